"""Failures at scale: how often, what saving and restarting take, and the share of time that trains. Pure; no torch.

The same share comes from a formula and from a seeded simulation of nodes that fail one by one; both stand beside each
other in docs/scaling.md. All of it is a model: rates are published, speeds of storage are assumed.
"""

import heapq
import math
import random
from dataclasses import dataclass

from ..harness.interval import Decision, decide
from ..harness.memory import FP32_BYTES
from ..harness.traffic import Collective, Hardware, traffic_s
from .scaling import ADAMW_BYTES, Work

DAY_S = 86400.0
WRITE_BYTES_PER_S = 1e9
"""Of one writer on shared storage; every node can read twice as fast, all at the same time."""
READ_BYTES_PER_S = 2e9
HASH_BYTES_PER_S = 1.5e9
"""sha256 on one core."""
START_S = 60.0
"""From the failure to ranks that have their model, without the checkpoint. All four are assumptions."""
TOLERANCE = 0.003
"""Of the share of time: how far formula and simulation lie apart at most."""
NUM_FAILURES = 20_000
"""Simulated ones, so that chance moves the share by less than that."""


@dataclass(frozen=True)
class Rate:
    """A published rate: `failures` in `hours` on `num_gpus` GPUs, each as likely to fail as the others."""

    name: str
    source: str
    num_gpus: int
    hours: float
    failures: float

    def mtbf_s(self, num_gpus: int) -> float:
        """Mean time between failures of a job of so many GPUs."""
        return 3600 * self.hours * self.num_gpus / self.failures / num_gpus

    def per_day(self, num_gpus: int) -> float:
        return DAY_S / self.mtbf_s(num_gpus)


RSC = Rate("Meta RSC, jobs of 1,024", "7.9 h between failures of jobs of 1,024 A100 (arXiv 2410.21680)", 1024, 7.9, 1)
RSC_LARGE = Rate("Meta RSC, 16,384", "1.8 h between failures at 16,384 A100 (arXiv 2410.21680)", 16384, 1.8, 1)
LLAMA = Rate(
    "Llama 3 405B", "419 unexpected interruptions in 54 days on 16,384 H100 (arXiv 2407.21783)", 16384, 54 * 24, 419
)
RATES = (RSC, RSC_LARGE, LLAMA)
"""The first is that of harness.interval."""


@dataclass(frozen=True)
class Course:
    """Seconds of a run, all of them, by what they were used for; `lost_s` was trained and is trained again."""

    trained_s: float
    saved_s: float
    lost_s: float
    restarted_s: float
    num_failures: int

    @property
    def share(self) -> float:
        return self.trained_s / (self.trained_s + self.saved_s + self.lost_s + self.restarted_s)


def checkpoint_bytes(work: Work) -> int:
    """Masters and both moments of AdamW in fp32 of what is trained; frozen weights are not in a checkpoint."""
    return (FP32_BYTES + ADAMW_BYTES) * work.num_trained


def save_s(work: Work, num_gpus: int, hardware: Hardware) -> float:
    """All ranks send their part to the first, which writes the files and hashes them; nobody trains meanwhile."""
    size = checkpoint_bytes(work)
    gathered_s = traffic_s([Collective("all_gather", size, work.shape.num_layers)], num_gpus, hardware)
    return gathered_s + size / WRITE_BYTES_PER_S + size / HASH_BYTES_PER_S


def restart_s(work: Work) -> float:
    """New processes, then every node reads the checkpoint and every rank hashes it before it is used."""
    size = checkpoint_bytes(work)
    return START_S + size / READ_BYTES_PER_S + size / HASH_BYTES_PER_S


def chosen(work: Work, num_gpus: int, *, step_s: float, hardware: Hardware, rate: Rate = RSC) -> Decision:
    """What `checkpoint.every_steps: auto` decides."""
    return decide(step_s=step_s, save_s=save_s(work, num_gpus, hardware), mtbf_s=rate.mtbf_s(num_gpus))


def expected_share(*, interval_s: float, save_s: float, restart_s: float, mtbf_s: float) -> float:
    """Training over time, where failures are independent and restarts fail too.

    T / (M exp(R/M) (exp((T+d)/M) - 1)): Daly, A higher order estimate of the optimum checkpoint interval for restart
    dumps, FGCS 22(3), 2006, its complete model.
    """
    lost = math.exp(restart_s / mtbf_s) * math.expm1((interval_s + save_s) / mtbf_s)
    return interval_s / (mtbf_s * lost)


def simulate(
    *,
    interval_s: float,
    save_s: float,
    restart_s: float,
    mtbf_s: float,
    num_nodes: int,
    num_failures: int = NUM_FAILURES,
    seed: int = 0,
) -> Course:
    """A run on nodes that fail one by one, each after an exponential time; a new one takes the failed one's place.

    `mtbf_s` is that of all nodes together. From a failure on the run restarts, trains for `interval_s`, saves, trains
    …; what was trained after the last whole save is lost. Ends with the last failure.
    """
    rng = random.Random(seed)
    node_s = mtbf_s * num_nodes
    failures = [rng.expovariate(1 / node_s) for _ in range(num_nodes)]
    heapq.heapify(failures)
    now = trained = saved = lost = restarted = 0.0
    is_restart = False
    for _ in range(num_failures):
        failure = failures[0]
        heapq.heapreplace(failures, failure + rng.expovariate(1 / node_s))
        left = failure - now
        start = min(left, restart_s) if is_restart else 0.0
        num_saves, rest = divmod(left - start, interval_s + save_s)
        restarted += start
        trained += num_saves * interval_s
        saved += num_saves * save_s
        lost += rest
        now, is_restart = failure, True
    return Course(trained, saved, lost, restarted, num_failures)
