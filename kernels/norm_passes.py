"""The two passes over rows of RMS and layer norm, for each backend, and the low-rank products between them.

Forward:   h = x + residual,  y = gain * xhat + bias,  masked copies of y
Backward:  dy += sum_j mask_j∘T_j,  dx = rstd * (gain * dy - mean(gain * dy) - xhat * mean(gain * dy * xhat)) + dh,
           the masked copies of y in the place of T_j, sums over rows for the gradients of gain and bias

The means of layer norm only where `is_centered`. Shape letters: M rows, K features, R ranks together, L masks.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import norm_blocks
from .lora_cpu import scratch, uses_tiles
from .norm_cpu import backward_native, backward_tiles, backward_torch, forward_native, forward_torch, shrink_tiles
from .norm_state import Lanes, Norm, Saved, Sums, total
from .op import Backend


@dataclass(frozen=True)
class Backward:
    """Gradients that were asked for, in the dtype of h (dx [M, K], da [R, K]) and fp32 (d_gain and d_bias [K])."""

    dx: Tensor | None = None
    da: Tensor | None = None
    d_gain: Tensor | None = None
    d_bias: Tensor | None = None


def _fused_constants(lanes: Lanes | None, backend: Backend) -> dict[str, Any] | None:
    """The configuration of the Triton kernels that take the products on the way; None: the library multiplies.

    This is the one place where that is chosen.
    """
    if backend != "triton" or lanes is None or (not lanes.dropped and len(set(lanes.factors)) > 1):
        return None
    return norm_blocks.fused([a.shape[0] for a in lanes.a])


def forward_pass(
    x: Tensor,
    *,
    backend: Backend,
    norm: Norm,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    lanes: Lanes | None,
) -> tuple[Tensor, Tensor | None, Saved]:
    """y [M, K] and S [M, R] for x and residual [M, K] in one dtype, last stride 1; and what backward needs."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    rstd = torch.empty(x.shape[0], dtype=dtype, device=x.device)
    mean = torch.empty_like(rstd) if norm.is_centered else None
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    saved = Saved(norm, x if residual is None else torch.empty_like(y), rstd, mean, weight, bias, lanes)
    fused = _fused_constants(lanes, backend)
    s: Tensor | None = None
    if lanes is not None and fused is not None:
        s = torch.empty(x.shape[0], lanes.num_ranks, dtype=x.dtype, device=x.device)
        _forward_triton(saved, x, residual, y, None, s, fused)
        return y, s, saved
    if lanes is not None and uses_tiles(x.dtype, backend):
        forward_native(saved, x, residual, y, None)
        return y, shrink_tiles(y, lanes), saved
    copies = None
    if lanes is not None and lanes.dropped:
        copies = _room(lanes, x)
    if backend == "triton":
        constants = norm_blocks.PLAIN if copies is None else norm_blocks.COPIES
        _forward_triton(saved, x, residual, y, copies, None, constants)
    else:
        (forward_native if backend == "native" else forward_torch)(saved, x, residual, y, copies)
    s = None if lanes is None else lanes.shrink(y[None] if copies is None else copies)
    return y, s, saved


def backward_pass(
    saved: Saved,
    *,
    backend: Backend,
    dy: Tensor | None,
    dh: Tensor | None,
    ds: Tensor | None,
    s: Tensor | None,
    needs_dx: bool,
    needs_affine: bool,
    needs_a: bool,
) -> Backward:
    """The gradients asked for; dy and dh [M, K] with last stride 1, ds [M, R] if there are lanes."""
    h, lanes = saved.h, saved.lanes
    fused = _fused_constants(lanes, backend)
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device) if needs_dx else None
    if lanes is not None and fused is not None:
        assert ds is not None
        assert s is not None
        ds, sums = ds.contiguous(), None
        if needs_dx or needs_affine:
            sums = _backward_triton(saved, dy, dh, None, (ds, s), dx, needs_affine, needs_a, fused)
        return Backward(dx, _grad_a_triton(saved, ds, fused) if needs_a else None, *(sums or ()))
    if lanes is not None and uses_tiles(h.dtype, backend) and not saved.norm.is_centered and not needs_affine:
        assert ds is not None
        return Backward(dx, backward_tiles(saved, lanes, dy, dh, ds, dx, needs_a))
    t = scaled = None
    if lanes is not None:
        assert ds is not None
        scaled, t = lanes.scaled(ds), _room(lanes, h)
        lanes.expand(scaled, t)
    if backend == "triton":
        constants = norm_blocks.PLAIN if t is None else norm_blocks.COPIES
        sums = _backward_triton(saved, dy, dh, t, None, dx, needs_affine, needs_a, constants)
    else:
        run = backward_native if backend == "native" else backward_torch
        sums = run(saved, dy, dh, t, dx, needs_affine, needs_a)
    da = None
    if lanes is not None and scaled is not None and t is not None and needs_a:
        da = lanes.grad_a(scaled, t)
    return Backward(dx, da, *(sums or ()))


