"""The first steps of a plan in fresh processes, and the peaks of their memory."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .plan import Plan


@dataclass(frozen=True)
class Measured:
    """Peak bytes of the rank that had most, less what its process had with all imported and no weight loaded.

    On a CPU resident memory, with the pages of mapped files that are resident; on a GPU what torch's allocator has given.
    """

    phases: Mapping[str, int]
    """load, step, evaluation, save."""
    parts: Mapping[str, int]
    """What could be counted in the live engine: weights, quantization_constants, gradients, master_weights,
    optimizer_state."""
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


def measure(plan: Plan, *, num_steps: int = 2) -> Measured:
    """Runs the first steps on synthetic examples of full length, all ranks on this host.

    Raises OutOfMemory where a process finds no memory or is killed, TrainingError where it ends otherwise.
    """
    raise NotImplementedError
