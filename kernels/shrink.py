"""Counter-based dropout masks, and what a producer computes for the low-rank updates of the linears it feeds.

A mask is a function of (seed, row, column, lane) and is never stored: forward, backward and recomputation make it anew,
and Triton, C++ and torch make the same one. One 32-bit hash serves three lanes of ten bits: the three projections of a
group draw independent masks for the price of one hash.

    key(row)       = mix(mix(row + low(seed)) ^ high(seed))
    bits(row, col) = mix(key(row) ^ (col * 0x9E3779B1 mod 2^32))
    keep           = ((bits >> 10 * lane) & 1023) >= threshold(p),   threshold(p) = round(1024 p)

`mix` is the 32-bit finaliser with multipliers 0x7feb352d and 0x846ca68b (C. Wellons, "Prospecting for hash functions").
Kept values are scaled by 1024 / (1024 - threshold), so the expectation is exact for the quantised probability.
Shape letters: M rows, K input features, R ranks of a group together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LEVELS = 1024
MAX_LANES = 3
COLUMN = 0x9E3779B1
MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Shrink:
    """S[:, block j] = scale_j * drop_j(y) A_jᵀ for every projection j of a group, columns side by side: [M, R].

    `a`: each [r_j, K], at most MAX_LANES of them; projection j draws its mask from lane j. `p` = 0 is no dropout.
    """

    a: tuple[Tensor, ...]
    scales: tuple[float, ...]
    p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        assert 1 <= len(self.a) == len(self.scales) <= MAX_LANES, (len(self.a), self.scales)


def draw_seed(p: float) -> int:
    """A seed from torch's CPU generator, which activation checkpointing restores; 0 (and no draw) where p is 0.

    Never below 2^32, so that Triton sees one integer type.
    """
    return int(torch.randint(2**32, 2**62, (1,))) if p > 0 else 0


def threshold(p: float) -> int:
    """Of 1024 equally likely levels, how many drop; at least one where p > 0."""
    assert 0 <= p <= 1, p
    return max(1, round(p * LEVELS)) if p > 0 else 0


def keep_scale(p: float) -> float:
    """What kept values are multiplied by; 0 where everything is dropped."""
    dropped = threshold(p)
    return LEVELS / (LEVELS - dropped) if dropped < LEVELS else 0.0


def _mix(x: Tensor) -> Tensor:
    """The finaliser, in place, on int32 words; products wrap, and the shifts are made logical by a mask."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(factor)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _words(values: Tensor) -> Tensor:
    """The low 32 bits of int64 values, as int32."""
    return ((values & MASK32) ^ 0x80000000).sub_(0x80000000).to(torch.int32)


def hash_bits(num_rows: int, num_cols: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """bits(row, col) as int32 words [num_rows, num_cols]."""
    rows, cols = torch.arange(num_rows, device=device), torch.arange(num_cols, device=device)
    high = _words(torch.tensor(seed >> 32, device=device))
    keys = _mix(_mix(_words(rows + (seed & MASK32))) ^ high)
    return _mix(keys[:, None] ^ _words(cols * COLUMN))


def keep_mask(
    num_rows: int, num_cols: int, *, p: float, seed: int, lane: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """True where a value is kept: bool [num_rows, num_cols]."""
    bits = hash_bits(num_rows, num_cols, seed, device)
    return (bits >> (10 * lane)).bitwise_and_(LEVELS - 1) >= threshold(p)


def drop(x: Tensor, *, p: float, seed: int, lane: int = 0) -> Tensor:
    """mask∘x * keep_scale, in plain torch; x [..., K] is rows of its last dimension."""
    if p == 0:
        return x
    flat = x.reshape(-1, x.shape[-1])
    mask = keep_mask(*flat.shape, p=p, seed=seed, lane=lane, device=x.device)
    return (flat * keep_scale(p)).masked_fill(~mask, 0).view(x.shape)


def shrink_reference(y: Tensor, shrink: Shrink) -> Tensor:
    """S [M, R] for y [M, K], in plain torch: the specification of what producers compute."""
    parts = [
        scale * (drop(y, p=shrink.p, seed=shrink.seed, lane=lane) @ a.to(y.dtype).t())
        for lane, (a, scale) in enumerate(zip(shrink.a, shrink.scales, strict=True))
    ]
    return torch.cat(parts, dim=-1)


def rank_slices(a: Sequence[Tensor]) -> list[slice]:
    """The columns of S that belong to each projection."""
    slices, start = [], 0
    for matrix in a:
        slices.append(slice(start, start + matrix.shape[0]))
        start += matrix.shape[0]
    return slices


@triton.jit
def mix32(x):
    """The hash finaliser on uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_keys(rows, seed):
    """key(row), uint32, for integer rows and a 64-bit seed."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    return mix32(mix32(rows.to(tl.uint32) + low) ^ high)


@triton.jit
def mask_bits(keys, cols):
    """bits(row, col), uint32: keys [BM], cols [BK] -> [BM, BK]."""
    return mix32(keys[:, None] ^ (cols.to(tl.uint32) * 0x9E3779B1)[None, :])


@triton.jit
def is_kept(bits, dropped, LANE: tl.constexpr):
    """keep of a lane from mask_bits; `dropped` is threshold(p)."""
    return ((bits >> (10 * LANE)) & 1023).to(tl.int32) >= dropped
