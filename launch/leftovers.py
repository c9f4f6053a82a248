"""What a run may leave on this machine when it is killed, processes and temporary folders, and the end of it.

Whatever a driver starts inherits a mark in its environment, by which it is found whoever has adopted it. A caretaker,
a process of a few megabytes in a session of its own, outlives the supervisor and ends what is left of the run. Reads
/proc; without it nothing is found.
"""

import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

from .processes import Process, find

MARK = "BURNISH_RUN"
POLL_S = 0.1
QUIET_ROUNDS = 3
"""A process that is being started shows its mark a moment later."""
OWNER = "owner.json"
PREFIX = "burnish-"
MAX_TEMP_CHARS = 24
"""Ray makes Unix sockets below its folder, and their paths end at 107 characters."""


def marked(mark: str) -> list[int]:
    """Processes with this mark in their environment, but not this one."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0") and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


def end_marked(mark: str) -> int:
    """Kills what carries the mark until nothing does; how many it were."""
    killed, quiet = set(), 0
    while quiet < QUIET_ROUNDS:
        found = marked(mark)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed.update(found)
        quiet = 0 if found else quiet + 1
        time.sleep(POLL_S)
    return len(killed)


def start_caretaker(mark: str) -> None:
    """Leaves a process that waits for this one's end, however it comes, and then ends what carries the mark."""
    alive, held_by_parent = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() != 0:
            os._exit(0)
        _be_caretaker(mark, alive)
    os.wait()
    os.close(alive)
    _pipes.append(held_by_parent)


_pipes: list[int] = []
"""Their other ends see that this process has ended, so no forked child may have them."""


def _let_go() -> None:
    while _pipes:
        os.close(_pipes.pop())


os.register_at_fork(after_in_child=_let_go)


def _be_caretaker(mark: str, alive: int) -> None:
    # Whoever waits for the end of the command's output must not wait for this process.
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    for descriptor in [int(name) for name in os.listdir("/proc/self/fd")]:
        if descriptor > 2 and descriptor != alive:
            with contextlib.suppress(OSError):
                os.close(descriptor)
    os.chdir("/")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(BaseException):
        os.read(alive, 1)
        end_marked(mark)
        remove_dead_folders()
    os._exit(0)


def private_folder() -> Path:
    """A folder for this process that only its user can enter; one that a killed process has left is removed."""
    remove_dead_folders()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_parent()))
    owner = find(os.getpid())
    if owner is not None:
        record = {"pid": owner.pid, "start_ticks": owner.start_ticks, "namespace": _namespace()}
        (folder / OWNER).write_text(json.dumps(record), encoding="ascii")
    return folder


def remove_dead_folders() -> None:
    """Removes the private folders of this user's processes on this machine that have ended."""
    for path in Path(_parent()).glob(f"{PREFIX}*/{OWNER}"):
        try:
            record = json.loads(path.read_bytes())
            is_mine = path.lstat().st_uid == os.geteuid() and record["namespace"] == _namespace()
            is_dead = is_mine and not Process(record["pid"], record["start_ticks"]).is_alive()
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if is_dead:
            shutil.rmtree(path.parent, ignore_errors=True)


def _parent() -> str:
    return tempfile.gettempdir() if len(tempfile.gettempdir()) <= MAX_TEMP_CHARS else "/tmp"


def _namespace() -> str:
    """Where process ids mean the same: containers may share a folder, but not these."""
    return os.readlink("/proc/self/ns/pid")
