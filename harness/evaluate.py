"""Metrics of a model on batches: the task's sums, added over batches and ranks, summarised once."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .config import Config
from .errors import DataError
from .tasks import Batch, Task


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    task: Task,
    config: Config,
    *,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[str, float]:
    """The task's metrics over all batches. `reduce` adds one float64 vector [S] over the ranks. Collective.

    Every rank must bring the same number of batches. Raises DataError if there is none or nothing to measure.
    """
    sums: dict[str, Tensor] = {}
    with eval_mode(model):
        for batch in batches:
            for name, value in task.evaluate(model, batch, config).items():
                sums[name] = sums[name] + value if name in sums else value
    if not sums:
        raise DataError("there is nothing to measure: the split has no examples; see `burnish data`")
    names = sorted(sums)
    reduced = reduce(torch.cat([sums[name] for name in names]))
    parts = reduced.split([sums[name].numel() for name in names])
    return task.summarise(dict(zip(names, parts, strict=True)))
