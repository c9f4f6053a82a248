"""The trainers that users run without burnish: TRL's SFTTrainer, transformers' Trainer on DeepSpeed, Unsloth.

Each runs its own loop, data loader and collator. A callback waits for every turn; rows are fetched outside the measured
time. Only modes of the benchmark.
"""

import os
import tempfile
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from .peers import adapted, draw_adapter, load_base, load_tokenizer, lora_config
from .turns import Finished, Turns
from .workload import Workload

ENDLESS = 10**6
"""Steps that a trainer is told to take; it is stopped before."""
ZERO_2: dict[str, Any] = {
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
}
"""The DeepSpeed configuration of transformers' documentation, for stage 2."""
ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


class Waiting(TrainerCallback):
    """Takes each step of a trainer in its turn."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.loss = float("nan")

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.turns.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.turns.end(self.loss)


def observed(trainer: type[Trainer], waiting: Waiting) -> Any:
    """The class of a trainer that tells `waiting` the loss of every step."""

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super(made, self).training_step(*args, **kwargs)
        waiting.loss = float(loss.detach())
        return loss

    made: Any = type(f"Observed{trainer.__name__}", (trainer,), {"training_step": training_step})
    return made


def common_arguments(workload: Workload, turns: Turns, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": ENDLESS,
        "per_device_train_batch_size": workload.num_sequences,
        "learning_rate": workload.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": workload.max_grad_norm,
        "seed": workload.seed,
        "train_sampling_strategy": "sequential",
        "use_cpu": turns.device == "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def rows(workload: Workload, vocab_size: int) -> list[list[int]]:
    return [row.tolist() for n in range(workload.num_batches) for row in workload.batch(n, vocab_size)]


def start(trainer: Any, workload: Workload, turns: Turns) -> None:
    """Trains in turns. Raises Finished."""
    num_trained = draw_adapter(trainer.model, workload.seed)
    turns.ready(trainer.model, num_trained=num_trained, length=workload.length)
    trainer.train()
    raise Finished


def run_sft(workload: Workload, turns: Turns, *, is_liger: bool = False) -> None:
    """TRL's SFTTrainer with its defaults: gradient checkpointing, bf16 autocast, a loss in chunks."""
    import trl  # noqa: F401  # part of the floor

    turns.mark_floor()
    model = load_base(workload, torch.bfloat16, device=turns.device)
    options = {"peft_config": lora_config(workload), "processing_class": load_tokenizer(workload)}
    with tempfile.TemporaryDirectory(prefix="burnish-bench-") as folder:
        train_sft(workload, turns, model, folder=folder, is_liger=is_liger, **options)


def train_sft(
    workload: Workload, turns: Turns, model: Any, *, folder: str, is_liger: bool = False, **options: Any
) -> None:
    """Takes the steps of an SFTTrainer with these options. Raises Finished."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    waiting = Waiting(turns)
    arguments = common_arguments(workload, turns, folder)
    trainer = observed(SFTTrainer, waiting)(
        model=model,
        args=SFTConfig(**arguments, max_length=workload.length, use_liger_kernel=is_liger),
        train_dataset=Dataset.from_list([{"input_ids": row} for row in rows(workload, model.config.vocab_size)]),
        callbacks=[waiting],
        **options,
    )
    start(trainer, workload, turns)


def run_deepspeed(workload: Workload, turns: Turns) -> None:
    """transformers' Trainer with a PEFT model on DeepSpeed's ZeRO-2, in bf16, one rank."""
    os.environ.update(ONE_RANK)
    if turns.device == "cpu":
        use_cpu_accelerator()
    turns.mark_floor()
    model = adapted(load_base(workload, torch.bfloat16, device=turns.device), workload)
    waiting = Waiting(turns)
    with tempfile.TemporaryDirectory(prefix="burnish-bench-") as folder:
        trainer = observed(Trainer, waiting)(
            model=model,
            args=TrainingArguments(**common_arguments(workload, turns, folder), bf16=True, deepspeed=ZERO_2),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows(workload, model.config.vocab_size)],
            callbacks=[waiting],
        )
        start(trainer, workload, turns)


def use_cpu_accelerator() -> None:
    """DeepSpeed's CPU without what takes 45 s to build and serves inference alone."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import set_accelerator

    from ..harness.zero import CpuAccelerator

    set_accelerator(CpuAccelerator())
