"""One watched forward pass: which linears read which tensor, which module made it, what attention was called with."""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .fused import FusedLinear, Group, attention_function

RECORDING = "burnish_recording"
"""The name under which transformers finds the recording attention function."""


@dataclass
class AttentionCall:
    """What an attention module was given, and what it passed to the attention function."""

    inputs: dict[str, Any]
    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]


@dataclass
class Trace:
    """Events in order. Every tensor is kept, so that an address names one tensor."""

    linears: list[tuple[Any, Tensor]] = field(default_factory=list)
    made: dict[int, tuple[nn.Module, list[Tensor]]] = field(default_factory=dict)
    attentions: dict[nn.Module, AttentionCall] = field(default_factory=dict)
    parents: dict[int, nn.Module] = field(default_factory=dict)
    head_input: Tensor | None = None
    output: Tensor = field(default_factory=lambda: torch.empty(0))

    def readers_of_one_tensor(self) -> list[list[Any]]:
        """LoRA linears by (parent, tensor they read), in the order of their first call; each appears once."""
        found: dict[tuple[int, int], list[Any]] = {}
        placed: set[int] = set()
        for module, x in self.linears:
            if id(module) not in placed:
                placed.add(id(module))
                found.setdefault((id(self.parents[id(module)]), x.data_ptr()), []).append(module)
        return list(found.values())

    def makers(self) -> list[nn.Module]:
        """Modules without children, in order."""
        return [module for module, _ in self.made.values()]

    def fed_by(self, module: nn.Module) -> Group | None:
        """The group that reads the module's output first, if one reads it as it is and lies in the same layer.

        A layer may be recomputed alone in backward, and must not need then what a module outside it handed over.
        """
        _, outputs = self.made.get(id(module), (module, []))
        made = {output.data_ptr() for output in outputs}
        reader = next((linear for linear, x in self.linears if x.data_ptr() in made), None)
        return reader.group if reader is not None and self._layer_of(reader) is self._layer_of(module) else None

    def _layer_of(self, module: nn.Module | None) -> nn.Module | None:
        """The layer around a module that activation checkpointing recomputes as a whole."""
        while module is not None and not isinstance(module, GradientCheckpointingLayer):
            module = self.parents.get(id(module))
        return module


def trace(model: Any, inputs: dict[str, Any]) -> Trace:
    """Runs model(**inputs) and records it. The model's own dropouts are on: what they separate is not one tensor."""
    seen = Trace()
    for parent in model.modules():
        for child in parent.children():
            seen.parents.setdefault(id(child), parent)
    with _recording(model, seen):
        outputs = model(**inputs)
    seen.output = outputs.logits if "logits" in outputs else outputs[0]
    return seen


class _recording:  # noqa: N801
    """Hooks on all modules of interest while the pass runs."""

    def __init__(self, model: Any, seen: Trace) -> None:
        self.model, self.seen = model, seen
        self.handles: list[Any] = []
        self.configs: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        for name, module in self.model.named_modules():
            if ".lora_" not in name:  # the dropout of an adapter would change what others are compared with
                self.handles += list(self._hooks(module, head))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        for module, config in self.configs:
            module.config = config
            _RECORDERS.pop(id(module))

    def _hooks(self, module: Any, head: Any) -> Iterator[Any]:
        if isinstance(module, FusedLinear):
            yield module.register_forward_pre_hook(self._read)  # type: ignore[attr-defined]
        elif module is head and head is not None:
            yield module.register_forward_pre_hook(self._head)
        elif isinstance(module, nn.Dropout):
            self.handles.append(_Restore(module))
        elif not any(True for _ in module.children()):
            yield module.register_forward_hook(self._made)
        elif hasattr(module, "attention_dropout") and _is_plain(getattr(module, "config", None)):
            yield self._watch_attention(module)

    def _read(self, module: Any, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            self.seen.linears.append((module, inputs[0]))

    def _head(self, module: Any, inputs: tuple[Any, ...]) -> None:
        self.seen.head_input = inputs[0]

    def _made(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self.seen.made.setdefault(id(module), (module, []))[1].append(output)

    def _watch_attention(self, module: Any) -> Any:
        """The module sees a copy of its config that names the recording attention function."""
        attend = attention_function(module)
        given: dict[str, Any] = {}

        def remember(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given.clear()
            given.update(kwargs | ({"hidden_states": args[0]} if args else {}))

        def record(*args: Any, **options: Any) -> Any:
            _, q, k, v, *_ = args
            self.seen.attentions[module] = AttentionCall(dict(given), q.clone(), k.clone(), v.clone(), options)
            return attend(*args, **options)

        self.configs.append((module, module.config))
        _RECORDERS[id(module)] = record
        module.config = copy(module.config)
        module.config._attn_implementation = RECORDING
        return module.register_forward_pre_hook(remember, with_kwargs=True)


def _is_plain(config: Any) -> bool:
    """A configuration without parts: those would be changed together with a copy of it."""
    return config is not None and not config.sub_configs


class _Restore:
    """A dropout in train mode until removed."""

    def __init__(self, module: nn.Dropout) -> None:
        self.module, self.was = module, module.training
        module.training = True

    def remove(self) -> None:
        self.module.training = self.was


_RECORDERS: dict[int, Any] = {}


def _record(module: Any, *args: Any, **options: Any) -> Any:
    return _RECORDERS[id(module)](module, *args, **options)


AttentionInterface.register(RECORDING, _record)
assert RECORDING in ALL_ATTENTION_FUNCTIONS.valid_keys()
