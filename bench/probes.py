"""Probes of memory: a mode takes a step or two in a process that has done nothing before, and says its peak.

A peak is what the process has at most during its steps, less what it has when all libraries are imported and no weight
is loaded (on a GPU: what torch's allocator has given out). The peak of loading a model does not count.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..harness.markup import duration
from ..harness.markup import size as size_text
from ..harness.plan import Resources
from ..launch.resources import detect, memory_bytes
from .fit import Curve, Measure, Probe, Refuse, peak_at, time_at
from .pool import Crew, Worker, WorkerDied, at_once
from .workload import Workload

NUM_STEPS = 2
"""The first makes the optimizer's state; the second has all that the ones after it have."""
MAX_SHARE = 0.8
"""Of the memory at hand: a probe that would need more is not tried, for it may take the machine down with it."""
LOADING_BYTES_PER_WEIGHT = 3.0
"""While a random model is made on the host: bf16 weights, and their nf4 form beside them."""
MEMINFO = Path("/proc/meminfo")
LOADING, TRAINING = "while the model was loaded", "in a step"
SIGNS_OF_NO_MEMORY = (
    "for want of memory",
    "out of memory",
    "outofmemory",
    "memoryerror",
    "allocate memory",
    "bad_alloc",
)
"""What the last words of a process hold that found no memory, in small letters."""


@cache
def host() -> Resources:
    """What this machine has; a GPU's memory takes a process to ask for."""
    return detect()


def available_bytes(device: str) -> int:
    """Memory that probes may use: the GPU's, or what this host has free within the limits of its cgroups."""
    if device == "cuda":
        return host().device_memory_bytes
    found = re.search(r"^MemAvailable:\s*(\d+) kB", MEMINFO.read_text(encoding="ascii"), re.MULTILINE)
    return min(memory_bytes(), 1024 * int(found[1])) if found else memory_bytes()


def ended(size: int, died: WorkerDied, *, while_doing: str) -> Probe:
    """The probe of a process that died. Dying while a model is loaded says nothing of a training step."""
    is_full = while_doing != LOADING and any(sign in str(died).lower() for sign in SIGNS_OF_NO_MEMORY)
    return Probe(size, "out of memory" if is_full else "failed", reason=f"{while_doing}: {died}")


def tried(worker: Worker, workload: Workload, size: int) -> Probe:
    """A probe of this size by a process that has loaded nothing yet; it ends with it."""
    doing = LOADING
    try:
        worker.build(workload)
        doing = TRAINING
        answers = [worker.step() for _ in range(NUM_STEPS)]
    except WorkerDied as died:
        return ended(size, died, while_doing=doing)
    finally:
        worker.close()
    floor_bytes = worker.built["floor_bytes"]
    peak_bytes = max(answer["peak_bytes"] for answer in answers) - floor_bytes
    return Probe(size, "ok", peak_bytes, min(answer["time_s"] for answer in answers), floor_bytes)


@contextlib.contextmanager
def in_fresh_processes(mode: str, workload_of: Callable[[int], Workload]) -> Iterator[Measure]:
    """Every probe in a process of its own, all that are asked for at the same time."""
    with Crew() as crew:

        def measure(sizes: Sequence[int]) -> list[Probe]:
            calls = [partial(tried, crew.take(mode), workload_of(size), size) for size in sizes]
            return at_once(calls, num_at_once=len(calls), stop=crew.kill)

        yield measure


class LengthsWorker(Worker):
    """A process whose sequences change their length, see `lengths_worker`."""

    module = "lengths_worker"

    def step_of(self, length: int) -> dict[str, Any]:
        """A step on sequences of this length, with the peak of this step alone. Raises WorkerDied."""
        return self._ask({"do": "step", "length": length})


@contextlib.contextmanager
def in_one_process(mode: str, workload: Workload) -> Iterator[Measure]:
    """All lengths in one process, which loads the model once and is started again when it has died.

    For GPUs, where loading takes longest and the allocator counts the bytes of each step exactly. The first step, on
    sequences of the workload's length, makes the optimizer's state and compiles kernels; it does not count.
    """
    alive: list[LengthsWorker] = []

    def measure(sizes: Sequence[int]) -> list[Probe]:
        return [one(size) for size in sizes]

    def one(size: int) -> Probe:
        doing = TRAINING
        try:
            if not alive:
                doing = LOADING
                alive.append(LengthsWorker(mode))
                alive[0].build(workload)
                alive[0].step()
                doing = TRAINING
            answer = alive[0].step_of(size)
        except WorkerDied as died:
            alive.pop().close()
            return ended(size, died, while_doing=doing)
        floor_bytes = alive[0].built["floor_bytes"]
        return Probe(size, "ok", answer["peak_bytes"] - floor_bytes, answer["time_s"], floor_bytes)

    try:
        yield measure
    finally:
        for worker in alive:
            worker.close()


def refusal(
    curve: Curve, *, available_bytes: int, num_at_once: int, limit_s: float, loading_bytes: Callable[[int], float]
) -> Refuse:
    """Why a size must not be tried: for memory, so that the machine survives it, or for time."""

    def refuse(wanted: int) -> str | None:
        needed = max(peak_at(curve, wanted), loading_bytes(wanted))
        if num_at_once * needed > MAX_SHARE * available_bytes:
            return f"more would take about {size_text(needed)}, and {size_text(available_bytes)} are free here"
        if (step_s := time_at(curve, wanted)) > limit_s:
            return f"more was not tried: a step would take about {duration(step_s)}"
        return None

    return refuse
