"""What one rank holds while it trains."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from . import backoff, lock
from .data.loader import Loader
from .data.prepare import Prepared
from .data.sampler import Sampler
from .detectors import Spikes
from .engine import Engine, World
from .errors import SupersededError
from .identity import identity
from .metrics import MetricsWriter
from .plan import Plan
from .run_dir import RunDir
from .tasks import Task
from .tasks.common import unwrap
from .watchdog import Position

Report = Callable[[dict[str, Any]], None]


@dataclass
class Job:
    """The parts that a step, an evaluation and a save need, made once."""

    plan: Plan
    prepared: Prepared
    world: World
    run_dir: RunDir
    task: Task
    processor: Any
    engine: Engine
    loader: Loader
    sampler: Sampler
    metrics: MetricsWriter
    report: Report
    position: Position
    attempt: int
    """What rank 0 of this group of workers took from the fence (see lock.py)."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    num_skipped: int = 0
    spikes: Spikes = field(default_factory=Spikes)
    peak_memory_bytes: int = 0

    @property
    def is_first(self) -> bool:
        return self.world.rank == 0

    @contextlib.contextmanager
    def during(self, phase: backoff.Phase) -> Iterator[None]:
        """Says what is being done; an error leaves it as it is."""
        before = self.position.phase
        self.position.at(phase)
        yield
        self.position.at(before)

    def may_write(self) -> bool:
        """Whether no later attempt has taken over the run directory."""
        return lock.is_current(self.plan.run_dir, self.attempt)

    def _check_fence(self) -> None:
        if not self.may_write():
            raise SupersededError

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What must not differ between the run that saved a checkpoint and the run that resumes it."""
        return identity(
            self.plan,
            train_store=self.prepared.train,
            base_fingerprint=unwrap(self.engine.model).base_fingerprint,
            processor=self.processor,
        )

    def emit(self, event: dict[str, Any]) -> None:
        """Writes an event to events.jsonl and hands it to the launcher; rank 0 only."""
        if self.is_first:
            self._check_fence()
            event = {"time": time.time()} | event
            self.run_dir.append_jsonl(self.run_dir.events_jsonl, event)
            self.report(event)

    def log(self, record: dict[str, Any]) -> None:
        """Writes a metrics record and hands it to the launcher; rank 0 only."""
        if self.is_first:
            self._check_fence()
            self.metrics.log(record)
            self.report(record)
