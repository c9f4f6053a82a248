"""One layer of a model, real but for its size: width, dtype, quantisation, adapter and kernels are the run's.

`marked` says on a timeline where forward and backward enter and leave the layer and the head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import adapters, models
from .config import Config
from .live_bytes import Mark
from .pretrained import load_config_of_model
from .tasks.common import unwrap

TOKEN_KEYS = ("pad_token_id", "bos_token_id", "eos_token_id")
"""Fields of a model's config that are token ids; an id outside of the vocabulary is refused."""


def small_model(config: Config, labels: list[str] | None, *, vocab_size: int) -> nn.Module:
    """The model of a worker, cut to one layer and to a vocabulary, in train mode; gradients are added up in fp32.

    A model whose config does not count its layers is built whole. Raises ConfigError.
    """
    fields = cut(load_config_of_model(config), num_layers=1, vocab_size=vocab_size)
    section = config.model.model_copy(update={"path": None, "init": fields, "tokenizer": None, "revision": None})
    config = config.model_copy(update={"model": section, "adapter": _of_one_layer(config.adapter)})
    model = models.with_kernels(adapters.adapt(models.load_model(config, labels=labels), config), config)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.grad_dtype = torch.float32
    return model.train()


def _of_one_layer(adapter: Any) -> Any:
    """Where the last layers are trained, the one there is."""
    return adapter.model_copy(update={"last_layers": 1}) if getattr(adapter, "last_layers", 0) > 1 else adapter


def cut(model_config: Any, *, num_layers: int, vocab_size: int) -> dict[str, Any]:
    """The fields of a transformers config with fewer layers and token ids; lists by layer become shorter."""
    fields: dict[str, Any] = model_config.to_dict()
    names = {key: model_config.attribute_map.get(key, key) for key in ("num_hidden_layers", "vocab_size", *TOKEN_KEYS)}
    depth = fields.get(names["num_hidden_layers"])
    if isinstance(depth, int):
        for name, value in fields.items():
            if isinstance(value, list) and len(value) == depth > num_layers and name != "architectures":
                fields[name] = value[:num_layers]
        fields[names["num_hidden_layers"]] = num_layers
    if names["vocab_size"] in fields:
        fields[names["vocab_size"]] = vocab_size
        for key in TOKEN_KEYS:
            if fields.get(names[key]) is not None:
                fields[names[key]] = 0
    return {name: value for name, value in fields.items() if name not in ("architectures", "dtype", "torch_dtype")}


def layers_of(model: nn.Module) -> nn.ModuleList | None:
    """The list of layers: of all lists, the one with most parameters; None where the model has none."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters())) if lists else None


@contextmanager
def frozen_layers(model: nn.Module) -> Iterator[None]:
    """Inside, no weight of a layer is trained."""
    trained = [p for p in (layers_of(model) or nn.ModuleList()).parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def grow_vocabulary(model: nn.Module, vocab_size: int) -> bool:
    """Gives embedding and head rows for a larger vocabulary; False where they are of kinds that it does not know."""
    base = unwrap(model)
    modules = [base.get_input_embeddings(), base.get_output_embeddings()]
    known = all(isinstance(m, nn.Embedding | nn.Linear) and not hasattr(m.weight, "quant_state") for m in modules)
    if not known:
        return False
    grown: dict[int, nn.Parameter] = {}
    for module in modules:
        old = module.weight
        if id(old) not in grown:
            rows = old.detach()[:1].repeat(vocab_size, 1)
            grown[id(old)] = nn.Parameter(rows, requires_grad=old.requires_grad)
            grown[id(old)].grad_dtype = torch.float32
        module.weight = grown[id(old)]
        if getattr(module, "bias", None) is not None:
            module.bias = nn.Parameter(old.new_zeros(vocab_size), requires_grad=module.bias.requires_grad)
    base.config.vocab_size = vocab_size
    return True


@contextmanager
def marked(model: nn.Module, mark: Mark) -> Iterator[None]:
    """Inside, forward marks layer, layer end and head; backward marks head end (before the layer) and embedding.

    The layer's input takes a gradient, as that of every layer but the first does.
    """
    base, layers = unwrap(model), layers_of(unwrap(model))
    handles = []

    def at_gradient(tensor: Any, name: str) -> None:
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(lambda _gradient: mark(name))

    def before_layer(_module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        hidden = inputs[0] if inputs else options.get("hidden_states")
        mark("layer")
        if isinstance(hidden, Tensor) and torch.is_grad_enabled():
            hidden.requires_grad_(True)
            at_gradient(hidden, "embedding")

    def before_head(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        mark("head")
        at_gradient(inputs[0], "head end")

    if layers is not None:
        handles.append(layers[0].register_forward_pre_hook(before_layer, with_kwargs=True))
        handles.append(layers[0].register_forward_hook(lambda *_: mark("layer end")))
    heads = adapters.head_names(base)
    if layers is not None and heads:
        handles.append(base.get_submodule(heads[0]).register_forward_pre_hook(before_head))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def backward_twice(model: nn.Module, loss: Callable[[], Tensor], mark: Mark) -> None:
    """Two passes, the second one with marks: its gradients are added to those of the first."""
    loss().backward()
    mark("second")
    with marked(model, mark):
        mark("forward")
        value = loss()
        mark("backward")
        value.backward()
    del value
    mark("end")
