"""Classification of texts (or pairs of texts) with a new head on a pre-trained encoder or decoder.

Shape letters: B examples, T tokens, Y classes. An Example is {input_ids int32[T], token_type_ids int32[T] where the
model has them, label int64[1]}, and num_truncated int32[1] where tokens were cut off.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import Batch, Example, RowError, Task
from .common import (
    IGNORE,
    accepts,
    class_counts,
    find_labels,
    label_index,
    neftune,
    summarise_classes,
    summed_cross_entropy,
    to_model_device,
    unwrap,
)


def load_processor(config: Any) -> Any:
    """The tokenizer. Raises ConfigError."""
    from ..pretrained import load_tokenizer

    return load_tokenizer(config)


def auto_class() -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification


def encode(row: dict[str, Any], tokenizer: Any, config: Any, labels: list[str]) -> Example:
    """Row {text, text_pair?, label}. Raises RowError for an empty or wrong row and, if asked for, a long one."""
    label = label_index(row, labels)
    return _encode_text(row, tokenizer, config) | {"label": np.array([label], dtype=np.int64)}


def _encode_text(row: dict[str, Any], tokenizer: Any, config: Any) -> Example:
    for column in ("text", "text_pair"):
        value = row.get(column)
        if column == "text" and value is None:
            raise RowError("missing_column", "no column text")
        if value is not None and not isinstance(value, str):
            raise RowError("wrong_type", f"{column} is {type(value).__name__}, not text")
    if not row["text"].strip():
        raise RowError("empty", "text is empty")
    truncation, limit = config.data.truncation, config.data.max_length
    texts = (row["text"], row.get("text_pair"))
    encoded = tokenizer(*texts, verbose=False)
    num_tokens = len(encoded["input_ids"])
    if num_tokens > limit:
        if truncation in ("drop", "error"):
            raise RowError("too_long", f"{num_tokens} tokens, data.max_length is {limit}")
        tokenizer.truncation_side = truncation
        encoded = tokenizer(*texts, truncation=True, max_length=limit)
    fields = [name for name in ("input_ids", "token_type_ids") if name in encoded]
    example = {name: np.asarray(encoded[name], dtype=np.int32) for name in fields}
    if num_tokens > limit:
        example["num_truncated"] = np.array([num_tokens - len(encoded["input_ids"])], dtype=np.int32)
    return example


def num_supervised(example: Example) -> int:
    return int(example["label"][0] != IGNORE)


def ignore(example: Example) -> Example:
    return example | {"label": np.array([IGNORE], dtype=np.int64)}


def collate(examples: list[Example], tokenizer: Any, config: Any, pad_to: int | None = None) -> Batch:
    """input_ids, attention_mask, token_type_ids (where present) [B, T], padded on the right; labels [B]."""
    width = max(pad_to or 0, *(len(example["input_ids"]) for example in examples))
    batch = {"attention_mask": torch.zeros(len(examples), width, dtype=torch.int64)}
    batch["input_ids"] = torch.full((len(examples), width), tokenizer.pad_token_id)
    if "token_type_ids" in examples[0]:
        batch["token_type_ids"] = torch.zeros(len(examples), width, dtype=torch.int64)
    for i, example in enumerate(examples):
        size = len(example["input_ids"])
        batch["attention_mask"][i, :size] = 1
        for name in batch.keys() & example.keys():
            batch[name][i, :size] = torch.from_numpy(example[name].astype(np.int64))
    if "label" in examples[0]:
        batch["labels"] = torch.tensor([int(example["label"][0]) for example in examples])
    return batch


def _logits(model: Any, batch: Batch) -> Tensor:
    """[B, Y]"""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if "token_type_ids" in inputs and not accepts(model, "token_type_ids"):
        del inputs["token_type_ids"]
    if accepts(model, "use_cache"):
        inputs["use_cache"] = False
    return model(**inputs).logits


def loss(model: Any, batch: Batch, config: Any) -> Tensor:
    batch = to_model_device(batch, model)
    lengths = batch["attention_mask"].sum(1, keepdim=True)
    with neftune(model, alpha=config.task.neftune_alpha, lengths=lengths):
        logits = _logits(model, batch)
    return summed_cross_entropy(logits, batch["labels"], label_smoothing=config.task.label_smoothing)


@torch.no_grad()
def evaluate(model: Any, batch: Batch, config: Any) -> dict[str, Tensor]:
    """loss_sum, count and the confusion matrix, without smoothing or noise; the model must be in eval mode."""
    batch = to_model_device(batch, model)
    return class_counts(_logits(model, batch), batch["labels"])


@torch.no_grad()
def predict(model: Any, tokenizer: Any, inputs: list[Any], config: Any) -> list[dict[str, Any]]:
    """{label, probability} per text; an input is a text, a pair of texts or a row with `text`."""
    names, answers = unwrap(model).config.id2label, []
    for item in inputs:
        pair = {"text": item} if isinstance(item, str) else item
        row = pair if isinstance(pair, dict) else {"text": pair[0], "text_pair": pair[1]}
        batch = to_model_device(collate([_encode_text(row, tokenizer, config)], tokenizer, config), model)
        probabilities = _logits(model, batch)[0].float().softmax(-1)
        best = int(probabilities.argmax())
        answers.append({"label": names[best], "probability": round(float(probabilities[best]), 4)})
    return answers


def prompt(row: dict[str, Any]) -> Any:
    return row["text"] if row.get("text_pair") is None else [row["text"], row["text_pair"]]


TASK = Task(
    name="sequence_classification",
    load_processor=load_processor,
    auto_class=auto_class,
    find_labels=find_labels,
    encode=encode,
    num_supervised=num_supervised,
    ignore=ignore,
    collate=collate,
    loss=loss,
    evaluate=evaluate,
    summarise=summarise_classes,
    predict=predict,
    prompt=prompt,
)
