"""The processes that this one started, seeing to it that they end, and how many the kernel killed for want of memory.

Reads /proc and cgroups; without them there are none.
"""

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from .resources import cgroups

POLL_S = 0.05


@dataclass(frozen=True)
class Process:
    """One process; its start time (clock ticks since boot) tells it from a later one with the same number."""

    pid: int
    start_ticks: int

    def is_alive(self) -> bool:
        found = _status(self.pid)
        return found is not None and found[1] == self.start_ticks and found[2] != "Z"


def find(pid: int) -> Process | None:
    """The process of that number, if there is one."""
    found = _status(pid)
    return Process(pid, found[1]) if found is not None else None


def descendants(pid: int) -> list[Process]:
    """Children of `pid`, their children, and so on."""
    parents: dict[int, list[Process]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        found = _status(int(entry.name))
        if found is not None:
            parents.setdefault(found[0], []).append(Process(int(entry.name), found[1]))
    result: list[Process] = []
    todo = [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        result += children
        todo += [child.pid for child in children]
    return result


def end(processes: list[Process], *, grace_s: float) -> list[Process]:
    """Waits until they have ended by themselves, kills what is left after `grace_s`, and returns what was killed."""
    deadline = time.monotonic() + grace_s
    while (alive := [process for process in processes if process.is_alive()]) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for process in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    return alive


def oom_kills(root: Path = Path("/")) -> int:
    """Processes killed for want of memory so far, as this process's cgroup counts them; the whole system's without one.

    The container's limit is often that of a cgroup above; a kernel of version 1 counts at the victim's own alone.
    """
    for folder in cgroups(root, "memory"):
        for name in ("memory.events", "memory.oom_control"):
            found = _count(folder / name, "oom_kill")
            if found is not None:
                return found
    return _count(root / "proc/vmstat", "oom_kill") or 0


def _count(file: Path, name: str) -> int | None:
    """The number after a name in a file of `name number` lines; None if it is not there."""
    try:
        lines = file.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith(f"{name} ")]
    return int(found[0][1]) if found else None


def _status(pid: int) -> tuple[int, int, str] | None:
    """Parent, start time and state of a process; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]), int(fields[19]), fields[0]
