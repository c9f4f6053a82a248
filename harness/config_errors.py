"""What pydantic found wrong -> one sentence a mistake: where, which key, which value, what is allowed, what to do.

The JSON schema says what is allowed at a key, so a sentence is the same however many union members complained.
"""

import json
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from .strict_yaml import Path, resolve_scalar

Schema = dict[str, Any]
TYPES = {"string": "text", "boolean": "true or false", "object": "a mapping", "array": "a list", "null": "null"}


def explain(error: ValidationError, raw: Any, schema: Schema, place: Callable[[Path], str]) -> list[str]:
    """One line per key that is wrong. `raw` is what was validated; `place` names the file and line of a key."""
    by_path: dict[Path, list[Any]] = {}
    for item in error.errors(include_url=False, include_context=True):
        path = _path(item["loc"], raw, schema, is_missing=_is_missing(item))
        by_path.setdefault(path, []).append(item)
    lines = []
    for path, items in by_path.items():
        if any(len(other) > len(path) > 0 and other[: len(path)] == path for other in by_path):
            continue  # another member of the union got further
        if not path and items[0]["type"] == "value_error":
            for sentence in str(items[0]["ctx"]["error"]).splitlines():
                key = tuple(int(part) if part.isdecimal() else part for part in sentence.split(":")[0].split("."))
                lines.append(place(key) + sentence)
        else:
            tag = items[0].get("ctx", {}).get("discriminator", "").strip("'")
            lines.append(place((*path, tag) if tag else path) + _sentence(path, items, raw, schema))
    return lines


def _is_missing(item: Any) -> bool:
    """A key of a section is missing; a list that is too short is a wrong list."""
    return item["type"] == "missing" and isinstance(item["loc"][-1], str)


def _sentence(path: Path, items: list[Any], raw: Any, schema: Schema) -> str:
    kinds, key = {item["type"] for item in items}, dotted(path)
    if _is_missing(items[0]):
        return f"{key}: missing; give {allowed(_schema_at(path, raw, schema), schema)}"
    if "extra_forbidden" in kinds:
        return f"{key}: unknown key{_unknown_key(path, raw, schema)}"
    value, here = _value_at(path, raw), _schema_at(path, raw, schema)
    if kinds & {"union_tag_not_found", "union_tag_invalid"}:
        return _tag(path, value, here, schema)
    if kinds == {"value_error"}:
        reason = str(items[0]["ctx"]["error"])
        return f"{key}: {reason}" if isinstance(value, dict) else f"{key}: {shown(value)} is not allowed; {reason}"
    if (
        isinstance(value, str)
        and (union := _discriminated(here, schema))
        and value in union["discriminator"]["mapping"]
    ):
        return (
            f"{key}: {shown(value)} is not allowed; write {key}: {{{union['discriminator']['propertyName']}: {value}}}"
        )
    sentence = f"{key or 'the file'}: {shown(value)} is not allowed; give {allowed(here, schema)}"
    choices = [str(choice) for branch in _branches(here, schema) for choice in _choices(branch)]
    if isinstance(value, str) and (close := suggestion(value, choices)):
        return f"{sentence}; did you mean {close}?"
    return sentence + _type_hint(value, allowed(here, schema))


def _type_hint(value: Any, wanted: str) -> str:
    """What to write instead, where the value is right but for its YAML type."""
    if value is None:
        return " or leave the key out"
    if isinstance(value, str):
        word = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(value.lower())
        if word and TYPES["boolean"] in wanted:
            return f"; write {word}"
        is_text = isinstance(resolve_scalar(value), str | None)
        return "" if is_text else f"; remove the quotes around {value[:60]}"
    if isinstance(value, float) and value.is_integer() and "whole number" in wanted and abs(value) < 1e15:
        return f"; write {int(value)}"
    is_scalar = not isinstance(value, list | dict)
    return "; put it in quotes" if is_scalar and wanted.startswith("text") else ""


