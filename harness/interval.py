"""How often a run saves: `checkpoint.every_steps`, a number, none or `auto`. Pure; no torch.

`auto` weighs the time that saving takes against the work that a failure loses. M mean time between failures, d time of
a save, T training between two saves: the expected time is least at T = sqrt(2 d M) (Young, A first order approximation
to the optimum checkpoint interval, CACM 17(9), 1974), to higher order in `optimum_s` (Daly, A higher order estimate of
the optimum checkpoint interval for restart dumps, FGCS 22(3), 2006).

Saving changes no number of the training, so two runs that save at other steps have equal results.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .plan import Plan
from .run_dir import RunDir

if TYPE_CHECKING:
    from .engine import World

MAX_COST = 0.035
"""Share of the time that may go into saving beyond what failures call for: the bound that CheckFreq keeps (FAST'21)."""
LONGEST_S = 1800.0
"""Most training between two saves, however rare failures are, where saves are cheap enough for it."""
ASSUMED_SAVE_S = 10.0
"""Until a save was measured."""
GPU_MTBF_S = 7.9 * 1024 * 3600
"""Published: 7.9 h between failures of jobs of 1,024 GPUs on Meta's research clusters (arXiv 2410.21680). Failures of
components are taken to be independent, so that n of them fail n times as often as one."""
NODE_MTBF_S = GPU_MTBF_S / 8
"""Of a node: theirs have 8 GPUs."""
FAILURES = ("restart", "worker_failure")
"""Events that tell one: of the run as a whole, and of its workers."""
MIN_FAILURES = 2
"""Failures of the run itself from which on its own rate counts, where it is the higher one."""
NUM_SAVES = 5
"""The time of a save is the median of so many."""
MIN_STEPS = 4
"""Steps that are measured before the decision is told."""
CHANGE = 0.2
"""A decision is told again where it differs by more."""


@dataclass(frozen=True)
class Decision:
    """`interval_s` of training between two saves, `every_steps` at the present speed, and what they follow from."""

    every_steps: int
    interval_s: float
    step_s: float
    save_s: float
    mtbf_s: float
    bound: Literal["optimum", "cost", "longest"]


def optimum_s(save_s: float, mtbf_s: float) -> float:
    """T of least expected time; M where a save takes longer than 2 M."""
    ratio = save_s / (2 * mtbf_s)
    if ratio >= 1:
        return mtbf_s
    return math.sqrt(2 * save_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s


def decide(*, step_s: float, save_s: float, mtbf_s: float) -> Decision:
    """The optimum, but no longer than LONGEST_S or than saves of MAX_COST need, whichever is the longer of the two."""
    cheapest_s = save_s * (1 / MAX_COST - 1)
    best_s = optimum_s(save_s, mtbf_s)
    bound: Literal["optimum", "cost", "longest"] = "optimum"
    interval_s = min(best_s, max(LONGEST_S, cheapest_s))
    if interval_s != best_s:
        bound = "cost" if cheapest_s > LONGEST_S else "longest"
    return Decision(max(1, math.ceil(interval_s / step_s)), interval_s, step_s, save_s, mtbf_s, bound)


def published_mtbf_s(device: str, num_workers: int) -> float:
    """Of a run of so many GPUs; on CPUs, of as many nodes as it has workers, at most."""
    return (GPU_MTBF_S if device == "cuda" else NODE_MTBF_S) / num_workers


def mean_time_between_failures_s(
    failures: Sequence[Mapping[str, Any]], *, published_s: float, running_s: float
) -> float:
    """The published time, or that of the run so far, by its events of FAILURES, where this is shorter.

    So a run that failed twice while it started saves often at first, and less often the longer it goes on.
    """
    names = [event["event"] for event in failures]
    num_failures = max(names.count(name) for name in FAILURES)
    if num_failures < MIN_FAILURES:
        return published_s
    return min(published_s, max(1.0, running_s / num_failures))


class Interval(Protocol):
    """Says after which steps to save; every rank asks after every step."""

    def is_due(self, done: int) -> bool:
        """Whether to save after `done` steps. Collective: the same on all ranks."""

    def saved(self, done: int, time_s: float | None) -> None:
        """A save after `done` steps took so long; None where it failed, and the next one is to be tried."""


@dataclass(frozen=True)
class Fixed:
    """Every so many steps, or never."""

    every_steps: int | None

    def is_due(self, done: int) -> bool:
        return self.every_steps is not None and done % self.every_steps == 0

    def saved(self, done: int, time_s: float | None) -> None:
        """The next save is at the next multiple."""


class Auto:
    """Decides on rank 0, by its clock, and tells the others.

    Ranks do not speak after every step. Rank 0 says in how many steps they look again: half of those that are left, and
    no more than have been measured. So ranks that become slower save in time, and ten looks are enough for an hour.
    """

    def __init__(
        self,
        *,
        first_step: int,
        is_first: bool,
        published_s: float,
        events: Sequence[Mapping[str, Any]] = (),
        share: Callable[[float], float],
        tell: Callable[[dict[str, Any]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`share` gives every rank rank 0's number; `events` are those of the run so far, on rank 0."""
        self.is_first, self.share, self.tell, self.clock = is_first, share, tell, clock
        self.published_s, self.epoch_s = published_s, time.time() - clock()
        self.failures = [event for event in events if event.get("event") in FAILURES]
        self.begun = events[0]["time"] if events else 0.0
        saves_s = [float(event["time_s"]) for event in events if event.get("event") == "checkpoint"]
        self.save_times_s = deque(saves_s, maxlen=NUM_SAVES)
        self.told = 0
        self._begin(first_step)

    def _begin(self, done: int) -> None:
        self.saved_step, self.look_at, self.since_s = done, done + 1, self.clock()

    def is_due(self, done: int) -> bool:
        if done < self.look_at:
            return False
        left = int(self.share(float(self._steps_left(done)) if self.is_first else 0.0))
        self.look_at = done + max(1, min(left // 2, done - self.saved_step))
        return left == 0

    def saved(self, done: int, time_s: float | None) -> None:
        if time_s is not None:
            self.save_times_s.append(time_s)
        self._begin(done)

    def _steps_left(self, done: int) -> int:
        """Steps until the next save: 0 where it is due."""
        num_steps, elapsed_s = done - self.saved_step, self.clock() - self.since_s
        save_s = statistics.median(self.save_times_s) if self.save_times_s else ASSUMED_SAVE_S
        now = self.epoch_s + self.clock()
        mtbf_s = mean_time_between_failures_s(self.failures, published_s=self.published_s, running_s=now - self.begun)
        found = decide(step_s=max(elapsed_s / num_steps, 1e-6), save_s=save_s, mtbf_s=mtbf_s)
        left = max(0, math.ceil((found.interval_s - elapsed_s) / found.step_s))
        if (num_steps >= MIN_STEPS or left == 0) and abs(found.every_steps - self.told) > CHANGE * self.told:
            self.told = found.every_steps
            self.tell({"event": "checkpoint_interval", "step": done} | asdict(found))
        return left


def of_run(
    plan: Plan,
    world: "World",
    *,
    first_step: int,
    share: Callable[[float], float],
    tell: Callable[[dict[str, Any]], None],
) -> Interval:
    """The interval that the plan's config asks for."""
    every_steps, run = plan.config.checkpoint.every_steps, RunDir(plan.run_dir)
    if every_steps != "auto":
        return Fixed(every_steps)
    is_first = world.rank == 0
    return Auto(
        first_step=first_step,
        is_first=is_first,
        published_s=published_mtbf_s(plan.device, world.size),
        events=run.read_jsonl(run.events_jsonl) if is_first else [],
        share=share,
        tell=tell,
    )
