"""Hangs: every rank notes what it does in a small file, and watches that it goes on doing something.

    heartbeats/rank_00001.json    {rank, step, phase, since, pid, start_ticks, host}; written at most once a second
    hangs/…                       stacks of all threads of a rank that hung

A rank that makes no progress for `launch.hang_timeout_s` (longer in phases where it may wait for rank 0 alone, and in
work that has taken longer before) ends its process, so that the launcher replaces the group. Before that it writes down
its stacks and names, from everyone's files, the rank that is furthest behind: the others only wait for it. One that is
stopped cannot end itself, so the watchdog of another rank on its host kills it.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from .backoff import Phase
from .plan import Plan
from .run_dir import RunDir, read_json

Item = TypeVar("Item")
BEAT_S = 1.0
PATIENCE = {"load": 8.0, "first_step": 4.0, "evaluation": 4.0, "save": 8.0, "finish": 8.0}
"""Times hang_timeout_s: the first step compiles and follows answers to prompts, evaluation may have larger batches, and
rank 0 alone writes, generates and proves."""
SLOWER = 4.0
"""Times the longest that the same phase has taken in this process: a slow machine is no hang."""
EXIT_CODE = 71
GRACE_S = 5.0
"""After it a watchdog in C, which needs no interpreter lock, ends a process whose own thread cannot."""


@dataclass(frozen=True)
class Beat:
    """What a rank does, and since when (seconds since 1970)."""

    rank: int
    step: int
    phase: str
    count: int
    """Notes since the step began; all ranks make the same ones."""
    since: float
    pid: int
    start_ticks: int
    host: str


class Watchdog:
    """The watchdog of one rank; a context manager. `on_hang` ends the process."""

    def __init__(
        self,
        run: RunDir,
        *,
        rank: int,
        timeout_s: float,
        on_hang: Callable[[], None] = lambda: os._exit(EXIT_CODE),
    ) -> None:
        self.run, self.rank, self.timeout_s, self.on_hang = run, rank, timeout_s, on_hang
        self.identity = {"pid": os.getpid(), "start_ticks": start_ticks(os.getpid()), "host": socket.gethostname()}
        self.is_over = threading.Event()
        self.file = run.heartbeats / f"rank_{rank:05d}.json"
        self.current = self._made(step=0, phase="load", count=0)
        self.began = time.monotonic()
        self.written: Beat | None = None
        self.longest_s: dict[str, float] = {}
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self.run.heartbeats.mkdir(exist_ok=True)
        self.run.hangs.mkdir(exist_ok=True)
        self.stacks = (self.run.hangs / f"rank_{self.rank:05d}_pid{os.getpid()}.txt").open("w")
        self.note("load", step=0)
        self._beat()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()
        self.stacks.close()
        path = Path(self.stacks.name)
        if not path.stat().st_size:
            path.unlink()
        self.file.unlink(missing_ok=True)
        for folder in (self.run.hangs, self.run.heartbeats):
            with contextlib.suppress(OSError):  # others still use it, or there is something to read
                folder.rmdir()

    def note(self, phase: str, *, step: int) -> None:
        """Progress: this rank begins something else. `step` is the number of steps done. Writes no file."""
        count = self.current.count + 1 if step == self.current.step else 0
        for name in {self.current.phase, "step" if self.current.phase == "first_step" else self.current.phase}:
            self.longest_s[name] = max(self.longest_s.get(name, 0.0), time.monotonic() - self.began)
        self.current, self.began = self._made(step=step, phase=phase, count=count), time.monotonic()

    def _made(self, *, step: int, phase: str, count: int) -> Beat:
        return Beat(self.rank, step, phase, count, time.time(), **self.identity)  # type: ignore[arg-type]

    def _left_s(self) -> float:
        """How much longer the rank may do what it does. A host that sleeps does not use it up."""
        phase = self.current.phase
        allowed_s = max(self.timeout_s * PATIENCE.get(phase, 1.0), SLOWER * self.longest_s.get(phase, 0.0))
        return allowed_s - (time.monotonic() - self.began)

    def _watch(self) -> None:
        """In a thread of its own: writes the heartbeat where it changed, and waits for the time to be up."""
        while not self.is_over.wait(min(BEAT_S, self.timeout_s / 5)):
            if self.current is not self.written:
                self._beat()
            if self._left_s() < 0:
                self._end()
                return

    def _beat(self) -> None:
        """The file whole, but not forced to the disk: after a crash of the host nobody asks."""
        self.written = self.current
        faulthandler.dump_traceback_later(max(0.0, self._left_s()) + GRACE_S, exit=True, file=self.stacks)
        temporary = self.file.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # a full disk is no hang
            temporary.write_text(json.dumps(asdict(self.written)))
            os.replace(temporary, self.file)

    def _end(self) -> None:
        """Stacks, the event (from the first rank that gets here), the end of stopped neighbours, and our own."""
        faulthandler.dump_traceback(file=self.stacks)
        self.stacks.flush()
        beats = read_beats(self.run) or [self.current]
        last = behind(beats)
        if _claim(self.run, last):
            waited_s = round(time.time() - self.current.since, 1)
            what = {"rank": last.rank, "phase": last.phase, "step": last.step}
            self.run.log_event("hang", **what, noticed_by=self.rank, waited_s=waited_s, stacks=str(self.run.hangs))
        for beat in beats:
            if beat.rank != self.rank and is_stopped(beat):
                os.kill(beat.pid, signal.SIGKILL)
        self.on_hang()


@dataclass
class Position:
    """What a rank is doing, after how many steps; its watchdog hears of every change."""

    phase: Phase = "load"
    step: int = 0
    first_step: int = 0
    watchdog: Watchdog | None = None

    def at(self, phase: Phase, *, step: int | None = None) -> None:
        self.phase, self.step = phase, self.step if step is None else step
        self.progress()

    def progress(self) -> None:
        """Tells the watchdog that something was done; the first step of an attempt may take longer than the others."""
        if self.watchdog is not None:
            is_first = self.phase == "step" and self.step == self.first_step
            self.watchdog.note("first_step" if is_first else self.phase, step=self.step)

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; each is progress."""
        for item in items:
            self.progress()
            yield item


