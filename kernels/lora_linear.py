"""Frozen linears that share an input, each with a low-rank update: one operation for q|k|v, gate|up or a single linear.

    y_j = x W_jᵀ + bias_j + S_j B_jᵀ,   S_j = scale_j * drop_j(x) A_jᵀ,   y = [y_0 | y_1 | ...]
    dS_j = scale_j * dy_j B_j,   dx = sum_j dy_j W_j + mask_j∘(dS_j A_j) * keep_scale
    dA_j = dS_jᵀ drop_j(x),   dB_j = dy_jᵀ S_j

W is dense or NF4 and gets no gradient. Saved for backward: x (shared) and S [M, R]; only S where the producer of x
computed it. Shape letters: M rows, K inputs, N_j outputs (N together), r_j ranks (R together). Masks: see `shrink`.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from . import lora_cpu, lora_gemm, lora_grads
from .columns import are_adjacent, joined
from .nf4_dequant import Nf4Weight, nf4_dequant
from .op import Backend, Case, Op, backend_of, compute_dtype, random_normal
from .product import product
from .shrink import MAX_LANES, draw_seed, drop, rank_slices


@dataclass(frozen=True)
class Projection:
    """One frozen linear with its low-rank update: weight [N, K] with any strides, bias [N] or None, a [r, K], b [N, r].

    With `quant` the dense weight is made from it when needed and `weight` is not read. With `packed` [N, K + room]
    `weight` is its first K columns, and the others are room where lora_linear puts B: see `pack`.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    quant: Nf4Weight | None = None
    packed: Tensor | None = None

    @property
    def num_outputs(self) -> int:
        return self.b.shape[0]


def pack(projections: Sequence[Projection]) -> list[Projection]:
    """The projections with copies of their weights as rows of one matrix [N, K + R], with room for every B.

    On a GPU the forward of the group is then one product of the vendor's library, [x | S] [W | B]ᵀ.
    """
    first, sizes = projections[0].weight, [part.num_outputs for part in projections]
    room = -(-sum(part.a.shape[0] for part in projections) // 8) * 8
    whole = first.new_zeros(sum(sizes), first.shape[1] + room)
    packed = []
    for part, rows in zip(projections, whole.split(sizes), strict=True):
        weight = rows[:, : first.shape[1]].copy_(part.weight.detach())
        packed.append(replace(part, weight=weight, packed=rows))
    return packed


FUSED_CAPABILITIES: frozenset[tuple[int, int]] = frozenset()
"""Compute capabilities where the Triton GEMM was measured to beat the vendor's library with separate kernels."""


def _strategy(call: "_Call", x: Tensor) -> Literal["augmented", "fused", "separate"]:
    """How the base product and the low-rank update are put together."""
    if call.backend != "triton":
        return "separate"
    packed = [part.packed for part in call.projections if part.packed is not None]
    if len(packed) == len(call.projections) and packed[0].dtype == x.dtype and are_adjacent(packed, dim=0):
        return "augmented" if packed[0].shape[1] >= x.shape[1] + call.ranks[-1].stop else "separate"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) in FUSED_CAPABILITIES:
        return "fused"
    return "separate"


def lane_of(j: int, seed: int) -> tuple[int, int]:
    """(seed, lane) of projection j: three share a hash, every further three get a seed of their own."""
    group, lane = divmod(j, MAX_LANES)
    return ((seed + group * 0x9E3779B97F4A7C15) % 2**62) | 2**32 if group else seed, lane


def lora_linear_reference(
    x: Tensor, projections: Sequence[Projection], *, p: float = 0.0, seed: int | None = None, s: Tensor | None = None
) -> Tensor:
    """The specification, in plain torch."""
    outputs, flat = [], x.reshape(-1, x.shape[-1])
    for j, (part, columns) in enumerate(zip(projections, rank_slices([q.a for q in projections]), strict=True)):
        own_seed, lane = lane_of(j, seed or 0)
        low = part.scale * (drop(flat, p=p, seed=own_seed, lane=lane) @ part.a.to(x.dtype).t())
        low = low if s is None else s[:, columns]
        base = torch.nn.functional.linear(flat, dense_weight(part, x.dtype), part.bias)
        outputs.append(base + low @ part.b.to(x.dtype).t())
    return torch.cat(outputs, dim=-1).view(*x.shape[:-1], -1)


def dense_weight(part: Projection, dtype: torch.dtype) -> Tensor:
    """W [N, K] in this dtype."""
    if part.quant is None:
        return part.weight.to(dtype)
    return nf4_dequant(part.quant, dtype=dtype)


