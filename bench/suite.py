"""The benchmarks by name, and the module of each. No torch here; the modules may import it."""

from importlib import import_module

from ..harness.errors import ConfigError
from .benchmark import Benchmark

MODULES = {"kernels": ".bench_kernels", "step": ".bench_step", "memory": ".bench_memory", "scale": ".bench_scale"}
"""Each has BENCHMARK = Benchmark(...)."""
ON_REQUEST = {"limit": ".bench_limit"}
"""Those that run only where they are named: they need a memory cgroup, or take very long."""


def benchmark(name: str) -> Benchmark:
    """Raises ConfigError for one there is not."""
    modules = MODULES | ON_REQUEST
    if name not in modules:
        raise ConfigError(f"{name!r} is no benchmark; there is {', '.join(modules)}")
    found: Benchmark = import_module(modules[name], __package__).BENCHMARK
    return found
