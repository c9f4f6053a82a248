"""What the page draws of memory: peaks over the length of a sequence, and what fits a budget."""

from collections.abc import Sequence
from dataclasses import replace

from ..harness.markup import Markup, join, number, size, tag
from .benchmark import Result, Row
from .page_rows import GIB, colour_of, grouped, is_ok, tokens, value_at, why
from .plots import Bar, Curve, Spot, bars, linear, listed, logarithmic, points

MAX_OVER = 1.25
"""Predictions are drawn up to this multiple of the largest measured peak or budget."""


def memory(result: Result) -> Markup:
    """Peaks over the length of a sequence, the longest that fits, the largest model that fits."""
    found = []
    lengths = [row for row in result["rows"] if row.get("kind") == "length"]
    for (model,), rows in grouped(lengths, "model").items():
        found += [tag("h3", f"{model}: longer sequences"), listed(memory_curves(rows), longest(rows))]
    models = [row for row in result["rows"] if row.get("kind") == "model"]
    for (budget,), rows in grouped(models, "budget_bytes").items():
        found += [tag("h3", f"Larger models in {size(budget)}"), listed(largest(rows), model_peaks(rows))]
    return join(*found)


def memory_curves(rows: Sequence[Row]) -> Markup:
    curves: list[Curve] = []
    budgets = sorted({budget for row in rows if (budget := value_at(row, "budget_bytes"))})
    for row in rows:
        name = method_of(row)
        colour = colour_of(str(row.get("method")))
        measured, said = curve_of(row, "probes", "peak_bytes"), curve_of(row, "predicted", "predicted_bytes")
        if is_ok(row) and measured and name not in [curve.name for curve in curves]:
            curves.append(Curve(name, measured, colour, "marked", name))
            curves += [Curve(f"{name}, predicted", said, colour, "dashed")] if said else []
    spots = [spot for row in rows for spot in published(row)]
    top = max([b / GIB for b in budgets] + [y for curve in curves if curve.style == "marked" for y in heights(curve)])
    curves = [replace(curve, points=[at for at in curve.points if (at[1] or 0) <= MAX_OVER * top]) for curve in curves]
    xs = [x for curve in curves for x, _ in curve.points] + [spot.x for spot in spots]
    ys = [y for curve in curves for y in heights(curve)] + [spot.y for spot in spots]
    if not xs or not ys:
        return Markup("")
    levels = [(budget / GIB, f"budget {size(budget)}") for budget in budgets]
    x = logarithmic("tokens in a sequence", xs, tokens, base=2)
    y = linear("peak memory, GiB", [*ys, *(level for level, _ in levels)], number)
    keys = [(curve.name, curve.colour) for curve in curves if curve.style == "marked"]
    keys += [("dashed: what burnish plan predicts", "ink")] if any(c.style == "dashed" for c in curves) else []
    keys += [("ring: published by others", "grey")] if spots else []
    return points("Peak memory over the length", x, y, curves=curves, spots=spots, levels=levels, keys=keys)


def heights(curve: Curve) -> list[float]:
    return [y for _, y in curve.points if y is not None]


def curve_of(row: Row, key: str, value: str) -> list[tuple[float, float | None]]:
    """(tokens, GiB) of a row's probes or predictions, by tokens; one that did not fit is a gap."""
    found = []
    for probe in row.get(key) or []:
        length, peak = value_at(probe, "tokens"), value_at(probe, value)
        if length:
            found.append((length, None if peak is None else peak / GIB))
    return sorted(found, key=lambda point: point[0])


def published(row: Row) -> list[Spot]:
    """Figures of others, as they published them."""
    given = row.get("published") or []
    found = []
    for one in given if isinstance(given, list) else [given]:
        length, budget = value_at(one, "max_tokens"), value_at(one, "budget_bytes")
        if length and budget:
            name = f"{one.get('label') or method_of(row)}, published"
            told = f"{name}: {length:,.0f} tokens in {size(budget)}, {one.get('source')}"
            found.append(Spot(length, budget / GIB, colour_of(name), name, told, is_open=True))
    return found


def method_of(row: Row) -> str:
    return str(row.get("label") or row.get("method") or row["key"])


def longest(rows: Sequence[Row]) -> Markup:
    """max_tokens of each method, for each budget."""
    groups = []
    for (budget,), some in grouped(rows, "budget_bytes").items():
        found = []
        for row in some:
            value = value_at(row, "max_tokens") if is_ok(row) else None
            note = "" if value is not None else why(row) if not is_ok(row) else "nothing fits"
            colour = colour_of(str(row.get("method")))
            found.append(Bar(method_of(row), value, f"{value or 0:,.0f}", colour, note=note))
            for spot in published(row):
                found.append(Bar(spot.label, spot.x, f"{spot.x:,.0f}", "grey", note="published"))
        groups.append((f"in {size(budget)}", found))
    axis = linear("tokens in a sequence", [bar.value or 0 for _, found in groups for bar in found], tokens)
    return bars("Longest sequence that fits", groups, axis)


def largest(rows: Sequence[Row]) -> Markup:
    found = []
    for row in rows:
        value = value_at(row, "max_params") if is_ok(row) else None
        note = "" if value is not None else why(row) if not is_ok(row) else "nothing fits"
        colour = colour_of(str(row.get("method")))
        found.append(Bar(method_of(row), value, number(value), colour, note=note))
    axis = linear("parameters", [bar.value or 0.0 for bar in found], number)
    tried = sorted({f"{value:,.0f}" for row in rows if (value := value_at(row, "tokens"))})
    lead = f"The largest of the tried models that trains on {' or '.join(tried)} tokens." if tried else ""
    return bars("Largest model that fits", [("", found)], axis, lead=lead)


def model_peaks(rows: Sequence[Row]) -> Markup:
    """The peak of each model that was tried, with the planner's prediction as a stroke."""
    groups = []
    for row in rows:
        found = []
        for probe in row.get("probes") or []:
            peak, said = value_at(probe, "peak_bytes"), value_at(probe, "predicted_bytes")
            name = f"{probe.get('model')}, {number(value_at(probe, 'params'))}"
            note = f"predicted {size(said)}" if said is not None else ""
            if peak is None:
                found.append(Bar(name, None, note=f"does not fit; {note}" if note else "does not fit"))
                continue
            mark = None if said is None else said / GIB
            found.append(Bar(name, peak / GIB, size(peak), colour_of(str(row["method"])), note=note, mark=mark))
        groups.append((method_of(row), found if is_ok(row) else []))
    values = [x for _, found in groups for bar in found for x in (bar.value, bar.mark) if x is not None]
    axis = linear("peak memory, GiB", values, number)
    return bars("Peak of each model that was tried", groups, axis, lead="Stroke: what burnish plan predicts.")
