"""HSDP (`fully_shard` over replicas × shards): logged, replayed to the bit, unlearned from like FSDP2, corrected live."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import KeepDouble
from hypothesis import given
from hypothesis import strategies as st
from pool import Pool
from test_engine_logs import (
    check_replay,
    deletion,
    engine_config,
    request,
    resumed_job,
    trained,
)
from test_fd_engines import my_micros, oracle, random_full, reference_model, sgd, shard_of
from test_world_512 import LLAMA_70B, join, llama
from test_zero3 import GPT2, LLAMA, build_for_replay, small_config, train_job

from lmc_dist.config import Config
from lmc_dist.curvature import HVPConfig, TokenCrossEntropy, hvp_apply
from lmc_dist.data import collate
from lmc_dist.errors import LmcError
from lmc_dist.shards.checksum import checksum
from lmc_dist.shards.engines import EngineShards, engine_shards
from lmc_dist.shards.layout import ParamSpec, ShardLayout, held_bounds, padded_numel, shard_bounds, shard_ranks
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.relayout import relayout
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import DatasetBatches
from lmc_dist.trajectory.callback import training_log
from lmc_dist.trajectory.files import step_folder
from lmc_dist.trajectory.reader import ShardReader
from lmc_dist.trajectory.replay import replay, replay_engine
from lmc_dist.trajectory.store import TrajectoryLog

ODD = {**LLAMA, "intermediate_size": 27}  # 14 rows on one shard, 13 on the other; tied embeddings
WORLD, REPLICAS = 4, 2
ADAMW = {"optimizer": "adamw", "learning_rate": 0.01}


def hsdp_config(folder: Path, tier: str = "full", model: Any = ODD, replicas: int = REPLICAS, **train: Any) -> Config:
    """Steps of 7, 7, 7 and 3 samples; on four ranks two passes a step, the first of which is not reduced."""
    settings = {"micro_batch_size": 1, "max_grad_norm": 0.5, "replicas": replicas, **train}
    return engine_config(folder, "fsdp2", tier, model, **settings)


def whole_weights(shards: EngineShards, like: ShardLayout) -> ShardedVector:
    """The engine's weights as DTensor itself puts them together."""
    whole = {name: p.detach().full_tensor() for name, p in shards.parameters.items()}
    return ShardedVector.from_full(like, whole.__getitem__)


def check_equal_replicas(shards: EngineShards) -> None:
    """Every rank's whole shards, bit by bit, against those of the same shard in the other replicas."""
    mine = torch.cat([p.detach().to_local().reshape(-1) for p in shards.parameters.values()])
    found: list[Any] = [None] * WORLD
    dist.all_gather_object(found, mine)
    for rank in range(WORLD):
        assert torch.equal(found[rank], found[rank % 2])
    assert not torch.equal(found[0], found[1][: len(found[0])])


def dataset_of(config: Config) -> Any:
    from lmc_dist.training import build_dataset

    return build_dataset(config)[0]


