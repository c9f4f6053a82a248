"""Bytes and seconds of collectives, and what ZeRO communicates in a step. Pure; no torch.

Shape letters: n ranks, B bytes of the whole tensor of a collective, Psi parameters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .memory import FP32_BYTES

BUCKET_ELEMENTS = 50_000_000
"""Gradients that one collective reduces at most, as harness.zero sets it."""
RING_PASSES = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1, "broadcast": 1, "reduce": 1}
"""How often a ring carries the whole tensor around: an all-reduce is a reduce-scatter and an all-gather."""


@dataclass(frozen=True)
class Link:
    """What one rank can send to its neighbour in a ring: bytes per second in one direction, and seconds per hop."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Hardware:
    """GPUs in nodes, each with a link to the others of its node and one to the same place in the other nodes."""

    name: str
    peak_flops_per_s: float
    memory_bytes: float
    gpus_per_node: int
    inside: Link
    between: Link


@dataclass(frozen=True)
class Collective:
    """`num_bytes` of whole tensors, given to `count` calls of one operation in equal parts."""

    op: str
    num_bytes: float
    count: int = 1


def sent_bytes(op: str, num_bytes: float, n: int) -> float:
    """Bytes that each of n ranks sends, on average, in the bandwidth-optimal form of a collective on B whole bytes.

    (n-1)/n B for reduce-scatter and all-gather, twice that for all-reduce (Patarasuk and Yuan, Bandwidth optimal
    all-reduce algorithms for clusters of workstations, JPDC 69, 2009); broadcast and reduce: n-1 ranks get or give B.
    """
    return RING_PASSES[op] * (n - 1) / n * num_bytes


def ring_s(op: str, num_bytes: float, n: int, link: Link) -> float:
    """Seconds of a ring: n-1 hops per pass, each of B/n bytes (Thakur et al., IJHPCA 19, 2005, section 4)."""
    return RING_PASSES[op] * (n - 1) * (num_bytes / n / link.bytes_per_s + link.latency_s)


def collective_s(op: str, num_bytes: float, n: int, hardware: Hardware) -> float:
    """Seconds of a collective on n GPUs: a ring inside every node, then a ring of the nodes for each place in a node.

    The second moves B / (GPUs per node), every GPU over its own link; the two do not overlap. n beyond a node must be
    whole nodes.
    """
    inside = min(n, hardware.gpus_per_node)
    nodes = n // inside
    assert nodes * inside == n, (n, hardware.gpus_per_node)
    return ring_s(op, num_bytes, inside, hardware.inside) + ring_s(op, num_bytes / inside, nodes, hardware.between)


def zero_traffic(
    stage: int,
    *,
    gradient_bytes: float,
    trained_bytes: float,
    weight_bytes: float,
    num_layers: int = 1,
    num_micro_batches: int = 1,
) -> list[Collective]:
    """What ZeRO communicates in a step (arXiv 1910.02054, section 7), each part in its own dtype.

    Stage 0 all-reduces the gradients. Stages 1 and 2 reduce-scatter them and all-gather the updated weights: 2 Psi,
    as much. Stage 3 all-gathers all weights, frozen ones too, for forward and again for backward, and reduce-scatters
    the gradients: 3 Psi. Gradients go in buckets, stage 3's weights layer by layer. Stages 2 and 3 keep no whole
    gradients between micro-batches, so each of these reduces its own; stages 0 and 1 reduce once.
    """
    num_buckets = max(1, math.ceil(gradient_bytes / FP32_BYTES / BUCKET_ELEMENTS))
    if stage == 0:
        return [Collective("all_reduce", gradient_bytes, num_buckets)]
    times = num_micro_batches if stage >= 2 else 1
    gradients = Collective("reduce_scatter", times * gradient_bytes, times * num_buckets)
    if stage in (1, 2):
        return [gradients, Collective("all_gather", trained_bytes)]
    return [Collective("all_gather", 2 * times * weight_bytes, 2 * times * num_layers), gradients]


def traffic_bytes(traffic: Sequence[Collective], n: int) -> float:
    """Bytes that each rank sends."""
    return sum(sent_bytes(part.op, part.num_bytes, n) for part in traffic)


def traffic_s(traffic: Sequence[Collective], n: int, hardware: Hardware) -> float:
    """Seconds, one collective after the other."""
    return sum(part.count * collective_s(part.op, part.num_bytes / part.count, n, hardware) for part in traffic)


def overlapped_step_s(compute_s: float, communication_s: float, overlap: float) -> float:
    """Seconds of a step of whose communication at most the fraction `overlap` hides behind computing."""
    assert 0 <= overlap <= 1, overlap
    return compute_s + communication_s - min(compute_s, overlap * communication_s)
