"""Memory of this process now and at most: resident on a CPU, given out by torch's allocator on a GPU."""

import contextlib
import re
from pathlib import Path

import torch

from .metrics import peak_memory_bytes

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What resets VmHWM to the present size, proc_pid_clear_refs(5)."""


def bytes_now(device: str) -> int:
    """Pages of mapped files count where they are resident."""
    return torch.cuda.memory_allocated() if device.startswith("cuda") else _status("VmRSS") or peak_bytes(device)


def peak_bytes(device: str) -> int:
    """The most since `reset_peak`; where the system cannot reset it, since the process began."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") or peak_memory_bytes(device)


def reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")


def _status(field: str) -> int | None:
    try:
        text = STATUS.read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s*(\d+) kB", text, re.MULTILINE)
    return 1024 * int(found[1]) if found else None
