"""What engines have in common whose masters are tensors of the parameters' shapes, stepped by a torch optimizer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lmc_dist.errors import LmcError
from lmc_dist.shards.engines.protocol import EngineShards, State, check_kept
from lmc_dist.shards.vector import ShardedVector


class TorchLoopShards(EngineShards):
    """Each master is shaped like its parameter, and so is the optimizer's state. Abstract.

    Attributes:
        masters: What the optimizer steps: the parameters themselves unless DeepSpeed keeps copies of them.
    """

    masters: dict[str, Any]

    def _set_optimizer(self, optimizer: Any) -> None:
        """Takes the optimizer whose groups hold exactly the masters.

        Raises:
            LmcError: Not a torch optimizer, or one of other parameters.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise LmcError(
                f"{self.name}: the training loop's torch optimizer is needed, got {type(optimizer).__name__}: pass "
                "engine_shards(model, optimizer)"
            )
        names = {id(p): name for name, p in self.masters.items()}
        self._groups: dict[str, int] = {}
        for i, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                if id(p) in names:
                    self._groups[names[id(p)]] = i
                elif p.requires_grad:
                    raise LmcError(
                        f"{self.name}: the optimizer holds a parameter of shape {tuple(p.shape)} that the model has not: "
                        "build it after the model was wrapped, over model.parameters()"
                    )
        if missing := [name for name in self.masters if name not in self._groups]:
            raise LmcError(
                f"{self.name}: trainable parameters that the optimizer has not, first {missing[0]}: freeze them with "
                "requires_grad_(False)"
            )
        self.base = optimizer

    @abstractmethod
    def _shard(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's 1-D view of a tensor that lies like the named parameter."""

    @abstractmethod
    def _fill(self, targets: Callable[[str], torch.Tensor], values: ShardedVector) -> None:
        """Writes a vector into tensors that lie like the parameters. Collective."""

    def _vector(self, tensors: Callable[[str], torch.Tensor]) -> ShardedVector:
        """A copy in host memory."""
        return ShardedVector.from_shards(
            self.layout, {name: self._shard(name, tensors(name)).cpu() for name in self.parameters}
        )

    def read(self) -> ShardedVector:
        """A copy of the parameters' shards in host memory. Local."""
        return self._vector(lambda name: self.masters[name].detach())

    def _state(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return ((name, self.base.state.get(p, {})) for name, p in self.masters.items())

    def held(self) -> Iterator[torch.Tensor]:
        return (self._shard(name, master.detach()) for name, master in self.masters.items())

    def check_state(self) -> None:
        for name, state in self._state():
            for key, value in state.items():
                check_kept(self.base, key, value, self.masters[name].shape, name)

    def read_state(self) -> State:
        """The optimizer's state, copied. Local.

        Raises:
            LmcError: Parameters whose counters differ, or without state where others have some; state that is neither of
                a parameter's shape nor a number.
        """
        self.check_state()
        per_element: dict[str, dict[str, torch.Tensor]] = {}
        counters: dict[str, dict[str, float]] = {}
        for name, state in self._state():
            for key, value in state.items():
                if value is None:
                    continue
                if torch.is_tensor(value) and value.shape == self.masters[name].shape and value.dim():
                    per_element.setdefault(key, {})[name] = value
                else:
                    counters.setdefault(key, {})[name] = float(value)
        for key, found in (per_element | counters).items():
            if missing := [name for name in self.parameters if name not in found]:
                raise LmcError(
                    f"{missing[0]} has no '{key}' in the optimizer's state, as it never got a gradient: freeze it with "
                    "requires_grad_(False)"
                )
        for key, values in counters.items():
            if len(set(values.values())) > 1:
                raise LmcError(
                    f"parameters disagree about '{key}' of the optimizer: some got no gradient in some steps"
                )
        vectors = {key: self._vector(tensors.__getitem__) for key, tensors in per_element.items()}
        return vectors, {key: next(iter(values.values())) for key, values in counters.items()}

    def write_state(self, vectors: dict[str, ShardedVector], scalars: dict[str, float]) -> None:
        self.base.state.clear()
        if not vectors and not scalars:
            return
        for name, master in self.masters.items():
            where = counter_device(self.base.param_groups[self._groups[name]], master)
            self.base.state[master] = {
                **{key: torch.zeros_like(master) for key in vectors},
                **{key: torch.tensor(value, dtype=torch.float32, device=where) for key, value in scalars.items()},
            }
        for key, vector in vectors.items():
            self._fill(lambda name, key=key: self.base.state[self.masters[name]][key], vector)  # type: ignore[misc]

    @property
    def master_dtype(self) -> torch.dtype:
        return next(iter(self.masters.values())).dtype

    @property
    def group_of(self) -> dict[str, int]:
        return self._groups

    @property
    def has_state(self) -> bool:
        return any(state for _, state in self._state())


def counter_device(group: dict[str, Any], parameter: torch.Tensor) -> torch.device:
    """Where a torch optimizer keeps a parameter's `step`: a kernel that does the whole step reads it itself. Local."""
    on_device = group.get("fused") or group.get("capturable")
    return parameter.device if on_device else torch.device("cpu")


def trainable(module: torch.nn.Module) -> dict[str, Any]:
    """Trainable parameters by name, tied ones once."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
