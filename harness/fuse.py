"""Swaps module instances of a built model for ones that call our kernels (`fused`). Structure decides, never a name.

What a norm, an activation, a gated MLP or an attention module computes is found by running it on random numbers beside
the formula; which linears read one tensor, and which module made it, by watching one forward pass (`trace`). The fused
model must then give the logits it gave before; if it does not, every swap is undone.
"""

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.dora_norm import DoraNorm
from . import fused
from .attention import use_fast_attention
from .fused import (
    AttentionPlan,
    FusedActivation,
    FusedAttention,
    FusedHead,
    FusedLinear,
    FusedMlp,
    FusedNorm,
    GatedMlp,
    Group,
    NormKind,
)
from .mapping import is_mapped
from .tasks.common import accepts, unwrap
from .trace import Trace, trace

logger = logging.getLogger(__name__)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Relative difference up to which two results are the same computation, rounded differently."""


WHOLE_MODEL = 5
"""How many times the rounding of one module a model's logits may differ: 1.1 times were seen in 30 layers of bf16."""
ANY_IMAGE_SIZE = 64
"""Edge in pixels of the image for a convolutional network, which takes any."""


@dataclass(frozen=True)
class Fused:
    """How many modules of each kind call our kernels."""

    linears: int = 0
    groups: int = 0
    norms: int = 0
    activations: int = 0
    mlps: int = 0
    attentions: int = 0
    loss: bool = False
    attention_kernel: bool = False


class Swaps:
    """Replaces modules in their parents and can put them back."""

    def __init__(self, root: nn.Module) -> None:
        self.done: list[tuple[nn.Module, str, nn.Module]] = []
        self.places: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in root.modules():
            for name, child in parent.named_children():
                self.places.setdefault(id(child), []).append((parent, name))

    def become(self, module: nn.Module, mixin: type, **attributes: Any) -> Any:
        """The same module (one state, one name) with the mix-in's forward, in every place where the module is."""
        kind = type(module)
        new: Any = object.__new__(type(f"{mixin.__name__}{kind.__name__}", (mixin, kind), {}))
        new.__dict__ = module.__dict__
        for name, value in attributes.items():
            object.__setattr__(new, name, value)
        places = self.places[id(module)]
        for parent, name in places:
            setattr(parent, name, new)
            self.done.append((parent, name, module))
        self.places[id(new)] = places
        return new

    def undo(self) -> None:
        for parent, name, module in reversed(self.done):
            setattr(parent, name, module)
        self.done.clear()


def fuse(model: nn.Module) -> Fused:
    """Fuses in place what it recognises and returns the counts; the model computes the same, its names stay.

    Call it after the adapters are in and before an engine takes the model. Raises what the model's own forward raises.
    """
    base = unwrap(model)
    inputs = probe_inputs(base)
    swaps = Swaps(base)
    with probing(base):
        try:
            before = outputs_of(base, inputs)
        except Exception as error:
            logger.info("%s was not fused: its forward pass failed: %s", type(base).__name__, error)
            return Fused()
        for module in [m for m in base.modules() if is_lora_linear(m)]:
            new = swaps.become(module, FusedLinear, dora_norm=DoraNorm())
            object.__setattr__(new, "group", Group([new]))
        seen = trace(base, inputs)
        groups = make_groups(seen)
        counts = Fused(
            linears=len(seen.linears),
            groups=sum(len(group.members) > 1 for group in groups),
            mlps=fuse_mlps(base, swaps),
            attentions=fuse_attentions(seen, groups, swaps),
            activations=fuse_activations(seen, swaps),
            norms=fuse_norms(base, seen, swaps),
            loss=fuse_head(base, seen, swaps),
            attention_kernel=use_fast_attention(base),
        )
        after = outputs_of(base, inputs)
    if not is_close(after, before, layers=WHOLE_MODEL):
        swaps.undo()
        return Fused(attention_kernel=counts.attention_kernel)
    for group in groups:
        # A copy of a mapped weight would be this process's own: only one that is alone on its host makes it.
        if getattr(base, "is_alone", False) or not any(is_mapped(member.base_layer.weight) for member in group.members):
            pack_weights(group)
    return counts


