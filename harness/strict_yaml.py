"""YAML as people mean it: 1.2 core schema (`no` is text, 1e-4 a number, 010 is ten), every key once, all bounded.

The only importer of yaml. Values are built from parser events, so nothing in a file can construct a Python object.
"""

import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_CHARS = 1_000_000
MAX_DEPTH = 32
MAX_VALUES = 100_000
MAX_DIGITS = 100
CONSTANTS: dict[str, bool | float | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
CONSTANTS |= dict.fromkeys(("true", "True", "TRUE"), True) | dict.fromkeys(("false", "False", "FALSE"), False)
CONSTANTS |= {sign + word: float(sign + "inf") for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")}
CONSTANTS |= dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan"))
INTEGERS = ((r"[-+]?[0-9]+", 10), (r"0o[0-7]+", 8), (r"0x[0-9a-fA-F]+", 16))
FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
STRING_TAGS = ("!", "tag:yaml.org,2002:str")

Path = tuple[str | int, ...]


class YamlError(ValueError):
    """The text cannot be read as YAML; `line` counts from 1, or is 0 where the parser does not say."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.line = line


@dataclass
class Document:
    """A parsed text: its value, the line of each key and list item, and of keys that appear again (the first wins)."""

    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    repeated: dict[Path, int] = field(default_factory=dict)


def parse_yaml(text: str) -> Document:
    """One document -> values. Raises YamlError for bad syntax, tags, merge keys, or anything beyond the limits."""
    if len(text) > MAX_CHARS:
        raise YamlError(f"larger than {MAX_CHARS // 10**6} MB")
    if bad := re.search("[\ud800-\udfff]", text):
        raise YamlError(f"{bad[0]!r} is no character", text.count("\n", 0, bad.start()) + 1)
    events = _events(text)
    try:
        return _Builder(events).document()
    finally:
        events.close()


def _events(text: str) -> Generator[Any, None, None]:
    """libyaml's events where PyYAML was built with it: the pure parser needs ten seconds for 1 MB."""
    try:
        yield from yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join(part for part in (error.context, error.problem) if part)
        raise YamlError(f"not valid YAML: {reason}", mark.line + 1 if mark else 0) from None
    except (yaml.YAMLError, ValueError) as error:
        raise YamlError(f"not valid YAML: {str(error).splitlines()[0]}") from None


class _Builder:
    def __init__(self, events: Iterator[Any]) -> None:
        self.events = events
        self.anchors: dict[str, Any] = {}
        self.num_values = 0
        self.result = Document()

    def document(self) -> Document:
        num_documents = 0
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                num_documents += 1
                if num_documents > 1:
                    raise YamlError("more than one document; keep one and remove the line `---`", _line(event))
                self.result.value = self._value(next(self.events), ())
        return self.result

    def _value(self, event: Any, path: Path) -> Any:
        self._count(len(path), _line(event))
        self.result.lines.setdefault(path, _line(event))
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise YamlError(
                    f"*{event.anchor} stands for nothing yet: no &{event.anchor} ends before it", _line(event)
                )
            return self._copy(self.anchors[event.anchor], len(path), _line(event))
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
        elif event.tag not in (None, "!"):
            raise YamlError(f"tags such as {event.tag[:60]!r} are not allowed", _line(event))
        else:
            value = self._mapping(path) if isinstance(event, yaml.MappingStartEvent) else self._sequence(path)
        if event.anchor:
            self.anchors[event.anchor] = value
        return value

    def _mapping(self, path: Path) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise YamlError("a key must be plain text", _line(event))
            key = event.value
            if key == "<<" and event.implicit[0]:
                raise YamlError("merge keys (<<) are not supported; give several files instead", _line(event))
            if key in mapping:
                self.result.repeated[*path, key] = _line(event)
                self._value(next(self.events), (*path, key))
                continue
            self.result.lines[*path, key] = _line(event)
            mapping[key] = self._value(next(self.events), (*path, key))
        return mapping

    def _sequence(self, path: Path) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            values.append(self._value(event, (*path, len(values))))
        return values

    def _scalar(self, event: Any) -> Any:
        if event.tag in STRING_TAGS and not (event.tag == "!" and event.implicit[0]):
            return event.value
        if event.tag is not None and event.tag != "!":
            raise YamlError(f"tags such as {event.tag[:60]!r} are not allowed", _line(event))
        return resolve_scalar(event.value) if event.implicit[0] else event.value

    def _copy(self, value: Any, depth: int, line: int) -> Any:
        self._count(depth, line)
        if isinstance(value, dict):
            return {key: self._copy(child, depth + 1, line) for key, child in value.items()}
        if isinstance(value, list):
            return [self._copy(child, depth + 1, line) for child in value]
        return value

    def _count(self, depth: int, line: int) -> None:
        self.num_values += 1
        if depth > MAX_DEPTH:
            raise YamlError(f"nested deeper than {MAX_DEPTH} levels", line)
        if self.num_values > MAX_VALUES:
            raise YamlError(f"more than {MAX_VALUES} values", line)


def _line(event: Any) -> int:
    return event.start_mark.line + 1


def resolve_scalar(text: str) -> bool | int | float | str | None:
    """An unquoted scalar -> its value by the YAML 1.2 core schema; numbers of more than 100 digits stay text."""
    if text in CONSTANTS:
        return CONSTANTS[text]
    if len(text) > MAX_DIGITS:
        return text
    for pattern, base in INTEGERS:
        if re.fullmatch(pattern, text):
            return int(text.removeprefix("0o").removeprefix("0x"), base)
    return float(text) if re.fullmatch(FLOAT, text) else text


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML version would take for something other than text."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(resolve_scalar(text), str) else "'"
    if "\n" in text and text.replace("\n", "").isprintable():
        style = "|"  # PyYAML falls back on escapes where a block would not be read back
    elif not text.isprintable():  # line breaks, in any of YAML's other senses, survive only as escapes
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump_yaml(value: Any) -> str:
    """Text that parse_yaml reads back exactly; keys stay in order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9)
