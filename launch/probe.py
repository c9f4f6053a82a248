"""What an actor on one node of a cluster finds out for the pre-flight: versions, files, storage, ports, all-reduce."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ray.util import get_node_ip_address

from .staging import ROOT, source_digest

LIBRARIES = ("torch", "ray", "transformers", "deepspeed", "peft")
CONNECT_TIMEOUT_S = 5
INSTALLED_TIMEOUT_S = 15
REDUCE_TIMEOUT_S = 90
"""Importing torch on every node, joining, and the reductions."""
REDUCE_BYTES = {"gloo": 4 * 2**20, "nccl": 256 * 2**20}
REDUCE_ROUNDS = 5
INSTALLED = "import burnish.launch.staging as s; print(s.source_digest())"


class Probe:
    """An actor on one node."""

    def look(self, packages: list[str], paths: list[tuple[str, str]]) -> dict[str, Any]:
        """Versions, whether this code is installed here as well, and which packages and paths are missing."""
        missing = [name for name in packages if find_spec(name) is None]
        missing += [f"{key}={path}" for key, path in paths if not os.access(path, os.R_OK)]
        return {"versions": versions(), "digest": source_digest(), "installed": _installed(), "missing": missing}

    def write(self, folder: str, name: str, nonce: str) -> str:
        """Writes a file into a folder two levels below runs_dir; returns why it could not, or nothing.

        What is above runs_dir must be there: a mount that is missing must not be covered up by a folder.
        """
        place = Path(folder)
        try:
            for path in (place.parent.parent, place.parent, place):
                path.mkdir(exist_ok=True)
            with (Path(folder) / name).open("x", encoding="ascii") as file:
                file.write(nonce)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def read(self, folder: str, nonces: dict[str, str]) -> list[str]:
        """Names of the files that are not here, or hold something else."""
        return [name for name, nonce in nonces.items() if _content(Path(folder) / name) != nonce]

    def clear(self, folder: str) -> None:
        """Removes the folder, and the one it is in if that was the last."""
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            Path(folder).parent.rmdir()

    def free(self, folder: str) -> int:
        return shutil.disk_usage(folder).free

    def listen(self, address: str) -> int:
        """Opens a port on the address of this node and returns it."""
        self.socket = socket.create_server((address, 0), backlog=1024)
        return int(self.socket.getsockname()[1])

    def connect(self, targets: list[tuple[str, int]]) -> list[str]:
        """The addresses that do not answer."""
        silent = []
        for address, port in targets:
            try:
                socket.create_connection((address, port), timeout=CONNECT_TIMEOUT_S).close()
            except OSError:
                silent.append(address)
        return silent

    def meeting(self) -> tuple[str, int]:
        """The address of this node, and a port that is free on it."""
        own = get_node_ip_address()
        with socket.create_server((own, 0)) as server:
            return own, int(server.getsockname()[1])

    def reduce(self, backend: str, rank: int, world_size: int, meeting: tuple[str, int]) -> float:
        """Bytes per second and direction of an all-reduce: 2 (n - 1) / n of the tensor, over the median time."""
        from datetime import timedelta

        import torch
        from torch import distributed

        device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
        host, port = meeting
        place = f"tcp://{host}:{port}"
        limit = timedelta(seconds=REDUCE_TIMEOUT_S / 2)
        distributed.init_process_group(backend, init_method=place, rank=rank, world_size=world_size, timeout=limit)
        try:
            tensor = torch.ones(REDUCE_BYTES[backend] // 4, device=device)
            times = []
            for _ in range(1 + REDUCE_ROUNDS):
                start = time.perf_counter()
                distributed.all_reduce(tensor)
                tensor.div_(world_size)
                if backend == "nccl":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            assert bool((tensor == 1).all()), "the sum over all ranks is wrong"
        finally:
            distributed.destroy_process_group()
        return 2 * (world_size - 1) / world_size * REDUCE_BYTES[backend] / sorted(times[1:])[REDUCE_ROUNDS // 2]


def versions() -> dict[str, str]:
    found = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def _installed() -> str:
    """source_digest of the burnish that this node has without a job's; nothing if it has none."""
    command = [sys.executable, "-I", "-c", INSTALLED]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALLED_TIMEOUT_S, cwd=ROOT.anchor)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _content(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
