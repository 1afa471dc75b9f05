"""What is written is read back to the bit: files, rows, updates, checksums, and whole logs between ranks and engines."""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import token_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engines import build, odd_model
from test_fd_engines import reference_model, zero3_engine

from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement
from lmc_dist.shards.checksum import checksum, format_checksum, local_checksum
from lmc_dist.shards.engines import engine_shards
from lmc_dist.shards.layout import ParamSpec, ShardLayout, group_rank
from lmc_dist.shards.relayout import relayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory import writer as writer_module
from lmc_dist.trajectory.codec import COMPRESSIONS
from lmc_dist.trajectory.difference import RoundedUpdates, difference, exact_update
from lmc_dist.trajectory.files import write_shard_file
from lmc_dist.trajectory.prefetch import Prefetch
from lmc_dist.trajectory.reader import ShardReader, apply_fixes
from lmc_dist.trajectory.record import MicroRecord, StepRecord, TrajectoryManifest
from lmc_dist.trajectory.store import TrajectoryLog
from lmc_dist.trajectory.table import StepTable, decode_row, encode_row, read_rows
from lmc_dist.trajectory.writer import LogWriter, gather_reports

RULES: tuple[Any, Any] = ("zero3", "fsdp2")
many = settings(max_examples=40, deadline=None)

# Mostly small, with scalars, fewer rows than ranks, and first dimensions beyond a block of the checksum.
shapes = st.lists(st.integers(1, 7), max_size=3).map(tuple) | st.sampled_from([(2049,), (5000, 1), (70, 31), (4096,)])
tables = st.lists(shapes, min_size=1, max_size=6).map(
    lambda found: [ParamSpec(f"p{i}", shape) for i, shape in enumerate(found)]
)
rules, sizes, seeds = st.sampled_from(RULES), st.integers(1, 5), st.integers(0, 2**32 - 1)

SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1.17e-38, 3.4e38, -3.4e38, 1.0, -1.0, 1 + 2**-23, 1e-30, 2.0**24, 16777217.0]


def layouts(specs: list[ParamSpec], world_size: int, rule: Any) -> Iterator[ShardLayout]:
    return (ShardLayout(specs, rank, world_size, rule) for rank in range(world_size))


