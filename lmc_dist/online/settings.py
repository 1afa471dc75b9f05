"""How requests are answered while training runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmc_dist.curvature import HVPConfig
from lmc_dist.errors import LmcError
from lmc_dist.unlearn.head import check_head


@dataclass(frozen=True)
class OnlineSettings:
    """How requests are answered while training runs.

    Attributes:
        replay_head: `all`: exact replay on the live engine; or steps replayed before the recursion takes over, or `auto`.
        hessian_mode: Curvature of the recursion.
        damping: λ.
        head_tolerance: `auto`: when the two agree.
        max_growth: A correction that grew by more than this in one step is not trusted: the tangent of a young Adam does
            not describe what a deletion does to it. None trusts any.
        fallback: What is done where the correction cannot be computed or trusted (steps whose tensors are gone, divergence, an
            update rule that is not known): `replay` from a snapshot, or `refuse`.
        poll_every: Steps between looks at the ledger.
        relearn_per_step: Companions of removed batches that each later batch takes up; 0 leaves them out.
        signing_key: PEM file of the Ed25519 key that signs the audit; None does not sign.
    """

    replay_head: int | Literal["auto", "all"] = "all"
    hessian_mode: str = "GGN"
    damping: float = 0.0
    head_tolerance: float = 0.05
    max_growth: float | None = 2.0
    fallback: Literal["replay", "refuse"] = "replay"
    poll_every: int = 1
    relearn_per_step: int = 2
    signing_key: str | None = None

    def check(self) -> None:
        """Local.

        Raises:
            LmcError: Values out of range.
        """
        HVPConfig(self.hessian_mode, self.damping)
        if self.replay_head != "all":
            check_head(self.replay_head, self.head_tolerance)
        if self.fallback not in ("replay", "refuse"):
            raise LmcError(f"online.fallback must be replay or refuse, not {self.fallback!r}")
        if self.max_growth is not None and not self.max_growth >= 1:
            raise LmcError(f"online.max_growth must be at least 1 or null, got {self.max_growth}")
        for name, number, least in (("poll_every", self.poll_every, 1), ("relearn_per_step", self.relearn_per_step, 0)):
            if number < least:
                raise LmcError(f"online.{name} must be at least {least}, got {number}")

    @property
    def hvp(self) -> HVPConfig:
        """Curvature and damping."""
        return HVPConfig(self.hessian_mode, self.damping)

    @property
    def method(self) -> str:
        """Its name in the log and the audit."""
        if self.replay_head == "all":
            return "replay"
        return f"{self.replay_head}+{self.hessian_mode}" if self.replay_head else self.hessian_mode
