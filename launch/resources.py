"""What this host has for training -> Resources. Looks at cgroups, so a container's limits count. Imports no torch."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath

from ..harness.plan import Resources

GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg")
"""Present where an NVIDIA driver is (Linux, WSL)."""
QUERY_GPUS = """
import json, torch
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps([[gpu.name, gpu.total_memory] for gpu in gpus]))
"""
QUERY_TIMEOUT_S = 120


def detect() -> Resources:
    """The devices, cores and memory that this process may use."""
    gpus = visible_gpus()
    return Resources(
        device="cuda" if gpus else "cpu",
        num_devices=len(gpus),
        num_cpus=num_cpus(),
        host_memory_bytes=memory_bytes(),
        device_memory_bytes=min((size for _, size in gpus), default=0),
        device_name=gpus[0][0] if gpus else "",
    )


def has_gpu_driver() -> bool:
    return any(os.path.exists(device) for device in GPU_DEVICES)


def visible_gpus() -> list[tuple[str, int]]:
    """Name and bytes of every GPU that torch can use.

    Asked in a process of its own: a launcher that touches CUDA itself takes memory from the workers.
    """
    if not has_gpu_driver():
        return []
    command = [sys.executable, "-c", QUERY_GPUS]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = result.stdout.splitlines()
    return [(name, size) for name, size in json.loads(lines[-1])] if result.returncode == 0 and lines else []


def num_cpus(root: Path = Path("/")) -> int:
    """Cores of this process's affinity mask, or fewer where a cgroup's quota allows fewer; at least 1."""
    count = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for folder in _cgroups(root, "cpu"):
        for quota, period in (_pair(folder / "cpu.max"), (_number(folder / "cpu.cfs_quota_us"), None)):
            if quota is not None and quota > 0:
                count = min(count, quota / (period or _number(folder / "cpu.cfs_period_us") or 100_000))
    return max(1, int(count))


def memory_bytes(root: Path = Path("/")) -> int:
    """Memory of the machine, or the smallest cgroup limit above this process."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for folder in _cgroups(root, "memory"):
        found = (_number(folder / "memory.max"), _number(folder / "memory.limit_in_bytes"))
        limits += [int(limit) for limit in found if limit is not None and limit > 0]
    return min(limits)


def _cgroups(root: Path, controller: str) -> list[Path]:
    """Folders of this process's cgroup and all above it, version 2 or the controller's tree of version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        inside = PurePosixPath(path.lstrip("/"))
        folders += [mount / part for part in (inside, *inside.parents)]
    return folders


def _number(file: Path) -> float | None:
    """The number in a cgroup file; None if there is no such file or no limit in it."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return float(text) if re.fullmatch(r"-?\d+", text) else None


def _pair(file: Path) -> tuple[float | None, float | None]:
    """`cpu.max` holds quota and period in microseconds, or `max` and the period."""
    try:
        quota, period = file.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None, None
    return (float(quota), float(period)) if quota != "max" else (None, None)
