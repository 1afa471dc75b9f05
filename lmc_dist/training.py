"""Fine-tuning under an engine with a trajectory log: the run that is unlearned from, and its reference.

With a request in the configuration the same loop trains the counterfactual: forgotten samples leave empty rows in
their places of the batches, so that order and random numbers are those of the logged run.

Long, because a run is one thing here: what it is made of, its loop, and the checks that come before it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lmc_dist.audit.hidden import hidden
from lmc_dist.config import Config, ModelConfig, TrainConfig
from lmc_dist.data import (
    SampleDataset,
    collate,
    epoch_order,
    load_dataset,
    load_rows,
    read_ids,
    split_batch,
    train_tokenizer,
)
from lmc_dist.errors import LmcError, first_line
from lmc_dist.export import export_model
from lmc_dist.online.ledger import asked_before
from lmc_dist.online.service import OnlineUnlearning, open_books
from lmc_dist.online.settings import check_settings
from lmc_dist.runtime import Runtime, agreement, check_replaceable, promoted, remove_folder
from lmc_dist.shards.engines import engine_shards
from lmc_dist.shards.engines.build import build_engine as build_any_engine
from lmc_dist.shards.frozen import read_frozen
from lmc_dist.shards.module import attention_refused, build_skeleton
from lmc_dist.shards.pretrained import CheckpointWeights, checkpoint_folder
from lmc_dist.shards.unloaded import Unloaded
from lmc_dist.stopping import stop_asked, stopped
from lmc_dist.trajectory.batches import DatasetBatches, blank_rows
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.edits import union
from lmc_dist.trajectory.files import MANIFEST_FILE, write_json
from lmc_dist.trajectory.lock import require_free
from lmc_dist.trajectory.logger import TrainingLogger
from lmc_dist.trajectory.manifest import read_manifest
from lmc_dist.trajectory.rewritten import KEY, log_rewritings, resumed_request, rewritings
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.unlearn.request import make_request

logger = logging.getLogger("lmc_dist")


@dataclass(frozen=True)
class Schedule:
    """The order of training: which samples step s sees."""

    ids: list[int]
    batch_size: int
    epochs: int
    max_steps: int | None
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.ids) // self.batch_size)

    @property
    def num_steps(self) -> int:
        total = self.steps_per_epoch * self.epochs
        return total if self.max_steps is None else min(total, self.max_steps)

    def __iter__(self) -> Iterator[tuple[int, float, list[int]]]:
        """(step, epoch, sample ids of the global batch); the last batch of an epoch may be short."""
        for step in range(self.num_steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            if position == 0:
                order = epoch_order(self.ids, self.seed, epoch)
            start = position * self.batch_size
            yield step, epoch + start / len(self.ids), order[start : start + self.batch_size]


def build_tokenizer(config: Config) -> Any:
    """The checkpoint's tokenizer, or one trained on the data; the same on every rank and in every run."""
    if config.model.path is not None:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(config.model.path)
        except (OSError, ValueError) as error:
            raise LmcError(f"no tokenizer in model.path '{config.model.path}': {first_line(error)}") from None
    rows = load_rows(config.data)
    texts = (config.data.prompt.replace("{question}", row["question"]) + row["answer"] for row in rows)
    return train_tokenizer(texts, config.model.vocab_size)


def build_dataset(config: Config) -> tuple[SampleDataset, Any]:
    """(dataset, tokenizer)."""
    tokenizer = build_tokenizer(config)
    if config.data.source == "log":
        return TrajectoryLog(config.log_dir).samples(), tokenizer
    return load_dataset(config.data, tokenizer), tokenizer


