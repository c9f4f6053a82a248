"""Rows and rejections, and the checks that every row passes before it becomes an example."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from ..tasks import RowError

MAX_DEPTH = 64
MAX_INT_DIGITS = 400
GARBAGE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd\ufffe\uffff]")
MAX_GARBAGE = 0.05
"""Share of control and replacement characters above which a text counts as garbled."""


@dataclass(frozen=True)
class Row:
    """One row with its place: `line` is the line of a text file or the number of the row, from 1."""

    values: dict[str, Any]
    file: str
    line: int

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used, and why. `line` as in Row."""

    kind: str
    file: str
    line: int
    detail: str = ""

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Malformed:
    """Stands in parsed JSON for a value that JSON does not have; `check_row` rejects the row that holds it."""

    kind: str
    detail: str


def _constant(name: str) -> Malformed:
    return Malformed("bad_json", f"{name} is not JSON")


def _integer(digits: str) -> Any:
    if len(digits) > MAX_INT_DIGITS:
        return Malformed("bad_json", f"a number of {len(digits)} digits")
    return int(digits)


def _real(digits: str) -> Any:
    value = float(digits)
    return value if math.isfinite(value) else Malformed("bad_json", f"{digits[:40]} is out of range")


def _object(pairs: list[tuple[str, Any]]) -> Any:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    names = [name for name, _ in pairs]
    return Malformed("duplicate_key", f"key {next(name for name in names if names.count(name) > 1)!r:.80} occurs twice")


DECODER = json.JSONDecoder(parse_constant=_constant, parse_int=_integer, parse_float=_real, object_pairs_hook=_object)


def parse_json(text: str) -> Any:
    """Strict JSON; NaN, huge numbers and repeated keys become Malformed. Raises RowError."""
    try:
        return DECODER.decode(text)
    except RecursionError:
        raise RowError("too_deep", "nested too deeply") from None
    except ValueError as error:
        raise RowError("bad_json", str(error)[:200]) from None


def check_text(value: str) -> None:
    """Raises RowError for lone surrogates and for texts with many control or replacement characters."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError("lone_surrogate", f"half a surrogate pair at character {error.start}") from None
    if GARBAGE.search(value):
        found = len(GARBAGE.findall(value))
        if found > MAX_GARBAGE * len(value):
            raise RowError("garbled", f"{found} of {len(value)} characters are control or replacement characters")


def check_row(values: Any, *, max_bytes: int) -> None:
    """Raises RowError unless it is an object of clean texts, not nested too deeply and not too large."""
    if isinstance(values, Malformed):
        raise RowError(values.kind, values.detail)
    if not isinstance(values, dict):
        raise RowError("not_an_object", f"a row is {type(values).__name__}, not an object")
    size, stack = 0, [(values, 0)]
    while stack:
        value, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise RowError("too_deep", f"nested more than {MAX_DEPTH} levels")
        if isinstance(value, str):
            size += len(value)
            if size <= max_bytes:
                check_text(value)
        elif isinstance(value, bytes):
            size += len(value)
        elif isinstance(value, dict):
            stack += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, (list, tuple)):
            stack += [(part, depth + 1) for part in value]
        elif isinstance(value, Malformed):
            raise RowError(value.kind, value.detail)
    if size > max_bytes:
        raise RowError("too_large", f"{size} bytes, data.max_row_bytes is {max_bytes}")
