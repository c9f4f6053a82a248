"""Rotary position embedding, in place on the first heads of a packed buffer.

    y_j = x_j c_j - x_k s_j,   y_k = x_k c_j + x_j s_j    for pairs (j, k) of the first 2E features of a head

Pairs are (j, j + E), or (2j, 2j + 1) where interleaved; the gradient is the same rotation with -s. Su et al.,
arXiv 2104.09864. Everything is computed in fp32 and rounded once. Shape letters: B batch, T tokens, H heads, D head
dim, E half of the rotary dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import native
from .op import Backend, Case, Config, Kernel, Op, backend_of, random_normal

MAX_HALF = 512
"""The C++ code holds one row of cos and sin in arrays of this length."""


def rope_reference(
    x: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int | None = None, interleaved: bool = False
) -> Tensor:
    """The specification, in plain torch: x * cos + rotated(x) * sin, not in place. x [B, T, H, D]."""
    heads = x[:, :, : x.shape[2] if num_heads is None else num_heads, : cos.shape[-1]]
    if interleaved:
        turned = torch.stack((-heads[..., 1::2], heads[..., ::2]), dim=-1).flatten(-2)
    else:
        left, right = heads.chunk(2, dim=-1)
        turned = torch.cat((-right, left), dim=-1)
    rotated = (heads * cos[:, :, None] + turned * sin[:, :, None]).to(x.dtype)
    rotated = torch.cat((rotated, x[:, :, : heads.shape[2], cos.shape[-1] :]), dim=-1)
    return torch.cat((rotated, x[:, :, heads.shape[2] :]), dim=2)


@triton.jit
def _rope_kernel(
    x_ptr, y_ptr, cos_ptr, sin_ptr, M, T, E, num_heads, step, gap, x_stride_b, x_stride_t, x_stride_h, y_stride_b,
    y_stride_t, y_stride_h, cos_stride_b, cos_stride_t, sin_stride_b, sin_stride_t, sign,
    BM: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Rotates all heads of BM of the M = B * T rows; the pairs of a head are (j * step, j * step + gap)."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    b, t = rows // T, rows % T
    pairs = tl.program_id(1) * BE + tl.arange(0, BE)
    inside = (rows < M)[:, None] & (pairs < E)[None, :]
    first = (pairs * step)[None, :]
    c = tl.load(cos_ptr + (b * cos_stride_b + t * cos_stride_t)[:, None] + first, mask=inside, other=0.0)
    s = tl.load(sin_ptr + (b * sin_stride_b + t * sin_stride_t)[:, None] + first, mask=inside, other=0.0)
    c = c.to(tl.float32)
    s = s.to(tl.float32) * sign
    x_at = x_ptr + (b * x_stride_b + t * x_stride_t)[:, None] + first
    y_at = y_ptr + (b * y_stride_b + t * y_stride_t)[:, None] + first
    for _head in range(num_heads):
        left = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(x_at + gap, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_at, left * c - right * s, mask=inside)
        tl.store(y_at + gap, right * c + left * s, mask=inside)
        x_at += x_stride_h
        y_at += y_stride_h


CONFIGS = (
    Config({"BM": 16, "BE": 32}, num_warps=4, elements=2 * 16 * 32),
    Config({"BM": 8, "BE": 64}, num_warps=4, elements=2 * 8 * 64),
    Config({"BM": 4, "BE": 128}, num_warps=4, elements=2 * 4 * 128),
)


@dataclass(frozen=True)
class _Call:
    """What forward hands to backward besides tensors."""

    num_heads: int
    head_dim: int
    interleaved: bool
    backend: Backend


def _rotate_triton(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, call: _Call, sign: float) -> None:
    B, T, _, _ = x.shape
    E = cos.shape[-1] // 2
    config = next((config for config in CONFIGS if config.constants["BE"] >= E), CONFIGS[-1])
    grid = (triton.cdiv(B * T, config.constants["BM"]), triton.cdiv(E, config.constants["BE"]))
    step, gap = (2, 1) if call.interleaved else (1, E)
    _rope_kernel[grid](
        x, y, cos, sin, B * T, T, E, call.num_heads, step, gap, *x.stride()[:3], *y.stride()[:3], *cos.stride()[:2],
        *sin.stride()[:2], sign, **config.constants, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    _copy_others(x, y, cos, call)


def _rotate_native(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, call: _Call, sign: float) -> None:
    sizes = torch.tensor([*x.shape, call.num_heads, cos.shape[-1] // 2])
    strides = torch.tensor([*x.stride()[:3], *y.stride()[:3], *cos.stride()[:2], *sin.stride()[:2]])
    is_wide = int(cos.dtype == torch.float32)
    native.call("rope", x.dtype, x, y, cos, sin, sizes, strides, is_wide, int(call.interleaved), sign)


def _rotate_torch(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, call: _Call, sign: float) -> None:
    E = cos.shape[-1] // 2
    first, second = (slice(0, 2 * E, 2), slice(1, 2 * E, 2)) if call.interleaved else (slice(0, E), slice(E, 2 * E))
    c, s = cos[:, :, None, first], sin[:, :, None, first] * sign
    heads, target = x[:, :, : call.num_heads], y[:, :, : call.num_heads]
    left, right = heads[..., first] * c - heads[..., second] * s, heads[..., second] * c + heads[..., first] * s
    target[..., first], target[..., second] = left, right
    _copy_others(x, y, cos, call)


def _copy_others(x: Tensor, y: Tensor, cos: Tensor, call: _Call) -> None:
    """What is not rotated, where y is not x itself."""
    if x.data_ptr() == y.data_ptr():
        return
    if call.num_heads < x.shape[2]:
        y[:, :, call.num_heads :] = x[:, :, call.num_heads :]
    if cos.shape[-1] < x.shape[3]:
        y[:, :, : call.num_heads, cos.shape[-1] :] = x[:, :, : call.num_heads, cos.shape[-1] :]


ROTATE: dict[Backend, Callable[..., None]] = {
    "triton": _rotate_triton,
    "native": _rotate_native,
    "torch": _rotate_torch,
}


def _heads(x: Tensor, call: _Call) -> Tensor:
    """x [B, T, H * D] or [B, T, H, D] as the latter."""
    return x.unflatten(-1, (-1, call.head_dim)) if x.dim() == 3 else x


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, call: _Call) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(cos, sin)
        ctx.mark_dirty(x)
        heads = _heads(x, call)
        ROTATE[call.backend](heads, heads, cos, sin, call, 1.0)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        call: _Call = ctx.call
        if dy.stride(-1) == 1:
            dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
        else:
            dy = dx = dy.clone(memory_format=torch.contiguous_format)
        ROTATE[call.backend](_heads(dy, call), _heads(dx, call), *ctx.saved_tensors, call, -1.0)
        return dx, None, None, None


def _table(table: Tensor, x: Tensor, B: int) -> Tensor:
    """cos or sin [1 or B, T, 2E] in the dtype of x or in fp32, with unit stride, B in front."""
    table = table if table.dtype in (x.dtype, torch.float32) else table.to(torch.promote_types(x.dtype, torch.float32))
    table = table if table.stride(-1) == 1 else table.contiguous()
    return table.expand(B, -1, -1)


@torch.compiler.disable
def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int | None = None,
    head_dim: int | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Rotates the first `num_heads` heads (all if None) of x [B, T, H, D] IN PLACE and returns x.

    cos and sin [1 or B, T, rotary dim] as transformers makes them: cat(c, c), or repeat_interleave(c, 2) where
    interleaved; only the first of each pair is read. Features past the rotary dim stay. x may be a strided view with
    unit last stride; a packed x [B, T, H * D] with `head_dim` given spares autograd the copies that in-place operations
    on views cost. Raises ValueError where shapes do not fit or the last stride is not 1.
    """
    if x.dim() != (4 if head_dim is None else 3) or x.stride(-1) != 1:
        raise ValueError(f"x {tuple(x.shape)}, strides {x.stride()}: expected [B, T, H, D] with unit last stride")
    D = x.shape[-1] if head_dim is None else head_dim
    H = x.shape[2] if head_dim is None else x.shape[2] // D
    heads = H if num_heads is None else num_heads
    rotary_dim = cos.shape[-1]
    if heads > H or x.shape[-1] % D:
        raise ValueError(f"{heads} heads of {D} features do not fit into x {tuple(x.shape)}")
    if rotary_dim % 2 or rotary_dim > min(D, 2 * MAX_HALF) or cos.shape != sin.shape:
        raise ValueError(f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)} do not fit heads of {D} features")
    if cos.shape[1] != x.shape[1] or cos.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"cos {tuple(cos.shape)} does not fit x {tuple(x.shape)}")
    cos, sin = (_table(table.detach(), x, x.shape[0]) for table in (cos, sin.to(cos.dtype)))
    return _Rope.apply(x, cos, sin, _Call(heads, D, interleaved, backend_of(x)))


