"""What follows from the settings by which requests are answered."""

from __future__ import annotations

from lmc_dist.config import OnlineSettings
from lmc_dist.curvature import HVPConfig
from lmc_dist.errors import LmcError
from lmc_dist.unlearn.head import check_head


def check_settings(settings: OnlineSettings) -> None:
    """Local.

    Raises:
        LmcError: Values out of range.
    """
    curvature(settings)
    if settings.replay_head != "all":
        check_head(settings.replay_head, settings.head_tolerance)
    if settings.fallback not in ("replay", "refuse"):
        raise LmcError(f"online.fallback must be replay or refuse, not {settings.fallback!r}")
    if settings.max_growth is not None and not settings.max_growth >= 1:
        raise LmcError(f"online.max_growth must be at least 1 or null, got {settings.max_growth}")
    for name, least in (("poll_every", 1), ("relearn_per_step", 0)):
        if (number := getattr(settings, name)) < least:
            raise LmcError(f"online.{name} must be at least {least}, got {number}")


def curvature(settings: OnlineSettings) -> HVPConfig:
    """Curvature and damping of the recursion. Pure."""
    return HVPConfig(settings.hessian_mode, settings.damping)


def method_name(settings: OnlineSettings) -> str:
    """What a method is called in the log and the audit. Pure."""
    if settings.replay_head == "all":
        return "replay"
    return f"{settings.replay_head}+{settings.hessian_mode}" if settings.replay_head else settings.hessian_mode
