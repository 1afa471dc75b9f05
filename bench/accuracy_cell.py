"""What a cell of bench/accuracy.py is: a training under one optimizer and seed, and the methods that are compared on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmc_dist.config import Config, DataConfig, LogConfig, ModelConfig, TrainConfig

BATCH, LENGTH, CONTINUED_STEPS = 8, 96, 50
EARLY_STEP = 5  # whose whole batch is forgotten
# Learning rates of the continued training, constant, as parts of the peak: training itself ended at 0.
CONTINUED_RATES = (0.1, 0.5)
CONTINUED_REQUESTS = ("1%", "batch")
CONTINUED_BY = ("ggn", "head10_exact", "secant")

TRAINING = {"epochs": 1, "batch_size": BATCH, "warmup_steps": 10, "engine": "single"}
TRAININGS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "learning_rate": 0.01, "schedule": "linear", "micro_batch_size": BATCH},
    "adamw": {
        "optimizer": "adamw",
        "learning_rate": 2e-4,
        "schedule": "cosine",
        "micro_batch_size": BATCH // 2,  # accumulates two passes
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
    },
}
# Updates of plain SGD tell the gradient; following AdamW takes it at every step.
STORAGE = {"sgd": "update", "adamw": "gradient"}


@dataclass(frozen=True)
class Method:
    """How a correction is computed.

    Attributes:
        label: In tables.
        curvature: Arguments of `HVPConfig`.
        head: `replay_head`.
        K: Steps each source is propagated; None is all.
        left_out: Requests that it would take too long on.
        first_only: Whether it is computed for the first seed alone.
        update: How the optimizer's steps are carried.
    """

    label: str
    curvature: dict[str, Any]
    head: int | str = 0
    K: int | None = None
    left_out: tuple[str, ...] = ()
    first_only: bool = False
    update: str = "tangent"


GGN: dict[str, Any] = {"mode": "GGN"}
EXACT = {"mode": "exact", "keep_activations": True}
# A basis takes 2·16 + 9 products: one every 75 steps, or it would cost several times a retrain.
LOW_RANK = {"mode": "low_rank", "rank": 16, "refresh": 75}
MANY = ("1%", "10%")  # a source every few steps, and K opens a window for each of them
SECANT = {"mode": "secant", "keep_activations": True}
METHODS = {
    "tim": Method("first-order (TIM)", {"mode": "none"}),
    "fisher": Method("fisher", {"mode": "fisher"}),
    "low_rank": Method("low_rank 16", LOW_RANK),
    "ggn_k10": Method("GGN, K=10", GGN, K=10, left_out=("10%",)),
    "ggn_k50": Method("GGN, K=50", GGN, K=50, left_out=MANY),
    "ggn": Method("GGN", GGN),
    "head10_ggn": Method("head 10 + GGN", GGN, 10),
    "auto_ggn": Method("head auto + GGN", GGN, "auto", first_only=True),
    "exact": Method("exact", EXACT),
    "head10_exact": Method("head 10 + exact", EXACT, 10),
    "finite_ggn": Method("GGN, steps as they are", GGN, update="finite"),
    "finite_exact": Method("exact, steps as they are", EXACT, update="finite"),
    "finite_head10_ggn": Method("head 10 + GGN, steps as they are", GGN, 10, update="finite"),
    "secant": Method("secant", SECANT),
    "head10_secant": Method("head 10 + secant", SECANT, 10, first_only=True),
}


@dataclass(frozen=True)
class Cell:
    """What a cell is asked to do.

    Attributes:
        optimizer: A key of TRAININGS.
        seed: Of the order of data and of what is forgotten.
        steps: Optimizer steps.
        data: Folder with full.jsonl.
        model: Checkpoint folder.
        folder: Where its result and, while it runs, its log go.
        methods: Keys of METHODS.
        is_first: Whether a reference is compared with a training run of its own, and training goes on from corrections.
    """

    optimizer: str
    seed: int
    steps: int
    data: str
    model: str
    folder: str
    is_first: bool
    methods: tuple[str, ...] = tuple(METHODS)

    @property
    def name(self) -> str:
        return f"{self.optimizer}-{self.seed}"

    @property
    def file(self) -> Path:
        return Path(self.folder) / f"{self.name}.json"

    @property
    def settings(self) -> dict[str, Any]:
        """All that its result depends on, but for code and machine."""
        methods = {name: asdict(METHODS[name]) for name in self.methods}
        given = {"steps": self.steps, "length": LENGTH, "is_first": self.is_first, "methods": methods}
        more = {"continued": [CONTINUED_STEPS, CONTINUED_RATES, CONTINUED_REQUESTS, CONTINUED_BY]}
        return {**given, **more, "training": TRAINING | TRAININGS[self.optimizer], "storage": STORAGE[self.optimizer]}

    def config(self, rows: str, log: str) -> Config:
        return Config(
            data=DataConfig("tofu", self.data, rows, max_length=LENGTH, prompt="{question}\n"),
            model=ModelConfig(self.model),
            train=TrainConfig(**TRAINING, **TRAININGS[self.optimizer], seed=self.seed),
            log=LogConfig(STORAGE[self.optimizer], 50),  # type: ignore[arg-type]
            log_dir=f"{self.folder}/{self.name}.{log}",
        )