def _of_copy(x: Tensor, cos: Tensor, sin: Tensor, *, is_packed: bool = False, **options: Any) -> Tensor:
    """rope on a copy of x, for tests: a leaf cannot be changed in place."""
    if not is_packed:
        return rope(x.clone(), cos, sin, **options)
    return rope(x.flatten(2).clone(), cos, sin, head_dim=x.shape[-1], **options).view(x.shape)


def _reference(x: Tensor, cos: Tensor, sin: Tensor, *, is_packed: bool = False, **options: Any) -> Tensor:
    return rope_reference(x, cos, sin, **options)


def _make_inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
    B, T, H, D, E = case["B"], case["T"], case["H"], case["D"], case["E"]
    if case.get("layout") == "heads first":
        x = random_normal(B, H, T, D, dtype=dtype, device=device, generator=generator).transpose(1, 2)
    else:
        x = random_normal(B, T, H, D, dtype=dtype, device=device, generator=generator)
    angles = random_normal(case.get("tables", B), T, E, dtype=torch.float64, device=device, generator=generator)
    is_interleaved = case.get("interleaved", False)
    angles = angles.repeat_interleave(2, dim=-1) if is_interleaved else torch.cat((angles, angles), dim=-1)
    cos, sin = ((1.2 * f(angles)).to(dtype) for f in (torch.cos, torch.sin))
    inputs = {"x": x.requires_grad_(), "cos": cos, "sin": sin, "interleaved": is_interleaved}
    return {**inputs, "num_heads": case.get("heads"), "is_packed": case.get("layout") == "packed"}


