"""The matrix product x w on the CPU, in as many blocks of columns as run fastest on this machine.

oneDNN leaves some shapes to a single thread: with two threads in bf16 an output of 1024 x 576 takes longer than one of
1024 x 960, and half of it twice takes half as long. The first call of a shape therefore times the whole and the halves,
and takes the halves where they are faster and equal to the last bit. M rows, K inputs, N outputs.
"""

import time

import torch
from torch import Tensor

BLOCKS = (1, 2)
REPEATS = 6
MIN_WORK = 2**25
"""Multiplications below which nothing is timed."""
ROWS = 128
"""Numbers of rows that round up to the same multiple share a choice."""
GAIN = 0.9
"""The halves must take at most this part of the time of the whole."""

_chosen: dict[tuple[int, int, int, bool, torch.dtype, int], int] = {}


def product(x: Tensor, w: Tensor, *, out: Tensor) -> Tensor:
    """out [M, N] = x [M, K] w [K, N]; any strides."""
    (M, K), N = x.shape, w.shape[1]
    threads = torch.get_num_threads()
    if x.is_cuda or threads == 1 or M * K * N < MIN_WORK:
        return torch.mm(x, w, out=out)
    key = (-(-M // ROWS), K, N, w.stride(0) == 1, x.dtype, threads)
    blocks = _chosen.get(key)
    if blocks is None:
        blocks = _chosen[key] = _fastest(x, w, out)
    return _in_blocks(x, w, out, blocks)


def _in_blocks(x: Tensor, w: Tensor, out: Tensor, blocks: int) -> Tensor:
    if blocks == 1:
        return torch.mm(x, w, out=out)
    width = -(-w.shape[1] // blocks // 32) * 32
    for start in range(0, w.shape[1], width):
        torch.mm(x, w[:, start : start + width], out=out[:, start : start + width])
    return out


def _fastest(x: Tensor, w: Tensor, out: Tensor) -> int:
    best = dict.fromkeys(BLOCKS, float("inf"))
    results = {blocks: _in_blocks(x, w, out, blocks).clone() for blocks in BLOCKS}
    for _ in range(REPEATS):
        for blocks in BLOCKS:
            start = time.perf_counter()
            _in_blocks(x, w, out, blocks)
            best[blocks] = min(best[blocks], time.perf_counter() - start)
    whole, halves = BLOCKS
    is_equal = torch.equal(results[whole], results[halves])
    return halves if is_equal and best[halves] < GAIN * best[whole] else whole
