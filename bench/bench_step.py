"""Whole training steps of several modes side by side, and whether they compute the same.

One fresh process per mode; all stay alive and take one step each in turn, starting with another one every round, so
that a slow moment of the machine hits all alike. Ratios are of steps of the same round, and rounds in which other
processes kept the machine busy are left out and taken again. Before that a check: three
steps of each mode without dropout, from the same adapter on the same batch, must give the baseline's first loss and
make it fall as far. The losses in between say little: AdamW's first update is the sign of a gradient that bf16 rounds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from ..harness.errors import ConfigError
from .modes import MODES
from .pool import Worker, WorkerDied, open_worker
from .stats import paired_ratios, quantiles
from .workload import Workload

MAX_ALIVE = 5
"""Processes at a time; with more modes there are groups, each with the baseline and burnish."""
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

Say = Callable[[str], None]


@dataclass
class Row:
    """All that was measured of one mode."""

    mode: str
    built: dict[str, Any] = field(default_factory=dict)
    check_losses: list[float] = field(default_factory=list)
    warmup_times_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    failure: str | None = None
    void: str | None = None


@dataclass
class Measurement:
    """Rows by mode, and of every round the step times by mode and the cores that others used meanwhile.

    A round holds the modes of one group.
    """

    workload: Workload
    baseline: str
    rows: dict[str, Row]
    rounds: list[dict[str, float]] = field(default_factory=list)
    others: list[dict[str, float]] = field(default_factory=list)
    is_interrupted: bool = False


def measure(
    modes: Sequence[str], workload: Workload, *, baseline: str, num_steps: int, num_warmup: int, say: Say
) -> Measurement:
    """Checks the losses of every mode, then times all modes. Raises ConfigError for a mode there is not."""
    check_names([*modes, baseline])
    found = Measurement(workload, baseline, {mode: Row(mode) for mode in modes})
    try:
        for row in found.rows.values():
            check(row, workload, say)
        compare_losses(found)
        for group in groups([mode for mode, row in found.rows.items() if row.failure is None], baseline):
            time_group(group, found, num_steps=num_steps, num_warmup=num_warmup, say=say)
    except KeyboardInterrupt:
        if not found.rounds:
            raise
        found.is_interrupted = True
    return found


def check_names(modes: Sequence[str]) -> None:
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"{mode!r} is no mode of the step benchmark; there is {', '.join(MODES)}")


def groups(modes: Sequence[str], baseline: str) -> list[list[str]]:
    """Modes that are alive together: at most MAX_ALIVE, every group with the baseline and burnish."""
    if len(modes) <= MAX_ALIVE:
        return [list(modes)]
    common = [mode for mode in modes if mode in (baseline, "burnish")]
    others = [mode for mode in modes if mode not in common]
    size = MAX_ALIVE - len(common)
    return [common + others[start : start + size] for start in range(0, len(others), size)]


def check(row: Row, workload: Workload, say: Say) -> None:
    """A few steps in a process of their own, without dropout; the losses go into the row."""
    say(f"{row.mode}: {NUM_CHECK_STEPS} steps without dropout, for the losses")
    try:
        with open_worker(row.mode, workload.for_check()) as worker:
            row.built = worker.built
            row.check_losses = [worker.step()["loss"] for _ in range(NUM_CHECK_STEPS)]
    except WorkerDied as died:
        row.failure = str(died)
        say(f"{row.mode}: {row.failure}")


def compare_losses(found: Measurement) -> None:
    """Makes void the rows whose model or losses are not the baseline's."""
    base = found.rows.get(found.baseline)
    if base is None or base.failure is not None:
        return
    for row in found.rows.values():
        if row.failure is not None:
            continue
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


