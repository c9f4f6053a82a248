"""Which configurations the benchmark of the planner predicts and measures. Imports no torch."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..harness.config import Config
from .benchmark import Choice, Item
from .memory_cases import LADDERS, SEPARATOR
from .workload import MODELS

SMOL, LLAMA_8B, LLAMA_70B = "smollm2-135m", "llama-8b", "llama-70b"
SHAPES: dict[str, dict[str, Any]] = {
    SMOL: MODELS[SMOL],
    **{f"llama-{name}": {"init": init} for name, init in LADDERS["cpu"].items()},
    LLAMA_8B: MODELS["llama-8b"],
    LLAMA_70B: {"init": MODELS["llama-70b-1-layer"]["init"] | {"num_hidden_layers": 80}},
}
"""Name -> the `model` section of a config, without dtype: SmolLM2-135M, and Llamas of random weights."""
NF4: dict[str, Any] = {"type": "nf4", "double_quant": True}
FREEZE: dict[str, Any] = {"method": "freeze", "last_layers": 4}
MOMENTUM: dict[str, Any] = {"name": "sgd", "momentum": 0.9}
IN_FILES = {"offload_optimizer": "nvme", "offload_param": "nvme"}
FILES = Path("runs/bench/files")


@dataclass(frozen=True)
class Case:
    """One configuration: `batch` is sequences x tokens of a micro-batch, `micro_batches` those of a step and worker."""

    model: str
    method: str
    batch: tuple[int, int]
    policy: str = "none"
    optimizer: dict[str, Any] = field(default_factory=lambda: {"name": "adamw"})
    adapter: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bf16"
    micro_batches: int = 1
    zero_stage: int = 0
    num_ranks: int = 1
    packing: bool = False
    is_fused: bool = True
    is_in_files: bool = False
    """Weights, gradients and optimizer state; only what is at work is in memory."""
    cost_s: float = 20.0

    @property
    def key(self) -> str:
        parts = [self.model, self.method, f"{self.batch[0]}x{self.batch[1]}"]
        parts += [f"{self.micro_batches} micro-batches"] if self.micro_batches > 1 else []
        parts += [f"{self.policy} checkpointing"] if self.policy != "none" else []
        parts += [self.optimizer["name"]] if self.optimizer["name"] != "adamw" else []
        parts += [self.dtype] if self.dtype != "bf16" else []
        parts += ["packed"] if self.packing else []
        parts += ["unfused"] if not self.is_fused else []
        parts += [f"ZeRO-{self.zero_stage}"] if self.zero_stage or self.num_ranks > 1 else []
        parts += ["in files"] if self.is_in_files else []
        return SEPARATOR.join(["plan", " ".join(parts), f"{self.num_ranks} rank{'s' * (self.num_ranks > 1)}"])

    def config(self, num_threads: int) -> Config:
        """The config of a run of this kind. Its data section names no data: what is measured trains on random ids."""
        memory = {"zero_stage": self.zero_stage, "activation_checkpointing": self.policy}
        launch = {"type": "inline"} if self.num_ranks == 1 else {"type": "ray", "num_workers": self.num_ranks}
        return Config.model_validate(
            {
                "name": "plan",
                "model": SHAPES[self.model] | {"dtype": self.dtype},
                "quantization": NF4 if self.method == "qlora" else {"type": "none"},
                "task": {"type": "causal_lm"},
                "data": {"train": "random tokens", "max_length": self.batch[1], "packing": self.packing},
                "adapter": {"method": self.method} | self.adapter,
                "optimizer": self.optimizer,
                "train": {
                    "max_steps": 2,
                    "global_batch_size": self.batch[0] * self.micro_batches * self.num_ranks,
                    "micro_batch_size": self.batch[0],
                    "num_threads": num_threads,
                },
                "memory": memory | (IN_FILES | {"nvme_path": str(FILES.absolute())} if self.is_in_files else {}),
                "kernels": {} if self.is_fused else {"enabled": False},
                "launch": launch,
            }
        )


CPU_CASES = (
    Case(SMOL, "lora", (4, 256)),
    Case(SMOL, "full", (2, 256)),
    Case(SMOL, "qlora", (2, 256)),
    Case(SMOL, "lora", (2, 256), zero_stage=2, num_ranks=2),
    Case(SMOL, "lora", (1, 1024)),
    Case(SMOL, "lora", (4, 512), policy="full"),
    Case(SMOL, "lora", (2, 256), dtype="fp32"),
    Case(SMOL, "lora", (2, 256), policy="selective", is_fused=False),
    Case(SMOL, "lora", (2, 256), is_fused=False),
    Case(SMOL, "lora", (4, 256), packing=True),
    Case(SMOL, "dora", (2, 256)),
    Case(SMOL, "freeze", (4, 256), adapter={"last_layers": 4}),
    Case(SMOL, "full", (2, 256), policy="full", micro_batches=2),
    Case(SMOL, "full", (2, 256), optimizer={"name": "adamw_8bit"}),
    Case(SMOL, "full", (2, 256), optimizer=MOMENTUM),
    Case(SMOL, "full", (2, 256), optimizer={"name": "adafactor"}),
    Case(SMOL, "lora", (2, 256), zero_stage=0, num_ranks=2),
    Case(SMOL, "lora", (2, 256), zero_stage=1, num_ranks=2),
    Case(SMOL, "lora", (2, 256), zero_stage=3, num_ranks=2),
    Case(SMOL, "full", (2, 256), zero_stage=0, num_ranks=2),
    Case(SMOL, "full", (2, 256), zero_stage=1, num_ranks=2),
    Case(SMOL, "full", (2, 256), zero_stage=2, num_ranks=2),
    Case(SMOL, "full", (2, 256), zero_stage=3, num_ranks=2),
    Case(SMOL, "full", (2, 256), zero_stage=2),
    Case(SMOL, "full", (2, 256), zero_stage=3),
    Case(SMOL, "qlora", (2, 256), zero_stage=3, num_ranks=2),
    Case("llama-360M", "full", (1, 256), cost_s=40),
    Case("llama-360M", "lora", (2, 512), cost_s=40),
    Case("llama-360M", "full", (1, 256), zero_stage=2, num_ranks=2, cost_s=60),
    Case("llama-360M", "full", (1, 256), zero_stage=3, num_ranks=2, cost_s=60),
    Case("llama-360M", "lora", (1, 256), zero_stage=3, num_ranks=2, cost_s=60),
    Case("llama-0.6B", "lora", (4, 512), policy="full", cost_s=60),
    Case("llama-0.6B", "qlora", (2, 512), policy="full", cost_s=60),
    Case("llama-1.5B", "lora", (1, 256), cost_s=80),
    Case("llama-1.5B", "qlora", (1, 512), policy="full", cost_s=100),
    Case(SMOL, "full", (2, 256), zero_stage=3, is_in_files=True, cost_s=60),
    Case("llama-360M", "full", (1, 256), zero_stage=3, num_ranks=2, is_in_files=True, cost_s=120),
)
NUM_QUICK = 4
"""The first of them, in a quick run."""
GPU_CASES = (
    Case(LLAMA_8B, "qlora", (1, 2048), policy="full", cost_s=60),
    Case(LLAMA_8B, "qlora", (1, 8192), policy="full", cost_s=60),
    Case(LLAMA_8B, "lora", (1, 2048), policy="full", cost_s=60),
    Case("llama-1.5B", "full", (2, 2048), policy="full", cost_s=40),
    Case("llama-1.5B", "lora", (4, 2048), cost_s=40),
    Case(LLAMA_70B, "qlora", (1, 2048), policy="full", cost_s=300),
)


def items(device: str, choice: Choice) -> list[Item]:
    cases = CPU_CASES if device == "cpu" else GPU_CASES
    return [item(case) for case in (cases[:NUM_QUICK] if choice.is_quick else cases)]


def item(case: Case) -> Item:
    return Item(case.key, (case.key,), asdict(case), case.cost_s)
