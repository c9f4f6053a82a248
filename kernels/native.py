"""The C++ half of the CPU path: built once per machine with the system's compiler, called through ctypes.

Where there is no compiler the operations run in plain torch, with the same results. `cpp/*.cpp` make one library; every
function is `extern "C" void name_bf16(...)` / `name_fp32(...)` of pointers, 64-bit integers and floats. OpenMP is
torch's own runtime, so torch.set_num_threads holds for both.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "cpp"
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
SUFFIX = {torch.bfloat16: "bf16", torch.float32: "fp32"}
BUILD_TIMEOUT_S = 300
logger = logging.getLogger(__name__)


def supports(x: Tensor) -> bool:
    """Whether the library can take this tensor: on the CPU, bf16 or fp32, and built."""
    return x.device.type == "cpu" and x.dtype in SUFFIX and library() is not None


def call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    """Calls name_<dtype>. Tensors go as pointers, None as a null pointer, int as int64_t, float as float.

    The caller keeps strides and lifetimes right: the function sees nothing but addresses.
    """
    function = _function(f"{name}_{SUFFIX[dtype]}")
    if function.argtypes is None:
        function.argtypes = [_kind(value) for value in arguments]
    function(*[value.data_ptr() if isinstance(value, Tensor) else value for value in arguments])


def _kind(value: Tensor | int | float | None) -> type:
    """The C type of a parameter: each takes one kind of argument in all calls."""
    if isinstance(value, Tensor) or value is None:
        return ctypes.c_void_p
    return ctypes.c_float if isinstance(value, float) else ctypes.c_int64


@functools.cache
def _function(name: str) -> Any:
    found = library()
    assert found is not None, name
    function = found[name]
    function.restype = None
    return function


@functools.cache
def library() -> ctypes.CDLL | None:
    """The built library; None (with one log line) where it cannot be built."""
    return built("native", SOURCES, FLAGS, without="operations on the CPU run in plain torch")


def built(name: str, folder: Path, flags: tuple[str, ...], *, without: str) -> ctypes.CDLL | None:
    """The library of a folder's C++; None, and a log line that says what is so `without` it, where it cannot be."""
    compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
    if compiler is None or platform.system() != "Linux":
        logger.info("no C++ compiler: %s", without)
        return None
    try:
        return ctypes.CDLL(str(_build(name, folder, (compiler, *flags))))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        logger.warning("building C++ failed, %s: %s", without, detail.strip()[-2000:])
        return None


def _build(name: str, folder: Path, command: tuple[str, ...]) -> Path:
    """The library of these sources, this compiler and this processor: from the cache, or built into it."""
    files = sorted([*folder.glob("*.cpp"), *folder.glob("*.h")])
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    digest = hashlib.sha256("\0".join([version, *command[1:], _processor(), torch.__version__]).encode())
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    target = _cache_folder() / f"{name}-{digest.hexdigest()[:20]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            output = Path(temporary) / target.name
            sources = [str(file) for file in files if file.suffix == ".cpp"]
            whole = [command[0], *sources, *command[1:], "-o", str(output)]
            subprocess.run(whole, capture_output=True, text=True, check=True, timeout=BUILD_TIMEOUT_S)
            os.replace(output, target)
    return target


def _processor() -> str:
    """The instruction sets of this processor: a library built on one machine may not run on another."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return next((line for line in info.splitlines() if line.startswith(("flags", "Features"))), platform.processor())


def _cache_folder() -> Path:
    """~/.cache/burnish, or a folder of this user's own in the temporary directory where that cannot be written."""
    folder = Path.home() / ".cache" / "burnish"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="burnish-"))
