"""The training loop: which micro-batches, which learning rate, one update; then what is due after the step.

The loss of a step is the sum over the supervised targets of the whole global batch divided by their number, so the
update does not depend on micro-batch size, accumulation, packing or world size. Random numbers (dropout, NEFTune) are
seeded per micro-batch from (seed, step, number of the micro-batch in the global batch): no hidden state to restore.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .config import Config
from .data.loader import Loader, StepBatch
from .engine import Engine
from .errors import TrainingError
from .faults import faultpoint
from .schedule import learning_rate
from .tasks import Task

MAX_SKIPPED_IN_A_ROW = 5


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did. `loss` is the mean over the global batch's supervised targets."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    time_s: float
    skipped: bool
    is_stop_requested: bool

    def record(self) -> dict[str, Any]:
        """The line of metrics.jsonl; steps count from 1 there (steps done)."""
        fields = ("loss", "lr", "grad_norm", "tokens", "time_s", "skipped")
        return {"kind": "train", "step": self.step + 1} | {name: getattr(self, name) for name in fields}


def seed_micro_batch(seed: int, step: int, cell: int) -> None:
    """Seeds torch for one micro-batch, the same on whatever rank it runs."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, cell]).generate_state(1, np.uint64)[0] >> 1))


def train_step(
    engine: Engine, task: Task, config: Config, *, batch: StepBatch, step: int, lr: float, is_stopping: bool
) -> StepReport:
    """One optimizer step over this rank's micro-batches. Collective: every rank calls it with the same step."""
    start = time.perf_counter()
    loss_sum = torch.zeros((), dtype=torch.float64)
    last = len(batch.micro_batches) - 1
    for i, (cell, micro) in enumerate(zip(batch.cells, batch.micro_batches, strict=True)):
        seed_micro_batch(config.seed, step, cell)
        faultpoint("step.micro_batch")
        loss = task.loss(engine.module, micro, config) / batch.num_supervised
        engine.backward(loss, is_last=i == last)
        loss_sum += loss.detach().double().cpu()
    result = engine.step(lr)
    total, stops = engine.all_reduce_sum(torch.tensor([float(loss_sum), float(is_stopping)], dtype=torch.float64))
    return StepReport(
        step=step,
        loss=float(total),
        lr=lr,
        grad_norm=result.grad_norm,
        tokens=batch.num_tokens,
        time_s=time.perf_counter() - start,
        skipped=result.skipped,
        is_stop_requested=bool(stops > 0),
    )


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
) -> int:
    """Runs steps first_step … total_steps-1 and returns how many are done; fewer when a stop was requested.

    Raises TrainingError after MAX_SKIPPED_IN_A_ROW steps in a row with a non-finite gradient or loss.
    """
    skipped_in_a_row = 0
    for step in range(first_step, total_steps):
        lr = learning_rate(config, step, total_steps)
        report = train_step(engine, task, config, batch=loader.step(step), step=step, lr=lr, is_stopping=is_stopping())
        skipped_in_a_row = skipped_in_a_row + 1 if report.skipped or not math.isfinite(report.loss) else 0
        if skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"the loss or gradient was not finite in {skipped_in_a_row} steps in a row (up to step {step + 1}); "
                "lower optimizer.learning_rate, set train.max_grad_norm, or look for broken rows with `burnish data`"
            )
        after_step(report)
        if report.is_stop_requested:
            return step + 1
    return total_steps
