"""TrainingLogger: watches a training engine and writes the trajectory log, every rank its own shards.

It hooks two places and needs no change to the training loop: a forward pre-hook takes the samples' `index` field, the
loss normalisation and the random state of each pass; the engine reports its optimizer steps (`EngineShards.watch`), of
which the learning rate that is used, the gradient norm and the shards before and after are taken.

Long, because all that is known of a step meets in one class: hooks, the step's registration, and the ways to leave one out.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lmc_dist.data import IGNORED
from lmc_dist.errors import LmcError
from lmc_dist.runtime import agree, agreement
from lmc_dist.shards.checksum import bit_sum
from lmc_dist.shards.engines import EngineShards, engine_shards
from lmc_dist.shards.engines.passes import is_measuring
from lmc_dist.shards.engines.protocol import State
from lmc_dist.shards.engines.wrappers import accelerate_autocast
from lmc_dist.shards.fingerprint import model_config, model_fingerprint, parameter_table
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.module import get_rng_state
from lmc_dist.shards.precision import IEEE, matmul_precision
from lmc_dist.shards.relayout import relayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import BATCH_INPUTS, BLANK
from lmc_dist.trajectory.codec import COMPRESSIONS
from lmc_dist.trajectory.edits import LogEdit
from lmc_dist.trajectory.index import check_row_number, read_index
from lmc_dist.trajectory.passes import (
    Pass,
    batch_samples,
    check_autocast,
    clip_coefficient,
    first_leaf,
    gather_to_main,
    merge_passes,
    step_statistics,
)
from lmc_dist.trajectory.record import TIERS, LossNormalization, StepRecord, TrajectoryManifest
from lmc_dist.trajectory.resume import resume
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.trajectory.writer import LogWriter

STORED_DTYPES = ("float32", "bfloat16")
AUTOCAST_DTYPES = ("bfloat16", "float16")


@dataclass
class _Attached:
    """What belongs to one attached engine."""

    shards: EngineShards
    writer: LogWriter
    before: ShardedVector
    gradient: ShardedVector | None = None
    lrs: tuple[float, ...] = ()
    loss_scale: float = 1.0
    passes: list[Pass] = field(default_factory=list)
    undo: list[Any] = field(default_factory=list)
    state: State | None = None  # of the optimizer before a step that is taken back
    drift: int = 0  # of the masters' bits since the last step
    is_checked: bool = False  # the optimizer's state, once there is any


class TrainingLogger:
    """Records every optimizer step of a training engine (docs/engines.md). All ranks construct and use it together.

    Args:
        log_dir: New or empty directory, shared by all ranks.
        max_steps: Ring: tensors of the last `max_steps` steps are kept; None keeps all.
        mode: Storage tier: `replay` (ids, random state, snapshots), `update` (also u_s), `gradient` (also g_s) or
            `full` (g_s and θ_{s+1}, which holds u_s).
        save_interval: Steps between snapshots; None keeps the first and the last only.
        save_batch_data: Keep the tokens of every sample, once, so that unlearning needs no dataset.
        update_dtype: `float32` (the masters' own type, where they are float64) keeps every θ_s to the bit; `bfloat16`
            halves u_s, and what is rounded away is added to the next step's, so that θ_s is never off by more than one
            update's rounding.
        gradient_dtype: `float32`, or `bfloat16` rounded to nearest.
        compression: `none`, or `zstd` of the tensors' shuffled bytes.
        buffer_mb: Memory (MiB) of each rank for steps that wait to be written; training waits when it is full.
        resume: Continue the run whose log is in `log_dir`, from its last snapshot; begin it where there is none.
        dataset_fingerprint: Digest of the training data, compared before a later deletion.
        loss_normalization: What the loss of a step is (docs/method.md §1); checked at every step where it can be.
        max_grad_norm: What a torch training loop clips the global gradient norm to; None is no clipping, checked at
            every step. The Trainer's arguments and DeepSpeed's configuration say it themselves.
        autocast: What a torch training loop computes in by `torch.autocast`, `bfloat16` or `float16`; None is nothing,
            checked at every step. Where accelerate does it, it is found.
        run: Free-form JSON about the run, such as its configuration.
        keep_first: With a ring: keep the first snapshot, from which what has left the ring can still be replayed, and the
            edits that such a replay comes past.

    Raises:
        LmcError: Unknown tier or values out of range.
    """

    def __init__(
        self,
        log_dir: str | Path,
        max_steps: int | None = None,
        mode: str = "update",
        save_interval: int | None = 50,
        save_batch_data: bool = False,
        update_dtype: str = "float32",
        gradient_dtype: str = "float32",
        compression: str = "none",
        buffer_mb: float = 512,
        resume: bool = False,
        dataset_fingerprint: str | None = None,
        loss_normalization: LossNormalization = "global_token_mean",
        run: dict[str, Any] | None = None,
        max_grad_norm: float | None = None,
        autocast: str | None = None,
        keep_first: bool = False,
    ) -> None:
        choices = {
            "log storage": (mode, tuple(TIERS)),
            "update_dtype": (update_dtype, STORED_DTYPES),
            "gradient_dtype": (gradient_dtype, STORED_DTYPES),
            "compression": (compression, COMPRESSIONS),
        }
        if autocast is not None:
            choices["autocast"] = (autocast, AUTOCAST_DTYPES)
        for name, (value, known) in choices.items():
            if value not in known:
                raise LmcError(f"unknown {name} '{value}'; available: {', '.join(known)}")
        for name, value, kind in (
            ("update_dtype", update_dtype, "update"),
            ("gradient_dtype", gradient_dtype, "gradient"),
        ):
            if value != "float32" and kind not in TIERS[mode]:
                raise LmcError(f"{name}={value} has no effect: log storage '{mode}' keeps no {kind}s; leave it out")
        if max_grad_norm is not None and not max_grad_norm >= 0:
            raise LmcError(f"max_grad_norm must be ≥ 0 or null, got {max_grad_norm}")
        if not buffer_mb > 0:
            raise LmcError(f"buffer_mb must be above 0, got {buffer_mb}")
        for name, number in (("max_steps", max_steps), ("save_interval", save_interval)):
            if number is not None and number < 1:
                raise LmcError(f"{name} must be at least 1 or null, got {number}")
        if keep_first and max_steps is None:
            raise LmcError("keep_first has no effect without a ring (max_steps): leave it out")
        if max_steps is not None and save_interval is None:
            raise LmcError("a ring (max_steps) needs save_interval: what is left must start at a snapshot")
        self.log_dir = Path(log_dir)
        self.max_steps, self.mode, self.save_interval = max_steps, mode, save_interval
        self.save_batch_data, self.buffer_mb, self.resume = save_batch_data, buffer_mb, resume
        self.update_dtype, self.gradient_dtype, self.compression = update_dtype, gradient_dtype, compression
        self.dataset_fingerprint, self.run = dataset_fingerprint, run or {}
        self.loss_normalization = loss_normalization
        self.max_grad_norm, self.autocast, self.keep_first = max_grad_norm, autocast, keep_first
        self.epoch = 0.0
        self.step = 0
        self._attached: _Attached | None = None
        self._automatic = True
        self.boundaries: list[Callable[[int], None]] = []  # called with the next step, once a step is recorded
        self.is_void: Callable[[Sequence[Pass]], bool] = lambda passes: False  # asked before each step, on all ranks
        self._is_paused = False
        self.has_resumed = False
        self._sent: set[tuple[int, int]] = set()  # samples whose tokens are with rank 0 already

    def attach(
        self,
        model: Any,
        optimizer: Any = None,
        automatic: bool = True,
        scaler: Any = None,
        resume_at: int | None = None,
    ) -> None:
        """Starts logging: writes the manifest and θ_0, installs the hooks. Collective.

        With `resume` the engine's weights and optimizer state are set to those of the log's last snapshot, and `step`
        says where the run continues; the training loop skips the steps before it.

        Args:
            model: The engine: see `engine_shards`.
            optimizer: Its optimizer, wrapped or not; a DeepSpeed engine knows its own.
            automatic: Register a step after each `optimizer.step`; False leaves it to `register_step`.
            scaler: The loop's `torch.amp.GradScaler`; accelerate's optimizer knows its own.
            resume_at: With `resume`: the step at which the training loop goes on by itself; None takes the last snapshot.

        Raises:
            LmcError: Unsupported engine, log_dir not empty, already attached, working weights that are not the masters',
                no snapshot of `resume_at`, a model whose loss has auxiliary terms.
        """
        if self._attached is not None:
            raise LmcError("the logger is already attached to an engine")
        shards = engine_shards(model, optimizer, scaler)
        keeps_gradient = "gradient" in TIERS[self.mode]
        with agreement(shards.layout.group):
            check_loss(shards.module)
            shards.declare_clipping(self.max_grad_norm)
            autocast = self.autocast or accelerate_autocast(shards.module)
            if autocast is not None:
                shards.autocast = getattr(torch, autocast)
            manifest = self._manifest(shards)
        resumed = resume(self.log_dir, manifest, shards.layout, resume_at) if self.resume else None
        self.has_resumed = resumed is not None
        if resumed is not None:
            self.step = resumed.step
            shards.write(resumed.vectors.pop("theta"))
            shards.write_state(resumed.vectors, resumed.scalars)
        before = shards.read()
        try:
            shards.verify(before)
        except LmcError as error:
            raise LmcError(
                f"{error}: set them by shards = engine_shards(model, optimizer); shards.write(shards.read()) before training"
            ) from None
        start = before if resumed is None else relayout(resumed.followed, shards.layout)
        writer = LogWriter(
            self.log_dir, manifest, shards.layout, int(self.buffer_mb * 2**20), start, resumed, self.keep_first
        )
        attached = _Attached(shards, writer, before)
        self._attached, self._automatic = attached, automatic
        self._snapshot(attached, self.step)
        writer.finish()
        module = shards.module
        attached.undo = [
            module.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True).remove,
            module.register_forward_hook(self._after_forward, with_kwargs=True).remove,
            first_leaf(module).register_forward_pre_hook(self._inside_forward).remove,
            shards.watch(
                lambda: self._before_step(attached, keeps_gradient), lambda: self._after_step(attached), keeps_gradient
            ),
        ]

    @property
    def shards(self) -> EngineShards:
        """Of the attached engine."""
        return self._require_attached().shards

    def _manifest(self, shards: EngineShards) -> TrajectoryManifest:
        module, dtype = shards.module, str(shards.master_dtype).removeprefix("torch.")
        # ZeRO-3 regroups parameters into sub-groups; their order follows the client's groups, whose settings they share.
        settings = [
            {
                k: v
                for k, v in group.items()
                if k != "params" and isinstance(v, (int, float, str, bool, tuple, type(None)))
            }
            for group in shards.param_groups
        ]
        groups = shards.group_of
        settings_key = "deepspeed" if shards.name.startswith("deepspeed") else "engine"
        computed = {} if shards.autocast is None else {"autocast": str(shards.autocast).removeprefix("torch.")}
        if (precision := matmul_precision()) != IEEE:
            computed["matmul"] = precision
        attention = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if isinstance(attention, str):
            computed["attention"] = attention
        table = [{**row, "group": groups[row["name"]]} for row in parameter_table(module)]
        return TrajectoryManifest(
            model_config=model_config(module),
            model_fingerprint=model_fingerprint(module),
            parameters=table,
            optimizer={"class": shards.optimizer_class, "groups": settings} | decay_mode(shards.base),
            loss_normalization=self.loss_normalization,
            max_grad_norm=shards.max_grad_norm,
            dataset_fingerprint=self.dataset_fingerprint,
            world_size=shards.layout.world_size,
            engine=shards.name,
            storage=self.mode,
            save_interval=self.save_interval,
            max_steps=self.max_steps,
            partition=shards.layout.rule,
            dtype=dtype,
            update_dtype=dtype if self.update_dtype == "float32" else self.update_dtype,
            gradient_dtype=dtype if self.gradient_dtype == "float32" else self.gradient_dtype,
            compression=self.compression,
            save_batch_data=self.save_batch_data,
            run={settings_key: shards.settings} | computed | self.run,
            versions=package_versions(),
        )

    def _before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index = kwargs.pop("index", None)
        if self._is_watching(module):
            assert self._attached is not None
            if index is None and self._automatic:
                raise LmcError(
                    "no sample ids reach the model: every batch needs an `index` field with the dataset's ids "
                    "(with the HF Trainer also remove_unused_columns=False, or it is dropped)"
                )
            labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
            inputs = {name: kwargs[name] for name in BATCH_INPUTS if torch.is_tensor(kwargs.get(name))}
            ids = read_index(index, inputs)
            self._attached.passes.append(
                Pass(
                    sample_ids=[i for i in ids if i != BLANK],
                    num_targets=0 if labels is None else int((labels[:, 1:] != IGNORED).sum()),
                    num_items=None if items is None else float(items),
                    random_state=get_rng_state(self._device(kwargs)),
                    inputs=inputs,
                    is_local=self._attached.shards.is_local_pass(),
                    blanks=tuple(row for row, i in enumerate(ids) if i == BLANK),
                )
            )
        return args, kwargs

    def _is_watching(self, module: Any) -> bool:
        """Whether the pass that runs is training's. Local."""
        is_training = module.training and torch.is_grad_enabled() and not is_measuring()
        return self._attached is not None and is_training and not self._is_paused

    def _inside_forward(self, leaf: Any, args: tuple[Any, ...]) -> None:
        """In the first of the model's parts, where an autocast of the model's own forward is on as well."""
        attached = self._attached
        if attached is not None and attached.passes and self._is_watching(attached.shards.module):
            device = next((v.device.type for v in args if torch.is_tensor(v)), "cpu")
            if torch.is_autocast_enabled(device):
                attached.passes[-1].autocast = torch.get_autocast_dtype(device)

    @staticmethod
    def _device(kwargs: dict[str, Any]) -> torch.device:
        return next((v.device for v in kwargs.values() if torch.is_tensor(v)), torch.device("cpu"))

    def _after_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._attached is None or not self._attached.passes or not self._is_watching(module):
            return
        last = self._attached.passes[-1]
        last.drew_random = not torch.equal(last.random_state, get_rng_state(self._device(kwargs)))
        loss = getattr(output, "loss", None)
        if loss is not None:
            last.loss = loss.detach().clone()  # the Trainer multiplies it in place by the number of ranks
            if loss.requires_grad:  # what the loss is multiplied by on the way to the gradient
                loss.register_hook(lambda seed: setattr(last, "seed", seed.detach()))

    def _before_step(self, attached: _Attached, keeps_gradient: bool) -> None:
        if self._is_paused:
            return
        attached.drift = bit_sum(attached.shards.held()) - bit_sum([attached.before.flat])
        attached.lrs = rates(attached.shards)
        attached.loss_scale = attached.shards.loss_scale
        if keeps_gradient:
            attached.gradient = attached.shards.step_gradient()
        if self.is_void(attached.passes):
            attached.state = attached.shards.read_state()

    def _after_step(self, attached: _Attached) -> None:
        if self._is_paused:
            return
        if attached.state is not None:
            # The run without the data has no such step, and momentum and decay move weights without a gradient as well.
            # Taken back, and not left out: schedule, counters and random numbers go on as in every step.
            attached.shards.write(attached.before)
            attached.shards.write_state(*attached.state)
        if self._automatic:
            self._register(attached, self.step, attached.lrs, None, attached.shards.applied)

    def skip_step(self) -> None:
        """Records a step that does not happen: a reference run leaves it out, or the loop drops its gradient. Collective."""
        attached = self._require_attached()
        lrs = rates(attached.shards)
        if attached.passes:
            self._register(attached, self.step, lrs, None, applied=False)
            return
        self._record_idle(attached, StepRecord(self.step, self.step, (), lrs, 0.0, epoch=self.epoch, applied=False))

    def _record_idle(self, attached: _Attached, record: StepRecord) -> None:
        """Adds the record of a step that changed nothing. Collective."""
        attached.writer.store(self.step, attached.before, attached.before, None, False)
        reports = gather_to_main(attached.writer.report(), attached.shards.layout)
        with agreement(attached.shards.layout.group):
            if attached.shards.layout.rank == 0:
                attached.writer.commit(record, reports)
        self._finish_step(attached, self.step)

    def register_step(
        self, step_id: int, batch_id: int, eta: float, model: Any, batch_data: dict[str, Any] | None = None
    ) -> None:
        """Records the step the engine has just taken; for `attach(..., automatic=False)`. Collective.

        Args:
            step_id: Index of the step, counted from 0 without gaps.
            batch_id: The user's name of the batch, by which it can be forgotten.
            eta: Learning rate the step used (not the scheduler's next one).
            model: The attached engine.
            batch_data: {"sample_ids": [[ids of each forward pass of this rank], …]}; may be left out where the
                batches carry an `index` field.

        Raises:
            LmcError: Not attached, a gap in step ids, ids missing or of the wrong number.
        """
        attached = self._require_attached()
        if self._automatic:
            raise LmcError("steps are registered automatically; use attach(..., automatic=False) to do it by hand")
        if model is not attached.shards and attached.shards.module not in (model, getattr(model, "module", model)):
            raise LmcError("register_step got another model than the one the logger is attached to")
        if step_id != self.step:
            raise LmcError(f"step {step_id} does not follow step {self.step - 1}")
        with agreement(attached.shards.layout.group):
            if batch_data is not None:
                self._take_ids(attached.passes, batch_data)
        lrs = (float(eta),) * len(attached.shards.param_groups)
        self._register(attached, batch_id, lrs, step_id, attached.shards.applied)

    @staticmethod
    def _take_ids(passes: list[Pass], batch_data: dict[str, Any]) -> None:
        """The ids of each pass, as `register_step` was given them."""
        ids = batch_data.get("sample_ids")
        if ids is None or len(ids) != len(passes):
            raise LmcError(f"batch_data['sample_ids'] needs one list of ids for each of {len(passes)} passes")
        for seen, given in zip(passes, ids, strict=True):
            if given:  # else a filler
                check_row_number(given, seen.inputs)
            seen.sample_ids = [int(i) for i in given]

    def _register(
        self, attached: _Attached, batch_id: int, lrs: tuple[float, ...], step_id: int | None, applied: bool
    ) -> None:
        step = self.step if step_id is None else step_id
        shards, layout = attached.shards, attached.shards.layout
        after = shards.read()
        grad_norm = shards.grad_norm
        flags = (attached.writer.failed, attached.writer.snapshot_done)
        stats = step_statistics(attached.before, after, attached.passes, layout, flags, attached.drift)
        if any(failed for failed, _ in stats["flags"]):
            attached.writer.raise_error()
        if stats["drifted"]:
            raise LmcError(
                f"step {step}: the weights were changed outside the optimizer since the step before (clamped, averaged, loaded, "
                "or by a step that was not registered), which the log does not hold and a replay would not repeat: change a "
                "copy, or put the weights back before the next step"
            )
        # Without a gradient nothing happened, unless the optimizer carries momentum or counts its steps.
        applied = applied and attached.state is None and (grad_norm != 0 or stats["changed"] or shards.has_state)
        self._check(step, applied and grad_norm != 0, lrs, stats, layout)
        if applied and grad_norm is not None and not math.isfinite(grad_norm):
            raise LmcError(
                f"step {step}: the optimizer stepped with a gradient of norm {grad_norm}, so the weights are lost: skip such "
                "steps, by a torch.amp.GradScaler (scaler=), or by logger.skip_step() in place of optimizer.step()"
            )
        if applied and not attached.is_checked:  # at once, and not when the next snapshot is due
            with agreement(layout.group):
                shards.check_state()
            attached.is_checked = True
        attached.writer.store(step, attached.before, after, attached.gradient, applied)
        with agreement(layout.group):
            check_autocast(step, shards, attached.passes)
            wire = {
                "passes": [p.to_wire(attached.loss_scale) for p in attached.passes],
                "report": attached.writer.report(),
                "samples": self._new_samples(attached.passes),
            }
        wires = gather_to_main(wire, layout)
        error = None
        if layout.rank == 0:
            try:
                micros, denominator, loss = merge_passes([w["passes"] for w in wires], self.loss_normalization)
                record = StepRecord(
                    step=step,
                    batch_id=batch_id,
                    micro_batches=micros,
                    lr=lrs,
                    denominator=denominator,
                    epoch=self.epoch,
                    loss=loss,
                    grad_norm=grad_norm,
                    clip_coef=clip_coefficient(grad_norm, shards.max_grad_norm),
                    loss_scale=attached.loss_scale,
                    applied=applied,
                )
                samples = [sample for w in wires for sample in w["samples"]]
                attached.writer.commit(record, [w["report"] for w in wires], samples)
            except Exception as caught:
                error = caught
        agree(error, layout.group)
        attached.before, attached.gradient, attached.state = after, None, None
        attached.drift = 0
        attached.passes.clear()
        if all(done for _, done in stats["flags"]):
            attached.writer.finish_snapshot()
        self._finish_step(attached, step)

    def _new_samples(self, passes: list[Pass]) -> list[dict[str, Any]]:
        """The samples of the passes that this rank has not sent yet; the others are checked against those. Local."""
        if not self.save_batch_data:
            return []
        found = []
        for seen in passes:
            if not seen.sample_ids:  # a filler
                continue
            rows = batch_samples(seen.inputs)
            samples = [sample for row, sample in enumerate(rows) if row not in seen.blanks]
            if len(samples) != len(seen.sample_ids):
                raise LmcError("save_batch_data needs the id of every sample in the batch")
            for sample_id, sample in zip(seen.sample_ids, samples, strict=True):
                key = (sample_id, hash((tuple(sample["input_ids"]), tuple(sample["labels"]))))
                if key not in self._sent:
                    self._sent.add(key)
                    found.append({"id": sample_id, **sample})
        return found

    def _finish_step(self, attached: _Attached, step: int) -> None:
        self.step = step + 1
        for boundary in self.boundaries:
            boundary(self.step)
        if self.save_interval is not None and self.step % self.save_interval == 0:
            self._snapshot(attached, self.step)

    def _check(
        self,
        step: int,
        has_gradient: bool,
        lrs: tuple[float, ...],
        stats: dict[str, Any],
        layout: ShardLayout,
    ) -> None:
        """What is silently wrong elsewhere is an error here, the same on every rank."""
        if has_gradient and not stats["changed"] and any(lrs):
            raise LmcError(f"step {step}: the optimizer stepped with lr {lrs} but no weight changed")
        if layout.world_size > 1 and stats["same_ids"]:
            raise LmcError(
                f"step {step}: all {layout.world_size} ranks saw the same samples. The launcher's ranks are not the "
                "trainer's: with the HF Trainer on CPU start PartialState(backend='gloo') first and pass "
                "accelerator_config={'use_configured_state': True}"
            )

    def _snapshot(self, attached: _Attached, step: int) -> None:
        state, scalars = attached.shards.read_state()
        attached.writer.snapshot(step, {"theta": attached.before, **state}, scalars)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it what the engine does is not training: nothing of it is recorded. Local."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def flush(self) -> None:
        """Waits until every step so far can be read from the log. Collective."""
        self._require_attached().writer.finish()

    def edit(self, edit: LogEdit) -> None:
        """Records that the engine's weights and optimizer state have been corrected since the last step. Collective.

        To be called from a boundary, before the step's snapshot is taken; returns when it is on disk.

        Raises:
            LmcError: Not attached, another step than the present one, or the step has a snapshot already.
        """
        attached = self._require_attached()
        if edit.step != self.step:
            raise LmcError(f"the edit is of step {edit.step}, the run is at step {self.step}")
        attached.before = attached.shards.read()
        state, scalars = attached.shards.read_state()
        attached.writer.edit(self.step, {"theta": attached.before, **state}, scalars, edit.to_json())

    def _require_attached(self) -> _Attached:
        if self._attached is None:
            raise LmcError("the logger is not attached: call attach(engine) before the first step, or θ_0 is lost")
        return self._attached

    def save_to_disk(self) -> Path:
        """Writes the snapshot of the present weights and waits until all is on disk; returns log_dir. Collective."""
        attached = self._require_attached()
        self._snapshot(attached, self.step)
        attached.writer.finish()
        return self.log_dir

    def load_from_disk(self) -> TrajectoryLog:
        """The log as far as it is on disk (all of it after `save_to_disk`), opened for reading."""
        return TrajectoryLog(self.log_dir)

    def close(self) -> None:
        """Final snapshot, waits until all is on disk, removes the hooks. Collective; does nothing when not attached."""
        if self._attached is None:
            return
        self.save_to_disk()
        self.detach()

    def has_moved(self) -> bool:
        """Whether the engine's weights are others than those the log ends with. Collective."""
        attached = self._require_attached()
        layout = attached.shards.layout
        return step_statistics(attached.before, attached.shards.read(), [], layout)["changed"]

    def detach(self) -> None:
        """Removes the hooks and closes the files without a final snapshot, as after an error. Local."""
        if self._attached is None:
            return
        for undo in reversed(self._attached.undo):
            undo()
        self._attached.writer.close()
        self._attached = None


def check_loss(module: torch.nn.Module) -> None:
    """Checks that the model's loss is its token cross entropy alone. Local.

    Raises:
        LmcError: It adds the auxiliary loss of experts.
    """
    config: Any = getattr(module, "config", None)
    parts = [config, config.get_text_config() if hasattr(config, "get_text_config") else None]
    if any(getattr(part, "output_router_logits", False) for part in parts):
        raise LmcError(
            "the model's config has output_router_logits=True, which adds the experts' auxiliary loss to the token cross "
            "entropy: only the latter can be logged, set model.config.output_router_logits = False before training"
        )


def rates(shards: EngineShards) -> tuple[float, ...]:
    """Learning rate of each optimizer group. Local."""
    return tuple(float(group["lr"]) for group in shards.param_groups)


def decay_mode(optimizer: Any) -> dict[str, Any]:
    """Which weight decay DeepSpeed's Adam does: an attribute of the optimizer, in no group's settings."""
    mode = getattr(optimizer, "adam_w_mode", None)
    return {} if mode is None else {"adam_w_mode": bool(mode)}


def package_versions() -> dict[str, str]:
    """Versions that a run can depend on."""
    found = {"python": platform.python_version()}
    for name in ("lmc_dist", "torch", "deepspeed", "transformers", "accelerate", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
