"""Optimizers by name: OPTIMIZERS maps optimizer.name to a function (parameter groups, options) -> torch optimizer."""

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch

from ..kernels import native
from .bnb import adamw_8bit
from .config import Adafactor, Adamw, Config, Rmsprop, Sgd

Groups = list[dict[str, Any]]


def make_optimizer(config: Config, named_params: Iterable[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
    """The configured optimizer over the parameters that require a gradient.

    Matrices (two or more dimensions) get `weight_decay`; norms, biases and other vectors are spared. Call it before
    DeepSpeed flattens the parameters: afterwards their shapes no longer tell the two kinds apart.
    """
    options = config.optimizer
    return OPTIMIZERS[options.name](parameter_groups(named_params, options.weight_decay), options)


def parameter_groups(named_params: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float) -> Groups:
    """Decayed and spared parameters as optimizer groups; a group without parameters is left out."""
    trained = [param for _, param in named_params if param.requires_grad]
    decayed = [param for param in trained if param.ndim >= 2]
    spared = [param for param in trained if param.ndim < 2]
    groups: Groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _adamw(groups: Groups, options: Adamw) -> torch.optim.Optimizer:
    """Our own on a CPU with a C++ compiler, else torch's. The results and the state are the same."""
    numbers: dict[str, Any] = {"lr": options.learning_rate, "betas": options.betas, "eps": options.eps}
    if find_spec("triton") and all(native.supports(param) for group in groups for param in group["params"]):
        from ..kernels.adapter_adamw import AdapterAdamW

        return AdapterAdamW(groups, **numbers)
    return torch.optim.AdamW(groups, **numbers, fused=True)


def _sgd(groups: Groups, options: Sgd) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=options.learning_rate, momentum=options.momentum, nesterov=options.nesterov)


def _rmsprop(groups: Groups, options: Rmsprop) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(
        groups, lr=options.learning_rate, alpha=options.alpha, eps=options.eps, momentum=options.momentum
    )


def _adafactor(groups: Groups, options: Adafactor) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=options.learning_rate)


OPTIMIZERS: dict[str, Callable[[Groups, Any], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": adamw_8bit,
    "sgd": _sgd,
    "rmsprop": _rmsprop,
    "adafactor": _adafactor,
}
