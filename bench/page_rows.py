"""How the page reads rows, writes their numbers and colours their names. No number is trusted to be there."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from .benchmark import NOT_MEASURED, Row

GIB = 2**30
HUES = (
    *(("burnish", "copper"), ("compile", "violet"), ("torch", "violet"), ("frozen", "grey"), ("reference", "grey")),
    *(("sft", "green"), ("hf-", "green"), ("trainer", "green"), ("bitsandbytes", "green"), ("bnb", "green")),
    *(("peft", "blue"), ("unsloth", "ochre"), ("liger", "ochre"), ("lorafusion", "ochre"), ("mlora", "ochre")),
)
"""Part of a name -> its colour everywhere on the page; the first that matches."""
PLAIN_NAMES = (
    "burnish",
    "peft",
    "sft",
    "compiled",
    "reference",
    "liger",
    "unsloth",
    "lorafusion-scheme",
    "bitsandbytes",
)
"""Names in the full colour of their family; its other members are pale."""


def colour_of(name: str) -> str:
    hue = next((hue for part, hue in HUES if part in name.lower()), "grey")
    return hue if name.lower() in PLAIN_NAMES or hue == "grey" else f"{hue} pale"


def value_at(value: Any, *path: str) -> float | None:
    """The number at the path of keys; None where there is none or it is not finite."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def samples_at(value: Any, *path: str) -> list[float]:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return [one for item in value or [] if (one := value_at({"": item}, "")) is not None]


def span_of(quartiles: Any) -> tuple[float, float] | None:
    q1, q3 = value_at(quartiles, "q1"), value_at(quartiles, "q3")
    return None if q1 is None or q3 is None else (q1, q3)


def times(value: float | None) -> str:
    """3.66×, 0.0512×."""
    return "–" if value is None else f"{value:.2f}×" if 0.1 <= value < 100 else f"{value:.3g}×"


def times_span(span: tuple[float, float] | None) -> str:
    return f"{times(span[0])[:-1]}–{times(span[1])[:-1]}" if span else ""


def tick(value: float) -> str:
    """¼×, 1×, 16×."""
    return f"{ {0.5: '½', 0.25: '¼', 0.125: '⅛'}.get(value, f'{value:g}') }×"


def metric(value: float) -> str:
    """With the prefixes of units: 1.2 T, 340 G."""
    for factor, prefix in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.3g}"


def tokens(value: float) -> str:
    """512, 1k (1024), 16k."""
    return f"{value / 1024:g}k" if value >= 1024 and value % 512 == 0 else f"{value:,.0f}"


def seconds(value: float) -> str:
    """1.23 s, 45.6 ms, 7.89 µs."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def spelled(stated: Any) -> str:
    """Stated speeds in words: the name, then what the keys say."""
    if not isinstance(stated, dict):
        return str(stated or "stated speeds")
    units: dict[str, Callable[[float], str]] = {
        "_bytes_per_s": lambda value: f"{metric(value)}B/s",
        "_flops_per_s": lambda value: f"{metric(value)}FLOP/s",
        "_bytes": lambda value: f"{metric(value)}B",
        "_s": seconds,
    }
    found = [str(stated["name"])] if stated.get("name") else []
    for key in stated:
        value = value_at(stated, key)
        unit = next((unit for unit in units if key.endswith(unit)), "")
        if value is not None:
            found.append(f"{key.removesuffix(unit).replace('_', ' ')} {units.get(unit, metric)(value)}")
    return ", ".join(found)


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of the keys, in their order; rows that were not measured have none and are left out."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.get("state") != NOT_MEASURED and all(key in row for key in keys):
            found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def why(row: Row) -> str:
    return ": ".join(filter(None, (str(row.get("state")), row.get("reason"))))


def is_ok(row: Row) -> bool:
    return row.get("state") == "ok"


def label_of(row: Row) -> str:
    return str(row.get("label") or row.get("key") or row.get("op"))
