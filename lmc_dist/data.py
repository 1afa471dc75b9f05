"""Samples with stable ids: sources, tokenisation, batches and their order.

A sample is known everywhere by its dataset's own integer id, never by its position in a subset, so a logged id still
means the same text after filtering, shuffling or sharding.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmc_dist.biographies import PERSON_STRIDE, generate_biographies
from lmc_dist.errors import LmcError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from lmc_dist.config import DataConfig

IGNORED = -100  # the label that cross entropy skips
TOFU_ROWS = 4000
MOST_IDS = 10_000_000  # that ranges of an option may name: they are written out
SPLIT_PERCENTS = (1, 5, 10)
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def _read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LmcError(f"cannot read {path} as UTF-8 text: {error}; check the path and the encoding") from error


def _json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yields (0-based line number, value) of every line that is not blank."""
    # Not str.splitlines: it would also cut at U+2028 and the like, which JSON strings may hold unescaped.
    for number, line in enumerate(_read_text(path).split("\n")):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise LmcError(f"{path}, line {number + 1}: not JSON ({error}); write one JSON value a line") from error


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63  # type(): a bool is no id; 2**63: ids travel as int64


def _checked_rows(origin: str | Path, records: Iterable[tuple[int, Any]], own_ids: bool) -> list[dict[str, Any]]:
    """Validates numbered records; the number is the id unless ``own_ids`` is set and the record brings one."""
    rows = []
    first_seen: dict[int, int] = {}
    for number, record in records:
        where = f"{origin}, line {number + 1}"
        if not isinstance(record, dict):
            raise LmcError(f"{where}: a {type(record).__name__}; write an object with 'question' and 'answer'")
        for field in ("question", "answer"):
            if not isinstance(record.get(field), str):
                raise LmcError(f"{where}: no text under {field!r}; every row needs 'question' and 'answer'")
        row_id = record.get("id", number) if own_ids else number
        if not _is_id(row_id):
            raise LmcError(f"{where}: id {row_id!r} is not an integer in 0..2**63-1; correct it or drop the field")
        if (earlier := first_seen.setdefault(row_id, number)) != number:
            raise LmcError(f"{where}: id {row_id} is already that of line {earlier + 1}; give every row its own id")
        rows.append({**record, "id": row_id})
    if not rows:
        raise LmcError(f"{origin}: no rows; it needs at least one line with 'question' and 'answer'")
    return rows


def _tofu_rows(path: str) -> list[dict[str, Any]]:
    """Reads TOFU from a folder or from the hub; the id is the row's position in the full file."""
    if Path(path).is_dir():
        path = str(Path(path) / "full.jsonl")
        rows = _checked_rows(path, _json_lines(path), own_ids=False)
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) and not Path(path).exists():
        import datasets

        try:
            records = datasets.load_dataset(path, "full", split="train")
        except Exception as error:  # the hub client raises many unrelated types
            raise LmcError(f"data.path {path!r} is no folder, and loading it from the hub failed: {error}") from error
        rows = _checked_rows(path, enumerate(records), own_ids=False)
    else:
        raise LmcError(f"data.path {path!r} is neither a folder with full.jsonl nor a hub name like 'locuslab/TOFU'")
    if [row["id"] for row in rows] != list(range(TOFU_ROWS)):
        raise LmcError(  # the splits are defined by position in the full file: another file would get wrong ones
            f"{path}: {len(rows)} rows, not the {TOFU_ROWS} unbroken ones of TOFU's 'full'; "
            "for a subset use data.rows, for another file data.source = 'jsonl'"
        )
    return rows


def _row_range(spec: str | None, size: int) -> list[int]:
    """Positions of the rows that `data.rows` names."""
    found: list[int] = []
    for part in [":"] if spec is None else spec.split(","):
        if not (match := re.fullmatch(r"\s*(\d*)\s*:\s*(\d*)\s*", part)):
            raise LmcError(f"data.rows is {spec!r}; write 'start:stop', such as '0:400', several with commas between")
        start, stop = int(match[1] or 0), int(match[2] or size)
        if not (found[-1] + 1 if found else 0) <= start < stop <= size:
            raise LmcError(
                f"data.rows is {spec!r}, but the source has {size} rows; choose 0 <= start < stop <= {size}, ranges in order"
            )
        found += range(start, stop)
    return found


