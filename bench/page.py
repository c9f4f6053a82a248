"""Results -> one self-contained HTML page: headlines, plots, tables, and how to measure it again. No torch on import.

The page runs no script and loads nothing. Every number in it is a row's; what has no number is named with the reason.
"""

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..harness.markup import Markup, duration, join, size, tag
from ..harness.report import document, section, table, tile
from ..harness.run_dir import write_bytes
from . import suite
from .benchmark import BUSY, NOT_MEASURED, Result, Row, Table, others_cores
from .memory_cases import COUNTERPARTS, budget_text
from .page_kernels import kernels
from .page_memory import memory, method_of
from .page_rows import grouped, is_ok, span_of, times, times_span, value_at, why
from .page_scale import scale
from .page_step import step
from .page_style import STYLE

FIGURES: dict[str, Callable[[Result], Markup]] = {"step": step, "kernels": kernels, "memory": memory, "scale": scale}
"""Benchmark -> what draws its result, in the order of the page."""
TITLES = {"step": "Training steps", "kernels": "Operations", "memory": "Memory", "scale": "Scale"}
LIBRARIES = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "deepspeed", "ray")
PEERS = {"peft": "PEFT as installed", "sft": "TRL's SFTTrainer"}
"""Modes of the step benchmark that the headlines compare with."""
MAX_MISSING = 200
MAX_REASONS = 3


def write(results: Sequence[Result], path: str | Path) -> None:
    """The page of the results, at `path`, whole."""
    write_bytes(path, page(results).encode("utf-8", errors="xmlcharrefreplace"))


def page(results: Sequence[Result]) -> str:
    """The whole HTML page; one part for each kind of machine."""
    machines: dict[str, list[Result]] = {}
    for result in results:
        machines.setdefault(str(result.get("hardware")), []).append(result)
    parts = [machine(name, some, is_only=len(machines) == 1) for name, some in machines.items()]
    empty = None if parts else tag("p", "There is no result to show.", class_="soft")
    lead = "burnish and what people use instead, measured side by side on the machine at hand. Every bar is a median."
    header = tag("header", tag("h1", "burnish benchmarks"), tag("p", lead, class_="soft"))
    body = tag("main", header, *parts, empty, tag("footer", "Written by burnish bench report."))
    return document("burnish benchmarks", body, style=STYLE)


def machine(name: str, results: Sequence[Result], *, is_only: bool) -> Markup:
    """All results of one kind of machine."""
    ordered = sorted(results, key=lambda result: [*FIGURES, result["benchmark"]].index(result["benchmark"]))
    title = None if is_only else tag("h2", name)
    parts = [benchmark(result, name) for result in ordered]
    links = [tag("a", title_of(one), href=f"#{anchor(one, name)}") for one in ordered]
    found = headlines(ordered)
    tiles = tag("div", *found, class_="tiles", style=f"--columns: {len(found) if len(found) < 5 else 3}")
    shown = [facts(ordered), doubts(ordered), tiles if found else None, tag("nav", *links) if parts else None]
    return tag("div", title, *shown, *parts, reproduce(ordered), class_="machine")


def anchor(result: Result, hardware: str) -> str:
    return f"{hardware}-{result['benchmark']}"


def title_of(result: Result) -> str:
    return TITLES.get(result["benchmark"]) or str(result["benchmark"])


def facts(results: Sequence[Result]) -> Markup:
    """The machine, the dates, the commits, the versions and the commands; those of the newest result where one fits."""
    newest = max(results, key=lambda result: str(result.get("time")))
    found = newest.get("environment") or {}
    features = [feature.replace("_", " ") for feature in found.get("cpu_features") or []][:1]
    parts: list[Any] = [found.get("gpu"), f"{found.get('num_cpus')} × {found.get('cpu')}", *features]
    parts += [size(value_at(found, "memory_bytes"))] if value_at(found, "memory_bytes") else []
    libraries = found.get("libraries") or {}
    versions = [f"{name} {libraries[name]}" for name in LIBRARIES if name in libraries]
    days = sorted({str(result.get("time") or "")[:10] for result in results} - {""})
    commits = distinct(str((result.get("environment") or {}).get("git_commit") or "") for result in results)
    origin: list[Any] = [" – ".join(dict.fromkeys([*days[:1], *days[-1:]]))]
    origin += [f"burnish {libraries.get('burnish', '')}".strip()]
    origin += [f"commit {', '.join(commit[:10] + commit[40:] for commit in commits)}"] if commits else []
    written = [" · ".join(str(part) for part in line if part) for line in (parts, [*origin, *versions])]
    commands = [tag("p", tag("code", command)) for command in distinct(map(command_of, results))]
    return tag("div", tag("p", tag("b", written[0])), tag("p", written[1], class_="soft"), *commands, class_="facts")


