"""What the generated tests of operations do not see: hits, memory, chunks, skipped work, bad targets."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from burnish.kernels import linear_cross_entropy as module
from burnish.kernels.linear_cross_entropy import chunk_rows, linear_cross_entropy, linear_cross_entropy_reference
from burnish.kernels.op import use_backend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

BACKENDS = ("native", "torch", "triton")


class Recorder(TorchDispatchMode):
    """Calls by operator name, and the number of elements of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return result


@contextmanager
def chunks_of(rows: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(module, "MAX_CHUNK_ROWS", {"cpu": rows, "cuda": rows})
        patch.setattr(module, "MIN_CHUNK_ROWS", min(rows, module.MIN_CHUNK_ROWS))
        yield


def problem(*, tokens: int = 200, features: int = 24, classes: int = 300, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, features, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(classes, features, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(classes, (tokens,), generator=generator)
    targets[::3] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("backend", BACKENDS)
def test_right_answers_are_those_of_argmax_also_where_logits_tie(backend):
    hidden, weight, _ = problem()
    with torch.no_grad():
        weight[7] = weight[100] = weight[250]
        logits = hidden @ weight.t()
    targets = logits.argmax(-1)
    targets[::2] = 100
    targets[::5] = -100
    _, expected = linear_cross_entropy_reference(hidden, weight, targets)
    with use_backend(backend):
        _, found = linear_cross_entropy(hidden, weight, targets)
    assert found.dtype == torch.int64
    assert not found.requires_grad
    assert int(found) == int(expected) > 20


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_no_tensor_is_as_large_as_all_logits(backend, monkeypatch):
    hidden, weight, targets = problem(tokens=1024, classes=4096)
    with chunks_of(64, monkeypatch), use_backend(backend), Recorder() as recorder:
        loss, _ = linear_cross_entropy(hidden, weight, targets)
        loss.backward()
    assert recorder.largest == max(64 * 4096, weight.numel())


def test_logits_of_a_chunk_are_bounded_in_bytes():
    for tokens, classes in ((5, 10), (1025, 49152), (8192, 262144), (100_000, 151_936)):
        weight = torch.empty(classes, 1, dtype=torch.bfloat16, device="meta")
        rows = chunk_rows(tokens, weight)
        assert rows >= min(tokens, module.MIN_CHUNK_ROWS)
        assert rows * classes * 2 <= module.MAX_CHUNK_BYTES["cpu"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_chunks_give_what_one_gives(dtype, monkeypatch):
    def gradients(rows: int) -> list[torch.Tensor]:
        hidden, weight, targets = problem(dtype=dtype)
        with chunks_of(rows, monkeypatch):
            loss, _ = linear_cross_entropy(hidden, weight, targets, label_smoothing=0.1)
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]

    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for many, one in zip(gradients(32), gradients(1024), strict=True):
        assert float((many - one).norm() / one.norm()) < tolerance


def test_evaluation_makes_one_product_and_a_frozen_head_two():
    hidden, weight, targets = problem()
    with Recorder() as evaluation, torch.no_grad():
        linear_cross_entropy(hidden, weight, targets)
    assert evaluation.calls["mm"] == 1
    with Recorder() as frozen:
        linear_cross_entropy(hidden, weight.detach(), targets)
    assert frozen.calls["mm"] == 2


def test_backward_twice_gives_the_same_and_scales_with_the_incoming_gradient():
    hidden, weight, targets = problem(dtype=torch.bfloat16)
    loss, _ = linear_cross_entropy(hidden, weight, targets)
    first, *_ = torch.autograd.grad(loss, hidden, retain_graph=True)
    kept = first.clone()
    second, *_ = torch.autograd.grad(loss, hidden, torch.tensor(0.25), retain_graph=True)
    third, *_ = torch.autograd.grad(loss, hidden)
    assert torch.equal(first, third)
    assert torch.equal(first, kept)
    assert torch.equal(second, kept * 0.25)


def test_shapes_with_a_batch_dimension_autocast_and_checkpointing_agree_with_the_flat_call():
    hidden, weight, targets = problem()
    with torch.autocast("cpu", torch.bfloat16):
        loss, right = linear_cross_entropy(hidden.view(2, 100, -1), weight, targets.view(2, 100))
    low = (hidden.detach().bfloat16(), weight.detach().bfloat16())
    expected, expected_right = linear_cross_entropy(*low, targets)
    assert torch.equal(loss, expected)
    assert torch.equal(right, expected_right)
    plain, *_ = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets)[0], hidden)
    again, _ = checkpoint(linear_cross_entropy, hidden, weight, targets, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, hidden)[0], plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_class_with_a_logit_of_minus_infinity_takes_no_part(backend):
    hidden, weight, targets = problem()
    targets[targets == 5] = 6
    bias = torch.zeros(len(weight))
    bias[5] = float("-inf")
    with use_backend(backend):
        found, _ = linear_cross_entropy(hidden, weight, targets, bias=bias)
        grads = torch.autograd.grad(found, (hidden, weight))
    expected, _ = linear_cross_entropy_reference(hidden, weight, targets, bias=bias)
    assert torch.allclose(found, expected)
    for grad, own in zip(grads, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert torch.allclose(grad, own, atol=1e-5)


@pytest.mark.parametrize("target", [-1, 300])
def test_targets_outside_of_the_vocabulary(target):
    hidden, weight, targets = problem()
    targets[4] = target
    with pytest.raises(IndexError, match=f"target {target} is out of bounds of 300 classes"):
        linear_cross_entropy(hidden, weight, targets)


def test_a_compiled_model_keeps_the_loss_outside_of_its_graph():
    hidden, weight, targets = problem()

    def loss_of(hidden: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden * 2, weight, targets)[0] / 3

    compiled = torch.compile(loss_of, backend="eager")
    assert torch.allclose(compiled(hidden), loss_of(hidden))
