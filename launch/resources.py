"""What this host has for training -> Resources. Looks at cgroups, so a container's limits count. Imports no torch."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import Literal

from ..harness.config_hardware import Ray
from ..harness.offload import missing_tools
from ..harness.plan import Resources

GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg")
"""Present where an NVIDIA driver is (Linux, WSL)."""
QUERY_GPUS = """
import json, torch
gpus = range(torch.cuda.device_count())
print(json.dumps([[torch.cuda.get_device_properties(i).name, torch.cuda.mem_get_info(i)[0]] for i in gpus]))
"""
QUERY_TIMEOUT_S = 120


def detect() -> Resources:
    """The devices, cores and memory that this process may use; of the memory, what is free now."""
    gpus = visible_gpus()
    return Resources(
        device="cuda" if gpus else "cpu",
        num_devices=len(gpus),
        num_cpus=num_cpus(),
        host_memory_bytes=available_bytes(),
        device_memory_bytes=min((size for _, size in gpus), default=0),
        device_name=gpus[0][0] if gpus else "",
    )


def worker_resources(launch: Ray, device: str) -> dict[str, float]:
    """What one worker reserves on a Ray node."""
    asked = launch.resources_per_worker
    return {"GPU": 1.0} | asked if device == "cuda" else asked or {"CPU": 1.0}


def has_gpu_driver() -> bool:
    return any(os.path.exists(device) for device in GPU_DEVICES)


def visible_gpus() -> list[tuple[str, int]]:
    """Name of every GPU that torch can use, and the bytes that a process with a CUDA context has left on it.

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
    for folder in cgroups(root, "cpu"):
        for quota, period in (_pair(folder / "cpu.max"), (_number(folder / "cpu.cfs_quota_us"), None)):
            if quota is not None and quota > 0:
                count = min(count, quota / (period or _number(folder / "cpu.cfs_period_us") or 100_000))
    return max(1, int(count))


def memory_bytes(root: Path = Path("/")) -> int:
    """Memory of the machine, or the smallest cgroup limit above this process."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for folder in cgroups(root, "memory"):
        found = (_number(folder / "memory.max"), _number(folder / "memory.limit_in_bytes"))
        limits += [int(limit) for limit in found if limit is not None and limit > 0]
    return min(limits)


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that can be had without swapping: on the machine, and below every cgroup limit above this process.

    What the kernel keeps of files counts as free, in a cgroup too: it is given up before anything is refused.
    """
    found = [memory_bytes(root)]
    text = _text(root / "proc/meminfo")
    if match := re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE):
        found.append(1024 * int(match[1]))
    for folder in cgroups(root, "memory"):
        limits = (_number(folder / "memory.max"), _number(folder / "memory.limit_in_bytes"))
        used = (_number(folder / "memory.current"), _number(folder / "memory.usage_in_bytes"))
        stat = dict(re.findall(r"^(\w+) (\d+)$", _text(folder / "memory.stat"), re.MULTILINE))
        files = int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))
        for limit, taken in zip(limits, used, strict=True):
            if limit is not None and limit > 0 and taken is not None:
                found.append(max(0, int(limit - max(0, taken - files))))
    return min(found)


def offload_places(*, with_files: bool) -> tuple[Literal["cpu", "nvme"], ...]:
    """Where this host has the tools to offload to; files are asked about only where there may be some."""
    missing = set(missing_tools(with_files=with_files))
    if missing - {"libaio"}:
        return ()
    return ("cpu", "nvme") if with_files and not missing else ("cpu",)


def free_disk_bytes(path: str) -> int:
    """Free bytes where the folder is, or would be; 0 where that cannot be told."""
    folder = Path(path).absolute()
    existing = next((part for part in (folder, *folder.parents) if part.exists()), None)
    try:
        return shutil.disk_usage(existing).free if existing else 0
    except OSError:
        return 0


def cgroups(root: Path, controller: str) -> list[Path]:
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


def _text(file: Path) -> str:
    """What is in the file; nothing where it cannot be read."""
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _number(file: Path) -> float | None:
    """The number in a cgroup file; None if there is no such file or no limit in it."""
    text = _text(file).strip()
    return float(text) if re.fullmatch(r"-?\d+", text) else None


def _pair(file: Path) -> tuple[float | None, float | None]:
    """`cpu.max` holds quota and period in microseconds, or `max` and the period."""
    try:
        quota, period = file.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None, None
    return (float(quota), float(period)) if quota != "max" else (None, None)
