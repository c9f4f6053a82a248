"""Every operation of the registry, forward and backward, against its reference in plain and in compiled PyTorch.

Shapes are the record's bench_cases: whole on a GPU, cut to what a small model has on a CPU. The three take turns, with
cold caches. An operation whose results are wrong on the case at hand gets no ratio.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..harness.errors import ConfigError
from ..kernels.op import Case, Op, backend_of
from ..kernels.registry import OPS
from .op_runs import Run, in_dtype, mistake, tensors_of
from .stats import paired_ratios, quantiles
from .stopwatch import Stopwatch
from .turns import others_s

CPU_LIMITS = {"B": 4, "T": 512, "S": 512, "M": 1024, "K": 576, "N": 1536, "F": 1536, "V": 49152, "shapes": 576}
"""Largest value of a shape letter on a CPU: SmolLM2-135M on 4x256 tokens."""
CPU_PARTS = 64
"""Most entries of a shape letter that stands for many tensors."""
NUM_WARMUP = 3

Say = Callable[[str], None]


def measure(names: Sequence[str], *, num_rounds: int, is_compiled: bool, say: Say) -> dict[str, Any]:
    """All cases of the named operations as JSON, with the raw samples. Raises ConfigError for an unknown one."""
    for name in names:
        if name not in OPS:
            raise ConfigError(f"{name!r} is no operation; there is {', '.join(OPS)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stopwatch = Stopwatch(device)
    say("peaks of this machine: copy, matrix product")
    peaks = {str(dtype)[6:]: stopwatch.peaks(dtype) for dtype in (torch.bfloat16, torch.float32)}
    rows: list[dict[str, Any]] = []
    found = {"benchmark": "kernels", "device": device, "peaks": peaks, "num_rounds": num_rounds, "rows": rows}
    start_s, start_others_s = time.perf_counter(), others_s()
    work = [(OPS[name], case) for name in names for case in cases_on(OPS[name], device)]
    for number, (op, case) in enumerate(work, start=1):
        say(f"{number} of {len(work)}: {op.name} {describe(case)}")
        try:
            row = measure_case(op, case, stopwatch, peaks, num_rounds=num_rounds, is_compiled=is_compiled)
        except KeyboardInterrupt:
            if not rows:
                raise
            break
        rows.append(row)
    others_cores = max(0.0, (others_s() - start_others_s) / (time.perf_counter() - start_s))
    return found | {"others_cores": others_cores, "is_interrupted": len(rows) < len(work)}


def cases_on(op: Op, device: str) -> list[Case]:
    """The cases to time, each once."""
    cases = list(op.bench_cases) if device == "cuda" else [smaller(case) for case in op.bench_cases]
    return [case for i, case in enumerate(cases) if case not in cases[:i]]


def smaller(case: Case) -> Case:
    """The case within CPU_LIMITS; `offsets`, which cut the M rows into parts, shrink with M."""
    found = {key: limited(value, CPU_LIMITS[key]) if key in CPU_LIMITS else value for key, value in case.items()}
    if "offsets" in case:
        found["offsets"] = tuple(row * found["M"] // case["M"] for row in case["offsets"])
    return found


def limited(value: Any, limit: int) -> Any:
    if isinstance(value, tuple | list):
        return tuple(limited(part, limit) for part in value[:CPU_PARTS])
    return min(value, limit)


def describe(case: Case) -> str:
    """The case in a few words; of long tuples only the number of parts."""
    shown = {key: f"{len(value)} parts" if str(value).count(",") > 4 else value for key, value in case.items()}
    return " ".join(f"{key}={value}" for key, value in shown.items())


def dtype_of(op: Op) -> torch.dtype:
    return torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]


def measure_case(
    op: Op, case: Case, stopwatch: Stopwatch, peaks: Mapping[str, Any], *, num_rounds: int, is_compiled: bool
) -> dict[str, Any]:
    """One row: state ok, void or failed; times, ratios to burnish, bytes saved for backward, share of the peak."""
    device, dtype = stopwatch.device, dtype_of(op)
    row: dict[str, Any] = {"op": op.name, "case": describe(case), "dtype": str(dtype)[6:], "state": "ok"}
    try:
        reason = mistake(op, case, dtype, device)
        if reason is not None:
            return row | {"state": "void", "reason": reason}
        inputs = op.make_inputs(case, dtype, device, torch.Generator().manual_seed(0))
        row["backend"] = next((backend_of(tensor) for tensor in tensors_of(inputs)), "torch")
        runs = {
            "burnish": Run.prepare(op.function, in_dtype(inputs, dtype) | dict(op.options)),
            "reference": Run.prepare(op.reference, in_dtype(inputs, dtype)),
        }
        saved = {name: saved_bytes(run) for name, run in runs.items()}
        if is_compiled:
            row |= add_compiled(runs, op, inputs, dtype)
        for run in runs.values():
            for _ in range(NUM_WARMUP):
                run()
        rounds = stopwatch.in_turn(runs, num_rounds=num_rounds)
    except (RuntimeError, MemoryError, ValueError, TypeError, NotImplementedError) as error:
        return row | {"state": "failed", "reason": " ".join(str(error).split())[:300] or type(error).__name__}
    row |= {"rounds": rounds, "saved_bytes": saved}
    if device == "cuda":
        row |= {name: {key: of(run) for key, run in runs.items()} for name, of in GPU_COUNTS.items()}
    return row | figures(op, case, rounds, peaks[row["dtype"] if row["dtype"] in peaks else "float32"])


def add_compiled(runs: dict[str, Run], op: Op, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, str]:
    """Adds the compiled reference to the runs; why not, where it cannot be compiled."""
    torch._dynamo.reset()
    try:
        compiled = torch.compile(op.reference, dynamic=False)
        run = Run(compiled, in_dtype(inputs, dtype), runs["reference"].cotangents)
        run()
    except Exception as error:  # a compiler may fail in any way
        return {"not_compiled": " ".join(str(error).split())[:300]}
    runs["compiled"] = run
    return {}


def figures(op: Op, case: Case, rounds: list[dict[str, float]], peak: Mapping[str, float]) -> dict[str, Any]:
    """Times and ratios; share_of_peak is the least time that the record's bytes and operations need, by ours."""
    times = {name: [turn[name] for turn in rounds] for name in rounds[0]}
    result: dict[str, Any] = {"time_s": {name: quantiles(samples) for name, samples in times.items()}}
    result["ratio"] = {
        name: paired_ratios(samples, times["burnish"]) for name, samples in times.items() if name != "burnish"
    }
    needed = [of(case) / peak[key] for of, key in ((op.num_bytes, "bytes_per_s"), (op.num_flops, "flops_per_s")) if of]
    result["num_bytes"], result["num_flops"] = (of(case) if of else None for of in (op.num_bytes, op.num_flops))
    result["share_of_peak"] = max(needed) / result["time_s"]["burnish"]["median"] if needed else None
    return result


def saved_bytes(run: Run) -> int:
    """Bytes that forward keeps for backward, without its inputs."""
    inputs = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(run.arguments)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run.forward()
        total = sum(kept.values())
    del outputs
    return total


def peak_bytes(run: Run) -> int:
    """Most that one call allocates on the GPU."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def num_launches(run: Run) -> int:
    """Kernels, copies and fills that one call starts on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


GPU_COUNTS: dict[str, Callable[[Run], int]] = {"peak_bytes": peak_bytes, "num_launches": num_launches}
