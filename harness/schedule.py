"""Learning-rate schedules: a pure function of the step, so resuming needs no scheduler state.

With s the step (from 0), N the steps of the run, W the warm-up steps, D the decay steps of wsd, r = min_lr_ratio:

    warm-up, s < W   peak * s / W                            (the first step of a warm-up has learning rate 0)
    constant         peak
    linear           peak * (r + (1 - r) * (1 - p))                        p = (s - W) / (N - W)
    cosine           peak * (r + (1 - r) * (1 + cos(pi * p)) / 2)          p = (s - W) / (N - W)
    wsd              peak, then linear over the last D steps               p = (s - (N - D)) / D

These are transformers' `get_*_schedule_with_warmup` (r = 0) and `get_wsd_schedule`; W = ceil(warmup_ratio * N).
"""

import math

from .config import Config


def learning_rate(config: Config, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0, in a run of `total_steps`."""
    peak, schedule = config.optimizer.learning_rate, config.schedule
    warmup = schedule.warmup_steps
    if warmup is None:
        warmup = math.ceil(schedule.warmup_ratio * total_steps)
    if step < warmup:
        return peak * step / warmup
    if schedule.lr == "constant":
        return peak
    length = max(1, total_steps - warmup)
    if schedule.lr == "wsd":
        length = max(1, min(length, math.ceil(schedule.decay_ratio * total_steps)))
    progress = min(1.0, max(0.0, (step - (total_steps - length)) / length))
    share = (1 + math.cos(math.pi * progress)) / 2 if schedule.lr == "cosine" else 1 - progress
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * share)
