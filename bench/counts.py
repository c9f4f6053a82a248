"""What one call of a Run allocates, keeps for backward and starts. On a CPU the counts are exact: the same every time.

On a CPU an operation of ATen counts if it computes (views, metadata and empty memory do not), and so does every call of
the C++ library; bytes are those of the tensors that the call makes, the buffers that burnish keeps from call to call
among them. On a GPU the allocator and the profiler count.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ..harness.live_bytes import undisturbed
from ..kernels import native
from .op_runs import Run, tensors_of

SPIN = "spin_kernel"
"""What torch.cuda._sleep runs on a GPU."""
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


def all_counts(runs: Sequence[Run]) -> list[dict[str, int]]:
    """peak_bytes, saved_bytes and num_launches of every run; on a GPU in one session of the profiler."""
    saved = [saved_bytes(run) for run in runs]
    if any(map(is_on_gpu, runs)):
        pairs = list(zip(map(peak_bytes, runs), _gpu_launches(runs), strict=True))
    else:
        pairs = [(seen.peak_bytes, seen.num_launches) for seen in map(_observed, runs)]
    return [
        {"peak_bytes": peak, "saved_bytes": kept, "num_launches": launches}
        for kept, (peak, launches) in zip(saved, pairs, strict=True)
    ]


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
    return _gpu_launches([run])[0]


def _gpu_launches(runs: Sequence[Run]) -> list[int]:
    """Counted in one session of the profiler, which takes long to start; a kernel that spins begins each run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for run in runs:
            torch.cuda._sleep(1)
            run()
        torch.cuda.synchronize()
    on_gpu = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    on_gpu.sort(key=lambda event: event.time_range.start)
    return launches_after_spins([event.name for event in on_gpu], len(runs))


def launches_after_spins(names: Sequence[str], num_runs: int) -> list[int]:
    """How many follow each SPIN, by the names of kernels in their order. Raises RuntimeError for too few of them."""
    starts = [i for i, name in enumerate(names) if SPIN in name]
    if len(starts) != num_runs:
        raise RuntimeError(f"the profiler saw {len(starts)} of {num_runs} runs on the GPU")
    return [stop - start - 1 for start, stop in itertools.pairwise([*starts, len(names)])]


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
    """One call, observed."""
    observer = _Observer()

    def observe() -> None:
        with _native_calls(observer), observer:
            run()

    undisturbed(observe)
    return observer
