"""The benchmark's side of the conversation with the processes of the modes."""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from .workload import Workload

CLOSE_S = 20


class WorkerDied(Exception):  # noqa: N818
    """A mode's process ended before it was told to; the message says why in a line."""


class Worker:
    """One fresh process that runs one mode, loaded and waiting once the object is made. Raises WorkerDied."""

    def __init__(self, mode: str, workload: Workload, *, is_profiled: bool = False) -> None:
        self.errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        command = [sys.executable, "-m", f"{__package__}.worker"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, encoding="utf-8"
        )
        try:
            first = {"mode": mode, "workload": workload.to_dict(), "is_profiled": is_profiled}
            self.built = self._ask(first)
        except BaseException:
            self.close()
            raise

    def step(self) -> dict[str, Any]:
        """{time_s, loss, peak_bytes} of one step. Raises WorkerDied."""
        return self._ask({"do": "step"})

    def profile(self, num_rows: int) -> dict[str, Any]:
        """The same with `profile`, tables of where the time went. Raises WorkerDied."""
        return self._ask({"do": "profile", "rows": num_rows})

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._send({"do": "stop"})
        try:
            self.process.wait(timeout=CLOSE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]

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
        if code == -9:
            return "killed, most likely for want of memory"
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"ended with exit code {code}"


@contextlib.contextmanager
def open_worker(mode: str, workload: Workload, *, is_profiled: bool = False) -> Iterator[Worker]:
    worker = Worker(mode, workload, is_profiled=is_profiled)
    try:
        yield worker
    finally:
        worker.close()
