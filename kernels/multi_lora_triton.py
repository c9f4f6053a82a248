"""The Triton kernels of `multi_lora`: shrink and masked expand of a group of adapters that own neighbouring rows.

Every row finds its adapter in a small table, and with it its mask, its scale and its columns of S; all other columns of
that row are zero. Shape letters: M rows of the group, K inputs, R ranks of the group, J adapters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .op import Config, Kernel
from .shrink import is_kept, keep_scale, mask_bits, row_keys, threshold


@dataclass(frozen=True)
class Member:
    """Adapter number `index`, owner of rows start:stop of the batch."""

    index: int
    start: int
    stop: int
    rank: int
    scale: float
    p: float
    seed: int


@dataclass(frozen=True)
class Group:
    """Adapters with neighbouring rows."""

    members: tuple[Member, ...]

    @property
    def rows(self) -> slice:
        return slice(self.members[0].start, self.members[-1].stop)

    @property
    def indices(self) -> slice:
        return slice(self.members[0].index, self.members[-1].index + 1)

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """int64 [J, 6]: first row, last row + 1, seed, threshold, first column, last column + 1; fp32 [J, 2]: factor of
        what dropout keeps, scale. Rows are counted from the group's first."""
        integers, column, origin = [], 0, self.members[0].start
        for member in self.members:
            ends = (member.start - origin, member.stop - origin)
            integers.append((*ends, member.seed, threshold(member.p), column, column + member.rank))
            column += member.rank
        factors = [(keep_scale(member.p), member.scale) for member in self.members]
        return torch.tensor(integers, device=device), torch.tensor(factors, dtype=torch.float32, device=device)


@triton.jit
def _adapter_of(rows, integers_ptr, factors_ptr, J):
    """For each row: key of its mask, threshold, factor of what is kept, scale, columns [low, high) of its adapter."""
    keys = tl.zeros(rows.shape, tl.uint32)
    dropped = tl.zeros(rows.shape, tl.int32)
    low = tl.zeros(rows.shape, tl.int32)
    high = tl.zeros(rows.shape, tl.int32)
    keep = tl.zeros(rows.shape, tl.float32)
    scale = tl.zeros(rows.shape, tl.float32)
    for j in range(J):
        at = integers_ptr + j * 6
        start = tl.load(at)
        own = (rows >= start) & (rows < tl.load(at + 1))
        keys = tl.where(own, row_keys(rows - start, tl.load(at + 2)), keys)
        dropped = tl.where(own, tl.load(at + 3).to(tl.int32), dropped)
        low = tl.where(own, tl.load(at + 4).to(tl.int32), low)
        high = tl.where(own, tl.load(at + 5).to(tl.int32), high)
        keep = tl.where(own, tl.load(factors_ptr + j * 2), keep)
        scale = tl.where(own, tl.load(factors_ptr + j * 2 + 1), scale)
    return keys, dropped, keep, scale, low, high


