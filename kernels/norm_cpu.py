"""The passes over rows of RMS and layer norm on the CPU: in C++ (cpp/norm.cpp) and in plain torch.

See `norm_passes` for the formulas. Shape letters: M rows, K features, L masks.
"""

import torch
from torch import Tensor

from . import lora_cpu, native
from .lora_cpu import scratch
from .norm_state import Lanes, Norm, Saved, Sums, total
from .shrink import LEVELS, MASK32, hash_bits

BLOCK_ROWS = 32
"""Rows that share one partial sum of the gradients of gain and bias in C++."""
TORCH_BLOCK = 65536
"""Elements that the torch passes take at a time, so that their fp32 copies stay in the cache."""


def _affine(norm: Norm, weight: Tensor | None, bias: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """gain and bias [K], fp32 (fp64 for fp64); 1 and 0 where there is none."""
    dtype, size = torch.promote_types(like.dtype, torch.float32), like.shape[-1]
    gain = torch.ones(size, dtype=dtype) if weight is None else weight.detach().to(dtype)
    gain = gain + norm.offset if norm.offset else gain.contiguous()
    return gain, torch.zeros(size, dtype=dtype) if bias is None else bias.detach().to(dtype).contiguous()


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def forward_native(saved: Saved, x: Tensor, residual: Tensor | None, y: Tensor, copies: Tensor | None) -> None:
    norm = saved.norm
    gain, bias = _affine(norm, saved.weight, saved.bias, x)
    count, seed, dropped = (0, 0, 0) if copies is None else saved.masks
    native.call(
        "norm_forward", x.dtype, x, x.stride(0), residual, _stride(residual), None if residual is None else saved.h,
        gain, bias, y, copies, saved.rstd, saved.mean, *x.shape, norm.eps, norm.rounds_xhat, norm.is_centered,
        count, seed, dropped,
    )  # fmt: skip


def backward_native(
    saved: Saved,
    dy: Tensor | None,
    dh: Tensor | None,
    t: Tensor | None,
    dx: Tensor | None,
    needs_affine: bool,
    needs_a: bool,
) -> Sums | None:
    h = saved.h
    gain, bias = _affine(saved.norm, saved.weight, saved.bias, h)
    count, seed, dropped = saved.masks
    partial = torch.zeros(2, -(-h.shape[0] // BLOCK_ROWS), h.shape[1]) if needs_affine else None
    native.call(
        "norm_backward", h.dtype, dy, _stride(dy), dh, _stride(dh), h, h.stride(0), gain, bias, saved.rstd, saved.mean,
        t, t if needs_a else None, dx, None if partial is None else partial[0], None if partial is None else partial[1],
        *h.shape, saved.norm.rounds_xhat, count, seed, dropped, False,
    )  # fmt: skip
    return None if partial is None else total(partial)


def shrink_tiles(y: Tensor, lanes: Lanes) -> Tensor:
    """S [M, R], with the masks made on the way."""
    s = torch.empty(y.shape[0], lanes.num_ranks, dtype=y.dtype)
    lora_cpu.shrink(
        y, lanes.parts, lanes.scales, out=s, ranks=lanes.projections, p=lanes.p, seed=lanes.seed, backend="native"
    )
    return s


def backward_tiles(
    saved: Saved, lanes: Lanes, dy: Tensor | None, dh: Tensor | None, ds: Tensor, dx: Tensor | None, needs_a: bool
) -> Tensor | None:
    """dx of an RMS norm whose weight is frozen, and dA [R, K], without making y again.

    y = rstd * h * gain, so dA = (rstd * dS)ᵀ (mask∘h) * gain; and rstd * dS expands to the gradient of y times rstd.
    """
    h, rstd = saved.h, saved.rstd[:, None]
    gain, bias = _affine(saved.norm, saved.weight, saved.bias, h)
    steps: Tensor | float = lanes.scales[0]
    if len(set(lanes.scales)) > 1:
        steps = torch.tensor([s for a, s in zip(lanes.parts, lanes.scales, strict=True) for _ in range(a.shape[0])])
    scaled = (ds * (rstd * steps)).to(h.dtype)
    grad = None
    if dx is not None:
        grad = scratch("norm", h.shape, h.dtype)
        native.call("norm_scale", h.dtype, dy, _stride(dy), saved.rstd, grad, *h.shape)
    found = lora_cpu.grads_a(
        scaled, h, lanes.parts, dx=grad, ranks=lanes.projections, p=lanes.p, seed=lanes.seed, backend="native",
        dtypes=[torch.float32 if needs_a else None] * len(lanes.parts),
    )  # fmt: skip
    if dx is not None:
        native.call(
            "norm_backward", h.dtype, grad, h.shape[1], dh, _stride(dh), h, h.stride(0), gain, bias, saved.rstd, None,
            None, None, dx, None, None, *h.shape, saved.norm.rounds_xhat, 0, 0, 0, True,
        )  # fmt: skip
    return torch.cat([da for da in found if da is not None]).mul_(gain) if needs_a else None


def _row_blocks(x: Tensor) -> list[slice]:
    step = max(1, TORCH_BLOCK // x.shape[1])
    return [slice(start, min(start + step, x.shape[0])) for start in range(0, x.shape[0], step)]


def _kept(lanes: Lanes, rows: slice, num_cols: int, device: torch.device) -> list[Tensor]:
    """The mask of each lane on these rows; a later first row is a larger low half of the seed."""
    if not lanes.dropped:
        return [torch.ones((), dtype=torch.bool, device=device)]
    seed = (lanes.seed & ~MASK32) | ((lanes.seed + rows.start) & MASK32)
    bits = hash_bits(rows.stop - rows.start, num_cols, seed, device)
    return [(bits >> (10 * j)).bitwise_and_(LEVELS - 1) >= lanes.dropped for j in range(len(lanes.a))]


def _xhat(saved: Saved, rows: slice) -> Tensor:
    """xhat of these rows, fp32, not rounded."""
    wide = saved.h[rows].to(saved.rstd.dtype)
    if saved.mean is not None:
        wide = wide - saved.mean[rows, None]
    return wide * saved.rstd[rows, None]


def _rounded(saved: Saved, xhat: Tensor) -> Tensor:
    return xhat.to(saved.h.dtype).to(xhat.dtype) if saved.norm.rounds_xhat else xhat


def forward_torch(saved: Saved, x: Tensor, residual: Tensor | None, y: Tensor, copies: Tensor | None) -> None:
    gain, bias = _affine(saved.norm, saved.weight, saved.bias, x)
    for rows in _row_blocks(x):
        if residual is not None:
            torch.add(x[rows], residual[rows], out=saved.h[rows])
        wide = saved.h[rows].to(saved.rstd.dtype)
        if saved.mean is not None:
            torch.mean(wide, 1, out=saved.mean[rows])
            wide = wide - saved.mean[rows, None]
        torch.rsqrt(wide.square().mean(1).add_(saved.norm.eps), out=saved.rstd[rows])
        xhat = _rounded(saved, wide * saved.rstd[rows, None])
        y[rows] = torch.addcmul(bias, xhat, gain)
        if copies is not None and saved.lanes is not None:
            for copy, kept in zip(copies, _kept(saved.lanes, rows, x.shape[1], x.device), strict=True):
                torch.mul(y[rows], kept, out=copy[rows])


def backward_torch(
    saved: Saved,
    dy: Tensor | None,
    dh: Tensor | None,
    t: Tensor | None,
    dx: Tensor | None,
    needs_affine: bool,
    needs_a: bool,
) -> Sums | None:
    h, lanes = saved.h, saved.lanes
    gain, bias = _affine(saved.norm, saved.weight, saved.bias, h)
    sums = torch.zeros(2, h.shape[1], dtype=gain.dtype, device=h.device) if needs_affine else None
    for rows in _row_blocks(h):
        xhat = _xhat(saved, rows)
        rounded = _rounded(saved, xhat)
        grad = torch.zeros_like(xhat) if dy is None else dy[rows].to(xhat.dtype, copy=True)
        if lanes is not None and t is not None:
            y = torch.addcmul(bias, rounded, gain).to(h.dtype)
            for own, kept in zip(t, _kept(lanes, rows, h.shape[1], h.device), strict=True):
                grad += own[rows] * kept
                if needs_a:
                    torch.mul(y, kept, out=own[rows])
        if sums is not None:
            sums[0] += (grad * rounded).sum(0)
            sums[1] += grad.sum(0)
        if dx is not None:
            grad *= gain
            slope = (grad * xhat).mean(1, keepdim=True)
            if saved.mean is not None:
                grad -= grad.mean(1, keepdim=True)
            grad = grad.addcmul_(xhat, slope, value=-1).mul_(saved.rstd[rows, None])
            dx[rows] = grad if dh is None else grad.add_(dh[rows])
    return None if sums is None else (sums[0], sums[1])
