"""Metrics of forgetting: by hand, against scikit-learn and scipy, and models on shards against transformers' own forward."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import VOCAB, model_config
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score

from lmc_dist.cli import main, parse
from lmc_dist.config import Config, DataConfig, EvaluateConfig, ForgetConfig
from lmc_dist.data import SampleDataset
from lmc_dist.errors import LmcError
from lmc_dist.evaluate.compare import compare
from lmc_dist.evaluate.intervals import bootstrap, mean_interval
from lmc_dist.evaluate.measure import Measured
from lmc_dist.evaluate.membership import auc, loss_score, min_k_plus_plus_score, min_k_score, privleak, zlib_score
from lmc_dist.evaluate.memorization import answer_probability, exact_memorization, extraction_strength
from lmc_dist.evaluate.model_folder import find_model, generate, greedy_texts, prompts_of, read_on_shards
from lmc_dist.evaluate.run import evaluate
from lmc_dist.evaluate.samples import TokenValues, sharded_values, token_values
from lmc_dist.evaluate.table import evaluation_table
from lmc_dist.evaluate.tofu import (
    evenness,
    forget_quality,
    model_utility,
    option_probability,
    rouge_l_recall,
    truth_ratio,
    truthfulness,
)
from lmc_dist.evaluate.tofu_data import load_questions
from lmc_dist.runtime import Runtime
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.module import ShardedModule, build_skeleton
from lmc_dist.shards.vector import ShardedVector
from lmc_dist.trajectory.exchange import this_rank

FIELDS = ("log_probs", "means", "variances", "hits")


def values_of(probabilities: list[float], hits: list[bool], variance: float = 1.0) -> TokenValues:
    log_probs = np.log(probabilities)
    return TokenValues(log_probs, np.full(len(hits), -1.0), np.full(len(hits), variance), np.array(hits))


# --- by hand -----------------------------------------------------------------------------------------------------------


def test_values_of_tokens_are_those_of_the_distribution() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    logits = torch.stack([p.log(), p.log() + 3]).expand(2, 2, 3)  # a shift of the logits changes nothing
    first, second = token_values(logits, torch.tensor([[-100, 1], [-100, 0]]))
    mean = 0.5 * math.log(0.5) + 0.5 * math.log(0.25)
    variance = 0.5 * (math.log(0.5) - mean) ** 2 + 0.5 * (math.log(0.25) - mean) ** 2
    assert first.log_probs == pytest.approx([math.log(0.25)]) and second.log_probs == pytest.approx([math.log(0.5)])
    assert first.means == pytest.approx([mean]) and first.variances == pytest.approx([variance])
    assert not first.hits[0] and second.hits[0]
    empty, whole = token_values(logits, torch.tensor([[-100, -100], [2, 0]]))  # nothing predicts the first token
    assert len(empty.hits) == 0 and len(whole.hits) == 1


def test_memorization_by_hand() -> None:
    values = values_of([0.5, 0.25, 0.5, 1.0], [True, False, True, False])  # the last is the end token
    assert answer_probability(values) == pytest.approx((0.5 * 0.25 * 0.5) ** (1 / 4))
    assert exact_memorization(values) == pytest.approx(2 / 3)
    assert extraction_strength(values) == pytest.approx(1 - 2 / 3)
    for hits, strength in (([True, True, True], 1.0), ([True, True, False], 0.0), ([False, True, True], 2 / 3)):
        assert extraction_strength(values_of([0.5] * 4, [*hits, True])) == pytest.approx(strength)
    assert exact_memorization(values_of([0.5], [True])) == 1  # a single token is no end


def test_tofu_by_hand() -> None:
    right, wrong = np.log([0.4, 0.1]), np.log([[0.2, 0.2], [0.4, 0.1]])
    assert option_probability(right, wrong) == pytest.approx([0.5, 1 / 6])
    ratio = truth_ratio(right, wrong)
    assert ratio == pytest.approx([0.5, 2.0])
    assert evenness(ratio) == pytest.approx([0.5, 0.5]) and truthfulness(ratio) == pytest.approx([0.5, 0.0])
    assert model_utility(np.array([0.5, 0.25, 1.0])) == pytest.approx(3 / 7)
    assert model_utility(np.array([0.5, 0.0])) == 0
    # "the author wrote five books" against "five books the author writes": longest common run of stems is 2 or 3 of 5
    texts = ["The author wrote five books.", "nothing of it", "five books"]
    assert rouge_l_recall(["the author wrote five book"] * 3, texts) == pytest.approx([1.0, 0.0, 0.4])


def test_membership_scores_by_hand() -> None:
    values = values_of([0.5, 0.1, 0.8, 0.2, 0.3, 0.9], [True] * 6, variance=4.0)
    assert loss_score(values) == pytest.approx(np.log([0.5, 0.1, 0.8, 0.2, 0.3, 0.9]).mean())
    assert zlib_score(values, "text") == pytest.approx(loss_score(values) / len(zlib.compress(b"text")))
    assert min_k_score(values, 0.4) == pytest.approx(np.log([0.1, 0.2]).mean())  # ⌊0.4 · 5⌋ tokens
    assert min_k_score(values, 0.1) == pytest.approx(math.log(0.1))  # at least one
    assert min_k_plus_plus_score(values, 0.4) == pytest.approx(((np.log([0.1, 0.2]) + 1) / 2).mean())
    flat = replace(values, variances=np.zeros(6))
    assert min_k_plus_plus_score(flat, 0.2) == pytest.approx((math.log(0.1) + 1) / 1e-3)


# --- against scikit-learn and scipy --------------------------------------------------------------------------------------


def test_auc_and_forget_quality_are_those_of_the_libraries() -> None:
    rng = np.random.default_rng(0)
    for n, m, decimals in ((40, 50, 9), (7, 3, 1), (400, 400, 1)):  # rounded scores are tied
        members, others = rng.normal(0.5, 1, n).round(decimals), rng.normal(0, 1, m).round(decimals)
        expected = roc_auc_score([1] * n + [0] * m, np.concatenate([members, others]))
        assert auc(members, others) == pytest.approx(expected, abs=1e-12)
    many = auc(np.stack([members, others]), np.stack([others, members]))
    assert many == pytest.approx([expected, 1 - expected], abs=1e-12)
    found, retrain = np.exp(rng.normal(0, 1, 100)), np.exp(rng.normal(0.4, 1, 80))
    test = ks_2samp(found, retrain)
    assert forget_quality(found, retrain) == (test.pvalue, test.statistic)
    inverse = forget_quality(1 / found, 1 / retrain)  # TOFU's code tests 1/R
    assert inverse == pytest.approx((test.pvalue, test.statistic), rel=1e-9)
    assert forget_quality(found, found) == (1, 0)


def test_privleak_is_zero_for_the_retrained_model_and_signed() -> None:
    assert privleak(np.array(0.6), np.array(0.6)) == 0
    assert privleak(np.array(1.0), np.array(0.5)) == pytest.approx(-100)  # nothing forgotten
    assert privleak(np.array(0.0), np.array(0.5)) == pytest.approx(100)  # too much
    assert math.isnan(privleak(np.array(0.3), np.array(1.0)))


# --- intervals -----------------------------------------------------------------------------------------------------------


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    draws = rng.exponential(2.0, size=(400, 100))
    found = [mean_interval(row, resamples=300, seed=i) for i, row in enumerate(draws)]
    covered = np.mean([x.low <= 2 <= x.high for x in found])
    assert 0.90 <= covered <= 0.97  # 0.95; of a skew distribution a little less
    width = np.mean([x.high - x.low for x in found])
    assert width == pytest.approx(2 * 1.96 * 2 / 10, rel=0.06)
    assert [x.value for x in found] == pytest.approx(draws.mean(-1))


def test_two_models_are_resampled_in_pairs() -> None:
    scores = np.random.default_rng(2).normal(0, 1, 200)
    other = scores + 0.5

    def difference(rows: np.ndarray) -> np.ndarray:
        return other[rows].mean(-1) - scores[rows].mean(-1)

    paired = bootstrap(difference, [200])
    apart = bootstrap(lambda a, b: other[a].mean(-1) - scores[b].mean(-1), [200, 200])
    assert (paired.low, paired.high) == pytest.approx((0.5, 0.5))
    assert apart.high - apart.low > 0.3
    assert bootstrap(difference, [200], seed=5) == bootstrap(difference, [200], seed=5)


def measured(seed: int, forget: int = 30, holdout: int = 20) -> Measured:
    rng = np.random.default_rng(seed)
    attacks = ("loss", "zlib", "min_k", "min_k_plus_plus")
    ratios = np.exp(rng.normal(0, 1, forget))
    return Measured(
        {"probability": rng.random(forget), "truth_ratio": evenness(ratios), "rouge_l": rng.random(forget)},
        ratios,
        {name: rng.normal(1, 1, forget) for name in attacks},
        {name: rng.normal(0, 1, holdout) for name in attacks},
        {
            name: {metric: rng.random(12) for metric in ("probability", "truth_ratio", "rouge_l")}
            for name in ("retain", "real_authors", "world_facts")
        },
    )


def test_comparison_with_the_retrained_model() -> None:
    retrain, other = measured(0), measured(1)
    itself, found = compare(retrain, retrain, 100), compare(other, retrain, 100)
    zero = {"value": 0.0, "low": 0.0, "high": 0.0}
    for group in ("forget", "auc"):
        assert all(x["distance"] == zero for x in itself[group].values())
    assert all(x == zero for x in itself["privleak"].values())
    assert itself["forget_quality"] == {"p_value": 1.0, "ks_statistic": 0.0}
    own, reference = (
        roc_auc_score([1] * 30 + [0] * 20, [*x.members["zlib"], *x.holdout["zlib"]]) for x in (other, retrain)
    )
    assert found["auc"]["zlib"]["distance"]["value"] == pytest.approx(own - reference)
    assert found["privleak"]["zlib"]["value"] == pytest.approx(100 * (reference - own) / (1 - reference))
    for x in (*found["auc"].values(), *found["forget"].values()):
        assert (
            x["low"] < x["value"] < x["high"] and x["distance"]["low"] < x["distance"]["value"] < x["distance"]["high"]
        )
    nine = [x.mean() for scores in other.utility.values() for x in scores.values()]
    assert found["model_utility"]["value"] == pytest.approx(9 / sum(1 / x for x in nine))
    sure = measured(2)
    sure = replace(sure, members={k: v + 100 for k, v in sure.members.items()})  # AUC 1: no leak can be told
    assert compare(other, sure, 50)["privleak"]["loss"] == {"value": None, "low": None, "high": None}
    json.dumps(found, allow_nan=False)


# --- TOFU's files ----------------------------------------------------------------------------------------------------------


def test_questions_of_tofu(test_data: Path, tmp_path: Path) -> None:
    folder = test_data / "tofu"
    questions = load_questions(folder, range(3600, 4000), range(4000))
    sizes = {name: len(asked) for name, asked in vars(questions).items()}
    assert sizes == {"forget": 400, "retain": 400, "real_authors": 100, "world_facts": 117, "holdout": 400}
    assert [q.id for q in questions.forget] == list(range(3600, 4000)) and questions.retain[-1].id == 399
    assert {len(q.wrong) for q in questions.forget} == {5} and {len(q.wrong) for q in questions.real_authors} == {3}
    assert questions.forget[0].right != questions.forget[0].answer
    assert questions.world_facts[0].right == questions.world_facts[0].answer == "Paris"
    partly = load_questions(folder, range(3960, 4000), range(2000, 4000), limit=10)  # as configs/tofu.yaml trains
    assert [len(asked) for asked in vars(partly).values()] == [10] * 5
    assert [q.id for q in partly.forget[:2]] == [3960, 3964] and [q.id for q in partly.retain[:2]] == [3600, 3636]
    with pytest.raises(LmcError, match="none of the rows to forget"):
        load_questions(folder, [2000], range(4000))
    with pytest.raises(LmcError, match="no retained row"):
        load_questions(folder, [3999], range(2000, 3600))
    for name in ("full", "forget10_perturbed", "retain_perturbed"):
        (tmp_path / f"{name}.jsonl").write_text((folder / f"{name}.jsonl").read_text().replace("Yun-Hwa", name, 1))
    with pytest.raises(LmcError, match=r"forget10_perturbed\.jsonl, row \d+: not a row of full"):
        load_questions(tmp_path, [3999], range(4000))


# --- models on shards --------------------------------------------------------------------------------------------------------


def random_samples(count: int) -> SampleDataset:
    generator = torch.Generator().manual_seed(0)
    items = []
    for i in range(count):
        ids = torch.randint(2, VOCAB, (4 + i % 7,), generator=generator).tolist()
        items.append({"index": 10 * i, "input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return SampleDataset(items, 0)


def check_sharded_values(kind: str, count: int) -> float:
    """The largest difference to one sample at a time through the whole model."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(model_config(kind)).eval()
    for parameter in model.parameters():  # far from uniform predictions
        parameter.data += 0.3 * torch.randn_like(parameter)
    skeleton = build_skeleton(model_config(kind))
    layout = ShardLayout.of_module(skeleton)
    module = ShardedModule(skeleton, layout)
    theta = ShardedVector.from_full(layout, model.get_parameter)
    dataset, worst = random_samples(count), 0.0
    found = sharded_values(module, theta, dataset, batch_size=2)
    assert len(found) == count
    for item, values in zip(dataset.by_id(dataset.ids), found, strict=True):
        log_p = model(torch.tensor([item["input_ids"]])).logits[0, 1:-1].log_softmax(-1).double().detach()
        targets = torch.tensor(item["input_ids"][2:])
        means = (log_p.exp() * log_p).sum(-1)
        plain = {
            "log_probs": log_p.gather(-1, targets[:, None])[:, 0],
            "means": means,
            "variances": (log_p.exp() * log_p.square()).sum(-1) - means.square(),
            "hits": log_p.argmax(-1) == targets,
        }
        for name in FIELDS:
            assert len(getattr(values, name)) == len(targets)
            worst = max(worst, float(np.abs(getattr(values, name) - plain[name].numpy().astype(float)).max()))
    return worst


