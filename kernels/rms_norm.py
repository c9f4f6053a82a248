"""RMS norm with the residual addition before it and the shrink of the low-rank updates behind it.

    h = x + residual,  xhat = h / sqrt(mean(h²) + eps),  S = [scale_j * drop_j(y) A_jᵀ]
    y = weight * xhat (xhat rounded to the dtype first, as LlamaRMSNorm) or (1 + weight) * xhat (rounded once, as Gemma)
    dx = dresidual = rstd * (g - xhat * mean(g * xhat)) + dh,   g = gain * (dy + sum_j mask_j∘(dS_j A_j) * keep_scale)

Shape letters: M rows, K features, r_j ranks (R together). Passes and kernels: `norm_passes`, `norm_blocks`.
"""

from typing import Any

import torch
from torch import Tensor

from .norm import apply_norm
from .norm_blocks import kernel_records
from .norm_state import Norm
from .op import Case, Op, random_normal
from .shrink import Shrink, shrink_reference


def rms_norm_reference(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    residual: Tensor | None = None,
    shrink: Shrink | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The specification, in plain torch."""
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    xhat = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = weight * xhat.to(h.dtype) if offset == 0 else (xhat * (offset + weight.to(wide.dtype))).to(h.dtype)
    s = None if shrink is None else shrink_reference(y.reshape(-1, y.shape[-1]), shrink)
    return y, None if residual is None else h, s


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    residual: Tensor | None = None,
    shrink: Shrink | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y [..., K], h [..., K] or None, S [M, R] or None) for x and residual [..., K] and weight [K].

    h is None where there is no residual. The gradient of a weight is only computed where it requires one.
    """
    norm = Norm(eps=eps, offset=offset)
    return apply_norm(x, norm=norm, weight=weight, bias=None, residual=residual, shrink=shrink)


def make_norm_inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
    """x, weight, residual and shrink of a case: "ranks" (none: no shrink), "p", which inputs are there or trained."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return random_normal(*shape, dtype=dtype, device=device, generator=generator, scale=scale)

    M, K = case["M"], case["K"]
    is_trained, ranks = case.get("trains_weight", False), case.get("ranks", ())
    x = normal(K, M).t() if case.get("is_transposed") else normal(M, K)
    inputs: dict[str, Any] = {
        "x": (x + case.get("mean", 0)).requires_grad_(case.get("trains_x", True)),
        "weight": (1 + normal(K, scale=0.3)).requires_grad_(is_trained),
        "residual": normal(M, K).requires_grad_(case.get("trains_x", True)) if case.get("residual") else None,
    }
    if ranks:
        a = tuple(normal(r, K, scale=K**-0.5).requires_grad_(case.get("trains_a", True)) for r in ranks)
        scales = tuple(2.0 - 0.5 * j for j in range(len(a))) if case.get("scales_differ") else (2.0,) * len(a)
        inputs["shrink"] = Shrink(a, scales, case.get("p", 0.0), 2**40 + 12345 if case.get("p") else 0)
    return inputs


def _make_inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
    return {"eps": 1e-5, "offset": case.get("offset", 0.0), **make_norm_inputs(case, dtype, device, generator)}


NORM_CASES: tuple[dict[str, Any], ...] = (
    {"M": 1, "K": 16, "residual": True, "ranks": (4,), "p": 0.5},
    {"M": 7, "K": 100, "residual": True, "ranks": (1, 8, 16), "p": 0.1, "trains_weight": True},
    {"M": 7, "K": 100, "ranks": (24, 4), "p": 0.05, "is_transposed": True, "scales_differ": True},
    {"M": 7, "K": 64, "ranks": (8, 4), "scales_differ": True, "residual": True},
    {"M": 129, "K": 64, "ranks": (16, 16), "residual": True, "trains_weight": True, "trains_x": False},
    {"M": 129, "K": 64, "ranks": (16, 64), "p": 0.1, "trains_a": False, "trains_weight": True},
    {"M": 7, "K": 100, "ranks": (16, 8, 4), "p": 0.1, "trains_x": False},
    {"M": 33, "K": 64, "ranks": (128, 128), "p": 0.5, "residual": True, "trains_weight": True},
    {"M": 33, "K": 64, "ranks": (128, 128), "residual": True},
    {"M": 1025, "K": 16, "residual": True, "trains_weight": True},
    {"M": 129, "K": 576, "trains_weight": True},
    {"M": 129, "K": 576, "residual": True, "ranks": (16, 16, 16), "p": 0.05},
    {"M": 129, "K": 100, "residual": True, "ranks": (16, 64), "p": 0.1, "trains_weight": True},
)
"""What both kinds of norm are tested on."""


def _num_bytes(case: Case) -> float:
    """x, residual, h, y forward; dy, dh, h, dx backward, h again for the gradients of A; in bf16."""
    return 2.0 * case["M"] * case["K"] * (9 if case.get("ranks") else 8)


OP = Op(
    name="rms_norm",
    summary="residual add, RMS norm, dropout and shrink in one pass; the masked expand inside its backward",
    reference=rms_norm_reference,
    function=rms_norm,
    make_inputs=_make_inputs,
    cases=(
        *({**case, "offset": 1.0} for case in NORM_CASES[1:10:3]),
        *NORM_CASES,
    ),
    kernels=kernel_records(is_centered=False),
    bench_cases=(
        {"M": 8192, "K": 4096, "residual": True},
        {"M": 8192, "K": 4096, "residual": True, "ranks": (16, 16, 16), "p": 0.1},
    ),
    num_bytes=_num_bytes,
)
