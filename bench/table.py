"""Results as plain text for a terminal."""

from collections.abc import Sequence

from .benchmark import Table

SENTENCE = 30
"""Characters from which on a cell is a sentence."""


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns: the first and those of sentences to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 or width > SENTENCE else cell.rjust(width)
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
