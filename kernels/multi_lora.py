"""Many adapters trained in one batch over one frozen linear: different jobs, ranks, scales, dropouts and seeds.

    y = x Wᵀ + bias,   y[rows of k] += S_k B_kᵀ,   S_k = scale_k * drop_k(x[rows of k]) A_kᵀ

Adapter k owns a range of rows, and the rows of its mask are counted from the start of that range: it learns exactly
what it would learn alone. On a GPU, neighbours with at most MAX_RANKS ranks together go through one product: their S
side by side with zeros outside a row's own adapter. M rows, K inputs, N outputs, r_k ranks, R of a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import lora_cpu, multi_lora_triton
from .multi_lora_triton import Group, Member
from .nf4_dequant import Nf4Weight, nf4_dequant
from .op import Backend, Case, Op, backend_of, compute_dtype, random_normal
from .shrink import drop, rank_slices

MAX_RANKS = 128


@dataclass(frozen=True)
class Adapter:
    """One low-rank update: a [r, K], b [N, r]; dropout of its input with probability p and the mask of `seed`."""

    a: Tensor
    b: Tensor
    scale: float
    p: float = 0.0
    seed: int = 0


def multi_lora_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    offsets: Sequence[int],
    *,
    quant: Nf4Weight | None = None,
) -> Tensor:
    """The specification, in plain torch."""
    flat = x.reshape(-1, x.shape[-1])
    dense = weight.to(x.dtype) if quant is None else nf4_dequant(quant, dtype=x.dtype)
    y = torch.nn.functional.linear(flat, dense, bias)
    parts = [y[: offsets[0]]]
    for adapter, start, stop in zip(adapters, offsets[:-1], offsets[1:], strict=True):
        dropped = drop(flat[start:stop], p=adapter.p, seed=adapter.seed)
        low = adapter.scale * (dropped @ adapter.a.to(x.dtype).t())
        parts.append(y[start:stop] + low @ adapter.b.to(x.dtype).t())
    return torch.cat([*parts, y[offsets[-1] :]]).view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class _Call:
    """What forward hands to backward besides tensors."""

    weight: Tensor
    quant: Nf4Weight | None
    groups: tuple[Group, ...]
    backend: Backend

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W [N, K]."""
        return self.weight.detach().to(dtype) if self.quant is None else nf4_dequant(self.quant, dtype=dtype)


def _groups(adapters: Sequence[Adapter], offsets: Sequence[int], max_ranks: int) -> tuple[Group, ...]:
    """Neighbours with at most max_ranks ranks together, at least one each."""
    groups: list[list[Member]] = []
    total = 0
    for k, adapter in enumerate(adapters):
        rank = adapter.a.shape[0]
        member = Member(k, offsets[k], offsets[k + 1], rank, adapter.scale, adapter.p, adapter.seed)
        if groups and total + rank <= max_ranks:
            groups[-1].append(member)
            total += rank
        else:
            groups.append([member])
            total = rank
    return tuple(Group(tuple(members)) for members in groups)


def _forward_group(
    x: Tensor, y: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], group: Group, backend: Backend
) -> Tensor:
    """S [rows, R] of a group, from its rows of x; y += S Bᵀ."""
    if backend == "triton":
        s = multi_lora_triton.shrink(x, torch.cat(list(a)), group)
        y.addmm_(s, torch.cat(list(b), dim=1).t())
        return s
    (member,) = group.members
    ranks, columns = [slice(0, member.rank)], [slice(0, y.shape[1])]
    s = x.new_empty(x.shape[0], member.rank)
    lora_cpu.shrink(x, a, [member.scale], out=s, ranks=ranks, p=member.p, seed=member.seed, backend=backend)
    lora_cpu.expand(y, s, b, columns=columns, ranks=ranks, backend=backend)
    return s


@dataclass(frozen=True)
class _Wanted:
    """dtypes of the gradients of a group's A and B; None where none is wanted."""

    a: Sequence[torch.dtype | None]
    b: Sequence[torch.dtype | None]


