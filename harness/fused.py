"""Modules that call our kernels. Each is a mix-in put before the class of a module of transformers or PEFT: parameters,
names and state stay; where the module is in a state the kernels do not know, the original forward runs.

A *group* is a set of LoRA linears that read the same tensor (q|k|v, gate|up): one call computes them all. A *producer*
(norm, activation) makes that tensor and, in the same pass, S = scale * drop(y) A^T of the group it feeds, so the group
saves neither the tensor nor a mask.

Shape letters: B batch, T tokens, D hidden, H heads, N output features, R ranks of a group.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..kernels.columns import split_columns
from ..kernels.dora import dora_linear
from ..kernels.dora_norm import DoraNorm
from ..kernels.glu import glu
from ..kernels.layer_norm import layer_norm
from ..kernels.linear_cross_entropy import linear_cross_entropy
from ..kernels.lora_linear import Projection, lora_linear
from ..kernels.nf4_dequant import Nf4Weight, nf4_dequant
from ..kernels.rms_norm import rms_norm
from ..kernels.rope import rope
from ..kernels.shrink import MAX_LANES, Shrink, draw_seed


def adapter_of(module: Any) -> str | None:
    """The one adapter that our kernels apply in this module's present state; None where PEFT's own code must run."""
    if module.disable_adapters or module.merged:
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) != 1 or module.lora_B[active[0]].bias is not None:
        return None
    is_plain = active[0] not in module.lora_variant or active[0] in module.lora_magnitude_vector
    return active[0] if is_plain else None


def frozen_weight(base: nn.Module) -> tuple[Tensor, Nf4Weight | None] | None:
    """A linear layer's weight as [N, K] and how it is packed; None if it is trained, or of a kind we do not know."""
    weight = base.weight
    if not isinstance(weight, Tensor) or weight.requires_grad:
        return None
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return (weight, Nf4Weight.from_quant_state(weight, state)) if state.quant_type == "nf4" else None
    if not weight.is_floating_point():
        return None
    if isinstance(base, Conv1D):
        return weight.t(), None
    return (weight, None) if type(base) is nn.Linear else None


def is_plain_linear(module: Any) -> bool:
    """A linear layer, dense or in NF4, without an adapter."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return type(module) is nn.Linear or (isinstance(module, nn.Linear) and getattr(state, "quant_type", "") == "nf4")


def dense_weight(module: Any) -> Tensor:
    """The weight of a plain linear layer; one in NF4 is dense only while the caller holds it."""
    weight: Tensor = module.weight
    state = getattr(weight, "quant_state", None)
    return weight if state is None else nf4_dequant(Nf4Weight.from_quant_state(weight, state))


def projection_of(module: Any) -> Projection | None:
    """The linear layer and its adapter for the kernels; None where PEFT's own code must run."""
    name = adapter_of(module)
    found = frozen_weight(module.base_layer) if name else None
    if name is None or found is None:
        return None
    weight, quant = found
    return Projection(
        weight=weight,
        bias=module.base_layer.bias,
        a=module.lora_A[name].weight,
        b=module.lora_B[name].weight,
        scale=float(module.scaling[name]),
        quant=quant,
    )


def dropout_of(module: Any) -> float:
    """The dropout probability that holds now."""
    dropout = module.lora_dropout[adapter_of(module)]
    return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory with the same content; DeepSpeed's hooks pass on new objects."""
    if one is other:
        return True
    has_same_layout = one.shape == other.shape and one.stride() == other.stride()
    return has_same_layout and one.data_ptr() == other.data_ptr() and one._version == other._version


