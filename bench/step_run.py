"""One configuration of the step benchmark: the check of the losses and the steps in turn.

Every process is fresh and does one thing. No torch here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from . import errands
from .benchmark import Say
from .modes import MODES
from .pool import Crew, Worker, WorkerDied, at_once
from .step_cases import Case
from .workload import Workload

NUM_CHECK_STEPS = 3
LOSS_TOLERANCE = 2.0**-9
"""Largest relative difference of the first loss from the baseline's: the unit roundoff of bf16."""
FALL_TOLERANCE = 2.0**-3
"""The same for the fall of the loss over the check. PEFT in bf16 and in fp32 were 2% apart on SmolLM2-135M."""

QUIET_CORES = 0.25
"""A round counts as quiet if other processes used no more cores than this in any of its steps. Two threads that wait
for each other lose far more than their share to a third: steps of 1 s took 9 s."""
CLOCK_S = 0.02
"""What the kernel's accounts may be off by: two of its ticks."""
MAX_ROUNDS = 2
"""Rounds at most, as a multiple of those asked for, until enough were quiet."""

MAX_ALIVE = {"cpu": 5, "cuda": 8}
"""Processes at a time; with more modes there are groups, each with the baseline and burnish's own."""
ROOM_SHARE = 0.9
"""Of the device's memory, for processes that are alive together."""
DROPOUT_SHARE = 1.25
"""How much more than in the check, which has no dropout, a mode needs when it is timed; and what is lost to gaps."""
CONTEXT_BYTES = 2**29
"""What a process takes of a GPU without any tensor."""


@dataclass
class Row:
    """All that was measured of one mode."""

    mode: str
    built: dict[str, Any] = field(default_factory=dict)
    check_losses: list[float] = field(default_factory=list)
    check_peak_bytes: int = 0
    warmup_times_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    missing: str | None = None
    failure: str | None = None
    void: str | None = None

    @property
    def state(self) -> str:
        if self.missing is not None:
            return "not measured"
        return "failed" if self.failure is not None else "void" if self.void is not None else "ok"

    @property
    def reason(self) -> str | None:
        return self.missing or self.failure or self.void


@dataclass
class Measurement:
    """Rows by mode, and of every round the step times by mode and the cores that others used meanwhile.

    A round holds the modes that were alive together.
    """

    case: Case
    device: str
    workload: Workload
    num_rounds: int
    rows: dict[str, Row]
    rounds: list[dict[str, float]] = field(default_factory=list)
    others: list[dict[str, float]] = field(default_factory=list)
    is_interrupted: bool = False

    def modes(self) -> list[str]:
        """Those that are neither missing, failed nor void."""
        return [mode for mode, row in self.rows.items() if row.state == "ok"]


def measure_case(case: Case, *, device: str, num_threads: int, num_rounds: int | None, say: Say) -> Measurement:
    """Checks the losses of every mode, then times those that passed. What was timed before a Ctrl-C is kept."""
    rows = {mode: Row(mode) for mode in case.modes}
    found = Measurement(case, device, case.workload(num_threads), num_rounds or case.num_rounds, rows)
    for row in rows.values():
        if names := MODES[row.mode].missing():
            row.missing = f"{' and '.join(names)} is not installed"
            say(f"{row.mode}: {row.missing}")
    try:
        workload = errands.with_unpacked_weights(found.workload)
        # A GPU machine has cores to let libraries be imported meanwhile; on a CPU that would take others' time.
        with Crew(ahead=2 * found.modes() if device == "cuda" else []) as crew:
            check_all(found, workload, crew, say)
            compare_losses(found)
            time_all(found, workload, crew, say)
    except errands.ErrandFailed as failed:
        for row in rows.values():
            row.failure = str(failed)
    except KeyboardInterrupt:
        if not found.rounds:
            raise
        found.is_interrupted = True
    return found