def load_rows(config: DataConfig) -> list[dict[str, Any]]:
    """Loads the rows that ``config`` names, each with at least ``id``, ``question`` and ``answer``."""
    if config.source == "generated":
        rows = generate_biographies(config.people, config.facts_per_person, config.seed)
    elif config.source == "log":
        raise LmcError(
            "data.source 'log' brings samples that are tokenised: give model.path, with the tokenizer of training"
        )
    elif config.source not in ("tofu", "jsonl"):
        raise LmcError(f"data.source is {config.source!r}; choose 'generated', 'tofu', 'jsonl' or 'log'")
    elif not config.path:
        raise LmcError(f"data.path is missing; data.source = {config.source!r} needs it")
    elif config.source == "tofu":
        rows = _tofu_rows(config.path)
    else:
        rows = _checked_rows(config.path, _json_lines(config.path), own_ids=True)
    return [rows[position] for position in _row_range(config.rows, len(rows))]


def named_splits(config: DataConfig, ids: Iterable[int]) -> dict[str, list[int]]:
    """Returns the named splits of a source, each restricted to ``ids`` and in their order (so one may be empty)."""
    ids = list(ids)
    splits: dict[str, list[int]] = {}
    if config.source == "generated":
        for sample_id in ids:
            splits.setdefault(f"person-{sample_id // PERSON_STRIDE}", []).append(sample_id)
        units, unit_size = config.people, PERSON_STRIDE
    elif config.source == "tofu":
        units, unit_size = TOFU_ROWS, 1
    else:
        return splits
    for percent in SPLIT_PERCENTS:
        first = (units - max(1, round(units * percent / 100))) * unit_size
        splits[f"forget{percent:02}"] = [sample_id for sample_id in ids if sample_id >= first]
        splits[f"retain{100 - percent}"] = [sample_id for sample_id in ids if sample_id < first]
    return splits


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer; the vocabulary stays smaller where the texts hold too few pairs to merge."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < (smallest := len(alphabet) + len(SPECIAL_TOKENS)):
        raise LmcError(f"vocab_size is {vocab_size}; all bytes and the special tokens need at least {smallest}")
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS)