class Group:
    """LoRA linears that read one tensor. Holds what a producer or the first member made until it is fetched."""

    def __init__(self, members: Sequence[Any]) -> None:
        assert 1 <= len(members) <= MAX_LANES, len(members)
        self.members = list(members)
        self.offered: tuple[Tensor, Tensor] | None = None
        self.outputs: tuple[Tensor, dict[int, Tensor]] | None = None

    def projections(self) -> list[Projection] | None:
        """All members for one call; None where one of them must run on its own."""
        if any(adapter_of(m) is None or adapter_of(m) in m.lora_magnitude_vector for m in self.members):
            return None
        if len({dropout_of(m) for m in self.members}) > 1:
            return None
        found = [projection_of(member) for member in self.members]
        return None if any(p is None for p in found) else [p for p in found if p is not None]

    def shrink(self) -> Shrink | None:
        """What a producer needs to make S for this group; None where S is not wanted."""
        projections = self.projections()
        if projections is None:
            return None
        p = dropout_of(self.members[0])
        return Shrink(tuple(x.a for x in projections), tuple(x.scale for x in projections), p, draw_seed(p))

    def offer(self, y: Tensor, s: Tensor | None) -> None:
        """A producer's output and the S that belongs to it."""
        self.offered = None if s is None else (y, s)

    def packed(self, x: Tensor) -> Tensor | None:
        """All members' outputs side by side [..., sum N]; None where the members must run on their own."""
        offered, self.offered = self.offered, None
        projections = self.projections()
        if projections is None:
            return None
        if offered is not None and is_same(x, offered[0]):
            return lora_linear(x, projections, s=offered[1])
        return lora_linear(x, projections, p=dropout_of(self.members[0]))

    def sizes(self) -> list[int]:
        return [int(member.out_features) for member in self.members]

    def output_of(self, member: Any, x: Tensor) -> Tensor | None:
        """One member's output: computed with all others at the first call, fetched at the following ones."""
        if self.outputs is not None and is_same(x, self.outputs[0]) and id(member) in self.outputs[1]:
            parts = self.outputs[1]
        else:
            packed = self.packed(x)
            if packed is None:
                return None
            outputs = split_columns(packed, self.sizes()) if len(self.members) > 1 else (packed,)
            parts = {id(m): part for m, part in zip(self.members, outputs, strict=True)}
            self.outputs = (x, parts)
        found = parts.pop(id(member))
        if not parts:
            self.outputs = None
        return found

    def parameters(self) -> Iterator[nn.Parameter]:
        for member in self.members:
            yield from member.parameters()


class FusedLinear:
    """Before PEFT's LoRA Linear (dense or 4-bit)."""

    group: Group
    dora_norm: DoraNorm

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = None
        if not args and not kwargs:
            name = adapter_of(self)
            if name is not None and name in self.lora_magnitude_vector:  # type: ignore[attr-defined]
                found = self._dora(x, name)
            else:
                found = self.group.output_of(self, x)
        return super().forward(x, *args, **kwargs) if found is None else found  # type: ignore[misc]

    def _dora(self, x: Tensor, name: str) -> Tensor | None:
        projection = projection_of(self)
        if projection is None:
            return None
        magnitude = self.lora_magnitude_vector[name].weight  # type: ignore[attr-defined]
        self.dora_norm.clear()  # engines write to A and B where autograd does not see it
        return dora_linear(x, projection, magnitude, p=dropout_of(self), norm=self.dora_norm(projection))

    def external_parameters(self) -> Iterator[nn.Parameter]:
        return self.group.parameters()


@dataclass(frozen=True)
class NormKind:
    """What a norm module computes: rms_norm with an offset, or layer_norm (offset None)."""

    eps: float
    offset: float | None


class FusedNorm:
    """Before a norm module; makes S for the group it feeds, if there is one."""

    kind: NormKind
    feeds: Group | None

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight: Any = self.weight  # type: ignore[attr-defined]
        # Behind frozen embeddings y takes no gradient: nothing would tell ZeRO-3 to gather the weight in backward.
        group = self.feeds if hidden_states.requires_grad or not torch.is_grad_enabled() else None
        shrink = group.shrink() if group is not None else None
        if self.kind.offset is None:
            bias: Any = self.bias  # type: ignore[attr-defined]
            y, _, s = layer_norm(hidden_states, weight, bias, eps=self.kind.eps, shrink=shrink)
        else:
            y, _, s = rms_norm(hidden_states, weight, eps=self.kind.eps, offset=self.kind.offset, shrink=shrink)
        if group is not None:
            group.offer(y, s)
        return y

    def external_parameters(self) -> Iterator[nn.Parameter]:
        return adapter_parameters(self.feeds)


class FusedActivation:
    """Before an activation module that feeds a group."""

    activation: str
    feeds: Group

    def forward(self, x: Tensor) -> Tensor:
        h, s = glu(x, None, activation=self.activation, shrink=self.feeds.shrink())
        self.feeds.offer(h, s)
        return h

    def external_parameters(self) -> Iterator[nn.Parameter]:
        return adapter_parameters(self.feeds)


@dataclass(frozen=True)
class GatedMlp:
    """The parts of a gated MLP: down(act(gate(x)) * up(x))."""

    gate: str
    up: str
    down: str
    activation: str


