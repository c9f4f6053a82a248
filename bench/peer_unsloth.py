"""Unsloth: its model, its adapter and its trainer's settings, with its kind of gradient checkpointing. Only a mode.

Unsloth has to be imported before transformers, and loads folders alone: random weights are saved into one for it.
"""

import tempfile
from pathlib import Path
from typing import Any

from .turns import Turns
from .workload import Workload

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run_unsloth(workload: Workload, turns: Turns, *, is_quantized: bool = False) -> None:
    """The steps of Unsloth's notebooks: FastLanguageModel and TRL's SFTTrainer, which Unsloth patches on import."""
    from unsloth import FastLanguageModel

    turns.mark_floor()
    with tempfile.TemporaryDirectory(prefix="burnish-bench-") as folder:
        model, tokenizer = FastLanguageModel.from_pretrained(
            model_name=saved(workload, Path(folder) / "model", turns.device),
            max_seq_length=workload.length,
            load_in_4bit=is_quantized,
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=workload.rank,
            target_modules=TARGETS,
            lora_alpha=workload.alpha,
            lora_dropout=workload.dropout,
            bias="none",
            use_gradient_checkpointing="unsloth",
            random_state=workload.seed,
        )
        from .trainers import train_sft

        train_sft(workload, turns, model, folder=folder, processing_class=tokenizer)


def saved(workload: Workload, folder: Path, device: str) -> str:
    """A folder with the model and its tokenizer."""
    if "path" in workload.model and Path(workload.model["path"]).is_dir():
        return str(workload.model["path"])
    import torch

    from .peers import load_base, load_tokenizer

    model: Any = load_base(workload, torch.bfloat16, device=device)
    model.save_pretrained(folder)
    load_tokenizer(workload).save_pretrained(folder)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return str(folder)
