"""The 8-bit optimizer of bitsandbytes (arXiv 2110.02861): moments as block-wise quantised uint8."""

from typing import Any

import torch

from .config import Adamw8bit


def adamw_8bit(groups: list[dict[str, Any]], options: Adamw8bit) -> torch.optim.Optimizer:
    """AdamW with 8-bit state, on CPU and CUDA. Parameters under 4096 elements keep fp32 moments.

    With `paged` the driver moves the moments of tensors of 100 000 elements and more between GPU and host memory.
    """
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    kind = PagedAdamW8bit if options.paged else AdamW8bit
    return kind(groups, lr=options.learning_rate, betas=options.betas, eps=options.eps)
