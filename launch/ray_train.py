"""The Ray launcher: data prepared in a task, then Ray Train with one worker per rank, watched through the run's files.

What a worker raises decides what happens: an error that a restart would not cure is written to fatal.json and ends
the run; a worker that dies is replaced up to launch.max_failures times and starts from the newest checkpoint.
"""

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback
from ray.train.torch import TorchTrainer

from ..harness import backoff, goodput, lock
from ..harness.config import Config
from ..harness.config_hardware import Ray
from ..harness.elastic import is_elastic
from ..harness.errors import BurnishError, DataError, LostError, SupersededError, TrainingError
from ..harness.plan import Plan, Resources
from ..harness.run_dir import RunDir
from ..harness.watchdog import longest_s
from .attempts import killed
from .failures import fatal_error, first_line, raise_fatal, write_fatal, write_traceback
from .preflight import require
from .processes import oom_kills
from .ray_cluster import check_capacity, cluster, cluster_resources
from .resources import worker_resources
from .tail import Tail
from .worker_signals import StoppableTorchConfig, ended

if TYPE_CHECKING:
    from ..harness.data.prepare import Prepared

POLL_S = 0.2
COLLECTIVE_TIMEOUT_S = 600
"""Longest wait of a rank for another, at least: watchdogs notice a hang before, and can say where."""
START_RETRIES, ELASTIC_START_RETRIES = 1, 2
"""A group of workers that finds no room in its start timeout is asked for again so often: then it is an error."""
RESIZE_INTERVAL_S = 60.0
"""How often an elastic run looks for room to grow. Growing restarts it from its newest checkpoint."""
ELASTIC_START_TIMEOUT_S = 20
"""How long an elastic run waits for the workers it asked for: a dead node counts until Ray's head has noticed."""
STORAGE = ".ray"
"""Folder in the run directory for Ray's own book-keeping, which burnish does not use."""

resources = cluster_resources


