"""Whole runs on several ranks without Ray: a pool of processes joined by gloo, each calling worker.run."""

import json
import os
import signal
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Any, Self

import tiny
from burnish.harness.config_io import load_config
from burnish.harness.data.prepare import prepare_data
from burnish.harness.plan import Plan, Resources, make_plan
from burnish.harness.run_dir import RunDir

KILLED = "killed"
TIMEOUT_S = 240


@dataclass(frozen=True)
class Job:
    """One run: its plan and data, the step after which every rank kills itself, or is asked to stop, and its faults."""

    plan: dict[str, Any]
    prepared: dict[str, Any]
    kill_after_step: int | None = None
    stop_after_step: int | None = None
    faults: tuple[dict[str, Any], ...] = ()


def make_job(
    folder: Path,
    *,
    world: int,
    kill_after_step: int | None = None,
    stop_after_step: int | None = None,
    faults: Sequence[dict[str, Any]] = (),
    mode: str = "new",
    **changes: Any,
) -> Job:
    """Config -> plan -> prepared data -> run directory, as the launchers do it."""
    launch = {"type": "ray", "num_workers": world} if world > 1 else {"type": "inline"}
    path = tiny.write_config(folder, **({"launch": launch} | changes))
    config = load_config([str(path)])
    run_dir = Path(config.runs_dir) / config.name
    resources = Resources(device="cpu", num_devices=0, num_cpus=world, host_memory_bytes=2**34)
    plan = make_plan(config, resources, run_dir=str(run_dir), cwd=str(folder))
    run = RunDir.create(run_dir, mode=mode)
    run.write_json(run.plan_json, plan.to_dict())
    prepared = prepare_data(config, str(folder), config.runs_dir)
    return Job(plan.to_dict(), prepared.to_dict(), kill_after_step, stop_after_step, tuple(faults))


def run_job(job: Job, rank: int, world: int) -> None:
    """Runs one job on this rank; rank 0 leaves the metrics in the run directory."""
    from burnish.harness.data.prepare import Prepared
    from burnish.harness.engine import World
    from burnish.harness.errors import Interrupted
    from burnish.harness.faults import VARIABLE, disarm
    from burnish.harness.worker import run

    plan = Plan.from_dict(job.plan)

    def report(record: dict[str, Any]) -> None:
        if record.get("kind") == "train" and record["step"] == job.kill_after_step:
            os.kill(os.getpid(), signal.SIGKILL)
        if record.get("kind") == "train" and record["step"] == job.stop_after_step:
            RunDir(plan.run_dir).stop.touch()

    disarm()
    os.environ[VARIABLE] = json.dumps(job.faults)
    world_info = World(rank=rank, local_rank=rank, size=world, device="cpu")
    try:
        run(plan, Prepared.from_dict(job.prepared), world=world_info, report=report)
    except Interrupted:
        if job.stop_after_step is None:
            raise


def _serve(rank: int, world: int, rendezvous: str, inbox: Any, outbox: Any) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    while (job := inbox.get()) is not None:
        try:
            run_job(job, rank, world)
            outbox.put((rank, None))
        except BaseException:
            outbox.put((rank, traceback.format_exc()))


class RankPool:
    """`world` processes that run jobs one after another; a killed pool is started anew for the next job."""

    def __init__(self, world: int, folder: Path) -> None:
        self.world, self.folder, self.starts = world, folder, 0
        self.processes: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        context = get_context("spawn")
        self.starts += 1
        rendezvous = str(self.folder / f"rendezvous-{self.starts}")
        self.inboxes = [context.Queue() for _ in range(self.world)]
        self.outbox = context.Queue()
        self.processes = [
            context.Process(
                target=_serve, args=(rank, self.world, rendezvous, self.inboxes[rank], self.outbox), daemon=True
            )
            for rank in range(self.world)
        ]
        for process in self.processes:
            process.start()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []

    def run(self, job: Job) -> str | None:
        """None when every rank finished, KILLED when the job's own kill ended it. Raises RuntimeError otherwise."""
        if not self.processes:
            self._start()
        for inbox in self.inboxes:
            inbox.put(job)
        done, waited_s = 0, 0
        while done < self.world:
            try:
                rank, error = self.outbox.get(timeout=1)
            except Empty:
                waited_s += 1
                if any(not process.is_alive() for process in self.processes):
                    self.stop()
                    if job.kill_after_step is not None:
                        return KILLED
                    raise RuntimeError("a rank died") from None
                if waited_s > TIMEOUT_S:
                    self.stop()
                    raise RuntimeError("the ranks hang") from None
                continue
            if error and job.kill_after_step is None:
                self.stop()
                raise RuntimeError(f"rank {rank}:\n{error}")
            done += 1
        if job.kill_after_step is not None:
            self.stop()
            return KILLED
        return None


def losses(job: Job) -> list[float]:
    """The training losses of a job's run directory, by step."""
    run_dir = RunDir(job.plan["run_dir"])
    records = [record for record in run_dir.read_jsonl(run_dir.metrics_jsonl) if record["kind"] == "train"]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1)), records
    return [record["loss"] for record in records]
