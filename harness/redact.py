"""Secrets out of text: what looks like one, and the values of environment variables whose names say that they are.

Applied to everything that leaves a run as text: events, errors, tracebacks. A config that holds a secret is refused.
Imports no torch.
"""

import json
import os
import re
from collections.abc import Iterator
from typing import Any

REMOVED = "[removed]"
NAMES = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIALS?)(_|$)", re.IGNORECASE
)
HARMLESS = re.compile(r"_(PATH|FILE|DIR|MODE|URL)$", re.IGNORECASE)
"""Ends of names of variables that say where a secret is."""
MIN_CHARS = 8
"""Shorter values are words of configuration."""
CERTAIN = (
    re.compile(r"\b(hf|hf_api|api_org)_[A-Za-z0-9]{16,}"),
    re.compile(r"\bsk-[A-Za-z0-9_-]{16,}"),
    re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,})"),
    re.compile(r"(?<=\bBearer )[^\s\"'\\,;]{8,}", re.IGNORECASE),
    re.compile(r"(?<=://)[^/\s\"'\\@:]*:[^/\s\"'\\@]+(?=@)"),
    re.compile(
        r"(?<=[?&;])[\w.-]{0,40}(token|key|password|secret|signature|sig|credential)=[^&\s\"'\\;#]{4,}",
        re.IGNORECASE,
    ),
)
"""Hub, OpenAI, GitHub, AWS and Slack keys, HTTP headers, passwords and keys in URLs."""
LIKELY = (re.compile(r"(?<![0-9A-Za-z/])[0-9a-f]{40}(?![0-9A-Za-z/])"),)
"""40 hexadecimal digits: keys of Weights & Biases, but commits too, so a config may hold them."""


def redact(text: str) -> str:
    """The text with REMOVED in place of secrets. JSON stays JSON."""
    for value in _values():
        text = text.replace(value, REMOVED)
    for pattern in (*CERTAIN, *LIKELY):
        text = pattern.sub(REMOVED, text)
    return text


def holds_secret(text: str) -> bool:
    """Whether there is a secret in a value of a config."""
    return any(pattern.search(text) for pattern in CERTAIN) or any(value in text for value in _values())


def secrets_in(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where in a tree of values (a config) secrets are, keys included."""
    if isinstance(value, str):
        if holds_secret(value):
            yield path
    elif isinstance(value, dict):
        for key, inner in value.items():
            if holds_secret(str(key)):
                yield path
            yield from secrets_in(inner, (*path, str(key)))
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from secrets_in(inner, (*path, number))


def _values() -> list[str]:
    """Values of the environment's secrets, longest first, also as they look inside JSON."""
    found = set()
    for name, value in os.environ.items():
        if len(value) >= MIN_CHARS and NAMES.search(name) and not HARMLESS.search(name) and not os.path.exists(value):
            found |= {value, json.dumps(value)[1:-1]}
    return sorted(found, key=len, reverse=True)
