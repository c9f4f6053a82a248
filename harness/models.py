"""A backbone: loaded or made, checked, adapted. `build` is what a worker calls."""

import hashlib
import io
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GgufConfig

from . import adapters
from .activations import apply_activation_policy, offload_activations
from .config import Config
from .drawing import outline
from .errors import ConfigError
from .loading import Dense, Keep, Parts, facts_of, in_memory, kept, load_mapped, name_origin, weight_files
from .memory import Counts
from .plan import Plan
from .pretrained import Origin, check_files, explained, load_config_of_model, load_tokenizer, model_origin, quiet
from .tasks import get_task
from .tasks.common import accepts, unwrap

if TYPE_CHECKING:  # its kernels need Triton, which not every platform has
    from .quantized import Quantizing

POOLERS = ("pooler",)
"""Backbone modules that a checkpoint trained on another task may lack; trained together with a new head."""


def load_processor(config: Config) -> Any:
    """The tokenizer or image processor of the task. Raises ConfigError."""
    return get_task(config.task.type).load_processor(config)


def load_model(
    config: Config,
    *,
    labels: list[str] | None = None,
    device: str = "cpu",
    seed: int | None = None,
    path: str | None = None,
) -> nn.Module:
    """The model in eval mode: weights loaded (GGUF unpacked, or quantised with nf4 / int8), or random with model.init.

    A new head, and everything with model.init, is drawn from `seed` (config.seed if None). `path` overrides
    model.path: a result of burnish's own. Raises ConfigError for a model that is missing, broken, pickled,
    incomplete or too small for its tokenizer.
    """
    quiet()
    if path is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": path, "init": None})})
    model_config = load_config_of_model(config)
    has_other_labels = labels is not None and list(model_config.id2label.values()) != labels
    _set_labels(model_config, labels)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(config.seed if seed is None else seed)
        origin = model_origin(config)
        if origin is None:
            model = _random(config, model_config, device=device)
        else:
            model = _load(config, origin, model_config, device=device)
        if origin is not None and has_other_labels:
            _draw_head(model)
    adapters.keep_nf4_layout(model)
    model.origin_name = origin.name if origin else None
    _check_vocabulary(model, config)
    model.base_fingerprint = fingerprint(model)
    return _on_device(model, device).eval()


def _on_device(model: nn.Module, device: str) -> nn.Module:
    """The model there; quantised weights are where they were made."""
    if not getattr(model, "is_quantized", False):
        return model.to(device)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(device)
    return model


def _set_labels(model_config: Any, labels: list[str] | None) -> None:
    if labels is not None:
        model_config.id2label = dict(enumerate(labels))
        model_config.label2id = {name: i for i, name in enumerate(labels)}


def _draw_head(model: Any) -> None:
    """A head for other classes starts anew, also where there happen to be as many."""
    for name in adapters.head_names(model):
        for module in model.get_submodule(name).modules():
            for part in (module, *module.parameters(recurse=False)):
                part.__dict__.pop("_is_hf_initialized", None)  # else transformers leaves it as it is
            model._init_weights(module)


def _attention(config: Config) -> dict[str, Any]:
    chosen = config.model.attn_implementation
    return {} if chosen == "auto" else {"attn_implementation": chosen}


def _random(config: Config, model_config: Any, *, device: str) -> Any:
    auto = get_task(config.task.type).auto_class()
    make = partial(
        auto.from_config,
        model_config,
        dtype=adapters.torch_dtype(config),
        trust_remote_code=config.model.trust_remote_code,
        **_attention(config),
    )
    with explained("model.init", str(model_config.model_type)):
        model = make() if config.quantization.type == "none" else _random_quantized(config, make, device=device)
    model.new_modules = ()
    return model


