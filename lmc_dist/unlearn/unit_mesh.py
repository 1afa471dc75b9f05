"""Two axes of ranks, (unit_groups, shard): each group holds one sharded copy of the model and takes units from a queue."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from lmc_dist.errors import LmcError
from lmc_dist.runtime import broadcast_object

_counter = itertools.count()
# One group may be at its last pass for days after the others are through.
_PATIENCE = timedelta(days=365)


@dataclass(frozen=True)
class UnitMesh:
    """This rank's place.

    Attributes:
        num_groups: Groups.
        group: The group of this rank.
        shard_group: Ranks that share its copy of the model; None is all ranks.
        everyone: All ranks, for `wait`; None with one group.
        queue: Name of the queue in the job's store, the same on all ranks.
    """

    num_groups: int
    group: int = 0
    shard_group: dist.ProcessGroup | None = None
    everyone: dist.ProcessGroup | None = None
    queue: str = ""

    def take(self, count: int) -> Iterator[int]:
        """Numbers 0 … count − 1, each to one group, until none is left or a group has failed. Collective in the group."""
        if self.num_groups == 1:
            yield from range(count)
            return
        store = dist.PrefixStore(self.queue, dist.distributed_c10d._get_default_store())
        is_leader = dist.get_rank(self.shard_group) == 0
        while True:
            number = -1
            if is_leader and not store.check(["failed"]):
                number = store.add("next", 1) - 1
            number = broadcast_object(number, self.shard_group)
            if not 0 <= number < count:
                return
            yield number

    def fail(self) -> None:
        """Lets the other groups stop after what they are at. Local."""
        if self.num_groups > 1:
            dist.PrefixStore(self.queue, dist.distributed_c10d._get_default_store()).set("failed", "1")

    def wait(self) -> None:
        """Waits for the other groups, longer than the job's own timeout lets a collective wait. Collective."""
        if self.everyone is not None:
            dist.barrier(self.everyone)


def unit_mesh(num_groups: int) -> UnitMesh:
    """The mesh of all ranks in `num_groups` groups of neighbours. Collective.

    Raises:
        LmcError: The number of groups does not divide that of ranks.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if num_groups < 1 or world_size % num_groups:
        raise LmcError(f"unit_groups={num_groups} does not divide {world_size} ranks")
    if num_groups == 1:
        return UnitMesh(1)
    size = world_size // num_groups
    groups = [dist.new_group(list(range(i * size, (i + 1) * size))) for i in range(num_groups)]
    own = dist.get_rank() // size
    everyone = dist.new_group(backend="gloo", timeout=_PATIENCE)
    # Ranks may have counted differently: some of them alone may have made a mesh before.
    queue = broadcast_object(f"lmc_dist/units/{next(_counter)}")
    return UnitMesh(num_groups, own, groups[own], everyone, queue)