class SampleDataset(torch.utils.data.Dataset):
    """Tokenised samples, found by position (for a DataLoader) or by id (for everything else).

    Attributes:
        ids: The samples' stable ids in storage order.
        splits: Named lists of ids.
        pad_token_id: What to pad ``input_ids`` with.
    """

    def __init__(
        self, items: Sequence[dict[str, Any]], pad_token_id: int, splits: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        self.ids: list[int] = [item["index"] for item in items]
        self.pad_token_id = pad_token_id
        self._items = list(items)
        self._positions = {sample_id: position for position, sample_id in enumerate(self.ids)}
        if len(self._positions) < len(self.ids):
            repeated = sorted({i for p, i in enumerate(self.ids) if self._positions[i] != p})
            raise LmcError(f"sample ids repeat: {repeated[:5]}; give every sample its own id")
        self.splits: dict[str, list[int]] = {name: list(ids) for name, ids in (splits or {}).items()}
        for ids in self.splits.values():
            self._locate(ids)

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        prompt: str,
        splits: Mapping[str, Sequence[int]] | None = None,
    ) -> SampleDataset:
        """Tokenises rows into ``[bos] prompt answer [eos]``; only answer and eos are targets.

        Args:
            rows: Rows with ``id``, ``question`` and ``answer``.
            tokenizer: Any Hugging Face tokenizer; bos and eos are added where it has them.
            max_length: Longer samples lose their right end.
            prompt: Template with ``{question}``.
            splits: Named lists of ids among those of ``rows``.
        """
        if "{question}" not in prompt:
            raise LmcError(f"data.prompt is {prompt!r}; it must contain {{question}}")
        if not rows:
            raise LmcError("no rows to tokenise; check data.path and data.rows")
        # replace, not format: the template may hold braces of its own
        prompts = [prompt.replace("{question}", row["question"]) for row in rows]
        # Prompt and answer apart: tokenised as one text, a token could straddle the boundary of the labels.
        prompt_ids, answer_ids = (
            tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            for texts in (prompts, [row["answer"] for row in rows])
        )
        bos, eos = ([] if t is None else [t] for t in (tokenizer.bos_token_id, tokenizer.eos_token_id))
        items = []
        for row, before, after in zip(rows, prompt_ids, answer_ids, strict=True):
            before, after = bos + before, after + eos
            labels = ([IGNORED] * len(before) + after)[:max_length]
            if not _count_targets(labels):
                raise LmcError(
                    f"sample {row['id']} keeps no target token: its prompt has {len(before)} tokens and its answer "
                    f"{len(after)}, data.max_length is {max_length}; raise it or drop the sample"
                )
            items.append({"index": row["id"], "input_ids": (before + after)[:max_length], "labels": labels})
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return cls(items, next(token for token in candidates if token is not None), splits)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return dict(self._items[position])  # a copy: some collators pop keys

    def _locate(self, ids: Iterable[int]) -> list[int]:
        ids = list(ids)
        if unknown := [sample_id for sample_id in ids if sample_id not in self._positions]:
            more = ", ..." if len(unknown) > 5 else ""
            known = f"{len(self)} ids in {min(self.ids)}..{max(self.ids)}" if self.ids else "no ids at all"
            raise LmcError(
                f"{len(unknown)} unknown sample ids: {', '.join(map(str, unknown[:5]))}{more}; the dataset has {known}"
            )
        return [self._positions[sample_id] for sample_id in ids]

    def by_id(self, ids: Iterable[int]) -> list[dict[str, Any]]:
        """Returns the samples with these ids, in this order."""
        return [self[position] for position in self._locate(ids)]

    def num_targets(self, sample_id: int) -> int:
        """Returns how many tokens of a sample enter the loss."""
        return _count_targets(self._items[self._locate([sample_id])[0]]["labels"])

    @cached_property
    def fingerprint(self) -> str:
        """128-bit hash of all ids, tokens and labels; the same whatever order the samples are stored in."""
        digest = blake2b(digest_size=16)
        for item in self.by_id(sorted(self.ids)):
            # The length makes the packing unambiguous; "<q" makes it the same on every platform.
            values = [item["index"], len(item["input_ids"]), *item["input_ids"], *item["labels"]]
            digest.update(struct.pack(f"<{len(values)}q", *values))
        return digest.hexdigest()


def _count_targets(labels: Sequence[int]) -> int:
    return sum(label != IGNORED for label in labels[1:])  # a causal LM predicts token t + 1: nothing predicts the first


