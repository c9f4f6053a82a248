"""The process of one mode: `python -m burnish.bench.worker MODE`, asked over stdin and answering on stdout.

The first line is a workload; see `turns` for what follows.
"""

import contextlib
import json
import os
import sys
from importlib import import_module
from typing import Any, TextIO

from .modes import MODES
from .workload import Workload


def main() -> None:
    answers = own_stdout()
    mode = MODES[sys.argv[1]]
    import torch

    from .turns import Finished, Turns

    function: Any = getattr(import_module(mode.module, __package__), mode.function)
    if "--profiled" in sys.argv:
        name_native_calls()
    line = sys.stdin.readline()
    if line and (first := json.loads(line)) != {"do": "stop"}:
        workload = Workload.from_dict(first)
        torch.set_num_threads(workload.num_threads)
        with contextlib.suppress(Finished):
            function(workload, Turns(sys.stdin, answers, keeps_memory=mode.keeps_memory), **mode.options)
    # Nothing of a benchmark is worth the seconds that tearing a model down takes.
    answers.close()
    sys.stderr.flush()
    os._exit(0)


def own_stdout() -> TextIO:
    """The real stdout for the answers alone; whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def name_native_calls() -> None:
    """Lets the profiler see the C++ functions, which ctypes calls behind its back."""
    import torch

    from ..kernels import native

    call = native.call

    def named(name: str, dtype: torch.dtype, *arguments: Any) -> None:
        with torch.profiler.record_function(f"native::{name}"):
            call(name, dtype, *arguments)

    native.call = named


if __name__ == "__main__":
    main()
