"""What a prediction rests on: the model, the log and the request, as plain numbers. No tensors, no collectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from lmc_dist.shards.layout import ParamSpec, ShardLayout
from lmc_dist.shards.segments import cut, find_blocks


@dataclass(frozen=True)
class ModelFacts:
    """A model's sizes.

    Attributes:
        parameters: Trained ones, in model order.
        frozen: Those that are constants.
        blocks: Repeated blocks.
        block_numel: Trained elements of the largest block.
        outer_numel: Trained elements outside the blocks.
        outer_copies: Whether gathering the outside copies it on one rank too: it is not one run of the flat buffer.
        frozen_block_numel: As `block_numel`, of the constants.
        frozen_outer_numel: As `outer_numel`, of the constants.
        hidden: Width of the hidden states.
        intermediate: Width inside the MLP; of all experts that a token visits.
        heads: Attention heads.
        head_dim: Width of one.
        vocabulary: Classes.
        matmul: Trained weights that a token is multiplied with.
        frozen_matmul: Constant ones.
        itemsize: Bytes of an element.
    """

    parameters: tuple[ParamSpec, ...]
    frozen: tuple[ParamSpec, ...]
    blocks: int
    block_numel: int
    outer_numel: int
    outer_copies: bool
    frozen_block_numel: int
    frozen_outer_numel: int
    hidden: int
    intermediate: int
    heads: int
    head_dim: int
    vocabulary: int
    matmul: float
    frozen_matmul: float
    itemsize: int = 4

    @cached_property
    def numel(self) -> int:
        return sum(spec.numel for spec in self.parameters)

    @cached_property
    def frozen_numel(self) -> int:
        return sum(spec.numel for spec in self.frozen)

    def shard(self, world_size: int) -> int:
        """Elements of a trained vector that each of `world_size` ranks holds, padding included."""
        if world_size not in self._shards:
            self._shards[world_size] = ShardLayout(self.parameters, 0, world_size).flat_numel
        return self._shards[world_size]

    def frozen_shard(self, world_size: int) -> int:
        return ShardLayout(self.frozen, 0, world_size).flat_numel

    @cached_property
    def _shards(self) -> dict[int, int]:
        return {}


def model_facts(module: nn.Module, itemsize: int = 4) -> ModelFacts:
    """The sizes of a causal language model, whole or on meta. Local."""
    named = list(module.named_parameters())
    trained = tuple(_spec(name, p) for name, p in named if p.requires_grad)
    frozen = tuple(_spec(name, p) for name, p in named if not p.requires_grad)
    slots, constants = list(ShardLayout(trained)), list(ShardLayout(frozen))
    name, blocks = find_blocks(module, [*slots, *constants])
    prefixes = [f"{name}.{i}." for i in range(len(blocks))] if blocks is not None else []
    outer, segments = cut(slots, prefixes)
    frozen_outer, frozen_segments = cut(constants, prefixes)
    config = getattr(module, "config", None)
    matmul, frozen_matmul = _multiplied(module, prefixes, config)
    hidden = int(getattr(config, "hidden_size", 0) or 1)
    heads = int(getattr(config, "num_attention_heads", 0) or 1)
    return ModelFacts(
        trained,
        frozen,
        len(segments),
        max((segment.numel for segment in segments), default=0),
        outer.numel,
        len(outer.ranges) > 1,
        max((segment.numel for segment in frozen_segments), default=0),
        frozen_outer.numel,
        hidden,
        _intermediate(config, hidden),
        heads,
        int(getattr(config, "head_dim", None) or hidden // heads),
        int(getattr(config, "vocab_size", 0) or 1),
        matmul,
        frozen_matmul,
        itemsize,
    )


def _spec(name: str, parameter: nn.Parameter) -> ParamSpec:
    return ParamSpec(name, tuple(getattr(parameter, "ds_shape", parameter.shape)))


def _intermediate(config: Any, hidden: int) -> int:
    """Width of the MLP, by the names that Hugging Face configs have for it."""
    experts = getattr(config, "moe_intermediate_size", None)
    if experts:
        return int(experts) * int(getattr(config, "num_experts_per_tok", 1) or 1)
    names = ("intermediate_size", "n_inner", "ffn_dim")
    return int(next((value for name in names if (value := getattr(config, name, None))), 4 * hidden))


def _multiplied(module: nn.Module, prefixes: Sequence[str], config: Any) -> tuple[float, float]:
    """(trained, frozen) weights that each token is multiplied with: blocks' matrices and the head; experts in part."""
    count = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    visited = (getattr(config, "num_experts_per_tok", None) or count) / count if count else 1.0
    find_head: Any = getattr(module, "get_output_embeddings", lambda: None)
    weights = {id(getattr(find_head(), "weight", None))}
    sums = [0.0, 0.0]
    for name, p in module.named_parameters():
        is_inside = not prefixes or name.startswith(tuple(prefixes))
        if (is_inside and p.dim() >= 2) or id(p) in weights:
            sums[not p.requires_grad] += _spec(name, p).numel * (visited if ".experts." in name else 1.0)
    return sums[0], sums[1]


