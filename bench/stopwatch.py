"""Times calls on the CPU or the GPU with cold caches, in turn, and measures what the machine can do at most."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

COLD_BYTES = {"cpu": 2**26, "cuda": 2**28}
"""Written before every call: more than the last cache of each core, or of the GPU, holds."""
SLEEP_CYCLES = 2_000_000
"""About a millisecond in which a GPU waits while Python queues the calls: without it launches are timed, not work."""
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
NUM_PEAK_SAMPLES = 7


class Stopwatch:
    """Seconds of single calls on one device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.cold = torch.empty(COLD_BYTES[device], dtype=torch.uint8, device=device)

    def time(self, call: Callable[[], Any]) -> float:
        self.cold.fill_(1)
        if self.device == "cpu":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP_CYCLES)
        before.record()
        call()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)) / 1000

    def in_turn(self, calls: Mapping[str, Callable[[], Any]], *, num_rounds: int) -> list[dict[str, float]]:
        """One call of each per round, starting with another one every time, so that all see the same disturbances."""
        names, rounds = list(calls), []
        for number in range(num_rounds):
            first = number % max(1, len(names))
            times = {name: self.time(calls[name]) for name in names[first:] + names[:first]}
            rounds.append({name: times[name] for name in names})
        return rounds

    def peaks(self, dtype: torch.dtype) -> dict[str, float]:
        """{bytes_per_s, flops_per_s}: the best of a few large copies and large matrix products of random numbers."""
        source = torch.empty(COPY_BYTES[self.device], dtype=torch.uint8, device=self.device).fill_(1)
        target = torch.empty_like(source)
        side = MATMUL_SIDE[self.device]
        a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        calls: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
        for call in calls.values():
            call()
        rounds = self.in_turn(calls, num_rounds=NUM_PEAK_SAMPLES)
        copy_s, matmul_s = (min(turn[name] for turn in rounds) for name in ("copy", "matmul"))
        return {"bytes_per_s": 2 * source.numel() / copy_s, "flops_per_s": 2 * side**3 / matmul_s}
