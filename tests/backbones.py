"""Tiny random models of every family on disk, and configs for them."""

from pathlib import Path
from typing import Any

import torch
from burnish.harness.config import Config
from burnish.harness.plan import Plan, Resources, make_plan
from tiny import make_tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

TASKS = {
    "llama": "causal_lm",
    "bert": "sequence_classification",
    "vit": "image_classification",
    "resnet": "image_classification",
}
LABELS = ["one", "two", "three"]
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 8}
VIT |= {"patch_size": 4, "num_channels": 1}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_channels": 1}


def save_backbone(kind: str, folder: Path, **changes: Any) -> Path:
    """A seeded model of this kind in fp32, with a tokenizer where it reads text."""
    torch.manual_seed(3)
    tokenizer = make_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": tokenizer.pad_token_id}
    labels = {"num_labels": 3, "id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
    if kind == "llama":
        fields = text | {"num_key_value_heads": 2, "eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": True}
        model: Any = LlamaForCausalLM(LlamaConfig(**fields | changes))
    elif kind == "bert":
        model = BertModel(BertConfig(**text | changes))
    elif kind == "bert_mlm":
        model = BertForMaskedLM(BertConfig(**text | changes))
    elif kind == "vit":
        model = ViTForImageClassification(ViTConfig(**VIT | labels | changes))
    else:
        model = ResNetForImageClassification(ResNetConfig(**RESNET | labels | changes))
    model.save_pretrained(folder)
    if kind in ("llama", "bert", "bert_mlm"):
        tokenizer.save_pretrained(folder)
    return folder


def make_config(kind: str, folder: Path | None, **changes: Any) -> Config:
    """A config for a saved backbone in fp32; `section__key=value` changes one value."""
    fields: dict[str, Any] = {
        "name": "run",
        "seed": 5,
        "model": {"path": str(folder), "dtype": "fp32"},
        "task": {"type": TASKS[kind]},
        "data": {"train": ["rows.jsonl"], "max_length": 64},
        "adapter": {"method": "lora", "rank": 4, "alpha": 8},
        "optimizer": {"name": "adamw"},
        "train": {"max_steps": 1, "global_batch_size": 4},
        "generation": {"max_new_tokens": 4},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = fields
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return Config.model_validate(fields)


def plan_of(config: Config, run_dir: Path) -> Plan:
    resources = Resources(device="cpu", num_devices=0, num_cpus=1, host_memory_bytes=8 << 30)
    return make_plan(config, resources, run_dir=str(run_dir), cwd=str(run_dir))


def randomise_trained(model: torch.nn.Module, *, scale: float = 0.1) -> dict[str, torch.Tensor]:
    """Moves every trained weight away from where it started; returns them as the engine gathers them."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=draw) * scale
                parameter += noise.to(parameter.dtype)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
