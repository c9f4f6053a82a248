"""Exact softmax attention in which every query sees one range of keys: causal, packed, windowed, padded or all of them.

    s[t, j] = scale * q[t] · k[j]      (softcap: s = softcap * tanh(s / softcap))
    o[t]    = sum over lo[t] <= j < hi[t] of softmax(s[t])[j] v[j];  0 where the range is empty

`ranges` [B, T, 2] holds (lo, hi) of every query. Saved: q, k, v, o and the log of the softmax sums; the backward is
that of FlashAttention (Dao et al. 2022, algorithm 4). Keys outside the ranges cost nothing, no T x S array exists, and
dq, dk, dv are slices of one buffer where q, k, v were. In C++ on the CPU, else F.scaled_dot_product_attention: on GPUs
flash attention is a library's business. Shape letters: B batch, T queries, S keys, H heads, Hk key heads, D head dim.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import native
from .columns import are_adjacent
from .op import Case, Op, backend_of, random_normal


@dataclass(frozen=True)
class _Mask:
    """What torch needs to know of a `ranges` tensor; `allowed` [B, 1, T, S], all True for queries that see nothing."""

    is_causal: bool
    allowed: Tensor
    empty: Tensor | None
    """Queries that see no key: [B, T, 1, 1], None where there are none."""


_masks: Any = WeakTensorKeyDictionary()
"""ranges -> {S: _Mask}: the layers of a model share one `ranges`, and so its mask."""


def allowed_keys(ranges: Tensor, num_keys: int) -> Tensor:
    """The boolean mask [B, T, S] that `ranges` stand for."""
    keys = torch.arange(num_keys, device=ranges.device, dtype=ranges.dtype)
    return (keys >= ranges[..., :1]) & (keys < ranges[..., 1:])


def causal_ranges(batch: int, num_queries: int, num_keys: int, device: torch.device | str = "cpu") -> Tensor:
    """Query t sees the keys up to its own, counted from the last: int32 [B, T, 2]."""
    last = torch.arange(num_keys - num_queries + 1, num_keys + 1, device=device, dtype=torch.int32)
    return torch.stack([torch.zeros_like(last), last], dim=-1).expand(batch, -1, -1)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = allowed_keys(ranges, k.shape[1])[:, None]
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(dim=-1).masked_fill(~allowed, 0)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def _mask_of(ranges: Tensor, num_keys: int) -> _Mask:
    known = _masks.setdefault(ranges, {})
    if num_keys not in known:
        batch, num_queries = ranges.shape[:2]
        causal = causal_ranges(batch, num_queries, num_keys, ranges.device)
        empty = (ranges.clamp(0, num_keys).diff(dim=-1) <= 0)[..., None]
        known[num_keys] = _Mask(
            is_causal=num_queries == num_keys and torch.equal(ranges, causal),
            allowed=(allowed_keys(ranges, num_keys) | empty[..., 0])[:, None],
            empty=empty if bool(empty.any()) else None,
        )
    return known[num_keys]


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, *, scale: float, softcap: float | None) -> Tensor:
    """The same with PyTorch's own attention and gradients, which knows no softcap: then as the reference."""
    if softcap is not None:
        return attention_reference(q, k, v, ranges, scale=scale, softcap=softcap)
    mask = _mask_of(ranges, k.shape[1])
    if q.is_cuda and not mask.is_causal:  # with a mask, CUDA's fast kernels want as many key heads as query heads
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if mask.is_causal else mask.allowed,
        is_causal=mask.is_causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)
    return o if mask.empty is None else o.masked_fill(mask.empty, 0)