# --- the rule ------------------------------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    replicas=st.integers(1, 4),
    shards=st.integers(1, 5),
)
def test_every_element_is_owned_once_by_a_rank_that_holds_it(shape: list[int], replicas: int, shards: int) -> None:
    spec, world_size, rule = ParamSpec("p", tuple(shape)), replicas * shards, f"hsdp-{replicas}"
    cut = torch.arange(spec.numel).view(shape).chunk(shards)  # as DTensor cuts
    pieces = [cut[s].reshape(-1).tolist() if s < len(cut) else [] for s in range(shards)]
    owned = []
    for rank in range(world_size):
        held = list(range(*held_bounds(spec, rank, world_size, rule)))
        mine = list(range(*shard_bounds(spec, rank, world_size, rule)))
        assert held == pieces[rank % shards] and set(mine) <= set(held)
        assert len(mine) <= padded_numel(spec, world_size, rule) <= -(-len(pieces[0]) // replicas)
        owned += mine
    assert sorted(owned) == list(range(spec.numel))


def test_rules_that_are_none_are_refused() -> None:
    for rule in ("hsdp-0", "hsdp-", "hsdp-2x", "zero2"):
        with pytest.raises(ValueError, match="unknown partition rule"):
            padded_numel(ParamSpec("p", (4,)), 4, rule)
    with pytest.raises(ValueError, match="'hsdp-2' is for a multiple of 2 ranks, not for 3"):
        shard_ranks(3, "hsdp-2")


def check_relayout() -> None:
    specs = [ParamSpec("odd", (7, 3)), ParamSpec("one", (1,)), ParamSpec("even", (8, 2))]
    layouts = [ShardLayout(specs, dist.get_rank(), WORLD, rule) for rule in ("zero3", "hsdp-2", "fsdp2", "hsdp-4")]
    values = {spec.name: torch.randn(spec.shape, generator=torch.Generator().manual_seed(1)) for spec in specs}
    vectors = [ShardedVector.from_full(layout, values.__getitem__) for layout in layouts]
    assert len({checksum(vector) for vector in vectors}) == 1
    for vector in vectors:
        for other in vectors:
            assert torch.equal(relayout(vector, other.layout).flat, other.flat)
        assert vector.norm() == pytest.approx(vectors[0].norm(), rel=1e-12)
    with pytest.raises(LmcError, match="cannot gather what lies by rule 'hsdp-2'"):
        module = torch.nn.Linear(3, 2)
        ShardedModule(module, ShardLayout.of_module(module, rule="hsdp-2"))


# --- training, replay, correction ----------------------------------------------------------------------------------


def logged_job(folder: Path) -> dict[str, Any]:
    """An AdamW run: logged in all vectors, repeated to the bit, stopped and resumed to the bit."""
    check_relayout()
    config = hsdp_config(folder / "run", max_grad_norm=0.05, **ADAMW)
    shards: Any = trained(config)
    log = check_replay(config)
    manifest, last = log.manifest, log.num_steps - 1
    assert (manifest.engine, manifest.partition, manifest.world_size) == ("hsdp-2", "hsdp-2", WORLD)
    assert all(r.applied and r.clip_coef < 1 for r in log.records())
    micros = log.record(0).micro_batches
    assert {m.rank for m in micros} == set(range(WORLD)) and [m.is_local for m in micros] == [True] * 4 + [False] * 4
    assert sorted(i for r in log.records() for i in r.sample_ids) == sorted(dataset_of(config).ids)
    assert checksum(whole_weights(shards, log.layout)) == log.record(last).checksum
    assert checksum(log.gradient(last)) and log.gradient(last).norm() == pytest.approx(log.record(last).grad_norm)
    check_equal_replicas(shards)
    sizes = [p.stat().st_size for p in sorted((Path(config.log_dir) / "steps").glob("*/theta*.safetensors"))[:WORLD]]
    shards.destroy()

    cut = hsdp_config(folder / "cut", max_grad_norm=0.05, **ADAMW)
    resumed_job(cut)
    again = TrajectoryLog(cut.log_dir)
    assert [r.checksum for r in again.records()] == [r.checksum for r in log.records()]
    assert [s.engine for s in again.manifest.all_segments] == ["hsdp-2"]
    dist.barrier()
    return {"sizes": sizes, "checksums": [r.checksum for r in log.records()]}


def reading_job(log_dir: str) -> list[str]:
    """Checksums of every θ and gradient, read by however many ranks this is."""
    log = TrajectoryLog(log_dir)
    thetas = [checksum(log.theta(step + 1)) for step in range(log.num_steps)]
    snapshot, _ = log.snapshot(log.snapshots[-1])
    assert snapshot.keys() == {"theta", "exp_avg", "exp_avg_sq"}
    rest = [checksum(log.gradient(step)) for step in range(log.num_steps)]
    return thetas + rest + [checksum(snapshot[key]) for key in sorted(snapshot)]


def test_a_run_is_logged_replayed_and_resumed_to_the_bit(ranks: Any, tmp_path: Path) -> None:
    from lmc_dist.trajectory.reshard import reshard
    from lmc_dist.trajectory.verify import verify

    found = ranks(WORLD).run(logged_job, tmp_path)[0]
    log_dir = str(tmp_path / "run" / "log")
    expected = reading_job(log_dir)
    assert expected[: len(found["checksums"])] == found["checksums"]
    for world_size in (2, 3):
        assert ranks(world_size).run(reading_job, log_dir)[0] == expected
    assert max(found["sizes"]) < 1.5 * min(found["sizes"])  # an equal part of the log on every rank
    assert not verify(log_dir).problems
    for number, rule in ((3, "zero3"), (6, None)):
        moved = reshard(log_dir, tmp_path / f"on-{number}", number, rule)
        assert moved.manifest.partition == (rule or "hsdp-2") and reading_job(str(moved.path)) == expected
    with pytest.raises(
        LmcError, match=r"reshard.ranks=3 cannot keep the log's partition 'hsdp-2'.*give reshard.partition"
    ):
        reshard(log_dir, tmp_path / "no", 3)
    with pytest.raises(LmcError, match="files of 4 ranks, which partition 'hsdp-3' cannot be of"):
        ShardReader(
            tmp_path / "run" / "log" / step_folder(0), TrajectoryLog(log_dir).layout, "hsdp-3", "step 0", "theta"
        )


def correction_job(folder: Path, replicas: int, tier: str, live: bool) -> None:
    """A run of SGD, every step clipped, and the deletion from its log, applied to the engine that trained."""
    from lmc_dist.unlearn.correction import Correction

    config = hsdp_config(folder, tier, replicas=replicas)
    shards = trained(config)
    log = TrajectoryLog(config.log_dir)
    assert all(r.clip_coef < 1 for r in log.records())
    theta = log.theta(log.num_steps)
    v = deletion(config, shards if live else None)
    if live:
        shards.verify(relayout(theta + v, shards.layout))
        assert checksum(whole_weights(shards, log.layout)) == checksum(theta + v)
        if replicas > 1:
            check_equal_replicas(shards)
    shards.destroy()
    Correction(v, (), 0.0).save(folder / "v")
    Correction(theta, (), 0.0).save(folder / "theta")
    dist.barrier()


def distances(folder: Path, other: Path) -> tuple[float, float]:
    """Relative distances of the corrected weights, and of v."""
    from lmc_dist.unlearn.correction import load_correction

    layout = TrajectoryLog(folder / "log").layout
    like = ShardedVector.zeros(layout)
    v, theta, v_other, theta_other = (
        load_correction(where / name, layout, like) for where in (folder, other) for name in ("v", "theta")
    )
    corrected = theta_other + v_other
    return ((theta + v) - corrected).norm() / corrected.norm(), (v - v_other).norm() / v_other.norm()


def test_deletion_is_that_from_fsdp2(ranks: Any, tmp_path: Path) -> None:
    """By GGN, and by replay; against FSDP2 on as many ranks and on half of them."""
    for tier in ("update", "replay"):
        live = tier == "update"
        ranks(WORLD).run(correction_job, tmp_path / tier / "hsdp", REPLICAS, tier, live)
        for world_size in (WORLD, 2) if live else (2,):
            other = tmp_path / tier / f"fsdp2-{world_size}"
            ranks(world_size).run(correction_job, other, 1, tier, live)
            weights, v = distances(tmp_path / tier / "hsdp", other)
            print(f"{tier}, FSDP2 on {world_size} ranks: weights {weights:.1e}, v {v:.1e}")
            # in tier `replay` v is the difference of two runs' weights, and carries the rounding of both
            assert weights <= 1e-6 and v <= (1e-5 if tier == "replay" else 1e-6)


def elsewhere_job(log_dir: str, config: Config) -> tuple[bool, str, str]:
    """A replay on ranks that two replicas do or do not divide."""
    log = TrajectoryLog(log_dir)
    engine = replay_engine(build_for_replay(config), log)
    result = replay(engine, log, DatasetBatches(dataset_of(config)), request())
    engine.destroy()
    return result.exact, engine.name, checksum(result.theta)


def other_worlds_job(folder: Path) -> None:
    """Frozen parameters in a live HSDP engine, one replica, and as many replicas as ranks."""
    config = hsdp_config(folder / "frozen", "gradient", max_grad_norm=0.05, **ADAMW)
    config = replace(
        config, model=replace(config.model, trainable=r"layers\.1\.|norm"), model_dir=str(folder / "model")
    )
    shards = trained(config)
    log = check_replay(config)
    theta, v = log.theta(log.num_steps), deletion(config, shards)
    assert v.norm() > 0 and checksum(shards.read()) == checksum(relayout(theta + v, shards.layout))
    check_equal_replicas(shards)
    shards.destroy()
    for replicas in (1, WORLD):
        config = hsdp_config(folder / str(replicas), "replay", replicas=replicas, epochs=1, **ADAMW)
        trained(config).destroy()
        log = check_replay(config)
        assert log.manifest.partition == ("fsdp2" if replicas == 1 else "hsdp-4")
        dist.barrier()


def test_frozen_parts_and_other_numbers_of_replicas(ranks: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ranks(WORLD).run(other_worlds_job, tmp_path)
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model").named_parameters())
    start = dict(build_for_replay(hsdp_config(tmp_path)).named_parameters())
    frozen = {name for name, p in exported.items() if torch.equal(p, start[name])}
    assert frozen == {name for name in start if "layers.1." not in name and "norm" not in name}


def test_a_log_is_replayed_on_other_ranks_up_to_rounding(ranks: Any, tmp_path: Path) -> None:
    config = hsdp_config(tmp_path, "replay")
    ranks(WORLD).run(train_job, config)
    ((exact, name, expected), *_) = ranks(WORLD).run(elsewhere_job, config.log_dir, config)
    assert exact and name == "hsdp-2"
    for world_size, engine in ((2, "hsdp-2"), (3, "fsdp2")):
        ((exact, name, found), *_) = ranks(world_size).run(elsewhere_job, config.log_dir, config)
        assert not exact and name == engine and found != expected


# --- loops written by hand -----------------------------------------------------------------------------------------


def hsdp(model: torch.nn.Module, mesh: Any = None, **settings: Any) -> torch.nn.Module:
    """`fully_shard` of the blocks and the model over two replicas, or another mesh."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if mesh is None:
        mesh = init_device_mesh("cpu", (REPLICAS, WORLD // REPLICAS), mesh_dim_names=("replicate", "shard"))
    base = getattr(model, "model", None) or model.transformer
    for block in getattr(base, "layers", None) or base.h:
        fully_shard(block, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


def hand_job(folder: Path, precision: str) -> None:
    """Three steps of two passes with dropout, the first of each step kept local, clipped."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    config = small_config(folder, GPT2)
    dataset = dataset_of(config)
    policies = {"bf16": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}, "float64": {}}
    dtype = torch.float64 if precision == "float64" else torch.float32
    model: Any = hsdp(build_for_replay(config).to(dtype), **policies[precision])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    mine = dataset.ids[dist.get_rank() :: WORLD]
    model.train()
    settings: Any = {"mode": "gradient", "save_interval": 2, "loss_normalization": "micro_batch_token_mean"}
    with training_log(model, config.log_dir, optimizer, max_grad_norm=0.1, **settings):
        for i in range(6):
            batch = collate(dataset.by_id(mine[i : i + 1]), dataset.pad_token_id)
            model.set_requires_gradient_sync(i % 2 == 1)
            (model(**batch).loss / 2).backward()
            if i % 2:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
    log = TrajectoryLog(config.log_dir)
    assert log.manifest.engine == "hsdp-2" and log.manifest.run["engine"]["units"][0] == ""
    assert log.manifest.run["engine"]["param_dtype"] == ("bfloat16" if precision == "bf16" else None)
    again = replay_engine(build_for_replay(config).to(dtype), log)
    result = replay(again, log, DatasetBatches(dataset))
    assert result.exact and result.verified == log.num_steps == 3
    for step, record in enumerate(log.records()):
        assert record.clip_coef < 1 and record.grad_norm == pytest.approx(log.gradient(step).norm(), rel=1e-5)
    dist.barrier()


def fd_job(full_v: torch.Tensor, gradient: torch.Tensor, product: torch.Tensor) -> dict[str, float]:
    """Relative errors of the engine's gradient and Hessian product in float64."""
    module = hsdp(reference_model("llama-tied", intermediate_size=27))
    shards = engine_shards(module, sgd(module.parameters()))
    layout, theta, loss = shards.layout, shards.read(), TokenCrossEntropy()
    micros = my_micros(layout.rank, layout.world_size)
    v = shard_of(layout, full_v)
    before = [p.detach().to_local().clone() for p in module.parameters()]  # type: ignore[attr-defined]
    with KeepDouble():
        got = {
            "gradient": shards.gradient(theta, micros, loss),
            "product": hvp_apply(v, HVPConfig("fd"), engine=shards, loss=loss, theta=theta, micro_batches=micros),
        }
    for was, p in zip(before, module.parameters(), strict=True):
        assert torch.equal(was, p.detach().to_local())  # type: ignore[attr-defined]
    expected = {"gradient": shard_of(layout, gradient), "product": shard_of(layout, product)}
    return {name: (got[name] - expected[name]).norm() / expected[name].norm() for name in got}


def test_loops_and_differences_under_hsdp(ranks: Any, tmp_path: Path) -> None:
    for precision in ("bf16", "float64"):
        ranks(WORLD).run(hand_job, tmp_path / precision, precision)
    model = {"intermediate_size": 27}
    v = random_full(ShardLayout.of_module(reference_model("llama-tied", **model)), 5)
    gradient, product = oracle("llama-tied", v, **model)
    for error in ranks(WORLD).run(fd_job, v, gradient, product):
        assert error["gradient"] < 1e-14 and error["product"] < 1e-7, error


# --- what is refused -----------------------------------------------------------------------------------------------


def poke(module: torch.nn.Module, rank: int, name: str) -> None:
    """One bit of one parameter of one rank."""
    if dist.get_rank() == rank:
        module.get_parameter(name).detach().to_local().view(-1).view(torch.int32)[3] ^= 1  # type: ignore[attr-defined]


def refused(message: str) -> Any:
    return pytest.raises(LmcError, match=message)


def refused_job(folder: Path) -> None:
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    config = small_config(folder, ODD)
    dataset = dataset_of(config)
    names = ("replicate", "shard")
    pipeline = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("pipeline", *names))
    for mesh, message in (
        (
            DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=names),
            r"mesh of ranks \[\[0, 2\], \[1, 3\]\] is not supported",
        ),
        (pipeline[names], r"mesh of \(1, 2\) is not supported"),
    ):
        other = hsdp(build_for_replay(config), mesh)
        with pytest.raises(LmcError, match=message):
            engine_shards(other, sgd(other.parameters()))

    norm, late = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
    model: Any = hsdp(build_for_replay(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    poke(model, 3, late)
    with refused(
        rf"replica 1 does not hold replica 0's weights: rank 3 has another {late} than rank 1, .* shard 1 of 2"
    ):
        training_log(model, folder / "attach", optimizer).__enter__()
    poke(model, 3, late)

    def run_pass(step: int) -> None:
        ids = dataset.ids[4 * step + dist.get_rank() :][:1]
        model(**collate(dataset.by_id(ids), dataset.pad_token_id)).loss.backward()

    def run_step(step: int) -> None:
        run_pass(step)
        optimizer.step()
        optimizer.zero_grad()

    def log_to(name: str, optimizer: Any, train: Any) -> None:
        with training_log(model, folder / name, optimizer, loss_normalization="micro_batch_token_mean"):
            train()

    model.train()
    with refused(rf"weights: rank 2 has another {norm} than rank 0, .* shard 0 of 2"):
        log_to("step", optimizer, lambda: (run_step(0), poke(model, 2, norm), run_step(1)))
    poke(model, 2, norm)

    shards = engine_shards(model, optimizer)
    with torch.no_grad():
        shards.write(shards.read() * 0.5)  # all alike again, after a step that one replica took otherwise
    if dist.get_rank() == 1:
        optimizer.state[shards.parameters[late]]["exp_avg"].to_local().view(-1)[5] += 1
    with refused(rf"'exp_avg' of the optimizer: rank 3 has another {late} than rank 1"):
        shards.read_state()

    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    with refused(r"set_requires_all_reduce\(False\)\) cannot be logged"):
        log_to("partial", plain, lambda: (model.set_requires_all_reduce(False), run_pass(2)))
    model.set_requires_all_reduce(True)
    model.set_gradient_divide_factor(4.0)
    with refused("HSDP with set_gradient_divide_factor"):
        log_to("factor", plain, lambda: run_step(2))


def settings_job(folder: Path) -> None:
    from lmc_dist.shards.engines.build import build_engine

    for engine, replicas, message in (
        ("fsdp2", 2, "train.replicas=2 does not divide 3 ranks: start a multiple of 2"),
        ("fsdp2", 0, "train.replicas=0 under train.engine=fsdp2: it must be at least 1"),
        ("ddp", 3, "train.replicas=3 under train.engine=ddp"),
    ):
        config = engine_config(folder / str(replicas), engine, replicas=replicas)
        with pytest.raises(LmcError, match=message):
            trained(config)
        assert not Path(config.log_dir).exists()
    for name in ("hsdp-2", "hsdp-x"):
        with pytest.raises(LmcError, match=f"engine {name} cannot be made of 3 ranks"):
            build_engine(name, torch.nn.Linear(2, 2), partial(torch.optim.SGD, lr=0.1), {})


def test_replicas_that_differ_and_meshes_of_another_kind_are_refused(ranks: Any, tmp_path: Path) -> None:
    ranks(WORLD).run(refused_job, tmp_path)
    ranks(3).run(settings_job, tmp_path / "settings")


# --- 512 ranks -----------------------------------------------------------------------------------------------------


def wide_job() -> dict[str, Any]:
    """Layouts of a 70B model at 8 × 64 ranks, beside what `fully_shard` makes of one of its blocks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    rule, world_size = "hsdp-8", 512
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama(LLAMA_70B, 128256))
    params = [ParamSpec(name, tuple(p.shape)) for name, p in model.named_parameters()]
    numel = sum(spec.numel for spec in params)
    bounds = [sorted(shard_bounds(spec, r, world_size, rule) for r in range(world_size)) for spec in params[:12]]
    covered = [
        row[0][0] == 0 and row[-1][1] == spec.numel and all(a[1] == b[0] for a, b in pairwise(row))
        for spec, row in zip(params, bounds, strict=False)
    ]
    sizes = [ShardLayout(params, rank, world_size, rule).flat_numel for rank in (0, 1, 63, 64, 255, 511)]
    same = []
    for rank in (0, 63, 64, 511):
        join(rank, world_size)
        with torch.device("meta"):
            block = AutoModelForCausalLM.from_config(llama({**LLAMA_70B, "num_hidden_layers": 1}, 128256))
            whole = AutoModelForCausalLM.from_config(llama({**LLAMA_70B, "num_hidden_layers": 1}, 128256))
        fully_shard(block, mesh=init_device_mesh("cpu", (8, 64), mesh_dim_names=("replicate", "shard")))
        layout = ShardLayout.of_module(whole, rule=rule)
        for name, p in block.named_parameters():
            start, end = layout.held(name)
            slot, local = layout.slots[name], p.to_local().reshape(-1)  # type: ignore[attr-defined]
            same.append(local.numel() == end - start and layout.owned(name, local).numel() == slot.local_numel)
    return {"covered": all(covered), "sizes": sizes, "numel": numel, "same": all(same) and len(same) == 4 * 12}


def test_layouts_at_8_by_64_are_those_of_the_engine() -> None:
    pool = Pool(1, join=False)
    try:
        (found,) = pool.run(wide_job)
    finally:
        pool.close()
    assert found["covered"] and found["same"]
    assert len(set(found["sizes"])) == 1  # padding included, every rank logs as much
    assert 0 <= found["sizes"][0] * 512 / found["numel"] - 1 < 0.01
