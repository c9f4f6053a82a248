"""The inline launcher: one process, no Ray."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..harness import lock
from ..harness.config import Config
from ..harness.plan import Plan, Resources
from .resources import detect

if TYPE_CHECKING:
    from ..harness.data.prepare import Prepared


def resources(_config: Config) -> Resources:
    return detect()


@dataclass(frozen=True)
class Session:
    """Prepares the data and trains in this process."""

    plan: Plan

    def prepare(self) -> "Prepared":
        from ..harness.data.prepare import prepare_data

        return prepare_data(self.plan.config, self.plan.cwd, self.plan.config.runs_dir)

    def train(self, prepared: "Prepared", *, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Hands every event and metrics record to `report`. Returns the worker's summary."""
        from ..harness.engine import World
        from ..harness.worker import run

        world = World(rank=0, local_rank=0, size=1, device=self.plan.device)
        return run(self.plan, prepared, world=world, report=report, driver=lock.driver_of(self.plan.run_dir))


@contextmanager
def session(plan: Plan, _resources: Resources) -> Iterator[Session]:
    yield Session(plan)
