"""`lmc log verify`: read all of a log and list every place that is not as it was written."""

from __future__ import annotations

from lmc_dist.config import Config
from lmc_dist.log_commands.text import check_target, count, write_findings
from lmc_dist.runtime import Runtime, agreement
from lmc_dist.trajectory.contents import read_contents
from lmc_dist.trajectory.verify import Verification, total_units, verify


def verify_log(config: Config, runtime: Runtime) -> tuple[str, int]:
    """(the findings as text, exit status: 1 if anything is damaged). Collective.

    Raises:
        LmcError: On every rank: no log, or nowhere to write to.
    """
    from tqdm import tqdm

    with agreement():
        check_target("json", config.json)
        units = total_units(read_contents(config.log_dir)) if runtime.is_main else 0
    with tqdm(total=units, desc="verify", unit="part", disable=not runtime.is_main) as bar:
        found = verify(config.log_dir, bar.update)
    if runtime.is_main:
        write_findings(config.json, {"log_dir": config.log_dir, **found.to_json()})
    return verification_text(config.log_dir, found), 1 if found.problems else 0


def verification_text(log_dir: str, found: Verification) -> str:
    """The findings for a person."""
    lines = [f"damaged: {problem.place}: {problem.message}" for problem in found.problems]
    lines += [f"note: {note}" for note in found.notes]
    checked = ", ".join(f"{number:,} {kind}" for kind, number in found.counts.items())
    if found.problems:
        lines.append(f"{count(len(found.problems), 'problem')} in {log_dir} (checked: {checked})")
    else:
        lines.append(f"{log_dir} is whole (checked: {checked})")
    return "\n".join(lines)
