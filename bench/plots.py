"""The plots of the page as inline SVG: bars with quartiles, and points and curves over linear or logarithmic axes.

The pictures stretch with the page; all text is HTML and does not. A value that is missing or not finite has no mark.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal

from ..harness.charts import EDGE, frame, plot, ticks, unbroken
from ..harness.markup import Markup, join, tag
from .labels import Label, placed

Width = Literal["half", "full"]
Form = Literal["", "open", "dotted", "open dotted"]
"""Rings instead of dots, a dotted line instead of a whole one."""
MAX_SAMPLES = 60
"""Raw samples drawn beside one bar; of more, every n-th."""
MAX_TICKS = 5
CHAR_PX = {"name": 7.6, "detail": 6.9, "written": 8.3, "note": 7.0}
"""Width of a character of a bar's texts in the widest of common fonts."""
MAX_NAME_PX = {"half": 180, "full": 330}


@dataclass(frozen=True)
class Axis:
    """A range of values, the ticks in it, and how they are written. `title` has the unit."""

    title: str
    low: float
    high: float
    ticks: Sequence[float]
    write: Callable[[float], str]
    is_log: bool = False

    def place(self, value: float) -> float:
        """0 at `low` … EDGE at `high`; outside of the range the nearer end."""
        low, high, value = (math.log(max(x, 1e-300)) if self.is_log else x for x in (self.low, self.high, value))
        return EDGE * min(1.0, max(0.0, (value - low) / (high - low)))


@dataclass(frozen=True)
class Bar:
    """One row of a bar plot. `value` None: no bar, and `note` says why. `parts`: (colour, value), one after another."""

    name: str
    value: float | None
    written: str = ""
    colour: str = "copper"
    span: tuple[float, float] | None = None
    samples: Sequence[float] = ()
    note: str = ""
    detail: str = ""
    """A second line under the name."""
    parts: Sequence[tuple[str, float]] = ()
    mark: float | None = None
    """Where a value to compare with lies, as a stroke across the bar."""


Group = tuple[str, Sequence[Bar]]
"""Bars under a name."""


@dataclass(frozen=True)
class Curve:
    """A line through (x, y) points; y None is a gap. `label` stands at its last point."""

    name: str
    points: Sequence[tuple[float, float | None]]
    colour: str
    style: Literal["line", "marked", "dashed", "roof"] = "marked"
    """A roof is shaded above."""
    label: str = ""
    form: Form = ""


@dataclass(frozen=True)
class Spot:
    """A single point with a label and the text that appears over it."""

    x: float
    y: float
    colour: str
    label: str
    title: str
    is_open: bool = False
    """A ring instead of a dot."""


def linear(title: str, values: Sequence[float], write: Callable[[float], str], *, start: float = 0.0) -> Axis:
    """From `start` (or below, if a value is) to a little above the largest value."""
    low, high = min([start, *values]), max([start, *values])
    high = high + 0.06 * (high - low) if high > low else low + (abs(low) or 1.0)
    return Axis(title, low, high, ticks(low, high, count=5), write)


def logarithmic(title: str, values: Sequence[float], write: Callable[[float], str], *, base: int = 10) -> Axis:
    """A little more than the range of the values, which are above 0; ticks at powers of the base, thinned."""
    low, high = min(values) / 1.15, max(values) * 1.15
    first, last = math.ceil(math.log(low, base)), math.floor(math.log(high, base))
    found = [float(base) ** power for power in range(first, last + 1)]
    if len(found) < 2 and base == 10:
        found = [f * 10.0**power for power in range(first - 1, last + 1) for f in (1, 2, 5)]
        found = [value for value in found if low <= value <= high]
    if len(found) < 2:
        low, high = min(low, float(base) ** (first - 1)), max(high, float(base) ** first)
        found = [float(base) ** (first - 1), float(base) ** first]
    return Axis(title, low, high, found[:: math.ceil(len(found) / MAX_TICKS)], write, is_log=True)


def roomier(axis: Axis, share: float) -> Axis:
    """The axis with so much more of its length beyond its high end: room for labels."""
    if axis.is_log:
        return replace(axis, high=axis.high * (axis.high / axis.low) ** share)
    return replace(axis, high=axis.high + share * (axis.high - axis.low))


def around_one(title: str, values: Sequence[float], write: Callable[[float], str]) -> Axis:
    """A logarithmic axis for ratios: it holds 1, and at least from a half to 2."""
    axis = logarithmic(title, [0.5, 2.0, *values], write, base=2)
    step = math.ceil(math.log2(axis.high / axis.low) / (MAX_TICKS + 0.5))
    found = [2.0**power for power in range(-20 * step, 20 * step, step) if axis.low <= 2.0**power <= axis.high]
    return Axis(title, axis.low, axis.high, found, write, is_log=True)