def _weights(projections: Sequence[Projection], dtype: torch.dtype) -> list[tuple[slice, Tensor]]:
    """(columns of y, W of these): one pair for all projections where their weights are adjacent rows, else one each.

    NF4 weights are made in scratch memory, as adjacent rows.
    """
    sizes = [part.num_outputs for part in projections]
    ends = list(itertools.accumulate(sizes))
    if all(part.quant is not None for part in projections):
        first = projections[0]
        shape = (ends[-1], first.a.shape[1])
        whole = lora_cpu.scratch("weight", shape, dtype, first.a.device)
        for part, size, end in zip(projections, sizes, ends, strict=True):
            assert part.quant is not None
            nf4_dequant(part.quant, out=whole[end - size : end])
        return [(slice(0, ends[-1]), whole)]
    dense = [dense_weight(part, dtype) for part in projections]
    if are_adjacent(dense, dim=0):
        return [(slice(0, ends[-1]), joined(dense, dim=0))]
    return [(slice(end - size, end), weight) for size, end, weight in zip(sizes, ends, dense, strict=True)]


@dataclass(frozen=True)
class _Call:
    """What forward hands to backward besides tensors."""

    projections: tuple[Projection, ...]
    p: float
    seed: int
    ranks: tuple[slice, ...]
    columns: tuple[slice, ...]
    backend: Backend

    @property
    def scales(self) -> list[float]:
        return [part.scale for part in self.projections]

    def groups(self) -> Iterator[tuple[slice, int]]:
        """The projections that share a hash, and their seed."""
        for start in range(0, len(self.projections), MAX_LANES):
            yield slice(start, start + MAX_LANES), lane_of(start, self.seed)[0]


def _grad_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype in which autograd takes the gradient of a parameter: `grad_dtype` (torch 2.10), else its own."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor | None, call: _Call, *parameters: Any) -> Tensor:
        count = len(call.projections)
        a, b, bias = parameters[:count], parameters[count : 2 * count], parameters[2 * count :]
        low = _shrink(x, a, call) if s is None else s
        y = FORWARD[_strategy(call, x)](x, low, [_like(part, x) for part in b], bias, call)
        ctx.call, ctx.has_s = call, s is not None
        ctx.save_for_backward(None if s is not None else x, low, *a, *b)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        call: _Call = ctx.call
        count = len(call.projections)
        x, low, *parameters = ctx.saved_tensors
        a, b = parameters[:count], parameters[count:]
        needs = ctx.needs_input_grad
        needs_a, needs_b, needs_bias = (needs[3 + i * count : 3 + (i + 1) * count] for i in range(3))
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        wants_ds = needs[1] if ctx.has_s else needs[0] or any(needs_a)
        ds = torch.empty_like(low) if wants_ds else None
        grads_b = lora_grads.grads_b(
            dy, low, [_like(part, dy) for part in b], [1.0] * count if ctx.has_s else call.scales,
            columns=call.columns, ranks=call.ranks, ds=ds, backend=call.backend,
            dtypes=[_grad_dtype(part) if wanted else None for part, wanted in zip(b, needs_b, strict=True)],
        )  # fmt: skip
        grads_a: list[Tensor | None] = [None] * count
        if needs[0] and not ctx.has_s and count <= MAX_LANES and _strategy(call, dy) == "fused":
            assert ds is not None
            dx: Tensor | None = _fused_backward(dy, ds, [_like(part, dy) for part in a], call)
            grads_a = _grads_a(ds, x, a, None, call, needs_a)
        else:
            dx = _base_backward(dy, call) if needs[0] else None
            if not ctx.has_s and ds is not None:
                grads_a = _grads_a(ds, x, a, dx, call, needs_a)
        grads_bias = [
            dy[:, columns].sum(0).to(_grad_dtype(part.bias)) if wanted and part.bias is not None else None
            for part, columns, wanted in zip(call.projections, call.columns, needs_bias, strict=True)
        ]
        return dx, ds if ctx.has_s else None, None, *grads_a, *grads_b, *grads_bias


def _like(parameter: Tensor, x: Tensor) -> Tensor:
    """A or B as the products take it: in the dtype of x, contiguous."""
    return parameter.to(x.dtype).contiguous()


def _separate(x: Tensor, s: Tensor, b: Sequence[Tensor], bias: Sequence[Tensor | None], call: _Call) -> Tensor:
    """y = x Wᵀ + bias, then the update in place."""
    y = x.new_empty(x.shape[0], call.columns[-1].stop)
    for columns, weight in _weights(call.projections, x.dtype):
        product(x, weight.t(), out=y[:, columns])
    _add_bias(y, bias, call)
    if call.backend != "triton":
        lora_cpu.expand(y, s, b, columns=call.columns, ranks=call.ranks, backend=call.backend)
        return y
    for part, columns, ranks in zip(b, call.columns, call.ranks, strict=True):
        lora_gemm.expand(y[:, columns], s, [part], ranks=[ranks], turned=True)
    return y


