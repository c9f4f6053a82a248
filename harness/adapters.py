"""How a model is trained: full, freeze, LoRA, DoRA, QLoRA. What is trained has requires_grad, nothing else does.

Only this file imports peft, and (with `bnb`) bitsandbytes' layers. Shape letters: D input, F output, R rank.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from .config import Config, Freeze, LoraOptions
from .engine import DTYPES
from .errors import ConfigError, TrainingError

PEFT_TASK_TYPES = {"causal_lm": TaskType.CAUSAL_LM, "sequence_classification": TaskType.SEQ_CLS}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
ADAPTER_WEIGHTS = "adapter_model.safetensors"
OWN_SETTINGS = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "rank_pattern", "alpha_pattern"),
    *("use_rslora", "use_dora", "task_type", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
}
"""What burnish sets in adapter_config.json; the rest has PEFT's defaults."""


def torch_dtype(config: Config) -> torch.dtype:
    return DTYPES[config.model.dtype]


def quantization_config(config: Config, *, skip: list[str]) -> BitsAndBytesConfig | None:
    """Settings of bitsandbytes; `skip` are modules left unquantised. None without quantization."""
    quantization = config.quantization
    if wants_embeddings(config) and config.task.type == "causal_lm":
        skip = []  # the head of a language model is an embedding
    if quantization.type == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=quantization.double_quant,
            bnb_4bit_compute_dtype=torch_dtype(config),
            llm_int8_skip_modules=skip,
        )
    if quantization.type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return None


def wants_embeddings(config: Config) -> bool:
    return config.quantization.type == "nf4" and config.quantization.embeddings


def quantized_embeddings(model: Any, config: Config) -> list[str]:
    """Name of the input embedding if it is quantised too. Raises ConfigError where it cannot be."""
    if not wants_embeddings(config):
        return []
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(table, nn.Embedding):
        raise ConfigError("quantization.embeddings: this model has no embedding of tokens; leave it out")
    if head is not None and head.weight is table.weight:
        raise ConfigError(
            "quantization.embeddings: the input embedding and the output head of this model are one matrix "
            "(tie_word_embeddings), which stays as it is; leave it out"
        )
    return [name for name, module in model.named_modules() if module is table]


def quantized_heads(model: nn.Module, config: Config) -> list[str]:
    """Name of the output embedding if it is quantised too; other heads are trained."""
    return head_names(model) if wants_embeddings(config) and config.task.type == "causal_lm" else []


def keep_nf4_layout(model: nn.Module) -> None:
    """Stops Linear4bit from repacking its weights in place in eval mode on CPUs with AVX512-BF16.

    ZeRO gathers the layout it knows, and state_dict() refuses the other: silent wrong results.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def head_names(model: nn.Module) -> list[str]:
    """Modules that turn features into answers: the output embedding, or all that is outside the backbone."""
    output = model.get_output_embeddings()  # type: ignore[operator]
    if output is not None:
        return [name for name, module in model.named_modules() if module is output]
    backbone = getattr(model, "base_model_prefix", "")
    return [
        name for name, child in model.named_children() if name != backbone and any(True for _ in child.parameters())
    ]


def adapt(model: nn.Module, config: Config) -> nn.Module:
    """Makes the model trainable as config.adapter says. Random weights depend on config.seed alone.

    Raises ConfigError where a pattern matches nothing or a module cannot carry an adapter.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(config.seed)
        adapted = ADAPTERS[config.adapter.method](model, config)
    if config.adapter.method != "full":
        hold_batch_norms(adapted)
    return adapted


def full(model: nn.Module, config: Config) -> nn.Module:
    return model.requires_grad_(True)


def freeze(model: nn.Module, config: Config) -> nn.Module:
    """Trains the head, the last layers and the parameters that match a pattern."""
    options = config.adapter
    assert isinstance(options, Freeze), options
    parameters = dict(model.named_parameters(remove_duplicate=False))
    prefixes = list(getattr(model, "new_modules", ()))
    if options.head:
        prefixes += head_names(model)
    if options.last_layers:
        prefixes += _last_layers(model, options.last_layers)
    chosen = {name for name in parameters if any(name.startswith(f"{prefix}.") for prefix in prefixes)}
    for pattern in options.trainable:
        chosen.update(_matches(pattern, parameters, key="adapter.trainable"))
    model.requires_grad_(False)
    for name in chosen:  # after all others are off: tied parameters have two names
        parameters[name].requires_grad_(True)
    return model