def _strides(*tensors: Tensor) -> Tensor:
    return torch.tensor([stride for x in tensors for stride in x.stride()[:3]])


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for dq, dk, dv: slices of one packed buffer [B, T, (H + 2 Hk) * D] where q, k and v are such slices."""
    if k.shape == v.shape and q.stride(2) == q.shape[3] and are_adjacent((q, k, v), dim=2):
        sizes = [x.shape[2] for x in (q, k, v)]
        packed = q.new_empty(*q.shape[:2], sum(sizes), q.shape[3])
        dq, dk, dv = packed.split(sizes, dim=2)
        return dq, dk, dv
    return tuple(x.new_empty(x.shape) for x in (q, k, v))  # type: ignore[return-value]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, scale: float, softcap: float) -> Tensor:
        B, T, H, D = q.shape
        o = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(B, H, T)
        ctx.sizes = torch.tensor([B, T, k.shape[1], H, k.shape[2], D])
        native.call(
            "attention_forward", q.dtype, q, k, v, ranges, o, lse, ctx.sizes, _strides(q, k, v, o), scale, softcap
        )
        ctx.save_for_backward(q, k, v, ranges, o, lse)
        ctx.scale, ctx.softcap = scale, softcap
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, ranges, o, lse = ctx.saved_tensors
        g = g if g.stride(-1) == 1 else g.contiguous()
        grads = _empty_gradients(q, k, v)
        strides = _strides(q, k, v, o, g, *grads)
        native.call(
            *("attention_backward", q.dtype, q, k, v, o, g, ranges, lse, *grads, ctx.sizes, strides),
            *(ctx.scale, ctx.softcap),
        )
        needed = (grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False))
        return *needed, None, None, None


def _check(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, scale: float, softcap: float | None) -> None:
    B, T, H, D = q.shape
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != D or H % k.shape[2]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if ranges.shape != (B, T, 2) or ranges.dtype != torch.int32:
        raise ValueError(f"ranges must be int32 {(B, T, 2)}, not {ranges.dtype} {tuple(ranges.shape)}")
    if scale <= 0 or (softcap is not None and softcap <= 0):
        raise ValueError(f"scale {scale} and softcap {softcap} must be positive")


@torch.compiler.disable
def attention(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, *, scale: float, softcap: float | None = None) -> Tensor:
    """o [B, T, H, D] of q [B, T, H, D], k and v [B, S, Hk, D], where H is a multiple of Hk (query head h reads key head
    h // (H / Hk)); query t of row b sees the keys ranges[b, t, 0] <= s < ranges[b, t, 1]. Raises ValueError where the
    shapes do not fit, `ranges` is not int32 [B, T, 2], or `scale` or `softcap` is not positive.
    """
    _check(q, k, v, ranges, scale, softcap)
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if backend_of(q) != "native" or not q.numel() or not k.numel():
        return _torch_attention(q, k, v, ranges, scale=scale, softcap=softcap)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _Attention.apply(q, k, v, ranges.contiguous(), float(scale), float(softcap or 0.0))


def _lengths(num_tokens: int, num_documents: int) -> list[int]:
    """Lengths of documents, all different, that add up to num_tokens."""
    weights = [3 + i for i in range(num_documents)]
    bounds = [round(num_tokens * sum(weights[:i]) / sum(weights)) for i in range(num_documents + 1)]
    return [b - a for a, b in pairwise(bounds)]


def _make_ranges(case: Case) -> Tensor:
    B, T, S, kind = case["B"], case["T"], case.get("S", case["T"]), case["mask"]
    ranges = causal_ranges(B, T, S).clone()
    if kind == "packed":
        starts, start = [], 0
        for length in _lengths(T, case["documents"]):
            starts += [start] * length
            start += length
        ranges[..., 0] = torch.tensor(starts)
    elif kind == "window":
        ranges[..., 0] = (ranges[..., 1] - case["window"]).clamp_min(0)
    elif kind == "left_padded":
        ranges[..., 0] = torch.arange(B)[:, None] * 7
    elif kind == "right_padded":
        ranges[..., 1] = torch.minimum(ranges[..., 1], S - torch.arange(B)[:, None] * 9)
    elif kind == "full":
        ranges[..., 0], ranges[..., 1] = 0, S - torch.arange(B)[:, None] * 5
    return ranges.int()


def _make_inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
    B, T, S, D = case["B"], case["T"], case.get("S", case["T"]), case["D"]
    q, k, v = (
        random_normal(B, length, heads, D, dtype=dtype, device=device, generator=generator)
        for length, heads in ((T, case["H"]), (S, case["Hk"]), (S, case["Hk"]))
    )
    softcap = {"softcap": case["softcap"]} if "softcap" in case else {}
    ranges = _make_ranges(case).to(device)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    return {"q": q, "k": k, "v": v, "ranges": ranges, "scale": D**-0.5, **softcap}


def _num_pairs(case: Case) -> int:
    """How many (query, key) pairs of one head the ranges allow, over the batch."""
    return int(_make_ranges(case).diff(dim=-1).clamp_min(0).sum())


OP = Op(
    name="attention",
    summary="softmax attention over one range of keys for each query: causal, packed, windowed, padded or full",
    reference=attention_reference,
    function=attention,
    make_inputs=_make_inputs,
    cases=(
        {"B": 2, "T": 70, "H": 6, "Hk": 2, "D": 64, "mask": "causal"},
        {"B": 1, "T": 300, "H": 2, "Hk": 2, "D": 16, "mask": "causal"},
        {"B": 2, "T": 129, "H": 2, "Hk": 2, "D": 80, "mask": "packed", "documents": 4},
        {"B": 1, "T": 200, "H": 8, "Hk": 1, "D": 32, "mask": "packed", "documents": 7},
        {"B": 2, "T": 190, "H": 4, "Hk": 2, "D": 96, "mask": "window", "window": 17},
        {"B": 3, "T": 50, "H": 3, "Hk": 1, "D": 8, "mask": "left_padded"},
        {"B": 3, "T": 64, "H": 4, "Hk": 4, "D": 64, "mask": "right_padded"},
        {"B": 2, "T": 33, "H": 2, "Hk": 2, "D": 256, "mask": "full"},
        {"B": 2, "T": 5, "S": 90, "H": 4, "Hk": 2, "D": 32, "mask": "causal"},
        {"B": 2, "T": 1, "S": 140, "H": 8, "Hk": 1, "D": 128, "mask": "left_padded"},
        {"B": 2, "T": 40, "S": 75, "H": 2, "Hk": 2, "D": 20, "mask": "full"},
        {"B": 2, "T": 65, "H": 4, "Hk": 2, "D": 64, "mask": "window", "window": 40, "softcap": 3.0},
        {"B": 1, "T": 150, "H": 3, "Hk": 1, "D": 64, "mask": "causal"},
    ),
    bench_cases=(
        {"B": 4, "T": 256, "H": 9, "Hk": 3, "D": 64, "mask": "causal"},
        {"B": 2, "T": 512, "H": 9, "Hk": 3, "D": 64, "mask": "causal"},
        {"B": 1, "T": 1024, "H": 9, "Hk": 3, "D": 64, "mask": "packed", "documents": 6},
        {"B": 1, "T": 2048, "H": 9, "Hk": 3, "D": 64, "mask": "causal"},
    ),
    num_flops=lambda case: 14.0 * _num_pairs(case) * case["H"] * case["D"],
    num_bytes=lambda case: (
        12.0 * case["B"] * case["D"] * (case["T"] * case["H"] + case.get("S", case["T"]) * case["Hk"])
    ),
)
