"""One step of AdamW over hundreds of small tensors: the table of segments and the code that walks it.

The table holds the address and size of everything that belongs to one parameter, a *segment*; a program (a thread, in
C++) takes one chunk of a segment. `adapter_adamw` has the formula. Shape letters: S segments.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from . import native
from .byte_moments import code_table, dequantize, nearest_code, quantize
from .op import Backend, Config, Kernel, backend_of

CHUNK = 16384
"""Elements that one program takes; cpp/adamw.cpp has its own."""
Numbers = tuple[float, float, float, float, float]
"""What a parameter group fixes: lr, weight decay, beta1, beta2, eps."""


class Segment(NamedTuple):
    """One parameter: fp32 and contiguous, as all but the gradient; the maxima only where the moments are bytes."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_max: Tensor | None
    exp_avg_sq_max: Tensor | None
    step: Tensor


@triton.jit
def _segment_of(table_ptr, chunk_ptr):
    """This program's segment, its row of the table, where its chunk starts, and the size of the segment."""
    pid = tl.program_id(0).to(tl.int64)
    segment = tl.load(chunk_ptr + 2 * pid)
    row_ptr = table_ptr + segment * 8
    return segment, row_ptr, tl.load(chunk_ptr + 2 * pid + 1), tl.load(row_ptr + 7)


@triton.jit
def _gradients(row_ptr, offsets, inside, GRAD_BF16: tl.constexpr):
    address = tl.load(row_ptr + 1)
    if GRAD_BF16:
        grads = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offsets, mask=inside, other=0.0)
    else:
        grads = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask=inside, other=0.0)
    return grads.to(tl.float32)


