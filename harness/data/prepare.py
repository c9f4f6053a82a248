"""Sources -> stores: reads, checks, splits and tokenises every row once, before any worker starts.

The result lies in a folder named by a hash of all that went in (data and task sections, content of the sources,
tokenizer, version of this code). It is written beside its place and renamed, so runs may prepare at the same time.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from ..config import Config, Source
from ..errors import ConfigError, DataError
from ..tasks import RowError, Task, get_task
from .clean import Rejected, Row
from .format import reference
from .readers import Item
from .sources import find_parts, read_source
from .split import Cut, group_hash, make_cut
from .store import Store, StoreWriter

VERSION = 1
"""Raised whenever the same input gives other examples: it makes old caches void."""
SPLITS = ("train", "validation", "test")
POLICY = ("filtered", "too_long", "no_target")
"""Rows left out as asked (by `where` or by truncation), which are not malformed."""
NAMED_ROWS = 20
NAMED_IN_ERROR = 5
PREPARED, REJECTED = "prepared.json", "rejected.jsonl"


@dataclass(frozen=True)
class Prepared:
    """Where the tokenised data is: one store folder per split, class names, counts per split, one weight per source
    of `train`, and the first validation row (else training row) as {prompt, reference}."""

    train: str
    validation: str | None
    test: str | None
    labels: list[str] | None
    counts: dict[str, Any]
    first_prompt: Any
    weights: list[float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Prepared":
        return cls(**fields)


def prepare_data(config: Config, cwd: str, runs_dir: str) -> Prepared:
    """The prepared data of a run; a second call with the same input verifies the checksums and returns.

    Raises ConfigError for a missing file or column, DataError if more than data.max_bad_fraction of a split's rows
    cannot be used or none is left.
    """
    task = get_task(config.task.type)
    processor = task.load_processor(config)
    cache = Path(cwd) / (config.data.cache_dir or os.path.join(runs_dir, ".cache"))
    folder = Path(os.path.abspath(cache)) / cache_key(config, processor, cwd)
    found = _load(folder, config)
    if found is not None:
        return found
    working = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        working.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"data.cache_dir: {folder.parent} cannot be written: {error.strerror}") from None
    try:
        _build(config, task, processor, cwd=cwd, folder=working)
        _put_in_place(working, folder)
    finally:
        _keep_rejected(working, folder)
        shutil.rmtree(working, ignore_errors=True)
    prepared = _load(folder, config)
    assert prepared is not None, folder
    return prepared


def cache_key(config: Config, processor: Any, cwd: str) -> str:
    """Hash of all that the examples depend on."""
    data = config.data.model_dump(mode="json", exclude={"packing", "cache_dir"})
    task = config.task.model_dump(mode="json", include={"type", "labels", "image_size"})
    contents = []
    for name in SPLITS:
        for source, fields in zip(getattr(config.data, name) or [], data[name] or [], strict=True):
            del fields["weight"]
            contents += [[name, part.name, part.fingerprint()] for part in find_parts(source, cwd)]
    facts = [VERSION, data, task, contents, config.model.tokenizer, _fingerprint(processor)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _fingerprint(processor: Any) -> str:
    """Of a tokenizer: its serialised back end without padding and truncation, special tokens and chat template."""
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is None:
        return hashlib.sha256(repr(processor).encode()).hexdigest()
    serialised = json.loads(backend.to_str())
    serialised["padding"] = serialised["truncation"] = None
    facts = [serialised, repr(processor.special_tokens_map), processor.chat_template]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _load(folder: Path, config: Config) -> Prepared | None:
    """The finished folder if every checksum holds; a broken one is removed."""
    if not folder.exists():
        return None
    try:
        fields = json.loads((folder / PREPARED).read_text(encoding="utf-8"))
        for name in SPLITS:
            if fields[name] is not None:
                fields[name] = str(folder / fields[name])
                Store(fields[name]).verify()
        return Prepared(**fields, weights=[source.weight for source in config.data.train])
    except (OSError, ValueError, KeyError, TypeError, DataError):
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _put_in_place(working: Path, folder: Path) -> None:
    """Renames; where another run was faster, its folder stays."""
    try:
        working.rename(folder)
    except OSError:
        if not (folder / PREPARED).exists():
            raise


def _keep_rejected(working: Path, folder: Path) -> None:
    """Saves the list of rejected rows of a preparation that failed."""
    listed = working / REJECTED
    if listed.exists() and listed.stat().st_size and not folder.exists():
        shutil.copyfile(listed, _kept_list(folder.parent))


def _kept_list(cache: Path) -> Path:
    return cache / REJECTED


@dataclass
class _Split:
    """What is counted about one split while it is written."""

    name: str
    writer: StoreWriter
    rejected_file: IO[str]
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    tokens: int = 0
    supervised: int = 0
    first: dict[str, Any] | None = None

    @property
    def bad(self) -> int:
        return sum(self.rejected.values())

    def reject(self, item: Rejected) -> None:
        if item.kind in POLICY:
            self.dropped[item.kind] += 1
            return
        self.rejected[item.kind] += 1
        if len(self.examples[item.kind]) < NAMED_ROWS:
            self.examples[item.kind].append(item.place)
        self.rejected_file.write(json.dumps({"split": self.name} | asdict(item)) + "\n")

    def add(self, row: Row, source: int, task: Task, processor: Any, config: Config, labels: list[str] | None) -> None:
        try:
            example = task.encode(row.values, processor, config, labels)
        except RowError as error:
            if error.kind == "too_long" and config.data.truncation == "error":
                raise DataError(f"{row.place} is too long: {error} (data.truncation is error)") from None
            self.reject(Rejected(error.kind, row.file, row.line, str(error)))
            return
        num_supervised = task.num_supervised(example)
        self.truncated += bool(example.pop("num_truncated", None) is not None)
        self.writer.write(example, source, num_supervised)
        if self.first is None:
            self.first = {"prompt": _plain(task.prompt(row.values)), "reference": _plain(reference(row.values))}
        self.kept += 1
        self.tokens += len(example["input_ids"]) if "input_ids" in example else 0
        self.supervised += num_supervised

    def counts(self) -> dict[str, Any]:
        named = {kind: {"count": count, "examples": self.examples[kind]} for kind, count in self.rejected.most_common()}
        return {
            "rows": self.kept + self.bad + sum(self.dropped.values()),
            "kept": self.kept,
            "bad": self.bad,
            "rejected": named,
            "dropped": dict(self.dropped),
            "truncated": self.truncated,
            "tokens": self.tokens,
            "supervised": self.supervised,
        }

    def check(self, config: Config, listed: Path) -> None:
        """Raises DataError if too much is bad or nothing is left."""
        used = self.kept + self.bad
        limit = config.data.max_bad_fraction
        shown = [f"{place} {kind}" for kind, places in self.examples.items() for place in places][:NAMED_IN_ERROR]
        if self.bad > limit * used:
            raise DataError(
                f"data.{self.name}: {self.bad} of {used} rows ({self.bad / used:.1%}) cannot be used, above "
                f"data.max_bad_fraction={limit:g}: {'; '.join(shown)}; all are listed in {listed}"
            )
        if self.kept == 0:
            left_out = ", ".join(f"{count} {kind}" for kind, count in (self.dropped + self.rejected).items())
            raise DataError(f"data.{self.name}: no row is left ({left_out or 'the sources are empty'})")


def _plain(value: Any) -> Any:
    """A JSON-able form of what a row asks or answers; an image becomes its numbers."""
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        import numpy as np

        values = np.asarray(value)
        return values.tolist() if values.dtype.kind in "uif" else str(value)


def read_sources(config: Config, sources: list[Source], cwd: str) -> Iterator[tuple[int, Item]]:
    """(number of the source, row or rejected row) of all sources, one after the other."""
    for number, source in enumerate(sources):
        for item in read_source(source, cwd=cwd, task_type=config.task.type, max_row_bytes=config.data.max_row_bytes):
            yield number, item


def find_cut(config: Config, cwd: str) -> Cut:
    """Which training rows are held out; reads them once if any are."""
    split = config.data.split
    shares = {"validation": split.validation, "test": split.test}
    wanted = {name: share for name, share in shares.items() if share > 0 and getattr(config.data, name) is None}
    if not wanted:
        return Cut(split, {})
    items = read_sources(config, config.data.train, cwd)
    return make_cut((group_hash(item.values, split) for _, item in items if isinstance(item, Row)), split, wanted)


def _build(config: Config, task: Task, processor: Any, *, cwd: str, folder: Path) -> None:
    cut = find_cut(config, cwd)
    train_rows = (
        item.values
        for _, item in read_sources(config, config.data.train, cwd)
        if isinstance(item, Row) and cut.split_of(item.values) == "train"
    )
    labels = task.find_labels(train_rows, config)
    names = [
        name for name in SPLITS if name == "train" or getattr(config.data, name) is not None or name in cut.held_out
    ]
    with ExitStack() as stack:
        rejected_file = stack.enter_context((folder / REJECTED).open("w", encoding="utf-8"))
        splits = {name: _Split(name, StoreWriter(folder / name), rejected_file) for name in names}
        for split in splits.values():
            stack.callback(split.writer.abort)
        for name in names:
            for number, item in read_sources(config, getattr(config.data, name) or [], cwd):
                if isinstance(item, Rejected):
                    splits[name].reject(item)
                    continue
                target = cut.split_of(item.values) if name == "train" else name
                splits[target].add(item, number, task, processor, config, labels)
        for split in splits.values():
            split.check(config, _kept_list(folder.parent))
            split.writer.close({"split": split.name})
    first = splits.get("validation", splits["train"]).first
    fields = {name: name if name in splits else None for name in SPLITS}
    counts = {name: split.counts() for name, split in splits.items()}
    record = fields | {"labels": labels, "counts": counts, "first_prompt": first}
    (folder / PREPARED).write_text(json.dumps(record, indent=2), encoding="utf-8")
