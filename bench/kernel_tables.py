"""The rows of the kernel benchmark as figures and as tables. No torch here."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..harness.markup import size
from .benchmark import BUSY, NOT_MEASURED, Figure, Kind, Result, Row, Table

BURNISH, REFERENCE, COMPILED, FROZEN = "burnish", "reference", "compiled", "frozen"
HEAD = (
    *("operation", "ms", "quartiles", "x ref", "x comp", "best peer", "x frozen", "of peak", "saves", "ref saves"),
    "launches",
)
NOTHING = "-"


def figures(row: Row) -> list[Figure]:
    """burnish against every contender and the frozen products; its time, bytes and launches."""
    if row["state"] != "ok":
        return []
    return list(_figures(row))


COUNTED: dict[str, tuple[str, Kind]] = {
    "saved_bytes": ("saved for backward", "bytes"),
    "peak_bytes": ("peak", "bytes"),
    "num_launches": ("launches", "count"),
}


def _figures(row: Row) -> Iterator[Figure]:
    """Launches are a figure on a GPU alone: on a CPU `kernels.product` chooses its column blocks by timing them."""
    own = row["contenders"][BURNISH]
    for name, ratio in row["ratio"].items():
        key = f"{row['key']} · times faster than {name}"
        yield Figure(key, "ratio", ratio["median"], ratio["samples"], "higher")
    if row["over_frozen"]:
        below = row["contenders"][FROZEN]["samples"]
        samples = [time_s / frozen_s for time_s, frozen_s in zip(own["samples"], below, strict=True)]
        yield Figure(
            f"{row['key']} · over the frozen products", "ratio", row["over_frozen"][BURNISH]["median"], samples, "lower"
        )
    yield Figure(f"{row['key']} · time", "time", own["time_s"]["median"], own["samples"], "lower")
    for name, (what, kind) in COUNTED.items():
        if own[name] is not None and (name != "num_launches" or row["backend"] == "triton"):
            yield Figure(f"{row['key']} · {what}", kind, own[name], (), "lower")


def tables(result: Result) -> list[Table]:
    """All operations; then the linears with every contender over the frozen products."""
    rows = result["rows"]
    found = [Table("Operations, forward and backward", HEAD, [times_of(row) for row in rows], notes(result))]
    linears = [row for row in rows if row["key"].startswith("lora_linear")]
    if linears:
        found.append(over_frozen(linears))
    return found


def times_of(row: Row) -> tuple[str, ...]:
    """One line: burnish's time, how much faster it is, and what it needs."""
    if row["state"] != "ok":
        return (row["key"], row["state"], *[""] * (len(HEAD) - 2))
    entries, ratio = row["contenders"], row["ratio"]
    time_s, share, over = entries[BURNISH]["time_s"], row["share_of_peak"], row["over_frozen"]
    return (
        row["key"],
        milliseconds(time_s["median"]),
        f"{milliseconds(time_s['q1'])}-{milliseconds(time_s['q3'])}",
        times(ratio.get(REFERENCE)),
        times(ratio.get(COMPILED)),
        best_peer(ratio),
        times(over and over[BURNISH]),
        NOTHING if share is None else f"{100 * share:.0f}%",
        size(entries[BURNISH]["saved_bytes"]),
        size(entries[REFERENCE]["saved_bytes"]),
        str(entries[BURNISH]["num_launches"]),
    )


def best_peer(ratio: Mapping[str, Any]) -> str:
    """The fastest of all but PyTorch's own: its name, and its time over burnish's."""
    peers = {name: found["median"] for name, found in ratio.items() if name not in (REFERENCE, COMPILED)}
    if not peers:
        return NOTHING
    name = min(peers, key=lambda peer: peers[peer])
    return f"{name.removesuffix('-scheme')} {peers[name]:.2f}"


def over_frozen(rows: Sequence[Row]) -> Table:
    """A line for every case, a column for every contender that was measured on one."""
    labels = {BURNISH: BURNISH}
    for row in rows:
        labels |= {name: row["contenders"][name]["label"] for name in row.get("over_frozen") or {}}
    lines = []
    for row in rows:
        over = row.get("over_frozen") if row["state"] == "ok" else None
        cells = [times(over.get(name)) for name in labels] if over else [row["state"], *[""] * (len(labels) - 1)]
        lines.append((row["key"].removeprefix("lora_linear · "), *cells))
    told = ["time of forward and backward over that of the frozen products alone, in the same rounds"]
    told += [f"{name}: {label}" for name, label in labels.items() if name != label]
    return Table("Linears with adapters, over their frozen products", ("linears", *labels), lines, told)


def notes(result: Result) -> list[str]:
    """How it was measured, what the columns are, and what is missing."""
    found = [
        "ms: burnish's; x ref, x comp: the time of the operation in plain and in compiled PyTorch over burnish's",
        "x comp: measured in full runs, for the first case of an operation",
        "best peer: the fastest other contender, and its time over burnish's",
        "x frozen: burnish over the frozen products alone; of peak: the least time that the operation's bytes and "
        "products take on this machine, over burnish's",
        "saves: bytes kept for backward; launches: operations that burnish starts, views not counted",
    ]
    rounds = [len(row["contenders"][BURNISH]["samples"]) for row in result["rows"] if row["state"] == "ok"]
    if rounds:
        peaks = "; ".join(
            f"{name} {peak['flops_per_s'] / 1e9:.0f} GFLOP/s, {peak['bytes_per_s'] / 1e9:.0f} GB/s"
            for name, peak in result["peaks"].items()
        )
        count = str(rounds[0]) if len(set(rounds)) == 1 else f"{min(rounds)} to {max(rounds)}"
        found.append(f"{count} rounds in turn, cold caches; peaks measured: {peaks}")
    found += list(dict.fromkeys(_doubts(result["rows"])))
    if result.get("is_interrupted"):
        found.append("interrupted: not all that was asked for")
    return found


def _doubts(rows: Sequence[Row]) -> Iterator[str]:
    """Rows and contenders without figures, each reason once; rows that other processes disturbed."""
    for row in rows:
        if row["state"] not in ("ok", NOT_MEASURED):
            yield f"{row['key']} is {row['state']}: {row['reason']}"
        for name, entry in (row.get("contenders") or {}).items() if row["state"] == "ok" else ():
            if entry["state"] == NOT_MEASURED:
                yield f"{name} in {row['op']}: not measured: {entry['reason']}"
            elif entry["state"] != "ok":
                yield f"{name} in {row['key']} is {entry['state']}: {entry['reason']}"
    measured = [row["others_cores"] for row in rows if "others_cores" in row]
    if disturbed := [cores for cores in measured if cores > BUSY]:
        yield (
            f"other processes used up to {max(disturbed):.2f} cores in {len(disturbed)} of {len(measured)} rows: their "
            "times are too long and their ratios uncertain"
        )


def times(value: Mapping[str, float] | None) -> str:
    return NOTHING if not value else f"{value['median']:.2f}"


def milliseconds(time_s: float) -> str:
    """Three digits that mean something."""
    value = 1000 * time_s
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"
