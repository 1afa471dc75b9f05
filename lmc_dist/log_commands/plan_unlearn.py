"""`lmc plan unlearn`: every way to answer a request, what it would take here or elsewhere, and which to choose."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from lmc_dist.config import Config
from lmc_dist.errors import LmcError
from lmc_dist.log_commands.text import check_target, count, size, table, write_findings
from lmc_dist.planner.facts import LogFacts, ModelFacts, RequestFacts, model_facts
from lmc_dist.planner.hardware import find_hardware
from lmc_dist.planner.machine import Machine, Projected
from lmc_dist.planner.reading import imagined, log_facts, request_facts
from lmc_dist.planner.recommendation import recommend
from lmc_dist.planner.strategies import Measurement, Options, Strategy, plan
from lmc_dist.runtime import Runtime, agreement, broadcast_object

_STATE = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
DEFAULT_HARDWARE = "h100"  # of a plan without a log


@dataclass(frozen=True)
class Planned:
    """A plan with what it was made from."""

    request: RequestFacts
    log: LogFacts
    machine: Machine
    options: Options
    strategies: list[Strategy]
    notes: tuple[str, ...]


def plan_unlearn(config: Config, runtime: Runtime) -> str:
    """The plan as text, and as JSON where asked for. Collective with a log, else local.

    Raises:
        LmcError: On every rank, before any long work, for whatever does not fit.
    """
    planned = plan_without_log(config) if config.plan_unlearn.steps is not None else _with_log(config, runtime)
    if runtime.is_main:
        write_findings(config.json, to_json(planned))
    return plan_text(planned)


def choose(config: Config, runtime: Runtime) -> Config:
    """The settings of the recommended strategy for a request. Collective.

    Raises:
        LmcError: Nothing but training anew is possible, and whatever `plan_unlearn` raises.
    """
    planned = _with_log(config, runtime)
    chosen, sentence = recommend(planned.strategies, planned.options.max_error)
    if chosen is None or not chosen.settings:
        raise LmcError(f"unlearn.strategy=auto: {sentence} Train anew with --forget to do so")
    if runtime.is_main:
        sys.stderr.write(sentence + "\n")
    settings = {"replay_head": 0, "K": None, "units": "joint", "unit_groups": 1, **chosen.settings}
    return replace(config, unlearn=replace(config.unlearn, **settings))


def _options(config: Config) -> Options:
    """The settings of the plan, checked. Local."""
    check_target("json", config.json)
    asked, unlearn = config.plan_unlearn, config.unlearn
    for name in ("groups", "head"):
        if getattr(asked, name) < 1:
            raise LmcError(f"plan_unlearn.{name} must be at least 1, got {getattr(asked, name)}")
    for name in ("block", "world_size", "steps", "tokens", "forgotten"):
        value = getattr(asked, name)
        if value is not None and value < 1:
            raise LmcError(f"plan_unlearn.{name} must be at least 1, got {value}")
    if asked.max_error is not None and not asked.max_error >= 0:
        raise LmcError(f"plan_unlearn.max_error must be ≥ 0, got {asked.max_error}")
    if not asked.calibrate > 0 or asked.controls < 0:
        raise LmcError("plan_unlearn.calibrate must be above 0 and plan_unlearn.controls at least 0")
    return Options(
        head=asked.head,
        K=unlearn.K,
        block=asked.block,
        groups=asked.groups,
        probes=unlearn.probes,
        rank=unlearn.rank,
        base=unlearn.base,
        refresh=unlearn.refresh,
        max_error=asked.max_error,
    )


def _projected(config: Config, log: LogFacts, options: Options, present: int) -> Projected:
    """The cluster that was asked for. Local."""
    asked = config.plan_unlearn
    ranks = asked.world_size or present
    if ranks % options.groups:
        raise LmcError(f"plan_unlearn.groups={options.groups} does not divide {ranks} ranks")
    length = round(median(p.length for passes in log.passes for p in passes))
    return Projected(ranks, log, length, find_hardware(asked.hardware or DEFAULT_HARDWARE), asked.tf32)


# --- without a log -----------------------------------------------------------------------------------------------------


def plan_without_log(config: Config) -> Planned:
    """A plan for an imagined run: no data, no weights, no memory. Local."""
    asked, train, options = config.plan_unlearn, config.train, _options(config)
    assert asked.steps is not None
    if asked.controls:
        raise LmcError("plan_unlearn.controls measures on a log: leave plan_unlearn.steps out")
    from lmc_dist.training import engine_name

    model = model_facts(meta_model(config))
    engine = "deepspeed-zero3" if train.engine == "deepspeed" else engine_name(train, asked.world_size or 1)
    itemsize = 2 if config.log.update_dtype == "bfloat16" else 4
    log, request = imagined(
        model,
        engine,
        asked.steps,
        train.batch_size,
        train.micro_batch_size,
        asked.tokens or config.data.max_length,
        _STATE[train.optimizer] if train.optimizer == "adamw" or train.momentum else (),
        config.log.save_interval,
        itemsize,
        asked.forgotten,
    )
    machine = _projected(config, log, options, present=1)
    notes = ("no log: a run of equal batches, the forgotten samples evenly over it; nothing was run",)
    return Planned(request, log, machine, options, plan(request, log, machine, options), notes)


def meta_model(config: Config) -> torch.nn.Module:
    """The configured model on the meta device, without a tokenizer where its config names the vocabulary. Local."""
    from transformers import AutoModelForCausalLM

    from lmc_dist.shards.module import attention_refused
    from lmc_dist.training import build_config, build_tokenizer, freeze

    tokenizer: Any = None
    if config.model.config is not None and "vocab_size" in config.model.config:
        tokenizer = _NoTokenizer(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model_config = build_config(config.model, build_tokenizer(config) if tokenizer is None else tokenizer)
    with torch.device("meta"), attention_refused():
        model = AutoModelForCausalLM.from_config(model_config, attn_implementation=config.model.attention)
    freeze(model, config.model.trainable)
    return model


class _NoTokenizer(SimpleNamespace):
    """Stands where only the vocabulary's size is asked for, which the config gives."""

    def __len__(self) -> int:
        return 0


