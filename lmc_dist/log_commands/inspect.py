"""`lmc log inspect`: what a log holds, on one page; also of one that is being written, was cut off, or is damaged."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from lmc_dist.config import Config
from lmc_dist.errors import LmcError
from lmc_dist.log_commands.text import check_target, count, size, spans, table, write_findings
from lmc_dist.shards.layout import ParamSpec
from lmc_dist.trajectory.contents import LogContents, folder_bytes, read_contents, writer_of
from lmc_dist.trajectory.files import MANIFEST_FILE, rank_file, step_folder
from lmc_dist.trajectory.kept import FOLDER as CURVATURE_FOLDER
from lmc_dist.trajectory.kept import kept_names
from lmc_dist.trajectory.record import TIERS, TrajectoryManifest
from lmc_dist.trajectory.rewritten import rewritings
from lmc_dist.trajectory.size import LogShape, snapshot_bytes, stored_bytes
from lmc_dist.trajectory.snapshots import read_meta, snapshot_folder
from lmc_dist.trajectory.table import TABLE_FILE
from lmc_dist.update_rules import check_supported


def inspect_log(config: Config) -> str:
    """The summary as text, as JSON and as a picture where they are asked for. Local.

    Raises:
        LmcError: No log, or nowhere to write to.
    """
    check_target("json", config.json)
    check_target("plot", config.plot)
    contents = read_contents(config.log_dir)
    found = summary(contents)
    write_findings(config.json, found)
    text = summary_text(found)
    if config.plot is not None:
        plot(contents, Path(config.plot))
        text += f"\ncurves in {config.plot}"
    return text


def summary(contents: LogContents) -> dict[str, Any]:
    """What there is to say about a log, as JSON. Local."""
    manifest, records = contents.manifest, [contents.records[step] for step in sorted(contents.records)]
    incomplete, writer = contents.incomplete(), writer_of(contents.path)
    whole = [step for step in range(contents.num_steps) if step not in incomplete]
    applied = [record for record in records if record.applied]
    times = Counter(i for record in applied for i in record.sample_ids)
    losses = [record.loss for record in applied if record.loss is not None]
    rates = [record.lr[0] for record in applied if record.lr]
    finished = contents.num_steps in contents.snapshots
    found: dict[str, Any] = {
        "log_dir": str(contents.path),
        "state": "being written" if writer else "complete" if finished else "cut off",
        "writer": writer,
        "problems": [{"place": p.place, **p.to_json()} for p in contents.problems],
        "steps": {
            "rows": contents.num_steps,
            "applied": len(applied),
            "not_applied": [record.step for record in records if not record.applied],
            "epochs": records[-1].epoch if records else 0,
            "whole": spans(whole),
            "incomplete": {str(step): problem for step, problem in incomplete.items()},
        },
        "samples": {"distinct": len(times), "times_seen": dict(sorted(Counter(times.values()).items()))},
        "loss": {"first": losses[0], "last": losses[-1]} if losses else None,
        "lr": {"first": rates[0], "min": min(rates), "max": max(rates), "last": rates[-1]} if rates else None,
        "snapshots": contents.snapshots,
        "edits": {step: edit.method for step, edit in contents.edits.items()},
        "curvature": kept_names(contents.path),
    }
    if manifest is not None:
        found["run"] = _run(manifest)
        found["rewritten"] = [
            {key: entry[key] for key in ("how", "from", "first_step", "steps", "samples")}
            for entry in rewritings(manifest)
        ]
        found["forget"] = _forget(contents, manifest)
        found["bytes"] = _bytes(contents, manifest)
    return found


def _run(manifest: TrajectoryManifest) -> dict[str, Any]:
    numel = sum(prod(row["shape"]) for row in manifest.parameters)
    return {
        "model": manifest.model_config.get("model_type"),
        "model_fingerprint": manifest.model_fingerprint,
        "parameters": numel,
        "tensors": len(manifest.parameters),
        "engine": manifest.engine,
        "world_size": manifest.world_size,
        "partition": manifest.partition,
        "segments": [{key: s[key] for key in ("first_step", "world_size", "engine")} for s in manifest.segments],
        "optimizer": manifest.optimizer,
        "loss_normalization": manifest.loss_normalization,
        "max_grad_norm": manifest.max_grad_norm,
        "schedule": manifest.run.get("config", {}).get("train", {}).get("schedule"),
        "storage": manifest.storage,
        "update_dtype": manifest.update_dtype,
        "gradient_dtype": manifest.gradient_dtype,
        "compression": manifest.compression,
        "save_interval": manifest.save_interval,
        "max_steps": manifest.max_steps,
        "save_batch_data": manifest.save_batch_data,
        "versions": manifest.versions,
    }


def _forget(contents: LogContents, manifest: TrajectoryManifest) -> dict[str, Any]:
    """Which steps can still be forgotten, and how."""
    first = min(contents.snapshots, default=contents.num_steps)
    reason = None
    kind = next((k for k in ("theta", "update") if k in TIERS[manifest.storage]), None)
    whole, last = contents.unbroken_from(), contents.num_steps
    start = min((n for n in contents.snapshots if n >= whole), default=last)
    if not contents.snapshots:
        reason = "the log holds no snapshot"
    elif kind is None:
        reason = "storage 'replay' keeps no updates"
    elif start == last > first:
        reason = f"the {kind} of step {whole - 1} is not there"
    else:
        try:
            check_supported(manifest.optimizer)
        except LmcError as error:
            reason = str(error)
    return {
        "first_step": first,
        "replay": bool(contents.snapshots),
        "correction": reason is None,
        "first_correction": start if reason is None else None,
        "why_no_correction": reason,
        "gone": sorted({i for s, r in contents.records.items() if s < first and r.applied for i in r.sample_ids}),
    }


def _bytes(contents: LogContents, manifest: TrajectoryManifest) -> dict[str, Any]:
    """Bytes on disk by kind beside what was predicted for them."""
    path, disk = contents.path, Counter[str]()
    stored: dict[str, list[int]] = {}
    for step, kind, rank, ranks, _ in contents.files():
        file = path / step_folder(step) / rank_file(rank, ranks, kind)
        if file.exists():
            disk[kind] += file.stat().st_size
            if rank == 0:
                stored.setdefault(kind, []).append(step)
    snapshots = {n: folder_bytes(path / snapshot_folder(n)) for n in contents.snapshots}
    rows = {
        "snapshots": sum(snapshots.values()),
        "table": sum(p.stat().st_size for p in path.glob(f"{TABLE_FILE}*")),
        "manifest": (path / MANIFEST_FILE).stat().st_size,
        "curvature": folder_bytes(path / CURVATURE_FOLDER),
    }
    everything = folder_bytes(path)
    disk.update(rows)
    disk["other"] = everything - disk.total()
    shape = shape_of(contents, manifest)
    every = manifest.save_interval
    predicted = {kind: round(stored_bytes(shape, kind, stored[kind], every)) for kind in stored}
    states = {n: _state(path, n) for n in snapshots}
    predicted["snapshots"] = sum(round(snapshot_bytes(replace(shape, state=states[n]))) for n in snapshots)
    steps = max(map(len, stored.values()), default=0)
    numel, tensors = shape.numel, sum(disk[kind] for kind in stored)
    return {
        "disk": dict(disk),
        "predicted": predicted,
        "total": everything,
        "per_step": tensors / steps if steps else 0.0,
        "per_snapshot": rows["snapshots"] / len(snapshots) if snapshots else 0.0,
        "per_step_per_parameter": tensors / steps / numel if steps else 0.0,
        "steps_with_tensors": steps,
    }


def shape_of(contents: LogContents, manifest: TrajectoryManifest) -> LogShape:
    """What the log's files look like: as many ranks' as there are files."""
    ranks = max((ranks for *_, ranks, _ in contents.files()), default=manifest.world_size)
    return LogShape(
        tuple(ParamSpec(row["name"], tuple(row["shape"])) for row in manifest.parameters),
        ranks,
        manifest.partition,  # type: ignore[arg-type]
        manifest.storage,
        getattr(torch, manifest.dtype),
        getattr(torch, manifest.update_dtype),
        getattr(torch, manifest.gradient_dtype),
        manifest.compression,  # type: ignore[arg-type]
    )


def _state(log_dir: Path, step: int) -> tuple[str, ...]:
    """Optimizer state in a snapshot; none where its description is damaged, which `verify` reports."""
    try:
        return tuple(sorted(set(read_meta(log_dir / snapshot_folder(step))["kinds"]) - {"theta"}))
    except LmcError:
        return ()


def summary_text(found: dict[str, Any]) -> str:
    """The summary for a person."""
    lines = [f"{found['log_dir']}: {found['state']}" + (f" by {found['writer']}" if found["writer"] else "")]
    if run := found.get("run"):
        lines += _run_lines(run)
    steps = found["steps"]
    left_out = f", not applied {spans(steps['not_applied'])}" if steps["not_applied"] else ""
    lines.append(
        f"steps       {steps['rows']:,} up to epoch {steps['epochs']:.2f}; {steps['applied']:,} applied{left_out}"
    )
    lines.append(f"whole       {steps['whole']}")
    lines += [f"not whole   step {step}: {problem}" for step, problem in list(steps["incomplete"].items())[:5]]
    if lr := found["lr"]:
        lines.append(f"lr          {lr['first']:g} → {lr['last']:g}, between {lr['min']:g} and {lr['max']:g}")
    if loss := found["loss"]:
        lines.append(f"loss        {loss['first']:.4f} → {loss['last']:.4f}")
    seen = ", ".join(
        f"{number:,} seen {count(times, 'time')}" for times, number in found["samples"]["times_seen"].items()
    )
    lines.append(f"samples     {found['samples']['distinct']:,} distinct" + (f": {seen}" if seen else ""))
    lines.append(f"snapshots   {spans(found['snapshots'])}")
    if found["edits"]:  # corrections while it trained
        made = ", ".join(f"{step} ({method})" for step, method in found["edits"].items())
        lines.append(f"corrected   at step {made}")
    for entry in found.get("rewritten", []):
        what = f"without {count(entry['samples'], 'sample')} from step {entry['first_step']} on"
        lines.append(f"rewritten   {what} ({entry['how']}); it was run {entry['from'][:12]}")
    if found["curvature"]:
        lines.append(f"curvature   {', '.join(found['curvature'])}")
    if forget := found.get("forget"):
        lines += _forget_lines(forget, steps["rows"])
    if sizes := found.get("bytes"):
        lines += _byte_lines(sizes)
    lines += [f"damaged     {p['place']}: {p['message']}" for p in found["problems"]]
    return "\n".join(lines)


def _run_lines(run: dict[str, Any]) -> list[str]:
    groups = run["optimizer"]["groups"]
    settings = {k: v for k, v in groups[0].items() if k not in ("lr", "initial_lr") and v not in (None, False, 0, 0.0)}
    named = ", ".join(f"{key}={value}" for key, value in settings.items())
    clipping = f", clipped to {run['max_grad_norm']:g}" if run["max_grad_norm"] else ""
    dtypes = [f"{kind} {run[f'{kind}_dtype']}" for kind in ("update", "gradient") if kind in TIERS[run["storage"]]]
    if run["compression"] != "none":
        dtypes.append(run["compression"])
    if run["save_batch_data"]:
        dtypes.append("tokens of samples kept")
    every = f"every {run['save_interval']} steps" if run["save_interval"] else "at the ends only"
    ring = f", ring of {run['max_steps']} steps" if run["max_steps"] else ""
    lines = [
        f"model       {run['model'] or 'not of transformers'}, {run['parameters']:,} parameters in {run['tensors']} tensors",
        f"engine      {run['engine']} on {count(run['world_size'], 'rank')}, cut by rule {run['partition']}",
        f"optimizer   {run['optimizer']['class']} ({named}){clipping}; schedule {run['schedule'] or 'not known'}",
        f"tier        {run['storage']}" + (f" ({', '.join(dtypes)})" if dtypes else "") + f"; snapshots {every}{ring}",
    ]
    for segment in run["segments"]:
        where = f"{segment['engine']} on {count(segment['world_size'], 'rank')}"
        lines.append(f"resumed     at step {segment['first_step']} with {where}")
    return lines


def _forget_lines(forget: dict[str, Any], num_steps: int) -> list[str]:
    first, last = forget["first_step"], num_steps - 1
    if not forget["replay"]:
        return [f"forget      nothing: {forget['why_no_correction']}"]
    start = forget["first_correction"]
    lines = [] if start is None else [f"forget      steps {start}–{last} by correction or replay"]
    if start != first:  # θ_0 that a ring has kept
        lines.append(f"forget      steps {first}–{last if start is None else start - 1} by replay")
    if not forget["correction"]:
        lines.append(f"            no correction: {forget['why_no_correction']}")
    if first > 0:
        gone = count(len(forget["gone"]), "sample")
        lines.append(f"            steps 0–{first - 1} no longer, nor {gone} that were in them")
    return lines


def _byte_lines(sizes: dict[str, Any]) -> list[str]:
    rows = [("on disk", "", "predicted")]
    for kind, number in sizes["disk"].items():
        if number:
            predicted = sizes["predicted"].get(kind)
            rows.append((kind, size(number), "-" if predicted is None else size(predicted)))
    rows.append(("total", size(sizes["total"]), ""))
    lines = table(rows)
    if sizes["steps_with_tensors"]:
        per = f"{size(sizes['per_step'])} a step, {sizes['per_step_per_parameter']:.3f} bytes a step and parameter"
        lines.append(f"tensors of {count(sizes['steps_with_tensors'], 'step')}: {per}")
    if sizes["per_snapshot"]:
        lines.append(f"{size(sizes['per_snapshot'])} a snapshot")
    return lines


def plot(contents: LogContents, file: Path) -> None:
    """Loss, norm of the update and learning rate over the steps, as a picture. Local.

    Raises:
        LmcError: matplotlib is not installed, or cannot write such a file.
    """
    try:
        import matplotlib
    except ImportError:
        raise LmcError("plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [contents.records[step] for step in sorted(contents.records)]
    figure, axes = pyplot.subplots(3, 1, sharex=True, figsize=(8, 7), layout="constrained")
    curves = {
        "loss": [(r.step, r.loss) for r in records],
        "‖u‖": [(r.step, r.u_norm) for r in records if r.applied],
        "learning rate": [(r.step, r.lr[0] if r.lr else None) for r in records],
    }
    for axis, (name, points) in zip(axes, curves.items(), strict=True):
        known = [point for point in points if point[1] is not None]
        axis.plot(*zip(*known, strict=True) if known else ((), ()), linewidth=1)
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
        for snapshot in contents.snapshots:
            axis.axvline(snapshot, color="gray", linewidth=0.5, linestyle=":")
    axes[-1].set_xlabel("step (dotted: snapshots)")
    axes[0].set_title(str(contents.path), fontsize="small")
    try:
        figure.savefig(file, dpi=120)
    except ValueError as error:  # an ending that matplotlib does not know
        raise LmcError(f"plot: {error}") from None
    finally:
        pyplot.close(figure)
