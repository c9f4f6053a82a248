"""One operation run forward and backward on given inputs, and how far its results are from the truth."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.op import Case, Op

ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class Run:
    """A function bound to its inputs; calling it computes the outputs and the gradient of every trained input."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    cotangents: list[Tensor]

    @classmethod
    def prepare(cls, function: Callable[..., Any], arguments: dict[str, Any]) -> "Run":
        """Calls the function once to see what comes out; the cotangents are fixed random numbers."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            outputs = floats(function(**arguments))
        drawn = [
            torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype).to(out.device)
            for out in outputs
        ]
        return cls(function, arguments, drawn)

    def forward(self) -> list[Tensor]:
        return floats(self.function(**self.arguments))

    def __call__(self) -> list[Tensor]:
        """Outputs, then gradients; an input that the function does not use has none."""
        outputs = self.forward()
        pairs = [(out, dy) for out, dy in zip(outputs, self.cotangents, strict=True) if out.requires_grad]
        leaves = [leaf for leaf in tensors_of(self.arguments) if leaf.requires_grad]
        if not pairs or not leaves:
            return outputs
        roots, cotangents = zip(*pairs, strict=True)
        found = torch.autograd.grad(roots, leaves, cotangents, allow_unused=True)
        grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]
        return [*outputs, *grads]


def floats(value: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_of(value) if tensor.is_floating_point()]


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in a value: itself, or inside tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in tensors_of(part)]
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in tensors_of(part)]
    if hasattr(value, "__dataclass_fields__"):
        return [tensor for name in value.__dataclass_fields__ for tensor in tensors_of(getattr(value, name))]
    return []


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """The same inputs as fresh leaves, floating-point tensors in `dtype`."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        return value.detach().to(dtype, copy=True).requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: in_dtype(part, dtype) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(in_dtype(part, dtype) for part in value)
    if hasattr(value, "__dataclass_fields__"):
        fields = {name: in_dtype(getattr(value, name), dtype) for name in value.__dataclass_fields__}
        return type(value)(**fields)
    return value


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the difference by the norm of the truth; infinite where the value is not finite."""
    if value.shape != truth.shape or not bool(value.isfinite().all()):
        return float("inf")
    size = float(truth.norm())
    return float((value.double() - truth).norm()) / (size or 1.0)


def mistake(op: Op, case: Case, dtype: torch.dtype, device: str) -> str | None:
    """What is wrong with the operation's results on this case, in a sentence; None if nothing is.

    The error against the reference in fp64 may be twice that of the reference in `dtype`. Exact operations must equal
    the reference bit for bit.
    """
    inputs = op.make_inputs(case, dtype, device, torch.Generator().manual_seed(0))
    found = Run.prepare(op.function, in_dtype(inputs, dtype) | dict(op.options))()
    own = Run.prepare(op.reference, in_dtype(inputs, dtype))()
    if len(found) != len(own):
        return f"{len(found)} results instead of {len(own)}"
    if op.is_exact:
        equal = all(torch.equal(value, other) for value, other in zip(found, own, strict=True))
        return None if equal else "not bit for bit the reference"
    truth = Run.prepare(op.reference, in_dtype(inputs, torch.float64))()
    for i, (value, other, expected) in enumerate(zip(found, own, truth, strict=True)):
        error = relative_error(value.detach(), expected.detach())
        allowed = 2 * max(relative_error(other.detach(), expected.detach()), ROUNDING[dtype] / 2)
        if not error <= allowed:
            return f"result {i} is off by {error:.2g}, allowed is {allowed:.2g}"
    return None
