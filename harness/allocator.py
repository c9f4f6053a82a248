"""The allocator of a training process on a CPU: what a step frees serves the next, and no more is held than is used.

PyTorch frees and allocates the same large tensors in each layer and step. Given back to the kernel, they would cost a
page fault per 4 KiB; kept in the C library's heap, they leave holes. So `cpp/allocator.cpp` keeps large blocks itself.
"""

import ctypes
import functools
import gc
import sys
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Parameters of mallopt(3)."""
KEPT_BYTES = 2**31 - 1
GROWTH_BYTES = 256 * 2**20
SOURCES = Path(__file__).parent / "cpp"
FLAGS = ("-std=c++20", "-O2", "-shared", "-fPIC")


def keep_freed_memory() -> None:
    """Large CPU tensors come from the pool from now on; glibc keeps what else is freed. Without Linux nothing changes.

    What was freed before (by loading) goes back to the kernel first.
    """
    keep_heap()
    if (found := pool()) is not None:
        found.allocator_install()


@functools.cache
def pool() -> ctypes.CDLL | None:
    """The library of the pool; None where it cannot be built, and the heap has to do."""
    from ..kernels.native import built

    of_torch = Path(torch.__file__).parent
    flags = (*FLAGS, f"-I{of_torch / 'include'}", f"-L{of_torch / 'lib'}", "-lc10")
    return built("allocator", SOURCES, flags, without="freed tensors leave holes in the heap")


def keep_heap() -> bool:
    """Lets glibc keep what is freed instead of returning it to the kernel. False where the C library is another one."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    libc.malloc_trim(0)
    settings = {M_MMAP_THRESHOLD: KEPT_BYTES, M_TRIM_THRESHOLD: KEPT_BYTES, M_TOP_PAD: GROWTH_BYTES}
    accepted = [libc.mallopt(parameter, value) == 1 for parameter, value in settings.items()]
    return all(accepted)


def give_back_freed_memory(device: str) -> None:
    """Returns what nothing holds any more to the kernel, and to the GPU: for the next attempt of a run."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    if pool.cache_info().currsize and (found := pool()) is not None:
        found.allocator_release()
    trim_heap()


def trim_heap() -> None:
    """Returns the freed pages between live allocations to the kernel, where the C library can."""
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
