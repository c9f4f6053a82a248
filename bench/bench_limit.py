"""The smallest limit of memory under which a training run completes: its process, all of it, in a cgroup without swap.

Everything counts that a user's process holds: libraries, loading, training, saving. A limit is found by bisection:
there the run completes with the losses of the others, and under one that is smaller by RESOLUTION it does not. The
files of the model are dropped from the page cache before every run: pages that others have read cost nothing.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..harness.errors import ConfigError
from ..harness.markup import duration, number, size
from ..harness.run_dir import read_json, read_jsonl
from .benchmark import Benchmark, Figure, Item, Result, Row, Setting, Table
from .cgroup import Ended, forget_pages, missing, run_limited
from .limit_cases import MODELS, OWN, PEER, SMALLEST, Case, items, search_key, write_run
from .memory_cases import GIB, MIB, SEPARATOR, params_of
from .probes import available_bytes

RESOLUTION = 0.03
MAX_SHARE = 0.9
"""Of the memory at hand: the limit of the first run."""
MAX_PROBES = 18
MIN_LIMIT_BYTES = 64 * MIB
SEARCH_STEPS = 2
"""Of a run in a search: the second step has all that later ones have. All steps are taken under the limit found."""
MAX_CONFIRMATIONS = 4
SLOWER = 4.0
"""A run that takes so much longer than the first one reads the same pages again and again: it counts as not fitting."""
MIN_TIMEOUT_S, FITS_TIMEOUT_S = 120.0, 3600.0
LOSS_TOLERANCE = 0.02
"""Relative, of every step: two ways to compute in bf16 part by about 0.5 % (measured) in ten steps."""
MODELS_FOLDER = Path("runs/bench/models")
SIGKILL = 9


@dataclass(frozen=True)
class Probe:
    """One run under a limit."""

    limit_bytes: int
    state: str
    """completed, killed, too slow, or failed (with the last of its output as the reason)."""
    peak_bytes: int
    peak_own_bytes: int
    time_s: float
    num_killed: int
    losses: list[float] = field(default_factory=list)
    reason: str | None = None


def prepare(_setting: Setting) -> dict[str, Any]:
    """Raises ConfigError where no cgroup can be made."""
    if (why := missing()) is not None:
        raise ConfigError(why)
    return {"resolution": RESOLUTION, "loss_tolerance": LOSS_TOLERANCE}


def measure(item: Item, setting: Setting) -> Iterator[Row]:
    """One row for each case; the losses of the first are those that the others must have."""
    from .limit_models import checkpoint

    cases = [Case(**fields) for fields in item.what["cases"]]
    setting.say(f"  {cases[0].model}: {number(params_of(MODELS[cases[0].model]))} random weights in {MODELS_FOLDER}")
    model = checkpoint(cases[0].model, MODELS_FOLDER.absolute())
    expected: list[float] = []
    before = {row["key"]: row for row in item.before}
    for case in cases:
        made = before.get(case.key) or row(case, found(case, model, setting), expected)
        expected = expected or (made["losses"] or [])
        yield made


def found(case: Case, model: Path, setting: Setting) -> list[Probe]:
    """The runs of a case: one under its own limit, or all of a search."""
    generous = int(MAX_SHARE * available_bytes("cpu"))
    if case.limit_bytes is not None:
        if case.limit_bytes > generous:
            reason = f"{size(available_bytes('cpu'))} are free here"
            return [Probe(case.limit_bytes, "not tried", 0, 0, 0.0, 0, reason=reason)]
        return [told(case, tried(case, case.limit_bytes, model, setting, timeout_s=FITS_TIMEOUT_S), setting)]
    short = replace(case, num_steps=min(case.num_steps, SEARCH_STEPS))
    probes = [told(case, tried(short, generous, model, setting, timeout_s=FITS_TIMEOUT_S), setting)]
    timeout_s = max(MIN_TIMEOUT_S, SLOWER * probes[0].time_s)
    while (limit := next_limit(probes)) is not None:
        probes.append(told(case, tried(short, limit, model, setting, timeout_s=timeout_s), setting))
    return probes + confirmed(case, probes, model, setting, timeout_s=timeout_s * case.num_steps / short.num_steps)


def confirmed(case: Case, probes: Sequence[Probe], model: Path, setting: Setting, *, timeout_s: float) -> list[Probe]:
    """All steps under the limit that was found, or under the next larger ones until they complete."""
    _, limit = bracket(probes)
    found: list[Probe] = []
    while limit is not None and len(found) < MAX_CONFIRMATIONS:
        found.append(told(case, tried(case, limit, model, setting, timeout_s=timeout_s), setting))
        limit = None if found[-1].state == "completed" else int((1 + RESOLUTION) * limit)
    return found


def bracket(probes: Sequence[Probe]) -> tuple[int, int | None]:
    """The largest limit under which a run did not complete (0: none), and the smallest above it under which one did."""
    failed = max((probe.limit_bytes for probe in probes if probe.state != "completed"), default=0)
    done = [probe.limit_bytes for probe in probes if probe.state == "completed" and probe.limit_bytes > failed]
    return failed, min(done, default=None)


def next_limit(probes: Sequence[Probe]) -> int | None:
    """The limit to try next; None when the bracket is narrow, nothing completes, or it has been enough.

    Downwards first: just above what the last run held, then in growing strides, for a run may adapt to its limit.
    """
    low, high = bracket(probes)
    if high is None or len(probes) >= MAX_PROBES or high <= MIN_LIMIT_BYTES:
        return None
    if low == 0:
        last = min((probe for probe in probes if probe.state == "completed"), key=lambda probe: probe.limit_bytes)
        stride = max(0.5, 1 - RESOLUTION * 2 ** (len(probes) - 2)) if len(probes) > 1 else 1.0
        return min(int(1.01 * last.peak_own_bytes), int(stride * high), int(high / (1 + RESOLUTION)))
    if high <= (1 + RESOLUTION) * low:
        return None
    return int((low * high) ** 0.5)


def tried(case: Case, limit_bytes: int, model: Path, setting: Setting, *, timeout_s: float) -> Probe:
    """One run in a folder of its own, removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="limit-", dir=model.parent))
    try:
        arguments = write_run(case, model=model, folder=folder, num_threads=setting.num_threads)
        forget_pages(model)
        ended = run_limited([sys.executable, *arguments], limit_bytes=limit_bytes, timeout_s=timeout_s, cwd=folder)
        return probe(ended, limit_bytes, losses_in(folder, case), num_steps=case.num_steps)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def losses_in(folder: Path, case: Case) -> list[float]:
    if case.mode != OWN:
        return list(read_json(folder / "losses.json", []))
    records = read_jsonl(folder / "runs" / "limit" / "metrics.jsonl")
    return [record["loss"] for record in records if record["kind"] == "train"]