def _augmented(x: Tensor, s: Tensor, b: Sequence[Tensor], bias: Sequence[Tensor | None], call: _Call) -> Tensor:
    """y = [x | S] [W | B]ᵀ + bias with the B in the room of the packed weights, block by block."""
    whole = joined([part.packed for part in call.projections if part.packed is not None], dim=0)
    K, R = x.shape[1], s.shape[1]
    wide = lora_cpu.scratch("augmented", (x.shape[0], whole.shape[1]), x.dtype, x.device)
    wide[:, :K], wide[:, K : K + R], wide[:, K + R :] = x, s, 0
    whole[:, K:] = 0
    for part, columns, ranks in zip(b, call.columns, call.ranks, strict=True):
        whole[columns, K + ranks.start : K + ranks.stop] = part
    y = torch.mm(wide, whole.t())
    _add_bias(y, bias, call)
    return y


def _fused(x: Tensor, s: Tensor, b: Sequence[Tensor], bias: Sequence[Tensor | None], call: _Call) -> Tensor:
    """The Triton GEMM with the update inside, for every projection."""
    y = x.new_empty(x.shape[0], call.columns[-1].stop)
    for j, part in enumerate(call.projections):
        weight, ranks = dense_weight(part, x.dtype), [call.ranks[j]]
        weight = weight if weight.stride(-1) == 1 else weight.contiguous()
        lora_gemm.gemm(x, weight, s, [b[j]], out=y[:, call.columns[j]], ranks=ranks, turned=True, bias=bias[j])
    return y


FORWARD = {"separate": _separate, "augmented": _augmented, "fused": _fused}


def _fused_backward(dy: Tensor, ds: Tensor, a: Sequence[Tensor], call: _Call) -> Tensor:
    """dx by the Triton GEMM, the low-rank part inside."""
    (_, weight), *others = _weights(call.projections, dy.dtype)
    weight = torch.cat([weight, *(part for _, part in others)]) if others else weight
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    lora_gemm.gemm(dy, weight, ds, a, out=dx, ranks=call.ranks, turned=False, p=call.p, seed=call.seed)
    return dx


def _add_bias(y: Tensor, bias: Sequence[Tensor | None], call: _Call) -> None:
    for columns, part in zip(call.columns, bias, strict=True):
        if part is not None:
            y[:, columns] += part


def _base_backward(dy: Tensor, call: _Call) -> Tensor:
    """dx [M, K] = dy W."""
    dx: Tensor | None = None
    for columns, weight in _weights(call.projections, dy.dtype):
        if dx is None:
            dx = product(dy[:, columns], weight, out=dy.new_empty(dy.shape[0], weight.shape[1]))
        else:
            dx.addmm_(dy[:, columns], weight)
    assert dx is not None
    return dx


def _shrink(x: Tensor, a: Sequence[Tensor], call: _Call) -> Tensor:
    """S [M, R]."""
    s = x.new_empty(x.shape[0], call.ranks[-1].stop)
    for group, seed in call.groups():
        parts, scales, ranks = [_like(part, x) for part in a[group]], call.scales[group], call.ranks[group]
        if call.backend == "triton":
            lora_gemm.shrink(x, parts, scales, out=s, ranks=ranks, p=call.p, seed=seed)
        else:
            lora_cpu.shrink(x, parts, scales, out=s, ranks=ranks, p=call.p, seed=seed, backend=call.backend)
    return s


