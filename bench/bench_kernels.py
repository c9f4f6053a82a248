"""Every operation of the registry, forward and backward, against plain and compiled PyTorch and its published peers.

All contenders of an item take turns with cold caches. Results are compared with the reference in fp64 in the same run:
where burnish's are wrong the row is void, where a contender's are the contender is; neither gets a ratio.
`pytest bench/bench_kernels.py` times the same calls with pytest-benchmark.
"""

import functools
import gc
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import SkipTest

import torch

from ..harness.allocator import keep_freed_memory
from ..kernels.op import Case, Op, backend_of
from ..kernels.registry import OPS
from .benchmark import Benchmark, Choice, Item, Row, Setting
from .contenders import (
    BURNISH,
    COMPILED,
    FROZEN,
    REFERENCE,
    Contender,
    contenders_of,
    fault,
    small_problem,
)
from .counts import all_counts, is_on_gpu, num_launches, peak_bytes
from .kernel_tables import figures, tables
from .op_runs import Run, mistake, tensors_of
from .plain import Problem, problem_of
from .shapes import brief, items
from .stats import paired_ratios, quantiles
from .stopwatch import Stopwatch
from .turns import others_s

NUM_WARMUP = 3
WARMUP_S = 0.2
"""Where the first call takes longer, it was enough."""
NUM_ROUNDS = 25
ROUNDS_S = {"cpu": 3.0, "cuda": 1.0}
"""What the rounds of an item take at most, where they are not counted by the caller."""
QUICK_ROUNDS_S = 1.0
COUNTS = ("peak_bytes", "saved_bytes", "num_launches")
FAILURES = (RuntimeError, MemoryError, ValueError, TypeError, NotImplementedError, ImportError, AttributeError)
"""What an operation or a peer may raise on a machine that cannot run it."""


@functools.cache
def stopwatch_of(device: str) -> Stopwatch:
    return Stopwatch(device)


@functools.cache
def peaks_of(device: str, num_threads: int) -> dict[str, dict[str, float]]:
    """The machine's measured peaks by dtype."""
    stopwatch = stopwatch_of(device)
    return {str(dtype)[6:]: stopwatch.peaks(dtype) for dtype in (torch.bfloat16, torch.float32)}


def prepare(setting: Setting) -> dict[str, Any]:
    """On a CPU freed memory stays with the process, for all contenders alike: work is timed and not page faults."""
    torch.set_num_threads(setting.num_threads)
    if setting.device == "cpu":
        keep_freed_memory()
    setting.say("kernels: peaks of this machine: copy, matrix product")
    return {"peaks": peaks_of(setting.device, setting.num_threads), "num_threads": setting.num_threads}


def dtype_of(op: Op) -> torch.dtype:
    return torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]


def measure(item: Item, setting: Setting) -> Iterator[Row]:
    """One row: ok, void or failed."""
    op, case = OPS[item.what["op"]], item.what["case"]
    dtype = dtype_of(op)
    row: Row = {
        "key": item.key, "state": "ok", "reason": None, "op": op.name, "case": brief(case),
        "label": item.key, "dtype": str(dtype)[6:],
    }  # fmt: skip
    try:
        row |= _measured(op, case, dtype, item, setting)
    except FAILURES as error:
        row |= {"state": "failed", "reason": _text(error)}
    finally:
        _free(setting.device)
    yield row


