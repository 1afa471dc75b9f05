"""Seconds of the parts that strategies are made of: as measured here, or projected to hardware of the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from lmc_dist.planner.facts import LogFacts, ModelFacts
from lmc_dist.planner.hardware import Hardware
from lmc_dist.planner.work import Work, gradient_work, product_work, training_work

PRODUCTS = ("GGN", "exact")  # modes that are products of their own; all others are made of them or of gradients


class Machine(Protocol):
    """Ranks on some hardware. Tokens are those of the rank that has most of them, padding included."""

    @property
    def world_size(self) -> int: ...

    @property
    def memory(self) -> float | None:
        """Bytes that a rank may use on its device."""

    @property
    def host_memory(self) -> float | None:
        """Bytes that it may use of the host's memory; None where that is the device's."""

    def training_step(self, tokens: int) -> float:
        """A step of the engine, repeated."""

    def start(self) -> float:
        """Building the engine, and its first step."""

    def gradient(self, tokens: int) -> float:
        """A gradient of the module on shards."""

    def product(self, mode: str, num_vectors: int, tokens: int) -> float:
        """m products of `GGN`, `exact`, `fd` or `secant`."""

    def follow(self) -> float:
        """One logged step: u_s read and added, θ_{s+1} checked, the optimizer's state taken along."""

    def tangent(self, num_vectors: int) -> float:
        """The update rule's tangent for m deviations, and their norms."""

    def snapshot(self) -> float:
        """Reading one."""

    def on(self, world_size: int) -> Machine:
        """A part of the ranks."""

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Measured:
    """Timed on this machine under the present ranks (`calibrate`): what runs the model is proportional to tokens.

    Attributes:
        world_size: Ranks.
        tokens: Of the busiest rank in the step that was timed.
        gradient_seconds: A gradient of it.
        products: Mode → (seconds of one product, of each further one at the same time).
        step_seconds: A step of the engine, at `step_tokens`.
        step_tokens: Of that step.
        start_seconds: Building the engine.
        follow_seconds: Following a logged step, without gradients.
        tangent_seconds: A deviation's tangent and norm.
        snapshot_seconds: Reading a snapshot.
        read_bandwidth: Bytes/s at which the log was read; None where the step holds no tensors.
        memory: Bytes that are free for each rank on its device.
        host_memory: In the host's memory, where the device has its own.
        notes: Where the numbers come from.
    """

    world_size: int
    tokens: int
    gradient_seconds: float
    products: Mapping[str, tuple[float, float]]
    step_seconds: float
    step_tokens: int
    start_seconds: float
    follow_seconds: float
    tangent_seconds: float
    snapshot_seconds: float
    read_bandwidth: float | None
    memory: float | None
    host_memory: float | None = None
    notes: tuple[str, ...] = ()

    def training_step(self, tokens: int) -> float:
        return self.step_seconds * tokens / max(self.step_tokens, 1)

    def start(self) -> float:
        return self.start_seconds

    def gradient(self, tokens: int) -> float:
        return self.gradient_seconds * tokens / max(self.tokens, 1)

    def product(self, mode: str, num_vectors: int, tokens: int) -> float:
        if mode in ("fd", "secant"):
            return num_vectors * (2 if mode == "fd" else 1) * self.gradient(tokens)
        one, further = self.products[mode]
        return (one + further * (num_vectors - 1)) * tokens / max(self.tokens, 1)

    def follow(self) -> float:
        return self.follow_seconds

    def tangent(self, num_vectors: int) -> float:
        return num_vectors * self.tangent_seconds

    def snapshot(self) -> float:
        return self.snapshot_seconds

    def on(self, world_size: int) -> Measured:
        """Fewer ranks have as much more to do, each; what they say to each other is left out."""
        factor, times = self.world_size / world_size, {}
        for name in ("follow_seconds", "tangent_seconds", "snapshot_seconds"):
            times[name] = getattr(self, name) * factor
        return Measured(
            **{**{f: getattr(self, f) for f in self.__dataclass_fields__}, **times, "world_size": world_size}
        )

    def to_json(self) -> dict[str, Any]:
        return {"kind": "measured", **asdict(self)}


