"""The gate of a feed-forward block, and what it hands to the low-rank update of the linear that follows.

    h = act(gate) * up  (up may be absent: h = act(gate)),   S_j = scale_j * drop_j(h) A_jᵀ
    d = dh + sum_j mask_j∘((scale_j dS_j) A_j) * keep_scale
    d_gate = d * up * act'(gate),   d_up = d * act(gate),   dA_j = (scale_j dS_j)ᵀ drop_j(h)

Only gate and up are saved; h is computed again in backward. act(gate) is rounded to the dtype before the product, as in
the models' own code. Shape letters: M rows, F features, R ranks of the group together. Masks: see `shrink`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import glu_triton, lora_cpu, native
from .activations import ACTIVATIONS
from .glu_triton import Call, Grads, Inputs
from .op import Backend, Case, Op, backend_of, compute_dtype, random_normal
from .shrink import (
    Shrink,
    drop,
    rank_slices,
    shrink_reference,
)


def glu_reference(
    gate: Tensor, up: Tensor | None, *, activation: str, shrink: Shrink | None = None
) -> tuple[Tensor, Tensor | None]:
    """The specification, in plain torch."""
    h = ACTIVATIONS[activation].function(gate)
    h = h if up is None else h * up
    return h, None if shrink is None else shrink_reference(h.reshape(-1, h.shape[-1]), shrink)


def _forward_native(x: Inputs, call: Call) -> tuple[Tensor, Tensor | None]:
    """With matrix tiles the shrink masks h while it reads it; else the copies of h that it needs are made here."""
    M, F = x.gate.shape
    uses_tiles = lora_cpu.uses_tiles(x.gate.dtype, "native")
    lanes = len(x.a) if call.p > 0 and not uses_tiles else 0
    h, copies = x.gate.new_empty(M, F), lora_cpu.scratch("dropped", (lanes, M, F), x.gate.dtype)
    native.call(
        "glu", h.dtype, x.gate, x.gate.stride(0), x.up, 0 if x.up is None else x.up.stride(0), h, copies, M, F,
        *call.form, lanes, *call.dropout,
    )  # fmt: skip
    if not x.a:
        return h, None
    ranks = rank_slices(x.a)
    s = h.new_empty(M, ranks[-1].stop)
    if uses_tiles:
        lora_cpu.shrink(h, x.a, call.scales, out=s, ranks=ranks, p=call.p, seed=call.seed, backend="native")
        return h, s
    for j, (part, columns) in enumerate(zip(x.a, ranks, strict=True)):
        torch.mm(copies[j] if lanes else h, part.t(), out=s[:, columns]).mul_(call.scales[j])
    return h, s


def _backward_native(
    dh: Tensor | None, ds: Sequence[Tensor], x: Inputs, out: Grads, call: Call
) -> Sequence[Tensor | None]:
    """One buffer holds dS A until it is read, then the dropped copies of h, each in the place of what was just read."""
    M, F = x.gate.shape
    lanes = len(ds) if call.p > 0 else 0
    expanded = lora_cpu.scratch("dropped", (lanes, M, F), x.gate.dtype) if lanes else None
    for j, part in enumerate(ds):
        if expanded is not None:
            torch.mm(part, x.a[j], out=expanded[j])
        else:
            dh = torch.mm(part, x.a[j]) if dh is None else torch.addmm(dh, part, x.a[j])
    copies = None
    if ds and out.needs_a:
        copies = lora_cpu.scratch("dropped", (1, M, F), x.gate.dtype) if expanded is None else expanded
    native.call(
        "glu_backward", x.gate.dtype, dh, 0 if dh is None else dh.stride(0), expanded, x.gate, x.gate.stride(0), x.up,
        0 if x.up is None else x.up.stride(0), out.gate, out.up, out.row_stride, copies, M, F, *call.form,
        max(lanes, int(copies is not None)), *call.dropout,
    )  # fmt: skip
    if copies is None:
        return [None] * len(x.a)
    return [torch.mm(part.t(), copies[j if lanes else 0]) for j, part in enumerate(ds)]


def _forward_torch(x: Inputs, call: Call) -> tuple[Tensor, Tensor | None]:
    h = call.activation.function(x.gate)
    h = h if x.up is None else h.mul_(x.up)
    return h, shrink_reference(h, Shrink(x.a, call.scales, call.p, call.seed)) if x.a else None


def _backward_torch(
    dh: Tensor | None, ds: Sequence[Tensor], x: Inputs, out: Grads, call: Call
) -> Sequence[Tensor | None]:
    for lane, part in enumerate(ds):
        expanded = drop(torch.mm(part, x.a[lane]), p=call.p, seed=call.seed, lane=lane)
        dh = expanded if dh is None else expanded.add_(dh)
    assert dh is not None
    value = call.activation.function(x.gate)
    if out.up is not None:
        torch.mul(dh, value, out=out.up)
    if out.gate is not None:
        call.activation.backward(dh if x.up is None else dh * x.up, x.gate, out.gate)
    if not out.needs_a:
        return [None] * len(x.a)
    h = value if x.up is None else value.mul_(x.up)
    return [part.t() @ drop(h, p=call.p, seed=call.seed, lane=lane) for lane, part in enumerate(ds)]


BACKENDS: dict[Backend, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "triton": (glu_triton.forward, glu_triton.backward),
    "native": (_forward_native, _backward_native),
    "torch": (_forward_torch, _backward_torch),
}


def _outputs(gate: Tensor, up: Tensor | None, needs: Sequence[bool]) -> Grads:
    """Room for the gradients: where both are needed halves of one [M, 2F] buffer, in the order of gate and up."""
    M, F = gate.shape
    needs_a = any(needs[3:])
    if up is None or not (needs[0] and needs[1]):
        first = gate.new_empty(M, F) if needs[0] else None
        return Grads(first, gate.new_empty(M, F) if up is not None and needs[1] else None, needs_a)
    left, right = gate.new_empty(M, 2 * F).split(F, dim=1)
    up_is_left = up.data_ptr() + F * up.element_size() == gate.data_ptr()
    return Grads(right, left, needs_a) if up_is_left else Grads(left, right, needs_a)


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, call: Call, *a: Tensor) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.save_for_backward(gate, up, *a)
        return BACKENDS[call.backend][0](Inputs(gate, up, _in_dtype(a, gate.dtype)), call)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dh: Tensor | None, ds: Tensor | None) -> tuple[Any, ...]:
        call: Call = ctx.call
        gate, up, *a = ctx.saved_tensors
        out = _outputs(gate, up, ctx.needs_input_grad)
        parts: list[Tensor] = []
        if ds is not None:
            scaled = zip(rank_slices(a), call.scales, strict=True)
            parts = [(ds[:, columns] * scale).contiguous() for columns, scale in scaled]
        dh = dh if dh is None or dh.stride(-1) == 1 else dh.contiguous()
        inputs = Inputs(gate, up, _in_dtype(a, gate.dtype))
        grads_a = BACKENDS[call.backend][1](dh, parts, inputs, out, call) if parts or dh is not None else []
        grads = [
            grad.to(getattr(part, "grad_dtype", None) or part.dtype) if needed and grad is not None else None
            for part, grad, needed in zip(a, grads_a or [None] * len(a), ctx.needs_input_grad[3:], strict=True)
        ]
        return out.gate, out.up, None, *grads


def _in_dtype(a: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(part.detach().to(dtype).contiguous() for part in a)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., F] as [M, F] with unit column stride, in this dtype."""
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    return flat if flat.stride(-1) == 1 else flat.contiguous()


