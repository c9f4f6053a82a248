"""Results as plain text for a terminal."""

from collections.abc import Sequence
from typing import Any

from ..harness.markup import size
from .benchmark import Table

BUSY = 0.1
"""Cores that others may use before the table warns."""


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def as_text(table: Table) -> str:
    """The table for a terminal: title, columns, notes."""
    body = aligned([list(table.head), *map(list, table.rows)])
    return "\n".join([table.title, "", body, *(["", *table.notes] if table.notes else [])])


def as_markdown(table: Table) -> str:
    """The table for a document, without its title; the notes are a list under it."""
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    body = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
    return "\n\n".join([body, "\n".join(f"* {note}" for note in table.notes)] if table.notes else [body])


def doubts(result: dict[str, Any]) -> list[str]:
    """What to hold against the figures."""
    found = []
    if result["others_cores"] > BUSY:
        found.append(
            f"other processes used {result['others_cores']:.2f} cores meanwhile: "
            "the times are too long and the ratios uncertain"
        )
    if result["is_interrupted"]:
        found.append("interrupted: not all that was asked for")
    return found


def kernel_table(result: dict[str, Any]) -> str:
    """The rows of a kernel benchmark, and how they were measured."""
    head = ("operation", "ms", "quartiles", "x reference", "x compiled", "of peak", "saved", "reference saves")
    rows, notes = [head], []
    for row in result["rows"]:
        name = f"{row['op']} {row['case']}"
        if row["state"] != "ok":
            rows.append((name, row["state"], *[""] * 6))
            notes.append(f"{name} is {row['state']}: {row['reason']}")
            continue
        time_s, ratio, share = row["time_s"]["burnish"], row["ratio"], row["share_of_peak"]
        rows.append(
            (
                name,
                f"{1000 * time_s['median']:.3f}",
                f"{1000 * time_s['q1']:.3f}-{1000 * time_s['q3']:.3f}",
                f"{ratio['reference']['median']:.2f}",
                f"{ratio['compiled']['median']:.2f}" if "compiled" in ratio else "-",
                f"{100 * share:.0f}%" if share is not None else "-",
                size(row["saved_bytes"]["burnish"]),
                size(row["saved_bytes"]["reference"]),
            )
        )
    peaks = "; ".join(
        f"{name} {peak['flops_per_s'] / 1e9:.0f} GFLOP/s, {peak['bytes_per_s'] / 1e9:.0f} GB/s"
        for name, peak in result["peaks"].items()
    )
    notes.append(f"forward and backward, {result['num_rounds']} times in turn, cold caches; peaks measured: {peaks}")
    return "\n".join([aligned(rows), "", *notes, *doubts(result)])
