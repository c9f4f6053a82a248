"""What the memory benchmark measures where: methods, budgets, models, and how long it may take. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from .benchmark import Choice, Item
from .workload import MODELS, llama

SEPARATOR = " · "
GB, GIB, MIB = 10**9, 2**30, 2**20
Init = dict[str, Any]


def longer(init: Mapping[str, Any], **changes: int) -> Init:
    """The same for sequences of up to 2^19 tokens: nothing in its weights depends on the length."""
    return dict(init) | {"max_position_embeddings": 2**19} | changes


LLAMA_8B, LLAMA_70B_LAYER = MODELS["llama-8b"]["init"], MODELS["llama-70b-1-layer"]["init"]
INITS: dict[str, Init] = {
    "smollm2-135m": llama(576, 1536, 30, 9, 3),
    "smollm2-135m-10-layers": llama(576, 1536, 10, 9, 3),
    "llama-8b": longer(LLAMA_8B),
    "llama-70b": longer(LLAMA_70B_LAYER, num_hidden_layers=80),
}
"""Models of the question for the longest sequence. One that is cut to some layers says so."""
LADDERS: dict[str, dict[str, Init]] = {
    "cpu": {
        "50M": llama(512, 1408, 8, 8, 4),
        "135M": INITS["smollm2-135m"],
        "360M": llama(960, 2560, 32, 15, 5),
        "0.6B": llama(1280, 3456, 31, 20, 5),
        "1.0B": llama(1536, 4096, 36, 24, 8),
        "1.5B": llama(2048, 5632, 30, 32, 8),
    },
    "cuda": {
        "1B": longer(MODELS["llama-1b"]["init"]),
        "3B": longer(LLAMA_8B, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24),
        "8B": longer(LLAMA_8B),
        "13B": longer(
            LLAMA_8B, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
        ),
        "32B": longer(
            LLAMA_8B, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40
        ),
        "70B": longer(LLAMA_70B_LAYER, num_hidden_layers=80),
    },
}
"""Models of the question for the largest one, by growing size."""

QUICK_METHODS = ("peft", "peft-gc", "burnish", "burnish-full-gc")
OTHER_METHODS = ("peft-bf16", "sft", "peft-qlora-gc", "burnish-qlora", "burnish-qlora-gc")
MODEL_METHODS = {
    "cpu": ("peft", "peft-qlora-gc", "burnish", "burnish-qlora-gc"),
    "cuda": ("peft-gc", "peft-qlora-gc", "burnish-full-gc", "burnish-qlora-gc"),
}
QLORA_METHODS = ("peft-qlora-gc", "burnish-qlora", "burnish-qlora-gc")
COUNTERPARTS = {
    "peft": "burnish",
    "peft-bf16": "burnish",
    "peft-gc": "burnish-full-gc",
    "sft": "burnish-full-gc",
    "peft-qlora-gc": "burnish-qlora-gc",
}
"""Method -> that of burnish which gives up the same for memory; SFTTrainer checkpoints by default."""
COMMON_TOKENS = {"cpu": (256, 1024), "cuda": (2048, 8192)}
"""Lengths that every method is probed at, before any search."""
MODEL_TOKENS = {"cpu": 256, "cuda": 2048}
RANKS = {"cpu": 16, "cuda": 32}
COSTS_S = {("length", "cpu"): 50.0, ("model", "cpu"): 35.0, ("length", "cuda"): 35.0, ("model", "cuda"): 150.0}
QUICK_COST_S = {"cpu": 15.0, "cuda": 30.0}
LONGEST_COST_S = 90.0
"""On a GPU, of the method with the longest sequences: attention takes the square of the length."""


def params_of(init: Mapping[str, Any]) -> int:
    """Number of weights of a Llama."""
    hidden, head_dim = init["hidden_size"], init["hidden_size"] // init["num_attention_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * head_dim * init["num_key_value_heads"]
    layer = attention + 3 * hidden * init["intermediate_size"] + 2 * hidden
    embeddings = init["vocab_size"] * hidden * (1 if init["tie_word_embeddings"] else 2)
    return int(embeddings + init["num_hidden_layers"] * layer + hidden)


def budget_text(num_bytes: int) -> str:
    """`512 MiB` or `1 GiB` of a host, `24 GB` of a GPU: a card sold as 24 GB has 24 GiB."""
    if num_bytes % GB == 0:
        return f"{num_bytes // GB} GB"
    return f"{num_bytes // GIB} GiB" if num_bytes % GIB == 0 else f"{num_bytes // MIB} MiB"


def budget_bytes(text: str) -> int:
    """What `budget_text` made the text of."""
    value, unit = text.split()
    return int(value) * {"GB": GB, "GiB": GIB, "MiB": MIB}[unit]


def items(device: str, choice: Choice) -> list[Item]:
    """One item for each question and method; it has a row for each budget."""
    quick = choice.is_quick
    if device == "cpu":
        if quick:
            return lengths("smollm2-135m-10-layers", QUICK_METHODS, (384 * MIB,), device, quick)
        return [
            *lengths("smollm2-135m", QUICK_METHODS, (GIB, 2 * GIB), device, quick),
            *lengths("smollm2-135m", OTHER_METHODS, (GIB,), device, quick),
            *models(MODEL_METHODS["cpu"], (GIB,), device, quick),
        ]
    budgets = tuple(gb * GB for gb in ((8, 12, 16, 24) if quick else (8, 12, 16, 24, 40, 48, 80)))
    found = lengths("llama-8b", QLORA_METHODS, budgets, device, quick)
    if not quick:
        found += models(MODEL_METHODS["cuda"], (24 * GB, 48 * GB, 80 * GB), device, quick)
        found += lengths("llama-70b", QLORA_METHODS, (48 * GB, 80 * GB), device, quick)
    return found


def lengths(model: str, methods: Sequence[str], budgets: Sequence[int], device: str, is_quick: bool) -> list[Item]:
    what = {"kind": "length", "model": model, "budgets": list(budgets)}
    return [item(f"length{SEPARATOR}{model}", method, what, device, is_quick) for method in methods]


def models(methods: Sequence[str], budgets: Sequence[int], device: str, is_quick: bool) -> list[Item]:
    what = {"kind": "model", "tokens": MODEL_TOKENS[device], "budgets": list(budgets)}
    return [item(f"model{SEPARATOR}{what['tokens']} tokens", method, what, device, is_quick) for method in methods]


def item(question: str, method: str, what: Mapping[str, Any], device: str, is_quick: bool) -> Item:
    key = f"{question}{SEPARATOR}{method}"
    rows = tuple(f"{key}{SEPARATOR}{budget_text(budget)}" for budget in what["budgets"])
    cost_s = QUICK_COST_S[device] if is_quick else COSTS_S[what["kind"], device]
    if device == "cuda" and method == "burnish-qlora-gc" and not is_quick:
        cost_s = max(cost_s, LONGEST_COST_S)
    return Item(key, rows, {**what, "method": method, "rank": RANKS[device]}, cost_s)
