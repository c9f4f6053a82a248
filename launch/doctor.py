"""What is installed here, what is missing, and what that switches off."""

import ctypes.util
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from ..harness.markup import size
from ..harness.offload import INSTALL, find_tool, missing_tools
from .resources import detect
from .versions import floors, is_older

State = Literal["ok", "missing", "broken"]
MIN_OPEN_FILES = 4096
SHARED = ("nfs", "nfs4", "lustre", "gpfs", "ceph", "beegfs", "fuse", "9p", "cifs", "smb3", "virtiofs")
"""File systems that several machines can see."""
PROBE_TIMEOUT_S = 180
TORCH_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
found = {"version": torch.__version__, "cuda": torch.version.cuda, "gpu": cuda,
         "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
         "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available()}
print(json.dumps(found))
"""
BITSANDBYTES_PROBE = """
import json, torch, bitsandbytes.functional as f
device = "cuda" if torch.cuda.is_available() else "cpu"
weight = torch.linspace(-1, 1, 128, device=device).reshape(2, 64)
packed, state = f.quantize_4bit(weight, quant_type="nf4")
error = float((f.dequantize_4bit(packed, state) - weight).abs().max())
print(json.dumps({"device": device, "error": error}))
"""


@dataclass(frozen=True)
class Check:
    """One thing that burnish can use. `switches_off` says what does not work without it; empty where nothing."""

    name: str
    state: State
    detail: str
    switches_off: str = ""
    is_required: bool = False


def examine(runs_dir: str) -> dict[str, Any]:
    """All checks as JSON: {ok, checks: [{name, state, detail, switches_off, is_required}]}.

    ok = nothing required is missing. What may crash or take long is asked in a process of its own.
    """
    torch = _probe(TORCH_PROBE)
    checks = [_python(), *_packages(), *_torch(torch), *_compiler(), _bitsandbytes(), *_machine(), _storage(runs_dir)]
    ok = all(check.state == "ok" for check in checks if check.is_required)
    return {"ok": ok, "checks": [asdict(check) for check in checks]}


def render(found: dict[str, Any]) -> str:
    """The checks as lines, what is missing last."""
    marks = {"ok": "ok", "missing": "--", "broken": "!!"}
    lines = []
    for check in sorted(found["checks"], key=lambda check: check["state"] != "ok"):
        lines.append(f"{marks[check['state']]}  {check['name']:<22}{check['detail']}")
        if check["state"] != "ok" and check["switches_off"]:
            lines.append(f"    {'':<22}{'needed' if check['is_required'] else 'without it'}: {check['switches_off']}")
    verdict = "everything that is required is here" if found["ok"] else "something required is missing"
    return "\n".join([*lines, "", verdict])


def _python() -> Check:
    return Check("python", "ok", f"{sys.version.split()[0]} at {sys.prefix}", is_required=True)


def _packages() -> list[Check]:
    """The distributions that burnish itself asks for, with their versions."""
    uses = {
        "ray": "launch.type ray: several workers, restarts",
        "deepspeed": "ZeRO stages and more than one worker",
        "bitsandbytes": "quantization nf4 and int8, optimizer adamw_8bit",
        "peft": "adapter methods lora, dora, qlora",
        "tensorboard": "TensorBoard events",
        "gguf": "models in GGUF files",
        "datasets": "hub datasets and datasets folders",
    }
    checks = []
    for name, floor in floors().items():
        off = uses.get(name, "burnish")
        try:
            have = version(name)
        except PackageNotFoundError:
            checks.append(Check(name, "missing", "not installed: pip install burnish", off, is_required=True))
            continue
        is_old = bool(floor) and is_older(have, floor)
        detail = f"{have}, too old: pip install '{name}>={floor}'" if is_old else have
        checks.append(Check(name, "broken" if is_old else "ok", detail, off if is_old else "", is_required=True))
    return checks


def _torch(found: dict[str, Any] | str) -> list[Check]:
    if isinstance(found, str):
        return [Check("torch import", "broken", found, "everything that trains", is_required=True)]
    build = f"{found['version']}, " + (f"CUDA {found['cuda']}" if found["cuda"] else "CPU build")
    off_gpu = "training on a GPU: everything runs on the CPU"
    return [
        Check("torch import", "ok", build, is_required=True),
        Check("GPU", "ok", _gpu_names()) if found["gpu"] else Check("GPU", "missing", "no usable GPU", off_gpu),
        Check("NCCL", "ok", found["nccl"])
        if found["nccl"]
        else Check("NCCL", "missing", "no GPU to use it", "several GPUs"),
        Check("gloo", "ok", "in torch") if found["gloo"] else Check("gloo", "missing", "", "several CPU workers"),
        _triton(),
    ]


def _gpu_names() -> str:
    resources = detect()
    return f"{resources.num_devices} x {resources.device_name}, {size(resources.device_memory_bytes)}"


def _triton() -> Check:
    off = "the fused operations: models run as transformers and PEFT made them"
    try:
        return Check("triton", "ok", version("triton"))
    except PackageNotFoundError:
        return Check("triton", "missing", "not installed: pip install triton", off)


def _compiler() -> list[Check]:
    """What our CPU kernels and DeepSpeed's operators are built with on first use."""
    off = {
        "g++": "the C++ half of the fused operations on a CPU (they run in plain torch), memory.offload_optimizer",
        "ninja": "memory.offload_optimizer, and nvme for either offload: DeepSpeed builds their operators",
        "nvcc": "DeepSpeed's CUDA operators, built on first use",
    }
    checks = []
    for tool, consequence in off.items():
        found = find_tool(tool)
        checks.append(Check(tool, "ok", found) if found else Check(tool, "missing", "not on PATH", consequence))
    return [*checks, _libaio()]


def _libaio() -> Check:
    """Whether programs can be built with it: the library alone is not enough."""
    library, is_known = ctypes.util.find_library("aio"), find_tool("g++") is not None
    if is_known and "libaio" not in missing_tools(with_files=True):
        return Check("libaio", "ok", library or "builds")
    found = "library not found" if library is None else "its header is missing" if is_known else "not tried without g++"
    off = f"memory.offload_optimizer and memory.offload_param nvme: install {INSTALL['libaio']}"
    return Check("libaio", "missing", found, off)


def _bitsandbytes() -> Check:
    found = _probe(BITSANDBYTES_PROBE)
    off = "quantization nf4 (qlora)"
    if isinstance(found, str):
        return Check("bitsandbytes back end", "broken", found, off)
    return Check("bitsandbytes back end", "ok", f"nf4 works on {found['device']}")


def _machine() -> list[Check]:
    resources = detect()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = f"{soft} (at most {hard})"
    few = Check("open files", "broken", files, f"many workers and files: raise it with ulimit -n {MIN_OPEN_FILES}")
    shm = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0
    small = Check("/dev/shm", "broken", size(shm), "fast exchange between Ray workers; give containers --shm-size=2g")
    return [
        Check("cores", "ok", str(resources.num_cpus)),
        Check("memory", "ok", size(resources.host_memory_bytes)),
        Check("open files", "ok", files) if soft >= MIN_OPEN_FILES else few,
        Check("/dev/shm", "ok", size(shm)) if shm >= 2**28 else small,
    ]


def _storage(runs_dir: str) -> Check:
    """Whether runs can be written, how much space there is, and whether other machines can see it."""
    folder = Path(runs_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"burnish")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Check("storage for runs", "broken", f"{folder}: {error.strerror}", "writing runs there: set runs_dir")
    kind = _file_system(folder)
    shared = "shared" if kind.startswith(SHARED) else "of this machine only, so no multi-node runs"
    free = size(shutil.disk_usage(folder).free)
    return Check("storage for runs", "ok", f"{folder}: {free} free on {kind or 'an unknown file system'}, {shared}")


def _file_system(folder: Path) -> str:
    """Type of the file system that holds the folder, from the longest mount point above it."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    mounts = [(fields[1], fields[2]) for line in lines if len(fields := line.split()) > 2]
    above = [(point, kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    return max(above, key=lambda mount: len(mount[0]), default=("", ""))[1]


def _probe(code: str) -> dict[str, Any] | str:
    """What a small program prints as JSON, or why it did not."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"no answer in {PROBE_TIMEOUT_S} s"
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return done.stderr.strip().splitlines()[-1][:200] if done.stderr.strip() else f"exit code {done.returncode}"