def is_close(one: Tensor, other: Tensor, *, layers: int = 1) -> bool:
    """Equal up to the rounding of their dtype, that of `layers` layers together."""
    difference = (one.double() - other.double()).norm()
    return bool(difference <= layers * TOLERANCE[one.dtype] * other.double().norm() + 1e-30)


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Eval mode but for dropouts of the model itself (they separate a producer from its consumer), no gradients."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    devices = range(torch.cuda.device_count())
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def probe_inputs(model: Any) -> dict[str, Any]:
    """A small batch that the model takes: eight tokens, or one image."""
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    if accepts(model, "pixel_values") and not accepts(model, "input_ids"):
        size = getattr(model.config, "image_size", ANY_IMAGE_SIZE)
        shape = (1, model.config.num_channels, *(size if isinstance(size, tuple | list) else (size, size)))
        return {"pixel_values": torch.randn(shape, device=parameter.device, dtype=parameter.dtype)}
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(1, 9, device=parameter.device) * 7 % vocabulary)[None]
    inputs: dict[str, Any] = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids.flip(1)
    if accepts(model, "use_cache"):
        inputs["use_cache"] = False
    return inputs


def outputs_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    outputs = model(**inputs)
    return outputs.logits if "logits" in outputs else outputs[0]


def is_lora_linear(module: Any) -> bool:
    """A PEFT LoRA layer over a linear layer that our kernels can read."""
    if not (hasattr(module, "lora_A") and hasattr(module, "base_layer")) or hasattr(module, "group"):
        return False
    return fused.adapter_of(module) is not None and fused.projection_of(module) is not None


def make_groups(seen: Trace) -> list[Group]:
    """Linears of one parent that read the same tensor become one group, three at most."""
    groups = []
    for members in seen.readers_of_one_tensor():
        for start in range(0, len(members), fused.MAX_LANES):
            group = Group(members[start : start + fused.MAX_LANES])
            for member in group.members:
                object.__setattr__(member, "group", group)
            groups.append(group)
    return groups


def pack_weights(group: Group) -> None:
    """Makes the dense weights of a group adjacent rows of one storage, so that one GEMM serves them all."""
    bases = [member.base_layer for member in group.members]
    weights = [base.weight for base in bases]
    is_dense = all(type(base) is nn.Linear and base.weight.is_floating_point() for base in bases)
    if len(weights) < 2 or not is_dense or len({(w.dtype, w.device, w.shape[1]) for w in weights}) > 1:
        return
    rows = torch.cat([weight.data for weight in weights])
    for weight, part in zip(weights, rows.split([w.shape[0] for w in weights]), strict=True):
        weight.data = part


def fuse_norms(base: nn.Module, seen: Trace, swaps: Swaps) -> int:
    found = 0
    for module in list(base.modules()):
        kind = norm_kind(module)
        if kind is not None:
            swaps.become(module, FusedNorm, kind=kind, feeds=seen.fed_by(module))
            found += 1
    return found


def norm_kind(module: Any) -> NormKind | None:
    """LayerNorm, or an RMS norm found by computing it; None for anything else."""
    if type(module) is nn.LayerNorm:
        return NormKind(module.eps, None) if len(module.normalized_shape) == 1 else None
    parameters = dict(module.named_parameters())
    if list(parameters) != ["weight"] or parameters["weight"].ndim != 1 or any(True for _ in module.children()):
        return None
    weight = parameters["weight"]
    if not weight.is_floating_point() or weight.numel() < 2:
        return None
    x = torch.randn(3, weight.shape[0], device=weight.device, dtype=weight.dtype)
    candidates = [value for value in vars(module).values() if isinstance(value, float) and 0 < value < 1e-2]
    try:
        y = module(x)
    except Exception:
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    for eps, offset in itertools.product(candidates, (0.0, 1.0)):
        normed = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps)
        if is_close(y, (normed * (weight.double() + offset)).to(x.dtype)):
            return NormKind(eps, offset)
    return None


def activation_of(module: nn.Module) -> str | None:
    """The name of an activation module, by computing it; None for anything else."""
    if any(True for _ in module.parameters()) or isinstance(module, nn.Identity | nn.Dropout):
        return None
    x = torch.linspace(-6, 6, 101)
    try:
        y = module(x)
    except Exception:
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    return next((name for name, f in ACTIVATIONS.items() if torch.allclose(y, f(x), rtol=1e-6, atol=1e-6)), None)


