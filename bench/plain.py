"""Every operation as a user of PyTorch writes it: the yardstick of the kernel benchmark, and what is compiled.

The references of the records make burnish's dropout masks in many small operations, for tests; here dropout is
PyTorch's own. Tensors are laid out as in a model without burnish: separate outputs, gates and heads, where burnish has
them side by side. Each function makes a Run from a Problem, with the gradients in the order of the reference's.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..kernels.activations import ACTIVATIONS
from ..kernels.nf4_quantize import nf4_quantize_reference
from ..kernels.op import Case, Op
from ..kernels.shrink import Shrink
from .op_runs import Expected, Run, draw_like, expected_of, floats, fresh, inputs_of


@dataclass(frozen=True)
class Problem:
    """An operation on one set of inputs, and the gradients of its outputs: what every contender is given."""

    op: Op
    case: Case
    dtype: torch.dtype
    device: str
    inputs: dict[str, Any]
    cotangents: list[Tensor]

    @functools.cached_property
    def expected(self) -> Expected:
        return expected_of(self.op, self.inputs)

    @property
    def p(self) -> float:
        """The largest probability of dropout in it."""
        found = self.case.get("p", 0.0)
        return max(found) if isinstance(found, Sequence) else found

    def copied(self) -> "Problem":
        """The same numbers elsewhere in memory."""
        inputs, cotangents = fresh(self.inputs, copies=True), fresh(self.cotangents, copies=True)
        return Problem(self.op, self.case, self.dtype, self.device, inputs, cotangents)


def problem_of(op: Op, case: Case, dtype: torch.dtype, device: str) -> Problem:
    inputs = inputs_of(op, case, dtype, device)
    with torch.no_grad():
        outputs = floats(op.function(**inputs, **op.options))
    return Problem(op, case, dtype, device, inputs, draw_like(outputs))


def columns_of(dy: Tensor, projections: Sequence[Any]) -> list[Tensor]:
    """The gradient of every projection's own output."""
    return [part.contiguous() for part in dy.split([part.num_outputs for part in projections], dim=-1)]


def side_by_side(value: Any, grads: list[Tensor]) -> list[Tensor]:
    return [torch.cat(list(value), dim=-1), *grads]


def shrunk(y: Tensor, shrink: Shrink | None) -> Tensor | None:
    """S of a group of low-rank updates behind y [M, K]."""
    if shrink is None:
        return None
    parts = [scale * F.linear(F.dropout(y, shrink.p), a) for a, scale in zip(shrink.a, shrink.scales, strict=True)]
    return torch.cat(parts, dim=-1)


def _lora_linear(problem: Problem) -> Run:
    def function(x: Tensor, projections: Sequence[Any], p: float, **_: Any) -> list[Tensor]:
        return [
            F.linear(x, part.weight, part.bias) + F.linear(F.linear(F.dropout(x, p), part.a), part.b) * part.scale
            for part in projections
        ]

    arguments = fresh(problem.inputs)
    return Run(function, arguments, columns_of(problem.cotangents[0], arguments["projections"]), side_by_side)


def _dora(problem: Problem) -> Run:
    def function(x: Tensor, projection: Any, magnitude: Tensor, p: float, mode: str, **_: Any) -> Tensor:
        weight, a, b, scale = projection.weight, projection.a, projection.b, projection.scale
        gain = magnitude / torch.linalg.vector_norm(weight + scale * (b @ a), dim=1).detach()
        dropped, base = F.dropout(x, p), F.linear(x, weight)
        scaled = F.linear(dropped, weight) if p > 0 and mode == "exact" else base
        y = base + (gain - 1) * scaled + gain * (scale * F.linear(F.linear(dropped, a), b))
        return y if projection.bias is None else y + projection.bias

    return Run(function, fresh(problem.inputs), problem.cotangents)


def _dropout(problem: Problem) -> Run:
    return Run(lambda x, p, **_: F.dropout(x, p), fresh(problem.inputs), problem.cotangents)


def _norm(problem: Problem) -> Run:
    reference = problem.op.reference

    def function(x: Tensor, shrink: Shrink | None = None, **options: Any) -> tuple[Any, ...]:
        y, h, _ = reference(x, **options)
        return y, h, shrunk(y, shrink)

    return Run(function, fresh(problem.inputs), problem.cotangents)


def gate_and_up(problem: Problem, function: Callable[[Tensor, Tensor], Tensor]) -> Run:
    """h = function(gate, up) and S of gate and up in memory of their own, where burnish has them in one buffer."""
    gate_up, shrink = problem.inputs["gate_up"], fresh(problem.inputs["shrink"])

    def whole(gate: Tensor, up: Tensor, shrink: Shrink | None) -> tuple[Tensor, Tensor | None]:
        h = function(gate, up)
        return h, shrunk(h, shrink)

    def arranged(value: Any, grads: list[Tensor]) -> list[Tensor]:
        return [*floats(value), torch.cat(grads[:2], dim=-1), *grads[2:]]

    gate, up = (part.detach().contiguous().requires_grad_() for part in gate_up.chunk(2, dim=-1))
    return Run(whole, {"gate": gate, "up": up, "shrink": shrink}, problem.cotangents, arranged)