def _tag(path: Path, value: Any, here: Schema, schema: Schema) -> str:
    union = _discriminated(here, schema)
    assert union, path
    tag, tags = union["discriminator"]["propertyName"], list(union["discriminator"]["mapping"])
    key = dotted((*path, tag))
    if tag not in value:
        return f"{key}: missing; give one of {', '.join(tags)}"
    close = suggestion(str(value[tag]), tags)
    hint = f"; did you mean {close}?" if close else ""
    return f"{key}: {shown(value[tag])} is not allowed; give one of {', '.join(tags)}{hint}"


def _unknown_key(path: Path, raw: Any, schema: Schema) -> str:
    """What follows `unknown key`: a sibling spelled alike, another choice or section that has it, or what is valid."""
    name, parent = str(path[-1]), path[:-1]
    here = _schema_at(parent, raw, schema)
    known = list(_properties(here, _value_at(parent, raw), schema))
    if close := suggestion(name, known):
        return f"; did you mean {close}?"
    if union := _discriminated(here, schema):
        tag, mapping = union["discriminator"]["propertyName"], union["discriminator"]["mapping"]
        owners = [choice for choice, ref in mapping.items() if name in _resolve({"$ref": ref}, schema)["properties"]]
        current = _value_at(parent, raw).get(tag, here.get("default", {}).get(tag))
        if owners:
            return f" for {tag} {current}; it belongs to {dotted((*parent, tag))} {' or '.join(owners)}"
    elsewhere = [found for found in _all_keys(schema) if found.rpartition(".")[2] == name]
    if elsewhere:
        return f" here; did you mean {' or '.join(elsewhere[:3])}?"
    return f"; valid here: {', '.join(known)}" if known else f"; remove it, {dotted(parent)} takes no keys"


def _all_keys(schema: Schema) -> list[str]:
    keys = []
    for section, here in schema["properties"].items():
        keys.append(section)
        for branch in _branches(here, schema):
            keys += [f"{section}.{key}" for key in branch.get("properties", {})]
    return list(dict.fromkeys(keys))


def suggestion(word: str, choices: list[str]) -> str:
    """The choice spelled most like the word, or an empty string."""
    folded = {choice.lower().replace("-", "_"): choice for choice in choices}
    close = get_close_matches(word[:100].lower().replace("-", "_"), list(folded), n=1, cutoff=0.6)
    return folded[close[0]] if close else ""


