"""Triton kernels of the skinny products around a frozen product, and that product with the low-rank update inside.

    shrink:  S_j = scale_j * mask_j(x) A_jᵀ                      [M, R] from x [M, K], x read once for up to three masks
    expand:  Y += scale * sum_j mask_j∘(S_j L_j)                 in place; L_j is B_jᵀ forward, A_j backward
    gemm:    Y = X W + bias + scale * sum_j mask_j∘(S_j L_j)     the same sum inside the base product

The sum comes after the loop of the gemm, but before it where there are masks, which need the loop's registers.

M rows, K inputs, N outputs, r_j ranks, c_j first column of S_j in S. Masks: see `shrink`. The gemm is persistent: each
program makes every PROGRAMS-th tile, in groups of GROUP rows of tiles that share columns of W in the cache.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import joined
from .op import Config, Kernel
from .shrink import is_kept, keep_scale, mask_bits, row_keys, threshold

FIRST_LONG = 2**32


@triton.jit
def _masked_dot(sums, x, bits, dropped, a_ptr, ranks, rank, cols, K, LANE: tl.constexpr, DROPS: tl.constexpr):
    """sums [BM, BR] + mask(x) [BM, BK] a [ranks, cols]ᵀ."""
    inside = (ranks < rank)[None, :] & (cols < K)[:, None]
    a = tl.load(a_ptr + ranks[None, :].to(tl.int64) * K + cols[:, None], mask=inside, other=0.0).to(tl.float32)
    if DROPS:
        x = tl.where(is_kept(bits, dropped, LANE), x, 0.0)
    dtype = a_ptr.dtype.element_ty
    return tl.dot(x.to(dtype), a.to(dtype), sums, input_precision="ieee")


@triton.jit
def _store_ranks(s_ptr, sums, rows, M, stride_s, column, ranks, rank):
    inside = (rows < M)[:, None] & (ranks < rank)[None, :]
    tl.store(s_ptr + rows[:, None] * stride_s + (column + ranks)[None, :], sums, mask=inside)


@triton.jit
def _shrink_kernel(
    x_ptr, a0_ptr, a1_ptr, a2_ptr, s_ptr,
    M, K, r0, r1, r2, c0, c1, c2, stride_x, stride_s, seed, dropped, scale0, scale1, scale2,
    LANES: tl.constexpr, DROPS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """BM rows of S, ranks of every projection from BR * program_id(1) on."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    keys = row_keys(rows, seed)
    sums0 = tl.zeros((BM, BR), tl.float32)
    sums1 = tl.zeros((BM, BR), tl.float32)
    sums2 = tl.zeros((BM, BR), tl.float32)
    for k in range(0, K, BK):
        cols = k + tl.arange(0, BK)
        inside = (rows < M)[:, None] & (cols < K)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_x + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        bits = mask_bits(keys, cols)
        sums0 = _masked_dot(sums0, x, bits, dropped, a0_ptr, ranks, r0, cols, K, 0, DROPS)
        if LANES > 1:
            sums1 = _masked_dot(sums1, x, bits, dropped, a1_ptr, ranks, r1, cols, K, 1, DROPS)
            sums2 = _masked_dot(sums2, x, bits, dropped, a2_ptr, ranks, r2, cols, K, 2, DROPS)
    _store_ranks(s_ptr, sums0 * scale0, rows, M, stride_s, c0, ranks, r0)
    if LANES > 1:
        _store_ranks(s_ptr, sums1 * scale1, rows, M, stride_s, c1, ranks, r1)
        _store_ranks(s_ptr, sums2 * scale2, rows, M, stride_s, c2, ranks, r2)


