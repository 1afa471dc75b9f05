"""What DeepSpeed's engines have in common: how they run passes, how their steps are watched, how they are set up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import torch

from lmc_dist.errors import LmcError
from lmc_dist.shards.engines.protocol import EngineShards, check_kept
from lmc_dist.shards.engines.torch_loop import counter_device
from lmc_dist.shards.engines.wrappers import find_wrapper

# Settings that rounding depends on; the others concern speed, output, or are given by replay itself.
NUMERIC = (
    "zero_optimization",
    "bf16",
    "bfloat16",
    "fp16",
    "data_types",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "torch_autocast",
)


def backward_micro_batch(
    engine: Any, inputs: dict[str, torch.Tensor], num_items: float, scale: float, is_boundary: bool
) -> torch.Tensor:
    """One forward and backward pass under DeepSpeed of scale · Σ nll / num_items; returns Σ nll / num_items. Collective.

    DeepSpeed then averages over ranks, so a loss meant as a sum over W ranks needs scale = W. The order of these
    operations is the Hugging Face Trainer's, which makes its runs repeatable bit for bit.
    """
    engine.set_gradient_accumulation_boundary(is_boundary)
    loss = engine(**inputs, num_items_in_batch=torch.tensor(num_items, dtype=torch.float32, device=engine.device)).loss
    engine.backward(loss * scale, scale_wrt_gas=False)
    return loss.detach()


def read_counters(optimizer: Any, flats: Iterable[torch.Tensor]) -> dict[str, float]:
    """State of one element, such as Adam's `step`: torch keeps a tensor, DeepSpeed's own optimizers a number. Local."""
    return {
        key: float(value)
        for flat in flats
        for key, value in optimizer.state.get(flat, {}).items()
        if isinstance(value, (int, float)) or (torch.is_tensor(value) and value.numel() == 1 and value.dim() == 0)
    }


def as_counter(optimizer: Any, value: float, flat: torch.Tensor) -> Any:
    """A counter as the optimizer keeps it for a flat tensor. Local."""
    if type(optimizer).__module__.startswith("deepspeed."):
        return int(value)
    group = next((g for g in optimizer.param_groups if any(p is flat for p in g["params"])), optimizer.param_groups[0])
    return torch.tensor(value, dtype=torch.float32, device=counter_device(group, flat))


def check_flat_state(optimizer: Any, flats: Iterable[torch.Tensor], what: str) -> None:
    """Checks that the log can hold what an optimizer keeps for DeepSpeed's flat masters, each called `what`. Local.

    Raises:
        LmcError: Something is neither of a master's shape nor a number.
    """
    for i, flat in enumerate(flats):
        for key, value in optimizer.state.get(flat, {}).items():
            check_kept(optimizer, key, value, flat.shape, f"{what} {i}")


class DeepSpeedShards(EngineShards):
    """An engine of DeepSpeed. Abstract.

    Attributes:
        engine: The `DeepSpeedEngine`; None where only its module and optimizer were given.
        optimizer: DeepSpeed's, or torch's where the engine steps that itself.
    """

    engine: Any
    optimizer: Any

    def _engine(self) -> Any:
        """The engine, looked for where it was not given.

        Raises:
            LmcError: There is none.
        """
        if self.engine is None:
            self.engine = find_wrapper(self.module, self.optimizer)
        if self.engine is None:
            raise LmcError("the DeepSpeed engine is needed: pass it, and not its module, to engine_shards()")
        return self.engine

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine().device)

    @property
    def settings(self) -> dict[str, Any]:
        given = self._engine()._config._param_dict
        return json.loads(json.dumps({key: given[key] for key in NUMERIC if key in given}, default=str))

    def declare_clipping(self, max_grad_norm: float | None) -> None:
        if max_grad_norm is not None and max_grad_norm != self.max_grad_norm:
            raise LmcError(
                f"max_grad_norm={max_grad_norm} was given, but DeepSpeed clips to gradient_clipping={self.max_grad_norm}"
            )

    def is_local_pass(self) -> bool:
        return False  # when DeepSpeed reduces follows from its stage and the end of the window

    def run_pass(
        self, inputs: dict[str, torch.Tensor], num_items: float, scale: float, is_last: bool, is_local: bool
    ) -> torch.Tensor:
        return backward_micro_batch(self._engine(), inputs, num_items, scale, is_last)

    @torch.no_grad()
    def forward(self, inputs: dict[str, torch.Tensor]) -> Any:
        return self._engine()(**inputs)

    def run_loss(
        self, inputs: dict[str, torch.Tensor], loss: Callable[[Any], torch.Tensor], is_last: bool, is_local: bool
    ) -> torch.Tensor:
        engine = self._engine()
        engine.set_gradient_accumulation_boundary(is_last)
        value = loss(engine(**inputs))
        engine.backward(value * self.layout.world_size, scale_wrt_gas=False)  # it averages over the ranks
        return value.detach()

    def step(self) -> bool:
        self._engine().step()
        return True

    def clear_gradients(self) -> None:
        engine = self._engine()
        is_wrapped = engine.bfloat16_enabled() or engine.fp16_enabled() or engine.zero_optimization()
        if is_wrapped and hasattr(engine.optimizer, "zero_grad"):
            engine.optimizer.zero_grad()
        else:
            engine.zero_grad()

    def destroy(self) -> None:
        self._engine().destroy()


class WrappedStepShards(DeepSpeedShards):
    """A DeepSpeed engine whose optimizer has a `step` of DeepSpeed's, which checks for overflow and clips. Abstract."""

    def watch(self, before: Callable[[], None], after: Callable[[], None], keeps_gradient: bool) -> Callable[[], None]:
        optimizer = self.optimizer
        if getattr(optimizer, "torch_autocast_gradscaler", None) is not None:
            raise LmcError(
                "DeepSpeed's torch_autocast in float16 steps through a scaler of its own, which is not supported: use its "
                "fp16 or bf16 settings"
            )
        original = optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            before()
            result = original(*args, **kwargs)
            after()
            return result

        optimizer.step = step
        return lambda: setattr(optimizer, "step", original)

    @property
    def applied(self) -> bool:  # type: ignore[override]
        return not bool(self.optimizer.overflow)

    @property
    def grad_norm(self) -> float | None:
        norm = getattr(self.optimizer, "_global_grad_norm", None)
        return None if norm is None else float(norm)

    @property
    def max_grad_norm(self) -> float:  # type: ignore[override]
        return float(self.optimizer.clip_grad)

    @property
    def loss_scale(self) -> float:
        return float(getattr(self.optimizer, "loss_scale", 1.0))
