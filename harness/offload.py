"""What offloading needs of a host: tools that build DeepSpeed's operators, libaio, and private folders for files.

A folder lives as long as the process that made it: it holds a lock, so what a crash left is told from what is in use
and removed at the next start. Imports no torch.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ConfigError
from .plan import Plan

PREFIX = "burnish-"
LOCK = ".lock"
NEEDS_LIBAIO = "#include <libaio.h>\nint main() { io_context_t context = 0; return io_queue_init(1, &context); }\n"
INSTALL = {
    "g++": "the package g++ (or gcc-c++)",
    "ninja": "pip install ninja",
    "libaio": "the package libaio-dev (or libaio-devel)",
}
BUILD_STEP_S = 300
"""A compiler that writes nothing for so long is not running."""


def missing_tools(*, with_files: bool) -> list[str]:
    """Which of INSTALL are not here: what DeepSpeedCPUAdam is built with and, `with_files`, its asynchronous I/O."""
    missing = [tool for tool in ("g++", "ninja") if find_tool(tool) is None]
    if with_files and "g++" not in missing and not _has_libaio():
        missing.append("libaio")
    return missing


def find_tool(name: str) -> str | None:
    """Path of a program on PATH or beside the Python that runs, where pip puts programs; None if there is none."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _has_libaio() -> bool:
    """Whether a program with the library's header compiles and links."""
    command = [find_tool("g++") or "g++", "-x", "c++", "-", "-laio", "-o", os.devnull]
    return subprocess.run(command, input=NEEDS_LIBAIO, capture_output=True, text=True, check=False).returncode == 0


def check(plan: Plan) -> None:
    """Raises ConfigError where this host lacks what the plan's offload needs."""
    places = {"offload_optimizer": plan.offload_optimizer, "offload_param": plan.offload_param}
    with_files = "nvme" in places.values()
    if not with_files and (plan.device == "cpu" or plan.offload_optimizer == "none"):
        return
    missing = missing_tools(with_files=with_files)
    if missing:
        key = next(name for name, place in places.items() if place == ("nvme" if with_files else "cpu"))
        wanted = "; ".join(f"{tool} ({INSTALL[tool]})" for tool in missing)
        raise ConfigError(
            f"memory.{key}: {places[key]} builds an operator of DeepSpeed on first use and this host lacks {wanted}; "
            "install it, or switch the offload off"
        )
    if with_files:
        with private_folder(plan, rank=os.getpid()) as folder:
            _check_direct_io(folder)


@contextmanager
def one_builder_at_a_time(folder: Path) -> Iterator[None]:
    """Waits until no other process of this user builds in the folder, and clears what an ended one left there.

    PyTorch's own lock is a file that a killed build leaves behind, and for which the next one waits for ever.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "burnish.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        left = folder / "lock"
        while left.exists() and time.time() - folder.stat().st_mtime < BUILD_STEP_S:
            time.sleep(1)
        left.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


def _check_direct_io(folder: Path) -> None:
    """Raises ConfigError where files cannot be written past the page cache, as asynchronous I/O does."""
    try:
        os.close(os.open(folder / "probe", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError as error:
        raise ConfigError(
            f"memory.nvme_path: {folder.parent} is on a file system without direct I/O ({error.strerror}); "
            "use a folder on a local disk"
        ) from error


def files_folder(plan: Plan) -> Path:
    """Where the private folders of all ranks lie: memory.nvme_path."""
    assert plan.config.memory.nvme_path is not None, plan.config.memory
    return Path(plan.cwd) / plan.config.memory.nvme_path


@contextmanager
def private_folder(plan: Plan, *, rank: int) -> Iterator[Path]:
    """A new folder nvme_path/burnish-<run>-<rank>-… that only this user can read, removed at the end.

    Folders that crashed processes left below nvme_path are removed first. Raises ConfigError if it cannot be made.
    """
    parent = files_folder(plan)
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", plan.config.name)[:64]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(parent)
        lock, path = _locked(parent, f"{PREFIX}{name}-{rank}-")
        folder = Path(path.removesuffix(LOCK))
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise ConfigError(f"memory.nvme_path: cannot write in {parent}: {error.strerror}") from error
    try:
        yield folder
    finally:
        _remove(path)
        os.close(lock)


def _locked(parent: Path, prefix: str) -> tuple[int, str]:
    """A new lock file, locked: its descriptor and path. Tries again where another process took it for a leftover."""
    while True:
        lock, path = tempfile.mkstemp(prefix=prefix, suffix=LOCK, dir=parent)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(path):
            return lock, path
        os.close(lock)


def remove_leftovers(parent: Path) -> None:
    """Removes the folders below `parent` whose process has ended."""
    for path in parent.glob(f"{PREFIX}*{LOCK}"):
        try:
            lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # another user's, or removed a moment ago
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(str(path))
        except BlockingIOError:
            pass  # its process lives
        finally:
            os.close(lock)


def _remove(lock_path: str) -> None:
    shutil.rmtree(lock_path.removesuffix(LOCK), ignore_errors=True)
    Path(lock_path).unlink(missing_ok=True)


def reserve_file(folder: Path, num_bytes: int) -> Path:
    """A new file of this size with its blocks reserved, so that a full disk is an error here and not a signal later.

    Raises OSError.
    """
    descriptor, path = tempfile.mkstemp(dir=folder)
    try:
        os.posix_fallocate(descriptor, 0, max(1, num_bytes))
    finally:
        os.close(descriptor)
    return Path(path)