@dataclass(frozen=True)
class Session:
    """A connection to Ray for one run."""

    plan: Plan
    launch: Ray

    def prepare(self) -> "Prepared":
        """Tokenises in a Ray task, so that no worker has to and the driver stays small.

        Beside it another task tries the model's config and adapter, so that a mistake there shows before workers start.
        """
        from ..harness.data.prepare import Prepared

        config = self.plan.config.model_dump(mode="json")
        wanted = ray.remote(num_cpus=1, max_retries=0)(_prepare).remote(config, self.plan.cwd)
        pending = [wanted, ray.remote(num_cpus=0, max_retries=0)(_try_model).remote(config, self.plan.cwd)]
        try:
            while pending:
                ready, pending = ray.wait(pending, timeout=POLL_S)
                ray.get(ready)
            return Prepared.from_dict(ray.get(wanted))
        except RayTaskError as error:
            if isinstance(error.cause, BurnishError):
                raise error.cause from None
            raise
        except RayError as error:
            raise DataError(f"preparing the data failed in Ray: {first_line(error)}") from None

    def train(self, prepared: "Prepared", *, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Runs the workers to the end; `report` gets every event and metrics record they write."""
        run, outcome, kills = RunDir(self.plan.run_dir), Outcome(), oom_kills()
        tails = [Tail(run.events_jsonl), Tail(run.metrics_jsonl)]
        trainer = make_trainer(self.plan, self.launch, prepared)
        # Only outside the main thread does Ray Train leave SIGINT to us.
        thread = threading.Thread(target=outcome.fit, args=(trainer,), name="ray-train", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S)
            for record in (record for tail in tails for record in tail.poll()):
                report(record)
        raise_fatal(run)
        if outcome.error is not None:
            raise _failed(outcome.error, run, has_killed=oom_kills() > kills)
        assert outcome.value is not None
        if "interrupted" in outcome.value:
            raise fatal_error("Interrupted", outcome.value["interrupted"])
        return outcome.value["summary"]


@dataclass
class Outcome:
    """How Ray Train ended: what rank 0 returned, or the error."""

    value: dict[str, Any] | None = None
    error: BaseException | None = None

    def fit(self, trainer: TorchTrainer) -> None:
        try:
            self.value = trainer.fit().return_value
        except BaseException as error:
            self.error = error


@contextlib.contextmanager
def session(plan: Plan, resources: Resources) -> Iterator[Session]:
    """Raises InfeasibleError if the cluster can never run the workers, or its nodes differ in what the run needs."""
    launch = plan.config.launch
    assert isinstance(launch, Ray), launch
    with cluster(launch, resources):
        check_capacity(launch, worker_resources(launch, plan.device))
        if launch.address is not None:
            require(plan.config)
        try:
            yield Session(plan, launch)
        finally:
            shutil.rmtree(RunDir(plan.run_dir).path / STORAGE, ignore_errors=True)


def make_trainer(plan: Plan, launch: Ray, prepared: "Prepared") -> TorchTrainer:
    run = RunDir(plan.run_dir)
    env_vars = {"OMP_NUM_THREADS": str(plan.num_threads), "RAY_USAGE_STATS_ENABLED": "0"}
    if plan.device == "cpu":
        env_vars["DS_ACCELERATOR"] = "cpu"
    if launch.address is None:
        env_vars["HOME"] = os.path.expanduser("~")
        if sys.platform.startswith("linux"):
            env_vars["GLOO_SOCKET_IFNAME"] = "lo"  # all workers are here: nobody else has to reach them
    if is_elastic(plan.config):
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(ELASTIC_START_TIMEOUT_S)
    is_fixed = launch.min_workers == launch.max_workers
    return TorchTrainer(
        work,
        train_loop_config={
            "plan": plan.to_dict(),
            "prepared": prepared.to_dict(),
            "driver": lock.driver_of(plan.run_dir),
        },
        torch_config=StoppableTorchConfig(
            timeout_s=max(COLLECTIVE_TIMEOUT_S, round(longest_s(launch.hang_timeout_s))),
            run_dir=plan.run_dir if is_fixed else "",
            driver=lock.driver_of(plan.run_dir),
        ),
        scaling_config=ScalingConfig(
            num_workers=launch.max_workers if is_fixed else launch.num_workers,
            elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
            use_gpu=plan.device == "cuda",
            resources_per_worker=worker_resources(launch, plan.device),
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(run.path / STORAGE),
            failure_config=FailureConfig(
                max_failures=launch.max_failures,
                controller_failure_limit=START_RETRIES if is_fixed else ELASTIC_START_RETRIES,
            ),
            callbacks=[FailureLog(plan.run_dir, oom_kills(), max_failures=launch.max_failures)],
            worker_runtime_env={"env_vars": env_vars},
        ),
    )


class FailureLog(UserCallback):
    """Notes every failure of the workers and every restart in events.jsonl; runs in Ray Train's controller.

    A worker that was killed for want of memory would be again: what it left for workers to come makes them end at once.
    """

    def __init__(self, run_dir: str, kills: int, *, max_failures: int) -> None:
        self.run_dir, self.kills, self.left = run_dir, kills, max_failures

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        run = RunDir(self.run_dir)
        failures = {rank: reason_of(error) for rank, error in sorted(worker_exceptions.items())}
        run.log_event("worker_failure", reasons={str(rank): first_line(error) for rank, error in failures.items()})
        if died_for_memory(failures, has_killed=oom_kills() > self.kills) and not run.fatal_json.exists():
            write_fatal(run, killed(run))
        self.left -= 1
        if self.left >= 0 and not run.fatal_json.exists():
            event = goodput.restart_event(run, cause=cause_of(run, failures))
            run.append_jsonl(run.events_jsonl, event)


def cause_of(run: RunDir, failures: Mapping[int, BaseException]) -> str:
    """What the workers failed of, in words: one that hung or is gone explains the errors of those that wait for it."""
    events = run.read_jsonl(run.events_jsonl)
    begin = max((number for number, event in enumerate(events) if event.get("event") == goodput.EVENT), default=0)
    hung = [event["rank"] for event in events[begin:] if event.get("event") == "hang"]
    gone = sorted(rank for rank, error in failures.items() if is_gone(error))
    if hung:
        return f"rank {hung[-1]} hung"
    if gone:
        return f"rank {', '.join(map(str, gone))} died"
    return "; ".join(f"rank {rank}: {first_line(error)}" for rank, error in sorted(failures.items()))


def reason_of(error: BaseException) -> BaseException:
    """What a worker failed of: Ray Train wraps the end of a process in an error about its health check."""
    found = getattr(error, "health_check_failure", None)
    return found if isinstance(found, BaseException) else error


def is_gone(error: BaseException) -> bool:
    """Whether it is not the worker's own error but that its process is not there any more."""
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


def work(settings: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train calls on every worker: one rank of the run."""
    from ..harness.data.prepare import Prepared
    from ..harness.engine import World
    from ..harness.errors import Interrupted
    from ..harness.worker import run

    plan = Plan.from_dict(settings["plan"])
    run_dir = RunDir(plan.run_dir)
    if run_dir.fatal_json.exists():
        return {}
    _enter(plan.cwd)
    context = ray.train.get_context()
    world = World(
        rank=context.get_world_rank(),
        local_rank=context.get_local_rank(),
        size=context.get_world_size(),
        device=plan.device,
    )
    if world.rank == 0:
        note_resize(run_dir, world.size)
    try:
        prepared = Prepared.from_dict(settings["prepared"])
        driver = settings["driver"]
        return {"summary": run(plan, prepared, world=world, report=lambda _record: None, driver=driver)}
    except Interrupted as error:
        return {"interrupted": str(error)}
    except Exception as error:
        if (fatal := deterministic(error)) and lock.driver_of(run_dir.path) == settings["driver"]:
            write_fatal(run_dir, fatal)
        raise
    finally:
        ended(plan.run_dir)


def note_resize(run: RunDir, num_workers: int) -> None:
    """Writes the restart of a group of workers that replaces one that did not fail: the cluster has another size."""
    events = run.read_jsonl(run.events_jsonl)
    openings = ("plan", goodput.EVENT, backoff.EVENT)
    begin = max((number for number, event in enumerate(events) if event.get("event") in openings), default=0)
    if started := [event for event in events[begin:] if event.get("event") == "start"]:
        cause = f"resized from {started[-1]['world_size']} to {num_workers} workers"
        run.append_jsonl(run.events_jsonl, goodput.restart_event(run, cause=cause))


def deterministic(error: Exception) -> BurnishError | None:
    """The error to end the attempt with, if a restart would meet it again; None if a restart may cure it."""
    if isinstance(error, SupersededError):
        return None
    if isinstance(error, BurnishError):
        return error
    return backoff.explained(error, phase="load", step=0) if backoff.found_no_memory(error) else None


def died_for_memory(failures: Mapping[int, BaseException], *, has_killed: bool) -> bool:
    """Whether a worker is gone because Ray's memory monitor killed it, or the kernel did.

    Ray does not say which signal ended a process: `has_killed` is that a cgroup has counted a kill meanwhile.
    """
    gone = [reason for error in failures.values() if is_gone(reason := reason_of(error))]
    # Ray ends the message about any process that is gone with what often ends one; that says nothing about this one.
    said = [str(error).partition("Some common causes")[0] for error in gone]
    return bool(gone) and (has_killed or any(map(backoff.says_no_memory, said)))


def _prepare(config: dict[str, Any], cwd: str) -> dict[str, Any]:
    from ..harness.data.prepare import prepare_data

    _enter(cwd)
    parsed = Config.model_validate(config)
    return prepare_data(parsed, cwd, parsed.runs_dir).to_dict()


def _try_model(config: dict[str, Any], cwd: str) -> None:
    from ..harness.models import count_parameters

    _enter(cwd)
    parsed = Config.model_validate(config)
    count_parameters(parsed, getattr(parsed.task, "labels", None))


def _enter(cwd: str) -> None:
    """Relative paths in a config are relative to the folder where the command was typed, if this node has it."""
    if os.path.isdir(cwd):
        os.chdir(cwd)


def _failed(error: BaseException, run: RunDir, *, has_killed: bool) -> TrainingError:
    """One sentence about what ended Ray Train, with the workers' tracebacks in a file; OutOfMemory where that did."""
    failures = getattr(error, "worker_failures", {})
    if died_for_memory(failures, has_killed=has_killed):
        return killed(run)
    if isinstance(error, TrainingFailedError | RayError) and failures:
        what = "; ".join(f"rank {rank}: {first_line(reason_of(error))}" for rank, error in sorted(failures.items()))
    else:
        what = first_line(error)
    path = write_traceback(error, folder=run.path)
    if isinstance(error, RayError):
        return LostError(f"the controller of the workers is gone ({what})")
    return TrainingError(f"training failed in Ray ({what}); details in {path}")
