"""ShardedVector: a vector over all trainable parameters, of which each rank holds its own shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from lmc_dist.shards.layout import ShardLayout

_CHUNK = 1 << 18  # elements; reductions convert to float64 chunk by chunk, so that they need no second vector


class ShardedVector:
    """name → 1-D local shard, all in one flat buffer (`flat`, padding zero).

    Arithmetic is local. `dot` and `norm` are collective over the layout's group (one all-reduce each, float64
    sums) and return the same Python float on every rank.
    """

    def __init__(self, layout: ShardLayout, flat: torch.Tensor) -> None:
        if flat.shape != (layout.flat_numel,):
            raise ValueError(f"flat has shape {tuple(flat.shape)}, the layout needs ({layout.flat_numel},)")
        self.layout = layout
        self.flat = flat

    @classmethod
    def zeros(
        cls, layout: ShardLayout, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> ShardedVector:
        return cls(layout, torch.zeros(layout.flat_numel, dtype=dtype, device=device))

    @classmethod
    def from_full(
        cls, layout: ShardLayout, full: Callable[[str], torch.Tensor], dtype: torch.dtype | None = None
    ) -> ShardedVector:
        """This rank's slices of whole tensors, asked for one at a time by name."""
        pieces = {}
        for slot in layout:
            tensor = full(slot.spec.name).detach().reshape(-1)[slot.start : slot.end]
            pieces[slot.spec.name] = tensor if dtype is None else tensor.to(dtype)
        return cls.from_shards(layout, pieces)

    @classmethod
    def from_shards(cls, layout: ShardLayout, shards: dict[str, torch.Tensor]) -> ShardedVector:
        """Copies unpadded 1-D local shards into one buffer."""
        first = next(iter(shards.values()))
        vector = cls(layout, torch.empty(layout.flat_numel, dtype=first.dtype, device=first.device))
        for slot in layout:
            end = slot.offset + slot.local_numel
            vector.flat[slot.offset : end].copy_(shards[slot.spec.name])
            vector.flat[end : slot.offset + slot.padded].zero_()
        return vector

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.layout.view(self.flat, name)

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((slot.spec.name, self[slot.spec.name]) for slot in self.layout)

    def like(self, flat: torch.Tensor) -> ShardedVector:
        return ShardedVector(self.layout, flat)

    def clone(self) -> ShardedVector:
        return self.like(self.flat.clone())

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> ShardedVector:
        return self.like(self.flat.to(device=device, dtype=dtype))

    def zero_(self) -> ShardedVector:
        self.flat.zero_()
        return self

    def add_(self, other: ShardedVector, alpha: float = 1.0) -> ShardedVector:
        """self += alpha · other, in place (axpy)."""
        self.flat.add_(other.flat, alpha=alpha)
        return self

    def scale_(self, alpha: float) -> ShardedVector:
        self.flat.mul_(alpha)
        return self

    def __add__(self, other: ShardedVector) -> ShardedVector:
        return self.like(self.flat + other.flat)

    def __sub__(self, other: ShardedVector) -> ShardedVector:
        return self.like(self.flat - other.flat)

    def __mul__(self, alpha: float) -> ShardedVector:
        return self.like(self.flat * alpha)

    __rmul__ = __mul__

    def dot(self, other: ShardedVector) -> float:
        """⟨self, other⟩; collective."""
        return dots([(self, other)])[0]

    def norm(self) -> float:
        """‖self‖₂; collective."""
        return max(self.dot(self), 0.0) ** 0.5


def local_dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """⟨a, b⟩ of two flat local buffers, accumulated in float64."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for i in range(0, a.numel(), _CHUNK):
        total += torch.dot(a[i : i + _CHUNK].double(), b[i : i + _CHUNK].double())
    return float(total)


def dots(pairs: Sequence[tuple[ShardedVector, ShardedVector]]) -> list[float]:
    """Several inner products for the price of one all-reduce; collective."""
    layout, flat = pairs[0][0].layout, pairs[0][0].flat
    local = [local_dot(a.flat, b.flat) for a, b in pairs]
    if layout.world_size == 1:
        return local
    sums = torch.tensor(local, dtype=torch.float64, device=flat.device)
    dist.all_reduce(sums, group=layout.group)
    return sums.tolist()


def gram(a: torch.Tensor, b: torch.Tensor, layout: ShardLayout) -> torch.Tensor:
    """All inner products of two blocks of vectors, one all-reduce; collective.

    Args:
        a: (k, L) this rank's shards of k vectors.
        b: (m, L) those of m others.
        layout: Their layout.

    Returns:
        (k, m) in float64, the same on every rank, on the CPU.
    """
    sums = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    columns = max(_CHUNK // (4 * max(len(a), len(b), 1)), 1 << 10)  # the doubles of a chunk stay in a CPU's cache
    for i in range(0, a.shape[1], columns):
        sums += a[:, i : i + columns].double() @ b[:, i : i + columns].double().T
    if layout.world_size > 1:
        dist.all_reduce(sums, group=layout.group)
    return sums.cpu()