def probe(ended: Ended, limit_bytes: int, losses: list[float], *, num_steps: int) -> Probe:
    """A run that ended well and took all its steps completed, also if it gave up something on the way."""
    if ended.is_out_of_time:
        state = "too slow"
    elif ended.exit_code == 0 and len(losses) == num_steps:
        state = "completed"
    else:
        state = "killed" if ended.num_killed else "failed"
    lines = ended.output.strip().splitlines()
    return Probe(
        limit_bytes=limit_bytes,
        state=state,
        peak_bytes=ended.peak_bytes,
        peak_own_bytes=ended.peak_own_bytes,
        time_s=ended.time_s,
        num_killed=ended.num_killed,
        losses=losses,
        reason=None if state == "completed" or not lines else lines[-1][-500:],
    )


def told(case: Case, made: Probe, setting: Setting) -> Probe:
    own = f"{size(made.peak_own_bytes)} of its own"
    why = f" ({made.reason})" if made.state == "failed" else ""
    setting.say(f"  {case.mode}, {size(made.limit_bytes)}: {made.state}{why}, {own}, {duration(made.time_s)}")
    return made


def row(case: Case, probes: Sequence[Probe], expected: Sequence[float]) -> Row:
    """The answer with its runs. Losses that are not the first case's make it void."""
    low, high = bracket(probes)
    done = [probe for probe in probes if probe.state == "completed"]
    whole = [probe for probe in done if len(probe.losses) == case.num_steps and probe.limit_bytes == high]
    best = whole[-1] if whole else None
    difference = max(
        (abs(a / b - 1) for probe in done for a, b in zip(probe.losses, expected, strict=False)), default=0
    )
    state, reason = "ok", None
    if case.limit_bytes is not None and probes[0].state == "not tried":
        state, reason = "not measured", probes[0].reason
    elif best is None and case.limit_bytes is None:
        state, reason = "failed", probes[0].reason or probes[0].state
    elif difference > LOSS_TOLERANCE:
        state, reason = "void", f"losses differ from those of {PEER} by {difference:.2g}"
    return {
        "key": case.key,
        "state": state,
        "reason": reason,
        **asdict(case),
        "params": params_of(MODELS[case.model]),
        "limit_bytes": case.limit_bytes,
        "smallest_limit_bytes": high if best else None,
        "largest_failed_bytes": low or None,
        "is_exact": high is not None and high <= (1 + RESOLUTION) ** 2 * low,
        "peak_own_bytes": best.peak_own_bytes if best else None,
        "losses": best.losses if best else None,
        "loss_difference": difference if expected else None,
        "probes": [asdict(probe) for probe in probes],
    }


