"""A tiny language model with a real tokenizer and a real text file, made from nothing: for tests of whole runs."""

import json
import random
from pathlib import Path

import torch
import yaml
from burnish.harness.run_dir import RunDir
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = tuple(
    "red green blue one two three cat dog bird sees likes finds under over beside the a big small".split()  # noqa: SIM905
)
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 entries with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    special = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|end|>")
    fast.chat_template = TEMPLATE
    return fast


def save_model(folder: Path, *, seed: int = 0) -> Path:
    """A 2-layer Llama of 32 hidden units in fp32, with its tokenizer."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, *, num_rows: int = 64, seed: int = 0) -> Path:
    """Prompt/completion rows of varied length; the completion repeats words of the prompt."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for _ in range(num_rows):
            words = rng.choices(WORDS, k=rng.randint(2, 10))
            row = {"prompt": "say " + " ".join(words), "completion": " ".join(words[: rng.randint(1, 6)])}
            file.write(json.dumps(row) + "\n")
    return path


def run_config(folder: Path, **changes: object) -> dict[str, object]:
    """A complete config (as a dict) that trains in a second; `section__key=value` changes one value."""
    config: dict[str, object] = {
        "name": "tiny",
        "runs_dir": str(folder / "runs"),
        "seed": 7,
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "task": {"type": "causal_lm"},
        "data": {
            "train": [str(folder / "rows.jsonl")],
            "max_length": 64,
            "split": {"validation": 0.2},
        },
        "adapter": {"method": "lora", "rank": 4, "alpha": 8, "dropout": 0.0},
        "optimizer": {"name": "adamw", "learning_rate": 1e-2},
        "schedule": {"lr": "cosine", "warmup_ratio": 0.1},
        "train": {"max_steps": 10, "global_batch_size": 8, "micro_batch_size": 4, "num_threads": 1},
        "generation": {"max_new_tokens": 4},
        "tracking": {"tensorboard": False},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = config
        for section in sections:
            place = place.setdefault(section, {})  # type: ignore[assignment]
        place[last] = value
    return config


def write_config(folder: Path, **changes: object) -> Path:
    """Model, data and config files in `folder`, ready for `burnish train`."""
    if not (folder / "model").exists():
        save_model(folder / "model")
        write_rows(folder / "rows.jsonl")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(run_config(folder, **changes)))
    return path


def losses(run: RunDir) -> list[float]:
    """Of every training step in the run's metrics."""
    return [record["loss"] for record in run.read_jsonl(run.metrics_jsonl) if record["kind"] == "train"]
