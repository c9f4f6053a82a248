"""Where the labels of points go, so that no two overlap on any screen: text keeps its size while the picture stretches.

Two sets are chosen, for wide and for narrow screens, and each is tried on several widths of the picture. A label is
beside its point, or further up or down at the end of a stroke; one for which there is no room is left out of the set.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ..harness.charts import EDGE
from ..harness.markup import Markup, tag

Box = tuple[float, float, float, float]
"""left, top, right, bottom in pixels."""

WIDTHS: dict[str, dict[str, tuple[int, ...]]] = {
    "wide": {"full": (630, 760, 950), "half": (255, 320, 400, 450)},
    "narrow": {"full": (245, 290, 350, 450, 640), "half": (245, 290, 350, 450, 640)},
}
"""Widths in pixels that the picture may have above and below 760 pixels of the page."""
HEIGHTS = {"wide": {"full": 400, "half": 260}, "narrow": {"full": 330, "half": 240}}
"""Those of the style sheet."""
CHAR_PX = 7.4
"""Width of a character of 12 pixels in the widest of common fonts."""
LINE_PX = 14.0
DOT_PX = 5.0
STROKE_PX = 2.0
SPACE_PX = 4.0
"""Between the texts of neighbours."""
SIDES: dict[str, tuple[float, float, float, float]] = {
    "e": (9, -0.5, 0, 0),
    "w": (-9, -0.5, -1, 0),
    "n": (0, -1, -0.5, -7),
    "s": (0, 0, -0.5, 7),
    "ne": (6, -1, 0, -4),
    "se": (6, 0, 0, 4),
    "nw": (-6, -1, -1, -4),
    "sw": (-6, 0, -1, 4),
}
"""Side -> shift of the box: x in pixels, y in its heights, x in its widths, y in pixels; as in the style sheet."""
RISES = (22, 38, 54, 70, 86)
"""Lengths in pixels of the strokes to labels that are further away."""


@dataclass(frozen=True)
class Label:
    """Text at a place of the picture (0…EDGE). A line's label stands on the line at its left or right end."""

    x: float
    y: float
    text: str
    colour: str
    is_line: bool = False


@dataclass(frozen=True)
class Seat:
    """Where a label may go: the classes of the style sheet, and the length of the stroke, 0 without one."""

    side: str
    rise: int = 0


BESIDE = tuple(Seat(side) for side in SIDES)
AWAY = tuple(Seat(f"{way} {side}", rise) for way in ("up", "down") for rise in RISES for side in ("right", "left"))
ON_LINE = tuple(Seat(f"on {side}") for side in ("nw", "ne", "sw", "se"))


def placed(
    labels: Sequence[Label], *, lines: Sequence[Sequence[tuple[float, float]]], width: Literal["half", "full"]
) -> list[Markup]:
    """The labels as HTML, each with its seat and the set that it belongs to.

    The first have the first choice, beside their points, unless more find a seat in another order or further away.
    """
    found: list[Markup] = []
    sets = {name: _seats(labels, lines, WIDTHS[name][width], HEIGHTS[name][width]) for name in WIDTHS}
    for index, label in enumerate(labels):
        chosen = {name: seat for name, seats in sets.items() if (seat := seats[index])}
        is_same = len(chosen) == len(sets) and len(set(chosen.values())) == 1
        for name, seat in list(chosen.items())[:1] if is_same else chosen.items():
            style = f"left:{label.x / EDGE:.2%};top:{label.y / EDGE:.2%}" + (
                f";--rise:{seat.rise}px" if seat.rise else ""
            )
            sort = f"label {seat.side} {label.colour}" + ("" if is_same else f" {name}")
            found.append(tag("span", label.text, class_=sort, style=style))
    return found


