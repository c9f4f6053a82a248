"""The tables of the scale benchmark. No torch here."""

from collections.abc import Sequence

from ..harness.markup import size
from .benchmark import BUSY, NOT_MEASURED, Result, Row, Table

WORKERS_HEAD = (
    *("layout", "ms/step", "quartiles", "compute", "communication", "model", "input", "waiting"),
    *("efficiency", "at most", "tokens/s", "checkpoint"),
)
WIRE_HEAD = (
    "layout",
    "ZeRO's formula",
    "collectives called",
    "as the backend runs them",
    "on the wire",
    "wire/formula",
)


def tables(result: Result) -> list[Table]:
    kinds = {kind: [row for row in result["rows"] if kind_of(row) == kind] for kind in ("workers", "compute")}
    kinds["workers"].sort(key=place)
    found = [workers_table(kinds["workers"], result), wire_table([row for row in kinds["workers"] if is_shared(row)])]
    found += [compute_table(kinds["compute"])] if kinds["compute"] else []
    found.append(simulation_table([row for row in result["rows"] if kind_of(row) == "simulation"]))
    return [table for table in found if table.rows]


def kind_of(row: Row) -> str:
    """Rows that were not measured have nothing but their key."""
    if "kind" in row:
        return str(row["kind"])
    if row["key"].startswith("model of"):
        return "simulation"
    return "compute" if " layers of " in row["key"] else "workers"


def place(row: Row) -> tuple[str, str, int]:
    """Full fine-tuning first, by ZeRO stage, then by the number of workers; from the key, which all rows have."""
    workers, stage, adapter = row["key"].split(", ")
    return adapter, stage, int(workers.split()[0])


def is_shared(row: Row) -> bool:
    return row["state"] == "ok" and row["num_workers"] > 1


def workers_table(rows: Sequence[Row], result: Result) -> Table:
    cells, notes = [], []
    for row in rows:
        if row["state"] != "ok":
            cells.append((row["key"], row["state"], *[""] * (len(WORKERS_HEAD) - 2)))
            if row["state"] != NOT_MEASURED:
                notes.append(f"{row['key']} is {row['state']}: {row['reason']}")
            continue
        time_s, split = row["time_s"], row["split"]
        limit = at_most(row, result)
        cells.append(
            (
                row["key"],
                ms(time_s["median"]),
                f"{ms(time_s['q1'])}-{ms(time_s['q3'])}",
                ms(split["compute_s"]),
                ms(split["communication_s"]),
                ms(row["model_calls_s"]),
                f"{1000 * split['input_s']:.1f}",
                ms(row["waiting_s"]),
                percent(row["efficiency"]),
                percent(limit),
                f"{row['tokens_per_s']:.0f}",
                f"{row['checkpoint_s']:.1f} s",
            )
        )
    busy = max((row["others_cores"] for row in rows if row["state"] == "ok"), default=0.0)
    if busy > BUSY:
        notes.append(f"other processes used up to {busy:.2f} cores meanwhile: the times are too long")
    return Table("Workers on this machine", WORKERS_HEAD, cells, [*notes, *workers_notes(rows, result)])


def at_most(row: Row, result: Result) -> float:
    """The efficiency that the number of cores allows."""
    if row["backend"] == "nccl":
        return 1.0
    return min(1.0, result["num_cores"] / (row["num_workers"] * row["num_threads"]))


def workers_notes(rows: Sequence[Row], result: Result) -> list[str]:
    row = next((row for row in rows if row["state"] == "ok"), None)
    if row is None:
        return []
    device = "GPU" if row["backend"] == "nccl" else f"thread of {result['environment']['cpu']}"
    return [
        f"weak scaling: {row['tokens_per_worker']} tokens for each worker, one {device} each, model {row['model']} "
        f"(random weights, bf16, full or LoRA), {row['backend']}; efficiency: time of one worker alone without "
        "DeepSpeed over that of all, steps of the same round; at most: what the cores allow",
        "compute, communication, input and waiting are of further steps, whose collectives are waited for one by one, "
        "so that nothing overlaps: means over the workers, medians over the steps; communication counts from when the "
        "last worker has come to a collective, waiting is the time before",
        "model: what a ring over the loopback interface, calibrated with two all-reduces, should take for the "
        "collectives called",
    ]


def wire_table(rows: Sequence[Row]) -> Table:
    cells = []
    for row in rows:
        wire, said = row["wire_bytes"], row["formula_bytes"]
        shown = (row["formula_bytes"], row["called_bytes"], row["backend_bytes"])
        ratio = f"{wire / said:.2f}" if wire is not None else "-"
        cells.append((row["key"], *map(size, shown), size(wire), ratio))
    return Table("Bytes sent by each worker in a step", WIRE_HEAD, cells, WIRE_NOTES if cells else ())


