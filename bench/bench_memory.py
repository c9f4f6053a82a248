"""What fits a budget of memory: the longest sequence and the largest model that each method takes a step with.

A step has one sequence. Its peak is what the process has at most in its steps, less what it has when all libraries are
imported and no weight is loaded: those take half a gigabyte with every method, and what is asked for is what the method
decides. On a GPU it is the peak of torch's allocator, without the CUDA context, and budgets are decimal GB: a card sold
as 24 GB has 24 GiB, and the difference is room for the context. Loading may have had a higher peak; it does not count.

On a CPU every probe is a fresh process: in one that has taken longer steps before, peaks are 3 to 5 % higher (measured
with SmolLM2-135M), because freed memory is not all given back. On a GPU one process takes steps of all lengths.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..harness.plan import make_plan
from ..harness.run_dir import write_json
from ..launch.estimate import estimate
from . import memory_tables, published
from .benchmark import NOT_MEASURED, Benchmark, Figure, Item, Row, Setting
from .fit import Answer, Curve, Measure, Probe, known, search
from .memory_cases import COMMON_TOKENS, INITS, LADDERS, SEPARATOR, Init, items, params_of
from .modes import MODES
from .probes import LOADING_BYTES_PER_WEIGHT, available_bytes, host, in_fresh_processes, in_one_process, refusal
from .workload import Workload

LENGTH_STEP = {"cpu": 32, "cuda": 64}
"""Tokens: lengths are multiples of it."""
RESOLUTION = {"cpu": 0.02, "cuda": 0.01}
"""A length that is so much longer, or longer by one step, does not fit; in a quick run it is QUICK_RESOLUTION."""
QUICK_RESOLUTION = 0.15
STEP_LIMIT_S = {("cpu", True): 10.0, ("cpu", False): 20.0, ("cuda", True): 5.0, ("cuda", False): 25.0}
"""Device, is_quick -> the longest step that is tried: attention takes the square of the length."""
TWO_AT_ONCE_BYTES = 8 * 2**30
"""Memory at hand from which on two processes are probed at a time, each with half of the threads."""


@dataclass(frozen=True)
class Study:
    """One method and one question: the sizes it may try (tokens, or weights of the models) and a workload for each."""

    what: dict[str, Any]
    setting: Setting
    available_bytes: int
    num_at_once: int

    @property
    def is_length(self) -> bool:
        return bool(self.what["kind"] == "length")

    @property
    def inits(self) -> dict[int, Init]:
        """Weights -> the model's shape."""
        return {params_of(init): init for init in LADDERS[self.setting.device].values()}

    @property
    def sizes(self) -> list[int]:
        if not self.is_length:
            return list(self.inits)
        step, longest = LENGTH_STEP[self.setting.device], INITS[self.what["model"]]["max_position_embeddings"]
        return list(range(step, longest + 1, step))

    @property
    def share(self) -> float:
        """How near the answer must be to a size that does not fit."""
        return resolution(self.setting) if self.is_length else 0.0

    @property
    def first_sizes(self) -> list[int]:
        """Those that every method is probed at."""
        return list(COMMON_TOKENS[self.setting.device]) if self.is_length else self.sizes[:2]

    def workload(self, size: int) -> Workload:
        init = INITS[self.what["model"]] if self.is_length else self.inits[size]
        return Workload(
            model={"init": init},
            num_sequences=1,
            length=size if self.is_length else self.what["tokens"],
            rank=self.what["rank"],
            num_threads=max(1, self.setting.num_threads // self.num_at_once),
            num_batches=4,
        )

    def loading_bytes(self, size: int) -> float:
        """What the host needs while the model is made; a GPU makes it itself."""
        if self.setting.device == "cuda":
            return 0.0
        return LOADING_BYTES_PER_WEIGHT * params_of(self.workload(size).model["init"])

    def probes(self) -> AbstractContextManager[Measure]:
        if self.is_length and self.setting.device == "cuda":
            return in_one_process(self.what["method"], self.workload(self.first_sizes[0]))
        return in_fresh_processes(self.what["method"], self.workload)


def prepare(setting: Setting) -> dict[str, Any]:
    free_bytes = available_bytes(setting.device)
    return {
        "available_bytes": free_bytes,
        "num_at_once": num_at_once(setting, free_bytes),
        "resolution": resolution(setting),
        "length_step": LENGTH_STEP[setting.device],
        "step_limit_s": STEP_LIMIT_S[setting.device, setting.is_quick],
    }


def resolution(setting: Setting) -> float:
    return QUICK_RESOLUTION if setting.is_quick else RESOLUTION[setting.device]


def num_at_once(setting: Setting, free_bytes: int) -> int:
    is_roomy = setting.device == "cpu" and setting.num_threads > 1 and free_bytes >= TWO_AT_ONCE_BYTES
    return 2 if is_roomy else 1


def measure(item: Item, setting: Setting) -> Iterator[Row]:
    """The rows of a method, by growing budget."""
    missing = MODES[item.what["method"]].missing()
    if missing:
        reason = f"{', '.join(missing)} is not installed"
        yield from ({"key": key, "state": NOT_MEASURED, "reason": reason} for key in item.rows)
        return
    free_bytes = available_bytes(setting.device)
    study = Study(dict(item.what), setting, free_bytes, num_at_once(setting, free_bytes))
    curve: Curve = {}
    answers: dict[str, Answer] = {}
    try:
        find(study, dict(zip(item.rows, study.what["budgets"], strict=True)), curve, answers)
    except KeyboardInterrupt:
        yield from rows(study, curve, answers)
        raise
    yield from rows(study, curve, answers)


def find(study: Study, budgets: dict[str, int], curve: Curve, answers: dict[str, Answer]) -> None:
    """Fills the curve with probes and the answers for the budgets; both hold what there is if it is interrupted."""
    refuse = refusal(
        curve,
        available_bytes=study.available_bytes,
        num_at_once=study.num_at_once,
        limit_s=STEP_LIMIT_S[study.setting.device, study.setting.is_quick],
        loading_bytes=study.loading_bytes,
    )
    with study.probes() as probe:

        def told(sizes: Sequence[int]) -> Sequence[Probe]:
            for one in (found := probe(sizes)):
                study.setting.say(f"  {line(study, one)}")
            return found

        first = study.first_sizes
        for start in range(0, len(first), study.num_at_once):
            wanted = [size for size in first[start : start + study.num_at_once] if refuse(size) is None]
            curve |= {one.size: one for one in told(wanted)}
        for key, budget in budgets.items():
            if any(one.state == "failed" for one in curve.values()):
                answers[key] = known(study.sizes, budget, curve, share=study.share)
                continue
            answers[key] = search(
                study.sizes, budget, curve, told, refuse=refuse, share=study.share, at_once=study.num_at_once
            )


def line(study: Study, probe: Probe) -> str:
    """A probe for the progress of a run."""
    return f"{memory_tables.sized(study.what['kind'], probe.size)}: {memory_tables.outcome(probe)}"


def rows(study: Study, curve: Curve, answers: dict[str, Answer]) -> list[Row]:
    """A row for each answer, all with all probes; what is common to them stands in the first alone."""
    predicted = predictions(study, sorted(curve)) if answers else {}
    parts = sorted({name for found in predicted.values() for name in found} - {"total"})
    found: list[Row] = []
    for key, answer in answers.items():
        budget = study.what["budgets"][len(found)]
        is_known = answer.size is not None or answer.bound != "at least"
        row: Row = {
            "key": key,
            "state": "ok" if is_known else "failed",
            "reason": None if is_known else answer.reason,
            **{name: study.what[name] for name in ("kind", "method", "rank")},
            "label": study.what["method"],
            "summary": MODES[study.what["method"]].summary,
            "budget_bytes": budget,
            "bound": answer.bound,
            "bound_reason": answer.reason,
            "peak_bytes": None if answer.size is None else curve[answer.size].peak_bytes,
            "predicted_parts": parts,
        }
        shape = by_length if study.is_length else by_model
        found.append(row | shape(study, curve, answer, budget, predicted))
    if found and study.is_length:
        found[0]["common_tokens"] = list(study.first_sizes)
    return found


def by_length(study: Study, curve: Curve, answer: Answer, budget: int, predicted: dict[int, dict[str, int]]) -> Row:
    probes = [{"tokens": size} | fields(curve[size]) for size in sorted(curve)]
    return {
        "model": study.what["model"],
        "max_tokens": answer.size,
        "probes": probes,
        "predicted": [
            {"tokens": size, "predicted_bytes": parts["total"], "parts": parts} for size, parts in predicted.items()
        ],
        "published": published.as_fields(published.contexts(study.what["model"], study.what["method"], budget)),
    }


def by_model(study: Study, curve: Curve, answer: Answer, budget: int, predicted: dict[int, dict[str, int]]) -> Row:
    names = {params_of(init): name for name, init in LADDERS[study.setting.device].items()}
    probes = [
        {
            "model": names[size],
            "params": size,
            **fields(curve[size]),
            "predicted_bytes": predicted[size]["total"] if size in predicted else None,
        }
        for size in sorted(curve)
    ]
    return {
        "tokens": study.what["tokens"],
        "max_params": answer.size,
        "largest": None if answer.size is None else names[answer.size],
        "probes": probes,
    }


def fields(probe: Probe) -> dict[str, Any]:
    return {name: value for name, value in asdict(probe).items() if name != "size"}


def predictions(study: Study, sizes: Sequence[int]) -> dict[int, dict[str, int]]:
    """Size -> bytes by part and their total, as `burnish plan` gives them; none for other methods than burnish's.

    Where it gives the shortest and the longest sequence the same, it is not asked for those in between.
    """
    if not study.what["method"].startswith("burnish") or not sizes:
        return {}
    asked = {size: planned(study.what["method"], study.workload(size)) for size in {sizes[0], sizes[-1]}}
    if study.is_length and asked[sizes[0]] == asked[sizes[-1]]:
        return dict.fromkeys(sizes, asked[sizes[0]])
    return {size: asked.get(size) or planned(study.what["method"], study.workload(size)) for size in sizes}


def planned(method: str, workload: Workload) -> dict[str, int]:
    """The planner's bytes by part. It reads the model's shape from a folder, as it would with a model on disk."""
    options = MODES[method].options
    with tempfile.TemporaryDirectory(prefix="burnish-bench-") as folder:
        write_json(Path(folder) / "config.json", workload.model["init"])
        on_disk = Workload(**workload.to_dict() | {"model": {"path": folder}})
        memory = {"activation_checkpointing": options.get("checkpointing", "auto")}
        config = on_disk.config(method=options.get("method", "lora"), memory=memory)
        found = estimate(make_plan(config, host(), run_dir="", cwd=""), host())
    parts: dict[str, int] = found["state_bytes_per_worker"]
    return parts


def figures(row: Row) -> list[Figure]:
    """The peaks at the lengths that all methods share, and the longest if it is one and not a bound; or of each model.

    The largest model is no figure: from one to the next is a leap, which a peak near the budget takes or does not.
    """
    if row["kind"] == "model":
        peaks = {probe["model"]: probe["peak_bytes"] for probe in row["probes"] if probe["peak_bytes"] is not None}
        return [Figure(f"{row['key']}{SEPARATOR}peak of {name}", "peak", peaks[name], (), "lower") for name in peaks]
    found = [
        Figure(f"{row['key']}{SEPARATOR}peak at {probe['tokens']} tokens", "peak", probe["peak_bytes"], (), "lower")
        for probe in row["probes"]
        if probe.get("tokens") in row.get("common_tokens", ()) and probe["peak_bytes"] is not None
    ]
    if row["bound"] != "at least" and row["max_tokens"] is not None:
        found.append(Figure(f"{row['key']}{SEPARATOR}max_tokens", "count", row["max_tokens"], (), "higher"))
    return found


BENCHMARK = Benchmark(
    name="memory",
    summary="the longest sequence and the largest model that fit a budget of memory",
    items=items,
    prepare=prepare,
    measure=measure,
    figures=figures,
    tables=memory_tables.tables,
)
