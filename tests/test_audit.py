"""The audit: a chain that shows every edit, survives a kill at any write, and whose norms the log confirms."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import stat
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from test_engine_logs import engine_config, this_runtime, train_job

from lmc_dist.audit import digests
from lmc_dist.audit.chain import AuditChain, verify_chain
from lmc_dist.audit.digests import new_salt, read_salt, salt_at, salted_digest, write_salt
from lmc_dist.audit.files import part_digests
from lmc_dist.audit.keys import keygen
from lmc_dist.audit.reading import head_path
from lmc_dist.audit.reexecute import draw
from lmc_dist.config import AuditConfig
from lmc_dist.errors import LmcError
from lmc_dist.report.collect import Run, group_runs

FORGOTTEN = (3, 101, 204, 301)
FORGET = ["--forget.samples", ",".join(map(str, FORGOTTEN))]


def make_chain(folder: Path, records: int = 3, key: Path | None = None) -> Path:
    chain = AuditChain(folder / "chain.jsonl", key)
    for i in range(records):
        chain.append("event", {"i": i, "values": [0.5, None, "ü"]}, f"id-{i}")
    return chain.path


@pytest.fixture(scope="module")
def key(tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("key") / "audit"
    keygen(path)
    return path


def public(key: Path | None) -> Path | None:
    return None if key is None else Path(f"{key}.pub")


# --- the chain as it is ------------------------------------------------------------------------------------------------


def test_a_chain_is_what_the_documentation_says(tmp_path: Path, key: Path) -> None:
    """Digests and signatures computed here, from the text of docs/audit.md alone."""

    def text(value: Any) -> bytes:
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

    def blake(content: bytes) -> str:
        return hashlib.blake2b(content, digest_size=32).hexdigest()

    path, previous = make_chain(tmp_path, 3, key), "0" * 64
    shown = load_pem_public_key(Path(f"{key}.pub").read_bytes())
    lines = path.read_bytes().splitlines()
    for n, line in enumerate(lines):
        record = json.loads(line)
        assert (record["n"], record["event"], record["event_id"]) == (n, "event", f"id-{n}")
        assert record.pop("digest") == blake(text(record)) and record["previous"] == previous
        previous = blake(text(record))
        shown.verify(bytes.fromhex(record.pop("signature")), text(record))  # type: ignore[union-attr,call-arg]
    head = json.loads(head_path(path).read_bytes())
    assert head.pop("seal") == blake(text(head)) and (head["count"], head["digest"]) == (3, previous)
    shown.verify(bytes.fromhex(head.pop("signature")), text(head))  # type: ignore[union-attr,call-arg]
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_appending(tmp_path: Path, key: Path) -> None:
    chain = AuditChain(tmp_path / "a" / "chain.jsonl")
    assert chain.records() == []
    first = chain.append("began", {"of": {"b": 1, "a": (2, 3)}, 7: None}, "once")
    assert chain.append("began", {"of": {"a": [2, 3], "b": 1}, "7": None}, "once") == first
    other = AuditChain(chain.path)  # another process
    second = other.append("went on", {})
    assert other.append("began", {"of": {"a": [2, 3], "b": 1}, "7": None}, "once") == first
    assert chain.append("went on", {}) not in (first, second)  # without an id the same again is another event
    records = chain.records()
    assert [r["n"] for r in records] == [0, 1, 2] and [r["digest"] for r in records][:2] == [first, second]
    assert records[0]["body"] == {"of": {"a": [2, 3], "b": 1}, "7": None}
    for event, body in (("began", {"of": 2}), ("ended", {"of": {"a": [2, 3], "b": 1}, "7": None})):
        with pytest.raises(LmcError, match="'once' is in the chain already, with another content"):
            chain.append(event, body, "once")
    for body in ({"x": float("nan")}, {"x": {1, 2}}):
        with pytest.raises(LmcError, match="what JSON cannot say"):
            chain.append("bad", body)
    for act in (AuditChain.check, lambda one: one.append("signed", {})):
        with pytest.raises(LmcError, match="not signed and cannot go on with a key"):
            act(AuditChain(chain.path, key))
    signed = make_chain(tmp_path / "b", 1, key)
    for act in (AuditChain.check, lambda one: one.append("unsigned", {})):
        with pytest.raises(LmcError, match="signed and cannot go on without a key"):
            act(AuditChain(signed))
    keygen(tmp_path / "other")
    with pytest.raises(LmcError, match="not of this key"):
        AuditChain(signed, tmp_path / "other").append("signed by another", {})
    assert len(verify_chain(chain.path).problems) == 0 and verify_chain(chain.path).records == 3
    with pytest.raises(LmcError, match="no audit chain is there"):
        verify_chain(tmp_path / "c" / "chain.jsonl")


def test_a_write_that_fails_does_not_end_the_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = AuditChain(make_chain(tmp_path))
    for name in ("_replace_head", "_write"):
        with monkeypatch.context() as disk:
            disk.setattr(chain, name, lambda *_: exec("raise OSError(28, 'No space left on device')"))
            with pytest.raises(OSError, match="No space left"):
                chain.append("event", {}, name)
        for _ in range(2):
            chain.append("event", {}, name)  # once, whether the record was there already or not
    chain.check()
    assert len(chain.records()) == 5 and verify_chain(chain.path).problems == verify_chain(chain.path).notes == []


def test_several_processes_append_to_one_chain(tmp_path: Path) -> None:
    path, children = tmp_path / "chain.jsonl", []
    for process in range(4):
        child = os.fork()
        if child == 0:
            chain = AuditChain(path)
            for i in range(10):
                chain.append("event", {"process": process}, f"{process}-{i}")
                chain.append("event", {"by": "all"}, f"all-{i}")
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    report, records = verify_chain(path), AuditChain(path).records()
    assert not report.problems and not report.notes
    ids = [record["event_id"] for record in records]
    assert sorted(ids) == sorted([f"{p}-{i}" for p in range(4) for i in range(10)] + [f"all-{i}" for i in range(10)])


# --- what is changed is seen -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [False, True])
def test_every_byte_counts(tmp_path: Path, key: Path, signed: bool) -> None:
    """One bit of each byte of the chain and of its head, with and without the public key."""
    path, chance = make_chain(tmp_path, 3, key if signed else None), random.Random(0)
    tried = 0
    for file in (path, head_path(path)):
        whole = file.read_bytes()
        for place in range(len(whole)):
            changed = bytearray(whole)
            changed[place] ^= 1 << chance.randrange(8)
            file.write_bytes(changed)
            with_key = public(key) if signed and place % 8 == 0 else None
            assert verify_chain(path, with_key).problems, (file.name, place)
            tried += 1
        file.write_bytes(whole)
    assert tried > 1000 and not verify_chain(path, public(key) if signed else None).problems


def edits(lines: list[bytes], head: bytes, other: list[bytes]) -> dict[str, tuple[list[bytes], bytes | None]]:
    """Ways to forge a chain of four records, without the key."""
    found: dict[str, tuple[list[bytes], bytes | None]] = {}
    for i in range(4):
        found[f"without {i}"] = [*lines[:i], *lines[i + 1 :]], head
        found[f"{i} twice"] = [*lines[: i + 1], *lines[i:]], head
        found[f"{i} of another chain"] = [*lines[:i], other[i], *lines[i + 1 :]], head
        found[f"cut after {i}"] = lines[:i], head
        found[f"in the middle of {i}"] = [*lines[:i], lines[i][: len(lines[i]) // 2]], head
        for j in range(i):
            swapped = list(lines)
            swapped[i], swapped[j] = lines[j], lines[i]
            found[f"{i} and {j} swapped"] = swapped, head
    found |= {
        "reversed": (lines[::-1], head),
        "no line": ([], head),
        "an empty line": ([*lines[:2], b"\n", *lines[2:]], head),
        "no head": (lines, None),
        "an empty head": (lines, b""),
        "a head of zeros": (lines, bytes(len(head))),
        "no last end of line": ([*lines[:3], lines[3][:-1]], head),
        "one line for two": ([*lines[:2], lines[2][:-1] + lines[3]], head),
        "more beyond the end": ([*lines, b"{}\n"], head),
        "half a line beyond two more": ([*lines, *lines[:1], lines[0][:20]], head),
    }
    return found


@pytest.mark.parametrize("signed", [False, True])
def test_lines_are_neither_removed_nor_moved(tmp_path: Path, key: Path, signed: bool) -> None:
    used = key if signed else None
    path, other = make_chain(tmp_path / "one", 4, used), make_chain(tmp_path / "two", 4, used)
    lines, head = path.read_bytes().splitlines(True), head_path(path).read_bytes()
    for name, (content, top) in edits(lines, head, other.read_bytes().splitlines(True)).items():
        path.write_bytes(b"".join(content))
        head_path(path).unlink(missing_ok=True)
        if top is not None:
            head_path(path).write_bytes(top)
        assert verify_chain(path, public(used)).problems, name
        with pytest.raises(LmcError, match="does not verify"):
            AuditChain(path, used).append("event", {})


def test_what_only_a_key_or_a_digest_seen_before_can_tell(tmp_path: Path, key: Path) -> None:
    path = make_chain(tmp_path / "one", 3, key)
    seen = AuditChain(path, key).records()[1]["digest"]
    early = make_chain(tmp_path / "early", 2, key)
    assert not verify_chain(path, public(key), seen).problems
    # written anew as a whole, without the key: only the public key tells
    for file in (path, head_path(path)):
        file.unlink()
    make_chain(tmp_path / "one", 3)
    assert not verify_chain(path).problems and not verify_chain(path).signed
    assert any("is not signed" in problem for problem in verify_chain(path, public(key)).problems)
    # replaced by an earlier state of a signed chain, head and all: only a digest that was seen tells
    for file, old in ((path, early), (head_path(path), head_path(early))):
        shutil.copy(old, file)
    assert not verify_chain(path, public(key)).problems
    assert any("which was seen before" in problem for problem in verify_chain(path, public(key), seen).problems)
    report = verify_chain(path)
    assert report.signed and any("no signature was checked" in note for note in report.notes)


# --- a kill at any write -----------------------------------------------------------------------------------------------


def killed_at(point: int, half: bool, work: Callable[[], None]) -> bool:
    """Runs `work` in a process that is killed right before its n-th system call that changes a file, or half-way in a
    write; whether it came to its end before."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return not os.WIFSIGNALED(status)
    passed = 0

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **more: Any) -> Any:
            nonlocal passed
            passed += 1
            if passed == point:
                if name == "write" and half:
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **more)

        return call

    try:
        for name in ("write", "fsync", "replace", "rename", "open", "truncate", "link"):
            setattr(os, name, counted(name))
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize(("signed", "half"), [(False, False), (True, True)], ids=["before", "half-way, signed"])
def test_a_kill_at_any_write_leaves_a_chain_that_verifies(tmp_path: Path, key: Path, signed: bool, half: bool) -> None:
    """Three appends, killed at each of their write points in turn, then gone on with by the same events."""
    used, point, kinds = key if signed else None, 0, set()
    while True:
        point += 1
        path, told = tmp_path / str(point) / "chain.jsonl", tmp_path / f"{point}.told"

        def work(path: Path = path, told: Path = told) -> None:
            chain = AuditChain(path, used)
            with told.open("ab", buffering=0) as file:
                for i in range(3):
                    chain.append("event", {"i": i}, f"id-{i}")
                    file.write(b"x")  # what its caller knows to be on disk

        is_done = killed_at(point, half, work)
        acknowledged = told.stat().st_size if told.exists() else 0
        if path.exists() or head_path(path).exists():
            report = verify_chain(path, public(used))
            assert not report.problems, (point, report)
            assert acknowledged <= report.records <= acknowledged + 1, (point, report)
            kinds |= {word for note in report.notes for word in ("torn", "not acknowledged") if word in note}
        else:
            assert acknowledged == 0
        chain = AuditChain(path, used)
        for i in range(3):
            chain.append("event", {"i": i}, f"id-{i}")
        report = verify_chain(path, public(used))
        assert not report.problems and not report.notes and report.records == 3, (point, report)
        if is_done:
            break
    # opens, writes, syncs and renames of three lines and four heads
    assert point > 20 and "not acknowledged" in kinds and ("torn" in kinds) == half


