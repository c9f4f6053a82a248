"""The ways to take a training step that the benchmark knows, by name: one line for each. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any


@dataclass(frozen=True)
class Mode:
    """`function` of `module` takes a Workload, Turns and the options, and steps until Turns raises Finished."""

    summary: str
    module: str
    function: str
    options: Mapping[str, Any] = field(default_factory=dict)
    keeps_memory: bool = False
    """Whether freed memory stays with the process, see harness.allocator."""
    needs: tuple[str, ...] = ()
    """Packages it cannot do without and that burnish itself does not need on every machine."""
    is_quantized: bool = False
    """Whether the frozen linear layers are nf4."""

    @property
    def is_slow_to_start(self) -> bool:
        """Whether the first step takes a minute or more on a CPU."""
        return bool(self.options.get("is_compiled"))

    def missing(self) -> list[str]:
        """The packages of `needs` that are not installed."""
        return [name for name in self.needs if find_spec(name) is None]


def _peft(summary: str, *, keeps_memory: bool = False, **options: Any) -> Mode:
    return Mode(summary, ".peers", "run_peft", options, keeps_memory=keeps_memory)


def _peft_qlora(summary: str, **options: Any) -> Mode:
    options = FP32_ADAPTERS | {"is_quantized": True} | options
    return Mode(summary, ".peers", "run_peft", options, needs=("bitsandbytes",), is_quantized=True)


def _burnish(summary: str, **options: Any) -> Mode:
    return Mode(summary, ".own", "run_burnish", options, keeps_memory=True)


def _burnish_qlora(summary: str, **options: Any) -> Mode:
    options = {"method": "qlora"} | options
    return Mode(summary, ".own", "run_burnish", options, keeps_memory=True, needs=("bitsandbytes",), is_quantized=True)


FP32_ADAPTERS: dict[str, Any] = {"has_fp32_adapters": True, "autocast": True}
BF16_ADAPTERS: dict[str, Any] = {"has_fp32_adapters": False, "autocast": False}
MODES = {
    "peft": _peft("PEFT as installed: fp32 adapters, bf16 autocast", **FP32_ADAPTERS),
    "peft-bf16": _peft("PEFT, bf16 adapters", **BF16_ADAPTERS),
    "peft+malloc": _peft("peft, freed memory kept", keeps_memory=True, **FP32_ADAPTERS),
    "peft-bf16+malloc": _peft("peft-bf16, freed memory kept", keeps_memory=True, **BF16_ADAPTERS),
    "peft-compile": _peft("peft-bf16 under torch.compile", is_compiled=True, **BF16_ADAPTERS),
    "peft-gc": _peft("peft with gradient checkpointing", has_checkpointing=True, **FP32_ADAPTERS),
    "peft-qlora": _peft_qlora("PEFT QLoRA: nf4, double quantisation, bf16 autocast"),
    "peft-qlora-gc": _peft_qlora("peft-qlora with gradient checkpointing", has_checkpointing=True),
    "sft": Mode("TRL SFTTrainer, its defaults", ".trainers", "run_sft", needs=("trl",)),
    "sft-liger": Mode(
        "sft with Liger-Kernel", ".trainers", "run_sft", {"is_liger": True}, needs=("trl", "liger_kernel")
    ),
    "hf-deepspeed": Mode(
        "transformers Trainer, PEFT, DeepSpeed ZeRO-2", ".trainers", "run_deepspeed", needs=("deepspeed",)
    ),
    "unsloth": Mode("Unsloth and SFTTrainer", ".peer_unsloth", "run_unsloth", needs=("unsloth",)),
    "unsloth-qlora": Mode(
        "Unsloth and SFTTrainer, nf4",
        ".peer_unsloth",
        "run_unsloth",
        {"is_quantized": True},
        needs=("unsloth",),
        is_quantized=True,
    ),
    "fp32": _peft("PEFT, everything in fp32", is_fp32=True, **BF16_ADAPTERS),
    "burnish": _burnish("burnish"),
    "burnish-unfused": _burnish("burnish, fused kernels off", is_fused=False),
    "burnish-full-gc": _burnish("burnish, full activation checkpointing", checkpointing="full"),
    "burnish-qlora": _burnish_qlora("burnish, nf4 with double quantisation"),
    "burnish-qlora-gc": _burnish_qlora("burnish-qlora, full activation checkpointing", checkpointing="full"),
}
