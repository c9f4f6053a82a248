"""A mode's side of the conversation with the benchmark: it takes a step whenever it is asked for one, and is timed.

Requests and answers are lines of JSON. Requests: {"do": "step"}, {"do": "profile", "rows": n}, {"do": "release"},
{"do": "stop"}. Answers: what `Turns.ready` and `Turns.end` write, and {} for a release.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from ..harness.allocator import give_back_freed_memory, keep_freed_memory
from ..harness.metrics import flops_per_token
from ..harness.resident import bytes_now, peak_bytes, reset_peak
from ..launch.resources import memory_bytes

STAT = Path("/proc/stat")
STOP = '{"do": "stop"}'


class Finished(Exception):  # noqa: N818
    """The benchmark wants no more steps."""


class Turns:
    """begin() waits for a request and starts the clock, end() stops it and answers."""

    def __init__(self, requests: TextIO, answers: TextIO, *, keeps_memory: bool = False) -> None:
        self.requests, self.answers, self.keeps_memory = requests, answers, keeps_memory
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.floor_bytes = 0
        self.num_begun = 0
        self.start_s = self.start_others_s = 0.0
        self.profiler: torch.profiler.profile | None = None
        self.num_rows = 0

    def mark_floor(self) -> None:
        """Call it when all libraries are imported and no weight is loaded."""
        self.floor_bytes = bytes_now(self.device)

    def ready(self, model: Any, *, num_trained: int, length: int) -> None:
        """Call it before the first begin(): says what was built, and forgets the memory that loading took."""
        give_back_freed_memory(self.device)
        if self.keeps_memory:
            keep_freed_memory()
        loaded = bytes_now(self.device)
        reset_peak(self.device)
        self._answer(
            {
                "device": self.device,
                "floor_bytes": self.floor_bytes,
                "loaded_bytes": loaded,
                "room_bytes": room_bytes(self.device),
                "num_trained": num_trained,
                "flops_per_token": step_flops(model, num_trained, length),
            }
        )

    def begin(self) -> int:
        """Number of the step to take. Raises Finished."""
        while (request := json.loads(self.requests.readline() or STOP))["do"] == "release":
            if self.device == "cuda":
                torch.cuda.empty_cache()
            self._answer({})
        if request["do"] == "stop":
            raise Finished
        if request["do"] == "profile":
            self.num_rows = request["rows"]
            self.profiler = torch.profiler.profile(record_shapes=True)
            self.profiler.start()
        self.num_begun += 1
        self.start_others_s = others_s()
        self.start_s = time.perf_counter()
        return self.num_begun - 1

    def end(self, loss: float) -> None:
        """Ends the step. `loss` must have been read from the device, or the step is not over."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        time_s = time.perf_counter() - self.start_s
        answer: dict[str, Any] = {
            "time_s": time_s,
            "others_s": others_s() - self.start_others_s,
            "loss": loss,
            "peak_bytes": peak_bytes(self.device),
        }
        if self.profiler is not None:
            self.profiler.stop()
            answer["profile"] = profile_tables(self.profiler, self.num_rows)
            self.profiler = None
        self._answer(answer)

    def _answer(self, value: dict[str, Any]) -> None:
        self.answers.write(json.dumps(value) + "\n")
        self.answers.flush()


def step_flops(model: Any, num_trained: int, length: int) -> int:
    """FLOPs of a training step per token of sequences of that length, see `metrics.flops_per_token`."""
    total, config = sum(map(numel, model.parameters())), model.config
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return flops_per_token(
        total if table is head else total - numel(table),
        num_trained,
        attention_width=length * config.num_attention_heads * head_dim,
        num_layers=config.num_hidden_layers,
    )


def numel(parameter: torch.Tensor) -> int:
    """Its elements; a quantised one has those that it stands for."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def room_bytes(device: str) -> int:
    """All memory of the device; on a CPU what the machine or its container has."""
    return int(torch.cuda.mem_get_info()[1]) if device == "cuda" else memory_bytes()


def others_s() -> float:
    """Seconds that the machine's cores have worked for other processes, or for other machines on the same host."""
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(
        int, STAT.read_text(encoding="ascii").split("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()


def profile_tables(profiler: torch.profiler.profile, num_rows: int) -> str:
    """The operations with the most time of their own, and the same by the shapes of their inputs."""
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    tables = [
        profiler.key_averages().table(sort_by=key, row_limit=num_rows, max_name_column_width=60),
        profiler.key_averages(group_by_input_shape=True).table(
            sort_by=key, row_limit=num_rows, max_name_column_width=60, max_shapes_column_width=90
        ),
    ]
    return "\n\n".join(tables)