@torch.compiler.disable
def glu(
    gate: Tensor, up: Tensor | None = None, *, activation: str, shrink: Shrink | None = None
) -> tuple[Tensor, Tensor | None]:
    """(h [..., F], s [M, R]) with h = act(gate) * up, or act(gate) where up is None; s is None without `shrink`.

    gate and up [..., F] may be halves of one [..., 2F] tensor: their gradients are halves of one tensor again. For the
    names of activations see `activations`. Under autocast everything runs in the autocast dtype. Matrices A may have
    another dtype: they are rounded to that of gate, and their gradients come in their own.
    Raises ValueError for an unknown activation and for shapes that do not fit.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    if up is not None and up.shape != gate.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} differ in shape")
    a = () if shrink is None else shrink.a
    if any(part.shape[-1] != gate.shape[-1] for part in a):
        raise ValueError(f"A of {[tuple(part.shape) for part in a]} does not take {gate.shape[-1]} features")
    device = gate.device.type
    dtype = compute_dtype(gate)
    backend = backend_of(gate.to(dtype))
    if backend == "triton" and len(a) > 1:
        backend = "torch"
    if shrink is None:
        call = Call(ACTIVATIONS[activation], (), 0.0, 0, backend)
    else:
        call = Call(ACTIVATIONS[activation], shrink.scales, shrink.p, shrink.seed, backend)
    with torch.autocast(device, enabled=False):
        h, s = _Glu.apply(_rows(gate, dtype), None if up is None else _rows(up, dtype), call, *a)
    return h.view(gate.shape), s


def _with_packed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on gate_up [M, 2F], or on a pair (gate, up): so cases cover both layouts."""

    def call(gate_up: Tensor | Sequence[Tensor | None], **options: Any) -> Any:
        gate, up = gate_up.chunk(2, dim=-1) if isinstance(gate_up, Tensor) else gate_up
        return function(gate, up, **options)

    return call