class FusedMlp:
    """Before a gated MLP module."""

    parts: GatedMlp

    def forward(self, x: Tensor) -> Tensor:
        gate_module, up_module, down = (
            getattr(self, name) for name in (self.parts.gate, self.parts.up, self.parts.down)
        )
        gate, up = gate_module(x), up_module(x)
        group: Group | None = getattr(down, "group", None)
        h, s = glu(gate, up, activation=self.parts.activation, shrink=group.shrink() if group else None)
        if group is not None:
            group.offer(h, s)
        return down(h)

    def external_parameters(self) -> Iterator[nn.Parameter]:
        return adapter_parameters(getattr(getattr(self, self.parts.down), "group", None))


@dataclass(frozen=True)
class AttentionPlan:
    """How an attention module is put together, and the constant options it passes to the attention function."""

    group: Group
    output: str
    q_norm: str | None
    k_norm: str | None
    head_dim: int
    interleaved: bool
    options: dict[str, Any]


class FusedAttention:
    """Before an attention module that projects q, k and v from one tensor and rotates q and k."""

    plan: AttentionPlan

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        positions: Any = kwargs.get("position_embeddings")
        packed = None if args or positions is None else self.plan.group.packed(hidden_states)
        if packed is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        q, k, v = rotated_heads(self, self.plan, packed, *positions)
        cache = kwargs.pop("past_key_values", None)
        del kwargs["position_embeddings"]
        mask = kwargs.pop("attention_mask", None)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)  # type: ignore[attr-defined]
        dropout = self.attention_dropout if self.training else 0.0  # type: ignore[attr-defined]
        attend = attention_function(self)
        output, weights = attend(self, q, k, v, mask, dropout=dropout, **self.plan.options, **kwargs)
        return getattr(self, self.plan.output)(output.reshape(*hidden_states.shape[:-1], -1)), weights

    def external_parameters(self) -> Iterator[nn.Parameter]:
        return self.plan.group.parameters()


def attention_function(module: Any) -> Any:
    """What transformers would call for this module."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import eager_attention_forward

    return ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention_forward)


def rotated_heads(
    module: Any, plan: AttentionPlan, packed: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, T, K], k and v from a packed projection [B, T, N]: normed if the module norms them, and rotated."""
    sizes = plan.group.sizes()
    rotate = {"cos": cos, "sin": sin, "interleaved": plan.interleaved}
    if plan.q_norm is None or plan.k_norm is None:
        packed = rope(packed, head_dim=plan.head_dim, num_heads=(sizes[0] + sizes[1]) // plan.head_dim, **rotate)
        q, k, v = (part.unflatten(-1, (-1, plan.head_dim)) for part in split_columns(packed, sizes))
    else:
        q, k, v = (part.unflatten(-1, (-1, plan.head_dim)) for part in split_columns(packed, sizes))
        q, k = (rope(getattr(module, name)(x), **rotate) for name, x in ((plan.q_norm, q), (plan.k_norm, k)))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class FusedHead:
    """Before the output embedding of a language model: computes the loss without logits when it is asked to."""

    softcap: float | None
    targets: Tensor | None
    label_smoothing: float
    num_right: Tensor | None

    def loss_of(self, targets: Tensor, run: Callable[[], Any], *, label_smoothing: float) -> tuple[Tensor, Tensor]:
        """(summed loss, number of right answers) of what the head is given while `run` runs the model; targets [B, T].

        The loss is what the head's last forward hook passes on, and the model's own output is added with weight zero:
        so the backward hooks of every module run, which ZeRO-3 gathers and frees parameters by.
        """
        passed_on: list[Tensor] = []
        self.targets, self.label_smoothing = targets, label_smoothing
        hook = self.register_forward_hook(lambda _module, _inputs, output: passed_on.append(output))  # type: ignore[attr-defined]
        try:
            output = run().logits
            assert self.num_right is not None
            return passed_on[0].sum() + 0 * output.sum(), self.num_right
        finally:
            hook.remove()
            self.targets = self.num_right = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.targets is None:
            return super().forward(hidden_states)  # type: ignore[misc]
        assert self.targets.shape == hidden_states.shape[:-1], (self.targets.shape, hidden_states.shape)
        loss_sum, self.num_right = linear_cross_entropy(
            hidden_states.flatten(0, -2),
            dense_weight(self),
            self.targets.flatten(),
            bias=self.bias,  # type: ignore[attr-defined]
            label_smoothing=self.label_smoothing,
            softcap=self.softcap,
        )
        return loss_sum.view(1, 1, 1)


def adapter_parameters(group: Group | None) -> Iterator[nn.Parameter]:
    """The A matrices that a producer reads."""
    for member in group.members if group is not None else ():
        yield from member.lora_A.parameters()