def test_a_torn_line_is_told_from_a_cut_one(tmp_path: Path) -> None:
    path = make_chain(tmp_path, 2)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"body":')
    report = verify_chain(path)
    assert not report.problems and report.notes == [
        "line 3: torn, never acknowledged: the process ended while writing it"
    ]
    AuditChain(path).append("event", {"i": 0, "values": [0.5, None, "ü"]}, "id-0")  # nothing new, and it is cut off
    assert path.read_bytes() == whole and not verify_chain(path).notes


# --- salts and keys ----------------------------------------------------------------------------------------------------


def test_digests_of_ids(tmp_path: Path, key: Path) -> None:
    salt, file = new_salt(), tmp_path / "deep" / "salt.key"
    expected = hashlib.blake2b(b"int:7", digest_size=16, key=salt).hexdigest()
    assert salted_digest(salt, 7) == expected != salted_digest(salt, "7") and salted_digest(new_salt(), 7) != expected
    with pytest.raises(LmcError, match="16 to 64 bytes"):
        salted_digest(b"short", 7)
    synced: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "fsync_path", synced.append)
        write_salt(file, salt)
    assert synced == [file.parent]
    assert read_salt(file) == salt == salt_at(file) and stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(LmcError, match="never replaced"):
        write_salt(file, new_salt())
    assert len({salt_at(tmp_path / "new.key") for _ in range(2)}) == 1 and not list(tmp_path.glob("*.part"))
    file.write_text("nonsense")
    with pytest.raises(LmcError, match="cannot be read"):
        salt_at(file)
    with pytest.raises(LmcError, match="is missing"):
        read_salt(tmp_path / "nowhere")
    with pytest.raises(LmcError, match="never replaced"):
        keygen(key)
    for bad in (tmp_path / "nowhere", file, public(key)):
        with pytest.raises(LmcError, match="key"):
            AuditChain(tmp_path / "chain.jsonl", bad)
    with pytest.raises(LmcError, match="no public key in PEM form"):
        verify_chain(make_chain(tmp_path), key)


