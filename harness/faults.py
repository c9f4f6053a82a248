"""Fault injection: `faultpoint(name)` marks a place where a test may break the program. Inert in normal runs."""

from collections.abc import Callable

_armed: dict[str, Callable[[], None]] = {}


def arm(name: str, action: Callable[[], None]) -> None:
    """Makes `faultpoint(name)` call `action` from now on: kill the process, raise, sleep."""
    _armed[name] = action


def disarm() -> None:
    """Makes every fault point inert again."""
    _armed.clear()


def faultpoint(name: str) -> None:
    """Does nothing unless a test armed this name."""
    action = _armed.get(name)
    if action is not None:
        action()
