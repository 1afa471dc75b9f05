"""`lmc report`: runs → report.html, report.md and report.csv."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lmc_dist.config import Config
from lmc_dist.errors import LmcError
from lmc_dist.log_commands.text import count
from lmc_dist.report.collect import LAYERS, NUMBERS, Group, Run, at, group_runs, number, read_runs
from lmc_dist.report.content import Section, sections
from lmc_dist.report.pictures import require_matplotlib
from lmc_dist.report.sweep_content import sweep_sections
from lmc_dist.report.sweeps import SweepRun, is_sweep, read_sweeps
from lmc_dist.report.tables import Table, environment, overview
from lmc_dist.runtime import check_replaceable
from lmc_dist.trajectory.files import write_atomic, write_json

PAGE, MARKDOWN, CSV = "report.html", "report.md", "report.csv"


def report(config: Config) -> str:
    """Writes the report on finished runs; returns a line about it. Local.

    Raises:
        LmcError: A folder that holds no finished run, an output folder that is in use, or matplotlib is not installed.
    """
    folder = Path(config.report.output)
    if folder.exists() and not folder.is_dir():
        raise LmcError(f"report.output: {folder} is a file; give the folder to put report.html into")
    check_replaceable(folder, PAGE, config.overwrite, is_kept=True)
    require_matplotlib()
    given = [part.strip() for part in config.report.runs.split(",") if part.strip()]
    sweeps = read_sweeps(place for place in given if is_sweep(place))
    folders = [place for place in given if not is_sweep(place)]
    runs = read_runs(folders) if folders or not sweeps else []
    if config.report.layers:
        keep_layers(runs)
        runs = read_runs(folders)
    groups = group_runs(runs)
    texts = render(runs, groups, sweeps)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomic(folder / name, text)
    except OSError as error:
        raise LmcError(f"report.output: {folder} cannot be written: {error.strerror}") from None
    found = [f"{count(len(runs), 'run')} in {count(len(groups), 'group')}"] if runs else []
    found += [f"{count(len(sweep.rows), 'cell')} of {sweep.folder}" for sweep in sweeps]
    return f"{', '.join(found)}: {folder / PAGE}, {MARKDOWN}, {CSV}"


def keep_layers(runs: Sequence[Run]) -> None:
    """Writes layers.json into each run from its log and its correction. Local.

    Raises:
        LmcError: The log is not where it was, or is another.
    """
    from lmc_dist.evaluate.layers import layers_of_run

    for run in runs:
        log_dir = run.at("config", "log_dir")
        if not isinstance(log_dir, str):
            raise LmcError(f"report.layers: {run.folder} does not say where its log is")
        write_json(Path(run.folder) / LAYERS, layers_of_run(Path(run.folder), Path(log_dir)))


def render(runs: Sequence[Run], groups: Sequence[Group], sweeps: Sequence[SweepRun] = ()) -> dict[str, str]:
    """File name → content."""
    parts = [part for i, sweep in enumerate(sweeps, 1) for part in sweep_sections(sweep, f"w{i}")]
    parts, whole, tables = [*parts, *sections(groups)], overview(groups), environment(runs, sweeps)
    title = "Unlearning report"
    found = {
        PAGE: page(title, parts, whole, tables),
        MARKDOWN: markdown(title, parts, whole, tables),
        CSV: comma_separated(groups, sweeps),
    }
    # control characters and halves of surrogate pairs, which neither HTML nor UTF-8 has
    return {name: re.sub("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\ufffd", text) for name, text in found.items()}


def page(title: str, parts: Sequence[Section], whole: Table | None, tables: Sequence[Table]) -> str:
    """The HTML page; everything is escaped but the pictures, which are so already."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["svg"] = Markup
    template = environment.from_string(files("lmc_dist.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(title=title, sections=parts, overview=whole, environment=tables) + "\n"


def markdown(title: str, parts: Sequence[Section], whole: Table | None, tables: Sequence[Table]) -> str:
    """The same without pictures."""
    lines = [f"# {title}", ""]
    if whole is not None:
        lines += _markdown_table(whole, 2)
    for part in parts:
        lines += [f"## {_plain(part.title)}", "", _plain(part.summary), ""]
        for name, facts in part.facts.items():
            lines += [f"### {name}", "", *(f"- {_plain(key)}: {_plain(value)}" for key, value in facts), ""]
        for table in part.tables:
            lines += _markdown_table(table, 3)
    lines += ["## Environment", ""]
    for table in tables:
        lines += _markdown_table(table, 3)
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(table: Table, level: int) -> list[str]:
    lines = [f"{'#' * level} {_plain(table.title)}", "", _markdown_row(table.header)]
    lines.append(_markdown_row(["---", *("---:" for _ in table.header[1:])], escaped=False))
    for i, row in enumerate(table.rows):
        cells = [_plain(cell) for cell in row]
        lines.append(_markdown_row([f"**{cells[0]}**", *cells[1:]] if i == table.marked else cells, escaped=False))
    return [*lines, "", *([_plain(table.note), ""] if table.note else [])]


def _markdown_row(cells: Sequence[str], escaped: bool = True) -> str:
    return "| " + " | ".join(_plain(cell) if escaped else cell for cell in cells) + " |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    line = " ".join(text.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # An underscore inside a word means nothing.
    return re.sub(r"([\\`*\[\]|~#!$]|(?<!\w)_|_(?!\w))", r"\\\1", line)


def comma_separated(groups: Sequence[Group], sweeps: Sequence[SweepRun] = ()) -> str:
    """One row a method and run, numbers as they are in the results."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["group", "run", "seed", "data_seed", "world_size", "engine", "method", "label", *NUMBERS])
    for i, group in enumerate(groups, 1):
        for run in group.runs:
            seeds = ["" if seed is None else seed for seed in run.seeds]
            own = [i, _cell(run.folder), *seeds, _cell(run.at("world_size")), _cell(run.at("engine"))]
            for row in run.rows:
                values = ["" if (x := number(row.get(key))) is None else repr(x) for key in NUMBERS]
                writer.writerow([*own, _cell(row["method"]), _cell(row.get("label")), *values])
    for sweep in sweeps:
        for row in sweep.rows:
            own = [_cell(f"{sweep.folder}: {row['split']}"), _cell(row["name"])]
            own += [_cell(row.get(key)) for key in ("seed", "data_seed", "world_size")]
            own.append(_cell(at(row, "settings", "train", "engine")))
            values = ["" if (x := number(row.get(key))) is None else repr(x) for key in NUMBERS]
            writer.writerow([*own, _cell(row["method"]), _cell(row["label"]), *values])
    return out.getvalue()


def _cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula."""
    if value is None or isinstance(value, (int, float)):
        return "" if value is None else value
    text = str(value)
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
