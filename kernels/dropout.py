"""Dropout with a mask from a counter: y = mask∘x * keep_scale(p); the gradient is the same function of dy.

Nothing is saved but the seed. Shape letters: M rows, K features. See `shrink` for the mask.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import native
from .op import Backend, Case, Config, Kernel, Op, backend_of, random_normal
from .shrink import draw_seed, drop, is_kept, keep_scale, mask_bits, row_keys, threshold


def dropout_reference(x: Tensor, *, p: float, seed: int) -> Tensor:
    return drop(x, p=p, seed=seed)


@triton.jit
def _dropout_kernel(x_ptr, y_ptr, M, K, stride_m, seed, dropped, scale, BM: tl.constexpr, BK: tl.constexpr):
    """y [M, K] contiguous from rows of x [M, K] that are stride_m apart."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (rows < M)[:, None] & (cols < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_m + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    kept = is_kept(mask_bits(row_keys(rows, seed), cols), dropped, 0)
    tl.store(y_ptr + rows[:, None] * K + cols[None, :], tl.where(kept, x * scale, 0.0), mask=inside)


BLOCK = {"BM": 16, "BK": 256}


def _apply(x: Tensor, *, p: float, seed: int, backend: Backend) -> Tensor:
    """Forward and backward alike, on x [..., K]."""
    if backend == "torch":
        return drop(x, p=p, seed=seed)
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    y = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    M, K = flat.shape
    if backend == "native":
        native.call("dropout", x.dtype, flat, y, M, K, flat.stride(0), seed, threshold(p), keep_scale(p))
    else:
        grid = (triton.cdiv(M, BLOCK["BM"]), triton.cdiv(K, BLOCK["BK"]))
        _dropout_kernel[grid](flat, y, M, K, flat.stride(0), seed, threshold(p), keep_scale(p), **BLOCK)
    return y.view(x.shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.p, ctx.seed, ctx.backend = p, seed, backend_of(x)
        return _apply(x, p=p, seed=seed, backend=ctx.backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _apply(dy, p=ctx.p, seed=ctx.seed, backend=ctx.backend), None, None


def dropout(x: Tensor, *, p: float, seed: int | None = None) -> Tensor:
    """Dropout of x [..., K] with probability p, quantised to 1/1024; `seed` is drawn from torch's generator if None."""
    if p == 0:
        return x
    return _Dropout.apply(x, p, draw_seed(p) if seed is None else seed)


def _make_inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
    x = random_normal(case["M"], case["K"], dtype=dtype, device=device, generator=generator)
    return {"x": x.requires_grad_(), "p": case["p"], "seed": 2**40 + 12345}


OP = Op(
    name="dropout",
    summary="dropout whose mask comes from a counter and is never stored",
    reference=dropout_reference,
    function=dropout,
    make_inputs=_make_inputs,
    cases=tuple({"M": M, "K": K, "p": p} for M, K in ((1, 16), (7, 100), (129, 576)) for p in (0.0, 0.05, 0.1, 0.5)),
    kernels=(
        Kernel(
            fn=_dropout_kernel,
            signature={
                "x_ptr": "*bf16", "y_ptr": "*bf16", "M": "i32", "K": "i32", "stride_m": "i32",
                "seed": "i64", "dropped": "i32", "scale": "fp32",
            },
            configs=(Config(BLOCK, num_warps=4, elements=BLOCK["BM"] * BLOCK["BK"]),),
            divisible=("K", "stride_m"),
        ),
    ),
    bench_cases=({"M": 8192, "K": 4096, "p": 0.1},),
    num_bytes=lambda case: 8.0 * case["M"] * case["K"],
)  # fmt: skip