@triton.jit
def _low_rank(
    total, bits, dropped, s_ptr, l_ptr, rows, cols, M, N, rank, column, stride_s,
    LANE: tl.constexpr, DROPS: tl.constexpr, TURNED: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """total [BM, BN] + mask∘(S[:, column:column+rank] L); L is [rank, N], or [N, rank] with TURNED."""
    sums = tl.zeros_like(total) if DROPS else total
    dtype = s_ptr.dtype.element_ty
    for r in range(0, rank, BR):
        ranks = r + tl.arange(0, BR)
        inside = (rows < M)[:, None] & (ranks < rank)[None, :]
        s = tl.load(s_ptr + rows[:, None] * stride_s + (column + ranks)[None, :], mask=inside, other=0.0)
        if TURNED:
            places = cols[None, :].to(tl.int64) * rank + ranks[:, None]
        else:
            places = ranks[:, None].to(tl.int64) * N + cols[None, :]
        low = tl.load(l_ptr + places, mask=(ranks < rank)[:, None] & (cols < N)[None, :], other=0.0)
        sums = tl.dot(s.to(tl.float32).to(dtype), low.to(tl.float32).to(dtype), sums, input_precision="ieee")
    if DROPS:
        return total + tl.where(is_kept(bits, dropped, LANE), sums, 0.0)
    return sums


@triton.jit
def _expand_kernel(
    y_ptr, s_ptr, l0_ptr, l1_ptr, l2_ptr,
    M, N, r0, r1, r2, c0, c1, c2, stride_y, stride_s, seed, dropped, scale,
    LANES: tl.constexpr, DROPS: tl.constexpr, TURNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BN] of Y, read and written."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    bits = mask_bits(row_keys(rows, seed), cols)
    total = tl.zeros((BM, BN), tl.float32)
    total = _low_rank(total, bits, dropped, s_ptr, l0_ptr, rows, cols, M, N, r0, c0, stride_s, 0, DROPS, TURNED, BR)
    if LANES > 1:
        total = _low_rank(total, bits, dropped, s_ptr, l1_ptr, rows, cols, M, N, r1, c1, stride_s, 1, DROPS, TURNED, BR)
        total = _low_rank(total, bits, dropped, s_ptr, l2_ptr, rows, cols, M, N, r2, c2, stride_s, 2, DROPS, TURNED, BR)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    places = y_ptr + rows[:, None] * stride_y + cols[None, :]
    y = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    tl.store(places, y + total * scale, mask=inside)


@triton.jit
def _gemm_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, s_ptr, l0_ptr, l1_ptr, l2_ptr,
    M, N, K, r0, r1, r2, c0, c1, c2, stride_x, stride_w, stride_y, stride_s, seed, dropped, scale,
    LANES: tl.constexpr, DROPS: tl.constexpr, TURNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Y [M, N]; W is [K, N], or [N, K] with TURNED, rows stride_w apart."""
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    dtype = x_ptr.dtype.element_ty
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        first = tile // (GROUP * tiles_n) * GROUP
        height = min(tiles_m - first, GROUP)
        rows = (first + tile % (GROUP * tiles_n) % height).to(tl.int64) * BM + tl.arange(0, BM)
        cols = (tile % (GROUP * tiles_n) // height).to(tl.int64) * BN + tl.arange(0, BN)
        sums = tl.zeros((BM, BN), tl.float32)
        if DROPS:
            bits = mask_bits(row_keys(rows, seed), cols)
            sums = _low_rank(sums, bits, dropped, s_ptr, l0_ptr, rows, cols, M, N, r0, c0, stride_s, 0, True, False, BR)
            if LANES > 1:
                sums = _low_rank(
                    sums, bits, dropped, s_ptr, l1_ptr, rows, cols, M, N, r1, c1, stride_s, 1, True, False, BR
                )
                sums = _low_rank(
                    sums, bits, dropped, s_ptr, l2_ptr, rows, cols, M, N, r2, c2, stride_s, 2, True, False, BR
                )
            sums *= scale
        for k in range(0, K, BK):
            deep = k + tl.arange(0, BK)
            x_inside = (rows < M)[:, None] & (deep < K)[None, :]
            x = tl.load(x_ptr + rows[:, None] * stride_x + deep[None, :], mask=x_inside, other=0.0)
            if TURNED:
                places = cols[None, :] * stride_w + deep[:, None]
            else:
                places = deep[:, None].to(tl.int64) * stride_w + cols[None, :]
            w = tl.load(w_ptr + places, mask=(deep < K)[:, None] & (cols < N)[None, :], other=0.0)
            sums = tl.dot(x.to(tl.float32).to(dtype), w.to(tl.float32).to(dtype), sums, input_precision="ieee")
        if not DROPS:
            sums = _low_rank(sums, sums, 0, s_ptr, l0_ptr, rows, cols, M, N, r0, c0, stride_s, 0, False, TURNED, BR)
        if TURNED:
            sums += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        inside = (rows < M)[:, None] & (cols < N)[None, :]
        tl.store(y_ptr + rows[:, None] * stride_y + cols[None, :], sums, mask=inside)


WIDE_RANK = 64
RANKS = (16, WIDE_RANK)


def rank_block(ranks: Sequence[slice]) -> int:
    return RANKS[0] if max(own.stop - own.start for own in ranks) <= RANKS[0] else WIDE_RANK


def lanes_of(tensors: Sequence[Tensor], ranks: Sequence[slice]) -> tuple[list[Tensor], list[int], list[int], int]:
    """Three of everything (absent projections have rank 0), and the number of lanes to compile for: one or three."""
    missing = 3 - len(tensors)
    sizes = [own.stop - own.start for own in ranks]
    starts = [own.start for own in ranks]
    lanes = 1 if len(tensors) == 1 else 3
    return [*tensors, *[tensors[0]] * missing], sizes + [0] * missing, starts + [0] * missing, lanes


def _joined(low: Sequence[Tensor], ranks: Sequence[slice]) -> tuple[list[Tensor], list[slice]]:
    """Without masks the projections are one of a larger rank."""
    return [joined(low, dim=0)], [slice(ranks[0].start, ranks[-1].stop)]


SHRINK_CONFIGS = tuple(
    Config(
        {"LANES": lanes, "DROPS": drops, "BM": 64, "BK": 32 if lanes > 1 and rank > 16 else 64, "BR": rank},
        num_warps=8 if lanes > 1 and rank > 16 else 4,
        num_stages=2,
    )
    for lanes, drops, rank in ((1, False, 64), (1, True, 16), (1, True, 64), (3, True, 16), (3, True, 64))
)


def shrink(
    x: Tensor, a: Sequence[Tensor], scales: Sequence[float], *, out: Tensor, ranks: Sequence[slice], p: float, seed: int
) -> None:
    """out[:, ranks[j]] = scales[j] * drop_j(x) a_jᵀ for up to three projections; a contiguous, in the dtype of x."""
    M, K = x.shape
    if p == 0 and len(set(scales)) > 1:
        for part, own, scale in zip(a, ranks, scales, strict=True):
            shrink(x, [part], [scale], out=out, ranks=[own], p=p, seed=seed)
        return
    if p == 0:
        (a, ranks), scales = _joined(a, ranks), scales[:1]
    tensors, sizes, starts, lanes = lanes_of(a, ranks)
    block = rank_block(ranks) if p > 0 else WIDE_RANK
    config = pick(SHRINK_CONFIGS, LANES=lanes, DROPS=p > 0, BR=block)
    factors = [scale * keep_scale(p) for scale in scales] + [0.0] * (3 - len(scales))
    grid = (triton.cdiv(M, config.constants["BM"]), triton.cdiv(max(sizes), block))
    _shrink_kernel[grid](
        x, *tensors, out, M, K, *sizes, *starts, x.stride(0), out.stride(0), seed or FIRST_LONG, threshold(p), *factors,
        **config.constants, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


EXPAND_CONFIGS = tuple(
    Config(
        {"LANES": lanes, "DROPS": drops, "TURNED": turned, "BM": 64, "BN": 128, "BR": rank},
        num_warps=8, num_stages=1, elements=64 * 128,
    )
    for lanes, drops, turned, rank in (
        (1, False, True, 16), (1, False, True, 64), (1, False, False, 64),
        (1, True, False, 16), (1, True, False, 64), (3, True, False, 16), (3, True, False, 64),
    )
)  # fmt: skip


def expand(
    y: Tensor, s: Tensor, low: Sequence[Tensor], *, ranks: Sequence[slice], turned: bool, p: float = 0.0, seed: int = 0
) -> None:
    """y += keep_scale * sum_j mask_j∘(S_j L_j), in place, for up to three L_j [r_j, N] (turned: one, [N, r])."""
    if p == 0:
        low, ranks = _joined(low, ranks)
    M, N = y.shape
    tensors, sizes, starts, lanes = lanes_of(low, ranks)
    block = rank_block(ranks) if turned or p > 0 else WIDE_RANK
    config = pick(EXPAND_CONFIGS, LANES=lanes, DROPS=p > 0, TURNED=turned, BR=block)
    grid = (triton.cdiv(M, config.constants["BM"]), triton.cdiv(N, config.constants["BN"]))
    _expand_kernel[grid](
        y, s, *tensors, M, N, *sizes, *starts, y.stride(0), s.stride(0),
        seed or FIRST_LONG, threshold(p), keep_scale(p),
        **config.constants, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


GEMM_CONFIGS = tuple(
    Config(
        {
            "LANES": lanes, "DROPS": drops, "TURNED": turned,
            "BM": 128, "BN": width, "BK": 64, "BR": 16, "GROUP": 8,
        },
        num_warps=8, num_stages=3, elements=128 * width,
    )
    for lanes, drops, turned, width in (
        (1, False, True, 256), (1, False, False, 128), (1, True, False, 128), (3, True, False, 64),
    )
)  # fmt: skip


def gemm(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    low: Sequence[Tensor],
    *,
    out: Tensor,
    ranks: Sequence[slice],
    turned: bool,
    bias: Tensor | None = None,
    p: float = 0.0,
    seed: int = 0,
) -> None:
    """out [M, N] = x W + bias + keep_scale * sum_j mask_j∘(S_j L_j); weight [K, N] and L_j [r_j, N].

    turned: weight [N, K] and one L [N, r], no mask. The last stride of every matrix is 1.
    """
    M, K = x.shape
    N = out.shape[1]
    if p == 0:
        low, ranks = _joined(low, ranks)
    tensors, sizes, starts, lanes = lanes_of(low, ranks)
    config = pick(GEMM_CONFIGS, LANES=lanes, DROPS=p > 0, TURNED=turned)
    constants = config.constants
    tiles = triton.cdiv(M, constants["BM"]) * triton.cdiv(N, constants["BN"])
    bias = out.new_zeros(N if turned else 1) if bias is None else bias
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    _gemm_kernel[(min(tiles, programs),)](
        x, weight, bias, out, s, *tensors, M, N, K, *sizes, *starts,
        x.stride(0), weight.stride(0), out.stride(0), s.stride(0), seed or FIRST_LONG, threshold(p), keep_scale(p),
        **constants, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def pick(configs: Sequence[Config], **wanted: int | bool) -> Config:
    """The configuration with these constants."""
    return next(c for c in configs if all(c.constants[name] == value for name, value in wanted.items()))


_INTEGERS = dict.fromkeys(("M", "N", "K", "r0", "r1", "r2", "c0", "c1", "c2", "dropped"), "i32")
_STRIDES = dict.fromkeys(("stride_x", "stride_w", "stride_y", "stride_s"), "i32")
_POINTERS = {f"{name}_ptr": "*bf16" for name in ("x", "w", "y", "s", "bias", "a0", "a1", "a2", "l0", "l1", "l2")}
_FLOATS = dict.fromkeys(("scale", "scale0", "scale1", "scale2"), "fp32")
SIGNATURE = {**_INTEGERS, **_STRIDES, **_POINTERS, **_FLOATS, "seed": "i64"}
DIVISIBLE = ("N", "K", "stride_x", "stride_w", "stride_y", "stride_s", "r0", "r1", "r2")
KERNELS = tuple(
    Kernel(fn=fn, signature=SIGNATURE, configs=configs, uses_mma=True, divisible=DIVISIBLE)
    for fn, configs in (
        (_shrink_kernel, SHRINK_CONFIGS), (_expand_kernel, EXPAND_CONFIGS), (_gemm_kernel, GEMM_CONFIGS),
    )
)  # fmt: skip