def _make_inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
    def normal(*shape: int, scale: float = 1.5) -> Tensor:
        return random_normal(*shape, dtype=dtype, device=device, generator=generator, scale=scale).requires_grad_()

    M, F, layout = case["M"], case["F"], case.get("layout", "packed")
    gate_up: Any = normal(M, 2 * F)
    if layout == "columns":
        gate_up = [normal(F, M).detach().t().requires_grad_() for _ in range(2)]
    elif layout == "alone":
        gate_up = [normal(M, F), None]
    elif layout == "frozen":
        gate_up = [normal(M, F).detach(), normal(M, F)]
    shrink = None
    if ranks := case.get("r"):
        a = tuple(normal(r, F, scale=F**-0.5) for r in ranks)
        shrink = Shrink(a, tuple(1.5 - 0.5 * j for j in range(len(a))), case.get("p", 0.0), 2**40 + 12345)
    return {"gate_up": gate_up, "activation": case["activation"], "shrink": shrink}


OP = Op(
    name="glu",
    summary="gate of a feed-forward block with dropout and shrink for the linear that follows",
    reference=_with_packed(glu_reference),
    function=_with_packed(glu),
    make_inputs=_make_inputs,
    cases=(
        {"M": 1, "F": 16, "activation": "silu"},
        {"M": 7, "F": 100, "activation": "gelu", "layout": "alone", "r": (4,), "p": 0.05},
        {"M": 7, "F": 40, "activation": "relu", "layout": "columns", "r": (1,), "p": 0.5},
        {"M": 129, "F": 72, "activation": "gelu_tanh", "layout": "frozen", "r": (24,), "p": 0.0},
        {"M": 33, "F": 136, "activation": "quick_gelu", "r": (8, 3), "p": 0.1},
        {"M": 40, "F": 96, "activation": "silu", "r": (130,), "p": 0.1},
        {"M": 129, "F": 300, "activation": "gelu"},
        {"M": 1025, "F": 24, "activation": "silu", "r": (8,), "p": 0.1},
        {"M": 129, "F": 300, "activation": "silu", "r": (16,), "p": 0.1},
    ),
    kernels=glu_triton.KERNELS,
    bench_cases=({"M": 8192, "F": 14336, "activation": "silu", "r": (16,), "p": 0.1},),
    num_bytes=lambda case: 18.0 * case["M"] * case["F"],
)  # fmt: skip
