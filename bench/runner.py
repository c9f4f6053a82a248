"""Runs a benchmark item by item: progress with an estimate of what is left, and a file that always holds what there is.

No torch here.
"""

import fnmatch
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..harness.errors import ConfigError
from ..harness.markup import duration
from . import record
from .benchmark import NOT_MEASURED, Benchmark, Choice, Item, Result, Row, Setting, completed, not_measured

OUT_OF_TIME = "the time given to the run was over"
SAME = ("benchmark", "hardware", "options_hash")
"""Fields of a result that must be alike where one run goes on with another's rows."""


def chosen(items: Sequence[Item], only: Sequence[str], *, name: str) -> list[Item]:
    """The items whose keys match a pattern (all without patterns); a pattern is also a part of a key.

    Raises ConfigError for a pattern that matches none.
    """
    for pattern in only:
        if not any(matches(item.key, pattern) for item in items):
            raise ConfigError(f"--only {pattern!r} is nothing that {name} measures here; --list shows what there is")
    return [item for item in items if not only or any(matches(item.key, pattern) for pattern in only)]


def matches(key: str, pattern: str) -> bool:
    return fnmatch.fnmatch(key, pattern if "*" in pattern else f"*{pattern}*")


def run(
    benchmark: Benchmark,
    setting: Setting,
    choice: Choice,
    *,
    path: Path | None = None,
    limit_s: float = float("inf"),
    is_resumed: bool = False,
) -> Result:
    """Measures every chosen item; no new one begins if it would end after `limit_s`. Ctrl-C keeps what there is.

    After every row the file at `path` is whole. `is_resumed` takes over the items that an interrupted run has measured
    there in the same way. Raises ConfigError; KeyboardInterrupt where nothing was measured yet.
    """
    items = chosen(benchmark.items(setting.device, choice), choice.only, name=benchmark.name)
    start = time.perf_counter()
    result = record.opened(benchmark.name, setting, choice, benchmark.prepare(setting))
    if is_resumed and path is not None and path.exists():
        result["rows"], items = gone_on_with(record.load(path), result, items, path=path)
    progress = Progress(items)
    try:
        for item in items:
            if time.perf_counter() - start + progress.scaled(item.cost_s) > limit_s:
                result["rows"] += not_measured(item, OUT_OF_TIME)
                continue
            setting.say(f"{benchmark.name} {progress.line(item)}")
            for row in benchmark.measure(item, setting):
                result["rows"].append(row)
                keep(path, result)
            progress.done(item)
        result["is_interrupted"] = False
    except KeyboardInterrupt:
        if not result["rows"]:
            raise
        setting.say("interrupted: what was measured so far is kept")
    result["time_s"] = time.perf_counter() - start
    result = completed(result, items, reason="the run was interrupted")
    keep(path, result)
    return result


def gone_on_with(before: Result, now: Result, items: Sequence[Item], *, path: Path) -> tuple[list[Row], list[Item]]:
    """The rows of items that were measured whole, and the other items, with what there is of theirs in `before`.

    Raises ConfigError where something else was measured.
    """
    for name in SAME:
        if before[name] != now[name]:
            raise ConfigError(f"--resume: {path} was measured with another {name.replace('_hash', '')}")
    for name in ("libraries", "git_commit"):
        if (was := before["environment"].get(name)) != (is_now := now["environment"].get(name)):
            raise ConfigError(f"--resume: {path} was measured with the {name} {was}, now there is {is_now}")
    rows = {row["key"]: row for row in before["rows"] if row["state"] != NOT_MEASURED}
    kept: list[Row] = []
    left = []
    for item in items:
        found = [rows[key] for key in item.rows if key in rows]
        if len(found) == len(item.rows):
            kept += found
        else:
            left.append(replace(item, before=found))
    return kept, left


def keep(path: Path | None, result: Result) -> None:
    if path is not None:
        record.save(path, result)


class Progress:
    """How far a run is: the estimate of what is left scales the costs of the items by how long the others took."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.start_s = time.perf_counter()
        self.num_done = 0
        self.cost_done_s = 0.0

    def scaled(self, cost_s: float) -> float:
        """The cost in seconds of this machine, as far as that is known."""
        elapsed_s = time.perf_counter() - self.start_s
        return cost_s * (elapsed_s / self.cost_done_s if self.cost_done_s else 1.0)

    def line(self, item: Item) -> str:
        left_s = self.scaled(sum(other.cost_s for other in self.items) - self.cost_done_s)
        return f"{self.num_done + 1} of {len(self.items)}, about {duration(left_s)} left: {item.key}"

    def done(self, item: Item) -> None:
        self.num_done += 1
        self.cost_done_s += item.cost_s
