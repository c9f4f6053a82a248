"""The contract of an operation, and the choice of the code that runs it.

An operation file holds, in this order: docstring with the formula and its shape letters, `<op>_reference` (plain
PyTorch, the specification), Triton kernels, `autograd.Function`, the public function, `_make_inputs`, `OP = Op(...)`.
Tests, the compile gate, benchmarks and the kernel table are generated from the OP records of `registry.OPS`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from . import native

Backend = Literal["triton", "native", "torch"]
Case = Mapping[str, Any]
"""Shape letters and options of one set of inputs, for example {"M": 129, "K": 64, "p": 0.1}."""

_forced: ContextVar[Backend | None] = ContextVar("backend", default=None)


def backend_of(x: Tensor) -> Backend:
    """What runs an operation on this tensor: triton on CUDA; on the CPU native (C++) where it was built, else torch.

    Call it in forward and keep the answer for backward, which may run in another thread.
    """
    forced = _forced.get()
    if forced == "native" and not native.supports(x):
        return "torch"
    if forced is not None:
        return forced
    if x.is_cuda:
        return "triton"
    return "native" if native.supports(x) else "torch"


def compute_dtype(x: Tensor) -> torch.dtype:
    """What an operation computes in: the dtype of x, or autocast's where that is on for its device."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Runs everything inside with one backend: for tests and benchmarks. triton on CPU tensors is the interpreter."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@dataclass(frozen=True)
class Config:
    """One way to compile a kernel. `elements`: how many output elements one program makes (0 = not counted)."""

    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    elements: int = 0


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel and all configurations that a launch may choose, for the compile gate.

    `signature` gives the type of every runtime argument in Triton's spelling ("*bf16", "i32", "i64", "fp32"); the
    arguments named in `Config.constants` are the compile-time ones. Pointers, and the integers in `divisible`, are
    taken as multiples of 16, as a launch on ordinary shapes sees them.
    """

    fn: Any
    signature: Mapping[str, str]
    configs: Sequence[Config]
    uses_mma: bool = False
    """Whether tensor-core instructions must appear in the code."""
    divisible: Sequence[str] = ()


@dataclass(frozen=True)
class Op:
    """One operation: its specification, its public function, and how to make inputs for it.

    `make_inputs(case, dtype, device, generator)` returns the keyword arguments of both functions; every tensor in them
    (also inside tuples and lists) that has requires_grad is checked for its gradient. Outputs are a tensor or a tuple
    of tensors and None. The reference must work in float64: it is the ground truth.
    """

    name: str
    summary: str
    reference: Callable[..., Any]
    function: Callable[..., Any]
    make_inputs: Callable[[Case, torch.dtype, str, torch.Generator], dict[str, Any]]
    cases: Sequence[Case]
    kernels: Sequence[Kernel] = ()
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16)
    is_exact: bool = False
    """The outputs must equal the reference's bit for bit, in the same dtype."""
    bench_cases: Sequence[Case] = ()
    """Shapes of real models for the benchmark."""
    num_flops: Callable[[Case], float] | None = None
    """Floating-point operations of forward plus backward."""
    num_bytes: Callable[[Case], float] | None = None
    """Bytes that forward plus backward must move at least, in bf16."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of `function` that the reference does not take."""


def random_normal(
    *shape: int, dtype: torch.dtype, device: str, generator: torch.Generator, scale: float = 1.0
) -> Tensor:
    """Normal numbers that are the same for every dtype but for its rounding."""
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)
