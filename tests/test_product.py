"""Blocks of columns change the time of a product, not its value."""

import pytest
import torch
from burnish.kernels import product as module
from burnish.kernels.product import product


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(module, "MIN_WORK", 0)
    monkeypatch.setattr(module, "_shapes", {})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.mark.parametrize("is_halved", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("N", [1, 33, 70])
def test_every_way_makes_the_same_product(monkeypatch, is_halved, turned, N):
    x, w = torch.randn(5, 7), torch.randn(7, N)
    w = w.t().contiguous().t() if turned else w
    out = torch.empty(5, N + 10)[:, 3 : N + 3]
    for _ in range(module.TRIALS + 2):
        assert product(x, w, out=out) is out
        assert torch.allclose(out, x @ w, atol=1e-5)
        out.zero_()
    (shape,) = module._shapes.values()
    shape.best, shape.is_equal = {1: 1.0, 2: 0.5}, is_halved
    assert shape.blocks == (2 if is_halved else 1)
    assert torch.allclose(product(x, w, out=out), x @ w, atol=1e-5)


def test_a_shape_is_timed_a_few_times_only():
    for rows in (100, 128, 128, 129):
        product(torch.randn(rows, 8), torch.randn(8, 16), out=torch.empty(rows, 16))
    assert [shape.trials for shape in module._shapes.values()] == [3, 1]
    for _ in range(2 * module.TRIALS):
        product(torch.randn(128, 8), torch.randn(8, 16), out=torch.empty(128, 16))
    assert [shape.trials for shape in module._shapes.values()] == [module.TRIALS, 1]


def test_small_products_are_not_timed(monkeypatch):
    monkeypatch.setattr(module, "MIN_WORK", 2**25)
    product(torch.randn(8, 8), torch.randn(8, 8), out=torch.empty(8, 8))
    assert not module._shapes
