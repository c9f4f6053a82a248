"""Follows a JSONL file that other processes append to, and replace when they resume."""

import json
import os
import time
from pathlib import Path
from typing import Any


class Tail:
    """Yields each record once, from those written after the object was made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset, self.inode = self._end()
        self.last_time = time.time()

    def _end(self) -> tuple[int, int]:
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return 0, 0
        return status.st_size, status.st_ino

    def poll(self) -> list[dict[str, Any]]:
        """The complete records since the last call. After the file was replaced, those newer than what was seen."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                is_replaced = status.st_ino != self.inode and self.inode != 0
                if is_replaced or status.st_size < self.offset:
                    self.offset = 0
                self.inode = status.st_ino
                file.seek(self.offset)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self.offset += len(whole)
        records = [record for line in whole.splitlines() if (record := _parsed(line)) is not None]
        fresh = [record for record in records if record.get("time", 0.0) > self.last_time or not is_replaced]
        self.last_time = max([self.last_time, *(record.get("time", 0.0) for record in fresh)])
        return fresh


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None for a line that a crash tore."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
