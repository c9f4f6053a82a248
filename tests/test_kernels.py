"""Every operation of the registry against its reference in fp64: values, every gradient, determinism; all from OPS.

The error may be at most twice PyTorch's own in the same dtype. Memory from torch.empty is NaN throughout. The Triton
kernels run in the interpreter on a CPU (fp32 and fp16: its bf16 arithmetic is wrong), on a GPU where there is one.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from burnish.bench.op_runs import in_dtype, tensors_of
from burnish.kernels import native
from burnish.kernels.op import Op, use_backend
from burnish.kernels.registry import OPS

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BACKENDS = ("triton",) if ON_GPU else ("triton", "native", "torch")
LEAST = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Relative errors that are never too large: of sums of a few fp32 numbers the last bit."""


def combinations() -> Iterator[Any]:
    for name, op in OPS.items():
        for backend in BACKENDS:
            if backend == "triton" and not op.kernels:
                continue
            for dtype in op.dtypes:
                if backend == "triton" and dtype == torch.bfloat16 and not ON_GPU:
                    continue
                if backend == "native" and dtype not in native.SUFFIX:
                    continue
                is_slow = backend == "triton" and dtype != torch.float32 and not ON_GPU
                marks = pytest.mark.nightly if is_slow else ()
                yield pytest.param(name, backend, dtype, id=f"{name}-{backend}-{str(dtype)[6:]}", marks=marks)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN (and the largest integer), so that reading what was never written shows."""
    was = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = was


def run(function: Any, inputs: dict[str, Any], **options: Any) -> list[torch.Tensor]:
    """Outputs, then the gradient of every input that requires one; the cotangents are fixed random numbers."""
    outputs = [out for out in tensors_of(function(**inputs, **options)) if out.is_floating_point()]
    leaves = [leaf for leaf in tensors_of(inputs) if leaf.requires_grad]
    differentiable = [out for out in outputs if out.requires_grad]
    grads: list[torch.Tensor] = []
    if leaves:
        generator = torch.Generator().manual_seed(1)
        cotangents = [
            torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype).to(out.device)
            for out in differentiable
        ]
        found = torch.autograd.grad(differentiable, leaves, cotangents, allow_unused=True)
        grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]
    return [value.detach() for value in (*outputs, *grads)]


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    assert value.shape == truth.shape, (value.shape, truth.shape)
    assert bool(value.isfinite().all())
    size = float(truth.norm())
    return float((value.double() - truth).norm()) / size if size else float(value.double().norm())


def make(op: Op, case: Any, dtype: torch.dtype) -> dict[str, Any]:
    return op.make_inputs(case, dtype, DEVICE, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "backend", "dtype"), list(combinations()))
def test_values_and_gradients_are_as_good_as_pytorchs(name, backend, dtype):
    op = OPS[name]
    for case in op.cases:
        inputs = make(op, case, dtype)
        own = run(op.reference, in_dtype(inputs, dtype))
        with use_backend(backend):
            found = run(op.function, in_dtype(inputs, dtype), **op.options)
        assert len(found) == len(own), case
        if op.is_exact:
            assert all(torch.equal(a, b) for a, b in zip(found, own, strict=True)), case
            continue
        truth = run(op.reference, in_dtype(inputs, torch.float64))
        for i, (value, expected, other) in enumerate(zip(found, truth, own, strict=True)):
            allowed = max(2 * relative_error(other, expected), LEAST[dtype])
            assert relative_error(value, expected) <= allowed, (dict(case), f"output or gradient {i}")


@pytest.mark.parametrize(("name", "backend", "dtype"), list(combinations()))
def test_results_are_bitwise_equal_over_five_runs(name, backend, dtype):
    op = OPS[name]
    inputs = make(op, op.cases[-1], dtype)
    with use_backend(backend):
        first, *others = [run(op.function, in_dtype(inputs, dtype), **op.options) for _ in range(5)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_registry_names_each_operation_once():
    assert all(name == op.name for name, op in OPS.items())
