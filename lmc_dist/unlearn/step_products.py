"""(C_s + λI) v of one step for all vectors under propagation, and what that costs."""

from __future__ import annotations

from collections.abc import Callable

from lmc_dist.curvature import HVPConfig, Loss, LowRank, hvp_apply, low_rank_basis
from lmc_dist.planner.facts import model_facts
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import BatchSource
from lmc_dist.trajectory.counterfactual import EditedStep
from lmc_dist.trajectory.kept import KeptCurvature
from lmc_dist.unlearn.memory_guard import MemoryGuard
from lmc_dist.unlearn.plan import gradients_per_basis, gradients_per_step
from lmc_dist.unlearn.source import micro_batches, share


class StepProducts:
    """The curvature of a sweep.

    Args:
        config: Mode and damping.
        module: The model on shards; None with `kept`.
        loss: Its loss.
        batches: Samples by id; None with `kept`.
        kept: Curvature computed before, in place of the model's.
        block: Vectors that share a pass; None is all.
        anchor: `low_rank`: step whose basis serves a step. It depends on the request alone, so that units have the same
            curvature in whatever company.
        at: θ of a step, and the step as the counterfactual has it. Collective.

    Attributes:
        cost: Gradients of a whole batch computed so far.
        missed: `low_rank`: largest share of C z, z random, that a basis left out.
    """

    def __init__(
        self,
        config: HVPConfig,
        module: ShardedModule | None,
        loss: Loss,
        batches: BatchSource | None,
        kept: KeptCurvature | None = None,
        block: int | None = None,
        anchor: Callable[[int], int] = lambda step: step,
        at: Callable[[int], tuple[ShardedVector, EditedStep]] | None = None,
    ) -> None:
        self.config, self.module, self.loss, self.batches, self.kept = config, module, loss, batches, kept
        self.block, self.anchor, self.at = block, anchor, at
        self.cost = 0.0
        self.missed = None if kept is None else max(window.curvature.missed for window in kept.windows)
        self.guard: MemoryGuard | None = None
        if module is not None:
            self.guard = MemoryGuard(model_facts(module.module), module.layout, module.device)
        self.basis: LowRank | None = None
        self.basis_step = 0
        self.counted: int | None = None  # anchor of a basis that is in the cost already

    def __call__(
        self,
        step: int,
        theta: ShardedVector,
        edited: EditedStep,
        vectors: list[ShardedVector],
        gradient: Callable[[], ShardedVector],
    ) -> tuple[list[ShardedVector], int]:
        """The products, and how many of the curvature each vector took. Collective.

        Args:
            step: The step.
            theta: θ_s.
            edited: The step as the counterfactual has it.
            vectors: v of each window, at least one.
            gradient: What `fisher` and `secant` need: the batch gradient, ∇L(θ_s; w').
        """
        config = self.config
        if self.kept is not None:
            found = self.kept.window(step).curvature(vectors)
            return [c.add_(v, alpha=config.damping) for c, v in zip(found, vectors, strict=True)], 1
        assert self.module is not None and self.batches is not None
        micros = micro_batches(edited, self.batches, self.module, "kept") if config.uses_model else []
        base = gradient() if config.mode in ("fisher", "secant") else None
        calls, basis = int(config.mode not in ("none", "low_rank")), None
        if config.mode == "low_rank":
            basis, calls = self._basis(step, theta, edited)
        products: list[ShardedVector] = []
        size = min(self.block or len(vectors), len(vectors))
        if size > 1 and self.guard is not None and (allowed := self.guard.allow(config.mode, size, micros)) < size:
            size = self.block = allowed
        for i in range(0, len(vectors), size):
            part = vectors[i : i + size]
            self.cost += gradients_per_step(config, len(part)) * share(edited, "kept")
            products += hvp_apply(part, config, self.module, self.loss, theta, micros, base, basis=basis)
        return products, calls

    def _basis(self, step: int, theta: ShardedVector, edited: EditedStep) -> tuple[LowRank, int]:
        """The eigenpairs in use, and the products that took if they are taken anew."""
        assert self.module is not None and self.batches is not None
        anchor, products = self.anchor(step), 0
        if self.basis is None or self.basis_step != anchor:
            if anchor != step:  # this sweep, or what was left of it, begins in between
                assert self.at is not None
                theta, edited = self.at(anchor)
            micros = micro_batches(edited, self.batches, self.module, "kept")
            self.basis = low_rank_basis(self.config, self.module, self.loss, theta, micros)
            self.basis_step = anchor
            self.missed = max(self.missed or 0.0, self.basis.missed)
            if anchor != self.counted:
                products, self.counted = self.basis.products, anchor
                self.cost += gradients_per_basis(self.config, products) * share(edited, "kept")
        return self.basis, products