def test_sharded_values_are_those_of_the_whole_model(ranks: Any) -> None:
    for kind, count in (("llama-tied", 9), ("gpt2-untied", 1)):  # of the last, one rank has none
        for worst in (check_sharded_values(kind, count), *ranks(2).run(check_sharded_values, kind, count)):
            assert worst <= 1e-5


# --- the command -------------------------------------------------------------------------------------------------------------


def evaluation_config(data: Path, work: Path, **changes: Any) -> Config:
    settings = {
        "models": f"same={work / 'same'},noisy={work / 'run'}",
        "retrain": str(data / "models" / "stories260K"),
        "limit": 3,
        "batch_size": 16,
        "max_new_tokens": 4,
        "resamples": 50,
    }
    return Config(
        data=DataConfig(source="tofu", path=str(data / "tofu"), rows="3600:4000"),
        forget=ForgetConfig(split="forget01"),
        evaluate=EvaluateConfig(**{**settings, **changes}),
        json=str(work / "found.json"),
    )


def evaluation_job(config: Config) -> tuple[dict[str, Any], str]:
    result = evaluate(config, Runtime(*this_rank(), torch.device("cpu")))
    return result, evaluation_table(result)


def read_job(folder: str, dataset: SampleDataset) -> tuple[list[TokenValues], list[str]]:
    found = find_model(folder)
    module, theta = read_on_shards(found)
    return sharded_values(module, theta, dataset, 4), greedy_texts(found, prompts_of(dataset), 6, 2)


