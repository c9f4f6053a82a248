"""Random weights in a model's shape as a checkpoint on disk, made shard by shard: config, index, tokenizer, bf16."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ..harness.run_dir import write_json
from .limit_cases import MODELS, WORDS

SHARD_BYTES = 500 * 10**6
INDEX = "model.safetensors.index.json"
STD = 0.02


def checkpoint(name: str, folder: Path) -> Path:
    """The folder of the model, made if it is not there. Needs the memory of one shard."""
    path = folder / name
    if (path / INDEX).exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(**MODELS[name], dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, 1, None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys) if hasattr(model, "all_tied_weights_keys") else {"lm_head.weight"}
    is_tied = MODELS[name]["tie_word_embeddings"]
    shapes = {key: value.shape for key, value in model.state_dict().items() if not (is_tied and key in tied)}
    config.save_pretrained(path)
    tokenizer().save_pretrained(path)
    places: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards(shapes)):
        file = f"model-{number:05d}.safetensors"
        drawn = {key: weight(key, shapes[key], seed=number) for key in shard}
        save_file(drawn, path / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in drawn.values())
    write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return path


def shards(shapes: dict[str, Any]) -> Iterator[list[str]]:
    """Names in groups of at most SHARD_BYTES, or of one."""
    group: list[str] = []
    size = 0
    for name, shape in shapes.items():
        num_bytes = 2 * shape.numel()
        if group and size + num_bytes > SHARD_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += num_bytes
    yield group


def weight(name: str, shape: torch.Size, *, seed: int) -> torch.Tensor:
    """Ones for a norm; else uniform with the spread of a fresh model, which is drawn faster than normal numbers."""
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    bound = STD * 3**0.5
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word."""
    vocabulary = {"<pad>": 0, "<eos>": 1} | {word: number + 2 for number, word in enumerate(WORDS)}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>")
