"""The tables of the benchmark of the planner. Imports no torch."""

from ..harness.markup import size
from .benchmark import Result, Row, Table

HEAD = ("configuration", "predicted", "measured", "error", "predicted of the step, by part")
PHASES = ("load", "step", "evaluation", "save")
PEAK = "peak_bytes"
NOTE = {
    "cpu": "Measured: most resident memory of any rank in two steps, each rank a fresh process, less what it has with "
    "its libraries imported and no weight loaded (about 0.5 GiB). Pages of mapped files count where they are resident.",
    "cuda": "Measured: most that torch's allocator has given out in two steps, without the CUDA context.",
}
MIN_SHARE = 0.02
"""Of the peak, below which a part is left out of the table."""


def tables(result: Result) -> list[Table]:
    """The peaks of the runs, and of their phases: on a CPU none has less than those before it."""
    rows = [row for row in result["rows"] if row["state"] == "ok"]
    cells = [
        (
            label(row),
            *(size(row[side][PEAK]) for side in ("predicted", "measured")),
            error(row["predicted"][PEAK], row["measured"][PEAK]),
            parts(row),
        )
        for row in rows
    ]
    others = [
        (label(row), *(text for name in PHASES for text in (*pair(row, name), error_of(row, name)))) for row in rows
    ]
    head = ("configuration", *(text for name in PHASES for text in (f"{name}: predicted", "measured", "error")))
    lost = [f"{row['key']}: {row['reason']}" for row in result["rows"] if row["state"] in ("failed", "void")]
    notes = [summary(rows), NOTE[result["device"]], *lost] if rows else lost
    found = [Table("Peak of a run", HEAD, cells, notes), Table("Peaks of its phases", head, others)]
    return [table for table in found if table.rows]


def label(row: Row) -> str:
    return str(row["key"]).removeprefix("plan · ")


def pair(row: Row, phase: str) -> tuple[str, str]:
    return size(row["predicted"]["phases"][phase]), size(row["measured"]["phases"][phase])


def error_of(row: Row, phase: str) -> str:
    return error(row["predicted"]["phases"][phase], row["measured"]["phases"][phase])


def error(predicted: int, measured: int) -> str:
    """How much more was predicted than measured."""
    return f"{100 * (predicted / measured - 1):+.1f} %" if measured > 0 else "–"


def parts(row: Row) -> str:
    """The parts of the predicted step, largest first."""
    found = row["predicted"]["device"]
    total = sum(found.values())
    shown = sorted((one for one in found.items() if one[1] >= MIN_SHARE * total), key=lambda one: -one[1])
    return ", ".join(f"{name.replace('_', ' ')} {size(value)}" for name, value in shown)


def summary(rows: list[Row]) -> str:
    """How many are within a tenth, and the extremes."""
    errors = [row["predicted"][PEAK] / row["measured"][PEAK] - 1 for row in rows]
    near = sum(abs(one) <= 0.1 for one in errors)
    return (
        f"{near} of {len(errors)} predictions are within 10 % of what was measured; the lowest is "
        f"{100 * min(errors):+.1f} %, the highest {100 * max(errors):+.1f} %."
    )
