"""The benchmarks by name, and the module of each. No torch here; the modules may import it."""

from collections.abc import Iterable
from importlib import import_module

from ..harness.config_errors import suggestion
from ..harness.errors import ConfigError
from .benchmark import Benchmark

MODULES = {"kernels": ".bench_kernels", "step": ".bench_step", "memory": ".bench_memory", "scale": ".bench_scale"}
"""Each has BENCHMARK = Benchmark(...)."""
ON_REQUEST = {"limit": ".bench_limit", "plan": ".bench_plan"}
"""Those that run only where they are named: they need a memory cgroup, or take very long."""

LONG = ("limit",)
"""Take hours: `verify` measures them again only where they are named."""


def with_results(results: Iterable[str]) -> list[str]:
    """All of the suite, and those on request that have results."""
    return [*MODULES, *(name for name in ON_REQUEST if name in results)]


def benchmark(name: str) -> Benchmark:
    """Raises ConfigError for one there is not."""
    modules = MODULES | ON_REQUEST
    if name not in modules:
        raise ConfigError(f"{name!r} is no benchmark{did_you_mean(name, modules)}")
    found: Benchmark = import_module(modules[name], __package__).BENCHMARK
    return found


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """The end of a sentence about a name there is not: the nearest one, or all there are."""
    close = suggestion(word, list(names))
    return f"; did you mean {close}?" if close else f"; there is {', '.join(names)}"
