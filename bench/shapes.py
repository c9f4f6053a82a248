"""Real model shapes, and the cases of every operation in them. No measuring here.

Shape letters: M tokens, r rank of the low-rank updates.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..kernels.op import Case, Op
from ..kernels.registry import OPS
from .benchmark import Choice, Item

P = 0.1
"""Dropout of the low-rank path, as in LoRAFusion's measurements."""
NUM_ADAPTERS = 8


@dataclass(frozen=True)
class Shape:
    """A decoder with grouped keys and values."""

    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    num_layers: int

    @property
    def queries(self) -> int:
        """Features of all queries together."""
        return self.num_heads * self.head_dim

    @property
    def keys(self) -> int:
        """Features of all keys, or all values, together."""
        return self.num_kv_heads * self.head_dim


SHAPES = {
    "smollm2-135m": Shape(576, 1536, 9, 3, 64, 49152, 30),
    "llama-1b": Shape(2048, 8192, 32, 8, 64, 128256, 16),
    "llama-3b": Shape(3072, 8192, 24, 8, 128, 128256, 28),
    "llama-8b": Shape(4096, 14336, 32, 8, 128, 128256, 32),
    "llama-70b": Shape(8192, 28672, 64, 8, 128, 128256, 80),
    "qwen-32b": Shape(5120, 27648, 40, 8, 128, 152064, 64),
}
"""Llama 3.2 1B and 3B, 3.1 8B and 70B, Qwen 2.5 32B and SmolLM2-135M, from their published configurations."""

Cases = Iterator[tuple[str, Case]]
"""(what of the model, case) of an operation."""