def _backward_group(
    dy: Tensor, x: Tensor, s: Tensor, dx: Tensor | None, a: Sequence[Tensor], b: Sequence[Tensor], group: Group,
    wanted: _Wanted, backend: Backend,
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:  # fmt: skip
    """(dA, dB) of a group's members from its rows of dy, x and s; adds their part to its rows of dx."""
    if backend == "triton":
        ds = dy @ torch.cat(list(b), dim=1)
        da = multi_lora_triton.expand(ds, x, torch.cat(list(a)), dx, group)
        db = dy.t() @ s
        ranks = rank_slices(a)
        return (
            [None if dtype is None else da[own].to(dtype) for own, dtype in zip(ranks, wanted.a, strict=True)],
            [None if t is None else db[:, own].to(t).contiguous() for own, t in zip(ranks, wanted.b, strict=True)],
        )
    (member,) = group.members
    ranks, columns = [slice(0, member.rank)], [slice(0, dy.shape[1])]
    low = torch.empty_like(s) if dx is not None or wanted.a[0] is not None else None
    grads_b = lora_cpu.grads_b(
        dy, s, b, [member.scale], columns=columns, ranks=ranks, ds=low, dtypes=wanted.b, backend=backend
    )
    if low is None:
        return [None], grads_b
    grads_a = lora_cpu.grads_a(
        low, x, a, dx=dx, ranks=ranks, dtypes=wanted.a, p=member.p, seed=member.seed, backend=backend
    )
    return grads_a, grads_b


class _MultiLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, call: _Call, *parameters: Tensor) -> Tensor:
        count = len(parameters) // 2
        a, b = (_like(part, x) for part in (parameters[:count], parameters[count:]))
        y = torch.mm(x, call.dense(x.dtype).t())
        if bias is not None:
            y += bias
        kept = []
        for group in call.groups:
            rows, own = group.rows, group.indices
            kept.append(_forward_group(x[rows], y[rows], a[own], b[own], group, call.backend))
        ctx.call = call
        ctx.save_for_backward(x, bias, *parameters, *kept)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        call: _Call = ctx.call
        x, bias, *others = ctx.saved_tensors
        count = (len(ctx.needs_input_grad) - 3) // 2
        parameters, kept = others[: 2 * count], others[2 * count :]
        a, b = (_like(part, x) for part in (parameters[:count], parameters[count:]))
        wanted = [
            _grad_dtype(part) if needed else None
            for part, needed in zip(parameters, ctx.needs_input_grad[3:], strict=True)
        ]
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        dx = torch.mm(dy, call.dense(dy.dtype)) if ctx.needs_input_grad[0] else None
        grads_a: list[Tensor | None] = []
        grads_b: list[Tensor | None] = []
        for group, s in zip(call.groups, kept, strict=True):
            rows, own = group.rows, group.indices
            own_wanted = _Wanted(wanted[:count][own], wanted[count:][own])
            found: tuple[Sequence[Tensor | None], Sequence[Tensor | None]]
            if rows.start == rows.stop:
                found = _zeros(own_wanted.a, a[own]), _zeros(own_wanted.b, b[own])
            else:
                own_dx = None if dx is None else dx[rows]
                found = _backward_group(dy[rows], x[rows], s, own_dx, a[own], b[own], group, own_wanted, call.backend)
            grads_a += found[0]
            grads_b += found[1]
        needs_bias = bias is not None and ctx.needs_input_grad[1]
        return dx, dy.sum(0).to(_grad_dtype(bias)) if needs_bias else None, None, *grads_a, *grads_b


def _zeros(dtypes: Sequence[torch.dtype | None], like: Sequence[Tensor]) -> list[Tensor | None]:
    return [
        None if dtype is None else torch.zeros_like(part, dtype=dtype) for dtype, part in zip(dtypes, like, strict=True)
    ]