def bars(
    title: str,
    groups: Sequence[Group],
    axis: Axis,
    *,
    origin: float = 0.0,
    keys: Sequence[tuple[str, str]] = (),
    lead: str = "",
    width: Width = "full",
    kind: str = "",
) -> Markup:
    """A figure of horizontal bars from `origin`, in named groups; nothing without a row. `kind` is a class of it."""
    if not any(rows for _, rows in groups):
        return Markup("")
    grid = " ".join(f"M{axis.place(tick):.1f} 0V{EDGE}" for tick in axis.ticks)
    shapes = [tag("path", d=grid, class_="grid")]
    if axis.low <= origin <= axis.high:
        shapes.append(tag("path", d=f"M{axis.place(origin):.1f} 0V{EDGE}", class_="origin"))
    back = tag(
        "svg", *shapes, class_="back", viewBox=f"0 0 {EDGE} {EDGE}", preserveAspectRatio="none", aria_hidden="true"
    )
    lines: list[Markup] = []
    has_bars = any(row.value is not None for _, rows in groups for row in rows)
    for name, rows in groups:
        lines += [tag("div", tag("b", name), class_="group")] if name and rows else []
        lines += [_bar(row, axis, origin, name) for row in rows]
    labels = [tag("span", axis.write(t), style=f"left:{axis.place(t) / 10:.2f}%", class_="x") for t in axis.ticks]
    under = join(tag("div", *labels, class_="ticks"), tag("p", axis.title, class_="unit"))
    style = _columns([row for _, rows in groups for row in rows], MAX_NAME_PX[width])
    content = [back, *lines, under] if has_bars else lines
    body = tag("div", *content, class_=f"bars {kind}".strip(), style=style)
    return frame(title, tag("p", lead, class_="lead") if lead else None, body, keys=keys, width=width)


def _columns(rows: Sequence[Bar], max_name_px: int) -> str:
    """The widths of the columns of names, values and notes, as the style sheet takes them on a wide screen."""

    def needed(texts: Sequence[str], kind: str, margin: int) -> int:
        return math.ceil(max(map(len, texts), default=0) * CHAR_PX[kind]) + margin

    name_px = max(needed([row.name for row in rows], "name", 16), needed([row.detail for row in rows], "detail", 16))
    valued = [row for row in rows if row.value is not None]
    note_px = needed([row.note for row in valued], "note", 8) if any(row.note for row in valued) else 0
    value_px = needed([row.written for row in valued], "written", 12) + note_px
    return f"--wide-name:{max(90, min(name_px, max_name_px))}px;--wide-value:{value_px}px;--note:{note_px}px"


def _bar(row: Bar, axis: Axis, origin: float, group: str) -> Markup:
    name = tag("span", row.name, tag("small", row.detail) if row.detail else None, class_="name")
    told = _told(row, group)
    if row.value is None:
        return tag("div", name, tag("span", row.note, class_="state"), class_="bar none")
    shapes, start = [tag("title", told)], axis.place(origin)
    top, height = (14, 46) if row.samples else (20, 60)
    ends = pairwise(accumulate((value for _, value in row.parts), initial=0.0))
    pieces = [(colour, axis.place(a), axis.place(b)) for (colour, _), (a, b) in zip(row.parts, ends, strict=True)]
    for colour, left, right in pieces or [(row.colour, start, axis.place(row.value))]:
        left, right = min(left, right), max(left, right)
        shapes.append(
            tag("rect", x=f"{left:.1f}", y=top, width=f"{right - left:.1f}", height=height, class_=f"fill {colour}")
        )
    middle = top + height / 2
    if row.span is not None:
        left, right = (axis.place(value) for value in row.span)
        caps = f"M{left:.1f} {middle:g}H{right:.1f}M{left:.1f} {middle - 12:g}v24M{right:.1f} {middle - 12:g}v24"
        shapes.append(tag("path", d=caps, class_="whisker"))
    if row.mark is not None:
        shapes.append(tag("path", d=f"M{axis.place(row.mark):.1f} {top - 10}v{height + 20}", class_="mark"))
    if row.samples:
        some = row.samples[:: math.ceil(len(row.samples) / MAX_SAMPLES)]
        dots = " ".join(f"M{axis.place(value):.1f} 80h0" for value in some)
        shapes.append(tag("path", d=dots, class_=f"samples {row.colour}"))
    svg = tag("svg", *shapes, viewBox=f"0 0 {EDGE} 100", preserveAspectRatio="none", role="img", aria_label=told)
    value = tag("span", tag("b", row.written), tag("i", row.note) if row.note else None, class_="value")
    return tag("div", name, value, tag("div", svg, class_="track"), class_="bar")