@dataclass(frozen=True)
class Pass:
    """One forward pass: samples, each padded to `length` tokens."""

    samples: int
    length: int

    @property
    def tokens(self) -> int:
        return self.samples * self.length


Passes = tuple[Pass, ...]


@dataclass(frozen=True)
class LogFacts:
    """A logged run.

    Attributes:
        model: Its model.
        engine: That trained it.
        passes: Of each step, in logged order; passes are dealt out to ranks in turn and never cut.
        applied: Of each step, whether weights changed.
        snapshots: Steps of snapshots, ascending.
        state: Kinds of the optimizer's per-element state; with any, the path is followed from a snapshot, with a gradient
            a step.
        logs_gradients: Whether those gradients are in the log.
        step_bytes: Of a step's update, or θ, of all ranks.
        gradient_bytes: Of a step's logged gradient.
        snapshot_bytes: Of a snapshot.
        is_coarse: Whether the path's gradients are of less than float32: a replayed head and `secant` then take another one.
        no_sweep: Why its steps cannot be propagated along; None where they can.
        no_replay: Why it cannot be replayed.
        is_clipped: Whether any step was, so that the tangent of a step is that of clipping as well.
        bucket_bytes: What the engine sets aside to reduce gradients in, whatever the model's size.
    """

    model: ModelFacts
    engine: str
    passes: tuple[Passes, ...]
    applied: tuple[bool, ...]
    snapshots: tuple[int, ...]
    state: tuple[str, ...] = ()
    logs_gradients: bool = False
    step_bytes: int = 0
    gradient_bytes: int = 0
    snapshot_bytes: int = 0
    is_coarse: bool = False
    no_sweep: str | None = None
    no_replay: str | None = None
    is_clipped: bool = True
    bucket_bytes: int = 0

    @property
    def num_steps(self) -> int:
        return len(self.passes)

    @property
    def computes_path(self) -> bool:
        """Whether following the optimizer takes a gradient a step."""
        return bool(self.state) and not self.logs_gradients

    def anchor(self, step: int) -> int:
        """Latest snapshot N ≤ step."""
        return max((n for n in self.snapshots if n <= step), default=0)


@dataclass(frozen=True)
class Edit:
    """A step that holds forgotten data.

    Attributes:
        skipped: Whether the counterfactual run leaves it out.
        kept: Passes over what remains.
        source: Passes over the samples whose weight changes.
        units: Forgotten samples, or the batch.
    """

    skipped: bool
    kept: Passes
    source: Passes
    units: tuple[int, ...]


@dataclass(frozen=True)
class RequestFacts:
    """What is to be forgotten.

    Attributes:
        kind: Counterfactual.
        size: Samples, or batches.
        edits: Of the applied steps that hold any of it.
    """

    kind: str
    size: int
    edits: Mapping[int, Edit] = field(default_factory=dict)

    @property
    def first(self) -> int:
        return min(self.edits)

    @property
    def num_sources(self) -> int:
        """Steps that go on without forgotten samples, which takes a gradient of them."""
        return sum(not edit.skipped for edit in self.edits.values())


def busiest(passes: Passes, world_size: int) -> int:
    """Tokens of the rank that has most to do."""
    if not passes:
        return 0
    return max(sum(p.tokens for p in passes[rank::world_size]) for rank in range(min(world_size, len(passes))))


def tokens(passes: Passes) -> int:
    return sum(p.tokens for p in passes)
