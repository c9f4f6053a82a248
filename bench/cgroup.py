"""A command under a limit of memory, without swap, in a cgroup of its own (version 1 or 2). No torch here.

All that the command and its children hold counts: their own memory, and the pages of files that they read first. The
kernel drops pages of files before it kills, so the limit is met by what cannot be dropped.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO

from ..harness.errors import ConfigError

ROOT = Path("/sys/fs/cgroup")
POLL_S = 0.1
END_S = 10.0
"""Longest wait for killed processes to be gone."""
TAIL_CHARS = 3000
JOIN = 'echo $$ > "$0" || exit 97; exec "$@"'
"""What /bin/sh does in the new process: it joins the cgroup ($0) and becomes the command."""
JOIN_FAILED = 97
_numbers = count()


@dataclass(frozen=True)
class Ended:
    """How a limited command ended. `exit_code` is negative for a signal; `output` holds the last of what it printed.

    `peak_bytes` is the most that counted at any time, with pages of files; `peak_own_bytes` without them, sampled.
    """

    exit_code: int
    num_killed: int
    """Processes that the kernel killed because of the limit."""
    is_out_of_time: bool
    peak_bytes: int
    peak_own_bytes: int
    time_s: float
    output: str


@dataclass(frozen=True)
class Files:
    """The names of a version's files: limits in the order in which they are to be written, members, what is counted."""

    limits: tuple[tuple[str, str], ...]
    """(name, value); `{limit}` stands for the bytes. Those after the first are left out where the kernel lacks them."""
    peak: str
    kills: str
    own: tuple[str, ...]
    """The lines of memory.stat whose bytes cannot be dropped: they belong to no file, or to one in memory."""


VERSION_1 = Files(
    limits=(
        ("memory.limit_in_bytes", "{limit}"),
        ("memory.memsw.limit_in_bytes", "{limit}"),
        ("memory.swappiness", "0"),
    ),
    peak="memory.max_usage_in_bytes",
    kills="memory.oom_control",
    own=("total_rss", "total_shmem"),
)
VERSION_2 = Files(
    limits=(("memory.max", "{limit}"), ("memory.swap.max", "0")),
    peak="memory.peak",
    kills="memory.events",
    own=("anon", "shmem"),
)


