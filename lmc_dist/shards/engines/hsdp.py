"""torch HSDP (`fully_shard` over a 2-D mesh): FSDP2 within each of several replicas of the model.

The mesh is (replicas R, shards S) over all R·S ranks in order: rank r·S + s holds shard s of replica r. Every rank owns
one of R equal runs of its shard (rule `hsdp-R`), so a vector is read without communication, each element once and by
one rank, and all ranks write an equal part of the log. To write a vector, the ranks that hold the same shard gather it.

That the replicas are equal is what all this rests on, so it is checked whenever weights or optimizer state are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from lmc_dist.errors import LmcError
from lmc_dist.runtime import AgreedError, agreement
from lmc_dist.shards.checksum import BLOCK, tensor_checksum
from lmc_dist.shards.engines.fsdp2 import FSDP2Shards
from lmc_dist.shards.engines.protocol import State
from lmc_dist.shards.vector import ShardedVector

_SCRATCH = 32 * BLOCK  # float64 elements


def fsdp_shards(module: FSDPModule, optimizer: Any, scaler: Any = None) -> FSDP2Shards:
    """The shards of an FSDP2 or HSDP module, as its mesh has one or two dimensions. Collective."""
    assert isinstance(module, nn.Module)
    meshes = (p.device_mesh for p in module.parameters() if isinstance(p, DTensor))
    mesh = next(meshes, None)
    kind = HSDPShards if mesh is not None and mesh.ndim == 2 else FSDP2Shards
    return kind(module, optimizer, scaler)


class HSDPShards(FSDP2Shards):
    """The shards of an HSDP model and its torch optimizer. Every rank constructs one.

    Args:
        module: The root that `fully_shard` was applied to.
        optimizer: A torch optimizer over its parameters.
        scaler: The loop's `GradScaler`.

    Attributes:
        replicas: R.
        mesh: (R, S), of all ranks in order.

    Raises:
        LmcError: As of FSDP2; a mesh over a part of the ranks or in another order.
    """

    placements = (Replicate(), Shard(0))

    def __init__(self, module: nn.Module, optimizer: Any, scaler: Any = None) -> None:
        self.mesh = next(p.device_mesh for p in module.parameters() if isinstance(p, DTensor))
        self.replicas, self.num_shards = self.mesh.shape
        self.name = f"hsdp-{self.replicas}"
        super().__init__(module, optimizer, scaler)

    def _check_placement(self, name: str, parameter: Any) -> None:
        super()._check_placement(name, parameter)
        mesh = parameter.device_mesh
        if mesh.mesh.flatten().tolist() != list(range(mesh.size())):
            raise LmcError(
                f"HSDP over a mesh of ranks {mesh.mesh.tolist()} is not supported: replicas of neighbouring ranks are, as "
                "init_device_mesh makes them"
            )
        if mesh.shape != self.mesh.shape:
            raise LmcError(
                f"HSDP: {name} lies on a mesh {tuple(mesh.shape)}, others on {tuple(self.mesh.shape)}: give every unit the "
                "same one"
            )

    def _shard(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return self.layout.owned(name, self._held(tensor))

    @torch.no_grad()
    def _fill(self, targets: Callable[[str], torch.Tensor], values: ShardedVector) -> None:
        """Every replica gets the whole shard from its copies' owners, one parameter at a time. Collective."""
        group, device = self.mesh.get_group(0), self.device
        for slot in values.layout:
            mine = values.flat[slot.offset : slot.offset + slot.padded].to(device)
            parts = [torch.empty_like(mine) for _ in range(self.replicas)]
            dist.all_gather(parts, mine.contiguous(), group=group)
            target = self._held(targets(slot.spec.name))
            target.copy_(torch.cat(parts)[: target.numel()])

    # --- logging ---------------------------------------------------------------------------------------------------

    def watch(self, before: Callable[[], None], after: Callable[[], None], keeps_gradient: bool) -> Callable[[], None]:
        with agreement(self.layout.group):
            if any(group.gradient_divide_factor is not None for group in self._param_groups()):
                raise LmcError(
                    "HSDP with set_gradient_divide_factor rounds otherwise than without: only gradients averaged over the "
                    "ranks by FSDP2 itself can be logged"
                )
        return super().watch(before, after, keeps_gradient)

    def is_local_pass(self) -> bool:
        group = next(self._param_groups())
        if group.reduce_grads and not group.all_reduce_grads:
            raise LmcError(
                "a pass that reduces its gradient within each replica alone (set_requires_all_reduce(False)) cannot be "
                "logged: accumulate by set_requires_gradient_sync(False), or let every pass reduce"
            )
        return super().is_local_pass()

    def _check_gradient(self) -> None:
        super()._check_gradient()
        if any(group._partial_reduce_output is not None for group in self._param_groups()):
            raise LmcError("a gradient was asked for inside an accumulation window: call it after an optimizer step")

    # --- replicas are equal ----------------------------------------------------------------------------------------

    def read(self) -> ShardedVector:
        """A copy of what this rank owns of the parameters, in host memory, the same in all replicas. Collective.

        Raises:
            LmcError: Replicas hold other weights.
        """
        self.check_replicas("weights", self.masters)
        return super().read()

    def read_state(self) -> State:
        """The optimizer's state, copied. Collective.

        Raises:
            LmcError: As of FSDP2; replicas hold other states.
        """
        with agreement(self.layout.group):
            vectors, scalars = super().read_state()
        for key in sorted(vectors):
            states = {name: self.base.state[master][key] for name, master in self.masters.items()}
            self.check_replicas(f"'{key}' of the optimizer", states)
        return vectors, scalars

    @torch.no_grad()
    def check_replicas(self, what: str, tensors: Mapping[str, Any]) -> None:
        """Checks that the ranks that should hold the same shard hold the same bits. Collective.

        Two sums over a rank's whole shard are compared, 16 bytes a rank; where they differ, those of each parameter.

        Args:
            what: What the tensors are, for the error.
            tensors: By parameter name, lying like the parameters.

        Raises:
            LmcError: They do not; which replica, rank and parameter is said.
        """
        held = {name: self._held(tensor.detach()) for name, tensor in tensors.items()}
        first = next(iter(held.values()))
        scratch = torch.empty(_SCRATCH, dtype=torch.float64, device=first.device)
        sums = torch.stack([tensor_checksum(shard, scratch) for shard in held.values()])  # (P, 2)
        # a parameter's place among the others counts as well, or values that went to the wrong one would go unseen
        place = torch.arange(1, len(sums) + 1, device=sums.device).unsqueeze(1)
        if self._unequal_ranks((sums * place).sum(0)) is None:
            return
        for name, row in zip(held, sums, strict=True):
            if (found := self._unequal_ranks(row)) is not None:
                (odd, shard), (usual, _) = (divmod(rank, self.num_shards) for rank in found)
                raise AgreedError(
                    f"replica {odd} does not hold replica {usual}'s {what}: rank {found[0]} has another {name} than rank "
                    f"{found[1]}, and both hold shard {shard} of {self.num_shards}. Start all {self.replicas} replicas from the "
                    "same weights and change them alike; where training alone made them differ, suspect the hardware of these "
                    "ranks, and resume the run from its log"
                )
        raise AssertionError("the sums of all parameters differ, and those of none")

    def _unequal_ranks(self, sums: torch.Tensor) -> tuple[int, int] | None:
        """(a rank whose (2,) sums are not those of most ranks with its shard, one of those); None where none is. Collective."""
        table = torch.zeros(self.layout.world_size, 2, dtype=torch.int64)
        table[self.layout.rank] = sums.cpu()
        dist.all_reduce(table, group=self.layout.group)
        rows = [tuple(row) for row in table.tolist()]
        for shard in range(self.num_shards):
            copies = rows[shard :: self.num_shards]
            usual = copies.index(Counter(copies).most_common(1)[0][0])  # the first replica where it is undecided
            for replica, row in enumerate(copies):
                if row != copies[usual]:
                    return replica * self.num_shards + shard, usual * self.num_shards + shard
        return None
