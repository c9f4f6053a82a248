"""The training loop: which micro-batches, which learning rate, one update; then what is due after the step.

The loss of a step is the sum over the supervised targets of the whole global batch divided by their number, so the
update does not depend on micro-batch size, accumulation, packing or world size. Random numbers (dropout, NEFTune) are
seeded per micro-batch from (seed, step, number of the micro-batch in the global batch): no hidden state to restore.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import Config
from .data.loader import Loader, StepBatch
from .detectors import Spikes
from .engine import Engine, World
from .errors import TrainingError
from .faults import faultpoint, loss_factor
from .schedule import learning_rate
from .tasks import Task

MAX_SKIPPED_IN_A_ROW = 5
MAX_SKIPPED_SHARE = 0.01
"""Of all steps of the run; MAX_SKIPPED_IN_A_ROW steps are always allowed."""


@dataclass(frozen=True)
class Pace:
    """Where ranks compare how long each works without waiting for others: until its first forward pass has ended.

    Under ZeRO-3 a forward pass waits for the others' weights, so only what comes before it counts.
    """

    rank: int
    world_size: int
    device: str
    has_own_forward: bool


def pace_of(world: World, *, zero_stage: int) -> Pace | None:
    """Ranks compare where there are several."""
    return Pace(world.rank, world.size, world.device, has_own_forward=zero_stage < 3) if world.size > 1 else None


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did. `loss` is the mean over the global batch's supervised targets.

    `busy_s` and `elements` have one number for each rank where the step was given a Pace: how long it worked without
    waiting for others, and for how large a micro-batch. `num_skipped` counts the run's skipped steps up to this one.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    time_s: float
    skipped: bool
    is_stop_requested: bool
    busy_s: tuple[float, ...] = ()
    elements: tuple[float, ...] = ()
    num_skipped: int = 0
    spike_limit: float | None = None
    """What the loss is above, where it is a spike."""

    def record(self) -> dict[str, Any]:
        """The line of metrics.jsonl; steps count from 1 there (steps done)."""
        fields = ("loss", "lr", "grad_norm", "tokens", "time_s", "skipped")
        return {"kind": "train", "step": self.step + 1} | {name: getattr(self, name) for name in fields}


def seed_micro_batch(seed: int, step: int, cell: int) -> None:
    """Seeds torch for one micro-batch, the same on whatever rank it runs."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, cell]).generate_state(1, np.uint64)[0] >> 1))


def train_step(
    engine: Engine,
    task: Task,
    config: Config,
    *,
    batch: StepBatch,
    step: int,
    lr: float,
    is_stopping: bool,
    spikes: Spikes | None = None,
    pace: Pace | None = None,
    began: float | None = None,
    progress: Callable[[], None] = lambda: None,
) -> StepReport:
    """One optimizer step over this rank's micro-batches. Collective: every rank calls it with the same step.

    The gradient of a loss that is not finite is made not finite, so that every rank skips the step; so is that of a
    spike where the config says so. `spikes` has the losses before, the same on every rank; without it none is looked
    for. `began` is when this rank began to work for the step, of time.perf_counter; `progress` is called before every
    micro-batch.
    """
    start = time.perf_counter()
    loss_sum: Tensor | float = 0.0
    spike_limit: float | None = None
    last = len(batch.micro_batches) - 1
    busy = Busy(start if began is None else began, on_device=pace is not None and pace.device == "cuda")
    for i, (cell, micro) in enumerate(zip(batch.cells, batch.micro_batches, strict=True)):
        progress()
        seed_micro_batch(config.seed, step, cell)
        faultpoint("step.micro_batch")
        if i == 0 and pace is not None and not pace.has_own_forward:
            busy.end()
        loss = task.loss(engine.module, micro, config) / batch.num_supervised
        if i == 0 and pace is not None and pace.has_own_forward:
            busy.end()
        if loss_factor() != 1:
            loss = loss * loss_factor()
        loss_sum = loss_sum + loss.detach().double()
        factor = one_or_nan(loss)
        if i == last and spikes is not None and config.train.on_loss_spike == "skip":
            [total] = engine.all_reduce_sum(torch.tensor([float(loss_sum)], dtype=torch.float64)).tolist()
            spike_limit = spikes.limit(total)
            factor = factor if spike_limit is None else factor * math.nan
        engine.backward(loss * factor, is_last=i == last)
    result = engine.step(lr)
    values = torch.tensor([float(loss_sum), float(is_stopping), *_own(pace, busy, batch)], dtype=torch.float64)
    total, stops, *paces = engine.all_reduce_sum(values).tolist()
    if spikes is not None and config.train.on_loss_spike == "note" and not result.skipped:
        spike_limit = spikes.limit(total)
    return StepReport(
        step=step,
        loss=total,
        lr=lr,
        grad_norm=result.grad_norm,
        tokens=batch.num_tokens,
        time_s=time.perf_counter() - start,
        skipped=result.skipped,
        is_stop_requested=stops > 0,
        busy_s=tuple(paces[0::2]),
        elements=tuple(paces[1::2]),
        spike_limit=spike_limit,
    )


