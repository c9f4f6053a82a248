"""The ways to take a training step that the benchmark knows, by name: one line for each. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
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


def _peft(summary: str, *, keeps_memory: bool = False, **options: Any) -> Mode:
    return Mode(summary, ".peers", "run_peft", options, keeps_memory=keeps_memory)


FP32_ADAPTERS: dict[str, Any] = {"has_fp32_adapters": True, "autocast": True}
BF16_ADAPTERS: dict[str, Any] = {"has_fp32_adapters": False, "autocast": False}
MODES = {
    "peft": _peft("PEFT as installed: fp32 adapters, bf16 autocast", **FP32_ADAPTERS),
    "peft-bf16": _peft("PEFT, bf16 adapters", **BF16_ADAPTERS),
    "peft+malloc": _peft("peft, freed memory kept", keeps_memory=True, **FP32_ADAPTERS),
    "peft-bf16+malloc": _peft("peft-bf16, freed memory kept", keeps_memory=True, **BF16_ADAPTERS),
    "peft-compile": _peft("peft-bf16 under torch.compile", is_compiled=True, **BF16_ADAPTERS),
    "sft": Mode("TRL SFTTrainer, its defaults", ".peers", "run_sft"),
    "fp32": _peft("PEFT, everything in fp32", is_fp32=True, **BF16_ADAPTERS),
    "burnish": Mode("burnish", ".own", "run_burnish", keeps_memory=True),
    "burnish-unfused": Mode(
        "burnish, fused kernels off", ".own", "run_burnish", {"is_fused": False}, keeps_memory=True
    ),
}
