"""`lmc evaluate`: the original, the unlearned and the retrained model on TOFU, side by side."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lmc_dist.config import Config
from lmc_dist.data import load_rows
from lmc_dist.errors import LmcError
from lmc_dist.evaluate.model_folder import ModelFolder, find_model
from lmc_dist.evaluate.tofu_data import forgotten_ids, load_questions
from lmc_dist.log_commands.text import check_target, write_findings
from lmc_dist.runtime import Runtime, agreement

NEEDED = {"scipy": "scipy", "rouge_score": "rouge-score"}
RETRAIN = "retrain"


def evaluate(config: Config, runtime: Runtime) -> dict[str, Any]:
    """Evaluates the model folders of a configuration against the retrained one; writes JSON where asked for. Collective.

    Raises:
        LmcError: On every rank, before any model is loaded: a folder without a model, data that is not TOFU's, settings out
            of bounds, or a library that is not installed.
    """
    with agreement():
        check_settings(config)
        folders = {RETRAIN: find_model(str(config.evaluate.retrain)), **named_models(config.evaluate.models)}
        forgotten = forgotten_ids(config)
        trained = [row["id"] for row in load_rows(config.data)]
        questions = load_questions(str(config.data.path), forgotten, trained, config.evaluate.limit)
    from lmc_dist.evaluate.compare import compare
    from lmc_dist.evaluate.measure import measure

    found = {name: measure(folder, questions, config, runtime.device) for name, folder in folders.items()}
    with agreement():
        result = {
            "models": {name: str(folder.path) for name, folder in folders.items()},
            "forgotten_rows": len(forgotten),
            "questions": {name: len(asked) for name, asked in vars(questions).items()},
            "retained_rows": [min(q.id for q in questions.retain), max(q.id for q in questions.retain)],
            "confidence": 0.95,
            "results": {name: compare(x, found[RETRAIN], config.evaluate.resamples) for name, x in found.items()},
        }
        if runtime.is_main:
            write_findings(config.json, result)
    return result


def check_settings(config: Config) -> None:
    """Checks what does not need the files. Local.

    Raises:
        LmcError: A setting out of bounds, or a library that is not installed.
    """
    settings = config.evaluate
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise LmcError(f"evaluation needs {' and '.join(missing)}: pip install 'lmc_dist[evaluate]'")
    if config.data.source != "tofu" or config.data.path is None or not Path(config.data.path).is_dir():
        raise LmcError("evaluation asks TOFU's questions: data.source 'tofu' and data.path, the folder with its files")
    if settings.retrain is None:
        raise LmcError("evaluate.retrain is missing: forgetting is measured as the distance to the retrained model")
    if settings.batch_size < 1 or settings.max_new_tokens < 1 or settings.resamples < 1:
        raise LmcError("evaluate.batch_size, max_new_tokens and resamples must be at least 1")
    if settings.limit is not None and settings.limit < 1:
        raise LmcError(f"evaluate.limit must be at least 1, got {settings.limit}")
    if not 0 < settings.min_k <= 1:
        raise LmcError(f"evaluate.min_k must be in (0, 1], got {settings.min_k}")
    check_target("--json", config.json)


def named_models(spec: str) -> dict[str, ModelFolder]:
    """The models of `name=folder,name=folder`; a folder by itself is called by its last part. Local.

    Raises:
        LmcError: None, a name that is taken, or a folder without a model.
    """
    found: dict[str, ModelFolder] = {}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        name, equals, folder = part.partition("=")
        name, folder = (name, folder) if equals else (Path(part).name, part)
        if name in found or name == RETRAIN:
            raise LmcError(f"evaluate.models: two models are called '{name}'; give names: name=folder,name=folder")
        found[name] = find_model(folder)
    if not found:
        raise LmcError("say which models to evaluate: evaluate.models name=folder,name=folder")
    return found
