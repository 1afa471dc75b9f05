"""Steps of a torch optimizer as a training loop takes them: watched by the optimizer's own hooks.

What torch keeps apart, and DeepSpeed does in one call, is put together here: clipping and unscaling have happened to the
gradients before the optimizer steps, and a `GradScaler` that finds NaN or infinity does not step it at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement
from lmc_dist.shards.engines.clipping import watch_clipping
from lmc_dist.shards.engines.torch_loop import TorchLoopShards
from lmc_dist.shards.vector import ShardedVector


class TorchStepShards(TorchLoopShards):
    """An engine whose training loop calls `step` of a torch optimizer over the module's own parameters. Abstract.

    Attributes:
        scaler: The loop's `torch.amp.GradScaler`, if it has one.
        wrapper: What the loop calls to run the model.
        replay_scale: What `run_pass` multiplies the loss by and `step` divides the gradients by, for float16.
    """

    scaler: Any = None
    wrapper: Any
    replay_scale: float = 1.0
    _norm: float | None = None
    _seen: tuple[float, float, ShardedVector | None] | None = None  # max_norm, norm and gradient before clipping
    _steps: int = 0
    _keeps_gradient: bool = False

    def declare_clipping(self, max_grad_norm: float | None) -> None:
        if max_grad_norm is not None:
            self.max_grad_norm = max_grad_norm

    def _gradient_of(self, name: str) -> torch.Tensor:
        """The gradient that is there for a parameter, lying like it; zeros where there is none."""
        parameter = self.parameters[name]
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    @property
    def _unscale(self) -> float:
        """What the gradients are still multiplied by: fused optimizers divide by it themselves."""
        scale = getattr(self.base, "grad_scale", None)
        return 1.0 if scale is None else 1.0 / float(scale)

    def _present_gradient(self) -> ShardedVector:
        gradient = self._vector(lambda name: self._gradient_of(name).detach()).to(self.master_dtype)
        return gradient if self._unscale == 1.0 else gradient.scale_(self._unscale)

    def step_gradient(self) -> ShardedVector:
        """g_s; where it was clipped, as it was before. Local."""
        kept = None if self._seen is None else self._seen[2]
        return self._present_gradient() if kept is None else kept

    @property
    def grad_norm(self) -> float | None:
        return self._norm

    @property
    def loss_scale(self) -> float:
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def watch(self, before: Callable[[], None], after: Callable[[], None], keeps_gradient: bool) -> Callable[[], None]:
        self._keeps_gradient = keeps_gradient

        def about_to_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with agreement(self.layout.group):
                if any(callable(value) for value in (*args, *kwargs.values())):
                    raise LmcError("optimizer.step(closure) runs its passes inside the step, which cannot be logged")
                self._check_clipping()
            self._norm = self._seen[1] if self._seen else self._present_norm()
            before()
            self._seen = None

        def stepped(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._steps += 1
            found = getattr(self.base, "found_inf", None)  # a fused optimizer's own check
            self.applied = found is None or not float(found)
            after()

        undo = [
            self.base.register_step_pre_hook(about_to_step).remove,
            self.base.register_step_post_hook(stepped).remove,
            self._watch_clipping(),
        ]
        if self.scaler is not None:
            undo.append(self._watch_scaler(before, after))

        def stop() -> None:
            for end in undo:
                end()

        return stop

    def _watch_scaler(self, before: Callable[[], None], after: Callable[[], None]) -> Callable[[], None]:
        scaler, original = self.scaler, self.scaler.step

        def step(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            count = self._steps
            result = original(optimizer, *args, **kwargs)
            if optimizer is self.base and self._steps == count:  # it found NaN or infinity
                self.applied, self._norm, self._seen = False, None, None
                before()
                after()
            return result

        scaler.step = step
        return lambda: setattr(scaler, "step", original)

    # --- clipping --------------------------------------------------------------------------------------------------

    def _watch_clipping(self) -> Callable[[], None]:
        """Notes what torch's clipping does to this engine's gradients."""

        def seen(parameters: list[torch.Tensor], max_norm: float, total_norm: torch.Tensor) -> None:
            if math.isfinite(max_norm):  # the HF Trainer without clipping measures the norm by clipping to infinity
                self._note_clipping({id(p) for p in parameters}, max_norm, total_norm)

        return watch_clipping(seen)

    def _note_clipping(self, clipped: set[int], max_norm: float, total_norm: Any) -> None:
        mine = {id(p) for p in self.parameters.values()}
        if not mine & clipped:
            return
        norm = float(total_norm.full_tensor() if hasattr(total_norm, "full_tensor") else total_norm)
        measured = self._present_norm()
        with agreement(self.layout.group):
            if mine - clipped:
                raise LmcError("a part of the gradients was clipped on its own: only one global norm can be logged")
            if self._seen is not None:
                raise LmcError("gradients were clipped twice before one step: only one clipping can be logged")
            if norm == norm and abs(norm - measured) > 1e-3 * measured:
                raise LmcError(
                    f"gradients were clipped by a norm of {norm:.6g}, their global 2-norm is {measured:.6g}: other norms "
                    "cannot be logged; with a GradScaler call scaler.unscale_(optimizer) first"
                )
        self._seen = (max_norm, norm, self._present_gradient() if self._keeps_gradient else None)

    def _check_clipping(self) -> None:
        if self._seen is None and self.max_grad_norm > 0:
            raise LmcError(
                f"max_grad_norm={self.max_grad_norm} was declared, but nothing clipped this step's gradients: clip them "
                "with torch.nn.utils.clip_grad_norm_ (or accelerator.clip_grad_norm_), or leave max_grad_norm out"
            )
        if self._seen is not None and self._seen[0] != self.max_grad_norm:
            raise LmcError(
                f"the training loop clips gradients to {self._seen[0]}, declared is {self.max_grad_norm or 'no clipping'}: "
                f"pass max_grad_norm={self._seen[0]} to TrainingLogger"
            )

    def _present_norm(self) -> float:
        """‖g‖₂ of the gradient that is there, unscaled; only a sum leaves the device. Collective."""
        shards = (self._shard(name, self._gradient_of(name).detach()) for name in self.parameters)
        norms = [torch.linalg.vector_norm(shard, dtype=torch.float64) for shard in shards]
        square = torch.stack(norms).square().sum().reshape(1).cpu()
        if self.layout.world_size > 1:
            dist.all_reduce(square, group=self.layout.group)
        return float(square.sqrt()) * self._unscale

    # --- replay ----------------------------------------------------------------------------------------------------

    def _accumulating(self, is_local: bool) -> Any:
        """A context in which a pass keeps its gradient on its rank, or reduces it."""
        return nullcontext()

    def run_pass(
        self, inputs: dict[str, torch.Tensor], num_items: float, scale: float, is_last: bool, is_local: bool
    ) -> torch.Tensor:
        items = torch.tensor(num_items, dtype=torch.float32, device=self.device)
        with self._accumulating(is_local):
            with self._autocast():
                loss = self.wrapper(**inputs, num_items_in_batch=items).loss
            (loss * (scale * self.replay_scale)).backward()
        return loss.detach()

    @torch.no_grad()
    def forward(self, inputs: dict[str, torch.Tensor]) -> Any:
        with self._autocast():
            return self.wrapper(**inputs)

    def run_loss(
        self, inputs: dict[str, torch.Tensor], loss: Callable[[Any], torch.Tensor], is_last: bool, is_local: bool
    ) -> torch.Tensor:
        with self._accumulating(is_local):
            with self._autocast():
                value = loss(self.wrapper(**inputs))
            # DDP and FSDP2 average over the ranks
            (value * (self.layout.world_size * self.replay_scale)).backward()
        return value.detach()

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        with torch.autocast(self.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            yield

    def step(self) -> bool:
        if self.replay_scale > 1:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.div_(self.replay_scale)
            if not math.isfinite(self._present_norm()):
                self.replay_scale /= 2
                self.base.zero_grad()
                return False
        if self.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.max_grad_norm)
        self.base.step()
        self.clear_gradients()
        return True

    def clear_gradients(self) -> None:
        self.base.zero_grad()