def awkward(specs: list[ParamSpec], seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Whole tensors of random finite bit patterns, ordinary numbers and the edges of the format."""
    draw = np.random.default_rng(seed)
    found = {}
    for spec in specs:
        n = spec.numel
        patterns = draw.integers(0, 2**32, n, dtype=np.uint32).view(np.float32)
        patterns = np.where(np.isfinite(patterns), patterns, np.float32(0))
        ordinary = (draw.standard_normal(n) * 10.0 ** draw.integers(-8, 4, n)).astype(np.float32)
        special = draw.choice(np.array(SPECIAL, dtype=np.float32), n)
        kind = draw.integers(0, 3, n)
        values = torch.from_numpy(np.where(kind == 0, patterns, np.where(kind == 1, ordinary, special)))
        values = values.to(dtype)
        found[spec.name] = torch.where(torch.isfinite(values), values, 1).view(spec.shape)
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


# --- files -----------------------------------------------------------------------------------------------------------


@many
@given(
    tables, sizes, sizes, rules, rules, seeds, st.sampled_from(COMPRESSIONS), st.sampled_from(["", "update", "theta"])
)
def test_shard_files_are_read_at_any_world_size(
    specs: Any, writers: int, readers: int, rule: Any, own: Any, seed: int, compression: Any, kind: str
) -> None:
    dtype = [torch.float32, torch.bfloat16, torch.float64, torch.float16][seed % 4]
    whole = awkward(specs, seed, dtype)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "steps" / "step"
        digests = []
        for layout in layouts(specs, writers, rule):
            tensors = dict(ShardedVector.from_full(layout, whole.__getitem__).items())
            digests.append(write_shard_file(folder, layout, tensors, {"step": "0"}, kind, compression))
        assert not list(folder.glob("*.part"))
        for layout in layouts(specs, readers, own):
            reader = ShardReader(folder, layout, rule, "test", kind)
            found, expected = reader.read(dtype), ShardedVector.from_full(layout, whole.__getitem__)
            assert torch.equal(bits(found.flat), bits(expected.flat))
            assert [reader.header_digest(rank) for rank in range(writers)] == digests
            assert not any(reader.damaged_tensors(rank) for rank in range(writers))


@many
@given(tables, sizes, sizes, rules, seeds, st.sampled_from(COMPRESSIONS))
def test_updates_and_fixes_give_the_weights_to_the_bit(
    specs: Any, writers: int, readers: int, rule: Any, seed: int, compression: Any
) -> None:
    before, after = awkward(specs, seed), awkward(specs, seed + 1)
    with tempfile.TemporaryDirectory() as name:
        for layout in layouts(specs, writers, rule):
            old, new = (ShardedVector.from_full(layout, whole.__getitem__) for whole in (before, after))
            write_shard_file(Path(name), layout, exact_update(old, new), {}, "update", compression)
        for layout in layouts(specs, readers, "zero3"):
            reader = ShardReader(Path(name), layout, rule, "test", "update")
            theta = ShardedVector.from_full(layout, before.__getitem__)
            theta.add_(reader.read(torch.float32))
            apply_fixes(theta, reader.fixes())
            assert torch.equal(bits(theta.flat), bits(ShardedVector.from_full(layout, after.__getitem__).flat))


# --- updates ---------------------------------------------------------------------------------------------------------


@many
@given(tables, sizes, rules, seeds)
def test_difference_is_what_it_says(specs: Any, world_size: int, rule: Any, seed: int) -> None:
    before, after = awkward(specs, seed), awkward(specs, seed + 1)
    for layout in layouts(specs, world_size, rule):
        old, new = (ShardedVector.from_full(layout, whole.__getitem__) for whole in (before, after))
        found = difference(old, new)
        assert found.checksum == local_checksum(new).tolist()
        u = found.update.flat if found.update is not None else torch.empty(0)
        assert torch.isfinite(u).all()
        assert found.square == pytest.approx(float(u.double().square().sum()), rel=1e-6)
        wrong = np.flatnonzero(bits(old.flat + u).numpy() != bits(new.flat).numpy())
        assert found.inexact is not None and found.inexact.tolist() == wrong.tolist()
        bare = difference(old, new, keep=False)
        assert (bare.square, bare.checksum, bare.update) == (found.square, found.checksum, None)


def test_weights_that_are_not_finite_are_refused() -> None:
    layout = ShardLayout([ParamSpec("p", (5,))])
    old = ShardedVector.zeros(layout)
    for bad in (float("nan"), float("inf"), -float("inf")):
        new = old.clone()
        new.flat[3] = bad
        for refused in (lambda new=new: exact_update(old, new), lambda new=new: difference(old, new, keep=False)):
            with pytest.raises(LmcError, match="weights hold NaN or infinity"):
                refused()
        with pytest.raises(LmcError, match=r"not finite in torch\.bfloat16"):
            RoundedUpdates(old, torch.bfloat16).round(new)


@many
@given(tables, seeds, st.floats(1e-6, 1e2))
def test_rounding_of_updates_never_adds_up(specs: Any, seed: int, rate: float) -> None:
    """After any number of steps θ is off by the rounding of the last stored update, elementwise."""
    layout, draw = ShardLayout(specs), torch.Generator().manual_seed(seed)
    theta = ShardedVector(layout, torch.randn(layout.flat_numel, generator=draw))
    rounded, followed = RoundedUpdates(theta, torch.bfloat16), theta.clone()
    for step in range(12):
        theta = theta + theta.like(torch.randn(layout.flat_numel, generator=draw) * rate)
        wanted = theta.flat - followed.flat
        if step == 7:
            found = theta.like(torch.empty_like(theta.flat))
            tensors = rounded.meet(theta)
            followed.flat.copy_(theta.flat)
            assert {name for name in tensors if "#" not in name} == set(layout.slots)
        else:
            found = rounded.round(theta)
            followed.add_(found.to(torch.float32))
            allowed = 2**-8 * wanted.abs() + 2**-22 * torch.maximum(theta.flat.abs(), followed.flat.abs())
            assert bool(((followed.flat - theta.flat).abs() <= allowed).all())
        assert torch.equal(bits(rounded.followed.flat), bits(followed.flat))
        assert rounded.checksum() == local_checksum(followed).tolist()


# --- checksums -------------------------------------------------------------------------------------------------------


def whole_checksum(specs: list[ParamSpec], world_size: int, rule: Any, whole: dict[str, torch.Tensor]) -> str:
    vectors = [ShardedVector.from_full(layout, whole.__getitem__) for layout in layouts(specs, world_size, rule)]
    return format_checksum(torch.stack([local_checksum(vector) for vector in vectors]).sum(0))


@many
@given(tables, seeds, st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]), st.data())
def test_checksum_is_that_of_the_definition_and_sees_every_bit(
    specs: Any, seed: int, dtype: torch.dtype, data: Any
) -> None:
    whole = awkward(specs, seed, dtype)
    flat = bits(torch.cat([whole[spec.name].reshape(-1) for spec in specs])).tolist()
    defined = [sum(flat) % 2**64, sum(i * x for i, x in enumerate(flat)) % 2**64]
    expected = "".join(f"{part:016x}" for part in defined)
    assert {whole_checksum(specs, w, rule, whole) for w in range(1, 6) for rule in RULES} == {expected}
    name = data.draw(st.sampled_from([spec.name for spec in specs]))
    element = data.draw(st.integers(0, whole[name].numel() - 1))
    bit = data.draw(st.integers(0, 8 * dtype.itemsize - 1))
    raw = bits(whole[name].reshape(-1)).numpy()
    raw[element] ^= np.array(1 << bit, dtype=np.uint64).astype(raw.dtype)
    damaged = {**whole, name: torch.from_numpy(raw).view(dtype).view(whole[name].shape)}
    assert whole_checksum(specs, 1 + seed % 5, RULES[seed % 2], damaged) != expected


def test_padding_never_enters_a_checksum() -> None:
    specs = [ParamSpec("a", (5,)), ParamSpec("b", (2, 3)), ParamSpec("c", (4097,))]
    for rule in RULES:
        for layout in layouts(specs, 4, rule):
            vector = ShardedVector.zeros(layout)
            for tensor in (tensor for _, tensor in vector.items()):
                tensor.copy_(torch.randn(tensor.shape))
            filled = vector.clone()
            for slot in layout:
                filled.flat[slot.offset + slot.local_numel : slot.offset + slot.padded] = -0.0
            assert torch.equal(local_checksum(filled), local_checksum(vector))


# --- rows ------------------------------------------------------------------------------------------------------------

reals = st.floats(allow_nan=False, allow_infinity=False)
ids = st.integers(0, 2**63 - 1)
hexes = st.text("0123456789abcdef", min_size=32, max_size=32)


@st.composite
def records(draw: Any, step: int) -> StepRecord:
    length = draw(st.integers(1, 40))
    micros = [
        MicroRecord(
            rank=draw(st.integers(0, 7)),
            micro_step=draw(st.integers(0, 3)),
            sample_ids=tuple(draw(st.lists(ids, max_size=4))),
            denominator=draw(reals),
            random_state=draw(st.none() | st.binary(min_size=length, max_size=length)),
            digest=draw(st.none() | hexes),
        )
        for _ in range(draw(st.integers(0, 4)))
    ]
    return StepRecord(
        step=step,
        batch_id=draw(ids),
        micro_batches=tuple(micros),
        lr=tuple(draw(st.lists(reals, min_size=1, max_size=3))),
        denominator=draw(reals),
        epoch=draw(reals),
        loss=draw(st.none() | reals | st.just(float("inf"))),
        grad_norm=draw(st.none() | reals),
        clip_coef=draw(reals),
        applied=draw(st.booleans()),
        u_norm=draw(st.none() | reals),
        checksum=draw(hexes),
        log_checksum=draw(st.none() | hexes),
    )


digests_of = st.none() | st.dictionaries(
    st.sampled_from(["update", "gradient", "theta"]), st.lists(hexes, min_size=1, max_size=4), min_size=1
)


@many
@given(st.tuples(records(0), records(1), records(2)), st.lists(digests_of, min_size=3, max_size=3))
def test_rows_give_back_every_record(found: Any, digests: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        table = StepTable(Path(name))
        table.insert(zip(found[:1], digests[:1], strict=True))
        table.insert(zip(found[1:], digests[1:], strict=True))
        table.close()
        rows = read_rows(Path(name) / "steps.sqlite")
    assert tuple(decode_row(row) for row in rows) == found
    column = sorted(set(rows[1]) - {"tensors", "digest"})[found[1].batch_id % (len(rows[1]) - 2)]
    with pytest.raises(LmcError, match="does not have its digest"):
        decode_row({**rows[1], column: "other"})


def test_a_loss_that_is_nan_becomes_unknown() -> None:
    record = StepRecord(0, 0, (), (0.1,), 1.0, loss=float("nan"), checksum="0" * 32)
    assert decode_row(encode_row(record, None)).loss is None


# --- the writer's thread ---------------------------------------------------------------------------------------------

ODD = [ParamSpec(name, tuple(p.shape)) for name, p in odd_model().named_parameters()]


def manifest(rule: Any, world_size: int, **more: Any) -> TrajectoryManifest:
    rows = [
        {"name": spec.name, "shape": list(spec.shape), "dtype": "float32", "tied_to": [], "group": 0} for spec in ODD
    ]
    settings: dict[str, Any] = {"storage": "update", "save_interval": 3, "max_steps": None} | more
    return TrajectoryManifest(
        model_config={},
        model_fingerprint="0" * 32,
        parameters=rows,
        optimizer={"class": "SGD", "groups": [{"lr": 0.1}]},
        loss_normalization="given",
        max_grad_norm=0.0,
        dataset_fingerprint=None,
        world_size=world_size,
        engine="test",
        partition=rule,
        **settings,
    )


def weights(step: int) -> dict[str, torch.Tensor]:
    """θ_step, the same at every world size."""
    draw = torch.Generator().manual_seed(100)
    found = {spec.name: torch.randn(spec.shape, generator=draw) for spec in ODD}
    for _ in range(step):
        found = {name: t + 1e-2 * torch.randn(t.shape, generator=draw) for name, t in found.items()}
    return found


NUM_STEPS = 4


def write_log(folder: str, rule: Any, **more: Any) -> None:
    """A log of four steps as the engines' logger would write it, of which step 2 changes nothing."""
    rank, world_size = group_rank(None)
    layout = ShardLayout(ODD, rank, world_size, rule)
    before = ShardedVector.from_full(layout, weights(0).__getitem__)
    writer = LogWriter(folder, manifest(rule, world_size, **more), layout, 1 << 20, before)
    writer.snapshot(0, {"theta": before}, {})
    writer.finish()
    for step in range(NUM_STEPS):
        applied = step != 2
        after = ShardedVector.from_full(layout, weights(step + 1 - (step >= 2)).__getitem__)
        writer.store(step, before, after, before * 2.0 if "gradient" in writer.kinds else None, applied)
        reports = gather_reports(writer.report(), layout)
        record = StepRecord(step, step, (), (0.1,), 1.0, applied=applied)
        with agreement():
            if rank == 0:
                writer.commit(record, reports)
        before = after
        if step == 2:
            writer.snapshot(3, {"theta": before}, {})
    writer.finish()
    writer.close()


def test_steps_that_wait_are_synced_together_and_none_is_lost(tmp_path: Path, monkeypatch: Any) -> None:
    """A slow disk: memory stays within the bound, syncs and rows are shared, every step is reported once."""
    layout = ShardLayout([ParamSpec("p", (1000,))])
    size, together, held, publish = 4000, [], [], writer_module.publish_files

    def slow(files: Any) -> None:
        time.sleep(0.05)
        staged = list(files)
        together.append(len(staged))
        publish(staged)

    monkeypatch.setattr(writer_module, "publish_files", slow)
    theta = ShardedVector(layout, torch.randn(1000))
    bare = manifest("zero3", 1)
    bare.parameters[:] = [{"name": "p", "shape": [1000], "dtype": "float32", "tied_to": [], "group": 0}]
    writer = LogWriter(tmp_path, bare, layout, 5 * size, theta)
    thetas = [theta]
    for step in range(30):
        thetas.append(thetas[-1] + theta * 1e-3)
        writer.store(step, thetas[-2], thetas[-1], None, True)
        held.append(writer._background._held)
        writer.commit(StepRecord(step, step, (), (0.1,), 1.0), [writer.report()])
    writer.drain()
    writer.close()
    assert max(held) <= 5 * size and sum(together) == 30 and 1 < max(together) <= 8 and len(together) < 25
    rows = [decode_row(row) for row in read_rows(tmp_path / "steps.sqlite")]
    assert [row.checksum for row in rows] == [checksum(theta) for theta in thetas[1:]]
    for row, (old, new) in zip(rows, pairwise(thetas), strict=True):
        assert row.u_norm == pytest.approx((new - old).norm(), rel=1e-6)


def broken_writer_job(folder: str) -> tuple[str, int]:
    """Rank 1's disk fails at step 1; (what every rank is told at the next step, rows on disk)."""
    rank, world_size = group_rank(None)
    layout = ShardLayout(ODD, rank, world_size)
    theta = ShardedVector.from_full(layout, weights(0).__getitem__)
    writer = LogWriter(folder, manifest("zero3", world_size), layout, 1 << 20, theta)
    if rank == 1:
        file = Path(folder) / "steps" / "step-00000001"
        file.write_text("in the way")
    with agreement():
        pass
    message = ""
    for step in range(3):
        failed = torch.tensor([int(writer.failed)])
        dist.all_reduce(failed)
        if failed:
            with pytest.raises(LmcError) as caught:
                writer.raise_error()
            message = str(caught.value)
            break
        writer.store(step, theta, theta * 1.5, None, True)
        writer._background.drain()
        reports = gather_reports(writer.report(), layout)
        if rank == 0:
            writer.commit(StepRecord(step, step, (), (0.1,), 1.0), reports)
            writer._background.drain()
        dist.barrier()
    writer.close()
    return message, len(read_rows(Path(folder) / "steps.sqlite"))


def test_one_ranks_disk_error_stops_all_ranks_with_its_cause(ranks: Any, tmp_path: Path) -> None:
    found = ranks(2).run(broken_writer_job, str(tmp_path / "log"))
    assert found[0] == found[1] and found[0][1] == 1  # step 1 has no row, although rank 0 wrote its part
    assert "cannot be written any more (FileExistsError" in found[0][0] and "--resume true" in found[0][0]


class Stuck(torch.optim.SGD):
    """An optimizer that says it stepped."""

    def step(self, closure: Any = None) -> None:
        return None


def stuck_job(folder: str) -> str:
    from lmc_dist import TrainingLogger

    engine = zero3_engine(reference_model("llama-tied", torch.float32), partial(Stuck, lr=0.1))
    engine.train()
    logger = TrainingLogger(folder, mode="replay", loss_normalization="micro_batch_token_mean")
    logger.attach(engine)
    tokens = token_batch(dist.get_rank(), 2)[0]
    index = torch.arange(2) + 2 * dist.get_rank()
    engine.backward(engine(input_ids=tokens, labels=tokens, index=index).loss)
    with pytest.raises(LmcError) as caught:
        engine.step()
    logger.detach()
    engine.destroy()
    return str(caught.value)


def test_a_step_that_changes_nothing_is_an_error_at_once(ranks: Any, tmp_path: Path) -> None:
    for message in ranks(2).run(stuck_job, str(tmp_path / "log")):
        assert "step 0: the optimizer stepped with lr" in message and "no weight changed" in message


# --- reading ahead ---------------------------------------------------------------------------------------------------


def test_reading_ahead_goes_on_during_work_within_its_bound() -> None:
    begun: list[int] = []
    done = {step: threading.Event() for step in range(12)}

    def read(step: int) -> int:
        begun.append(step)
        done[step].set()
        if step == 11:
            raise LmcError("step 11 is damaged")
        return step

    ahead = Prefetch(read, [*range(8), 11, 12], depth=2)
    for step in range(8):
        assert step in ahead and step + 1 not in ahead
        assert ahead.take(step) == step
        for later in (step + 1, step + 2):  # read while this thread has other things to do
            assert done[later].wait(20) if later < 8 else True
        time.sleep(0.02)  # for a third one, which must not come
        assert len(begun) <= step + 3
    with pytest.raises(LmcError, match="not the next"):
        ahead.take(12)
    with pytest.raises(LmcError, match="step 11 is damaged"):
        ahead.take(11)
    assert 12 not in ahead
    ahead.close()


def read_ahead_job(folder: str) -> list[str]:
    """Follows a log, and waits after each step until the thread has read the next one; checksums on the way."""
    log = TrajectoryLog(folder)
    read, done = log._stored, {step: threading.Event() for step in range(log.num_steps)}

    def watched(step: int) -> Any:
        found = read(step)
        done[step].set()
        return found

    log._stored = watched  # type: ignore[method-assign]
    theta, sums = log.theta(0), []
    with log.read_ahead(0, log.num_steps):
        for step in range(log.num_steps):
            log.advance(theta, step)
            sums.append(checksum(theta))
            following = [s for s in range(step + 1, log.num_steps) if log.record(s).applied]
            assert not following or done[following[0]].wait(20)
    assert log._ahead is None
    return sums


# --- between ranks and engines ---------------------------------------------------------------------------------------


def check_relayout(seed: int) -> None:
    """Random tables from either rule to either, with parameters that some ranks hold nothing of."""
    rank, world_size = group_rank(None)
    draw = random.Random(seed)
    for _ in range(12):
        specs = [
            ParamSpec(f"p{i}", tuple(draw.choices([1, 2, 3, 5, 40], k=draw.randrange(4))))
            for i in range(draw.randrange(1, 6))
        ]
        whole = awkward(specs, draw.randrange(2**32), draw.choice([torch.float32, torch.bfloat16, torch.float64]))
        by_rule = {
            rule: ShardedVector.from_full(ShardLayout(specs, rank, world_size, rule), whole.__getitem__)
            for rule in RULES
        }
        for source in by_rule.values():
            for target in by_rule.values():
                assert torch.equal(bits(relayout(source, target.layout).flat), bits(target.flat))


TIERS_WRITTEN = [
    {"storage": "update"},
    {"storage": "full"},
    {"storage": "gradient", "compression": "zstd"},
    {"storage": "update", "update_dtype": "bfloat16"},
]


def written_logs(folder: Path) -> dict[str, tuple[int, Any, dict[str, Any]]]:
    """Folder → (ranks, rule, settings): every world size and rule, tiers in turn."""
    found = {}
    for i, (world_size, rule) in enumerate((w, rule) for w in (1, 2, 3, 4) for rule in RULES):
        found[str(folder / f"{world_size}-{rule}")] = (world_size, rule, TIERS_WRITTEN[(i + world_size) % 4])
    return found


def write_job(logs: dict[str, tuple[int, Any, dict[str, Any]]], seed: int) -> None:
    for folder, (world_size, rule, more) in logs.items():
        if world_size == group_rank(None)[1]:
            write_log(folder, rule, **more)
    check_relayout(seed)


def read_job(logs: dict[str, tuple[int, Any, dict[str, Any]]]) -> None:
    """Every log gives the same θ_s here, and every live engine takes it over to the bit."""
    expected = []
    engines = {name: build(name, odd_model()) for name in ("zero3", "fsdp2")}
    if group_rank(None)[1] == 1:
        model = odd_model()
        engines["single"] = (model, engine_shards(model, torch.optim.AdamW(model.parameters())))
    for folder, (_, _, more) in logs.items():
        log = TrajectoryLog(folder)
        for step in range(NUM_STEPS + 1):
            whole = weights(step - (step > 2))
            theta, exact = log.theta(step), ShardedVector.from_full(log.layout, whole.__getitem__)
            if "update_dtype" in more and step > 0:
                last = ShardedVector.from_full(log.layout, weights(step - (step > 2) - 1).__getitem__)
                # step 2, before the snapshot, was not applied: nothing brought the log to meet it
                assert 0 < (theta - exact).norm() <= 2**-7 * (exact - last).norm()
                continue
            expected.append(checksum(exact))
            assert checksum(theta) == expected[-1], (folder, step)
        for _, shards in engines.values():
            target = relayout(log.theta(3), shards.layout)
            shards.write(target)
            logged = log.record(2).log_checksum or log.record(2).checksum
            assert shards.verify(target) == checksum(shards.read()) == logged
    engines["zero3"][0].destroy()


def test_logs_written_at_any_number_of_ranks_are_read_at_any_other(ranks: Any, tmp_path: Path) -> None:
    logs = written_logs(tmp_path)
    for world_size in (1, 2, 3, 4):
        ranks(world_size).run(write_job, logs, world_size)
    for world_size in (1, 2, 3, 4):
        ranks(world_size).run(read_job, logs)
    for folder in (name for name, (_, _, more) in logs.items() if more in TIERS_WRITTEN[:3]):
        sums = ranks(2).run(read_ahead_job, folder)[0]
        assert sums == [record.checksum for record in TrajectoryLog(folder).records()]


def replay_tier_job(folder: str) -> str:
    write_log(folder, "zero3", storage="replay")
    log = TrajectoryLog(folder)
    assert [checksum(log.theta(step)) for step in log.snapshots] == [
        checksum(ShardedVector.from_full(log.layout, weights(step - (step > 2)).__getitem__)) for step in (0, 3)
    ]
    with pytest.raises(LmcError) as caught:
        log.theta(2)
    return str(caught.value)


def test_tier_replay_says_which_weights_it_holds(ranks: Any, tmp_path: Path) -> None:
    for message in ranks(2).run(replay_tier_job, str(tmp_path / "log")):
        assert "storage 'replay'" in message and "steps 0, 3" in message and "replay() on an engine" in message
