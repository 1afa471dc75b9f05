"""A model cut into segments whose parameters are gathered one at a time: the outside and its repeated blocks.

    prefix (embeddings, masks) → block 0 → … → block n−1 → suffix (norm, head)

The model itself stays unmodified. Its own forward is run with stand-ins in place of the blocks, once to see what the
first block is given and what arguments every block gets, once to continue from the last block's output.

A model whose blocks cannot be found has none: then the suffix is the whole model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from lmc_dist.shards.gather import flattened
from lmc_dist.shards.layout import ShardLayout, Slot

logger = logging.getLogger(__name__)

Parameters = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Segment:
    """Some parameters of a layout, gathered together.

    Attributes:
        slots: Their slots.
        ranges: Runs [start, stop) of the flat buffer that they fill, in slot order.
        strip: Length of the name prefix that the segment's own module does not know.
    """

    slots: tuple[Slot, ...]
    ranges: tuple[tuple[int, int], ...]
    strip: int = 0

    @property
    def numel(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    def take(self, flat: torch.Tensor) -> torch.Tensor:
        """(..., L of the layout) → (..., L of the segment); a view when the segment is one run."""
        parts = [flat[..., start:stop] for start, stop in self.ranges] or [flat[..., :0]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def add_to(self, flat: torch.Tensor, part: torch.Tensor) -> None:
        """flat[the segment's runs] += part."""
        offset = 0
        for start, stop in self.ranges:
            flat[..., start:stop] += part[..., offset : offset + stop - start]
            offset += stop - start

    def unpack(self, full: torch.Tensor) -> Parameters:
        """Gathered (W, L of the segment) → parameters by the names the segment's module knows; views where W = 1."""
        columns = torch.split(full, [slot.padded for slot in self.slots], dim=-1)
        return {
            slot.spec.name[self.strip :]: flattened(column)[: slot.spec.numel].view(slot.spec.shape)
            for slot, column in zip(self.slots, columns, strict=True)
        }

    def accumulate(self, total: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> None:
        """total += parts, in place: (W, L of the segment) gets tensors by the names of `unpack`; absent ones are zero."""
        offset = 0
        for slot in self.slots:
            part = parts.get(slot.spec.name[self.strip :])
            if part is not None:
                column, flat = total[:, offset : offset + slot.padded], part.reshape(-1)
                whole = slot.spec.numel // max(slot.padded, 1)  # ranks whose shard is full
                column[:whole] += flat[: whole * slot.padded].view(whole, slot.padded)
                if (rest := slot.spec.numel - whole * slot.padded) > 0:
                    column[whole, :rest] += flat[whole * slot.padded :]
            offset += slot.padded


def make_segment(slots: Sequence[Slot], strip: int = 0) -> Segment:
    """A segment of the given slots, neighbouring ones merged into runs."""
    ranges: list[tuple[int, int]] = []
    for slot in slots:
        stop = slot.offset + slot.padded
        if ranges and ranges[-1][1] == slot.offset:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((slot.offset, stop))
    return Segment(tuple(slots), tuple(ranges), strip)


class _Stop(Exception):
    """Carries the first block's input out of the model's forward."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


class _StandIn(nn.Module):
    """Takes a block's place: answers attribute look-ups like the block, does something else when called."""

    def __init__(self, block: nn.Module, action: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # not registered: its parameters must stay out of the outside's table
        self.__dict__["_action"] = action

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_action"](hidden, args, kwargs)


@dataclass
class Call:
    """What the model's forward hands each block beside the hidden states."""

    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


class SegmentedModule:
    """The segments of a skeleton module and how to run each of them.

    Args:
        module: Skeleton; parameters on meta.
        layout: Where its parameters lie.
        blocked: False treats the whole model as one segment.
        frozen: Where the parameters lie that are constants.
    """

    def __init__(
        self, module: nn.Module, layout: ShardLayout, blocked: bool = True, frozen: ShardLayout | None = None
    ) -> None:
        self.module = module
        constants = list(frozen) if frozen is not None else []
        name, blocks = find_blocks(module, [*layout, *constants]) if blocked else ("", None)
        self.container = blocks
        self.blocks: list[nn.Module] = list(blocks) if blocks is not None else []
        prefixes = [f"{name}.{i}." for i in range(len(self.blocks))]
        self.outer, self.block_segments = cut(list(layout), prefixes)
        self.frozen_outer, self.frozen_blocks = cut(constants, prefixes)
        self._returns_tuple = False
        if blocked and not self.blocks and layout.total_numel > 1_000_000:
            logger.warning(
                "no repeated blocks found in %s: products gather the whole model (%.0f MB a rank) at once",
                type(module).__name__,
                layout.total_numel * 4 / 2**20,
            )

    @contextmanager
    def _stand_ins(self, action: Callable[[int, torch.Tensor, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
        assert self.container is not None
        modules = self.container._modules
        for i, block in enumerate(self.blocks):
            modules[str(i)] = _StandIn(block, lambda h, a, k, i=i: action(i, h, a, k))
        try:
            yield
        finally:
            for i, block in enumerate(self.blocks):
                modules[str(i)] = block

    def _wrap(self, hidden: torch.Tensor) -> Any:
        return (hidden,) if self._returns_tuple else hidden

    def _outside(self, outer: Parameters, inputs: Mapping[str, Any]) -> Any:
        return functional_call(self.module, outer, args=(), kwargs=dict(inputs))

    def prefix(self, outer: Parameters, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The first block's input, from the parameters outside the blocks."""

        def stop(i: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            raise _Stop(hidden)

        try:
            with self._stand_ins(stop):
                self._outside(outer, inputs)
        except _Stop as stopped:
            return stopped.hidden
        raise AssertionError("the model's forward did not call its blocks")

    def block(self, i: int, parameters: Parameters, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """Block i's output hidden states."""
        args, kwargs = call.arguments[i]
        result = functional_call(self.blocks[i], parameters, (hidden, *args), kwargs)
        self._returns_tuple = isinstance(result, tuple)
        return result[0] if self._returns_tuple else result

    def suffix(self, outer: Parameters, hidden: torch.Tensor | None, inputs: Mapping[str, Any]) -> Any:
        """The model's output from the last block's; the whole model where there are no blocks (hidden None)."""
        if hidden is None:
            return self._outside(outer, inputs)
        with self._stand_ins(lambda i, h, a, k: self._wrap(hidden)):
            return self._outside(outer, inputs)

    @torch.no_grad()
    def arguments(self, outer: Parameters, inputs: Mapping[str, Any]) -> Call:
        """What every block is called with beside the hidden states (masks, positions)."""
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        shapes: list[torch.Size] = []

        def note(i: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            found.append((args, kwargs))
            shapes.append(hidden.shape)
            if hidden.shape != shapes[0] and not self._returns_tuple:
                self._returns_tuple = True  # the model took the first row of what it meant to be a tuple
                raise _Stop(hidden)
            if i == len(self.blocks) - 1:
                raise _Stop(hidden)
            return self._wrap(hidden)

        try:
            with self._stand_ins(note):
                self._outside(outer, inputs)
        except _Stop:
            complete = len(found) == len(self.blocks) and len(set(shapes)) == 1
            return Call(found) if complete else self.arguments(outer, inputs)
        raise AssertionError("the model's forward did not call its blocks")


def cut(slots: Sequence[Slot], prefixes: Sequence[str]) -> tuple[Segment, list[Segment]]:
    """(what lies outside, one segment for each name prefix)."""
    inside = [[slot for slot in slots if slot.spec.name.startswith(prefix)] for prefix in prefixes]
    names = {slot.spec.name for members in inside for slot in members}
    outer = make_segment([slot for slot in slots if slot.spec.name not in names])
    return outer, [make_segment(members, len(prefix)) for members, prefix in zip(inside, prefixes, strict=True)]


def find_blocks(module: nn.Module, slots: Sequence[Slot]) -> tuple[str, nn.ModuleList | None]:
    """(name, ModuleList) of the model's repeated blocks: the list of one class that holds the most parameters."""
    sizes = {slot.spec.name: slot.spec.numel for slot in slots}
    best: tuple[str, nn.ModuleList | None] = ("", None)
    best_size = 0
    for name, candidate in module.named_modules():
        if not isinstance(candidate, nn.ModuleList) or len(candidate) < 1:
            continue
        if len({type(child) for child in candidate}) != 1:
            continue
        size = sum(n for parameter, n in sizes.items() if parameter.startswith(f"{name}."))
        if size > best_size:
            best, best_size = (name, candidate), size
    return best
