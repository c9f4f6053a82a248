"""How many bytes are alive at every moment of a run on the CPU, as torch's allocator sees it: temporaries inside
operations count.

What C++ libraries keep behind torch's back (packed weights of a product, for one) is not seen.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from threading import Thread
from typing import Any, TypeVar

import numpy as np
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

MARK = "burnish mark: "
Mark = Callable[[str], None]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Timeline:
    """`live[i]` bytes after the i-th allocation or release, from 0 on; `marks` are (name, number of events before)."""

    live: np.ndarray
    marks: tuple[tuple[str, int], ...]

    def at(self, name: str, *, after: int = 0) -> int:
        """The number of events before the first mark of this name that comes after so many events."""
        return next(place for mark, place in self.marks if mark == name and place >= after)

    def bytes_at(self, place: int) -> int:
        return int(self.live[place - 1]) if place else 0


def live_bytes(run: Callable[[Mark], None]) -> Timeline:
    """The timeline of `run` on the CPU; it is given a function that sets a mark."""
    return undisturbed(lambda: _observed(run))


def undisturbed(observed: Callable[[], Found]) -> Found:
    """What a call returns or raises: without gc, in a new thread, which has no scratch memory of earlier calls."""
    found: list[Found] = []
    errors: list[BaseException] = []

    def observe() -> None:
        try:
            found.append(observed())
        except Exception as error:
            errors.append(error)

    was_enabled = gc.isenabled()
    gc.disable()
    try:
        thread = Thread(target=copy_context().run, args=(observe,))
        thread.start()
        thread.join()
    finally:
        if was_enabled:
            gc.enable()
    if errors:
        raise errors[0]
    return found[0]


def _observed(run: Callable[[Mark], None]) -> Timeline:
    def mark(name: str) -> None:
        with record_function(MARK + name):
            pass

    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with _silent():
        profiler.start()
        try:
            run(mark)
        finally:
            profiler.stop()
    return _timeline(profiler.profiler.kineto_results.events())  # type: ignore[union-attr]


@contextmanager
def _silent() -> Iterator[None]:
    """Without what the profiler's library writes to stderr, which has no switch."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _timeline(events: Sequence[Any]) -> Timeline:
    """From the profiler's events: changes of memory are named [memory], marks are user annotations."""
    changes, marks = [], []
    for event in events:
        name = event.name()
        if name == "[memory]" and event.device_type() == DeviceType.CPU:
            changes.append((event.start_ns(), event.nbytes()))
        elif name.startswith(MARK):
            marks.append((event.start_ns(), name.removeprefix(MARK)))
    changes.sort(key=lambda change: change[0])
    times = np.array([time for time, _ in changes], dtype=np.int64)
    places = np.searchsorted(times, [time for time, _ in sorted(marks)])
    names = [name for _, name in sorted(marks)]
    live = np.cumsum([size for _, size in changes], dtype=np.int64) if changes else np.zeros(0, np.int64)
    return Timeline(live, tuple(zip(names, map(int, places), strict=True)))
