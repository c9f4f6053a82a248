"""rms_norm and layer_norm beyond the table's cases: strided rows, parts of the outputs unused, dtypes, the masks."""

import pytest
import torch
from burnish.kernels.layer_norm import layer_norm
from burnish.kernels.op import use_backend
from burnish.kernels.rms_norm import rms_norm
from burnish.kernels.shrink import Shrink, drop

M, K = 9, 48
SEED = 2**40 + 7
BACKENDS = ("triton", "native", "torch")


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def shrink_of(*ranks, p=0.1, dtype=torch.float32):
    a = tuple(normal(r, K, dtype=dtype, seed=10 + r).requires_grad_() for r in ranks)
    return Shrink(a, (2.0,) * len(a), p, SEED)


def run_rms(x, residual, shrink, **options):
    return rms_norm(x, normal(K, seed=3).to(x.dtype), eps=1e-5, residual=residual, shrink=shrink, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_wider_buffer_give_what_contiguous_rows_give(backend):
    wide = normal(M, 3 * K)
    parts = [wide[:, :K], wide[:, K : 2 * K]]
    results = []
    for own in (parts, [part.contiguous() for part in parts]):
        x, residual = (part.detach().requires_grad_() for part in own)
        with use_backend(backend):
            y, h, s = run_rms(x, residual, shrink_of(4, 3))
            cotangents = [wide[:, 2 * K :], wide[:, :K], normal(M, 14, seed=5)[:, ::2]]
            grads = torch.autograd.grad([y, h, s], [x, residual], cotangents)
        results.append([y, h, s, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_retained_graph_gives_the_same_gradients_again(backend, p):
    x, residual, shrink = (
        normal(2, M, K).requires_grad_(),
        normal(2, M, K, seed=1).requires_grad_(),
        shrink_of(4, 3, p=p),
    )
    with use_backend(backend):
        y, h, s = run_rms(x, residual, shrink)
        assert (y.shape, h.shape, s.shape) == ((2, M, K), (2, M, K), (2 * M, 7))
        loss = (y * normal(K)).sum() + (h * h).sum() + (s * s).sum()
        first, second = (torch.autograd.grad(loss, [x, residual, *shrink.a], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", [0, 1, 2])
def test_an_unused_output_counts_as_a_zero_gradient(backend, used):
    def gradients(weights):
        x, residual, shrink = normal(M, K).requires_grad_(), normal(M, K, seed=1), shrink_of(4)
        with use_backend(backend):
            outputs = layer_norm(x, None, None, eps=1e-5, residual=residual, shrink=shrink)
            pairs = [(out, weight) for out, weight in zip(outputs, weights, strict=True) if weight is not None]
            terms = [(out * normal(*out.shape, seed=6) * weight).sum() for out, weight in pairs]
            return torch.autograd.grad(sum(terms), [x, *shrink.a], allow_unused=True, materialize_grads=True)

    alone = gradients([1.0 if i == used else None for i in range(3)])
    beside_zeros = gradients([1.0 if i == used else 0.0 for i in range(3)])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(alone, beside_zeros, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_s_holds_the_masks_of_the_three_lanes(backend):
    x, eye = normal(M, K).abs() + 0.1, torch.eye(K)
    with use_backend(backend):
        y, _, s = rms_norm(x, torch.ones(K), eps=1e-5, shrink=Shrink((eye,) * 3, (1.0,) * 3, 0.5, SEED))
    for lane in range(3):
        assert torch.allclose(s[:, lane * K : (lane + 1) * K], drop(y, p=0.5, seed=SEED, lane=lane), rtol=1e-6)


def test_matrices_in_fp32_get_gradients_in_fp32_from_bf16_rows():
    x, shrink = normal(M, K, dtype=torch.bfloat16).requires_grad_(), shrink_of(4)
    y, h, s = rms_norm(x, torch.ones(K), eps=1e-5, shrink=shrink)
    assert (y.dtype, h, s.dtype) == (torch.bfloat16, None, torch.bfloat16)
    (da,) = torch.autograd.grad(s.float().sum(), shrink.a)
    assert da.dtype == torch.float32


def test_autocast_decides_the_dtype_and_gradients_come_in_that_of_the_inputs():
    x, residual, weight = normal(M, K).requires_grad_(), normal(M, K, seed=1), torch.ones(K, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, h, s = rms_norm(x, weight, eps=1e-5, residual=residual, shrink=shrink_of(4))
    assert {y.dtype, h.dtype, s.dtype} == {torch.bfloat16}
    assert {grad.dtype for grad in torch.autograd.grad(y.float().sum(), [x, weight])} == {torch.float32}


def test_only_what_depends_on_a_trained_input_requires_a_gradient():
    y, h, s = run_rms(normal(M, K), normal(M, K, seed=1), shrink_of(4))
    assert (y.requires_grad, h.requires_grad, s.requires_grad) == (False, False, True)


def test_gradients_agree_with_finite_differences():
    x, residual = normal(3, 8).double().requires_grad_(), normal(3, 8, seed=1).double().requires_grad_()
    weight, bias = normal(8, seed=2).double().requires_grad_(), normal(8, seed=3).double().requires_grad_()
    a = normal(2, 8, seed=4).double().requires_grad_()

    def whole(x, residual, weight, bias, a):
        shrink = Shrink((a,), (1.5,), 0.5, SEED)
        first = rms_norm(x, weight, eps=1e-3, offset=1.0, residual=residual, shrink=shrink)
        return *first, *layer_norm(x, weight, bias, eps=1e-3, residual=residual, shrink=shrink)

    assert torch.autograd.gradcheck(whole, (x, residual, weight, bias, a))