def time_group(modes: Sequence[str], found: Measurement, *, num_steps: int, num_warmup: int, say: Say) -> None:
    """Loads the modes, warms them up, and takes their steps in turn."""
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for mode in modes:
            say(f"{mode}: load, {num_warmup} steps to warm up")
            row = found.rows[mode]
            try:
                worker = stack.enter_context(open_worker(mode, found.workload))
                row.built = worker.built
                row.warmup_times_s = [worker.step()["time_s"] for _ in range(num_warmup)]
                workers[mode] = worker
            except WorkerDied as died:
                row.failure = str(died)
                say(f"{mode}: {row.failure}")
        num_quiet = 0
        for number in range(MAX_ROUNDS * num_steps):
            times = one_round(number, workers, found, say)
            shown = ", ".join(f"{mode} {time_s:.3f} s" for mode, time_s in times.items())
            num_quiet += is_quiet(found.others[-1])
            say(f"round {number + 1}: {shown}" + ("" if is_quiet(found.others[-1]) else " (disturbed)"))
            if num_quiet == num_steps:
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
            answer = workers[mode].step()
        except WorkerDied as died:
            row.failure = str(died)
            say(f"{mode}: {row.failure}")
            del workers[mode]
            continue
        times[mode] = answer["time_s"]
        others[mode] = max(0.0, (answer["others_s"] - CLOCK_S) / answer["time_s"])
        row.losses.append(answer["loss"])
        row.peak_bytes = max(row.peak_bytes, answer["peak_bytes"])
    found.rounds.append(times)
    found.others.append(others)
    return {mode: times[mode] for mode in modes if mode in times}


def summarise(found: Measurement) -> dict[str, Any]:
    """The measurement as JSON, with the raw samples."""
    return {
        "benchmark": "step",
        "baseline": found.baseline,
        "loss_tolerance": LOSS_TOLERANCE,
        "fall_tolerance": FALL_TOLERANCE,
        "num_check_steps": NUM_CHECK_STEPS,
        "is_interrupted": found.is_interrupted,
        "others_cores": others_cores(found),
        "rounds": found.rounds,
        "others_cores_by_round": found.others,
        "counted_rounds": counted(found),
        "rows": [summarise_row(row, found) for row in found.rows.values()],
    }


def is_quiet(others: Mapping[str, float]) -> bool:
    return all(cores <= QUIET_CORES for cores in others.values())


def counted(found: Measurement) -> list[int]:
    """Numbers of the rounds that the figures are made of: the quiet ones, or all where there are not enough of them."""
    everyone = list(range(len(found.rounds)))
    quiet = [number for number in everyone if is_quiet(found.others[number])]
    modes, quiet_modes = ({mode for n in numbers for mode in found.rounds[n]} for numbers in (everyone, quiet))
    return quiet if quiet_modes == modes and 2 * MAX_ROUNDS * len(quiet) >= len(everyone) else everyone


def others_cores(found: Measurement) -> float:
    """Cores that other processes used in the counted steps, on average."""
    cores = [value for number in counted(found) for value in found.others[number].values()]
    return sum(cores) / len(cores) if cores else 0.0


def summarise_row(row: Row, found: Measurement) -> dict[str, Any]:
    """One row: state ok, void or failed; times and memory; `ratio` is how many times faster than the baseline."""
    state = "failed" if row.failure is not None else "void" if row.void is not None else "ok"
    rounds = [found.rounds[number] for number in counted(found)]
    times = [times[row.mode] for times in rounds if row.mode in times]
    result: dict[str, Any] = {
        "mode": row.mode,
        "summary": MODES[row.mode].summary,
        "state": state,
        "reason": row.failure or row.void,
        "check_losses": row.check_losses,
        "losses": row.losses,
        "warmup_times_s": row.warmup_times_s,
        "times_s": times,
        "peak_bytes": row.peak_bytes,
        **row.built,
    }
    if state == "ok" and times:
        time_s = quantiles(times)
        result |= {"time_s": time_s, "tokens_per_s": found.workload.tokens / time_s["median"]}
        both = [turn for turn in rounds if row.mode in turn and found.baseline in turn]
        base = found.rows.get(found.baseline)
        if both and base is not None and base.failure is None and base.void is None:
            pairs = [turn[found.baseline] for turn in both], [turn[row.mode] for turn in both]
            result["ratio"] = paired_ratios(*pairs)
    return result


def profile(mode: str, workload: Workload, *, num_warmup: int, num_rows: int, say: Say) -> dict[str, Any]:
    """Where the time of one step of a mode goes: {mode, time_s, plain_time_s, profile}."""
    check_names([mode])
    say(f"{mode}: load, {num_warmup} steps to warm up")
    with open_worker(mode, workload, is_profiled=True) as worker:
        times = [worker.step()["time_s"] for _ in range(num_warmup)]
        answer = worker.profile(num_rows)
    return {"mode": mode, "plain_time_s": times[-1], "time_s": answer["time_s"], "profile": answer["profile"]}
