"""SIGTERM at a worker process: the host is wanted back, so the run writes a checkpoint and ends.

Ray runs the training loop beside the main thread, where alone Python takes signal handlers, and ends the process on
SIGTERM. Ray Train's backend runs in the main thread before training starts, after Ray has set its handler.
"""

import os
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from ray.train.torch import TorchConfig

from .interrupt import request_stop


@dataclass
class StoppableTorchConfig(TorchConfig):
    """TorchConfig whose workers ask for a stop of the whole run on SIGTERM; a second one ends the process."""

    stop_file: str = ""

    @property
    def backend_cls(self) -> type:
        return StoppableTorchBackend


class StoppableTorchBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_training_start(self, worker_group: Any, backend_config: StoppableTorchConfig) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(stop_on_sigterm, backend_config.stop_file)


def stop_on_sigterm(stop_file: str) -> None:
    """Takes SIGTERM in this process; in the main thread only."""
    signal.signal(signal.SIGTERM, partial(_stop, Path(stop_file)))


def _stop(stop_file: Path, number: int, _frame: FrameType | None) -> None:
    if stop_file.exists():
        os._exit(128 + number)
    request_stop(stop_file, number)
