"""What one rank of the scale benchmark does when it is asked: build, step, take a step apart, save a checkpoint.

It goes through the code that a run goes through: the loader, models.build, make_engine, train_step, checkpoint.save.
Rank 0 also holds a model of its own, trained by one worker alone, beside which the ranks together are measured.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from ..harness import checkpoint, models
from ..harness.allocator import keep_freed_memory
from ..harness.config import Config
from ..harness.data.loader import Loader
from ..harness.data.sampler import Sampler
from ..harness.data.store import Store
from ..harness.engine import Engine, World, make_engine
from ..harness.loop import train_step
from ..harness.tasks import get_task
from ..harness.worker import set_up_process
from .collectives import Recorder, loopback_bytes
from .scale_job import LEARNING_RATE, Job

PAD_ID = 0
"""All rows have the same length: nothing is padded."""


@dataclass
class Training:
    """An engine and what it trains on."""

    job: Job
    world: World
    config: Config
    engine: Engine
    rows: str

    def loader(self, *, num_cells: int) -> Loader:
        """This rank's batches, of `num_cells` micro-batches over all ranks."""
        config, store = self.config, Store(self.rows)
        size = num_cells * self.job.num_sequences
        sampler = Sampler(store.source, [1.0], seed=config.seed, global_batch_size=size, max_steps=1)
        return Loader(
            store,
            sampler,
            get_task(config.task.type),
            SimpleNamespace(pad_token_id=PAD_ID),
            config,
            micro_batch_size=self.job.num_sequences,
            world_size=self.world.size,
            rank=self.world.rank,
        )

    def step(self, loader: Loader, number: int) -> dict[str, float]:
        """One step on batch `number`: {time_s, input_s, cpu_s, loss}; cpu_s is what this process worked."""
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        batch = loader.step(number)
        input_s = time.perf_counter() - start_s
        task = get_task(self.config.task.type)
        report = train_step(
            self.engine, task, self.config, batch=batch, step=number, lr=LEARNING_RATE, is_stopping=False
        )
        self.synchronize()
        time_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        return {"time_s": time_s, "input_s": input_s, "cpu_s": cpu_s, "loss": report.loss}

    @property
    def synchronize(self) -> Callable[[], None]:
        return torch.cuda.synchronize if self.world.device == "cuda" else _nothing


def _nothing() -> None:
    """A CPU has done what it was given."""


class Rank:
    """The methods are called on all ranks alike, `solo` ones on rank 0 only. Their results are plain data."""

    def __init__(self) -> None:
        self.together: Training | None = None
        self.alone: Training | None = None

    def pid(self) -> int:
        return os.getpid()

    def build(self, fields: dict[str, Any], folder: str, rows: str, rank: int, port: int) -> dict[str, Any]:
        """The job's engine on this rank: {engine, num_trained, num_total}."""
        ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ.update(ranks)
        job = Job.from_dict(fields)
        self.together = make_training(job, folder, rows, rank=rank)
        parameters = [(parameter.requires_grad, _numel(parameter)) for parameter in self.model().parameters()]
        return {
            "engine": job.plan(folder).engine,
            "num_trained": sum(count for is_trained, count in parameters if is_trained),
            "num_total": sum(count for _, count in parameters),
        }

    def model(self) -> torch.nn.Module:
        assert self.together is not None
        return self.together.engine.model

    def build_solo(self, fields: dict[str, Any], folder: str, rows: str) -> None:
        """The same model trained by this worker alone, without DeepSpeed."""
        job = replace(Job.from_dict(fields), num_workers=1, zero_stage=0)
        self.alone = None  # two at a time might not fit
        self.alone = make_training(job, folder, rows, rank=0)

    def check(self, num_steps: int) -> list[float]:
        """Losses of the first steps, all on the first global batch."""
        assert self.together is not None
        loader = self.together.loader(num_cells=self.together.world.size)
        return [self.together.step(loader, 0)["loss"] for _ in range(num_steps)]

    def check_solo(self, num_steps: int, num_workers: int) -> list[float]:
        """The same by one worker, which accumulates the batches of all."""
        assert self.alone is not None
        loader = self.alone.loader(num_cells=num_workers)
        return [self.alone.step(loader, 0)["loss"] for _ in range(num_steps)]

    def step(self, number: int) -> dict[str, float]:
        assert self.together is not None
        self.together.engine.barrier()
        return self.together.step(self.together.loader(num_cells=self.together.world.size), number)

    def step_solo(self, number: int) -> dict[str, float]:
        assert self.alone is not None
        return self.alone.step(self.alone.loader(num_cells=1), number)

    def take_apart(self, number: int) -> dict[str, Any]:
        """A step whose collectives are waited for one by one: its times, the collectives, and the loopback's bytes."""
        training = self.together
        assert training is not None
        loader = training.loader(num_cells=training.world.size)
        training.engine.barrier()
        before = loopback_bytes()
        start_s = time.perf_counter()
        with Recorder(training.synchronize) as recorder:
            step = training.step(loader, number)
        training.engine.barrier()
        after, time_s = loopback_bytes(), time.perf_counter() - start_s
        carried = None if before is None or after is None else after - before
        calls = [(call.op, call.num_bytes, call.start_s, call.end_s) for call in recorder.calls]
        return step | {"calls": calls, "loopback_bytes": carried, "loopback_s": time_s}

    def all_reduce(self, num_bytes: int, num_times: int) -> list[float]:
        """Seconds of single all-reduces of that many bytes."""
        training = self.together
        assert training is not None
        tensor = torch.zeros(num_bytes // 4, device=training.world.device)
        times = []
        for _ in range(num_times):
            training.engine.barrier()
            training.synchronize()
            start_s = time.perf_counter()
            dist.all_reduce(tensor)
            training.synchronize()
            times.append(time.perf_counter() - start_s)
        return times

    def save(self, folder: str) -> float:
        """Seconds of one checkpoint, from gathering the state until it counts; it is deleted again."""
        training = self.together
        assert training is not None
        training.engine.barrier()
        start_s = time.perf_counter()
        path = checkpoint.save(
            folder,
            1,
            state=training.engine.state(),
            trainer={"step": 1},
            world=training.world,
            barrier=training.engine.barrier,
            keep=1,
        )
        time_s = time.perf_counter() - start_s
        training.engine.barrier()
        if training.world.rank == 0:
            shutil.rmtree(path)
        return time_s

    def leave(self) -> None:
        """Ends the engine of all ranks."""
        if self.together is not None:
            self.together.engine.close()
            self.together = None

    def leave_solo(self) -> None:
        self.alone = None


def make_training(job: Job, folder: str, rows: str, *, rank: int) -> Training:
    """As a worker of a run builds it."""
    plan = job.plan(folder)
    Path(folder).mkdir(parents=True, exist_ok=True)
    world = World(rank=rank, local_rank=_local_rank(job, rank), size=job.num_workers, device=plan.device)
    set_up_process(plan, world)
    model = models.build(plan)
    if plan.device == "cpu":
        keep_freed_memory()
    return Training(job=job, world=world, config=plan.config, engine=make_engine(plan, model, world), rows=rows)


def _local_rank(job: Job, rank: int) -> int:
    """The number of this rank's device among those it sees: of GPUs Ray shows every worker only its own."""
    return 0 if job.device == "cuda" else rank


def _numel(parameter: torch.nn.Parameter) -> int:
    """Elements of the whole parameter, also where ZeRO-3 has partitioned it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
