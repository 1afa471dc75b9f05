"""Cost of curvature products over one plain gradient: interleaved medians of one run.

    .venv/bin/python bench/hvp.py                 one process, then two ranks
    .venv/bin/python bench/hvp.py --num_ranks 1   one of them

A Llama-shaped model of about 5 M parameters, 8 sequences of 128 tokens. The plain gradient is torch's own forward and
backward with fused attention: of the whole module in one process, of an FSDP2 module (`fully_shard` by layer) on several
ranks. A product of m vectors is reported per vector. `peak` counts the bytes of live tensors on rank 0; `gathered/p` and
`reduced/p` are what the collectives move, in whole models. curvlinops is measured where it is installed (`make peers`);
its Hessian needs an activation whose backward torch can differentiate forward, so both are compared with GELU there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measure import interleaved, live_peak, on_ranks, write_results

SEQUENCES, LENGTH, VOCAB = 8, 128, 4096
COUNTS = (2, 4, 8)
RANK = 16  # of low_rank
# What a case may cost, in plain gradients per vector, in one process.
TARGETS = {
    "GGN, blocks kept": 1.8,
    "GGN, blocks kept, m=8": 1.5,
    "GGN, blocks recomputed": 2.2,
    "exact, blocks kept": 3.2,
    "fd, blocks kept": 2.1,
    "fisher": 0.05,
    "low_rank, between refreshes": 0.2,
}


def build(activation: str) -> dict[str, Any]:
    """Sharded modules, θ, vectors and this rank's batch."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lmc_dist.curvature import MicroBatch
    from lmc_dist.shards.layout import ShardLayout, group_rank
    from lmc_dist.shards.module import ShardedModule, build_skeleton
    from lmc_dist.shards.vector import ShardedVector

    rank, world_size = group_rank(None)
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=VOCAB, num_key_value_heads=4, max_position_embeddings=LENGTH, **sizes)
    config.tie_word_embeddings, config.hidden_act = True, activation
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    skeleton = build_skeleton(config)
    layout = ShardLayout.of_module(skeleton)
    theta = ShardedVector.from_full(layout, model.get_parameter)
    ids = torch.randint(0, VOCAB, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    weights = torch.full((SEQUENCES,), 1.0 / (SEQUENCES * (LENGTH - 1)))
    mine = slice(rank * SEQUENCES // world_size, (rank + 1) * SEQUENCES // world_size)
    micro = MicroBatch({"input_ids": ids[mine]}, ids[mine], weights[mine])
    vectors = [theta.like(torch.randn_like(theta.flat) * (theta.flat != 0)) for _ in range(max(COUNTS))]
    modules = {blocked: ShardedModule(skeleton, layout, blocked=blocked) for blocked in (True, False)}
    return {"model": model, "modules": modules, "theta": theta, "micro": micro, "vectors": vectors}


def plain_gradient(model: torch.nn.Module, ids: torch.Tensor, world_size: int) -> Callable[[], None]:
    """torch's own forward and backward."""
    if world_size > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world_size,))
        for layer in model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def run() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def cases(setup: dict[str, Any], world_size: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """name → (call, vectors it multiplies); the first is what all others are compared with."""
    from lmc_dist.curvature import HVPConfig, TokenCrossEntropy, hvp_apply, low_rank_basis
    from lmc_dist.curvature.products import weighted_gradient

    theta, micro, vectors, loss = setup["theta"], setup["micro"], setup["vectors"], TokenCrossEntropy()
    modules = setup["modules"]

    def product(mode: str, m: int = 1, blocked: bool = True, **options: Any) -> Callable[[], Any]:
        config = HVPConfig(mode, **options)
        return lambda: hvp_apply(vectors[:m], config, modules[blocked], loss, theta, [micro])

    gradient = weighted_gradient(modules[True], loss, theta, [micro])
    found: dict[str, tuple[Callable[[], Any], int]] = {}
    found["gradient, plain"] = (plain_gradient(setup["model"], micro.inputs["input_ids"], world_size), 1)
    found["gradient, blocks kept"] = (lambda: weighted_gradient(modules[True], loss, theta, [micro], keep=True), 1)
    found["gradient, blocks recomputed"] = (lambda: weighted_gradient(modules[True], loss, theta, [micro]), 1)
    found["GGN, unblocked"] = (product("GGN", blocked=False, keep_activations=True), 1)
    found["GGN, blocks kept"] = (product("GGN", keep_activations=True), 1)
    found["GGN, blocks recomputed"] = (product("GGN"), 1)
    for m in COUNTS:
        found[f"GGN, blocks kept, m={m}"] = (product("GGN", m, keep_activations=True), m)
        found[f"GGN, blocks recomputed, m={m}"] = (product("GGN", m), m)
    found["exact, blocks kept"] = (product("exact", keep_activations=True), 1)
    found["exact, blocks recomputed"] = (product("exact"), 1)
    for m in COUNTS:
        found[f"exact, blocks kept, m={m}"] = (product("exact", m, keep_activations=True), m)
    found["fd, blocks kept"] = (product("fd", keep_activations=True), 1)
    found["fd, blocks recomputed"] = (product("fd"), 1)
    found["fisher"] = (lambda: hvp_apply(vectors[0], HVPConfig("fisher"), gradient=gradient), 1)
    low_rank = HVPConfig("low_rank", rank=RANK)
    basis = low_rank_basis(low_rank, modules[True], loss, theta, [micro])
    found["low_rank, between refreshes"] = (lambda: hvp_apply(vectors[0], low_rank, basis=basis), 1)
    if world_size == 1:
        found |= peers(setup)
    return found


class Logits(torch.nn.Module):
    """(B, T) token ids → (B·(T−1), V) logits, as curvlinops needs them."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)


def peers(setup: dict[str, Any]) -> dict[str, tuple[Callable[[], Any], int]]:
    """The same products by curvlinops, and ours with GELU beside its Hessian."""
    try:
        import curvlinops
    except ImportError:
        print("curvlinops is not installed, its rows are left out: make peers")
        return {}
    from lmc_dist.curvature import HVPConfig, TokenCrossEntropy, hvp_apply

    found: dict[str, tuple[Callable[[], Any], int]] = {}

    def operator(kind: Any, setup: dict[str, Any]) -> tuple[Any, list[torch.Tensor]]:
        from copy import deepcopy

        model, layout, ids = deepcopy(setup["model"]), setup["theta"].layout, setup["micro"].inputs["input_ids"]
        model.set_attn_implementation("eager")  # the fused kernel has no forward mode
        parameters = [model.get_parameter(slot.spec.name) for slot in layout]
        data = [(ids, ids[:, 1:].flatten())]
        peer = kind(Logits(model), torch.nn.CrossEntropyLoss(), parameters, data, check_deterministic=False)
        columns = [
            torch.stack([v[slot.spec.name].view(slot.spec.shape) for v in setup["vectors"][:4]], -1) for slot in layout
        ]
        return peer, columns

    ggn, columns = operator(curvlinops.GGNLinearOperator, setup)
    gelu = build("gelu_pytorch_tanh")
    hessian, _ = operator(curvlinops.HessianLinearOperator, gelu)
    ours = HVPConfig("exact", keep_activations=True)
    for m in (1, 4):
        chosen = [c[..., :m].contiguous() for c in columns]
        found[f"curvlinops GGN, m={m}"] = (lambda chosen=chosen: ggn @ chosen, m)  # type: ignore[misc]
        found[f"curvlinops Hessian (GELU), m={m}"] = (lambda chosen=chosen: hessian @ chosen, m)  # type: ignore[misc]
        found[f"exact, blocks kept (GELU), m={m}"] = (
            lambda m=m: hvp_apply(  # type: ignore[misc]
                gelu["vectors"][:m], ours, gelu["modules"][True], TokenCrossEntropy(), gelu["theta"], [gelu["micro"]]
            ),
            m,
        )
    return found


def work(rounds: int) -> list[dict[str, Any]]:
    """One rank's part; the same rows on every rank."""
    import torch.distributed as dist

    from lmc_dist.shards.gather import count_traffic

    setup, world_size = build("silu"), dist.get_world_size()
    timed = cases(setup, world_size)
    main = dist.get_rank() == 0
    traffic, peaks = {}, {}
    for name, (call, _) in timed.items():
        with count_traffic() as counter:
            peaks[name] = live_peak(call)
        traffic[name] = (counter.gathered, counter.reduced)
    seconds = interleaved({name: call for name, (call, _) in timed.items()}, rounds, show=main)
    numel = setup["theta"].layout.total_numel
    first = next(iter(timed))
    return [
        {
            "case": name,
            "vectors": m,
            "ratio": seconds[name] / seconds[first] / m,
            "ratio_to": first,
            "seconds": seconds[name],
            "peak_mb": peaks[name] / 2**20,
            "gathered_over_p": traffic[name][0] / numel,
            "reduced_over_p": traffic[name][1] / numel,
            "parameters": numel,
            "world_size": world_size,
            "target": TARGETS.get(name) if world_size == 1 else None,
        }
        for name, (_, m) in timed.items()
    ]


def show(rows: list[dict[str, Any]]) -> None:
    print(f"\n{rows[0]['world_size']} rank(s), {rows[0]['parameters']:,} parameters")
    print(
        f"{'product':<36}{'x gradient':>11}{'target':>8}{'seconds':>9}{'peak MB':>9}{'gathered/p':>12}{'reduced/p':>11}"
    )
    for row in rows:
        target = f"{row['target']:g}" if row["target"] else ""
        print(
            f"{row['case']:<36}{row['ratio']:>11.3f}{target:>8}{row['seconds']:>9.3f}{row['peak_mb']:>9.1f}"
            f"{row['gathered_over_p']:>12.2f}{row['reduced_over_p']:>11.2f}"
        )


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The comparisons that are not against the plain gradient's time."""
    by_case = {row["case"]: row for row in rows if row["world_size"] == 1}
    ratio = lambda a, b, what="ratio": by_case[a][what] / by_case[b][what]  # noqa: E731
    found = {
        "ggn_over_gradient": by_case["GGN, blocks kept"]["ratio"],
        "kept_over_unblocked": ratio("GGN, blocks kept", "GGN, unblocked"),
        "recomputed_peak_over_gradient_peak": ratio("GGN, blocks recomputed", "gradient, plain", "peak_mb"),
    }
    if "curvlinops GGN, m=1" in by_case:
        for m, ours in ((1, "GGN, blocks kept"), (4, "GGN, blocks kept, m=4")):
            found[f"ggn_over_curvlinops_m{m}"] = ratio(ours, f"curvlinops GGN, m={m}")
            found[f"hessian_over_curvlinops_m{m}"] = ratio(
                f"exact, blocks kept (GELU), m={m}", f"curvlinops Hessian (GELU), m={m}"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_ranks", type=int, nargs="*", default=[1, 2], help="gloo processes, one thread each")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds; the median is reported")
    parser.add_argument("--json", default=None, help="write the rows to this file")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for num_ranks in options.num_ranks:
        found = on_ranks(num_ranks, work, options.rounds)
        show(found)
        rows += found
    totals = summary(rows) if 1 in options.num_ranks else {}
    print()
    for name, value in totals.items():
        print(f"{name}: {value:.3f}")
    write_results(options.json, "hvp", rows, totals)


if __name__ == "__main__":
    main()