def _random_quantized(config: Config, make: Callable[[], Any], *, device: str) -> Any:
    """The random model that `make` makes, quantised matrix by matrix as its numbers are drawn."""
    from .quantized import quantizing

    made = outline(make)
    model = made.model
    quantization = adapters.quantization_config(config, skip=adapters.head_names(model) + _poolers(model))
    assert quantization is not None, config.quantization
    embeddings = adapters.quantized_embeddings(model, config)
    todo = quantizing(model, quantization, device=device, embeddings=embeddings)
    todo.run(device=device, dense=made.draw)
    drawn: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.is_meta:
                if id(weight) not in drawn:  # tied modules have one
                    drawn[id(weight)] = nn.Parameter(made.draw(weight), requires_grad=weight.requires_grad)
                setattr(module, name, drawn[id(weight)])
    return model


def _load(config: Config, origin: Origin, model_config: Any, *, device: str) -> Any:
    check_files(origin, model_config)
    is_lm = config.task.type == "causal_lm"
    with explained("model.path", origin.name):
        empty = _empty(config, model_config)
        heads, poolers = adapters.head_names(empty), _poolers(empty)
        quantization = adapters.quantization_config(config, skip=heads + poolers)
        files = None if config.model.trust_remote_code else weight_files(origin, model_config)
        dense = _from_files(config, origin, model_config, type(empty), files)
        if dense is None:
            dense = _from_name(config, origin, model_config, quantization=quantization, device=device)
        _check_loaded(dense.model, dense.info, may_be_new=[] if is_lm else heads + poolers, name=origin.name)
        if not getattr(dense.model, "is_quantized", False):
            todo = None
            if quantization is not None:
                from .quantized import quantizing

                embeddings = adapters.quantized_embeddings(dense.model, config)
                todo = quantizing(dense.model, quantization, device=device, embeddings=embeddings)
            _finish(dense, todo, device=device, shelf=_shelf(config, files, device=device))
    new = {name.rpartition(".")[0] for name in dense.info["missing_keys"] if _is_inside(name, poolers)}
    dense.model.new_modules = tuple(sorted(new))
    return dense.model


def _options(config: Config, model_config: Any) -> dict[str, Any]:
    """Arguments of every from_pretrained that loads weights."""
    options = {"config": model_config, "dtype": adapters.torch_dtype(config), "output_loading_info": True}
    return options | {"ignore_mismatched_sizes": config.task.type != "causal_lm"} | _attention(config)


def _from_files(
    config: Config, origin: Origin, model_config: Any, kind: type[Any], files: list[str] | None
) -> Dense | None:
    """A model of this class with its weights mapped; None where that cannot be."""
    if files is None:
        return None
    state = torch.get_rng_state()
    load = partial(kind.from_pretrained, None, trust_remote_code=False, **_options(config, model_config))
    dense = load_mapped(files, load, adapters.torch_dtype(config))
    if dense is None:
        torch.set_rng_state(state)
    else:
        name_origin(dense.model, origin)
    return dense


def _from_name(config: Config, origin: Origin, model_config: Any, *, quantization: Any, device: str) -> Dense:
    """The model as transformers finds and reads it; one that is stored quantised stays so."""
    options = _options(config, model_config) | origin.options()
    if origin.gguf_file:
        options["quantization_config"] = GgufConfig(dequantize=True)
    elif quantization is not None and hasattr(model_config, "quantization_config"):
        options |= {"quantization_config": quantization, "device_map": {"": device}}
    auto = get_task(config.task.type).auto_class()
    with redirect_stderr(io.StringIO()):  # the progress bar of the GGUF reader has no switch
        model, info = auto.from_pretrained(
            origin.path,
            use_safetensors=None if origin.gguf_file else True,
            trust_remote_code=config.model.trust_remote_code,
            **options,
        )
    return Dense(model, info, {})


def has_plain_files(config: Config) -> bool:
    """Whether the model lies on this machine in files whose weights are mapped. Raises ConfigError."""
    origin = model_origin(config)
    if origin is None or not origin.is_local or config.model.trust_remote_code:
        return False
    return weight_files(origin, load_config_of_model(config)) is not None


