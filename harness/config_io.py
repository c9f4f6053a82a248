"""YAML files and `section.key=value` overrides -> Config, and back. Every mistake becomes one line of a ConfigError."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from stat import S_ISREG
from typing import Any

from pydantic import ValidationError

from .config import Config
from .config_errors import dotted, explain, shown, suggestion
from .errors import ConfigError
from .redact import redact, secrets_in
from .strict_yaml import MAX_CHARS, Path, YamlError, dump_yaml, parse_yaml

CHOICES: dict[Path, str] = {
    (name,): str(info.discriminator) for name, info in Config.model_fields.items() if info.discriminator
}
"""Sections that are a choice -> the key that chooses; another choice replaces the section."""
NO_SECRETS = (
    "this holds a secret, which would be written into the run directory; remove it, and leave keys and passwords to "
    "the environment or to the files that their libraries read (hf auth login, ~/.netrc, ~/.aws)"
)
TAGS: dict[Path, str] = CHOICES | {("model", "init"): "model_type"}


@dataclass
class _Layers:
    """What was merged so far, where each key came from, and the mistakes found on the way."""

    raw: dict[str, Any] = field(default_factory=dict)
    places: dict[Path, str] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)

    def place(self, path: Path) -> str:
        """`file:line: ` of the key, or of the nearest section around it; empty if nothing of it was given."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return ""


def load_config(paths: Sequence[str], overrides: Sequence[str] = ()) -> Config:
    """Defaults < files from left to right < overrides. Relative paths inside are relative to the current directory.

    Sections are merged key by key; lists, and a choice (`task.type`, `adapter.method` …) that changes, are replaced.
    Raises ConfigError with one line per mistake.
    """
    layers = _Layers()
    unreadable = []
    for path in paths:
        try:
            _add_file(layers, path)
        except ConfigError as error:
            unreadable.append(str(error))
    if unreadable:
        raise ConfigError("\n".join(unreadable))
    for override in sorted(overrides, key=lambda text: not _chooses(text)):
        try:
            _add_override(layers, override)
        except ValueError as error:
            layers.mistakes.append(f"command line: {error}")
    for keys in dict.fromkeys(secrets_in(layers.raw)):
        layers.mistakes.append(f"{layers.place(keys)}{dotted(keys)}: {NO_SECRETS}")
    raw = {key: value for key, value in layers.raw.items() if value is not None or key not in Config.model_fields}
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        layers.mistakes += explain(error, raw, config_schema(), layers.place)
    if layers.mistakes:
        raise ConfigError(redact("\n".join(dict.fromkeys(layers.mistakes))))
    return config


def config_to_yaml(config: Config) -> str:
    """Every value, defaults included, in the order of the schema; load_config of it gives an equal Config."""
    return dump_yaml(config.model_dump(mode="json"))


def config_schema() -> dict[str, Any]:
    """The JSON schema of a config file, with descriptions, for editors."""
    return Config.model_json_schema()


def _read(path: str) -> str:
    file = FilePath(path)
    try:
        info = file.stat()
        content = file.read_bytes() if S_ISREG(info.st_mode) and info.st_size <= MAX_CHARS else None
    except FileNotFoundError:
        close = suggestion(file.name, sorted(other.name for other in file.parent.glob("*.y*ml")))
        hint = f"; did you mean {file.parent / close}?" if close else ""
        raise ConfigError(f"{shown(path)}: no such file{hint}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{shown(path)} cannot be read: {reason}") from None
    if content is None:
        what = f"larger than {MAX_CHARS // 10**6} MB" if S_ISREG(info.st_mode) else "not a file"
        raise ConfigError(f"{shown(path)} is {what}; give a YAML file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown(path)} is not UTF-8 text (byte {error.start}); give a YAML file") from None


