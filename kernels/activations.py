"""Activation functions by name: in torch, their backward, and the form from which kernels compute them.

Every one is act(x) = x * weight(x), and `kind` names the weight: SIGMOID is sigmoid(x (c1 + c3 x²)), NORMAL is the
distribution function of the normal distribution, STEP is 1 where x > 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SIGMOID, NORMAL, STEP = 0, 1, 2
SQRT_8_OVER_PI = 1.5957691216057308
aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """`backward(d, x, out)` writes d * act'(x) into `out`."""

    function: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]
    kind: int
    c1: float = 0.0
    c3: float = 0.0


def _silu_backward(d: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return aten.silu_backward.grad_input(d, x, grad_input=out)


def _gelu_backward(d: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return aten.gelu_backward.grad_input(d, x, approximate="none", grad_input=out)


def _gelu_tanh(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _gelu_tanh_backward(d: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return aten.gelu_backward.grad_input(d, x, approximate="tanh", grad_input=out)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _quick_gelu_backward(d: Tensor, x: Tensor, out: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    return torch.mul(d, s * (1 + 1.702 * x * (1 - s)), out=out)


def _relu_backward(d: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return aten.threshold_backward.grad_input(d, x, 0, grad_input=out)


ACTIVATIONS = {
    "silu": Activation(torch.nn.functional.silu, _silu_backward, SIGMOID, 1.0),
    "gelu": Activation(torch.nn.functional.gelu, _gelu_backward, NORMAL),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_backward, SIGMOID, SQRT_8_OVER_PI, 0.044715 * SQRT_8_OVER_PI),
    "quick_gelu": Activation(_quick_gelu, _quick_gelu_backward, SIGMOID, 1.702),
    "relu": Activation(torch.relu, _relu_backward, STEP),
}
"""gelu_tanh(x) = 0.5 x (1 + tanh(u)) = x sigmoid(2u) with u = sqrt(2 / pi) (x + 0.044715 x³); it and quick_gelu are
from Hendrycks & Gimpel, arXiv 1606.08415."""
