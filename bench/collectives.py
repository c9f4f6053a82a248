"""The collectives that this process calls: which, with how many bytes, and how long each takes.

All collectives of torch.distributed pass PyTorch's dispatcher as operations of the namespace c10d, whoever calls them.
Each is waited for where it is called, so its seconds are its own and nothing runs beside it.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

COUNTERS = Path("/proc/net/dev")
LOOPBACK = "lo"
WHOLE = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
}
"""Operation of c10d -> what it does, and which argument is the whole tensor that all ranks share or add up to."""
BARRIERS = ("barrier", "monitored_barrier_")


@dataclass(frozen=True)
class Call:
    """One collective of this rank; the times are those of the machine's monotonic clock, the same in all processes."""

    op: str
    num_bytes: int
    start_s: float
    end_s: float


class Recorder(TorchDispatchMode):
    """Notes every collective called inside; `synchronize` waits for all that a GPU has been given."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        super().__init__()
        self.synchronize = synchronize
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "c10d" or func._opname in BARRIERS:
            return func(*args, **(kwargs or {}))
        op, position = WHOLE[func._opname]
        self.synchronize()
        start_s = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        (result[-1] if isinstance(result, tuple | list) else result).wait()
        self.synchronize()
        num_bytes = sum(tensor.nbytes for tensor in tensors_of(args[position]))
        self.calls.append(Call(op, num_bytes, start_s, time.perf_counter()))
        return result


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested lists."""
    if isinstance(value, torch.Tensor):
        yield value
    else:
        for part in value:
            yield from tensors_of(part)


def waited_s(ranks: Sequence[Sequence[Call]]) -> list[float]:
    """Seconds that each rank waited in its collectives for the last one to arrive.

    `ranks` holds the calls of every rank in order, on one machine; raises ValueError unless all made the same ones.
    """
    kinds = [[(call.op, call.num_bytes) for call in calls] for calls in ranks]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError("the ranks did not call the same collectives")
    waited = [0.0] * len(ranks)
    for calls in zip(*ranks, strict=True):
        last_s = max(call.start_s for call in calls)
        for rank, call in enumerate(calls):
            waited[rank] += min(last_s, call.end_s) - call.start_s
    return waited


def loopback_bytes() -> int | None:
    """Bytes that the loopback interface has carried, with the headers of TCP and IP; None where the system has none."""
    try:
        found = re.search(rf"^\s*{LOOPBACK}:\s*(.*)$", COUNTERS.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1].split()[8]) if found else None