def distinct(texts: Iterable[str]) -> list[str]:
    return [text for text in dict.fromkeys(texts) if text]


def command_of(result: Result) -> str:
    return shlex.join(map(str, result.get("command") or []))


def doubts(results: Sequence[Result]) -> Markup:
    """What to hold against the figures: quick, cut short, a busy machine."""
    found = []
    quick = [title_of(result) for result in results if result.get("is_quick")]
    if quick:
        found.append(f"Quick, of smaller shapes and fewer rounds than a full run: {', '.join(quick)}.")
    for result in results:
        name = title_of(result)
        if result.get("is_interrupted"):
            found.append(f"{name}: interrupted, so not all that was asked for.")
        if busy := [cores for cores in others_cores(result) if cores > BUSY]:
            parts = f" in {len(busy)} of {len(others_cores(result))} parts" if len(others_cores(result)) > 1 else ""
            told = f"{name}: other processes used up to {max(busy):.2f} cores{parts}"
            found.append(f"{told}; those times are too long and their ratios uncertain.")
    return tag("div", *(tag("p", line) for line in found), class_="notes") if found else Markup("")


def headlines(results: Sequence[Result]) -> list[Markup]:
    """The numbers that matter most, from the rows; one that cannot be made is left out."""
    return [tile for result in results for tile in HEADLINES.get(result["benchmark"], nothing)(result["rows"])]


def nothing(_: Sequence[Row]) -> Iterator[Markup]:
    yield from ()


def step_headlines(rows: Sequence[Row]) -> Iterator[Markup]:
    """How many times faster than the peers, and the share of PEFT's memory; a range over several configurations."""
    measured = [row for row in rows if is_ok(row)]
    for mode, name in PEERS.items():
        found = [row for row in measured if row.get("mode") == mode and value_at(row, "faster", "median")]
        if found:
            values = [row["faster"]["median"] for row in found]
            only = f"quartiles {times_span(span_of(found[0]['faster']))}, {found[0].get('case')}"
            note = only if len(found) == 1 else f"medians of {len(found)} configurations"
            yield tile(f"Speed-up over {name}", ranged(values, times), note)
    shares = []
    for some in grouped(measured, "case").values():
        peaks = {row.get("mode"): value_at(row, "peak_bytes") for row in some}
        ours, theirs = peaks.get("burnish"), peaks.get("peft")
        shares += [(ours / theirs, ours, theirs)] if ours and theirs else []
    if shares:
        note = f"{size(shares[0][1])} of {size(shares[0][2])}" if len(shares) == 1 else f"{len(shares)} configurations"
        yield tile("Memory, of PEFT's", ranged([share for share, _, _ in shares], "{:.0%}".format), note)


def kernel_headlines(rows: Sequence[Row]) -> Iterator[Markup]:
    """In how many cases no contender was faster."""
    found = []
    for row in rows:
        ratios = [value_at(one, "median") for one in (row.get("ratio") or {}).values()] if is_ok(row) else []
        found += [min(ratio for ratio in ratios if ratio is not None)] if any(ratios) else []
    if found:
        note = "no contender has a smaller median"
        yield tile("Fastest operations", f"{sum(ratio >= 1 for ratio in found)} of {len(found)}", note)


def memory_headlines(rows: Sequence[Row]) -> Iterator[Markup]:
    """The largest factor between the longest sequences of a method and of burnish's counterpart in the same budget."""
    lengths = [row for row in rows if row.get("kind") == "length" and is_ok(row) and value_at(row, "max_tokens")]
    found: list[tuple[float, Row, Row]] = []
    for some in grouped(lengths, "model", "budget_bytes").values():
        by_method = {row.get("method"): row for row in some}
        for theirs, ours in ((by_method.get(a), by_method.get(b)) for a, b in COUNTERPARTS.items()):
            if theirs and ours and theirs.get("bound") != "at least":
                found.append((ours["max_tokens"] / theirs["max_tokens"], ours, theirs))
    if found:
        factor, ours, theirs = max(found, key=lambda one: one[0])
        lengths_told = (
            f"{ours['max_tokens']:,} tokens of {method_of(ours)}, {theirs['max_tokens']:,} of {method_of(theirs)}"
        )
        at_least = "≥ " if ours.get("bound") not in (None, "exact") else ""
        yield tile(
            "Longer sequences", at_least + times(factor), f"{lengths_told}, in {budget_text(ours['budget_bytes'])}"
        )


