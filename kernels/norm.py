"""Residual add, RMS or layer norm, and what the low-rank updates behind it need, as one differentiable operation.

    h = x + residual,  y = norm(h),  S = [scale_j * drop_j(y) A_jᵀ]

Saved for backward: h (x where there is no residual), the statistics of its rows, weight, bias and the A_j; for the
Triton kernels also S, which its consumer saves anyway. See `norm_passes` for the formulas.
Shape letters: M rows, K features, R ranks together.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .columns import joined
from .norm_passes import backward_pass, forward_pass
from .norm_state import Lanes, Norm, Saved
from .op import Backend, backend_of
from .shrink import Shrink, keep_scale, rank_slices, threshold


@dataclass(frozen=True)
class _Call:
    """What a call needs besides tensors."""

    norm: Norm
    backend: Backend
    scales: tuple[float, ...]
    p: float
    seed: int

    def lanes(self, a: tuple[Tensor, ...], dtype: torch.dtype) -> Lanes | None:
        if not a:
            return None
        parts = tuple(part.detach().to(dtype).contiguous() for part in a)
        columns = tuple(rank_slices(parts))
        masks = columns if self.p else (slice(0, columns[-1].stop),)
        matrices = parts if self.p else (joined(parts, dim=0),)
        factors = tuple(scale * keep_scale(self.p) for scale in self.scales)
        return Lanes(matrices, masks, columns, factors, parts, self.scales, self.p, self.seed, threshold(self.p))


def _rows(x: Tensor | None) -> Tensor | None:
    """x [..., K] as [M, K] with last stride 1."""
    if x is None:
        return None
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _grad_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype in which autograd takes the gradient of a parameter: `grad_dtype` (torch 2.10), else its own."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        call: _Call,
        *a: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        rows = _rows(x)
        assert rows is not None
        y, s, saved = forward_pass(
            rows, backend=call.backend, norm=call.norm, residual=_rows(residual), weight=weight, bias=bias,
            lanes=call.lanes(a, x.dtype),
        )  # fmt: skip
        # Not marked as views: rope rotates a normed query in place.
        y = torch.ops.aten._unsafe_view(y, x.shape)
        h = None if residual is None else torch.ops.aten._unsafe_view(saved.h, x.shape)
        needs_h, needs_y = any(ctx.needs_input_grad[:2]), any(ctx.needs_input_grad[:4])
        ctx.mark_non_differentiable(*([] if needs_y else [y]), *([] if needs_h or h is None else [h]))
        ctx.save_for_backward(x if h is None else h, saved.rstd, saved.mean, weight, bias, s, *a)
        return y, h, s

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        h, rstd, mean, weight, bias, s, *a = ctx.saved_tensors
        needs_x, needs_affine = any(ctx.needs_input_grad[:2]), any(ctx.needs_input_grad[2:4])
        rows = _rows(h)
        lanes = None if ds is None else call.lanes(tuple(a), h.dtype)
        assert rows is not None
        found = backward_pass(
            Saved(call.norm, rows, rstd, mean, weight, bias, lanes), backend=call.backend, dy=_rows(dy), dh=_rows(dh),
            ds=ds, s=s, needs_dx=needs_x, needs_affine=needs_affine,
            needs_a=ds is not None and any(ctx.needs_input_grad[5:]),
        )  # fmt: skip
        dx = None if found.dx is None else found.dx.view(h.shape)
        affine = [
            grad.to(_grad_dtype(parameter)) if needed and grad is not None and parameter is not None else None
            for grad, parameter, needed in zip(
                (found.d_gain, found.d_bias), (weight, bias), ctx.needs_input_grad[2:4], strict=True
            )
        ]
        da: list[Tensor | None] = [None] * len(a)
        if found.da is not None:
            da = [found.da[rows].to(_grad_dtype(part)) for rows, part in zip(rank_slices(a), a, strict=True)]
        needs = ctx.needs_input_grad
        return dx if needs[0] else None, dx if needs[1] else None, *affine, None, *da


@torch.compiler.disable
def apply_norm(
    x: Tensor, *, norm: Norm, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, shrink: Shrink | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, h, S) of x and residual [..., K]. Under autocast they are computed in its dtype."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    else:
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    x, residual = x.to(dtype), None if residual is None else residual.to(dtype)
    a = () if shrink is None else shrink.a
    scales, p, seed = ((), 0.0, 0) if shrink is None else (shrink.scales, shrink.p, shrink.seed)
    with torch.autocast(kind, enabled=False):
        y, h, s = _Norm.apply(x, residual, weight, bias, _Call(norm, backend_of(x), scales, p, seed), *a)
    return y, h, s
