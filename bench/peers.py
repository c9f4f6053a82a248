"""What users run without burnish: PEFT in a plain loop. Only modes of the benchmark.

Each takes the same step: loss over every next token, gradient norm clipped, fused AdamW without weight decay.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedTokenizerFast,
)

from ..harness.pretrained import locate, quiet
from .turns import Turns
from .workload import Workload


def nf4() -> BitsAndBytesConfig:
    """Raises PackageNotFoundError where bitsandbytes is not installed."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def load_base(workload: Workload, dtype: torch.dtype, *, device: str = "cpu", is_quantized: bool = False) -> Any:
    """The model as transformers alone loads it, or random weights where the workload says `init`.

    Random weights are drawn on the device: on a CPU a billion of them takes half a minute.
    """
    quiet()
    if "init" in workload.model:
        torch.manual_seed(workload.seed)
        model_config = AutoConfig.for_model(**workload.model["init"])
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
        return quantized(model, device) if is_quantized else model
    origin = locate(workload.model["path"], key="model.path")
    options: dict[str, Any] = {"dtype": dtype} | origin.options()
    if origin.gguf_file:
        options["quantization_config"] = GgufConfig(dequantize=True)
    elif is_quantized:
        options |= {"quantization_config": nf4(), "device_map": device_map(device)}
    model = AutoModelForCausalLM.from_pretrained(origin.path, **options)
    if origin.gguf_file and is_quantized:
        return quantized(model, device)
    return model if is_quantized else model.to(device)


def quantized(model: Any, device: str) -> Any:
    """The same model in nf4 with double quantisation: neither GGUF files nor random weights can be made in it."""
    return type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        dtype=model.dtype,
        quantization_config=nf4(),
        device_map=device_map(device),
    )


def device_map(device: str) -> dict[str, Any]:
    """The whole model on this device, as transformers wants it."""
    return {"": torch.cuda.current_device() if device == "cuda" else device}


def load_tokenizer(workload: Workload) -> Any:
    """The model's own, or one of two tokens for random weights: the batches hold ids already."""
    if "init" in workload.model:
        words = {"<pad>": 0, "<eos>": 1}
        tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    origin = locate(workload.model["path"], key="model.path")
    return AutoTokenizer.from_pretrained(origin.path, **origin.options())


def lora_config(workload: Workload) -> LoraConfig:
    return LoraConfig(
        r=workload.rank,
        lora_alpha=workload.alpha,
        lora_dropout=workload.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def adapted(base: Any, workload: Workload, *, has_fp32_adapters: bool = True) -> Any:
    """The PEFT model; `has_fp32_adapters` is PEFT's default (autocast_adapter_dtype)."""
    return get_peft_model(base, lora_config(workload), autocast_adapter_dtype=has_fp32_adapters).train()


@torch.no_grad()
def draw_adapter(model: nn.Module, seed: int) -> int:
    """Gives every mode the same adapter: A uniform as PEFT draws it, rounded to bf16; B zero.

    Returns the number of trained elements.
    """
    trained = [(name, p) for name, p in sorted(model.named_parameters()) if p.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    for name, param in trained:
        if "lora_A" in name:
            bound = param.shape[-1] ** -0.5
            drawn = torch.empty(param.shape).uniform_(-bound, bound, generator=generator)
            param.copy_(drawn.to(torch.bfloat16))
        elif "lora_B" in name:
            param.zero_()
    return sum(param.numel() for _, param in trained)


def run_peft(
    workload: Workload,
    turns: Turns,
    *,
    has_fp32_adapters: bool,
    autocast: bool,
    is_compiled: bool = False,
    is_fp32: bool = False,
    is_quantized: bool = False,
    has_checkpointing: bool = False,
) -> None:
    """PEFT in the plain loop of its documentation."""
    turns.mark_floor()
    dtype = torch.float32 if is_fp32 else torch.bfloat16
    base = load_base(workload, dtype, device=turns.device, is_quantized=is_quantized)
    if is_quantized:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=has_checkpointing)
    elif has_checkpointing:
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    model = adapted(base, workload, has_fp32_adapters=has_fp32_adapters)
    num_trained = draw_adapter(model, workload.seed)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=workload.learning_rate, weight_decay=0.0, fused=True)
    forward = torch.compile(model) if is_compiled else model
    torch.manual_seed(workload.seed)
    turns.ready(model, num_trained=num_trained, length=workload.length)
    while True:
        number = turns.begin()
        ids = workload.batch(number, base.config.vocab_size).to(turns.device)
        with _autocast(turns.device, autocast):
            loss = forward(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, workload.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        turns.end(float(loss.detach()))


def _autocast(device: str, is_on: bool) -> AbstractContextManager[Any]:
    return torch.autocast(device, dtype=torch.bfloat16) if is_on else nullcontext()
