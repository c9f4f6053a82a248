"""Gradients of a low-rank update: dS and dB in one pass over dy, dA in one pass over x with the masks made anew.

    dS_j = scale_j * dy_j B_j,   dB_j = dy_jᵀ S_j,   dA_j = dS_jᵀ drop_j(x)

On the GPU each is a sum over parts: programs write fp32 partial sums, a second kernel adds them in a fixed order. No
atomics, so results are equal from run to run. M rows, K inputs, N outputs, r rank. Masks: see `shrink`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import lora_cpu
from .lora_gemm import DIVISIBLE, FIRST_LONG, SIGNATURE, WIDE_RANK, expand, lanes_of, pick, rank_block
from .op import Backend, Case, Config, Kernel, Op, backend_of, random_normal
from .shrink import drop, is_kept, keep_scale, mask_bits, row_keys, threshold


def lora_grads_reference(
    dy: Tensor, s: Tensor, b: Tensor, *, x: Tensor, p: float = 0.0, seed: int = 0, lane: int = 0, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(dS, dB, dA), in plain torch."""
    ds = scale * (dy @ b)
    return ds, dy.t() @ s, ds.t() @ drop(x, p=p, seed=seed, lane=lane)


@triton.jit
def _ds_db_kernel(
    y_ptr, s_ptr, b_ptr, ds_ptr, db_ptr,
    M, N, rank, column, stride_y, stride_s, blocks,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Program (i, j, k): rows of blocks * BM from i on, BN columns of dy, BR ranks.

    ds [parts of N, M, rank] and db [parts of M, N, rank] are partial sums in fp32.
    """
    cols = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    ranks = tl.program_id(2) * BR + tl.arange(0, BR)
    dtype = y_ptr.dtype.element_ty
    b_inside = (cols < N)[:, None] & (ranks < rank)[None, :]
    b = tl.load(b_ptr + cols[:, None] * rank + ranks[None, :], mask=b_inside, other=0.0).to(tl.float32).to(dtype)
    ds_ptr += tl.program_id(1).to(tl.int64) * M * rank
    db_ptr += tl.program_id(0).to(tl.int64) * N * rank
    db = tl.zeros((BN, BR), tl.float32)
    for block in range(blocks):
        rows = (tl.program_id(0).to(tl.int64) * blocks + block) * BM + tl.arange(0, BM)
        inside = (rows < M)[:, None] & (cols < N)[None, :]
        dy = tl.load(y_ptr + rows[:, None] * stride_y + cols[None, :], mask=inside, other=0.0).to(tl.float32).to(dtype)
        s_inside = (rows < M)[:, None] & (ranks < rank)[None, :]
        s = tl.load(s_ptr + rows[:, None] * stride_s + (column + ranks)[None, :], mask=s_inside, other=0.0)
        ds = tl.dot(dy, b, input_precision="ieee")
        tl.store(ds_ptr + rows[:, None] * rank + ranks[None, :], ds, mask=s_inside)
        db = tl.dot(tl.trans(dy), s.to(tl.float32).to(dtype), db, input_precision="ieee")
    tl.store(db_ptr + cols[:, None] * rank + ranks[None, :], db, mask=b_inside)


@triton.jit
def _turned_dot(
    sums, x, bits, dropped, s_ptr, rows, ranks, M, rank, column, stride_s, LANE: tl.constexpr, DROPS: tl.constexpr
):
    """sums [BR, BK] + dS [rows, ranks]ᵀ mask(x) [BM, BK]."""
    inside = (rows < M)[None, :] & (ranks < rank)[:, None]
    places = rows[None, :] * stride_s + (column + ranks)[:, None]
    ds = tl.load(s_ptr + places, mask=inside, other=0.0).to(tl.float32)
    if DROPS:
        x = tl.where(is_kept(bits, dropped, LANE), x, 0.0)
    dtype = s_ptr.dtype.element_ty
    return tl.dot(ds.to(dtype), x.to(dtype), sums, input_precision="ieee")


@triton.jit
def _da_kernel(
    x_ptr, s_ptr, a0_ptr, a1_ptr, a2_ptr,
    M, K, r0, r1, r2, c0, c1, c2, stride_x, stride_s, seed, dropped, blocks,
    LANES: tl.constexpr, DROPS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Partial sums a_j [parts of M, r_j, K] in fp32 of dS_jᵀ mask_j(x) over blocks * BM rows."""
    cols = tl.program_id(1) * BK + tl.arange(0, BK)
    ranks = tl.program_id(2) * BR + tl.arange(0, BR)
    sums0 = tl.zeros((BR, BK), tl.float32)
    sums1 = tl.zeros((BR, BK), tl.float32)
    sums2 = tl.zeros((BR, BK), tl.float32)
    for block in range(blocks):
        rows = (tl.program_id(0).to(tl.int64) * blocks + block) * BM + tl.arange(0, BM)
        inside = (rows < M)[:, None] & (cols < K)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_x + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        bits = mask_bits(row_keys(rows, seed), cols)
        sums0 = _turned_dot(sums0, x, bits, dropped, s_ptr, rows, ranks, M, r0, c0, stride_s, 0, DROPS)
        if LANES > 1:
            sums1 = _turned_dot(sums1, x, bits, dropped, s_ptr, rows, ranks, M, r1, c1, stride_s, 1, DROPS)
            sums2 = _turned_dot(sums2, x, bits, dropped, s_ptr, rows, ranks, M, r2, c2, stride_s, 2, DROPS)
    part = tl.program_id(0).to(tl.int64)
    _store_part(a0_ptr, sums0, part, ranks, cols, r0, K)
    if LANES > 1:
        _store_part(a1_ptr, sums1, part, ranks, cols, r1, K)
        _store_part(a2_ptr, sums2, part, ranks, cols, r2, K)


@triton.jit
def _store_part(a_ptr, sums, part, ranks, cols, rank, K):
    places = (part * rank + ranks[:, None]) * K + cols[None, :]
    tl.store(a_ptr + places, sums, mask=(ranks < rank)[:, None] & (cols < K)[None, :])


@triton.jit
def _sum_parts_kernel(parts_ptr, y_ptr, count, width, stride_y, stride, parts, scale, keeps, BLOCK: tl.constexpr):
    """y (rows of `width`, stride_y apart) = keeps * y + scale * the sum of arrays of `count`, `stride` apart."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    total = tl.zeros((BLOCK,), tl.float32)
    start = parts_ptr
    for _ in range(parts):
        total += tl.load(start + places, mask=inside, other=0.0)
        start += stride
    to = y_ptr + places // width * stride_y + places % width
    total *= scale
    if keeps != 0:
        total += tl.load(to, mask=inside, other=0.0).to(tl.float32)
    tl.store(to, total, mask=inside)


DS_DB_CONFIGS = tuple(
    Config({"BM": 64, "BN": columns, "BR": rank}, num_warps=8, num_stages=2)
    for columns, rank in ((256, 16), (128, WIDE_RANK))
)
DA_CONFIGS = tuple(
    Config(
        {"LANES": lanes, "DROPS": drops, "BM": 64 if columns > 64 else 32, "BK": columns, "BR": rank},
        num_warps=8, num_stages=2,
    )
    for lanes, drops, columns, rank in (
        (1, False, 128, 64), (1, True, 128, 16), (1, True, 128, 64), (3, True, 128, 16), (3, True, 64, 64),
    )
)  # fmt: skip
SUM_CONFIG = Config({"BLOCK": 1024}, num_warps=4, num_stages=1)
BLOCKS = 8
"""Blocks of rows that one program adds up before it writes a part."""


def _sum_parts(parts: Tensor, out: Tensor, *, scale: float = 1.0, keeps: bool = False) -> None:
    """out [rows, width] = (out +) scale * the sum over the first dimension of parts, in that order."""
    count = parts[0].numel()
    if not count:
        return
    grid = (triton.cdiv(count, SUM_CONFIG.constants["BLOCK"]),)
    _sum_parts_kernel[grid](
        parts, out, count, out.shape[-1], out.stride(0), parts.stride(0), parts.shape[0], scale, int(keeps),
        **SUM_CONFIG.constants, num_warps=SUM_CONFIG.num_warps, num_stages=SUM_CONFIG.num_stages,
    )  # fmt: skip


def _parts(*shape: int, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _ds_db(dy: Tensor, s: Tensor, b: Tensor, own: slice) -> tuple[Tensor, Tensor]:
    """Parts of dS [parts, M, r] and of dB [parts, N, r] of one projection."""
    (M, N), rank = dy.shape, b.shape[1]
    config = pick(DS_DB_CONFIGS, BR=rank_block([own]))
    tile = config.constants
    grid = (triton.cdiv(M, tile["BM"] * BLOCKS), triton.cdiv(N, tile["BN"]), triton.cdiv(rank, tile["BR"]))
    ds, db = _parts(grid[1], M, rank, like=dy), _parts(grid[0], N, rank, like=dy)
    _ds_db_kernel[grid](
        dy, s, b, ds, db, M, N, rank, own.start, dy.stride(0), s.stride(0), BLOCKS,
        **tile, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return ds, db


def _da(ds: Tensor, x: Tensor, ranks: Sequence[slice], *, p: float, seed: int) -> list[Tensor]:
    """Parts of dA_j / keep_scale [parts, r_j, K] of up to three projections, or of one without dropout."""
    M, K = x.shape
    config = pick(
        DA_CONFIGS, LANES=1 if len(ranks) == 1 else 3, DROPS=p > 0, BR=rank_block(ranks) if p > 0 else WIDE_RANK
    )
    tile = config.constants
    longest = max(own.stop - own.start for own in ranks)
    grid = (triton.cdiv(M, tile["BM"] * BLOCKS), triton.cdiv(K, tile["BK"]), triton.cdiv(longest, tile["BR"]))
    parts = [_parts(grid[0], own.stop - own.start, K, like=x) for own in ranks]
    tensors, sizes, starts, _ = lanes_of(parts, ranks)
    _da_kernel[grid](
        x, ds, *tensors, M, K, *sizes, *starts, x.stride(0), ds.stride(0), seed or FIRST_LONG, threshold(p), BLOCKS,
        **tile, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return parts


def grads_b(
    dy: Tensor,
    s: Tensor,
    b: Sequence[Tensor],
    scales: Sequence[float],
    *,
    columns: Sequence[slice],
    ranks: Sequence[slice],
    ds: Tensor | None,
    dtypes: Sequence[torch.dtype | None],
    backend: Backend,
) -> list[Tensor | None]:
    """ds[:, ranks[j]] = scales[j] * dy_j b_j where ds is given; db_j = dy_jᵀ S_j in dtypes[j] (None: not wanted)."""
    if backend != "triton":
        return lora_cpu.grads_b(
            dy, s, b, scales, columns=columns, ranks=ranks, ds=ds, dtypes=dtypes, backend=backend
        )  # fmt: skip
    results: list[Tensor | None] = []
    for part, where, own, scale, dtype in zip(b, columns, ranks, scales, dtypes, strict=True):
        ds_parts, db_parts = _ds_db(dy[:, where], s, part, own)
        if ds is not None:
            _sum_parts(ds_parts, ds[:, own], scale=scale)
        grad = None if dtype is None else torch.empty(part.shape, dtype=dtype, device=dy.device)
        if grad is not None:
            _sum_parts(db_parts, grad)
        results.append(grad)
    return results


def grads_a(
    ds: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    *,
    dx: Tensor | None,
    ranks: Sequence[slice],
    dtypes: Sequence[torch.dtype | None],
    p: float,
    seed: int,
    backend: Backend,
) -> list[Tensor | None]:
    """dA_j = dS_jᵀ drop_j(x) in dtypes[j] (None: not wanted); dx += sum_j mask_j∘(dS_j a_j) * keep_scale where given.

    Up to three projections; ds holds the scales already.
    """
    if backend != "triton":
        return lora_cpu.grads_a(ds, x, a, dx=dx, ranks=ranks, dtypes=dtypes, p=p, seed=seed, backend=backend)
    if dx is not None:
        expand(dx, ds, a, ranks=ranks, turned=False, p=p, seed=seed)
    if all(dtype is None for dtype in dtypes):
        return [None] * len(a)
    if p == 0:
        (whole,) = _da(ds, x, [slice(ranks[0].start, ranks[-1].stop)], p=p, seed=seed)
        parts = [whole[:, own.start - ranks[0].start : own.stop - ranks[0].start] for own in ranks]
    else:
        parts = _da(ds, x, ranks, p=p, seed=seed)
    results: list[Tensor | None] = []
    for part, dtype in zip(parts, dtypes, strict=True):
        grad = None if dtype is None else torch.empty(part.shape[1:], dtype=dtype, device=x.device)
        if grad is not None:
            _sum_parts(part, grad, scale=keep_scale(p))
        results.append(grad)
    return results


def _rows(t: Tensor) -> Tensor:
    """The same matrix with its last stride 1."""
    return t if t.stride(-1) == 1 else t.contiguous()


def lora_grads(
    dy: Tensor,
    s: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(dS [M, r] = scale * dy b, dB [N, r] = dyᵀ s) for dy [M, N], s [M, r], b [N, r], in one pass over dy.

    dtype: that of dB (default: b's). into: an existing gradient [N, r] to which dB is added, and which is returned.
    """
    dy, s = _rows(dy), _rows(s)
    backend, own, where = backend_of(dy), slice(0, b.shape[1]), slice(0, b.shape[0])
    ds = dy.new_empty(dy.shape[0], b.shape[1])
    (db,) = grads_b(
        dy, s, [b.to(dy.dtype).contiguous()], [scale], columns=[where], ranks=[own], ds=ds,
        dtypes=[dtype or b.dtype if into is None else into.dtype], backend=backend,
    )  # fmt: skip
    assert db is not None
    return ds, db if into is None else into.add_(db)


def lora_grad_a(
    ds: Tensor,
    x: Tensor,
    *,
    p: float = 0.0,
    seed: int = 0,
    lane: int = 0,
    dtype: torch.dtype | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """dA [r, K] = dsᵀ drop_lane(x) for ds [M, r] and x [M, K]; the mask is made anew.

    dtype: that of dA (default: x's). into: an existing gradient [r, K] to which dA is added, and which is returned.
    """
    ds, x = _rows(ds), _rows(x)
    absent = [x.new_empty(0, x.shape[1])] * (lane if p > 0 else 0)
    a = [*absent, x.new_empty(ds.shape[1], x.shape[1])]
    (*_, da) = grads_a(
        ds, x, a, dx=None, ranks=[*[slice(0, 0)] * len(absent), slice(0, ds.shape[1])],
        dtypes=[*[None] * len(absent), dtype or x.dtype if into is None else into.dtype],
        p=p, seed=seed, backend=backend_of(x),
    )  # fmt: skip
    assert da is not None
    return da if into is None else into.add_(da)


def _all(
    dy: Tensor, s: Tensor, b: Tensor, *, x: Tensor, p: float = 0.0, seed: int = 0, lane: int = 0, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    ds, db = lora_grads(dy, s, b, scale=scale)
    return ds, db, lora_grad_a(ds, x, p=p, seed=seed, lane=lane)


def _make_inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
    M, K, N, r = (case[name] for name in "MKNr")
    tensors = {"dy": (M, N), "s": (M, r), "b": (N, r), "x": (M, K)}
    inputs: dict[str, Any] = {
        name: random_normal(*shape, dtype=dtype, device=device, generator=generator) for name, shape in tensors.items()
    }
    return {**inputs, "p": case["p"], "seed": 2**40 + 12345, "lane": case.get("lane", 0), "scale": 1.5}


OP = Op(
    name="lora_grads",
    summary="gradients of the low-rank factors, without atomics",
    reference=lora_grads_reference,
    function=_all,
    make_inputs=_make_inputs,
    cases=(
        {"M": 1, "K": 16, "N": 16, "r": 1, "p": 0.0},
        {"M": 7, "K": 40, "N": 33, "r": 8, "p": 0.1, "lane": 1},
        {"M": 33, "K": 24, "N": 17, "r": 130, "p": 0.5, "lane": 2},
        {"M": 600, "K": 150, "N": 272, "r": 16, "p": 0.05},
    ),
    kernels=(
        *(
            Kernel(
                fn=fn,
                signature={**SIGNATURE, "b_ptr": "*bf16", "ds_ptr": "*fp32", "db_ptr": "*fp32", "rank": "i32",
                           "column": "i32", "blocks": "i32", "a0_ptr": "*fp32", "a1_ptr": "*fp32", "a2_ptr": "*fp32"},
                configs=configs, uses_mma=True, divisible=(*DIVISIBLE, "rank", "column"),
            )
            for fn, configs in ((_ds_db_kernel, DS_DB_CONFIGS), (_da_kernel, DA_CONFIGS))
        ),
        Kernel(
            fn=_sum_parts_kernel,
            signature={"parts_ptr": "*fp32", "y_ptr": "*bf16", "count": "i32", "width": "i32", "stride_y": "i32",
                       "stride": "i32", "parts": "i32", "scale": "fp32", "keeps": "i32"},
            configs=(SUM_CONFIG,),
            divisible=("width", "stride_y", "count", "stride"),
        ),
    ),
    bench_cases=({"M": 8192, "K": 4096, "N": 4096, "r": 16, "p": 0.1},),
    num_flops=lambda case: 2.0 * case["M"] * case["r"] * (2 * case["N"] + case["K"]),
    num_bytes=lambda case: 2.0 * case["M"] * (case["N"] + case["K"]),
)  # fmt: skip
