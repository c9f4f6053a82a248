"""Two results of the same benchmarks: which figures became worse or better, and how sure that is. No torch here.

A sampled figure (a time, a ratio) is worse if the whole interval of its change lies beyond the tolerance. The intervals
hold together: with m of them each errs with probability ERROR_RATE / m (Bonferroni), because among the hundreds of
figures of two equal runs some 95 % intervals would lie anywhere. The tolerance is for what no interval of two runs can
know: machines and library versions that move all samples of a run together. With few samples only large changes are
found; a change that looks large and is not sure is listed as unclear.

Bytes are compared with a tolerance and counts exactly; they have no samples. A count of which more is better is the
largest size that fits: it follows from measured bytes and has a tolerance as well. Absolute times are compared on
request and on the same hardware only: they measure the machine as much as the program.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..harness.errors import ConfigError
from ..harness.markup import duration, number, size
from . import suite
from .benchmark import BUSY, Benchmark, Figure, Kind, Result, Row, Table, others_cores
from .stats import Interval, ratio_interval

ERROR_RATE = 0.05
"""Probability that any interval of a comparison is wrong."""
TOLERANCES: Mapping[str, float] = {
    "ratio": 0.10,
    "time": 0.10,
    "bytes": 0.05,
    "peak": 0.30,
    "count": 0.0,
    "largest": 0.10,
}
"""By kind. A change is counted beyond 1 + tolerance, or below 1 / (1 + tolerance).

