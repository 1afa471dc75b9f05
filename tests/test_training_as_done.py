"""Corrections of training as it is really done: epochs and repeats, accumulation, dropout, 16 bits, LoRA, other ranks.

Each is held against an oracle: a training loop of its own in float64, or the engine's replay or retraining without the
data.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import KeepDouble, model_config
from test_engine_logs import engine_config, replayed, train_lora
from test_sweep import manifest
from test_sweep_optimizers import Tokens
from test_zero3 import GPT2, LLAMA, build_for_replay, train_job
from torch.nn.functional import cross_entropy

from lmc_dist import TrainingLogger
from lmc_dist.config import Config
from lmc_dist.curvature import HVPConfig, TokenCrossEntropy
from lmc_dist.data import IGNORED, collate
from lmc_dist.shards.engines import engine_shards
from lmc_dist.shards.frozen import read_frozen, skeleton_of
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.module import ShardedModule, build_skeleton
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import BLANK, BatchSource, DatasetBatches
from lmc_dist.trajectory.counterfactual import Counterfactual, EditedMicro, EditedStep
from lmc_dist.trajectory.record import LossNormalization, MicroRecord, StepLog, StepRecord
from lmc_dist.trajectory.replay import replay, replay_engine
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.unlearn.correction import compute_correction, load_full_correction
from lmc_dist.unlearn.path import TrainingPath

# --- a loop that knows nothing of the package, in float64 ------------------------------------------------------------

REPEATED = 11  # the sample to forget

# Samples of each pass: two or three passes a step, of uneven size.
SHAPES = ((3, 1), (2, 2, 1), (1, 3), (1, 1, 2))
MAX_NORM = 0.27
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.8, "nesterov": True, "lr": 0.1},
    "AdamW": {"betas": (0.9, 0.95), "eps": 1e-6, "lr": 0.01},
}
Named = dict[str, torch.Tensor]


def passes() -> list[list[list[int]]]:
    """Ids by step and pass, two epochs. The sample is also drawn twice in a step, in a pass, and is a pass of its own."""
    steps: list[list[list[int]]] = []
    for epoch in range(2):
        order = torch.randperm(18, generator=torch.Generator().manual_seed(epoch)).tolist()
        while order:
            shape = SHAPES[len(steps) % len(SHAPES)]
            chunks = [[order.pop() for _ in range(min(size, len(order)))] for size in shape]
            steps.append([chunk for chunk in chunks if chunk])
    steps[4] = [[3, REPEATED, 8], [REPEATED, 5]]
    steps[6] = [[6, REPEATED, REPEATED], [7]]
    steps[7] = [[1, 2], [REPEATED], [4]]
    return steps


@dataclass
class ByHand:
    thetas: list[Named] = field(default_factory=list)  # before each step, and at the end
    norms: list[float] = field(default_factory=list)
    state: dict[str, Named] = field(default_factory=dict)


def rates(step: int, lr: float) -> tuple[float, float]:
    warm = lr * min(1.0, (step + 1) / 4)
    return warm, 0.5 * warm


def train_by_hand(kind: str, normalization: LossNormalization, request: str, by: float) -> ByHand:
    """A tiny Llama trained as one would write it in torch, the forgotten sample weighing 1 − `by`.

    With `renormalize` its target tokens count for as much; a pass in which nothing counts is left out.
    """
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model, tokens = LlamaForCausalLM(model_config("llama-untied")).double(), Tokens()
    for p in model.parameters():
        p.data = 0.2 * torch.randn(p.shape, dtype=torch.float64)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if (p.dim() < 2) == is_vector], "weight_decay": decay}
        for is_vector, decay in ((False, 0.1), (True, 0.0))
    ]
    optimizer = getattr(torch.optim, kind)(groups, **OPTIMIZERS[kind])
    named, out = dict(model.named_parameters()), ByHand()

    def count(ids: list[int]) -> float:
        weights = [1 - by * (request == "renormalize" and i == REPEATED) for i in ids]
        return sum(w * n for w, n in zip(weights, tokens.num_targets(ids), strict=True))

    for step, chunks in enumerate(passes()):
        out.thetas.append({name: p.detach().clone() for name, p in named.items()})
        total = sum(map(count, chunks))
        for ids in chunks:
            if count(ids) == 0:
                continue
            inputs, labels = tokens.inputs(ids)
            logits = model(**inputs).logits[:, :-1]
            losses = cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none").sum(1)
            loss = (losses * torch.tensor([1 - by * (i == REPEATED) for i in ids], dtype=torch.float64)).sum()
            (loss / (total if normalization == "global_token_mean" else count(ids) * len(chunks))).backward()
        for group, lr in zip(optimizer.param_groups, rates(step, OPTIMIZERS[kind]["lr"]), strict=True):
            group["lr"] = lr
        out.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
    out.thetas.append({name: p.detach().clone() for name, p in named.items()})
    for key in next(iter(optimizer.state.values())):
        if key != "step":
            out.state[key] = {name: optimizer.state[p][key].clone() for name, p in named.items()}
    return out


def log_of(trained: ByHand, kind: str, normalization: LossNormalization) -> tuple[StepLog, ShardedModule]:
    """The run as a log, and the model on shards."""
    tokens, skeleton = Tokens(), build_skeleton(model_config("llama-untied")).double()
    module = ShardedModule(skeleton, ShardLayout.of_module(skeleton))
    settings = {key: value for key, value in OPTIMIZERS[kind].items() if key != "lr"}
    optimizer = {"class": kind, "groups": [{**settings, "weight_decay": decay} for decay in (0.1, 0.0)]}
    described = replace(
        manifest(module.layout), optimizer=optimizer, max_grad_norm=MAX_NORM, loss_normalization=normalization
    )
    log = StepLog(described, ShardedVector.from_full(module.layout, trained.thetas[0].__getitem__))
    for step, chunks in enumerate(passes()):
        counts = [float(sum(tokens.num_targets(ids))) for ids in chunks]
        is_global = normalization == "global_token_mean"
        denominators = [sum(counts) if is_global else n * len(chunks) for n in counts]
        micros = tuple(MicroRecord(0, m, tuple(ids), denominators[m]) for m, ids in enumerate(chunks))
        lr, norm = rates(step, OPTIMIZERS[kind]["lr"]), trained.norms[step]
        mean = sum(denominators) / len(chunks)
        clipped = min(1.0, MAX_NORM / (norm + 1e-6))
        record = StepRecord(step, step, micros, lr, mean, grad_norm=norm, clip_coef=clipped)
        log.append(record, ShardedVector.from_full(module.layout, trained.thetas[step + 1].__getitem__))
    return log, module


@dataclass(frozen=True)
class FadedMicro(EditedMicro):
    by: float = 1.0

    @property
    def weights(self) -> list[float]:
        return [(1.0 - self.by * (not keep)) / self.denominator for keep in self.kept]


@dataclass(frozen=True)
class Faded(Counterfactual):
    """Only a part `by` of the edit: denominators are linear in the weights of samples."""

    by: float = 1.0

    def edit(self, record: StepRecord, normalization: Any, num_targets: Any) -> EditedStep:
        micros = []
        for m in super().edit(record, normalization, num_targets).micro_batches:
            # the mean over a pass of forgotten samples alone stays what it is, until nothing of it counts
            is_still = self.kind == "renormalize" and normalization == "micro_batch_token_mean" and not any(m.kept)
            by = 0.0 if is_still else self.by
            denominator = m.record.denominator + by * (m.denominator - m.record.denominator)
            micros.append(FadedMicro(m.record, m.kept, denominator, by))
        return EditedStep(record, False, tuple(micros))


def check_by_hand(kind: str, normalization: LossNormalization, request: Any) -> dict[str, float]:
    """Distances from the derivative of training, and from retraining, each relative to what it is."""
    h, epsilon, forgotten, errors = 2e-6, 1e-8, frozenset({REPEATED}), {}
    with KeepDouble():
        # each rank trains a part
        mine = {by: train_by_hand(kind, normalization, request, by) for by in ((0.0, -h), (1.0, h))[dist.get_rank()]}
        both: list[Any] = [None, None]
        dist.all_gather_object(both, mine)
        runs: dict[float, ByHand] = both[0] | both[1]
        trained = runs[0.0]
        clipped, steps = sum(norm > MAX_NORM for norm in trained.norms), len(trained.norms)
        assert 2 <= clipped <= steps - 2, (clipped, steps)
        log, module = log_of(trained, kind, normalization)

        def compare(name: str, found: Any, low: ByHand, high: ByHand, scale: float) -> None:
            ends = {"v": (found.v, low.thetas[-1], high.thetas[-1])}
            ends |= {key: (vector, low.state[key], high.state[key]) for key, vector in found.state.items()}
            for key, (vector, a, b) in ends.items():
                expected = ShardedVector.from_full(module.layout, lambda n, a=a, b=b: (b[n] - a[n]) * scale)
                errors[f"{name} {key}"] = (vector - expected).norm() / expected.norm()

        faded = Faded(request, forgotten, by=epsilon)
        found = compute_correction(log, module, Tokens(), faded, HVPConfig("exact"), update="tangent")
        compare("derivative", found, runs[-h], runs[h], epsilon / (2 * h))
        found = compute_correction(
            log, module, Tokens(), Counterfactual(request, forgotten), HVPConfig("none"), replay_head=steps
        )
        compare("head", found, trained, runs[1.0], 1.0)
    return errors


@pytest.mark.parametrize(
    ("kind", "normalization", "request_kind"),
    [
        ("SGD", "micro_batch_token_mean", "zero"),
        ("AdamW", "micro_batch_token_mean", "renormalize"),
        ("AdamW", "global_token_mean", "renormalize"),
    ],
)
def test_repeats_and_uneven_passes(ranks: Any, kind: str, normalization: str, request_kind: str) -> None:
    """Momentum and AdamW, clipped: the correction is the derivative of training, its full head is retraining."""
    for errors in ranks(2).run(check_by_hand, kind, normalization, request_kind):
        assert len(errors) == (4 if kind == "SGD" else 6)
        for name, error in errors.items():
            assert error <= (1e-5 if name.startswith("derivative") else 1e-10), errors


# --- under engines, against their own replay -------------------------------------------------------------------------


def adamw_config(folder: Path, engine: str, tier: str, model: dict[str, Any]) -> Config:
    """Six steps of AdamW without warm-up: 36 samples by seven (at two ranks in two passes), gradients clipped."""
    config = engine_config(folder, engine, tier, model, optimizer="adamw", learning_rate=0.005, max_grad_norm=0.9)
    return replace(config, data=replace(config.data, people=6))


@dataclass
class Subject:
    """A logged run and what corrections of it take."""

    log: TrajectoryLog
    module: ShardedModule
    batches: BatchSource

    @classmethod
    def of(cls, config: Config) -> Subject:
        from lmc_dist.training import build_config, build_dataset

        log, (dataset, tokenizer) = TrajectoryLog(config.log_dir), build_dataset(config)
        module = ShardedModule(build_skeleton(build_config(config.model, tokenizer)), log.layout)
        return cls(log, module, DatasetBatches(dataset))

    def correct(self, request: Counterfactual, mode: str, head: Any = 0, update: Any = "tangent") -> Any:
        ways = {"replay_head": head, "update": update}
        return compute_correction(self.log, self.module, self.batches, request, HVPConfig(mode), **ways)

    def errors(self, request: Counterfactual, reference: ShardedVector, *ways: tuple[Any, ...]) -> list[float]:
        """rel_error of corrections (mode, head, update)."""
        theta = self.log.theta(self.log.num_steps)
        distance = (theta - reference).norm()
        return [(theta + self.correct(request, *way).v - reference).norm() / distance for way in ways]

    def deviations(self, floor: float) -> list[float]:
        """By step: ‖Φ(θ, σ, g) − θ_{s+1}‖ / ‖u‖ where |g| ≥ floor · its root mean square; 0 where nothing moved."""
        path, found = TrainingPath(self.log, self.module, TokenCrossEntropy(), self.batches), []
        path.seek(path.start(0))
        for step in range(self.log.num_steps):
            here, update = path.step(step)
            if not self.log.record(step).applied:
                found.append(0.0)
                continue
            assert here.gradient is not None
            least = floor * here.gradient.norm() / math.sqrt(self.log.layout.total_numel)
            mask = here.gradient.like((here.gradient.flat.abs() >= least).float())
            error = path.rule.apply(here)[0] - path.theta
            sizes = [error.like(x.flat * mask.flat).norm() for x in (error, update)]
            found.append(sizes[0] / sizes[1])
        return found


def requests(log: TrajectoryLog, step: int) -> dict[str, Counterfactual]:
    ids = log.record(step).sample_ids
    return {
        "samples": Counterfactual("renormalize", frozenset(ids[:2])),
        "batch": Counterfactual("skip", batch_ids=frozenset({step})),
    }


ALL = 1000  # steps: a head to the end


def dropout_job(config: Config, folder: Path) -> dict[str, list[float]]:
    """Trains and corrects; leaves corrections by GGN in the folder."""
    train_job(config)
    subject = Subject.of(config)
    log = subject.log
    assert all(m.random_state and m.micro_step < 2 for r in log.records() for m in r.micro_batches if m.sample_ids)
    assert 0 < sum(r.clip_coef < 1 for r in log.records()) < log.num_steps and log.manifest.storage == "update"
    facts = {"deviations": subject.deviations(0.01)}
    for name, request in requests(log, 3).items():
        reference = replayed(config, request)
        assert reference.exact
        ways: list[tuple[Any, ...]] = [("none", 0), ("exact", 0), ("exact", 2), ("GGN", ALL)]
        facts[name] = subject.errors(request, reference.theta, *ways)
        subject.correct(request, "GGN").save(folder / name)
    first = Counterfactual("renormalize", frozenset(log.record(0).sample_ids[:1]))
    ways = [("exact", 0), ("exact", 0, "finite"), ("exact", ALL)]
    facts["first"] = subject.errors(first, replayed(config, first).theta, *ways)
    return facts


def again_job(config: Config, folder: Path) -> dict[str, float]:
    """Relative distances of corrections on this number of ranks to those in the folder."""
    subject, found = Subject.of(config), {}
    for name, request in requests(subject.log, 3).items():
        here = subject.correct(request, "GGN")
        stored = load_full_correction(folder / name, subject.log.layout, subject.log.theta(0))
        pairs = {"v": (here.v, stored.v)} | {key: (here.state[key], x) for key, x in stored.state.items()}
        found |= {f"{name} {key}": (a - b).norm() / b.norm() for key, (a, b) in pairs.items()}
        assert (here.behind, here.step) == (stored.behind, stored.step)
    return found


@dataclass(frozen=True)
class Float32:
    """The float32 run that several tests look at."""

    config: Config
    folder: Path
    facts: dict[str, list[float]]


@pytest.fixture(scope="module")
def float32(ranks: Any, tmp_path_factory: Any) -> Float32:
    folder = tmp_path_factory.mktemp("float32")
    config = adamw_config(folder, "zero3", "update", GPT2)
    return Float32(config, folder, ranks(2).run(dropout_job, config, folder)[0])


def test_dropout_accumulation_and_clipping(float32: Float32) -> None:
    """AdamW under ZeRO-3 without logged gradients: what the path regenerates is what training did."""
    facts = float32.facts
    assert max(facts["deviations"]) <= 5e-6, facts  # a wrong mask, sample or rate would give about 1
    for name in ("samples", "batch"):
        none, exact, handed_over, replayed_all = facts[name]
        assert handed_over < exact / 2 and exact < none < 0.8 and replayed_all <= 1e-3, facts
    # Adam's first steps are those of a sign: no tangent tells what a sample did in them
    tangent, finite, replayed_all = facts["first"]
    assert tangent > 1 and finite < 0.3 and replayed_all <= 1e-3, facts


def test_the_correction_does_not_depend_on_the_ranks(ranks: Any, float32: Float32) -> None:
    """Logged on two ranks with accumulation, corrected on two and on one."""
    for distances in ranks(1).run(again_job, float32.config, float32.folder):
        assert len(distances) == 6 and max(distances.values()) <= 1e-6, distances


def bfloat16_job(config: Config, twin: Config) -> dict[str, Any]:
    """Corrections of a run in bfloat16, with and without its logged gradients, and how far it is from its float32 twin."""
    train_job(config)
    subject, exact = Subject.of(config), TrajectoryLog(twin.log_dir)
    log, end, facts = subject.log, exact.num_steps, {}
    noise = (log.theta(end) - exact.theta(end)).norm()
    for name, request in requests(log, 3).items():
        reference = replayed(config, request)
        assert reference.exact
        facts[f"noise {name}"] = noise / (log.theta(end) - reference.theta).norm()
        for tier in ("gradient", "update"):
            log.manifest = replace(log.manifest, storage=tier)
            facts[f"{tier} {name}"] = subject.errors(request, reference.theta, ("exact", 0), ("exact", 2), ("GGN", ALL))
            facts[f"{tier} deviations"] = subject.deviations(0.1)
    return facts


def test_bfloat16_is_corrected_like_float32(ranks: Any, tmp_path: Path, float32: Float32) -> None:
    config = adamw_config(tmp_path, "zero3-bf16", "gradient", GPT2)
    for facts in ranks(2).run(bfloat16_job, config, float32.config):
        assert max(facts["gradient deviations"]) <= 1e-5 and max(facts["update deviations"]) <= 0.02, facts
        for name in ("samples", "batch"):
            _, *expected, _ = float32.facts[name]
            for tier in ("gradient", "update"):
                *found, replayed_all = facts[f"{tier} {name}"]
                assert found == pytest.approx(expected, abs=0.05), facts
                # rounding is all that is left, and of that less than what training in bfloat16 came to
                assert replayed_all <= min(facts[f"noise {name}"], 0.1), facts


# --- float16 under a GradScaler ----------------------------------------------------------------------------------------


def float16_run(config: Config, forgotten: frozenset[int] = frozenset()) -> None:
    """A loop under DDP in float16, two passes a step, whose first step overflows; the forgotten samples have no targets."""
    from lmc_dist.training import build_dataset, build_engine

    dataset, rank, world_size = build_dataset(config)[0], dist.get_rank(), dist.get_world_size()
    shards: Any = engine_shards(build_engine(build_for_replay(config), config.train, world_size))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, backoff_factor=2.0**-8)
    clip = config.train.max_grad_norm
    logger = TrainingLogger(config.log_dir, mode="gradient", save_interval=100, max_grad_norm=clip, autocast="float16")
    logger.attach(shards.wrapper, shards.base, scaler=scaler)
    shards.module.train()
    torch.manual_seed(rank)
    for step in range(6):
        ids = dataset.ids[6 * step : 6 * step + 6]
        items = torch.tensor(float(sum(dataset.num_targets(i) for i in ids if i not in forgotten)))
        for m in range(2):
            mine = ids[rank::world_size][m::2]
            batch = collate(dataset.by_id(mine), dataset.pad_token_id)
            batch["labels"][[i in forgotten for i in mine]] = IGNORED
            batch["index"] = torch.tensor([BLANK if i in forgotten else i for i in mine])
            with nullcontext() if m else shards.wrapper.no_sync():
                with torch.autocast("cpu", torch.float16):
                    loss = shards.wrapper(**batch, num_items_in_batch=items).loss * world_size
                scaler.scale(loss).backward()
        scaler.unscale_(shards.base)
        torch.nn.utils.clip_grad_norm_(shards.module.parameters(), clip)
        scaler.step(shards.base)
        scaler.update()
        shards.base.zero_grad()
    logger.close()
    shards.destroy()
    dist.barrier()


def float16_job(config: Config, reference: Config) -> dict[str, Any]:
    float16_run(config)
    subject = Subject.of(config)
    log, facts = subject.log, {}
    assert [r.applied for r in log.records()] == [False, *[True] * 5]
    request = requests(log, 3)["samples"]
    float16_run(reference, request.sample_ids)
    retrained = TrajectoryLog(reference.log_dir)
    repeated = replayed(config, request)
    assert repeated.exact
    facts["replay"] = (repeated.theta - retrained.theta(6)).norm()
    for tier in ("gradient", "update"):
        log.manifest = replace(log.manifest, storage=tier)
        facts[f"{tier} deviations"] = subject.deviations(0.1)
        facts[tier] = subject.errors(request, retrained.theta(6), ("none", 0), ("exact", 0), ("exact", 2), ("GGN", ALL))
    return facts


def test_float16_with_a_skipped_step_is_corrected(ranks: Any, tmp_path: Path) -> None:
    """The reference is retraining under its own scaler."""
    config = adamw_config(tmp_path / "whole", "ddp", "gradient", GPT2)
    reference = adamw_config(tmp_path / "without", "ddp", "gradient", GPT2)
    for facts in ranks(2).run(float16_job, config, reference):
        assert max(facts["gradient deviations"]) <= 1e-5 and max(facts["update deviations"]) <= 2e-3, facts
        assert facts["replay"] == 0, facts
        for tier in ("gradient", "update"):
            none, exact, handed_over, replayed_all = facts[tier]
            assert handed_over < exact / 2 and exact < none < 0.8 and replayed_all <= 0.03, facts


# --- LoRA --------------------------------------------------------------------------------------------------------------


def lora_job(folder: Path) -> dict[str, list[float]]:
    config = adamw_config(folder, "zero3", "update", LLAMA)
    shards, fresh, dataset = train_lora(config, ["q_proj", "v_proj"], steps=8, interval=100)
    shards.destroy()
    log, model = TrajectoryLog(config.log_dir), fresh()
    module = ShardedModule(skeleton_of(model), log.layout, frozen=read_frozen(model, log.layout))
    subject, facts = Subject(log, module, DatasetBatches(dataset)), {}
    facts["deviations"] = subject.deviations(0.01)
    for name, request in requests(log, 4).items():
        engine = replay_engine(fresh(), log)
        reference = replay(engine, log, subject.batches, request)
        engine.destroy()
        assert reference.exact and reference.verified == 4
        facts[name] = subject.errors(request, reference.theta, ("exact", 0), ("exact", 2), ("GGN", ALL))
    faded = Faded("renormalize", requests(log, 4)["samples"].sample_ids, by=0.05)
    whole = subject.correct(faded, "GGN", ALL).v
    facts["faded"] = [(subject.correct(faded, "exact").v - whole).norm() / whole.norm()]
    return facts


def test_lora_is_corrected(ranks: Any, tmp_path: Path) -> None:
    """Adapters alone, by AdamW, whose first gradients of A are exactly zero."""
    pytest.importorskip("peft")
    for facts in ranks(2).run(lora_job, tmp_path):
        assert max(facts["deviations"]) <= 5e-6, facts
        for name in ("samples", "batch"):
            exact, handed_over, replayed_all = facts[name]
            assert handed_over < 0.75 * exact and exact < 0.7 and replayed_all <= 1e-4, facts
        # half a batch is no small change: what the tangent misses of it shrinks with what is forgotten
        assert facts["faded"][0] <= 0.1, facts


# --- warm-up from a learning rate of 0 -------------------------------------------------------------------------------


def warm_up_job(folder: Path) -> tuple[float, float]:
    """(relative distance from replay of the correction by `secant`, learning rate of the first step)."""
    from lmc_dist.logged_run import open_logged_run
    from lmc_dist.runtime import Runtime

    config = engine_config(folder, "single", "update", learning_rate=0.05, warmup_steps=2, schedule="linear", epochs=2)
    train_job(config)
    run = open_logged_run(config, Runtime(0, 1, torch.device("cpu")))
    log = run.log
    request = Counterfactual("renormalize", sample_ids=frozenset(log.record(s).sample_ids[0] for s in (0, 2)))
    found = compute_correction(log, run.module, run.batches, request, HVPConfig("secant"))
    theta, reference = log.theta(log.num_steps), replayed(config, request).theta
    return (found.corrected(theta) - reference).norm() / (theta - reference).norm(), log.record(0).lr[0]


def test_a_source_at_a_learning_rate_of_0_is_no_divergence(ranks: Any, tmp_path: Path) -> None:
    """It moves nothing, and v is rounding until the next one."""
    ((distance, rate),) = ranks(1).run(warm_up_job, tmp_path)
    assert rate == 0 and distance <= 1e-3, (rate, distance)
