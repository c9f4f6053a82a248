"""What the page draws of memory: peaks over the length of a sequence or the size of a model, and what fits a budget."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ..harness.markup import Markup, join, number, size, tag
from .benchmark import Result, Row
from .memory_cases import GB, budget_text
from .page_rows import GIB, colour_of, grouped, is_ok, tokens, value_at, why
from .plots import Bar, Curve, Form, Group, Spot, bars, linear, listed, logarithmic, points, roomier

MAX_OVER = 1.25
"""Predictions are drawn up to this multiple of the largest measured peak or budget."""
FORMS: tuple[Form, ...] = ("", "open", "dotted", "open dotted")
"""How curves of one colour differ."""
SIZES = {"length": "tokens", "model": "params"}
"""Kind of row -> what its probes differ in."""
LARGEST = {"length": "max_tokens", "model": "max_params"}
TITLES = {
    "length": ("Peak memory over the length of a sequence", "Longest sequence that fits", "tokens in a sequence"),
    "model": ("Peak memory over the size of the model", "Largest model that fits", "parameters"),
}


def memory(result: Result) -> Markup:
    """For each model and for each length: the peaks of all methods, and what fits the budgets.

    What others published stands beside something measured or not at all.
    """
    found = []
    for kind, subject in (("length", "model"), ("model", "tokens")):
        rows = [row for row in result["rows"] if row.get("kind") == kind]
        for (name,), some in grouped(rows, subject).items():
            told = f"Longer sequences: {name}" if kind == "length" else f"Larger models: {name} tokens"
            if not any(map(is_ok, some)):
                some = [{**row, "published": None} for row in some]
            drawn = listed(peaks(some, kind), fitting(some, kind))
            found += [tag("h3", told), drawn] if drawn else []
    return join(*found)


def peaks(rows: Sequence[Row], kind: str) -> Markup:
    """Measured peaks, predictions, budgets and what others published."""
    budgets = sorted({round(budget) for row in rows if (budget := value_at(row, "budget_bytes"))})
    is_decimal = bool(budgets) and all(budget % GB == 0 for budget in budgets)
    unit = GB if is_decimal else GIB
    curves = curves_of([row for row in rows if is_ok(row)], kind, unit)
    top = max(
        [budget / unit for budget in budgets] + [y for one in curves if one.style == "marked" for y in heights(one)]
    )
    curves = [replace(one, points=[at for at in one.points if (at[1] or 0) <= MAX_OVER * top]) for one in curves]
    spots = [spot for row in reversed(rows) for spot in published(row, unit)]
    named = {spot.colour + spot.label: spot for spot in reversed(spots)}
    spots = [spot if spot in named.values() else replace(spot, label="") for spot in spots]
    xs = [x for one in curves for x, _ in one.points] + [spot.x for spot in spots]
    ys = [y for one in curves for y in heights(one)] + [spot.y for spot in spots]
    if not xs or not ys:
        return Markup("")
    title, _, x_title = TITLES[kind]
    levels = [(budget / unit, f"budget {budget_text(budget)}") for budget in budgets]
    x = logarithmic(x_title, xs, tokens if kind == "length" else number, base=2 if kind == "length" else 10)
    y = linear(f"peak memory, {'GB' if is_decimal else 'GiB'}", [*ys, *(level for level, _ in levels)], number)
    keys = [(one.name, f"{one.colour} {one.form}") for one in curves if one.style == "marked"]
    if any(one.style == "dashed" for one in curves):
        parts = sorted({part for row in rows if is_ok(row) for part in row.get("predicted_parts") or []})
        told = f" of {', '.join(parts).replace('_', ' ')}" if parts else ""
        keys.append((f"what burnish plan predicts{told}", "ink dashed"))
    keys += [("published by others", "grey open")] if spots else []
    x, y = roomier(x, 0.26), roomier(y, 0.08)
    return points(title, x, y, curves=curves, spots=spots, levels=levels, keys=keys)


def curves_of(rows: Sequence[Row], kind: str, unit: int) -> list[Curve]:
    """One for each method, and one for what the planner predicts of it; rows of one method have the same probes."""
    found: dict[str, Curve] = {}
    used: Counter[str] = Counter()
    for row in rows:
        name, colour = method_of(row), colour_of(str(row.get("method")))
        measured = curve_of(row, "probes", SIZES[kind], "peak_bytes", unit)
        if name in found or not any(y is not None for _, y in measured):
            continue
        form = FORMS[min(used[colour], len(FORMS) - 1)]
        used[colour] += 1
        found[name] = Curve(name, measured, colour, "marked", name, form)
        said = curve_of(row, "predicted" if kind == "length" else "probes", SIZES[kind], "predicted_bytes", unit)
        if any(y is not None for _, y in said):
            found[f"{name}, predicted"] = Curve(f"{name}, predicted", said, colour, "dashed")
    return list(found.values())


def curve_of(row: Row, key: str, along: str, value: str, unit: int) -> list[tuple[float, float | None]]:
    """(size, peak in units) of a row's probes or predictions; one that did not fit is a gap."""
    found = []
    for probe in row.get(key) or []:
        place, peak = value_at(probe, along), value_at(probe, value)
        if place:
            found.append((place, None if peak is None else peak / unit))
    return sorted(found, key=lambda point: point[0])


