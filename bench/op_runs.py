"""One operation run forward and backward on given inputs, and how far its results are from the truth."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..kernels.op import Case, Op

ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DRAWS = (torch.randn, torch.rand, torch.randint)
NUMBERS = (1e-2, 0.1, 0.9, 0.999, 1e-8)
"""Learning rate, weight decay, betas and eps of every parameter: no optimizer but ours takes others for each."""


def _in_order(value: Any, grads: list[Tensor]) -> list[Tensor]:
    return [*floats(value), *grads]


@dataclass(frozen=True)
class Run:
    """A function bound to its inputs; calling it computes the outputs and the gradient of every trained input.

    `arranged` brings what the function returned, and the gradients, into the order and shapes of the reference's.
    Without cotangents there is no backward.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    cotangents: list[Tensor]
    arranged: Callable[[Any, list[Tensor]], list[Tensor]] = _in_order

    @classmethod
    def prepare(cls, function: Callable[..., Any], arguments: dict[str, Any]) -> "Run":
        """Calls the function once to see what comes out; the cotangents are fixed random numbers."""
        with torch.no_grad():
            outputs = floats(function(**arguments))
        return cls(function, arguments, draw_like(outputs))

    def forward(self) -> list[Tensor]:
        return floats(self.function(**self.arguments))

    def __call__(self) -> list[Tensor]:
        """Outputs, then gradients; an input that the function does not use has zeros."""
        value, grads = self._computed()
        return [*floats(value), *grads]

    def results(self) -> list[Tensor]:
        """The same as the reference returns it."""
        return self.arranged(*self._computed())

    def _computed(self) -> tuple[Any, list[Tensor]]:
        value = self.function(**self.arguments)
        return value, _gradients(value, self.arguments, self.cotangents)


def once(function: Callable[..., Any], arguments: dict[str, Any]) -> list[Tensor]:
    """The results of one call, as those of Run.prepare."""
    value = function(**arguments)
    return [*floats(value), *_gradients(value, arguments, draw_like(floats(value)))]


def _gradients(value: Any, arguments: dict[str, Any], cotangents: list[Tensor]) -> list[Tensor]:
    leaves = [leaf for leaf in tensors_of(arguments) if leaf.requires_grad]
    if not leaves or not cotangents:
        return []
    pairs = [(out, dy) for out, dy in zip(floats(value), cotangents, strict=True) if out.requires_grad]
    if not pairs:
        return []
    roots, directions = zip(*pairs, strict=True)
    found = torch.autograd.grad(roots, leaves, directions, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


def draw_like(outputs: list[Tensor]) -> list[Tensor]:
    """Fixed random numbers, drawn on the device of each tensor."""
    generators = {out.device: torch.Generator(out.device).manual_seed(1) for out in outputs}
    return [
        torch.randn(out.shape, generator=generators[out.device], dtype=torch.float64, device=out.device).to(out.dtype)
        for out in outputs
    ]


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
    """The same inputs as fresh leaves, copied, floating-point tensors in `dtype`."""

    def converted(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.detach().to(dtype, copy=True).requires_grad_(tensor.requires_grad)

    return each_tensor(value, converted)


def fresh(value: Any, *, copies: bool = False) -> Any:
    """The same inputs as fresh leaves, which share their memory unless `copies`."""

    def renewed(tensor: Tensor) -> Tensor:
        return (tensor.detach().clone() if copies else tensor.detach()).requires_grad_(tensor.requires_grad)

    return each_tensor(value, renewed)


def each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: each_tensor(part, change) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(each_tensor(part, change) for part in value)
    if hasattr(value, "__dataclass_fields__"):
        fields = {name: each_tensor(getattr(value, name), change) for name in value.__dataclass_fields__}
        return type(value)(**fields)
    return value


class _OnDevice(TorchFunctionMode):
    """Random numbers are drawn where their generator is: on a GPU those of a large model take a CPU many seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in DRAWS and kwargs.get("generator") is not None:
            kwargs["device"] = kwargs["generator"].device
        return func(*args, **kwargs)


def inputs_of(op: Op, case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The operation's inputs, random, the same in every run on one kind of device."""
    with _OnDevice():
        inputs = op.make_inputs(case, dtype, device, torch.Generator(device).manual_seed(0))
    return inputs | ({"numbers": [NUMBERS] * len(inputs["numbers"])} if "numbers" in inputs else {})


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the difference by the norm of the truth; infinite where the value is not finite."""
    if value.shape != truth.shape or not bool(value.isfinite().all()):
        return float("inf")
    size = float(truth.norm())
    return float((value.double() - truth).norm()) / (size or 1.0)


@dataclass(frozen=True)
class Expected:
    """What the reference computes: in the dtype of its inputs, and in fp64."""

    own: list[Tensor]
    truth: list[Tensor]


def expected_of(op: Op, inputs: dict[str, Any]) -> Expected:
    return Expected(once(op.reference, fresh(inputs)), once(op.reference, in_dtype(inputs, torch.float64)))


def mistake(op: Op, case: Case, dtype: torch.dtype, device: str, inputs: dict[str, Any] | None = None) -> str | None:
    """What is wrong with the operation's results on this case, in a sentence; None if nothing is.

    The error against the reference in fp64 may be twice that of the reference in `dtype`. Exact operations must equal
    the reference bit for bit.
    """
    inputs = inputs_of(op, case, dtype, device) if inputs is None else inputs
    found = once(op.function, fresh(inputs) | dict(op.options))
    if not op.is_exact:
        return difference(found, expected_of(op, inputs), dtype)
    own = once(op.reference, fresh(inputs))
    equal = len(found) == len(own) and all(torch.equal(value, other) for value, other in zip(found, own, strict=True))
    return None if equal else "not bit for bit the reference"


def difference(
    found: list[Tensor], expected: Expected, dtype: torch.dtype, *, allowed_error: float | None = None
) -> str | None:
    """Where results differ from the truth by more than twice the reference's own error in `dtype`, or `allowed_error`.

    With `allowed_error` there may be fewer results; they are compared with the reference's first ones.
    """
    if not found or (allowed_error is None and len(found) != len(expected.own)):
        return f"{len(found)} results instead of {len(expected.own)}"
    for i, (value, own, truth) in enumerate(zip(found, expected.own, expected.truth, strict=False)):
        error = relative_error(value.detach(), truth.detach())
        allowed = allowed_error or 2 * max(relative_error(own.detach(), truth.detach()), ROUNDING[dtype] / 2)
        if not error <= allowed:
            return f"result {i} is off by {error:.2g}, allowed is {allowed:.2g}"
    return None
