"""Examples of random content and full length, for what is measured before there is data. B examples, T tokens."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from .config import Config
from .tasks import Batch, Example, get_task


def synthetic_batch(config: Config, *, num_examples: int, length: int, num_ids: int, seed: int = 0) -> Batch:
    """A micro-batch [B, T] as the task collates it, packed if the config packs; every token but the first is learned.

    Token ids are below `num_ids`; images have the size that the config says, whatever `length` is.
    """
    random = np.random.default_rng(seed)
    task = get_task(config.task.type)
    if config.task.type == "image_classification":
        processor: Any = task.load_processor(config)
        num_values = processor.num_channels * processor.image_size**2
        pixels = random.integers(0, 256, (num_examples, num_values), dtype=np.uint8)
        examples: list[Example] = [{"pixels": row, "label": np.zeros(1, np.int64)} for row in pixels]
        return task.collate(examples, processor, config)
    ids = random.integers(0, num_ids, (num_examples, length), dtype=np.int32)
    if config.task.type == "causal_lm":
        is_learned = np.ones(length, np.uint8)
        is_learned[0] = 0
        examples = [{"input_ids": row, "loss_mask": is_learned} for row in ids]
    else:
        examples = [{"input_ids": row, "label": np.zeros(1, np.int64)} for row in ids]
    return task.collate(examples, SimpleNamespace(pad_token_id=0), config)