def _like(parameters: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """As the products take them: in the dtype of x, contiguous."""
    return [part.detach().to(x.dtype).contiguous() for part in parameters]


def _grad_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype in which autograd takes the gradient of a parameter: `grad_dtype` (torch 2.10), else its own."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


def _check(x: Tensor, weight: Tensor, adapters: Sequence[Adapter], offsets: Sequence[int], quant: Any) -> int:
    """N. Raises ValueError for what does not fit and for a weight that wants a gradient."""
    M, K = x.numel() // max(1, x.shape[-1]), x.shape[-1]
    shape = tuple(weight.shape if quant is None else quant.shape)
    if quant is None and weight.requires_grad:
        raise ValueError("the weight requires a gradient: multi_lora takes a frozen weight")
    if len(offsets) != len(adapters) + 1:
        raise ValueError(f"{len(offsets)} offsets for {len(adapters)} adapters: expected one more than adapters")
    if list(offsets) != sorted(offsets) or offsets[0] < 0 or offsets[-1] > M:
        raise ValueError(f"offsets {tuple(offsets)} are not ascending row numbers of {M} rows")
    for k, adapter in enumerate(adapters):
        r = adapter.a.shape[0]
        if tuple(adapter.a.shape) != (r, shape[1]) or tuple(adapter.b.shape) != (shape[0], r) or shape[1] != K:
            found = f"a {tuple(adapter.a.shape)}, b {tuple(adapter.b.shape)}"
            raise ValueError(f"adapter {k}: {found}, weight {shape}, input {K} features")
    return int(shape[0])


@torch.compiler.disable
def multi_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    offsets: Sequence[int],
    *,
    quant: Nf4Weight | None = None,
) -> Tensor:
    """y [..., N] = x Wᵀ + bias for x [..., K], plus every adapter's update on its own rows.

    Adapter k owns rows offsets[k]:offsets[k + 1] of x flattened to [M, K]; rows before offsets[0] and from offsets[-1]
    on have none. An adapter without rows gets zero gradients, so that every rank of a data-parallel job has the same
    ones. weight [N, K] with any strides, or packed in `quant` (then `weight` is not read). Under autocast everything
    runs in the autocast dtype; adapters of another dtype are rounded to it, and their gradients come in their own.
    Raises ValueError where shapes or offsets do not fit or the weight requires a gradient.
    """
    num_outputs = _check(x, weight, adapters, offsets, quant)
    device = x.device.type
    dtype = compute_dtype(x)
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    backend = backend_of(flat)
    call = _Call(weight, quant, _groups(adapters, offsets, MAX_RANKS if backend == "triton" else 0), backend)
    parameters = [*(adapter.a for adapter in adapters), *(adapter.b for adapter in adapters)]
    with torch.autocast(device, enabled=False):
        y = _MultiLora.apply(flat, bias, call, *parameters)
    return y.view(*x.shape[:-1], num_outputs)


def _make_inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
    def normal(*shape: int, scale: float) -> Tensor:
        return random_normal(*shape, dtype=dtype, device=device, generator=generator, scale=scale)

    K, N, dropouts = case["K"], case["N"], case.get("p", (0.0,))
    adapters = tuple(
        Adapter(
            a=normal(r, K, scale=K**-0.5).requires_grad_(),
            b=normal(N, r, scale=r**-0.5).requires_grad_(),
            scale=2.0 - 0.5 * k,
            p=dropouts[k % len(dropouts)],
            seed=2**40 + 999 * k,
        )
        for k, r in enumerate(case["ranks"])
    )
    return {
        "x": normal(case["M"], K, scale=1.0).requires_grad_(case.get("needs_x", True)),
        "weight": normal(K, N, scale=K**-0.5).t(),
        "bias": normal(N, scale=0.5).requires_grad_() if case.get("bias") else None,
        "adapters": adapters,
        "offsets": case["offsets"],
    }


def _flops(case: Case) -> float:
    """Two base products and six skinny ones."""
    K, N = case["K"], case["N"]
    rows = [stop - start for start, stop in zip(case["offsets"][:-1], case["offsets"][1:], strict=True)]
    skinny = sum(count * r for count, r in zip(rows, case["ranks"], strict=True))
    return 4.0 * case["M"] * K * N + 6.0 * skinny * (N + K)


OP = Op(
    name="multi_lora",
    summary="many adapters, each on its own rows, over one frozen linear",
    reference=multi_lora_reference,
    function=multi_lora,
    make_inputs=_make_inputs,
    cases=(
        {"M": 1, "K": 16, "N": 16, "ranks": (4,), "offsets": (0, 1)},
        {"M": 7, "K": 40, "N": 24, "ranks": (4, 8), "offsets": (1, 3, 6), "p": (0.1, 0.5), "bias": True},
        {"M": 40, "K": 72, "N": 48, "ranks": (256, 9), "offsets": (0, 19, 40), "p": (0.05,), "needs_x": False},
        {"M": 1030, "K": 24, "N": 16, "ranks": (2, 3), "offsets": (0, 500, 1025), "p": (0.1,)},
        {"M": 129, "K": 100, "N": 64, "ranks": (16, 8, 24, 1), "offsets": (0, 50, 50, 97, 120), "p": (0.05, 0.0, 0.1)},
    ),
    kernels=multi_lora_triton.KERNELS,
    bench_cases=(
        {"M": 8192, "K": 4096, "N": 4096, "ranks": (16,) * 8, "offsets": tuple(range(0, 8193, 1024)), "p": (0.1,)},
    ),
    num_flops=_flops,
    num_bytes=lambda case: 4.0 * (case["M"] * (case["K"] + case["N"]) + case["K"] * case["N"]),
)
