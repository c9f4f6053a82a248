"""A training run as the driver sees it: config -> plan -> run directory -> data -> launcher -> report."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..harness import backoff
from ..harness.config import Config
from ..harness.config_io import config_to_yaml, load_config, with_values
from ..harness.errors import (
    BurnishError,
    ConfigError,
    DataError,
    InfeasibleError,
    Interrupted,
    OutOfMemory,
    SupersededError,
)
from ..harness.goodput import newest_step
from ..harness.lock import driver_of, fence
from ..harness.plan import Plan, Resources
from ..harness.reasons import written
from ..harness.report import write_report
from ..harness.room import check_room
from ..harness.run_dir import RunDir, run_path, write_bytes
from .attempts import Attempts, given_up, killed, tried
from .interrupt import Interrupts, exit_code
from .planning import planned
from .resources import free_disk_bytes, offload_places
from .supervisor import Life
from .versions import check_versions

if TYPE_CHECKING:
    from ..harness.data.prepare import Prepared

Mode = Literal["new", "resume", "fresh"]
Report = Callable[[dict[str, Any]], None]

LAUNCHERS = {"inline": ".local", "ray": ".ray_train"}
"""launch.type -> module with resources(config) and session(plan, resources); Ray is imported only if it is used."""
MAY_DIFFER = (
    *("launch", "tracking", "runs_dir", "memory", "checkpoint", "train.num_threads"),
    *("train.micro_batch_size", "eval.micro_batch_size"),
)
"""Keys that may change when a run goes on: where and how it runs, not what it computes."""
FIRST_LIFE = Life()
LESS = 0.2
"""Share of a plan's predicted memory: what needs less by so much may fit where the plan did not."""
CHEAPEST = "The cheapest change that fits: "


def launcher(config: Config) -> Any:
    return import_module(LAUNCHERS[config.launch.type], __package__)


def find_resources(config: Config) -> Resources:
    """What there is to train on, with the free bytes below memory.nvme_path."""
    resources: Resources = launcher(config).resources(config)
    path = config.memory.nvme_path
    places = offload_places(with_files=path is not None)
    return replace(resources, nvme_bytes=free_disk_bytes(path) if path else 0, offload_places=places)


def plan_run(config: Config, resources: Resources, *, before: Plan | None = None) -> Plan:
    """The plan of the run in runs_dir/name; `before` is its plan so far, where it goes on.

    Raises ConfigError, and InfeasibleError for what does not fit into memory or on the disk.
    """
    found = planned(config, resources, before=before)
    if found.profile is not None:
        run = RunDir(found.plan.run_dir)
        check_room(
            found.plan,
            found.profile.counts,
            free_bytes=free_disk_bytes(str(run.path)),
            has_checkpoint=newest_step(run) > 0,
        )
    return found.plan


def train(config: Config, *, mode: Mode, report: Report, life: Life = FIRST_LIFE) -> RunDir:
    """Runs to the end and returns the finished run. Every event goes to `report`.

    `life` says whether an earlier process of the same command was lost.

    Raises ConfigError, InfeasibleError, DataError; TrainingError, and OutOfMemory where a run that found no memory had
    nothing left to give up; Interrupted once a checkpoint is written, and KeyboardInterrupt where there was nothing to
    save or the user would not wait.
    """
    check_versions()
    resources = find_resources(config)
    run = RunDir(run_path(Path(os.getcwd()) / config.runs_dir, config.name))
    mode = _mode_after(run, mode, life)
    before = plan_before(run) if mode == "resume" else None
    attempts = Attempts(
        run,
        config,
        replan=lambda changed: plan_run(changed, resources, before=before),
        advice=lambda plan: smaller_run(plan, resources),
        report=report,
    )
    if mode == "resume" and run.is_run:
        check_same_config(run.load_config(), config)
        attempts.given_up, attempts.tried = given_up(run, config), tried(run)
    plan = _plan_of_attempt(attempts, life.killed_since)
    RunDir.create(plan.run_dir, mode=mode)
    fence(plan.run_dir)
    report({"event": "plan", "plan": plan})
    try:
        with (
            Interrupts(lambda text: report({"event": "notice", "text": text})) as interrupts,
            launcher(config).session(plan, resources) as session,
        ):
            prepared = session.prepare()
            _write_inputs(run, config, plan, prepared, report)
            interrupts.arm(run.stop)
            attempts.train(session, prepared)
    except BaseException as error:
        if isinstance(error, Interrupted):
            error.exit_code = exit_code(run.stop)
        _note_end(run, error, mode)
        raise
    write_report(run)
    return run


