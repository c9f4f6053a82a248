"""A training run as the driver sees it: config -> plan -> run directory -> data -> launcher -> report."""

import os
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..harness.config import Config
from ..harness.config_io import config_to_yaml, load_config
from ..harness.errors import BurnishError, ConfigError, DataError, InfeasibleError, Interrupted
from ..harness.plan import Plan, Resources, make_plan
from ..harness.report import write_report
from ..harness.run_dir import RunDir, run_path, write_bytes
from .interrupt import Interrupts

if TYPE_CHECKING:
    from ..harness.data.prepare import Prepared

Mode = Literal["new", "resume", "fresh"]
Report = Callable[[dict[str, Any]], None]

LAUNCHERS = {"inline": ".local", "ray": ".ray_train"}
"""launch.type -> module with resources(config) and session(plan, resources); Ray is imported only if it is used."""
MAY_DIFFER = ("launch", "tracking", "train.num_threads", "runs_dir")
"""Keys that may change when a run goes on: where and how it runs, not what it computes."""


def launcher(config: Config) -> Any:
    return import_module(LAUNCHERS[config.launch.type], __package__)


def find_resources(config: Config) -> Resources:
    return launcher(config).resources(config)


def plan_run(config: Config, resources: Resources) -> Plan:
    """The plan of the run in runs_dir/name. Raises ConfigError, InfeasibleError."""
    cwd = os.getcwd()
    run_dir = run_path(Path(cwd) / config.runs_dir, config.name)
    return make_plan(config, resources, run_dir=str(run_dir), cwd=cwd)


def train(config: Config, *, mode: Mode, report: Report) -> RunDir:
    """Runs to the end and returns the finished run. Every event goes to `report`.

    Raises ConfigError, InfeasibleError, DataError; TrainingError; Interrupted once a checkpoint is written, and
    KeyboardInterrupt where there was nothing to save or the user would not wait.
    """
    resources = find_resources(config)
    plan = plan_run(config, resources)
    run = RunDir(plan.run_dir)
    if mode == "resume" and run.is_run:
        check_same_config(run.load_config(), config)
    run = RunDir.create(plan.run_dir, mode=mode)
    report({"event": "plan", "plan": plan})
    try:
        with (
            Interrupts(lambda text: report({"event": "notice", "text": text})) as interrupts,
            launcher(config).session(plan, resources) as session,
        ):
            prepared = session.prepare()
            _write_inputs(run, plan, prepared, report)
            interrupts.arm(run.stop)
            session.train(prepared, report=report)
    except BaseException as error:
        _note_end(run, error, mode)
        raise
    write_report(run)
    return run


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


def _write_inputs(run: RunDir, plan: Plan, prepared: "Prepared", report: Report) -> None:
    """config.yaml, plan.json and data.json, and the events that open an attempt."""
    write_bytes(run.config_yaml, config_to_yaml(plan.config).encode("utf-8", "backslashreplace"))
    run.write_json(run.plan_json, plan.to_dict())
    run.write_json(run.data_json, prepared.to_dict())
    decisions = {decision.key: decision.value for decision in plan.decisions}
    run.log_event("plan", world_size=plan.world_size, device=plan.device, decisions=decisions)
    run.log_event("data", counts=prepared.counts)
    report({"event": "data", "counts": prepared.counts})


def _note_end(run: RunDir, error: BaseException, mode: Mode) -> None:
    """Writes how a run ended to its events, and removes a new directory in which nothing was trained."""
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
