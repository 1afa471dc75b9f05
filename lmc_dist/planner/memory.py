"""Peak bytes of live tensors on a rank (docs/scaling.md): own shards of vectors, boundaries of blocks, what is gathered at a
time, one block's graph, one chunk of logits.

V: elements of a rank's shard of a vector. A sweep's vectors lie where the log is read, in the host's memory; the model
computes on the device. On a CPU these are one memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmc_dist.curvature.passes import OUTPUT_BYTES
from lmc_dist.planner.facts import LogFacts, ModelFacts, Pass, Passes
from lmc_dist.shards.layout import is_rule, num_replicas
from lmc_dist.update_rules.sharded import CHUNK

AHEAD = 2  # vectors that reading ahead keeps, see trajectory/prefetch.py
# Chunks of a vector that the update rule's tangent makes on the way: of a clipped step, a kind of state more the same again;
# and of plain SGD's whose gradient enters as it is.
RULE, PLAIN_RULE = 6, 3


@dataclass(frozen=True)
class Graph:
    """Elements that live in a block while it is worked on: for each token and unit of width.

    Attributes:
        hidden: Of the hidden width.
        inner: Of the MLP's.
        scores: Of heads · length: attention written out.
    """

    hidden: float
    inner: float
    scores: float

    def elements(self, model: ModelFacts, passes: Sequence[Pass]) -> float:
        """Of the pass that takes most."""
        widths = self.hidden * model.hidden + self.inner * model.intermediate
        return max((p.tokens * (widths + self.scores * model.heads * p.length) for p in passes), default=0.0)


# Fitted to live tensors of Llama blocks, 15 shapes: widths 128 and 256, MLPs of 128 to 704, 2 to 16 heads, 64 to 256 tokens.
# The worst of 105 peaks of whole products was 7 % off. A graph of one pass with fused attention; tangents beside a primal;
# what the first tangent leaves for others; forward over reverse.
_BACKWARD = Graph(9.6, 5.6, 0.0)
_TANGENT = Graph(15.0, 0.4, 3.8)
_TAPE = Graph(3.8, 3.4, 0.0)
_SECOND = Graph(10.0, 11.8, 8.3)
_SECOND_TAPE = Graph(17.6, 3.2, 1.1)
_LOGITS = {"gradient": 3.9, "GGN": 4.3, "exact": 5.8}  # times one chunk of logits


def product_bytes(model: ModelFacts, mode: str, num_vectors: int, passes: Sequence[Pass], world_size: int) -> float:
    """Peak of a gradient (no vectors) or of m products, beside θ and the vectors themselves; the results are counted.

    Args:
        model: The model.
        mode: `gradient`, `GGN`, `exact`, `fd`, `secant`.
        num_vectors: m.
        passes: All of this rank's passes: their boundaries are there together.
        world_size: Ranks that share the model.
    """
    m, own = num_vectors, model.shard(world_size)
    if mode in ("fd", "secant"):  # one vector at a time: θ + εv and the first of two gradients
        return (m + 1) * own * model.itemsize + product_bytes(model, "gradient", 0, passes, world_size)
    results, is_many = max(m, 1), world_size > 1
    outside, block = model.outer_numel, model.block_numel
    boundary = sum(p.tokens for p in passes) * model.hidden
    standing = results * own + results * outside
    if is_many or model.outer_copies:
        standing += (1 + m) * outside
    standing += model.frozen_outer_numel * is_many
    back_tangents = m if mode == "exact" else 0
    one = is_many * ((1 + m) * block + model.frozen_block_numel)  # a gathered block; the next one is on its way
    one_back = is_many * ((1 + back_tangents) * block + model.frozen_block_numel)
    kept = 1 + back_tangents  # of each boundary
    forward = model.blocks * kept * boundary + 2 * m * boundary + 2 * one if m else 0.0
    if m:
        forward += _TANGENT.elements(model, passes) + (_TAPE.elements(model, passes) if m > 1 else 0.0)
    logits = _LOGITS[mode if m else "gradient"] * _chunk(model, passes)
    turn = (model.blocks + 1) * kept * boundary + (m if mode == "GGN" else 0) * boundary + logits
    turn += (2 if mode == "exact" else 1) * outside
    graph = (_SECOND if mode == "exact" else _BACKWARD).elements(model, passes)
    if mode == "exact" and m > 1:
        graph += _SECOND_TAPE.elements(model, passes)
    cotangents = (1 + m if mode == "exact" else results) * boundary
    back = model.blocks * kept * boundary + cotangents + graph + 2 * one_back
    back += (results + (2 if mode == "exact" else 1)) * block
    # A block is copied out of what was gathered while the next one is on its way.
    copied = max(3 * one + m * boundary if m else 0.0, 3 * one_back + cotangents)
    copied += model.blocks * kept * boundary
    end = is_many * (m > 1) * m * outside
    return model.itemsize * (standing + max(forward, turn, back, copied, end))


def gathered_bytes(model: ModelFacts, num_vectors: int) -> float:
    """Whole tensors that a rank of several holds at a time in m GGN products: what is outside the blocks, a block and the next.

    Part of `product_bytes`; it does not become less with more ranks. Pure.
    """
    trained = (1 + num_vectors) * (model.outer_numel + 2 * model.block_numel)
    return model.itemsize * (trained + model.frozen_outer_numel + 2 * model.frozen_block_numel)


def _chunk(model: ModelFacts, passes: Sequence[Pass]) -> float:
    """Elements of the largest chunk of logits."""
    found = 0.0
    for p in passes:
        fits = max(1, OUTPUT_BYTES // max(p.length * model.vocabulary * model.itemsize, 1))
        found = max(found, min(p.samples, fits) * p.length * model.vocabulary)
    return found


@dataclass(frozen=True)
class Peak:
    """Bytes of a rank at a strategy's peak.

    Attributes:
        together: In one memory, the host's and the device's.
        host: What lies in the host's: vectors, and what the update rule makes of them.
        work: What the model's passes take, on the device.
    """

    together: float
    host: float
    work: float

    @staticmethod
    def of(vectors: float, moved: float, work: float) -> Peak:
        """Of vectors that stay, what is made of them after the products, and the passes of the model."""
        return Peak(vectors + max(moved, work), vectors + moved, work)

    def or_larger(self, other: Peak) -> Peak:
        """Of two moments."""
        return Peak(max(self.together, other.together), max(self.host, other.host), max(self.work, other.work))


def sweep_peak(
    log: LogFacts,
    mode: str,
    num_vectors: int,
    passes: Sequence[Pass],
    world_size: int,
    options: Any,
    num_sources: int = 2,
    keeps_total: bool = True,
    has_head: bool = False,
) -> Peak:
    """Peak of a sweep with m deviations at once: the path, (v, dσ) of each, the products, the next deviations.

    Args:
        log: The run.
        mode: hessian_mode.
        num_vectors: m.
        passes: The largest step's on this rank.
        world_size: Ranks that share the model.
        options: With `probes`, `rank` and `base` of `diag` and `low_rank`.
        num_sources: Steps at which a gradient of forgotten samples is taken; skipped batches need none. At a second
            one deviations are under way already.
        keeps_total: Whether what is through is added up while others go on: units, windows of K steps.
        has_head: Whether the first steps are replayed.
    """
    model, m, k = log.model, num_vectors, len(log.state)
    own = model.shard(world_size) * model.itemsize
    needs_gradient = bool(k) or mode in ("fisher", "secant") or has_head
    path = 3 + AHEAD * (log.step_bytes > 0) + 2 * k + needs_gradient  # θ_s, θ_{s+1}, u_s and what is read ahead
    standing = (path + keeps_total * (1 + k)) * own + model.frozen_shard(world_size) * model.itemsize
    deviations = m * (1 + k) * own
    gradient = product_bytes(model, "gradient", 0, passes, world_size)
    work = m * own if mode in ("none", "fisher") else 0.0
    if mode == "diag":
        block = max(1, min(8, options.probes))
        work = product_bytes(model, "GGN", block, passes, world_size)
        standing += (block + 3) * own
    elif mode == "low_rank":
        work = product_bytes(model, options.base, 1, passes, world_size)
        standing += 2 * (2 * options.rank + 8) * own
    elif mode not in ("none", "fisher"):
        work = product_bytes(model, mode, m, passes, world_size)
    if log.computes_path:
        work = max(work, gradient)
    if has_head:
        work = max(work, product_bytes(model, "secant", 1, passes, world_size))
    is_met = num_sources > 1  # by deviations under way
    chunks = RULE * (1 + k) if k or log.is_clipped else PLAIN_RULE
    rule = chunks * min(own, CHUNK * model.itemsize)
    peak = Peak.of(standing + deviations + is_met * own, m * (2 + k) * own + rule, work)
    if num_sources:
        peak = peak.or_larger(Peak.of(standing + is_met * deviations, (2 + k) * own + rule, gradient))
    return peak


# Shards and whole copies of the parameters that an engine keeps, in float32: (sharded, whole), and what its state is.
_ENGINES: dict[str, tuple[int, int, bool]] = {
    "deepspeed-zero3": (4, 0, True),
    "deepspeed-zero2": (2, 2, True),
    "deepspeed-zero1": (2, 2, True),
    "deepspeed-zero0": (0, 3, False),
    "fsdp2": (2, 0, True),
    "ddp": (0, 3, False),
    "single": (0, 2, False),
}


def replay_peak(log: LogFacts, passes: Sequence[Pass], world_size: int) -> Peak:
    """Peak of the engine that replays: parameters, gradients, state, the graphs of all blocks of one pass, and DeepSpeed's
    bucket of gradients, which is 2 GB by default however small the model is.

    DeepSpeed below ZeRO-3 is given the whole model in every rank's host memory, other engines take a parameter at a time.
    """
    model, k = log.model, len(log.state)
    replicas = num_replicas(log.engine) if is_rule(log.engine) else 1
    replicas = replicas if world_size % replicas == 0 else 1  # another number of ranks replays under FSDP2
    engine = "fsdp2" if is_rule(log.engine) else log.engine
    sharded, whole, shards_state = _ENGINES.get(engine, (0, 3, False))
    own, everything = model.shard(world_size), model.numel + model.frozen_numel
    held = model.shard(world_size // replicas)
    vectors = (sharded + shards_state * k) * held + (whole + (not shards_state) * k) * everything
    gathered = 0 if whole else 2 * (model.block_numel + model.frozen_block_numel) * (world_size > 1)
    graphs = model.blocks * _BACKWARD.elements(model, passes)
    logits = 3 * max((p.tokens for p in passes), default=0) * model.vocabulary
    read = (2 + k) * own  # θ for checksums, and the snapshot that it starts from
    largest = max((spec.numel for spec in (*model.parameters, *model.frozen)), default=0)
    loaded = everything if whole and engine.startswith("deepspeed") else largest
    size = model.itemsize
    work = size * (vectors + gathered + graphs + logits) + log.bucket_bytes
    return Peak.of(size * read, size * loaded, work)


def largest_step(log: LogFacts, world_size: int) -> Passes:
    """The passes of the rank that has most tokens in any step."""
    dealt = (p[rank::world_size] for p in set(log.passes) for rank in range(min(world_size, len(p))))
    return max(dealt, key=lambda passes: sum(p.tokens for p in passes), default=())


def largest_block(
    log: LogFacts,
    mode: str,
    world_size: int,
    options: Any,
    memory: float,
    host_memory: float | None = None,
    most: int = 1 << 12,
    num_sources: int = 2,
) -> int:
    """Vectors that a sweep can carry at once, `most` at most; 0 where not one fits. Pure.

    Args:
        log: The run.
        mode: hessian_mode.
        world_size: Ranks that share the model.
        options: As of `sweep_peak`.
        memory: Bytes a rank may use.
        host_memory: Those of the host's memory, where `memory` is a device's; None where there is one memory.
        most: Vectors wanted.
        num_sources: As of `sweep_peak`.
    """
    passes = largest_step(log, world_size)

    def fits(m: int) -> bool:
        peak = sweep_peak(log, mode, m, passes, world_size, options, num_sources)
        return fits_in(peak, memory, host_memory)

    if not fits(1):
        return 0
    low, high = 1, most + 1  # low fits
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fits_in(peak: Peak, memory: float, host_memory: float | None) -> bool:
    """Whether a strategy fits: into one memory, or into a device's and the host's. Pure."""
    if host_memory is None:
        return peak.together <= memory
    return peak.work <= memory and peak.host <= host_memory