A peak is that of one process, and differs by what its allocator keeps and what the kernel has taken back: of 30
measured again on one machine, 5 were off by 10 to 24 %.
"""
MIN_SAMPLES = 3
"""With fewer on either side nothing is known about the noise, and no change is sure."""
SAMPLED = ("ratio", "time")
MAX_MISSING = 3
"""Shown of each reason why something has no match."""
BROKEN = ("void", "failed")
Verdict = Literal["worse", "better", "same", "unclear"]


@dataclass(frozen=True)
class Change:
    """One figure, or one row where `before` is None, of two results. `worse_by` is above 1 for the worse."""

    benchmark: str
    key: str
    verdict: Verdict
    kind: Kind | None = None
    before: float | None = None
    after: float | None = None
    worse_by: Interval | None = None
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """Every figure of the first result is in one list. `missing` are (benchmark, key, reason) of what has no match."""

    worse: list[Change] = field(default_factory=list)
    better: list[Change] = field(default_factory=list)
    same: list[Change] = field(default_factory=list)
    unclear: list[Change] = field(default_factory=list)
    missing: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_regression(self) -> bool:
        return bool(self.worse)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"is_regression": self.is_regression}


Pair = tuple[str, Figure, Figure]


def compare(
    before: Sequence[Result],
    after: Sequence[Result],
    *,
    tolerance: float = TOLERANCES["ratio"],
    with_times: bool = False,
) -> Comparison:
    """Every figure of `before` against that of `after`; `tolerance` is that of ratios and times.

    Raises ConfigError if they have no benchmark in common.
    """
    tolerances = {**TOLERANCES, "ratio": tolerance, "time": tolerance}
    return compared(before, after, tolerances, with_times=with_times)


def compared(
    before: Sequence[Result],
    after: Sequence[Result],
    tolerances: Mapping[str, float],
    *,
    with_times: bool,
) -> Comparison:
    """`compare` with a tolerance for each kind of figure."""
    olds, news = by_name(before), by_name(after)
    if not olds.keys() & news.keys():
        raise ConfigError(f"nothing to compare: {', '.join(olds)} on one side, {', '.join(news)} on the other")
    found, pairs = Comparison(), []
    for name, old in olds.items():
        if name not in news:
            found.missing.append((name, "", "this benchmark is not in the second result"))
            continue
        found.notes.extend(f"{name}: {note}" for note in differences(old, news[name]))
        for pair in matched(suite.benchmark(name), old, news[name], found):
            pairs.append((name, *pair))
    pairs = judged_pairs(pairs, olds, news, found, with_times=with_times)
    num_intervals = sum(has_interval(figure, other) for _, figure, other in pairs)
    for name, figure, other in pairs:
        tolerance = tolerances["largest" if figure.kind == "count" and figure.better == "higher" else figure.kind]
        change = judged(name, figure, other, tolerance, error_rate=ERROR_RATE / max(1, num_intervals))
        getattr(found, change.verdict).append(change)
    for changes in (found.worse, found.better, found.unclear):
        changes.sort(key=extent, reverse=True)
    return found


def by_name(results: Sequence[Result]) -> dict[str, Result]:
    """Raises ConfigError for two results of one benchmark."""
    found: dict[str, Result] = {}
    for result in results:
        if result["benchmark"] in found:
            raise ConfigError(f"two results of {result['benchmark']} on one side; give the file instead of the folder")
        found[result["benchmark"]] = result
    return found


def differences(old: Result, new: Result) -> list[str]:
    """What differs between two runs besides the program."""
    notes = []
    if old["hardware"] != new["hardware"]:
        notes.append(
            f"measured on different hardware ({old['hardware']}, {new['hardware']}): ratios, bytes and counts "
            "may differ for that reason alone"
        )
    if old["options_hash"] != new["options_hash"]:
        options = [(key, old["options"].get(key), new["options"].get(key)) for key in sorted(old["options"])]
        shown = "; ".join(f"{key} {a} and {b}" for key, a, b in options if a != b)
        notes.append(f"measured with different options: {shown}")
    libraries = [result["environment"].get("libraries", {}) for result in (old, new)]
    versions = [(key, *(side.get(key) for side in libraries)) for key in sorted({*libraries[0], *libraries[1]})]
    if changed := "; ".join(f"{key} {a} and {b}" for key, a, b in versions if a != b):
        notes.append(f"measured with different versions: {changed}")
    for side, result in (("first", old), ("second", new)):
        if result["is_interrupted"]:
            notes.append(f"the {side} run was interrupted")
        every = others_cores(result)
        if busy := [cores for cores in every if cores > BUSY]:
            place = f"{len(busy)} of {len(every)} parts of the {side} run"
            notes.append(f"other processes used up to {max(busy):.2f} cores in {place}: those figures are uncertain")
    return notes


def matched(benchmark: Benchmark, old: Result, new: Result, found: Comparison) -> list[tuple[Figure, Figure]]:
    """The figures of rows that are ok in both; other rows are put where they belong in `found`."""
    pairs = []
    rows: dict[str, Row] = {row["key"]: row for row in new["rows"]}
    for row in old["rows"]:
        other = rows.pop(row["key"], {"state": "missing", "reason": "this row is not in the second result"})
        if row["state"] == "ok" and other["state"] == "ok":
            olds = benchmark.figures(row)
            news = {figure.key: figure for figure in benchmark.figures(other)}
            pairs += [(figure, news[figure.key]) for figure in olds if figure.key in news]
            for figure in olds:
                if figure.key not in news:
                    reason = "this figure is not in the second result"
                    found.missing.append((benchmark.name, figure.key, reason))
        elif row["state"] == "ok" and other["state"] in BROKEN and is_own(row):
            reason = f"is {other['state']}: {other['reason']}"
            found.worse.append(Change(benchmark.name, row["key"], "worse", reason=reason))
        elif row["state"] == "ok":
            reason = f"is {other['state']}: {other['reason']}" if other["state"] in BROKEN else other["reason"]
            found.missing.append((benchmark.name, row["key"], reason))
        elif row["state"] in BROKEN and other["state"] == "ok" and is_own(row):
            found.better.append(Change(benchmark.name, row["key"], "better", reason=f"was {row['state']}"))
    if num_new := sum(row["state"] == "ok" for row in rows.values()):
        found.notes.append(f"{benchmark.name}: {num_new} rows are in the second result alone")
    return pairs


def is_own(row: Row) -> bool:
    """Whether the row is about burnish: a peer that breaks is no regression."""
    return str(row.get("mode") or row.get("method") or "burnish").startswith("burnish")


def judged_pairs(
    pairs: Sequence[Pair], olds: dict[str, Result], news: dict[str, Result], found: Comparison, *, with_times: bool
) -> list[Pair]:
    """Without the absolute times that cannot be compared, which are noted."""

    def is_judged(name: str, figure: Figure) -> bool:
        return figure.kind != "time" or (with_times and olds[name]["hardware"] == news[name]["hardware"])

    kept = [pair for pair in pairs if is_judged(pair[0], pair[1])]
    if num_left := len(pairs) - len(kept):
        why = "the hardware differs" if with_times else "two runs differ in them by the machine"
        found.notes.append(f"{num_left} absolute times were not compared: {why}")
    return kept


def has_interval(old: Figure, new: Figure) -> bool:
    return old.kind in SAMPLED and all(
        len(figure.samples) >= MIN_SAMPLES and min(figure.samples) > 0 for figure in (old, new)
    )


def judged(name: str, old: Figure, new: Figure, tolerance: float, *, error_rate: float) -> Change:
    reason = ""
    if has_interval(old, new):
        sides = (old.samples, new.samples) if old.better == "lower" else (new.samples, old.samples)
        worse_by = ratio_interval(*sides, error_rate=error_rate)
        verdict = verdict_of(worse_by, tolerance)
    else:
        low, high = (old.value, new.value) if old.better == "lower" else (new.value, old.value)
        worse_by = Interval(*[quotient(high, low)] * 3)
        verdict = verdict_of(worse_by, tolerance)
        if old.kind in SAMPLED:
            reason = f"not enough samples: {len(old.samples)} and {len(new.samples)}"
            verdict = "same" if verdict == "same" else "unclear"
    return Change(name, old.key, verdict, old.kind, old.value, new.value, worse_by, reason)


def quotient(above: float, below: float) -> float:
    if above == below:
        return 1.0
    return above / below if below else float("inf")


def verdict_of(worse_by: Interval, tolerance: float) -> Verdict:
    limit = 1 + tolerance
    if worse_by.low > limit:
        return "worse"
    if worse_by.high < 1 / limit:
        return "better"
    return "same" if 1 / limit <= worse_by.middle <= limit else "unclear"


def extent(change: Change) -> float:
    """How large a change is in either direction; a row that broke comes first."""
    if change.worse_by is None:
        return float("inf")
    middle = change.worse_by.middle
    return max(middle, 1 / middle) if middle else float("inf")


SHOWN: dict[Kind, Callable[[float], str]] = {
    "ratio": lambda value: f"{value:.2f}x",
    "time": lambda value: f"{1000 * value:.3g} ms" if value < 1 else duration(value),
    "bytes": size,
    "peak": size,
    "count": number,
}
HEADINGS = {
    "worse": "Worse",
    "better": "Better",
    "unclear": "Beyond the tolerance, but not surely",
    "same": "Not shown to differ",
}


def tables(comparison: Comparison, *, with_same: bool = False) -> list[Table]:
    """One for each verdict that occurs, and one of what has no match; the notes are under the last."""
    found = [
        Table(title, ("figure", "before", "after", "change", "interval", ""), [cells(change) for change in changes])
        for verdict, title in HEADINGS.items()
        if (changes := getattr(comparison, verdict)) and (with_same or verdict != "same")
    ]
    if comparison.missing:
        found.append(Table("Without a match", ("figure", "reason"), missing_cells(comparison)))
    notes = [
        *comparison.notes,
        "a change above 0 % is for the worse, whichever way the figure counts; the intervals hold together with "
        f"{100 * (1 - ERROR_RATE):.0f} % confidence",
    ]
    return [*found, Table("Comparison", ("verdict", "figures"), counts(comparison), notes)]


def missing_cells(comparison: Comparison) -> list[tuple[str, str]]:
    """What has no match; of many of one benchmark with the same reason their number."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, key, reason in comparison.missing:
        groups.setdefault((name, reason), []).append(key)
    found = []
    for (name, reason), keys in groups.items():
        shown, left = keys[:MAX_MISSING], len(keys) - MAX_MISSING
        found += [(f"{name} {key}".strip(), reason) for key in shown]
        found += [(f"{name}: {left} more", reason)] if left > 0 else []
    return found


def counts(comparison: Comparison) -> list[tuple[str, str]]:
    verdicts = [(title.lower(), str(len(getattr(comparison, name)))) for name, title in HEADINGS.items()]
    return [*verdicts, ("without a match", str(len(comparison.missing)))]


def cells(change: Change) -> tuple[str, ...]:
    name = f"{change.benchmark} {change.key}"
    if change.kind is None or change.worse_by is None or change.before is None or change.after is None:
        return (name, "", "", "", "", change.reason)
    show, worse_by = SHOWN[change.kind], change.worse_by
    is_sampled = worse_by.low < worse_by.high
    interval = f"{percent(worse_by.low)} to {percent(worse_by.high)}" if is_sampled else ""
    return (name, show(change.before), show(change.after), percent(worse_by.middle), interval, change.reason)


def percent(ratio: float) -> str:
    """1.25 -> +25 %; large changes as a factor."""
    return f"{100 * (ratio - 1):+.0f} %" if ratio < 3 else f"x {ratio:.3g}"
