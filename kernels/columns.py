"""Tensors that lie side by side: several projections' outputs in one buffer, and their gradients in one buffer again.

`joined` sees that its parts are neighbours in one storage and gives the whole as a view, so a group of projections
passes through its consumers and back as one matrix, without a copy. M rows, N columns of all parts together.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def are_adjacent(parts: Sequence[Tensor], *, dim: int = -1) -> bool:
    """Whether the parts follow each other along `dim` in one storage, with the same strides."""
    first = parts[0]
    dim %= first.dim()
    strides, dtype, storage = first.stride(), first.dtype, first.untyped_storage().data_ptr()
    step = strides[dim] * first.element_size()
    if step == 0:
        return len(parts) == 1
    others = [size for i, size in enumerate(first.shape) if i != dim]
    expected = first.data_ptr()
    for part in parts:
        if part.data_ptr() != expected or part.stride() != strides or part.dtype != dtype:
            return False
        if [size for i, size in enumerate(part.shape) if i != dim] != others:
            return False
        if part.untyped_storage().data_ptr() != storage:
            return False
        expected += part.shape[dim] * step
    return True


def joined(parts: Sequence[Tensor], *, dim: int = -1) -> Tensor:
    """The parts as one tensor along `dim`: a view where they are adjacent (column slices of one buffer; with dim=0,
    rows of one), else a copy. Parts that autograd tracks are copied."""
    first = parts[0]
    if len(parts) == 1:
        return first
    tracked = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    if tracked or not are_adjacent(parts, dim=dim):
        return torch.cat(list(parts), dim=dim)
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return first.as_strided(shape, first.stride(), first.storage_offset())


class _SplitColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.sizes = sizes
        ctx.set_materialize_grads(False)
        return tuple(y.split(sizes, dim=-1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        given = next((grad for grad in grads if grad is not None), None)
        if given is None:
            return None, None
        parts = [
            given.new_zeros((*given.shape[:-1], size)) if grad is None else grad
            for grad, size in zip(grads, ctx.sizes, strict=True)
        ]
        return joined(parts), None


@torch.compiler.disable
def split_columns(y: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Views of y [..., sum(sizes)]; their gradients come back as one tensor, without a copy where they are adjacent.

    Raises ValueError where the sizes do not add up to the columns of y.
    """
    if sum(sizes) != y.shape[-1]:
        raise ValueError(f"sizes {tuple(sizes)} do not add up to {y.shape[-1]} columns")
    if len(sizes) == 1:
        return (y,)
    return _SplitColumns.apply(y, tuple(sizes))
