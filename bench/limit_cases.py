"""What the benchmark of limits runs: models, methods, and the run of each as files. Imports no torch."""

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..harness.config import Config
from ..harness.config_io import config_to_yaml
from ..harness.data.sampler import Sampler
from ..harness.run_dir import write_bytes, write_json
from .benchmark import Choice, Item
from .memory_cases import GIB, SEPARATOR, Init
from .workload import llama

PEER, OWN = "transformers + PEFT + bitsandbytes", "burnish"
SMALLEST = "smallest limit"
WORDS = tuple(f"w{number}" for number in range(1000))
"""The tokenizer's words; the model's vocabulary is larger, as its shape asks."""
MODELS: dict[str, Init] = {
    "0.1B": llama(576, 1536, 30, 9, 3),
    "1.5B": llama(2048, 5632, 31, 32, 8),
    "7B": llama(4096, 11008, 32, 32, 32) | {"vocab_size": 32000, "tie_word_embeddings": False},
}
"""Random weights in a Llama's shape: SmolLM2-135M, one of 1.5e9 weights, and Llama 2 7B."""
ROWS, DATA_SEED = "rows.jsonl", 0


@dataclass(frozen=True)
class Case:
    """One way to train one model, with one sequence of `length` tokens a step.

    `limit_bytes`: does it fit there? None asks for the smallest limit under which the steps complete.
    """

    mode: str
    method: Literal["qlora", "full"]
    model: str
    num_steps: int
    length: int
    num_rows: int = 10
    limit_bytes: int | None = None
    memory: Mapping[str, Any] | None = None
    """The `memory` section of burnish's config; everything is `auto` without it."""
    rank: int = 16
    alpha: int = 32
    learning_rate: float = 1e-3
    max_grad_norm: float = 1.0
    seed: int = 0

    @property
    def key(self) -> str:
        if self.limit_bytes is None:
            return search_key(self.model, self.method, self.mode)
        return SEPARATOR.join((f"{self.limit_bytes / GIB:g} GiB", self.model, self.method, self.mode))


def search_key(model: str, method: str, mode: str) -> str:
    """Of the row that has the smallest limit."""
    return SEPARATOR.join((SMALLEST, model, method, mode))


NVME = {"zero_stage": 3, "offload_optimizer": "nvme", "offload_param": "nvme"}
"""The path is set where the run is made."""


def cases(choice: Choice) -> list[list[Case]]:
    """Those of one item share their losses: the peer's come first."""
    if choice.is_quick:
        return [[Case(mode, "qlora", "0.1B", num_steps=3, length=128) for mode in (PEER, OWN)]]
    return [
        [Case(mode, "qlora", "1.5B", num_steps=10, length=256) for mode in (PEER, OWN)],
        [Case(OWN, "full", "1.5B", num_steps=2, length=128, limit_bytes=8 * GIB, memory=NVME)],
        [Case(OWN, "qlora", "7B", num_steps=2, length=128, limit_bytes=int(7.5 * GIB))],
    ]


SEARCH_COSTS_S, RUN_COSTS_S = {"0.1B": 240.0, "1.5B": 1800.0}, {"1.5B": 600.0, "7B": 400.0}
"""Of an item, on two cores: all runs of a search for every mode, and one run."""


def items(_device: str, choice: Choice) -> list[Item]:
    """A limit of memory is one of the host: the same on every device."""
    found = []
    for group in cases(choice):
        first = group[0]
        key = first.key.rpartition(SEPARATOR)[0]
        costs = SEARCH_COSTS_S if first.limit_bytes is None else RUN_COSTS_S
        what = {"cases": [asdict(case) for case in group]}
        found.append(Item(key, tuple(case.key for case in group), what, costs[first.model]))
    return found


def write_rows(folder: Path, case: Case) -> Path:
    """Texts of exactly `length` tokens with the end token; each repeats a few words, so that there is much to learn."""
    draw = random.Random(DATA_SEED)
    lines = []
    for _ in range(case.num_rows):
        few = draw.sample(WORDS, 8)
        lines.append(json.dumps({"text": " ".join(draw.choices(few, k=case.length - 1))}))
    path = folder / ROWS
    write_bytes(path, "\n".join(lines).encode() + b"\n")
    return path


def order(case: Case) -> list[int]:
    """The row of every step, as burnish's sampler draws them: the peer takes them in the same order."""
    sampler = Sampler(
        np.zeros(case.num_rows, dtype=np.int64),
        [1.0],
        seed=case.seed,
        global_batch_size=1,
        max_steps=case.num_steps,
    )
    return [int(sampler.indices(step)[0]) for step in range(case.num_steps)]


def config(case: Case, *, model: Path, folder: Path, num_threads: int) -> Config:
    """burnish's config of a case, in the folder that holds its rows."""
    memory = dict(case.memory or {})
    if "nvme" in memory.values():
        memory["nvme_path"] = str(folder / "nvme")
    lora = {"rank": case.rank, "alpha": float(case.alpha), "dropout": 0.0, "target_modules": "all-linear"}
    values: dict[str, Any] = {
        "name": "limit",
        "runs_dir": str(folder / "runs"),
        "seed": case.seed,
        "model": {"path": str(model), "dtype": "bf16"},
        "quantization": {"type": "nf4", "double_quant": True} if case.method == "qlora" else {"type": "none"},
        "task": {"type": "causal_lm"},
        "data": {"train": str(folder / ROWS), "max_length": case.length},
        "adapter": {"method": "qlora"} | lora if case.method == "qlora" else {"method": "full"},
        "optimizer": {"name": "adamw", "learning_rate": case.learning_rate},
        "schedule": {"lr": "constant", "warmup_steps": 0},
        "train": {
            "max_steps": case.num_steps,
            "global_batch_size": 1,
            "max_grad_norm": case.max_grad_norm,
            "num_threads": num_threads,
        },
        "memory": memory,
        "checkpoint": {"every_steps": None},
        "generation": {"prompts": []},
        "tracking": {"tensorboard": False},
    }
    return Config.model_validate(values)


def write_run(case: Case, *, model: Path, folder: Path, num_threads: int) -> list[str]:
    """Writes what the case's process reads; its arguments after the interpreter's."""
    rows = write_rows(folder, case)
    if case.mode == OWN:
        path = folder / "config.yaml"
        text = config_to_yaml(config(case, model=model, folder=folder, num_threads=num_threads))
        write_bytes(path, text.encode())
        return ["-m", "burnish.launch.cli", "train", str(path), "--fresh", "--json"]
    job = asdict(case) | {"model": str(model), "rows": str(rows), "order": order(case), "num_threads": num_threads}
    write_json(folder / "job.json", job)
    return ["-m", "burnish.bench.limit_peer", str(folder)]
