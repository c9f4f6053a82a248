"""What the ranks of the scale benchmark train: the model, its batch and the layout. No torch here.

Weak scaling: every worker has the same number of sequences whatever the number of workers.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..harness.config import Config
from ..harness.data.store import StoreWriter
from ..harness.plan import Plan, Resources, make_plan
from .workload import llama

LORA_RANK = 16
LEARNING_RATE = 1e-3
NUM_ROWS = 4096
"""Rows of the store; more than a run takes would only cost time."""
MODELS: dict[str, dict[str, Any]] = {
    "llama-34m": llama(512, 1536, 8, 8, 4, vocab_size=16384),
    "llama-130m": llama(768, 3072, 12, 12, 4, vocab_size=32768),
    "llama-8b-4-layers": llama(4096, 14336, 4, 32, 8, vocab_size=32768),
}
"""Names of random models: the `init` of a config. The last one has the layers of Llama-3 8B."""


@dataclass(frozen=True)
class Job:
    """One layout. num_workers of 1 at stage 0 is a run without DeepSpeed."""

    model: str
    adapter: str
    """full or lora."""
    zero_stage: int
    num_workers: int
    num_sequences: int
    """Of each worker."""
    length: int
    device: str
    num_threads: int = 1
    seed: int = 0
    init: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's config; those of MODELS[model] if empty."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        return cls(**fields)

    @property
    def fields(self) -> dict[str, Any]:
        return self.init or MODELS[self.model]

    @property
    def tokens(self) -> int:
        """Of one step, over all workers."""
        return self.num_workers * self.num_sequences * self.length

    def config(self) -> Config:
        """The config of a run of burnish that takes these steps; its data is what `write_rows` writes."""
        lora = {"method": "lora", "rank": LORA_RANK, "alpha": 2.0 * LORA_RANK, "dropout": 0.0}
        return Config.model_validate(
            {
                "name": "scale",
                "seed": self.seed,
                "model": {"init": self.fields, "dtype": "bf16"},
                "task": {"type": "causal_lm"},
                "data": {"train": "random tokens", "max_length": self.length},
                "adapter": lora if self.adapter == "lora" else {"method": self.adapter},
                "optimizer": {"name": "adamw", "learning_rate": LEARNING_RATE},
                "train": {
                    "max_steps": 1,
                    "global_batch_size": self.num_workers * self.num_sequences,
                    "micro_batch_size": self.num_sequences,
                    "num_threads": self.num_threads,
                },
                "memory": {"zero_stage": self.zero_stage},
                "launch": {"type": "ray", "num_workers": self.num_workers},
            }
        )

    def plan(self, folder: str) -> Plan:
        """The plan of that run, on a machine with a device, or a core, for every worker."""
        is_gpu = self.device == "cuda"
        resources = Resources(
            device="cuda" if is_gpu else "cpu",
            num_devices=self.num_workers if is_gpu else 0,
            num_cpus=self.num_workers,
            host_memory_bytes=0,
        )
        return make_plan(self.config(), resources, run_dir=folder, cwd=folder)


def write_rows(folder: Path, job: Job) -> Path:
    """A store of rows of random tokens, all of the job's length: the same for every number of workers."""
    path = folder / f"rows-{job.length}-{job.fields['vocab_size']}"
    if path.exists():
        return path
    random = np.random.default_rng(job.seed)
    mask = np.ones(job.length, dtype=np.uint8)
    mask[0] = 0
    writer = StoreWriter(path)
    for _ in range(NUM_ROWS):
        ids = random.integers(0, job.fields["vocab_size"], job.length, dtype=np.int32)
        writer.write({"input_ids": ids, "loss_mask": mask}, 0, job.length - 1)
    writer.close()
    return path
