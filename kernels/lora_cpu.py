"""The skinny products of a group of low-rank updates on the CPU, beside the base product.

Three ways, chosen by `uses_tiles` and the backend: C++ with matrix tiles (AMX, bf16), where the masks are made while x
and dy are read; C++ masks around torch.mm; plain torch. Every function takes a group of projections that share a seed.
M rows, K inputs, N outputs and R ranks of the group together.
"""

import ctypes
import functools
import threading
from collections.abc import Sequence
from ctypes import addressof
from typing import Any

import torch
from torch import Tensor

from . import native
from .op import Backend
from .shrink import LEVELS, MAX_LANES, hash_bits, keep_scale, threshold

MAX_PROJECTIONS = 64
"""Of one call of the C++."""
_local = threading.local()


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Memory of this thread that the next call with the same name and dtype gets too; it grows, and stays."""
    buffers: dict[tuple[str, torch.dtype, str], Tensor] = _local.__dict__.setdefault("buffers", {})
    count = 1
    for size in shape:
        count *= size
    key = (name, dtype, str(device))
    if key not in buffers or buffers[key].numel() < count:
        buffers[key] = torch.empty(count, dtype=dtype, device=device)
    return buffers[key][:count].view(*shape)


@functools.cache
def _has_tiles() -> bool:
    """Whether the library was built with AMX and the kernel of the system lets this process use it."""
    if native.library() is None:
        return False
    ready = torch.zeros(1, dtype=torch.int64)
    native.call("lora_tiles", torch.bfloat16, ready)
    return bool(ready.item())


def uses_tiles(dtype: torch.dtype, backend: Backend) -> bool:
    return backend == "native" and dtype == torch.bfloat16 and _has_tiles()


def _table(
    ranks: Sequence[slice],
    columns: Sequence[slice],
    *,
    a: Sequence[Tensor] = (),
    b: Sequence[Tensor] = (),
    da: Sequence[Tensor | None] = (),
    db: Sequence[Tensor | None] = (),
) -> Any:
    """The rows of `struct Row` in lora.cpp, as an array whose address is passed."""
    assert len(ranks) <= (MAX_LANES if a else MAX_PROJECTIONS), len(ranks)
    values: list[int] = []
    for j, (own, where) in enumerate(zip(ranks, columns, strict=True)):
        for tensors in (a, b, da, db):
            tensor = tensors[j] if tensors else None
            values.append(0 if tensor is None else tensor.data_ptr())
        is_fp32 = any(grads and grads[j] is not None and grads[j].dtype == torch.float32 for grads in (da, db))  # type: ignore[union-attr]
        values += (own.stop - own.start, where.start, where.stop, own.start, is_fp32)
    return (ctypes.c_int64 * len(values))(*values)


def _floats(values: Sequence[float]) -> Any:
    return (ctypes.c_float * len(values))(*values)


def _dropped(x: Tensor, count: int, *, p: float, seed: int, backend: Backend) -> Sequence[Tensor]:
    """drop_j(x) [M, K] for lanes 0..count-1, in memory of the next call too."""
    M, K = x.shape
    if p == 0:
        return [x] * count
    copies = scratch("dropped", (count, M, K), x.dtype, x.device)
    if backend == "native":
        native.call("lora_drop", x.dtype, x, x.stride(0), copies, count, M, K, seed, threshold(p), keep_scale(p))
        return copies.unbind()
    bits = hash_bits(M, K, seed, x.device)
    for lane, copy in enumerate(copies.unbind()):
        torch.mul(x, keep_scale(p), out=copy).masked_fill_(_is_dropped(bits, lane, p), 0)
    return copies.unbind()


def _is_dropped(bits: Tensor, lane: int, p: float) -> Tensor:
    return (bits >> (10 * lane)).bitwise_and_(LEVELS - 1) < threshold(p)


def shrink(
    x: Tensor,
    a: Sequence[Tensor],
    scales: Sequence[float],
    *,
    out: Tensor,
    ranks: Sequence[slice],
    p: float,
    seed: int,
    backend: Backend,
) -> None:
    """out[:, ranks[j]] = scales[j] * drop_j(x) a_jᵀ for up to three projections; a in the dtype of x."""
    if uses_tiles(x.dtype, backend):
        table = _table(ranks, ranks, a=a)
        factors = _floats([scale * keep_scale(p) for scale in scales])
        M, K = x.shape
        native.call(
            "lora_shrink",
            x.dtype,
            addressof(table),
            addressof(factors),
            len(a),
            x,
            x.stride(0),
            out,
            out.stride(0),
            M,
            K,
            seed,
            threshold(p),
        )
        return
    for part, own, scale, dropped in zip(
        a, ranks, scales, _dropped(x, len(a), p=p, seed=seed, backend=backend), strict=True
    ):
        torch.mm(dropped, part.t(), out=out[:, own]).mul_(scale)


def expand(
    y: Tensor, s: Tensor, b: Sequence[Tensor], *, columns: Sequence[slice], ranks: Sequence[slice], backend: Backend
) -> None:
    """y[:, columns[j]] += S_j b_jᵀ."""
    if uses_tiles(y.dtype, backend):
        table = _table(ranks, columns, b=b)
        native.call("lora_expand", y.dtype, addressof(table), len(b), s, s.stride(0), y, y.stride(0), y.shape[0])
        return
    for part, where, own in zip(b, columns, ranks, strict=True):
        y[:, where].addmm_(s[:, own], part.t())


def grads_b(
    dy: Tensor,
    s: Tensor,
    b: Sequence[Tensor],
    scales: Sequence[float],
    *,
    columns: Sequence[slice],
    ranks: Sequence[slice],
    ds: Tensor | None,
    dtypes: Sequence[torch.dtype | None],
    backend: Backend,
) -> list[Tensor | None]:
    """ds[:, ranks[j]] = scales[j] * dy_j b_j where ds is given; db_j = dy_jᵀ S_j in dtypes[j] (None: not wanted)."""
    if uses_tiles(dy.dtype, backend):
        grads = [_gradient(part.shape, dtype) for part, dtype in zip(b, dtypes, strict=True)]
        table = _table(ranks, columns, b=b, db=grads)
        factors = _floats(scales)
        stride = 0 if ds is None else ds.stride(0)
        native.call(
            "lora_ds_db",
            dy.dtype,
            addressof(table),
            addressof(factors),
            len(b),
            dy,
            dy.stride(0),
            s,
            s.stride(0),
            ds,
            stride,
            dy.shape[0],
        )
        return _cast(grads, dtypes)
    results: list[Tensor | None] = []
    for part, where, own, scale, dtype in zip(b, columns, ranks, scales, dtypes, strict=True):
        own_dy = dy[:, where]
        if ds is not None:
            torch.mm(own_dy, part, out=ds[:, own]).mul_(scale)
        results.append(None if dtype is None else torch.mm(s[:, own].t(), own_dy).t().contiguous().to(dtype))
    return results


def grads_a(
    ds: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    *,
    dx: Tensor | None,
    ranks: Sequence[slice],
    dtypes: Sequence[torch.dtype | None],
    p: float,
    seed: int,
    backend: Backend,
) -> list[Tensor | None]:
    """da_j = dS_jᵀ drop_j(x) in dtypes[j] (None: not wanted); dx += sum_j mask_j∘(dS_j a_j) * keep_scale where given.

    Up to three projections; ds holds the scales already.
    """
    M, K = x.shape
    if uses_tiles(x.dtype, backend):
        grads = [_gradient(part.shape, dtype) for part, dtype in zip(a, dtypes, strict=True)]
        table = _table(ranks, ranks, a=a, da=grads)
        stride = 0 if dx is None else dx.stride(0)
        native.call(
            "lora_dx_da", x.dtype, addressof(table), len(a), ds, ds.stride(0), x, x.stride(0), dx, stride, M, K, seed,
            threshold(p), keep_scale(p),
        )  # fmt: skip
        return _cast(grads, dtypes)
    results: list[Tensor | None] = [None] * len(a)
    if any(dtype is not None for dtype in dtypes):
        for j, dropped in enumerate(_dropped(x, len(a), p=p, seed=seed, backend=backend)):
            dtype = dtypes[j]
            if dtype is not None:
                results[j] = torch.mm(ds[:, ranks[j]].t(), dropped).to(dtype)
    if dx is not None:
        _add_expanded(dx, ds, a, ranks=ranks, p=p, seed=seed, backend=backend)
    return results


def _add_expanded(
    dx: Tensor, ds: Tensor, a: Sequence[Tensor], *, ranks: Sequence[slice], p: float, seed: int, backend: Backend
) -> None:
    M, K = dx.shape
    if p == 0:
        for part, own in zip(a, ranks, strict=True):
            dx.addmm_(ds[:, own], part)
        return
    terms = scratch("dropped", (len(a), M, K), dx.dtype, dx.device)
    for part, own, term in zip(a, ranks, terms.unbind(), strict=True):
        torch.mm(ds[:, own], part, out=term)
    if backend == "native":
        native.call(
            "lora_add_masked", dx.dtype, terms, dx, dx.stride(0), len(a), M, K, seed, threshold(p), keep_scale(p)
        )
        return
    bits = hash_bits(M, K, seed, dx.device)
    for lane, term in enumerate(terms.unbind()):
        dx += term.mul_(keep_scale(p)).masked_fill_(_is_dropped(bits, lane, p), 0)


def _gradient(shape: Sequence[int], dtype: torch.dtype | None) -> Tensor | None:
    """What the C++ writes: bf16, or fp32 for every other dtype."""
    if dtype is None:
        return None
    return torch.empty(shape, dtype=dtype if dtype == torch.bfloat16 else torch.float32)


def _cast(grads: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None]) -> list[Tensor | None]:
    return [
        grad if grad is None or dtype is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)
    ]