def _seats(
    labels: Sequence[Label], lines: Sequence[Sequence[tuple[float, float]]], widths: Sequence[int], height: int
) -> list[Seat | None]:
    """The seat of each label, None where there is no room at one of the widths."""
    dots: dict[int, list[Box]] = {}
    taken: dict[int, list[Box]] = {}
    for width in widths:
        spots = [(one.x * width / EDGE, one.y * height / EDGE, one.text) for one in labels if not one.is_line]
        boxes = [((x - DOT_PX, y - DOT_PX, x + DOT_PX, y + DOT_PX), text) for x, y, text in spots]
        dots[width] = [box for box, text in boxes if text]
        taken[width] = [box for box, _ in boxes] + [box for line in lines for box in _along(line, width, height)]
    everyone = range(len(labels))
    orders = [list(everyone)]
    for sign in (1, -1):
        orders.append(sorted(everyone, key=[sign * label.x for label in labels].__getitem__))
        orders.append(sorted(everyone, key=[sign * label.y for label in labels].__getitem__))
    wishes = (*BESIDE, *AWAY), (*AWAY, *BESIDE)
    tried = [_taken_in_turn(labels, order, wish, dots, taken, height) for wish in wishes for order in orders]
    return max(tried, key=lambda found: sum(seat is not None for seat in found))


def _taken_in_turn(
    labels: Sequence[Label],
    order: Sequence[int],
    wish: Sequence[Seat],
    dots: Mapping[int, Sequence[Box]],
    obstacles: Mapping[int, Sequence[Box]],
    height: int,
) -> list[Seat | None]:
    """The seats when each label takes the first that is free at all widths; strokes cross no text and no named dot."""
    found: list[Seat | None] = [None] * len(labels)
    uncrossed = {width: list(boxes) for width, boxes in dots.items()}
    taken = {width: list(boxes) for width, boxes in obstacles.items()}
    for index in order:
        label = labels[index]
        for seat in (ON_LINE if label.is_line else wish) if label.text else ():
            boxes = {width: _box(label, seat, width, height) for width in dots}
            strokes = {width: list(_stroke(label, seat, width, height)) for width in dots}
            if all(
                _is_inside(boxes[width], width, height)
                and _is_free(boxes[width], taken[width])
                and all(_is_free(stroke, uncrossed[width]) for stroke in strokes[width])
                for width in dots
            ):
                for width, (left, top, right, bottom) in boxes.items():
                    spaced = left - SPACE_PX, top, right + SPACE_PX, bottom
                    uncrossed[width].append(spaced)
                    taken[width] += [spaced, *strokes[width]]
                found[index] = seat
                break
    return found


def _box(label: Label, seat: Seat, width: int, height: int) -> Box:
    """The text's box at this seat."""
    across = len(label.text) * CHAR_PX
    x, y = label.x * width / EDGE, label.y * height / EDGE
    if label.is_line:
        left = 4.0 if seat.side.endswith("w") else width - 4 - across
        top = y + (-LINE_PX - 3 if "n" in seat.side.split()[1] else 3)
    elif seat.rise:
        left = x if "right" in seat.side else x - across
        top = y - seat.rise - LINE_PX if "up" in seat.side else y + seat.rise
    else:
        dx, up, along, dy = SIDES[seat.side]
        left, top = x + dx + along * across, y + up * LINE_PX + dy
    return left, top, left + across, top + LINE_PX


def _stroke(label: Label, seat: Seat, width: int, height: int) -> Iterator[Box]:
    """The box of the stroke from the point to a label that is further away."""
    if seat.rise:
        x, y = label.x * width / EDGE, label.y * height / EDGE
        near, far = (-DOT_PX - 1, -seat.rise) if "up" in seat.side else (DOT_PX + 1, seat.rise)
        yield x - STROKE_PX, y + min(near, far), x + STROKE_PX, y + max(near, far)


def _is_inside(box: Box, width: int, height: int) -> bool:
    left, top, right, bottom = box
    return left >= 0 and right <= width and top >= -4 and bottom <= height


def _is_free(box: Box, taken: Sequence[Box]) -> bool:
    left, top, right, bottom = box
    return all(left >= b[2] or right <= b[0] or top >= b[3] or bottom <= b[1] for b in taken)


def _along(line: Sequence[tuple[float, float]], width: int, height: int) -> Iterator[Box]:
    """Small boxes on a curve, so that no label lies on it."""
    for (x1, y1), (x2, y2) in pairwise(line):
        x1, x2, y1, y2 = x1 * width / EDGE, x2 * width / EDGE, y1 * height / EDGE, y2 * height / EDGE
        count = max(1, int(max(abs(x2 - x1), abs(y2 - y1)) / 6))
        for i in range(count + 1):
            x, y = x1 + (x2 - x1) * i / count, y1 + (y2 - y1) * i / count
            yield x - 2, y - 2, x + 2, y + 2
