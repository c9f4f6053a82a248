"""Whether the documents say what the committed results say, the results what their samples say, and the machine agrees.

Three checks: docs/benchmarks.md, docs/scaling.md and README.md's figures are line by line what `document` makes; in
every committed result each median is that of its samples and each derived number follows from others; and what was
measured on hardware like this one is measured again. A figure has drifted if the interval of its change (see `compare`)
lies beyond DRIFT in either direction: a document may be too modest as well. No torch here.
"""

import difflib
import itertools
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..harness.errors import ConfigError
from . import document, record, runner, scaling_document, suite
from .benchmark import Choice, Result, Row, Setting, Table
from .compare import TOLERANCES, Change, Comparison, cells, compared
from .stats import paired_ratios, quantiles

DRIFT: Mapping[str, float] = {**TOLERANCES, "ratio": 0.25, "time": 1.0, "largest": 0.25}
"""How far a figure measured again may lie from the documented one, by kind.

Ratios are of the same round, but a virtual machine's memory and caches change with its neighbours, and with them what a
ratio of different work is: a quarter. Times are the machine's own: a factor of 2. The largest size that fits follows
from peaks, less what a model takes without tokens. What is counted is the same every time.
"""
NUM_ROUNDS = 7
"""At most, where the caller does not say: enough for drift, and no need of a document's narrow quartiles."""
MIN_ROUNDS = 3
HINT = "burnish bench docs writes docs/benchmarks.md, docs/scaling.md and the figures in README.md anew"
CONTEXT_WORDS = 6
"""Shown before and behind what differs in a line."""
QUARTILES = ("q1", "median", "q3")


@dataclass(frozen=True)
class Verification:
    """`problems` are sentences; `unchecked` says how many figures were not measured again, and why."""

    problems: list[str] = field(default_factory=list)
    num_figures: int = 0
    num_checked: int = 0
    unchecked: Mapping[str, int] = field(default_factory=dict)
    drifted: Sequence[Change] = ()
    notes: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"is_ok": not self.problems}


def verify(
    setting: Setting,
    *,
    is_remeasured: bool = True,
    names: Sequence[str] | None = None,
    limit_s: float = float("inf"),
    results: Path = record.RESULTS,
    docs: Path = document.DOCUMENT,
    readme: Path = document.README,
    scaling: Path = scaling_document.DOCUMENT,
) -> Verification:
    """All checks; the third only where `is_remeasured`, of the benchmarks with these names where there are any.

    `setting` is of this machine; the rest is the results' own.
    """
    problems: list[str] = []
    found: list[Result] = []
    for path in sorted(results.glob("*/*.json")):
        try:
            result = record.load(path)
        except ConfigError as error:
            problems.append(str(error))
            continue
        wrong = result_problems(path, result)
        problems += [f"{path.parent.name}/{path.name}: {problem}" for problem in wrong]
        found += [] if wrong else [result]
    num_figures = sum(map(num_figures_of, found))
    stale = document_problems(results=results, docs=docs, readme=readme, scaling=scaling)
    problems += [one for one in stale if one not in problems]
    if not is_remeasured:
        return Verification(problems, num_figures, 0, {"only the documents were asked for": num_figures})
    changes, unchecked = measured_again(setting, found, names=names, limit_s=limit_s)
    drifted = [*changes.worse, *changes.better]
    problems += [drift_problem(change) for change in drifted]
    num_checked = len(changes.same) + sum(change.kind is not None for change in drifted)
    return Verification(problems, num_figures, num_checked, unchecked, drifted, changes.notes)


def num_figures_of(result: Result) -> int:
    benchmark = suite.benchmark(result["benchmark"])
    return sum(len(benchmark.figures(row)) for row in result["rows"] if row["state"] == "ok")


def document_problems(
    *, results: Path, docs: Path, readme: Path, scaling: Path = scaling_document.DOCUMENT
) -> list[str]:
    """Each line of the documents that is not what the results say."""
    try:
        made = document.outputs(results=results, document=docs, readme=readme, scaling=scaling)
    except ConfigError as error:
        return [str(error)]
    except (KeyError, TypeError, ValueError) as error:
        return [f"no document can be made of these results: {type(error).__name__} {error}"]
    return [
        f"{path.name} {problem}"
        for path, texts in made.items()
        for problem in line_problems(*texts)
        if texts[0] != texts[1]
    ]


