"""Causal language models: next-token loss on the supervised tokens, perplexity, text generation.

Shape letters: B examples, T tokens, K kept columns, N supervised targets, V vocabulary. An Example is
{input_ids int32[T], loss_mask uint8[T]}; loss_mask marks the tokens that are learned and is 0 at position 0.

T and K are rounded up, because libraries prepare and keep a GEMM kernel for every new shape: SmolLM2-135M in bf16 on
one CPU core trained 1.28 times as many tokens/s with packed rows rounded to 128, and its memory stopped growing.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..data.format import encode_causal_lm, question, render_prompt
from . import Batch, Example, Task
from .common import IGNORE, accepts, mean_loss, neftune, summed_cross_entropy, to_model_device, unwrap

ROUND_PACKED, ROUND_PADDED, ROUND_KEPT = 128, 16, 32


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def load_processor(config: Any) -> Any:
    """The tokenizer, with a pad token and the configured chat template. Raises ConfigError."""
    from ..pretrained import load_tokenizer

    return load_tokenizer(config)


def auto_class() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def encode(row: dict[str, Any], tokenizer: Any, config: Any, labels: list[str] | None = None) -> Example:
    return encode_causal_lm(row, tokenizer, config, row.get("__format__", "auto"))


def num_supervised(example: Example) -> int:
    return int(example["loss_mask"].sum())


def ignore(example: Example) -> Example:
    return example | {"loss_mask": np.zeros_like(example["loss_mask"])}


def collate(examples: list[Example], tokenizer: Any, config: Any, pad_to: int | None = None) -> Batch:
    """Padded on the right to the longest example (or `pad_to`), or joined into one row when data.packing is on.

    padded: input_ids, attention_mask, loss_mask [B, T]. packed: input_ids, position_ids, loss_mask, lengths [1, T];
    position_ids start at 0 in every example, which is what keeps attention apart, and lengths holds each one's size.
    The padding at the end of a packed row is an example of its own, without targets.
    """
    ids = [torch.from_numpy(example["input_ids"].astype(np.int64)) for example in examples]
    masks = [torch.from_numpy(example["loss_mask"].astype(bool)) for example in examples]
    if config.data.packing:
        missing = -sum(len(row) for row in ids) % ROUND_PACKED
        ids.append(torch.full((missing,), tokenizer.pad_token_id))
        masks.append(torch.zeros(missing, dtype=torch.bool))
        sizes = torch.tensor([len(row) for row in ids])
        return {
            "input_ids": torch.cat(ids)[None],
            "position_ids": torch.cat([torch.arange(len(row)) for row in ids])[None],
            "loss_mask": torch.cat(masks)[None],
            "lengths": sizes.repeat_interleave(sizes)[None],
        }
    longest = max(pad_to or 0, *(len(row) for row in ids))
    width = max(longest, min(round_up(longest, ROUND_PADDED), config.data.max_length))
    input_ids = torch.full((len(ids), width), tokenizer.pad_token_id)
    attention_mask = torch.zeros(len(ids), width, dtype=torch.int64)
    loss_mask = torch.zeros(len(ids), width, dtype=torch.bool)
    for i, (row, mask) in enumerate(zip(ids, masks, strict=True)):
        input_ids[i, : len(row)], attention_mask[i, : len(row)], loss_mask[i, : len(row)] = row, 1, mask
    return {"input_ids": input_ids, "attention_mask": attention_mask, "loss_mask": loss_mask}


def model_inputs(model: Any, batch: Batch) -> Batch:
    """What the model's forward takes of a batch."""
    inputs: Batch = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    return inputs | ({"use_cache": False} if accepts(model, "use_cache") else {})


def supervised_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [N, V] that predict the supervised tokens, and those tokens [N].

    The head runs on the columns where some row is supervised, if the model's forward takes `logits_to_keep`.
    """
    inputs = model_inputs(model, batch)
    is_target = pad(batch["loss_mask"][:, 1:], (0, 1))  # [B, T]: the logits of column t predict token t+1
    columns = is_target.any(0).nonzero()[:, 0]
    if accepts(model, "logits_to_keep"):
        # At least one column: every rank runs the same forward, whatever is supervised.
        kept = pad(columns, (0, round_up(max(1, len(columns)), ROUND_KEPT) - len(columns)))
        logits = model(**inputs, logits_to_keep=kept).logits[:, : len(columns)]  # [B, K, V]
    else:
        logits = model(**inputs).logits[:, columns]
    keep = is_target[:, columns]
    return logits[keep], batch["input_ids"].roll(-1, 1)[:, columns][keep]


def summed_loss(model: Any, batch: Batch, *, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Sum of the loss over the supervised targets, and how many of them are the most likely token.

    A fused head makes both from the hidden states, without logits.
    """
    head = unwrap(model).get_output_embeddings()
    if not hasattr(head, "loss_of"):
        logits, targets = supervised_logits(model, batch)
        right = (logits.argmax(-1) == targets).sum()
        return summed_cross_entropy(logits, targets, label_smoothing=label_smoothing), right
    is_target = pad(batch["loss_mask"][:, 1:], (0, 1))
    targets = batch["input_ids"].roll(-1, 1).masked_fill(~is_target, IGNORE)
    return head.loss_of(targets, lambda: model(**model_inputs(model, batch)), label_smoothing=label_smoothing)


def loss(model: Any, batch: Batch, config: Any) -> Tensor:
    batch = to_model_device(batch, model)
    lengths = batch["lengths"] if "lengths" in batch else batch["attention_mask"].sum(1, keepdim=True)
    with neftune(model, alpha=config.task.neftune_alpha, lengths=lengths):
        return summed_loss(model, batch, label_smoothing=config.task.label_smoothing)[0]


@torch.no_grad()
def evaluate(model: Any, batch: Batch, config: Any) -> dict[str, Tensor]:
    """Sums of loss, targets and right answers, without smoothing or noise; the model must be in eval mode."""
    batch = to_model_device(batch, model)
    loss_sum, right = summed_loss(model, batch)
    return {
        "loss_sum": loss_sum.double().reshape(1).cpu(),
        "count": batch["loss_mask"][:, 1:].sum().double().reshape(1).cpu(),
        "right": right.double().reshape(1).cpu(),
    }


def summarise(sums: dict[str, Tensor]) -> dict[str, float]:
    mean = mean_loss(sums)
    accuracy = float(sums["right"] / sums["count"])
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "token_accuracy": accuracy}


@torch.no_grad()
def predict(model: Any, tokenizer: Any, inputs: list[Any], config: Any) -> list[str]:
    """One answer per prompt; a prompt is a string or a list of chat messages. Greedy at temperature 0."""
    options = config.generation
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    base = unwrap(model)
    device = next(base.parameters()).device
    answers = []
    for prompt in inputs:
        ids = torch.tensor([render_prompt(prompt, tokenizer, config)], device=device)
        output = base.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=options.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=_stop_tokens(base, tokenizer),
            synced_gpus=any(hasattr(parameter, "ds_id") for parameter in base.parameters()),
            **sampling,
        )
        answers.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return answers


def _stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every end token that the tokenizer or the model names."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return sorted({token for token in [*named, tokenizer.eos_token_id] if token is not None})


TASK = Task(
    name="causal_lm",
    load_processor=load_processor,
    auto_class=auto_class,
    find_labels=lambda rows, config: None,
    encode=encode,
    num_supervised=num_supervised,
    ignore=ignore,
    collate=collate,
    loss=loss,
    evaluate=evaluate,
    summarise=summarise,
    predict=predict,
    prompt=question,
)