def _measured(op: Op, case: Case, dtype: torch.dtype, item: Item, setting: Setting) -> dict[str, Any]:
    device = setting.device
    problem = problem_of(op, case, dtype, device)
    reason = mistake(op, case, dtype, device, problem.inputs)
    found: dict[str, Any] = {"backend": next((backend_of(x) for x in tensors_of(problem.inputs)), "torch")}
    contenders = contenders_of(op, is_compiled=item.what["is_compiled"])
    if reason is not None:
        entries = {c.name: _entry(c, "not measured", "burnish's results are wrong") for c in contenders}
        entries[BURNISH] |= {"state": "void", "reason": reason}
        return found | {"state": "void", "reason": reason, "contenders": entries}
    entries, runs = ready(contenders, problem, stopwatch_of(device))
    if BURNISH not in runs or REFERENCE not in runs:
        entry = entries[BURNISH if BURNISH not in runs else REFERENCE]
        reason = f"{entry['label']}: {entry['reason']}"
        return found | {"state": entry["state"], "reason": reason, "contenders": entries}
    limit_s = QUICK_ROUNDS_S if setting.is_quick else ROUNDS_S[device]
    start_s, start_others_s = time.perf_counter(), others_s()
    rounds = stopwatch_of(device).in_turn(
        runs, num_rounds=setting.num_rounds or NUM_ROUNDS, limit_s=float("inf") if setting.num_rounds else limit_s
    )
    found["others_cores"] = max(0.0, (others_s() - start_others_s) / (time.perf_counter() - start_s))
    counts = counted({name: copies[0] for name, copies in runs.items()})
    for name in runs:
        samples = [turn[name] for turn in rounds]
        entries[name] |= {"samples": samples, "time_s": quantiles(samples), **counts[name]}
    peaks = peaks_of(device, setting.num_threads)
    peak = peaks[str(dtype)[6:]] if str(dtype)[6:] in peaks else peaks["float32"]
    return found | {"contenders": entries} | ratios(entries, contenders) | roofline(op, case, peak, entries[BURNISH])


def ready(
    contenders: Sequence[Contender], problem: Problem, stopwatch: Stopwatch
) -> tuple[dict[str, dict[str, Any]], dict[str, list[Run]]]:
    """(state of every contender, the runs of those that can be timed: one for each copy of the inputs)."""
    device = stopwatch.device
    num_bytes = sum(tensor.nbytes for tensor in tensors_of(problem.inputs))
    copies = [problem, *(problem.copied() for _ in range(stopwatch.num_copies(num_bytes) - 1))]
    small = small_problem(problem.op, problem.case, problem.dtype, device)
    entries, runs = {}, {}
    for contender in contenders:
        missing = contender.reason(problem)
        if missing is not None:
            entries[contender.name] = _entry(contender, "not measured", missing)
            continue
        try:
            wrong = fault(contender, small)
            entries[contender.name] = _entry(contender, "ok" if wrong is None else "void", wrong)
            if wrong is None:
                made = [contender.make(copy) for copy in copies]
                warm_up(made)
                runs[contender.name] = made
        except Exception as error:
            # A compiler, or another library, may fail in any way.
            if contender.name in (BURNISH, REFERENCE) and not isinstance(error, FAILURES):
                raise
            entries[contender.name] = _entry(contender, "failed", _text(error))
            _free(device)
    return entries, runs


def warm_up(runs: Sequence[Run]) -> None:
    """Calls each once, and more often where that takes no time."""
    start_s = time.perf_counter()
    with warnings.catch_warnings():
        # Of compilers and other libraries, about their own code.
        warnings.simplefilter("ignore")
        for number in range(NUM_WARMUP):
            for run in runs:
                run()
            if number == 0 and time.perf_counter() - start_s > WARMUP_S:
                break


def _entry(contender: Contender, state: str, reason: str | None) -> dict[str, Any]:
    counts = dict.fromkeys(COUNTS)
    return {"label": contender.label, "state": state, "reason": reason, "samples": [], "time_s": None, **counts}


def counted(runs: Mapping[str, Run]) -> dict[str, dict[str, int | None]]:
    """Of every run. What is compiled runs past the dispatcher that is observed on a CPU, and past hooks anywhere."""
    plain_runs = {name: run for name, run in runs.items() if name != COMPILED}
    found: dict[str, dict[str, int | None]] = {name: dict.fromkeys(COUNTS) for name in runs}
    for name, counts in zip(plain_runs, all_counts(list(plain_runs.values())), strict=True):
        found[name] |= counts
    if COMPILED in runs and is_on_gpu(runs[COMPILED]):
        run = runs[COMPILED]
        found[COMPILED] |= {"peak_bytes": peak_bytes(run), "num_launches": num_launches(run)}
    return found