def _grads_a(
    ds: Tensor, x: Tensor, a: Sequence[Tensor], dx: Tensor | None, call: _Call, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """dA of every projection; adds their part to dx."""
    grads: list[Tensor | None] = []
    for group, seed in call.groups():
        grads += lora_grads.grads_a(
            ds, x, [_like(part, x) for part in a[group]],
            dx=dx, ranks=call.ranks[group], p=call.p, seed=seed, backend=call.backend,
            dtypes=[_grad_dtype(part) if want else None for part, want in zip(a[group], wanted[group], strict=True)],
        )  # fmt: skip
    return grads


def _check(x: Tensor, projections: Sequence[Projection], s: Tensor | None) -> None:
    """Raises ValueError for shapes that do not fit and for weights that want a gradient."""
    K = x.shape[-1]
    for j, part in enumerate(projections):
        if part.quant is None and part.weight.requires_grad:
            raise ValueError(f"the weight of projection {j} requires a gradient: lora_linear takes frozen weights")
        if part.a.shape[1] != K or part.a.shape[0] != part.b.shape[1]:
            raise ValueError(f"projection {j}: a {tuple(part.a.shape)}, b {tuple(part.b.shape)}, input {K} features")
        if part.quant is None and tuple(part.weight.shape) != (part.num_outputs, K):
            raise ValueError(f"projection {j}: weight {tuple(part.weight.shape)}, not {(part.num_outputs, K)}")
    if s is not None and s.shape[-1] != sum(part.a.shape[0] for part in projections):
        raise ValueError(f"s has {s.shape[-1]} columns, the ranks add up to another number")


@torch.compiler.disable
def lora_linear(
    x: Tensor, projections: Sequence[Projection], *, p: float = 0.0, seed: int | None = None, s: Tensor | None = None
) -> Tensor:
    """y [..., N] = [x W_jᵀ + bias_j + S_j B_jᵀ] side by side, for x [..., K].

    p: probability of dropout on the input of the low-rank path; projection j draws lane j of `seed` (drawn from
    torch's generator if None). s [M, R]: S as the producer of x computed it; then dropout and A are the producer's, and
    backward returns dS to it. Under autocast everything runs in the autocast dtype. Adapters may have another dtype
    than x (PEFT keeps them in fp32): they are rounded to that of x, and their gradients come in their own.
    Raises ValueError where shapes do not fit or a weight requires a gradient.
    """
    _check(x, projections, s)
    device = x.device.type
    dtype = compute_dtype(x)
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    shrunk = None if s is None else s.reshape(-1, s.shape[-1]).to(dtype)
    shrunk = shrunk if shrunk is None or shrunk.stride(-1) == 1 else shrunk.contiguous()
    columns, start = [], 0
    for part in projections:
        columns.append(slice(start, start + part.num_outputs))
        start += part.num_outputs
    call = _Call(
        projections=tuple(projections),
        p=p if s is None else 0.0,
        seed=(draw_seed(p) if seed is None else seed) if s is None else 0,
        ranks=tuple(rank_slices([part.a for part in projections])),
        columns=tuple(columns),
        backend=backend_of(flat),
    )
    parameters = [*(q.a for q in projections), *(q.b for q in projections), *(q.bias for q in projections)]
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        y = _LoraLinear.apply(flat, shrunk, call, *parameters)
    return y.view(*x.shape[:-1], start)


def _make_inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
    def normal(*shape: int, scale: float) -> Tensor:
        return random_normal(*shape, dtype=dtype, device=device, generator=generator, scale=scale)

    K, r = case["K"], case["r"]
    x = normal(case["M"], K, scale=1.0).requires_grad_()
    projections = tuple(
        Projection(
            weight=normal(N, K, scale=K**-0.5),
            bias=normal(N, scale=0.5).requires_grad_() if case.get("bias") else None,
            a=normal(r, K, scale=K**-0.5).requires_grad_(),
            b=normal(N, r, scale=r**-0.5).requires_grad_(),
            scale=1.0 + 0.5 * j,
        )
        for j, N in enumerate(case["N"])
    )
    inputs: dict[str, Any] = {"x": x, "projections": projections, "p": case["p"], "seed": 2**40 + 12345}
    if case.get("s"):
        inputs["s"] = normal(case["M"], r * len(projections), scale=1.0).requires_grad_()
    return inputs


def _flops(case: Case) -> float:
    """Two base products and six skinny ones."""
    M, K, N, r = case["M"], case["K"], sum(case["N"]), case["r"]
    return 4.0 * M * K * N + 6.0 * M * r * (N + K * len(case["N"]))


OP = Op(
    name="lora_linear",
    summary="frozen linears of one input with low-rank updates and dropout",
    reference=lora_linear_reference,
    function=lora_linear,
    make_inputs=_make_inputs,
    cases=(
        {"M": 1, "K": 16, "N": (16,), "r": 1, "p": 0.0},
        {"M": 7, "K": 40, "N": (24, 8), "r": 4, "p": 0.1, "bias": True},
        {"M": 33, "K": 64, "N": (48,), "r": 256, "p": 0.5},
        {"M": 129, "K": 96, "N": (64, 32, 32), "r": 16, "p": 0.05},
        {"M": 65, "K": 96, "N": (64, 32), "r": 24, "p": 0.0, "s": True},
    ),
    kernels=lora_gemm.KERNELS,
    bench_cases=(
        {"M": 8192, "K": 4096, "N": (4096, 1024, 1024), "r": 16, "p": 0.1},
        {"M": 8192, "K": 4096, "N": (14336, 14336), "r": 16, "p": 0.1},
    ),
    num_flops=_flops,
    num_bytes=lambda case: 4.0 * (case["M"] * (case["K"] + sum(case["N"])) + case["K"] * sum(case["N"])),
)