def _room(lanes: Lanes, like: Tensor) -> Tensor:
    """Memory for [L, M, K], valid until the next call; on a GPU the allocator keeps what is freed."""
    shape = (len(lanes.a), *like.shape)
    return scratch("norm", shape, like.dtype) if like.device.type == "cpu" else like.new_empty(shape)


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _triton_arguments(saved: Saved) -> dict[str, Any]:
    """The runtime arguments that all kernels take. A pointer without a tensor is h: its loads are masked off."""
    h, norm, lanes = saved.h, saved.norm, saved.lanes
    count, seed, dropped = saved.masks
    ranks = [a.shape[0] for a in lanes.a] if lanes is not None else []
    factors = list(lanes.factors[: len(lanes.a)]) if lanes is not None else []
    arguments: dict[str, Any] = {
        "h_ptr": h, "weight_ptr": h if saved.weight is None else saved.weight,
        "bias_ptr": h if saved.bias is None else saved.bias, "rstd_ptr": saved.rstd,
        "mean_ptr": saved.rstd if saved.mean is None else saved.mean, "M": h.shape[0], "K": h.shape[1],
        "R": sum(ranks), "stride_h": h.stride(0), "offset": norm.offset, "has_weight": int(saved.weight is not None),
        "has_bias": int(saved.bias is not None), "rounds": int(norm.rounds_xhat), "lanes": count, "seed": seed or 2**32,
        "dropped": dropped, "CENTERED": norm.is_centered,
    }  # fmt: skip
    for j in range(3):
        arguments[f"r{j}"] = ranks[j] if j < len(ranks) else 0
        arguments[f"c{j}"] = float(factors[j]) if j < len(factors) else 0.0
    return arguments


def _matrices(saved: Saved) -> dict[str, Tensor]:
    a = saved.lanes.a if saved.lanes is not None else ()
    return {f"a{j}_ptr": a[j] if j < len(a) else saved.h for j in range(3)}


def _forward_triton(
    saved: Saved,
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
    copies: Tensor | None,
    s: Tensor | None,
    constants: dict[str, Any],
) -> None:
    grid = (triton.cdiv(x.shape[0], constants["BM"]),)
    norm_blocks.norm_forward_kernel[grid](
        x_ptr=x, residual_ptr=x if residual is None else residual, y_ptr=y, copies_ptr=y if copies is None else copies,
        s_ptr=y if s is None else s, stride_x=x.stride(0), stride_r=_stride(residual), eps=saved.norm.eps,
        has_residual=int(residual is not None),
        **_triton_arguments(saved), **_matrices(saved), **constants, **norm_blocks.options(constants),
    )  # fmt: skip


def _backward_triton(
    saved: Saved,
    dy: Tensor | None,
    dh: Tensor | None,
    t: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
    dx: Tensor | None,
    needs_affine: bool,
    needs_a: bool,
    constants: dict[str, Any],
) -> Sums | None:
    """low_rank: (dS, S) where the kernel takes the products."""
    h = saved.h
    dy = torch.zeros_like(h) if dy is None else dy
    ds, s = (h, h) if low_rank is None else low_rank
    num_blocks = triton.cdiv(h.shape[0], constants["BM"])
    partial = saved.rstd.new_empty(2, num_blocks, h.shape[1]) if needs_affine else None
    norm_blocks.norm_backward_kernel[(num_blocks,)](
        dy_ptr=dy, dh_ptr=dy if dh is None else dh, t_ptr=h if t is None else t, ds_ptr=ds, s_ptr=s,
        dx_ptr=dy if dx is None else dx, d_gain_ptr=saved.rstd if partial is None else partial[0],
        d_bias_ptr=saved.rstd if partial is None else partial[1], stride_dy=dy.stride(0), stride_dh=_stride(dh),
        has_dh=int(dh is not None), needs_dx=int(dx is not None), needs_affine=int(needs_affine),
        needs_copies=int(needs_a and t is not None),
        **_triton_arguments(saved), **_matrices(saved), **constants, **norm_blocks.options(constants),
    )  # fmt: skip
    return None if partial is None else total(partial)


def _grad_a_triton(saved: Saved, ds: Tensor, constants: dict[str, Any]) -> Tensor:
    h = saved.h
    M, K = h.shape
    column_blocks = triton.cdiv(K, constants["BK"])
    rows = triton.cdiv(triton.cdiv(M * column_blocks, norm_blocks.PROGRAMS), constants["BM"]) * constants["BM"]
    splits = triton.cdiv(M, rows)
    partial = saved.rstd.new_empty(splits, ds.shape[1], K)
    norm_blocks.norm_grad_a_kernel[(column_blocks, splits)](
        ds_ptr=ds, partial_ptr=partial, rows_per_split=rows, **_triton_arguments(saved), **constants,
        **norm_blocks.options(constants),
    )  # fmt: skip
    return partial.sum(0).to(h.dtype)
