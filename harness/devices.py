"""Speeds of devices, links and disks, for estimates of time: peaks from data sheets, and what is assumed of the rest.

Nothing here was measured by burnish; `calibration` holds what was, and goes first. Pure; no torch.
"""

import re
from dataclasses import dataclass, replace

from .traffic import Hardware, Link


@dataclass(frozen=True)
class Speeds:
    """What one worker computes and moves in a second. `fabric` has its links to the others."""

    name: str
    flops_per_s: float
    """That training reaches, not the peak."""
    memory_bytes_per_s: float
    host_bytes_per_s: float
    """Host memory, for the optimizer of offloaded state."""
    pcie_bytes_per_s: float
    """One way between device and host."""
    nvme_bytes_per_s: float
    overlap: float
    """Share of the communication and of the transfers that hides behind computing."""
    fabric: Hardware


@dataclass(frozen=True)
class Card:
    """A GPU as its maker describes it: dense bf16 with fp32 sums, bytes as sold, links one way."""

    name: str
    flops_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    """NVLink where the card has it, else PCIe."""
    pcie_bytes_per_s: float
    source: str


PCIE_4, PCIE_5 = 32e9, 64e9
"""16 lanes, one way."""
SHEET = "NVIDIA's data sheet"
CARDS = (
    Card("B200", 2250e12, 180e9, 8.0e12, 900e9, PCIE_5, "NVIDIA's data sheet of the DGX B200, an eighth of it"),
    Card("H200", 989e12, 141e9, 4.8e12, 450e9, PCIE_5, SHEET),
    Card("H100 PCIe", 756e12, 80e9, 2.0e12, PCIE_5, PCIE_5, SHEET),
    Card("H100 NVL", 835e12, 94e9, 3.9e12, 300e9, PCIE_5, SHEET),
    Card("H100", 989e12, 80e9, 3.35e12, 450e9, PCIE_5, SHEET),
    Card("A100 40GB", 312e12, 40e9, 1.555e12, 300e9, PCIE_4, SHEET),
    Card("A100", 312e12, 80e9, 2.039e12, 300e9, PCIE_4, SHEET),
    Card("L40S", 362e12, 48e9, 864e9, PCIE_4, PCIE_4, SHEET),
    Card("A6000", 154.8e12, 48e9, 768e9, PCIE_4, PCIE_4, SHEET),
    Card("A10", 125e12, 24e9, 600e9, PCIE_4, PCIE_4, SHEET),
    Card("L4", 121e12, 24e9, 300e9, PCIE_4, PCIE_4, SHEET),
    Card("RTX 5090", 209.5e12, 32e9, 1.792e12, PCIE_5, PCIE_5, "NVIDIA's whitepaper of the RTX Blackwell architecture"),
    Card("RTX 4090", 165.2e12, 24e9, 1.008e12, PCIE_4, PCIE_4, "NVIDIA's whitepaper of the Ada architecture"),
    Card("RTX 3090", 71e12, 24e9, 936e9, PCIE_4, PCIE_4, "NVIDIA's whitepaper of the GA102 architecture"),
)
"""The first whose words are all in a device's name is taken, so narrower names stand before wider ones."""

GPU_SHARE = 0.4
"""Of the peak, that training reaches where nothing was measured: an assumption."""
LINK_SHARE = 0.8
"""Of a link's, a disk's or a memory's speed that is reached: an assumption."""
CORE_FLOPS_PER_S = 96e9
"""Two 8-lane fused multiply-adds a cycle at 3 GHz (AVX2, fp32)."""
CPU_SHARE = 0.4
CPU_BYTES_PER_S = 25.6e9
"""One channel of DDR4-3200: what a small machine has for all of its workers."""
SERVER_BYTES_PER_S = 8 * CPU_BYTES_PER_S
"""Eight channels: the host of GPUs."""
NVME_BYTES_PER_S = 3e9
"""A disk on four lanes of PCIe 3; all workers of a node share it."""
LATENCY_S = 5e-6
NETWORK = Link(LINK_SHARE * 12.5e9, 2e-5)
"""100 Gb/s between nodes."""
LOOPBACK = Link(1e9, 1e-4)
"""Two processes of one machine over gloo."""
GPU_OVERLAP = 0.5


def find_card(name: str) -> Card | None:
    """The card of a name such as `NVIDIA H100 80GB HBM3` or `h100`; None where it is not in the table."""
    words = set(re.findall(r"[a-z]+[0-9]+[a-z]*|[0-9]+gb|[0-9]+|[a-z]+", name.lower().replace("rtx", "rtx ")))
    return next((card for card in CARDS if set(card.name.lower().split()) <= words), None)


def speeds_of(device: str, *, name: str, num_threads: int, workers_per_node: int) -> Speeds:
    """What is known or assumed of one worker on a device; a GPU that is not in the table counts as the slowest."""
    shared = LINK_SHARE / workers_per_node
    if device == "cpu":
        return Speeds(
            name="CPU",
            flops_per_s=CPU_SHARE * CORE_FLOPS_PER_S * num_threads,
            memory_bytes_per_s=shared * CPU_BYTES_PER_S,
            host_bytes_per_s=shared * CPU_BYTES_PER_S,
            pcie_bytes_per_s=shared * CPU_BYTES_PER_S,
            nvme_bytes_per_s=shared * NVME_BYTES_PER_S,
            overlap=0.0,
            fabric=Hardware("CPU", 0.0, 0.0, workers_per_node, LOOPBACK, NETWORK),
        )
    card = find_card(name) or replace(min(CARDS, key=lambda card: card.flops_per_s), name=name or "GPU")
    inside = Link(LINK_SHARE * card.link_bytes_per_s, LATENCY_S)
    return Speeds(
        name=card.name,
        flops_per_s=GPU_SHARE * card.flops_per_s,
        memory_bytes_per_s=LINK_SHARE * card.memory_bytes_per_s,
        host_bytes_per_s=shared * SERVER_BYTES_PER_S,
        pcie_bytes_per_s=LINK_SHARE * card.pcie_bytes_per_s,
        nvme_bytes_per_s=shared * NVME_BYTES_PER_S,
        overlap=GPU_OVERLAP,
        fabric=Hardware(card.name, card.flops_per_s, card.memory_bytes, workers_per_node, inside, NETWORK),
    )
