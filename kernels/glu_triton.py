"""The Triton kernels of `glu`: forward with the shrink, backward with the masked expand, and their launches.

A forward program owns a block of rows and runs through the features, so that S stays in registers; a backward program
owns a block of features and runs through the rows, so that A and dA do. Both are split further until the GPU is full,
and the parts are added in a fixed order. Shape letters: M rows, F features, R ranks of the one projection.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import Activation
from .op import Backend, Config, Kernel
from .shrink import is_kept, keep_scale, mask_bits, row_keys, threshold


@dataclass(frozen=True)
class Call:
    """What forward hands to backward besides tensors."""

    activation: Activation
    scales: tuple[float, ...]
    p: float
    seed: int
    backend: Backend

    @property
    def dropout(self) -> tuple[int, int, float]:
        """Seed, threshold, and the factor of what is kept, as kernels take them."""
        return self.seed if self.p > 0 else 2**32, threshold(self.p), keep_scale(self.p)

    @property
    def form(self) -> tuple[int, float, float]:
        return self.activation.kind, self.activation.c1, self.activation.c3


@dataclass(frozen=True)
class Inputs:
    """gate, up [M, F] with unit column stride; a: each [r_j, F], contiguous, in the dtype of gate."""

    gate: Tensor
    up: Tensor | None
    a: tuple[Tensor, ...]


@dataclass(frozen=True)
class Grads:
    """Where backward writes: [M, F] each, or None where nothing is needed; rows of both are equally far apart."""

    gate: Tensor | None
    up: Tensor | None
    needs_a: bool

    @property
    def row_stride(self) -> int:
        return next((out.stride(0) for out in (self.gate, self.up) if out is not None), 0)


@triton.jit
def _activate(x, kind, c1, c3):
    """act(x) and act'(x). Products of a huge x with a vanishing weight are kept finite by a capped x."""
    near = tl.minimum(tl.maximum(x, -100.0), 100.0)
    if kind == 0:
        square = near * near
        weight = tl.sigmoid(near * (c1 + c3 * square))
        slope = weight * (1.0 + near * (c1 + 3.0 * c3 * square) * (1.0 - weight))
    elif kind == 1:
        weight = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = weight + near * tl.exp(-0.5 * near * near) * 0.3989422804014327
    else:
        weight = tl.where(x > 0.0, 1.0, 0.0)
        slope = weight
    return x * weight, slope


