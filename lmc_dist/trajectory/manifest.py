"""The manifest on disk: written whole or not at all, believed only where its digest and its contents hold."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite, prod
from pathlib import Path
from typing import Any, Literal, get_args

from lmc_dist.errors import LmcError
from lmc_dist.shards.layout import is_rule
from lmc_dist.trajectory.codec import COMPRESSIONS
from lmc_dist.trajectory.files import MANIFEST_FILE
from lmc_dist.trajectory.reader import FLOATS
from lmc_dist.trajectory.record import SCHEMA_VERSION, TIERS, LossNormalization, Segment, TrajectoryManifest
from lmc_dist.trajectory.sealed import read_bounded, unsealed, write_sealed

MAX_RANKS = 99_999  # file names have five digits
MAX_ELEMENTS = 2**52  # of a model


def write_manifest(log_dir: Path, manifest: TrajectoryManifest) -> None:
    """Writes or replaces a log's manifest, atomically. Local."""
    write_sealed(log_dir / MANIFEST_FILE, manifest.to_json())


def read_manifest(log_dir: Path) -> TrajectoryManifest:
    """The manifest of a log. Local.

    Raises:
        LmcError: It is missing, damaged, of another version, or holds what no writer writes.
    """
    path = log_dir / MANIFEST_FILE
    if not path.exists():
        raise LmcError(f"no trajectory log in '{log_dir}': {MANIFEST_FILE} is missing")
    values = read_bounded(path)
    schema = values.get("schema") if isinstance(values, dict) else SCHEMA_VERSION
    if schema != SCHEMA_VERSION:  # another version need not have a digest
        raise LmcError(
            f"{path} has schema {str(schema)[:40]}, this version reads {SCHEMA_VERSION}: read the log with the "
            "lmc_dist that wrote it (manifest.json, versions), or train again"
        )
    values = unsealed(path, values)
    try:
        manifest = TrajectoryManifest(**values)
        check_manifest(manifest)
    except (TypeError, ValueError) as error:
        raise LmcError(f"{path} is damaged: {str(error)[:300]}") from None
    return manifest


def logged_attention(manifest: TrajectoryManifest) -> Literal["sdpa", "eager"]:
    """The attention kernel to rebuild a logged model with: a log may choose between these two only. Local.

    Fused kernels of other names, and logs that name none, get `sdpa`.
    """
    return "eager" if manifest.all_segments[-1].run.get("attention") == "eager" else "sdpa"


def check_manifest(manifest: TrajectoryManifest) -> None:
    """Checks types, names and sizes of everything that is later looked up, allocated or counted with. Local.

    Raises:
        ValueError: Which field holds what.
    """
    choices: dict[str, Any] = {
        "loss_normalization": get_args(LossNormalization),
        "storage": TIERS,
        "dtype": FLOATS,
        "update_dtype": FLOATS,
        "gradient_dtype": FLOATS,
        "compression": COMPRESSIONS,
    }
    for name, known in choices.items():
        value = getattr(manifest, name)
        _require(isinstance(value, str) and value in known, name, value, f"one of {', '.join(known)}")
    for name in ("save_interval", "max_steps"):
        value = getattr(manifest, name)
        _require(value is None or _is_count(value, 1, 2**62), name, value, "null or a number of steps")
    _require(_is_number(manifest.max_grad_norm), "max_grad_norm", manifest.max_grad_norm, "a number ≥ 0")
    _require(isinstance(manifest.save_batch_data, bool), "save_batch_data", manifest.save_batch_data, "true or false")
    for name in ("model_fingerprint", "dataset_fingerprint"):
        value = getattr(manifest, name)
        _require(isinstance(value, str) or (value is None and name[0] == "d"), name, value, "a text")
    _require(isinstance(manifest.model_config, dict), "model_config", manifest.model_config, "an object")
    _check_optimizer(manifest.optimizer)
    _check_parameters(manifest.parameters, len(manifest.optimizer["groups"]))
    _check_segments(manifest)


