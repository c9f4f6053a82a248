"""data.train and its siblings -> rows: finds the files of a Source, maps columns, filters, and names the format.

A row keeps every column of its file, has ours on top, and the resolved format under FORMAT.
"""

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from difflib import get_close_matches
from glob import glob, has_magic
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from ..config import Source
from ..errors import ConfigError, DataError
from ..paths import is_url, resolve_path
from .clean import Rejected, Row
from .corpora import digits_file, sklearn_digits, stdlib_docstrings, stdlib_fingerprint
from .readers import READERS, Item, checked, find_reader

FORMAT = "__format__"
PEEK = 64
"""Rows looked at to learn the columns of a source."""
DATASET_FILES = ("dataset_info.json", "dataset_dict.json")
MAX_STATE_BYTES = 10 * 2**20
SAFE_BUILDERS = ("json", "csv", "parquet", "arrow", "text", "imagefolder")
"""Kinds of files that `datasets` may read from the hub; it reads pickles as well."""
COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "chat": (("messages",), ("conversations",)),
    "prompt_completion": (("prompt", "completion"),),
    "alpaca": (("instruction", "output"),),
    "classification": (("text", "label"),),
    "image": (("image", "label"),),
    "text": (("text",),),
}
"""The columns each format needs: one of the tuples."""
FORMATS = {
    "causal_lm": ("chat", "prompt_completion", "alpaca", "text"),
    "sequence_classification": ("classification",),
    "image_classification": ("image",),
}
"""The formats each task takes, in the order in which `auto` tries them."""


@dataclass(frozen=True)
class Part:
    """One file (or built-in corpus, or dataset) of a source: its rows, and a text that changes with its content."""

    name: str
    read: Callable[[int], Iterator[Item]]
    fingerprint: Callable[[], str]


def read_source(source: Source, *, cwd: str, task_type: str, max_row_bytes: int) -> Iterator[Item]:
    """Good and rejected rows in order; a row that `where` leaves out is a Rejected of kind `filtered`.

    Raises ConfigError for a missing file, column or format, DataError for a file that cannot be read at all.
    """
    parts = find_parts(source, cwd)
    items = chain.from_iterable(part.read(max_row_bytes) for part in parts)
    head = _head(items)
    columns = list(dict.fromkeys(name for item in head if isinstance(item, Row) for name in item.values))
    if not columns:
        yield from head
        return
    _check_columns(source, columns)
    layout = resolve_format(source, columns, task_type)
    kept = 0
    for item in chain(head, items):
        item = _map(item, source, layout) if isinstance(item, Row) else item
        yield item
        kept += isinstance(item, Row)
        if kept == source.limit:
            return


def _head(items: Iterator[Item]) -> list[Item]:
    """The items up to the PEEK-th good row."""
    head, rows = [], 0
    for item in items:
        head.append(item)
        rows += isinstance(item, Row)
        if rows == PEEK:
            break
    return head


def _check_columns(source: Source, columns: list[str]) -> None:
    wanted = [("columns." + ours, theirs) for ours, theirs in source.columns.items()]
    for key, name in wanted + [("where", name) for name in source.where]:
        if name not in columns:
            raise ConfigError(f"{key}: {source.path} has no column {name!r}{_suggest(name, columns)}")