def test_evaluation_of_folders(ranks: Any, test_data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = test_data / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [("Once", "there was a cat."), ("Why did the dog run away from home", "Because."), ("Who", "Tom and Lily")]
    rows = [{"id": i, "question": q, "answer": a} for i, (q, a) in enumerate(texts)]
    dataset = SampleDataset.from_rows(rows, tokenizer, 64, "{question} ")
    with torch.no_grad():
        for said in ranks(2).run(read_job, str(folder), dataset):
            for item, values, text in zip(dataset.by_id(dataset.ids), *said, strict=True):
                loss = model(torch.tensor([item["input_ids"]]), labels=torch.tensor([item["labels"]])).loss
                assert -values.log_probs.mean() == pytest.approx(float(loss), abs=1e-5)
                ids = list(prompts_of(dataset)[item["index"]])
                for _ in range(6):  # greedy, written out
                    ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                    if ids[-1] == tokenizer.eos_token_id:
                        break
                new = ids[len(prompts_of(dataset)[item["index"]]) :]
                assert text == tokenizer.decode(new, skip_special_tokens=True).strip()

    model.save_pretrained(tmp_path / "same")
    tokenizer.save_pretrained(tmp_path / "same")
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "run" / "model")  # where an unlearning run leaves it
    tokenizer.save_pretrained(tmp_path / "run" / "model")
    settings = json.loads((tmp_path / "same" / "config.json").read_text())
    (tmp_path / "wrong").mkdir()
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "wrong" / name).symlink_to(tmp_path / "same" / name)
    for change in ({"num_hidden_layers": settings["num_hidden_layers"] + 1}, {"intermediate_size": 8}):
        (tmp_path / "wrong" / "config.json").write_text(json.dumps(settings | change))
        with pytest.raises(LmcError, match="are not those of its config"):
            read_on_shards(find_model(tmp_path / "wrong"))
    config = evaluation_config(test_data, tmp_path)
    (two, table), (other, _) = ranks(2).run(evaluation_job, config)
    assert two == other == json.loads(Path(str(config.json)).read_text())
    assert two["questions"] == {"forget": 3, "retain": 3, "real_authors": 3, "world_facts": 3, "holdout": 3}
    same, noisy = two["results"]["same"], two["results"]["noisy"]
    assert all(x["distance"]["value"] == 0 for x in (*same["forget"].values(), *same["auc"].values()))
    assert all(x["value"] in (0, None) for x in same["privleak"].values()) and same["forget_quality"]["p_value"] == 1
    assert noisy["forget"]["probability"]["distance"]["value"] != 0
    assert "noisy − retrain" in table and "model utility" in table and "lower is better" not in table
    one, _ = evaluation_job(replace(config, evaluate=replace(config.evaluate, generate=False)))  # by one process
    assert one["results"]["noisy"]["model_utility"] is None and "rouge_l" not in one["results"]["noisy"]["forget"]
    for metric, value in one["results"]["noisy"]["forget"].items():  # other batches, the same numbers
        assert value["value"] == pytest.approx(noisy["forget"][metric]["value"], abs=1e-5)


