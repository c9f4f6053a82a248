"""HTML and SVG text in which everything is escaped unless it is Markup already: safe by construction."""

import html
import math
from typing import Any

# A control character would be invisible or refused; Unicode has a picture of each.
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def text(value: Any) -> Markup:
    """The value as escaped text; Markup passes through, None is nothing."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return Markup("")
    return Markup(html.escape(str(value).translate(CONTROL_PICTURES)))


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """One element. `class_` is class, aria_label is aria-label; an attribute that is None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Any) -> Markup:
    return Markup("".join(text(child) for child in children))


def number(value: Any) -> str:
    """A number for people: 4 significant digits, 12.3k, 4.56M, 1.5e-4; a dash for None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return str(value)
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= factor:
            return f"{value / (1e3 if unit == 'k' else factor):.4g}{unit}"
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):.3g}e{int(exponent)}"
    return f"{value:.4g}"


def size(num_bytes: float | None) -> str:
    """1.50 GiB, 12.0 MiB; a dash for None."""
    if num_bytes is None:
        return "–"
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if (value := num_bytes / factor) >= 1:
            return f"{value:.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float | None) -> str:
    """2 h 05 min, 3 min 12 s, 4.2 s; a dash for None."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
