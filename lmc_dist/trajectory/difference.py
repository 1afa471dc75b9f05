"""What one step changed, in one pass over the buffers: u_s, its norm, where θ_s + u_s misses θ_{s+1}, the checksum.

A step's vectors do not fit into a core's cache. Each piece of them is therefore read once and everything that is wanted
of it computed before the next: five passes over memory become one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lmc_dist.errors import LmcError
from lmc_dist.shards.checksum import BITS, BLOCK, BlockSums, local_checksum
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.files import FIX_INDEX, FIX_VALUE

_CHUNK = 32 * BLOCK  # elements; smaller pieces fit better, but then the calls themselves take longer


@dataclass(frozen=True)
class Difference:
    """θ' − θ on this rank.

    Attributes:
        square: ‖u‖², to about 1e-6.
        checksum: This rank's share of the checksum of θ'.
        update: u; None where it was not asked for.
        inexact: Places in the flat buffer, ascending, where θ + u rounds to something other than θ'.
    """

    square: float
    checksum: list[int]
    update: ShardedVector | None = None
    inexact: np.ndarray | None = None


def difference(before: ShardedVector, after: ShardedVector, keep: bool = True) -> Difference:
    """Compares two vectors of the same layout in host memory. Local.

    Args:
        before: θ.
        after: θ'.
        keep: Whether u itself is wanted.

    Raises:
        LmcError: θ' holds NaN or infinity.
    """
    found = _difference(before, after, keep, is_bounded=False)
    if np.isfinite(found.square):
        return found
    if not bool(torch.isfinite(after.flat).all()):
        raise LmcError("the weights hold NaN or infinity: they cannot be logged")
    return _difference(before, after, keep, is_bounded=True)  # finite weights, further apart than the largest float


def _difference(before: ShardedVector, after: ShardedVector, keep: bool, is_bounded: bool) -> Difference:
    numel, dtype = after.flat.numel(), after.flat.dtype
    bits, largest = BITS[dtype.itemsize], torch.finfo(dtype).max
    update = torch.empty(numel if keep else min(numel, _CHUNK), dtype=dtype)
    sum_, wide = torch.empty(_CHUNK, dtype=dtype), torch.empty(_CHUNK, dtype=torch.float64)
    blocks = BlockSums(after.flat) if dtype.itemsize <= 4 else None
    square, inexact = 0.0, []
    for start in range(0, numel, _CHUNK):
        end = min(start + _CHUNK, numel)
        length = end - start
        old, new = before.flat[start:end], after.flat[start:end]
        u = update[start:end] if keep else update[:length]
        torch.sub(new, old, out=u)
        if is_bounded:
            u.clamp_(-largest, largest)
        square += _square(u, wide)
        if blocks is not None:
            blocks.add(start, end, wide)
        if keep:
            torch.add(old, u, out=sum_[:length])
            # not the values: −0.0 equals 0.0
            wrong = np.flatnonzero(sum_[:length].view(bits).numpy() != new.view(bits).numpy())
            if len(wrong):
                inexact.append(wrong + start)
    total = local_checksum(after) if blocks is None else blocks.total(after.layout)
    return Difference(
        square,
        total.tolist(),
        after.like(update) if keep else None,
        np.concatenate(inexact) if inexact else np.empty(0, np.int64),
    )


def _square(u: torch.Tensor, scratch: torch.Tensor) -> float:
    """‖u‖² of a piece: in its own precision, which costs half as much, unless squares leave the range of that."""
    found = float(torch.dot(u, u))
    if 1e-30 < found < 1e30:
        return found
    wide = scratch[: u.numel()].copy_(u)
    return float(torch.dot(wide, wide))


def exact_update(before: ShardedVector, after: ShardedVector) -> dict[str, torch.Tensor]:
    """u = θ' − θ as shards to store, with the elements for which θ + u rounds to something other than θ'. Local.

    Raises:
        LmcError: θ' holds NaN or infinity.
    """
    return stored_update(difference(before, after), after)


def stored_update(found: Difference, after: ShardedVector) -> dict[str, torch.Tensor]:
    """The tensors that a log file keeps of a difference.

    The difference of two floats need not be a float (an element that crosses zero by a step larger than itself), so
    those few elements are stored as they are: index in the flattened parameter, and value.
    """
    assert found.update is not None and found.inexact is not None
    tensors = dict(found.update.items())
    slots = list(after.layout)
    bounds = np.searchsorted(found.inexact, [slot.offset for slot in slots] + [after.flat.numel()])
    for slot, low, high in zip(slots, bounds[:-1], bounds[1:], strict=True):
        if low < high:
            places = torch.from_numpy(found.inexact[low:high])
            tensors[slot.spec.name + FIX_INDEX] = places + (slot.start - slot.offset)
            tensors[slot.spec.name + FIX_VALUE] = after.flat[places]
    return tensors


class RoundedUpdates:
    """Updates rounded to a coarser dtype, each from where the log is, so that rounding never adds up.

    Args:
        theta: θ as the log gives it at the first step; copied.
        dtype: What updates are rounded to.
    """

    def __init__(self, theta: ShardedVector, dtype: torch.dtype) -> None:
        self.followed, self.dtype = theta.clone(), dtype

    def round(self, after: ShardedVector) -> ShardedVector:
        """The update to store on the way to θ'; `followed` is afterwards where the log is. Local.

        Raises:
            LmcError: θ' holds NaN or infinity, or is too far away for the dtype.
        """
        rounded = torch.empty_like(after.flat, dtype=self.dtype)
        for start in range(0, rounded.numel(), _CHUNK):
            part = slice(start, start + _CHUNK)
            rounded[part] = after.flat[part] - self.followed.flat[part]
            self.followed.flat[part] += rounded[part]
            total = rounded[part].sum(dtype=torch.float32)  # not finite where an element is not, and almost never else
            if not torch.isfinite(total) and not torch.isfinite(rounded[part]).all():
                raise LmcError(f"the update is not finite in {self.dtype}: it cannot be logged")
        return after.like(rounded)

    def meet(self, after: ShardedVector) -> dict[str, torch.Tensor]:
        """The exact update from where the log is to θ', which `followed` then is, as tensors to store. Local."""
        tensors = exact_update(self.followed, after)
        self.followed.flat.copy_(after.flat)
        return tensors

    def checksum(self) -> list[int]:
        """This rank's share of the checksum of `followed`."""
        return local_checksum(self.followed).tolist()
