"""The documentation: it builds without a warning, its commands run or parse, and it quotes messages as they are printed."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import REPO

import lmc_dist
from lmc_dist.cli import COMMANDS, parse
from lmc_dist.errors import LmcError

BIN = Path(sys.executable).parent
PAGES = sorted((REPO / "docs").glob("*.md"))
RUN_IN_ORDER = ("quickstart.md", "choosing.md", "cluster.md", "tutorial.md", "privacy.md", "online.md")
# A block that no test runs says why, in a comment before it.
BLOCK = re.compile(r"(?:<!-- not executed(?: here)?: (?P<why>[^>]+?) -->\n)?```bash\n(?P<text>.*?)```", re.DOTALL)


def commands(text: str) -> list[str]:
    """Commands of a shell block: continued lines joined, comments and what stands beside a command cut off."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    found = [re.split(r"\s{3,}|\s#\s", line.strip())[0] for line in lines]
    values: dict[str, str] = {}
    result = []
    for line in found:
        for name, value in values.items():
            line = line.replace(f"${name}", value)
        if match := re.fullmatch(r'(\w+)="(.*)"', line):
            values[match[1]] = match[2]
        elif line and not line.startswith(("#", "export ")):
            result.append(line)
    return result


def blocks(page: Path) -> Iterator[tuple[str | None, list[str]]]:
    """(why it is not executed, commands) of each shell block."""
    for match in BLOCK.finditer(page.read_text()):
        yield match["why"], commands(match["text"])


def shown(page: Path) -> list[str]:
    """All commands of a page, those in indented blocks too."""
    text = BLOCK.sub("", page.read_text())
    indented = "\n".join(re.findall(r"(?m)^ {4}((?:lmc|torchrun|deepspeed) (?:.*\\\n)*.*)$", text))
    return [command for _, found in blocks(page) for command in found] + commands(indented)


def read_command(command: str) -> tuple[str, list[str]] | None:
    """(command of `lmc`, its options) of a command line; None where it starts something else."""
    words = shlex.split(command.replace("…", " "))
    if words[0] in ("torchrun", "deepspeed", "sbatch"):
        if "lmc_dist.cli" in words:
            words = ["lmc", *words[words.index("lmc_dist.cli") + 1 :]]
        else:
            scripts = [i for i, word in enumerate(words) if re.search(r"\.(py|sbatch)$", word)]
            if not scripts:
                return None
            words = ["lmc", Path(words[scripts[0]]).stem, *words[scripts[0] + 1 :]]
    if words[0] != "lmc":
        return None
    name = " ".join(words[1:3]) if " ".join(words[1:3]) in COMMANDS else words[1]
    return name, words[1 + len(name.split()) :]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_read_by_the_real_parser(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPO)
    for command in shown(page):
        found = read_command(command)
        if found is None:
            continue
        name, options = found
        assert name in COMMANDS, command
        if "--config" in options and not Path(options[options.index("--config") + 1]).exists():
            at = options.index("--config")
            assert options[at + 1].startswith("runs/"), f"{command}: no such file"
            del options[at : at + 2]
        try:
            parse(name, options)
        except SystemExit:
            pytest.fail(f"{command}\n{capsys.readouterr().err}")