def test_greedy_text_ignores_the_models_own_settings() -> None:
    from transformers import AutoModelForCausalLM

    class Tokenizer:
        pad_token_id, eos_token_id, bos_token_id = None, 1, 0

        def batch_decode(self, rows: torch.Tensor, skip_special_tokens: bool) -> list[str]:
            return [" ".join(map(str, row)) for row in rows.tolist()]

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config("gpt2-tied")).eval()
    plain = generate(model, Tokenizer(), [[3, 4, 5], [6]], 5)
    model.generation_config.repetition_penalty, model.generation_config.do_sample = 5.0, True
    assert generate(model, Tokenizer(), [[3, 4, 5], [6]], 5) == plain
    assert len(generate(model, Tokenizer(), [[2] * 30], 5)[0].split()) == 2  # no further than the model's positions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retrain": None}, "evaluate.retrain is missing"),
        ({"models": ""}, "say which models"),
        ({"models": "retrain=x"}, "two models are called 'retrain'"),
        ({"models": "nowhere"}, "no model in nowhere"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"min_k": 0.0}, "min_k must be in"),
        ({"resamples": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_evaluated_is_said_first(
    test_data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(LmcError, match=message):
        evaluate(evaluation_config(test_data, tmp_path, **changes), Runtime(0, 1, torch.device("cpu")))


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse(
        "evaluate", ["a=x", "b=y", "--evaluate.retrain", "z", "--forget.split", "forget05", "--json", "f.json"]
    )
    assert (config.evaluate.models, config.evaluate.retrain, config.forget.split) == ("a=x,b=y", "z", "forget05")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "evaluate" in capsys.readouterr().out
