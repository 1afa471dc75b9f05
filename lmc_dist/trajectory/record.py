"""What is known of a training step, and the recent steps in memory.

Step s takes θ_s to θ_{s+1} = θ_s + u_s; steps are counted from 0 over the whole training run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lmc_dist.errors import LmcError
from lmc_dist.shards.layout import ShardLayout
from lmc_dist.shards.vector import ShardedVector

if TYPE_CHECKING:
    from lmc_dist.trajectory.edits import LogEdit

# Per-element state by kind, and scalars.
OptimizerState = tuple[dict[str, ShardedVector], dict[str, float]]

SCHEMA_VERSION = 3

# Storage tier → the vectors it keeps of each step: u_s, g_s, θ_{s+1} (which makes u_s redundant).
TIERS: dict[str, tuple[str, ...]] = {
    "replay": (),
    "update": ("update",),
    "gradient": ("update", "gradient"),
    "full": ("theta", "gradient"),
}

# What the summed loss of a pass is divided by: the target tokens of the global batch; its own target tokens times the
# number of passes; or a number the training loop chose and the logger took as given.
LossNormalization = Literal["global_token_mean", "micro_batch_token_mean", "given"]


@dataclass(frozen=True)
class MicroRecord:
    """One forward/backward pass of one rank.

    Attributes:
        rank: Rank that ran it.
        micro_step: Its place in the accumulation window.
        sample_ids: The dataset's own ids, in the order the model saw them; empty for a filler pass.
        denominator: What the summed loss of this pass was divided by, so that L_s = Σ_passes Σ_i nll_i / denominator.
        random_state: Generator state before the pass; None when the pass drew no random number.
        digest: Of the tensors the model saw (`passes.batch_digest`); None where the pass is not data's own.
        is_local: Whether its gradient stayed on the rank until a later pass reduced it (`no_sync`), as far as the engine
            leaves that to the training loop.
        blanks: Rows of the pass that held no sample, where forgotten ones would have been.
        width: Tokens of a row, padding included, which other collators pad otherwise; None where nothing told.
    """

    rank: int
    micro_step: int
    sample_ids: tuple[int, ...]
    denominator: float
    random_state: bytes | None = None
    digest: str | None = None
    is_local: bool = False
    blanks: tuple[int, ...] = ()
    width: int | None = None


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step (docs/log_format.md).

    `checksum` is that of θ_{s+1}; `log_checksum` that of the θ_{s+1} which following the logged updates gives. They
    differ where updates are stored in bfloat16.
    """

    step: int
    batch_id: int
    micro_batches: tuple[MicroRecord, ...]
    lr: tuple[float, ...]
    denominator: float
    epoch: float = 0.0
    loss: float | None = None
    grad_norm: float | None = None
    clip_coef: float = 1.0
    loss_scale: float = 1.0
    applied: bool = True
    u_norm: float | None = None
    checksum: str | None = None
    log_checksum: str | None = None

    @property
    def world_size(self) -> int:
        """Ranks that ran its passes; 0 for a step without any."""
        return 1 + max((micro.rank for micro in self.micro_batches), default=-1)

    @property
    def sample_ids(self) -> tuple[int, ...]:
        """All samples of the global batch, a multiset, in the order of accumulation and rank."""
        return tuple(i for micro in self.micro_batches for i in micro.sample_ids)


@dataclass(frozen=True)
class Segment:
    """How the steps from `first_step` on were run, until the next segment begins.

    Attributes:
        first_step: Its first step.
        world_size: Ranks that trained.
        engine: Engine that trained.
        partition: Rule by which the files of its steps are cut.
        run: Free-form JSON about the run as it was then.
        versions: Package versions.
    """

    first_step: int
    world_size: int
    engine: str
    partition: str
    run: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True)
class TrajectoryManifest:
    """What holds for the whole run (docs/log_format.md).

    `world_size`, `engine`, `partition`, `run` and `versions` are those of its beginning; `segments` says from which
    steps on a resumed run went on with others.
    """

    model_config: dict[str, Any]
    model_fingerprint: str
    parameters: list[dict[str, Any]]
    optimizer: dict[str, Any]
    loss_normalization: LossNormalization
    max_grad_norm: float
    dataset_fingerprint: str | None
    world_size: int
    engine: str
    storage: str
    save_interval: int | None
    max_steps: int | None
    partition: str = "zero3"
    dtype: str = "float32"
    update_dtype: str = "float32"
    gradient_dtype: str = "float32"
    compression: str = "none"
    save_batch_data: bool = False
    run: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    segments: list[dict[str, Any]] = field(default_factory=list)
    schema: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def all_segments(self) -> list[Segment]:
        """The beginning and `segments`, in order."""
        first = Segment(0, self.world_size, self.engine, self.partition, self.run, self.versions)
        return [first, *(Segment(**values) for values in self.segments)]

    def segment(self, step: int) -> Segment:
        """How a step was run."""
        return next(s for s in reversed(self.all_segments) if s.first_step <= step)


