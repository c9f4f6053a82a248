"""Parity with the field: burnish follows TRL's SFTTrainer with a PEFT LoRA adapter, loss by loss."""

import json
import random

import pytest
import tiny
import torch
from ranks import RankPool, losses, make_job
from transformers import LlamaForCausalLM

NUM_STEPS = 20
BATCH, MICRO = 8, 4
LEARNING_RATE, WEIGHT_DECAY, WARMUP_STEPS = 3e-2, 0.1, 3
RANK, ALPHA = 4, 8
DISTRIBUTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
CHANGES = {
    "name": "parity",
    "data__split": {},
    "data__max_length": 128,
    "adapter": {"method": "lora", "rank": RANK, "alpha": ALPHA, "dropout": 0.0},
    "optimizer": {"name": "adamw", "learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
    "schedule": {"lr": "cosine", "warmup_steps": WARMUP_STEPS},
    "train": {
        "max_steps": NUM_STEPS,
        "global_batch_size": BATCH,
        "micro_batch_size": MICRO,
        "max_grad_norm": 1.0,
        "num_threads": 1,
    },
    "generation": {"prompts": []},
}


def save_model(folder):
    """The tiny model with embeddings large enough for its frozen head to tell tokens apart."""
    tiny.save_model(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(10)
    model.save_pretrained(folder)


def write_rows(path, *, num_rows=50):
    """Completions begin with a space, so that the boundary of prompt and completion is one between tokens."""
    rng = random.Random(3)
    rows = []
    for _ in range(num_rows):
        words = rng.choices(tiny.WORDS, k=rng.randint(2, 12))
        rows.append({"prompt": "say " + " ".join(words), "completion": " " + " ".join(words[: rng.randint(1, 8)])})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def batches_of(job):
    """The store of the job's training data and the row numbers of every step, as burnish takes them."""
    from burnish.harness.data.sampler import Sampler
    from burnish.harness.data.store import Store

    store = Store(job.prepared["train"])
    seed, weights = job.plan["config"]["seed"], job.prepared["weights"]
    sampler = Sampler(store.source, weights, seed=seed, global_batch_size=BATCH, max_steps=NUM_STEPS)
    return store, [sampler.indices(step).tolist() for step in range(NUM_STEPS)]


def initial_adapter(job):
    """The trained tensors of burnish's freshly built model, by name."""
    from burnish.harness import models
    from burnish.harness.plan import Plan

    model = models.build(Plan.from_dict(job.plan), None)
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


def train_with_trl(folder, rows, adapter):
    """The trainer after NUM_STEPS steps over the rows in their order, from the given adapter."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=NUM_STEPS,
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=BATCH // MICRO,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP_STEPS,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        max_length=128,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trained = {name: param for name, param in trainer.model.named_parameters() if param.requires_grad}
    assert trained.keys() == adapter.keys()
    with torch.no_grad():
        for name, param in trained.items():
            param.copy_(adapter[name])
    trainer.train()
    return trainer


def as_chat(row):
    """The row as TRL wants it to use the chat template; burnish uses the template where the tokenizer has one."""
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


@pytest.mark.parametrize("template", ["none", None], ids=["plain text", "chat template"])
def test_twenty_steps_follow_trl_within_a_thousandth(tmp_path, monkeypatch, template):
    for name in DISTRIBUTED:
        monkeypatch.delenv(name, raising=False)
    save_model(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl")
    job = make_job(tmp_path, world=1, data__chat_template=template, **CHANGES)
    store, steps = batches_of(job)
    order = [index for step in steps for index in step]
    assert len(store) == len(rows)

    theirs_rows = [rows[index] if template == "none" else as_chat(rows[index]) for index in order]
    trainer = train_with_trl(tmp_path, theirs_rows, initial_adapter(job))
    for index, theirs in zip(order, trainer.train_dataset, strict=True):
        ours = store[index]
        labels = [token if mask else -100 for token, mask in zip(ours["input_ids"], ours["loss_mask"], strict=True)]
        assert ours["input_ids"].tolist() == theirs["input_ids"]
        assert labels == theirs["labels"]

    with RankPool(1, tmp_path) as pool:
        assert pool.run(job) is None
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert expected[-1] < 0.8 * expected[0]
    assert losses(job) == pytest.approx(expected, abs=1e-3)
