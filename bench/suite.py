"""The benchmarks by name, and the module of each. No torch here; the modules may import it."""

from importlib import import_module

from ..harness.errors import ConfigError
from .benchmark import Benchmark

MODULES = {"kernels": ".bench_kernels", "step": ".bench_step", "memory": ".bench_memory", "scale": ".bench_scale"}
"""Each has BENCHMARK = Benchmark(...)."""


def benchmark(name: str) -> Benchmark:
    """Raises ConfigError for one there is not."""
    if name not in MODULES:
        raise ConfigError(f"{name!r} is no benchmark; there is {', '.join(MODULES)}")
    found: Benchmark = import_module(MODULES[name], __package__).BENCHMARK
    return found
