"""What the passes of RMS and layer norm work on: the kind of norm, its low-rank products, what backward keeps.

Shape letters: M rows, K features, r_j ranks (R together), L masks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """RMS norm with gain weight + offset, or layer norm (`is_centered`)."""

    eps: float
    offset: float = 0.0
    is_centered: bool = False

    @property
    def rounds_xhat(self) -> bool:
        """Whether xhat is rounded before the product, as LlamaRMSNorm does; Gemma's and layer norm round once."""
        return not self.is_centered and self.offset == 0


@dataclass(frozen=True)
class Lanes:
    """The low-rank products of a call. Without dropout the projections' matrices are joined into one."""

    a: tuple[Tensor, ...]
    """One matrix [r, K] per mask, contiguous and in y's dtype."""
    masks: tuple[slice, ...]
    """The columns of S of each mask."""
    projections: tuple[slice, ...]
    """The columns of S of each projection."""
    factors: tuple[float, ...]
    """scale * keep_scale of each projection."""
    parts: tuple[Tensor, ...]
    """The matrix of each projection, in y's dtype."""
    scales: tuple[float, ...]
    p: float
    seed: int
    dropped: int

    @property
    def num_ranks(self) -> int:
        return self.masks[-1].stop

    def scaled(self, s: Tensor) -> Tensor:
        """s [M, R] times the factor of each projection, contiguous."""
        if len(set(self.factors)) == 1:
            return s * self.factors[0] if self.factors[0] != 1 else s.contiguous()
        scaled = torch.empty(s.shape, dtype=s.dtype, device=s.device)
        for columns, factor in zip(self.projections, self.factors, strict=True):
            torch.mul(s[:, columns], factor, out=scaled[:, columns])
        return scaled

    def shrink(self, copies: Tensor) -> Tensor:
        """S [M, R] from the masked copies [L, M, K]."""
        s = torch.empty(copies.shape[1], self.num_ranks, dtype=copies.dtype, device=copies.device)
        for copy, a, columns in zip(copies, self.a, self.masks, strict=True):
            torch.mm(copy, a.t(), out=s[:, columns])
        return self.scaled(s)

    def expand(self, ds: Tensor, t: Tensor) -> None:
        """T_j = dS_j A_j into t [L, M, K]; ds is already scaled."""
        for out, a, columns in zip(t, self.a, self.masks, strict=True):
            torch.mm(ds[:, columns], a, out=out)

    def grad_a(self, ds: Tensor, copies: Tensor) -> Tensor:
        """dA of all projections, one below the other [R, K]."""
        da = torch.empty(self.num_ranks, copies.shape[2], dtype=copies.dtype, device=copies.device)
        for copy, columns in zip(copies, self.masks, strict=True):
            torch.mm(ds[:, columns].t(), copy, out=da[columns])
        return da


@dataclass(frozen=True)
class Saved:
    """What backward reads of the forward pass: h [M, K] with last stride 1, fp32 statistics [M], weight, bias [K]."""

    norm: Norm
    h: Tensor
    rstd: Tensor
    mean: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    lanes: Lanes | None

    @property
    def masks(self) -> tuple[int, int, int]:
        """Number of masks, seed, threshold."""
        return (0, 0, 0) if self.lanes is None else (len(self.lanes.a), self.lanes.seed, self.lanes.dropped)


Sums = tuple[Tensor, Tensor]
"""Sums over rows for the gradients of gain and bias [K], fp32."""


def total(partial: Tensor) -> Sums:
    """The sums of partial sums [2, blocks, K]."""
    d_gain, d_bias = partial.sum(1)
    return d_gain, d_bias
