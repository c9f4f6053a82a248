"""What the page draws of several workers: the parts of a step, bytes on the wire, and the model of larger machines."""

from collections.abc import Sequence

from ..harness.markup import Markup, join, number, size, tag
from .benchmark import Result, Row
from .page_rows import grouped, is_ok, metric, seconds, span_of, spelled, value_at, why
from .plots import Bar, Curve, bars, linear, listed, logarithmic, points, roomier

SPLIT = (
    *(("compute_s", "compute", "copper"), ("communication_s", "communication", "blue")),
    *(("input_s", "input", "green"), ("other_s", "waiting, other", "grey")),
)
"""Part of a step's time -> its name and colour."""
STAGES = {0: "grey", 1: "violet", 2: "blue", 3: "copper"}
"""ZeRO stage -> colour."""


def scale(result: Result) -> Markup:
    """Where the time of a step goes, what goes over the wire, and what the model of larger machines says."""
    rows = [row for row in result["rows"] if row.get("kind") == "workers"]
    rows.sort(key=lambda row: (str(row.get("adapter")), layout(row), value_at(row, "num_workers") or 0.0))
    simulated = [row for row in result["rows"] if row.get("kind") == "simulation" and is_ok(row)]
    modelled = listed(*(simulation(str(model), some) for (model,), some in grouped(simulated, "model").items()))
    measured = listed(splits(rows), wire(rows))
    if not modelled:
        return measured
    title = tag("h3", "Larger machines: a model, not a measurement")
    return join(measured, title, tag("p", stated(simulated[0]), class_="soft"), modelled)


def splits(rows: Sequence[Row]) -> Markup:
    groups: dict[str, list[Bar]] = {}
    for some in grouped(rows, "zero_stage").values():
        for row in some:
            found = groups.setdefault(layout(row), [])
            name = workers(row)
            whole = value_at(row, "time_s", "median")
            if not is_ok(row) or whole is None:
                found.append(Bar(name, None, note=why(row)))
                continue
            parts = [(colour, value_at(row, "split", key) or 0.0) for key, _, colour in SPLIT]
            efficiency = value_at(row, "efficiency")
            note = f"efficiency {efficiency:.0%}" if efficiency is not None else ""
            bar = Bar(name, whole, seconds(whole), span=span_of(row["time_s"]), note=note, parts=parts)
            found.append(bar)
    drawn = [bar for found in groups.values() for bar in found]
    values = [x for bar in drawn for x in (bar.value or 0.0, sum(part for _, part in bar.parts), *(bar.span or ()))]
    axis = linear("seconds a step", values, number)
    keys = [(name, colour) for _, name, colour in SPLIT]
    lead = (
        "Parts: medians of steps whose collectives are waited for one by one; line: quartiles of undisturbed steps."
        " Efficiency: against one worker alone, steps of the same round."
    )
    return bars("Where the time of a step goes", list(groups.items()), axis, keys=keys, lead=lead)


def wire(rows: Sequence[Row]) -> Markup:
    groups: dict[str, list[Bar]] = {}
    for row in rows:
        sent, said = value_at(row, "wire_bytes"), value_at(row, "formula_bytes")
        if is_ok(row) and sent is not None and row.get("num_workers") != 1:
            note = f"formula {size(said)}" if said is not None else ""
            mark = None if said is None else said / 2**20
            bar = Bar(workers(row), sent / 2**20, size(sent), "blue", note=note, mark=mark)
            groups.setdefault(layout(row), []).append(bar)
    values = [x for found in groups.values() for bar in found for x in (bar.value, bar.mark) if x is not None]
    axis = linear("MiB a step and worker", values, number)
    return bars("Bytes on the wire", list(groups.items()), axis, lead="Bar: counted. Stroke: ZeRO's formula.")


def layout(row: Row) -> str:
    """ZeRO stage 2, LoRA."""
    adapter = {"lora": "LoRA"}.get(str(row.get("adapter")), row.get("adapter"))
    return f"ZeRO stage {row.get('zero_stage')}" + (f", {adapter}" if adapter else "")


def workers(row: Row) -> str:
    count = row.get("num_workers")
    return str(row["key"]) if count is None else f"{count} worker" + ("s" if count != 1 else "")


def simulation(model: str, rows: Sequence[Row]) -> Markup:
    """Efficiency against the number of GPUs, one curve for each ZeRO stage; what does not fit is a gap."""
    curves, unfit = [], []
    for (stage,), some in grouped(rows, "zero_stage").items():
        name, line = f"ZeRO {stage}", []
        for row in sorted(some, key=lambda row: value_at(row, "num_gpus") or 0.0):
            count, efficiency = value_at(row, "num_gpus"), value_at(row, "efficiency")
            fits = row.get("fits") is not False
            unfit += [] if fits or name in unfit else [name]
            if count and efficiency is not None:
                line.append((count, 100 * efficiency if fits else None))
        curves.append(Curve(name, line, STAGES.get(stage, "grey"), "marked", name))
    xs = [x for curve in curves for x, _ in curve.points]
    if not xs:
        return Markup("")
    x = roomier(logarithmic("GPUs", xs, number, base=2), 0.15)
    y = linear("efficiency, %", [100.0], number)
    keys = [(curve.name, curve.colour) for curve in curves]
    speed = value_at(rows[0], "flops_per_s")
    source = "measured" if rows[0].get("is_speed_measured") else "assumed"
    lead = f"Model: each GPU computes at {metric(speed)}FLOP/s ({source})." if speed is not None else "Model."
    lead += f" Where a curve is missing, it does not fit: {', '.join(unfit)}." if unfit else ""
    return points(
        f"Efficiency of {model}: model", x, y, curves=curves, keys=keys, lead=lead, width="half", kind="model"
    )


def stated(row: Row) -> str:
    """The machine that the model is of."""
    overlap = value_at(row, "overlap")
    hidden = f" {overlap:.0%} of the communication hides behind computing; the table has the bounds." if overlap else ""
    return f"Stated speeds: {spelled(row.get('hardware'))}.{hidden}"
