"""The norm of the rows of a weight with a low-rank update, without making the sum: norm = ||W + s B A||.

    norm² = ||W||² + sum_j B∘(2 s P + s² B (A Aᵀ)),   P = W Aᵀ

All in fp32, clamped at 0 before the root. W is read once, an NF4 weight a panel of rows at a time; ||W||² may be kept.
Source: arXiv 2603.22276. Shape letters: N outputs, K inputs, R rank.
"""

import math
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lora_linear import Projection
from .nf4_dequant import Nf4Weight, nf4_dequant, nf4_dequant_reference
from .nf4_quantize import nf4_quantize
from .op import Case, Config, Kernel, Op, backend_of, random_normal

PANEL = 1 << 20
"""Elements of W that are dense, or in fp32, at a time."""


def dora_norm_reference(projection: Projection) -> Tensor:
    a, b, quant = projection.a, projection.b, projection.quant
    weight = (projection.weight if quant is None else nf4_dequant_reference(quant)).detach().to(b.dtype)
    return torch.linalg.vector_norm(weight + projection.scale * (b @ a), dim=1)


@triton.jit
def _rows_kernel(
    w_ptr, a_ptr, p_ptr, squares_ptr, N, K, R, stride_n, stride_k,
    SQUARES: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """P [N, R] = W Aᵀ in fp32 for BR ranks of BN rows, and squares [N] = ||W||² in the same pass where SQUARES.

    A (fp32) goes through the tensor cores as the sum of two numbers of W's dtype.
    """
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    products = tl.zeros((BN, BR), tl.float32)
    squares = tl.zeros((BN,), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        inside = (n < N)[:, None] & (k < K)[None, :]
        at = n[:, None] * stride_n + k.to(tl.int64)[None, :] * stride_k
        w = tl.load(w_ptr + at, mask=inside, other=0.0)
        at = r[None, :] * K + k[:, None]
        a = tl.load(a_ptr + at, mask=(k < K)[:, None] & (r < R)[None, :], other=0.0)
        high = a.to(w.dtype)
        products = tl.dot(w, high, products, input_precision="ieee")
        if w.dtype != tl.float32:
            low = (a - high.to(tl.float32)).to(w.dtype)
            products = tl.dot(w, low, products, input_precision="ieee")
        if SQUARES:
            exact = w.to(tl.float32)
            squares += tl.sum(exact * exact, axis=1)
    tl.store(p_ptr + n[:, None] * R + r[None, :], products, mask=(n < N)[:, None] & (r < R)[None, :])
    if SQUARES:
        tl.store(squares_ptr + n, squares, mask=n < tl.where(tl.program_id(1) == 0, N, 0))


ROWS_BLOCK = {"BN": 64, "BK": 64}
STAGES = 3


def _rank_block(rank: int, *, has_squares: bool) -> int:
    """Ranks that one program makes: few where the squares need registers too."""
    return 16 if rank <= 16 or has_squares else 64


def _row_products(weight: Tensor, a: Tensor, p: Tensor, squares: Tensor | None) -> None:
    """p [N, R] = W Aᵀ; squares [N] = ||W||² of every row if given. W in any strides and dtype, the rest fp32."""
    (N, K), R = weight.shape, a.shape[0]
    if backend_of(weight) == "triton":
        block = {**ROWS_BLOCK, "BR": _rank_block(R, has_squares=squares is not None)}
        grid = (triton.cdiv(N, block["BN"]), triton.cdiv(R, block["BR"]))
        _rows_kernel[grid](
            weight, a, p, p if squares is None else squares, N, K, R, *weight.stride(),
            SQUARES=squares is not None, **block, num_stages=STAGES,
        )  # fmt: skip
    else:
        step = max(1, PANEL // K)
        for start in range(0, N, step):
            panel = weight[start : start + step].to(a.dtype)
            torch.mm(panel, a.t(), out=p[start : start + step])
            if squares is not None:
                torch.linalg.vecdot(panel, panel, out=squares[start : start + step])


def _weight_rows(projection: Projection, a: Tensor, squares: Tensor | None) -> Tensor:
    """P [N, R] = W Aᵀ, filling `squares`; an NF4 weight is made dense panel by panel."""
    N = projection.num_outputs
    p = torch.empty((N, a.shape[0]), dtype=a.dtype, device=a.device)
    quant = projection.quant
    if quant is None:
        _row_products(projection.weight.detach(), a, p, squares)
        return p
    period = _panel_rows(quant)
    for start in range(0, N, period):
        rows = slice(start, min(start + period, N))
        _row_products(_panel(quant, rows), a, p[rows], None if squares is None else squares[rows])
    return p


def _panel_rows(quant: Nf4Weight) -> int:
    """Rows of a panel: a multiple of what holds whole blocks of statistics, or everything where nothing small does."""
    unit = quant.blocksize * (quant.blocksize2 if quant.nested else 1)
    K = quant.shape[1]
    period = unit // math.gcd(K, unit)
    return min(quant.shape[0], period * max(1, 4 * PANEL // (period * K)))


def _panel(quant: Nf4Weight, rows: slice) -> Tensor:
    """These rows, dense; they begin at whole blocks."""
    K = quant.shape[1]
    first, last = rows.start * K, rows.stop * K
    blocks = slice(first // quant.blocksize, -(-last // quant.blocksize))
    coarse = quant.absmax2
    if coarse is not None:
        coarse = coarse[blocks.start // quant.blocksize2 : -(-blocks.stop // quant.blocksize2)]
    part = replace(
        quant,
        packed=quant.bytes_()[first // 2 : (last + 1) // 2],
        absmax=quant.absmax[blocks],
        absmax2=coarse,
        shape=(rows.stop - rows.start, K),
    )
    return nf4_dequant(part)


@torch.no_grad()
def dora_norm(projection: Projection, *, squares: Tensor | None = None) -> Tensor:
    """||W + scale * B A|| of every row, fp32 [N]; the sum is never made, an NF4 W only panel by panel.

    squares: ||W||² of every row as `weight_squares` gives it, which spares half of the work.
    """
    dtype = torch.promote_types(projection.a.dtype, torch.float32)
    a, b = projection.a.detach().to(dtype).contiguous(), projection.b.detach().to(dtype)
    found = torch.empty(b.shape[0], dtype=dtype, device=b.device) if squares is None else None
    with torch.autocast(a.device.type, enabled=False):
        p = _weight_rows(projection, a, found)
        cross = p.mul_(2).addmm_(b, a @ a.t(), alpha=projection.scale).mul_(projection.scale)
        total = torch.linalg.vecdot(b, cross).add_(found if squares is None else squares)
    return total.clamp_(min=0).sqrt_()


@torch.no_grad()
def weight_squares(projection: Projection) -> Tensor:
    """||W||² of every row, fp32 [N]."""
    squares = torch.empty(projection.num_outputs, device=projection.a.device)
    nothing = torch.zeros((1, projection.a.shape[1]), device=projection.a.device)
    _weight_rows(projection, nothing, squares)
    return squares


class DoraNorm:
    """The norm of one projection, made again only where A or B changed; ||W||² only where the weight did.

    A change is seen by the address and the version counter of a tensor. Who writes to A or B behind autograd's back
    (through a pointer, or through `.data`) calls `clear` afterwards, or torch.autograd.graph.increment_version.
    """

    def __init__(self) -> None:
        self.clear()
        self._weight_key: tuple[int, ...] | None = None
        self._squares: Tensor | None = None

    def clear(self) -> None:
        """Forgets the norm, not ||W||²."""
        self._key: tuple[Any, ...] | None = None
        self._norm: Tensor | None = None

    @torch.inference_mode(False)
    def __call__(self, projection: Projection) -> Tensor:
        """fp32 [N]: an ordinary tensor even in inference mode, since training may use it next."""
        source = projection.weight if projection.quant is None else projection.quant.packed
        weight_key = _version(source)
        if self._squares is None or self._weight_key != weight_key:
            self._squares, self._weight_key = weight_squares(projection), weight_key
            self.clear()
        key = (*_version(projection.a), *_version(projection.b), projection.scale)
        if self._norm is None or self._key != key:
            self._norm, self._key = dora_norm(projection, squares=self._squares), key
        return self._norm


def _version(x: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), 0 if x.is_inference() else x._version)


def _make_inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
    def normal(*shape: int, scale: float) -> Tensor:
        return random_normal(*shape, dtype=dtype, device=device, generator=generator, scale=scale)

    N, K, r = case["N"], case["K"], case["r"]
    weight = normal(K, N, scale=K**-0.5).t() if case.get("transposed") else normal(N, K, scale=K**-0.5)
    quant = nf4_quantize(weight, double_quant=case["nf4"] == "nested") if case.get("nf4") else None
    a, b = normal(r, K, scale=K**-0.5), normal(N, r, scale=r**-0.5)
    return {"projection": Projection(weight=weight, bias=None, a=a, b=b, scale=0.75, quant=quant)}


OP = Op(
    name="dora_norm",
    summary="norm of the rows of W + s B A, never materialised",
    reference=dora_norm_reference,
    function=dora_norm,
    make_inputs=_make_inputs,
    cases=(
        {"N": 1, "K": 16, "r": 1},
        {"N": 37, "K": 700, "r": 4},
        {"N": 70, "K": 100, "r": 24, "transposed": True},
        {"N": 130, "K": 96, "r": 256},
        {"N": 21, "K": 75, "r": 8, "nf4": "plain"},
        {"N": 300, "K": 96, "r": 16, "nf4": "nested"},
        {"N": 129, "K": 576, "r": 16},
    ),
    kernels=(
        Kernel(
            fn=_rows_kernel,
            signature={
                "w_ptr": "*bf16", "a_ptr": "*fp32", "p_ptr": "*fp32", "squares_ptr": "*fp32",
                "N": "i32", "K": "i32", "R": "i32", "stride_n": "i32", "stride_k": "i32",
            },
            configs=tuple(
                Config({"SQUARES": squares, **ROWS_BLOCK, "BR": block}, num_stages=STAGES)
                for squares, block in ((False, 16), (False, 64), (True, 16))
            ),
            uses_mma=True,
            divisible=("N", "K", "R", "stride_n"),
        ),
    ),
    bench_cases=({"N": 4096, "K": 4096, "r": 16}, {"N": 14336, "K": 4096, "r": 16, "nf4": "nested"}),
    num_bytes=lambda case: 2.0 * case["N"] * case["K"],
)  # fmt: skip