def test_the_draw_is_by_the_seed_and_reaches_every_step() -> None:
    norms = [None, [[3, 1.0], [4, 1.5], [5, 2.0]], [[7, 1.0]], []]
    drawn = {draw(norms, seed) for seed in range(200)}
    assert drawn == {(1, 4), (1, 5), (2, 7)} and draw(norms, 5) == draw(norms, 5) and draw([None, []], 0) is None


# --- runs --------------------------------------------------------------------------------------------------------------


def lmc(name: str, *argv: str) -> tuple[str, int]:
    """(what a command prints, its exit status), on every rank."""
    from lmc_dist.cli import COMMANDS, parse

    try:
        done = COMMANDS[name].work(parse(name, list(argv)), this_runtime())
    except LmcError as error:
        return f"error: {error}", 2
    return done if isinstance(done, tuple) else (done, 0)


def lmc_all(calls: list[list[str]]) -> list[tuple[str, int]]:
    """Several commands, one after the other."""
    return [lmc(*call) for call in calls]


class Runs:
    """Logs of one optimizer each, and runs on them."""

    def __init__(self, ranks: Any, folder: Path) -> None:
        self.ranks, self.folder = ranks, folder
        self.configs: dict[str, str] = {}
        for name, train in (("sgd", {}), ("adamw", {"optimizer": "adamw", "learning_rate": 3e-3})):
            settings = engine_config(folder / name, "zero3", "update", epochs=2, **train)
            ranks(2).run(train_job, settings)
            path = folder / name / "config.json"
            path.write_text(json.dumps(asdict(settings)))
            self.configs[name] = str(path)

    def unlearn(self, name: str, output: Path, *more: str, ranks: int = 2, forget: list[str] = FORGET) -> None:
        argv = ["--config", self.configs[name], "--output_dir", str(output), "--progress", "none", *forget, *more]
        for text, status in self.ranks(ranks).run(lmc, "unlearn", *argv):
            assert status == 0, text

    def verify(self, calls: list[list[str]], ranks: int = 1) -> list[tuple[str, int]]:
        found = self.ranks(ranks).run(lmc_all, [["audit verify", *call] for call in calls])
        assert all(texts == found[0] for texts in found)
        return found[0]

    def again(self, name: str, output: Path, seed: int) -> list[str]:
        """Options by which a step of a run is taken again."""
        return [str(output), "--config", self.configs[name], "--progress", "none", *FORGET, "--audit.seed", str(seed)]


