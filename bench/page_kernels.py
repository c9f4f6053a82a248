"""What the page draws of the operations: the roofline, the share of the peak, and burnish against every contender."""

from collections.abc import Sequence
from dataclasses import replace

from ..harness.markup import Markup, join, number, tag
from .benchmark import NOT_MEASURED, Result, Row
from .page_rows import colour_of, is_ok, label_of, metric, seconds, span_of, tick, times, times_span, value_at, why
from .plots import Axis, Bar, Curve, Group, Spot, Width, around_one, bars, linear, listed, logarithmic, points

MAX_GROUPS = 4
"""Cases of one operation drawn at once; the others unfold."""
MAX_SHARES = 30
"""Cases in view; of more, the first of the catalogue, so that what is in view does not depend on the results."""


def kernels(result: Result) -> Markup:
    """The roofline, the share of the machine's peak, what adapters add to frozen products, and the contenders."""
    rows = [row for row in result["rows"] if row.get("state") != NOT_MEASURED and "op" in row]
    against = contenders(rows)
    lead = (
        "The time of each contender over burnish's in the same round: right of 1×, burnish is faster."
        " An asterisk: our own implementation of the published scheme."
    )
    heading = join(tag("h3", "burnish against each contender"), tag("p", lead, class_="soft")) if against else None
    alone = tag("div", against, class_="charts towers") if against else None
    return join(listed(roofline(result, rows), shares(rows), over_frozen(rows)), heading, alone, absent(rows))


def achieved(row: Row, contender: str) -> tuple[float, float] | None:
    """(arithmetic intensity, FLOP/s) of an operation whose record knows its operations and its bytes."""
    flops, num_bytes = value_at(row, "num_flops"), value_at(row, "num_bytes")
    time_s = value_at(row.get("contenders"), contender, "time_s", "median")
    return (flops / num_bytes, flops / time_s) if flops and num_bytes and time_s and is_ok(row) else None


def roofline(result: Result, rows: Sequence[Row]) -> Markup:
    """Only operations with both counts have a place; `shares` has them all."""
    spots, shafts, named = [], [], set()
    for row in sorted(rows, key=lambda row: -(achieved(row, "burnish") or (0.0, 0.0))[1]):
        if (ours := achieved(row, "burnish")) is None:
            continue
        told = f"{label_of(row)}: {number(ours[0])} FLOP per byte, {metric(ours[1])}FLOP/s"
        if share := value_at(row, "share_of_peak"):
            told += f", {share:.0%} of the peak"
        op = str(row["op"])
        spots.append(Spot(*ours, "copper", op if op not in named else "", told))
        named.add(op)
        if (plain := achieved(row, "reference")) is not None:
            shafts.append(Curve(f"{label_of(row)} in plain PyTorch", [plain, ours], "grey", "line"))
            told = f"{label_of(row)} in plain PyTorch: {metric(plain[1])}FLOP/s"
            spots.append(Spot(*plain, "grey", "", told, is_open=True))
    if not spots:
        return Markup("")
    peaks = {
        dtype: (top, rate)
        for dtype in sorted({str(row.get("dtype")) for row in rows})
        if (top := value_at(result.get("peaks"), dtype, "flops_per_s"))
        and (rate := value_at(result.get("peaks"), dtype, "bytes_per_s"))
    }
    ridges = [top / rate for top, rate in peaks.values()]
    x = logarithmic("arithmetic intensity, FLOP per byte", [*(spot.x for spot in spots), *ridges], number)
    x = replace(x, low=x.low / 1.6, high=x.high * 2)
    lowest = min(spot.y for spot in spots)
    y = logarithmic("FLOP/s", [lowest, *(spot.y for spot in spots), *(top for top, _ in peaks.values())], metric)
    y = replace(y, high=y.high * 5)
    roofs = [roof(dtype, *peak, x, y, is_first=i == 0) for i, (dtype, peak) in enumerate(peaks.items())]
    lead = (
        "No operation can lie above the roof: what this machine was measured to move (slope) and to compute (flat)."
        " Each point is one operation, forward and backward; a ring is the same in plain PyTorch."
    )
    keys = [
        ("burnish", "copper"),
        ("plain PyTorch", "grey"),
        *((one.name, "ink" if one.style == "roof" else "ink dashed") for one in roofs),
    ]
    return points("Roofline", x, y, curves=[*roofs, *shafts], spots=spots, keys=keys, lead=lead, kind="roofline")


def roof(dtype: str, top: float, rate: float, x: Axis, y: Axis, *, is_first: bool) -> Curve:
    """The most that the machine can do at each intensity, within the axes."""
    ridge, start = top / rate, max(x.low, y.low / rate)
    line = [(start, start * rate), (ridge, top), (x.high, top)]
    name = f"roof in {short(dtype)}: {metric(rate)}B/s, {metric(top)}FLOP/s"
    return Curve(name, line, "ink", "roof" if is_first else "dashed", label=f"{metric(top)}FLOP/s {short(dtype)}")


