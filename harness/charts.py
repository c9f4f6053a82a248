"""Line charts as inline SVG, without scripts. The picture stretches with the page; its labels are HTML and do not."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .markup import Markup, join, number, tag

EDGE = 1000
"""The picture is EDGE x EDGE units and stretched to the width and height of its box."""
MAX_BUCKETS = 400
MAX_SQUARES = 32

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """One curve. `colour` is a class of the style sheet; a point with y = None is a gap (not finite)."""

    name: str
    points: Sequence[Point]
    colour: str
    style: Literal["line", "faint", "marked"] = "line"


def chart(
    title: str, series: Sequence[Series], *, floor: float | None = None, width: Literal["half", "full"]
) -> Markup:
    """A figure with its key, axes and curves; nothing if no series has a finite point. The y axis reaches `floor`."""
    drawn = [one for one in series if any(y is not None for _, y in one.points)]
    if not drawn:
        return Markup("")
    xs = [x for one in drawn for x, _ in one.points]
    ys = [y for one in drawn for _, y in one.points if y is not None]
    x_low, x_high = _widened(min(xs), max(xs), share=0.0)
    y_low, y_high = _widened(min(ys), max(ys), share=0.06)
    y_low = y_low if floor is None or min(ys) < floor else floor
    x_ticks, y_ticks = ticks(x_low, x_high, count=6, whole=True), ticks(y_low, y_high, count=4)

    def place(x: float, y: float) -> tuple[float, float]:
        return EDGE * (x - x_low) / (x_high - x_low), EDGE * (y_high - y) / (y_high - y_low)

    grid = " ".join(f"M0 {place(x_low, y)[1]:.1f}H{EDGE}" for y in y_ticks)
    shapes = [tag("path", d=grid, class_="grid")]
    for one in drawn:
        parts = [[place(x, y) for x, y in run] for run in unbroken(decimated(one.points))]
        line = " ".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in part) for part in parts)
        shapes.append(tag("path", d=line, class_=f"{one.style} {one.colour}"))
        # A round cap on a line of no length stays a circle however the picture is stretched.
        spots = [spot for part in parts for spot in part if one.style == "marked" or len(part) == 1]
        dots = " ".join(f"M{x:.1f} {y:.1f}h0" for x, y in spots)
        shapes.append(tag("path", d=dots, class_=f"dots {one.colour}") if dots else Markup(""))
    described = f"{title}: " + "; ".join(_described(one) for one in drawn)
    x_labels = [(place(x, y_low)[0], number(x)) for x in x_ticks]
    y_labels = [(place(x_low, y)[1], number(y)) for y in y_ticks]
    keys = [(one.name, one.colour) for one in drawn if one.style != "faint" and one.name]
    return frame(title, plot(shapes, described, x_labels=x_labels, y_labels=y_labels), keys=keys, width=width)


def frame(title: str, *content: Any, keys: Sequence[tuple[str, str]], width: Literal["half", "full"]) -> Markup:
    """A figure: its title, what each colour means (name, colour), then the content."""
    shown = [tag("span", name, class_=f"key {colour}") for name, colour in keys]
    caption = tag("figcaption", tag("b", title), join(*shown))
    return tag("figure", caption, *content, class_=f"chart {width}")


def plot(
    shapes: Sequence[Markup],
    described: str,
    *,
    x_labels: Sequence[tuple[float, str]],
    y_labels: Sequence[tuple[float, str]],
    others: Sequence[Markup] = (),
) -> Markup:
    """The shapes with (place, text) of the ticks of both axes around them, and other HTML labels upon them."""
    svg = tag(
        "svg", *shapes, viewBox=f"0 0 {EDGE} {EDGE}", preserveAspectRatio="none", role="img", aria_label=described
    )
    labels = [tag("span", name, class_="y", style=f"top:{y / 10:.2f}%") for y, name in y_labels]
    labels += [tag("span", name, class_="x", style=f"left:{x / 10:.2f}%") for x, name in x_labels]
    return tag("div", svg, *labels, *others, class_="plot")


def ticks(low: float, high: float, *, count: int, whole: bool = False) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) in low…high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def decimated(points: Sequence[Point]) -> list[Point]:
    """At most 2 * MAX_BUCKETS points: the lowest and highest of each bucket, so that no spike is lost. Gaps stay."""
    if len(points) <= 2 * MAX_BUCKETS:
        return list(points)
    kept: list[Point] = []
    for bucket in range(MAX_BUCKETS):
        start, end = (bucket * len(points) // MAX_BUCKETS, (bucket + 1) * len(points) // MAX_BUCKETS)
        some = [(y, index) for index in range(start, end) if (y := points[index][1]) is not None]
        gaps = [index for index in range(start, end) if points[index][1] is None]
        chosen = {min(some)[1], max(some)[1]} if some else set()
        kept += [points[index] for index in sorted(chosen | set(gaps[:1]))]
    return kept


def unbroken(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """The curve cut at its gaps."""
    parts: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            parts.append([])
        else:
            parts[-1].append((x, y))
    return [part for part in parts if part]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Mean over a window of a tenth of the curve around each point, narrower at the ends: it does not lag behind."""
    sums, counts = [0.0], [0]
    for _, y in points:
        sums.append(sums[-1] + (y or 0.0))
        counts.append(counts[-1] + (y is not None))
    result: list[Point] = []
    for i, (x, y) in enumerate(points):
        reach = min(len(points) // 20, i, len(points) - 1 - i)
        start, end = i - reach, i + reach + 1
        mean = None if y is None else (sums[end] - sums[start]) / (counts[end] - counts[start])
        result.append((x, mean))
    return result


def picture(values: Any) -> Markup | None:
    """An image given as nested lists [height][width] or [height][width][1 or 3], as squares; None if it is no image.

    The brightest number is white. A larger image than MAX_SQUARES on an edge is thinned out.
    """
    try:
        pixels = np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError):
        return None
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or min(pixels.shape) < 1 or not np.isfinite(pixels).all():
        return None
    stride = -(-max(pixels.shape[:2]) // MAX_SQUARES)
    pixels = pixels[::stride, ::stride]
    low, high = float(pixels.min()), float(pixels.max())
    shades = np.broadcast_to((pixels - low) * (255 / (high - low or 1)), (*pixels.shape[:2], 3)).astype(int)
    height, width = shades.shape[:2]
    squares = [
        tag("rect", x=x, y=y, width=1, height=1, fill="#{:02x}{:02x}{:02x}".format(*shades[y, x]))
        for y in range(height)
        for x in range(width)
    ]
    return tag("svg", *squares, viewBox=f"0 0 {width} {height}", class_="picture", role="img", aria_label="image")


def _widened(low: float, high: float, *, share: float) -> tuple[float, float]:
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin
    return low - share * (high - low), high + share * (high - low)


def _described(series: Series) -> str:
    values = [y for _, y in series.points if y is not None]
    return f"{series.name or 'curve'} from {number(values[0])} to {number(values[-1])}"
