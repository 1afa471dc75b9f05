"""What a cell's result depends on: equal settings, written otherwise, are the same cell, and what has no effect is left out.

A method looks at some settings only (K means nothing to replay), and some settings make one method another (a head through
all steps is replay, no curvature is the first-order rollback). Cells are compared after that.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from lmc_dist.config import Config, UnlearnConfig
from lmc_dist.digest import json_digest
from lmc_dist.errors import LmcError

BASELINES = ("retain", "ga", "graddiff", "npo")
CORRECTIONS = ("lmcleaner", "tim", "replay")

# Of `unlearn`: what matters to every recursion, and what to one mode of it.
_RECURSION = ("hessian_mode", "K", "damping", "replay_head", "tol", "units", "update")
_MODES = {"diag": ("probes",), "low_rank": ("rank", "base", "refresh", "curvature")}
# Of `evaluate`: what is given by the cell itself.
_GIVEN = ("models", "retrain")


@dataclass(frozen=True)
class Identity:
    """A cell, told from others.

    Attributes:
        method: As `cell.method`, after settings that make it another one.
        seed: Of training.
        data_seed: Of generated data.
        split: What is forgotten.
        variant: What tells it from others of the same method, seed and split, as text; the same for all seeds and splits.
        label: Method and variant in words.
        settings: All that its result depends on, but for code and machine.
        config: The cell's settings, after the same changes.
    """

    method: str
    seed: int
    data_seed: int
    split: str
    variant: str
    label: str
    settings: dict[str, Any]
    config: Config

    @property
    def digest(self) -> str:
        return json_digest(self.settings)

    @property
    def name(self) -> str:
        """Of its folder."""
        split = "".join(c if c.isalnum() or c in "-_" else "_" for c in self.split)[:40]
        variant = f"-{self.variant}" if self.variant else ""
        return f"{split}-seed{self.seed}-{self.method}{variant}-{self.digest[:8]}"


def training_settings(config: Config) -> dict[str, Any]:
    """What the logged training run depends on."""
    return {name: asdict(getattr(config, name)) for name in ("data", "model", "train", "log")}


def retrain_settings(config: Config) -> dict[str, Any]:
    """What the retrain depends on."""
    return {name: asdict(getattr(config, name)) for name in ("data", "model", "train", "forget")}


def identify(config: Config) -> Identity:
    """The cell that settings describe. Local.

    Raises:
        LmcError: Settings that no cell can have.
    """
    config = normalized(config)
    cell, method = config.cell, config.cell.method
    settings: dict[str, Any] = {"method": method, **retrain_settings(config)}
    if method in CORRECTIONS:  # training itself goes the same way however it is logged
        settings["log"] = asdict(config.log)
    if cell.evaluate:
        settings["evaluate"] = {k: v for k, v in asdict(config.evaluate).items() if k not in _GIVEN}
    parts: list[str] = []
    words = [_WORDS[method]]
    if method == "lmcleaner":
        settings["unlearn"] = {key: getattr(config.unlearn, key) for key in _names(config.unlearn)}
        variant, told = _described(config.unlearn)
        parts, words = parts + variant, words + told
    if cell.post_epochs:
        settings["post_epochs"] = cell.post_epochs
        parts, words = [*parts, f"post{cell.post_epochs}"], [*words, f"then {cell.post_epochs} epochs on retained"]
    if method in BASELINES or cell.post_epochs:
        settings["baseline"] = {key: getattr(config.baseline, key) for key in _baseline_names(config)}
        if method in BASELINES:
            parts, words = [*parts, *_told(config)[0]], [*words, *_told(config)[1]]
    split = next(str(x) for x in (config.forget.split, config.forget.samples, config.forget.batches) if x is not None)
    where = config.train.seed, config.data.seed if config.data.source == "generated" else 0
    return Identity(method, *where, split, "-".join(parts), ", ".join(words), settings, config)


_WORDS = {
    "do_nothing": "do nothing",
    "retrain": "retrain",
    "replay": "exact replay",
    "tim": "first-order rollback (TIM)",
    "lmcleaner": "LMCleaner",
    "retain": "fine-tuning on retained",
    "ga": "gradient ascent",
    "graddiff": "GradDiff",
    "npo": "NPO",
}


def normalized(config: Config) -> Config:
    """Settings without what has no effect on the cell's method. Local.

    Raises:
        LmcError: Nothing to forget, or post_epochs where there is nothing to go on from.
    """
    forget, cell, unlearn = config.forget, config.cell, config.unlearn
    if sum(x is not None for x in (forget.samples, forget.split, forget.batches)) != 1:
        raise LmcError("a cell needs one of forget.split, forget.samples and forget.batches")
    if cell.post_epochs < 0:
        raise LmcError(f"cell.post_epochs must be ≥ 0, got {cell.post_epochs}")
    if unlearn.strategy != "given" or unlearn.undo or unlearn.add:
        raise LmcError("a cell does what its settings say: unlearn.strategy, undo and add are not for sweeps")
    method = cell.method
    if method == "lmcleaner" and unlearn.replay_head == "all":
        method = "replay"
    elif method == "lmcleaner" and _is_rollback(unlearn):
        method = "tim"
    if method == "replay":
        unlearn = UnlearnConfig(replay_head="all")
    elif method == "tim":
        unlearn = UnlearnConfig(hessian_mode="none")
    elif method != "lmcleaner":
        unlearn = UnlearnConfig()
    if cell.post_epochs and method not in CORRECTIONS:
        cell = replace(cell, post_epochs=0)
    return replace(config, cell=replace(cell, method=method), unlearn=unlearn)


def _is_rollback(unlearn: UnlearnConfig) -> bool:
    """Whether a recursion is the first-order rollback through all steps."""
    plain = UnlearnConfig(hessian_mode="none")
    return all(getattr(unlearn, key) == getattr(plain, key) for key in _RECURSION)


def _names(unlearn: UnlearnConfig) -> list[str]:
    """Settings of a recursion that matter."""
    found = [*_RECURSION, *_MODES.get(unlearn.hessian_mode, ())]
    return [*found, "head_tolerance"] if unlearn.replay_head == "auto" else found


def _described(unlearn: UnlearnConfig) -> tuple[list[str], list[str]]:
    """A recursion in parts of a name, and in words."""
    K = "all" if unlearn.K is None else str(unlearn.K)
    parts, words = [unlearn.hessian_mode, f"K{K}"], [unlearn.hessian_mode, f"K={K}"]
    if unlearn.damping:
        parts, words = [*parts, f"d{unlearn.damping:g}"], [*words, f"λ={unlearn.damping:g}"]
    if unlearn.replay_head:
        parts, words = [*parts, f"head{unlearn.replay_head}"], [*words, f"head {unlearn.replay_head}"]
    plain = UnlearnConfig()
    for key in _names(unlearn):
        if key not in ("hessian_mode", "K", "damping", "replay_head") and getattr(unlearn, key) != getattr(plain, key):
            value = getattr(unlearn, key)
            parts, words = [*parts, f"{key}{str(value).replace('/', '_')}"], [*words, f"{key} {value}"]
    return parts, words


def _baseline_names(config: Config) -> list[str]:
    """Settings of a baseline that matter; its method and its start are the cell's."""
    left_out = {"method", "start"}
    if config.cell.post_epochs:
        left_out |= {"epochs"}
    if config.cell.method != "npo":
        left_out |= {"beta"}
    if config.cell.method not in ("graddiff", "npo"):
        left_out |= {"retain_weight"}
    return [key for key in asdict(config.baseline) if key not in left_out]


def _told(config: Config) -> tuple[list[str], list[str]]:
    """A baseline's settings that one may want to vary, in parts of a name and in words."""
    baseline = config.baseline
    parts, words = (
        [f"e{baseline.epochs}", f"lr{baseline.learning_rate:g}"],
        [f"{baseline.epochs} epochs", f"η={baseline.learning_rate:g}"],
    )
    if config.cell.method == "npo":
        parts, words = [*parts, f"b{baseline.beta:g}"], [*words, f"β={baseline.beta:g}"]
    if config.cell.method in ("graddiff", "npo"):
        parts, words = [*parts, f"a{baseline.retain_weight:g}"], [*words, f"α={baseline.retain_weight:g}"]
    return parts, words
