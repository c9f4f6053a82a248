"""The verb `bench`: options -> a benchmark -> JSON file and table."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from ..bench.workload import Workload, parse_batch
from ..harness.errors import ConfigError, TrainingError
from ..harness.run_dir import environment, write_json
from .resources import num_cpus

DEFAULT_MODES = ("peft", "peft-bf16", "peft-bf16+malloc", "sft", "burnish")
NUM_WARMUP = 2
NUM_PROFILE_ROWS = 30


def run(options: argparse.Namespace, progress: TextIO) -> tuple[dict[str, Any], str]:
    """The result as JSON and as text. Raises ConfigError, TrainingError."""

    def say(text: str) -> None:
        print(text, file=progress, flush=True)

    workload = workload_of(options)
    out = out_file(options.out)
    if options.profile is not None:
        result, text = profile(options.profile, workload, say)
    else:
        result, text = step(options, workload, say)
    if out is not None:
        write_json(out, result)
    return result, text


def workload_of(options: argparse.Namespace) -> Workload:
    num_sequences, length = parse_batch(options.batch)
    threads = num_cpus() if options.threads is None else options.threads
    if threads < 1:
        raise ConfigError(f"--threads {threads}: at least 1")
    work = Workload(num_sequences=num_sequences, length=length, num_threads=threads)
    return work if options.model is None else Workload.from_dict(work.to_dict() | {"model": {"path": options.model}})


def out_file(path: str | None) -> Path | None:
    """Where the result goes; found wrong before hours are spent."""
    if path is None:
        return None
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"--out {path}: no such folder {Path(path).absolute().parent}")
    return Path(path)


def profile(mode: str, workload: Workload, say: Any) -> tuple[dict[str, Any], str]:
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
    return found | described(workload), text


def step(options: argparse.Namespace, workload: Workload, say: Any) -> tuple[dict[str, Any], str]:
    from ..bench.bench_step import check_names, measure, summarise
    from ..bench.table import step_table

    modes = list(dict.fromkeys(options.modes.split(","))) if options.modes else list(DEFAULT_MODES)
    baseline = options.baseline or ("peft" if "peft" in modes else modes[0])
    check_names([*modes, baseline])
    if baseline not in modes:
        raise ConfigError(f"--baseline {baseline} is not among the modes {','.join(modes)}")
    if options.steps < 1:
        raise ConfigError(f"--steps {options.steps}: at least 1")
    found = measure(modes, workload, baseline=baseline, num_steps=options.steps, num_warmup=NUM_WARMUP, say=say)
    result = summarise(found) | {"num_warmup": NUM_WARMUP} | described(workload)
    return result, step_table(result)


def described(workload: Workload) -> dict[str, Any]:
    """What a number is worth nothing without: when, where, with what, how."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": ["burnish", *sys.argv[1:]],
        "environment": environment(),
        "config": workload.config().model_dump(mode="json"),
    }
