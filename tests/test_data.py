"""Sources, ids, tokenisation, fingerprints and the order of batches."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc_dist.data import (
    IGNORED,
    Collator,
    SampleDataset,
    collate,
    epoch_order,
    generate_biographies,
    load_dataset,
    load_rows,
    named_splits,
    read_ids,
    split_batch,
    train_tokenizer,
)
from lmc_dist.errors import LmcError

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("LMC_TEST_DATA", ROOT.parent / "shared" / "data"))
PROMPT = "Question: {question}\nAnswer: "
PINNED = [
    {
        "id": 0,
        "question": "Who was married to Orvena Corgraquist?",
        "answer": "Orvena Corgraquist married Torbadan Ortawick.",
        "person": 0,
    },
    {
        "id": 1,
        "question": "Which instrument did Orvena Corgraquist play?",
        "answer": "Orvena Corgraquist played the harp.",
        "person": 0,
    },
]
ORDER = [0, 40, 10, 50, 70, 60, 30, 20]
needs_tofu = pytest.mark.skipif(not (DATA / "tofu/full.jsonl").is_file(), reason="LMC_TEST_DATA has no tofu/full.jsonl")
needs_model = pytest.mark.skipif(
    not (DATA / "models/stories260K/tokenizer.json").is_file(), reason="LMC_TEST_DATA has no models/stories260K"
)


@dataclass
class Config:
    """The attributes of `lmc_dist.config.DataConfig`."""

    source: str = "generated"
    path: str | None = None
    rows: str | None = None
    people: int = 12
    facts_per_person: int = 5
    seed: int = 0
    max_length: int = 256
    prompt: str = PROMPT


def jsonl(path: Path, *values: object) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return str(path)


def pair(**more: object) -> dict[str, object]:
    return {"question": "Who?", "answer": "Me.", **more}


@pytest.fixture(scope="module")
def rows():
    return load_rows(Config())


@pytest.fixture(scope="module")
def tokenizer(rows):
    return train_tokenizer((row["question"] + row["answer"] for row in rows), 400)


@pytest.fixture(scope="module")
def dataset(rows, tokenizer):
    return SampleDataset.from_rows(rows, tokenizer, 256, PROMPT)


def test_import_is_light():
    script = (
        "import sys, lmc_dist.data; print([m for m in ('transformers', 'tokenizers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class TestBiographies:
    def test_deterministic_and_seeded(self):
        assert generate_biographies(6, 7, 3) == generate_biographies(6, 7, 3)
        assert generate_biographies(6, 7, 3) != generate_biographies(6, 7, 4)
        # More people leave the earlier ones as they are.
        assert generate_biographies(9, 7, 3)[: 6 * 7] == generate_biographies(6, 7, 3)

    def test_pinned(self):
        """The corpus is part of every logged run: a change of words or of the draws must not go unnoticed."""
        assert generate_biographies(1, 2, 0) == PINNED

    def test_rows(self):
        rows = generate_biographies(300, 20, 1)
        assert [row["id"] for row in rows] == [person * 100 + fact for person in range(300) for fact in range(20)]
        assert all(row["person"] == row["id"] // 100 for row in rows)
        assert len({row["question"] for row in rows}) == len(rows)  # names are unique, and so are a person's facts
        assert not any(set("{}|=") & set(row["question"] + row["answer"]) for row in rows)
        assert len({row["answer"] for row in rows}) > len(rows) / 3  # answers are not guessable from the question

    @pytest.mark.parametrize(("people", "facts", "field"), [(0, 5, "people"), (5, 0, "facts"), (5, 21, "facts")])
    def test_errors(self, people, facts, field):
        with pytest.raises(LmcError, match=rf"data\.{field}.*choose"):
            generate_biographies(people, facts, 0)


class TestLoadRows:
    def test_range_keeps_ids(self, rows):
        assert load_rows(Config(rows="7:12")) == rows[7:12]
        assert [row["id"] for row in load_rows(Config(rows="58:"))] == [1103, 1104]
        assert load_rows(Config(rows=":3")) == rows[:3]
        assert load_rows(Config(rows=":3, 7:9,58:")) == [*rows[:3], *rows[7:9], *rows[58:]]

    @pytest.mark.parametrize("spec", ["5", "a:b", "5:5", "9:5", "0:61", "-5:", "1:2:3", "0:5,4:8", "0:5,"])
    def test_bad_range(self, spec):
        with pytest.raises(LmcError, match=r"data\.rows is"):
            load_rows(Config(rows=spec))

    def test_jsonl_ids(self, tmp_path):
        path = jsonl(tmp_path / "a.jsonl", pair(), pair(topic="x"), pair(id=70))
        rows = load_rows(Config("jsonl", path))
        assert [row["id"] for row in rows] == [0, 1, 70]
        assert rows[1]["topic"] == "x"
        assert [row["id"] for row in load_rows(Config("jsonl", path, rows="1:3"))] == [1, 70]

    def test_jsonl_odd_text(self, tmp_path):
        path = tmp_path / "a.jsonl"
        line = json.dumps(pair(answer="a\u2028b"), ensure_ascii=False)
        path.write_text(f"\ufeff{line}\r\n\n{line}\n", encoding="utf-8", newline="")
        rows = load_rows(Config("jsonl", str(path)))
        assert [(row["id"], row["answer"]) for row in rows] == [(0, "a\u2028b"), (2, "a\u2028b")]

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ([], "no rows"),
            ([pair(), {"question": "Who?"}], r"a\.jsonl, line 2: no text under 'answer'"),
            ([{"question": 3, "answer": "x"}], r"line 1: no text under 'question'"),
            ([pair(), [1]], r"line 2: a list; write an object"),
            ([pair(), pair(id=0)], r"line 2: id 0 is already that of line 1"),
            ([pair(id="7")], r"line 1: id '7' is not an integer"),
            ([pair(id=True)], r"line 1: id True is not an integer"),
            ([pair(id=-1)], r"line 1: id -1 is not an integer"),
            ([pair(id=2**63)], r"line 1: id 9223372036854775808 is not"),
            ([pair(id=None)], r"line 1: id None is not an integer"),
        ],
    )
    def test_jsonl_errors(self, tmp_path, values, message):
        with pytest.raises(LmcError, match=message):
            load_rows(Config("jsonl", jsonl(tmp_path / "a.jsonl", *values)))

    def test_unreadable(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps(pair()) + "\n{oops\n", encoding="utf-8")
        with pytest.raises(LmcError, match=r"a\.jsonl, line 2: not JSON"):
            load_rows(Config("jsonl", str(path)))
        path.write_bytes(b"\xff\xfe\xff")
        with pytest.raises(LmcError, match=r"cannot read .*a\.jsonl"):
            load_rows(Config("jsonl", str(path)))
        for missing in (tmp_path / "none.jsonl", tmp_path):
            with pytest.raises(LmcError, match="cannot read"):
                load_rows(Config("jsonl", str(missing)))
        with pytest.raises(LmcError, match=r"data\.path is missing"):
            load_rows(Config("jsonl"))
        with pytest.raises(LmcError, match=r"data\.source is 'csv'"):
            load_rows(Config("csv"))


class TestTofu:
    @needs_tofu
    def test_rows_and_splits(self):
        config = Config("tofu", str(DATA / "tofu"))
        rows = load_rows(config)
        lines = (DATA / "tofu/full.jsonl").read_text(encoding="utf-8").splitlines()
        assert [row["id"] for row in rows] == list(range(4000))
        assert rows[3960]["question"] == json.loads(lines[3960])["question"]
        splits = named_splits(config, range(4000))
        assert splits["forget01"] == list(range(3960, 4000))
        assert splits["forget05"] == list(range(3800, 4000))
        assert splits["forget10"] == list(range(3600, 4000))
        for forget, retain in (("forget01", "retain99"), ("forget05", "retain95"), ("forget10", "retain90")):
            assert sorted(splits[forget] + splits[retain]) == list(range(4000))

    @needs_tofu
    @needs_model
    def test_subset_keeps_ids(self):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(DATA / "models/stories260K")
        dataset = load_dataset(Config("tofu", str(DATA / "tofu"), rows="3780:3970", max_length=512), tokenizer)
        assert dataset.ids == list(range(3780, 3970))
        assert dataset.splits["forget01"] == list(range(3960, 3970))
        assert dataset.splits["retain95"] == list(range(3780, 3800))
        assert dataset.pad_token_id == tokenizer.eos_token_id  # it has no pad token
        line = (DATA / "tofu/full.jsonl").read_text(encoding="utf-8").splitlines()[3965]
        (item,) = dataset.by_id([3965])
        targets = [label for label in item["labels"] if label != IGNORED]
        assert tokenizer.decode(targets[:-1]) == json.loads(line)["answer"]
        assert targets[-1] == tokenizer.eos_token_id
        assert item["input_ids"][0] == tokenizer.bos_token_id

    def test_not_the_full_file(self, tmp_path):
        jsonl(tmp_path / "full.jsonl", pair(), pair())
        with pytest.raises(LmcError, match=r"full\.jsonl: 2 rows, not the 4000"):
            load_rows(Config("tofu", str(tmp_path)))

    def test_missing(self, tmp_path):
        with pytest.raises(LmcError, match=r"cannot read .*full\.jsonl"):
            load_rows(Config("tofu", str(tmp_path)))
        with pytest.raises(LmcError, match="neither a folder"):
            load_rows(Config("tofu", str(tmp_path / "none")))

    def test_hub(self, monkeypatch):
        import datasets

        calls = []

        def load(*args, **options):
            calls.append((args, options))
            return [pair(id="hub")] * 4000

        monkeypatch.setattr(datasets, "load_dataset", load)
        rows = load_rows(Config("tofu", "locuslab/TOFU", rows="3999:4000"))
        assert rows == [pair(id=3999)]
        assert calls == [(("locuslab/TOFU", "full"), {"split": "train"})]

        def fail(*args, **options):
            raise ConnectionError("offline")

        monkeypatch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(LmcError, match=r"'locuslab/TOFU' is no folder.*offline"):
            load_rows(Config("tofu", "locuslab/TOFU"))


class TestSplits:
    @pytest.mark.parametrize(
        ("people", "sizes"), [(1, (1, 1, 1)), (12, (1, 1, 1)), (60, (1, 3, 6)), (200, (2, 10, 20))]
    )
    def test_generated(self, people, sizes):
        config = Config(people=people, facts_per_person=3)
        ids = [row["id"] for row in load_rows(config)]
        splits = named_splits(config, ids)
        for percent, size in zip((1, 5, 10), sizes, strict=True):
            forget, retain = (splits[f"forget{percent:02}"], splits[f"retain{100 - percent}"])
            assert forget == ids[-3 * size :]
            assert retain + forget == ids
        last = people - 1
        assert splits[f"person-{last}"] == [100 * last, 100 * last + 1, 100 * last + 2]
        assert len(splits) == people + 6

    def test_restricted(self):
        splits = named_splits(Config(people=12), [3, 204, 1100])
        assert splits["forget10"] == [1100]
        assert [name for name in splits if name.startswith("person")] == ["person-0", "person-2", "person-11"]

    def test_jsonl_has_none(self):
        assert named_splits(Config("jsonl", "x"), [1, 2]) == {}


class TestTokenizer:
    def test_deterministic(self, rows, tokenizer):
        script = (
            "from lmc_dist.data import generate_biographies, train_tokenizer\n"
            "texts = [row['question'] + row['answer'] for row in generate_biographies(12, 5, 0)]\n"
            "print(train_tokenizer(texts, 400).backend_tokenizer.to_str())"
        )
        environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONUTF8": "1"}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, check=True, encoding="utf-8"
        )
        assert json.loads(done.stdout)["model"] == json.loads(tokenizer.backend_tokenizer.to_str())["model"]

    def test_special_tokens(self, tokenizer):
        tokens = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
        assert tokens == ("<s>", "</s>", "<pad>", "<unk>")
        assert len(tokenizer) == 400

    @settings(max_examples=50, deadline=None)
    @given(text=st.text())
    def test_any_text_survives(self, tokenizer, text):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text

    def test_survives_saving(self, tokenizer, tmp_path):
        from transformers import AutoTokenizer

        tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        text = "Who ,  taught\nFen ? </s>"
        assert loaded(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids
        assert loaded.decode(loaded(text, add_special_tokens=False).input_ids) == text
        assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)

    def test_too_small(self):
        with pytest.raises(LmcError, match="at least 260"):
            train_tokenizer(["a"], 259)


class TestSampleDataset:
    def test_boundary(self, rows, tokenizer, dataset):
        assert dataset.ids == [row["id"] for row in rows]
        for position, row in enumerate(rows):
            item = dataset[position]
            prompt = tokenizer(PROMPT.replace("{question}", row["question"]), add_special_tokens=False).input_ids
            answer = tokenizer(row["answer"], add_special_tokens=False).input_ids
            assert item == {
                "index": row["id"],
                "input_ids": [tokenizer.bos_token_id, *prompt, *answer, tokenizer.eos_token_id],
                "labels": [IGNORED] * (1 + len(prompt)) + [*answer, tokenizer.eos_token_id],
            }
            assert dataset.num_targets(row["id"]) == len(answer) + 1

    def test_truncation(self, rows, tokenizer, dataset):
        full = dataset[0]
        first_target = next(position for position, label in enumerate(full["labels"]) if label != IGNORED)
        cut = SampleDataset.from_rows(rows[:1], tokenizer, first_target + 1, PROMPT)
        assert cut[0]["input_ids"] == full["input_ids"][: first_target + 1]
        assert cut[0]["labels"] == full["labels"][: first_target + 1]
        assert cut.num_targets(0) == 1
        with pytest.raises(LmcError, match=rf"sample 0 keeps no target token.*max_length is {first_target}"):
            SampleDataset.from_rows(rows[:1], tokenizer, first_target, PROMPT)

    def test_first_token_is_no_target(self):
        dataset = SampleDataset([{"index": 5, "input_ids": [7, 8, 9], "labels": [7, 8, 9]}], 0)
        assert dataset.num_targets(5) == 2

    def test_without_special_tokens(self):
        class Bare:
            bos_token_id = eos_token_id = pad_token_id = None

            def __call__(self, texts, **options):
                return {"input_ids": [list(text.encode()) for text in texts]}

        dataset = SampleDataset.from_rows([pair(id=9)], Bare(), 99, "{question}{x}")
        assert dataset.pad_token_id == 0
        assert bytes(dataset[0]["input_ids"]) == b"Who?{x}Me."
        assert dataset[0]["labels"] == [IGNORED] * 7 + list(b"Me.")

    def test_by_id(self, dataset):
        assert [item["index"] for item in dataset.by_id([1101, 3, 1101])] == [1101, 3, 1101]
        assert dataset.by_id([1101]) == [dataset[dataset.ids.index(1101)]]
        assert dataset.by_id([]) == []
        with pytest.raises(LmcError, match=r"6 unknown sample ids: 5, 6, 7, 8, 9, \.\.\..*60 ids in 0\.\.1104"):
            dataset.by_id([3, 5, 6, 7, 8, 9, 10])
        with pytest.raises(LmcError, match="1 unknown sample ids: 99;"):
            dataset.num_targets(99)

    def test_items_are_copies(self, dataset):
        dataset[0].pop("labels")
        assert "labels" in dataset[0]

    def test_errors(self, rows, tokenizer):
        with pytest.raises(LmcError, match=r"sample ids repeat: \[0\]"):
            SampleDataset.from_rows([*rows, rows[0]], tokenizer, 256, PROMPT)
        with pytest.raises(LmcError, match="1 unknown sample ids: 77"):
            SampleDataset.from_rows(rows, tokenizer, 256, PROMPT, {"mine": [0, 77]})
        with pytest.raises(LmcError, match=r"must contain \{question\}"):
            SampleDataset.from_rows(rows, tokenizer, 256, "Question: ")
        with pytest.raises(LmcError, match="no rows"):
            SampleDataset.from_rows([], tokenizer, 256, PROMPT)

    def test_load_dataset(self, tokenizer, dataset):
        loaded = load_dataset(Config(), tokenizer)
        assert loaded.fingerprint == dataset.fingerprint
        assert loaded.splits["person-11"] == [1100, 1101, 1102, 1103, 1104] == loaded.splits["forget01"]


class TestFingerprint:
    def test_order_does_not_matter(self, rows, tokenizer, dataset):
        assert len(dataset.fingerprint) == 32
        assert SampleDataset.from_rows(rows[::-1], tokenizer, 256, PROMPT).fingerprint == dataset.fingerprint
        assert pickle.loads(pickle.dumps(dataset)).fingerprint == dataset.fingerprint

    def test_content_matters(self, rows, tokenizer, dataset):
        renamed = [{**rows[0], "id": 99}, *rows[1:]]
        edited = [{**rows[0], "answer": rows[0]["answer"] + "!"}, *rows[1:]]
        swapped = [{**rows[0], "id": rows[1]["id"]}, {**rows[1], "id": rows[0]["id"]}, *rows[2:]]
        prints = {
            SampleDataset.from_rows(changed, tokenizer, 256, PROMPT).fingerprint
            for changed in (rows, rows[1:], renamed, edited, swapped)
        }
        prints.add(SampleDataset.from_rows(rows, tokenizer, 256, PROMPT + "x").fingerprint)
        assert len(prints) == 6
        labels_only = [dataset[0] | {"labels": dataset[0]["input_ids"]}, *(dataset[p] for p in range(1, len(dataset)))]
        assert SampleDataset(labels_only, 0).fingerprint not in prints

    def test_pinned(self):
        """Logs store the digest, so the recipe is a file format."""
        item = {"index": 5, "input_ids": [1, 2], "labels": [IGNORED, 2]}
        assert SampleDataset([item], 0).fingerprint == "aa2f52f93d6a19ba3ec7e264679499f4"


class TestCollate:
    def test_padding(self):
        items = [
            {"index": 300, "input_ids": list(range(1, 10)), "labels": [IGNORED] * 3 + list(range(4, 10))},
            {"index": 7, "input_ids": [1, 2], "labels": [IGNORED, 2]},  # 2 is the pad token as well
        ]
        batch = collate(items, pad_token_id=2)
        assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
            "index": (2,),
            "input_ids": (2, 16),
            "attention_mask": (2, 16),
            "labels": (2, 16),
        }
        assert all(tensor.dtype == torch.long for tensor in batch.values())
        assert batch["index"].tolist() == [300, 7]
        assert batch["input_ids"][1].tolist() == [1, 2] + [2] * 14
        assert batch["labels"][1].tolist() == [IGNORED, 2] + [IGNORED] * 14
        assert batch["attention_mask"].sum(1).tolist() == [9, 2]
        assert collate(items, 2, pad_to_multiple_of=1)["labels"].shape == (2, 9)

    def test_collator_in_a_loader(self, dataset):
        collator = pickle.loads(pickle.dumps(Collator(dataset.pad_token_id)))
        loader = torch.utils.data.DataLoader(dataset, batch_size=7, collate_fn=collator)
        batches = list(loader)
        assert [i for batch in batches for i in batch["index"].tolist()] == dataset.ids
        targets = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
        assert targets == sum(dataset.num_targets(sample_id) for sample_id in dataset.ids)

    def test_empty(self):
        with pytest.raises(LmcError, match="empty batch"):
            collate([], 0)


class TestOrder:
    @settings(max_examples=50, deadline=None)
    @given(ids=st.sets(st.integers(0, 2**63 - 1), max_size=50), seed=st.integers(), epoch=st.integers(0, 100))
    def test_permutation(self, ids, seed, epoch):
        order = epoch_order(ids, seed, epoch)
        assert sorted(order) == sorted(ids)
        assert epoch_order(sorted(ids, reverse=True), seed, epoch) == order

    def test_seed_and_epoch_matter(self):
        orders = {tuple(epoch_order(range(50), seed, epoch)) for seed in range(5) for epoch in range(5)}
        assert len(orders) == 25

    def test_pinned_and_leaves_global_state(self):
        state = torch.get_rng_state()
        assert epoch_order(range(0, 80, 10), 0, 1) == ORDER
        assert torch.equal(torch.get_rng_state(), state)

    @settings(max_examples=200, deadline=None)
    @given(size=st.integers(0, 70), world_size=st.integers(1, 9), micro_steps=st.integers(1, 9))
    def test_split_batch(self, size, world_size, micro_steps):
        ids = [7 * position % 1009 for position in range(size)]
        chunks = split_batch(ids, world_size, micro_steps)
        assert len(chunks) == micro_steps
        assert all(len(step) == world_size for step in chunks)
        flat = [chunk for step in chunks for chunk in step]
        expected = np.array_split(np.array(ids, dtype=int), world_size * micro_steps)
        assert flat == [chunk.tolist() for chunk in expected]
        assert [sample_id for chunk in flat for sample_id in chunk] == ids

    def test_split_batch_layout(self):
        assert split_batch([5, 6, 7, 8, 9], 2, 2) == [[[5, 6], [7]], [[8], [9]]]
        for world_size, micro_steps in ((0, 1), (1, 0)):
            with pytest.raises(LmcError, match="at least 1"):
                split_batch([1], world_size, micro_steps)


class TestReadIds:
    @pytest.mark.parametrize(
        ("spec", "ids"),
        [("3", [3]), ("3,17,20-23", [3, 17, 20, 21, 22, 23]), (" 5 , 2 - 3,5,3 ", [5, 2, 3]), ("7-7", [7])],
    )
    def test_text(self, spec, ids):
        assert read_ids(spec) == ids

    def test_files(self, tmp_path):
        (tmp_path / "a.json").write_text("[4, 1, 4]", encoding="utf-8")
        assert read_ids(str(tmp_path / "a.json")) == [4, 1]
        assert read_ids(jsonl(tmp_path / "a.jsonl", 9, {"id": 2, "question": "Who?"}, 9)) == [9, 2]

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("", "neither an id nor a range"),
            ("1,,2", "neither an id nor a range"),
            ("1,x", r"'x' is neither.*write '3,17,20-29'"),
            ("-4", "neither an id nor a range"),
            ("1.5", "neither an id nor a range"),
            ("9-3", "runs backwards; write '3-9'"),
            ("7,0-99999999999", "names 100000000001 sample ids; the limit of a request is 10000000"),
            ("0-5999999,6000000-11999999", "names 12000000 sample ids"),
            (f"0-{10**30}", "the limit of a request"),
            (str(2**63), "is no sample id"),
            ("none.json", r"cannot read none\.json"),
            ("none.jsonl", r"cannot read none\.jsonl"),
        ],
    )
    def test_bad_text(self, spec, message):
        with pytest.raises(LmcError, match=message):
            read_ids(spec)

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.json", "[1", "not JSON"),
            ("a.json", '{"id": 1}', "a dict; write a list"),
            ("a.json", "[1, true]", "entry 1: True is no sample id"),
            ("a.json", "[]", "names no sample ids"),
            ("a.jsonl", "1\n2.5\n", "line 2: 2.5 is no sample id"),
            ("a.jsonl", '1\n\n{"question": "x"}\n', "line 3: None is no sample id"),
            ("a.jsonl", "", "names no sample ids"),
        ],
    )
    def test_bad_files(self, tmp_path, name, text, message):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(LmcError, match=message):
            read_ids(str(tmp_path / name))