@dataclass(frozen=True)
class Projected:
    """Reckoned from FLOPs, traffic and a row of the hardware table: nothing was run.

    A gather is under way while the segment before it computes, so a pass takes as long as the longer of the two;
    reductions are waited for. Vectors lie in the host's memory: what is done with them goes at its speed, and products
    move θ, the vectors and the results over the bus.

    Attributes:
        world_size: Ranks.
        log: The run.
        length: Tokens of a typical sample, for attention.
        hardware: Row of the table.
        tf32: Whether float32 products use TF32.
        memory: Bytes of a rank's device.
        host_memory: Of its share of the host.
    """

    world_size: int
    log: LogFacts
    length: int
    hardware: Hardware
    tf32: bool = False

    @property
    def memory(self) -> float:
        return self.hardware.memory

    @property
    def host_memory(self) -> float:
        return self.hardware.host_memory

    @property
    def _model(self) -> ModelFacts:
        return self.log.model

    @property
    def bandwidth(self) -> float:
        """Bytes/s of a rank in a collective of all of them."""
        inside = self.world_size <= self.hardware.ranks_per_node
        return (self.hardware.link if inside else self.hardware.network) * self.hardware.network_efficiency

    def _exchange(self, elements: float, itemsize: int) -> float:
        return elements * itemsize * (1 - 1 / self.world_size) / self.bandwidth

    def _seconds(self, work: Work, tokens: int) -> float:
        rate = self.hardware.tf32_flops if self.tf32 else self.hardware.fp32_flops
        compute = work.flops * tokens / (rate * self.hardware.utilisation)
        return max(compute, self._exchange(work.gathered, 4)) + self._exchange(work.reduced, 4)

    def _memory_traffic(self, vectors: float) -> float:
        """Seconds in which that many shards of vectors go through the host's memory."""
        return vectors * self._shard_bytes / self.hardware.host_bandwidth

    @property
    def _shard_bytes(self) -> int:
        return self._model.shard(self.world_size) * self._model.itemsize

    def training_step(self, tokens: int) -> float:
        work = training_work(self._model, self.length)
        compute = work.flops * tokens / (self.hardware.bf16_flops * self.hardware.utilisation)
        exchange = self._exchange(work.gathered + work.reduced, 2)
        update = (6 + 3 * len(self.log.state)) * self._shard_bytes / self.hardware.memory_bandwidth
        return max(compute, exchange) + update

    def start(self) -> float:
        return 0.0

    def gradient(self, tokens: int) -> float:
        return self._seconds(gradient_work(self._model, self.length), tokens) + 2 * self._bus

    def product(self, mode: str, num_vectors: int, tokens: int) -> float:
        if mode in ("fd", "secant"):
            return num_vectors * (2 if mode == "fd" else 1) * self.gradient(tokens)
        work = product_work(self._model, mode, num_vectors, self.length)
        return self._seconds(work, tokens) + (1 + 2 * num_vectors) * self._bus

    @property
    def _bus(self) -> float:
        """Seconds in which a vector's shard goes between host and device."""
        return self._shard_bytes / self.hardware.bus

    def _read(self, num_bytes: float) -> float:
        nodes = max(self.world_size / self.hardware.ranks_per_node, 1.0)
        return num_bytes / (nodes * self.hardware.disk)

    def follow(self) -> float:
        stored = self.log.step_bytes + (self.log.gradient_bytes if self.log.state else 0)
        return max(self._read(stored), self._memory_traffic(8 + 6 * len(self.log.state)))

    def tangent(self, num_vectors: int) -> float:
        return self._memory_traffic(num_vectors * 12 * (1 + len(self.log.state)))

    def snapshot(self) -> float:
        return self._read(self.log.snapshot_bytes)

    def on(self, world_size: int) -> Projected:
        return Projected(world_size, self.log, self.length, self.hardware, self.tf32)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "projected",
            "world_size": self.world_size,
            "sample_tokens": self.length,
            "tf32": self.tf32,
            "collective_bytes_per_second": self.bandwidth,
            "hardware": self.hardware.to_json(),
        }
