"""The configurations of the step benchmark: which model, batch and modes are measured together. Imports no torch.

On a GPU the checks of a case run `num_checks_at_once` at a time, each with its activations: with 8192 tokens PEFT needs
about 4 GB of weights and 16 GB of activations for 1B, 16 and 80 GB for 8B, 8 and 30 GB for two layers of 70B. A step
takes 0.1 to 1 s there and a process 15 s to start, so that few modes and rounds are taken: 30 to 75 s for each case and
4 minutes together, the most important first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..harness.errors import ConfigError
from .benchmark import Choice, Item
from .modes import MODES
from .suite import did_you_mean
from .workload import DEFAULT_BATCH, DEFAULT_MODEL, MODELS, Workload, model_named, parse_batch

SEPARATOR = " · "


@dataclass(frozen=True)
class Case:
    """`baseline` is what ratios are over, `own` burnish's mode that the others are compared with (None: none)."""

    name: str
    model: Mapping[str, Any]
    batch: str
    modes: tuple[str, ...]
    baseline: str
    own: str | None
    num_rounds: int = 5
    num_warmup: int = 2
    num_checks_at_once: int = 2
    cost_s: float = 60.0

    def workload(self, num_threads: int) -> Workload:
        num_sequences, length = parse_batch(self.batch)
        return Workload(
            model=dict(self.model), num_sequences=num_sequences, length=length, num_threads=max(1, num_threads)
        )

    def item(self) -> Item:
        return Item(self.name, tuple(row_key(self.name, mode) for mode in self.modes), asdict(self), self.cost_s)


def row_key(case: str, mode: str) -> str:
    return f"{case}{SEPARATOR}{mode}"


def case_and_mode(key: str) -> tuple[str, str]:
    case, _, mode = key.rpartition(SEPARATOR)
    return case, mode


def lora(model: str, batch: str, *modes: str, **options: Any) -> Case:
    case = f"{model} lora {batch}"
    return Case(case, MODELS[model], batch, (*modes, "burnish"), baseline="peft", own="burnish", **options)


def qlora(model: str, batch: str, *modes: str, own: Sequence[str] = ("burnish-qlora",), **options: Any) -> Case:
    case, modes = f"{model} qlora {batch}", (*modes, *own)
    return Case(case, MODELS[model], batch, modes, baseline="peft-qlora-gc", own="burnish-qlora", **options)


QUICK_MODES = ("peft", "peft-bf16", "sft", "burnish")
QUICK = [lora("smollm2-135m", "4x256", *QUICK_MODES[:-1], num_rounds=3, num_warmup=1, cost_s=150)]
CPU = [
    lora(
        "smollm2-135m",
        "4x256",
        *("peft", "peft-bf16", "peft+malloc", "peft-bf16+malloc", "sft", "hf-deepspeed", "peft-compile"),
        cost_s=560,
    ),
    qlora(
        "smollm2-135m",
        "4x256",
        *("peft-qlora", "peft-qlora-gc"),
        own=("burnish-qlora", "burnish-qlora-gc"),
        cost_s=170,
    ),
]
GPU = [
    lora(
        "llama-8b",
        "4x2048",
        *("peft", "peft-bf16", "sft-liger", "unsloth"),
        num_rounds=3,
        num_warmup=1,
        num_checks_at_once=1,
        cost_s=75,
    ),
    qlora(
        "llama-8b",
        "4x2048",
        *("peft-qlora-gc", "unsloth-qlora"),
        num_rounds=3,
        num_warmup=1,
        num_checks_at_once=1,
        cost_s=50,
    ),
    lora(
        "llama-1b",
        "4x2048",
        *("peft", "peft-bf16", "sft", "sft-liger", "hf-deepspeed", "unsloth"),
        num_warmup=1,
        num_checks_at_once=4,
        cost_s=50,
    ),
    lora(
        "llama-70b-2-layers",
        "4x2048",
        *("peft", "peft-bf16", "peft-compile", "sft-liger"),
        num_warmup=1,
        num_checks_at_once=3,
        cost_s=45,
    ),
    qlora("llama-70b-2-layers", "4x2048", "peft-qlora-gc", num_warmup=1, num_checks_at_once=2, cost_s=30),
]
CASES = {"cpu": CPU, "cuda": GPU}


def cases(device: str, choice: Choice) -> list[Case]:
    """What is measured there, or the one case that the user's options make. Raises ConfigError."""
    if choice.modes or choice.baseline or choice.model or choice.batch:
        return [custom(device, choice)]
    return QUICK if device == "cpu" and choice.is_quick else CASES[device]


def custom(device: str, choice: Choice) -> Case:
    """Raises ConfigError for a mode or a model there is not, and a baseline that is not among the modes."""
    modes = tuple(dict.fromkeys(choice.modes)) or QUICK_MODES
    baseline = choice.baseline or ("peft" if "peft" in modes else modes[0])
    check_names([*modes, baseline])
    if baseline not in modes:
        raise ConfigError(f"--baseline {baseline} is not among the modes {','.join(modes)}")
    batch, model = choice.batch or DEFAULT_BATCH, choice.model or DEFAULT_MODEL
    parse_batch(batch)
    own = [mode for mode in modes if mode.startswith("burnish")]
    return Case(
        name=f"{model if model in MODELS else Path(model).name} {batch}",
        model=model_named(model),
        batch=batch,
        modes=modes,
        baseline=baseline,
        own=own[0] if own else None,
        num_rounds=3 if choice.is_quick else 5,
        num_checks_at_once=2 if device == "cpu" else 1,
        cost_s=40.0 * len(modes),
    )


def check_names(modes: Sequence[str]) -> None:
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"{mode!r} is no mode of the step benchmark{did_you_mean(mode, MODES)}")
