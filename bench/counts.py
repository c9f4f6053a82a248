"""What one call of a Run allocates, keeps for backward and starts. On a CPU the counts are exact: the same every time.

On a CPU an operation of ATen counts if it computes (views, metadata and empty memory do not), and so does every call of
the C++ library; bytes are those of the tensors that the call makes, the buffers that burnish keeps from call to call
among them. On a GPU the allocator and the profiler count.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ..kernels import native
from .op_runs import Run, tensors_of

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"}
"""Operations of ATen that make memory and write nothing to it."""


def saved_bytes(run: Run) -> int:
    """Bytes that forward keeps for backward, without its inputs."""
    inputs = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(run.arguments)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run.forward()
        total = sum(kept.values())
    del outputs
    return total


def all_counts(run: Run) -> dict[str, int]:
    """peak_bytes, saved_bytes and num_launches."""
    saved = saved_bytes(run)
    if is_on_gpu(run):
        return {"peak_bytes": peak_bytes(run), "saved_bytes": saved, "num_launches": num_launches(run)}
    observed = _observed(run)
    return {"peak_bytes": observed.peak_bytes, "saved_bytes": saved, "num_launches": observed.num_launches}


def peak_bytes(run: Run) -> int:
    """The most that one call has allocated at a time, its results included."""
    if not is_on_gpu(run):
        return _observed(run).peak_bytes
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def num_launches(run: Run) -> int:
    """Kernels, copies and fills that one call starts on the GPU; operations and C++ calls that compute on a CPU."""
    if not is_on_gpu(run):
        return _observed(run).num_launches
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def is_on_gpu(run: Run) -> bool:
    return any(tensor.is_cuda for tensor in tensors_of(run.arguments))


class _Observer(TorchDispatchMode):
    """Sees every operation of ATen, forward and backward, and the memory of what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.num_launches = self.peak_bytes = 0
        self.alive: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        value = func(*args, **kwargs)
        given = {tensor.untyped_storage()._cdata for tensor in tensors_of((args, kwargs))}
        made = [tensor for tensor in tensors_of(value) if tensor.untyped_storage()._cdata not in given]
        for tensor in made:
            self.alive[tensor.untyped_storage()] = None
        if (made or func._schema.is_mutable) and func._schema.name.split("::")[1] not in ALLOCATIONS:
            self.num_launches += 1
        self.peak_bytes = max(self.peak_bytes, sum(storage.nbytes() for storage in self.alive))
        return value


@contextmanager
def _native_calls(observer: _Observer) -> Iterator[None]:
    """Counts the calls of the C++ library, which ctypes makes behind the dispatcher's back."""
    call = native.call

    def counted(name: str, dtype: torch.dtype, *arguments: Any) -> None:
        observer.num_launches += 1
        call(name, dtype, *arguments)

    native.call = counted
    try:
        yield
    finally:
        native.call = call


def _observed(run: Run) -> _Observer:
    """One call, observed in a thread of its own, which has no memory of earlier calls."""
    observer, context = _Observer(), copy_context()
    errors: list[BaseException] = []

    def observe() -> None:
        try:
            with _native_calls(observer), observer:
                run()
        except Exception as error:
            errors.append(error)

    was_enabled = gc.isenabled()
    gc.disable()
    try:
        thread = Thread(target=context.run, args=(observe,))
        thread.start()
        thread.join()
    finally:
        if was_enabled:
            gc.enable()
    if errors:
        raise errors[0]
    return observer
