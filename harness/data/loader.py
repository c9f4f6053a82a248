"""The batches of a step, cut from the global batch so that no number depends on the world size.

The G indices of a step are cut into G/micro cells by token length alone. Padded: neighbours in length share a cell, so
little is padded. Packed: every cell gets about the same number of tokens. Rank r takes the cells a*world_size + r;
neighbouring cells are of similar length, so ranks wait little for each other. Where they do not come out even, the last
ones are empty: one short example with its targets switched off.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import Config
from ..tasks import Batch, Task
from .sampler import ABSENT, Sampler
from .store import Store


@dataclass(frozen=True)
class StepBatch:
    """One rank's micro-batches of a step and their numbers (`cells`) in the global batch; the counts are global."""

    micro_batches: list[Batch]
    cells: list[int]
    num_supervised: int
    num_tokens: int


def cut_cells(indices: np.ndarray, lengths: np.ndarray, *, micro_batch_size: int, packing: bool) -> list[list[int]]:
    """Cells of micro_batch_size indices each; ABSENT ones come last. lengths [n] are those of all rows."""
    assert len(indices) % micro_batch_size == 0, (len(indices), micro_batch_size)
    size = np.where(indices == ABSENT, -1, lengths[indices])
    order = indices[np.lexsort((indices, -size))].tolist()
    num_cells = len(indices) // micro_batch_size
    if not packing:
        return [order[start : start + micro_batch_size] for start in range(0, len(order), micro_batch_size)]
    cells: list[list[int]] = [[] for _ in range(num_cells)]
    loads = [0] * num_cells
    for index in order:
        open_cells = (number for number in range(num_cells) if len(cells[number]) < micro_batch_size)
        lightest = min(open_cells, key=lambda number: (loads[number], number))
        cells[lightest].append(index)
        loads[lightest] += 0 if index == ABSENT else int(lengths[index])
    return cells


def _filler(indices: list[int], lengths: np.ndarray) -> int:
    """The shortest real example: it stands in for absent ones, with its targets switched off."""
    return min((index for index in indices if index != ABSENT), key=lambda index: (int(lengths[index]), index))


def _collate(cell: list[int], store: Store, task: Task, processor: Any, config: Config, *, filler: int) -> Batch:
    examples = [task.ignore(store[filler]) if index == ABSENT else store[index] for index in cell]
    return task.collate(examples, processor, config, pad_to=None)


class Loader:
    """Gives one rank its part of any step; holds no position."""

    def __init__(
        self,
        store: Store,
        sampler: Sampler,
        task: Task,
        processor: Any,
        config: Config,
        *,
        micro_batch_size: int,
        world_size: int,
        rank: int,
    ) -> None:
        total = sampler.global_batch_size
        assert total % micro_batch_size == 0, (total, micro_batch_size)
        self.store, self.sampler, self.task, self.processor, self.config = store, sampler, task, processor, config
        self.micro_batch_size, self.world_size, self.rank = micro_batch_size, world_size, rank

    def step(self, step: int) -> StepBatch:
        indices = self.sampler.indices(step)
        lengths, packing = self.store.lengths, self.config.data.packing
        cells = cut_cells(indices, lengths, micro_batch_size=self.micro_batch_size, packing=packing)
        present = indices[indices != ABSENT]
        filler = _filler(present.tolist(), lengths)
        cells += [[ABSENT]] * (-len(cells) % self.world_size)
        mine = list(range(self.rank, len(cells), self.world_size))
        parts = (self.store, self.task, self.processor, self.config)
        return StepBatch(
            micro_batches=[_collate(cells[number], *parts, filler=filler) for number in mine],
            cells=mine,
            num_supervised=int(self.store.num_supervised[present].sum()),
            num_tokens=int(lengths[present].sum()),
        )


def eval_batches(
    store: Store,
    task: Task,
    processor: Any,
    config: Config,
    *,
    micro_batch_size: int,
    world_size: int,
    rank: int,
    max_examples: int | None = None,
) -> Iterator[Batch]:
    """This rank's share of the whole store, or of max_examples spread evenly over it; every rank gets as many batches.

    Sorted by length; what is missing in the last batches is filled with examples whose targets are switched off.
    """
    num = len(store) if max_examples is None else min(len(store), max_examples)
    chosen = (np.arange(num, dtype=np.int64) * len(store)) // max(num, 1)
    per_round = micro_batch_size * world_size
    padded = np.full(-(-num // per_round) * per_round, ABSENT, dtype=np.int64)
    padded[:num] = chosen
    if num == 0:
        return
    cells = cut_cells(padded, store.lengths, micro_batch_size=micro_batch_size, packing=False)
    filler = _filler(chosen.tolist(), store.lengths)
    for cell in cells[rank::world_size]:
        yield _collate(cell, store, task, processor, config, filler=filler)