# --- of a log ----------------------------------------------------------------------------------------------------------


def _with_log(config: Config, runtime: Runtime) -> Planned:
    """A plan for a request on a log. Collective."""
    from lmc_dist.logged_run import open_logged_run, starting_model
    from lmc_dist.planner.calibrate import calibrate
    from lmc_dist.planner.controls import measurements, read_controls
    from lmc_dist.training import read_request
    from lmc_dist.unlearn.request import check_request

    asked = config.plan_unlearn
    with agreement():
        options = _options(config)
        if asked.hardware is None and asked.world_size not in (None, runtime.world_size):
            raise LmcError(
                f"this machine is timed on the present {count(runtime.world_size, 'rank')}: name plan_unlearn.hardware to "
                f"project to {asked.world_size}, or start as many"
            )
        run = open_logged_run(config, runtime)
        request = read_request(config, run.dataset)
        if request is None:
            raise LmcError("say what to forget: forget.samples, forget.split or forget.batches")
        normalization = run.log.manifest.loss_normalization
        if not check_request(request, run.log.records(), run.batches, normalization):
            raise LmcError("no logged step that changed the weights holds any of the forgotten data")
        wanted = request_facts(run.log, request, run.batches, run.dataset)
        facts = log_facts(run.log, model_facts(run.module.module), run.dataset, wanted.first)
        if asked.hardware is None and runtime.world_size % options.groups:
            raise LmcError(f"plan_unlearn.groups={options.groups} does not divide {runtime.world_size} ranks")
    notes: list[str] = []
    if asked.controls:
        notes += _measure(config, runtime, run, request)
    machine: Machine
    if asked.hardware is not None:
        machine = _projected(config, facts, options, runtime.world_size)
    else:
        model = lambda: starting_model(config, run.model_config, run.log)  # noqa: E731
        timed = calibrate(run.log, facts, run.module, run.batches, wanted.first, model, asked.calibrate)
        machine, notes = timed, [*notes, *timed.notes]
    measured: dict[str, Measurement] = {}
    with agreement():
        if runtime.is_main:
            rows = read_controls(run.log, _control_settings(config))
            measured = measurements(rows, request.kind, wanted.size)
    measured = broadcast_object(measured)
    return Planned(wanted, facts, machine, options, plan(wanted, facts, machine, options, measured), tuple(notes))


def _control_settings(config: Config) -> dict[str, Any]:
    """Settings that errors depend on and a strategy's name does not say."""
    unlearn = config.unlearn
    names = ("probes", "rank", "base", "refresh")
    return {name: getattr(unlearn, name) for name in names}


def _measure(config: Config, runtime: Runtime, run: Any, request: Any) -> list[str]:
    """Control deletions, measured and kept beside the log; what was found in words. Collective."""
    from tqdm import tqdm

    from lmc_dist.curvature import HVPConfig
    from lmc_dist.logged_run import starting_model
    from lmc_dist.planner.controls import Candidate, control_requests, keep_controls, measure_controls
    from lmc_dist.trajectory.replay import replay_engine
    from lmc_dist.unlearn.run import parse_method

    settings = _control_settings(config)
    with agreement():
        run.log.require(run.log.first_step, updates=False)
        methods = [
            parse_method(name.strip(), 0.0) for name in config.plan_unlearn.candidates.split(",") if name.strip()
        ]
        candidates = [Candidate(m.hessian_mode, m.replay_head) for m in methods if m.replay_head != "all"]
        requests = control_requests(run.log, request, config.plan_unlearn.controls)
    make: Callable[[str], HVPConfig] = lambda mode: HVPConfig(mode, **settings)  # noqa: E731
    engine = replay_engine(starting_model(config, run.model_config, run.log), run.log)
    total = len(requests) * (1 + len(candidates))
    with tqdm(total=total, desc="controls", disable=not runtime.is_main) as bar:
        rows = measure_controls(run, engine, requests, candidates, make, lambda what: bar.update())
    engine.destroy()
    keep_controls(run.log, rows, settings)
    failed = {name: why for row in rows for name, why in row["failed"].items()}
    told = [f"{count(len(rows), 'control deletion')} measured, kept in {run.log.path / 'controls.json'}"]
    return told + [f"{name} failed on a control deletion: {why}" for name, why in failed.items()]