@triton.jit
def _prepare_kernel(
    table_ptr, chunk_ptr, partial_ptr, max_norm, GRAD_BF16: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Counts the step of every segment and, where max_norm > 0, sums the squares of every chunk."""
    _, row_ptr, start, size = _segment_of(table_ptr, chunk_ptr)
    step_ptr = tl.load(row_ptr + 6).to(tl.pointer_type(tl.float32))
    tl.store(step_ptr, tl.load(step_ptr) + 1.0, mask=start == 0)
    if max_norm > 0:
        total = tl.zeros([BLOCK], tl.float32)
        for i in range(0, tl.minimum(size - start, CHUNK), BLOCK):
            offsets = start + i + tl.arange(0, BLOCK)
            grads = _gradients(row_ptr, offsets, offsets < size, GRAD_BF16)
            total += grads * grads
        tl.store(partial_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _clip(partial_ptr, norm_ptr, step_ptr, start, size, num_partials, max_norm, BLOCK: tl.constexpr):
    """Factor of the gradients, and the size to update: 0 where they are not finite, which takes back the step."""
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, num_partials, BLOCK):
        offsets = i + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + offsets, mask=offsets < num_partials, other=0.0)
    norm = tl.sqrt(tl.sum(total, 0))
    tl.store(norm_ptr, norm, mask=tl.program_id(0) == 0)
    back = tl.where(norm < float("inf"), 0.0, 1.0)
    tl.store(step_ptr, tl.load(step_ptr) - back, mask=start == 0)
    scale = tl.where(max_norm > 0, tl.minimum(max_norm / (norm + 1e-6), 1.0), 1.0)
    return scale, tl.where(back > 0, 0, size)


@triton.jit
def _factors(numbers_ptr, step):
    """Decay, 1 - β1, β2, step size, √(1 - β2^t) and eps of a segment in fp32, worked out in fp64."""
    lr, weight_decay = tl.load(numbers_ptr), tl.load(numbers_ptr + 1)
    beta1, beta2, eps = tl.load(numbers_ptr + 2), tl.load(numbers_ptr + 3), tl.load(numbers_ptr + 4)
    first = 1.0 - tl.exp(step.to(tl.float64) * tl.log(beta1))
    second = 1.0 - tl.exp(step.to(tl.float64) * tl.log(beta2))
    decay, step_size = 1.0 - lr * weight_decay, lr / first
    return (
        decay.to(tl.float32), (1.0 - beta1).to(tl.float32), beta2.to(tl.float32), (1.0 - beta2).to(tl.float32),
        step_size.to(tl.float32), tl.sqrt(second).to(tl.float32), eps.to(tl.float32),
    )  # fmt: skip


@triton.jit
def _moved(p, g, m, v, decay, add1, keep2, add2, step_size, root2, eps):
    """New parameter and moments of one element."""
    m += add1 * (g - m)
    v = keep2 * v + add2 * g * g
    return p * decay - step_size * m / (tl.sqrt(v) / root2 + eps), m, v


@triton.jit
def _update_kernel(
    table_ptr, numbers_ptr, chunk_ptr, partial_ptr, norm_ptr, num_partials, max_norm,
    GRAD_BF16: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of a segment with fp32 moments."""
    segment, row_ptr, start, size = _segment_of(table_ptr, chunk_ptr)
    step_ptr = tl.load(row_ptr + 6).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr)
    scale, size = _clip(partial_ptr, norm_ptr, step_ptr, start, size, num_partials, max_norm, BLOCK)
    decay, add1, keep2, add2, step_size, root2, eps = _factors(numbers_ptr + segment * 5, step)
    param_ptr = tl.load(row_ptr).to(tl.pointer_type(tl.float32))
    exp_avg_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.float32))
    exp_avg_sq_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(tl.float32))
    for i in range(0, tl.minimum(size - start, CHUNK), BLOCK):
        offsets = start + i + tl.arange(0, BLOCK)
        inside = offsets < size
        g = _gradients(row_ptr, offsets, inside, GRAD_BF16) * scale
        p = tl.load(param_ptr + offsets, mask=inside, other=0.0)
        m = tl.load(exp_avg_ptr + offsets, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq_ptr + offsets, mask=inside, other=0.0)
        p, m, v = _moved(p, g, m, v, decay, add1, keep2, add2, step_size, root2, eps)
        tl.store(param_ptr + offsets, p, mask=inside)
        tl.store(exp_avg_ptr + offsets, m, mask=inside)
        tl.store(exp_avg_sq_ptr + offsets, v, mask=inside)


