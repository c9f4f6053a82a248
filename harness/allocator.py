"""The C allocator of a training process."""

import ctypes
import gc
import sys

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Parameters of mallopt(3)."""
KEPT_BYTES = 2**31 - 1
GROWTH_BYTES = 256 * 2**20


def keep_freed_memory() -> bool:
    """Lets glibc keep freed activations instead of returning them to the kernel after every step.

    PyTorch frees and allocates the same large buffers each step; giving them back costs a page fault per 4 KiB. What
    was freed before (by loading) goes back first. False where the C library is another one.
    """
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
    trim_heap()


def trim_heap() -> None:
    """Returns the freed pages between live allocations to the kernel, where the C library can."""
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
