"""Marks of a replay: the engine's weights and optimizer state between two steps, from which it goes on to the bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lmc_dist.errors import LmcError
from lmc_dist.runtime import agreement
from lmc_dist.shards.engines import EngineShards
from lmc_dist.stopping import stop_asked, stopped
from lmc_dist.trajectory.marks import MarkFolder
from lmc_dist.trajectory.reader import FLOATS


@dataclass(frozen=True)
class Reached:
    """How far a replay is.

    Attributes:
        step: The next step to take.
        steps: Gradients computed.
        verified: See `ReplayResult`.
        exact: See `ReplayResult`.
    """

    step: int
    steps: int = 0
    verified: int = 0
    exact: bool = True


class ReplayMarks(MarkFolder):
    """Where a replay on an engine leaves its marks. Every rank constructs one.

    Args:
        folder: Of this replay alone: one log, one request.
        shards: Of the engine.
        every: Steps between two marks.
    """

    def __init__(self, folder: Path, shards: EngineShards, every: int) -> None:
        super().__init__(folder, shards.layout, every)
        self.shards = shards

    def load(self) -> Reached | None:
        """Sets the engine to the last mark; None, and nothing is done, where there is none. Collective.

        Raises:
            LmcError: It is damaged.
        """
        found = self.last()
        if found is None:
            return None
        known, read = found
        with agreement(self.layout.group):
            try:
                dtypes = {kind: FLOATS[name] for kind, name in known["dtypes"].items()}
                reached = Reached(*(known[key] for key in ("step", "steps", "verified", "exact")))
                scalars = {key: float(value) for key, value in known["scalars"].items()}
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise LmcError(f"the mark of step {known['step']} in {self.folder} is damaged ({error!r})") from None
            vectors = {kind: read(kind, dtype) for kind, dtype in dtypes.items()}
        self.shards.write(vectors.pop("theta"))
        self.shards.write_state(vectors, scalars)
        return reached

    def leave(self, reached: Reached, num_steps: int) -> None:
        """Leaves a mark after a step, when it is time, at the end, or where a stop was asked for. Collective.

        Raises:
            Stopped: On every rank, with the mark on disk.
        """
        reason = stop_asked(self.layout.group) if reached.step < num_steps else None
        if reason is not None or reached.step == num_steps or self.is_due(reached.step):
            vectors, scalars = self.shards.read_state()
            vectors = {"theta": self.shards.read(), **vectors}
            dtypes = {kind: str(vector.flat.dtype).removeprefix("torch.") for kind, vector in vectors.items()}
            self.write(reached.step, vectors, {**vars(reached), "dtypes": dtypes, "scalars": scalars})
        if reason is not None:
            what = f"the replay stopped before step {reached.step} of {num_steps}"
            raise stopped(f"{what} (the same command goes on)", reason)
