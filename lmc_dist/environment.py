"""`lmc doctor`: whether this environment has what training, logging and unlearning need, and what to do where it has not.

Works where torch or any other package is missing or broken: each look is taken by itself, and what it raises is what it
found. `lmc log doctor` is another thing: it examines a log.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

from lmc_dist.config import Config
from lmc_dist.errors import LmcError, first_line

Status = Literal["ok", "warning", "failed"]

# Operators that training under DeepSpeed may build; with torch's own optimizers none of them is needed.
OPERATORS = {"cpu_adam": "DeepSpeedCPUAdam", "fused_adam": "FusedAdam", "deepspeed_shm_comm": "CPU ranks"}
SMALL_FOLDER = 1 << 30  # bytes
DEVELOPMENT = ("dev", "bench", "docs")


@dataclass(frozen=True)
class Finding:
    """One look at the environment.

    Attributes:
        name: What was looked at.
        status: `failed` where something that is needed is missing.
        found: What is there.
        advice: What to do; empty where nothing is.
    """

    name: str
    status: Status
    found: str
    advice: str = ""


def examine(config: Config) -> tuple[str, int]:
    """(all findings as text, exit status: 1 if any failed). Local; no process group.

    Raises:
        LmcError: The file for the findings cannot be written.
    """
    found = [finding for look in looks(config.environment.folder) for finding in guarded(*look)]
    if config.json is not None:
        target = Path(config.json)
        if not target.absolute().parent.is_dir():
            raise LmcError(f"json: there is no folder {target.parent}")
        target.write_text(json.dumps([asdict(finding) for finding in found], indent=1) + "\n")
    return text(found), int(any(finding.status == "failed" for finding in found))


def looks(folder: str | None) -> Iterator[tuple[str, Callable[[], list[Finding]]]]:
    """(name, look) of everything that is looked at."""
    yield "python", python
    yield "packages", packages
    yield "extras", extras
    yield "torch", torch_build
    yield "GPUs", gpus
    yield "backends", backends
    yield "deepspeed", deepspeed
    yield "compiler", compiler
    yield "launchers", launchers
    yield "cores", cores
    if folder is not None:
        yield "folder", lambda: [writable(Path(folder))]


def guarded(name: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """What a look finds; if it fails, that."""
    try:
        return look()
    except Exception as error:  # whatever a broken package raises is the finding
        advice = "reinstall the package that it comes from"
        return [Finding(name, "failed", f"{type(error).__name__}: {first_line(error)}", advice)]


def text(findings: list[Finding]) -> str:
    """The findings for a person."""
    widths = [max(len(getattr(f, key)) for f in findings) for key in ("name", "status")]
    lines = [f"{f.name:<{widths[0]}}  {f.status:<{widths[1]}}  {f.found}" for f in findings]
    told = [f"  {f.name}: {f.advice}" for f in findings if f.advice]
    return "\n".join([*lines, *(["", "what to do", *told] if told else [])])


# --- the looks ---------------------------------------------------------------------------------------------------------


def python() -> list[Finding]:
    version = sys.version.split()[0]
    needed = metadata.metadata("lmc_dist")["Requires-Python"] or ""
    from packaging.specifiers import SpecifierSet

    if version not in SpecifierSet(needed):
        return [Finding("python", "failed", f"{version}, needed is {needed}", "make an environment with a newer one")]
    if not sys.platform.startswith("linux"):
        return [Finding("python", "warning", f"{version} on {sys.platform}", "nothing is tested but Linux")]
    return [Finding("python", "ok", f"{version} ({sys.executable})")]


def requirements() -> list[tuple[Any, str | None]]:
    """(requirement, extra that asks for it) of the installed lmc_dist."""
    from packaging.requirements import Requirement

    found: list[tuple[Any, str | None]] = []
    names: list[str] = metadata.metadata("lmc_dist").get_all("Provides-Extra") or []
    for requirement in map(Requirement, metadata.requires("lmc_dist") or []):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            found.append((requirement, None))
        else:
            found += [(requirement, extra) for extra in names if marker.evaluate({"extra": extra})]
    return found


def installed(requirement: Any) -> str | None:
    """The version that is installed, or None."""
    try:
        return metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return None


def packages() -> list[Finding]:
    """Everything that is needed in any case, against the ranges of setup.py."""
    missing, outside, present = [], [], []
    for requirement, extra in requirements():
        if extra is not None:
            continue
        version = installed(requirement)
        if version is None:
            missing.append(str(requirement.name))
        elif not requirement.specifier.contains(version, prereleases=True):
            outside.append(f"{requirement.name} {version} (needed is {requirement.specifier})")
        elif requirement.specifier:
            present.append(f"{requirement.name} {version}")
    if missing or outside:
        problems = [*(f"{name} is missing" for name in missing), *outside]
        return [Finding("packages", "failed", ", ".join(problems), "pip install --upgrade lmc_dist, or those by name")]
    return [Finding("packages", "ok", ", ".join(present))]


def extras() -> list[Finding]:
    """What some commands need besides."""
    lacking: dict[str, list[str]] = {}
    for requirement, extra in requirements():
        if extra is not None and extra not in DEVELOPMENT:
            lacking.setdefault(extra, [])
            if installed(requirement) is None:
                lacking[extra].append(requirement.name)
    found = "; ".join(f"{extra}: {'no ' + ' and '.join(names) if names else 'all'}" for extra, names in lacking.items())
    short = [extra for extra, names in lacking.items() if names]
    if short:
        return [
            Finding("extras", "warning", found, f"where they are wanted: pip install 'lmc_dist[{','.join(short)}]'")
        ]
    return [Finding("extras", "ok", found)]


def torch_build() -> list[Finding]:
    import torch

    built = torch.version.cuda or torch.version.hip
    return [Finding("torch", "ok", f"{torch.__version__}, {f'built for {built}' if built else 'built for CPUs'}")]


def gpus() -> list[Finding]:
    import torch

    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [Finding("GPUs", "ok", ", ".join(f"{g.name} ({g.total_memory / 2**30:.0f} GiB)" for g in found))]
    if torch.version.cuda or torch.version.hip:
        advice = "look at nvidia-smi, the driver's version and CUDA_VISIBLE_DEVICES"
        return [
            Finding("GPUs", "warning", "none, although torch is built for them: everything runs on the CPU", advice)
        ]
    return [Finding("GPUs", "ok", "none: everything runs on the CPU")]


def backends() -> list[Finding]:
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        return [
            Finding("backends", "failed", "torch is built without torch.distributed", "install another build of torch")
        ]
    there = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    needed = ["gloo", *(["nccl"] if torch.cuda.is_available() else [])]
    found = ", ".join(name for name, is_there in there.items() if is_there) or "none"
    if missing := [name for name in needed if not there[name]]:
        return [Finding("backends", "failed", f"{found}; {missing[0]} is missing", "install another build of torch")]
    return [Finding("backends", "ok", found)]


def deepspeed() -> list[Finding]:
    """Whether it imports, and which of its operators are compatible and which are built already."""
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    ops = import_module("deepspeed.ops")
    compatible = ops.__compatible_ops__
    ahead = import_module("deepspeed.git_version_info").installed_ops
    built, states = operator_folder(), []
    for name in OPERATORS:
        libraries = list(built.rglob(f"{name}.so")) if built.is_dir() else []
        state = "built" if ahead.get(name) or libraries else "is built at first use"
        states.append(f"{name} {state if compatible.get(name) else 'not compatible'}")
    found = f"{metadata.version('deepspeed')}; operators: {', '.join(states)}"
    if locks := sorted(built.rglob("lock")) if built.is_dir() else []:
        advice = f"if nothing is being built now, remove {', '.join(map(str, locks))}: who needs the operator waits for it to go"
        return [Finding("deepspeed", "warning", f"{found}; a build was begun and not ended", advice)]
    return [Finding("deepspeed", "ok", found)]


def operator_folder() -> Path:
    """Where operators are built and looked for."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def compiler() -> list[Finding]:
    """What DeepSpeed builds operators with."""
    cxx = os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    have = {
        cxx or "C++ compiler": cxx is not None,
        "ninja": shutil.which("ninja") is not None,
        "Python.h": header.exists(),
    }
    found = ", ".join(name for name, is_there in have.items() if is_there) or "none"
    missing = [name for name, is_there in have.items() if not is_there]
    if not missing:
        return [Finding("compiler", "ok", found)]
    needed = (
        "only DeepSpeed's own operators need them (DeepSpeedCPUAdam, FusedAdam; CPU ranks of a script of one's own)"
    )
    return [Finding("compiler", "warning", f"{found}; without {', '.join(missing)}", needed)]


