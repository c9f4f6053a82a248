"""How many weights a model has, and where: found on the meta device, without a byte of them."""

from typing import Any

from torch import nn

from . import adapters, models
from .config import Config
from .profile_numbers import Counts, Shapes
from .small_model import layers_of
from .tasks.common import unwrap


def shapes_of(config: Config, labels: list[str] | None) -> Shapes:
    """Raises ConfigError."""
    model, quantized = models.empty_model(config, labels)
    base, trained = unwrap(model), [p for p in model.parameters() if p.requires_grad]
    layers = layers_of(base)
    embedding = _embedding(base)
    heads = [base.get_submodule(name) for name in adapters.head_names(base)]
    shared = set(embedding.parameters()) if embedding is not None else set()
    head = [p for module in heads for p in module.parameters() if p not in shared]
    count = _Counter(quantized)
    by_layer = [count(list(layer.parameters())) for layer in layers] if layers is not None else []
    return Shapes(
        counts=count(list(model.parameters())),
        num_layers=len(by_layer) or 1,
        layer=max(by_layer, key=lambda one: (one.total, one.trainable), default=count(list(model.parameters()))),
        embedding=count(list(shared)),
        head=count(head),
        largest_tensor=max(p.numel() for p in model.parameters()),
        largest_trained=max((p.numel() for p in trained), default=0),
        num_trained_tensors=len(trained),
        trained_vectors=sum(p.numel() for p in trained if p.ndim < 2),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        hidden_size=int(getattr(base.config, "hidden_size", 0) or 0),
        vocab_size=int(getattr(base.config, "vocab_size", 0) or 0),
        is_per_example=config.task.type == "image_classification",
        **_shares(layers, embedding),
    )


def _shares(layers: nn.ModuleList | None, embedding: nn.Module | None) -> dict[str, float]:
    """Nothing where there is no list of layers."""
    if not layers:
        return {}
    is_trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    num_saving = len(layers) - is_trained.index(True) if any(is_trained) else 0
    if embedding is not None and any(p.requires_grad for p in embedding.parameters()):
        num_saving = len(layers)
    return {"saving_share": num_saving / len(layers), "trained_share": sum(is_trained) / len(layers)}


def _embedding(base: Any) -> nn.Module | None:
    try:
        found = base.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Embedding) else None


class _Counter:
    """Counts of some parameters, given which are quantised."""

    def __init__(self, quantized: set[nn.Parameter]) -> None:
        self.quantized = {id(parameter) for parameter in quantized}

    def __call__(self, parameters: list[nn.Parameter]) -> Counts:
        return Counts(
            total=sum(p.numel() for p in parameters),
            trainable=sum(p.numel() for p in parameters if p.requires_grad),
            quantized=sum(p.numel() for p in parameters if id(p) in self.quantized),
        )
