"""The value types the schema is made of: bounded numbers, sizes, text, regular expressions."""

import json
import re
import warnings
from collections import Counter
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
SIZE = r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([A-Za-z]*)\s*"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def parse_bytes(value: Any) -> Any:
    """`24GiB` -> 25769803776; numbers pass through. Raises ValueError on an unknown unit."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(SIZE, value)
    if not match or match[2].upper() not in UNITS:
        raise ValueError("give a size such as 24GiB, 512MiB or a number of bytes")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _run_name(name: str) -> str:
    if not re.fullmatch(NAME_PATTERN, name):
        raise ValueError("give up to 100 letters, digits, dots, dashes and underscores, a letter or digit first")
    return name


def _one_line(text: str) -> str:
    if not text.strip() or CONTROL.search(text):
        raise ValueError("give text on one line without control characters")
    return text


def _no_nul(text: str) -> str:
    if re.search("[\0\ud800-\udfff]", text):
        raise ValueError("remove the characters that are no text (NUL, surrogates)")
    return text


def _regular_expression(pattern: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"it is no regular expression: {error}") from None
    return pattern


def _unique(values: list[str]) -> list[str]:
    value, count = Counter(values).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{value[:60]!r} appears {count} times; name it once")
    return values


def as_list(value: Any) -> Any:
    """A single source stands for a list of one."""
    return [value] if isinstance(value, (str, dict)) else value


def _plain_fields(fields: dict[str, Any]) -> dict[str, Any]:
    model_type = fields.get("model_type")
    if not (isinstance(model_type, str) and re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", model_type)):
        raise ValueError("it needs a model_type that transformers knows, for example {model_type: resnet}")
    refused = [key for key in fields if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,99}", key) or key == "auto_map"]
    if refused:
        raise ValueError(f"{refused[0][:60]!r} is no field of a transformers config; remove it")
    try:
        json.dumps(fields, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("its values must be text, finite numbers, true, false, null, lists or mappings") from None
    return fields


Size = Annotated[int, Field(gt=0, le=10**18)]
SizeText = Annotated[str, Field(examples=["24GiB", "512MiB"])]
Bytes = Annotated[Size, BeforeValidator(parse_bytes, json_schema_input_type=Size | SizeText)]
Positive = Annotated[int, Field(gt=0, le=10**12)]
NotNegative = Annotated[int, Field(ge=0, le=10**12)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Rank = Annotated[int, Field(gt=0, le=1024)]
Rate = Annotated[float, Field(gt=0, le=1e6)]
RunName = Annotated[str, AfterValidator(_run_name)]
Line = Annotated[str, Field(max_length=4096), AfterValidator(_one_line)]
Text = Annotated[str, Field(max_length=200_000), AfterValidator(_no_nul)]
Pattern = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_regular_expression)]
Label = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_no_nul)]
Labels = Annotated[list[Label], Field(min_length=2, max_length=100_000), AfterValidator(_unique)]
Betas = Annotated[tuple[Probability, Probability], Field(strict=False)]
ModelFields = Annotated[dict[str, Any], AfterValidator(_plain_fields)]


class Section(BaseModel):
    """A YAML section: immutable, no unknown keys, no NaN or infinity, no conversion but int -> float."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
