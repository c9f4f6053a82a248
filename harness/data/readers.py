"""File formats -> raw rows. Each reader yields a Row per good row and a Rejected per bad one, and never stops at one.

Text is read as bytes and split at \\n only: U+2028 and friends inside a JSON string are not line ends.
"""

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from ..errors import DataError
from ..tasks import RowError
from .clean import Rejected, Row, check_row, parse_json

MAX_JSON_BYTES = 2**30
"""A JSON file is read whole; JSONL has no limit but data.max_row_bytes for every row."""
BOM = b"\xef\xbb\xbf"
Item = Row | Rejected
Reader = Callable[..., Iterator[Item]]
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)


def lines(file: IO[bytes], name: str, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """(number, line) split at \\n; None for a line above max_bytes, which is skipped without being held.

    Raises DataError where a compressed file is damaged.
    """
    number = 0
    try:
        while line := file.readline(max_bytes + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(BOM)
            if len(line) <= max_bytes or line.endswith(b"\n"):
                yield number, line
                continue
            while line and not line.endswith(b"\n"):
                line = file.readline(1 << 20)
            yield number, None
    except DAMAGED as error:
        raise DataError(f"{name} is damaged after line {number}: {error}") from None


def _too_large(name: str, number: int, max_bytes: int) -> Rejected:
    return Rejected("too_large", name, number, f"more than {max_bytes} bytes (data.max_row_bytes)")


def _decode(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise RowError("bad_encoding", f"byte {error.start} is not UTF-8") from None


def checked(values: Any, name: str, number: int, max_bytes: int) -> Item:
    """A Row, or a Rejected if `check_row` refuses it."""
    try:
        check_row(values, max_bytes=max_bytes)
    except RowError as error:
        return Rejected(error.kind, name, number, str(error))
    return Row(values, name, number)


def read_jsonl(file: IO[bytes], name: str, max_bytes: int) -> Iterator[Item]:
    """One object per line; blank lines are skipped."""
    for number, line in lines(file, name, max_bytes):
        if line is None:
            yield _too_large(name, number, max_bytes)
            continue
        if not line.strip():
            continue
        try:
            values = parse_json(_decode(line))
        except RowError as error:
            yield Rejected(error.kind, name, number, str(error))
            continue
        yield checked(values, name, number, max_bytes)


def read_json(file: IO[bytes], name: str, max_bytes: int) -> Iterator[Item]:
    """A list of objects, or {"data": [...]}; `line` is the number of the row. JSONL under this suffix is read as such.

    Raises DataError for a file that is not JSON: no single row can be blamed.
    """
    try:
        content = file.read(MAX_JSON_BYTES + 1)
    except DAMAGED as error:
        raise DataError(f"{name} is damaged: {error}") from None
    if len(content) > MAX_JSON_BYTES:
        raise DataError(f"{name} is larger than {MAX_JSON_BYTES // 2**20} MiB; make it JSONL, which is read row by row")
    try:
        document = parse_json(_decode(content.removeprefix(BOM)))
    except RowError as error:
        if error.kind == "bad_json" and str(error).startswith("Extra data"):
            yield from read_jsonl(io.BytesIO(content), name, max_bytes)
            return
        raise DataError(f"{name} is not JSON: {error}") from None
    rows = document.get("data") if isinstance(document, dict) else document
    if not isinstance(rows, list):
        raise DataError(f'{name} must hold a list of rows, or {{"data": [rows]}}')
    for number, values in enumerate(rows, 1):
        yield checked(values, name, number, max_bytes)


def read_csv(file: IO[bytes], name: str, max_bytes: int, *, delimiter: str = ",") -> Iterator[Item]:
    """Comma-separated values with a header line; every value is a text. Bad bytes reject their row only."""
    oversized: list[int] = []

    def texts() -> Iterator[str]:
        for number, line in lines(file, name, max_bytes):
            if line is None:
                oversized.append(number)
            yield "\n" if line is None else line.decode(errors="surrogateescape")

    csv.field_size_limit(max_bytes)
    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    header = _next_record(reader)
    if not isinstance(header, list) or oversized:
        raise DataError(f"{name} has no header line with the names of its columns")
    if len(set(header)) < len(header):
        raise DataError(f"{name}: a column name occurs twice in the header: {', '.join(header)[:200]}")
    while True:
        first = reader.line_num + 1
        record = _next_record(reader)
        yield from (_too_large(name, number, max_bytes) for number in oversized)
        oversized.clear()
        if record is None:
            return
        if record:
            yield _csv_row(record, header, name=name, number=first, max_bytes=max_bytes)


def _next_record(reader: Any) -> list[str] | str | None:
    """The next record; a sentence if it is malformed; None at the end."""
    try:
        return next(reader, None)
    except csv.Error as error:
        return str(error)


def _csv_row(record: list[str] | str, header: list[str], *, name: str, number: int, max_bytes: int) -> Item:
    if isinstance(record, str):
        return Rejected("too_large" if "field limit" in record else "bad_csv", name, number, record)
    if len(record) != len(header):
        return Rejected("wrong_columns", name, number, f"{len(record)} values, the header has {len(header)}")
    if any("\udc80" <= character <= "\udcff" for value in record if not value.isascii() for character in value):
        return Rejected("bad_encoding", name, number, "bytes that are not UTF-8")
    return checked(dict(zip(header, record, strict=True)), name, number, max_bytes)


def read_tsv(file: IO[bytes], name: str, max_bytes: int) -> Iterator[Item]:
    """Tab-separated values with a header line."""
    return read_csv(file, name, max_bytes, delimiter="\t")


def read_text(file: IO[bytes], name: str, max_bytes: int) -> Iterator[Item]:
    """One row {text} per paragraph: lines up to the next blank one. `line` is the paragraph's first line."""
    paragraph: list[bytes] = []
    start, size = 1, 0
    for number, line in lines(file, name, max_bytes):
        if line is not None and line.strip():
            if not paragraph and not size:
                start = number
            size += len(line)
            if size <= max_bytes:
                paragraph.append(line)
            continue
        if line is None:
            start, size = (start if size else number), max_bytes + 1
            continue
        if size:
            yield _paragraph(paragraph, name, start, size=size, max_bytes=max_bytes)
        paragraph, size = [], 0
    if size:
        yield _paragraph(paragraph, name, start, size=size, max_bytes=max_bytes)


def _paragraph(parts: list[bytes], name: str, start: int, *, size: int, max_bytes: int) -> Item:
    if size > max_bytes:
        return _too_large(name, start, max_bytes)
    try:
        text = _decode(b"".join(parts)).strip()
    except RowError as error:
        return Rejected(error.kind, name, start, str(error))
    return checked({"text": text}, name, start, max_bytes)


def read_parquet(file: IO[bytes], name: str, max_bytes: int) -> Iterator[Item]:
    """Rows of a Parquet file; extension types are read as what they are stored as, so no code of theirs runs."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file, arrow_extensions_enabled=False)
        for batch in table.iter_batches(batch_size=256):
            columns = [getattr(column, "storage", column) for column in batch.columns]
            storage = pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)
            for values in storage.to_pylist():
                number += 1
                yield checked(values, name, number, max_bytes)
    except Exception as error:  # the types that other libraries register can raise anything
        raise DataError(f"{name} is no readable Parquet file (after row {number}): {str(error)[:200]}") from None


READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".txt": read_text,
    ".md": read_text,
}


def find_reader(name: str) -> tuple[Reader, bool] | None:
    """The reader for a file of that name and whether it is gzipped; None if it is no data file."""
    lower = name.lower()
    is_gzipped = lower.endswith(".gz")
    stem = lower.removesuffix(".gz")
    for suffix, reader in READERS.items():
        if stem.endswith(suffix):
            return reader, is_gzipped
    return None
