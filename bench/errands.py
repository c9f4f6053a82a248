"""What a benchmark of steps has done before anything is timed, by processes of their own that leave nothing behind.

`python -m burnish.bench.errands WHAT JSON` does WHAT with the arguments in JSON and prints its result as JSON.
"""

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .workload import Workload

CACHE_PREFIX = "burnish-bench-model-"
DTYPES = ("bfloat16", "float32")


class ErrandFailed(Exception):  # noqa: N818
    """The process ended with an error; the message is its last line."""


@functools.cache
def peaks(device: str, num_threads: int) -> dict[str, dict[str, float]]:
    """{dtype: {bytes_per_s, flops_per_s}} that this machine reaches; measured once. Raises ErrandFailed."""
    found: dict[str, dict[str, float]] = run("peaks", device=device, num_threads=num_threads)
    return found


def with_unpacked_weights(workload: Workload) -> Workload:
    """The same with the bf16 weights of a GGUF file in a folder of safetensors; others unchanged. Raises ErrandFailed.

    Unpacking takes half of the time in which a mode starts. The folder lives as long as this process.
    """
    path = workload.model.get("path", "")
    if not path.endswith(".gguf"):
        return workload
    return replace(workload, model={"path": unpacked(path).name})


@functools.cache
def unpacked(path: str) -> "tempfile.TemporaryDirectory[str]":
    folder = tempfile.TemporaryDirectory(prefix=CACHE_PREFIX)
    run("unpack", path=path, folder=folder.name)
    return folder


def run(what: str, **arguments: Any) -> Any:
    command = [sys.executable, "-m", f"{__package__}.errands", what, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ErrandFailed(lines[-1][:300] if lines else f"{what} ended with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def unpack(*, path: str, folder: str) -> list[str]:
    """Saves the model and its tokenizer into the folder; the names of the files there."""
    import torch

    from .peers import load_base, load_tokenizer

    workload = Workload(model={"path": path})
    load_base(workload, torch.bfloat16).save_pretrained(folder)
    load_tokenizer(workload).save_pretrained(folder)
    return sorted(file.name for file in Path(folder).iterdir())


def measure_peaks(*, device: str, num_threads: int) -> dict[str, dict[str, float]]:
    import torch

    from .stopwatch import Stopwatch

    torch.set_num_threads(num_threads)
    stopwatch = Stopwatch(device)
    return {dtype: stopwatch.peaks(getattr(torch, dtype)) for dtype in DTYPES}


ERRANDS: dict[str, Callable[..., Any]] = {"peaks": measure_peaks, "unpack": unpack}

if __name__ == "__main__":
    print(json.dumps(ERRANDS[sys.argv[1]](**json.loads(sys.argv[2]))))