def _shelf(config: Config, files: list[str] | None, *, device: str) -> Callable[..., AbstractContextManager[Keep]]:
    """Where what is made of these files is kept: beside the runs on a CPU, where all processes can use it in place."""
    if files is None or torch.device(device).type != "cpu":
        return lambda shapes: nullcontext(in_memory)
    folder = Path(os.path.abspath(config.data.cache_dir or os.path.join(config.runs_dir, ".cache")))
    form = [config.model.dtype, config.quantization.model_dump(mode="json")]
    return partial(kept, folder, owner=repr([files, form]), facts=[facts_of(files), form])


def _finish(
    dense: Dense, todo: "Quantizing | None", *, device: str, shelf: Callable[..., AbstractContextManager[Keep]]
) -> None:
    """Quantises and casts what is left to do, tensor by tensor."""
    names = {f"{name}.weight" for name in todo.modules} if todo else set()
    casts = {name: weight for name, weight in dense.waiting().items() if name not in names}
    shapes = {f"{name}.values": (weight.dtype, tuple(weight.shape)) for name, weight in casts.items()}
    with shelf(shapes=(todo.shapes() if todo else {}) | shapes) as keep:
        if todo:
            todo.run(device=device, dense=dense.values, keep=keep)
        for name, weight in casts.items():
            weight.data = keep(name, partial(_cast, dense, weight, device))["values"]
    for buffer in dense.model.buffers():
        buffer.data = dense.values(buffer)


def _cast(dense: Dense, weight: nn.Parameter, device: str) -> Parts:
    return {"values": dense.values(weight).to(device)}


def _empty(config: Config, model_config: Any) -> Any:
    """The model without weights."""
    with torch.device("meta"):
        auto = get_task(config.task.type).auto_class()
        return auto.from_config(model_config, trust_remote_code=config.model.trust_remote_code)


def _poolers(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in POOLERS]


