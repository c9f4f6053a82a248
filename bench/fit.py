"""The largest of sorted sizes (lengths of a sequence, or models) whose peak of memory fits a budget, with few probes.

Peaks are close to linear in the size, so a line through two probes says where the budget is reached; the probes there
narrow the bracket, and where lines do not, bisection does. An answer is confirmed: a probe of that size fits
and one of the next size, or of one as near as was asked for, does not. No torch here.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from typing import Literal

MIN_SPREAD = 1.25
"""Sizes of two probes are at least this factor apart before a line through them is believed: peaks are noisy."""
MAX_GROWTH = 4.0
"""The next probe is at most so many times larger than the largest so far."""
MIN_GROWTH = 1.2
"""Where a limit forbids more, the search ends instead of growing by less than this factor."""
MAX_STALLS = 1
"""Rounds in a row that do not halve the bracket before it is bisected."""


@dataclass(frozen=True)
class Probe:
    """One size tried in a process: its peak, and the time of a step. None where it ended before that.

    Out of memory counts as too large for every budget; what failed otherwise says nothing of a budget.
    """

    size: int
    state: Literal["ok", "out of memory", "failed"]
    peak_bytes: int | None = None
    time_s: float | None = None
    floor_bytes: int | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Answer:
    """The largest size that fits; None if not even the smallest does.

    `bound`: exact (the next one does not fit), all (there is no larger one), at least (`reason` ended the search).
    """

    size: int | None
    bound: Literal["exact", "all", "at least"]
    reason: str | None = None


Curve = dict[int, Probe]
Measure = Callable[[Sequence[int]], Sequence[Probe]]
Refuse = Callable[[int], str | None]


def search(
    sizes: Sequence[int],
    budget_bytes: int,
    curve: Curve,
    measure: Measure,
    *,
    refuse: Refuse,
    share: float = 0.0,
    at_once: int = 1,
) -> Answer:
    """Probes are added to the curve, which may hold some of other budgets.

    An answer is exact if the next size, or one larger by at most `share`, does not fit. `measure` tries up to `at_once`
    sizes; `refuse` says why a size must not be tried, and if it refuses one it refuses all larger ones.
    """
    width, num_stalls = len(sizes) + 1, 0
    while True:
        low, high = bracket(sizes, budget_bytes, curve)
        if is_next(sizes, low, high, share):
            return known(sizes, budget_bytes, curve, share=share)
        num_stalls = num_stalls + 1 if high < len(sizes) and 2 * (high - low) > width else 0
        is_stuck, width = num_stalls > MAX_STALLS, high - low
        num_stalls = 0 if is_stuck else num_stalls
        guesses = [(low + high) // 2] if is_stuck else guessed(sizes, budget_bytes, curve, low, high, share)
        reason = refuse(sizes[guesses[0]])
        if reason is not None:
            guesses = [largest_allowed(sizes, low, guesses[0], refuse)]
            if guesses[0] == low or (low >= 0 and sizes[guesses[0]] < MIN_GROWTH * sizes[low]):
                return replace(known(sizes, budget_bytes, curve, share=share), reason=reason)
        found = measure([sizes[i] for i in guesses[:at_once] if refuse(sizes[i]) is None])
        curve |= {probe.size: probe for probe in found}
        if any(probe.state == "failed" for probe in found):
            return known(sizes, budget_bytes, curve, share=share)


def known(sizes: Sequence[int], budget_bytes: int, curve: Mapping[int, Probe], *, share: float = 0.0) -> Answer:
    """What the probes so far say."""
    low, high = bracket(sizes, budget_bytes, curve)
    fitting = sizes[low] if low >= 0 else None
    if is_next(sizes, low, high, share):
        return Answer(fitting, "all" if high == len(sizes) else "exact")
    reason = next((probe.reason for probe in curve.values() if probe.state == "failed"), None)
    return Answer(fitting, "at least", reason)


def is_next(sizes: Sequence[int], low: int, high: int, share: float) -> bool:
    """Whether the two ends of a bracket are so near that they answer."""
    return high - low == 1 or (low >= 0 and high < len(sizes) and sizes[high] <= (1 + share) * sizes[low])


def around(sizes: Sequence[int], low: int, high: int, reached: float, share: float) -> list[int]:
    """One or two positions strictly inside the bracket that answer if the budget is reached where it is expected.

    One on each side of that size, so near that they are next to each other; or only the one that an end of the bracket
    lacks.
    """
    lower = min(bisect_right(sizes, reached / (1 + share) ** 0.5) - 1, high - 1)
    while (upper := after(sizes, lower, share)) < high and sizes[upper] <= reached:
        lower += 1  # where sizes are further apart than the share
    if lower <= low:
        return [min(after(sizes, low, share), high - 1)]
    if upper < high:
        return [lower, upper]
    if high == len(sizes):
        return [high - 1]
    return [min(max(bisect_left(sizes, sizes[high] / (1 + share)), low + 1), high - 1)]


def after(sizes: Sequence[int], position: int, share: float) -> int:
    """Position of the largest size that is next to this one."""
    if position < 0:
        return 0
    return max(position + 1, bisect_right(sizes, (1 + share) * sizes[position]) - 1)


def largest_allowed(sizes: Sequence[int], low: int, refused: int, refuse: Refuse) -> int:
    """Position of the largest size between the two that is not refused; `low` if there is none."""
    return bisect_left(range(refused), True, low + 1, refused, key=lambda i: refuse(sizes[i]) is not None) - 1


def bracket(sizes: Sequence[int], budget_bytes: int, curve: Mapping[int, Probe]) -> tuple[int, int]:
    """Positions of the largest size that fits (-1: none known), and of the smallest that does not (len(sizes)).

    Where noise has one fit that is larger than one that does not, the smaller one counts.
    """
    told = [(i, curve[size]) for i, size in enumerate(sizes) if size in curve and curve[size].state != "failed"]
    high = next((i for i, probe in told if not fits(probe, budget_bytes)), len(sizes))
    return max((i for i, _ in told if i < high), default=-1), high


def fits(probe: Probe, budget_bytes: int) -> bool:
    return probe.peak_bytes is not None and probe.peak_bytes <= budget_bytes


def guessed(
    sizes: Sequence[int], budget_bytes: int, curve: Mapping[int, Probe], low: int, high: int, share: float
) -> list[int]:
    """Positions strictly inside the bracket: where a line reaches the budget; without a line the middle, or twice."""
    measured = points(curve)
    reached = size_at(measured, budget_bytes)
    if high < len(sizes):
        return [(low + high) // 2] if reached is None else around(sizes, low, high, reached, share)
    largest = measured[-1][0] if measured else 0
    reached = 2.0 * largest if reached is None else reached
    if reached > MAX_GROWTH * largest:
        return [max(low + 1, bisect_right(sizes, MAX_GROWTH * largest) - 1)]
    return around(sizes, low, high, reached, share)


def points(curve: Mapping[int, Probe]) -> list[tuple[int, int]]:
    """(size, peak) of the probes that lived, by size."""
    return sorted((probe.size, probe.peak_bytes) for probe in curve.values() if probe.peak_bytes is not None)


def size_at(measured: Sequence[tuple[int, int]], num_bytes: float) -> float | None:
    """Where the line through the two points nearest to the bytes reaches them; None if there is no rising line."""
    near = sorted(measured, key=lambda point: abs(point[1] - num_bytes))
    line = next(((near[0], other) for other in near[1:] if is_apart(near[0][0], other[0])), None)
    if line is None:
        return None
    (a, peak), (b, other) = line
    slope = (peak - other) / (a - b)
    return a + (num_bytes - peak) / slope if slope > 0 else None


def is_apart(a: int, b: int) -> bool:
    return max(a, b) >= MIN_SPREAD * min(a, b)


def peak_at(curve: Mapping[int, Probe], size: int) -> float:
    """The peak that a line through the largest probes gives a larger size; 0 where nothing was measured.

    From one probe it is too high on purpose: as if all of its peak grew with the size.
    """
    measured = points(curve)
    if not measured:
        return 0.0
    last, peak = measured[-1]
    before = next(((a, b) for a, b in reversed(measured) if is_apart(a, last)), None)
    if before is None:
        return peak * max(1.0, size / last)
    return peak + max(0.0, (peak - before[1]) / (last - before[0])) * (size - last)


def time_at(curve: Mapping[int, Probe], size: int) -> float:
    """Seconds of a step at a larger size, by the power of the size (1 to 2) that the largest two probes show.

    From one probe it is too long on purpose: as if all grew with the square. 0 where nothing was measured.
    """
    measured = sorted((probe.size, probe.time_s) for probe in curve.values() if probe.time_s)
    if not measured:
        return 0.0
    last, time_s = measured[-1]
    before = next(((a, b) for a, b in reversed(measured) if is_apart(a, last)), None)
    power = 2.0 if before is None else log(time_s / before[1]) / log(last / before[0])
    return float(time_s * (size / last) ** min(2.0, max(1.0, power)))