WIRE_NOTES = (
    "formula: arXiv 1910.02054 section 7 with ring factors (n-1)/n, gradients in fp32 (what burnish accumulates and "
    "DeepSpeed is told to communicate), weights in bf16: all-reduce of the gradients (stage 0), reduce-scatter of them "
    "and all-gather of the trained weights (1, 2), two all-gathers of all weights and a reduce-scatter (3)",
    "collectives called: counted where they pass PyTorch's dispatcher. DeepSpeed 0.19 all-reduces the buckets of stage "
    "1, and burnish has it do so in stage 2 between two CPU workers, where the formula has a reduce-scatter; with more "
    "workers stage 2 reduces each gradient to the worker that owns it. Stage 3 keeps weights from forward to backward "
    "that are used again within 50 million parameters (stage3_max_reuse_distance): here all of them, so that one "
    "all-gather is left out",
    "as the backend runs them: gloo's reduce-scatter is an all-reduce of which every rank keeps a part "
    "(ProcessGroupGloo.cpp)",
    "on the wire: counters of the loopback interface, with the headers of TCP, less what others send in that time; "
    "gloo's reduce sends more than a ring would (stage 2 with 4 workers)",
)


def compute_table(rows: Sequence[Row]) -> Table:
    cells = []
    for row in rows:
        if row["state"] != "ok":
            cells.append((row["key"], row["state"], "", ""))
            continue
        speed = f"{row['flops_per_s'] / 1e12:.0f} TFLOP/s"
        cells.append((row["key"], ms(row["time_s"]["median"]), f"{row['tokens_per_s']:.0f}", speed))
    return Table("Speed of one GPU, for the model below", ("model", "ms/step", "tokens/s", "computed"), cells)


def simulation_table(rows: Sequence[Row]) -> Table:
    """Efficiency by the number of GPUs, with its bounds; names and numbers from the keys, which all rows have."""
    lines: dict[str, dict[int, str]] = {}
    for row in rows:
        name, _, gpus = row["key"].removeprefix("model of ").rpartition(", ")
        lines.setdefault(name, {})[int(gpus.split()[0])] = simulated_cell(row)
    counts = sorted({n for line in lines.values() for n in line})
    head = ("model, not measured", *(f"{n} GPUs" for n in counts))
    cells = [(name, *(line.get(n, "") for n in counts)) for name, line in lines.items()]
    title = "Efficiency of larger machines: a model, not a measurement"
    return Table(title, head, cells, simulation_notes([row for row in rows if "hardware" in row]))


def simulated_cell(row: Row) -> str:
    if "fits" not in row:
        return str(row["state"])
    if not row["fits"]:
        return "does not fit"
    low, high = row["efficiency_bounds"]
    return f"{percent(row['efficiency'])} ({100 * low:.0f}-{percent(high)})"


def simulation_notes(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    row = rows[0]
    stated = row["hardware"]
    source = "as measured on this GPU" if row["is_speed_measured"] else "assumed"
    speeds = sorted({f"{other['flops_per_s'] / 1e12:.0f}" for other in rows})
    return [
        f"{stated['name']}: {row['tokens_per_gpu']} tokens a GPU and step in sequences of {row['length']}, computed at "
        f"{' and '.join(speeds)} TFLOP/s ({source}; peak {stated['peak_flops_per_s'] / 1e12:.0f}), one micro-batch, no "
        "recomputation, gradients in fp32, weights in bf16",
        f"links at {percent(row['link_share'])} of their speed: {stated['inside_bytes_per_s'] / 1e9:.0f} GB/s in a "
        f"node, {stated['between_bytes_per_s'] / 1e9:.0f} GB/s between; {1e6 * stated['inside_latency_s']:.0f} and "
        f"{1e6 * stated['between_latency_s']:.0f} µs a hop (assumed); a ring in the node, then a ring of the nodes",
        f"{percent(row['overlap'])} of the communication hides behind computing (assumed); in brackets: none, and all "
        "that can; efficiency is against one GPU that communicates nothing; optimizer and kernel launches are left out",
        f"does not fit: weights, gradients and moments need more than {stated['memory_bytes'] / 1e9:.0f} GB a GPU; "
        "activations are not counted",
    ]


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f}"


def percent(share: float) -> str:
    return f"{100 * share:.0f}%"