OP = Op(
    name="rope",
    summary="rotary position embedding in place",
    reference=_reference,
    function=_of_copy,
    make_inputs=_make_inputs,
    cases=(
        {"B": 1, "T": 1, "H": 1, "D": 2, "E": 1},
        {"B": 1, "T": 7, "H": 3, "D": 24, "E": 12, "heads": 2, "layout": "packed"},
        {"B": 2, "T": 5, "H": 2, "D": 300, "E": 140, "tables": 1},
        {"B": 3, "T": 7, "H": 4, "D": 20, "E": 5, "interleaved": True, "heads": 3},
        {"B": 2, "T": 9, "H": 2, "D": 64, "E": 32, "layout": "heads first", "tables": 1},
        {"B": 2, "T": 513, "H": 1, "D": 8, "E": 4},
        {"B": 1, "T": 129, "H": 3, "D": 128, "E": 64, "heads": 2},
    ),
    kernels=(
        Kernel(
            fn=_rope_kernel,
            signature={
                **dict.fromkeys(("x_ptr", "y_ptr", "cos_ptr", "sin_ptr"), "*bf16"),
                **dict.fromkeys(("M", "T", "E", "num_heads", "step", "gap"), "i32"),
                **{f"{name}_stride_{d}": "i32" for name in "xy" for d in "bth"},
                **{f"{name}_stride_{d}": "i32" for name in ("cos", "sin") for d in "bt"},
                "sign": "fp32",
            },
            configs=CONFIGS,
            divisible=("E", "gap", *(f"{name}_stride_{d}" for name in "xy" for d in "bth")),
        ),
    ),
    bench_cases=({"B": 4, "T": 2048, "H": 48, "D": 128, "E": 64, "heads": 40, "layout": "packed"},),
    num_bytes=lambda case: 8.0 * case["B"] * case["T"] * case.get("heads", case["H"]) * 2 * case["E"],
)