def ratios(entries: Mapping[str, dict[str, Any]], contenders: Sequence[Contender]) -> dict[str, Any]:
    """Times of the contenders over burnish's, and of all over the frozen products', in the same rounds."""
    samples = {name: entry["samples"] for name, entry in entries.items() if entry["samples"]}
    whole = [c.name for c in contenders if c.name in samples and c.is_whole]
    ratio = {name: paired_ratios(samples[name], samples[BURNISH]) for name in whole if name != BURNISH}
    over_frozen = None
    if FROZEN in samples:
        pairs = {name: paired_ratios(samples[name], samples[FROZEN]) for name in whole}
        over_frozen = {name: {key: pair[key] for key in ("q1", "median", "q3")} for name, pair in pairs.items()}
    return {"ratio": ratio, "over_frozen": over_frozen}


def roofline(op: Op, case: Case, peak: Mapping[str, float], entry: Mapping[str, Any]) -> dict[str, Any]:
    """The least time that the record's operations and bytes take at the machine's peaks, and its share of burnish's."""
    num_flops, num_bytes = (of(case) if of else None for of in (op.num_flops, op.num_bytes))
    pairs = (num_flops, peak["flops_per_s"]), (num_bytes, peak["bytes_per_s"])
    floor_s = max((amount / rate for amount, rate in pairs if amount), default=None)
    share = None if floor_s is None else floor_s / entry["time_s"]["median"]
    return {"num_flops": num_flops, "num_bytes": num_bytes, "floor_s": floor_s, "share_of_peak": share}


def _text(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


BENCHMARK = Benchmark(
    name="kernels",
    summary="every operation, forward and backward, against PyTorch and its peers",
    items=items,
    prepare=prepare,
    measure=measure,
    figures=figures,
    tables=tables,
)


def pytest_generate_tests(metafunc: Any) -> None:
    """One test for every contender of every item of the quick catalogue."""
    if "contender" not in metafunc.fixturenames:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pairs = [
        (item, contender)
        for item in items(device, Choice(is_quick=True))
        for contender in contenders_of(OPS[item.what["op"]], is_compiled=item.what["is_compiled"])
    ]
    names = [f"{item.key} · {contender.name}".replace(" · ", " | ") for item, contender in pairs]
    metafunc.parametrize(("item", "contender"), pairs, ids=names)


def test_contender(benchmark: Any, item: Item, contender: Contender) -> None:
    """Times one contender; skipped, with the reason, where it cannot run or its results are wrong."""
    op, case = OPS[item.what["op"]], item.what["case"]
    dtype, device = dtype_of(op), "cuda" if torch.cuda.is_available() else "cpu"
    problem, stopwatch = problem_of(op, case, dtype, device), stopwatch_of(device)
    wrong = mistake(op, case, dtype, device, problem.inputs) if contender.name == BURNISH else None
    if wrong is not None:
        raise SkipTest(f"void: {wrong}")
    entries, runs = ready([contender], problem, stopwatch)
    entry = entries[contender.name]
    if contender.name not in runs:
        raise SkipTest(f"{entry['state']}: {entry['reason']}")
    run = runs[contender.name][0]

    def call() -> None:
        run()
        stopwatch.finish()

    def chill() -> None:
        stopwatch.chill()
        stopwatch.finish()

    benchmark.group = item.key
    benchmark.pedantic(call, setup=chill, rounds=NUM_ROUNDS if device == "cuda" else 5, warmup_rounds=1)
    peaks = peaks_of(device, torch.get_num_threads())
    time_s = {"median": benchmark.stats.stats.median}
    peak = peaks[str(dtype)[6:]] if str(dtype)[6:] in peaks else peaks["float32"]
    figures = roofline(op, case, peak, {"time_s": time_s}) | counted({contender.name: run})[contender.name]
    benchmark.extra_info.update(figures | {"label": contender.label, "dtype": str(dtype)[6:], "device": device})