# --- what is told ------------------------------------------------------------------------------------------------------


def to_json(planned: Planned) -> dict[str, Any]:
    """All of it for machines."""
    chosen, sentence = recommend(planned.strategies, planned.options.max_error)
    model, log, request = planned.log.model, planned.log, planned.request
    return {
        "request": {
            "kind": request.kind,
            "size": request.size,
            "first": request.first,
            "steps": len(request.edits),
            "num_steps": log.num_steps,
        },
        "model": model_json(model, planned.machine.world_size),
        "log": {
            "engine": log.engine,
            "state": list(log.state),
            "logs_gradients": log.logs_gradients,
            "step_bytes": log.step_bytes,
            "snapshot_bytes": log.snapshot_bytes,
            "snapshots": list(log.snapshots),
        },
        "machine": planned.machine.to_json(),
        "memory": planned.machine.memory,
        "host_memory": planned.machine.host_memory,
        "options": asdict(planned.options),
        "strategies": [strategy.to_json() for strategy in planned.strategies],
        "recommended": None if chosen is None else chosen.name,
        "recommendation": sentence,
        "notes": list(planned.notes),
    }


def model_json(model: ModelFacts, world_size: int) -> dict[str, Any]:
    return {
        "parameters": model.numel,
        "frozen": model.frozen_numel,
        "shard": model.shard(world_size),
        "blocks": model.blocks,
        "block": model.block_numel,
        "outside": model.outer_numel,
        "matmul": model.matmul,
    }


def plan_text(planned: Planned) -> str:
    """The plan for a person."""
    request, log, machine = planned.request, planned.log, planned.machine
    what = "batch" if request.kind == "skip" else "sample"
    many = "batches" if request.kind == "skip" else "samples"
    lines = [
        f"to forget: {count(request.size, what, many)} in {len(request.edits)} of {log.num_steps} steps, the first is "
        f"{request.first} ({request.kind}); {log.model.numel:,} parameters on {count(machine.world_size, 'rank')}"
    ]
    head = ["strategy", "rel_error", "gradients", "seconds", "read", "memory a rank"]
    head += ["host memory"] if machine.host_memory is not None else []
    rows = [head, *(_row(strategy) for strategy in planned.strategies if strategy.obstacle is None)]
    lines += table(rows)
    lines += [f"{s.name}: not possible: {s.obstacle}" for s in planned.strategies if s.obstacle is not None]
    bases = {s.basis for s in planned.strategies if s.rel_error}
    lines += [f"rel_error is {basis}" for basis in sorted(bases)]
    if isinstance(machine, Projected):
        lines.append(assumptions(machine))
    lines += list(planned.notes)
    lines.append(recommend(planned.strategies, planned.options.max_error)[1])
    return "\n".join(lines)


def _row(strategy: Strategy) -> Sequence[str]:
    error = "unknown" if strategy.rel_error is None else f"{strategy.rel_error:.3g}"
    block = strategy.settings.get("block")
    name = strategy.name + (f", {block} at once" if block else "")
    peak, read = size(strategy.peak_bytes), size(strategy.bytes_read)
    host = [] if strategy.host_bytes is None else [size(strategy.host_bytes)]
    return [name, error, f"{strategy.gradients:.1f}", f"{strategy.seconds:.3g}", read, peak, *host]


def assumptions(machine: Projected) -> str:
    """What a projection rests on."""
    h = machine.hardware
    rate, name = (h.tf32_flops, "TF32") if machine.tf32 else (h.fp32_flops, "float32")
    return (
        f"projected to {count(machine.world_size, 'rank')} of {h.name}, nothing was run: training {h.bf16_flops / 1e12:.0f} "
        f"TFLOP/s (bfloat16), products {rate / 1e12:.0f} ({name}), {h.utilisation:.0%} of them reached; memory "
        f"{h.memory / 1e9:.0f} GB at {h.memory_bandwidth / 1e12:.2f} TB/s, vectors in the host's {h.host_memory / 1e9:.0f} GB at "
        f"{h.host_bandwidth / 1e9:.0f} GB/s, {h.bus / 1e9:.0f} GB/s between the two; collectives {machine.bandwidth / 1e9:.0f} GB/s a "
        f"rank ({h.ranks_per_node} ranks a node, {h.network_efficiency:.0%} of {h.link / 1e9:.0f} inside, of "
        f"{h.network / 1e9:.0f} between); the log at {h.disk / 1e9:.0f} GB/s a node; samples of {machine.length} tokens"
    )
