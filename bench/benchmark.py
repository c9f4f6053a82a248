"""The contract of a benchmark: what there is to measure, how it is measured, and which figures its rows hold.

A result is JSON: the facts that `record.opened` writes, what `prepare` found, and `rows`. Every row has `key` (stable
over time, unique in its result), `state` (ok, void, failed or not measured) and `reason`. No torch here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Row = dict[str, Any]
Result = dict[str, Any]
Say = Callable[[str], None]
State = Literal["ok", "void", "failed", "not measured"]
Kind = Literal["ratio", "time", "bytes", "peak", "count"]
"""`bytes` are counted and the same every time; a `peak` is what one process took at most."""

NOT_MEASURED = "not measured"
BUSY = 0.1
"""Cores that others may use before a figure is uncertain."""


@dataclass(frozen=True)
class Choice:
    """What the user asked for. `only`: patterns (fnmatch) of item keys. The others are options of `step` alone."""

    is_quick: bool = False
    only: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    baseline: str | None = None
    model: str | None = None
    batch: str | None = None


@dataclass(frozen=True)
class Setting:
    """How to measure: cpu or cuda, threads, rounds (None: the benchmark's own number), and where progress goes."""

    device: str
    num_threads: int
    num_rounds: int | None
    is_quick: bool
    say: Say


@dataclass(frozen=True)
class Item:
    """One thing to measure, and the keys of the rows that come of it; `what` is all that `measure` needs, as JSON."""

    key: str
    rows: tuple[str, ...]
    what: Mapping[str, Any] = field(default_factory=dict)
    cost_s: float = 1.0
    """About how long it takes, for the estimate of what is left."""
    before: Sequence[Row] = ()
    """Rows of it that an interrupted run has measured; `measure` may yield them as they are."""


@dataclass(frozen=True)
class Figure:
    """One number of a row. `samples` are those it is the median of; none where it was counted, not sampled."""

    key: str
    kind: Kind
    value: float
    samples: Sequence[float]
    better: Literal["lower", "higher"]


@dataclass(frozen=True)
class Table:
    """Cells as text, the first column a name; notes below it say how it was measured and what is missing."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    `measure` yields a row as soon as it is known. On KeyboardInterrupt it yields what it has and raises it again.
    `figures` are of one row that is ok; `tables` are of a result, whose rows may be in any state.
    """

    name: str
    summary: str
    items: Callable[[str, Choice], list[Item]]
    """(device, choice) -> what would be measured there; works for cuda on a machine without a GPU."""
    prepare: Callable[[Setting], dict[str, Any]]
    measure: Callable[[Item, Setting], Iterator[Row]]
    figures: Callable[[Row], list[Figure]]
    tables: Callable[[Result], list[Table]]


def not_measured(item: Item, reason: str) -> list[Row]:
    return [{"key": key, "state": NOT_MEASURED, "reason": reason} for key in item.rows]


def completed(result: Result, items: Sequence[Item], *, reason: str) -> Result:
    """The result with a row, not measured, for each that the items promise and it lacks."""
    present = {row["key"] for row in result["rows"]}
    missing = [row for item in items for row in not_measured(item, reason) if row["key"] not in present]
    return result | {"rows": [*result["rows"], *missing]}


def others_cores(result: Result) -> list[float]:
    """Cores that other processes used, as the result, its configurations and its rows say."""
    places = [result, *(row.get("facts") for row in result["rows"]), *result["rows"]]
    found = [place.get("others_cores") for place in places if isinstance(place, dict)]
    return [float(cores) for cores in found if isinstance(cores, int | float)]
