"""The tables of the memory benchmark. Imports no torch."""

from collections.abc import Sequence

from ..harness.markup import number, size
from . import published
from .benchmark import Result, Row, Table
from .fit import Probe
from .memory_cases import COUNTERPARTS, GB, GIB, SEPARATOR, budget_bytes

LENGTH_HEAD = ("method", "budget", "longest sequence", "peak there", "burnish takes", "planner", "published by others")
MODEL_HEAD = ("method", "budget", "largest model", "weights", "peak there", "planner")
PEAK_NOTE = {
    "cpu": "Peak: most resident memory in a step less what the process has with its libraries imported and no weight "
    "loaded (about 0.5 GiB). Every probe is a fresh process that takes two steps; loading does not count. "
    "Of two equal probes the peaks differ by a few percent, once in six times by 10 to 24 % (the whole suite measured "
    "twice).",
    "cuda": "Peak: most that torch's allocator has given out in a step, without the CUDA context; GB are decimal, and "
    "a card sold as 24 GB has 24 GiB. Loading does not count.",
}


def tables(result: Result) -> list[Table]:
    """One for each model whose lengths were tried, with its peaks, and one of the largest models."""
    found = []
    for model in groups(result, "length"):
        found += [lengths(result, model), peaks(result, model)]
    for tokens in groups(result, "model"):
        found.append(models(result, tokens))
    return [table for table in found if table.rows]


def groups(result: Result, kind: str) -> list[str]:
    """The second parts of the keys of one kind: models, or lengths."""
    found = [place(row)[1] for row in result["rows"] if place(row)[0] == kind]
    return list(dict.fromkeys(found))


def place(row: Row) -> tuple[str, str, str, str]:
    """Kind, model or length, method and budget of a row, whatever its state."""
    kind, subject, method, budget = row["key"].split(SEPARATOR)
    return kind, subject, method, budget


def rows_of(result: Result, kind: str, subject: str) -> list[Row]:
    """By budget, and within one in the order of the methods."""
    found = [row for row in result["rows"] if place(row)[:2] == (kind, subject)]
    return sorted(found, key=lambda row: budget_bytes(place(row)[3]))


def lengths(result: Result, model: str) -> Table:
    rows = rows_of(result, "length", model)
    by_place = {place(row)[2:]: row for row in rows}
    cells = []
    for row in rows:
        _, _, method, budget = place(row)
        beside = published.as_text(published.contexts(model, method, budget_bytes(budget)))
        if row["state"] != "ok":
            cells.append((method, budget, row["state"], "–", "–", "–", beside))
            continue
        times = ratio(by_place.get((COUNTERPARTS.get(method, ""), budget)), row)
        planner = planned_at(row, "predicted", "tokens", row["max_tokens"], result)
        cells.append(
            (method, budget, bounded(row, "max_tokens"), amount(row["peak_bytes"], result), times, planner, beside)
        )
    lead = (
        f"Sequences are multiples of {result['length_step']} tokens. Unless marked, one that is longer by "
        f"{result['resolution']:.0%}, or by one multiple, was tried and did not fit. {ranks(rows)}"
    )
    notes = [
        lead,
        PEAK_NOTE[result["device"]],
        *bounds(rows),
        *planner_notes(rows),
        *published_notes(rows),
        *reasons(rows),
    ]
    return Table(f"Longest sequence that fits: {model}, one sequence a step", LENGTH_HEAD, cells, notes)


def peaks(result: Result, model: str) -> Table:
    """The peaks at the lengths that all methods were tried at."""
    rows = [row for row in rows_of(result, "length", model) if row["state"] == "ok" and row.get("common_tokens")]
    shared = sorted({tokens for row in rows for tokens in row["common_tokens"]})
    cells = []
    for row in rows:
        at = {probe["tokens"]: probe for probe in row["probes"]}
        shown = [amount(at[n]["peak_bytes"], result) if n in at else "–" for n in shared]
        cells.append((row["method"], *shown))
    return Table(f"Peak memory: {model}, one sequence a step", ("method", *(f"{n:,} tokens" for n in shared)), cells)


def models(result: Result, subject: str) -> Table:
    rows = rows_of(result, "model", subject)
    cells = []
    for row in rows:
        _, _, method, budget = place(row)
        if row["state"] != "ok":
            cells.append((method, budget, row["state"], "–", "–", "–"))
            continue
        planner = planned_at(row, "probes", "params", row["max_params"], result)
        largest = row["largest"] or "none of the tried"
        cells.append(
            (method, budget, limit(row, largest), number(row["max_params"]), amount(row["peak_bytes"], result), planner)
        )
    lead = f"Random weights in a Llama's shape; unless marked, the next larger one did not fit. {ranks(rows)}"
    notes = [lead, PEAK_NOTE[result["device"]], *bounds(rows), *planner_notes(rows), *reasons(rows)]
    return Table(f"Largest model that fits: one sequence of {subject}", MODEL_HEAD, cells, notes)


