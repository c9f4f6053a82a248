"""What the page draws of whole steps: how much faster burnish is, and speed against memory."""

from collections.abc import Sequence
from typing import Any

from ..harness.markup import Markup, join, number, size, tag
from .benchmark import Result, Row
from .page_rows import GIB, colour_of, grouped, is_ok, samples_at, span_of, tick, times, times_span, value_at, why
from .plots import Bar, Spot, bars, linear, listed, points


def step(result: Result) -> Markup:
    """For each configuration: how much faster burnish is, speed against memory, and what the memory is."""
    found = []
    for (case,), rows in grouped(result["rows"], "case").items():
        facts: dict[str, Any] = next((row["facts"] for row in rows if isinstance(row.get("facts"), dict)), {})
        drawn = listed(faster(rows, str(facts.get("own") or "burnish")), speed_and_memory(rows), memory_parts(rows))
        found += [tag("h3", case), tag("p", work_of(facts), class_="soft"), drawn] if drawn else []
    return join(*found)


def work_of(facts: dict[str, Any]) -> str:
    """What a step computes, in a line."""
    work = facts.get("workload")
    if not isinstance(work, dict):
        return ""
    parts = [f"{work.get('num_sequences')} × {work.get('length')} tokens a step", f"LoRA rank {work.get('rank')}"]
    parts += [f"{work['num_threads']} threads"] if work.get("num_threads") else []
    num_rounds = len(facts["rounds"]) if isinstance(facts.get("rounds"), list) else 0
    return " · ".join(parts + ([f"{num_rounds} rounds in turn, each mode a fresh process"] if num_rounds else []))


def faster(rows: Sequence[Row], own: str) -> Markup:
    """The other modes against burnish's own."""
    found = []
    for row in rows:
        value = value_at(row, "faster", "median") if is_ok(row) else None
        if row.get("mode") == own and is_ok(row):
            continue
        name, detail = str(row.get("mode", row["key"])), str(row.get("summary") or "")
        if value is None:
            note = why(row) if not is_ok(row) else "no ratio to burnish"
            found.append(Bar(name, None, note=note, detail=detail))
            continue
        span = span_of(row["faster"])
        samples = samples_at(row, "faster", "samples")
        found.append(Bar(name, value, times(value), colour_of(name), span, samples, times_span(span), detail))
    found.sort(key=lambda bar: -(bar.value or 0.0))
    values = [x for bar in found for x in (bar.value, *bar.samples, *(bar.span or ())) if x is not None]
    axis = linear("time of a step over burnish's in the same round", [1.0, *values], tick)
    lead = "How many times as long as burnish each takes. Bar: median, line: quartiles, dots: the rounds."
    return bars("burnish is faster by", [("", found)], axis, origin=0.0, lead=lead)


def speed_and_memory(rows: Sequence[Row]) -> Markup:
    spots = []
    for row in rows:
        speed, peak = value_at(row, "tokens_per_s"), value_at(row, "peak_bytes")
        if is_ok(row) and speed is not None and peak is not None:
            name = str(row["mode"])
            told = f"{name}: {number(speed)} tokens/s, {size(peak)}"
            spots.append(Spot(peak / GIB, speed, colour_of(name), name, told))
    spots.sort(key=lambda spot: not spot.label.startswith("burnish"))
    x = linear("peak memory, GiB (less is better)", [spot.x for spot in spots], number)
    y = linear("tokens per second (more is better)", [spot.y for spot in spots], number)
    return points("Speed against memory", x, y, spots=spots, width="half")


def memory_parts(rows: Sequence[Row]) -> Markup:
    """Peak memory as what was there before, the loaded model, and training itself."""
    found = []
    for row in rows:
        peak, name = value_at(row, "peak_bytes"), str(row.get("mode", row["key"]))
        if not is_ok(row) or not peak:
            continue
        floor, loaded = (value_at(row, key) or 0.0 for key in ("floor_bytes", "loaded_bytes"))
        loaded = min(max(floor, loaded), peak)
        cuts = (("grey", floor), ("violet", loaded - floor), (colour_of(name), peak - loaded))
        parts = [(colour, value / GIB) for colour, value in cuts]
        found.append(Bar(name, peak / GIB, size(peak), parts=parts))
    axis = linear("peak memory, GiB (less is better)", [bar.value or 0.0 for bar in found], number)
    keys = [("libraries", "grey"), ("model", "violet"), ("training, in the colour of the mode", "copper")]
    return bars("Peak memory", [("", found)], axis, keys=keys, width="half")
