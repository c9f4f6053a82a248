"""Times calls on the CPU or the GPU with cold caches, in turn, and measures what the machine can do at most."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

COLD_BYTES = {"cpu": 2**26, "cuda": 2**28}
"""Written before every call: more than the last cache of each core, or of the GPU, holds."""
CYCLES_PER_S = 2e9
"""At least the clock of a GPU."""
MIN_SLEEP_S, MAX_SLEEP_S = 1e-3, 0.2
"""A GPU sleeps while Python queues a call: without it launches are timed, not work."""
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
NUM_PEAK_SAMPLES = 7
MIN_ROUNDS = 5

Call = Callable[[], Any]


class Stopwatch:
    """Seconds of single calls on one device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.cold = torch.empty(COLD_BYTES[device], dtype=torch.uint8, device=device)

    def chill(self) -> None:
        """Leaves nothing of what a call reads in the caches."""
        self.cold.fill_(1)

    def time(self, call: Call, *, queue_s: float = 0.0) -> float:
        """`queue_s`: how long Python takes to queue the call on a GPU."""
        self.chill()
        if self.device == "cpu":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(CYCLES_PER_S * min(max(2 * queue_s, MIN_SLEEP_S), MAX_SLEEP_S)))
        before.record()
        call()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)) / 1000

    def queue_time(self, call: Call) -> float:
        """Seconds until Python has queued the call for a GPU; the work may still be to do."""
        if self.device == "cpu":
            return 0.0
        self.finish()
        start = time.perf_counter()
        call()
        queued_s = time.perf_counter() - start
        self.finish()
        return queued_s

    def finish(self) -> None:
        """Waits for the GPU."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def num_copies(self, num_bytes: int) -> int:
        """How many copies of inputs of this size a GPU's cache cannot hold together. On a CPU `chill` is enough."""
        if self.device == "cpu":
            return 1
        cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        return min(8, 1 + 2 * cache_bytes // max(num_bytes, 1))

    def in_turn(
        self, calls: Mapping[str, Call | Sequence[Call]], *, num_rounds: int, limit_s: float = float("inf")
    ) -> list[dict[str, float]]:
        """One call of each per round, starting with another one every time, so that all see the same disturbances.

        A sequence of calls does the same on copies of the inputs, one after the other. After `limit_s` no further round
        begins, but for the first MIN_ROUNDS.
        """
        names, rounds = list(calls), []
        cycles, queue_s = {}, {}
        for offset, (name, given) in enumerate(calls.items()):
            copies = [given] if callable(given) else list(given)
            first = offset % len(copies)
            cycles[name] = itertools.cycle(copies[first:] + copies[:first])
            queue_s[name] = self.queue_time(copies[0])
        start = time.perf_counter()
        for number in range(num_rounds):
            if number >= MIN_ROUNDS and time.perf_counter() - start > limit_s:
                break
            first = number % max(1, len(names))
            order = names[first:] + names[:first]
            times = {name: self.time(next(cycles[name]), queue_s=queue_s[name]) for name in order}
            rounds.append({name: times[name] for name in names})
        return rounds

    def peaks(self, dtype: torch.dtype) -> dict[str, float]:
        """{bytes_per_s, flops_per_s}: the best of a few large copies and large matrix products of random numbers."""
        source = torch.empty(COPY_BYTES[self.device], dtype=torch.uint8, device=self.device).fill_(1)
        target = torch.empty_like(source)
        side = MATMUL_SIDE[self.device]
        a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        calls: dict[str, Call] = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
        for call in calls.values():
            call()
        rounds = self.in_turn(calls, num_rounds=NUM_PEAK_SAMPLES)
        copy_s, matmul_s = (min(turn[name] for turn in rounds) for name in ("copy", "matmul"))
        return {"bytes_per_s": 2 * source.numel() / copy_s, "flops_per_s": 2 * side**3 / matmul_s}