class Trajectory(Protocol):
    """What the sweep needs of a logged run, on disk or in memory."""

    layout: ShardLayout
    manifest: TrajectoryManifest
    edits: dict[int, LogEdit]

    @property
    def first_step(self) -> int:
        """Lowest step whose θ_s and u_s are still there."""

    @property
    def num_steps(self) -> int:
        """τ: steps 0 … τ−1 were trained, θ_τ is the final model."""

    def record(self, step: int) -> StepRecord: ...

    def records(self) -> Iterator[StepRecord]:
        """All steps, also those whose tensors are gone."""

    def require(self, first_step: int) -> None:
        """Raises LmcError unless steps ≥ first_step can be propagated along. Local."""

    def theta(self, step: int) -> ShardedVector:
        """A copy of θ_s, 0 ≤ s ≤ τ. Collective."""

    def update(self, step: int) -> ShardedVector:
        """u_s. Local."""

    def advance(self, theta: ShardedVector, step: int) -> ShardedVector:
        """θ_s → θ_{s+1} in place, exactly; returns u_s. Collective."""

    def read_ahead(self, start: int, stop: int) -> AbstractContextManager[None]:
        """Within it, steps that `advance` takes in order from `start` to `stop` are read before they are needed. Local."""

    def gradient(self, step: int) -> ShardedVector:
        """g_s, unclipped, where the manifest's storage tier keeps it. Local."""

    def nearest_anchor(self, step: int) -> int:
        """Latest N ≤ step whose θ_N and optimizer state are kept, and from which θ can be followed exactly. Local."""

    def snapshot(self, step: int) -> tuple[dict[str, ShardedVector], dict[str, Any]]:
        """θ_N (`theta`) with the per-element optimizer state, and its scalars. Collective."""


class StepLog:
    """The last `max_steps` steps in memory, sharded like the model; the ring behind online unlearning and tests.

    Args:
        manifest: What the run is.
        theta: θ of the first step, copied.
        first_step: Its index.
        max_steps: Ring size; None keeps all.
        state: Optimizer state before that step, as an engine's `read_state` returns it (taken over, not copied); None
            is an optimizer that never stepped.
    """

    def __init__(
        self,
        manifest: TrajectoryManifest,
        theta: ShardedVector,
        first_step: int = 0,
        max_steps: int | None = None,
        state: OptimizerState | None = None,
    ) -> None:
        if max_steps is not None and max_steps < 1:
            raise LmcError(f"max_steps must be at least 1, got {max_steps}")
        self.manifest = manifest
        self.layout = theta.layout
        self.edits: dict[int, LogEdit] = {}
        self.max_steps = max_steps
        self._first = first_step
        self._start = first_step
        self._thetas: deque[ShardedVector] = deque([theta.clone()])
        self._gradients: dict[int, ShardedVector] = {}
        self._states: dict[int, OptimizerState] = {first_step: state or ({}, {})}
        self._records: list[
            StepRecord
        ] = []  # also of steps that left the ring: they say what can no longer be forgotten

    def append(
        self,
        record: StepRecord,
        theta: ShardedVector,
        gradient: ShardedVector | None = None,
        state: OptimizerState | None = None,
    ) -> None:
        """Adds a step and what it led to.

        Args:
            record: Its record.
            theta: θ_{s+1}, copied.
            gradient: g_s, unclipped, which storage tiers `gradient` and `full` keep; taken over.
            state: Optimizer state after the step, taken over. A ring needs it now and then: corrections of an optimizer
                with state start from the last one before the first forgotten sample.
        """
        if record.step != self.num_steps:
            raise LmcError(f"step {record.step} does not follow the last step {self.num_steps - 1} of the log")
        self._records.append(record)
        self._thetas.append(theta.clone())
        if gradient is not None:
            self._gradients[record.step] = gradient
        if state is not None:
            self._states[record.step + 1] = state
        if self.max_steps is not None and len(self._thetas) > self.max_steps + 1:
            self._thetas.popleft()
            self._gradients.pop(self._first, None)
            self._states.pop(self._first, None)
            self._first += 1

    @property
    def first_step(self) -> int:
        return self._first

    @property
    def num_steps(self) -> int:
        return self._start + len(self._records)

    def require(self, first_step: int) -> None:
        """Checks that steps ≥ first_step are still there. Local.

        Raises:
            LmcError: They left the ring.
        """
        if first_step < self._first:
            raise LmcError(
                f"step {first_step} fell out of the ring: steps {self._first} to {self.num_steps - 1} remain "
                f"(max_steps={self.max_steps}; a larger ring would have kept it)"
            )

    def record(self, step: int) -> StepRecord:
        if not self._start <= step < self.num_steps:
            raise LmcError(f"step {step} is not in the log, which holds steps {self._start} to {self.num_steps - 1}")
        return self._records[step - self._start]

    def records(self) -> Iterator[StepRecord]:
        return iter(self._records)

    def theta(self, step: int) -> ShardedVector:
        self.require(step)
        return self._thetas[step - self._first].clone()

    def update(self, step: int) -> ShardedVector:
        self.require(step)
        return self._thetas[step - self._first + 1] - self._thetas[step - self._first]

    def advance(self, theta: ShardedVector, step: int) -> ShardedVector:
        update = self.update(step)
        theta.flat.copy_(self._thetas[step - self._first + 1].flat)
        return update

    def read_ahead(self, start: int, stop: int) -> AbstractContextManager[None]:
        return nullcontext()  # it is in memory

    def gradient(self, step: int) -> ShardedVector:
        self.require(step)
        if step not in self._gradients:
            raise LmcError(f"the gradient of step {step} was not given to the log")
        return self._gradients[step]

    def nearest_anchor(self, step: int) -> int:
        self.require(step)
        usable = [n for n in self._states if n <= step]
        if not usable:
            raise LmcError(
                f"the optimizer's state at or before step {step} left the ring: give `append` the state more often"
            )
        return max(usable)

    def snapshot(self, step: int) -> tuple[dict[str, ShardedVector], dict[str, Any]]:
        vectors, scalars = self._states[step]
        return {"theta": self.theta(step), **{key: vector.clone() for key, vector in vectors.items()}}, dict(scalars)
