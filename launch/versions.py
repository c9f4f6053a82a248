"""The oldest versions that burnish works with, some of them for what newer ones no longer let a file do.

They are written once, in pyproject.toml, and read from the installed package. Imports no library that it looks at.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from ..harness.errors import ConfigError

REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*(?:>=\s*([0-9.]+))?")


def floors() -> dict[str, str]:
    """Distribution -> oldest version ("" for any) of all that burnish requires, without extras."""
    lines = [line for line in requires("burnish") or [] if "extra ==" not in line]
    lines = [line for line in lines if "sys_platform" not in line or sys.platform in line]
    found = [match for line in lines if (match := REQUIREMENT.match(line))]
    return {match[1]: match[2] or "" for match in sorted(found, key=lambda match: match[1])}


def is_older(have: str, floor: str) -> bool:
    """Whether a version comes before another, by the numbers at its beginning: 2.9.1+cpu before 2.11."""
    return _numbers(have) < _numbers(floor)


def check_versions() -> None:
    """Raises ConfigError if something that burnish needs is missing or too old."""
    wrong = []
    for name, floor in floors().items():
        try:
            have = version(name)
        except PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        if floor and is_older(have, floor):
            wrong.append(f"{name} {have} is older than {floor}")
    if wrong:
        raise ConfigError(f"{'; '.join(wrong)}: install burnish anew, `burnish doctor` shows what it then finds")


def _numbers(text: str) -> list[int]:
    """The release part without trailing zeros."""
    found = re.match(r"[0-9]+(\.[0-9]+)*", text)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers
