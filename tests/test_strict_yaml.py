"""Strict YAML: 1.2 core values, what is refused, bounds, and exact round trips."""

import json

import pytest
from burnish.harness.strict_yaml import YamlError, dump_yaml, parse_yaml
from hypothesis import given, settings
from yaml_cases import trees


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1e4", 1e4),
        ("-.5E+3", -500.0),
        ("no", "no"),
        ("on", "on"),
        ("y", "y"),
        ("true", True),
        ("false", False),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("12:30:00", "12:30:00"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("1.2.3", "1.2.3"),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("!!str 1", "1"),
        ("9" * 5000, "9" * 5000),
        ("[&a {b: 1}, *a]", [{"b": 1}, {"b": 1}]),
        ("{1: a, null: b}", {"1": "a", "null": "b"}),
    ],
)
def test_yaml_values_are_what_they_look_like(text, value):
    parsed = parse_yaml(text).value
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 5000, "nested deeper"),
        ("- " * 5000, "nested deeper"),
        ("{a: " * 40, "nested deeper"),
        ("[" + "1," * 100_001 + "]", "more than 100000 values"),
        ("a" * 1_000_001, "larger than 1 MB"),
        ("a: &a [*a]", "stands for nothing"),
        ("a: *b", "stands for nothing"),
        ("a: !!python/object:os.system x", "tags such as"),
        ("a: !x {b: 1}", "tags such as"),
        ("a: 1\n---\nb: 2", "more than one document"),
        ("<<: {a: 1}", "merge keys"),
        ("? [a]\n: 1", "a key must be"),
        ("a: [1", "not valid YAML"),
        ("a: '\0'", "control characters"),
        ("a: \ud800", "no character"),
    ],
)
def test_yaml_beyond_the_rules_is_refused(text, reason):
    with pytest.raises(YamlError, match=reason):
        parse_yaml(text)


def test_an_alias_bomb_is_cheap():
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    with pytest.raises(YamlError, match="more than 100000 values"):
        parse_yaml("a0: &a0 [x]\n" + "\n".join(levels))


@settings(max_examples=200, deadline=None)
@given(trees)
def test_what_is_dumped_reads_back_exactly(tree):
    assert json.dumps(parse_yaml(dump_yaml(tree)).value) == json.dumps(tree)


def test_the_first_of_two_equal_keys_counts_and_the_second_is_named():
    document = parse_yaml("a: 1\nb: {c: 1, c: 2}\na: 3\n")
    assert document.value == {"a": 1, "b": {"c": 1}}
    assert document.repeated == {("b", "c"): 2, ("a",): 3}


def test_lines_are_known_for_every_key():
    lines = parse_yaml("a:\n  - x\n  - b: 1\nc: 2\n").lines
    assert (lines["a",], lines["a", 1], lines["a", 1, "b"], lines["c",]) == (1, 3, 3, 4)