def heights(curve: Curve) -> list[float]:
    return [y for _, y in curve.points if y is not None]


def published(row: Row, unit: int) -> list[Spot]:
    """Figures of others, as they published them; what was out of memory has no place."""
    found = []
    for one in row.get("published") or []:
        length, budget = value_at(one, "max_tokens"), value_at(one, "budget_bytes")
        if length and budget:
            name = f"{one.get('label')}, published"
            told = f"{name}: {length:,.0f} tokens in {budget_text(round(budget))}; {one.get('source')}"
            found.append(Spot(length, budget / unit, colour_of(str(one.get("label"))), name, told, is_open=True))
    return found


def method_of(row: Row) -> str:
    return str(row.get("label") or row.get("method") or row["key"])


def fitting(rows: Sequence[Row], kind: str) -> Markup:
    """The largest size of each method in each budget, and what others published."""
    groups: list[Group] = []
    for (budget,), some in grouped(
        sorted(rows, key=lambda row: value_at(row, "budget_bytes") or 0), "budget_bytes"
    ).items():
        found = []
        for row in some:
            value = value_at(row, LARGEST[kind]) if is_ok(row) else None
            name, colour = method_of(row), colour_of(str(row.get("method")))
            if value is None:
                found.append(Bar(name, None, note="nothing that was tried fits" if is_ok(row) else why(row)))
            else:
                shown = f"{value:,.0f}" if kind == "length" else str(row.get("largest") or number(value))
                bound = {"at least": "≥ ", "all": "all, "}.get(str(row.get("bound")), "")
                peak = value_at(row, "peak_bytes")
                note = f"peak {size(peak)}" if peak is not None else ""
                found.append(Bar(name, value, f"{bound}{shown}", colour, note=note))
            found += [
                Bar(spot.label, spot.x, f"{spot.x:,.0f}", f"{spot.colour.split()[0]} pale", note="published")
                for spot in published(row, 1)
            ]
        groups.append((f"in {budget_text(round(budget))}" if value_at({"": budget}, "") else "", found))
    _, title, unit = TITLES[kind]
    tried = sorted({f"{value:,.0f}" for row in rows if (value := value_at(row, "tokens"))})
    lead = f"The largest of the tried models that trains on {' or '.join(tried)} tokens." if tried else ""
    axis = linear(
        unit, [bar.value or 0 for _, found in groups for bar in found], tokens if kind == "length" else number
    )
    return bars(title, groups, axis, lead=lead)