def run_limited(
    command: Sequence[str],
    *,
    limit_bytes: int,
    timeout_s: float,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> Ended:
    """Runs the command to its end, or kills all of it when the time is over. What it prints goes to `log`.

    Raises ConfigError where no cgroup with a limit can be made.
    """
    with cgroup(limit_bytes) as (folder, files), log.open("wb+") if log else tempfile.TemporaryFile() as out:
        start = time.monotonic()
        process = subprocess.Popen(
            ["/bin/sh", "-c", JOIN, str(folder / "cgroup.procs"), *command],
            cwd=cwd,
            env=None if env is None else dict(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        sampler = Sampler(folder, files)
        try:
            is_out_of_time = not _ended_in(process, timeout_s)
        finally:
            _kill_all(folder)
            exit_code = process.wait()
            sampler.close()
        if exit_code == JOIN_FAILED:
            raise ConfigError(f"a process may not join {folder}: {_tail(out)}")
        return Ended(
            exit_code=exit_code,
            num_killed=_counted(folder / files.kills, "oom_kill") or 0,
            is_out_of_time=is_out_of_time,
            peak_bytes=max(_number(folder / files.peak) or 0, sampler.peak_bytes),
            peak_own_bytes=sampler.peak_own_bytes,
            time_s=time.monotonic() - start,
            output=_tail(out),
        )


@contextlib.contextmanager
def cgroup(limit_bytes: int) -> Iterator[tuple[Path, Files]]:
    """A new cgroup below this process's own (or one above it) with the limit set, removed in the end."""
    folder, files = _made()
    try:
        for number, (name, value) in enumerate(files.limits):
            try:
                (folder / name).write_text(value.format(limit=limit_bytes), encoding="ascii")
            except OSError as error:
                if number == 0:
                    raise ConfigError(f"{folder / name} cannot be set to {limit_bytes}: {error.strerror}") from None
        yield folder, files
    finally:
        _kill_all(folder)
        _remove(folder)


def missing() -> str | None:
    """Why no cgroup with a limit of memory can be made here; None if one can."""
    try:
        with cgroup(2**30):
            return None
    except ConfigError as error:
        return str(error)


def _made() -> tuple[Path, Files]:
    """A new folder with the files of a memory controller. Raises ConfigError, with what stands in the way."""
    problems: list[str] = []
    for parent, files in _parents():
        folder = parent / f"burnish-{os.getpid()}-{next(_numbers)}"
        try:
            folder.mkdir()
        except OSError as error:
            problems.append(f"{parent}: {error.strerror}")
            continue
        if not (folder / files.limits[0][0]).exists() and files is VERSION_2:
            # The controller must be given to the children; a group that holds processes itself refuses that.
            with contextlib.suppress(OSError):
                (parent / "cgroup.subtree_control").write_text("+memory", encoding="ascii")
        if (folder / files.limits[0][0]).exists():
            return folder, files
        folder.rmdir()
        problems.append(f"{parent}: its memory controller is not given to groups below it")
    why = "; ".join(problems) or f"no memory controller below {ROOT}"
    raise ConfigError(
        f"no memory cgroup can be made here ({why}); run as root, in a container with its cgroups writable, or under "
        "`systemd-run --user --scope -p Delegate=yes`"
    )


def _parents() -> Iterator[tuple[Path, Files]]:
    """Where a group may be made: this process's own cgroup and those above it, of the version that has memory."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            mount, files = ROOT / "memory", VERSION_1
        elif not controllers and (ROOT / "cgroup.controllers").exists():
            mount, files = ROOT, VERSION_2
        else:
            continue
        own = mount / path.lstrip("/")
        folders = [own, *(parent for parent in own.parents if parent.is_relative_to(mount))]
        yield from ((folder, files) for folder in folders if folder.is_dir())


class Sampler:
    """Watches the bytes of a cgroup from a thread: no kernel keeps the peak of what belongs to no file."""

    def __init__(self, folder: Path, files: Files) -> None:
        self.folder, self.files = folder, files
        self.peak_bytes = self.peak_own_bytes = 0
        self.is_done = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="cgroup", daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.is_done.wait(POLL_S):
            own = sum(_counted(self.folder / "memory.stat", name) or 0 for name in self.files.own)
            self.peak_own_bytes = max(self.peak_own_bytes, own)
            self.peak_bytes = max(self.peak_bytes, _number(self.folder / "memory.current") or 0)

    def close(self) -> None:
        self.is_done.set()
        self.thread.join()


def _ended_in(process: "subprocess.Popen[bytes]", timeout_s: float) -> bool:
    try:
        process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _kill_all(folder: Path) -> None:
    """Kills what is left in the group, and waits until it is gone."""
    deadline = time.monotonic() + END_S
    while (pids := _members(folder)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S / 2)


def _members(folder: Path) -> list[int]:
    try:
        return [int(word) for word in (folder / "cgroup.procs").read_text(encoding="ascii").split()]
    except OSError:
        return []


def _remove(folder: Path) -> None:
    """The pages of files that are left are dropped first (version 1), or the group above would inherit them."""
    with contextlib.suppress(OSError):
        (folder / "memory.force_empty").write_text("0", encoding="ascii")
    deadline = time.monotonic() + END_S
    while folder.exists() and time.monotonic() < deadline:
        try:
            folder.rmdir()
        except OSError:
            time.sleep(POLL_S)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _counted(file: Path, name: str) -> int | None:
    """The number after a name in a file of `name number` lines."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), None)


def _tail(out: IO[bytes]) -> str:
    size = out.seek(0, os.SEEK_END)
    out.seek(max(0, size - TAIL_CHARS))
    return out.read().decode("utf-8", errors="replace")


def forget_pages(folder: Path) -> None:
    """Drops the files in a folder from the page cache: read before, they would cost a limited command nothing."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)  # only what is on the disk can be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
