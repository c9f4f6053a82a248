"""What a run notices about its own figures: skipped steps, spikes of the loss, slow ranks. Pure; no torch."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loop import StepReport

SPIKE_WINDOW = 64
SPIKE_DEVIATIONS = 8.0
WINDOW = 18
"""Steps that a judgement about a rank is made from."""
SLOW_STEPS = 13
"""Of these, so many are slow in a slow rank."""
NORMAL_STEPS = 4
SLOW_RATIO, LEAST_RATIO = 1.8, 1.2
SLOW_EXCESS_S = 0.01
"""A rank that loses less than this in a step is not worth a word, whatever the ratio."""


class Spikes:
    """Losses far above those of the 64 steps before: more than median + 8 MAD (median absolute deviation)."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self.losses = deque(losses, maxlen=SPIKE_WINDOW)

    def limit(self, loss: float) -> float | None:
        """What this step's loss is above, or None if it is no spike; the loss counts from the next step on.

        A loss that is not finite is another matter, and does not count.
        """
        if not math.isfinite(loss):
            return None
        usual = sorted(self.losses)
        self.losses.append(loss)
        if len(usual) < SPIKE_WINDOW:
            return None
        middle = median(usual)
        limit = middle + SPIKE_DEVIATIONS * median(abs(value - middle) for value in usual)
        return limit if loss > limit else None


class Stragglers:
    """Ranks that take about twice as long as the others, or longer, for what each does without waiting for them.

    A rank may have the longest micro-batch, and the time of one may follow its length or not. So two ratios to the
    others are taken, of the seconds and of the seconds per element: in a slow step their geometric mean is large, and
    neither is small.
    """

    def __init__(self, num_ranks: int) -> None:
        self.recent: list[deque[bool]] = [deque(maxlen=WINDOW) for _ in range(num_ranks)]
        self.named: set[int] = set()

    def see(self, seconds: Sequence[float], elements: Sequence[float]) -> dict[int, float]:
        """Ranks that are named from this step on, and how many times as long as the others they take."""
        rates = [time / max(1.0, size) for time, size in zip(seconds, elements, strict=True)]
        found = {}
        for rank, recent in enumerate(self.recent):
            ratios = _ratio(seconds, rank), _ratio(rates, rank)
            ratio = math.sqrt(ratios[0] * ratios[1])
            excess_s = seconds[rank] * (1 - 1 / ratio) if ratio > 0 else 0.0
            recent.append(ratio >= SLOW_RATIO and min(ratios) >= LEAST_RATIO and excess_s >= SLOW_EXCESS_S)
            if sum(recent) >= SLOW_STEPS and rank not in self.named:
                self.named.add(rank)
                found[rank] = ratio
            elif len(recent) == WINDOW and sum(recent) <= NORMAL_STEPS:
                self.named.discard(rank)
        return found


def _ratio(values: Sequence[float], rank: int) -> float:
    """A rank's value over the median of the others'; 0 where these are 0."""
    others = [value for number, value in enumerate(values) if number != rank]
    usual = median(others) if others else 0.0
    return values[rank] / usual if usual > 0 else 0.0


class Notices:
    """Says as events what is noticed about each step."""

    def __init__(self, emit: Callable[[dict[str, Any]], None], *, num_ranks: int) -> None:
        self.emit, self.stragglers = emit, Stragglers(num_ranks)

    def see(self, step: "StepReport") -> None:
        done = step.step + 1
        if step.spike_limit is not None:
            self.emit({"event": "loss_spike", "step": done, "loss": step.loss, "limit": step.spike_limit})
        if step.skipped:
            reason = "its loss or gradient is not finite" if step.spike_limit is None else "its loss jumped"
            self.emit({"event": "skipped_step", "step": done, "num_skipped": step.num_skipped, "reason": reason})
        if step.busy_s:
            for rank, ratio in self.stragglers.see(step.busy_s, step.elements).items():
                self.emit({"event": "straggler", "step": done, "rank": rank, "ratio": round(ratio, 2)})