def scale_headlines(rows: Sequence[Row]) -> Iterator[Markup]:
    """The efficiency of the most workers."""
    found = [row for row in rows if row.get("kind") == "workers" and is_ok(row) and value_at(row, "efficiency")]
    most = max((row.get("num_workers") or 0 for row in found), default=0)
    if most > 1:
        values = [row["efficiency"] for row in found if row.get("num_workers") == most]
        yield tile(
            f"Efficiency of {most} workers", ranged(values, "{:.0%}".format), "tokens/s of each, over one alone's"
        )


HEADLINES: dict[str, Callable[[Sequence[Row]], Iterator[Markup]]] = {
    "step": step_headlines,
    "kernels": kernel_headlines,
    "memory": memory_headlines,
    "scale": scale_headlines,
}


def ranged(values: Sequence[float], written: Callable[[float], str]) -> str:
    low, high = written(min(values)), written(max(values))
    return low if low == high else f"{low} – {high}"


def benchmark(result: Result, hardware: str) -> Markup:
    """One benchmark: its figures, what has none and why, its tables."""
    name = result["benchmark"]
    known = suite.benchmark(name) if name in suite.MODULES | suite.ON_REQUEST else None
    drawn = FIGURES[name](result) if name in FIGURES else None
    tables = known.tables(result) if known else []
    folded = tag("details", tag("summary", "All figures as tables"), *map(as_html, tables), class_="tables")
    content = section(
        title_of(result),
        tag("p", sentence(known.summary), class_="soft") if known else None,
        drawn or tag("p", "Nothing here has a figure.", class_="soft"),
        missing(result["rows"]),
        folded if tables else None,
    )
    return tag("div", content, id=anchor(result, hardware))


def sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def missing(rows: Sequence[Row]) -> Markup:
    """The rows without a figure, by reason: void and failed ones in full view, those not measured to unfold."""
    wrong = [tag("li", f"{row['key']}: {why(row)}") for row in rows if row["state"] in ("void", "failed")]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["state"] == NOT_MEASURED:
            reasons.setdefault(str(row.get("reason") or NOT_MEASURED), []).append(row["key"])
    found = [tag("p", "Without figures, because wrong or failed:"), tag("ul", *wrong)] if wrong else []
    if len(reasons) > MAX_REASONS:
        reasons = {"several reasons": [f"{key}: {reason}" for reason, keys in reasons.items() for key in keys]}
    for reason, keys in reasons.items():
        more = [tag("li", f"and {len(keys) - MAX_MISSING} more")] if len(keys) > MAX_MISSING else []
        listed = tag("ul", *(tag("li", key) for key in keys[:MAX_MISSING]), *more)
        found.append(tag("details", tag("summary", f"{len(keys)} not measured: {reason}"), listed))
    return tag("div", *found, class_="missing") if found else Markup("")


def as_html(one: Table) -> Markup:
    notes = tag("ul", *(tag("li", note) for note in one.notes)) if one.notes else None
    cells = table([list(row) for row in one.rows], head=list(one.head), class_="figures")
    return join(tag("h4", one.title), cells, notes)


def reproduce(results: Sequence[Result]) -> Markup:
    """The commands that made these results, and how to compare one's own with them."""
    made: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        commit = str((result.get("environment") or {}).get("git_commit") or "").removesuffix("+changes")
        made.setdefault((commit, command_of(result)), []).append(result)
    lines = []
    for (commit, command), some in made.items():
        took = duration(sum(value_at(result, "time_s") or 0.0 for result in some) or None)
        lines += [f"git checkout {commit}"] if commit and f"git checkout {commit}" not in lines else []
        lines += [f"{command}   # {', '.join(str(result['benchmark']) for result in some)}: {took}"] if command else []
    name = shlex.quote(str(results[0].get("hardware")))
    lines += [f"burnish bench compare bench/results/{name} runs/bench   # yours against these"]
    return section("How to reproduce", tag("div", tag("pre", "\n".join(lines)), class_="block"))
