"""`lmc audit verify`: whether a chain is as it was written, and whether the output is the one that it speaks of."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lmc_dist.audit.chain import verify_with_records
from lmc_dist.audit.files import CORRECTION, part_digests
from lmc_dist.audit.reading import ChainReport, head_path
from lmc_dist.audit.reexecute import Reexecution, reexecute
from lmc_dist.audit.run_record import CHAIN_FILE, RUN_EVENTS, chain_of, code_digest
from lmc_dist.config import Config
from lmc_dist.errors import LmcError
from lmc_dist.log_commands.text import check_target, count, write_findings
from lmc_dist.paths import named
from lmc_dist.runtime import AgreedError, Runtime, agreement, broadcast_object
from lmc_dist.trajectory.files import read_json
from lmc_dist.unlearn.audit import NORMS_FILE

_ROUNDING = 1e-5  # of a norm in float32, summed in another order


@dataclass
class Findings:
    """What was found.

    Attributes:
        chain: Of the chain.
        event: The last record of a run; None where the chain holds none or does not verify.
        problems: What the output has else than the record says.
        step: Of the step that was taken again; None where none was.
        seed: By which it was drawn.
    """

    chain: ChainReport
    event: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)
    step: Reexecution | None = None
    seed: int | None = None

    @property
    def all_problems(self) -> list[str]:
        return [*self.chain.problems, *self.problems, *(() if self.step is None else self.step.problems)]


def asks_for_a_step(config: Config) -> bool:
    """Whether a step is to be taken again: only then is it said what was forgotten. Pure."""
    return any(x is not None for x in (config.forget.samples, config.forget.split, config.forget.batches))


def find_chain(path: Path) -> Path:
    """The chain of a run's output, of a folder, or a chain's file. Local.

    Raises:
        LmcError: None there.
    """
    path = named(path)
    for chain in (chain_of(path), path / CHAIN_FILE, path):
        if (chain.suffix == ".jsonl" and chain.is_file()) or head_path(chain).is_file():
            return chain
    raise LmcError(f"{path} holds no audit: neither audit/{CHAIN_FILE} nor {CHAIN_FILE} is in it")


def verify_audit(config: Config, runtime: Runtime) -> tuple[str, int]:
    """(the findings as text, exit status: 1 if anything is wrong). Collective.

    Raises:
        LmcError: On every rank: no chain, an unusable key, or a log, data or request that are not the run's.
    """
    output, found = named(config.output_dir), Findings(ChainReport())
    with agreement():
        check_target("json", config.json)
        if runtime.is_main:
            audit = config.audit
            chain = find_chain(output)
            found.chain, records = verify_with_records(chain, audit.public_key, audit.known)
            if chain == chain_of(output) and not found.chain.problems:
                runs = (record for record in reversed(records) if record["event"] in RUN_EVENTS)
                found.event = next(runs, None)
                if found.event is not None and found.event["body"]["versions"]["lmc_dist_code"] != code_digest():
                    found.chain.notes.append("the run was made by another version of this package's code")
    found = broadcast_object(found)
    if found.event is not None:
        body = found.event["body"]
        found.problems += _files(output, body)
        if not found.problems:
            with agreement():
                if runtime.is_main:
                    found.problems += check_figures(output, body)
            found.problems = broadcast_object(found.problems)
    if asks_for_a_step(config) and not found.chain.problems:
        if found.event is None:
            raise AgreedError(f"{output}: its chain holds no run of which a step could be taken again")
        if not found.problems:
            seed = config.audit.seed
            found.seed = broadcast_object(secrets.randbits(32) if seed is None else seed)
            with agreement():
                norms = read_json(output / "audit" / NORMS_FILE)
            found.step = reexecute(config, runtime, output, found.event["body"], norms, found.seed)
    if runtime.is_main:
        write_findings(config.json, {"output": str(output), "seed": found.seed, **_as_json(found)})
    return findings_text(output, found), 1 if found.all_problems else 0


def check_figures(output: Path, body: Mapping[str, Any]) -> list[str]:
    """Whether the figures of an output agree with each other and with v as it is stored. Local.

    The record's digests say that the files are those it was made from; this is for a record that was made of false ones.
    """
    problems = []
    told = read_json(output / "audit" / "audit_records.json")
    norms = read_json(output / "audit" / NORMS_FILE)
    if [{**row, "unit": ""} for row in told] != [{**row, "unit": ""} for row in body["units"]]:
        problems.append("audit_records.json has other figures than the record")
    if len(norms) != len(body["units"]):
        return [*problems, f"{NORMS_FILE} is of {len(norms)} vectors, the record of {len(body['units'])}"]
    for row, known in zip(body["units"], norms, strict=True):
        if known and known[-1][1] != row["v_norm"]:
            problems.append(f"unit {row['unit']}: v_norm is {row['v_norm']:.6g}, and ‖v‖ ends at {known[-1][1]:.6g}")
    stored = stored_norm(output / CORRECTION)
    expected = {"correction_norm": body["correction_norm"]}
    if body["privacy"] is None:
        expected["v_norm"] = body["figures"]["v_norm"]
        if len(body["units"]) == 1:
            expected["v_norm of its unit"] = body["units"][0]["v_norm"]
    for name, norm in expected.items():
        if not math.isclose(norm, stored, rel_tol=_ROUNDING, abs_tol=1e-30):
            problems.append(f"{name} is {norm:.6g}, and the stored correction has norm {stored:.6g}")
    return problems


def stored_norm(folder: Path) -> float:
    """‖v‖ of a stored correction, file by file. Local."""
    from safetensors import safe_open

    square = 0.0
    for path in sorted(folder.glob("rank-*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                square += float(file.get_tensor(name).double().square().sum())
    return math.sqrt(square)


def _files(output: Path, body: Mapping[str, Any]) -> list[str]:
    """Parts of the output that are not the ones of the record. Collective."""
    recorded: dict[str, str] = body["files"]
    found = part_digests(output)
    problems = [f"{part} is missing" for part in recorded if part not in found]
    problems += [
        f"{part} is not what the run wrote"
        for part, known in recorded.items()
        if part in found and found[part] != known
    ]
    return problems + [f"{part} was added after the run" for part in found if part not in recorded]


def _as_json(found: Findings) -> dict[str, Any]:
    return {
        "ok": not found.all_problems,
        "problems": found.all_problems,
        "chain": asdict(found.chain),
        "step": None if found.step is None else asdict(found.step),
    }


def findings_text(output: Path, found: Findings) -> str:
    """The findings for a person."""
    lines = [f"wrong: {problem}" for problem in found.all_problems]
    lines += [f"note: {note}" for note in found.chain.notes]
    signed = "signed" if found.chain.signed else "not signed: whoever can write it can write it anew as a whole"
    lines.append(f"chain: {count(found.chain.records, 'record')}, {signed}, head {found.chain.head}")
    if found.event is not None:
        lines.append(f"output: {', '.join(found.event['body']['files'])} against record {found.event['n'] + 1}")
    if (step := found.step) is not None:
        if step.step is not None:
            lines.append(
                f"step {step.step} of unit {step.unit} was taken again, from step {step.begun} on: "
                f"{count(step.compared, 'recorded norm')} compared, the largest difference {step.difference:.2g} "
                f"(--audit.seed {found.seed} takes the same)"
            )
        if step.note:
            lines.append(f"note: {step.note}")
    problems = len(found.all_problems)
    lines.append(f"{output}: {count(problems, 'problem')}" if problems else f"{output} is as it was written")
    return "\n".join(lines)