def _glu(problem: Problem) -> Run:
    activation = ACTIVATIONS[problem.inputs["activation"]].function
    return gate_and_up(problem, lambda gate, up: activation(gate) * up)


def _lora_grads(problem: Problem) -> Run:
    """The dropped input is there already: PyTorch kept it from forward."""
    inputs = fresh(problem.inputs)
    dropped = F.dropout(inputs["x"], inputs["p"])

    def function(dy: Tensor, s: Tensor, b: Tensor, dropped: Tensor, scale: float) -> tuple[Tensor, ...]:
        ds = scale * (dy @ b)
        return ds, dy.t() @ s, ds.t() @ dropped

    arguments = {"dropped": dropped, **{name: inputs[name] for name in ("dy", "s", "b", "scale")}}
    return Run(function, arguments, problem.cotangents)


def _multi_lora(problem: Problem) -> Run:
    def function(x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Any, offsets: Sequence[int]) -> Tensor:
        y = F.linear(x, weight, bias)
        parts = [y[: offsets[0]]]
        for adapter, start, stop in zip(adapters, offsets[:-1], offsets[1:], strict=True):
            low = F.linear(F.dropout(x[start:stop], adapter.p), adapter.a)
            parts.append(y[start:stop] + F.linear(low, adapter.b) * adapter.scale)
        return torch.cat([*parts, y[offsets[-1] :]])

    return Run(function, fresh(problem.inputs), problem.cotangents)


def _linear_cross_entropy(problem: Problem) -> Run:
    """Without the number of right tokens, which burnish counts as well."""

    def function(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="sum")

    return Run(function, fresh(problem.inputs), problem.cotangents)


def queries_and_keys(problem: Problem, function: Callable[..., Any], *, are_heads_first: bool = False) -> Run:
    """(q', k') = function(q, k, cos, sin) of queries and keys in memory of their own; values take no part.

    They are [B, T, H, D], or [B, H, T, D] if `are_heads_first`. Of the case's heads the last are the values', as many
    as there are keys.
    """
    inputs, case, (dy,) = problem.inputs, problem.case, problem.cotangents
    heads, num_values = case["heads"], case["H"] - case["heads"]

    def laid_out(x: Tensor) -> Tensor:
        return x.transpose(1, 2) if are_heads_first else x

    def apart(x: Tensor) -> list[Tensor]:
        parts = x.detach()[:, :, :heads].split([heads - num_values, num_values], dim=2)
        return [laid_out(part).contiguous() for part in parts]

    def together(parts: Sequence[Tensor], whole: Tensor) -> Tensor:
        return torch.cat([*map(laid_out, parts), whole.detach()[:, :, heads:]], dim=2)

    def arranged(value: Any, grads: list[Tensor]) -> list[Tensor]:
        return [together(value, inputs["x"]), together(grads, dy)]

    q, k = (part.requires_grad_() for part in apart(inputs["x"]))
    return Run(function, {"q": q, "k": k, "cos": inputs["cos"], "sin": inputs["sin"]}, apart(dy), arranged)


def _rope(problem: Problem) -> Run:
    reference = problem.op.reference

    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return reference(q, cos, sin), reference(k, cos, sin)

    return queries_and_keys(problem, function)


def in_bytes(value: Any, grads: list[Tensor]) -> list[Tensor]:
    """The fields of an Nf4Weight as the operation's record compares them."""
    fields = (value.packed, value.absmax, value.absmax2, value.offset, value.code2)
    return [field.float() for field in fields if field is not None]


def _nf4_quantize(problem: Problem) -> Run:
    return Run(nf4_quantize_reference, problem.inputs, floats(nf4_quantize_reference(**problem.inputs)), in_bytes)


PLAIN: dict[str, Callable[[Problem], Run]] = {
    "dora": _dora,
    "dropout": _dropout,
    "glu": _glu,
    "layer_norm": _norm,
    "linear_cross_entropy": _linear_cross_entropy,
    "lora_grads": _lora_grads,
    "lora_linear": _lora_linear,
    "multi_lora": _multi_lora,
    "nf4_quantize": _nf4_quantize,
    "rms_norm": _norm,
    "rope": _rope,
}


def plain(problem: Problem) -> Run:
    """The operation in plain PyTorch: as in PLAIN, else the reference of its record."""
    if problem.op.name in PLAIN:
        return PLAIN[problem.op.name](problem)
    return Run(problem.op.reference, fresh(problem.inputs), problem.cotangents)