@pytest.fixture(scope="module")
def runs(ranks: Any, tmp_path_factory: Any) -> Runs:
    return Runs(ranks, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def joint(runs: Runs, key: Path) -> Path:
    """A signed joint run on two ranks that kept its marks."""
    output = runs.folder / "joint"
    runs.unlearn(
        "sgd", output, "--unlearn.mark_every", "3", "--audit.keep_marks", "true", "--audit.signing_key", str(key)
    )
    return output


def last_record(output: Path) -> dict[str, Any]:
    return AuditChain(output / "audit" / "chain.jsonl").records()[-1]


def forge(output: Path, change: Callable[[dict[str, Any], list[Any]], None]) -> None:
    """What somebody without the key can do: change figures wherever they stand, and write digests and chain anew."""
    folder = output / "audit"
    body, norms = last_record(output)["body"], json.loads((folder / "norms.json").read_text())
    change(body, norms)
    (folder / "norms.json").write_text(json.dumps(norms))
    (folder / "audit_records.json").write_text(json.dumps(body["units"]))
    result = json.loads((output / "result.json").read_text())
    (output / "result.json").write_text(json.dumps({**result, "v_norm": body["figures"]["v_norm"]}))
    body["files"] = part_digests(output)
    for path in (folder / "chain.jsonl", head_path(folder / "chain.jsonl")):
        path.unlink()
    AuditChain(folder / "chain.jsonl").append("unlearn", body)


def test_a_run_leaves_a_record_without_ids(runs: Runs, joint: Path, key: Path) -> None:
    record, result = last_record(joint), json.loads((joint / "result.json").read_text())
    body, salt = record["body"], read_salt(joint / "audit" / "salt.key")
    assert record["event"] == "unlearn" and "signature" in record
    assert body["request"]["ids"] == sorted(salted_digest(salt, i) for i in FORGOTTEN)
    assert (
        body["config"]["forget"]["samples"]
        == result["config"]["forget"]["samples"]
        == "salted:" + body["request"]["digest"]
    )
    assert body["log"]["fingerprint"] == result["log_fingerprint"] and body["figures"]["v_norm"] == result["v_norm"]
    told = json.loads((joint / "audit" / "audit_records.json").read_text())
    assert body["units"] == told and "norms" not in told[0] and body["privacy"] is None
    assert set(body["files"]) == {
        "model",
        "correction",
        "result.json",
        "audit/audit_records.json",
        "audit/norms.json",
        "audit/marks",
    }
    (norms,) = json.loads((joint / "audit" / "norms.json").read_text())
    assert [step for step, _ in norms] == list(range(told[0]["tz"], told[0]["tau"]))
    assert norms[0][1] == told[0]["v0_norm"] and norms[-1][1] == told[0]["v_norm"]
    for path in joint.rglob("*.json*"):  # neither the list as it was given nor one of its ids by itself
        text = path.read_text()
        assert FORGET[1] not in text and not any(f'"sample-{i}"' in text for i in FORGOTTEN), path

    text, status = runs.ranks(1).run(lmc, "audit show", str(joint), "--public_key", f"{key}.pub")[0]
    assert status == 0 and "4 samples" in text and record["digest"][:16] in text, text
    calls = [[str(joint)], [str(joint), "--public_key", f"{key}.pub", "--known", record["digest"]]]
    for text, status in [*runs.verify(calls), *runs.verify(calls, ranks=2)]:
        assert status == 0 and "is as it was written" in text, text


def test_any_change_of_an_output_is_found(runs: Runs, joint: Path, tmp_path: Path) -> None:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    changes: dict[str, Callable[[Path], Any]] = {
        "model is not what": lambda out: flip(out / "model" / "model.safetensors"),
        "correction is not what": lambda out: flip(out / "correction" / "rank-00001-of-00002.safetensors"),
        "model is not": lambda out: (out / "model" / "more.txt").write_text("x"),
        "result.json is not": lambda out: flip(out / "result.json"),
        "audit/audit_records.json is not": lambda out: flip(out / "audit" / "audit_records.json"),
        "audit/norms.json is missing": lambda out: (out / "audit" / "norms.json").unlink(),
        "audit/marks is not": lambda out: shutil.rmtree(out / "audit" / "marks" / "mark-3"),
        "chain.head.json: missing": lambda out: (out / "audit" / "chain.head.json").unlink(),
    }
    calls = []
    for i, change in enumerate(changes.values()):
        shutil.copytree(joint, tmp_path / str(i))
        change(tmp_path / str(i))
        calls.append([str(tmp_path / str(i))])
    (tmp_path / "none").mkdir()
    *found, missing = runs.verify([*calls, [str(tmp_path / "none")]])
    for said, (text, status) in zip(changes, found, strict=True):
        assert status == 1 and said in text, text
    assert missing[1] == 2 and "holds no audit" in missing[0]


def test_a_step_that_is_taken_again_has_the_recorded_norms(runs: Runs, joint: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    runs.unlearn("sgd", plain)  # without marks
    for ranks, most in ((2, 0.0), (1, 1e-6)):  # the same bits on the same ranks
        for output, begin in ((joint, {0, 3, 6}), (plain, {0})):
            calls = [[*runs.again("sgd", output, seed), "--json", str(tmp_path / f"{seed}.json")] for seed in range(3)]
            for text, status in runs.verify(calls, ranks):
                assert status == 0 and "was taken again" in text, text
            for seed in range(3):
                found = json.loads((tmp_path / f"{seed}.json").read_text())
                step = found["step"]
                assert found["ok"] and step["difference"] <= most and step["compared"] >= 1, found
                assert step["begun"] in begin and step["begun"] <= step["step"], found


def test_altered_norms_are_found_by_the_log(runs: Runs, joint: Path, tmp_path: Path) -> None:
    """Forgeries that are consistent in themselves: chain and digests are whole, and the log tells."""

    def along_the_way(body: dict[str, Any], norms: list[Any]) -> None:
        norms[0] = [[s, n if s in (norms[0][0][0], norms[0][-1][0]) else 1.01 * n] for s, n in norms[0]]

    def at_the_end(body: dict[str, Any], norms: list[Any]) -> None:
        norms[0][-1][1] *= 0.5
        body["units"][0]["v_norm"] = body["figures"]["v_norm"] = body["correction_norm"] = norms[0][-1][1]

    outputs = {}
    for name, change in (("way", along_the_way), ("end", at_the_end)):
        outputs[name] = tmp_path / name
        shutil.copytree(joint, outputs[name])
        forge(outputs[name], change)
    unmarked = tmp_path / "unmarked"
    shutil.copytree(outputs["way"], unmarked)
    shutil.rmtree(unmarked / "audit" / "marks")
    forge(unmarked, lambda body, norms: None)
    swapped = tmp_path / "swapped"  # a consistent record of a model that is not θ + v
    shutil.copytree(joint, swapped)
    content = bytearray((swapped / "model" / "model.safetensors").read_bytes())
    content[-1] ^= 0x40
    (swapped / "model" / "model.safetensors").write_bytes(content)
    forge(swapped, lambda body, norms: None)

    found = runs.verify([[str(folder)] for folder in (outputs["way"], unmarked, swapped, outputs["end"])])
    assert [status for _, status in found] == [0, 0, 0, 1] and "the stored correction has norm" in found[3][0], found
    drawn = [draw(json.loads((outputs["way"] / "audit" / "norms.json").read_text()), seed) for seed in range(9)]
    seeds = [seed for seed, pair in enumerate(drawn) if pair is not None and pair[1] < 7][:3]
    calls = [runs.again("sgd", folder, seed) for folder in (outputs["way"], unmarked) for seed in seeds]
    for text, status in runs.verify([*calls, runs.again("sgd", swapped, 0)]):
        assert status == 1, text
        assert "model/ is not the end of the log plus correction/" in text or "recorded 0." in text, text
    # the public key needs no log
    text, status = runs.verify([[str(outputs["way"]), "--public_key", str(public(runs.folder / "nowhere"))]])[0]
    assert status == 2 and "cannot be read" in text


def test_the_request_and_the_log_must_be_the_runs(runs: Runs, joint: Path, tmp_path: Path) -> None:
    other = [str(joint), "--config", runs.configs["sgd"], "--progress", "none", "--forget.samples", "3,101,204"]
    without = tmp_path / "without"
    shutil.copytree(joint, without)
    (without / "audit" / "salt.key").unlink()
    calls = [other, runs.again("adamw", joint, 0), runs.again("sgd", without, 0), [str(without)]]
    said = ["forgot something else", "on another log", "salt.key is missing", "is as it was written"]
    for (text, status), part in zip(runs.verify(calls, ranks=2), said, strict=True):
        assert part in text and status == (0 if part == said[-1] else 2), text
    assert not joint.with_name("joint.verify").exists()


def test_all_ways_to_carry_v_can_be_taken_again(runs: Runs, tmp_path: Path) -> None:
    """Windows of K steps, units, a replayed head, AdamW, other curvatures; exact replay has no step to take."""
    ways: dict[str, tuple[str, list[str]]] = {
        "K": ("sgd", ["--unlearn.K", "2"]),
        "units": ("sgd", ["--unlearn.units", "sample", "--unlearn.K", "2", "--unlearn.block", "2"]),
        "head": ("sgd", ["--unlearn.replay_head", "2"]),
        "secant": ("sgd", ["--unlearn.hessian_mode", "secant", "--unlearn.K", "3"]),
        "diag": ("sgd", ["--unlearn.hessian_mode", "diag", "--unlearn.probes", "2"]),
        "adamw": ("adamw", ["--unlearn.mark_every", "2", "--audit.keep_marks", "true"]),
        "adamw K": ("adamw", ["--unlearn.K", "1", "--unlearn.mark_every", "2", "--audit.keep_marks", "true"]),
        "replay": ("sgd", ["--unlearn.replay_head", "all"]),
    }
    for way, (log, more) in ways.items():
        runs.unlearn(log, tmp_path / way, *more)
        if way == "units":
            salt = read_salt(tmp_path / way / "audit" / "salt.key")
            named = {f"unit-{salted_digest(salt, f'sample-{i}')}" for i in FORGOTTEN}
            result = json.loads((tmp_path / way / "result.json").read_text())
            assert set(result["units"]["included"]) == named
            assert {row["unit"] for row in last_record(tmp_path / way)["body"]["units"]} == named
    for seed, ranks in enumerate((2, 1)):
        calls = [runs.again(log, tmp_path / way, seed) for way, (log, _) in ways.items()]
        for call, (text, status) in zip(calls, runs.verify(calls, ranks), strict=True):
            assert status == 0, (call, text)
            assert ("carries no vector" if call[0].endswith("replay") else "was taken again") in text, text


def test_a_chain_goes_on_with_its_output(runs: Runs, key: Path, tmp_path: Path) -> None:
    """Units taken out, and a run that replaces another, are further records of the same chain."""
    output, signed = tmp_path / "out", ["--audit.signing_key", str(key)]
    runs.unlearn("sgd", output, "--unlearn.units", "sample", "--unlearn.store_units", "true", *signed, ranks=1)
    first = last_record(output)["digest"]
    runs.unlearn("sgd", output, "--undo", "sample-3", *signed, ranks=1, forget=[])
    assert [row["event"] for row in AuditChain(output / "audit" / "chain.jsonl").records()] == ["unlearn", "recombine"]
    salt = read_salt(output / "audit" / "salt.key")
    assert last_record(output)["body"]["undone"] == [f"unit-{salted_digest(salt, 'sample-3')}"]
    ((text, status),) = runs.verify([[*runs.again("sgd", output, 0), "--public_key", f"{key}.pub", "--known", first]])
    assert status == 0 and "was taken again" in text, text
    argv = [
        "--config",
        runs.configs["sgd"],
        "--output_dir",
        str(output),
        "--progress",
        "none",
        "--overwrite",
        "true",
        *FORGET,
    ]
    ((text, status),) = runs.ranks(1).run(lmc, "unlearn", *argv)
    assert status == 2 and "it is signed: give audit.signing_key" in text, text
    runs.unlearn("sgd", output, "--overwrite", "true", *signed, ranks=1)
    records = AuditChain(output / "audit" / "chain.jsonl").records()
    assert [row["event"] for row in records] == ["unlearn", "recombine", "unlearn"] and records[0]["digest"] == first
    assert len({row["body"]["request"]["digest"] for row in records}) == 1  # one salt
    head_path(output / "audit" / "chain.jsonl").unlink()
    ((text, status),) = runs.ranks(1).run(lmc, "unlearn", *argv, *signed)
    assert status == 2 and "does not verify and cannot go on" in text, text


def test_a_report_groups_runs_whose_ids_are_digests() -> None:
    """By the digests under one salt, else by what is said of the requests; seeds never count."""

    def run(name: str, seed: int, digest: str, salt: str, samples: int = 4) -> Run:
        forget = {"samples": f"salted:{digest}", "split": None, "batches": None}
        request = {"what": f"{samples} samples", "samples": samples, "counterfactual": "renormalize", "salt": salt}
        config = {"forget": forget, "train": {"seed": seed}, "audit": {"salt": name}}
        return Run(name, name, {"config": config, "request": request, "log_fingerprint": f"log-{seed}"}, [], {}, [])

    def grouped(*runs: Run) -> list[list[str]]:
        return [[run.name for run in group.runs] for group in group_runs(runs)]

    assert grouped(run("a", 0, "1", "s"), run("b", 1, "1", "s"), run("c", 2, "2", "s")) == [["a", "b"], ["c"]]
    assert grouped(run("a", 0, "1", "s"), run("b", 1, "2", "t"), run("c", 2, "3", "u", 5)) == [["a", "b"], ["c"]]


def test_the_commands_of_the_page_run(runs: Runs, tmp_path: Path) -> None:
    """Those of docs/audit.md in their order, with a small log and its settings in place of the demo's."""
    from test_docs import blocks, read_command

    page = REPO / "docs" / "audit.md"
    found = [read_command(command) for _, typed in blocks(page) for command in typed]
    assert [command[0] for command in found if command] == [
        "audit keygen",
        "unlearn",
        "audit show",
        "audit verify",
        "audit verify",
    ]
    own = {
        "configs/demo.yaml": runs.configs["sgd"],
        "runs/log": json.loads(Path(runs.configs["sgd"]).read_text())["log_dir"],
    }
    for name, options in (command for command in found if command):
        if "--model.path" in options:  # this log's model is built from its settings
            at = options.index("--model.path")
            del options[at : at + 2]
        argv = [own.get(o, str(tmp_path / o) if o.startswith(("runs/", "keys/")) else o) for o in options]
        ((text, status),) = runs.ranks(1).run(lmc, name, *argv)
        assert status == 0, text
    assert "was taken again" in text


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--audit.signing_key", "nowhere.pem"], "key nowhere.pem cannot be read"),
        (["--audit.salt", "setup.py"], "the salt setup.py cannot be read"),
        (["--audit.keep_marks", "true", "--unlearn.replay_head", "2"], "audit.keep_marks keeps the marks of a joint"),
        (["--audit.keep_marks", "true", "--unlearn.mark_every", "null"], "audit.keep_marks keeps the marks of a joint"),
    ],
)
def test_settings_that_cannot_be_are_refused_first(runs: Runs, tmp_path: Path, more: list[str], said: str) -> None:
    argv = ["--config", runs.configs["sgd"], "--output_dir", str(tmp_path / "out"), *FORGET, *more]
    for text, status in runs.ranks(2).run(lmc, "unlearn", *argv):
        assert status == 2 and said in text, text
    assert not (tmp_path / "out").exists()


def test_a_shared_salt_and_keys_by_command(runs: Runs, tmp_path: Path) -> None:
    salt, made = tmp_path / "secret" / "salt.key", tmp_path / "keys" / "audit"
    ((text, status),) = runs.ranks(1).run(lmc, "audit keygen", str(made))
    assert status == 0 and f"public key in {made}.pub" in text and stat.S_IMODE(made.stat().st_mode) == 0o600
    salt.parent.mkdir()
    digests = []
    for name in ("one", "two"):
        runs.unlearn("sgd", tmp_path / name, "--audit.salt", str(salt), "--audit.signing_key", str(made), ranks=1)
        digests.append(last_record(tmp_path / name)["body"]["request"]["digest"])
        assert not (tmp_path / name / "audit" / "salt.key").exists()
    assert digests[0] == digests[1] and AuditConfig().salt is None
    ((text, status),) = runs.verify([[*runs.again("sgd", tmp_path / "two", 1), "--public_key", f"{made}.pub"]])
    assert status == 0, text