def build_config(config: ModelConfig, tokenizer: Any) -> Any:
    """The Hugging Face config of the model."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if config.path is not None:
        try:
            model_config = AutoConfig.from_pretrained(config.path)
        except (OSError, ValueError) as error:
            raise LmcError(f"no model in model.path '{config.path}': {first_line(error)}") from None
    elif config.config is not None:
        values = dict(config.config)
        kind = values.pop("model_type", None)
        if kind not in CONFIG_MAPPING:
            raise LmcError(f"model.config needs a model_type known to transformers, got {kind!r}")
        ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model_config = CONFIG_MAPPING[kind](**{"vocab_size": len(tokenizer), **ids, **values})
    else:
        raise LmcError("say which model: model.path (a checkpoint) or model.config (a fresh model)")
    if config.dropout is not None:
        names = [name for name in DROPOUT_NAMES if hasattr(model_config, name)]
        if not names:
            raise LmcError(f"model.dropout: a {model_config.model_type} config has no dropout setting")
        for name in names:
            setattr(model_config, name, config.dropout)
    model_config.use_cache = False
    return model_config


DROPOUT_NAMES = ("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "dropout")


def build_model(config: ModelConfig, model_config: Any, seed: int) -> torch.nn.Module:
    """The model before training, whole and in float32: pretrained weights, or random ones from the seed. Local."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = {"attn_implementation": config.attention, "dtype": torch.float32}
    with attention_refused():
        if config.path is not None:
            model = AutoModelForCausalLM.from_pretrained(config.path, config=model_config, **settings)
        else:
            model = AutoModelForCausalLM.from_config(model_config, **settings)
    freeze(model, config.trainable)
    return model


def open_model(config: ModelConfig, model_config: Any, seed: int) -> torch.nn.Module | Unloaded:
    """As `build_model`, the weights left in the files of a checkpoint whose names are the module's. Local.

    Random weights are made whole, and so are those of a checkpoint that transformers converts as it reads it.
    """
    if config.path is None:
        return build_model(config, model_config, seed)
    skeleton = build_skeleton(model_config, "cpu", config.attention)
    weights = CheckpointWeights(checkpoint_folder(config.path), skeleton)
    if weights.why_not:
        logger.info("every rank reads all of %s: %s", config.path, weights.why_not)
        return build_model(config, model_config, seed)
    generate_as_published(skeleton, config)
    freeze(skeleton, config.trainable)
    return Unloaded(skeleton, weights)


def generate_as_published(module: torch.nn.Module, config: ModelConfig) -> None:
    """Gives a module the settings of generation that its checkpoint has, to be exported with it. Local."""
    from transformers import GenerationConfig

    if config.path is not None:
        with suppress(OSError):  # it has none
            module.generation_config = GenerationConfig.from_pretrained(config.path)


