"""Who may write a run: one command at a time (the lock), and of its attempts the latest (the fence). Imports no torch.

The lock is flock on a hidden file beside the run directory, so it outlives a directory that is moved aside, and the
kernel frees it with its holder's death. Across hosts it holds where the file system passes flock on (NFS with Linux
clients, Lustre with -o flock); where it does not, the fence still keeps two attempts from writing in turns.

The fence is a number in the run directory: a driver takes one, and each group of workers that it starts. Whoever has
not the newest may be a zombie on a host that was cut off, and commits nothing any more.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import ConfigError, SupersededError
from .run_dir import FENCE, read_json, write_json

PATIENCE_S = 1.0
"""How long a start waits for a holder that is about to end, or has not said yet who it is."""
POLL_S = 0.05


@contextlib.contextmanager
def hold(run_path: str | Path) -> Iterator[None]:
    """Holds the lock of one run. Raises ConfigError, naming the holder, if another process has it.

    Children that are forked meanwhile, and programs that are started, do not hold it.
    """
    path = lock_file(run_path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"the run directory {run_path} cannot be locked: {error.strerror} ({path})") from None
    _held.add(file)
    try:
        _take(file, run_path)
        yield
    finally:
        if file in _held:
            _held.discard(file)
            os.close(file)


def lock_file(run_path: str | Path) -> Path:
    path = Path(run_path)
    return path.with_name(f".{path.name}.lock")


def holder(run_path: str | Path) -> dict[str, Any]:
    """Host, pid, start (seconds since 1970) and command of who holds the lock, or was the last to hold it."""
    found = read_json(lock_file(run_path), {})
    return found if isinstance(found, dict) else {}


def fence(run_dir: str | Path, *, driver: int = 0) -> int:
    """Takes the next number for a driver; with `driver`, for workers that the driver of that number has started.

    Numbers grow, also from a directory to one that takes its place: they are milliseconds since 1970, or one more
    than the last. Raises SupersededError if a later driver than `driver` has the run.
    """
    before = _fence(run_dir)
    if driver and before["driver"] > driver:
        raise SupersededError
    number = max(before["number"] + 1, time.time_ns() // 1_000_000)
    write_json(Path(run_dir) / FENCE, {"number": number, "driver": driver or number})
    return number


def driver_of(run_dir: str | Path) -> int:
    """The number of the latest driver; 0 where none has taken one."""
    return _fence(run_dir)["driver"]


def is_current(run_dir: str | Path, number: int) -> bool:
    """Whether nobody has taken a number since; False too if the run directory is gone."""
    return _fence(run_dir)["number"] == number


def _fence(run_dir: str | Path) -> dict[str, int]:
    found = read_json(Path(run_dir) / FENCE, {})
    found = found if isinstance(found, dict) else {}
    return {key: value if isinstance(value := found.get(key), int) else 0 for key in ("number", "driver")}


_held: set[int] = set()
"""Files whose lock this process has; a copy of one in a forked child would keep the lock after its parent's end."""


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


def _take(file: int, run_path: str | Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            found = holder(run_path)
            if time.monotonic() > deadline or (found and not _is_over(found)):
                raise ConfigError(_refusal(run_path, found)) from None
            time.sleep(POLL_S)
    record = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start": round(time.time(), 3),
        "command": _command(sys.argv),
    }
    os.truncate(file, 0)
    os.pwrite(file, json.dumps(record).encode("ascii"), 0)
    os.fsync(file)


def _is_over(found: dict[str, Any]) -> bool:
    """Whether the file still names a process of this host that has ended: the holder has not written its name yet."""
    return found.get("host") == socket.gethostname() and not Path(f"/proc/{found.get('pid')}").exists()


def _refusal(run_path: str | Path, found: dict[str, Any]) -> str:
    since = found.get("start")
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since)) if isinstance(since, int | float) else "?"
    who = (
        f"process {found.get('pid', '?')} on {found.get('host', '?')} (`{found.get('command', '?')}`, since {started})"
    )
    return (
        f"the run {run_path} is in use by {who}; wait for its end or stop it, or give this one another name with name=…"
    )


def _command(arguments: list[str]) -> str:
    """The command without the values of overrides: they may be secrets."""
    shown = [word.partition("=")[0] + "=…" if "=" in word else word for word in arguments[1:]]
    return " ".join([Path(arguments[0]).name or "python", *shown])
