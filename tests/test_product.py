"""Blocks of columns change the time of a product, not its value."""

import pytest
import torch
from burnish.kernels import product as module
from burnish.kernels.product import product


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("turned", [False, True])
def test_blocks_of_columns_make_the_same_product(monkeypatch, blocks, turned):
    monkeypatch.setattr(module, "MIN_WORK", 0)
    monkeypatch.setattr(module, "_chosen", {})
    monkeypatch.setattr(module, "_fastest", lambda x, w, out: blocks)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, w = torch.randn(5, 7), torch.randn(7, 70)
    w = w.t().contiguous().t() if turned else w
    out = torch.empty(5, 80)[:, 3:73]
    assert product(x, w, out=out) is out
    assert torch.allclose(out, x @ w, atol=1e-5)


def test_each_shape_is_timed_once(monkeypatch):
    timed = []
    monkeypatch.setattr(module, "MIN_WORK", 0)
    monkeypatch.setattr(module, "_chosen", {})
    monkeypatch.setattr(module, "_fastest", lambda x, w, out: timed.append(x.shape) or 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for rows in (100, 128, 128, 129):
        product(torch.randn(rows, 8), torch.randn(8, 16), out=torch.empty(rows, 16))
    assert timed == [(100, 8), (129, 8)]


def test_the_timed_call_returns_the_product(monkeypatch):
    monkeypatch.setattr(module, "_chosen", {})
    x, w = torch.randn(300, 400), torch.randn(400, 500)
    out = product(x, w, out=torch.empty(300, 500))
    assert torch.allclose(out, x @ w, atol=1e-3)
    assert torch.equal(out, product(x, w, out=torch.empty(300, 500)))
