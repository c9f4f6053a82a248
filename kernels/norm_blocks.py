"""Triton kernels of RMS and layer norm on blocks of rows, and the choice of their configuration.

    xhat = (h - mean) * rstd,   y = gain * xhat + bias,   S_j = c_j * (mask_j∘y) A_jᵀ
    dy += sum_j mask_j∘(c_j dS_j A_j),   dA_j = c_j dS_jᵀ (mask_j∘y),   c_j = scale_j * keep_scale

A program owns BM rows and walks over the columns twice: once for the sums of its rows, once to write. The products with
A_j (r_j <= RANK) are taken on the way. Where the ranks do not fit, RANK is 0: forward writes the masked copies of y
instead, and backward reads T_j = c_j dS_j A_j and leaves the masked copies in its place; the library multiplies.
Shape letters: M rows, K features, r_j ranks, R ranks together, L masks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import triton
import triton.language as tl

from .op import Config, Kernel
from .shrink import is_kept, mask_bits, row_keys

RUNTIME = (
    "M", "has_residual", "has_weight", "has_bias", "has_dh", "needs_dx", "needs_affine", "rounds", "needs_copies",
    "r0", "r1", "r2", "lanes", "seed", "dropped", "rows_per_split",
)  # fmt: skip
"""Integers that must not make a new compiled version where they happen to be 1 or a multiple of 16."""


@triton.jit
def _affine(weight_ptr, bias_ptr, cols, K, offset, has_weight, has_bias):
    """gain and bias of these columns, fp32; 1 and 0 where there is none."""
    gain = tl.load(weight_ptr + cols, mask=cols < K * has_weight, other=1.0).to(tl.float32) + offset
    return gain, tl.load(bias_ptr + cols, mask=cols < K * has_bias, other=0.0).to(tl.float32)


@triton.jit
def _narrow(value, rounds, like_ptr):
    """value, rounded to the storage dtype if `rounds`."""
    return tl.where(rounds != 0, value.to(like_ptr.dtype.element_ty).to(tl.float32), value)


@triton.jit
def _load_a(a_ptr, ranks, cols, r, K):
    """A [RANK, BK], zero outside of [r, K]."""
    inside = (ranks < r)[:, None] & (cols < K)[None, :]
    return tl.load(a_ptr + ranks[:, None] * K + cols[None, :], mask=inside, other=0.0)


@triton.jit
def _load_ds(ds_ptr, rows, ranks, start, r, M, R, c):
    """c * dS of one mask, [BM, RANK] in the storage dtype."""
    inside = (rows < M)[:, None] & (ranks < r)[None, :]
    ds = tl.load(ds_ptr + rows[:, None] * R + start + ranks[None, :], mask=inside, other=0.0).to(tl.float32)
    return (ds * c).to(ds_ptr.dtype.element_ty)


@triton.jit
def _store_s(s_ptr, total, rows, ranks, start, r, M, R, c):
    inside = (rows < M)[:, None] & (ranks < r)[None, :]
    tl.store(s_ptr + rows[:, None] * R + start + ranks[None, :], total * c, mask=inside)


@triton.jit
def _bits(keys, cols, dropped, BM: tl.constexpr, BK: tl.constexpr):
    """The hash of a block; without dropout any bits will do."""
    bits = tl.zeros([BM, BK], tl.uint32)
    if dropped > 0:
        bits = mask_bits(keys, cols)
    return bits


@triton.jit
def _masked(value, bits, dropped, LANE: tl.constexpr):
    return tl.where(is_kept(bits, dropped, LANE), value, 0.0)


@triton.jit
def _add_s(total, y, a, bits, dropped, LANE: tl.constexpr):
    """total + (mask∘y) Aᵀ."""
    kept = _masked(y.to(tl.float32), bits, dropped, LANE).to(y.dtype)
    return tl.dot(kept, tl.trans(a), total, input_precision="ieee")


@triton.jit
def _statistics(
    x_ptr, residual_ptr, h_ptr, rows, M, K, stride_x, stride_r, stride_h, has_residual,
    CENTERED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """(mean, squares) [BM] of the rows of h = x + residual, which is stored where there is a residual."""
    here = (rows < M)[:, None]
    mean = tl.zeros([BM], tl.float32)
    squares = tl.zeros([BM], tl.float32)
    for start in range(0, K, BK):
        cols = start + tl.arange(0, BK)
        inside = here & (cols < K)[None, :]
        value = tl.load(x_ptr + rows[:, None] * stride_x + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        other_ptr = residual_ptr + rows[:, None] * stride_r + cols[None, :]
        value += tl.load(other_ptr, mask=inside & (cols < K * has_residual)[None, :], other=0.0).to(tl.float32)
        value = value.to(x_ptr.dtype.element_ty)
        tl.store(
            h_ptr + rows[:, None] * stride_h + cols[None, :], value, mask=inside & (cols < K * has_residual)[None, :]
        )
        value = value.to(tl.float32)
        if CENTERED:
            count = tl.minimum(K - start, BK).to(tl.float32)
            own = tl.sum(value, 1) / count
            spread = tl.where(inside, value - own[:, None], 0.0)
            weight = count / (start + count)
            squares += tl.sum(spread * spread, 1) + (own - mean) * (own - mean) * weight * start
            mean += (own - mean) * weight
        else:
            squares += tl.sum(value * value, 1)
    return mean, squares


@triton.jit(do_not_specialize=RUNTIME)
def norm_forward_kernel(
    x_ptr, residual_ptr, h_ptr, weight_ptr, bias_ptr, y_ptr, rstd_ptr, mean_ptr, copies_ptr, s_ptr,
    a0_ptr, a1_ptr, a2_ptr,
    M, K, R, stride_x, stride_r, stride_h, eps, offset, has_residual, has_weight, has_bias, rounds,
    r0, r1, r2, c0, c1, c2, lanes, seed, dropped,
    CENTERED: tl.constexpr, HAS_LANES: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """h = x + residual, y [M, K], rstd and mean [M], and S [M, R] or the masked copies [lanes, M, K]."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    here = (rows < M)[:, None]
    keys = row_keys(rows, seed)
    mean, squares = _statistics(
        x_ptr, residual_ptr, h_ptr, rows, M, K, stride_x, stride_r, stride_h, has_residual, CENTERED, BM, BK
    )
    rstd = 1.0 / tl.sqrt(squares / K + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)
    if CENTERED:
        tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.debug_barrier()

    if RANK > 0:
        ranks = tl.arange(0, RANK)
        s0 = tl.zeros([BM, RANK], tl.float32)
        s1 = s0
        s2 = s0
    for start in range(0, K, BK):
        cols = start + tl.arange(0, BK)
        inside = here & (cols < K)[None, :]
        h = tl.load(h_ptr + rows[:, None] * stride_h + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        gain, bias = _affine(weight_ptr, bias_ptr, cols, K, offset, has_weight, has_bias)
        xhat = _narrow((h - mean[:, None]) * rstd[:, None], rounds, x_ptr)
        y = (gain[None, :] * xhat + bias[None, :]).to(x_ptr.dtype.element_ty)
        place = rows[:, None] * K + cols[None, :]
        tl.store(y_ptr + place, y, mask=inside)
        if HAS_LANES:
            bits = _bits(keys, cols, dropped, BM, BK)
            if RANK > 0:
                a0 = _load_a(a0_ptr, ranks, cols, r0, K)
                a1 = _load_a(a1_ptr, ranks, cols, r1, K)
                a2 = _load_a(a2_ptr, ranks, cols, r2, K)
                s0 = _add_s(s0, y, a0, bits, dropped, 0)
                if lanes > 1:
                    s1 = _add_s(s1, y, a1, bits, dropped, 1)
                if lanes > 2:
                    s2 = _add_s(s2, y, a2, bits, dropped, 2)
            else:
                for lane in tl.static_range(3):
                    if lane < lanes:
                        kept = _masked(y.to(tl.float32), bits, dropped, lane)
                        tl.store(copies_ptr + lane * (M.to(tl.int64) * K) + place, kept, mask=inside)
    if RANK > 0:
        _store_s(s_ptr, s0, rows, ranks, 0, r0, M, R, c0)
        _store_s(s_ptr, s1, rows, ranks, r0, r1, M, R, c1)
        _store_s(s_ptr, s2, rows, ranks, r0 + r1, r2, M, R, c2)


@triton.jit
def _add_product(grad, ds, a, bits, dropped, LANE: tl.constexpr):
    """grad + mask∘(dS A)."""
    return grad + _masked(tl.dot(ds, a, input_precision="ieee"), bits, dropped, LANE)


@triton.jit
def _expand_copies(grad, y, t_place, stride_t, lanes, bits, dropped, inside, stored):
    """grad + Σ mask∘t over the lanes; in their place the masked y is left where `stored`."""
    for lane in tl.static_range(3):
        if lane < lanes:
            place = t_place + lane * stride_t
            t = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            grad += _masked(t, bits, dropped, lane)
            narrow = y.to(t_place.dtype.element_ty).to(tl.float32)
            tl.store(place, _masked(narrow, bits, dropped, lane), mask=stored)
    return grad


@triton.jit
def _sum_of_products(one_ptr, other_ptr, total, rows, ranks, M, R, RANK: tl.constexpr):
    """total + the sums of the rows of one∘other, both [M, R]."""
    for start in range(0, R, RANK):
        place = rows[:, None] * R + start + ranks[None, :]
        inside = (rows < M)[:, None] & (start + ranks < R)[None, :]
        one = tl.load(one_ptr + place, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(one * tl.load(other_ptr + place, mask=inside, other=0.0).to(tl.float32), 1)
    return total


@triton.jit
def _store_sum(place, value, inside, here):
    """The sums of the columns of a block."""
    tl.store(place, tl.sum(tl.where(inside, value, 0.0), 0), mask=here)


@triton.jit(do_not_specialize=RUNTIME)
def norm_backward_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, bias_ptr, rstd_ptr, mean_ptr, t_ptr, ds_ptr, s_ptr, a0_ptr, a1_ptr, a2_ptr,
    dx_ptr, d_gain_ptr, d_bias_ptr,
    M, K, R, stride_dy, stride_dh, stride_h, offset, has_weight, has_bias, has_dh, needs_dx, needs_affine, rounds,
    needs_copies, r0, r1, r2, c0, c1, c2, lanes, seed, dropped,
    CENTERED: tl.constexpr, HAS_LANES: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dx [M, K], and per program the sums of its rows for gain and bias [cdiv(M, BM), K].

    The sum of the expanded gradient times gain * xhat is that of dS times S where there is no bias: the first loop
    needs no mask.
    """
    pid = tl.program_id(0).to(tl.int64)
    rows = pid * BM + tl.arange(0, BM)
    here = (rows < M)[:, None]
    keys = row_keys(rows, seed)
    rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
    mean = tl.zeros([BM], tl.float32)
    shift = tl.zeros([BM], tl.float32)
    slope = tl.zeros([BM], tl.float32)
    if CENTERED:
        mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)
    if RANK > 0:
        ranks = tl.arange(0, RANK)
        ds0 = _load_ds(ds_ptr, rows, ranks, 0, r0, M, R, c0)
        ds1 = _load_ds(ds_ptr, rows, ranks, r0, r1, M, R, c1)
        ds2 = _load_ds(ds_ptr, rows, ranks, r0 + r1, r2, M, R, c2)
        if not CENTERED:
            slope = _sum_of_products(ds_ptr, s_ptr, slope, rows, ranks, M, R, RANK)
    for stage in tl.static_range(2):
        for start in range(0, K, BK):
            cols = start + tl.arange(0, BK)
            inside = here & (cols < K)[None, :]
            place = rows[:, None] * K + cols[None, :]
            h = tl.load(h_ptr + rows[:, None] * stride_h + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(dy_ptr + rows[:, None] * stride_dy + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            gain, bias = _affine(weight_ptr, bias_ptr, cols, K, offset, has_weight, has_bias)
            xhat = tl.where(inside, (h - mean[:, None]) * rstd[:, None], 0.0)
            if HAS_LANES and (stage == 1 or CENTERED or RANK == 0):
                bits = _bits(keys, cols, dropped, BM, BK)
                if RANK > 0:
                    grad = _add_product(grad, ds0, _load_a(a0_ptr, ranks, cols, r0, K), bits, dropped, 0)
                    if lanes > 1:
                        grad = _add_product(grad, ds1, _load_a(a1_ptr, ranks, cols, r1, K), bits, dropped, 1)
                    if lanes > 2:
                        grad = _add_product(grad, ds2, _load_a(a2_ptr, ranks, cols, r2, K), bits, dropped, 2)
                else:
                    y = gain[None, :] * _narrow(xhat, rounds, dx_ptr) + bias[None, :]
                    stored = inside & (cols < K * needs_copies * stage)[None, :]
                    grad = _expand_copies(
                        grad, y, t_ptr + place, M.to(tl.int64) * K, lanes, bits, dropped, inside, stored
                    )
            if stage == 0:
                shift += tl.sum(tl.where(inside, grad * gain[None, :], 0.0), 1)
                slope += tl.sum(grad * gain[None, :] * xhat, 1)
            else:
                if needs_affine != 0:
                    product = grad * _narrow(xhat, rounds, dx_ptr)
                    _store_sum(d_gain_ptr + pid * K + cols, product, inside, cols < K)
                    _store_sum(d_bias_ptr + pid * K + cols, grad, inside, cols < K)
                dx = grad * gain[None, :] - xhat * slope[:, None]
                if CENTERED:
                    dx -= shift[:, None]
                dh_place = dh_ptr + rows[:, None] * stride_dh + cols[None, :]
                dh = tl.load(dh_place, mask=inside & (cols < K * has_dh)[None, :], other=0.0).to(tl.float32)
                tl.store(dx_ptr + place, dx * rstd[:, None] + dh, mask=inside & (cols < K * needs_dx)[None, :])
        if stage == 0:
            shift /= K
            slope /= K


@triton.jit
def _add_da(total, y, ds, bits, dropped, LANE: tl.constexpr):
    """total + (mask∘y)ᵀ dS."""
    kept = _masked(y, bits, dropped, LANE).to(ds.dtype)
    return tl.dot(tl.trans(kept), ds, total, input_precision="ieee")


@triton.jit
def _store_da(partial_ptr, total, split, ranks, cols, start, r, K, R):
    place = (split * R + start + ranks)[None, :] * K + cols[:, None]
    tl.store(partial_ptr + place, total, mask=(ranks < r)[None, :] & (cols < K)[:, None])


@triton.jit(do_not_specialize=RUNTIME)
def norm_grad_a_kernel(
    h_ptr, weight_ptr, bias_ptr, rstd_ptr, mean_ptr, ds_ptr, partial_ptr,
    M, K, R, stride_h, offset, has_weight, has_bias, rounds, r0, r1, r2, c0, c1, c2, lanes, seed, dropped,
    rows_per_split,
    CENTERED: tl.constexpr, HAS_LANES: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dA summed over rows_per_split rows: fp32 [splits, R, K], with y recomputed."""
    cols = tl.program_id(0) * BK + tl.arange(0, BK)
    split = tl.program_id(1).to(tl.int64)
    ranks = tl.arange(0, RANK)
    gain, bias = _affine(weight_ptr, bias_ptr, cols, K, offset, has_weight, has_bias)
    total0 = tl.zeros([BK, RANK], tl.float32)
    total1 = total0
    total2 = total0
    for start in range(0, rows_per_split, BM):
        rows = split * rows_per_split + start + tl.arange(0, BM)
        inside = (rows < M)[:, None] & (cols < K)[None, :]
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
        h = tl.load(h_ptr + rows[:, None] * stride_h + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        if CENTERED:
            h -= tl.load(mean_ptr + rows, mask=rows < M, other=0.0)[:, None]
        y = gain[None, :] * _narrow(h * rstd[:, None], rounds, ds_ptr) + bias[None, :]
        y = y.to(ds_ptr.dtype.element_ty).to(tl.float32)
        bits = _bits(row_keys(rows, seed), cols, dropped, BM, BK)
        ds1 = _load_ds(ds_ptr, rows, ranks, r0, r1, M, R, c1)
        ds2 = _load_ds(ds_ptr, rows, ranks, r0 + r1, r2, M, R, c2)
        total0 = _add_da(total0, y, _load_ds(ds_ptr, rows, ranks, 0, r0, M, R, c0), bits, dropped, 0)
        if lanes > 1:
            total1 = _add_da(total1, y, ds1, bits, dropped, 1)
        if lanes > 2:
            total2 = _add_da(total2, y, ds2, bits, dropped, 2)
    _store_da(partial_ptr, total0, split, ranks, cols, 0, r0, K, R)
    _store_da(partial_ptr, total1, split, ranks, cols, r0, r1, K, R)
    _store_da(partial_ptr, total2, split, ranks, cols, r0 + r1, r2, K, R)


PLAIN = {"HAS_LANES": False, "RANK": 0, "BM": 8, "BK": 256}
COPIES = {"HAS_LANES": True, "RANK": 0, "BM": 8, "BK": 256}
FUSED = tuple({"HAS_LANES": True, "RANK": rank, "BM": 64, "BK": rank} for rank in (32, 64))
PROGRAMS = 256
"""How many programs the gradient of A is spread over, at least, where there are enough rows."""


def fused(ranks: Sequence[int]) -> dict[str, Any] | None:
    """How to take the products with matrices of these ranks, one per mask, in the kernels; None if they are large."""
    return next((constants for constants in FUSED if max(ranks) <= constants["RANK"]), None)


def options(constants: Mapping[str, Any]) -> dict[str, int]:
    """Compile options that go with these constants."""
    return {"num_warps": 8 if constants["RANK"] else 4, "num_stages": 2}


_SIZES = {"M": "i32", "K": "i32", "R": "i32", "seed": "i64", "offset": "fp32", "eps": "fp32"}


def _signature(fn: Any) -> dict[str, str]:
    """Types of the runtime arguments: bf16 tensors, fp32 statistics and partial sums."""
    wide = {"rstd_ptr", "mean_ptr", "d_gain_ptr", "d_bias_ptr", "partial_ptr"}
    types = {}
    for name in fn.arg_names:
        if name.isupper() and len(name) > 1:
            continue
        if name.endswith("_ptr"):
            types[name] = "*fp32" if name in wide else "*bf16"
        else:
            types[name] = _SIZES.get(name, "fp32" if name in ("c0", "c1", "c2") else "i32")
    return types


def kernel_records(*, is_centered: bool) -> tuple[Kernel, ...]:
    """The kernels of one kind of norm, with every configuration that a launch may choose."""

    def configs(constants: Sequence[Mapping[str, Any]]) -> tuple[Config, ...]:
        return tuple(
            Config({"CENTERED": is_centered, **own}, **options(own), elements=own["BM"] * own["BK"])
            for own in constants
        )

    table = (
        (norm_forward_kernel, (PLAIN, COPIES), False),
        (norm_forward_kernel, FUSED, True),
        (norm_backward_kernel, (PLAIN, COPIES), False),
        (norm_backward_kernel, FUSED, True),
        (norm_grad_a_kernel, FUSED, True),
    )
    divisible = ("K", "stride_x", "stride_r", "stride_h", "stride_dy", "stride_dh")
    return tuple(
        Kernel(fn=fn, signature=_signature(fn), configs=configs(own), uses_mma=mma, divisible=divisible)
        for fn, own, mma in table
    )
