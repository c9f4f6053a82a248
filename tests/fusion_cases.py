"""Tiny random models of seven families and short trainings of them, with and without our kernels."""

from typing import Any

import torch
import transformers
from burnish.harness import adapters
from burnish.harness.config import Config
from burnish.harness.engine import World, make_engine
from burnish.harness.models import apply_activation_policy, with_kernels
from burnish.harness.plan import Plan
from torch.nn.functional import cross_entropy

VOCAB, ROWS, TOKENS, LR = 64, 4, 12, 1e-2
TEXT = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
ENCODER = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
T5 = {"vocab_size": VOCAB, "d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
T5 |= {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "tie_word_embeddings": False}
VIT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "image_size": 8}
VIT |= {"patch_size": 4, "num_channels": 1} | ENCODER
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", TEXT | {"head_dim": 16}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        TEXT | {"head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT | ENCODER),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
}
"""Family -> class of the model, class of its config, fields of the config."""
TASKS = {"bert": "sequence_classification", "vit": "image_classification"}


def make_config(family: str, method: str, *, p: float = 0.0, enabled: bool = True) -> Config:
    return Config.model_validate(
        {
            "name": "toy",
            "seed": 3,
            "model": {"path": "unused", "dtype": "fp32"},
            "quantization": {"type": "nf4" if method == "qlora" else "none"},
            "task": {"type": TASKS.get(family, "causal_lm")},
            "data": {"train": "unused.jsonl"},
            "adapter": {"method": method, "rank": 4, "alpha": 8, "dropout": p},
            "optimizer": {"name": "adamw", "learning_rate": LR},
            "train": {"max_steps": 100},
            "kernels": {"enabled": enabled},
        }
    )


def make_model(family: str, config: Config) -> Any:
    """The family's model with adapters whose B is not zero, fused where the config says so."""
    kind, kind_of_config, fields = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, kind_of_config)(**fields))
    with torch.no_grad():
        for parameter in model.parameters():  # so that every layer matters and gates are off zero
            parameter.add_(torch.randn_like(parameter) * (0.02 if family == "t5" else 0.1))  # T5 scales no logits
    model.new_modules = ()
    if config.quantization.type == "nf4":
        quantization = adapters.quantization_config(config, skip=adapters.head_names(model))
        model = type(model).from_pretrained(
            None, config=model.config, state_dict=model.state_dict(), quantization_config=quantization,
            device_map={"": "cpu"}, dtype=torch.float32,
        )  # fmt: skip
        adapters.keep_nf4_layout(model)
    model = adapters.adapt(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return with_kernels(model, config).train()


def batch_of(family: str, step: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Inputs of ROWS examples, and the class or tokens to predict."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(1, VOCAB, (ROWS, TOKENS), generator=draw)
    if family == "vit":
        return {"pixel_values": torch.randn(ROWS, 1, 8, 8, generator=draw)}, ids[:, 0] % 3
    if family == "bert":
        mask = (torch.arange(TOKENS) < torch.tensor([[TOKENS], [7], [9], [4]])).long()
        return {"input_ids": ids, "attention_mask": mask}, ids[:, 0] % 3
    if family == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}, ids
    return {"input_ids": ids}, ids.roll(-1, 1)


def loss_sum(model: Any, family: str, step: int, rows: slice) -> tuple[torch.Tensor, int]:
    """Summed loss of some rows of a step's batch, and the number of targets in the whole batch."""
    inputs, targets = batch_of(family, step)
    logits = model(**{name: value[rows] for name, value in inputs.items()}).logits
    return cross_entropy(logits.flatten(0, -2), targets[rows].flatten(), reduction="sum"), targets.numel()


def make_plan(config: Config, *, world: int, stage: int, policy: str) -> Plan:
    return Plan(
        config=config,
        run_dir="",
        cwd="",
        device="cpu",
        world_size=world,
        micro_batch_size=ROWS // world,
        gradient_accumulation_steps=1,
        engine="deepspeed" if world > 1 else "torch",
        zero_stage=stage,
        offload_optimizer="none",
        offload_param="none",
        activation_checkpointing=policy,
        offload_activations=False,
        num_threads=1,
        decisions=(),
    )


def train(
    family: str,
    method: str,
    *,
    rank: int = 0,
    world: int = 1,
    stage: int = 0,
    policy: str = "none",
    p: float = 0.0,
    enabled: bool = True,
    steps: int = 10,
) -> list[float]:
    """The losses of a short training."""
    config = make_config(family, method, p=p, enabled=enabled)
    model = make_model(family, config)
    apply_activation_policy(model, policy)
    plan = make_plan(config, world=world, stage=stage, policy=policy)
    engine = make_engine(plan, model, World(rank=rank, local_rank=rank, size=world, device="cpu"))
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        loss, count = loss_sum(engine.module, family, step, slice(rank, None, world))
        engine.backward(loss / count, is_last=True)
        engine.step(LR)
        total = engine.all_reduce_sum(torch.tensor([float(loss.detach()) / count], dtype=torch.float64))
        found.append(float(total))
    engine.close()
    return found
