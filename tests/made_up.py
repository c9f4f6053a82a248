"""Peaks of methods that do not exist, in the place of processes: for the tests of searches and rows."""

import random

from burnish.bench.fit import Probe
from burnish.bench.memory_cases import MIB


class Machine:
    """Peaks of a made-up method; `asked` holds the sizes that were tried, in turn."""

    def __init__(self, peak, *, noise=0.0, room=None, seed=0):
        self.peak, self.noise, self.room = peak, noise, room
        self.random = random.Random(seed)
        self.asked = []

    def __call__(self, sizes):
        return [self.probe(size) for size in sizes]

    def probe(self, size):
        assert size not in self.asked, "a size is tried once"
        self.asked.append(size)
        peak = round(self.peak(size) * (1 + self.random.uniform(-self.noise, self.noise)))
        if self.room is not None and peak > self.room:
            return Probe(size, "out of memory", reason="killed, most likely for want of memory")
        return Probe(size, "ok", peak_bytes=peak, time_s=1e-4 * min(size, 10_000))


def start(machine, *sizes):
    return {probe.size: probe for probe in machine(sizes)}


SHAPES = {
    "linear": lambda n: 300 * MIB + 0.5 * MIB * n,
    "flat": lambda n: 300 * MIB + 0.15 * MIB * n,
    "steep": lambda n: 300 * MIB + 3.0 * MIB * n,
    "quadratic": lambda n: 300 * MIB + 0.1 * MIB * n + 400 * n * n,
    "stairs": lambda n: 300 * MIB + 100 * MIB * (n // 300),
}
