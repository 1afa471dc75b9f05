"""`lmc log prune`: take parts out of a log, and say what can no longer be forgotten."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lmc_dist.config import Config
from lmc_dist.log_commands.text import check_target, count, size, spans, write_findings
from lmc_dist.trajectory.prune import PrunePlan, dry_run, prune
from lmc_dist.trajectory.record import TIERS
from lmc_dist.trajectory.store import TrajectoryLog


def prune_log(config: Config) -> str:
    """What was (or would be) dropped and what follows, as text. Local: one process does it.

    Raises:
        LmcError: Nothing has been changed: no log, another job writes it, settings that do not fit.
    """
    from tqdm import tqdm

    check_target("json", config.json)
    settings = asdict(config.prune)
    only_says = settings.pop("dry_run")
    before = TrajectoryLog(config.log_dir)
    if only_says:
        plan = dry_run(config.log_dir, **settings)
    else:
        with tqdm(desc="updates made", unit="step", disable=None) as bar:
            plan = prune(config.log_dir, bar.update, **settings)
    lost = losses(before, plan)
    found = {"log_dir": config.log_dir, "dry_run": only_says, "freed": plan.freed, "lost": lost}
    write_findings(config.json, found)
    return prune_text(plan, lost, only_says)


def losses(log: TrajectoryLog, plan: PrunePlan) -> list[str]:
    """What can no longer be done after pruning, in sentences."""
    lost = []
    if plan.first_kept > log.first_step:
        steps = range(log.first_step, plan.first_kept)
        samples = {i for step in steps if log.record(step).applied for i in log.record(step).sample_ids}
        lost.append(
            f"steps {spans(list(steps))} can no longer be forgotten, nor {count(len(samples), 'sample')} that were in them"
        )
    had, has = set(TIERS[log.manifest.storage]), set(TIERS[plan.tier])
    if had & {"update", "theta"} and not has & {"update", "theta"}:
        lost.append("no corrections any more: requests need exact replay (unlearn.replay_head=all)")
    if "gradient" in had - has:
        lost.append("gradients are no longer there: hessian_mode fisher makes them from updates, or not at all")
    if thinned := [n for n in plan.snapshots if n > plan.first_kept]:
        lost.append(f"replay and following start further back: snapshots {spans(thinned)} are gone")
    if plan.samples:
        lost.append("a deletion needs the dataset again: the log no longer holds the samples' tokens")
    return lost


def prune_text(plan: PrunePlan, lost: list[str], only_says: bool) -> str:
    """The outcome for a person."""
    freed: dict[str, Any] = plan.freed
    parts = ", ".join(f"{kind} {size(number)}" for kind, number in freed.items()) or "nothing"
    lines = [f"{'would free' if only_says else 'freed'} {size(sum(freed.values()))}: {parts}"]
    return "\n".join(lines + lost)
