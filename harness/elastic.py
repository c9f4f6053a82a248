"""Runs whose number of workers changes: what a worker derives from the driver's plan. Pure; no torch.

G global batch size, m micro-batch, W workers. A step has G/m cells (`data.loader`), whatever W is: rank r takes the
cells r, r + W, r + 2W … So rows, their order, their micro-batches and the random numbers of each are those of every
other W; only the order in which gradients are added differs. Where W does not divide the cells, some ranks take an
empty micro-batch at the end of the step: all ranks have to take part in as many collectives.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from .config import Config
from .errors import ConfigError

if TYPE_CHECKING:
    from .plan import Plan

MAX_AUTO_MICRO_BATCH = 8
MAX_TRIED = 4096


def is_elastic(config: Config) -> bool:
    return config.launch.type == "ray" and config.launch.min_workers < config.launch.max_workers


def accumulation(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches of a rank in a step, empty ones among them: ceil(G / (m W))."""
    assert global_batch_size % micro_batch_size == 0, (global_batch_size, micro_batch_size)
    return -(-global_batch_size // (micro_batch_size * world_size))


def micro_batch(global_batch_size: int, wanted: int | str, max_workers: int) -> int:
    """The micro-batch of an elastic run: a divisor of the global batch that leaves a cell for every worker.

    Raises ConfigError where there is none.
    """
    if global_batch_size < max_workers:
        raise ConfigError(
            f"train.global_batch_size={global_batch_size} leaves some of up to {max_workers} workers without work; "
            f"use at least {max_workers}, or at most {global_batch_size} in launch.num_workers"
        )
    valid = micro_batches(global_batch_size, max_workers)
    if wanted == "auto":
        return max(n for n in valid if n <= MAX_AUTO_MICRO_BATCH)
    share, rest = divmod(global_batch_size, max_workers)
    if int(wanted) > share or (global_batch_size if rest else share) % int(wanted):
        near = sorted(sorted(valid, key=lambda n: abs(n - int(wanted)))[:8])
        raise ConfigError(
            f"train.micro_batch_size={wanted} does not cut a global batch of {global_batch_size} into equal parts, at "
            f"least one for each of up to {max_workers} workers; use one of {', '.join(map(str, near))}"
        )
    return int(wanted)


def micro_batches(global_batch_size: int, max_workers: int) -> list[int]:
    """What `micro_batch` may be, up to MAX_TRIED. Where all workers can have the same share, it divides that."""
    share, rest = divmod(global_batch_size, max_workers)
    whole = global_batch_size if rest else share
    return [n for n in range(1, min(share, MAX_TRIED) + 1) if whole % n == 0]


def plan_for(plan: "Plan", world_size: int) -> "Plan":
    """The plan of a rank in a group of this size: the same steps on the same rows, with another accumulation."""
    total = plan.config.train.global_batch_size
    steps = accumulation(total, plan.micro_batch_size, world_size)
    return replace(plan, world_size=world_size, gradient_accumulation_steps=steps)


def smallest(plan: "Plan") -> "Plan":
    """The plan of the smallest group of workers, in which every one holds the most."""
    return plan_for(plan, plan.config.launch.min_workers if plan.config.launch.type == "ray" else 1)
