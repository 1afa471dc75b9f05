"""A log by somebody else: it cannot run code, write elsewhere or take all memory, and never gives wrong numbers."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import sqlite3
import struct
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from safetensors import safe_open
from safetensors.torch import save_file

from lmc_dist.errors import LmcError
from lmc_dist.shards.layout import ParamSpec, ShardLayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.difference import exact_update
from lmc_dist.trajectory.files import header_digest, write_shard_file
from lmc_dist.trajectory.kept import curvature_folder
from lmc_dist.trajectory.manifest import logged_attention, write_manifest
from lmc_dist.trajectory.record import MicroRecord, Segment, StepRecord, TrajectoryManifest
from lmc_dist.trajectory.replay import logged_optimizer, logged_settings
from lmc_dist.trajectory.resume import resume
from lmc_dist.trajectory.sealed import write_sealed
from lmc_dist.trajectory.snapshots import (
    finish_snapshot,
    part_folder,
    snapshot_folder,
    start_snapshot,
    vector_checksums,
)
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.trajectory.table import StepTable, encode_row, encode_tokens, row_digest

PARAMS = [ParamSpec("a", (5, 3)), ParamSpec("b", (7,))]
LAYOUT = ShardLayout(PARAMS)
STEP = "steps/step-00000001"


def plain_manifest(**changes: Any) -> TrajectoryManifest:
    table = [{"name": p.name, "shape": list(p.shape), "dtype": "float32", "tied_to": [], "group": 0} for p in PARAMS]
    values: dict[str, Any] = {
        "model_config": {},
        "model_fingerprint": "x",
        "parameters": table,
        "optimizer": {"class": "SGD", "groups": [{"lr": 0.1}]},
        "loss_normalization": "global_token_mean",
        "max_grad_norm": 0.0,
        "dataset_fingerprint": None,
        "world_size": 1,
        "engine": "single",
        "storage": "update",
        "save_interval": 2,
        "max_steps": None,
        "save_batch_data": True,
    }
    return TrajectoryManifest(**values | changes)


@pytest.fixture(scope="module")
def good(tmp_path_factory: Any) -> Path:
    """A log of three steps by one process, made of the parts that writers use."""
    folder = tmp_path_factory.mktemp("untrusted") / "log"
    folder.mkdir()
    write_manifest(folder, plain_manifest())
    table = StepTable(folder)
    generator = torch.Generator().manual_seed(0)
    thetas = [ShardedVector(LAYOUT, torch.randn(LAYOUT.flat_numel, generator=generator)) for _ in range(4)]
    for step, (before, after) in enumerate(pairwise(thetas)):
        digest = write_shard_file(folder / f"steps/step-{step:08d}", LAYOUT, exact_update(before, after), {}, "update")
        checksum = vector_checksums({"theta": after})["theta"]
        micro = MicroRecord(0, 0, (1, 2), 3.0, random_state=bytes(100))
        table.insert([(StepRecord(step, step, (micro,), (0.1,), 3.0, checksum=checksum), {"update": [digest]})])
    table.insert_samples([{"id": 1, "input_ids": [1, 2], "labels": [-100, 2], "pad": 0}])
    table.close()
    for step in (0, 2):
        vectors = {"theta": thetas[step]}
        start_snapshot(folder / snapshot_folder(step), vectors, None).result()
        sums = vector_checksums(vectors)
        finish_snapshot(
            folder / snapshot_folder(step), {"step": step, "checksum": sums["theta"], "kinds": sums, "scalars": {}}
        )
    use(folder)
    return folder


def use(folder: Path) -> None:
    """Everything that is done with a log, from its opening on."""
    log = TrajectoryLog(folder)
    list(log.records())
    theta = log.theta(0)
    for step in range(log.num_steps):
        log.advance(theta, step)
    for step in log.snapshots:
        log.snapshot(step)
    log.samples()
    log.require(0)


# --- ways to change one ------------------------------------------------------------------------------------------------


def manifest(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = plain_manifest().to_json() | changes
        write_sealed(folder / "manifest.json", values)

    return change


def parameter(**changes: Any) -> Callable[[Path], None]:
    first, second = plain_manifest().parameters
    return manifest(parameters=[first | changes, second])


def segment(**changes: Any) -> Callable[[Path], None]:
    good = {"first_step": 1, "world_size": 1, "engine": "single", "partition": "zero3", "run": {}, "versions": {}}
    return manifest(segments=[good | changes])


def text(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def sql(*statements: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with closing(sqlite3.connect(folder / "steps.sqlite")) as connection:
            for statement in statements:
                connection.execute(statement)
            connection.commit()

    return change


def row(**changes: Any) -> Callable[[Path], None]:
    """Another row of step 1, with a digest as good as any writer's."""

    def change(folder: Path) -> None:
        with closing(sqlite3.connect(folder / "steps.sqlite")) as connection:
            connection.row_factory = sqlite3.Row
            found = dict(connection.execute("SELECT * FROM steps WHERE step = 1").fetchone()) | changes
            found["digest"] = row_digest(found)
            names = ", ".join(f"{name} = :{name}" for name in found)
            connection.execute(f"UPDATE steps SET {names} WHERE step = 1", found)
            connection.commit()

    return change


