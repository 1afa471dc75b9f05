"""A cell of bench/accuracy.py, run: training, references, every method on every request, and training that goes on."""

from __future__ import annotations

import logging
import os
import random
import shutil
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from accuracy_cell import (
    BATCH,
    CONTINUED_BY,
    CONTINUED_RATES,
    CONTINUED_REQUESTS,
    CONTINUED_STEPS,
    EARLY_STEP,
    METHODS,
    STORAGE,
    Cell,
)

from lmc_dist.config import Config, ForgetConfig, LogConfig
from lmc_dist.trajectory.counterfactual import Counterfactual

Position = tuple[dict[str, Any], dict[str, Any]]  # θ and optimizer state, its scalars


def work(cell: Cell) -> dict[str, Any]:
    """Runs a cell in this process, a group of its own; returns its result, or `failed` with the reason."""
    os.dup2(os.open(f"{cell.folder}/{cell.name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)  # progress, warnings
    logging.getLogger("lmc_dist").setLevel(logging.WARNING)
    try:
        result = Run(cell).result()
    except Exception as error:
        traceback.print_exc()
        return {"optimizer": cell.optimizer, "seed": cell.seed, "failed": f"{type(error).__name__}: {error}"}
    from lmc_dist.trajectory.files import write_json

    write_json(cell.file, result)
    return result


class Run:
    """A logged training, opened for corrections and replays."""

    def __init__(self, cell: Cell) -> None:
        from lmc_dist.logged_run import open_logged_run, starting_model
        from lmc_dist.runtime import Runtime
        from lmc_dist.trajectory.replay import replay_engine

        self.cell, self.runtime, self.started = cell, Runtime(0, 1, torch.device("cpu")), time.perf_counter()
        samples = cell.steps * BATCH
        self.config = cell.config(f"0:{samples}", "log")
        self.fresh = cell.config(f"{samples}:{samples + CONTINUED_STEPS * BATCH}", "log")
        self._train(self.config)
        opened = open_logged_run(self.config, self.runtime)
        self.log, self.batches, self.module = opened.log, opened.batches, opened.module
        self.theta = self.log.theta(self.log.num_steps)
        self.engine = replay_engine(starting_model(self.config, opened.model_config, self.log), self.log)

    def _train(self, config: Config) -> Any:
        """θ at the end of a run."""
        from lmc_dist.training import Trainer

        shutil.rmtree(config.log_dir, ignore_errors=True)
        trainer = Trainer(config, self.runtime)
        trainer.run()
        return trainer.shards.read()

    def requests(self) -> dict[str, Counterfactual]:
        """What is forgotten, by name. The first step that moves weights is not step 0, whose learning rate is 0."""
        from lmc_dist.unlearn.request import make_request

        chance, records = random.Random(self.cell.seed), list(self.log.records())
        seen = sorted(i for record in records for i in record.sample_ids)
        first = next(record for record in records if any(record.lr))
        samples = {
            "first": [chance.choice(first.sample_ids)],
            "middle": [chance.choice(records[len(records) // 2].sample_ids)],
            "1%": chance.sample(seen, max(1, len(seen) // 100)),
            "10%": chance.sample(seen, len(seen) // 10),
        }
        found = {name: make_request(sample_ids=ids) for name, ids in samples.items()}
        found["batch"] = make_request(batch_ids=[records[EARLY_STEP].batch_id])
        return {name: found[name] for name in ("first", "middle", "batch", "1%", "10%")}

    def result(self) -> dict[str, Any]:
        """All rows of the cell; its log is removed."""
        rows, continued, retrained = [], [], None
        records = list(self.log.records())
        for request, counterfactual in self.requests().items():
            found, corrections = self._measure(request, counterfactual)
            rows += found
            if self.cell.is_first and request == "1%":
                retrained = self._is_retrained(counterfactual)
            if self.cell.is_first and request in CONTINUED_REQUESTS:
                end = self._position()
                for rate in CONTINUED_RATES:
                    continued += self._continue(request, corrections, end, rate)
        shutil.rmtree(self.config.log_dir)
        return {
            "optimizer": self.cell.optimizer,
            "seed": self.cell.seed,
            "settings": self.cell.settings,
            "loss": [record.loss for record in records],
            "clipped_steps": sum(record.clip_coef < 1 for record in records),
            "replay_is_retraining": retrained,
            "rows": rows,
            "continued": continued,
            "seconds": time.perf_counter() - self.started,
        }

    def _measure(self, request: str, counterfactual: Counterfactual) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(a row a method, their corrections); the engine is left where the counterfactual run ended."""
        from lmc_dist.curvature import HVPConfig
        from lmc_dist.errors import LmcError
        from lmc_dist.evaluate.distance import relative_error
        from lmc_dist.trajectory.replay import replay
        from lmc_dist.unlearn.correction import compute_correction

        started = time.perf_counter()
        replayed = replay(self.engine, self.log, self.batches, counterfactual)
        self.reference, seconds = replayed.theta, time.perf_counter() - started
        touched = sum(counterfactual.touches(record) for record in self.log.records())
        common = {
            "optimizer": self.cell.optimizer,
            "seed": self.cell.seed,
            "request": request,
            "touched_steps": touched,
        }
        distance = (self.theta - self.reference).norm()
        applied = sum(record.applied for record in self.log.records())
        common |= {"distance": distance, "storage": STORAGE[self.cell.optimizer]}
        none = {"head": None, "failed": None, "growth_max": None}
        rows = [
            {"method": "do_nothing", "label": "do nothing", "rel_error": 1.0, "gradients": 0.0, "seconds": 0.0, **none},
            {"method": "replay", "label": "full replay", "rel_error": 0.0, "gradients": float(replayed.steps), **none},
            {"method": "retrain", "label": "retrain", "rel_error": 0.0, "gradients": float(applied), **none},
        ]
        rows[1]["seconds"] = rows[2]["seconds"] = seconds
        corrections = {}
        for name, method in ((name, METHODS[name]) for name in self.cell.methods):
            if request in method.left_out or (method.first_only and not self.cell.is_first):
                continue
            row: dict[str, Any] = {"method": name, "label": method.label, "rel_error": None, "gradients": None, **none}
            started = time.perf_counter()
            try:
                found = corrections[name] = compute_correction(
                    self.log,
                    self.module,
                    self.batches,
                    counterfactual,
                    HVPConfig(**method.curvature),
                    method.K,
                    replay_head=method.head,  # type: ignore[arg-type]
                    update=method.update,  # type: ignore[arg-type]
                )
            except LmcError as error:  # divergence: a result as well
                row["failed"] = str(error)
            else:
                row["rel_error"] = relative_error(found.corrected(self.theta), self.theta, self.reference)
                row["gradients"] = found.gradients_equivalent
                row["head"] = found.audit[0].replay_head
                row["growth_max"] = max((a.growth_max for a in found.audit if a.growth_max), default=None)
            rows.append(row | {"seconds": time.perf_counter() - started})
        return [common | row for row in rows], corrections

    def _is_retrained(self, counterfactual: Counterfactual) -> bool:
        """Whether a training run without the data ends where the replay did, to the bit."""
        from lmc_dist.shards.checksum import checksum

        ids = ",".join(map(str, sorted(counterfactual.sample_ids)))
        forget = ForgetConfig(samples=ids, counterfactual=counterfactual.kind)
        log_dir = f"{self.cell.folder}/{self.cell.name}.retrain"
        config = replace(self.config, forget=forget, log_dir=log_dir, log=LogConfig("replay", None))
        found = checksum(self._train(config)) == checksum(self.reference)
        shutil.rmtree(log_dir)
        return found

    # --- training goes on --------------------------------------------------------------------------------------------

    def _continue(self, request: str, corrections: dict[str, Any], end: Position, rate: float) -> list[dict[str, Any]]:
        """‖difference‖ from the run that goes on from `end`, now and after each further step, a row a case."""
        from lmc_dist.training import build_dataset
        from lmc_dist.trajectory.batches import DatasetBatches
        from lmc_dist.unlearn.correction import apply_correction

        dataset = build_dataset(self.fresh)[0]
        fresh = DatasetBatches(dataset)
        self._go_to(end)
        reference = list(self._further(fresh, dataset.ids, rate))
        cases: dict[str, Any] = {"nothing corrected": None}
        for name in CONTINUED_BY:
            if name in corrections:
                cases[f"weights, {METHODS[name].label}"] = corrections[name].v
                cases[f"weights + state, {METHODS[name].label}"] = corrections[name]
        rows = []
        for case, correction in cases.items():
            self._go_to(self.log.snapshot(self.log.num_steps))
            if correction is not None:
                apply_correction(self.engine, correction)
            further = self._further(fresh, dataset.ids, rate)
            differences = [(theta - other).norm() for theta, other in zip(further, reference, strict=True)]
            row = {"optimizer": self.cell.optimizer, "seed": self.cell.seed, "request": request, "rate": rate}
            rows.append({**row, "case": case, "differences": differences})
        return rows

    def _position(self) -> Position:
        """Where the engine stands, as `TrajectoryLog.snapshot` gives it."""
        vectors, scalars = self.engine.read_state()
        return {**vectors, "theta": self.engine.read()}, scalars

    def _go_to(self, position: Position) -> None:
        from lmc_dist.shards.relayout import relayout

        vectors, scalars = position
        placed = {key: relayout(vector, self.engine.layout) for key, vector in vectors.items()}
        self.engine.write(placed.pop("theta"))
        self.engine.write_state(placed, scalars)

    def _further(self, fresh: Any, ids: list[int], rate: float) -> Iterator[Any]:
        """θ now and after each further step, at a constant learning rate and in the order of the ids."""
        engine, train = self.engine, self.config.train
        yield engine.read()
        for group in engine.param_groups:
            group["lr"] = rate * train.learning_rate
        engine.module.train()
        for start in range(0, len(ids), BATCH):
            batch = ids[start : start + BATCH]
            num_items = float(sum(fresh.num_targets(batch)))
            for i in range(0, BATCH, train.micro_batch_size):
                inputs, labels = fresh.inputs(batch[i : i + train.micro_batch_size])
                is_last = i + train.micro_batch_size >= BATCH
                engine.run_pass({**inputs, "labels": labels}, num_items, 1.0, is_last, not is_last)
            engine.step()
            yield engine.read()
