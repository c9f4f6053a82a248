"""AdapterAdamW is torch.optim.AdamW: same numbers, same checkpoints; and what it adds, clipping and 8-bit state."""

import copy

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from burnish.kernels.adapter_adamw import AdapterAdamW
from burnish.kernels.byte_moments import dequantize, dynamic_codes, quantize
from burnish.kernels.op import use_backend

BACKENDS = ["native", "torch", "triton"]
SHAPES = ((16, 37), (5000,), (1,), (129, 16), (70, 250))


def parameters(shapes=SHAPES, *, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def groups(params: list[torch.nn.Parameter]) -> list[dict]:
    """LoRA+: the second group has its own learning rate, and no decay."""
    return [{"params": params[::2], "weight_decay": 0.1}, {"params": params[1::2], "lr": 0.05, "weight_decay": 0.0}]


def set_gradients(params: list[torch.nn.Parameter], step: int, *, dtype: torch.dtype = torch.float32) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator).to(dtype) / (i + 1)
        param.grad_dtype = dtype
        param.grad = None if (i, step) == (1, 0) else grad


def train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step()


def assert_same(first: list[torch.Tensor], second: list[torch.Tensor], rtol: float = 1e-6) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.allclose(a, b, rtol=rtol, atol=1e-7), float((a - b).detach().abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_steps_are_those_of_torchs_adamw(backend):
    mine, others = parameters(), parameters()
    optimizer = AdapterAdamW(groups(mine), lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    reference = torch.optim.AdamW(groups(others), lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    with use_backend(backend):
        train(optimizer, mine, range(20))
    train(reference, others, range(20))
    assert_same(mine, others)
    for param, other in zip(mine, others, strict=True):
        found, expected = optimizer.state[param], reference.state[other]
        assert found.keys() == expected.keys()
        assert_same([found[key] for key in expected], list(expected.values()))


@pytest.mark.parametrize("fused", [True, False])
def test_checkpoints_go_to_and_from_torchs_adamw(fused):
    mine, others = parameters(), parameters()
    optimizer, reference = AdapterAdamW(groups(mine)), torch.optim.AdamW(groups(others), fused=fused)
    train(optimizer, mine, range(3))
    train(reference, others, range(3))
    for target_class, state, params in (
        (torch.optim.AdamW, optimizer.state_dict(), mine),
        (AdapterAdamW, reference.state_dict(), others),
    ):
        resumed = [torch.nn.Parameter(param.detach().clone()) for param in params]
        target = target_class(groups(resumed))
        target.load_state_dict(copy.deepcopy(state))
        train(target, resumed, range(3, 6))
        source = optimizer if params is mine else reference
        train(source, params, range(3, 6))
        assert_same(resumed, params)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_flat_partition_is_the_same_as_many_tensors(backend):
    parts = parameters()
    flat = torch.nn.Parameter(torch.cat([part.detach().view(-1) for part in parts]))
    with use_backend(backend):
        many, one = AdapterAdamW(parts, max_grad_norm=1.0), AdapterAdamW([flat], max_grad_norm=1.0)
        for step in range(1, 4):
            set_gradients(parts, step)
            flat.grad = torch.cat([part.grad.view(-1) for part in parts])
            many.step()
            one.step()
    assert_same([flat], [torch.cat([part.detach().view(-1) for part in parts])])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_gradients_and_parameters_are_respected(backend):
    storage = torch.randn(12, 40)
    mine = [torch.nn.Parameter(value.clone()) for value in (storage, storage)] + [torch.nn.Parameter(storage.t())]
    others = [torch.nn.Parameter(value.detach().clone().contiguous()) for value in mine]
    optimizer, reference = AdapterAdamW(mine), torch.optim.AdamW(others, foreach=False)
    with use_backend(backend):
        for _ in range(3):
            grads = [torch.randn(40, 12).t(), torch.randn(12, 80)[:, ::2], torch.randn(40, 12)]
            for params in (mine, others):
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad.clone(memory_format=torch.preserve_format) if params is mine else grad.clone()
            mine[1].grad = grads[1]
            optimizer.step()
            reference.step()
    assert not mine[2].is_contiguous()
    assert not mine[1].grad.is_contiguous()
    assert_same(mine, others)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_gradients_update_fp32_parameters(backend):
    mine, others = parameters(), parameters()
    optimizer, reference = AdapterAdamW(mine), torch.optim.AdamW(others)
    with use_backend(backend):
        for step in range(1, 4):
            set_gradients(mine, step, dtype=torch.bfloat16)
            for param, other in zip(mine, others, strict=True):
                other.grad = param.grad.float()
            optimizer.step()
            reference.step()
    assert_same(mine, others)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_is_that_of_torch_and_the_norm_is_kept(backend):
    mine, others = parameters(), parameters()
    optimizer, reference = AdapterAdamW(mine, max_grad_norm=0.5), torch.optim.AdamW(others)
    with use_backend(backend):
        for step in range(3):
            set_gradients(mine, step)
            set_gradients(others, step)
            optimizer.step()
            expected = torch.nn.utils.clip_grad_norm_(others, 0.5)
            reference.step()
            assert torch.allclose(optimizer.grad_norm, expected, rtol=1e-5)
    assert_same(mine, others, rtol=1e-5)
    measured = AdapterAdamW(parameters(), max_grad_norm=float("inf"))
    params = measured.param_groups[0]["params"]
    set_gradients(params, 2)
    with use_backend(backend):
        measured.step()
    exact = parameters()
    set_gradients(exact, 2)
    torch.optim.AdamW(exact).step()
    assert_same(params, exact)
    assert measured.grad_norm > 0.5


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_is_not_finite_changes_nothing(backend, bad, bits):
    params = parameters(((4097,), (3, 3)))
    optimizer = AdapterAdamW(params, max_grad_norm=1.0, state_bits=bits)
    with use_backend(backend):
        for step in (1, 2):
            set_gradients(params, step)
            optimizer.step()
        before = [value.detach().clone() for value in (*params, *_state_values(optimizer))]
        set_gradients(params, 3)
        params[0].grad[4096] = bad
        optimizer.step()
    after = [value.detach() for value in (*params, *_state_values(optimizer))]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not optimizer.grad_norm.isfinite()


def _state_values(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


def test_the_codes_of_8_bit_state_are_those_of_bitsandbytes():
    for is_signed in (True, False):
        assert torch.allclose(dynamic_codes(is_signed=is_signed), create_dynamic_map(signed=is_signed), rtol=1e-5)
    values = torch.randn(3, 1000) * torch.logspace(-4, 0, 1000)
    restored = dequantize(*quantize(values, is_signed=True), is_signed=True)
    assert float((restored - values).norm() / values.norm()) < 0.02


@pytest.mark.parametrize("backend", BACKENDS)
def test_8_bit_state_follows_fp32_state_and_every_backend_makes_the_same(backend):
    mine, others, exact = parameters(), parameters(), parameters()
    start = [param.detach().clone() for param in exact]
    with use_backend(backend):
        train(AdapterAdamW(groups(mine), state_bits=8), mine, range(4))
    with use_backend("torch"):
        train(other := AdapterAdamW(groups(others), state_bits=8), others, range(4))
    train(AdapterAdamW(groups(exact)), exact, range(4))
    for param, expected, first in zip(mine, exact, start, strict=True):
        assert float((param - expected).detach().norm() / (expected - first).detach().norm()) < 0.05
    for param, expected in zip(mine, others, strict=True):
        assert float((param - expected).detach().norm() / expected.detach().norm()) < 1e-4
    sizes = {param.numel(): other.state[param]["exp_avg"].dtype for param in others}
    assert {size for size, dtype in sizes.items() if dtype == torch.uint8} == {5000, 17500}


def test_8_bit_state_survives_a_checkpoint():
    params = parameters()
    optimizer = AdapterAdamW(params, state_bits=8)
    train(optimizer, params, range(2))
    resumed = [torch.nn.Parameter(param.detach().clone()) for param in params]
    target = AdapterAdamW(resumed, state_bits=8)
    target.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, params, range(2, 4))
    train(target, resumed, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))
    assert target.state[resumed[4]]["exp_avg"].dtype == torch.uint8


def test_parameters_of_another_dtype_are_refused():
    param = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"fp32 parameters, not torch\.bfloat16"):
        AdapterAdamW([param]).step()


def test_a_closure_is_called_with_gradients_and_its_loss_returned():
    (param,) = parameters(((4,),))
    optimizer = AdapterAdamW([param])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