def micro(**changes: Any) -> Callable[[Path], None]:
    found = json.loads(
        encode_row(StepRecord(1, 1, (MicroRecord(0, 0, (1, 2), 3.0, bytes(100)),), (0.1,), 3.0), None)["micro_batches"]
    )
    return row(micro_batches=json.dumps([found[0] | changes]))


def sample(tokens: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with closing(sqlite3.connect(folder / "steps.sqlite")) as connection:
            values = {"id": 1, "tokens": tokens, "pad": 0}
            connection.execute("UPDATE samples SET tokens = ?, digest = ?", (tokens, row_digest(values)))
            connection.commit()

    return change


def shard(
    added: dict[str, torch.Tensor] | None = None, table: dict[str, Any] | None = None, **header: str
) -> Callable[[Path], None]:
    """Another file of step 1, known to the table by its digest."""

    def change(folder: Path) -> None:
        path = folder / STEP / "update.rank-00000-of-00001.safetensors"
        with safe_open(path, "pt") as file:
            found = dict(file.metadata())
            kept = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        names = json.loads(found["tensors"]) | (table or {})
        found |= {"tensors": json.dumps(names), **header}
        save_file(kept | (added or {}), path, found)
        sql(f"UPDATE steps SET tensors = '{json.dumps({'update': [header_digest(found)]})}' WHERE step = 1")(folder)

    return change


def meta(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "snapshots/step-0/meta.json"
        write_sealed(path, {k: v for k, v in (json.loads(path.read_text()) | changes).items() if k != "digest"})

    return change


def snapshot_file(content: bytes | None = None, **tensors: torch.Tensor) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (path,) = (folder / "snapshots/step-0").glob("*.safetensors")
        if content is not None:
            path.write_bytes(content)
            return
        with safe_open(path, "pt") as file:
            found = file.metadata()
            kept = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        save_file(kept | {f"theta/{name}": tensor for name, tensor in tensors.items()}, path, found)

    return change


def link(name: str) -> Callable[[Path], None]:
    """A part of the log moved out of it, with a link in its place."""

    def change(folder: Path) -> None:
        outside = folder.parent / "outside"
        outside.mkdir()
        shutil.move(folder / name, outside / "moved")
        (folder / name).symlink_to(outside / "moved")

    return change


def journal(folder: Path) -> None:
    """A journal that tells SQLite to remove a file of the machine after its recovery."""
    victim = folder.parent / "victim"
    victim.write_text("precious")
    name = str(victim).encode()
    tail = (
        struct.pack(">I", 0x40000001)
        + name
        + struct.pack(">II", len(name), sum(name))
        + bytes.fromhex("d9d505f920a163d7")
    )
    header = bytes.fromhex("d9d505f920a163d7") + struct.pack(">IIIII", 0, 0, 1, 512, 4096)
    (folder / "steps.sqlite-journal").write_bytes(header.ljust(512, b"\0") + tail)


def bomb_header(length: int) -> bytes:
    return struct.pack("<Q", length) + b'{"a":{}}'


def zstd_bomb() -> bytes:
    """A few kB that say, and would be, 8 GiB."""
    size = 1 << 33
    stream = zstandard.ZstdCompressor(level=1).compressobj(size=size)
    head = stream.compress(bytes(1 << 20)) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    return head


FLAT = torch.zeros(15)
NAN = torch.full((15,), float("nan"))
DEEP = b"[" * 200_000
CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "text where there is JSON": (text("manifest.json", b"\x80\x81"), "manifest.json is damaged"),
    "JSON too deep": (text("manifest.json", DEEP), "manifest.json is damaged"),
    "a number of 10^6 digits": (
        text("manifest.json", b'{"schema": ' + b"9" * 1_000_000 + b"}"),
        "manifest.json is damaged",
    ),
    "NaN in JSON": (text("manifest.json", b'{"schema": NaN}'), "NaN is no number"),
    "another object": (text("manifest.json", b"[1]"), "it has no digest"),
    "no digest": (text("manifest.json", json.dumps(plain_manifest().to_json()).encode()), "it has no digest"),
    "another version without a digest": (text("manifest.json", b'{"schema": 1}'), "has schema 1, this version reads"),
    "another version": (manifest(schema=99), "has schema 99"),
    "a field too many": (manifest(code="x"), "manifest.json is damaged"),
    "a type that is a function": (manifest(dtype="load"), "dtype is 'load', needed is one of float32"),
    "a type that is a module": (parameter(dtype="hub"), "dtype is 'hub'"),
    "a type that is a list": (manifest(update_dtype=["float32"]), "update_dtype is"),
    "a huge shape": (parameter(shape=[10**18]), "shape is .1000000000000000000., needed is a list of sizes"),
    "huge shapes together": (parameter(shape=[2**30, 2**30]), "elements in all"),
    "more than fits": (parameter(shape=[2**45]), "a vector takes .* GiB on each of 1 ranks, this machine has"),
    "a shape below zero": (parameter(shape=[-5, 3]), "needed is a list of sizes"),
    "a shape of floats": (parameter(shape=[5.0, 3]), "needed is a list of sizes"),
    "a name twice": (parameter(name="b"), "needed is named once"),
    "a name with a mark": (parameter(name="b#fix_index"), "needed is a name"),
    "a name that is none": (parameter(name=None), "needed is a name"),
    "a group that is not there": (parameter(group=7), "needed is an optimizer group"),
    "a rule that is none": (manifest(partition="../../etc"), "partition is '../../etc'"),
    "a storage that is none": (manifest(storage="../x"), "storage is '../x'"),
    "segments out of order": (segment(first_step=0), "needed is in ascending order"),
    "a segment of 10^9 ranks": (segment(world_size=10**9), "needed is a number of ranks"),
    "a segment that lacks a field": (manifest(segments=[{"first_step": 1}]), "missing 5 required"),
    "no table": (lambda folder: (folder / "steps.sqlite").unlink(), "steps.sqlite is missing"),
    "a table of zeros": (text("steps.sqlite", bytes(8192)), "does not begin like a step table"),
    "an empty table": (text("steps.sqlite", b""), "its tables are not those of a log"),
    "a trigger": (
        sql("CREATE TRIGGER t AFTER INSERT ON steps BEGIN DELETE FROM steps; END"),
        "its tables are not those of a log",
    ),
    "a view in place of the table": (
        sql(
            "ALTER TABLE steps RENAME TO hidden",
            "CREATE VIEW steps AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i AS step FROM n",
        ),
        "its tables are not those of a log",
    ),
    "a column more": (sql("ALTER TABLE steps ADD COLUMN x AS (abs(step))"), "not those of a log"),
    "the other journal mode": (sql("PRAGMA journal_mode = WAL"), "does not begin like a step table"),
    "a journal that names a file": (journal, "names another journal"),
    "a gap": (sql("DELETE FROM steps WHERE step = 1"), "lacks step 1|rows were lost"),
    "rows lost at the end": (sql("DELETE FROM steps WHERE step > 0"), "rows were lost"),
    "another row": (sql("UPDATE steps SET lr = '[9]' WHERE step = 1"), "row of step 1 does not have its digest"),
    "a rate that is text": (row(lr='["x"]'), "row of step 1 is no record"),
    "a rate that is infinite": (row(lr="[Infinity]"), "row of step 1 is no record"),
    "a denominator that is a blob": (row(denominator=b"x"), "row of step 1 is no record"),
    "applied twice": (row(applied=7), "row of step 1 is no record"),
    "a checksum that is none": (row(checksum="../../x"), "row of step 1 is no record"),
    "JSON too deep in a row": (row(micro_batches=DEEP.decode()), "row of step 1 is no record"),
    "a huge number in a row": (row(micro_batches="[" + "9" * 100_000 + "]"), "row of step 1 is no record"),
    "ids that are floats": (micro(ids=[1.5]), "row of step 1 is no record"),
    "ids that are huge": (micro(ids=[10**30]), "row of step 1 is no record"),
    "a rank that is huge": (micro(rank=2**40), "row of step 1 is no record"),
    "a random state of 1 GiB": (row(random_state=zlib.compress(bytes(1 << 30), 1)), "random states are not those"),
    "a random state for nobody": (micro(random=False), "random states are not those"),
    "tensors that are a path": (
        sql("UPDATE steps SET tensors = '\"../../etc\"' WHERE step = 1"),
        "where its tensors are",
    ),
    "a kind that is a path": (
        sql("UPDATE steps SET tensors = '{\"../../x\": []}' WHERE step = 1"),
        "where its tensors are",
    ),
    "digests of 10^6 ranks": (
        sql(f"UPDATE steps SET tensors = '{json.dumps({'update': ['0' * 32] * 100_000})}' WHERE step = 1"),
        "where its tensors are",
    ),
    "no tensors": (
        sql("UPDATE steps SET tensors = NULL WHERE step = 1"),
        "update of step 1 is not in|no updates that lead",
    ),
    "tokens of 8 GiB": (sample(zstd_bomb()), "tokens of a sample are too many"),
    "tokens that are none": (sample(b"xxxx"), "tokens of a sample are"),
    "tokens of other length": (sample(zstandard.compress(b"12345")), "tokens of a sample are damaged"),
    "other tokens": (
        sql(f"UPDATE samples SET tokens = x'{encode_tokens([1], [2]).hex()}'"),
        "sample 1 in steps.sqlite",
    ),
    "a header of 2^60 bytes": (
        text(f"{STEP}/update.rank-00000-of-00001.safetensors", bomb_header(2**60)),
        "is damaged",
    ),
    "another type": (
        shard({"a": FLAT.long()}, {"a": ["int64", 15, "0" * 32]}),
        "elements of type int64, needed is float32",
    ),
    "another type than named": (shard({"a": FLAT.double()}), "is stored as F64 of shape .15., its header says F32"),
    "booleans": (shard({"a": FLAT.bool()}, {"a": ["bool", 15, "0" * 32]}), "elements of type bool"),
    "a type that is code": (shard(None, {"a": ["hub.load", 15, "0" * 32]}), "elements of type hub.load"),
    "more elements": (
        shard({"a": torch.zeros(16)}, {"a": ["float32", 16, "0" * 32]}),
        "has 16 elements, world size 1 needs 15",
    ),
    "10^18 elements": (shard(None, {"a": ["float32", 10**18, "0" * 32]}), "elements, world size 1 needs 15"),
    "a table that is a list": (shard(None, None, tensors="[1]"), "its table of tensors"),
    "a table too deep": (shard(None, None, tensors=DEEP.decode()), "is damaged"),
    "a row that is none": (shard(None, {"a": 5}), "is not described as"),
    "a tensor of nobody": (shard({"../x": FLAT}, {"../x": ["float32", 15, "0" * 32]}), "belongs to no parameter"),
    "a fix of nobody": (
        shard({"z#fix_index": FLAT}, {"z#fix_index": ["int64", 15, "0" * 32]}),
        "belongs to no parameter",
    ),
    "an unknown compression": (shard(None, None, compression="gzip"), "unknown compression 'gzip'"),
    "other numbers": (shard({"a": FLAT + 1}), "do not have their digest"),
    "a compressed file that is none": (shard(None, None, compression="zstd"), "is stored as F32"),
    "a snapshot's header of 2^60 bytes": (snapshot_file(bomb_header(2**60)), "snapshot .* is damaged"),
    "a snapshot of integers": (snapshot_file(a=FLAT.long()), "'theta' of a is torch.int64, the log says torch.float32"),
    "a snapshot of doubles": (snapshot_file(a=FLAT.double()), "'theta' of a is torch.float64"),
    "a snapshot with NaN": (snapshot_file(a=NAN), "does not have the logged checksum"),
    "a snapshot that is longer": (snapshot_file(a=torch.zeros(16)), "is not there element for element"),
    "another step's snapshot": (
        lambda folder: (folder / "snapshots/step-0").rename(folder / "snapshots/step-1"),
        "no snapshot at or before step 0",
    ),
    "another step's snapshot under its name": (
        lambda folder: (
            shutil.rmtree(folder / "snapshots/step-0"),
            (folder / "snapshots/step-2").rename(folder / "snapshots/step-0"),
        )[0],
        "lies in the wrong place",
    ),
    "kinds that are a list": (meta(kinds=["theta"]), "kinds are no checksums"),
    "a kind of a snapshot that is a path": (
        meta(kinds={"theta": "x", "../../x": "y"}, checksum="x"),
        "'../../x' of a is missing",
    ),
    "scalars that are text": (meta(scalars={"step": "import os"}), "scalars are no numbers"),
    "a step that is text": (meta(step="../../x"), "step is no number"),
    **{
        f"a link for {name}": (link(name), "is a symbolic link")
        for name in (
            "manifest.json",
            "steps.sqlite",
            "steps",
            "snapshots",
            STEP,
            f"{STEP}/update.rank-00000-of-00001.safetensors",
            "snapshots/step-0/meta.json",
            "snapshots/step-0/shard-00001-model-00001-of-00001.safetensors",
        )
    },
    "a pipe for the manifest": (
        lambda folder: ((folder / "manifest.json").unlink(), os.mkfifo(folder / "manifest.json"))[1],
        "manifest.json is no plain file",
    ),
}


@pytest.mark.timeout(120)
def test_a_crafted_log_is_refused_where_it_is_crafted(good: Path, tmp_path: Path) -> None:
    before, wrong = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for number, (name, (change, message)) in enumerate(CASES.items()):
        folder = tmp_path / str(number) / "log"
        shutil.copytree(good, folder)
        change(folder)
        try:
            use(folder)
        except LmcError as error:
            if not re.search(message, str(error)) or len(str(error)) > 1500:
                wrong.append(f"{name}: {error}")
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__} {error}")
        else:
            wrong.append(f"{name}: nothing was noticed")
        assert not (folder.parent / "victim").exists() or (folder.parent / "victim").read_text() == "precious"
    assert not wrong, "\n".join(wrong)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert peak < 400 << 10, f"{peak >> 10} MiB were taken"  # 1 GiB of zeros is made here, in pieces that zlib frees


