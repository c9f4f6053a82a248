"""Ctrl-C and SIGTERM: the first asks the run to write a checkpoint and end, the second ends it at once."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PASSED_ON = signal.SIGUSR1
"""What the parent of an inline run makes of them."""
TWIN_S = 1.0
"""Who signals a whole group reaches the run twice, itself and through its parent, and means it once."""


class Interrupts:
    """Handles the signals while it is entered. Until `arm` is called there is nothing to save: the first one ends."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        self.notice = notice
        self.stop_file: Path | None = None
        self.is_requested = False
        self.last: tuple[int, float] = (0, 0.0)
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.previous = {number: signal.getsignal(number) for number in (*SIGNALS, PASSED_ON)}
        self.install()
        return self

    def install(self) -> None:
        """Takes the signals (again, after a library has taken them)."""
        for number in (*SIGNALS, PASSED_ON):
            signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def arm(self, stop_file: Path) -> None:
        """From now on the first signal makes `stop_file`, which the workers look for at every step."""
        self.stop_file = stop_file

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        (before, when), self.last = self.last, (number, time.monotonic())
        if number != before and PASSED_ON in (number, before) and self.last[1] - when < TWIN_S:
            return
        if self.is_requested or self.stop_file is None:
            raise KeyboardInterrupt
        self.is_requested = True
        self.stop_file.touch()
        self.notice("stopping after this step; a checkpoint will be written (once more to quit at once)")
