"""Machines that a plan can be projected to: every assumption is a number of this table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lmc_dist.errors import LmcError


@dataclass(frozen=True)
class Hardware:
    """One rank's accelerator and its share of a node, as published, and how much of it is assumed to be reached.

    Attributes:
        name: What `plan_unlearn.hardware` calls it.
        bf16_flops: Dense bfloat16 matrix FLOP/s: training and replay.
        fp32_flops: float32 FLOP/s without TF32: products, which are float32.
        tf32_flops: With `plan_unlearn.tf32`.
        utilisation: Share of those that large matrix products reach.
        memory: Bytes.
        memory_bandwidth: Bytes/s.
        link: Bytes/s of a rank to the others of its node, each way.
        network: Bytes/s of a rank to other nodes, each way.
        network_efficiency: Share of `link` and `network` that collectives reach.
        ranks_per_node: Ranks that share a node.
        host_memory: Bytes of the host's memory, a rank.
        host_bandwidth: Bytes/s of it, a rank.
        bus: Bytes/s between host and device, each way.
        disk: Bytes/s that a node reads the log with.
    """

    name: str
    bf16_flops: float
    fp32_flops: float
    tf32_flops: float
    memory: float
    memory_bandwidth: float
    link: float
    network: float
    bus: float
    utilisation: float = 0.4
    network_efficiency: float = 0.7
    ranks_per_node: int = 8
    host_memory: float = 240e9
    host_bandwidth: float = 40e9
    disk: float = 4e9

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# Data sheets of the vendors, dense rates of the SXM/OAM versions. Network: one 200 Gb/s (A100) or 400 Gb/s adapter a rank.
# Bus: PCIe 4 (A100) or 5. The host: 2 TB and some 330 GB/s a node of 8, assumed.
HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("a100", 312e12, 19.5e12, 156e12, 80e9, 2.04e12, 300e9, 25e9, 25e9),
        Hardware("h100", 989e12, 67e12, 494e12, 80e9, 3.35e12, 450e9, 50e9, 50e9),
        Hardware("h200", 989e12, 67e12, 494e12, 141e9, 4.8e12, 450e9, 50e9, 50e9),
        Hardware("mi300x", 1307e12, 163e12, 654e12, 192e9, 5.3e12, 448e9, 50e9, 50e9),
    )
}


def find_hardware(name: str) -> Hardware:
    """Local.

    Raises:
        LmcError: Not in the table.
    """
    if name not in HARDWARE:
        raise LmcError(f"plan_unlearn.hardware '{name}' is not in the table; there are {', '.join(HARDWARE)}")
    return HARDWARE[name]