def one_or_nan(loss: torch.Tensor) -> torch.Tensor:
    """1 for a finite loss, else NaN. Without waiting for the device."""
    return torch.where(torch.isfinite(loss.detach()), 1.0, math.nan).to(loss.dtype)


class Busy:
    """Seconds from `began` (of time.perf_counter) to `end`. On a GPU by events, so that nobody waits for it."""

    def __init__(self, began: float, *, on_device: bool) -> None:
        self.began, self.time_s = began, 0.0
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_device else []
        if self.events:
            self.time_s = time.perf_counter() - began
            self.events[0].record()

    def end(self) -> None:
        if self.events:
            self.events[1].record()
        else:
            self.time_s = time.perf_counter() - self.began

    def seconds(self) -> float:
        """After the device has reached the end."""
        return self.time_s + (self.events[0].elapsed_time(self.events[1]) / 1000 if self.events else 0.0)


def _own(pace: Pace | None, busy: Busy, batch: StepBatch) -> list[float]:
    """This rank's seconds and elements, and zeros at the places of the others: the sum over ranks has all."""
    if pace is None:
        return []
    first = batch.micro_batches[0].values()
    elements = max((value.numel() for value in first if isinstance(value, torch.Tensor)), default=0)
    values = [0.0] * (2 * pace.world_size)
    values[2 * pace.rank : 2 * pace.rank + 2] = busy.seconds(), float(elements)
    return values


def train(
    engine: Engine,
    task: Task,
    config: Config,
    *,
    loader: Loader,
    first_step: int,
    total_steps: int,
    is_stopping: Callable[[], bool],
    after_step: Callable[[StepReport], None],
    spikes: Spikes,
    num_skipped: int = 0,
    pace: Pace | None = None,
    progress: Callable[[], None] = lambda: None,
) -> int:
    """Runs steps first_step … total_steps-1 and returns how many are done; fewer when a stop was requested.

    Raises TrainingError after MAX_SKIPPED_IN_A_ROW skipped steps in a row (a gradient or loss that is not finite, or a
    spike where these are skipped), and where MAX_SKIPPED_SHARE of the run's steps were. `num_skipped` and `spikes` are
    of the steps before first_step.
    """
    in_a_row = 0
    for step in range(first_step, total_steps):
        progress()
        began = time.perf_counter()
        faultpoint("step", step=step + 1)
        report = train_step(
            engine,
            task,
            config,
            batch=loader.step(step),
            step=step,
            lr=learning_rate(config, step, total_steps),
            is_stopping=is_stopping(),
            spikes=spikes,
            pace=pace,
            began=began,
            progress=progress,
        )
        is_broken = report.skipped or not math.isfinite(report.loss)
        in_a_row, num_skipped = (in_a_row + 1, num_skipped + 1) if is_broken else (0, num_skipped)
        _check_skipped(step, in_a_row, num_skipped, total_steps)
        after_step(replace(report, num_skipped=num_skipped))
        if report.is_stop_requested:
            return step + 1
    return total_steps


def _check_skipped(step: int, in_a_row: int, num_skipped: int, total_steps: int) -> None:
    most = max(MAX_SKIPPED_IN_A_ROW, int(MAX_SKIPPED_SHARE * total_steps))
    if in_a_row < MAX_SKIPPED_IN_A_ROW and num_skipped <= most:
        return
    how_often = f"{in_a_row} steps in a row" if in_a_row >= MAX_SKIPPED_IN_A_ROW else f"{num_skipped} steps"
    raise TrainingError(
        f"{how_often} were skipped, for a loss or gradient that is not finite or a loss that jumped (up to step "
        f"{step + 1} of {total_steps}); "
        "lower optimizer.learning_rate, set train.max_grad_norm, or look for broken rows with `burnish data`"
    )
