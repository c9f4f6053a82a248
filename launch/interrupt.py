"""Ctrl-C and SIGTERM: the first asks the run to write a checkpoint and end, the second ends it at once."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PASSED_ON = {signal.SIGINT: signal.SIGUSR1, signal.SIGTERM: signal.SIGUSR2}
"""What the parent of a run makes of them."""
MEANS = {number: number for number in SIGNALS} | {passed_on: number for number, passed_on in PASSED_ON.items()}
TWIN_S = 1.0
"""Who signals a whole group reaches the run twice, itself and through its parent, and means it once."""
STOP = "stopping after this step; a checkpoint will be written (once more to quit at once)"


class Terminated(KeyboardInterrupt):
    """SIGTERM where Ctrl-C would be a KeyboardInterrupt: exit 143."""


class Interrupts:
    """Handles the signals while it is entered. Until `arm` is called there is nothing to save: the first one ends."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        self.notice = notice
        self.stop_file: Path | None = None
        self.is_requested = False
        self.last: tuple[int, float] = (0, 0.0)
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.previous = {number: signal.getsignal(number) for number in MEANS}
        for number in MEANS:
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def arm(self, stop_file: Path) -> None:
        """From now on the first signal makes `stop_file`, which the workers look for at every step."""
        self.stop_file = stop_file

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        (before, when), self.last = self.last, (number, time.monotonic())
        is_twin = before not in (0, number) and MEANS[signal.Signals(before)] == MEANS[signal.Signals(number)]
        if is_twin and self.last[1] - when < TWIN_S:
            return
        if self.is_requested or self.stop_file is None:
            end_at_once(number, None)
        self.is_requested = True
        request_stop(self.stop_file, MEANS[signal.Signals(number)])
        self.notice(STOP)


def end_at_once(number: int, _frame: FrameType | None) -> NoReturn:
    """A signal handler for the time in which there is nothing to save."""
    raise Terminated if MEANS[signal.Signals(number)] == signal.SIGTERM else KeyboardInterrupt


def request_stop(stop_file: Path, number: int) -> None:
    """Asks the workers to write a checkpoint and end; the file says which signal wanted it."""
    stop_file.write_text(signal.Signals(number).name, encoding="ascii")


def exit_code(stop_file: Path) -> int:
    """The exit code of a run that has been stopped: 143 after SIGTERM, else 130."""
    try:
        name = stop_file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        name = ""
    return 128 + (signal.SIGTERM if name == "SIGTERM" else signal.SIGINT)