def figures(row: Row) -> list[Figure]:
    if row["smallest_limit_bytes"] is None or row["limit_bytes"] is not None:
        return []
    return [Figure(f"{row['key']}{SEPARATOR}bytes", "bytes", row["smallest_limit_bytes"], (), "lower")]


def tables(result: Result) -> list[Table]:
    """The searches, with the ratio to the peer's, and the cases that ask whether a limit is enough."""
    searched = [row for row in result["rows"] if row["key"].startswith(SMALLEST)]
    others = [row for row in result["rows"] if row not in searched]
    cells = []
    for row in searched:
        _, model, method, mode = row["key"].split(SEPARATOR)
        shown = gib(row.get("smallest_limit_bytes")) if row["state"] == "ok" else row["state"]
        peers_key = search_key(model, method, PEER)
        peer: Row = next((one for one in searched if one["key"] == peers_key), {})
        ratio = "–"
        if row["state"] == peer.get("state") == "ok":
            ratio = f"{row['smallest_limit_bytes'] / peer['smallest_limit_bytes']:.2f}"
        own = gib(row.get("peak_own_bytes"))
        cells.append((mode, model, method, shown, gib(row.get("largest_failed_bytes")), own, ratio))
    head = ("mode", "model", "method", "completes in", "not in", "its own bytes", "ratio")
    notes = [f"A memory cgroup without swap around the whole process; bisection to {result['resolution']:.0%}."]
    notes += [f"{row['key']}: {row['reason']}" for row in result["rows"] if row.get("reason")]
    found = [Table("Smallest limit of memory", head, cells, notes)] if cells else []
    if others:
        lines = []
        for row in others:
            _, model, method, mode = row["key"].split(SEPARATOR)
            is_done = row.get("smallest_limit_bytes") is not None
            shown = ("yes" if is_done else "no") if row["state"] == "ok" else row["state"]
            lines.append((mode, model, method, gib(row.get("limit_bytes")), shown, gib(row.get("peak_own_bytes"))))
        found.append(Table("Does it fit", ("mode", "model", "method", "limit", "completes", "its own bytes"), lines))
    return found


def gib(num_bytes: int | None) -> str:
    return "–" if num_bytes is None else f"{num_bytes / GIB:.2f} GiB"


BENCHMARK = Benchmark(
    name="limit",
    summary="the smallest limit of memory under which a run completes",
    items=items,
    prepare=prepare,
    measure=measure,
    figures=figures,
    tables=tables,
)