class Harmful:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_of_a_log_is_unpickled(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    shutil.copytree(good, folder)
    for place in ("", "steps", STEP, "snapshots", "snapshots/step-0", "snapshots/step-2"):
        for name in (".metadata", "__0_0.distcp", "optimizer.pt", "training_args.bin"):
            (folder / place / name).write_bytes(pickle.dumps(Harmful(tmp_path / "harm")))
    use(folder)
    assert not (tmp_path / "harm").exists()


def test_a_snapshot_without_its_folder_is_none(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    shutil.copytree(good, folder)
    for name in ("step-007", "step--1", "step-٣", "step-1e5", "step-" + "9" * 200, "step-3.part"):
        shutil.copytree(folder / "snapshots/step-2", folder / "snapshots" / name)
    link("snapshots/step-0")(folder)
    assert TrajectoryLog(folder).snapshots == [2]


def test_resuming_writes_and_removes_inside_the_log_alone(good: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("steps", "snapshots", "steps.sqlite", "manifest.json")):
        folder = tmp_path / str(number) / "log"
        shutil.copytree(good, folder)
        link(name)(folder)
        before = sorted((folder.parent / "outside").rglob("*"))
        with pytest.raises(LmcError, match="is a symbolic link"):
            resume(folder, plain_manifest(), LAYOUT)
        assert sorted((folder.parent / "outside").rglob("*")) == before
    folder = tmp_path / "links" / "log"
    shutil.copytree(good, folder)
    link("snapshots/step-0")(folder)
    outside = folder.parent / "outside" / "moved"
    (folder / "steps" / "step-00000009").symlink_to(outside)
    (folder / "snapshots" / "step-9").symlink_to(outside)
    before = sorted(outside.rglob("*"))
    resumed = resume(folder, plain_manifest(), LAYOUT)
    assert resumed is not None and resumed.step == 2 and resumed.lock is not None
    resumed.lock.release()
    assert sorted(outside.rglob("*")) == before
    assert not [path for path in folder.rglob("*") if path.is_symlink()]


def test_names_and_settings_are_not_taken_from_a_log_as_they_are(tmp_path: Path) -> None:
    for name in ("../x", "/etc", "..", "", ".hidden", "a/b", "a\0b", "x" * 300):
        with pytest.raises(LmcError, match="name is that of a folder"):
            curvature_folder(tmp_path, name)
    model = torch.nn.Linear(2, 2)
    for kind in ("lr_scheduler", "Optimizer.load", "swa_utils", "__builtins__", "_functional"):
        with pytest.raises(LmcError, match="which is not torch's"):
            logged_optimizer(model, replace(plain_manifest(), optimizer={"class": kind, "groups": []}))
    run = {"deepspeed": {"zero_optimization": {"stage": 3}, "tensorboard": {"enabled": True, "output_path": "/"}}}
    found = Segment(0, 1, "deepspeed-zero3", "zero3", run, {})
    assert logged_settings(found) == {"zero_optimization": {"stage": 3}}
    run["deepspeed"]["zero_optimization"] = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/"}}
    with pytest.raises(LmcError, match="NVMe"):
        logged_settings(found)
    with pytest.raises(LmcError, match="param_dtype is hub"):
        logged_settings(replace(found, engine="fsdp2", run={"engine": {"param_dtype": "hub"}}))
    kernels = {"eager": "eager", "sdpa": "sdpa", "flash_attention_2": "sdpa", "somebody/kernel": "sdpa"}
    for kernel, used in (*kernels.items(), (["eager"], "sdpa"), (None, "sdpa")):
        assert logged_attention(plain_manifest(run={"attention": kernel})) == used
    assert part_folder(tmp_path / "step-1").parent == tmp_path
