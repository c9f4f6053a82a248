"""Layer norm with the residual addition before it and the shrink of the low-rank updates behind it.

    h = x + residual,  xhat = (h - mean(h)) / sqrt(var(h) + eps),  y = weight * xhat + bias
    S = [scale_j * drop_j(y) A_jᵀ]
    dx = dresidual = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dh,
    g = weight * (dy + sum_j mask_j∘(dS_j A_j) * keep_scale)

Shape letters: M rows, K features, r_j ranks (R together). Passes and kernels: `norm_passes`, `norm_blocks`.
"""

from typing import Any

import torch
from torch import Tensor

from .norm import apply_norm
from .norm_blocks import kernel_records
from .norm_state import Norm
from .op import Case, Op, random_normal
from .rms_norm import NORM_CASES, make_norm_inputs
from .shrink import Shrink, shrink_reference


def layer_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    residual: Tensor | None = None,
    shrink: Shrink | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The specification, in plain torch."""
    h = x if residual is None else x + residual
    y = torch.nn.functional.layer_norm(h, (h.shape[-1],), weight, bias, eps)
    s = None if shrink is None else shrink_reference(y.reshape(-1, y.shape[-1]), shrink)
    return y, None if residual is None else h, s


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    residual: Tensor | None = None,
    shrink: Shrink | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y [..., K], h [..., K] or None, S [M, R] or None) for x and residual [..., K], weight and bias [K] or None.

    h is None where there is no residual. Gradients of weight and bias are only computed where one requires them.
    """
    norm = Norm(eps=eps, is_centered=True)
    return apply_norm(x, norm=norm, weight=weight, bias=bias, residual=residual, shrink=shrink)


def _make_inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
    inputs = make_norm_inputs({"mean": 0.5, **case}, dtype, device, generator)
    bias = random_normal(case["K"], dtype=dtype, device=device, generator=generator)
    inputs["bias"] = None if case.get("is_plain") else bias.requires_grad_(case.get("trains_weight", False))
    if case.get("is_plain"):
        inputs["weight"] = None
    return {"eps": 1e-5, **inputs}


OP = Op(
    name="layer_norm",
    summary="residual add, layer norm, dropout and shrink in one pass; the masked expand inside its backward",
    reference=layer_norm_reference,
    function=layer_norm,
    make_inputs=_make_inputs,
    cases=({"M": 7, "K": 100, "is_plain": True, "residual": True}, *NORM_CASES),
    kernels=kernel_records(is_centered=True),
    bench_cases=({"M": 8192, "K": 1024, "residual": True, "ranks": (16, 16, 16), "p": 0.1},),
    num_bytes=lambda case: 2.0 * case["M"] * case["K"] * 9,
)
