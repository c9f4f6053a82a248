"""lora_linear beyond the common cases: masks, ranks, strides, groups, frozen inputs, NF4, PEFT's dtypes, its GEMM."""

from dataclasses import replace

import pytest
import torch
from burnish.kernels import lora_cpu, lora_gemm, native
from burnish.kernels import lora_linear as module
from burnish.kernels.lora_grads import lora_grad_a, lora_grads
from burnish.kernels.lora_linear import Projection, lane_of, lora_linear, lora_linear_reference, pack
from burnish.kernels.nf4_dequant import nf4_dequant
from burnish.kernels.nf4_quantize import nf4_quantize
from burnish.kernels.op import use_backend
from burnish.kernels.shrink import drop, keep_mask

SEED = 2**40 + 99
BACKENDS = ("native", "torch", "triton")


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def group(*outputs, K, r=8, dtype=torch.float32, bias=False, adjacent=False, parameter_dtype=None):
    """Projections with random weights; adjacent: the weights are rows of one matrix."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape, scale):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    whole = normal(sum(outputs), K, scale=K**-0.5)
    weights = whole.split(outputs) if adjacent else [part.clone() for part in whole.split(outputs)]
    return [
        Projection(
            weight=weight,
            bias=normal(N, scale=1.0) if bias else None,
            a=normal(r, K, scale=K**-0.5).to(parameter_dtype or dtype).requires_grad_(),
            b=normal(N, r, scale=r**-0.5).to(parameter_dtype or dtype).requires_grad_(),
            scale=0.5 + j,
        )
        for j, (N, weight) in enumerate(zip(outputs, weights, strict=True))
    ]


def cotangent(y):
    """Numbers without a pattern, the same for every dtype but for rounding."""
    return torch.arange(y.numel(), dtype=torch.float64).square().mul(0.7).sin().view(y.shape).to(y.dtype)


def gradients(function, x, projections, dy=None, **options):
    """(y, dx, dA of all, dB of all)."""
    leaf = x.detach().requires_grad_()
    y = function(leaf, projections, **options)
    dy = cotangent(y) if dy is None else dy
    leaves = [leaf, *(part.a for part in projections), *(part.b for part in projections)]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_close(found, expected, tolerance=2e-5):
    for i, (value, truth) in enumerate(zip(found, expected, strict=True)):
        assert value.shape == truth.shape, i
        error = float((value.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-9))
        assert error < tolerance, (i, error)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_the_same_mask_is_used_forward_in_dx_and_in_da(backend, p):
    M = K = 48
    projections = [
        Projection(torch.zeros(K, K), None, torch.eye(K).requires_grad_(), torch.eye(K).requires_grad_(), 1.0)
        for _ in range(3)
    ]
    with use_backend(backend):
        y, dx, *rest = gradients(lora_linear, torch.ones(M, K), projections, torch.eye(3 * K)[:M], p=p, seed=SEED)
    masks = [keep_mask(M, K, p=p, seed=SEED, lane=lane) for lane in range(3)]
    for mask, columns in zip(masks, y.split(K, dim=1), strict=True):
        assert torch.equal(columns != 0, mask)
    assert torch.equal(dx != 0, masks[0] & torch.eye(M, dtype=torch.bool))
    assert torch.equal(rest[0] != 0, masks[0])
    assert float((~masks[0]).float().mean()) == pytest.approx(p, abs=0.04)
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("r", [1, 4, 8, 16, 24, 64, 128, 256])
def test_every_rank(r):
    x = torch.randn(19, 40)
    projections = group(24, 17, K=40, r=r)
    expected = gradients(lora_linear_reference, x, projections, p=0.1, seed=SEED)
    assert_close(gradients(lora_linear, x, projections, p=0.1, seed=SEED), expected)
    half = x.bfloat16()
    low = group(24, 17, K=40, r=r, dtype=torch.bfloat16)
    expected = gradients(lora_linear_reference, half.double(), group_in(low, torch.float64), p=0.1, seed=SEED)
    assert_close(gradients(lora_linear, half, low, p=0.1, seed=SEED), expected, tolerance=1e-2)


def group_in(projections, dtype):
    return [
        Projection(
            part.weight.to(dtype), None if part.bias is None else part.bias.to(dtype),
            part.a.detach().to(dtype).requires_grad_(), part.b.detach().to(dtype).requires_grad_(), part.scale,
        )
        for part in projections
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [1, 7, 129, 4097])
def test_every_number_of_rows(M, dtype):
    x = torch.randn(M, 24).to(dtype)
    projections = group(16, 8, K=24, r=4, dtype=dtype)
    expected = gradients(lora_linear_reference, x.double(), group_in(projections, torch.float64), p=0.05, seed=SEED)
    found = gradients(lora_linear, x, projections, p=0.05, seed=SEED)
    assert_close(found, expected, tolerance=2e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_gradients(backend):
    x = torch.randn(9, 2 * 32)[:, 1::2]
    y_like = torch.randn(24, 9).t()
    projections = group(24, K=32)
    with use_backend(backend):
        found = gradients(lora_linear, x, projections, y_like, p=0.1, seed=SEED)
        broadcast = gradients(lora_linear, x, projections, torch.ones(1, 1).expand(9, 24), p=0.1, seed=SEED)
    reference = gradients(lora_linear_reference, x, projections, y_like, p=0.1, seed=SEED)
    assert_close(found, reference)
    assert_close(broadcast, gradients(lora_linear_reference, x, projections, torch.ones(9, 24), p=0.1, seed=SEED))


def test_three_dimensions_and_no_rows():
    x = torch.randn(2, 5, 32)
    projections = group(24, 8, K=32, bias=True)
    assert lora_linear(x, projections).shape == (2, 5, 32)
    expected = gradients(lora_linear_reference, x, projections, p=0.1, seed=SEED)
    assert_close(gradients(lora_linear, x, projections, p=0.1, seed=SEED), expected)
    for dtype in (torch.float32, torch.bfloat16):
        empty = gradients(lora_linear, x[:0].to(dtype), group(24, 8, K=32, dtype=dtype), p=0.1, seed=SEED)
        assert empty[0].shape == (0, 5, 32)
        assert all(not grad.any() for grad in empty[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adjacent_weights_are_one_product_with_the_same_result(dtype):
    x = torch.randn(33, 64).to(dtype)
    separate = gradients(lora_linear, x, group(32, 16, 16, K=64, dtype=dtype), p=0.1, seed=SEED)
    adjacent = gradients(lora_linear, x, group(32, 16, 16, K=64, dtype=dtype, adjacent=True), p=0.1, seed=SEED)
    assert_close(adjacent, separate, tolerance=1e-5 if dtype == torch.float32 else 1e-2)


def test_transposed_weights():
    x = torch.randn(9, 32)
    projections = group(24, K=32, bias=True)
    turned = [Projection(q.weight.t().contiguous().t(), q.bias, q.a, q.b, q.scale) for q in projections]
    assert turned[0].weight.stride() == (1, 24)
    assert_close(gradients(lora_linear, x, turned), gradients(lora_linear_reference, x, projections))


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_weights_are_those_of_the_dense_weight_they_stand_for(double_quant):
    x = torch.randn(9, 64)
    projections = group(32, 64, K=64)
    packed, dense = [], []
    for part in projections:
        quant = nf4_quantize(part.weight, double_quant=double_quant)
        packed.append(Projection(quant.packed, None, part.a, part.b, part.scale, quant))
        dense.append(Projection(nf4_dequant(quant, dtype=torch.float32), None, part.a, part.b, part.scale))
    found = gradients(lora_linear, x, packed, p=0.1, seed=SEED)
    assert_close(found, gradients(lora_linear_reference, x, dense, p=0.1, seed=SEED))


def test_an_input_without_gradient_gets_none():
    x = torch.randn(9, 32)
    projections = group(24, K=32)
    expected = gradients(lora_linear_reference, x, projections, p=0.1, seed=SEED)[2:]
    y = lora_linear(x, projections, p=0.1, seed=SEED)
    leaves = [projections[0].a, projections[0].b]
    dy = cotangent(y)
    assert_close(torch.autograd.grad(y, leaves, dy), expected)
    frozen = [Projection(q.weight, None, q.a.detach(), q.b.detach(), q.scale) for q in projections]
    assert not lora_linear(x, frozen).requires_grad
    only_x = x.clone().requires_grad_()
    lora_linear(only_x, frozen, p=0.1, seed=SEED).backward(dy)
    assert_close([only_x.grad], gradients(lora_linear_reference, x, projections, p=0.1, seed=SEED)[1:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_twice_gives_the_same(dtype):
    x = torch.randn(9, 32).to(dtype).requires_grad_()
    projections = group(24, 8, K=32, dtype=dtype)
    leaves = [x, *(q.a for q in projections), *(q.b for q in projections)]
    y = lora_linear(x, projections, p=0.1, seed=SEED)
    first = torch.autograd.grad(y.float().square().sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(y.float().square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_two_adapters_on_one_weight_add_their_gradients_to_x():
    x = torch.randn(9, 32)
    one = group(24, K=32)
    other = [Projection(one[0].weight, None, torch.randn(4, 32), torch.randn(24, 4), 2.0)]

    def both(function):
        leaf = x.clone().requires_grad_()
        total = function(leaf, one, p=0.1, seed=SEED) * function(leaf, other, p=0.1, seed=SEED + 1)
        return torch.autograd.grad(total.sum(), [leaf, one[0].a, one[0].b])

    assert_close(both(lora_linear), both(lora_linear_reference))


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_more_than_three_get_a_mask_each(backend):
    x = torch.randn(9, 32)
    projections = group(8, 8, 8, 8, 8, K=32, r=4)
    assert len({lane_of(j, SEED) for j in range(7)}) == 7
    expected = gradients(lora_linear_reference, x, projections, p=0.3, seed=SEED)
    with use_backend(backend):
        assert_close(gradients(lora_linear, x, projections, p=0.3, seed=SEED), expected)


def test_adapters_in_fp32_around_a_bf16_model():
    x = torch.randn(64, 32).bfloat16()
    low = group(24, 8, K=32, dtype=torch.bfloat16, parameter_dtype=torch.float32)
    expected = gradients(lora_linear_reference, x.double(), group_in(low, torch.float64), p=0.1, seed=SEED)
    found = gradients(lora_linear, x, low, p=0.1, seed=SEED)
    assert [t.dtype for t in found] == [torch.bfloat16] * 2 + [torch.float32] * 4
    assert_close(found, expected, tolerance=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradients(lora_linear, x.float(), low, p=0.1, seed=SEED)
    assert [t.dtype for t in mixed[:2]] == [torch.bfloat16, torch.float32]
    assert_close(mixed, expected, tolerance=1e-2)


def test_gradients_come_in_the_dtype_that_the_parameter_asks_for():
    x = torch.randn(64, 32).bfloat16()
    (part,) = group(24, K=32, dtype=torch.bfloat16)
    part.a.grad_dtype = part.b.grad_dtype = torch.float32
    lora_linear(x, [part], p=0.1, seed=SEED).sum().backward()
    assert part.a.grad.dtype == part.b.grad.dtype == torch.float32
    assert part.a.grad.is_contiguous()
    assert part.b.grad.is_contiguous()


def test_what_is_saved_is_the_input_and_the_low_rank_product():
    x = torch.randn(64, 32, requires_grad=True)
    projections = group(24, 8, K=32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_linear(x, projections, p=0.1, seed=SEED)
        s = torch.randn(64, 16, requires_grad=True)
        first, _ = list(saved), saved.clear()
        lora_linear(x, projections, s=s)
    parameters = {id(q.a) for q in projections} | {id(q.b) for q in projections}
    shapes = [[tuple(t.shape) for t in found if id(t) not in parameters] for found in (first, saved)]
    assert y.shape == (64, 32)
    assert sum(shape[0] == 64 for shape in shapes[0]) == 2
    assert sum(shape[0] == 64 for shape in shapes[1]) == 1


def test_what_cannot_be_is_refused():
    x = torch.randn(4, 32)
    (part,) = group(24, K=32)
    with pytest.raises(ValueError, match="frozen"):
        lora_linear(x, [Projection(part.weight.clone().requires_grad_(), None, part.a, part.b, 1.0)])
    with pytest.raises(ValueError, match="input 31 features"):
        lora_linear(x[:, :31], [part])
    with pytest.raises(ValueError, match="ranks"):
        lora_linear(x, [part], s=torch.randn(4, 3))


def test_the_seed_comes_from_torchs_generator():
    x = torch.randn(16, 32)
    projections = group(24, K=32)
    torch.manual_seed(5)
    first = lora_linear(x, projections, p=0.5)
    second = lora_linear(x, projections, p=0.5)
    torch.manual_seed(5)
    assert torch.equal(first, lora_linear(x, projections, p=0.5))
    assert not torch.equal(first, second)


def test_results_do_not_depend_on_what_the_scratch_memory_held():
    x = torch.randn(40, 33).bfloat16()
    projections = group(17, 24, K=33, r=5, dtype=torch.bfloat16)
    first = gradients(lora_linear, x, projections, p=0.1, seed=SEED)
    gradients(
        lora_linear,
        torch.full((200, 90), float("nan")).bfloat16(),
        group(70, 9, K=90, r=80, dtype=torch.bfloat16),
        p=0.1,
    )
    again = gradients(lora_linear, x, projections, p=0.1, seed=SEED)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler")
def test_tiles_and_plain_products_agree(monkeypatch):
    x = torch.randn(70, 50).bfloat16()
    projections = group(33, 17, K=50, r=20, dtype=torch.bfloat16)
    with use_backend("native"):
        tiles = gradients(lora_linear, x, projections, p=0.1, seed=SEED)
        monkeypatch.setattr(lora_cpu, "_has_tiles", lambda: False)
        products = gradients(lora_linear, x, projections, p=0.1, seed=SEED)
    assert_close(tiles, products, tolerance=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_the_factors_are_added_to_existing_ones(backend):
    dy, s, b, x = torch.randn(20, 24), torch.randn(20, 4), torch.randn(24, 4), torch.randn(20, 16)
    db, da = torch.ones(24, 4), torch.ones(4, 16)
    with use_backend(backend):
        ds, found = lora_grads(dy, s, b, scale=2.0, into=db)
        assert found is db
        assert lora_grad_a(ds, x, p=0.2, seed=SEED, lane=2, into=da) is da
    assert_close([ds, db], [2 * dy @ b, 1 + dy.t() @ s])
    assert_close([da], [1 + ds.t() @ drop(x, p=0.2, seed=SEED, lane=2)])


@pytest.mark.parametrize(
    ("p", "turned", "count"), [(0.0, True, 1), (0.0, False, 1), (0.0, False, 2), (0.3, False, 1), (0.3, False, 2)]
)
def test_the_triton_gemm_holds_the_low_rank_update(p, turned, count):
    M, K, N = 37, 50, 70
    x, s, weight, out = torch.randn(M, K), torch.randn(M, 10 * count), torch.randn(K, N), torch.empty(M, N)
    ranks = [slice(10 * j, 10 * j + 10) for j in range(count)]
    low = [torch.randn(10, N) for _ in ranks]
    bias = torch.randn(N) if turned else None
    expected = x @ weight + (bias if turned else 0)
    for lane, (own, part) in enumerate(zip(ranks, low, strict=True)):
        expected += drop(s[:, own] @ part, p=p, seed=SEED, lane=lane)
    lora_gemm.gemm(
        x, weight.t().contiguous() if turned else weight, s,
        [part.t().contiguous() if turned else part for part in low],
        out=out, ranks=ranks, turned=turned, bias=bias, p=p, seed=SEED,
    )  # fmt: skip
    assert_close([out], [expected])


def changed(projections, **fields):
    return [replace(part, **{name: values[j] for name, values in fields.items()}) for j, part in enumerate(projections)]


@pytest.mark.parametrize("r", [4, 16])
def test_packed_weights_take_b_into_the_product(r):
    x = torch.randn(9, 32)
    projections = group(24, 8, K=32, r=r, bias=True)
    packed = pack(group(24, 8, K=32, r=16, bias=True))
    packed = changed(packed, **{name: [getattr(q, name) for q in projections] for name in ("a", "b", "bias")})
    expected = gradients(lora_linear_reference, x, projections, p=0.1, seed=SEED)
    with use_backend("triton"):
        lora_linear(x, pack(group(24, 8, K=32, r=16)))
        assert_close(gradients(lora_linear, x, packed, p=0.1, seed=SEED), expected)
        assert_close(gradients(lora_linear, x, packed, p=0.1, seed=SEED), expected)
    assert packed[0].packed[:24, 32:].any()
    assert_close(gradients(lora_linear, x, packed, p=0.1, seed=SEED), expected)


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("adjacent", [False, True])
def test_the_fused_strategy_gives_the_same(monkeypatch, p, adjacent):
    x = torch.randn(9, 32)
    projections = group(24, 8, K=32, bias=True, adjacent=adjacent)
    expected = gradients(lora_linear_reference, x, projections, p=p, seed=SEED)
    monkeypatch.setattr(module, "_strategy", lambda call, x: "fused")
    with use_backend("triton"):
        assert_close(gradients(lora_linear, x, projections, p=p, seed=SEED), expected)