def _add_file(layers: _Layers, path: str) -> None:
    """Raises ConfigError if the file holds no mapping; keys that appear twice are only noted."""
    name = path if path.isprintable() else shown(path)
    try:
        document = parse_yaml(_read(path))
    except YamlError as error:
        raise ConfigError(f"{name}:{error.line}: {error}" if error.line else f"{name}: {error}") from None
    if not isinstance(document.value, dict | None):
        raise ConfigError(f"{name}: {shown(document.value)} is no config; write sections such as `model:`")
    layers.mistakes += [
        f"{name}:{line}: {dotted(key)}: already given in line {document.lines[key]}; keep one"
        for key, line in document.repeated.items()
    ]
    layers.raw = _merge(layers.raw, _normalised(document.value or {}), ())
    layers.places |= {key: f"{name}:{line}: " for key, line in document.lines.items() if key}


def _normalised(raw: dict[str, Any]) -> dict[str, Any]:
    """A single source, or a bare path, becomes a list of mappings, so that data.train.0.path always exists."""
    data = raw.get("data")
    if not isinstance(data, dict):
        return raw
    listed = {}
    for split in data.keys() & {"train", "validation", "test"}:
        sources = [data[split]] if isinstance(data[split], str | dict) else data[split]
        is_list = isinstance(sources, list)
        listed[split] = [{"path": one} if isinstance(one, str) else one for one in sources] if is_list else sources
    return raw | {"data": data | listed}


def _merge(old: Any, new: Any, path: Path) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    tag = TAGS.get(path)
    if tag and tag in new and new[tag] != old.get(tag, _default_choice(path)):
        return new
    return old | {key: _merge(old[key], new[key], (*path, key)) if key in old else new[key] for key in new}


def _default_choice(path: Path) -> Any:
    default = Config.model_fields[str(path[0])].default
    return getattr(default, TAGS[path], None) if path in CHOICES else None


def _chooses(override: str) -> bool:
    """Whether it picks a choice: these come first, so that the options of the new choice survive in any order."""
    *section, key = override.partition("=")[0].strip().split(".")
    return TAGS.get(tuple(section)) == key


def _add_override(layers: _Layers, override: str) -> None:
    """Raises ValueError with a sentence."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    path = tuple(int(key) if re.fullmatch(r"0|[1-9][0-9]{0,5}", key) else key for key in keys)
    if not equals or not all(keys):
        raise ValueError(f"{shown(override)} is no override; write section.key=value, for example train.max_steps=10")
    try:
        value = parse_yaml(text).value
    except YamlError as error:
        raise ValueError(f"{dotted(path)}: {shown(text)} is not valid YAML; put text in quotes ({error})") from None
    layers.raw = _normalised(_set(layers.raw, path, value, ()))
    layers.places = {key: place for key, place in layers.places.items() if key[: len(path)] != path}
    for length in range(1, len(path)):
        layers.places.setdefault(path[:length], "command line: ")
    layers.places[path] = "command line: "


def _set(node: Any, keys: Path, value: Any, path: Path) -> Any:
    """A copy of `node` with `value` merged in at `keys`."""
    if not keys:
        return _merge(node, value, path)
    key, rest = keys[0], keys[1:]
    here = (*path, key)
    if isinstance(node, list):
        if not (isinstance(key, int) and key < len(node)):
            how = f"name an entry by its number, 0 to {len(node) - 1}" if node else "give the whole list"
            raise ValueError(f"{dotted(here)}: {dotted(path)} is a list of {len(node)}; {how}")
        return [*node[:key], _set(node[key], rest, value, here), *node[key + 1 :]]
    if not isinstance(node, dict | None):
        raise ValueError(f"{dotted(here)}: {dotted(path)} is {shown(node)}, not a section with keys")
    node = node or {}
    return _merge(node, {str(key): _set(node.get(str(key)), rest, value, here)}, path)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with these values under dotted keys, checked anew. Raises ConfigError."""
    fields = config.model_dump(mode="json")
    for key, value in values.items():
        *sections, last = key.split(".")
        place = fields
        for section in sections:
            place = place[section]
        place[last] = value
    try:
        return Config.model_validate(fields)
    except ValueError as error:
        raise ConfigError(str(error)) from None
