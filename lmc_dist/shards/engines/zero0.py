"""DeepSpeed without partitions (stage 0): every rank holds the whole model, and all gradients are reduced to all ranks.

In float32 the optimizer is torch's own, over the parameters. In bfloat16 or float16 DeepSpeed's wrapper of it steps a
float32 copy of each parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement, cpu_group
from lmc_dist.shards.engines.driven import DeepSpeedShards, WrappedStepShards
from lmc_dist.shards.engines.replicated import ReplicatedMasters
from lmc_dist.shards.engines.torch_loop import trainable
from lmc_dist.shards.engines.torch_step import TorchStepShards
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector


class ZeRO0Shards(DeepSpeedShards, TorchStepShards, ReplicatedMasters):
    """A DeepSpeed engine of stage 0 that computes in float32.

    Args:
        engine: The engine.
    """

    name = "deepspeed-zero0"

    def __init__(self, engine: Any) -> None:
        self.engine = self.wrapper = engine
        self.optimizer = engine.optimizer
        self.scaler = engine.torch_autocast_z0_gradscaler
        self._set_model(engine.module, engine.optimizer)

    @property
    def max_grad_norm(self) -> float:  # type: ignore[override]
        return float(self.engine.gradient_clipping())

    def _watch_clipping(self) -> Callable[[], None]:
        """DeepSpeed clips with a function of its own, which keeps the norm to itself."""
        engine, original = self.engine, self.engine.clip_fp32_gradients

        def clip() -> None:
            gradient = self._present_gradient() if self._keeps_gradient else None
            self._seen = (self.max_grad_norm, self._present_norm(), gradient)
            original()

        engine.clip_fp32_gradients = clip
        return lambda: setattr(engine, "clip_fp32_gradients", original)


class UnfusedShards(WrappedStepShards, ReplicatedMasters):
    """A DeepSpeed engine of stage 0 that computes in bfloat16 or float16, with float32 masters.

    Args:
        module: The module of the engine.
        optimizer: Its `FP16_UnfusedOptimizer`, which serves bfloat16 as well.
        engine: The engine itself.
    """

    name = "deepspeed-zero0"

    def __init__(self, module: nn.Module, optimizer: Any, engine: Any = None) -> None:
        self.module, self.optimizer, self.engine = module, optimizer, engine
        self.parameters = trainable(module)
        names = {id(p): name for name, p in self.parameters.items()}
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        masters = {names[id(p)]: m for ps, ms in pairs for p, m in zip(ps, ms, strict=True)}
        with agreement(cpu_group()):
            if missing := [name for name in self.parameters if name not in masters]:
                raise LmcError(f"trainable parameters that the optimizer has not, first {missing[0]}: freeze them")
            self.masters = {name: masters[name] for name in self.parameters}
            self._set_optimizer(optimizer.optimizer)
        self.layout = ShardLayout.of_module(module, cpu_group())
        self._scale = 1.0

    def _write_masters(self, theta: ShardedVector) -> None:
        super()._write_masters(theta)
        for name, parameter in self.parameters.items():
            parameter.detach().copy_(self.masters[name].detach())

    def watch(self, before: Callable[[], None], after: Callable[[], None], keeps_gradient: bool) -> Callable[[], None]:
        def note_scale() -> None:
            self._scale = self.loss_scale
            before()

        return super().watch(note_scale, after, keeps_gradient)

    @property
    def grad_norm(self) -> float | None:
        norm = super().grad_norm  # this optimizer leaves it scaled
        return None if norm is None else norm / self._scale

    def step_gradient(self) -> ShardedVector:
        """g_s in float32. Local."""
        scale = self.loss_scale
        shards = {}
        for name, parameter in self.parameters.items():
            gradient = self.masters[name] * 0.0 if parameter.grad is None else parameter.grad
            shards[name] = self._slice(name, gradient).float().div(scale).cpu()
        return ShardedVector.from_shards(self.layout, shards)
