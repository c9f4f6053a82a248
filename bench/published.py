"""What other projects publish about memory, as they print it; nothing here was measured by burnish.

Each entry names its source. GB are the publisher's: the memory of the card.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

UNSLOTH_CONTEXT = (
    "Unsloth documentation, page Unsloth Benchmarks (unsloth.ai/docs/basics/unsloth-benchmarks), 80 GB A100"
)
UNSLOTH_MINIMUM = "Unsloth documentation, page Unsloth Requirements (approximate minimum VRAM)"
LLAMA_FACTORY = "LLaMA-Factory wiki, page Performance comparison (github.com/hiyouga/LLaMA-Factory/wiki), A100 40 GB"
CONTEXT_SETTINGS = "QLoRA of rank 32 on all linear layers, batch size 1, padded"
CURVE_SETTINGS = "Llama-2-7B, QLoRA of rank 8, batch size 1"


@dataclass(frozen=True)
class Context:
    """The longest sequence on a card; `max_tokens` None: out of memory. `method`: the mode here that is its like."""

    model: str
    label: str
    method: str
    budget_gb: float
    max_tokens: int | None
    source: str = UNSLOTH_CONTEXT


def _contexts(model: str, label: str, method: str, lengths: dict[float, int | None]) -> list[Context]:
    return [Context(model, label, method, budget, length) for budget, length in lengths.items()]


CONTEXTS: tuple[Context, ...] = (
    *_contexts(
        "llama-8b",
        "Unsloth",
        "burnish-qlora-gc",
        {8: 2972, 12: 21848, 16: 40724, 24: 78475, 40: 153977, 48: 191728, 80: 342733},
    ),
    *_contexts(
        "llama-8b",
        "transformers + FlashAttention 2",
        "peft-qlora-gc",
        {8: None, 12: 932, 16: 2551, 24: 5789, 40: 12264, 48: 15502, 80: 28454},
    ),
    *_contexts("llama-70b", "Unsloth", "burnish-qlora-gc", {48: 12106, 80: 89389}),
    *_contexts("llama-70b", "transformers + FlashAttention 2", "peft-qlora-gc", {48: None, 80: 6916}),
)
"""Llama 3.1 8B and Llama 3.3 70B."""

MINIMUM_GB: dict[str, dict[str, float]] = {
    "3B": {"QLoRA": 3.5, "LoRA in 16 bits": 8},
    "7B": {"QLoRA": 5, "LoRA in 16 bits": 19},
    "8B": {"QLoRA": 6, "LoRA in 16 bits": 22},
    "14B": {"QLoRA": 8.5, "LoRA in 16 bits": 33},
    "32B": {"QLoRA": 26, "LoRA in 16 bits": 76},
    "70B": {"QLoRA": 41, "LoRA in 16 bits": 164},
    "405B": {"QLoRA": 237, "LoRA in 16 bits": 950},
}
"""UNSLOTH_MINIMUM; for sequences of a length that the page does not say."""

CURVE_TOKENS = ("1k", "2k", "4k", "8k", "16k", "32k", "64k", "100k")
CURVES_GB: dict[str, tuple[float | None, ...]] = {
    "transformers + FlashAttention 2": (6, 7, 9, 12, 19, 32, None, None),
    "Unsloth": (5, 6, 7, 8, 10, 16, 25, 37),
}
"""LLAMA_FACTORY, CURVE_SETTINGS: GB at CURVE_TOKENS; None: out of memory."""


def contexts(model: str, method: str, budget_bytes: int) -> list[Context]:
    """The published figures that a row of this benchmark stands beside."""
    wanted = (model, method, budget_bytes)
    return [one for one in CONTEXTS if (one.model, one.method, round(one.budget_gb * 1e9)) == wanted]


def as_fields(found: Sequence[Context]) -> list[dict[str, Any]] | None:
    """The `published` of a row, as JSON; None where nothing is published."""
    fields = [
        {
            "label": one.label,
            "max_tokens": one.max_tokens,
            "budget_bytes": round(one.budget_gb * 1e9),
            "source": f"published: {one.source}, {CONTEXT_SETTINGS}",
        }
        for one in found
    ]
    return fields or None


def as_text(found: Sequence[Context]) -> str:
    """`Unsloth 78,475` for a cell of a table; a dash where nothing is published."""
    shown = [f"{one.label} {'out of memory' if one.max_tokens is None else f'{one.max_tokens:,}'}" for one in found]
    return ", ".join(shown) or "–"
