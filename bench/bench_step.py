"""Whole training steps of several modes side by side, and whether they compute the same.

One fresh process per mode; those of a group are alive together and take one step each in turn, starting with another
one every round, so that a slow moment of the machine hits all alike. Ratios are of steps of the same round, and rounds
in which other processes kept the machine busy are left out and taken again. Before that a check: three steps of each
mode without dropout, from the same adapter on the same batch, must give the baseline's first loss and make it fall as
far. The losses in between say little: AdamW's first update is the sign of a gradient that bf16 rounds. A mode with
other losses is void: it is not timed.

On a GPU machine all processes of a configuration are started at once and import their libraries, the checks run as many
at a time as the configuration says, and the modes that are timed together keep only their weights between turns: each
turn takes an unmeasured step, a measured one, and gives its activations back (see `step_cases` for the bytes).
"""

from collections.abc import Iterator, Sequence
from typing import Any

from ..harness.markup import size
from . import errands
from .benchmark import BUSY, Benchmark, Choice, Figure, Item, Result, Row, Say, Setting, Table
from .pool import open_worker
from .step_cases import Case, case_and_mode, cases, check_names
from .step_rows import rows_of
from .step_run import measure_case
from .workload import Workload

HEAD = (
    *("mode", "ms/step", "quartiles", "tokens/s", "MFU", "x baseline", "quartiles"),
    *("burnish is faster by", "peak memory", "floor"),
)


def items(device: str, choice: Choice) -> list[Item]:
    """Raises ConfigError for options that make no configuration."""
    return [case.item() for case in cases(device, choice)]


def prepare(setting: Setting) -> dict[str, Any]:
    """The peaks of this machine, measured in a process of its own; without them there is no MFU."""
    setting.say("step: peaks of this machine: copy, matrix product")
    return {"peaks": peaks(setting)}


def peaks(setting: Setting) -> dict[str, dict[str, float]]:
    try:
        return errands.peaks(setting.device, setting.num_threads)
    except errands.ErrandFailed as failed:
        setting.say(f"no peaks: {failed}")
        return {}


def measure(item: Item, setting: Setting) -> Iterator[Row]:
    case = Case(**item.what)
    found = measure_case(
        case,
        device=setting.device,
        num_threads=setting.num_threads,
        num_rounds=setting.num_rounds,
        say=setting.say,
    )
    yield from rows_of(found, peaks=peaks(setting))
    if found.is_interrupted:
        raise KeyboardInterrupt


def figures(row: Row) -> list[Figure]:
    """The times over the baseline and of burnish over this mode, the time of a step, and its memory."""
    key, found = row["key"], []
    for name, what in (("ratio", "speed over the baseline's"), ("faster", "burnish is faster by")):
        if ratio := row.get(name):
            found.append(Figure(f"{key} · {what}", "ratio", ratio["median"], ratio["samples"], better="higher"))
    return [
        *found,
        Figure(f"{key} · time", "time", row["time_s"]["median"], row["times_s"], better="lower"),
        Figure(f"{key} · peak memory", "peak", row["peak_bytes"], [], better="lower"),
    ]


def tables(result: Result) -> list[Table]:
    """One for each configuration."""
    by_case: dict[str, list[Row]] = {}
    for row in result["rows"]:
        by_case.setdefault(case_and_mode(row["key"])[0], []).append(row)
    return [table(case, rows, result) for case, rows in by_case.items()]


def table(case: str, rows: Sequence[Row], result: Result) -> Table:
    cells = [cells_of(row) for row in rows]
    facts = next((row["facts"] for row in rows if "facts" in row), None)
    if facts is None:  # nothing of it was measured on this machine
        return Table(case, HEAD, cells)
    head = [title.replace("baseline", facts["baseline"]) for title in HEAD]
    reasons = [
        f"{row['mode']} is {row['state']}: {row['reason']}" for row in rows if row["state"] != "ok" and "mode" in row
    ]
    return Table(case, head, cells, [how(facts, rows, result), *disturbed(facts), *reasons, *doubts(facts)])


def cells_of(row: Row) -> list[str]:
    mode = case_and_mode(row["key"])[1]
    if row["state"] != "ok":
        return [mode, row["state"], *[""] * (len(HEAD) - 2)]
    time_s, ratio, faster = row["time_s"], row.get("ratio"), row.get("faster")
    return [
        mode,
        f"{1000 * time_s['median']:.0f}",
        f"{1000 * time_s['q1']:.0f}-{1000 * time_s['q3']:.0f}",
        f"{row['tokens_per_s']:.0f}",
        f"{100 * row['mfu']:.0f}%" if row["mfu"] is not None else "-",
        f"{ratio['median']:.2f}" if ratio else "-",
        f"{ratio['q1']:.2f}-{ratio['q3']:.2f}" if ratio else "-",
        f"{faster['median']:.2f}" if faster else "-",
        size(row["peak_bytes"]),
        size(row["floor_bytes"]),
    ]


def how(facts: dict[str, Any], rows: Sequence[Row], result: Result) -> str:
    work, machine = facts["workload"], result["environment"]
    num_steps = max((len(row.get("times_s", ())) for row in rows), default=0)
    if result["device"] == "cuda":
        where, memory = machine["gpu"], "peak memory: what tensors took of the GPU while training"
    else:
        where = f"{work['num_threads']} threads of {machine['cpu']}"
        memory = "peak memory: resident while training; floor: before the model is loaded"
    return (
        f"{work['num_sequences']}x{work['length']} tokens, LoRA rank {work['rank']} on every linear layer, up to "
        f"{num_steps} steps in turn, {where}; MFU: over the rate of a large bf16 matrix product here; {memory}"
    )


def disturbed(facts: dict[str, Any]) -> list[str]:
    if not (number := len(facts["rounds"]) - len(facts["counted_rounds"])):
        return []
    return [f"{number} of {len(facts['rounds'])} rounds were disturbed by other processes and left out"]


def doubts(facts: dict[str, Any]) -> list[str]:
    """What to hold against the figures."""
    found = []
    if facts["others_cores"] > BUSY:
        found.append(
            f"other processes used {facts['others_cores']:.2f} cores meanwhile: "
            "the times are too long and the ratios uncertain"
        )
    if facts["is_interrupted"]:
        found.append("interrupted: not all that was asked for")
    return found


def profile(mode: str, workload: Workload, *, num_warmup: int, num_rows: int, say: Say) -> dict[str, Any]:
    """Where the time of one step of a mode goes: {mode, time_s, plain_time_s, profile}. Raises WorkerDied."""
    check_names([mode])
    say(f"{mode}: load, {num_warmup} steps to warm up")
    with open_worker(mode, workload, is_profiled=True) as worker:
        times = [worker.step()["time_s"] for _ in range(num_warmup)]
        answer = worker.profile(num_rows)
    return {"mode": mode, "plain_time_s": times[-1], "time_s": answer["time_s"], "profile": answer["profile"]}


BENCHMARK = Benchmark(
    name="step",
    summary="whole training steps of several modes side by side",
    items=items,
    prepare=prepare,
    measure=measure,
    figures=figures,
    tables=tables,
)