def line_problems(present: str, expected: str) -> Iterator[str]:
    says, should = present.split("\n"), expected.split("\n")
    for tag, i, i_end, j, j_end in difflib.SequenceMatcher(None, says, should, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        for number, (line, other) in enumerate(itertools.zip_longest(says[i:i_end], should[j:j_end]), start=i + 1):
            if line is None:
                yield f"before line {i_end + 1}: the results say {other!r}, which is missing"
            elif other is None:
                yield f"line {number}: says {line!r}, of which the results say nothing"
            else:
                says_here, says_there = differing(line, other)
                yield f"line {number}: says {says_here!r}, the results say {says_there!r}"


def differing(line: str, other: str) -> tuple[str, str]:
    """Both lines without the words that they begin and end with alike, but for a few next to what differs."""
    words = line.split(" "), other.split(" ")
    num_least = min(map(len, words))
    first = next((i for i in range(num_least) if words[0][i] != words[1][i]), num_least)
    last = next((i for i in range(num_least - first) if words[0][-1 - i] != words[1][-1 - i]), num_least - first)
    start, end = max(0, first - CONTEXT_WORDS), max(0, last - CONTEXT_WORDS)
    shown = [" ".join(part[start : len(part) - end]) for part in words]
    shown = [f"{'… ' if start else ''}{text}{' …' if end else ''}" for text in shown]
    return shown[0], shown[1]


def result_problems(path: Path, result: Result) -> list[str]:
    """What is wrong with a committed result in itself."""
    if result["benchmark"] not in suite.MODULES | suite.ON_REQUEST:
        return [f"{result['benchmark']!r} is no benchmark"]
    try:
        return [*head_problems(path, result), *itertools.chain.from_iterable(map(row_checker(result), result["rows"]))]
    except (KeyError, TypeError, ValueError) as error:
        return [f"is not what burnish bench run writes: {type(error).__name__} {error}"]


def head_problems(path: Path, result: Result) -> Iterator[str]:
    if not result["environment"].get("git_commit"):
        yield "names no commit"
    if result["benchmark"] != path.stem:
        yield f"holds the benchmark {result['benchmark']}"
    hardware = record.hardware(result["environment"], result["device"])
    for name in {result["hardware"], path.parent.name} - {hardware}:
        yield f"was measured on {hardware}, not on {name}"
    if result["options_hash"] != record.hash_of(result["options"]):
        yield "has other options than those of its options_hash"
    for name in ("is_interrupted", "is_quick"):
        if result[name]:
            yield f"is no whole run: {name}"
    if result["options"]["only"]:
        yield f"is no whole run: only {', '.join(result['options']['only'])}"
    keys = Counter(row["key"] for row in result["rows"])
    yield from (f"has {count} rows {key}" for key, count in keys.items() if count > 1)


def row_checker(result: Result) -> Any:
    """A function from a row to what is wrong in it."""
    benchmark = suite.benchmark(result["benchmark"])
    derived = DERIVED.get(benchmark.name, lambda *_: ())

    def check(row: Row) -> Iterator[str]:
        if row["state"] != "ok":
            return
        numbers = [*medians(row, row["key"]), *derived(row, result)]
        for figure in benchmark.figures(row):
            if figure.samples:
                numbers.append((figure.key, figure.value, quantiles(figure.samples)["median"]))
        for what, stored, computed in numbers:
            if not math.isclose(stored, computed, rel_tol=1e-9):
                yield f"{what} is {stored:.6g}, its samples say {computed:.6g}"

    return check


Numbers = Iterator[tuple[str, float, float]]
"""(what, as stored, as computed)"""


def medians(value: Any, where: str) -> Numbers:
    """The quartiles anywhere in a row whose samples lie beside them."""
    if isinstance(value, list):
        for i, part in enumerate(value):
            yield from medians(part, f"{where} {i}")
    if not isinstance(value, dict):
        return
    samples = value.get("samples") or value.get("times_s")
    if samples:
        computed = quantiles(samples)
        for place, stored in ((where, value), (f"{where} time_s", value.get("time_s"))):
            if isinstance(stored, dict):
                yield from ((f"{place} {name}", stored[name], computed[name]) for name in QUARTILES if name in stored)
    for name, part in value.items():
        yield from medians(part, f"{where} {name}")


def kernel_numbers(row: Row, _result: Result) -> Numbers:
    """Ratios are of samples of the same round; the share of the peak is of burnish's median."""
    samples = {name: one["samples"] for name, one in row["contenders"].items() if one.get("samples")}
    pairs = [("ratio", name, ratio, "burnish") for name, ratio in row["ratio"].items()]
    pairs += [("over_frozen", name, ratio, "frozen") for name, ratio in (row["over_frozen"] or {}).items()]
    for what, name, ratio, below in pairs:
        computed = paired_ratios(samples[name], samples[below])
        for quartile in QUARTILES:
            yield f"{row['key']} {what} {name} {quartile}", ratio[quartile], float(str(computed[quartile]))
    if row["share_of_peak"] is not None:
        share = row["floor_s"] / quantiles(samples["burnish"])["median"]
        yield f"{row['key']} share_of_peak", row["share_of_peak"], share


def step_numbers(row: Row, result: Result) -> Numbers:
    """Times and ratios are of the counted rounds; tokens and FLOPs are per second of the median step."""
    facts = next(other["facts"] for other in result["rows"] if other.get("case") == row["case"] and other.get("facts"))
    rounds = [facts["rounds"][number] for number in facts["counted_rounds"]]
    median_s = quantiles([turn[row["mode"]] for turn in rounds if row["mode"] in turn])["median"]
    tokens_per_s = facts["workload"]["num_sequences"] * facts["workload"]["length"] / median_s
    yield f"{row['key']} median", row["time_s"]["median"], median_s
    yield f"{row['key']} tokens_per_s", row["tokens_per_s"], tokens_per_s
    if row["mfu"] is not None:
        peak = result["peaks"]["float32" if row["mode"] == "fp32" else "bfloat16"]["flops_per_s"]
        yield f"{row['key']} mfu", row["mfu"], tokens_per_s * row["flops_per_token"] / peak
    for what, above, below in (("ratio", facts["baseline"], row["mode"]), ("faster", row["mode"], facts["own"])):
        if row.get(what):
            samples = [turn[above] / turn[below] for turn in rounds if above in turn and below in turn]
            yield f"{row['key']} {what}", row[what]["median"], quantiles(samples)["median"]


def memory_numbers(row: Row, _result: Result) -> Numbers:
    """The peak is that of the probe of the largest size."""
    size, name = ("max_tokens", "tokens") if row["kind"] == "length" else ("max_params", "params")
    for probe in row["probes"]:
        if probe[name] == row[size]:
            yield f"{row['key']} peak", row["peak_bytes"], probe["peak_bytes"]


DERIVED = {"kernels": kernel_numbers, "step": step_numbers, "memory": memory_numbers}
"""Benchmark -> numbers of a row that follow from its samples in other ways than as quartiles."""


def measured_again(
    setting: Setting, results: Sequence[Result], *, names: Sequence[str] | None = None, limit_s: float
) -> tuple[Comparison, dict[str, int]]:
    """Measures what was measured on this hardware with the same options; says how many figures were not, and why."""
    start_s, here = time.monotonic(), record.hardware_here(setting.device)
    unchecked: Counter[str] = Counter()
    olds: list[Result] = []
    news: list[Result] = []
    for result in results:
        if (result["device"], result["hardware"]) != (setting.device, here):
            unchecked[f"measured on {result['hardware']}"] += num_figures_of(result)
        elif names is not None and result["benchmark"] not in names:
            unchecked["not asked for"] += num_figures_of(result)
        elif names is None and result["benchmark"] in suite.LONG:
            unchecked[f"takes hours: burnish bench verify {result['benchmark']}"] += num_figures_of(result)
        elif news and news[-1]["is_interrupted"]:
            unchecked["interrupted"] += num_figures_of(result)
        else:
            left_s = limit_s - (time.monotonic() - start_s)
            olds.append(result)
            news.append(run_again(setting, result, limit_s=left_s))
    if not olds:
        return Comparison(), dict(unchecked)
    found = compared(olds, news, DRIFT, with_times=True)
    if found.unclear:
        unchecked["too noisy, or too few samples, to tell"] += len(found.unclear)
    for name, key, reason in found.missing:
        unchecked[reason] += num_figures_behind(olds, name, key)
    return found, dict(unchecked)


def num_figures_behind(results: Sequence[Result], name: str, key: str) -> int:
    """Figures of a row of the benchmark; 1 where the key is a figure's."""
    benchmark = suite.benchmark(name)
    rows = [row for result in results if result["benchmark"] == name for row in result["rows"] if row["key"] == key]
    return sum(len(benchmark.figures(row)) for row in rows) or 1


def run_again(setting: Setting, result: Result, *, limit_s: float) -> Result:
    benchmark = suite.benchmark(result["benchmark"])
    options: dict[str, Any] = result["options"]
    tuples = {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
    choice = Choice(**{one.name: (options | tuples)[one.name] for one in fields(Choice)})
    samples = [
        len(figure.samples) for row in result["rows"] if row["state"] == "ok" for figure in benchmark.figures(row)
    ]
    num_rounds = setting.num_rounds or max(MIN_ROUNDS, min(NUM_ROUNDS, max(samples, default=0)))
    own = replace(setting, num_threads=options["num_threads"], num_rounds=num_rounds, is_quick=choice.is_quick)
    return runner.run(benchmark, own, choice, limit_s=limit_s)


def drift_problem(change: Change) -> str:
    name, before, after, *_ = cells(change)
    if change.worse_by is None:
        return f"{name}: documented, and now {change.reason}"
    bounds = [change.worse_by.low, change.worse_by.middle, change.worse_by.high]
    if change.verdict == "better":
        bounds = [1 / bound if bound else float("inf") for bound in reversed(bounds)]
    low, middle, high = bounds
    interval = f", {low:.2f} to {high:.2f}" if low < high else ""
    return f"{name}: documented {before}, measured again {after}: {middle:.2f} times {change.verdict}{interval}"


def tables(found: Verification) -> list[Table]:
    """What is wrong, then what was checked and what was not."""
    rows = [("figures in the committed results", str(found.num_figures)), ("measured again", str(found.num_checked))]
    rows += [(f"not measured again: {reason}", str(count)) for reason, count in found.unchecked.items()]
    verdict = f"{len(found.problems)} problems" if found.problems else "the documents hold"
    summary = Table(f"Verification: {verdict}", ("what", "figures"), rows, found.notes)
    if not found.problems:
        return [summary]
    notes = [HINT] if any(re.search(r"\.md (before )?line", problem) for problem in found.problems) else []
    problems = [(problem,) for problem in found.problems]
    return [Table("Problems", ("what is wrong",), problems, notes), summary]
