"""The process of a mode whose sequences change their length: `python -m burnish.bench.lengths_worker MODE`.

As `worker`, but {"do": "step", "length": n} takes a step on sequences of n tokens and forgets the peak that was before
it. Not for modes that prepare all their data beforehand. For a GPU, whose allocator counts exactly: on a CPU memory
that a longer step has left behind raises the peaks after it by some per cent.
"""

import contextlib
import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TextIO, cast

import torch

from ..harness.resident import reset_peak
from .modes import MODES
from .turns import Finished, Turns
from .worker import own_stdout
from .workload import Workload


@dataclass(frozen=True)
class AnyLength(Workload):
    """Its batches have the newest of `lengths`."""

    lengths: list[int] = field(default_factory=list)

    def batch(self, number: int, vocab_size: int) -> torch.Tensor:
        values = self.to_dict()
        now = values.pop("lengths")[-1]
        return Workload(**values | {"length": now}).batch(number, vocab_size)


class Requests:
    """Lines of requests; each length in one is told before the line is passed on."""

    def __init__(self, lines: TextIO, tell: Callable[[int], None]) -> None:
        self.lines, self.tell = lines, tell

    def readline(self) -> str:
        line = self.lines.readline()
        if line and (length := json.loads(line).get("length")) is not None:
            self.tell(length)
        return line


def run(mode_name: str, first: dict[str, Any], lines: TextIO, answers: TextIO) -> None:
    """Takes the steps of the mode that are asked for, until it is told to stop."""
    mode = MODES[mode_name]
    workload = AnyLength(**first, lengths=[first["length"]])
    function: Any = getattr(import_module(mode.module, __package__), mode.function)
    turns = Turns(sys.stdin, answers, keeps_memory=mode.keeps_memory)

    def change(length: int) -> None:
        workload.lengths.append(length)
        gc.collect()
        if turns.device == "cuda":
            torch.cuda.empty_cache()
        reset_peak(turns.device)

    turns.requests = cast(TextIO, Requests(lines, change))
    torch.set_num_threads(workload.num_threads)
    with contextlib.suppress(Finished):
        function(workload, turns, **mode.options)


def main() -> None:
    answers = own_stdout()
    line = sys.stdin.readline()
    if line and (first := json.loads(line)) != {"do": "stop"}:
        run(sys.argv[1], first, sys.stdin, answers)
    answers.close()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
