"""Toy trainings for the tests of the engines: a tiny Llama, whole or with LoRA, on seeded random tokens."""

from typing import Any

import torch
from burnish.harness.config import Config
from burnish.harness.engine import Engine, World, make_engine
from burnish.harness.plan import Plan
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

GLOBAL_MICRO_BATCHES = 4
VOCAB = 64
LR = 1e-2


def make_config(**changes: Any) -> Config:
    """A config for the engines; `model__dtype="bf16"` changes one value."""
    fields: dict[str, Any] = {
        "name": "toy",
        "model": {"init": {"model_type": "llama"}, "dtype": "fp32"},
        "task": {"type": "causal_lm"},
        "data": {"train": "unused.jsonl"},
        "adapter": {"method": "full"},
        "optimizer": {"name": "adamw", "learning_rate": LR, "weight_decay": 0.1},
        "train": {"max_steps": 100, "max_grad_norm": 1.0},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        fields.setdefault(section, {})[name] = value
    return Config.model_validate(fields)


def make_plan(config: Config, *, stage: int = 0, world: int = 1, engine: str = "torch") -> Plan:
    memory = config.memory
    return Plan(
        config=config,
        run_dir="",
        cwd="",
        device="cpu",
        world_size=world,
        micro_batch_size=2,
        gradient_accumulation_steps=GLOBAL_MICRO_BATCHES // world,
        engine=engine,
        zero_stage=stage,
        offload_optimizer=memory.offload_optimizer if memory.offload_optimizer != "auto" else "none",
        offload_param=memory.offload_param if memory.offload_param != "auto" else "none",
        activation_checkpointing="none",
        offload_activations=False,
        num_threads=1,
        decisions=(),
    )


def make_model(kind: str) -> torch.nn.Module:
    """`full`, `lora` (with dropout 0.1), `buffers` (a small network with BatchNorm), `experts`, or `wide`."""
    torch.manual_seed(0)
    if kind == "buffers":
        return BatchNormToy()
    if kind == "experts":
        return ExpertsToy()
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32 if kind != "wide" else 256,
        intermediate_size=48 if kind != "wide" else 2048,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear"))
    return model.train()


class BatchNormToy(torch.nn.Module):
    """Token embedding -> BatchNorm -> logits [B, T, V]: has running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, 16)
        self.norm = torch.nn.BatchNorm1d(16)
        self.head = torch.nn.Linear(16, VOCAB)

    def forward(self, input_ids: torch.Tensor) -> Any:
        hidden = self.norm(self.embed(input_ids).transpose(1, 2)).transpose(1, 2)
        return {"logits": self.head(hidden)}


class ExpertsToy(torch.nn.Module):
    """Token embedding -> one of three experts -> logits [B, T, V]. Each step uses two, one after the other.

    `step` is set from outside. All ranks use the same expert at the same time, as ZeRO needs it.
    """

    step = 0

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, 16)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(3))
        self.head = torch.nn.Linear(16, VOCAB)

    def forward(self, input_ids: torch.Tensor) -> Any:
        cell = (input_ids.shape[1] - 6) // 2  # of `micro_batch`
        expert = self.experts[(self.step + cell // 2) % 3]
        return {"logits": self.head(torch.tanh(expert(self.embed(input_ids))))}


def micro_batch(step: int, cell: int) -> torch.Tensor:
    """Tokens [2, T] of a global micro-batch; T differs from cell to cell."""
    generator = torch.Generator().manual_seed(1000 * step + cell)
    return torch.randint(0, VOCAB, (2, 6 + 2 * cell), generator=generator)


def loss_sum(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Sum of next-token losses."""
    logits = model(input_ids=tokens)["logits"]
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().reshape(-1, VOCAB), tokens[:, 1:].reshape(-1), reduction="sum"
    )


def train_step(engine: Engine, step: int, rank: int, world: int, *, poison: bool = False) -> tuple[float, float, bool]:
    """One step over the global batch: (loss, gradient norm, skipped). `poison` makes one rank's loss NaN."""
    count = sum(2 * (micro_batch(step, cell).shape[1] - 1) for cell in range(GLOBAL_MICRO_BATCHES))
    total = torch.zeros(1, dtype=torch.float64)
    cells = range(rank, GLOBAL_MICRO_BATCHES, world)
    for cell in cells:
        torch.manual_seed(100 * step + cell)
        loss = loss_sum(engine.module, micro_batch(step, cell)) / count
        if poison and rank == world - 1:
            loss = loss * float("nan")
        engine.backward(loss, is_last=cell == cells[-1])
        total += float(loss.detach())
    result = engine.step(LR * (1 - step / 20))
    return float(engine.all_reduce_sum(total)), result.grad_norm, result.skipped


def new_engine(
    kind: str, *, rank: int = 0, world: int = 1, stage: int = 0, engine: str = "torch", **changes: Any
) -> Engine:
    plan = make_plan(make_config(**changes), stage=stage, world=world, engine=engine)
    return make_engine(plan, make_model(kind), World(rank=rank, local_rank=rank, size=world, device="cpu"))


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    """A copy of the resume state on rank 0; nothing on the others. Collective."""
    return {name: tensor.clone() for name, tensor in engine.state()}
