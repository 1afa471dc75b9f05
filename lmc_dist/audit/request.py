"""A request without its data: salted digests in place of ids, in what a run leaves behind."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmc_dist.audit.digests import SALT_FILE, read_salt, salted_digest
from lmc_dist.audit.hidden import hidden
from lmc_dist.audit.record import canonical, digest
from lmc_dist.trajectory.counterfactual import Counterfactual
from lmc_dist.unlearn.correction import Correction
from lmc_dist.unlearn.units import JOINT

# Windows of a joint request are named after steps; the last is what stands for a name.
_TELLS_NOTHING = re.compile(rf"{JOINT}|(step|head)-\d+|unit-[0-9a-f]{{32}}")


def described_request(request: Counterfactual, salt: bytes) -> dict[str, Any]:
    """A request as an audit record has it. Local.

    The digests are sorted, so that their order does not tell that of the ids.
    """
    ids = request.sample_ids or request.batch_ids
    found = {
        "counterfactual": request.kind,
        "of": "samples" if request.sample_ids else "batches",
        "ids": sorted(salted_digest(salt, i) for i in ids),
    }
    return {"digest": digest(canonical(found)), "salt": salt_name(salt), "count": len(ids), **found}


def salt_name(salt: bytes) -> str:
    """By which a salt is known again, without telling it. Local."""
    return hashlib.blake2b(salt, digest_size=8, person=b"lmc salt name").hexdigest()


def unit_name(name: str, salt: bytes) -> str:
    """What stands for a unit's name, which may hold an id or be a person's; what stands for one stays. Local."""
    return name if _TELLS_NOTHING.fullmatch(name) else f"unit-{salted_digest(salt, name)}"


def anonymous(
    result: Mapping[str, Any], correction: Correction, request: dict[str, Any], salt: bytes, names_stay: bool
) -> tuple[dict[str, Any], Correction]:
    """What result.json holds, and a correction, without ids. Local.

    Args:
        result: As result.json would have it.
        correction: Its audit names units.
        request: `described_request`.
        salt: Of the digests.
        names_stay: Units are stored under their names, so that they can be taken out and put back: these stay.
    """
    config = dict(result["config"])
    for section in ("forget", "request"):
        config[section] = hidden(config[section], request["digest"])
    told = {**result["request"], "digest": request["digest"], "salt": request["salt"]}
    result = {**result, "config": config, "request": told}
    if names_stay:
        return result, correction
    if (units := result["units"]) is not None:
        result["units"] = {
            "included": sorted(unit_name(name, salt) for name in units["included"]),
            "undone": [],
            "samples": {
                unit_name(name, salt): sorted(salted_digest(salt, i) for i in ids)
                for name, ids in units["samples"].items()
            },
        }
    audit = tuple(replace(record, unit=unit_name(record.unit, salt)) for record in correction.audit)
    return result, replace(correction, audit=audit)


def salt_path(config: Mapping[str, Any], folder: Path) -> Path:
    """Where the salt of a run is, by its settings as result.json has them and its folder. Pure."""
    given = config["audit"]["salt"]
    return folder / "audit" / SALT_FILE if given is None else Path(given)


def is_of_request(result: Mapping[str, Any], folder: Path, request: Counterfactual) -> bool:
    """Whether a finished run without ids was of a request. Local.

    Raises:
        LmcError: Its salt is not at hand.
    """
    salt = read_salt(salt_path(result["config"], folder))
    return bool(described_request(request, salt)["digest"] == result["request"]["digest"])
