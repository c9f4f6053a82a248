"""What happened in a run, in numbers: run directory -> Facts -> summary. Reads files only; the run need not be over."""

from dataclasses import dataclass
from typing import Any

from . import goodput
from .errors import ConfigError
from .run_dir import RunDir, read_json, read_jsonl

FIRST_EVENTS = ("plan", "data", "model", "start")
"""Events that open an attempt, in any order."""
ENDINGS = {"finish": "finished", "interrupt": "interrupted", "error": "failed", "fatal": "failed"}
HIGHER_IS_BETTER = ("accuracy", "macro_f1", "token_accuracy")


@dataclass(frozen=True)
class Facts:
    """All that the files of a run say."""

    run: RunDir
    config_yaml: str
    plan: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]
    events: list[dict[str, Any]]
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    def last_event(self, name: str) -> dict[str, Any]:
        return next((event for event in reversed(self.events) if event.get("event") == name), {})


def read_facts(run: RunDir) -> Facts:
    if not run.is_run:
        raise ConfigError(f"{run.path} is no run directory (no plan.json or config.yaml in it)")
    records = read_jsonl(run.metrics_jsonl)
    samples = read_json(run.samples_json, [])
    return Facts(
        run=run,
        config_yaml=run.config_yaml.read_text(encoding="utf-8", errors="replace") if run.config_yaml.exists() else "",
        plan=_dict(read_json(run.plan_json)),
        data=_dict(read_json(run.data_json)),
        environment=_dict(read_json(run.env_json)),
        events=read_jsonl(run.events_jsonl),
        train=_last_of_each([record for record in records if record.get("kind") == "train"]),
        evals=_last_of_each([record for record in records if record.get("kind") == "eval"]),
        samples=[sample for sample in samples if isinstance(sample, dict)] if isinstance(samples, list) else [],
    )


def summarise(facts: Facts) -> dict[str, Any]:
    """The headline numbers. Under `change`, `relative` is after/before - 1; times are in seconds."""
    run, config = facts.run, _dict(facts.plan.get("config"))
    steps = facts.train[-1]["step"] if facts.train else 0
    tokens, time_s = (sum(record.get(key) or 0 for record in facts.train) for key in ("tokens", "time_s"))
    memory = [record.get("memory_bytes") or 0 for record in facts.train]
    memory.append(facts.last_event("finish").get("peak_memory_bytes") or 0)
    spent = goodput.measure(facts.events, facts.train + facts.evals)
    model = {key: value for key, value in facts.last_event("model").items() if key not in ("event", "time")}
    validation = [record for record in facts.evals if record.get("split") == "validation"]
    tests = [record for record in facts.evals if record.get("split") == "test"]
    before = numbers(validation[0]) if validation and validation[0]["step"] == 0 else {}
    after = numbers(validation[-1]) if validation and validation[-1]["step"] > 0 else {}
    return {
        "name": config.get("name", run.name),
        "status": status(facts),
        "task": _dict(config.get("task")).get("type"),
        "method": _dict(config.get("adapter")).get("method"),
        "model": model,
        "steps": steps,
        "total_steps": facts.last_event("start").get("total_steps"),
        "validation": {"before": before, "after": after, "change": change(before, after)},
        "test": numbers(tests[-1]) if tests else {},
        "wall_time_s": round(spent.wall_s, 3),
        "num_attempts": num_attempts(facts),
        "goodput": spent.to_dict(),
        "tokens": tokens,
        "tokens_per_s": round(tokens / time_s, 3) if time_s else None,
        "peak_memory_bytes": max(memory) or None,
        "proof": {k: v for k, v in facts.last_event("proof").items() if k not in ("event", "time")},
        "paths": paths(run),
        "versions": facts.environment.get("libraries", {}),
    }


def status(facts: Facts) -> str:
    """finished, interrupted or failed, as the last attempt ended; else unfinished."""
    result = "unfinished"
    for event in facts.events:
        name = event.get("event")
        result = ENDINGS.get(str(name), "unfinished" if name in FIRST_EVENTS else result)
    if result == "unfinished" and facts.run.fatal_json.exists():
        return "failed"
    return "interrupted" if result == "unfinished" and facts.run.stop.exists() else result


def num_attempts(facts: Facts) -> int:
    """How often the run was started, by users and after failures."""
    timed = [(event["time"], event.get("event")) for event in facts.events if isinstance(event.get("time"), float)]
    timed += [(record["time"], "metrics") for record in facts.train + facts.evals if record.get("time")]
    names = [name for _, name in sorted(timed, key=lambda item: item[0])]
    return sum(
        number == 0 or (name in FIRST_EVENTS and names[number - 1] not in FIRST_EVENTS)
        for number, name in enumerate(names)
    )


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    """The metrics of an eval record with their step."""
    return {key: value for key, value in record.items() if key not in ("kind", "split", "time", "non_finite")}


def change(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """For each metric of both: the difference, the relative change, and whether it is for the better."""
    result = {}
    for key in before.keys() & after.keys() - {"step", "count"}:
        old, new = before[key], after[key]
        if not isinstance(old, (int, float)) or not isinstance(new, (int, float)):
            continue
        is_better = new > old if key in HIGHER_IS_BETTER else new < old
        relative = new / old - 1 if old else None
        result[key] = {"difference": new - old, "relative": relative, "is_better": is_better}
    return dict(sorted(result.items()))


def paths(run: RunDir) -> dict[str, str]:
    """What lies in the run directory, relative to it."""
    found = {"report": "report.html", "metrics": "metrics.jsonl", "config": "config.yaml"}
    for folder in ("adapter", "model", "tensorboard"):
        if (run.path / folder).is_dir():
            found[folder] = folder
    checkpoints = sorted(path.name for path in run.checkpoints.glob("step_*") if (path / "MANIFEST.json").exists())
    return found | ({"checkpoint": f"checkpoints/{checkpoints[-1]}"} if checkpoints else {})


def _last_of_each(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record per split and step, the one written last, in the order of the steps."""
    found = {(r.get("split"), r["step"]): r for r in records if isinstance(r.get("step"), int)}
    return sorted(found.values(), key=lambda record: record["step"])


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
