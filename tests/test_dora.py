"""DoRA against PEFT's own layer, the cache of its norm, and what autograd may ask of it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from burnish.kernels import dora_norm as module
from burnish.kernels.dora import dora_linear, dora_linear_reference
from burnish.kernels.dora_norm import DoraNorm, dora_norm
from burnish.kernels.lora_linear import Projection
from burnish.kernels.nf4_dequant import Nf4Weight, nf4_dequant
from burnish.kernels.nf4_quantize import nf4_quantize
from burnish.kernels.op import use_backend
from burnish.kernels.shrink import drop
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BACKENDS = ("native", "torch")
SEED = 2**40 + 7


class FixedDropout(nn.Module):
    """The mask of one seed."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, p=self.p, seed=SEED)


def peft_layer(base: nn.Module, *, rank: int, p: float, fan_in_fan_out: bool = False) -> Any:
    """The PEFT layer around `base`, with B away from zero and the magnitude away from the norm."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, use_dora=True, lora_dropout=p, target_modules=["0"], fan_in_fan_out=fan_in_fan_out
    )
    layer = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(std=0.1)
        layer.lora_magnitude_vector["default"].weight.mul_(torch.linspace(0.5, 1.5, base_outputs(layer)))
    if p > 0:
        layer.lora_dropout["default"] = FixedDropout(p)
    return layer


def base_outputs(layer: Any) -> int:
    return layer.lora_B["default"].weight.shape[0]


def projection_of(layer: Any, **changes: Any) -> Projection:
    base = layer.get_base_layer()
    return Projection(
        weight=base.weight.detach(),
        bias=base.bias,
        a=layer.lora_A["default"].weight,
        b=layer.lora_B["default"].weight,
        scale=layer.scaling["default"],
        **changes,
    )


def outputs_and_gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def compare(layer: Any, projection: Projection, *, inputs: int, p: float, tolerance: float = 2e-6) -> None:
    x = torch.randn(2, 9, inputs, requires_grad=True)
    magnitude = layer.lora_magnitude_vector["default"].weight
    leaves = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight, magnitude]
    theirs = outputs_and_gradients(layer(x), leaves)
    for backend in BACKENDS:
        with use_backend(backend):
            ours = outputs_and_gradients(dora_linear(x, projection, magnitude, p=p, seed=SEED), leaves)
        for own, other in zip(ours, theirs, strict=True):
            assert float((own - other).norm()) <= tolerance * float(other.norm())


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_computes_what_pefts_does(p, bias):
    torch.manual_seed(0)
    layer = peft_layer(nn.Linear(48, 40, bias=bias), rank=8, p=p)
    compare(layer, projection_of(layer), inputs=48, p=p)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_transposed_layer_computes_what_pefts_does(p):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer = peft_layer(Conv1D(40, 48), rank=4, p=p, fan_in_fan_out=True)
    projection = projection_of(layer)
    compare(layer, replace(projection, weight=projection.weight.t()), inputs=48, p=p)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_an_nf4_layer_computes_what_pefts_does(p):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = bitsandbytes.nn.Linear4bit(64, 40, quant_type="nf4", compute_dtype=torch.float32)
    layer = peft_layer(base.to("cpu"), rank=8, p=p)
    weight = layer.get_base_layer().weight
    quant = Nf4Weight.from_quant_state(weight.data, weight.quant_state)
    compare(layer, projection_of(layer, quant=quant), inputs=64, p=p)


def make(
    N: int = 24, K: int = 32, rank: int = 4, dtype: torch.dtype = torch.float64, *, bias: bool = False
) -> tuple[Tensor, Projection, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(6, K, dtype=dtype, requires_grad=True)
    projection = Projection(
        weight=torch.randn(N, K, dtype=dtype) * K**-0.5,
        bias=torch.randn(N, dtype=dtype, requires_grad=True) if bias else None,
        a=(torch.randn(rank, K, dtype=dtype) * K**-0.5).requires_grad_(),
        b=torch.randn(N, rank, dtype=dtype, requires_grad=True),
        scale=0.5,
    )
    return x, projection, torch.rand(N, dtype=dtype).add_(0.5).requires_grad_()


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_gradients_are_those_of_finite_differences_but_for_the_norm(mode):
    x, projection, magnitude = make(5, 6, 2, bias=True)
    norm = dora_norm(projection)

    def function(x, a, b, magnitude, bias):
        part = replace(projection, a=a, b=b, bias=bias)
        return dora_linear(x, part, magnitude, p=0.3, seed=SEED, mode=mode, norm=norm)

    assert torch.autograd.gradcheck(function, (x, projection.a, projection.b, magnitude, projection.bias))


def test_without_dropout_both_modes_are_equal():
    x, projection, magnitude = make(dtype=torch.float32)
    exact, fast = (dora_linear(x, projection, magnitude, mode=mode) for mode in ("exact", "fast"))
    assert torch.equal(exact, fast)


def test_the_norm_is_that_of_the_sum_and_never_not_a_number():
    _, projection, _ = make(dtype=torch.float32)
    opposite = replace(projection, weight=-projection.scale * projection.b.detach() @ projection.a.detach())
    assert float(dora_norm(opposite).max()) < 2e-3
    for blocksize in (64, 4096):
        quant = nf4_quantize(torch.randn(700, 75), blocksize=blocksize)
        a, b = torch.randn(3, 75), torch.randn(700, 3)
        part = Projection(weight=torch.empty(0), bias=None, a=a, b=b, scale=0.3, quant=quant)
        expected = (nf4_dequant(quant).double() + 0.3 * b.double() @ a.double()).norm(dim=1)
        assert float((dora_norm(part) - expected).abs().max() / expected.max()) < 1e-6


def test_the_norm_is_made_again_only_where_a_tensor_changed(monkeypatch):
    _, projection, _ = make(dtype=torch.float32)
    made, squared = [], []
    norm_of, squares_of = module.dora_norm, module.weight_squares
    monkeypatch.setattr(module, "dora_norm", lambda *a, **k: made.append(1) or norm_of(*a, **k))
    monkeypatch.setattr(module, "weight_squares", lambda *a: squared.append(1) or squares_of(*a))
    cache = DoraNorm()
    with torch.inference_mode():
        first = cache(projection)
    assert not first.is_inference()
    assert cache(projection) is first
    for parameter in (projection.a, projection.b):
        with torch.no_grad():
            parameter.add_(0.1)
        assert not torch.equal(cache(projection), first)
        assert torch.allclose(cache(projection), norm_of(projection), rtol=1e-6)
    cache.clear()
    cache(projection)
    assert (len(made), len(squared)) == (4, 1)
    projection.weight.mul_(2)
    assert torch.allclose(cache(projection), norm_of(projection), rtol=1e-6)
    assert (len(made), len(squared)) == (5, 2)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_strides_and_repeated_backwards_change_nothing(mode):
    x, projection, magnitude = make(dtype=torch.float32)
    leaves = [x, projection.a, projection.b, magnitude]
    dy = torch.randn(24, 6).t()
    strided = torch.empty(6, 64)[:, ::2].copy_(x.detach()).requires_grad_()
    y = dora_linear(x, projection, magnitude, p=0.1, seed=SEED, mode=mode)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    again = torch.autograd.grad(y, leaves, dy.contiguous())
    other = dora_linear(strided, projection, magnitude, p=0.1, seed=SEED, mode=mode)
    assert torch.equal(y, other)
    moved = torch.autograd.grad(other, [strided, *leaves[1:]], dy)
    for grads in (again, moved):
        assert all(torch.equal(a, b) for a, b in zip(first, grads, strict=True))


def test_only_what_requires_a_gradient_gets_one():
    x, projection, magnitude = make(dtype=torch.float32)
    for mode in ("exact", "fast"):
        frozen = replace(projection, a=projection.a.detach(), b=projection.b.detach())
        y = dora_linear(x.detach(), frozen, magnitude, p=0.1, seed=SEED, mode=mode)
        (only,) = torch.autograd.grad(y.sum(), [magnitude])
        y = dora_linear(x, projection, magnitude.detach(), p=0.1, seed=SEED, mode=mode)
        dx, da, db = torch.autograd.grad(y.sum(), [x, projection.a, projection.b])
        expected = dora_linear_reference(x, projection, magnitude, p=0.1, seed=SEED, mode=mode)
        for own, leaf in ((only, magnitude), (dx, x), (da, projection.a), (db, projection.b)):
            (other,) = torch.autograd.grad(expected.sum(), [leaf], retain_graph=True)
            assert torch.allclose(own, other, rtol=1e-4, atol=1e-5)


def test_autocast_computes_in_its_dtype_and_gradients_come_in_the_parameters_own():
    x, projection, magnitude = make(dtype=torch.float32)
    for mode in ("exact", "fast"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = dora_linear(x, projection, magnitude, p=0.1, seed=SEED, mode=mode)
        assert y.dtype == torch.bfloat16
        leaves = [x, projection.a, projection.b, magnitude]
        assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(y.float().sum(), leaves))
        expected = dora_linear_reference(x, projection, magnitude, p=0.1, seed=SEED, mode=mode)
        assert float((y - expected).detach().norm() / expected.detach().norm()) < 2e-2


def test_checkpointing_draws_the_same_mask_again():
    x, projection, magnitude = make(dtype=torch.float32)
    leaves = [x, projection.a, projection.b, magnitude]
    grads = []
    for wrap in (False, True):
        torch.manual_seed(5)
        arguments = (x, projection, magnitude)
        y = checkpoint(dora_linear, *arguments, p=0.5, use_reentrant=False) if wrap else dora_linear(*arguments, p=0.5)
        grads.append(torch.autograd.grad(y.sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_an_unknown_mode_is_refused():
    x, projection, magnitude = make(dtype=torch.float32)
    with pytest.raises(ValueError, match="mode"):
        dora_linear(x, projection, magnitude, mode="slow")  # type: ignore[arg-type]