def freeze(model: torch.nn.Module, trainable: str | None) -> None:
    """Freezes the parameters whose names the regular expression does not find; None freezes nothing.

    Raises:
        LmcError: Nothing is left to train, or not a regular expression.
    """
    if trainable is None:
        return
    try:
        pattern = re.compile(trainable)
    except re.error as error:
        raise LmcError(f"model.trainable '{trainable}' is no regular expression: {error}") from None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(pattern.search(name) is not None)
    if not any(p.requires_grad for p in model.parameters()):
        names = [name for name, _ in model.named_parameters()]
        raise LmcError(f"model.trainable '{trainable}' finds no parameter; there are {', '.join(names[:3])}, …")


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """The engine's configuration: the given file or plain ZeRO-3, with batch sizes and clipping of `config`."""
    base: dict[str, Any] = {"zero_optimization": {"stage": 3}, "steps_per_print": 1 << 30}
    if config.deepspeed is not None:
        try:
            base |= json.loads(Path(config.deepspeed).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise LmcError(f"train.deepspeed '{config.deepspeed}': {error}") from None
    if "optimizer" in base or "scheduler" in base:
        raise LmcError("train.deepspeed must not name an optimizer or scheduler: they come from the train settings")
    return base | {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": micro_steps(config, world_size),
        "gradient_clipping": config.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def micro_steps(config: TrainConfig, world_size: int) -> int:
    """Forward passes of each rank in one step."""
    return -(-config.batch_size // (config.micro_batch_size * world_size))


def engine_name(config: TrainConfig, world_size: int) -> str:
    """The configured engine by the name under which it is made: `hsdp-R` for FSDP2 with replicas. Pure.

    Raises:
        LmcError: The replicas do not divide the ranks.
    """
    if config.replicas == 1:
        return config.engine
    if world_size % config.replicas:
        raise LmcError(
            f"train.replicas={config.replicas} does not divide {world_size} ranks: start a multiple of {config.replicas}, or "
            "set another number"
        )
    return f"hsdp-{config.replicas}"


def build_engine(model: torch.nn.Module | Unloaded, config: TrainConfig, world_size: int) -> Any:
    """The configured engine with torch's own optimizer: DeepSpeed's, or the `EngineShards` of another. Collective."""
    settings = deepspeed_config(config, world_size) if config.engine == "deepspeed" else {}
    name = engine_name(config, world_size)
    engine = build_any_engine(name, model, lambda module: build_optimizer(module, config), settings)
    engine_shards(engine).declare_clipping(config.max_grad_norm)
    return engine


def build_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD or AdamW; vectors (norms, biases) are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay}]
    if vectors := [p for p in parameters if p.dim() <= 1]:
        groups.append({"params": vectors, "weight_decay": 0.0})
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def pass_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """Seed of the random numbers of one forward pass: a function of its place, not of what ran before."""
    text = f"{seed}/{step}/{micro_step}/{rank}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def read_request(config: Config, dataset: SampleDataset, is_joint: bool = False) -> Counterfactual | None:
    """The request of the configuration, or None where it has none.

    Args:
        config: Its section `forget`.
        dataset: Whose splits may be named.
        is_joint: Batches may be given beside samples: the log was rewritten for both, one after the other.

    Raises:
        LmcError: More than one kind of target, an unknown split, bad ids.
    """
    forget = config.forget
    given = [name for name in ("samples", "split", "batches") if getattr(forget, name) is not None]
    if not given:
        return None
    if is_joint and len(given) == 2 and forget.batches is not None:
        parts = (replace(forget, batches=None), replace(forget, samples=None, split=None, counterfactual=None))
        one, other = (read_request(replace(config, forget=part), dataset) for part in parts)
        assert one is not None and other is not None
        return union(one, other)
    if len(given) > 1:
        raise LmcError(f"give one of forget.samples, forget.split and forget.batches, not {' and '.join(given)}")
    kind = forget.counterfactual
    if forget.batches is not None:
        return make_request(batch_ids=read_ids(str(forget.batches)), kind=kind)
    if forget.samples is not None:
        return make_request(sample_ids=read_ids(str(forget.samples)), kind=kind)
    if forget.split not in dataset.splits:
        raise LmcError(f"unknown split '{forget.split}'; the data has {', '.join(sorted(dataset.splits)) or 'none'}")
    return make_request(sample_ids=dataset.splits[forget.split], kind=kind)


class Trainer:
    """The training loop of one run, on every rank."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.online: OnlineUnlearning | None = None
        with agreement():
            check_train_config(config)
            engine_name(config.train, runtime.world_size)
            check_targets(config)
            self.dataset, self.tokenizer = build_dataset(config)
            train = config.train
            self.schedule = Schedule(self.dataset.ids, train.batch_size, train.epochs, train.max_steps, train.seed)
            log_dir = Path(config.log_dir)
            self.rewritten = log_rewritings(log_dir) if config.resume else []
            self.request = read_request(config, self.dataset, is_joint=bool(self.rewritten))
            if self.rewritten:
                steps = range(self.schedule.num_steps)
                self.request = resumed_request(log_dir, self.request, self.dataset.ids, steps)
            if self.request is not None and self.request.kind == "renormalize" and not self._kept(self.dataset.ids):
                raise LmcError("all samples are forgotten: nothing is left to train on")
            self.micro_steps = micro_steps(train, runtime.world_size)
            self.model_config = build_config(config.model, self.tokenizer)
            model = open_model(config.model, self.model_config, train.seed)
            if config.online.enabled:  # before an earlier run is removed
                check_settings(config.online)
                if runtime.is_main:
                    open_books(config.log_dir, config.online, is_new=not config.resume)
        self.engine = build_engine(model, config.train, runtime.world_size)
        self.shards = engine_shards(self.engine)
        from transformers import get_scheduler

        with agreement():
            self.scheduler = get_scheduler(
                train.schedule, self.shards.base, train.warmup_steps, self.schedule.num_steps
            )
        self.logger = TrainingLogger(
            config.log_dir,
            max_steps=config.log.max_steps,
            mode=config.log.storage,
            save_interval=config.log.save_interval,
            save_batch_data=config.log.save_batch_data,
            update_dtype=config.log.update_dtype,
            gradient_dtype=config.log.gradient_dtype,
            compression=config.log.compression,
            buffer_mb=config.log.buffer_mb,
            resume=config.resume,
            dataset_fingerprint=None if self.rewritten else self.dataset.fingerprint,
            loss_normalization="given" if self.request and self.request.kind == "zero" else "global_token_mean",
            run={**self._logged_config(), **self._engine_settings(), "threads": torch.get_num_threads()},
            max_grad_norm=train.max_grad_norm,
            keep_first=config.log.keep_first,
        )

    def _logged_config(self) -> dict[str, Any]:
        """The settings as the manifest has them: of a rewritten log without what names the forgotten data."""
        values = asdict(self.config)
        if not self.rewritten:
            return {"config": values}
        return {"config": {**values, "forget": hidden(values["forget"], KEY, True)}, KEY: self.rewritten}

    def _engine_settings(self) -> dict[str, Any]:
        """DeepSpeed's whole configuration; the settings of other engines the logger finds itself."""
        train = self.config.train
        return {"deepspeed": deepspeed_config(train, self.runtime.world_size)} if train.engine == "deepspeed" else {}

    def _kept(self, ids: list[int]) -> list[int]:
        forgotten = self.request.sample_ids if self.request else frozenset()
        return [i for i in ids if i not in forgotten and not (self.online and self.online.is_forgotten(i))]

    def run(self) -> dict[str, Any]:
        """Trains to the end; returns a summary, equal on all ranks."""
        from tqdm import tqdm

        self.shards.module.train()
        if not self.config.resume:
            remove_folder(Path(self.config.log_dir))  # an earlier run's, now that all else is known to be well
        self.logger.attach(self.engine)
        started, losses = time.perf_counter(), []
        first = self.logger.step
        if first and self.runtime.is_main:
            logger.info("resuming at step %d of %d", first, self.schedule.num_steps)
        bar = tqdm(self.schedule, total=self.schedule.num_steps, desc="train", disable=not self.runtime.is_main)
        try:
            if self.config.online.enabled:
                batches = DatasetBatches(self.dataset, self.runtime.device)
                self.online = OnlineUnlearning(self.logger, batches, self.config.online, self.dataset.ids)
            if first:
                self.shards.warm_up(self._inputs(self.dataset.ids[:1], used=[]))
            for step, epoch, ids in bar:
                if step >= first:
                    self.logger.epoch = epoch
                    loss = self._step(step, ids)
                    if loss is not None:
                        losses.append(loss)
                        bar.set_postfix(loss=f"{loss:.4f}")
                    self._stop_if_asked(step + 1)
                elif self.online is not None:
                    self.online.relearned(step, ids)
                self.scheduler.step()
        except BaseException:
            self.logger.detach()
            raise
        self.logger.close()
        seconds = time.perf_counter() - started
        if self.config.model_dir is not None:
            shards = self.shards
            dtypes = dict.fromkeys(shards.layout.slots, torch.float32)
            with promoted(Path(self.config.model_dir)) as part:
                frozen = read_frozen(self.engine.module, shards.layout)
                export_model(part, shards.read(), dtypes, self.engine.module, self.tokenizer, frozen)
        return {
            "steps": len(losses),
            "samples": len(self.dataset),
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "seconds": seconds,
            "world_size": self.runtime.world_size,
            "log_dir": str(self.config.log_dir),
            "online": None if self.online is None else self.online.summary(),
        }

    def _stop_if_asked(self, done: int) -> None:
        """Leaves a snapshot after which the run can go on, and ends it, where some rank was asked to. Collective."""
        reason = stop_asked()
        if reason is None or done == self.schedule.num_steps:
            return
        self.logger.save_to_disk()
        what = f"training stopped after step {done} of {self.schedule.num_steps}"
        raise stopped(f"{what} (the same command with --resume true goes on)", reason)

    def _step(self, step: int, ids: list[int]) -> float | None:
        """One optimizer step; returns the loss of the global batch, None for a step that does not happen."""
        kind = self.request.kind if self.request else None
        if self.online is not None:
            ids = ids + self.online.relearned(step, ids)
            kind = "renormalize" if self.online.empties(ids) else kind
        counted = self._kept(ids) if kind == "renormalize" else ids
        num_items = sum(self.dataset.num_targets(i) for i in counted)
        if num_items == 0 or (self.request is not None and step in self.request.batch_ids):
            self.logger.skip_step()
            return None
        chunks = split_batch(ids, self.runtime.world_size, self.micro_steps)
        total = torch.zeros((), device=self.runtime.device)
        for m in range(self.micro_steps):
            mine = chunks[m][self.runtime.rank]
            inputs = self._inputs(mine or ids[:1], used=self._kept(mine))
            torch.manual_seed(pass_seed(self.config.train.seed, step, m, self.runtime.rank))
            is_boundary = m == self.micro_steps - 1
            total += self.shards.run_pass(inputs, num_items, self.runtime.world_size, is_boundary, not is_boundary)
        self.shards.step()
        torch.distributed.all_reduce(total)
        return float(total)

    def _inputs(self, ids: list[int], used: list[int]) -> dict[str, torch.Tensor]:
        """A pass over `ids`, of which only `used` reach the model and are logged; the others leave empty rows."""
        batch = collate(self.dataset.by_id(ids), self.dataset.pad_token_id)
        remaining = set(used)
        batch = blank_rows(batch, [row for row, i in enumerate(ids) if i not in remaining])
        return {key: value.to(self.runtime.device) for key, value in batch.items()}


def check_targets(config: Config) -> None:
    """Checks that training may write where it is told to.

    Raises:
        LmcError: Something is there that is neither to be resumed nor to be overwritten, or another job is at it.
    """
    if config.data.source == "log":
        raise LmcError("data.source 'log' is for unlearning: training needs data that is not in the log it writes")
    if config.resume and config.overwrite:
        raise LmcError("resume continues the log in log_dir, overwrite removes it: give one of them")
    log_dir = Path(config.log_dir)
    if config.resume:
        check_same_config(log_dir, config)
        if not config.online.enabled and asked_before(log_dir):
            raise LmcError(
                f"the run in {log_dir} was asked to forget samples while it trained: resume with --online.enabled true, or it "
                "would train on them again"
            )
    else:
        check_replaceable(log_dir, MANIFEST_FILE, config.overwrite)
        require_free(log_dir)
    if config.model_dir is not None:
        check_replaceable(Path(config.model_dir), "config.json", config.overwrite or config.resume)


def check_same_config(log_dir: Path, config: Config) -> None:
    """Checks that a resumed run has the settings it was started with.

    Raises:
        LmcError: Some differ.
    """
    if not (log_dir / MANIFEST_FILE).exists():
        return
    manifest = read_manifest(log_dir)
    logged = manifest.run.get("config", {})
    mine = json.loads(json.dumps(asdict(config)))
    for section in ("data", "model", "train", "forget"):
        for key, value in mine[section].items():
            if (section, key) in (("train", "engine"), ("train", "deepspeed"), ("train", "replicas")):
                continue  # a run may go on under another engine
            if key == "attn_implementation" and {value, logged.get(section, {}).get(key)} <= {None, "sdpa"}:
                continue  # null is sdpa
            if section == "forget" and rewritings(manifest):
                continue  # `resumed_rewritings` compares it with what the log was rewritten without
            if logged.get(section, {}).get(key, value) != value:
                raise LmcError(
                    f"log_dir {log_dir} was trained with {section}.{key}={logged[section][key]}, not {value}: resume with "
                    "the settings the run was started with"
                )


def check_train_config(config: Config, section: str = "train") -> None:
    """Bounds of the training settings; `section` is where the user wrote them."""
    train = config.train
    for name in ("epochs", "batch_size", "micro_batch_size"):
        if getattr(train, name) < 1:
            raise LmcError(f"{section}.{name} must be at least 1, got {getattr(train, name)}")
    for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "momentum"):
        if not getattr(train, name) >= 0:
            raise LmcError(f"{section}.{name} must be ≥ 0, got {getattr(train, name)}")
    if train.replicas < 1 or (train.replicas > 1 and train.engine != "fsdp2"):
        raise LmcError(
            f"train.replicas={train.replicas} under train.engine={train.engine}: it must be at least 1, and above 1 it is for "
            "fsdp2"
        )
    if train.deepspeed is not None and train.engine != "deepspeed":
        raise LmcError(f"train.deepspeed is for train.engine=deepspeed, not {train.engine}: leave it out")
    if train.max_steps is not None and train.max_steps < 1:
        raise LmcError(f"{section}.max_steps must be at least 1 or null, got {train.max_steps}")


def train(config: Config, runtime: Runtime) -> dict[str, Any]:
    """Trains as configured and leaves the log; returns the summary, which also lies beside the log. Collective."""
    summary = Trainer(config, runtime).run()
    if runtime.is_main:
        write_json(Path(config.log_dir) / "train.json", summary)
    return summary