@triton.jit(do_not_specialize=["dropped"])
def _glu_kernel(
    gate_ptr, up_ptr, h_ptr, a_ptr, s_ptr, M, F, R, gate_stride, up_stride, span, up_rows, kind, c1, c3,
    seed, dropped, keep, scale, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """h [M, F] contiguous, and s [splits, M, R] of the columns that split program_id(1) owns; BR = 0: no s.

    up_rows is M, or 0 where there is no up.
    """
    start_m = tl.program_id(0).to(tl.int64) * BM
    lines = tl.arange(0, BM)
    rows = start_m + lines
    gate_ptr += start_m * gate_stride
    up_ptr += start_m * up_stride
    h_ptr += start_m * F
    first = tl.program_id(1) * span
    keys = row_keys(rows, seed)
    ranks = tl.arange(0, BR if BR else 1)
    total = tl.zeros((BM, BR if BR else 1), tl.float32)
    for start in range(first, tl.minimum(first + span, F), BK):
        cols = start + tl.arange(0, BK)
        columns = (cols < F)[None, :]
        inside = (rows < M)[:, None] & columns
        gate = tl.load(gate_ptr + lines[:, None] * gate_stride + cols[None, :], mask=inside, other=0.0)
        has_up = (rows < up_rows)[:, None] & columns
        up = tl.load(up_ptr + lines[:, None] * up_stride + cols[None, :], mask=has_up, other=1.0)
        value, _slope = _activate(gate.to(tl.float32), kind, c1, c3)
        h = value.to(h_ptr.dtype.element_ty).to(tl.float32) * up.to(tl.float32)
        tl.store(h_ptr + lines[:, None] * F + cols[None, :], h, mask=inside)
        if BR:
            a = tl.load(
                a_ptr + ranks[None, :] * F + cols[:, None],
                mask=(ranks < R)[None, :] & (cols < F)[:, None],
                other=0.0,
            )  # fmt: skip
            h = h.to(h_ptr.dtype.element_ty).to(tl.float32)
            if dropped > 0:
                h = tl.where(is_kept(mask_bits(keys, cols), dropped, 0), h * keep, 0.0)
            total = tl.dot(h.to(a.dtype), a, total, input_precision="ieee")
    if BR:
        s_ptr += tl.program_id(1).to(tl.int64) * M * R
        inside = (rows < M)[:, None] & (ranks < R)[None, :]
        tl.store(s_ptr + rows[:, None] * R + ranks[None, :], total * scale, mask=inside)


@triton.jit(do_not_specialize=["dropped"])
def _glu_backward_kernel(
    dh_ptr, ds_ptr, a_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, da_ptr, M, F, R, dh_stride, gate_stride, up_stride,
    d_stride, span, dh_rows, up_rows, d_gate_rows, d_up_rows, kind, c1, c3, seed, dropped, keep,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """d_gate, d_up [M, F] in rows d_stride apart; da [splits, R, F] of the rows that split program_id(1) owns.

    ds [M, R] is scaled already. BR = 0: no ds and no da. A tensor that is absent has 0 rows, else M.
    """
    cols = tl.program_id(0) * BK + tl.arange(0, BK)
    ranks = tl.arange(0, BR if BR else 1)
    columns = (cols < F)[None, :]
    edge = (ranks < R)[:, None] & columns
    if BR:
        a = tl.load(a_ptr + ranks[:, None] * F + cols[None, :], mask=edge, other=0.0)
    total = tl.zeros((BR if BR else 1, BK), tl.float32)
    first = tl.program_id(1).to(tl.int64) * span
    lines = tl.arange(0, BM)
    for step in range(0, span, BM):
        start_m = first + step
        rows = start_m + lines
        inside = (rows < M)[:, None] & columns
        at_gate, at_up = gate_ptr + start_m * gate_stride, up_ptr + start_m * up_stride
        gate = tl.load(at_gate + lines[:, None] * gate_stride + cols[None, :], mask=inside, other=0.0)
        has_up, has_dh = (rows < up_rows)[:, None] & columns, (rows < dh_rows)[:, None] & columns
        up = tl.load(at_up + lines[:, None] * up_stride + cols[None, :], mask=has_up, other=1.0)
        at_dh = dh_ptr + start_m * dh_stride
        d = tl.load(at_dh + lines[:, None] * dh_stride + cols[None, :], mask=has_dh, other=0.0)
        d = d.to(tl.float32)
        up = up.to(tl.float32)
        value, slope = _activate(gate.to(tl.float32), kind, c1, c3)
        if BR:
            ds = tl.load(
                ds_ptr + rows[:, None] * R + ranks[None, :], mask=(rows < M)[:, None] & (ranks < R)[None, :], other=0.0
            )
            expanded = tl.dot(ds, a, input_precision="ieee")
            h = value.to(a.dtype).to(tl.float32) * up
            h = h.to(a.dtype).to(tl.float32)
            if dropped > 0:
                kept = is_kept(mask_bits(row_keys(rows, seed), cols), dropped, 0)
                expanded = tl.where(kept, expanded * keep, 0.0)
                h = tl.where(kept, h * keep, 0.0)
            d += expanded
            total = tl.dot(tl.trans(ds), h.to(a.dtype), total, input_precision="ieee")
        at, block = lines[:, None] * d_stride + cols[None, :], start_m * d_stride
        tl.store(d_gate_ptr + block + at, d * up * slope, mask=(rows < d_gate_rows)[:, None] & columns)
        tl.store(d_up_ptr + block + at, d * value, mask=(rows < d_up_rows)[:, None] & columns)
    if BR:
        da_ptr += tl.program_id(1).to(tl.int64) * R * F
        tl.store(da_ptr + ranks[:, None] * F + cols[None, :], total, mask=edge)


def _configs(*blocks: tuple[int, int, int, int]) -> tuple[Config, ...]:
    """(BM, BK, BR, warps) of each."""
    return tuple(
        Config({"BM": BM, "BK": BK, "BR": BR}, num_warps=warps, elements=BM * BK) for BM, BK, BR, warps in blocks
    )


FORWARD = _configs((8, 256, 0, 4), (16, 128, 16, 8), (32, 64, 64, 8), (32, 32, 256, 8))
BACKWARD = _configs((8, 256, 0, 4), (32, 64, 16, 8), (32, 32, 64, 8), (32, 32, 256, 8))
NUM_PROGRAMS = 264
"""Programs that keep a large GPU busy: the rows or columns of one block are split until there are as many."""


def _config(configs: Sequence[Config], num_ranks: int) -> Config:
    """The smallest block of ranks that holds them."""
    return next(config for config in configs if config.constants["BR"] >= num_ranks)


def _splits(length: int, block: int, num_others: int) -> tuple[int, int]:
    """(number of splits of `length`, length of each as a multiple of `block`)."""
    blocks = max(1, triton.cdiv(length, block))
    span = triton.cdiv(blocks, min(blocks, triton.cdiv(NUM_PROGRAMS, max(1, num_others)))) * block
    return triton.cdiv(length, span), span


def _rows(x: Tensor | None) -> int:
    return 0 if x is None else x.shape[0]


def forward(x: Inputs, call: Call) -> tuple[Tensor, Tensor | None]:
    M, F = x.gate.shape
    R = x.a[0].shape[0] if x.a else 0
    config = _config(FORWARD, R)
    num_rows = triton.cdiv(M, config.constants["BM"])
    splits, span = _splits(F, config.constants["BK"], num_rows)
    h = x.gate.new_empty(M, F)
    s = x.gate.new_empty((splits, M, R), dtype=torch.float32 if splits > 1 else None) if x.a else h
    up = x.gate if x.up is None else x.up
    _glu_kernel[num_rows, splits](
        x.gate, up, h, x.a[0] if x.a else h, s, M, F, R, x.gate.stride(0), up.stride(0), span, _rows(x.up),
        *call.form, *call.dropout, call.scales[0] if x.a else 1.0, **config.constants, num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    if not x.a:
        return h, None
    return h, s[0] if splits == 1 else s.sum(0).to(h.dtype)


def backward(dh: Tensor | None, ds: Sequence[Tensor], x: Inputs, out: Grads, call: Call) -> Sequence[Tensor | None]:
    M, F = x.gate.shape
    R = x.a[0].shape[0] if ds else 0
    config = _config(BACKWARD, R)
    num_cols = triton.cdiv(F, config.constants["BK"])
    splits, span = _splits(M, config.constants["BM"], num_cols)
    da = x.gate.new_empty((splits, R, F), dtype=torch.float32)
    d, up = x.gate if dh is None else dh, x.gate if x.up is None else x.up
    _glu_backward_kernel[num_cols, splits](
        d, ds[0] if ds else d, x.a[0] if ds else d, x.gate, up, da if out.gate is None else out.gate,
        da if out.up is None else out.up, da, M, F, R, d.stride(0), x.gate.stride(0), up.stride(0), out.row_stride,
        span, *map(_rows, (dh, x.up, out.gate, out.up)),
        *call.form, *call.dropout, **config.constants, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return [da.sum(0)] if ds else []


SIZES = {"M": "i32", "F": "i32", "R": "i32", "gate_stride": "i32", "up_stride": "i32", "span": "i32", "up_rows": "i32"}
FORM = {"kind": "i32", "c1": "fp32", "c3": "fp32", "seed": "i64", "dropped": "i32", "keep": "fp32"}
KERNELS = (
    Kernel(
        fn=_glu_kernel,
        signature={
            **dict.fromkeys(("gate_ptr", "up_ptr", "h_ptr", "a_ptr", "s_ptr"), "*bf16"),
            **SIZES, **FORM, "scale": "fp32",
        },
        configs=FORWARD,
        divisible=("F", "gate_stride", "up_stride"),
    ),
    Kernel(
        fn=_glu_backward_kernel,
        signature={
            **dict.fromkeys(("dh_ptr", "ds_ptr", "a_ptr", "gate_ptr", "up_ptr", "d_gate_ptr", "d_up_ptr"), "*bf16"),
            "da_ptr": "*fp32", **SIZES, "dh_stride": "i32", "d_stride": "i32", "dh_rows": "i32", "d_gate_rows": "i32",
            "d_up_rows": "i32", **FORM,
        },
        configs=BACKWARD,
        divisible=("F", "gate_stride", "up_stride", "dh_stride", "d_stride"),
    ),
)  # fmt: skip
