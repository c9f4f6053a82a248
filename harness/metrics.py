"""What is measured while training: metrics.jsonl and TensorBoard, memory, and the arithmetic of throughput and MFU.

N parameters that take part in a forward pass, without the table of an input embedding; N_t those that are trained.
"""

import math
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .config import Config
from .run_dir import RunDir, append_jsonl, finite, read_jsonl, write_jsonl

NOT_PLOTTED = ("kind", "split", "step", "time", "non_finite")


class MetricsWriter:
    """Appends records to metrics.jsonl and TensorBoard. On ranks other than the first it does nothing."""

    def __init__(self, run_dir: RunDir, config: Config, *, is_writer: bool = True) -> None:
        self.run_dir = run_dir
        self.is_writer = is_writer
        self.has_tensorboard = is_writer and config.tracking.tensorboard
        self.board: Any = None

    def start(self, num_done_steps: int) -> None:
        """Begins after that many steps. What an earlier attempt wrote of later steps is dropped: it comes again."""
        if not self.is_writer:
            return
        records = read_jsonl(self.run_dir.metrics_jsonl)
        kept = [record for record in records if num_done_steps > 0 and record.get("step", 0) <= num_done_steps]
        if len(kept) < len(records):
            write_jsonl(self.run_dir.metrics_jsonl, kept)
        if self.has_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge_step = num_done_steps + 1 if num_done_steps else 0
            self.board = SummaryWriter(str(self.run_dir.tensorboard), purge_step=purge_step if records else None)

    def log(self, record: dict[str, Any]) -> None:
        """Writes one record (`kind`, `step`, numbers). Non-finite numbers become null, named in `non_finite`."""
        if not self.is_writer:
            return
        broken = [key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
        extra = {"time": round(time.time(), 3)} | ({"non_finite": broken} if broken else {})
        append_jsonl(self.run_dir.metrics_jsonl, finite(record) | extra)
        if self.board is not None:
            prefix = record.get("split") or record["kind"]
            for key, value in record.items():
                if key not in NOT_PLOTTED and isinstance(value, (int, float)):
                    self.board.add_scalar(f"{prefix}/{key}", value, record["step"])
            self.board.flush()

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
            self.board = None


def memory_bytes(device: str) -> int:
    """Peak of allocated GPU memory on `cuda`, resident memory of this process now on `cpu`."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    try:
        resident_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return peak_memory_bytes(device)
    return resident_pages * resource.getpagesize()


def peak_memory_bytes(device: str) -> int:
    """Largest memory so far: allocated on the GPU, or resident in this process on `cpu`."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tokens_per_s(records: Sequence[dict[str, Any]], *, window: int = 20) -> float | None:
    """Tokens per second over the last `window` train records (`tokens`, `time_s` each); None if nothing was timed."""
    recent = [record for record in records if record.get("kind") == "train"][-window:]
    time_s = sum(record.get("time_s") or 0.0 for record in recent)
    return sum(record.get("tokens") or 0 for record in recent) / time_s if time_s > 0 else None


def eta_s(records: Sequence[dict[str, Any]], *, total_steps: int, window: int = 20) -> float | None:
    """Seconds that the steps after the last record will take at the pace of the last `window` train records."""
    recent = [record for record in records if record.get("kind") == "train"][-window:]
    if not recent:
        return None
    per_step = sum(record.get("time_s") or 0.0 for record in recent) / len(recent)
    return per_step * max(0, total_steps - recent[-1]["step"])


def flops_per_token(num_parameters: int, num_trained: int, *, attention_width: int = 0, num_layers: int = 0) -> int:
    """FLOPs of a training step per token: 2N forward, 2N gradients of activations, 2N_t gradients of weights.

    Full fine-tuning is the known 6N; LoRA comes to about 4N, because frozen weights need no weight gradient. With
    attention_width = tokens * heads * head_dim and the number of layers, attention's 12 * layers * width is added
    (PaLM, arXiv 2204.02311, appendix B). Recomputed activations do not count: MFU is about useful work. With only the
    last layers trained the backward pass ends early, and this is an upper bound.
    """
    return 4 * num_parameters + 2 * num_trained + 12 * num_layers * attention_width


def mfu(tokens_per_second: float, flops_each: float, *, peak_flops: float | None) -> float | None:
    """Model FLOPs utilisation in 0…1: achieved over peak FLOP/s of all devices; None where the peak is not known."""
    return tokens_per_second * flops_each / peak_flops if peak_flops else None