@triton.jit
def _update_8bit_kernel(
    table_ptr, numbers_ptr, chunk_ptr, partial_ptr, norm_ptr, codes_ptr, num_partials, max_norm,
    GRAD_BF16: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One chunk of a segment whose moments are bytes, ROWS blocks of 256 at a time."""
    segment, row_ptr, start, size = _segment_of(table_ptr, chunk_ptr)
    step_ptr = tl.load(row_ptr + 6).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr)
    scale, size = _clip(partial_ptr, norm_ptr, step_ptr, start, size, num_partials, max_norm, ROWS * 256)
    decay, add1, keep2, add2, step_size, root2, eps = _factors(numbers_ptr + segment * 5, step)
    param_ptr = tl.load(row_ptr).to(tl.pointer_type(tl.float32))
    exp_avg_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.uint8))
    exp_avg_sq_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(tl.uint8))
    max1_ptr = tl.load(row_ptr + 4).to(tl.pointer_type(tl.float32))
    max2_ptr = tl.load(row_ptr + 5).to(tl.pointer_type(tl.float32))
    for i in range(0, tl.cdiv(tl.minimum(size - start, CHUNK), 256), ROWS):
        blocks = start // 256 + i + tl.arange(0, ROWS)
        is_block = blocks * 256 < size
        offsets = blocks[:, None] * 256 + tl.arange(0, 256)[None, :]
        inside = offsets < size
        g = _gradients(row_ptr, offsets, inside, GRAD_BF16) * scale
        p = tl.load(param_ptr + offsets, mask=inside, other=0.0)
        code1 = tl.load(exp_avg_ptr + offsets, mask=inside, other=0).to(tl.int32)
        code2 = tl.load(exp_avg_sq_ptr + offsets, mask=inside, other=0).to(tl.int32)
        m = tl.load(codes_ptr + code1) * tl.load(max1_ptr + blocks, mask=is_block, other=0.0)[:, None]
        v = tl.load(codes_ptr + 256 + code2) * tl.load(max2_ptr + blocks, mask=is_block, other=0.0)[:, None]
        p, m, v = _moved(p, g, m, v, decay, add1, keep2, add2, step_size, root2, eps)
        max1 = tl.max(tl.where(inside, tl.abs(m), 0.0), 1)
        max2 = tl.max(tl.where(inside, v, 0.0), 1)
        inverse1 = 1.0 / tl.where(max1 > 0, max1, 1.0)
        inverse2 = 1.0 / tl.where(max2 > 0, max2, 1.0)
        tl.store(param_ptr + offsets, p, mask=inside)
        tl.store(exp_avg_ptr + offsets, nearest_code(m * inverse1[:, None], codes_ptr + 512), mask=inside)
        tl.store(exp_avg_sq_ptr + offsets, nearest_code(v * inverse2[:, None], codes_ptr + 768), mask=inside)
        tl.store(max1_ptr + blocks, max1, mask=is_block)
        tl.store(max2_ptr + blocks, max2, mask=is_block)


BLOCK, ROWS, NUM_WARPS = 1024, 2, 4


def _table(segments: Sequence[Segment]) -> Tensor:
    """Addresses and size of every segment: int64 [S, 8], as the kernels and cpp/adamw.cpp read it."""
    rows = [
        (
            s.param.data_ptr(),
            s.grad.data_ptr(),
            s.exp_avg.data_ptr(),
            s.exp_avg_sq.data_ptr(),
            0 if s.exp_avg_max is None else s.exp_avg_max.data_ptr(),
            0 if s.exp_avg_sq_max is None else s.exp_avg_sq_max.data_ptr(),
            s.step.data_ptr(),
            s.param.numel(),
        )
        for s in segments
    ]
    return torch.tensor(rows, dtype=torch.int64)


@functools.lru_cache(maxsize=16)
def _chunks(sizes: tuple[int, ...], which: tuple[bool, ...], device: torch.device) -> Tensor:
    """(segment, first element) of every chunk of the segments in `which`: int64 [number of chunks, 2]."""
    rows = [
        (i, start)
        for i, (size, is_meant) in enumerate(zip(sizes, which, strict=True))
        if is_meant
        for start in range(0, size, CHUNK)
    ]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 2).to(device)


def _update_in_triton(segments: Sequence[Segment], numbers: Sequence[Numbers], max_norm: float) -> Tensor | None:
    device = segments[0].param.device
    table, values = _table(segments).to(device), torch.tensor(numbers, dtype=torch.float64).to(device)
    sizes = tuple(s.param.numel() for s in segments)
    is_8bit = tuple(s.exp_avg_max is not None for s in segments)
    every = _chunks(sizes, (True,) * len(sizes), device)
    partial = torch.empty(len(every), dtype=torch.float32, device=device)
    norm = torch.empty((), dtype=torch.float32, device=device)
    num_partials = len(every) if max_norm > 0 else 0
    options = {"GRAD_BF16": segments[0].grad.dtype == torch.bfloat16, "CHUNK": CHUNK}
    _prepare_kernel[(len(every),)](table, every, partial, max_norm, **options, BLOCK=BLOCK, num_warps=NUM_WARPS)
    plain = _chunks(sizes, tuple(not flag for flag in is_8bit), device)
    if len(plain):
        _update_kernel[(len(plain),)](
            table, values, plain, partial, norm, num_partials, max_norm, **options, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    small = _chunks(sizes, is_8bit, device)
    if len(small):
        _update_8bit_kernel[(len(small),)](
            table, values, small, partial, norm, code_table(device), num_partials, max_norm,
            **options, ROWS=ROWS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return norm if max_norm > 0 else None


def _update_in_cpp(segments: Sequence[Segment], numbers: Sequence[Numbers], max_norm: float) -> Tensor | None:
    table, values = _table(segments), torch.tensor(numbers, dtype=torch.float64)
    norm = torch.zeros((), dtype=torch.float64)
    codes = code_table(torch.device("cpu"))
    native.call("adamw", segments[0].grad.dtype, table, values, codes, len(segments), float(max_norm), norm)
    return norm.float() if max_norm > 0 else None


def _update_in_torch(segments: Sequence[Segment], numbers: Sequence[Numbers], max_norm: float) -> Tensor | None:
    norm, scale = None, 1.0
    if max_norm > 0:
        norm = torch.nn.utils.get_total_norm([s.grad for s in segments]).float()
        if not bool(norm.isfinite()):
            return norm
        scale = min(1.0, max_norm / (float(norm) + 1e-6))
    for s, (lr, weight_decay, beta1, beta2, eps) in zip(segments, numbers, strict=True):
        m, v = s.exp_avg, s.exp_avg_sq
        if s.exp_avg_max is not None and s.exp_avg_sq_max is not None:
            m = dequantize(m, s.exp_avg_max, is_signed=True)
            v = dequantize(v, s.exp_avg_sq_max, is_signed=False)
        grad = s.grad.float() if scale == 1 else s.grad.float() * scale
        torch_adamw(
            [s.param], [grad], [m], [v], [], [s.step], amsgrad=False, maximize=False, fused=True,
            lr=lr, weight_decay=weight_decay, beta1=beta1, beta2=beta2, eps=eps,
        )  # fmt: skip
        if s.exp_avg_max is not None and s.exp_avg_sq_max is not None:
            for value, bytes_, maxima, is_signed in (
                (m, s.exp_avg, s.exp_avg_max, True),
                (v, s.exp_avg_sq, s.exp_avg_sq_max, False),
            ):
                found, highest = quantize(value, is_signed=is_signed)
                bytes_.copy_(found)
                maxima.copy_(highest)
    return norm


UPDATES: dict[Backend, Callable[[Sequence[Segment], Sequence[Numbers], float], Tensor | None]] = {
    "triton": _update_in_triton,
    "native": _update_in_cpp,
    "torch": _update_in_torch,
}


def update(segments: Sequence[Segment], numbers: Sequence[Numbers], *, max_grad_norm: float) -> Tensor | None:
    """One step of all segments in place. Their gradients must have one dtype, fp32 or bf16.

    `max_grad_norm` > 0: returns the norm of all gradients; where it is not finite nothing changes.
    """
    assert len({(s.grad.dtype, s.param.device) for s in segments}) == 1, "gradients of several dtypes or devices"
    return UPDATES[backend_of(segments[0].param)](segments, numbers, max_grad_norm)


def kernels() -> tuple[Kernel, ...]:
    """All kernels, for the compile gate."""
    table = {"table_ptr": "*i64", "chunk_ptr": "*i64", "partial_ptr": "*fp32", "max_norm": "fp32"}
    update_types = table | {"numbers_ptr": "*fp64", "norm_ptr": "*fp32", "num_partials": "i32"}

    def configs(**constants: int) -> tuple[Config, ...]:
        return tuple(
            Config({"GRAD_BF16": bf16, "CHUNK": CHUNK} | constants, num_warps=NUM_WARPS) for bf16 in (False, True)
        )

    return (
        Kernel(fn=_prepare_kernel, signature=table, configs=configs(BLOCK=BLOCK)),
        Kernel(fn=_update_kernel, signature=update_types, configs=configs(BLOCK=BLOCK)),
        Kernel(fn=_update_8bit_kernel, signature=update_types | {"codes_ptr": "*fp32"}, configs=configs(ROWS=ROWS)),
    )
