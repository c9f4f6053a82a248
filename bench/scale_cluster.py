"""The ranks of the scale benchmark: actors of a Ray that is started on this machine for it, and ended with it.

A rank serves one layout after the other. DeepSpeed numbers the parameters that it partitions through the life of a
process, and all ranks must have the same numbers: where some have built more ZeRO-3 models than others, all start anew.
"""

import atexit
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

CALL_S = 180.0
"""Longest that a call may take: the ranks wait for each other, and one that is lost makes the others wait for ever."""


class RankFailed(Exception):  # noqa: N818
    """A rank died, raised or did not answer; the message says why in a line."""


class Cluster:
    """Ray and the ranks in it. Both start when ranks are first asked for; a failure of one ends all ranks."""

    def __init__(self) -> None:
        self.stack = ExitStack()
        self.actors: list[Any] = []
        self.num_partitioned: list[int] = []
        """ZeRO-3 models that each rank has built."""
        self.is_started = False
        self.folder = Path()
        self.alone: str | None = None
        """What rank 0 trains alone: a model and an adapter."""
        self.check_losses: dict[tuple[str, int], list[float]] = {}
        """Losses of that worker alone on the batch of so many: the same at every ZeRO stage."""
        self.flops_per_s: dict[str, float] = {}
        """What one GPU computes in whole steps, by adapter, for the model of many; outlives the ranks."""

    def start(self) -> None:
        """Raises RankFailed if Ray does not start."""
        if self.is_started:
            return
        from ..harness.config_hardware import Ray
        from ..launch.ray_cluster import cluster
        from ..launch.resources import detect

        self.is_started = True
        atexit.register(self.stop)
        try:
            self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="burnish-scale-")))
            self.stack.enter_context(cluster(Ray(type="ray"), detect()))
        except BaseException as error:
            self.stop()
            if isinstance(error, Exception):
                raise RankFailed(f"Ray did not start: {first_line(error)}") from None
            raise

    def stop(self) -> None:
        """Ends the ranks and Ray, and removes its files; it can start again."""
        if not self.is_started:
            return
        self.is_started, self.actors, self.num_partitioned, self.alone = False, [], [], None
        atexit.unregister(self.stop)
        stack, self.stack = self.stack, ExitStack()
        stack.close()

    def grow(self, num_ranks: int, *, is_gpu: bool, zero_stage: int) -> None:
        """Starts ranks until there are so many, all fit for a model at that stage. Raises RankFailed."""
        self.start()
        counts = [*self.num_partitioned, *[0] * num_ranks][:num_ranks]
        if zero_stage == 3 and len(set(counts)) > 1:
            self.end_ranks()
        missing = max(0, num_ranks - len(self.actors))
        self.actors += [self.new_rank(is_gpu=is_gpu) for _ in range(missing)]
        self.num_partitioned += [0] * missing
        for rank in range(num_ranks if zero_stage == 3 else 0):
            self.num_partitioned[rank] += 1
        self.call("pid", num_ranks=num_ranks)

    def new_rank(self, *, is_gpu: bool) -> Any:
        import ray

        from .scale_worker import Rank

        return ray.remote(num_cpus=0, num_gpus=1 if is_gpu else 0, max_restarts=0)(Rank).remote()

    def call(self, method: str, *arguments: Any, num_ranks: int) -> list[Any]:
        """The method on the first ranks together, with the same arguments. Raises RankFailed."""
        return self.call_each(method, [arguments] * num_ranks)

    def call_each(self, method: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """The method on the first ranks together, each with its own arguments. Raises RankFailed."""
        import ray

        ranks = self.actors[: len(arguments)]
        waiting = [getattr(rank, method).remote(*given) for rank, given in zip(ranks, arguments, strict=True)]
        found = list(waiting)
        deadline = time.monotonic() + CALL_S
        try:
            while waiting:
                ready, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise RankFailed(f"no answer to {method} within {CALL_S:.0f} s")
                ray.get(ready)
            return list(ray.get(found))
        except ray.exceptions.RayTaskError as error:
            self.end_ranks()
            raise RankFailed(first_line(error.cause or error)) from None
        except ray.exceptions.RayError as error:
            self.end_ranks()
            raise RankFailed(f"a rank died in {method}: {first_line(error)}") from None
        except BaseException:
            self.end_ranks()
            raise

    def end_ranks(self) -> None:
        """Ends all ranks at once, whatever they are doing."""
        import ray

        for actor in self.actors:
            ray.kill(actor)
        self.actors, self.num_partitioned, self.alone = [], [], None


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
