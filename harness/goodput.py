"""Where the wall time of a run went: events and metrics -> buckets, and the goodput. Reads files only.

Every moment between the first and the last sign of a run is in one bucket:

    train    steps taken for the first time, also those that were lost later (with their evaluations)
    save     checkpoints
    detect   from the last sign of a run that failed until somebody noticed
    wait     the pause before a restart
    restart  from then until training goes on: processes, model, checkpoint
    replay   steps that had been done before the failure
    other    planning, data, loading, evaluation, the result and its proof

Time in which nothing of the run was there (from an interruption to its resumption) is in none.

goodput = train / (all but other): the share of training time that brought the run forward, called ETTR by "Revisiting
Reliability in Large-Scale Machine Learning Research Clusters" (arXiv 2410.21680).
"""

import time
from dataclasses import dataclass, field
from typing import Any

from . import backoff
from .run_dir import RunDir, read_jsonl

BUCKETS = ("train", "save", "detect", "restart", "replay", "wait", "other")
EVENT = "restart"
ENDINGS = ("finish", "interrupt", "error")
OPENINGS = ("plan", "data", "model", "start")
"""Events of an attempt that has not trained yet."""
SIGNS = (*OPENINGS, "resume", "checkpoint", "samples", "proof")
"""Events that a run writes while it gets on; others tell what somebody noticed about it."""
Record = dict[str, Any]


@dataclass
class Goodput:
    """Seconds of each bucket, and what the failures cost."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BUCKETS, 0.0))
    num_restarts: int = 0
    lost_steps: int = 0

    @property
    def wall_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float | None:
        """In 0…1; None before the first step."""
        total = self.wall_s - self.seconds["other"]
        return self.seconds["train"] / total if total > 0 else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "goodput": self.goodput and round(self.goodput, 4),
            "wall_s": round(self.wall_s, 3),
            "seconds": {bucket: round(value, 3) for bucket, value in self.seconds.items()},
            "num_restarts": self.num_restarts,
            "lost_steps": self.lost_steps,
        }


def measure(events: list[Record], metrics: list[Record]) -> Goodput:
    """The buckets of a run so far, in one sweep over its records in the order of their times."""
    found, sweep = Goodput(), _Sweep()
    marks = _marks(events, metrics)
    for number, (at, name, record) in enumerate(marks):
        if number:
            for bucket, seconds in sweep.split(max(0.0, at - marks[number - 1][0]), name, record).items():
                found.seconds[bucket] += seconds
        sweep.enter(name, record)
        if name == EVENT:
            found.num_restarts += 1
            found.lost_steps += _number(record, "lost_steps")
    return found


def restart_event(run: RunDir, *, cause: str, wait_s: float = 0.0) -> Record:
    """The fields of the event `restart` for a run that failed and is about to go on, as its files are.

    Call it before anything of the run is started again: resuming drops the metrics of lost steps. lost_s counts from
    the last checkpoint (or the start of training), detect_s from the last sign of the run; `wait_s` is the pause that
    follows the event.
    """
    events, metrics = read_jsonl(run.events_jsonl), read_jsonl(run.metrics_jsonl)
    now = time.time()
    begin = max((position for position, event in enumerate(events) if event.get("event") == "plan"), default=0)
    from_step = newest_step(run)
    last_step = max([from_step, *(_number(record, "step") for record in metrics if record.get("kind") == "train")])
    anchors = [event for event in events[begin:] if event.get("event") in ("start", "resume", "checkpoint")]
    signs = [_time(event) for event in events if event.get("event") in SIGNS] + [_time(record) for record in metrics]
    event = {
        "event": EVENT,
        "time": now,
        "cause": cause,
        "attempt": 1 + sum(event.get("event") == EVENT for event in events),
        "from_step": from_step,
        "lost_steps": last_step - from_step,
        "lost_s": round(max(0.0, now - _time(anchors[-1])), 3) if anchors else 0.0,
        "detect_s": round(max(0.0, now - max(signs, default=now)), 3),
        "wait_s": round(wait_s, 3),
    }
    goodput = measure([*events, event], metrics).goodput
    return event | {"goodput": None if goodput is None else round(goodput, 4)}


def newest_step(run: RunDir) -> int:
    """The step of the newest checkpoint by its name; its content is not looked at."""
    steps = [path.parent.name.removeprefix("step_") for path in run.checkpoints.glob("step_*/MANIFEST.json")]
    return max((int(step) for step in steps if step.isdecimal()), default=0)


@dataclass
class _Sweep:
    """What the run is doing between two records."""

    state: str = "other"
    opening: str = "other"
    """What the time counts as until the attempt goes on where its checkpoint is."""
    replayed_until: int = 0
    """Steps up to this one have been done before."""
    wait_s: float = 0.0

    def split(self, seconds: float, name: str, record: Record) -> dict[str, float]:
        """The seconds before a record, by bucket."""
        if self.state == "gone" or (name in OPENINGS and self.state == "train"):
            return {}
        if name == EVENT:
            # Until the last sign there was work, whose records a resumed run has replaced.
            detect = min(seconds, max(0.0, _number(record, "detect_s", 0.0)))
            return {"detect": detect, self._work(_last_step(record)): seconds - detect}
        if name == backoff.EVENT:
            return {"detect": seconds}
        if self.state == "restart":
            waited = min(seconds, self.wait_s)
            self.wait_s -= waited
            return {"wait": waited, "restart": seconds - waited}
        if name == "resume":
            return {self.opening: seconds}
        if self.state == "train" and name in ("eval", "samples", "proof", *ENDINGS):
            return {"other": seconds}
        saved = min(seconds, max(0.0, _number(record, "time_s", 0.0))) if name == "checkpoint" else 0.0
        return {"save": saved, self._work(_number(record, "step")): seconds - saved}

    def _work(self, step: int) -> str:
        is_again = self.state == "train" and step <= self.replayed_until
        return "replay" if is_again else self.state

    def enter(self, name: str, record: Record) -> None:
        if name in (EVENT, backoff.EVENT):
            self.state = self.opening = "restart"
            self.wait_s = max(0.0, _number(record, "wait_s", 0.0))
            done = _last_step(record) if name == EVENT else _number(record, "step")
            self.replayed_until = max(self.replayed_until, done)
        elif name in ENDINGS:
            self.state = "gone"
        elif name in ("start", "resume", "checkpoint", "train", "eval", "samples"):
            self.state = "train"
        elif name in OPENINGS and self.state != "restart":
            self.state = self.opening = "other"


def _marks(events: list[Record], metrics: list[Record]) -> list[tuple[float, str, Record]]:
    """(time, name, record) of what tells where a run was, in the order of time."""
    marks = []
    for event in events:
        name = event.get("event")
        if _time(event) <= 0.0 or name not in (*SIGNS, *ENDINGS, EVENT, backoff.EVENT):
            continue
        marks.append((_time(event), str(name), event))
    for record in metrics:
        if _time(record) > 0.0 and record.get("kind") in ("train", "eval"):
            marks.append((_time(record), record["kind"], record))
    marks.sort(key=lambda mark: mark[0])
    # An error that a restart follows is no end, and nobody was gone.
    return [
        mark
        for number, mark in enumerate(marks)
        if mark[1] != "error" or number + 1 == len(marks) or marks[number + 1][1] != EVENT
    ]


def _last_step(restart: Record) -> int:
    return int(_number(restart, "from_step") + _number(restart, "lost_steps"))


def _time(record: Record) -> float:
    return float(_number(record, "time", 0.0))


def _number(record: Record, key: str, default: Any = 0) -> Any:
    value = record.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else default
