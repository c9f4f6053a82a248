"""DoRA: a frozen linear with a low-rank update whose rows are rescaled to a trained magnitude.

    norm = ||W + s B A|| of every row (no gradient flows through it),   g = magnitude / norm
    u = base Wᵀ + S Bᵀ,   S = s * drop(x) Aᵀ,   y = g∘u + bias + rest Wᵀ
    du = g∘dy,   dmagnitude = (sum over rows of dy∘u) / norm

"fast" and p = 0: base = x, rest = 0. "exact" with p > 0 is PEFT's: base = drop(x), rest = x - drop(x), so that
y = x Wᵀ + (g - 1)∘(drop(x) Wᵀ) + g∘(S Bᵀ) + bias, with a second base product in forward and in backward.
Source: S.-Y. Liu et al., "DoRA", arXiv 2402.09353, section 4.3. The norm: see `dora_norm`.
Shape letters: M rows, K inputs, N outputs, R rank.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import native
from .dora_norm import dora_norm, dora_norm_reference
from .dropout import dropout
from .lora_grads import lora_grad_a, lora_grads
from .lora_linear import Projection, dense_weight, lora_linear
from .nf4_dequant import nf4_dequant_reference
from .nf4_quantize import nf4_quantize
from .op import Backend, Case, Config, Kernel, Op, backend_of, compute_dtype, random_normal
from .shrink import draw_seed, drop

Mode = Literal["exact", "fast"]
PANEL = 1 << 18
"""Elements that plain torch holds in fp32 at a time."""
ROWS = 256
"""Rows whose column sums one program adds up."""


def dora_linear_reference(
    x: Tensor, projection: Projection, magnitude: Tensor, *, p: float = 0.0, seed: int = 0, mode: Mode = "exact"
) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    a, b, scale = projection.a.to(x.dtype), projection.b.to(x.dtype), projection.scale
    quant = projection.quant
    weight = (projection.weight if quant is None else nf4_dequant_reference(quant)).detach().to(x.dtype)
    g = magnitude / dora_norm_reference(projection).to(x.dtype).detach()
    dropped = drop(flat, p=p, seed=seed)
    base = dropped if mode == "exact" else flat
    y = flat @ weight.t() + (g - 1) * (base @ weight.t()) + g * (scale * (dropped @ a.t() @ b.t()))
    y = y if projection.bias is None else y + projection.bias
    return y.view(*x.shape[:-1], -1)


@triton.jit
def _scale_kernel(
    u_ptr, g_ptr, bias_ptr, y_ptr, M, N,
    HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y [M, N] = g∘u + bias, plus what y holds where ADDS."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    at = rows[:, None] * N + cols[None, :]
    g = tl.load(g_ptr + cols, mask=cols < N, other=0.0)
    y = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32) * g[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0)[None, :]
    if ADDS:
        y += tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scale_backward_kernel(
    dy_ptr, u_ptr, g_ptr, du_ptr, partial_ptr, M, N, stride,
    SUMS: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """du = g∘dy for ROWS rows of BN columns; where SUMS also partial [programs, N] = their column sums of dy∘u."""
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    g = tl.load(g_ptr + cols, mask=cols < N, other=0.0)
    sums = tl.zeros((BM, BN), tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for start in range(0, ROWS, BM):
        rows = first + start + tl.arange(0, BM)
        inside = (rows < M)[:, None] & (cols < N)[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        at = rows[:, None] * N + cols[None, :]
        if SUMS:
            sums += dy * tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(du_ptr + at, (dy * g[None, :]).to(du_ptr.dtype.element_ty), mask=inside)
    if SUMS:
        at = tl.program_id(0).to(tl.int64) * N + cols
        tl.store(partial_ptr + at, tl.sum(sums, axis=0), mask=cols < N)


SCALE_BLOCK = {"BM": 8, "BN": 256}
SCALE_WARPS = 8
BACKWARD_BLOCK = {"ROWS": ROWS, "BM": 16, "BN": 128}


def _scale(u: Tensor, g: Tensor, bias: Tensor | None, y: Tensor | None, backend: Backend) -> Tensor:
    """g∘u + bias as a new tensor, or added to y in place. u, y [M, N] contiguous, g fp32 [N]."""
    M, N = u.shape
    out = torch.empty_like(u) if y is None else y
    if backend == "torch":
        if y is None:
            torch.mul(u, g.to(u.dtype), out=out)
        else:
            out.addcmul_(u, g.to(u.dtype))
        return out if bias is None else out.add_(bias)
    shift = None if bias is None else bias.float().contiguous()
    if backend == "native":
        native.call("dora_scale", u.dtype, u, g, shift, y, out, M, N)
    else:
        grid = (triton.cdiv(M, SCALE_BLOCK["BM"]), triton.cdiv(N, SCALE_BLOCK["BN"]))
        has_bias, adds = shift is not None, y is not None
        _scale_kernel[grid](
            u, g, shift if has_bias else g, out, M, N,
            HAS_BIAS=has_bias, ADDS=adds, **SCALE_BLOCK, num_warps=SCALE_WARPS,
        )  # fmt: skip
    return out


def _scale_backward(dy: Tensor, u: Tensor | None, g: Tensor, backend: Backend) -> tuple[Tensor, Tensor | None]:
    """du = g∘dy, and the column sums of dy∘u in fp32 where u is given. dy [M, N] has last stride 1."""
    M, N = dy.shape
    du = torch.empty((M, N), dtype=dy.dtype, device=dy.device)
    if backend == "torch":
        torch.mul(dy, g.to(dy.dtype), out=du)
        step = max(1, PANEL // N)
        sums = None if u is None else torch.zeros(N, device=dy.device, dtype=g.dtype)
        for start in range(0, M if u is not None else 0, step):
            assert u is not None
            assert sums is not None
            sums += (dy[start : start + step].to(g.dtype) * u[start : start + step]).sum(0)
        return du, sums
    if backend == "native":
        sums = None if u is None else torch.empty(N)
        native.call("dora_scale_backward", dy.dtype, dy, u, g, du, sums, M, N, dy.stride(0))
        return du, sums
    programs = triton.cdiv(M, ROWS)
    partial = None if u is None else torch.empty((programs, N), device=dy.device)
    _scale_backward_kernel[(programs, triton.cdiv(N, BACKWARD_BLOCK["BN"]))](
        dy, dy if u is None else u, g, du, du if partial is None else partial, M, N, dy.stride(0),
        SUMS=u is not None, **BACKWARD_BLOCK,
    )  # fmt: skip
    return du, None if partial is None else partial.sum(0)


class _Scale(torch.autograd.Function):
    """y = g∘u + bias; u is kept for the gradient of the magnitude."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None) -> Tensor:
        ctx.backend = backend_of(u)
        g = magnitude.to(norm.dtype) / norm
        ctx.save_for_backward(u if ctx.needs_input_grad[1] else None, g, norm)
        ctx.dtypes = magnitude.dtype, None if bias is None else bias.dtype
        return _scale(u, g, bias, None, ctx.backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, g, norm = ctx.saved_tensors
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        du, sums = _scale_backward(dy, u, g, ctx.backend)
        dbias = dy.sum(0).to(ctx.dtypes[1]) if ctx.needs_input_grad[3] else None
        return du, None if sums is None else sums.div_(norm).to(ctx.dtypes[0]), None, dbias


class _Exact(torch.autograd.Function):
    """PEFT's form with dropout; saves x, S and u, and makes the mask again in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, magnitude: Tensor, bias: Tensor | None, norm: Tensor,
        projection: Projection, p: float, seed: int,
    ) -> Tensor:  # fmt: skip
        weight = dense_weight(projection, x.dtype)
        dropped = dropout(x, p=p, seed=seed)
        s = dropped @ (a.to(x.dtype) * projection.scale).t()
        u = (dropped @ weight.t()).addmm_(s, b.to(x.dtype).t())
        g = magnitude.to(norm.dtype) / norm
        y = _scale(u, g, bias, torch.sub(x, dropped, out=dropped) @ weight.t(), backend_of(x))
        ctx.projection, ctx.p, ctx.seed, ctx.backend = projection, p, seed, backend_of(x)
        ctx.dtypes = magnitude.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(x, s, u if ctx.needs_input_grad[3] else None, a, b, g, norm)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, s, u, a, b, g, norm = ctx.saved_tensors
        needs, scale = ctx.needs_input_grad, ctx.projection.scale
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        du, sums = _scale_backward(dy, u, g, ctx.backend)
        ds, db = lora_grads(du, s, b, scale=scale)
        dx = da = None
        if needs[0]:
            weight = dense_weight(ctx.projection, dy.dtype)
            dx = dy @ weight
            through = (du @ weight).addmm_(ds, a.to(dy.dtype)).sub_(dx)
            dx += dropout(through, p=ctx.p, seed=ctx.seed)
        if needs[1]:
            da = lora_grad_a(ds, x, p=ctx.p, seed=ctx.seed, dtype=a.dtype)
        dmagnitude = None if sums is None else sums.div_(norm).to(ctx.dtypes[0])
        dbias = dy.sum(0).to(ctx.dtypes[1]) if needs[4] else None
        return dx, da, db if needs[2] else None, dmagnitude, dbias, None, None, None, None


@torch.compiler.disable
def dora_linear(
    x: Tensor,
    projection: Projection,
    magnitude: Tensor,
    *,
    p: float = 0.0,
    seed: int | None = None,
    mode: Mode = "exact",
    norm: Tensor | None = None,
) -> Tensor:
    """y [..., N] of a DoRA linear for x [..., K] and magnitude [N]; gradients for x, A, B, magnitude and bias.

    p: probability of dropout on the input of the low-rank path, its mask made from `seed` (drawn from torch's
    generator if None). mode "exact" is PEFT's arithmetic, in which the dropped input also goes through W, at the price
    of a second base product; "fast" drops on the low-rank path only, as LoRA does. Without dropout they are equal.
    norm fp32 [N]: `dora_norm(projection)`, kept by a `dora_norm.DoraNorm`; None makes it here. Under autocast all but
    the norm and the magnitude is in the autocast dtype.
    """
    if mode not in ("exact", "fast"):
        raise ValueError(f"mode {mode!r}: exact or fast")
    device = x.device.type
    dtype = compute_dtype(x)
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    norm = dora_norm(projection) if norm is None else norm
    bias, seed = projection.bias, draw_seed(p) if seed is None else seed
    with torch.autocast(device, enabled=False):
        if mode == "exact" and p > 0:
            frozen = replace(projection, bias=None)
            y = _Exact.apply(flat, projection.a, projection.b, magnitude, bias, norm, frozen, p, seed)
        else:
            u = lora_linear(flat, (replace(projection, bias=None),), p=p, seed=seed)
            y = _Scale.apply(u, magnitude, norm, bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def _make_inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
    def normal(*shape: int, scale: float) -> Tensor:
        return random_normal(*shape, dtype=dtype, device=device, generator=generator, scale=scale)

    N, K, r = case["N"], case["K"], case["r"]
    weight = normal(N, K, scale=K**-0.5)
    projection = Projection(
        weight=normal(K, N, scale=K**-0.5).t() if case.get("transposed") else weight,
        bias=normal(N, scale=0.5).requires_grad_() if case.get("bias") else None,
        a=normal(r, K, scale=K**-0.5).requires_grad_(),
        b=normal(N, r, scale=r**-0.5).requires_grad_(),
        scale=0.75,
        quant=nf4_quantize(weight) if case.get("nf4") else None,
    )
    return {
        "x": normal(case["M"], K, scale=1.0).requires_grad_(),
        "projection": projection,
        "magnitude": normal(N, scale=1.0).requires_grad_(),
        "p": case["p"],
        "seed": 2**40 + 12345,
        "mode": case.get("mode", "exact"),
    }


def _signature(types: str) -> dict[str, str]:
    """ "name:type name:type" as a signature."""
    return dict(pair.split(":") for pair in types.split())


OP = Op(
    name="dora",
    summary="frozen linear with a low-rank update, rows rescaled to a trained magnitude",
    reference=dora_linear_reference,
    function=dora_linear,
    make_inputs=_make_inputs,
    cases=(
        {"M": 1, "K": 16, "N": 40, "r": 4, "p": 0.0},
        {"M": 65, "K": 64, "N": 72, "r": 1, "p": 0.1, "mode": "fast"},
        {"M": 7, "K": 40, "N": 24, "r": 4, "p": 0.1, "bias": True},
        {"M": 7, "K": 40, "N": 24, "r": 8, "p": 0.1, "bias": True, "mode": "fast"},
        {"M": 129, "K": 96, "N": 80, "r": 16, "p": 0.0, "bias": True},
        {"M": 33, "K": 72, "N": 300, "r": 24, "p": 0.5, "mode": "fast"},
        {"M": 65, "K": 64, "N": 48, "r": 64, "p": 0.5, "transposed": True},
        {"M": 65, "K": 100, "N": 70, "r": 16, "p": 0.1, "nf4": True},
        {"M": 300, "K": 64, "N": 130, "r": 8, "p": 0.0, "nf4": True},
    ),
    kernels=(
        Kernel(
            fn=_scale_kernel,
            signature=_signature("u_ptr:*bf16 g_ptr:*fp32 bias_ptr:*fp32 y_ptr:*bf16 M:i32 N:i32"),
            configs=tuple(
                Config(
                    {"HAS_BIAS": has_bias, "ADDS": adds, **SCALE_BLOCK},
                    num_warps=SCALE_WARPS,
                    elements=SCALE_BLOCK["BM"] * SCALE_BLOCK["BN"],
                )
                for has_bias in (False, True)
                for adds in (False, True)
            ),
            divisible=("N",),
        ),
        Kernel(
            fn=_scale_backward_kernel,
            signature=_signature(
                "dy_ptr:*bf16 u_ptr:*bf16 g_ptr:*fp32 du_ptr:*bf16 partial_ptr:*fp32 M:i32 N:i32 stride:i32"
            ),
            configs=tuple(Config({"SUMS": sums, **BACKWARD_BLOCK}) for sums in (False, True)),
            divisible=("N", "stride"),
        ),
    ),
    bench_cases=(
        {"M": 8192, "K": 4096, "N": 4096, "r": 16, "p": 0.0},
        {"M": 8192, "K": 4096, "N": 4096, "r": 16, "p": 0.1},
    ),
    num_flops=lambda case: 4.0 * case["M"] * case["K"] * case["N"],
)