def launchers() -> list[Finding]:
    names = ("torchrun", "deepspeed", "accelerate")
    paths = {name: shutil.which(name) for name in names}
    missing = [name for name, path in paths.items() if path is None]
    own = Path(sys.executable).parent
    foreign = [name for name, path in paths.items() if path and (own / name).exists() and Path(path).parent != own]
    if missing or foreign:
        found = ", ".join([*(f"{n} is not on PATH" for n in missing), *(f"{n} is {paths[n]}" for n in foreign)])
        return [Finding("launchers", "warning", found, f"put {own} first on PATH: activate the environment")]
    return [Finding("launchers", "ok", ", ".join(names))]


def cores() -> list[Finding]:
    import psutil  # type: ignore[import-untyped]

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = psutil.virtual_memory().available / 2**30
    threads = os.environ.get("OMP_NUM_THREADS")
    found = f"{usable} usable, {free:.1f} GiB of memory free, OMP_NUM_THREADS {threads or 'not set'}"
    if threads is not None and threads.isdecimal() and int(threads) > usable:
        return [Finding("cores", "warning", found, f"set OMP_NUM_THREADS to {usable} divided by the ranks of a node")]
    return [Finding("cores", "ok", found)]


def writable(folder: Path) -> Finding:
    """Whether a log can be written to a folder, or could be where it would be made."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        return Finding("folder", "failed", f"{place} is a file", "name another folder")
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".lmc-doctor-") as trial:
            part = Path(trial) / "file.part"
            with open(part, "wb") as file:
                file.write(b"x")
                file.flush()
                os.fsync(file.fileno())
            part.replace(Path(trial) / "file")
    except OSError as error:
        return Finding(
            "folder", "failed", f"{place} cannot be written to: {error}", "name another folder, or its rights"
        )
    free = shutil.disk_usage(place).free
    found = f"{place} can be written to, {free / 2**30:.1f} GiB free"
    if free < SMALL_FOLDER:
        return Finding("folder", "warning", found, "make room: lmc plan log predicts what a log takes")
    return Finding("folder", "ok", found)
