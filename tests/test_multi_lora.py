"""Adapters trained together in one batch over one frozen linear learn what each would learn alone."""

from dataclasses import replace

import pytest
import torch
from burnish.kernels.lora_linear import Projection, lora_linear
from burnish.kernels.multi_lora import Adapter, multi_lora
from burnish.kernels.nf4_dequant import nf4_dequant
from burnish.kernels.nf4_quantize import nf4_quantize
from burnish.kernels.op import use_backend

K, N = 48, 40
RANKS, SCALES, DROPOUTS = (4, 8, 16, 3), (2.0, 1.0, 0.5, 4.0), (0.0, 0.1, 0.5, 0.05)
ROWS = (33, 7, 20, 1)
OFFSETS = (0, 33, 40, 60, 61)
RATES = (1e-2, 3e-3, 1e-3, 2e-2)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def new_adapters() -> list[Adapter]:
    return [
        Adapter(
            a=(normal(r, K, seed=k) * K**-0.5).requires_grad_(),
            b=(normal(N, r, seed=10 + k) * 0.1).requires_grad_(),
            scale=SCALES[k],
            p=DROPOUTS[k],
        )
        for k, r in enumerate(RANKS)
    ]


def seed_of(k: int, step: int) -> int:
    return 2**40 + 1000 * k + step


def optimizers_of(adapters: list[Adapter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW([part.a, part.b], lr=lr) for part, lr in zip(adapters, RATES, strict=True)]


def train_together(weight: torch.Tensor, x: torch.Tensor, target: torch.Tensor, num_steps: int) -> list[Adapter]:
    adapters = new_adapters()
    optimizers = optimizers_of(adapters)
    for step in range(num_steps):
        seeded = [replace(part, seed=seed_of(k, step)) for k, part in enumerate(adapters)]
        y = multi_lora(x, weight, None, seeded, OFFSETS)
        sum(own.square().mean() for own in (y - target)[: OFFSETS[-1]].split(ROWS)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return adapters


def train_alone(weight: torch.Tensor, x: torch.Tensor, target: torch.Tensor, num_steps: int) -> list[Adapter]:
    adapters = new_adapters()
    for k, (part, optimizer) in enumerate(zip(adapters, optimizers_of(adapters), strict=True)):
        rows = slice(OFFSETS[k], OFFSETS[k + 1])
        projection = Projection(weight=weight, bias=None, a=part.a, b=part.b, scale=part.scale)
        for step in range(num_steps):
            y = lora_linear(x[rows], [projection], p=part.p, seed=seed_of(k, step))
            (y - target[rows]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return adapters


@pytest.mark.parametrize("backend", ["native", "torch", "triton"])
def test_four_adapters_in_one_batch_learn_what_each_learns_alone(backend):
    weight, x, target = normal(N, K, seed=20) * K**-0.5, normal(65, K, seed=21), normal(65, N, seed=22)
    with use_backend(backend):
        together = train_together(weight, x, target, 10)
    with use_backend("native"):
        alone = train_alone(weight, x, target, 10)
    before = new_adapters()
    for one, other, start in zip(together, alone, before, strict=True):
        for name in ("a", "b"):
            found, expected = getattr(one, name), getattr(other, name)
            assert not torch.equal(found, getattr(start, name))
            assert float((found - expected).detach().norm() / expected.detach().norm()) < 1e-5


@pytest.mark.parametrize("backend", ["native", "torch", "triton"])
def test_an_adapter_without_rows_gets_zero_gradients_and_other_rows_are_the_frozen_linears(backend):
    weight, x, adapters = normal(N, K, seed=20), normal(2, 10, K, seed=21), new_adapters()
    with use_backend(backend):
        y = multi_lora(x, weight, None, adapters, (2, 2, 9, 15, 15))
    y.square().sum().backward()
    base = x @ weight.t()
    assert y.shape == (2, 10, N)
    torch.testing.assert_close(y.view(20, N)[:2], base.view(20, N)[:2])
    torch.testing.assert_close(y.view(20, N)[15:], base.view(20, N)[15:])
    for k in (0, 3):
        assert adapters[k].a.grad is not None
        assert not adapters[k].a.grad.any()
        assert adapters[k].b.grad is not None
        assert not adapters[k].b.grad.any()
    assert adapters[1].a.grad.any()
    assert adapters[2].b.grad.any()


def test_no_adapters_at_all_is_the_frozen_linear():
    weight, bias, x = normal(N, K, seed=20), normal(N, seed=23), normal(5, K, seed=21).requires_grad_()
    y = multi_lora(x, weight, bias, [], (0,))
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias))
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, K))


def test_more_ranks_than_one_group_holds_change_nothing():
    weight, x = normal(N, K, seed=20), normal(20, K, seed=21)
    adapters = [
        Adapter(normal(r, K, seed=r), normal(N, r, seed=r + 1), 1.0, p=0.1, seed=2**40 + r) for r in (60, 60, 30, 200)
    ]
    offsets = (0, 5, 9, 14, 20)
    results = []
    for backend in ("torch", "triton"):
        with use_backend(backend):
            results.append(multi_lora(x, weight, None, adapters, offsets))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-3)


def test_an_nf4_weight_gives_what_its_dense_form_gives():
    quant = nf4_quantize(normal(64, 64, seed=20) * 0.1)
    x = normal(9, 64, seed=21)
    adapters = [Adapter(normal(4, 64, seed=1), normal(64, 4, seed=2), 0.5)]
    dense = nf4_dequant(quant, dtype=torch.float32)
    packed = multi_lora(x, torch.empty(0), None, adapters, (0, 9), quant=quant)
    assert torch.equal(packed, multi_lora(x, dense, None, adapters, (0, 9)))


@pytest.mark.parametrize("offsets", [(0, 5), (0, 5, 4), (0, 5, 21), (-1, 5, 9)])
def test_offsets_that_do_not_fit_are_refused(offsets):
    adapters = new_adapters()[:2]
    with pytest.raises(ValueError, match="offsets"):
        multi_lora(normal(20, K, seed=1), normal(N, K, seed=2), None, adapters, offsets)


def test_mixed_dtypes_under_autocast_run_in_its_dtype():
    adapters = new_adapters()
    x, weight = normal(61, K, seed=1), normal(N, K, seed=2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = multi_lora(x, weight, None, adapters, OFFSETS)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert adapters[0].a.grad.dtype == torch.float32