def test_every_block_is_executed_or_says_why_not() -> None:
    for page in PAGES:
        for why, found in blocks(page):
            assert why or page.name in RUN_IN_ORDER, f"{page.name}: {found[0]}"
            if page.name in RUN_IN_ORDER and why is None:
                assert all(command.startswith(("lmc ", "python examples/")) for command in found), found


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_quick_start_and_tutorial_run(tmp_path: Path) -> None:
    for name in ("configs", "examples", "launch"):
        (tmp_path / name).symlink_to(REPO / name)
    pages = [REPO / "docs" / name for name in RUN_IN_ORDER]
    typed = [command for page in pages for why, found in blocks(page) if why is None for command in found]
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(REPO / "tests" / "typed.py")],
        input="\n".join(typed),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
        timeout=1400,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    for part in ("quick/unlearn/result.json", "quick/report/report.html", "quick/train.sbatch"):
        assert (tmp_path / "runs" / part).exists()
    for part in ("unlearned/model/model.safetensors", "report/report.html", "loop_unlearned/result.json"):
        assert (tmp_path / "runs" / "example" / part).exists()


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(BIN / "mkdocs"), "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")],
        capture_output=True,
        text=True,
        cwd=REPO,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    for name in lmc_dist.__all__:
        assert re.search(rf'id="lmc_dist[\w.]*\.{name}"', api), f"{name} is public and not in docs/api.md"


# --- messages ----------------------------------------------------------------------------------------------------------


@cache
def templates() -> list[re.Pattern[str]]:
    """Every text of the source as a pattern, with anything in place of what is filled in."""
    found = set()
    for path in (REPO / "lmc_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else None for p in node.values]
                text = "".join("\0" if part is None else str(part) for part in parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = re.sub(r"%[-+0-9.]*[dsfg]", "\0", node.value)
            else:
                continue
            if len(text.replace("\0", "")) >= 20:
                found.add(text)
    return [re.compile(".*?".join(map(re.escape, text.split("\0"))), re.DOTALL) for text in found]


def quoted() -> list[str]:
    return [
        " ".join(text.split())
        for text in re.findall(r"```text\n(.*?)```", (REPO / "docs" / "troubleshooting.md").read_text(), re.DOTALL)
    ]


def test_quoted_messages_are_those_of_the_source() -> None:
    assert len(quoted()) >= 30
    for message in quoted():
        assert any(template.fullmatch(message) for template in templates()), message


def printed(message: str) -> bool:
    """Whether the page quotes a message that was really raised."""
    return any(re.fullmatch(re.escape(text).replace("…", ".*?"), message, re.DOTALL) for text in quoted())


def test_messages_that_are_cheap_to_provoke_are_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmc_dist import TrajectoryLog
    from lmc_dist.runtime import check_replaceable
    from lmc_dist.trajectory.callback import TrainingLoggerCallback, check_launch
    from lmc_dist.trajectory.lock import LogLock, require_free

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    lock = LogLock(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments: Any = SimpleNamespace(world_size=1, remove_unused_columns=True)

    def unused_columns() -> None:
        monkeypatch.setenv("WORLD_SIZE", "1")
        TrainingLoggerCallback(str(tmp_path / "log")).on_train_begin(arguments, None, None)  # type: ignore[arg-type]

    provoked = [
        lambda: TrajectoryLog(tmp_path / "nowhere"),
        lambda: check_replaceable(tmp_path / "full", "result.json", overwrite=False),
        lambda: require_free(tmp_path),
        lambda: check_launch(arguments),
        unused_columns,
    ]
    try:
        for provoke in provoked:
            with pytest.raises(LmcError) as caught:
                provoke()
            assert printed(str(caught.value)), str(caught.value)
    finally:
        lock.release()


# --- facts that the pages repeat ---------------------------------------------------------------------------------------


def test_versions_in_the_limits_are_those_of_the_project() -> None:
    page = " ".join((REPO / "docs" / "limits.md").read_text().split())
    pins = dict(re.findall(r"(?m)^([\w-]+)==([\w.]+)", (REPO / "constraints.txt").read_text()))
    for shown_as in ("torch", "DeepSpeed", "accelerate"):
        assert f"{shown_as} {'.'.join(pins[shown_as.lower()].split('.')[:2])}" in page, shown_as
    lower = dict(re.findall(r'"([\w-]+)>=([\w.]+)"', (REPO / "setup.py").read_text()))
    for shown_as in ("torch", "DeepSpeed", "transformers", "accelerate"):
        assert f"{shown_as} {lower[shown_as.lower()]}" in page, shown_as
