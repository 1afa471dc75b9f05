"""The question sets of TOFU as its folder has them: forgotten, retained, real authors, world facts, holdout.

`full.jsonl` gives the ids. `forget10_perturbed.jsonl` and `retain_perturbed.jsonl` are rows of it with a paraphrase of the
answer and five wrong answers; `real_authors_perturbed.jsonl` and `world_facts_perturbed.jsonl` have three wrong answers and
no paraphrase; `holdout10.jsonl` are authors that no model was trained on.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmc_dist.config import Config, DataConfig
from lmc_dist.data import load_rows, named_splits, read_ids
from lmc_dist.errors import LmcError


@dataclass(frozen=True)
class Question:
    """A question with its answers.

    Attributes:
        id: Row of full.jsonl, or of its own file for the sets that are not in it.
        text: The question.
        answer: As trained on.
        right: A paraphrase of the answer, or the answer where there is none.
        wrong: Wrong answers, as many for each question of a set.
    """

    id: int
    text: str
    answer: str
    right: str
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class TofuQuestions:
    """The sets a model is asked.

    Attributes:
        forget: Those among the forgotten rows that have wrong answers to compare with.
        retain: Rows that were trained on and not forgotten.
        real_authors: On real authors.
        world_facts: On the world.
        holdout: On invented authors that are in no training set.
    """

    forget: list[Question]
    retain: list[Question]
    real_authors: list[Question]
    world_facts: list[Question]
    holdout: list[Question]


def load_questions(
    folder: str | Path, forgotten: Collection[int], trained: Collection[int], limit: int | None = None
) -> TofuQuestions:
    """Reads TOFU's question sets. Local.

    Retained questions are those of retain_perturbed.jsonl that were trained on; where none of them was, the trained ones of
    forget10_perturbed.jsonl that were not forgotten.

    Args:
        folder: With TOFU's files.
        forgotten: Ids of the rows to forget.
        trained: Ids of the rows of the training set.
        limit: Questions of each set at most, evenly over it.

    Raises:
        LmcError: A file is missing or not TOFU's, or a set would be empty.
    """
    places = {(row["question"], row["answer"]): row["id"] for row in _rows(folder, "full")}
    last, first = (_questions(folder, name, places) for name in ("forget10_perturbed", "retain_perturbed"))
    forgotten, trained = set(forgotten), set(trained)
    forget = [q for q in (*last, *first) if q.id in forgotten]
    if not forget:
        raise LmcError(
            "none of the rows to forget has wrong answers in forget10_perturbed.jsonl or retain_perturbed.jsonl"
        )
    kept = trained - forgotten
    retain = [q for q in first if q.id in kept] or [q for q in last if q.id in kept]
    if not retain:
        raise LmcError("no retained row has wrong answers: data.rows must cover rows 0–399 or other rows of 3600–3999")
    sets = [forget, retain, *(_questions(folder, f"{name}_perturbed") for name in ("real_authors", "world_facts"))]
    holdout = [Question(r["id"], r["question"], r["answer"], r["answer"], ()) for r in _rows(folder, "holdout10")]
    return TofuQuestions(*(_thinned(questions, limit) for questions in (*sets, holdout)))


def forgotten_ids(config: Config) -> list[int]:
    """Ids of the rows that a configuration asks to forget. Local.

    Raises:
        LmcError: Neither samples nor a split, or both, or a split that the data does not have.
    """
    forget = config.forget
    if forget.batches is not None or (forget.samples is None) == (forget.split is None):
        raise LmcError("say which rows were forgotten: forget.samples or forget.split, one of them")
    if forget.samples is not None:
        return read_ids(str(forget.samples))
    splits = named_splits(config.data, [row["id"] for row in load_rows(config.data)])
    if forget.split not in splits:
        raise LmcError(f"unknown split '{forget.split}'; the data has {', '.join(sorted(splits))}")
    return splits[forget.split]


def _rows(folder: str | Path, name: str) -> list[dict[str, Any]]:
    return load_rows(DataConfig(source="jsonl", path=str(Path(folder) / f"{name}.jsonl")))


def _questions(folder: str | Path, name: str, places: dict[tuple[str, str], int] | None = None) -> list[Question]:
    """Questions with wrong answers; their ids are those of `places` where it is given."""
    found: list[Question] = []
    for row in _rows(folder, name):
        where = f"{Path(folder) / name}.jsonl, row {row['id'] + 1}"
        wrong, number = row.get("perturbed_answer"), row["id"]
        if not isinstance(wrong, list) or not wrong or not all(isinstance(text, str) for text in wrong):
            raise LmcError(f"{where}: no list of texts under 'perturbed_answer'")
        if found and len(wrong) != len(found[0].wrong):
            raise LmcError(f"{where}: {len(wrong)} wrong answers, {len(found[0].wrong)} in the rows before")
        if places is not None:
            if (row["question"], row["answer"]) not in places:
                raise LmcError(f"{where}: not a row of full.jsonl; are the files of one version of TOFU?")
            number = places[row["question"], row["answer"]]
        right = row.get("paraphrased_answer", row["answer"])
        found.append(Question(number, row["question"], row["answer"], right, tuple(wrong)))
    return found


def _thinned(questions: Sequence[Question], limit: int | None) -> list[Question]:
    size = len(questions) if limit is None else min(limit, len(questions))
    return [questions[i * len(questions) // size] for i in range(size)]
