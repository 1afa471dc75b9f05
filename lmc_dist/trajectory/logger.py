"""TrainingLogger: watches a training engine and writes the trajectory log, every rank its own shards.

It hooks two places and needs no change to the training loop: a forward pre-hook takes the samples' `index` field, the
loss normalisation and the random state of each pass; a wrapper of the optimizer's `step` takes the learning rate that
is used, the gradient norm and the shards before and after.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lmc_dist.errors import LmcError
from lmc_dist.runtime import agree, agreement
from lmc_dist.shards.checksum import checksum
from lmc_dist.shards.engines import ZeRO3Shards, engine_shards
from lmc_dist.shards.fingerprint import model_config, model_fingerprint, parameter_table
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.module import get_rng_state
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.codec import COMPRESSIONS
from lmc_dist.trajectory.passes import (
    BATCH_INPUTS,
    Pass,
    batch_samples,
    clip_coefficient,
    gather_to_main,
    merge_passes,
    step_statistics,
)
from lmc_dist.trajectory.record import TIERS, LossNormalization, StepRecord, TrajectoryManifest
from lmc_dist.trajectory.resume import resume
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.trajectory.writer import LogWriter

STORED_DTYPES = ("float32", "bfloat16")
IGNORED = -100


@dataclass
class _Attached:
    """What belongs to one attached engine."""

    shards: ZeRO3Shards
    writer: LogWriter
    before: ShardedVector
    gradient: ShardedVector | None = None
    passes: list[Pass] = field(default_factory=list)
    undo: list[Any] = field(default_factory=list)


class TrainingLogger:
    """Records every optimizer step of a DeepSpeed ZeRO-3 engine. All ranks construct and use it together.

    Args:
        log_dir: New or empty directory, shared by all ranks.
        max_steps: Ring: tensors of the last `max_steps` steps are kept; None keeps all.
        mode: Storage tier: `replay` (ids, random state, snapshots), `update` (also u_s), `gradient` (also g_s) or
            `full` (g_s and θ_{s+1}, which holds u_s).
        save_interval: Steps between snapshots; None keeps the first and the last only.
        save_batch_data: Keep the tokens of every sample, once, so that unlearning needs no dataset.
        update_dtype: `float32` keeps every θ_s to the bit; `bfloat16` halves u_s, and what is rounded away is added to
            the next step's, so that θ_s is never off by more than one update's rounding.
        gradient_dtype: `float32`, or `bfloat16` rounded to nearest.
        compression: `none`, or `zstd` of the tensors' shuffled bytes.
        buffer_mb: Memory (MiB) of each rank for steps that wait to be written; training waits when it is full.
        resume: Continue the run whose log is in `log_dir`, from its last snapshot; begin it where there is none.
        dataset_fingerprint: Digest of the training data, compared before a later deletion.
        loss_normalization: What the loss of a step is (docs/method.md §1); checked at every step where it can be.
        run: Free-form JSON about the run, such as its configuration.

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
    ) -> None:
        choices = {
            "log storage": (mode, tuple(TIERS)),
            "update_dtype": (update_dtype, STORED_DTYPES),
            "gradient_dtype": (gradient_dtype, STORED_DTYPES),
            "compression": (compression, COMPRESSIONS),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise LmcError(f"unknown {name} '{value}'; available: {', '.join(known)}")
        for name, value, kind in (
            ("update_dtype", update_dtype, "update"),
            ("gradient_dtype", gradient_dtype, "gradient"),
        ):
            if value != "float32" and kind not in TIERS[mode]:
                raise LmcError(f"{name}={value} has no effect: log storage '{mode}' keeps no {kind}s; leave it out")
        if not buffer_mb > 0:
            raise LmcError(f"buffer_mb must be above 0, got {buffer_mb}")
        for name, number in (("max_steps", max_steps), ("save_interval", save_interval)):
            if number is not None and number < 1:
                raise LmcError(f"{name} must be at least 1 or null, got {number}")
        if max_steps is not None and save_interval is None:
            raise LmcError("a ring (max_steps) needs save_interval: what is left must start at a snapshot")
        self.log_dir = Path(log_dir)
        self.max_steps, self.mode, self.save_interval = max_steps, mode, save_interval
        self.save_batch_data, self.buffer_mb, self.resume = save_batch_data, buffer_mb, resume
        self.update_dtype, self.gradient_dtype, self.compression = update_dtype, gradient_dtype, compression
        self.dataset_fingerprint, self.run = dataset_fingerprint, run or {}
        self.loss_normalization = loss_normalization
        self.epoch = 0.0
        self.step = 0
        self._attached: _Attached | None = None
        self._automatic = True
        self._sent: set[tuple[int, int]] = set()  # samples whose tokens are with rank 0 already

    def attach(self, model: Any, optimizer: Any = None, automatic: bool = True) -> None:
        """Starts logging: writes the manifest and θ_0, installs the hooks. Collective.

        With `resume` the engine's weights and optimizer state are set to those of the log's last snapshot, and `step`
        says where the run continues; the training loop skips the steps before it.

        Args:
            model: The DeepSpeed engine, or its module with `optimizer` given.
            optimizer: The engine's optimizer, wrapped or not.
            automatic: Register a step after each `optimizer.step`; False leaves it to `register_step`.

        Raises:
            LmcError: Unsupported engine, log_dir not empty, already attached.
        """
        if self._attached is not None:
            raise LmcError("the logger is already attached to an engine")
        shards = engine_shards(model, optimizer)
        if not isinstance(shards, ZeRO3Shards):
            raise LmcError(f"training under {shards.name} cannot be logged yet, only DeepSpeed ZeRO-3")
        if odd := {str(p.dtype) for p in shards.parameters.values()} - {"torch.float32"}:
            raise LmcError(f"training in {', '.join(sorted(odd))} cannot be logged yet, only float32")
        manifest = self._manifest(shards)
        resumed = resume(self.log_dir, manifest, shards.layout) if self.resume else None
        if resumed is not None:
            self.step = resumed.step
            shards.write(resumed.vectors.pop("theta"))
            shards.write_state(resumed.vectors, resumed.scalars)
        before = shards.read()
        start = before if resumed is None else resumed.followed
        writer = LogWriter(self.log_dir, manifest, shards.layout, int(self.buffer_mb * 2**20), start, resumed)
        attached = _Attached(shards, writer, before)
        self._attached, self._automatic = attached, automatic
        self._snapshot(attached, self.step)
        writer.finish()
        module = shards.module
        attached.undo.append(
            module.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True).remove
        )
        attached.undo.append(module.register_forward_hook(self._after_forward, with_kwargs=True).remove)
        if automatic or "gradient" in TIERS[self.mode]:
            self._wrap_step(attached)

    def _manifest(self, shards: ZeRO3Shards) -> TrajectoryManifest:
        module, optimizer = shards.module, shards.optimizer.optimizer
        # ZeRO-3 regroups parameters into sub-groups; their order follows the client's groups, whose settings they share.
        settings = [
            {
                k: v
                for k, v in group.items()
                if k != "params" and isinstance(v, (int, float, str, bool, tuple, type(None)))
            }
            for group in optimizer.param_groups
        ]
        groups = parameter_groups(shards)
        table = [{**row, "group": groups[row["name"]]} for row in parameter_table(module)]
        return TrajectoryManifest(
            model_config=model_config(module),
            model_fingerprint=model_fingerprint(module),
            parameters=table,
            optimizer={"class": type(optimizer).__name__, "groups": settings},
            loss_normalization=self.loss_normalization,
            max_grad_norm=shards.max_grad_norm,
            dataset_fingerprint=self.dataset_fingerprint,
            world_size=shards.layout.world_size,
            engine=shards.name,
            storage=self.mode,
            save_interval=self.save_interval,
            max_steps=self.max_steps,
            update_dtype=self.update_dtype,
            gradient_dtype=self.gradient_dtype,
            compression=self.compression,
            save_batch_data=self.save_batch_data,
            run=self.run,
            versions=package_versions(),
        )

    def _before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index = kwargs.pop("index", None)
        if self._attached is not None and module.training and torch.is_grad_enabled():
            if index is None and self._automatic:
                raise LmcError(
                    "no sample ids reach the model: every batch needs an `index` field with the dataset's ids "
                    "(with the HF Trainer also remove_unused_columns=False, or it is dropped)"
                )
            labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
            self._attached.passes.append(
                Pass(
                    sample_ids=[] if index is None else [int(i) for i in index],
                    num_targets=0 if labels is None else int((labels[:, 1:] != IGNORED).sum()),
                    num_items=None if items is None else float(items),
                    random_state=get_rng_state(self._device(kwargs)),
                    inputs={name: kwargs[name] for name in BATCH_INPUTS if torch.is_tensor(kwargs.get(name))},
                )
            )
        return args, kwargs

    @staticmethod
    def _device(kwargs: dict[str, Any]) -> torch.device:
        return next((v.device for v in kwargs.values() if torch.is_tensor(v)), torch.device("cpu"))

    def _after_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._attached is None or not self._attached.passes or not (module.training and torch.is_grad_enabled()):
            return
        last = self._attached.passes[-1]
        last.drew_random = not torch.equal(last.random_state, get_rng_state(self._device(kwargs)))
        loss = getattr(output, "loss", None)
        if loss is not None:
            last.loss = loss.detach()
            if loss.requires_grad:  # what the loss is multiplied by on the way to the gradient
                loss.register_hook(lambda seed: setattr(last, "seed", seed.detach()))

    def _wrap_step(self, attached: _Attached) -> None:
        optimizer = attached.shards.optimizer
        original = optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            lrs = tuple(float(group["lr"]) for group in optimizer.optimizer.param_groups)
            if "gradient" in TIERS[self.mode]:
                attached.gradient = read_gradient(attached.shards)
            result = original(*args, **kwargs)
            if self._automatic:
                self._register(attached, self.step, lrs, None)
            return result

        optimizer.step = step
        attached.undo.append(lambda: setattr(optimizer, "step", original))

    def skip_step(self) -> None:
        """Records a step that does not happen: a reference run leaves it out. Collective."""
        attached = self._require_attached()
        total = checksum(attached.before)
        lrs = tuple(float(group["lr"]) for group in attached.shards.optimizer.optimizer.param_groups)
        record = StepRecord(self.step, self.step, (), lrs, 0.0, epoch=self.epoch, applied=False, checksum=total)
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
        module = getattr(model, "module", model)
        if module is not attached.shards.module and model is not attached.shards.module:
            raise LmcError("register_step got another model than the one the logger is attached to")
        if step_id != self.step:
            raise LmcError(f"step {step_id} does not follow step {self.step - 1}")
        with agreement(attached.shards.layout.group):
            if batch_data is not None:
                self._take_ids(attached.passes, batch_data)
        groups = len(attached.shards.optimizer.optimizer.param_groups)
        self._register(attached, batch_id, (float(eta),) * groups, step_id)

    @staticmethod
    def _take_ids(passes: list[Pass], batch_data: dict[str, Any]) -> None:
        """The ids of each pass, as `register_step` was given them."""
        ids = batch_data.get("sample_ids")
        if ids is None or len(ids) != len(passes):
            raise LmcError(f"batch_data['sample_ids'] needs one list of ids for each of {len(passes)} passes")
        for seen, given in zip(passes, ids, strict=True):
            seen.sample_ids = [int(i) for i in given]

    def _register(self, attached: _Attached, batch_id: int, lrs: tuple[float, ...], step_id: int | None) -> None:
        step = self.step if step_id is None else step_id
        shards, layout = attached.shards, attached.shards.layout
        after = shards.read()
        grad_norm = shards.grad_norm
        update = after - attached.before
        flags = (attached.writer.failed, attached.writer.snapshot_done)
        total, stats = step_statistics(update, after, attached.passes, layout, flags)
        if any(failed for failed, _ in stats["flags"]):
            attached.writer.raise_error()
        u_norm = stats["u_square"] ** 0.5
        # Without a gradient nothing happened, unless the optimizer carries momentum or counts its steps.
        applied = shards.applied and (grad_norm != 0 or u_norm > 0 or shards.has_state)
        self._check(step, applied and grad_norm != 0, u_norm, lrs, stats, layout)
        attached.writer.store(step, attached.before, after, attached.gradient, applied)
        with agreement(layout.group):
            wire = {
                "passes": [p.to_wire() for p in attached.passes],
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
                    applied=applied,
                    u_norm=u_norm,
                    checksum=total,
                )
                samples = [sample for w in wires for sample in w["samples"]]
                attached.writer.commit(record, [w["report"] for w in wires], samples)
            except Exception as caught:
                error = caught
        agree(error, layout.group)
        attached.before, attached.gradient = after, None
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
            samples = batch_samples(seen.inputs)
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
        if self.save_interval is not None and self.step % self.save_interval == 0:
            self._snapshot(attached, self.step)

    def _check(
        self,
        step: int,
        has_gradient: bool,
        u_norm: float,
        lrs: tuple[float, ...],
        stats: dict[str, Any],
        layout: ShardLayout,
    ) -> None:
        """What is silently wrong elsewhere is an error here, the same on every rank."""
        if has_gradient and u_norm == 0 and any(lrs):
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

    def detach(self) -> None:
        """Removes the hooks and closes the files without a final snapshot, as after an error. Local."""
        if self._attached is None:
            return
        for undo in reversed(self._attached.undo):
            undo()
        self._attached.writer.close()
        self._attached = None


def parameter_groups(shards: ZeRO3Shards) -> dict[str, int]:
    """Parameter name → index of the optimizer group it belongs to."""
    o = shards.optimizer
    groups = {}
    for name, parameter in shards.parameters.items():
        sub_group = o.grad_position[o.get_param_id(parameter)][0]
        groups[name] = int(o.sub_group_to_group_id[sub_group])
    return groups


def read_gradient(shards: ZeRO3Shards) -> ShardedVector:
    """g_s, between the last backward pass and the optimizer's step: reduced over ranks, unscaled, unclipped. Local."""
    o = shards.optimizer
    pieces = {}
    for name, parameter in shards.parameters.items():
        gradient = o.get_local_fp32_grad_for_param(parameter).view(-1)[: shards.layout.slots[name].local_numel]
        pieces[name] = gradient.float().div(float(o.loss_scale)).cpu()
    return ShardedVector.from_shards(shards.layout, pieces)


def package_versions() -> dict[str, str]:
    """Versions that a run can depend on."""
    found = {"python": platform.python_version()}
    for name in ("lmc_dist", "torch", "deepspeed", "transformers", "accelerate", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