def shown(value: Any) -> str:
    """A value on one line, at most 60 characters, spelled as YAML would."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    text = repr(value) if isinstance(value, str | float) else json.dumps(value)
    return text if len(text) <= 60 else text[:40] + "…" + text[-1]


def dotted(path: Path) -> str:
    """`adapter.rank`; a part that would not print on one line is quoted and cut."""
    return ".".join(str(part) if len(str(part)) <= 60 and str(part).isprintable() else shown(part) for part in path)


def _path(loc: tuple[str | int, ...], raw: Any, schema: Schema, *, is_missing: bool) -> Path:
    """Drops from a pydantic location what is no key of the data: tags and members of unions."""
    path: Path = ()
    rest = list(loc)
    while rest:
        part = rest.pop(0)
        value = _value_at(path, raw)
        if (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        ):
            path = (*path, part)
            if rest and _discriminated(_schema_at(path, raw, schema), schema):
                rest.pop(0)
        elif is_missing and not rest:
            path = (*path, part)
    return path


def _value_at(path: Path, raw: Any) -> Any:
    for part in path:
        raw = raw[part]
    return raw


def _schema_at(path: Path, raw: Any, schema: Schema) -> Schema:
    """The schema of the key at `path`, following the tags found in `raw`; empty where the schema allows anything."""
    here = schema
    for part in path:
        if isinstance(part, int):
            lists = [branch for branch in _branches(here, schema) if branch.get("type") == "array"]
            branch = lists[0] if lists else {}
            here = branch["prefixItems"][part] if "prefixItems" in branch else branch.get("items", {})
        else:
            here = _properties(here, raw, schema).get(part, _extra(here, schema))
        raw = raw[part] if isinstance(part, int) or (isinstance(raw, dict) and part in raw) else None
    return here


def _properties(here: Schema, raw: Any, schema: Schema) -> Mapping[str, Schema]:
    union = _discriminated(here, schema)
    if union and isinstance(raw, dict):
        tag = union["discriminator"]["propertyName"]
        choice = raw.get(tag, (here.get("default") or {}).get(tag))
        ref = union["discriminator"]["mapping"].get(choice) if isinstance(choice, str) else None
        return _resolve({"$ref": ref}, schema)["properties"] if ref else {}
    for branch in _branches(here, schema):
        if "properties" in branch:
            return branch["properties"]
    return {}


def _extra(here: Schema, schema: Schema) -> Schema:
    for branch in _branches(here, schema):
        extra = branch.get("additionalProperties") or next(iter(branch.get("patternProperties", {}).values()), None)
        if isinstance(extra, dict):
            return extra
    return {}


def _resolve(here: Schema, schema: Schema) -> Schema:
    while "$ref" in here:
        here = schema["$defs"][here["$ref"].rpartition("/")[2]]
    return here


def _discriminated(here: Schema, schema: Schema) -> Schema | None:
    return next((node for node in (here, _resolve(here, schema)) if "discriminator" in node), None)


def _branches(here: Schema, schema: Schema) -> list[Schema]:
    here = _resolve(here, schema)
    members = here.get("anyOf") or here.get("oneOf")
    return [leaf for member in members for leaf in _branches(member, schema)] if members else [here]


def _choices(branch: Schema) -> list[Any]:
    return [branch["const"]] if "const" in branch else branch.get("enum", [])


def allowed(here: Schema, schema: Schema) -> str:
    """What a schema node accepts, in words: `auto or a whole number from 1 to 1024`."""
    if union := _discriminated(here, schema):
        return (
            f"a section with {union['discriminator']['propertyName']}: {' | '.join(union['discriminator']['mapping'])}"
        )
    words = [_words(branch, schema) for branch in _branches(here, schema) if branch.get("type") != "null"]
    last = f"a list of {' or '.join(words[:-1])}"
    return " or ".join(dict.fromkeys("a list of these" if word == last else word for word in words))


def _words(branch: Schema, schema: Schema) -> str:
    if choices := _choices(branch):
        return ("one of " if len(choices) > 1 else "") + ", ".join(map(str, choices))
    kind = branch.get("type")
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _bounds(branch)
    if kind == "object" and "properties" in branch:
        required = branch.get("required", [])
        return f"a section with {', '.join(required or [*list(branch['properties'])[:3], '…'])}"
    if kind == "array" and "prefixItems" in branch:
        return f"a list of {len(branch['prefixItems'])}: {_words(_resolve(branch['prefixItems'][0], schema), schema)}"
    if kind == "array":
        least = branch.get("minItems", 0)
        return f"a list of {f'at least {least}: ' if least else ''}{allowed(branch.get('items', {}), schema)}"
    if kind == "string" and "examples" in branch:
        return f"text such as {branch['examples'][0]}"
    if kind == "string" and branch.get("maxLength"):
        least = f"{branch['minLength']} to " if "minLength" in branch else "up to "
        return f"text of {least}{_round(branch['maxLength'])} characters"
    return TYPES.get(str(kind), "another value")


def _round(number: float) -> str:
    """A large power of ten is easier to read as one."""
    is_power = number >= 10**6 and str(int(number)).rstrip("0") == "1"
    return f"10^{len(str(int(number))) - 1}" if is_power else f"{number:.16g}"


def _bounds(branch: Schema) -> str:
    low, high = branch.get("minimum"), branch.get("maximum")
    above, below = branch.get("exclusiveMinimum"), branch.get("exclusiveMaximum")
    if branch["type"] == "integer":
        low = above + 1 if above is not None else low
        high = below - 1 if below is not None else high
        above = below = None
    words = [f"from {low:g}"] if low is not None else [f"above {above:g}"] if above is not None else []
    words += [f"to {_round(high)}"] if high is not None else [f"to below {below:g}"] if below is not None else []
    return " " + " ".join(words).replace("above 0 to", "above 0, up to") if words else ""
