"""Cuts validation and test rows out of the training rows, by a hash of each row's content or of its group.

Equal rows have equal hashes, so a row and its copies land in one split, and so do all rows of a group.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import Split
from ..errors import ConfigError

HELD_OUT = ("test", "validation")


@dataclass(frozen=True)
class Cut:
    """Where each group goes: the hashes of the groups held out; all others train."""

    split: Split
    held_out: dict[str, frozenset[int]]

    def split_of(self, values: dict[str, Any]) -> str:
        """`train`, `validation` or `test`."""
        if not any(self.held_out.values()):
            return "train"
        key = group_hash(values, self.split)
        return next((name for name, groups in self.held_out.items() if key in groups), "train")


def group_hash(values: dict[str, Any], split: Split) -> int:
    """64-bit hash of the row's group (or of its content) and the seed. Raises ConfigError without the column `by`."""
    if split.by is not None and split.by not in values:
        columns = ", ".join(name for name in values if not name.startswith("__"))
        raise ConfigError(f"data.split.by: a training row has no column {split.by!r} (it has {columns})")
    key = values if split.by is None else values[split.by]
    return int.from_bytes(content_digest([split.seed, key])[:8], "big")


def content_digest(value: Any) -> bytes:
    """SHA-256 of a JSON-like value; bytes and images are hashed by their content."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).digest()


def _plain(value: Any) -> str:
    content = value.tobytes() if hasattr(value, "tobytes") else value
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else repr(content)


def make_cut(hashes: Iterable[int], split: Split, wanted: dict[str, float]) -> Cut:
    """Chooses the held-out groups from the hashes of all rows and the wanted share of each split.

    Groups are taken in the order of their hashes while they fit the wanted number of rows, so a group larger than a
    split is left to training. Every wanted split gets a group if there are enough to leave one for training.
    """
    groups, counts = np.unique(np.fromiter(hashes, dtype=np.uint64), return_counts=True)
    free = dict(zip(groups.tolist(), counts.tolist(), strict=True))
    total = int(counts.sum())
    held_out: dict[str, frozenset[int]] = {}
    names = [name for name in HELD_OUT if wanted.get(name, 0.0) > 0]
    for i, name in enumerate(names):
        taken: set[int] = set()
        target, rows = wanted[name] * total, 0
        num_spare = len(free) - len(names[i:])  # the later splits and training need one group each
        for group, count in free.items():
            if len(taken) < num_spare and count <= max(target, 1) and rows + count / 2 <= target:
                taken.add(group)
                rows += count
        if not taken and num_spare > 0:
            taken.add(min(free, key=lambda group: (free[group], group)))
        held_out[name] = frozenset(taken)
        free = {group: count for group, count in free.items() if group not in taken}
    return Cut(split, held_out)