def _mode_after(run: RunDir, mode: Mode, life: Life) -> Mode:
    """How to enter the run directory: a run that an earlier process of this command has begun is gone on with."""
    if life.killed_since is not None:
        return "resume"
    if life.restarts == 0 or driver_of(run.path) < 1000 * life.since:
        return mode
    if run.is_run:
        return "resume"
    shutil.rmtree(run.path, ignore_errors=True)  # this command's own, and not planned yet
    return mode


def plan_before(run: RunDir) -> Plan | None:
    """The plan that the run had so far, if it has one that this version can read."""
    try:
        return run.load_plan()
    except ConfigError:
        return None


def smaller_run(plan: Plan, resources: Resources) -> str:
    """The cheapest change of a run that takes clearly less memory than the plan, if the planner finds one."""
    settings = backoff.decided(plan)
    config = with_values(plan.config, settings)
    choice = planned(config, resources).choice
    if choice is None:
        return ""
    budget = int((1 - LESS) * choice.prediction.needed_bytes)
    try:
        planned(with_values(config, {"memory.budget": budget}), resources)
    except InfeasibleError as error:
        as_they_are = {f"{key}={written(value)}" for key, value in settings.items()}
        words = [word for word in str(error).partition(CHEAPEST)[2].split() if word not in as_they_are]
        return f"the cheapest change that needs less is {' '.join(words)}" if words else ""
    return ""


def _plan_of_attempt(attempts: Attempts, killed_since: float | None) -> Plan:
    """The plan of a config with what was given up before; after a kill, that of the killed attempt with less."""
    if killed_since is None:
        return attempts.replan(with_values(attempts.asked, attempts.given_up))
    try:
        failure = killed(attempts.run, since=killed_since)
        return attempts.after(attempts.run.load_plan(), failure)
    except OutOfMemory as error:
        _note_end(attempts.run, error, "resume")
        raise


def check_same_config(old: Config, new: Config) -> None:
    """Raises ConfigError naming the keys in which a resumed run would not be the same run."""
    before, after = (dict(_flat(config.model_dump(mode="json"))) for config in (old, new))
    missing = object()
    changed = [
        key
        for key in sorted(before.keys() | after.keys())
        if before.get(key, missing) != after.get(key, missing)
        and not any(key == free or key.startswith(f"{free}.") for free in MAY_DIFFER)
    ]
    if changed:
        shown = "; ".join(f"{key} was {before.get(key)!r}, now {after.get(key)!r}" for key in changed[:8])
        more = f"; and {len(changed) - 8} more" if len(changed) > 8 else ""
        raise ConfigError(
            f"--resume: the config is not the run's own ({shown}{more}); change it back, or start another run with "
            "name=… or --fresh"
        )


def resumed_config(paths: list[str], overrides: list[str]) -> Config:
    """The config of a run directory given by path, else of the config files."""
    if len(paths) == 1 and Path(paths[0]).is_dir():
        run = RunDir.open(paths[0])
        config = load_config([str(run.config_yaml)], overrides)
        found = RunDir(run_path(config.runs_dir, config.name))
        if found.path.resolve() != run.path.resolve():
            raise ConfigError(
                f"{paths[0]} says it is {found.path}; start burnish in the folder where the run was started"
            )
        return config
    return load_config(paths, overrides)


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        return [(prefix, value)]
    return [pair for key, item in value.items() for pair in _flat(item, f"{prefix}.{key}" if prefix else str(key))]


def _write_inputs(run: RunDir, config: Config, plan: Plan, prepared: "Prepared", report: Report) -> None:
    """config.yaml as the user gave it, plan.json and data.json, and the events that open an attempt."""
    write_bytes(run.config_yaml, config_to_yaml(config).encode("utf-8", "backslashreplace"))
    run.write_json(run.plan_json, plan.to_dict())
    run.write_json(run.data_json, prepared.to_dict())
    decisions = {decision.key: decision.value for decision in plan.decisions}
    run.log_event("plan", world_size=plan.world_size, device=plan.device, decisions=decisions)
    run.log_event("data", counts=prepared.counts)
    report({"event": "data", "counts": prepared.counts})


def _note_end(run: RunDir, error: BaseException, mode: Mode) -> None:
    """Writes how a run ended to its events, and removes a new directory in which nothing was trained."""
    if isinstance(error, SupersededError):
        return  # the directory is another's
    is_users_mistake = isinstance(error, ConfigError | InfeasibleError | DataError)
    if mode != "resume" and not run.metrics_jsonl.exists() and (is_users_mistake or not run.is_run):
        shutil.rmtree(run.path, ignore_errors=True)
        return
    if not run.is_run:
        return
    if isinstance(error, Interrupted | KeyboardInterrupt):
        run.log_event("interrupt", message=str(error))
    else:
        message = str(error) if isinstance(error, BurnishError) else f"{type(error).__name__}: {error}"
        run.log_event("error", message=message, exit_code=getattr(error, "exit_code", 5))
    write_report(run)