def _check_optimizer(optimizer: Any) -> None:
    is_whole = isinstance(optimizer, dict) and isinstance(optimizer.get("class"), str)
    groups = optimizer.get("groups") if is_whole else None
    is_whole = isinstance(groups, list) and all(isinstance(group, dict) for group in groups)
    _require(is_whole, "optimizer", optimizer, "a class and groups")


def _check_parameters(parameters: Any, num_groups: int) -> None:
    _require(isinstance(parameters, list) and len(parameters) > 0, "parameters", parameters, "a list")
    total, seen = 0, set()
    for i, row in enumerate(parameters):
        where = f"parameters[{i}]"
        _require(isinstance(row, dict), where, row, "an object")
        name, shape = row.get("name"), row.get("shape")
        _require(isinstance(name, str) and name != "" and "#" not in name, f"{where}.name", name, "a name")
        _require(name not in seen, f"{where}.name", name, "named once")
        seen.add(name)
        is_shape = isinstance(shape, list) and len(shape) <= 64 and all(_is_count(d, 0, MAX_ELEMENTS) for d in shape)
        _require(is_shape, f"{where}.shape", shape, "a list of sizes")
        total += prod(shape)
        _require(total <= MAX_ELEMENTS, f"{where}.shape", shape, f"at most {MAX_ELEMENTS} elements in all")
        _require(
            isinstance(row.get("dtype"), str) and row["dtype"] in FLOATS, f"{where}.dtype", row.get("dtype"), "a float"
        )
        _require(
            _is_count(row.get("group", 0), 0, num_groups - 1), f"{where}.group", row.get("group"), "an optimizer group"
        )


def _check_segments(manifest: TrajectoryManifest) -> None:
    _require(isinstance(manifest.segments, list), "segments", manifest.segments, "a list")
    before = -1
    for segment in manifest.all_segments:  # a TypeError says which field is missing or unknown
        where = f"segment of step {str(segment.first_step)[:40]}"
        _require(_is_count(segment.first_step, before + 1, 2**62), where, segment.first_step, "in ascending order")
        before = segment.first_step
        _require(
            _is_count(segment.world_size, 1, MAX_RANKS), f"{where}, world_size", segment.world_size, "a number of ranks"
        )
        _require(isinstance(segment.engine, str), f"{where}, engine", segment.engine, "a text")
        is_known = is_rule(segment.partition)
        _require(is_known, f"{where}, partition", segment.partition, "one of zero3, fsdp2, hsdp-R")
        _require(isinstance(segment.run, dict), f"{where}, run", segment.run, "an object")
        is_versions = isinstance(segment.versions, dict) and all(isinstance(v, str) for v in segment.versions.values())
        _require(is_versions, f"{where}, versions", segment.versions, "texts by package")


def _require(holds: bool, name: str, value: Any, needed: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {repr(value)[:80]}, needed is {needed}")


def _is_count(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value) and value >= 0


def resumed_manifest(logged: TrajectoryManifest, present: TrajectoryManifest, step: int) -> TrajectoryManifest:
    """The manifest of a run that goes on at `step` as `present` says.

    Args:
        logged: As it was until now.
        present: Of the run as it is started now, equal but for what a segment says.
        step: The first step that is run anew.
    """
    if step == 0:
        return present
    kept = [values for values in logged.segments if values["first_step"] < step]
    before = replace(logged, segments=kept).segment(step - 1)
    now = Segment(step, present.world_size, present.engine, present.partition, present.run, present.versions)
    if _way(now) != _way(before):
        kept = [*kept, vars(now)]
    return replace(logged, segments=kept)


def _way(segment: Segment) -> tuple[Any, ...]:
    """What decides whether steps are run alike; `run` says where results go as well, so it does not."""
    return segment.world_size, segment.engine, segment.partition, segment.versions
