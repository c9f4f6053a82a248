"""The first steps of a plan in fresh processes, and the peaks of their memory.

A process is asked over stdin and answers on stdout; `measure_rank` is what it runs.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import IO, Any

from .errors import OutOfMemory, TrainingError
from .offload import files_folder, remove_leftovers
from .plan import Plan

TIMEOUT_S = 3600
SIGNS_OF_NO_MEMORY = ("out of memory", "outofmemory", "memoryerror", "can't allocate memory", "bad_alloc")
"""What the last words of a process hold that found no memory, in small letters."""


@dataclass(frozen=True)
class Measured:
    """Peak bytes of the rank that had most, less what its process had with all imported and no weight loaded.

    On a CPU resident memory, with the pages of mapped files that are resident; on a GPU what torch's allocator gave
    out.
    """

    phases: Mapping[str, int]
    """load, step, evaluation, save."""
    parts: Mapping[str, int]
    """What could be counted in the live engine after the last step, of the rank that had most in it: weights,
    gradients, master_weights, optimizer_state."""
    baseline_bytes: int
    step_s: float
    """The last step."""
    losses: tuple[float, ...]
    num_ranks: int

    @property
    def peak_bytes(self) -> int:
        return max(self.phases.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"peak_bytes": self.peak_bytes}


def measure(plan: Plan, *, num_steps: int = 2, labels: list[str] | None = None) -> Measured:
    """Runs the first steps on synthetic examples of full length, all ranks on this host.

    A step has two micro-batches where the plan accumulates: more of them have no higher peak. Raises OutOfMemory where
    a process finds no memory or is killed, TrainingError where it ends otherwise.
    """
    assert num_steps >= 1, num_steps
    job = json.dumps({"plan": plan.to_dict(), "num_steps": num_steps, "labels": labels})
    with tempfile.TemporaryDirectory(prefix="burnish-measure-") as folder:
        ranks = [_Rank(plan, rank, folder) for rank in range(plan.world_size)]
        try:
            answers = _answers(ranks, job)
        finally:
            for one in ranks:
                one.end()
            if plan.config.memory.nvme_path is not None:
                remove_leftovers(files_folder(plan))
    largest = max(answers, key=lambda answer: max(answer["phases"].values()))
    names = answers[0]["phases"]
    return Measured(
        phases={name: max(answer["phases"][name] for answer in answers) for name in names},
        parts=largest["parts"],
        baseline_bytes=largest["baseline_bytes"],
        step_s=max(answer["step_s"] for answer in answers),
        losses=tuple(answers[0]["losses"]),
        num_ranks=len(answers),
    )


class _Rank:
    """The process of one rank."""

    def __init__(self, plan: Plan, rank: int, folder: str) -> None:
        self.errors: IO[str] = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        module = f"{__package__}.measure_rank"
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, str(rank), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            encoding="utf-8",
            env=_environment(plan),
        )

    def ask(self, job: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(job + "\n")
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it has died, and the reason is read with its answer

    def answer(self) -> dict[str, Any]:
        """Raises OutOfMemory, TrainingError."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        raise self._reason()

    def _reason(self) -> TrainingError:
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return OutOfMemory("a process was killed while the plan was tried, most likely for want of memory")
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().splitlines() if line.strip()]
        last = lines[-1][:500] if lines else f"it ended with code {code}"
        kind = OutOfMemory if any(sign in last.lower() for sign in SIGNS_OF_NO_MEMORY) else TrainingError
        return kind(f"the plan could not be tried: {last}")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.errors):
            assert stream is not None
            stream.close()


def _answers(ranks: list[_Rank], job: str) -> list[dict[str, Any]]:
    """Of all ranks. Raises what the rank that died first says: the others only wait for it."""
    for one in ranks:
        one.ask(job)
    problem: TrainingError | None = None
    found: dict[int, dict[str, Any]] = {}
    with selectors.DefaultSelector() as selector:
        for number, one in enumerate(ranks):
            assert one.process.stdout is not None
            selector.register(one.process.stdout, selectors.EVENT_READ, number)
        while len(found) < len(ranks):
            ready = selector.select(timeout=TIMEOUT_S)
            if not ready:
                raise TrainingError(f"the plan could not be tried: no answer in {TIMEOUT_S} s")
            for key, _ in ready:
                try:
                    found[key.data] = ranks[key.data].answer()
                except TrainingError as error:
                    problem = problem or error
                selector.unregister(key.fileobj)
            if problem is not None:
                raise problem
    return [found[number] for number in range(len(ranks))]


def _environment(plan: Plan) -> dict[str, str]:
    """Variables that libraries read when they are imported."""
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": str(plan.num_threads)}
    return os.environ | own | ({"DS_ACCELERATOR": "cpu"} if plan.device == "cpu" else {})
