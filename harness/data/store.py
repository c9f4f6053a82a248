"""Examples in memory-mapped flat files: one file per field, offsets beside it, and a manifest with their SHA-256.

A folder exists under its name only when it is complete: it is written beside it and renamed.
"""

import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import DataError
from ..tasks import Example

MANIFEST = "MANIFEST.json"
VERSION = 1


class _File:
    """A file that knows the SHA-256 and the number of what was written to it."""

    def __init__(self, path: Path) -> None:
        self.file: IO[bytes] = path.open("wb")
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, array: np.ndarray) -> None:
        content = np.ascontiguousarray(array).tobytes()
        self.file.write(content)
        self.digest.update(content)
        self.size += len(content)

    def close(self) -> dict[str, Any]:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"sha256": self.digest.hexdigest(), "bytes": self.size}


class StoreWriter:
    """Writes examples one after the other; `close` makes the folder appear. All examples have the same fields."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.folder = self.path.with_name(f".{self.path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        self.folder.mkdir(parents=True)
        self.files: dict[str, _File] = {}
        self.fields: dict[str, dict[str, Any]] = {}
        self.num_examples = 0

    def write(self, example: Example, source: int, num_supervised: int) -> None:
        for name, array in example.items():
            self._append(name, np.asarray(array))
        assert self.fields.keys() == example.keys(), (self.fields.keys(), example.keys())
        length = len(example["input_ids"]) if "input_ids" in example else 1
        for name, value, dtype in (
            ("lengths", length, np.int64),
            ("num_supervised", num_supervised, np.int64),
            ("source", source, np.uint16),
        ):
            self._file(name).write(np.array([value], dtype=dtype))
        self.num_examples += 1

    def _append(self, name: str, array: np.ndarray) -> None:
        if name not in self.fields:
            assert self.num_examples == 0, (name, "is not in the first example")
            trailing = list(array.shape[1:])
            self.fields[name] = {"dtype": array.dtype.str, "is_scalar": array.ndim == 0, "trailing": trailing}
            self._file(f"{name}.offsets").write(np.zeros(1, dtype=np.int64))
        field = self.fields[name]
        assert (array.dtype.str, list(array.shape[1:])) == (field["dtype"], field["trailing"]), (name, array.shape)
        data = self._file(f"{name}.data")
        data.write(array)
        self._file(f"{name}.offsets").write(np.array([data.size // array.dtype.itemsize], dtype=np.int64))

    def _file(self, name: str) -> _File:
        if name not in self.files:
            self.files[name] = _File(self.folder / f"{name}.bin")
        return self.files[name]

    def close(self, manifest_extra: dict[str, Any] | None = None) -> dict[str, Any]:
        """Makes the folder durable and visible under its name; returns the manifest."""
        files = {f"{name}.bin": file.close() for name, file in sorted(self.files.items())}
        described = json.dumps([VERSION, files, self.fields], sort_keys=True)
        manifest = dict(manifest_extra or {}) | {
            "version": VERSION,
            "num_examples": self.num_examples,
            "fields": self.fields,
            "files": files,
            "content_hash": hashlib.sha256(described.encode()).hexdigest(),
        }
        with (self.folder / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.rename(self.folder, self.path)
        return manifest

    def abort(self) -> None:
        """Removes what was written."""
        for file in self.files.values():
            file.file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Store:
    """Read-only examples of a folder. lengths int64[n] (tokens; 1 where there are none), num_supervised int64[n],
    source uint16[n]. Raises DataError for a folder that is missing, torn or of another version."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.manifest: dict[str, Any] = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path} is no complete data store: {error}") from None
        if not isinstance(self.manifest, dict) or self.manifest.get("version") != VERSION:
            raise DataError(f"{self.path} was written by another version of burnish; delete it")
        for name, facts in self.manifest["files"].items():
            file = self.path / name
            if not file.is_file() or file.stat().st_size != facts["bytes"]:
                raise DataError(f"{file} is missing or has the wrong size; delete {self.path}")
        self.lengths = self._column("lengths", np.int64)
        self.num_supervised = self._column("num_supervised", np.int64)
        self.source = self._column("source", np.uint16)
        self._data = {name: self._map(f"{name}.data", field["dtype"]) for name, field in self._fields.items()}
        self._offsets = {name: self._map(f"{name}.offsets", np.int64) for name in self._fields}

    @property
    def _fields(self) -> dict[str, dict[str, Any]]:
        return self.manifest["fields"]

    def _map(self, name: str, dtype: Any) -> np.ndarray:
        file = self.path / f"{name}.bin"
        if not file.exists() or file.stat().st_size == 0:
            return np.zeros(0, dtype=dtype)
        return np.memmap(file, dtype=dtype, mode="r")

    def _column(self, name: str, dtype: Any) -> np.ndarray:
        return np.array(self._map(name, dtype))

    def __len__(self) -> int:
        return int(self.manifest["num_examples"])

    def __getitem__(self, index: int) -> Example:
        """A copy of example `index`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        example = {}
        for name, field in self._fields.items():
            start, end = self._offsets[name][index : index + 2]
            shape = () if field["is_scalar"] else (-1, *field["trailing"])
            example[name] = np.array(self._data[name][start:end]).reshape(shape)
        return example

    def verify(self) -> None:
        """Hashes every file. Raises DataError for the first that differs from the manifest."""
        for name, facts in self.manifest["files"].items():
            with (self.path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                    raise DataError(f"{self.path / name} differs from its checksum; delete {self.path}")