def _told(row: Bar, group: str) -> str:
    """A bar in words, with its raw samples."""
    name = ", ".join(filter(None, (group, row.name)))
    samples = ", ".join(f"{value:.4g}" for value in row.samples[:MAX_SAMPLES])
    return f"{name}: " + "; ".join(filter(None, (row.written, row.note, f"samples {samples}" if samples else "")))


def points(
    title: str,
    x: Axis,
    y: Axis,
    *,
    curves: Sequence[Curve] = (),
    spots: Sequence[Spot] = (),
    levels: Sequence[tuple[float, str]] = (),
    keys: Sequence[tuple[str, str]] = (),
    lead: str = "",
    width: Width = "full",
    kind: str = "",
) -> Markup:
    """A figure of curves and single points; `levels` are named horizontal lines. Nothing without curves and points."""
    drawn = [curve for curve in curves if any(value is not None for _, value in curve.points)]
    if not drawn and not spots:
        return Markup("")
    grid = [f"M0 {EDGE - y.place(tick):.1f}H{EDGE}" for tick in y.ticks]
    grid += [f"M{x.place(tick):.1f} 0V{EDGE}" for tick in x.ticks]
    shapes = [tag("path", d=" ".join(grid), class_="grid")]
    labels: list[Label] = []
    ends: list[Label] = []
    lines: list[list[tuple[float, float]]] = []
    for level, name in levels:
        high = EDGE - y.place(level)
        shapes.append(tag("path", tag("title", name), d=f"M0 {high:.1f}H{EDGE}", class_="level"))
        labels.append(Label(0.0, high, name, "level", is_line=True))
        lines.append([(0.0, high), (float(EDGE), high)])
    traces = [_trace(curve, x, y) for curve in drawn]
    for curve, parts in zip(drawn, traces, strict=True):
        lines += parts
        shapes.append(tag("g", *_curve(curve, parts)))
        ends += [Label(*parts[-1][-1], curve.label, curve.colour)] if curve.label else []
    for spot in spots:
        place = x.place(spot.x), EDGE - y.place(spot.y)
        dot = f"M{place[0]:.1f} {place[1]:.1f}h0"
        shapes.append(tag("path", tag("title", spot.title), d=dot, class_=f"dots {spot.colour}"))
        shapes += [tag("path", d=dot, class_="hole")] if spot.is_open else []
        labels.append(Label(*place, spot.label, spot.colour))
    told = [f"{curve.name}: " + _said(curve, x, y) for curve in drawn] + [spot.title for spot in spots]
    picture = plot(
        shapes,
        f"{title}. " + "; ".join([*told, *(name for _, name in levels)]),
        x_labels=[(x.place(tick), x.write(tick)) for tick in x.ticks],
        y_labels=[(EDGE - y.place(tick), y.write(tick)) for tick in y.ticks],
        others=placed([*labels, *ends], lines=lines, width=width),
    )
    above, below = tag("p", f"↑ {y.title}", class_="unit up"), tag("p", f"{x.title} →", class_="unit")
    body = tag("div", above, picture, below, class_=f"points {kind}".strip())
    return frame(title, tag("p", lead, class_="lead") if lead else None, body, keys=keys, width=width)


def _trace(curve: Curve, x: Axis, y: Axis) -> list[list[tuple[float, float]]]:
    """The curve's places, cut at its gaps."""
    return [[(x.place(a), EDGE - y.place(b)) for a, b in part] for part in unbroken(curve.points)]


def _curve(curve: Curve, parts: Sequence[Sequence[tuple[float, float]]]) -> list[Markup]:
    line = " ".join("M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in part) for part in parts)
    dots = " ".join(f"M{a:.1f} {b:.1f}h0" for part in parts for a, b in part)
    style = "dashed" if curve.style == "dashed" else "line"
    shapes = [tag("title", curve.name), tag("path", d=line, class_=f"{style} {curve.colour} {curve.form}".strip())]
    if curve.style == "roof":
        shapes.append(tag("path", d=f"{line}V0H{parts[0][0][0]:.1f}Z", class_="above"))
    if curve.style != "marked":
        return shapes
    holes = [tag("path", d=dots, class_="hole")] if "open" in curve.form else []
    return [*shapes, tag("path", d=dots, class_=f"dots {curve.colour}"), *holes]


def _said(curve: Curve, x: Axis, y: Axis) -> str:
    return ", ".join(f"{x.write(a)} {y.write(b)}" for a, b in curve.points if b is not None)


def listed(*parts: Markup) -> Markup:
    """The figures in the grid of the page; nothing where there is none."""
    return tag("div", join(*parts), class_="charts") if any(parts) else Markup("")
