"""SIGTERM at a worker process: the host is wanted back, so the run writes a checkpoint and ends.

Ray runs the training loop beside the main thread, where alone Python takes signal handlers, and ends the process on
SIGTERM. Ray Train's backend runs in the main thread before training starts, after Ray has set its handler.
"""

import os
import signal
from dataclasses import dataclass
from types import FrameType
from typing import Any

from ray.train.torch import TorchConfig

from ..harness.lock import driver_of
from ..harness.run_dir import RunDir
from .interrupt import request_stop

_training: dict[str, int] = {}
"""Run directory -> number of its driver, while this process trains. Ray ends its idle processes with SIGTERM too."""


@dataclass
class StoppableTorchConfig(TorchConfig):
    """TorchConfig whose workers ask for a stop of the whole run on SIGTERM; a second one ends the process."""

    run_dir: str = ""
    """Empty: SIGTERM ends the process, as Ray has it. An elastic run goes on without it."""
    driver: int = 0

    @property
    def backend_cls(self) -> type:
        return StoppableTorchBackend


class StoppableTorchBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_training_start(self, worker_group: Any, backend_config: StoppableTorchConfig) -> None:
        super().on_training_start(worker_group, backend_config)
        if backend_config.run_dir:
            worker_group.execute(stop_on_sigterm, backend_config.run_dir, backend_config.driver)

    def on_shutdown(self, worker_group: Any, backend_config: StoppableTorchConfig) -> None:
        # Before Ray ends those that are left of a group that failed: their SIGTERM is not the user's.
        worker_group.execute_async(ended, backend_config.run_dir)
        super().on_shutdown(worker_group, backend_config)


def stop_on_sigterm(run_dir: str, driver: int) -> None:
    """Takes SIGTERM in this process until `ended`; in the main thread only."""
    _training[run_dir] = driver
    signal.signal(signal.SIGTERM, _stop)


def ended(run_dir: str) -> None:
    """Training is over here, and SIGTERM ends the process; in any thread."""
    _training.pop(run_dir, None)


def _stop(number: int, _frame: FrameType | None) -> None:
    # A zombie stops nobody.
    asked = [RunDir(path) for path, driver in list(_training.items()) if driver_of(path) == driver]
    if not asked or any(run.stop.exists() for run in asked):
        os._exit(128 + number)
    for run in asked:
        request_stop(run.stop, number)
