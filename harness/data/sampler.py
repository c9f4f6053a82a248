"""Which rows each step sees, as a stateless function of (seed, step).

G global batch size, n rows, V rows of a virtual epoch: a source of weight w gives each of its rows floor(w) times and
a fresh random part of them, of the size of w's fraction, once more. The epochs follow each other without a gap.
"""

import math
from functools import lru_cache

import numpy as np

ABSENT = -1


class Sampler:
    """Indices of every step: a new permutation of the virtual epoch per epoch, from raw Philox words (whose stream
    numpy guarantees). source [n] is the number of each row's source; weights holds one number per source."""

    def __init__(
        self,
        source: np.ndarray,
        weights: list[float],
        *,
        seed: int,
        global_batch_size: int,
        max_steps: int | None = None,
        epochs: float | None = None,
    ) -> None:
        assert (max_steps is None) != (epochs is None), (max_steps, epochs)
        assert len(source) > 0, "no rows to sample from"
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.rows = [np.flatnonzero(source == number) for number in range(len(weights))]
        self.weights = weights
        sizes = [_virtual_size(len(rows), weight) for rows, weight in zip(self.rows, weights, strict=True)]
        if sum(whole + extra for whole, extra in sizes) == 0:
            largest = max(range(len(weights)), key=lambda number: len(self.rows[number]))
            sizes[largest] = (0, 1)
        self.sizes = sizes
        self.epoch_size = sum(whole + extra for whole, extra in sizes)
        self.num_samples = None if epochs is None else max(1, math.ceil(round(epochs * self.epoch_size, 6)))
        self._order = lru_cache(maxsize=2)(self._epoch_order)
        self._max_steps = max_steps

    @property
    def total_steps(self) -> int:
        """max_steps, or as many as the epochs take; the last one may be partial."""
        if self.num_samples is None:
            assert self._max_steps is not None
            return self._max_steps
        return -(-self.num_samples // self.global_batch_size)

    @property
    def steps_per_epoch(self) -> float:
        return self.epoch_size / self.global_batch_size

    def epoch(self, step: int) -> float:
        """Epochs done when `step` steps are done."""
        return step * self.global_batch_size / self.epoch_size

    def indices(self, step: int) -> np.ndarray:
        """int64[G]; ABSENT fills the last batch of a run given in epochs."""
        first = step * self.global_batch_size
        positions = np.arange(first, first + self.global_batch_size, dtype=np.int64)
        chosen = np.full(self.global_batch_size, ABSENT, dtype=np.int64)
        epochs = positions // self.epoch_size
        is_present = np.ones_like(positions, dtype=bool) if self.num_samples is None else positions < self.num_samples
        for epoch in np.unique(epochs[is_present]):
            here = is_present & (epochs == epoch)
            chosen[here] = self._order(int(epoch))[positions[here] % self.epoch_size]
        return chosen

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """int64[V]"""
        pieces = []
        for number, (rows, weight, (_, extra)) in enumerate(zip(self.rows, self.weights, self.sizes, strict=True)):
            pieces += [rows] * int(weight)
            if extra:
                pieces.append(rows[_permutation(len(rows), self.seed, epoch, number + 1)[:extra]])
        entries = np.concatenate(pieces)
        return entries[_permutation(len(entries), self.seed, epoch, 0)]


def _virtual_size(num_rows: int, weight: float) -> tuple[int, int]:
    """Rows given whole times, and rows drawn for the fraction."""
    return num_rows * int(weight), min(num_rows, round(num_rows * (weight - int(weight))))


def _permutation(size: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    key = np.random.SeedSequence([seed, epoch, stream]).generate_state(2, np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")
