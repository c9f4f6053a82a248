"""Fault injection: `faultpoint(name)` marks a place where a test may break the program. Inert in normal runs.

A test arms a point in its own process, or those of other processes by the environment (`arm_from_environment`):

    BURNISH_FAULTS='[{"rank": 1, "step": 7, "point": "step", "action": "kill", "once": "/path/to/marker"}]'

`step` counts from 1: the point "step" is reached before that step, the points "save.*" in a save after it; without it
every step is meant. `once` is a file that the fault makes, and where it is there already nothing happens. "sleep" takes
`seconds`; "nan" makes the losses of this rank's next step NaN, "jump" JUMP times as large; "full" raises
what a full disk does.
"""

import errno
import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "BURNISH_FAULTS"
SIGNALS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "stop": signal.SIGSTOP,
    "segv": signal.SIGSEGV,
    "abrt": signal.SIGABRT,
}
EXIT_CODE = 70
JUMP = 1000.0

_armed: dict[str, Callable[[], None]] = {}
_position = {"step": 0}
_factors: dict[int, float] = {}


def arm(name: str, action: Callable[[], None]) -> None:
    """Makes `faultpoint(name)` call `action` from now on: kill the process, raise, sleep."""
    _armed[name] = action


def disarm() -> None:
    """Makes every fault point inert again."""
    _armed.clear()
    _factors.clear()


def faultpoint(name: str, *, step: int | None = None) -> None:
    """Does nothing unless a test armed this name. `step` is the step (from 1) that is about to be taken."""
    if step is not None:
        _position["step"] = step
    action = _armed.get(name)
    if action is not None:
        action()


def loss_factor() -> float:
    """What a fault multiplies the losses of the step at hand with; 1 without one."""
    return _factors.get(_position["step"], 1.0)


def arm_from_environment(rank: int) -> None:
    """Arms what BURNISH_FAULTS has for this rank; nothing without the variable. Called once by a worker."""
    text = os.environ.get(VARIABLE)
    if not text:
        return
    by_point: dict[str, list[dict[str, Any]]] = {}
    for fault in json.loads(text):
        if fault.get("rank", rank) == rank:
            by_point.setdefault(fault["point"], []).append(fault)
    for point, faults in by_point.items():
        arm(point, lambda faults=faults: _strike(faults))  # type: ignore[misc]


def _strike(faults: list[dict[str, Any]]) -> None:
    for fault in faults:
        if fault.get("step", _position["step"]) == _position["step"] and _is_first(fault.get("once")):
            _act(fault)


def _is_first(marker: str | None) -> bool:
    """Makes the marker, whose modification time is that of the fault; False if it is there already."""
    if marker is None:
        return True
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _act(fault: dict[str, Any]) -> None:
    action = fault["action"]
    if action == "sleep":
        time.sleep(fault["seconds"])
    elif action in ("nan", "jump"):
        _factors[_position["step"]] = math.nan if action == "nan" else JUMP
    elif action == "raise":
        raise RuntimeError(f"injected at {fault['point']}")
    elif action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif action == "exit":
        os._exit(EXIT_CODE)
    else:
        os.kill(os.getpid(), SIGNALS[action])
