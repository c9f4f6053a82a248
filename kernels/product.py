"""The matrix product x w on the CPU, in as many blocks of columns as run fastest on this machine.

oneDNN leaves some shapes to a single thread: with two threads in bf16 an output of 1024 x 576 takes longer than one of
1024 x 960, and half of it twice takes half as long. The first calls of a shape therefore time the whole and the halves;
later ones take the halves if they were faster, and equal to the last bit. M rows, K inputs, N outputs.
"""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCKS = (1, 2)
TRIALS = 8
"""Calls of a shape that are timed: spread over time, so that a moment of other load decides nothing."""
MIN_WORK = 2**25
"""Multiplications below which nothing is timed."""
ROWS = 128
"""Numbers of rows that round up to the same multiple share a choice."""
GAIN = 0.9
"""The halves must take at most this part of the time of the whole."""


@dataclass
class _Shape:
    """What is known of a shape: the best time of each way in seconds, and whether the results were equal."""

    best: dict[int, float] = field(default_factory=lambda: dict.fromkeys(BLOCKS, float("inf")))
    trials: int = 0
    is_equal: bool = True

    @property
    def blocks(self) -> int:
        whole, halves = BLOCKS
        return halves if self.is_equal and self.best[halves] < GAIN * self.best[whole] else whole


_shapes: dict[tuple[int, int, int, bool, torch.dtype, int], _Shape] = {}


def product(x: Tensor, w: Tensor, *, out: Tensor) -> Tensor:
    """out [M, N] = x [M, K] w [K, N]; any strides."""
    (M, K), N = x.shape, w.shape[1]
    threads = torch.get_num_threads()
    if x.is_cuda or threads == 1 or M * K * N < MIN_WORK:
        return torch.mm(x, w, out=out)
    key = (-(-M // ROWS), K, N, w.stride(0) == 1, x.dtype, threads)
    shape = _shapes.get(key)
    if shape is None:
        shape = _shapes[key] = _Shape()
    if shape.trials < TRIALS:
        return _try(shape, x, w, out)
    return _in_blocks(x, w, out, shape.blocks)


def _in_blocks(x: Tensor, w: Tensor, out: Tensor, blocks: int) -> Tensor:
    if blocks == 1:
        return torch.mm(x, w, out=out)
    width = -(-w.shape[1] // blocks // 32) * 32
    for start in range(0, w.shape[1], width):
        torch.mm(x, w[:, start : start + width], out=out[:, start : start + width])
    return out


def _try(shape: _Shape, x: Tensor, w: Tensor, out: Tensor) -> Tensor:
    """Both ways, the whole last: that is what `out` holds."""
    results = {}
    for blocks in reversed(BLOCKS):
        start = time.perf_counter()
        _in_blocks(x, w, out, blocks)
        shape.best[blocks] = min(shape.best[blocks], time.perf_counter() - start)
        results[blocks] = out if blocks == 1 else out.clone()
    shape.trials += 1
    shape.is_equal = shape.is_equal and torch.equal(*results.values())
    return out