def load_dataset(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> SampleDataset:
    """Loads and tokenises the samples that ``config`` names, with their named splits."""
    rows = load_rows(config)
    splits = named_splits(config, [row["id"] for row in rows])
    return SampleDataset.from_rows(rows, tokenizer, config.max_length, config.prompt, splits)


def collate(
    items: Sequence[Mapping[str, Any]], pad_token_id: int, pad_to_multiple_of: int = 8
) -> dict[str, torch.Tensor]:
    """Pads samples on the right into int64 ``index`` (B,) and ``input_ids``, ``attention_mask``, ``labels`` (B, T)."""
    if not items:
        raise LmcError("cannot collate an empty batch; skip the empty chunks of a short last batch")
    longest = max(len(item["input_ids"]) for item in items)
    shape = (len(items), -(-longest // pad_to_multiple_of) * pad_to_multiple_of)
    input_ids, labels = torch.full(shape, pad_token_id), torch.full(shape, IGNORED)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        input_ids[row, :length] = torch.tensor(item["input_ids"])
        labels[row, :length] = torch.tensor(item["labels"])
        attention_mask[row, :length] = 1  # by length, not by token: the pad token may also be the eos token
    index = torch.tensor([item["index"] for item in items])
    return {"index": index, "input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@dataclass(frozen=True)
class Collator:
    """``collate`` as an object that a DataLoader or a Trainer can hold and pickle."""

    pad_token_id: int
    pad_to_multiple_of: int = 8

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        return collate(items, self.pad_token_id, self.pad_to_multiple_of)


def epoch_order(ids: Iterable[int], seed: int, epoch: int) -> list[int]:
    """Returns the ids in the order of one epoch, which depends on the set of ids, the seed and the epoch alone."""
    ids = sorted(ids)  # so that storage order, which the dataset's fingerprint ignores, cannot change a run
    # A hash, not seed + epoch: neighbouring seeds would share their epochs' orders.
    digest = blake2b(f"{seed}:{epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return [ids[position] for position in torch.randperm(len(ids), generator=generator).tolist()]


def split_batch(ids: Sequence[int], world_size: int, micro_steps: int) -> list[list[list[int]]]:
    """Cuts an ordered global batch into contiguous chunks ``[micro_step][rank]`` of nearly equal size.

    The sizes are those of ``numpy.array_split``; chunks are empty where the batch has fewer ids than chunks.
    """
    if world_size < 1 or micro_steps < 1:
        raise LmcError(f"world_size is {world_size} and micro_steps is {micro_steps}; both must be at least 1")
    size, longer = divmod(len(ids), world_size * micro_steps)
    starts = [chunk * size + min(chunk, longer) for chunk in range(world_size * micro_steps + 1)]
    chunks = [list(ids[start:stop]) for start, stop in pairwise(starts)]
    return [chunks[step * world_size : (step + 1) * world_size] for step in range(micro_steps)]


def read_ids(spec: str) -> list[int]:
    """Reads sample ids from an option value: a list or the path of a file.

    Args:
        spec: Comma-separated ids and inclusive ranges such as ``3,17,20-29``, or a ``.json`` file (a list of ids),
            or a ``.jsonl`` file (an id, or an object with ``id``, a line).

    Returns:
        The ids in the order given, without repetitions.
    """
    spec = spec.strip()
    suffix = Path(spec).suffix.lower()
    if suffix == ".jsonl":
        entries: list[tuple[str, Any]] = [
            (f"{spec}, line {number + 1}", value.get("id") if isinstance(value, dict) else value)
            for number, value in _json_lines(spec)
        ]
    elif suffix == ".json":
        try:
            values = json.loads(_read_text(spec))
        except json.JSONDecodeError as error:
            raise LmcError(f"{spec}: not JSON ({error}); write a list of sample ids") from error
        if not isinstance(values, list):
            raise LmcError(f"{spec}: a {type(values).__name__}; write a list of sample ids")
        entries = [(f"{spec}, entry {position}", value) for position, value in enumerate(values)]
    else:
        ranges = [(repr(part), _range(part)) for part in spec.split(",")]
        if (number := sum(ids.stop - ids.start for _, ids in ranges)) > MOST_IDS:
            raise LmcError(f"{spec[:60]} names {number} sample ids; the limit of a request is {MOST_IDS}: split it")
        entries = [(where, value) for where, ids in ranges for value in ids]
    for where, value in entries:
        if not _is_id(value):
            raise LmcError(f"{where}: {value!r} is no sample id; write an integer in 0..2**63-1")
    if not entries:
        raise LmcError(f"{spec} names no sample ids; it needs at least one")
    return list(dict.fromkeys(value for _, value in entries))


def _range(part: str) -> range:
    if not (match := re.fullmatch(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", part)):
        raise LmcError(f"{part!r} is neither an id nor a range; write '3,17,20-29' or the path of a .json/.jsonl file")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise LmcError(f"the range {part.strip()!r} runs backwards; write '{last}-{first}'")
    return range(first, last + 1)
