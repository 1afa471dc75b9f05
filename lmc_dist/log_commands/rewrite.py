"""`lmc log rewrite`: the log itself without the forgotten data, and what became of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmc_dist.audit.digests import read_salt
from lmc_dist.config import Config
from lmc_dist.console import StepProgress
from lmc_dist.errors import LmcError
from lmc_dist.log_commands.text import check_target, count, size, spans, table, write_findings
from lmc_dist.logged_run import LoggedRun, open_logged_run, starting_model
from lmc_dist.online.ledger import ledger_salt
from lmc_dist.runtime import Runtime, agreement, broadcast_object
from lmc_dist.training import build_dataset, read_request
from lmc_dist.trajectory.contents import folder_bytes
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.trajectory.files import ledger_folder
from lmc_dist.trajectory.manifest import read_manifest
from lmc_dist.trajectory.replay import replay_engine
from lmc_dist.trajectory.rewrite import Rewritten, dry_run, held, remove, rewrite
from lmc_dist.trajectory.rewrite_plan import RewritePlan
from lmc_dist.trajectory.rewritten import is_without, rewritings, salt_file
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.trajectory.swap import recover_name
from lmc_dist.unlearn.request import check_request


def rewrite_log(config: Config, runtime: Runtime) -> str:
    """What became, or would become, of the log, as text. Collective.

    Raises:
        LmcError: On every rank, and with the log as it was: no log, another job writes it, a request that does not fit, a
            step that cannot be run again.
    """
    how, path = config.rewrite.how, Path(config.log_dir)
    opened: LoggedRun | None = None
    with agreement():
        check_target("json", config.json)
        if how is None:
            raise LmcError("say how: --how replay runs the steps again without the data, --how remove cuts the log off")
        if not config.rewrite.dry_run:
            recover_name(path.resolve())
        dataset: Any = None
        if how == "replay":
            opened = open_logged_run(config, runtime)
            dataset = opened.dataset
        elif config.forget.split is not None:
            dataset = build_dataset(config)[0]
        request = read_request(config, dataset)
        if request is None:
            raise LmcError("say what to forget: forget.samples, forget.split or forget.batches")
    if _is_done(path, request, runtime):
        with held(path.resolve()):  # what a call that was cut off has left beside it goes
            pass
        return f"{path}: rewritten without this data before, there is nothing to do"
    with agreement():
        log = TrajectoryLog(path)
        batches = None if opened is None else opened.batches
        check_request(request, log.records(), batches, log.manifest.loss_normalization)
        plan = dry_run(path, request, how)
        size_before = folder_bytes(path)
    if config.rewrite.dry_run:
        if runtime.is_main:
            write_findings(config.json, findings(config, log, plan, None))
        return rewrite_text(log, plan, None, size_before, None)
    with agreement():
        salt = ledger_salt(ledger_folder(path)) if runtime.is_main else b""
    salt = bytes(broadcast_object(salt))
    if opened is None:
        done = remove(path, request, salt)
    else:
        engine = replay_engine(starting_model(config, opened.model_config, log), log)
        kind = config.progress if runtime.is_main else "none"
        with StepProgress("rewrite", plan.stop, plan.num_steps, kind) as progress:
            done = rewrite(engine, path, opened.batches, request, salt, progress)
        engine.destroy()
    if runtime.is_main:
        write_findings(config.json, findings(config, log, done.plan, done))
    return rewrite_text(log, done.plan, done, size_before, folder_bytes(path))


def _is_done(path: Path, request: Counterfactual, runtime: Runtime) -> bool:
    """Whether an earlier call has done it already. Collective."""
    done = False
    with agreement():
        if runtime.is_main and rewritings(manifest := read_manifest(path)) and salt_file(path).exists():
            done = is_without(manifest, request, read_salt(salt_file(path)))
    return bool(broadcast_object(done))


def findings(config: Config, log: TrajectoryLog, plan: RewritePlan, done: Rewritten | None) -> dict[str, Any]:
    """The outcome as JSON; it names no sample."""
    return {
        "log_dir": config.log_dir,
        "how": plan.how,
        "dry_run": done is None,
        "counterfactual": plan.request.kind,
        "samples": plan.samples,
        "steps_touched": list(plan.touched),
        "steps_kept": plan.stop,
        "steps_run": None if done is None else done.steps,
        "steps_verified": None if done is None else done.verified,
        "bit_exact": None if done is None else done.exact,
        "steps_removed": plan.num_steps - plan.stop if plan.how == "remove" else 0,
        "snapshots_kept": list(plan.snapshots),
        "snapshots_removed": [n for n in log.snapshots if n not in plan.snapshots] if plan.how == "remove" else [],
        "edits_removed": list(plan.edits),
        "dropped": list(plan.dropped),
        "fingerprint_before": log.fingerprint,
        "fingerprint_after": None if done is None else done.after,
    }


def rewrite_text(
    log: TrajectoryLog, plan: RewritePlan, done: Rewritten | None, size_before: int, size_after: int | None
) -> str:
    """The outcome for a person."""
    later = range(plan.stop, plan.num_steps)
    gone = [n for n in log.snapshots if n not in plan.snapshots]
    rows = [
        ["forgotten", f"{count(plan.samples, 'sample')} in {count(len(plan.touched), 'step')} ({spans(plan.touched)})"],
        ["taken over", f"steps {spans(range(plan.stop))}; snapshots {spans(plan.snapshots)}"],
    ]
    if plan.how == "replay":
        how = "" if done is None else f", {_certificate(done)}"
        rows.append(["run again", f"steps {spans(later)} without the data{how}"])
    else:
        rows.append(["removed", f"steps {spans(later)} with all they led to; snapshots {spans(gone)}"])
    if plan.edits:
        rows.append(["corrections", f"those at step {spans(plan.edits)} go: what they corrected is no longer there"])
    if plan.dropped:
        rows.append(["not taken over", f"{', '.join(plan.dropped)}: made with the data"])
    if done is None:
        rows.append(["nothing done", f"the log is as it was ({size(size_before)}); without --dry_run it is rewritten"])
    else:
        rows.append(["size", f"{size(size_before)}, now {size(size_after or 0)}"])
        rows.append(["run", f"{done.before[:12]}, now {done.after[:12]}; the old log is deleted"])
    return "\n".join(table(rows, left=2))


def _certificate(done: Rewritten) -> str:
    gradients = count(done.steps, "gradient")
    if not done.exact:
        return f"{gradients}; not to the bit: other ranks, another engine or float16"
    checked = (
        f", {count(done.verified, 'step')} before the first change found again to the bit" if done.verified else ""
    )
    return gradients + checked
