"""The verb `bench`: measure, compare, verify, report. Imports no torch until something is measured.

Actions: `run` measures here; `compare` judges two results; `verify` checks the documents against the committed results
and re-measures them; `report` and `docs` write the page and the documents; `profile` shows where a step's time goes.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ..bench import record, runner, suite
from ..bench.benchmark import Benchmark, Choice, Result, Say, Setting
from ..bench.table import as_text
from ..bench.workload import DEFAULT_BATCH, DEFAULT_MODEL, Workload, model_named, parse_batch
from ..harness.errors import ConfigError, TrainingError
from .commands import Answer
from .interrupt import Interrupts
from .resources import has_gpu_driver, num_cpus

DEFAULT_FOLDER = Path("runs/bench")
DEFAULT_TOLERANCE = 0.1
REPORT = "report.html"
NUM_WARMUP = 2
NUM_PROFILE_ROWS = 30
PARTS_OF_A_RUN = ("quick", "only", "modes", "baseline", "model", "batch", "seconds", "out")
"""Options that a recorded run is made without."""
EXIT_INTERRUPTED = 130
EXIT_WORSE = 6
"""A figure got worse, a result of burnish is wrong, or a document says what the results do not."""


def run(options: argparse.Namespace, progress: TextIO) -> Answer:
    """Runs one action; SIGTERM ends it as Ctrl-C does. Raises ConfigError, TrainingError."""

    def say(text: str) -> None:
        print(text, file=progress, flush=True)

    action = ACTIONS[options.action]
    for name in NAMES_OF_OPTIONS:
        if getattr(options, name) and name not in action.options:
            users = " and ".join(other for other, one in ACTIONS.items() if name in one.options)
            raise ConfigError(f"--{name.replace('_', '-')} is an option of burnish bench {users}")
    for name in ("rounds", "threads", "seconds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: at least 1")
    with Interrupts(say):
        return action.function(options, say)


def measure(options: argparse.Namespace, say: Say) -> Answer:
    """`run`: measures the named benchmarks (all without names), and writes their JSON and the page."""
    names = list(dict.fromkeys(options.names)) or list(suite.MODULES)
    benchmarks = [suite.benchmark(name) for name in names]
    choice = choice_of(options, benchmarks)
    setting = setting_of(options, say)
    if options.list:
        return listed(benchmarks, choice, setting.device)
    folder = folder_for(options)
    start, results = time.monotonic(), []
    for benchmark in benchmarks:
        limit_s = options.seconds - (time.monotonic() - start) if options.seconds else float("inf")
        path = folder / f"{benchmark.name}.json"
        result = runner.run(benchmark, setting, choice, path=path, limit_s=limit_s, is_resumed=options.resume)
        results.append(result)
        say("\n" + "\n\n".join(as_text(table) for table in benchmark.tables(result)) + "\n")
        if result["is_interrupted"]:
            break
    is_cut = results[-1]["is_interrupted"]
    lines = [str(folder / f"{result['benchmark']}.json") for result in results] + [str(write_page(folder))]
    if options.record:
        lines += recorded(results) if not is_cut else ["interrupted: nothing was kept in bench/results"]
    wrong = [row for result in results for row in result["rows"] if is_own(row) and row["state"] in ("void", "failed")]
    lines += [f"wrong or failed: {row['key']}: {row['reason']}" for row in wrong]
    return Answer(results, "\n".join(lines), EXIT_INTERRUPTED if is_cut else EXIT_WORSE if wrong else 0)


def choice_of(options: argparse.Namespace, benchmarks: Sequence[Benchmark]) -> Choice:
    for name in ("modes", "baseline", "model", "batch"):
        if getattr(options, name) and [one.name for one in benchmarks] != ["step"]:
            raise ConfigError(f"--{name} is an option of burnish bench run step")
    return Choice(
        is_quick=options.quick,
        only=tuple(options.only or ()),
        modes=tuple(options.modes.split(",")) if options.modes is not None else (),
        baseline=options.baseline,
        model=options.model,
        batch=options.batch,
    )


def setting_of(options: argparse.Namespace, say: Say) -> Setting:
    threads = num_cpus() if options.threads is None else options.threads
    return Setting(device_here(), threads, options.rounds, options.quick, say)


def device_here() -> str:
    if not has_gpu_driver():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def listed(benchmarks: Sequence[Benchmark], choice: Choice, device: str) -> Answer:
    """`run --list`: the keys of what would be measured."""
    found = {}
    for benchmark in benchmarks:
        items = runner.chosen(benchmark.items(device, choice), choice.only, name=benchmark.name)
        found[benchmark.name] = [item.key for item in items]
    return Answer(found, "\n".join(f"{name}: {key}" for name, keys in found.items() for key in keys))


def folder_for(options: argparse.Namespace) -> Path:
    """Where the results go, made; found wrong before minutes are spent."""
    if options.record:
        check_record(options)
    folder = Path(options.out) if options.out else DEFAULT_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error.strerror}") from None
    for file in folder.glob("*.json"):  # what cannot go into the page afterwards
        if not record.is_foreign(file):
            record.load(file)
    return folder


def check_record(options: argparse.Namespace) -> None:
    """Raises ConfigError where the run would be no whole one, or there are no documents to write."""
    from ..bench import document

    if given := [f"--{name}" for name in PARTS_OF_A_RUN if getattr(options, name)]:
        raise ConfigError(f"--record keeps a whole full run in bench/results: not with {' and '.join(given)}")
    for path in (document.DOCUMENT, document.README):
        document.text_of(path)


def recorded(results: Sequence[Result]) -> list[str]:
    """Writes results to bench/results/<hardware> and the documents anew; the paths.

    Only once all is measured: the commit in a result says whether any file differed from it.
    """
    from ..bench import document

    paths = []
    for result in results:
        path = record.RESULTS / result["hardware"] / f"{result['benchmark']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        record.save(path, result)
        paths.append(path)
    return [str(path) for path in [*paths, *document.write()]]


def is_own(row: dict[str, Any]) -> bool:
    """Whether the row is about burnish: a peer that fails is a finding, burnish failing is an error."""
    return str(row.get("mode") or row.get("method") or "burnish").startswith("burnish")


def write_page(folder: Path) -> Path:
    """The page of all results in the folder, beside them."""
    from ..bench import page

    page.write(record.load_all(folder), folder / REPORT)
    return folder / REPORT


def compare(options: argparse.Namespace, _say: Say) -> Answer:
    """`compare A B`: whether B is worse than A."""
    if len(options.names) != 2:
        raise ConfigError("burnish bench compare needs two results or folders: compare OLD NEW")
    tolerance = DEFAULT_TOLERANCE if options.tolerance is None else share(options.tolerance)
    before, after = (record.load_all(name) for name in options.names)
    from ..bench.compare import compare as judge
    from ..bench.compare import tables

    found = judge(before, after, tolerance=tolerance, with_times=options.times)
    text = "\n\n".join(as_text(table) for table in tables(found))
    return Answer(found.to_dict(), text, EXIT_WORSE if found.is_regression else 0)


def share(text: str) -> float:
    """`10%` or `0.1` -> 0.1."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 10:
        raise ConfigError(f"--tolerance {text!r}: give a share, for example 10% or 0.1")
    return value


