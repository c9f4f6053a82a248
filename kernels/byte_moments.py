"""Optimizer moments as bytes: one of 256 codes times the maximum of its block of 256 values (arXiv 2110.02861).

The codes are bitsandbytes' dynamic map; the nearest one is stored. Shape letters: n values, n / 256 blocks.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

STATE_BLOCK = 256


def dynamic_codes(*, is_signed: bool) -> Tensor:
    """256 numbers in [-1, 1] or [0, 1], sorted: seven decades, the higher the finer, and 0 and 1."""
    parts = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for decade in range(7):
        count = 2**decade if is_signed else 2 ** (decade + 1)
        middles = (0.1 + 0.9 / count * (torch.arange(count, dtype=torch.float64) + 0.5)) * 10.0 ** (decade - 6)
        parts += [middles, -middles] if is_signed else [middles]
    return torch.cat(parts).sort().values.float()


@functools.cache
def code_table(device: torch.device) -> Tensor:
    """[4, 256]: signed codes, unsigned codes, and the points between neighbours of both."""
    codes = torch.stack([dynamic_codes(is_signed=True), dynamic_codes(is_signed=False)])
    middles = torch.nn.functional.pad((codes[:, 1:] + codes[:, :-1]) / 2, (0, 1), value=float("inf"))
    return torch.cat([codes, middles]).to(device)


def dequantize(codes: Tensor, maxima: Tensor, *, is_signed: bool) -> Tensor:
    """Bytes of any shape and the maxima [ceil(n / 256)] of their blocks, as fp32."""
    values = code_table(codes.device)[0 if is_signed else 1][codes.long()].view(-1)
    return (values * maxima.repeat_interleave(STATE_BLOCK)[: values.numel()]).view(codes.shape)


def quantize(values: Tensor, *, is_signed: bool) -> tuple[Tensor, Tensor]:
    """The nearest codes (uint8) of fp32 values of any shape, and the maxima of their blocks."""
    num_blocks = -(-values.numel() // STATE_BLOCK)
    blocks = torch.nn.functional.pad(values.flatten(), (0, num_blocks * STATE_BLOCK - values.numel()))
    blocks = blocks.view(num_blocks, STATE_BLOCK)
    maxima = blocks.abs().amax(1)
    scaled = blocks * torch.where(maxima > 0, 1 / maxima, 0.0)[:, None]
    middles = code_table(values.device)[2 if is_signed else 3][:255]
    found = torch.bucketize(scaled, middles).to(torch.uint8)
    return found.view(-1)[: values.numel()].view(values.shape), maxima


@triton.jit
def nearest_code(x, middle_ptr):
    """The code nearest to x, by bisection of the 255 points between codes."""
    code = tl.zeros(x.shape, tl.int32)
    for bit in tl.static_range(7, -1, -1):
        middle = tl.load(middle_ptr + code + (2**bit - 1))
        code += tl.where(x > middle, 2**bit, 0)
    return code.to(tl.uint8)