def _suggest(name: str, columns: list[str]) -> str:
    close = get_close_matches(name, columns, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{hint} (it has {', '.join(columns[:30])})"


def resolve_format(source: Source, columns: list[str], task_type: str) -> str:
    """The source's format, or the first of the task's that its (mapped) columns allow. Raises ConfigError."""
    names = (set(columns) - set(source.columns.values())) | set(source.columns)
    allowed = FORMATS[task_type]
    if source.format != "auto" and source.format not in allowed:
        raise ConfigError(f"format={source.format}: task.type {task_type} takes {', '.join(allowed)}")
    for layout in allowed if source.format == "auto" else (source.format,):
        if any(names.issuperset(needed) for needed in COLUMNS[layout]):
            return layout
    if source.format == "auto":
        needs = "; ".join(f"{layout}: {_needs(layout)}" for layout in allowed)
        raise ConfigError(
            f"{source.path}: no format for task.type {task_type} fits its columns {', '.join(sorted(names)[:30])}; "
            f"give columns, for example {{{COLUMNS[allowed[0]][0][0]}: theirs}} (needed: {needs})"
        )
    missing = next(name for name in COLUMNS[source.format][0] if name not in names)
    raise ConfigError(
        f"{source.path}: format {source.format} needs {_needs(source.format)}, and there is no column "
        f"{missing!r}{_suggest(missing, sorted(names))}; map it with columns: {{{missing}: theirs}}"
    )


def _needs(layout: str) -> str:
    return " or ".join(" + ".join(needed) for needed in COLUMNS[layout])


def _map(row: Row, source: Source, layout: str) -> Item:
    if not all(_is_among(row.values.get(name), allowed) for name, allowed in source.where.items()):
        return Rejected("filtered", row.file, row.line)
    present = {name: value for name, value in row.values.items() if name not in source.columns}
    values = present | {ours: row.values[theirs] for ours, theirs in source.columns.items() if theirs in row.values}
    needed = min(COLUMNS[layout], key=lambda names: sum(name not in values for name in names))
    missing = [source.columns.get(name, name) for name in needed if name not in values]
    if missing:
        return Rejected("missing_column", row.file, row.line, f"no column {', '.join(missing)}")
    return Row(values | {FORMAT: layout}, row.file, row.line)


def _is_among(value: Any, allowed: list[str | int | float | bool]) -> bool:
    """Text from a CSV file also matches a number spelled the same."""
    if not isinstance(value, (str, int, float, bool)):
        return False
    return value in allowed or (isinstance(value, str) and value in map(str, allowed))


def find_parts(source: Source, cwd: str) -> list[Part]:
    """The files of a source in a fixed order. Raises ConfigError if there are none."""
    if source.path in BUILT_IN:
        return [BUILT_IN[source.path]]
    if source.path.partition(":")[0] in ("stdlib", "sklearn"):
        raise ConfigError(f"{source.path}: no such built-in corpus; there are {', '.join(BUILT_IN)}")
    path = resolve_path(source.path, cwd)
    if is_url(path):
        return _url_parts(path)
    if os.path.isdir(path) and any((Path(path) / name).exists() for name in DATASET_FILES):
        return [_dataset_part(source, path)]
    if os.path.isdir(path):
        files = sorted(str(file) for file in Path(path).rglob("*") if _is_data_file(file, Path(path)))
        if not files:
            raise ConfigError(f"{source.path}: the folder has no data file ({', '.join(READERS)}, also .gz)")
        return [_file_part(file, cwd) for file in files]
    if os.path.isfile(path):
        return [_file_part(path, cwd)]
    if has_magic(path):
        matches = [file for file in sorted(glob(path, recursive=True)) if os.path.isfile(file)]
        if not matches:
            raise ConfigError(f"{source.path}: matches no file")
        return [_file_part(file, cwd) for file in matches]
    return [_dataset_part(source, None)]


def _is_data_file(file: Path, root: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return not is_hidden and find_reader(file.name) is not None and file.is_file()


def _file_part(path: str, cwd: str) -> Part:
    base = os.path.abspath(cwd) + os.sep
    name = path.removeprefix(base)
    return Part(name, _reader(name, lambda: open(path, "rb")), lambda: _sha256(path))


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return f"{os.path.getsize(path)} {hashlib.file_digest(file, 'sha256').hexdigest()}"


def _reader(name: str, open_file: Callable[[], IO[bytes]]) -> Callable[[int], Iterator[Item]]:
    found = find_reader(name)
    if found is None:
        raise ConfigError(f"{name}: unknown kind of data file; use {', '.join(READERS)}, also with .gz")
    reader, is_gzipped = found

    def read(max_row_bytes: int) -> Iterator[Item]:
        try:
            with closing(open_file()) as file:
                plain = cast(IO[bytes], gzip.GzipFile(fileobj=file)) if is_gzipped else file
                yield from reader(plain, name, max_row_bytes)
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error}") from None

    return read


def _url_parts(url: str) -> list[Part]:
    import fsspec

    try:
        files = fsspec.open_files(url, mode="rb")
    except Exception as error:  # every fsspec back end has exceptions of its own
        raise ConfigError(f"{url} cannot be opened: {' '.join(str(error).split())[:300]}") from error
    if not files:
        raise ConfigError(f"{url}: matches no file")
    return [_url_part(file) for file in files]


def _url_part(file: Any) -> Part:
    protocol = file.fs.protocol if isinstance(file.fs.protocol, str) else file.fs.protocol[0]
    name = file.path if is_url(file.path) else f"{protocol}://{file.path.lstrip('/')}"

    def fingerprint() -> str:
        try:
            return str(file.fs.ukey(file.path))
        except Exception as error:  # every fsspec back end has exceptions of its own
            raise DataError(f"{name} cannot be read: {' '.join(str(error).split())[:300]}") from error

    return Part(name, _reader(name, lambda: file.fs.open(file.path, "rb")), fingerprint)


def _dataset_part(source: Source, folder: str | None) -> Part:
    """A folder saved by `datasets`, or (folder None) a dataset of the Hugging Face hub. No code of theirs runs."""
    loaded: list[Any] = []

    def dataset() -> Any:
        if not loaded:
            loaded.append(_load_folder(source, folder) if folder else _load_hub(source))
        return loaded[0]

    def read(max_row_bytes: int) -> Iterator[Item]:
        for number, values in enumerate(dataset(), 1):
            yield checked(values, source.path, number, max_row_bytes)

    return Part(source.path, read, lambda: str(dataset()._fingerprint))


def _check_dataset_folder(path: str, folder: Path) -> None:
    """Raises DataError if its state names a file outside it, or something that is no file."""
    for state in (*folder.glob("state.json"), *folder.glob("*/state.json")):
        try:
            if not state.is_file() or state.stat().st_size > MAX_STATE_BYTES:
                raise ValueError("no file of JSON")
            named = [entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{path} is no readable datasets folder: {state.name}: {str(error)[:200]}") from None
        for name in named:
            if os.path.basename(str(name)) != name or not (state.parent / name).is_file():
                raise DataError(f"{path}: {state.name} names {str(name)[:100]!r}, which is no file of this folder")


def _load_folder(source: Source, folder: str) -> Any:
    import datasets

    _check_dataset_folder(source.path, Path(folder))
    try:
        saved = datasets.load_from_disk(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{source.path} is no readable datasets folder: {str(error)[:200]}") from None
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if source.split not in saved:
        raise ConfigError(f"{source.path} has no split {source.split!r}{_suggest(source.split, list(saved))}")
    return saved[source.split]


def _load_hub(source: Source) -> Any:
    import datasets

    try:
        builder = datasets.load_dataset_builder(source.path, source.subset)
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in SAFE_BUILDERS:
            raise ConfigError(
                f"{source.path} holds files of the kind {kind}, which are not read: some can run code; of a dataset on "
                f"the hub {', '.join(SAFE_BUILDERS)} files are"
            )
        builder.download_and_prepare()
        return builder.as_dataset(split=source.split)
    except ConfigError:
        raise
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ConfigError(f"{source.path}: {str(error)[:300]}") from None
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{source.path} is no local file, and the Hugging Face hub did not give it: {reason}; "
            "check the spelling, the network and `hf auth login`"
        ) from None


def _corpus(name: str, rows: Callable[[], Any], fingerprint: Callable[[], str]) -> Part:
    return Part(name, lambda _max: (Row(dict(values), file, line) for values, file, line in rows()), fingerprint)


BUILT_IN = {
    "stdlib:docstrings": _corpus("stdlib:docstrings", stdlib_docstrings, stdlib_fingerprint),
    "sklearn:digits": _corpus("sklearn:digits", sklearn_digits, lambda: _sha256(digits_file())),
}