def fuse_activations(seen: Trace, swaps: Swaps) -> int:
    """Activation modules whose output a group reads; those of gated MLPs are the MLP's own."""
    found = 0
    for module in seen.makers():
        group, name = seen.fed_by(module), activation_of(module)
        if group is not None and name is not None:
            swaps.become(module, FusedActivation, activation=name, feeds=group)
            found += 1
    return found


def fuse_mlps(base: nn.Module, swaps: Swaps) -> int:
    found = 0
    for module in list(base.modules()):
        parts = gated_mlp(module)
        if parts is not None:
            swaps.become(module, FusedMlp, parts=parts)
            found += 1
    return found


def gated_mlp(module: Any) -> GatedMlp | None:
    """The parts of a module that computes down(act(gate(x)) * up(x)), found by computing it; None for any other."""
    children = dict(module.named_children())
    linears = {name: child for name, child in children.items() if _features(child) is not None}
    others = [child for name, child in children.items() if name not in linears]
    if len(linears) != 3 or any(isinstance(child, nn.Dropout) and child.p > 0 for child in others):
        return None
    names = {activation_of(child) for child in others if not isinstance(child, nn.Dropout)}
    activation = names.pop() if len(names) == 1 else None
    if activation is None:
        return None
    for gate, up, down in itertools.permutations(linears, 3):
        inner, outer = _features(linears[gate]), _features(linears[down])
        if inner != _features(linears[up]) or inner is None or outer != inner[::-1]:
            continue
        weight = next(p for p in module.parameters() if p.is_floating_point())
        x = torch.randn(2, 3, inner[0], device=weight.device, dtype=weight.dtype) * 4
        expected = linears[down](ACTIVATIONS[activation](linears[gate](x)) * linears[up](x))
        try:
            y = module(x)
        except Exception:
            return None
        if isinstance(y, Tensor) and y.shape == expected.shape and is_close(y, expected):
            return GatedMlp(gate, up, down, activation)
    return None


def _features(module: Any) -> tuple[int, int] | None:
    """(in, out) of a linear layer, adapted or not."""
    found = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (int(found[0]), int(found[1])) if isinstance(found[0], int) and isinstance(found[1], int) else None


def fuse_attentions(seen: Trace, groups: list[Group], swaps: Swaps) -> int:
    found = 0
    for module, call in seen.attentions.items():
        plan = attention_plan(module, call, groups)
        if plan is not None:
            swaps.become(module, FusedAttention, plan=plan)
            found += 1
    return found


def attention_plan(module: Any, call: Any, groups: list[Group]) -> AttentionPlan | None:
    """How this module makes the q, k and v that it was seen to pass on; None if our way gives others."""
    children = list(module.children())
    own = [group for group in groups if len(group.members) == 3 and all(m in children for m in group.members)]
    if len(own) != 1 or "position_embeddings" not in call.inputs or not hasattr(module, "attention_dropout"):
        return None
    names = {id(child): name for name, child in module.named_children()}
    outputs = [child for child in children if _features(child) and child not in own[0].members]
    norms = [names[id(child)] for child in children if norm_kind(child) is not None]
    options = {name: value for name, value in call.options.items() if name not in call.inputs and name != "dropout"}
    if len(outputs) != 1 or len(norms) not in (0, 2) or any(isinstance(v, Tensor) for v in options.values()):
        return None
    q_norm, k_norm = norms or (None, None)
    for interleaved in (False, True):
        plan = AttentionPlan(own[0], names[id(outputs[0])], q_norm, k_norm, call.q.shape[-1], interleaved, options)
        packed = own[0].packed(call.inputs["hidden_states"])
        if packed is None:
            return None
        made = fused.rotated_heads(module, plan, packed, *call.inputs["position_embeddings"])
        if all(a.shape == b.shape and is_close(a, b) for a, b in zip(made, (call.q, call.k, call.v), strict=True)):
            return plan
    return None


def fuse_head(base: Any, seen: Trace, swaps: Swaps) -> bool:
    """The output embedding, where the model's logits are its output, soft-capped or not."""
    head: Any = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if not fused.is_plain_linear(head) or seen.head_input is None or not accepts(base, "logits_to_keep"):
        return False
    cap = getattr(base.config, "final_logit_softcapping", None)
    logits = head(seen.head_input)
    for softcap in {None, cap}:
        expected = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        if seen.output.shape == expected.shape and is_close(seen.output, expected):
            swaps.become(head, FusedHead, softcap=softcap, targets=None, num_right=None)
            return True
    return False