def short(dtype: str) -> str:
    """bf16, fp32."""
    return dtype.replace("bfloat", "bf").replace("float", "fp")


def shares(rows: Sequence[Row]) -> Markup:
    """The share of the machine's peak: the least time for the bytes and operations that the record counts, by ours."""
    found = []
    for row in rows:
        share = value_at(row, "share_of_peak")
        if is_ok(row) and share is not None:
            floor, ours = value_at(row, "floor_s"), value_at(row.get("contenders"), "burnish", "time_s", "median")
            note = f"{seconds(floor)} of {seconds(ours)}" if floor is not None and ours is not None else ""
            found.append(Bar(label_of(row), 100 * share, f"{share:.0%}", note=note))
    if len(found) <= MAX_SHARES:
        found.sort(key=lambda bar: -(bar.value or 0.0))
    axis = linear("share of what the machine was measured to reach, %", [100.0, *(b.value or 0 for b in found)], number)
    lead = (
        "The least time that the bytes and operations of each need on this machine, over the time that burnish takes."
    )
    return folded(
        "Share of the machine's peak", [("", found[:MAX_SHARES]), ("", found[MAX_SHARES:])], axis, 1, lead=lead
    )


def over_frozen(rows: Sequence[Row]) -> Markup:
    """What adapters add to the frozen products, for operations that have some."""
    groups: list[Group] = []
    for row in rows:
        found: list[Bar] = []
        parts = row.get("over_frozen") if is_ok(row) else None
        for name, quartiles in (parts or {}).items():
            if (value := value_at(quartiles, "median")) is not None:
                span = span_of(quartiles)
                written = times_span(span)
                found.append(Bar(contender_of(row, name), value, times(value), colour_of(name), span, note=written))
        groups += [(label_of(row), found)] if found else []
    values = [x for _, found in groups for bar in found for x in (bar.value or 1.0, *(bar.span or ()))]
    axis = linear("time over that of the frozen products (1×: adapters for nothing)", values, tick, start=1.0)
    axis = replace(axis, ticks=sorted({1.0, *axis.ticks}))
    lead = "Training through frozen weights needs these products in any case; beyond 1× is the price of the adapters."
    return folded("Over the frozen products", groups, axis, MAX_GROUPS, origin=1.0, lead=lead)


def contenders(rows: Sequence[Row]) -> Markup:
    """One figure for each operation, all on one axis."""
    groups: dict[str, list[Group]] = {}
    for row in rows:
        op = str(row["op"])
        groups.setdefault(op, []).append((label_of(row).removeprefix(op).strip(" ·"), ratio_bars(row)))
    every = [bar for cases in groups.values() for _, found in cases for bar in found]
    ratios = [x for bar in every for x in (bar.value, *(bar.span or ())) if x]
    axis = around_one("time over burnish's", ratios, tick)
    return join(*(folded(op, cases, axis, MAX_GROUPS, origin=1.0, width="half") for op, cases in groups.items()))


def folded(
    title: str,
    groups: Sequence[Group],
    axis: Axis,
    limit: int,
    *,
    origin: float = 0.0,
    lead: str = "",
    width: Width = "full",
) -> Markup:
    """Bars of which only the first groups are in view; the others unfold."""
    first = bars(title, groups[:limit], axis, origin=origin, lead=lead, width=width)
    more = bars(f"{title}, more", groups[limit:], axis, origin=origin, width=width)
    count = sum(len(rows) for _, rows in groups[limit:])
    return join(first, tag("details", tag("summary", f"{title}: {count} more"), more, class_=width) if more else None)


def ratio_bars(row: Row) -> list[Bar]:
    """burnish against each contender; a row that is not ok is one line without a bar."""
    if not is_ok(row):
        return [Bar("burnish", None, note=why(row))]
    found = []
    for name, contender in (row.get("contenders") or {}).items():
        value = value_at(row.get("ratio"), name, "median")
        if name == "burnish" or contender.get("state") == NOT_MEASURED or (value is None and is_ok(contender)):
            continue
        label = contender_of(row, name)
        if value is None or value <= 0:
            found.append(Bar(label, None, note=why(contender)))
            continue
        span = span_of(row["ratio"][name])
        found.append(Bar(label, value, times(value), colour_of(name), span, note=times_span(span)))
    return found


def contender_of(row: Row, name: str) -> str:
    contender = (row.get("contenders") or {}).get(name)
    label = str((contender.get("label") if isinstance(contender, dict) else None) or name)
    return label.replace(", own implementation", "*")


def absent(rows: Sequence[Row]) -> Markup:
    """The contenders that were not at hand, each with the reason, once."""
    reasons: dict[str, None] = {}
    for row in rows:
        for name, contender in (row.get("contenders") or {}).items():
            if contender.get("state") == NOT_MEASURED:
                reasons[f"{contender_of(row, name)} ({contender.get('reason')})"] = None
    written = f"Contenders that were not measured: {'; '.join(reasons)}."
    return tag("p", written, class_="missing") if reasons else Markup("")
