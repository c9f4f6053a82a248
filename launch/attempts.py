"""Attempts of a run: one that finds no memory is followed by another that needs less, until one ends otherwise.

A process that the kernel kills for want of memory says nothing; its cgroup counts it, and the run's files say where
the run was. A run directory remembers what was given up, and a resumed run does not ask for it again.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from ..harness import backoff, goodput
from ..harness.config import Config
from ..harness.config_io import load_config
from ..harness.errors import OutOfMemory, TrainingError
from ..harness.plan import Plan
from ..harness.report import write_report
from ..harness.run_dir import RunDir

if TYPE_CHECKING:
    from ..harness.data.prepare import Prepared

Report = Callable[[dict[str, Any]], None]
Replan = Callable[[Config], Plan]
ATTEMPT_EVENTS = ("plan", backoff.EVENT)
"""Events that a new attempt begins after."""
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
"""Between a lost driver and the next; each wait is twice the one before."""
KILLED = "the system killed the process for want of memory"


class Session(Protocol):
    """What a launcher's `session` gives; a dataclass."""

    plan: Plan

    def prepare(self) -> "Prepared": ...

    def train(self, prepared: "Prepared", *, report: Report) -> dict[str, Any]: ...


@dataclass
class Attempts:
    """The attempts of one run. `asked` is the config as the user gave it."""

    run: RunDir
    asked: Config
    replan: Replan
    advice: Callable[[Plan], str]
    """What would take less memory than a plan, in words; empty where nobody knows."""
    report: Report
    given_up: backoff.Settings = field(default_factory=dict)
    tried: list[str] = field(default_factory=list)

    def train(self, session: Any, prepared: "Prepared") -> Plan:
        """Trains to the end; the plan that did. Raises what the session raises, and OutOfMemory in the end."""
        while True:
            try:
                session.train(prepared, report=self.report)
                return session.plan
            except OutOfMemory as error:
                failure = error.with_traceback(None)
            session = replace(session, plan=self.after(session.plan, failure))

    def after(self, failed: Plan, failure: OutOfMemory) -> Plan:
        """The next plan, written to the run directory and to its events. Raises OutOfMemory if there is none."""
        if self.run.stop.exists():
            raise failure
        found = backoff.smaller(failed, asked=self.asked, phase=failure.phase, replan=self.replan)
        if found is None:
            raise backoff.exhausted(failure, plan=failed, tried=self.tried, advice=self.advice(failed))
        plan, change = found
        self.given_up |= change.after
        self.tried.append(str(change))
        fields = backoff.event(plan, failed=failed, error=failure, change=change, given_up=self.given_up)
        self.run.fatal_json.unlink(missing_ok=True)
        self.run.write_json(self.run.plan_json, plan.to_dict())
        self.run.log_event(backoff.EVENT, **fields)
        self.report({"event": backoff.EVENT, "time": time.time()} | fields)
        return plan


@dataclass
class Restarts:
    """What the supervisor of a run on Ray does about a lost driver; see supervisor.Policy."""

    run: RunDir
    max_failures: int
    report: Report
    since: float = field(default_factory=lambda: round(time.time(), 3))
    num_drivers: int = 0
    """Drivers that were lost so far; worker failures count too, as often as Ray Train has noted them."""

    def __call__(self, cause: str) -> float:
        """Notes the restart, shows it, and returns the seconds to wait. Raises TrainingError if all are used up."""
        events = [event for event in self.run.read_jsonl(self.run.events_jsonl) if event.get("time", 0.0) >= self.since]
        errors = [str(event.get("message")) for event in events if event.get("event") == "error"]
        cause = cause or (errors[-1] if errors else "the driver asked for another")
        restarts = self.num_drivers + sum(event.get("event") == "worker_failure" for event in events)
        if restarts >= self.max_failures:
            raise self._used_up(cause, restarts)
        event = goodput.restart_event(self.run, cause=cause, wait_s=min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0**restarts))
        self.num_drivers += 1
        if self.run.is_run:
            self.run.append_jsonl(self.run.events_jsonl, event)
        self.report(event)
        return float(event["wait_s"])

    def _used_up(self, cause: str, restarts: int) -> TrainingError:
        error = TrainingError(
            f"{cause}, and launch.max_failures={self.max_failures} allows no more restarts (there were {restarts}); "
            "go on from the newest checkpoint with --resume once the reason is gone"
        )
        if self.run.is_run:
            self.run.log_event("error", message=str(error), exit_code=error.exit_code)
            write_report(self.run)
        return error


def given_up(run: RunDir, config: Config) -> backoff.Settings:
    """What the earlier attempts of a run gave up for memory, and it gives up again when it is resumed."""
    if not run.config_yaml.is_file():
        return {}
    before = load_config([str(run.config_yaml)])
    return backoff.kept(config, before=before, events=run.read_jsonl(run.events_jsonl))


def tried(run: RunDir) -> list[str]:
    """What the run has given up so far, in words."""
    return [event["change"] for event in run.read_jsonl(run.events_jsonl) if event.get("event") == backoff.EVENT]


def killed(run: RunDir, *, since: float = 0.0) -> OutOfMemory:
    """The error of an attempt whose process could not say it itself: where it was is read from the run's files.

    `since` is when the process began: before it was planned there is nothing to give up.
    """
    events = [event for event in run.read_jsonl(run.events_jsonl) if event.get("time", 0.0) >= since]
    names = [event.get("event") for event in events]
    first = max((number for number, name in enumerate(names) if name in ATTEMPT_EVENTS), default=None)
    if first is None:
        raise OutOfMemory(f"{KILLED} before training began: planning and preparing the data need more than there is")
    is_built, step = "start" in names[first:], 0
    if is_built:
        done = [event for event in events[first:] if event.get("event") in ("resume", "checkpoint")]
        metrics = [one for one in run.read_jsonl(run.metrics_jsonl) if one.get("time", 0.0) >= events[first]["time"]]
        step = max([0, *(int(one["step"]) for one in (*done, *metrics))])
    return backoff.out_of_memory(KILLED, phase="step" if is_built else "load", step=step)
