"""Ctrl-C and SIGTERM: the first asks the run to write a checkpoint and end, the second ends it at once."""

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Handles the signals while it is entered. Until `arm` is called there is nothing to save: the first one ends."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        self.notice = notice
        self.stop_file: Path | None = None
        self.is_requested = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.previous = {number: signal.getsignal(number) for number in SIGNALS}
        self.install()
        return self

    def install(self) -> None:
        """Takes the signals (again, after a library has taken them)."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def arm(self, stop_file: Path) -> None:
        """From now on the first signal makes `stop_file`, which the workers look for at every step."""
        self.stop_file = stop_file

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.is_requested or self.stop_file is None:
            raise KeyboardInterrupt
        self.is_requested = True
        self.stop_file.touch()
        self.notice("stopping after this step; a checkpoint will be written (once more to quit at once)")