def verify(options: argparse.Namespace, say: Say) -> Answer:
    """`verify [NAME…]`: documents against results, results against themselves, and (those named) measured again."""
    from ..bench.verify import tables
    from ..bench.verify import verify as check

    names = [suite.benchmark(name).name for name in options.names]
    if names and options.docs_only:
        raise ConfigError(f"burnish bench verify --docs-only measures nothing again, {', '.join(names)} neither")
    limit_s = float(options.seconds) if options.seconds else float("inf")
    found = check(setting_of(options, say), is_remeasured=not options.docs_only, names=names or None, limit_s=limit_s)
    text = "\n\n".join(as_text(table) for table in tables(found))
    return Answer(found.to_dict(), text, EXIT_WORSE if found.problems else 0)


def report(options: argparse.Namespace, _say: Say) -> Answer:
    """`report [FOLDER…]`: one page of results; without folders those of the last run, else the committed ones."""
    folders = [Path(name) for name in options.names]
    if not folders:
        has_own = DEFAULT_FOLDER.is_dir() and any(DEFAULT_FOLDER.glob("*.json"))
        folders = [DEFAULT_FOLDER] if has_own else sorted(path for path in record.RESULTS.iterdir() if path.is_dir())
    if not folders:
        raise ConfigError("there is no result yet; burnish bench run makes some")
    results = [result for folder in folders for result in record.load_all(folder)]
    from ..bench import page

    out = Path(options.out) if options.out else DEFAULT_FOLDER / REPORT
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        page.write(results, out)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}") from None
    return Answer({"report": str(out), "num_results": len(results)}, str(out))


def docs(options: argparse.Namespace, _say: Say) -> Answer:
    """`docs`: writes docs/benchmarks.md, docs/scaling.md and the figures of the README anew."""
    no_names(options)
    from ..bench import document

    paths = [str(path) for path in document.write()]
    return Answer({"written": paths}, "\n".join(paths))


def profile(options: argparse.Namespace, say: Say) -> Answer:
    """`profile MODE`: the operations that the time of one step goes to."""
    from ..bench.bench_step import profile as measure_profile
    from ..bench.pool import WorkerDied

    if len(options.names) != 1:
        raise ConfigError("burnish bench profile needs one mode, for example: profile burnish")
    mode, workload = options.names[0], workload_of(options)
    try:
        found = measure_profile(mode, workload, num_warmup=NUM_WARMUP, num_rows=NUM_PROFILE_ROWS, say=say)
    except WorkerDied as died:
        raise TrainingError(f"{mode}: {died}") from None
    times = (1000 * found["plain_time_s"], 1000 * found["time_s"])
    text = f"{found['profile']}\n{mode}: {times[0]:.0f} ms, with the profiler {times[1]:.0f} ms"
    return Answer(found | {"workload": workload.to_dict()}, text)


def workload_of(options: argparse.Namespace) -> Workload:
    num_sequences, length = parse_batch(options.batch or DEFAULT_BATCH)
    threads = num_cpus() if options.threads is None else options.threads
    model = model_named(options.model or DEFAULT_MODEL)
    return Workload(model=model, num_sequences=num_sequences, length=length, num_threads=threads)


def no_names(options: argparse.Namespace) -> None:
    if options.names:
        raise ConfigError(f"burnish bench {options.action} takes no {options.names[0]!r}")


@dataclass(frozen=True)
class Action:
    """One action and the options it takes."""

    function: Callable[[argparse.Namespace, Say], Answer]
    options: tuple[str, ...] = ()


STEP_OPTIONS = ("modes", "baseline", "model", "batch")
RUN_OPTIONS = ("rounds", "threads", "seconds", "out", "resume", "record")
ACTIONS = {
    "run": Action(measure, ("quick", "only", "list", *STEP_OPTIONS, *RUN_OPTIONS)),
    "compare": Action(compare, ("tolerance", "times")),
    "verify": Action(verify, ("docs_only", "rounds", "threads", "seconds")),
    "report": Action(report, ("out",)),
    "docs": Action(docs),
    "profile": Action(profile, ("model", "batch", "threads")),
}
NAMES_OF_OPTIONS = tuple(dict.fromkeys(name for action in ACTIONS.values() for name in action.options))
