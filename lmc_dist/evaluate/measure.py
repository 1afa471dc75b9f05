"""One model asked all of TOFU's questions: a number for each question and metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from lmc_dist.config import Config
from lmc_dist.data import SampleDataset
from lmc_dist.evaluate.membership import loss_score, min_k_plus_plus_score, min_k_score, zlib_score
from lmc_dist.evaluate.memorization import (
    answer_probability,
    exact_memorization,
    extraction_strength,
    mean_log_prob,
)
from lmc_dist.evaluate.model_folder import ModelFolder, greedy_texts, prompts_of, read_on_shards
from lmc_dist.evaluate.samples import TokenValues, sharded_values
from lmc_dist.evaluate.tofu import evenness, option_probability, rouge_l_recall, truth_ratio, truthfulness
from lmc_dist.evaluate.tofu_data import Question, TofuQuestions
from lmc_dist.runtime import agreement

UTILITY_SETS = ("retain", "real_authors", "world_facts")
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus")


@dataclass(frozen=True)
class Measured:
    """What a model scores; every array has one number a question.

    Attributes:
        forget: Metric → (N,) on forgotten questions.
        truth_ratios: (N,) of the forgotten questions.
        members: Attack → (N,) scores of the forgotten answers.
        holdout: Attack → (M,) scores of answers that no model was trained on.
        utility: Set → metric → (n,); `rouge_l` only where texts were generated.
    """

    forget: dict[str, np.ndarray]
    truth_ratios: np.ndarray
    members: dict[str, np.ndarray]
    holdout: dict[str, np.ndarray]
    utility: dict[str, dict[str, np.ndarray]]


@dataclass
class Sheet:
    """Rows to evaluate, put together so that the model goes over all of them at once."""

    rows: list[dict[str, object]] = field(default_factory=list)

    def add(self, questions: Sequence[Question], answers: Sequence[str]) -> slice:
        """Adds one answer to each question; where their values will be."""
        start = len(self.rows)
        for question, answer in zip(questions, answers, strict=True):
            self.rows.append({"id": len(self.rows), "question": question.text, "answer": answer})
        return slice(start, len(self.rows))


def measure(found: ModelFolder, questions: TofuQuestions, config: Config, device: torch.device) -> Measured:
    """Asks a model everything. Collective.

    Raises:
        LmcError: On every rank: the checkpoint's weights are not those of its config, or an answer is cut off whole.
    """
    settings, sheet = config.evaluate, Sheet()
    sets = {"forget": questions.forget, **{name: getattr(questions, name) for name in UTILITY_SETS}}
    answers = {name: sheet.add(asked, [q.answer for q in asked]) for name, asked in sets.items()}
    spoken = len(sheet.rows)  # these are asked for texts as well
    rights = {name: sheet.add(asked, [q.right for q in asked]) for name, asked in sets.items()}
    wrongs = {
        name: sheet.add([q for q in asked for _ in q.wrong], [text for q in asked for text in q.wrong])
        for name, asked in sets.items()
    }
    outside = sheet.add(questions.holdout, [q.answer for q in questions.holdout])
    with agreement():
        dataset = SampleDataset.from_rows(sheet.rows, found.tokenizer, config.data.max_length, config.data.prompt)
        module, theta = read_on_shards(found, device)
    values = sharded_values(module, theta, dataset, settings.batch_size)
    del module, theta
    log_probs = np.array([mean_log_prob(value) for value in values])
    right = {name: log_probs[rows] for name, rows in rights.items()}
    wrong = {name: log_probs[rows].reshape(len(sets[name]), -1) for name, rows in wrongs.items()}
    ratios = {name: truth_ratio(right[name], wrong[name]) for name in sets}

    known = values[answers["forget"]]
    forget = {
        "probability": np.array([answer_probability(value) for value in known]),
        "truth_ratio": evenness(ratios["forget"]),
        "extraction_strength": np.array([extraction_strength(value) for value in known]),
        "exact_memorization": np.array([exact_memorization(value) for value in known]),
    }
    utility = {}
    for name in UTILITY_SETS:
        alone = log_probs[answers[name]]
        probability = np.exp(alone) if name == "retain" else option_probability(alone, wrong[name])
        utility[name] = {"probability": probability, "truth_ratio": truthfulness(ratios[name])}
    if settings.generate:
        texts = greedy_texts(found, prompts_of(dataset)[:spoken], settings.max_new_tokens, settings.batch_size, device)
        for name, scores in (("forget", forget), *utility.items()):
            scores["rouge_l"] = rouge_l_recall([q.answer for q in sets[name]], texts[answers[name]])
    return Measured(
        forget,
        ratios["forget"],
        attack_scores(known, questions.forget, settings.min_k),
        attack_scores(values[outside], questions.holdout, settings.min_k),
        utility,
    )


def attack_scores(
    values: Sequence[TokenValues], questions: Sequence[Question], fraction: float
) -> dict[str, np.ndarray]:
    """Attack → scores of the questions' answers. Local."""
    scores = [
        (loss_score(v), zlib_score(v, q.answer), min_k_score(v, fraction), min_k_plus_plus_score(v, fraction))
        for v, q in zip(values, questions, strict=True)
    ]
    return dict(zip(ATTACKS, np.array(scores).T, strict=True))
