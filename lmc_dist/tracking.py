"""Weights & Biases: a run's progress as it happens and its final figures, from rank 0, where a project is named.

wandb does the work. Without a key, and unless told otherwise, runs are written to disk and nothing touches the network;
`wandb sync` sends them later.
"""

from __future__ import annotations

import netrc
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lmc_dist.audit.hidden import SALTED, hidden
from lmc_dist.config import Config, WandbConfig
from lmc_dist.console import Listener
from lmc_dist.errors import LmcError, first_line

KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


class Tracker:
    """Where a run's figures go; nowhere without a run of wandb, as on all ranks but the first.

    Args:
        run: wandb's.
    """

    def __init__(self, run: Any = None) -> None:
        self.run = run
        self._methods: set[str] = set()

    @property
    def listeners(self) -> list[Listener]:
        """For `console.StepProgress`."""
        return [] if self.run is None else [self.event]

    def event(self, told: Mapping[str, Any]) -> None:
        """A step that is done, under its method's name and over its own steps. Local."""
        if self.run is None:
            return
        method = told["method"]
        if method not in self._methods:
            self._methods.add(method)
            self.run.define_metric(f"{method}/step")
            self.run.define_metric(f"{method}/*", step_metric=f"{method}/step")
        self.run.log({f"{method}/{key}": x for key, x in told.items() if isinstance(x, (int, float))})

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Final figures; nested ones get names with dots. Local."""
        if self.run is not None:
            self.run.summary.update(flat(figures))


def flat(figures: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{a: {b: 1}} → {a.b: 1}."""
    found: dict[str, Any] = {}
    for key, value in figures.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def audit_summary(records: Sequence[Any]) -> dict[str, Any]:
    """What audit records (`unlearn.audit.AuditRecord`) say together."""
    growths = [record.growth_max for record in records if record.growth_max is not None]
    return {
        "records": len(records),
        "modes": ", ".join(dict.fromkeys(record.mode for record in records)),
        "hvp_calls": sum(record.hvp_calls for record in records),
        "K_used_max": max(record.K_used for record in records),
        "v_norm_max": max(record.v_norm for record in records),
        "growth_max": max(growths, default=None),
        "stopped_by": dict(Counter(record.stopped_by for record in records)),
    }


def effective_mode(settings: WandbConfig) -> str:
    """`online`, `offline` or `disabled`. Local.

    `auto` is what WANDB_MODE says; else online where there is a key and offline where there is none.
    """
    if settings.project is None:
        return "disabled"
    if settings.mode != "auto":
        return settings.mode
    given = {"dryrun": "offline", "run": "online"}.get(mode := os.environ.get("WANDB_MODE", ""), mode)
    if given in ("online", "offline", "disabled"):
        return given
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether wandb would find a key without asking: in the environment or in the netrc file."""
    if any(os.environ.get(name) for name in KEYS):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def check_tracking(settings: WandbConfig) -> None:
    """Checks that a run can be tracked as asked for. Local.

    Raises:
        LmcError: wandb is not installed, or `online` without a key, which would ask for one.
    """
    mode = effective_mode(settings)
    if mode == "disabled":
        return
    if find_spec("wandb") is None:
        raise LmcError("wandb.project asks for Weights & Biases: pip install 'lmc_dist[wandb]', or leave it out")
    if mode == "online" and not has_key():
        raise LmcError("wandb.mode is online and there is no key: set WANDB_API_KEY, or use --wandb.mode offline")


def shown_settings(config: Config) -> dict[str, Any]:
    """The settings as a server may have them: without the ids of what is forgotten. Pure."""
    values = asdict(config)
    if values["slurm"]["arguments"]:  # a command line, which may name them
        values["slurm"]["arguments"] = f"{SALTED}not sent"
    return values | {section: hidden(values[section], "not sent") for section in ("forget", "request")}


@contextmanager
def tracked(config: Config, is_main: bool, folder: str | Path | None = None) -> Iterator[Tracker]:
    """A run at Weights & Biases for as long as the block lasts; an error in it marks the run as failed.

    Args:
        config: Its settings, all of which the run shows.
        is_main: False on all ranks but the first, which get a tracker that does nothing.
        folder: Where wandb writes, unless WANDB_DIR says; None is the present folder.

    Raises:
        LmcError: As of `check_tracking`, or wandb cannot start. On the first rank alone.
    """
    settings = config.wandb
    if not is_main or effective_mode(settings) == "disabled":
        yield Tracker()
        return
    check_tracking(settings)
    import wandb

    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        run = wandb.init(
            project=settings.project,
            name=settings.name,
            group=settings.group,
            tags=[tag.strip() for tag in settings.tags.split(",") if tag.strip()],
            mode=effective_mode(settings),  # type: ignore[arg-type]
            dir=None if folder is None or "WANDB_DIR" in os.environ else str(folder),
            config=shown_settings(config),
            # Its own lines would stand between those of the run, and a job's log keeps the output anyway.
            # wandb-metadata.json would hold the command line, with the ids of what is forgotten; with it go the names of
            # host, user and hardware, not the system's metrics.
            settings=wandb.Settings(console="off", silent=True, x_disable_meta=True),
        )
    except Exception as error:  # it has many types of its own
        raise LmcError(f"wandb cannot start: {first_line(error)}; see --wandb.mode") from error
    try:
        yield Tracker(run)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish(exit_code=0)
