"""NF4 weights as bitsandbytes stores them, dequantised in one pass: W[n, k] = code[q[n, k]] * absmax[block].

A weight [N, K] is flattened row by row into blocks of `blocksize` elements (a block may span rows). A byte holds two
elements, the one with the lower index in the high nibble. `absmax` [blocks] is fp32, or itself quantised ("nested"):
absmax[b] = code2[absmax_u8[b]] * absmax2[b // blocksize2] + offset. Every product and the sum are rounded to fp32, the
value once more to the output's dtype: the same bits as bitsandbytes on every device.
Source of the format: T. Dettmers et al., "QLoRA", arXiv 2305.14314. Shape letters: N outputs, K inputs.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import native
from .op import Case, Config, Kernel, Op, backend_of, random_normal

CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of NF4: quantiles of the normal distribution, scaled to [-1, 1]; 0 is one of them."""
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
GRANULE = 32
"""Elements that surely share one block: the smallest block size."""
CHUNK = 1 << 18
"""Elements that plain torch decodes at a time: the fp32 buffer stays in a core's cache."""


@dataclass(frozen=True)
class Nf4Weight:
    """A packed weight of shape (N, K).

    packed: bytes in any shape and dtype, ceil(N * K / 2) or more of them. absmax: fp32 [blocks], or with nested
    statistics uint8 [blocks], code2 fp32 [256], absmax2 fp32 [ceil(blocks / blocksize2)] and offset fp32 [].
    dtype: what it dequantises to if nothing else is asked.
    Raises ValueError for a block size that is not one of BLOCKSIZES.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    blocksize: int = 64
    code2: Tensor | None = None
    absmax2: Tensor | None = None
    offset: Tensor | None = None
    blocksize2: int = 256

    def __post_init__(self) -> None:
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"NF4 block size {self.blocksize}: must be one of {BLOCKSIZES}")
        if self.nested and self.blocksize2 & (self.blocksize2 - 1):
            raise ValueError(f"block size {self.blocksize2} of the nested statistics: must be a power of two")

    @property
    def nested(self) -> bool:
        return self.code2 is not None

    @property
    def num_elements(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def num_blocks(self) -> int:
        return -(-self.num_elements // self.blocksize)

    def bytes_(self) -> Tensor:
        """The packed bytes, flat: a view."""
        return self.packed.detach().reshape(-1).view(torch.uint8)

    def scales(self) -> Tensor:
        """fp32 [blocks]: the absolute maxima, dequantised."""
        if self.code2 is None:
            return self.absmax.float()
        assert self.absmax2 is not None
        assert self.offset is not None
        coarse = self.absmax2.float().repeat_interleave(self.blocksize2)[: self.num_blocks]
        return (self.code2.float()[self.absmax.int()] * coarse).add_(self.offset.float())

    @classmethod
    def from_quant_state(cls, packed: Tensor, quant_state: Any) -> "Nf4Weight":
        """The weight behind a bitsandbytes Params4bit: its data and its QuantState; nothing is copied.

        A weight of more than two dimensions becomes (product of the leading ones, last). Raises ValueError for fp4.
        """
        if quant_state.quant_type != "nf4":
            raise ValueError(f"quant_type {quant_state.quant_type!r}: only nf4 is supported")
        *leading, columns = quant_state.shape
        inner = quant_state.state2
        return cls(
            packed=packed,
            absmax=quant_state.absmax,
            shape=(math.prod(leading), columns),
            dtype=quant_state.dtype,
            blocksize=quant_state.blocksize,
            code2=inner.code if inner is not None else None,
            absmax2=inner.absmax if inner is not None else None,
            offset=quant_state.offset if inner is not None else None,
            blocksize2=inner.blocksize if inner is not None else 256,
        )


@functools.cache
def code_on(device: torch.device) -> Tensor:
    """CODE as fp32 [16]."""
    return torch.tensor(CODE, device=device)


@functools.cache
def _pairs_on(device: torch.device) -> Tensor:
    """fp32 [256, 2]: the two values of every byte."""
    codes = code_on(device)
    return torch.cartesian_prod(codes, codes)


def nf4_dequant_reference(w: Nf4Weight, *, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    data = w.bytes_()
    nibbles = torch.stack((data >> 4, data & 15), dim=1).reshape(-1)[: w.num_elements]
    scales = w.scales().repeat_interleave(w.blocksize)[: w.num_elements]
    values = (code_on(data.device)[nibbles.int()] * scales).view(w.shape)
    return values.to(dtype or w.dtype) if out is None else out.copy_(values)


@triton.jit
def _nf4_dequant_kernel(
    packed_ptr, absmax_ptr, code_ptr, code2_ptr, absmax2_ptr, offset_ptr, out_ptr,
    C, chunks, stride, shift, shift2,
    NESTED: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Rows of C elements, each made by `chunks` programs of BG granules of 32; C % 32 is 0 or there is one row.

    packed: 32-bit words, whole granules. shift, shift2: log2 of the granules in a block and of blocksize2.
    One thread loads the 16 bytes of a granule; the 16 codes are looked up in shared memory, one word per bank.
    """
    row = tl.program_id(0) // chunks
    chunk = (tl.program_id(0) - row * chunks).to(tl.int64)
    first = row.to(tl.int64) * tl.cdiv(C, 32) + chunk * BG
    left = tl.minimum(C - chunk * (BG * 32), BG * 32).to(tl.int32)
    g = tl.arange(0, BG)
    there = g * 32 < left
    block = (first + g) >> shift
    if NESTED:
        fine = tl.load(code2_ptr + tl.load(absmax_ptr + block, mask=there, other=0).to(tl.int32))
        scale = fine * tl.load(absmax2_ptr + (block >> shift2), mask=there, other=0.0) + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=there, other=0.0)
    at = g[:, None] * 4 + tl.arange(0, 4)[None, :]
    word = tl.load(packed_ptr + first * 4 + at, mask=there[:, None], other=0)
    index = (word[:, :, None] >> (4 * (tl.arange(0, 8) ^ 1))[None, None, :]) & 15
    code = tl.load(code_ptr + tl.arange(0, 16))
    value = tl.gather(code, tl.reshape(index, (BG * 32,)), 0).reshape((BG, 4, 8))
    value = tl.reshape(value * scale[:, None, None], (BG, 32)).to(out_ptr.dtype.element_ty)
    to = g[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(out_ptr + row.to(tl.int64) * stride + chunk * (BG * 32) + to, value, mask=to < left)


BLOCK = {"BG": 128}


def _triton(w: Nf4Weight, out: Tensor) -> None:
    """out: whole rows of a multiple of GRANULE elements, or contiguous."""
    rows, columns = (1, w.num_elements) if out.is_contiguous() else w.shape
    chunks = triton.cdiv(columns, BLOCK["BG"] * GRANULE)
    statistics = (w.absmax, w.absmax, w.absmax) if not w.nested else (w.code2, w.absmax2, w.offset)
    _nf4_dequant_kernel[(rows * chunks,)](
        _words(w.bytes_()), w.absmax, code_on(out.device), *statistics, out, columns, chunks, out.stride(0),
        (w.blocksize // GRANULE).bit_length() - 1, w.blocksize2.bit_length() - 1,
        NESTED=w.nested, **BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _words(data: Tensor) -> Tensor:
    """Bytes as int32 words of whole granules; copied only where the size or the address is odd."""
    missing = -len(data) % (GRANULE // 2)
    if missing:
        data = torch.nn.functional.pad(data, (0, missing))
    elif data.data_ptr() % 4:
        data = data.clone()
    return data.view(torch.int32)


def _native(w: Nf4Weight, out: Tensor) -> None:
    """out: rows at any stride."""
    columns = max(w.blocksize, 4096) if out.is_contiguous() else w.shape[1]
    stride = columns if out.is_contiguous() else out.stride(0)
    native.call(
        "nf4_dequant", out.dtype, w.bytes_(), w.absmax, w.code2, w.absmax2, w.offset, out,
        w.num_elements, columns, stride, w.blocksize, w.blocksize2,
    )  # fmt: skip


def _torch(w: Nf4Weight, out: Tensor) -> None:
    """A few rows at a time, as many as start at a whole block; both values of a byte come from a table as one word."""
    n, k = w.shape
    data, scales, pairs = w.bytes_(), w.scales(), _pairs_on(out.device).view(torch.int64).view(-1)
    period = 2 * w.blocksize // math.gcd(k, 2 * w.blocksize)
    step = min(period * max(1, CHUNK // (period * k)), n)
    buffer = torch.zeros(-(-step * k // w.blocksize) * w.blocksize, device=out.device)
    for row in range(0, n, step):
        rows = min(step, n - row)
        first, count = row * k, rows * k
        half = data[first // 2 : (first + count + 1) // 2].int()
        torch.index_select(pairs, 0, half, out=buffer.view(torch.int64)[: len(half)])
        start, blocks = first // w.blocksize, -(-count // w.blocksize)
        buffer.view(-1, w.blocksize)[:blocks].mul_(scales[start : start + blocks, None])
        out[row : row + rows].copy_(buffer[:count].view(rows, k))


def _check(w: Nf4Weight, out: Tensor) -> None:
    """Raises ValueError where a tensor is too small for the shape: the kernels see nothing but addresses."""
    data, blocks = w.packed.numel() * w.packed.element_size(), w.num_blocks
    sizes = {"packed": (data, (w.num_elements + 1) // 2), "absmax": (w.absmax.numel(), blocks)}
    if w.nested:
        assert w.code2 is not None
        assert w.absmax2 is not None
        sizes["code2"] = (w.code2.numel(), 256)
        sizes["absmax2"] = (w.absmax2.numel(), -(-blocks // w.blocksize2))
    for name, (found, needed) in sizes.items():
        if found < needed:
            raise ValueError(
                f"NF4 weight {w.shape}, block size {w.blocksize}: {name} has {found} entries, not {needed}"
            )
    if out.shape != w.shape or (out.stride(-1) != 1 and out.shape[-1] > 1):
        raise ValueError(f"output {tuple(out.shape)} with strides {out.stride()}: need {w.shape} with last stride 1")


@torch.no_grad()
def nf4_dequant(w: Nf4Weight, *, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """The dense weight [N, K] in `dtype` (default: the weight's own), or written into `out`.

    out [N, K] may be a slice of the columns of a larger buffer: any row stride, last stride 1. Raises ValueError where
    a tensor of the weight is smaller than its shape says, or `out` does not fit.
    """
    if out is None:
        out = torch.empty(w.shape, dtype=dtype or w.dtype, device=w.packed.device)
    _check(w, out)
    if w.num_elements == 0:
        return out
    backend = backend_of(out)
    if backend == "torch":
        _torch(w, out)
    elif backend == "native":
        _native(_plain(w), out)
    elif out.is_contiguous() or w.shape[1] % GRANULE == 0:
        _triton(_plain(w), out)
    else:
        out.copy_(nf4_dequant(w, dtype=out.dtype))
    return out


def _plain(w: Nf4Weight) -> Nf4Weight:
    """The same weight with contiguous statistics, those that are not bytes in fp32."""
    if w.code2 is None:
        return w if _is_plain(w.absmax) else replace(w, absmax=w.absmax.float().contiguous())
    assert w.absmax2 is not None
    assert w.offset is not None
    if all(map(_is_plain, (w.code2, w.absmax2, w.offset))) and w.absmax.is_contiguous():
        return w
    return replace(
        w,
        absmax=w.absmax.contiguous(),
        code2=w.code2.float().contiguous(),
        absmax2=w.absmax2.float().contiguous(),
        offset=w.offset.float(),
    )


def _is_plain(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_contiguous()


def _make_inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
    shape, blocksize = (case["N"], case["K"]), case["blocksize"]
    count = shape[0] * shape[1]
    blocks = -(-count // blocksize)

    def random_bytes(size: int) -> Tensor:
        return torch.randint(256, (size,), generator=generator).to(torch.uint8).to(device)

    def positive(*size: int) -> Tensor:
        return random_normal(*size, dtype=torch.float32, device=device, generator=generator).abs()

    statistics: dict[str, Any] = {"absmax": positive(blocks)}
    if case["nested"]:
        statistics = {
            "absmax": random_bytes(blocks), "code2": positive(256) - 1, "absmax2": positive(-(-blocks // 256)),
            "offset": positive(1)[0],
        }  # fmt: skip
    w = Nf4Weight(
        packed=random_bytes((count + 1) // 2)[:, None], shape=shape, dtype=dtype, blocksize=blocksize, **statistics
    )
    return {"w": w, "dtype": dtype}


def _num_bytes(case: Case) -> float:
    """Nibbles in, statistics in, bf16 out."""
    count, blocks = case["N"] * case["K"], case["N"] * case["K"] / case["blocksize"]
    return 0.5 * count + (blocks * (1 + 4 / 256) if case["nested"] else 4 * blocks) + 2 * count


_SIGNATURE = {
    "packed_ptr": "*i32", "code_ptr": "*fp32", "code2_ptr": "*fp32", "absmax2_ptr": "*fp32", "offset_ptr": "*fp32",
    "out_ptr": "*bf16", "C": "i32", "chunks": "i32", "stride": "i32", "shift": "i32", "shift2": "i32",
}  # fmt: skip
OP = Op(
    name="nf4_dequant",
    summary="NF4 to bf16, fp16 or fp32 in one pass, nested statistics included",
    reference=nf4_dequant_reference,
    function=nf4_dequant,
    make_inputs=_make_inputs,
    cases=tuple(
        {"N": N, "K": K, "blocksize": blocksize, "nested": nested}
        for nested in (False, True)
        for N, K, blocksize in (
            (1, 1, 64), (3, 5, 64), (7, 100, 64), (33, 96, 32), (129, 64, 64), (16, 576, 128),
            (5, 1000, 512), (3, 3000, 4096),
        )
    ),
    kernels=tuple(
        Kernel(
            fn=_nf4_dequant_kernel,
            signature={**_SIGNATURE, "absmax_ptr": "*u8" if nested else "*fp32"},
            configs=(Config({**BLOCK, "NESTED": nested}, num_warps=4, elements=BLOCK["BG"] * GRANULE),),
            divisible=("C", "stride"),
        )
        for nested in (True, False)
    ),
    is_exact=True,
    bench_cases=(
        {"N": 4096, "K": 4096, "blocksize": 64, "nested": True},
        {"N": 14336, "K": 4096, "blocksize": 64, "nested": True},
        {"N": 1024, "K": 4096, "blocksize": 64, "nested": True},
    ),
    num_bytes=_num_bytes,
)  # fmt: skip
