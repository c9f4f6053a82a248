"""Dense weights to NF4, byte for byte as bitsandbytes' CPU code does it: q = the number of boundaries below W / absmax.

absmax[b] is the largest magnitude in block b, boundaries are the midpoints of neighbouring codes (a tie goes down), and
W is multiplied by the reciprocal of absmax in full blocks, divided by it in a last short one. With double quantisation
the absmax minus their mean are quantised in blocks of 256 to the 8-bit dynamic type: the normalised value is rounded to
one of 65536 steps over [-1, 1], and the step's nearest code is looked up.
Sources: T. Dettmers et al., "QLoRA", arXiv 2305.14314; T. Dettmers, "8-Bit Approximations for Parallelism in Deep
Learning", arXiv 1511.04561. Shape letters: N outputs, K inputs.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import native
from .nf4_dequant import BLOCKSIZES, CODE, Nf4Weight
from .op import Case, Config, Kernel, Op, backend_of, random_normal

BLOCKSIZE2 = 256
STEPS = 65535
SMALLEST = 1e-38
"""What a block's absmax is raised to before anything is divided by it."""
CHUNK = 1 << 18
"""Elements that plain torch quantises at a time."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def boundaries_on(device: torch.device) -> Tensor:
    """fp32 [15]: the midpoints of neighbouring codes."""
    code = torch.tensor(CODE)
    return ((code[:-1] + code[1:]) / 2).to(device)


@functools.cache
def dynamic_map() -> Tensor:
    """fp32 [256], sorted: the 8-bit dynamic type, 7 decades with 1, 2, 4 ... 64 values of each sign, and 0 and 1.

    The values of a decade are the midpoints of equal intervals over [0.1, 1], times its power of ten.
    """
    decades = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        decades.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6))
    positive = torch.cat(decades)
    return torch.cat((-positive, positive, torch.tensor([0.0, 1.0]))).sort().values


@functools.cache
def _steps_on(device: torch.device) -> Tensor:
    """uint8 [65536]: the code of every step over [-1, 1]."""
    code = dynamic_map()
    values = -1 + 2 * torch.arange(STEPS + 1, dtype=torch.float32) / STEPS
    return torch.bucketize(values, (code[:-1] + code[1:]) / 2).to(torch.uint8).to(device)


def quantize_values(values: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [n] to the dynamic type in blocks of BLOCKSIZE2: codes uint8 [n] and absmax fp32 [blocks].

    A block of zeros gets code 0, as in bitsandbytes.
    """
    blocks = -(-len(values) // BLOCKSIZE2)
    rows = torch.nn.functional.pad(values, (0, blocks * BLOCKSIZE2 - len(values))).view(blocks, BLOCKSIZE2)
    largest = rows.abs().amax(1)
    scaled = (rows * (1 / largest)[:, None]).nan_to_num_(-1.0).clamp_(-1, 1)
    steps = scaled.add_(1).mul_(0.5).mul_(STEPS).add_(0.5).int()
    return _steps_on(values.device)[steps].view(-1)[: len(values)], largest


def quantize_statistics(absmax: Tensor) -> dict[str, Tensor]:
    """fp32 [blocks] -> the fields absmax, code2, absmax2 and offset of a nested Nf4Weight."""
    offset = absmax.mean()
    codes, largest = quantize_values(absmax - offset)
    return {"absmax": codes, "code2": dynamic_map().to(absmax.device, copy=True), "absmax2": largest, "offset": offset}


def _check(w: Tensor, blocksize: int) -> None:
    if w.dtype not in DTYPES:
        raise ValueError(f"{w.dtype}: only {DTYPES} can be quantised")
    if w.ndim != 2 or blocksize not in BLOCKSIZES:
        raise ValueError(f"weight {tuple(w.shape)}, block size {blocksize}: need two dimensions, one of {BLOCKSIZES}")


def _pack(codes: Tensor) -> Tensor:
    """uint8 [n] -> uint8 [n / 2]."""
    return codes[::2] << 4 | codes[1::2]


def _quantize_tail(values: Tensor) -> tuple[Tensor, Tensor]:
    """The last, short block: bytes and absmax [1]. An odd element gets 0 beside it."""
    largest = values.abs().max().clamp(min=SMALLEST)
    padded = torch.nn.functional.pad((values / largest).clamp(-1, 1), (0, len(values) % 2))
    return _pack(torch.bucketize(padded, boundaries_on(values.device)).to(torch.uint8)), largest[None]


def _quantize_blocks(values: Tensor) -> tuple[Tensor, Tensor]:
    """Full blocks [blocks, blocksize] in fp32: bytes and absmax [blocks]."""
    largest = values.abs().amax(1)
    scaled = (values * (1 / largest.clamp(min=SMALLEST))[:, None]).clamp_(-1, 1).view(-1)
    return _pack(torch.bucketize(scaled, boundaries_on(values.device)).to(torch.uint8)), largest


def nf4_quantize_reference(w: Tensor, *, blocksize: int = 64, double_quant: bool = True) -> Nf4Weight:
    flat = w.reshape(-1).float()
    full = flat.numel() // blocksize * blocksize
    parts = [_quantize_blocks(flat[:full].view(-1, blocksize))] if full else []
    if full < flat.numel():
        parts.append(_quantize_tail(flat[full:]))
    packed, absmax = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return _weight(w, packed, absmax, blocksize, double_quant)


def _weight(w: Tensor, packed: Tensor, absmax: Tensor, blocksize: int, double_quant: bool) -> Nf4Weight:
    statistics: dict[str, Any] = quantize_statistics(absmax) if double_quant else {"absmax": absmax}
    shape = (w.shape[0], w.shape[1])
    return Nf4Weight(packed=packed[:, None], shape=shape, dtype=w.dtype, blocksize=blocksize, **statistics)


@triton.jit
def _nf4_quantize_kernel(
    w_ptr,
    boundaries_ptr,
    packed_ptr,
    absmax_ptr,
    blocks,
    SMALLEST: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NB: tl.constexpr,
):
    """NB full blocks per program; the code is found by bisection in a table in shared memory."""
    block = tl.program_id(0).to(tl.int64) * NB + tl.arange(0, NB)
    there = block < blocks
    at = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    w = tl.load(w_ptr + at, mask=there[:, None], other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(w), axis=1)
    tl.store(absmax_ptr + block, largest, mask=there)
    scaled = tl.reshape(w * tl.div_rn(1.0, tl.maximum(largest, SMALLEST))[:, None], (NB * BLOCKSIZE,))
    lane = tl.arange(0, 16)
    boundaries = tl.load(boundaries_ptr + lane, mask=lane < 15, other=0.0)
    code = tl.zeros((NB * BLOCKSIZE,), tl.int32)
    for level in tl.static_range(4):
        step = 8 >> level
        code += tl.where(scaled > tl.gather(boundaries, code + (step - 1), 0), step, 0)
    high, low = tl.split(tl.reshape(code, (NB, BLOCKSIZE // 2, 2)))
    to = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed_ptr + to, (high << 4 | low).to(tl.uint8), mask=there[:, None])


def _constants(blocksize: int) -> dict[str, Any]:
    return {"SMALLEST": SMALLEST, "BLOCKSIZE": blocksize, "NB": max(1, 2048 // blocksize)}


def _triton(w: Tensor, packed: Tensor, absmax: Tensor, blocksize: int) -> None:
    constants = _constants(blocksize)
    grid = (triton.cdiv(len(absmax), constants["NB"]),)
    _nf4_quantize_kernel[grid](w, boundaries_on(w.device), packed, absmax, len(absmax), **constants)


def _torch(w: Tensor, packed: Tensor, absmax: Tensor, blocksize: int) -> None:
    step = CHUNK // blocksize
    for start in range(0, len(absmax), step):
        end = min(start + step, len(absmax))
        values = w[start * blocksize : end * blocksize].view(-1, blocksize).float()
        packed[start * blocksize // 2 : end * blocksize // 2], absmax[start:end] = _quantize_blocks(values)


@torch.no_grad()
def nf4_quantize(w: Tensor, *, blocksize: int = 64, double_quant: bool = True) -> Nf4Weight:
    """The weight [N, K] in NF4; double_quant also quantises the statistics (bitsandbytes' compress_statistics).

    packed is uint8 [ceil(N * K / 2), 1]. Raises ValueError for other dtypes than fp32, fp16, bf16 and other block sizes
    than bitsandbytes has.
    """
    _check(w, blocksize)
    flat = w.reshape(-1)
    count = flat.numel()
    blocks = count // blocksize
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-count // blocksize), device=w.device)
    if blocks:
        backend = backend_of(flat)
        if backend == "native":
            native.call("nf4_quantize", flat.dtype, flat, boundaries_on(w.device), packed, absmax, blocks, blocksize)
        else:
            run = _triton if backend == "triton" else _torch
            run(flat, packed[: blocks * blocksize // 2], absmax[:blocks], blocksize)
    if blocks * blocksize < count:
        packed[blocks * blocksize // 2 :], absmax[blocks:] = _quantize_tail(flat[blocks * blocksize :].float())
    return _weight(w, packed, absmax, blocksize, double_quant)


def _make_inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
    w = random_normal(case["N"], case["K"], dtype=dtype, device=device, generator=generator, scale=0.02)
    return {"w": w, "blocksize": case["blocksize"], "double_quant": case["nested"]}


def _tensors(weight: Nf4Weight) -> tuple[Tensor | None, ...]:
    """Every tensor of it as fp32, which is what the comparison of outputs looks at."""
    fields = (weight.packed, weight.absmax, weight.absmax2, weight.offset, weight.code2)
    return tuple(None if field is None else field.float() for field in fields)


OP = Op(
    name="nf4_quantize",
    summary="dense weights to NF4, byte for byte bitsandbytes' format",
    reference=lambda w, **options: _tensors(nf4_quantize_reference(w, **options)),
    function=lambda w, **options: _tensors(nf4_quantize(w, **options)),
    make_inputs=_make_inputs,
    cases=tuple(
        {"N": N, "K": K, "blocksize": blocksize, "nested": nested}
        for nested in (False, True)
        for N, K, blocksize in (
            (1, 1, 64), (3, 5, 64), (7, 100, 64), (33, 96, 32), (129, 64, 64), (16, 576, 128),
            (5, 1000, 512), (3, 3000, 4096),
        )
    ),
    kernels=(
        Kernel(
            fn=_nf4_quantize_kernel,
            signature={
                "w_ptr": "*bf16", "boundaries_ptr": "*fp32", "packed_ptr": "*u8", "absmax_ptr": "*fp32",
                "blocks": "i32",
            },
            configs=tuple(Config(_constants(size), num_warps=4, elements=max(2048, size)) for size in BLOCKSIZES),
        ),
    ),
    is_exact=True,
    bench_cases=({"N": 4096, "K": 4096, "blocksize": 64, "nested": True},),
    num_bytes=lambda case: 2.5 * case["N"] * case["K"] + 4 * case["N"] * case["K"] / case["blocksize"],
)  # fmt: skip