def minimums() -> Table:
    """What Unsloth says is needed at least, for comparison with the largest models."""
    kinds = ("QLoRA", "LoRA in 16 bits")
    cells = [(model, *(f"{needed[kind]:g} GB" for kind in kinds)) for model, needed in published.MINIMUM_GB.items()]
    note = f"Published: {published.UNSLOTH_MINIMUM}; it names no length. Not measured here."
    return Table("Memory that Unsloth says a model needs", ("model", *kinds), cells, [note])


def bounded(row: Row, name: str) -> str:
    """The largest size as text; what is a bound says so."""
    return limit(row, "none of the tried" if row[name] is None else f"{row[name]:,}")


def limit(row: Row, text: str) -> str:
    return {"exact": text, "all": f"{text} (all)", "at least": f"≥ {text}"}[row["bound"]]


def ratio(ours: Row | None, row: Row) -> str:
    """How many times longer the sequences of burnish's counterpart are; nothing where one is a bound."""
    if ours is None or any(one["state"] != "ok" or not one["max_tokens"] for one in (ours, row)):
        return "–"
    if row["bound"] == "at least":
        return "–"
    sign = "≥ " if ours["bound"] != "exact" else ""
    return f"{sign}{ours['max_tokens'] / row['max_tokens']:.1f}x ({ours['method']})"


def planned_at(row: Row, key: str, name: str, wanted: int | None, result: Result) -> str:
    return next((amount(one["predicted_bytes"], result) for one in row[key] if one[name] == wanted), "–")


def amount(num_bytes: int | None, result: Result) -> str:
    """Bytes in the unit of the budgets, so that a column can be compared."""
    if num_bytes is None:
        return "–"
    return f"{num_bytes / GB:.2f} GB" if result["device"] == "cuda" else f"{num_bytes / GIB:.3f} GiB"


def ranks(rows: Sequence[Row]) -> str:
    found = sorted({row["rank"] for row in rows if row["state"] == "ok"})
    return f"LoRA rank {', '.join(map(str, found))}." if found else ""


def bounds(rows: Sequence[Row]) -> list[str]:
    """What the marks beside sizes mean."""
    measured = [row for row in rows if row["state"] == "ok"]
    found = ["(all): the largest that there is to try fits."] if any(row["bound"] == "all" for row in measured) else []
    ended = gathered([row for row in measured if row["bound"] == "at least"], "bound_reason")
    return found + [f"≥ {', '.join(keys)}: {reason}." for reason, keys in ended]


def planner_notes(rows: Sequence[Row]) -> list[str]:
    """What the planner's figure has in it: without this a reader would take it for the peak."""
    parts = sorted({part for row in rows if row["state"] == "ok" for part in row["predicted_parts"]})
    if not parts:
        return []
    return [f"Planner: what burnish plan predicts for {', '.join(parts).replace('_', ' ')}, and nothing else."]


def published_notes(rows: Sequence[Row]) -> list[str]:
    sources = {
        one.source
        for row in rows
        for one in published.contexts(place(row)[1], place(row)[2], budget_bytes(place(row)[3]))
    }
    return [f"Published: {source}, {published.CONTEXT_SETTINGS}. Not measured here." for source in sorted(sources)]


def reasons(rows: Sequence[Row]) -> list[str]:
    """Why rows have no figure, each reason once; what was not tried on any machine needs none."""
    found = gathered([row for row in rows if row["state"] in ("failed", "void")], "reason")
    return [f"{', '.join(keys)}: {reason}" for reason, keys in found]


def gathered(rows: Sequence[Row], name: str) -> list[tuple[str, list[str]]]:
    """Each reason with the methods and budgets that it is true of."""
    found: dict[str, list[str]] = {}
    for row in rows:
        _, _, method, budget = place(row)
        found.setdefault(str(row[name]), []).append(f"{method} in {budget}")
    return list(found.items())


def sized(kind: str, value: int) -> str:
    return f"{value:,} tokens" if kind == "length" else f"{number(value)} weights"


def outcome(probe: Probe) -> str:
    if probe.peak_bytes is None:
        return f"{probe.state} ({probe.reason})"
    return f"{size(probe.peak_bytes)}, {probe.time_s or 0:.1f} s a step"
