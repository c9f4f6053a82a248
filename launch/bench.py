"""The verb `bench`: options -> a benchmark -> JSON file and table."""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from ..bench.workload import MODELS, Workload, parse_batch
from ..harness.errors import ConfigError, TrainingError
from ..harness.run_dir import environment, write_json
from .resources import num_cpus

DEFAULT_MODES = ("peft", "peft-bf16", "peft-bf16+malloc", "sft", "burnish")
DEFAULT_STEPS = {"step": 5, "kernels": 20}
DEFAULT_BATCH = "4x256"
OWN_OPTIONS = {"step": ("modes", "baseline", "batch", "model", "profile"), "kernels": ("ops", "quick")}
"""Options that only one of the benchmarks has."""
NUM_WARMUP = 2
NUM_PROFILE_ROWS = 30

Say = Callable[[str], None]
Result = tuple[dict[str, Any], str]


def run(options: argparse.Namespace, progress: TextIO) -> Result:
    """The result as JSON and as text. Raises ConfigError, TrainingError."""

    def say(text: str) -> None:
        print(text, file=progress, flush=True)

    for what, names in OWN_OPTIONS.items():
        if what != options.what and (given := [name for name in names if getattr(options, name)]):
            raise ConfigError(f"--{given[0]} is an option of burnish bench {what}")
    steps = DEFAULT_STEPS[options.what] if options.steps is None else options.steps
    threads = num_cpus() if options.threads is None else options.threads
    for name, value in (("steps", steps), ("threads", threads)):
        if value < 1:
            raise ConfigError(f"--{name} {value}: at least 1")
    out = out_file(options.out)
    if options.what == "kernels":
        result, text = kernels(options, steps, threads, say)
    elif options.profile is not None:
        result, text = profile(options.profile, workload_of(options, threads), say)
    else:
        result, text = step(options, steps, workload_of(options, threads), say)
    result |= described()
    if out is not None:
        write_json(out, result)
    return result, text


def workload_of(options: argparse.Namespace, num_threads: int) -> Workload:
    num_sequences, length = parse_batch(options.batch or DEFAULT_BATCH)
    work = Workload(num_sequences=num_sequences, length=length, num_threads=num_threads)
    if options.model is None:
        return work
    return replace(work, model=MODELS.get(options.model, {"path": options.model}))


def out_file(path: str | None) -> Path | None:
    """Where the result goes; found wrong before hours are spent."""
    if path is None:
        return None
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"--out {path}: no such folder {Path(path).absolute().parent}")
    return Path(path)


def profile(mode: str, workload: Workload, say: Say) -> Result:
    from ..bench.bench_step import profile as measure
    from ..bench.pool import WorkerDied

    try:
        found = measure(mode, workload, num_warmup=NUM_WARMUP, num_rows=NUM_PROFILE_ROWS, say=say)
    except WorkerDied as died:
        raise TrainingError(f"{mode}: {died}") from None
    text = (
        f"{found['profile']}\n{mode}: {1000 * found['plain_time_s']:.0f} ms, with the profiler "
        f"{1000 * found['time_s']:.0f} ms"
    )
    return found | workload_fields(workload), text


def step(options: argparse.Namespace, num_steps: int, workload: Workload, say: Say) -> Result:
    from ..bench.bench_step import check_names, measure, summarise
    from ..bench.table import step_table

    modes = list(dict.fromkeys(options.modes.split(","))) if options.modes else list(DEFAULT_MODES)
    baseline = options.baseline or ("peft" if "peft" in modes else modes[0])
    check_names([*modes, baseline])
    if baseline not in modes:
        raise ConfigError(f"--baseline {baseline} is not among the modes {','.join(modes)}")
    found = measure(modes, workload, baseline=baseline, num_steps=num_steps, num_warmup=NUM_WARMUP, say=say)
    result = summarise(found) | {"num_warmup": NUM_WARMUP} | workload_fields(workload)
    return result, step_table(result | {"environment": environment()})


def kernels(options: argparse.Namespace, num_rounds: int, num_threads: int, say: Say) -> Result:
    import torch

    from ..bench.bench_kernels import measure
    from ..bench.table import kernel_table
    from ..kernels.registry import OPS

    torch.set_num_threads(num_threads)
    names = options.ops.split(",") if options.ops else list(OPS)
    result = measure(names, num_rounds=num_rounds, is_compiled=not options.quick, say=say)
    return result | {"num_threads": num_threads}, kernel_table(result)


def workload_fields(workload: Workload) -> dict[str, Any]:
    return {"workload": workload.to_dict(), "config": workload.config().model_dump(mode="json")}


def described() -> dict[str, Any]:
    """What a number is worth nothing without: when, how, where and with what."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": ["burnish", *sys.argv[1:]],
        "environment": environment(),
    }
