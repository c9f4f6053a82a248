"""The corpora made from what is installed."""

import ast
import textwrap

from burnish.harness.config import Source
from burnish.harness.data.corpora import (
    INSTRUCTION,
    MAX_CHARACTERS,
    MAX_LINES,
    MIN_CHARACTERS,
    stdlib_docstrings,
    stdlib_fingerprint,
)
from burnish.harness.data.sources import FORMAT, read_source


def read(path, task_type, **fields):
    return list(read_source(Source(path=path, **fields), cwd=".", task_type=task_type, max_row_bytes=10**6))


def test_the_standard_library_gives_thousands_of_documented_functions():
    rows = [row for row, _, _ in stdlib_docstrings()]
    assert len(rows) >= 3000
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert len({row["module"] for row in rows}) > 200
    for row in rows:
        assert MIN_CHARACTERS <= len(row["completion"]) <= MAX_CHARACTERS
        assert row["completion"] == " ".join(row["completion"].split()) == row["text"]
        assert row["module"].split(".")[0] == row["package"]
        assert row["prompt"].startswith(INSTRUCTION + "\n\n")
        assert len(row["prompt"].splitlines()) <= MAX_LINES + 2


def test_the_code_parses_and_holds_no_docstring():
    broken = 0
    for row, _, _ in stdlib_docstrings()[::10]:
        code = row["prompt"].removeprefix(INSTRUCTION).strip("\n")
        try:
            function = ast.parse(textwrap.dedent(code)).body[0]
        except SyntaxError:
            broken += 1
            continue
        assert function.name == row["name"]
        assert ast.get_docstring(function) is None or ast.get_docstring(function) != row["completion"]
    assert broken <= 5


def test_the_corpus_is_the_same_every_time():
    first, fingerprint = stdlib_docstrings(), stdlib_fingerprint()
    stdlib_docstrings.cache_clear()
    assert stdlib_docstrings() == first
    assert stdlib_fingerprint() == fingerprint


def test_the_corpora_serve_their_tasks():
    (first, *_) = read("stdlib:docstrings", "causal_lm", limit=3)
    assert first.values[FORMAT] == "prompt_completion"
    options = {"columns": {"label": "package"}, "where": {"package": ["email", "asyncio"]}}
    rows = [
        item.values
        for item in read("stdlib:docstrings", "sequence_classification", **options)
        if hasattr(item, "values")
    ]
    assert {row["label"] for row in rows} == {"email", "asyncio"}
    assert {row[FORMAT] for row in rows} == {"classification"}


def test_the_digits_are_8_by_8_images_of_ten_classes():
    rows = [item.values for item in read("sklearn:digits", "image_classification")]
    assert len(rows) == 1797
    assert {row["label"] for row in rows} == set(range(10))
    assert {(len(row["image"]), *{len(line) for line in row["image"]}) for row in rows} == {(8, 8)}
    values = {value for row in rows for line in row["image"] for value in line}
    assert (min(values), max(values)) == (0, 255)
    halves = read("sklearn:digits", "image_classification", where={"label": [0, 1, 2, 3, 4]})
    assert {item.values["label"] for item in halves if hasattr(item, "values")} == {0, 1, 2, 3, 4}
