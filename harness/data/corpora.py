"""Corpora made from what is installed: documented functions of the standard library, scikit-learn's digits."""

import ast
import csv
import gzip
import hashlib
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..paths import resolve_path

INSTRUCTION = "Write the docstring of this Python function."
MAX_LINES = 40
MIN_CHARACTERS, MAX_CHARACTERS = 15, 300
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "_bundled", "pydoc_data", "__pycache__"}
Function = ast.FunctionDef | ast.AsyncFunctionDef
DIGITS = "package:sklearn/datasets/data/digits.csv.gz"
DIGITS_EDGE = 8


@lru_cache(maxsize=1)
def stdlib_files() -> tuple[tuple[Path, str], ...]:
    """(file, dotted module) of the running Python's standard library in order, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED.isdisjoint(parts) and all(part.isidentifier() for part in parts):
            found.append((path, ".".join(parts).removesuffix(".__init__")))
    return tuple(found)


@lru_cache(maxsize=1)
def stdlib_docstrings() -> tuple[tuple[dict[str, str], str, int], ...]:
    """(row, file, line) per documented function of the standard library, read with ast, in a fixed order.

    A row is {prompt: instruction and source without its docstring, completion: first paragraph of the docstring,
    text: the same paragraph, name, module: dotted, package: top-level module}. Functions of more than MAX_LINES lines,
    without a body, or with a very short or long paragraph are left out, and so are repeated sources.
    Raises DataError where Python came without its source files.
    """
    rows, seen = [], set()
    for path, module in stdlib_files():
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError):
            continue
        for function in _functions(tree):
            row = _row(function, source.splitlines(), module)
            if row and row["prompt"] not in seen:
                seen.add(row["prompt"])
                rows.append((row, f"stdlib:{module}", function.lineno))
    if not rows:
        raise DataError("stdlib:docstrings: the source files of this Python's standard library are not installed")
    return tuple(rows)


def _functions(node: ast.AST) -> Iterator[Function]:
    """Functions and methods in the order of the file."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield child
        yield from _functions(child)


def _row(function: Function, lines: list[str], module: str) -> dict[str, str] | None:
    docstring = ast.get_docstring(function)
    if not docstring or len(function.body) < 2:
        return None
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    expression = function.body[0]
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    assert expression.end_lineno is not None, (module, function.name)
    code = lines[first - 1 : expression.lineno - 1] + lines[expression.end_lineno : function.end_lineno]
    is_apart = expression.lineno > function.lineno and function.body[1].lineno > expression.end_lineno
    if not is_apart or len(code) > MAX_LINES or not MIN_CHARACTERS <= len(paragraph) <= MAX_CHARACTERS:
        return None
    source = textwrap.dedent("\n".join(line.rstrip() for line in code)).strip("\n")
    return {
        "prompt": f"{INSTRUCTION}\n\n{source}",
        "completion": paragraph,
        "text": paragraph,
        "name": function.name,
        "module": module,
        "package": module.split(".")[0],
    }


def stdlib_fingerprint() -> str:
    """Changes with the Python version and with the files of the standard library."""
    digest = hashlib.sha256(sys.version.encode())
    for path, module in stdlib_files():
        digest.update(f"{module} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


def digits_file() -> str:
    """Raises ConfigError where scikit-learn is not installed."""
    return resolve_path(DIGITS)


def sklearn_digits() -> Iterator[tuple[dict[str, Any], str, int]]:
    """(row, file, line) of the 1,797 handwritten digits: {image: 8 rows of 8 values 0..255, label: 0..9}."""
    with gzip.open(digits_file(), "rt", newline="") as file:
        for number, record in enumerate(csv.reader(file), 1):
            *ink, label = (int(float(value)) for value in record)
            pixels = [round(value * 255 / 16) for value in ink]
            image = [pixels[start : start + DIGITS_EDGE] for start in range(0, len(pixels), DIGITS_EDGE)]
            yield {"image": image, "label": label}, "sklearn:digits", number
