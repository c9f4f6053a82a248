"""The benchmark's side of the conversation with the processes of the modes."""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

from .workload import Workload

CLOSE_S = 20
T = TypeVar("T")


class WorkerDied(Exception):  # noqa: N818
    """A mode's process ended before it was told to; the message says why in a line."""


class Worker:
    """One fresh process that runs one mode. It imports its libraries at once, and loads nothing before `build`."""

    module = "worker"
    """What the process runs, of this package."""

    def __init__(self, mode: str, *, is_profiled: bool = False) -> None:
        self.errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        command = [sys.executable, "-m", f"{__package__}.{self.module}", mode, *(["--profiled"] if is_profiled else [])]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, encoding="utf-8"
        )
        self.built: dict[str, Any] = {}
        self.is_killed = False

    def build(self, workload: Workload) -> None:
        """Loads the model; `built` is what `Turns.ready` says of it. Raises WorkerDied."""
        self.built = self._ask(workload.to_dict())

    def step(self) -> dict[str, Any]:
        """{time_s, others_s, loss, peak_bytes} of one step. Raises WorkerDied."""
        return self._ask({"do": "step"})

    def turn(self) -> dict[str, Any]:
        """The same of a step in a turn with other modes. Raises WorkerDied.

        On a GPU the memory of activations goes back afterwards, for the others to have it, and a step that does not
        count comes first, to fetch it.
        """
        if self.built["device"] == "cpu":
            return self.step()
        self.step()
        answer = self.step()
        self._ask({"do": "release"})
        return answer

    def profile(self, num_rows: int) -> dict[str, Any]:
        """A step with `profile`, tables of where the time went. Raises WorkerDied."""
        return self._ask({"do": "profile", "rows": num_rows})

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed before
            self._send({"do": "stop"})
        try:
            self.process.wait(timeout=CLOSE_S)
        except subprocess.TimeoutExpired:
            self.kill()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]

    def kill(self) -> None:
        self.is_killed = True
        self.process.kill()
        self.process.wait()

    def _send(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdout is not None
        try:
            self._send(request)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerDied(self._reason())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _reason(self) -> str:
        code = self.process.wait()
        if self.is_killed:
            return "ended with the run"
        if code == -signal.SIGKILL:
            return "killed, most likely for want of memory"
        if code < 0:
            return f"ended by signal {-code}"
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"ended with exit code {code}"


@contextlib.contextmanager
def open_worker(mode: str, workload: Workload, *, is_profiled: bool = False) -> Iterator[Worker]:
    """A process that has loaded the model. Raises WorkerDied."""
    worker = Worker(mode, is_profiled=is_profiled)
    try:
        worker.build(workload)
        yield worker
    finally:
        worker.close()


class Crew:
    """Processes of several modes. All end with it, at once on Ctrl-C."""

    def __init__(self, ahead: Sequence[str] = ()) -> None:
        """Those of `ahead` are started now, to be taken later."""
        self.workers: list[Worker] = []
        self.waiting: dict[str, list[Worker]] = {}
        for mode in ahead:
            self.waiting.setdefault(mode, []).append(self._start(mode))

    def take(self, mode: str) -> Worker:
        """A process of this mode that nobody has had."""
        waiting = self.waiting.get(mode)
        return waiting.pop() if waiting else self._start(mode)

    def _start(self, mode: str) -> Worker:
        self.workers.append(Worker(mode))
        return self.workers[-1]

    def kill(self) -> None:
        for worker in self.workers:
            worker.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self.kill()
        for worker in self.workers:
            worker.close()


def at_once(calls: Sequence[Callable[[], T]], *, num_at_once: int, stop: Callable[[], None]) -> list[T]:
    """The results of all calls, so many at a time. `stop` must make running calls end; it is called on Ctrl-C."""
    with ThreadPoolExecutor(max(1, num_at_once)) as executor:
        futures = [executor.submit(call) for call in calls]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            stop()
            raise