@triton.jit
def _multi_shrink_kernel(
    x_ptr, a_ptr, s_ptr, integers_ptr, factors_ptr, M, K, R, J, x_stride, span,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """s [splits, M, R] of the columns of x that split program_id(1) owns."""
    start_m = tl.program_id(0).to(tl.int64) * BM
    lines, ranks = tl.arange(0, BM), tl.arange(0, BR)
    rows = start_m + lines
    keys, dropped, keep, scale, low, high = _adapter_of(rows, integers_ptr, factors_ptr, J)
    x_ptr += start_m * x_stride
    first = tl.program_id(1) * span
    total = tl.zeros((BM, BR), tl.float32)
    for start in range(first, tl.minimum(first + span, K), BK):
        cols = start + tl.arange(0, BK)
        inside = (rows < M)[:, None] & (cols < K)[None, :]
        x = tl.load(x_ptr + lines[:, None] * x_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        own = (ranks < R)[None, :] & (cols < K)[:, None]
        a = tl.load(a_ptr + ranks[None, :] * K + cols[:, None], mask=own, other=0.0)
        kept = is_kept(mask_bits(keys, cols), dropped[:, None], 0)
        x = tl.where(kept, x * keep[:, None], 0.0)
        total = tl.dot(x.to(a.dtype), a, total, input_precision="ieee")
    own = (ranks[None, :] >= low[:, None]) & (ranks[None, :] < high[:, None])
    total = tl.where(own, total * scale[:, None], 0.0)
    s_ptr += tl.program_id(1).to(tl.int64) * M * R
    tl.store(s_ptr + rows[:, None] * R + ranks[None, :], total, mask=(rows < M)[:, None] & (ranks < R)[None, :])


@triton.jit
def _multi_expand_kernel(
    ds_ptr, x_ptr, a_ptr, dx_ptr, da_ptr, integers_ptr, factors_ptr, M, K, R, J, x_stride, span, dx_rows,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dx [M, K] += mask∘(scale dS A) * keep; da [splits, R, K] of the rows that split program_id(1) owns.

    ds [M, R] has neither scale nor zeros yet. dx_rows is M, or 0 where there is no dx.
    """
    cols = tl.program_id(0) * BK + tl.arange(0, BK)
    ranks, lines = tl.arange(0, BR), tl.arange(0, BM)
    columns = (cols < K)[None, :]
    edge = (ranks < R)[:, None] & columns
    a = tl.load(a_ptr + ranks[:, None] * K + cols[None, :], mask=edge, other=0.0)
    total = tl.zeros((BR, BK), tl.float32)
    first = tl.program_id(1).to(tl.int64) * span
    for step in range(0, span, BM):
        start_m = first + step
        rows = start_m + lines
        keys, dropped, keep, scale, low, high = _adapter_of(rows, integers_ptr, factors_ptr, J)
        own = (ranks[None, :] >= low[:, None]) & (ranks[None, :] < high[:, None]) & (rows < M)[:, None]
        ds = tl.load(ds_ptr + rows[:, None] * R + ranks[None, :], mask=own, other=0.0).to(tl.float32)
        ds = (ds * scale[:, None]).to(a.dtype)
        kept = is_kept(mask_bits(keys, cols), dropped[:, None], 0)
        factor = tl.where(kept, 1.0, 0.0) * keep[:, None]
        x_at = x_ptr + start_m * x_stride + lines[:, None] * x_stride + cols[None, :]
        x = tl.load(x_at, mask=(rows < M)[:, None] & columns, other=0.0).to(tl.float32)
        total = tl.dot(tl.trans(ds), (x * factor).to(a.dtype), total, input_precision="ieee")
        dx_at = dx_ptr + start_m * K + lines[:, None] * K + cols[None, :]
        has_dx = (rows < dx_rows)[:, None] & columns
        dx = tl.load(dx_at, mask=has_dx, other=0.0).to(tl.float32)
        tl.store(dx_at, dx + tl.dot(ds, a, input_precision="ieee") * factor, mask=has_dx)
    da_ptr += tl.program_id(1).to(tl.int64) * R * K
    tl.store(da_ptr + ranks[:, None] * K + cols[None, :], total, mask=edge)


def _configs(*blocks: tuple[int, int, int, int]) -> tuple[Config, ...]:
    """(BM, BK, BR, warps) of each."""
    return tuple(
        Config({"BM": BM, "BK": BK, "BR": BR}, num_warps=warps, elements=BM * BK) for BM, BK, BR, warps in blocks
    )


SHRINK = _configs((32, 128, 16, 8), (32, 64, 128, 8), (32, 32, 256, 8))
EXPAND = _configs((32, 64, 16, 8), (32, 32, 128, 8), (32, 32, 256, 8))
NUM_PROGRAMS = 264
"""Programs that keep a large GPU busy: the rows or columns of one block are split until there are as many."""


def _config(configs: Sequence[Config], num_ranks: int) -> Config:
    """The smallest block of ranks that holds them. Raises ValueError where none does."""
    fitting = [config for config in configs if config.constants["BR"] >= num_ranks]
    if not fitting:
        raise ValueError(f"rank {num_ranks} is more than {configs[-1].constants['BR']}")
    return fitting[0]


def _splits(length: int, block: int, num_others: int) -> tuple[int, int]:
    """(number of splits of `length`, length of each as a multiple of `block`)."""
    blocks = max(1, triton.cdiv(length, block))
    span = triton.cdiv(blocks, min(blocks, triton.cdiv(NUM_PROGRAMS, max(1, num_others)))) * block
    return triton.cdiv(length, span), span


def shrink(x: Tensor, a: Tensor, group: Group) -> Tensor:
    """S [M, R] of the group's rows x [M, K], a [R, K] of all its adapters."""
    (M, K), R = x.shape, a.shape[0]
    if M == 0:
        return x.new_empty(0, R)
    config = _config(SHRINK, R)
    num_rows = triton.cdiv(M, config.constants["BM"])
    splits, span = _splits(K, config.constants["BK"], num_rows)
    s = x.new_empty((splits, M, R), dtype=torch.float32 if splits > 1 else x.dtype)
    _multi_shrink_kernel[num_rows, splits](
        x, a, s, *group.tables(x.device), M, K, R, len(group.members), x.stride(0), span,
        **config.constants, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return s[0] if splits == 1 else s.sum(0).to(x.dtype)


def expand(ds: Tensor, x: Tensor, a: Tensor, dx: Tensor | None, group: Group) -> Tensor:
    """dA [R, K] in fp32; adds the group's part to dx [M, K] (contiguous) where given."""
    (M, K), R = x.shape, a.shape[0]
    config = _config(EXPAND, R)
    num_cols = triton.cdiv(K, config.constants["BK"])
    splits, span = _splits(M, config.constants["BM"], num_cols)
    da = x.new_empty((splits, R, K), dtype=torch.float32)
    _multi_expand_kernel[num_cols, splits](
        ds, x, a, x if dx is None else dx, da, *group.tables(x.device), M, K, R, len(group.members), x.stride(0),
        span, 0 if dx is None else M, **config.constants, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return da.sum(0)


SIZES = dict.fromkeys(("M", "K", "R", "J", "x_stride", "span"), "i32")
TABLES = {"integers_ptr": "*i64", "factors_ptr": "*fp32"}
KERNELS = (
    Kernel(
        fn=_multi_shrink_kernel,
        signature={**dict.fromkeys(("x_ptr", "a_ptr", "s_ptr"), "*bf16"), **TABLES, **SIZES},
        configs=SHRINK,
        uses_mma=True,
        divisible=("K", "x_stride"),
    ),
    Kernel(
        fn=_multi_expand_kernel,
        signature={
            **dict.fromkeys(("ds_ptr", "x_ptr", "a_ptr", "dx_ptr"), "*bf16"),
            "da_ptr": "*fp32", **TABLES, **SIZES, "dx_rows": "i32",
        },
        configs=EXPAND,
        uses_mma=True,
        divisible=("K", "x_stride"),
    ),
)  # fmt: skip
