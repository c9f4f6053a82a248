"""What can be trained: one file per task family. A task is a record of functions; TASKS finds it by name.

Shape letters: B examples, T tokens, C channels, Y classes. An Example is one row of training data as numpy arrays,
as kept in the memory-mapped store; a Batch is a dict of torch tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

Example = dict[str, np.ndarray]
Batch = dict[str, Any]


class RowError(ValueError):
    """A row that cannot become an example. `kind` groups it in the counts (`empty`, `wrong_type` …)."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(detail or kind)
        self.kind = kind


@dataclass(frozen=True)
class Task:
    """One task family.

    load_processor(config)                      tokenizer or image processor
    auto_class()                                the transformers Auto class that loads the model
    find_labels(rows, config)                   class names in order, or None where there are no classes
    encode(row, processor, config, labels)      one row -> Example; raises RowError
    num_supervised(example)                     how many targets the example contributes to the loss
    ignore(example)                             the same example with every target switched off (padding of a batch)
    collate(examples, processor, config, pad_to) -> Batch of tensors (packed if config.data.packing)
    loss(model, batch, config)                  scalar tensor: SUM of the loss over supervised targets
    evaluate(model, batch, config)              dict of sums as 1-d float64 tensors, additive over batches and ranks;
                                                always has `loss_sum` and `count`
    summarise(sums)                             sums -> metrics: always `loss`; perplexity, accuracy, macro_f1 …
    predict(model, processor, inputs, config)   list of inputs (strings, arrays) -> list of JSON-able answers
    prompt(row)                                 the part of a raw row that is shown and answered before and after
    """

    name: str
    load_processor: Callable[..., Any]
    auto_class: Callable[[], Any]
    find_labels: Callable[..., list[str] | None]
    encode: Callable[..., Example]
    num_supervised: Callable[[Example], int]
    ignore: Callable[[Example], Example]
    collate: Callable[..., Batch]
    loss: Callable[..., Any]
    evaluate: Callable[..., dict[str, Any]]
    summarise: Callable[[dict[str, Any]], dict[str, float]]
    predict: Callable[..., list[Any]]
    prompt: Callable[..., Any]


TASKS = ("causal_lm", "sequence_classification", "image_classification")


def get_task(name: str) -> Task:
    """The task record of that name; imports torch and transformers only now."""
    assert name in TASKS, (name, TASKS)
    return import_module(f".{name}", __name__).TASK