def _linears(shape: Shape) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Inputs and outputs of the linears of a layer, those that share an input together."""
    return {
        "qkv": (shape.hidden, (shape.queries, shape.keys, shape.keys)),
        "o": (shape.queries, (shape.hidden,)),
        "gate+up": (shape.hidden, (shape.intermediate,) * 2),
        "down": (shape.intermediate, (shape.hidden,)),
    }


def _lora_linear(shape: Shape, M: int, r: int) -> Cases:
    linears = _linears(shape)
    for name, (K, N) in linears.items():
        yield name, {"M": M, "K": K, "N": N, "r": r, "p": P}
    for name in ("qkv", "gate+up"):
        yield name, {"M": M, "K": linears[name][0], "N": linears[name][1], "r": r, "p": 0.0}


def _norm(shape: Shape, M: int, r: int) -> Cases:
    yield "", {"M": M, "K": shape.hidden, "residual": True}
    yield "+ shrink", {"M": M, "K": shape.hidden, "residual": True, "ranks": (r,) * 3, "p": P}


def _glu(shape: Shape, M: int, r: int) -> Cases:
    yield "", {"M": M, "F": shape.intermediate, "activation": "silu"}
    yield "+ shrink", {"M": M, "F": shape.intermediate, "activation": "silu", "r": (r,), "p": P}


def _linear_cross_entropy(shape: Shape, M: int, r: int) -> Cases:
    yield "", {"M": M, "K": shape.hidden, "V": shape.vocab}


def _sequences(M: int) -> tuple[int, int]:
    """(sequences, tokens of each)."""
    length = 2048 if M >= 4096 else 256
    return max(1, M // length), length


def _rope(shape: Shape, M: int, r: int) -> Cases:
    B, T = _sequences(M)
    heads = shape.num_heads + shape.num_kv_heads
    yield "", {
        "B": B, "T": T, "H": heads + shape.num_kv_heads, "D": shape.head_dim, "E": shape.head_dim // 2, "heads": heads,
        "layout": "packed",
    }  # fmt: skip


def _attention(shape: Shape, M: int, r: int) -> Cases:
    B, T = _sequences(M)
    yield "causal", {"B": B, "T": T, "H": shape.num_heads, "Hk": shape.num_kv_heads, "D": shape.head_dim,
                     "mask": "causal"}  # fmt: skip


def _dora(shape: Shape, M: int, r: int) -> Cases:
    for p in (P, 0.0):
        yield "o", {"M": M, "K": shape.queries, "N": shape.hidden, "r": r, "p": p}


def _dora_norm(shape: Shape, M: int, r: int) -> Cases:
    yield "up", {"N": shape.intermediate, "K": shape.hidden, "r": r}
    yield "up in NF4", {"N": shape.intermediate, "K": shape.hidden, "r": r, "nf4": "nested"}


def _dropout(shape: Shape, M: int, r: int) -> Cases:
    yield "", {"M": M, "K": shape.hidden, "p": P}


def _lora_grads(shape: Shape, M: int, r: int) -> Cases:
    yield "o", {"M": M, "K": shape.queries, "N": shape.hidden, "r": r, "p": P}


def _multi_lora(shape: Shape, M: int, r: int) -> Cases:
    offsets = tuple(i * M // NUM_ADAPTERS for i in range(NUM_ADAPTERS + 1))
    case = {"M": M, "K": shape.queries, "N": shape.hidden, "ranks": (r,) * NUM_ADAPTERS, "offsets": offsets, "p": (P,)}
    yield f"{NUM_ADAPTERS} x o", case


def _nf4_dequant(shape: Shape, M: int, r: int) -> Cases:
    for name, N, K in (
        ("up", shape.intermediate, shape.hidden),
        ("q", shape.queries, shape.hidden),
        ("k", shape.keys, shape.hidden),
        ("down", shape.hidden, shape.intermediate),
    ):
        yield name, {"N": N, "K": K, "blocksize": 64, "nested": True}
    yield "up, not nested", {"N": shape.intermediate, "K": shape.hidden, "blocksize": 64, "nested": False}


def _nf4_quantize(shape: Shape, M: int, r: int) -> Cases:
    yield "up", {"N": shape.intermediate, "K": shape.hidden, "blocksize": 64, "nested": True}


def _adapter_adamw(shape: Shape, M: int, r: int) -> Cases:
    pairs = [(K, width) for K, widths in _linears(shape).values() for width in widths]
    layer = tuple(side for K, N in pairs for side in ((r, K), (N, r)))
    yield "all linears", {"shapes": layer * shape.num_layers, "num_steps": 10, "max_grad_norm": 1.0}


CASES: Mapping[str, Callable[[Shape, int, int], Cases]] = {
    "adapter_adamw": _adapter_adamw,
    "attention": _attention,
    "dora": _dora,
    "dora_norm": _dora_norm,
    "dropout": _dropout,
    "glu": _glu,
    "layer_norm": _norm,
    "linear_cross_entropy": _linear_cross_entropy,
    "lora_grads": _lora_grads,
    "lora_linear": _lora_linear,
    "multi_lora": _multi_lora,
    "nf4_dequant": _nf4_dequant,
    "nf4_quantize": _nf4_quantize,
    "rms_norm": _norm,
    "rope": _rope,
}
"""An operation that is missing is measured on the bench_cases of its record."""
RANKED = {"adapter_adamw", "dora_norm"}
"""Operations whose case holds the rank under no letter, or no M beside it."""
FIRST = ("lora_linear", "linear_cross_entropy", "nf4_dequant", "glu", "rms_norm")
"""What is measured on every model, the most important first."""
SWEPT = ("qkv", "gate+up")
"""The linears of the sweeps."""


CPU_LIMITS = {"B": 4, "T": 512, "S": 512, "M": 1024, "K": 576, "N": 1536, "F": 1536, "V": 49152, "shapes": 576}
"""Largest value of a shape letter on a CPU where CASES has no shapes of the operation: those of SmolLM2-135M."""
MAX_PARTS = 64
"""Most tensors of an optimizer in a case that was made smaller."""


def cases_of(op: Op, model: str, M: int, r: int, *, device: str) -> list[tuple[str, Case]]:
    """(label, case) of an operation: "llama-8b qkv" and its shape letters."""
    if op.name not in CASES:
        found = [case if device == "cuda" else smaller(case, CPU_LIMITS) for case in op.bench_cases]
        return [(describe(case), case) for case in found]
    return [(f"{model} {what}".rstrip(), case) for what, case in CASES[op.name](SHAPES[model], M, r)]


def smaller(case: Case, limits: Mapping[str, int]) -> Case:
    """The case within the limits; `offsets`, which cut the M rows into parts, shrink with M."""
    found = {key: _limited(value, limits[key]) if key in limits else value for key, value in case.items()}
    if "shapes" in limits and "shapes" in case:
        found["shapes"] = found["shapes"][:MAX_PARTS]
    if "offsets" in case:
        found["offsets"] = tuple(row * found["M"] // case["M"] for row in case["offsets"])
    return found


def _limited(value: Any, limit: int) -> Any:
    return tuple(_limited(part, limit) for part in value) if isinstance(value, tuple | list) else min(value, limit)


def describe(case: Case) -> str:
    """The case in a few words; of long tuples only the number of parts."""
    return " ".join(f"{key}={value}" for key, value in brief(case).items())


def brief(case: Case) -> dict[str, Any]:
    """The case for a file: long tuples become the number of their parts."""
    return {key: f"{len(value)} parts" if str(value).count(",") > 9 else value for key, value in case.items()}


def item(op: Op, label: str, case: Case, *, r: int, is_compiled: bool, device: str) -> Item:
    """The key names what of the case the label does not: "lora_linear · llama-8b qkv · M=8192 r=16"."""
    parts = []
    if "T" in case:
        parts.append(f"{case['B']}x{case['T']}")
    if "M" in case:
        parts.append(f"M={case['M']}")
    if op.name in RANKED or any(letter in case for letter in ("r", "ranks")):
        parts.append(f"r={r}")
    if case.get("p") == 0:
        parts.append("p=0")
    key = " · ".join(filter(None, (op.name, label, " ".join(parts) if op.name in CASES else "")))
    what = {"op": op.name, "label": label, "case": case, "is_compiled": is_compiled}
    return Item(key, (key,), what, cost_s=_cost_s(op, case, device=device, is_compiled=is_compiled))


COST_S = {"cpu": 3.0, "cuda": 0.7}
COMPILE_S = {"cpu": 8.0, "cuda": 5.0}
SLOW_FLOPS_PER_S = {"cpu": 1e10, "cuda": 5e12}
"""What all contenders, rounds and the check in fp64 together come to."""


def _cost_s(op: Op, case: Case, *, device: str, is_compiled: bool) -> float:
    work_s = op.num_flops(case) / SLOW_FLOPS_PER_S[device] if op.num_flops else 0.0
    return COST_S[device] + work_s + (COMPILE_S[device] if is_compiled else 0.0)


def items(device: str, choice: Choice) -> list[Item]:
    """What is measured there, the most important first: a limit of time cuts the end."""
    found = _gpu_items(choice.is_quick) if device == "cuda" else _cpu_items(choice.is_quick)
    by_key: dict[str, Item] = {}
    for one in found:
        by_key.setdefault(one.key, one)
    return list(by_key.values())


def _of(name: str, model: str, *, device: str, M: int = 8192, r: int = 16, num_compiled: int = 0) -> list[Item]:
    """The cases of an operation in a model; the first `num_compiled` also against torch.compile."""
    return [
        item(OPS[name], label, case, r=r, is_compiled=i < num_compiled, device=device)
        for i, (label, case) in enumerate(cases_of(OPS[name], model, M, r, device=device))
    ]


def _gpu_items(is_quick: bool) -> Iterator[Item]:
    for name in _ordered():
        count = 4 if name == "lora_linear" else 2
        yield from _of(name, "llama-8b", device="cuda", num_compiled=0 if is_quick else count)
    if is_quick:
        return
    for name in _first():
        for model in ("llama-1b", "llama-3b", "llama-70b", "qwen-32b"):
            found = _of(name, model, device="cuda")
            yield from found if name == "lora_linear" else found[:1]
    if "lora_linear" in OPS:
        for M in (1024, 2048, 4096, 16384):
            yield from _swept(_of("lora_linear", "llama-8b", device="cuda", M=M))
        for r in (8, 32, 64, 128):
            yield from _swept(_of("lora_linear", "llama-8b", device="cuda", r=r))


def _cpu_items(is_quick: bool) -> Iterator[Item]:
    for name in _ordered():
        found = _of(name, "smollm2-135m", device="cpu", M=1024, num_compiled=0 if is_quick else 1)
        yield from found[:1] if is_quick else found
    if is_quick:
        return
    for name in _first():
        # The head of a large vocabulary takes ten times as long as anything else.
        M = 256 if name == "linear_cross_entropy" else 1024
        yield from _of(name, "llama-1b", device="cpu", M=M)[: 4 if name == "lora_linear" else 1]
    if "lora_linear" in OPS:
        for r in (8, 32, 64, 128):
            yield from _swept(_of("lora_linear", "smollm2-135m", device="cpu", M=1024, r=r))


def _swept(found: list[Item]) -> list[Item]:
    return [one for one in found if one.what["label"].endswith(SWEPT) and one.what["case"]["p"] > 0]


def _first() -> list[str]:
    return [name for name in FIRST if name in OPS]


def _ordered() -> list[str]:
    return [*_first(), *(name for name in OPS if name not in FIRST)]