def check_all(found: Measurement, workload: Workload, crew: Crew, say: Say) -> None:
    """A few steps of every mode without dropout, in processes of their own; the losses go into the rows.

    Several run at a time and share the threads: nothing is timed.
    """
    modes = sorted(found.modes(), key=lambda mode: not MODES[mode].is_slow_to_start)
    num_at_once = min(found.case.num_checks_at_once, len(modes))
    if found.device == "cpu":
        num_at_once = max(1, min(num_at_once, workload.num_threads))
        workload = replace(workload, num_threads=workload.num_threads // num_at_once)

    def check(row: Row) -> None:
        worker = crew.take(row.mode)
        try:
            worker.build(workload.for_check())
            answers = [worker.step() for _ in range(NUM_CHECK_STEPS)]
            row.built = worker.built
            row.check_losses = [answer["loss"] for answer in answers]
            row.check_peak_bytes = answers[-1]["peak_bytes"]
        except WorkerDied as died:
            row.failure = str(died)
            say(f"{row.mode}: {row.failure}")
        worker.close()

    say(f"{', '.join(modes)}: {NUM_CHECK_STEPS} steps without dropout each, for the losses")
    at_once([partial(check, found.rows[mode]) for mode in modes], num_at_once=num_at_once, stop=crew.kill)


def compare_losses(found: Measurement) -> None:
    """Makes void the rows whose model or losses are not the baseline's."""
    base = found.rows[found.case.baseline]
    if base.state != "ok":
        return
    for mode in found.modes():
        row = found.rows[mode]
        if row.built["num_trained"] != base.built["num_trained"]:
            row.void = f"trains {row.built['num_trained']} weights, {base.mode} {base.built['num_trained']}"
        else:
            row.void = difference(row.check_losses, base.check_losses)


def difference(losses: Sequence[float], baseline: Sequence[float]) -> str | None:
    """In what the losses of a check are not the baseline's; None where they agree."""
    first = abs(losses[0] - baseline[0]) / abs(baseline[0])
    falls = losses[0] - losses[-1], baseline[0] - baseline[-1]
    if not all(map(math.isfinite, losses)):
        return f"its losses are not finite: {', '.join(f'{loss:g}' for loss in losses)}"
    if not first <= LOSS_TOLERANCE:
        return f"its first loss differs by {first:.2g}, allowed is {LOSS_TOLERANCE:.2g}"
    if not abs(falls[0] - falls[1]) <= FALL_TOLERANCE * abs(falls[1]):
        return (
            f"its loss falls by {falls[0]:.4g}, the baseline's by {falls[1]:.4g}; allowed is {FALL_TOLERANCE:.2g} of it"
        )
    return None


def groups(found: Measurement) -> tuple[list[str], list[list[str]]]:
    """The baseline and burnish's own mode, which stay alive, and the others in groups that fit beside them.

    On a CPU every process keeps its peak; on a GPU all keep their weights, and one at a time has activations.
    """
    modes, case = found.modes(), found.case
    common = [mode for mode in modes if mode in (case.baseline, case.own)]
    others = [mode for mode in modes if mode not in common]
    parts: list[list[str]] = [[]]
    for mode in others:
        candidate = [*parts[-1], mode]
        is_fitting = len(common) + len(candidate) <= MAX_ALIVE[found.device] and fits(found, common + candidate)
        if is_fitting or not parts[-1]:
            parts[-1] = candidate
        else:
            parts.append([mode])
    return common, parts


def fits(found: Measurement, modes: Sequence[str]) -> bool:
    """Whether these processes may be alive together, by what they needed in the check."""
    rows = [found.rows[mode] for mode in modes]
    if found.device == "cpu":
        needed = sum(DROPOUT_SHARE * row.check_peak_bytes for row in rows)
    else:
        steady = [row.built["loaded_bytes"] + CONTEXT_BYTES for row in rows]
        needed = sum(steady) + max(DROPOUT_SHARE * (row.check_peak_bytes - row.built["loaded_bytes"]) for row in rows)
    return needed <= ROOM_SHARE * min(row.built["room_bytes"] for row in rows)


def time_all(found: Measurement, workload: Workload, crew: Crew, say: Say) -> None:
    """Takes the steps of all modes in turn, group by group."""
    common, parts = groups(found)
    staying = load(common, found, workload, crew, say)
    for part in parts:
        workers = load(part, found, workload, crew, say)
        alive = {mode: worker for mode, worker in (staying | workers).items() if found.rows[mode].state == "ok"}
        take_turns(alive, found, say)
        for worker in workers.values():
            worker.close()


def load(modes: Sequence[str], found: Measurement, workload: Workload, crew: Crew, say: Say) -> dict[str, Worker]:
    """Processes that have loaded their models, on a CPU two at a time, and have warmed up one after the other."""
    workers = {mode: crew.take(mode) for mode in modes} if found.device == "cuda" else {}

    def build(mode: str) -> None:
        worker = workers[mode] if mode in workers else crew.take(mode)
        workers[mode] = worker
        try:
            worker.build(workload)
            found.rows[mode].built = worker.built
        except WorkerDied as died:
            fail(mode, died, found, workers, say)

    if modes:
        say(f"{', '.join(modes)}: load")
    num_at_once = min(2, workload.num_threads) if found.device == "cpu" else len(modes)
    at_once([partial(build, mode) for mode in modes], num_at_once=num_at_once, stop=crew.kill)
    for mode in [mode for mode in modes if mode in workers]:
        say(f"{mode}: {found.case.num_warmup} steps to warm up")
        try:
            times = [workers[mode].turn()["time_s"] for _ in range(found.case.num_warmup)]
            found.rows[mode].warmup_times_s = times
        except WorkerDied as died:
            fail(mode, died, found, workers, say)
    return workers


def fail(mode: str, died: WorkerDied, found: Measurement, workers: dict[str, Worker], say: Say) -> None:
    """The mode's process is gone; the others go on."""
    found.rows[mode].failure = str(died)
    say(f"{mode}: {died}")
    workers.pop(mode).close()


def take_turns(workers: dict[str, Worker], found: Measurement, say: Say) -> None:
    """Rounds, until enough of them were quiet."""
    num_quiet = 0
    for number in range(MAX_ROUNDS * found.num_rounds):
        times = one_round(number, workers, found, say)
        quiet = is_quiet(found.others[-1])
        num_quiet += quiet
        shown = ", ".join(f"{mode} {time_s:.3f} s" for mode, time_s in times.items())
        say(f"round {len(found.rounds)}: {shown}" + ("" if quiet else " (disturbed)"))
        if num_quiet == found.num_rounds or not workers:
            break


def one_round(number: int, workers: dict[str, Worker], found: Measurement, say: Say) -> dict[str, float]:
    """One step of each, starting with another mode every time. A mode that dies is dropped."""
    modes = list(workers)
    first = number % max(1, len(modes))
    times: dict[str, float] = {}
    others: dict[str, float] = {}
    for mode in modes[first:] + modes[:first]:
        row = found.rows[mode]
        try:
            answer = workers[mode].turn()
        except WorkerDied as died:
            fail(mode, died, found, workers, say)
            continue
        times[mode] = answer["time_s"]
        others[mode] = max(0.0, (answer["others_s"] - CLOCK_S) / answer["time_s"])
        row.losses.append(answer["loss"])
        row.peak_bytes = max(row.peak_bytes, answer["peak_bytes"])
    found.rounds.append(times)
    found.others.append(others)
    return {mode: times[mode] for mode in modes if mode in times}


def is_quiet(others: Mapping[str, float]) -> bool:
    return all(cores <= QUIET_CORES for cores in others.values())