def _last_layers(model: nn.Module, count: int) -> list[str]:
    """Names of the last blocks or stages: of the module list that holds most of the parameters."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        raise ConfigError(f"adapter.last_layers={count}: this model has no list of layers; use adapter.trainable")
    name = max(lists, key=lambda key: sum(p.numel() for p in lists[key].parameters()))
    if count > len(lists[name]):
        raise ConfigError(f"adapter.last_layers={count}: the model has {len(lists[name])} layers ({name})")
    return [f"{name}.{i}" for i in range(len(lists[name]) - count, len(lists[name]))]


def lora(model: nn.Module, config: Config) -> nn.Module:
    """A PeftModel with adapters in the dtype of the model; a new head is trained whole and saved with them."""
    options = config.adapter
    assert isinstance(options, LoraOptions), options
    to_save = _modules_to_save(model, config)
    targets = _target_modules(model, options.target_modules, excluded=to_save)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(options, key):
            _matches(rf"(.*\.)?({pattern})$", targets, key=f"adapter.{key}", shown=pattern, whole=True)
    peft_config = LoraConfig(
        task_type=PEFT_TASK_TYPES.get(config.task.type),
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # peft takes any number
        lora_dropout=options.dropout,
        target_modules=_short_names(model, targets),
        use_rslora=options.rslora,
        use_dora=config.adapter.method == "dora",
        rank_pattern=dict(options.rank_pattern),
        alpha_pattern=dict(options.alpha_pattern),
        modules_to_save=to_save or None,
    )
    try:
        adapted = get_peft_model(model, peft_config, autocast_adapter_dtype=False)
    except (ValueError, NotImplementedError, TypeError) as error:
        raise ConfigError(f"adapter.target_modules: {' '.join(str(error).split())[:300]}") from error
    peft_config.base_model_name_or_path = getattr(model, "origin_name", None)
    return _in_dtype(adapted, torch_dtype(config))


def _in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


ADAPTERS: dict[str, Callable[[nn.Module, Config], nn.Module]] = {
    "full": full,
    "freeze": freeze,
    "lora": lora,
    "dora": lora,
    "qlora": lora,
}


def hold_batch_norms(model: nn.Module) -> None:
    """Keeps the running statistics of batch norms that are not trained: they stay in eval mode in every forward."""
    for module in model.modules():
        if isinstance(module, BATCH_NORMS) and not any(p.requires_grad for p in module.parameters()):
            module.register_forward_pre_hook(_to_eval_mode)


def _to_eval_mode(module: nn.Module, _inputs: Any) -> None:
    module.training = False


def _modules_to_save(model: nn.Module, config: Config) -> list[str]:
    assert isinstance(config.adapter, LoraOptions), config.adapter
    names = [name for name, _ in model.named_modules() if name]
    chosen = [
        found for name in config.adapter.modules_to_save for found in _named(name, names, key="adapter.modules_to_save")
    ]
    tied = getattr(model.config, "tie_word_embeddings", False) and model.get_output_embeddings()  # type: ignore[operator]
    embeddings = {id(model.get_input_embeddings()), id(tied)} if tied else set()  # type: ignore[operator]
    for name in chosen:
        if any(hasattr(weight, "quant_state") for weight in model.get_submodule(name).parameters()):
            raise ConfigError(f"adapter.modules_to_save: {name} is quantised and cannot be trained; leave it out")
        if id(model.get_submodule(name)) in embeddings:
            raise ConfigError(
                f"adapter.modules_to_save: {name} shares its weights with another module of this model, so training "
                "it alone would tear them apart; use adapter.method freeze or full"
            )
    if config.task.type != "causal_lm":
        chosen += head_names(model)
        chosen += getattr(model, "new_modules", ())
    return sorted(set(chosen))


def _target_modules(model: nn.Module, wanted: str | list[str], *, excluded: Iterable[str]) -> list[str]:
    """Full names of the modules that get an adapter."""
    if wanted != "all-linear":
        names = [name for name, _ in model.named_modules() if name]
        found = {name for pattern in wanted for name in _named(pattern, names, key="adapter.target_modules")}
        return sorted(found)
    names = linear_names(model, excluded=excluded)
    if not names:
        raise ConfigError(
            "adapter.target_modules=all-linear: this model has no linear layer but its head; name its convolutions "
            '(for example ["convolution"]) or use adapter.method freeze or full'
        )
    return names


def linear_names(model: nn.Module, *, excluded: Iterable[str] = ()) -> list[str]:
    """Every linear layer (quantised or not) outside the head and the excluded modules."""
    outside = [f"{name}." for name in (*excluded, *head_names(model))]
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    return [name for name in linear if not any(f"{name}.".startswith(prefix) for prefix in outside)]


def _short_names(model: nn.Module, targets: list[str]) -> list[str]:
    """The last parts of the names where those select exactly the same modules; else the full names."""
    short = {name.rpartition(".")[2] for name in targets}
    selected = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short) if selected == set(targets) else targets


def _named(pattern: str, names: list[str], *, key: str) -> list[str]:
    """Names equal to the pattern, ending in `.pattern`, or matching it whole as a regular expression."""
    found = [name for name in names if name == pattern or name.endswith(f".{pattern}")]
    return found or _matches(pattern, names, key=key, whole=True)


def _matches(
    pattern: str, names: Iterable[str], *, key: str, shown: str | None = None, whole: bool = False
) -> list[str]:
    """Names in which the regular expression is found. Raises ConfigError, with close names, if there is none."""
    shown, names = shown or pattern, list(names)
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{key}: {shown!r} is no regular expression: {error}") from None
    found = [name for name in names if (expression.fullmatch if whole else expression.search)(name)]
    if not found:
        parts = sorted({part for name in names for part in (name, name.rpartition(".")[2]) if not part.isdecimal()})
        close = difflib.get_close_matches(shown, parts, n=3, cutoff=0.5) or parts[:5]
        raise ConfigError(f"{key}: {shown!r} matches nothing in this model; there is {', '.join(close)}")
    return found


def adapter_tensors(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a PEFT folder, by their names there, out of trained weights by their names in the model.

    Raises TrainingError if one is empty (a parameter that ZeRO-3 did not gather) or missing.
    """
    tensors = get_peft_model_state_dict(model, state_dict=dict(state), save_embedding_layers=False)
    expected = sum(parameter.requires_grad for parameter in model.parameters())
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if empty or len(tensors) < expected:
        raise TrainingError(f"the adapter is incomplete: {len(tensors)} of {expected} tensors, empty: {empty[:3]}")
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def save_adapter_config(model: Any, folder: str) -> None:
    """Writes adapter_config.json, marked for inference."""
    peft_config = model.peft_config["default"]
    was_inference, peft_config.inference_mode = peft_config.inference_mode, True
    try:
        peft_config.save_pretrained(folder)
    finally:
        peft_config.inference_mode = was_inference


def _check_adapter_config(folder: str) -> None:
    """Raises ConfigError for settings that burnish does not write: some make PEFT import modules or read files."""
    file = Path(folder) / "adapter_config.json"
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        usual = LoraConfig().to_dict()
        strange = sorted(key for key in saved.keys() - OWN_SETTINGS if saved[key] != usual.get(key))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    if strange:
        raise ConfigError(f"{file} sets {', '.join(strange[:5])[:200]}, which burnish does not write; it is not loaded")


def load_adapter(base: nn.Module, folder: str, config: Config) -> nn.Module:
    """The saved adapter on a freshly loaded base, in the dtype of the model and ready to run. Raises ConfigError."""
    _check_adapter_config(folder)
    model = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            parameter.data = parameter.data.to(torch_dtype(config))
    keep_nf4_layout(model)
    return model.eval()


def merge(model: nn.Module) -> nn.Module:
    """The adapter folded into the base; a quantised base must have been dequantised before the adapter was loaded."""
    return model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
