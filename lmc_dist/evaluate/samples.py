"""What a model gives each target token of each sample: the numbers that every metric here is a function of.

Shapes: B samples, T positions, V classes, N target tokens of one sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import pad

from lmc_dist.curvature import MicroBatch, TokenCrossEntropy
from lmc_dist.curvature.engine import ProductEngine
from lmc_dist.curvature.loss import raised
from lmc_dist.data import IGNORED, SampleDataset
from lmc_dist.shards.module import ShardedModule
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.batches import DatasetBatches


@dataclass(frozen=True)
class TokenValues:
    """One sample's target tokens under a model that sees all tokens before each of them.

    Attributes:
        log_probs: (N,) log p(target).
        means: (N,) Σ_v p(v) log p(v), what log p is expected to be.
        variances: (N,) Σ_v p(v) (log p(v) − mean)².
        hits: (N,) bool, whether the target is the most likely token.
    """

    log_probs: np.ndarray
    means: np.ndarray
    variances: np.ndarray
    hits: np.ndarray

    def without_end(self) -> TokenValues:
        """The same without the last target, which is the end token; a single target is kept.

        open-unlearning (src/evals/metrics/utils.py) leaves it out of memorisation and membership scores.
        """
        if len(self.hits) == 1:
            return self
        return TokenValues(self.log_probs[:-1], self.means[:-1], self.variances[:-1], self.hits[:-1])


def token_values(outputs_BTV: torch.Tensor, labels_BT: torch.Tensor) -> list[TokenValues]:
    """Values of each sample from a causal model's logits; labels are unshifted, -100 is no target. Local."""
    next_BT = pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
    kept_BT = next_BT != IGNORED
    log_p_KV, targets_K = raised(outputs_BTV[kept_BT]).log_softmax(-1), next_BT[kept_BT]
    p_KV = log_p_KV.exp()
    means_K = (p_KV * log_p_KV).sum(-1)
    variances_K = (p_KV * (log_p_KV - means_K[:, None]).square()).sum(-1)
    log_probs_K = log_p_KV.gather(-1, targets_K[:, None])[:, 0]
    hits_K = (log_p_KV.argmax(-1) == targets_K).to(means_K.dtype)
    together = torch.stack([log_probs_K, means_K, variances_K, hits_K]).double().cpu().numpy()
    ends = kept_BT.sum(-1).cumsum(0).tolist()
    return [TokenValues(part[0], part[1], part[2], part[3] > 0) for part in np.split(together, ends[:-1], axis=1)]


def sharded_values(
    module: ShardedModule, theta: ShardedVector, dataset: SampleDataset, batch_size: int = 16
) -> list[TokenValues]:
    """Values of every sample at a sharded θ, in the dataset's order and on every rank. Collective.

    Samples are dealt out over the ranks, like with like in length, and each block of the model is gathered once for
    every `batch_size` samples a rank.
    """
    layout, batches = module.layout, DatasetBatches(dataset, module.device)
    lengths = [len(item["input_ids"]) for item in dataset.by_id(dataset.ids)]
    order = sorted(range(len(dataset)), key=lambda i: -lengths[i])
    mine, most = order[layout.rank :: layout.world_size], -(-len(order) // layout.world_size)
    found: dict[int, TokenValues] = {}
    for start in range(0, most, batch_size):
        positions, micros = mine[start : start + batch_size], []
        if positions:  # a rank that has run out takes part without samples
            inputs, targets = batches.inputs([dataset.ids[i] for i in positions])
            micros.append(MicroBatch(inputs, targets, torch.ones(len(targets), device=targets.device)))
        engine = ProductEngine(module, TokenCrossEntropy(), theta, micros)
        chunks = engine.map_outputs(lambda outputs, micro: token_values(outputs, micro.targets))
        values = [value for parts in chunks for part in parts for value in part]
        found.update(zip(positions, values, strict=True))
    if layout.world_size > 1:
        box: list[dict[int, TokenValues]] = [{} for _ in range(layout.world_size)]
        dist.all_gather_object(box, found, group=layout.group)
        found = {position: value for part in box for position, value in part.items()}
    return [found[i] for i in range(len(dataset))]