def watched(plan: Plan, rank: int) -> contextlib.AbstractContextManager[Watchdog | None]:
    """The watchdog of a rank where a launcher replaces what hangs."""
    if plan.config.launch.type != "ray":
        return contextlib.nullcontext()
    return Watchdog(RunDir(plan.run_dir), rank=rank, timeout_s=plan.config.launch.hang_timeout_s)


def longest_s(timeout_s: float) -> float:
    """How long a rank may wait for another at most."""
    return timeout_s * max(PATIENCE.values())


def _claim(run: RunDir, beat: Beat) -> bool:
    """Whether this is the first rank that reports this hang: the file says which the last one was."""
    try:
        (run.hangs / f".{beat.host}-{beat.pid}-{beat.start_ticks}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def read_beats(run: RunDir) -> list[Beat]:
    """The heartbeats of all ranks, by rank; torn or foreign files are left out."""
    found: list[Beat] = []
    for path in sorted(run.heartbeats.glob("rank_*.json")):
        fields: Any = read_json(path)
        if isinstance(fields, dict) and fields.keys() == Beat.__dataclass_fields__.keys():
            found.append(Beat(**fields))
    return found


def behind(beats: list[Beat]) -> Beat:
    """The rank that the others wait for: a stopped one, else the one that got least far, since the longest."""
    return min(beats, key=lambda beat: (not is_stopped(beat), beat.step, beat.count, beat.since))


def start_ticks(pid: int) -> int:
    """Start of a process in clock ticks since boot: tells it from a later one with its number. 0 if it is gone."""
    return int((_status(pid) or ["0"] * 20)[19])


def is_stopped(beat: Beat) -> bool:
    """Whether the rank's process is on this host and stopped by a signal, so that it cannot end itself."""
    status = _status(beat.pid) if beat.host == socket.gethostname() else None
    return status is not None and int(status[19]) == beat.start_ticks and status[0] in ("T", "t")


def _status(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on; None without such a process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
