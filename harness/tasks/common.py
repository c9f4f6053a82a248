"""What the tasks share: unwrapping, the summed cross-entropy, NEFTune noise, class counts.

Shape letters: B examples, T tokens, D hidden, N targets, Y classes.
"""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..errors import DataError
from . import Batch, RowError

IGNORE = -100
"""The label of a target that does not count."""


def unwrap(model: Any) -> Any:
    """The transformers model inside an engine and an adapter."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def accepts(model: Any, argument: str) -> bool:
    """Whether the transformers model's forward has this argument."""
    return argument in inspect.signature(unwrap(model).forward).parameters


def to_model_device(batch: Batch, model: Any) -> Batch:
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def summed_cross_entropy(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Sum over targets that are not IGNORE, computed in fp32; zero (with a gradient) where there are none.

    logits [N, Y], targets [N]. With smoothing e a target costs (1-e) * nll + e * mean over classes of nll.
    """
    return cross_entropy(logits.float(), targets, reduction="sum", ignore_index=IGNORE, label_smoothing=label_smoothing)


@contextmanager
def neftune(model: Any, *, alpha: float, lengths: Tensor) -> Iterator[None]:
    """Adds uniform noise of alpha / sqrt(length * D) to the token embeddings while the model trains.

    lengths [B, T] or [B, 1]: tokens of the example that each position belongs to. arXiv 2310.05914.
    """
    if alpha == 0 or not model.training:
        yield
        return

    def add_noise(_module: nn.Module, _inputs: Any, embedded: Tensor) -> Tensor:
        scale = alpha / (lengths.to(embedded.device) * embedded.shape[-1]).sqrt()
        noise = torch.empty_like(embedded, dtype=torch.float32).uniform_(-1, 1) * scale[..., None]
        return embedded + noise.to(embedded.dtype)

    embedding = unwrap(model).get_input_embeddings()
    handle = embedding.register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def find_labels(rows: Iterable[dict[str, Any]], config: Any) -> list[str]:
    """task.labels, or the labels found in the rows: sorted, as numbers where all of them are."""
    if config.task.labels is not None:
        return list(config.task.labels)
    found = {str(row["label"]) for row in rows if row.get("label") is not None}
    return sorted(found, key=lambda name: (0, int(name), "") if name.isdecimal() else (1, 0, name))


def label_index(row: dict[str, Any], labels: list[str]) -> int:
    """Position of the row's label in `labels`. Raises RowError."""
    if row.get("label") is None:
        raise RowError("no_label")
    name = str(row["label"])
    if name not in labels:
        raise RowError("unknown_label", f"label {name!r:.80} is none of {', '.join(labels[:20])}")
    return labels.index(name)


def class_counts(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Sums over the targets that count: loss, number, and the confusion matrix (target x answer) as Y*Y numbers."""
    counted = targets != IGNORE
    num_classes = logits.shape[-1]
    pairs = targets[counted] * num_classes + logits[counted].argmax(-1)
    return {
        "loss_sum": summed_cross_entropy(logits, targets).double().reshape(1).cpu(),
        "count": counted.sum().double().reshape(1).cpu(),
        "confusion": torch.bincount(pairs, minlength=num_classes**2).double().cpu(),
    }


def mean_loss(sums: dict[str, Tensor]) -> float:
    """Raises DataError where no target counted."""
    count = float(sums["count"])
    if count == 0:
        raise DataError("there is nothing to measure: no example of this split has a target; see `burnish data`")
    return float(sums["loss_sum"]) / count


def summarise_classes(sums: dict[str, Tensor]) -> dict[str, float]:
    """loss, accuracy and macro_f1: the mean F1 over the classes that occur as target or answer."""
    size = round(sums["confusion"].numel() ** 0.5)
    confusion = sums["confusion"].view(size, size)
    right = confusion.diagonal()
    seen = confusion.sum(0) + confusion.sum(1)
    f1 = (2 * right / seen.clamp(min=1))[seen > 0]
    loss = mean_loss(sums)
    return {"loss": loss, "accuracy": float(right.sum() / confusion.sum()), "macro_f1": float(f1.mean())}