def _is_inside(name: str, modules: list[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def _check_loaded(model: Any, info: dict[str, Any], *, may_be_new: list[str], name: str) -> None:
    """Every weight must come from the file, but those of a new classification head. Raises ConfigError."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(key for key in info["missing_keys"] if not _is_inside(key, may_be_new) and key not in tied)
    unexpected = sorted(info["unexpected_keys"])
    if may_be_new:  # the head of the task it was pre-trained on
        prefix = f"{model.base_model_prefix}."
        unexpected = [key for key in unexpected if key.startswith(prefix)]
    mismatched = sorted(key for key, *_ in info["mismatched_keys"] if not _is_inside(key, may_be_new))
    for what, keys in (("lacks", missing), ("has unknown", unexpected), ("has wrongly shaped", mismatched)):
        if keys:
            shown = ", ".join(keys[:3]) + (" …" if len(keys) > 3 else "")
            kind = type(model).__name__
            raise ConfigError(f"model.path={name} {what} {len(keys)} weights of a {kind}: {shown}")


def _check_vocabulary(model: Any, config: Config) -> None:
    """Raises ConfigError where the tokenizer makes ids that the embedding does not have."""
    own, given = model.origin_name, config.model.tokenizer
    if config.task.type == "image_classification" or (given is None and (own is None or own.endswith(".gguf"))):
        return  # no text, no tokenizer, or both out of one file
    size, rows = len(load_tokenizer(config)), model.get_input_embeddings().num_embeddings
    if size > rows:
        raise ConfigError(
            f"model.tokenizer={given or own} has {size} tokens but the model has embeddings for {rows} only"
        )


def fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes and 64 sampled values of every weight that is not quantised."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        if parameter.is_floating_point() and parameter.device.type != "meta":
            flat = parameter.detach().flatten()
            digest.update(flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Counts of a built model; a quantised weight counts as what it stands for."""
    return asdict(_count(model))


def _count(model: nn.Module) -> Counts:
    total = trainable = quantized = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        number = state.shape.numel() if state is not None else parameter.numel()
        total += number
        # nf4 weights keep the shape they had in their quant_state and may be stored in any dtype; int8 keeps its shape.
        quantized += number if state is not None or not parameter.is_floating_point() else 0
        if parameter.requires_grad:
            trainable += number
    return Counts(total, trainable, quantized)


def count_parameters(config: Config, labels: list[str] | None = None) -> Counts:
    """Counts without loading a weight. Raises ConfigError."""
    model, quantized = empty_model(config, labels)
    return replace(_count(model), quantized=sum(weight.numel() for weight in quantized))


def empty_model(config: Config, labels: list[str] | None) -> tuple[nn.Module, set[nn.Parameter]]:
    """The adapted model on the meta device, and those of its weights that are quantised when it is loaded.

    Raises ConfigError.
    """
    model_config = load_config_of_model(config)
    _set_labels(model_config, labels)
    auto = get_task(config.task.type).auto_class()
    with torch.device("meta"), explained("model.path", str(config.model.path or model_config.model_type)):
        model = auto.from_config(
            model_config, dtype=adapters.torch_dtype(config), trust_remote_code=config.model.trust_remote_code
        )
        model.new_modules = ()
        chosen = {*adapters.linear_names(model, excluded=_poolers(model))}
        chosen |= {*adapters.quantized_embeddings(model, config), *adapters.quantized_heads(model, config)}
        quantized = {module.weight for name, module in model.named_modules() if name in chosen}
        return adapters.adapt(model, config), quantized if config.quantization.type != "none" else set()


def build(plan: Plan, labels: list[str] | None = None) -> nn.Module:
    """The model of a worker: loaded, checked for packing, adapted, fused, activation policy on, in train mode."""
    config = plan.config
    device = "cpu" if plan.device == "cpu" else f"cuda:{torch.cuda.current_device()}"
    model: Any = load_model(config, labels=labels, device=device)
    if config.data.packing:
        check_packing(model)
    model.is_alone = plan.world_size == 1 and plan.zero_stage < 3
    model = with_kernels(adapters.adapt(model, config), config)
    with explained("memory.activation_checkpointing", plan.activation_checkpointing):
        apply_activation_policy(model, plan.activation_checkpointing)
    if plan.offload_activations:
        offload_activations(model)
    return model.train()


def with_kernels(model: nn.Module, config: Config) -> nn.Module:
    """The same model with our kernels where they fit, as kernels.enabled says; `fused` of the base model counts them.

    Raises ConfigError if kernels.enabled is true and nothing could be fused.
    """
    base, wanted = unwrap(model), config.kernels.enabled
    base.fused = {}
    if wanted is False:
        return model
    if find_spec("triton") is not None:
        from .fuse import fuse

        base.fused = {name: int(count) for name, count in asdict(fuse(model)).items()}
    if wanted is True and not any(base.fused.values()):
        why = f"nothing in {type(base).__name__} could be fused" if base.fused else "Triton is not installed"
        raise ConfigError(f"kernels.enabled=true: {why}; use auto to run the model as it is")
    return model


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Raises ConfigError unless the examples of one packed row are invisible to each other.

    Two rows that differ only in their first example must give the second example the same logits. State-space and
    linear-attention layers carry state across and fail; so do models that know no position_ids.
    """
    name = type(unwrap(model)).__name__
    if not accepts(model, "position_ids"):
        raise ConfigError(
            f"data.packing: {name} takes no position_ids, so packed examples would mix; switch packing off"
        )
    device = next(model.parameters()).device
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    rows = [torch.tensor([[*first, 9, 8, 7, 6]], device=device) for first in ([1, 2, 3, 4], [5, 5, 10, 11])]
    one, other = (model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 4:].float() for ids in rows)
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(one.abs().max())):
        raise ConfigError(f"data.packing: in {name} the examples of a packed row see each other; switch packing off")
