"""Run directory -> report.html and summary.json. The page needs nothing but itself: no script, no outside resource."""

import json
import shlex
from pathlib import Path
from typing import Any

from .charts import Point, Series, chart, picture, smoothed
from .markup import Markup, duration, join, number, size, tag
from .report_style import STYLE
from .run_dir import RunDir, write_bytes, write_json
from .summary import Facts, read_facts, summarise

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
HEADLINES = ("loss", "perplexity", "accuracy", "macro_f1")
METRIC_NAMES = {"loss": "loss", "perplexity": "perplexity", "accuracy": "accuracy", "macro_f1": "macro F1"}
CURVES_IN_PERCENT = ("accuracy", "macro_f1")
SHARES = (*CURVES_IN_PERCENT, "token_accuracy")
MAX_EVENTS = 200
MAX_TEXT = 20_000
GIB = 2**30


def write_report(run_dir: RunDir | str | Path) -> dict[str, Any]:
    """Writes report.html and summary.json and returns the summary. Raises ConfigError if it is no run."""
    run = run_dir if isinstance(run_dir, RunDir) else RunDir.open(run_dir)
    facts = read_facts(run)
    summary = summarise(facts)
    write_json(run.summary_json, summary)
    write_bytes(run.report_html, page(facts, summary).encode("utf-8", errors="xmlcharrefreplace"))
    return summary


def page(facts: Facts, summary: dict[str, Any]) -> str:
    """The whole HTML page."""
    first = (headline, curves, validation, samples, plan, proof, data, time)
    sections = (*first, history, reproduce, config, environment)
    return document(
        f"{summary['name']} · burnish",
        tag("main", *(one(facts, summary) for one in sections), tag("footer", "Written by burnish report.")),
    )


def document(title: str, body: Markup, *, style: str = "") -> str:
    """A whole HTML page with the style sheet of reports and more of it; it may load and run nothing."""
    head = join(
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        tag("title", title),
        tag("style", Markup(STYLE + style)),
    )
    return "<!doctype html>\n" + tag("html", tag("head", head), tag("body", body), lang="en")


def headline(facts: Facts, summary: dict[str, Any]) -> Markup:
    """Name, status, what was trained, and the numbers that matter most."""
    validated, tiles = summary["validation"], []
    for key in HEADLINES:
        before, after = validated["before"].get(key), validated["after"].get(key)
        if before is None and after is None:
            continue
        change = validated["change"].get(key)
        note = tag("span", _changed(key, change), class_=_better(change)) if change else _so_far(before, after)
        old, new = _metric(key, before), _metric(key, after)
        values = new if before is None else join(tag("i", f"{old} → "), new)
        tiles.append(tile(f"Validation {METRIC_NAMES[key]}", values, note))
    tiles.append(tile("Wall time", duration(summary["wall_time_s"]), _attempts(summary["num_attempts"])))
    unit = "Examples" if summary["task"] == "image_classification" else "Tokens"
    tiles.append(tile(f"{unit} per second", number(summary["tokens_per_s"]), f"{number(summary['tokens'])} in all"))
    tiles.append(tile("Peak memory", size(summary["peak_memory_bytes"]), "of the first worker"))
    trained, total = (summary["model"].get(key) for key in ("trainable", "total"))
    share = f"{trained / total:.2%} of {number(total)}" if trained and total else ""
    tiles.append(tile("Trained parameters", number(trained), share))
    steps = f"step {summary['steps']}" + (f" of {summary['total_steps']}" if summary["total_steps"] else "")
    model = summary["model"].get("name") or _config(facts, "model").get("path")
    line = " · ".join(str(part) for part in (model, summary["task"], summary["method"], steps) if part)
    title = tag("h1", summary["name"], tag("span", summary["status"], class_=f"status {summary['status']}"))
    return join(
        tag("header", title, tag("p", line, class_="soft")),
        tag("div", *tiles, class_="tiles", style=f"--columns: {4 if len(tiles) > 6 else 3}"),
    )


def curves(facts: Facts, summary: dict[str, Any]) -> Markup:
    """Loss, other validation metrics, learning rate, gradient norm, throughput, memory."""
    loss = _points(facts.train, "loss")
    validations = [record for record in facts.evals if record.get("split") == "validation"]
    figures = [
        chart(
            "Loss",
            [
                Series("training, each step", loss, "blue", "faint"),
                Series("training", smoothed(loss), "blue"),
                Series("validation", _points(validations, "loss"), "copper", "marked"),
            ],
            width="full",
        )
    ]
    for key in CURVES_IN_PERCENT:
        series = Series("validation", _scaled(_points(validations, key), 100.0), "copper", "marked")
        title = METRIC_NAMES[key]
        figures.append(chart(f"{title[0].upper()}{title[1:]} (%)", [series], width="half"))
    unit = "Examples" if summary["task"] == "image_classification" else "Tokens"
    for title, key, scale in (
        ("Learning rate", "lr", 1.0),
        ("Gradient norm", "grad_norm", 1.0),
        (f"{unit} per second", "tokens_per_s", 1.0),
        ("Memory (GiB)", "memory_bytes", 1.0 / GIB),
    ):
        points = _scaled(_points(facts.train, key), scale)
        figures.append(chart(title, [Series("", points, "blue")], floor=0.0, width="half"))
    drawn = join(*figures)
    broken = sorted({record["step"] for record in facts.train if record.get("non_finite") or record.get("skipped")})
    warning = f"Skipped or not finite at step {_listed(broken)}: a gap in the curves."
    note = tag("p", warning, class_="bad") if broken else None
    axis = tag("p", "Over the optimizer steps done.", class_="soft")
    return section("Curves", axis, note, tag("div", drawn, class_="charts")) if drawn else Markup("")


def validation(facts: Facts, summary: dict[str, Any]) -> Markup:
    """Every validation and test, one row each."""
    if not facts.evals:
        return Markup("")
    skipped = ("kind", "split", "step", "time", "non_finite")
    keys = sorted({key for record in facts.evals for key in record if key not in skipped}, key=_metric_order)
    rows = [
        [record.get("split"), record["step"], *(_metric(key, record.get(key)) for key in keys)]
        for record in facts.evals
    ]
    names = [METRIC_NAMES.get(key, key.replace("_", " ")) for key in keys]
    return section("Validation and test", table(rows, head=["split", "step", *names], class_="figures"))


def samples(facts: Facts, summary: dict[str, Any]) -> Markup:
    """Each prompt with the answers before and after training."""
    cards = []
    for sample in facts.samples:
        answers = [(key, sample[key]) for key in ("before", "after", "reference") if sample.get(key) is not None]
        shown = [
            tag("div", tag("small", f"{key} training" if key != "reference" else key), _content(answer), class_=key)
            for key, answer in answers
        ]
        prompt = tag("div", tag("small", "prompt"), _content(sample.get("prompt")))
        grid = tag("div", *shown, class_="answers three" if len(shown) > 2 else "answers")
        cards.append(tag("div", prompt, grid if shown else None, class_="sample"))
    return section("Before and after", *cards) if cards else Markup("")


def plan(facts: Facts, summary: dict[str, Any]) -> Markup:
    """The batch arithmetic and every decision with its reason."""
    wanted = facts.plan
    if not wanted:
        return Markup("")
    arithmetic = (
        f"{_config(facts, 'train').get('global_batch_size')} examples a step = {wanted.get('micro_batch_size')} per "
        f"micro-batch × {wanted.get('gradient_accumulation_steps')} accumulated × {wanted.get('world_size')} workers, "
        f"on {wanted.get('device')} with the {wanted.get('engine')} engine, ZeRO stage {wanted.get('zero_stage')}."
    )
    decisions = [item for item in wanted.get("decisions", []) if isinstance(item, dict)]
    rows = [[tag("code", item.get("key")), item.get("value"), item.get("why")] for item in decisions]
    decided = table(rows, head=["decided by burnish", "value", "because"]) if rows else None
    return section("Plan", tag("p", arithmetic), decided)


def proof(facts: Facts, summary: dict[str, Any]) -> Markup:
    """The saved result was loaded again and gave the same loss."""
    found = summary["proof"]
    if not found:
        return Markup("")
    sentence = "The saved result was loaded into a fresh model and gave its loss on one batch again."
    exact = {key: f"{value:.7g}" if isinstance(value, float) else value for key, value in found.items()}
    exact = _inside(facts, exact)
    rows = [[key.replace("_", " "), _value(key, value)] for key, value in exact.items()]
    return section("Proof of the save", tag("p", sentence), table(rows, class_="stack"))


def data(facts: Facts, summary: dict[str, Any]) -> Markup:
    """What was kept and rejected of the data, one column per split."""
    counts = facts.data.get("counts")
    if not isinstance(counts, dict) or not counts:
        return Markup("")
    if all(isinstance(split, dict) for split in counts.values()):
        columns = [dict(_flattened(split)) for split in counts.values()]
        keys = list(dict.fromkeys(key for column in columns for key in column))
        cells = [[key, *(number(column.get(key)) for column in columns)] for key in keys]
        return section("Data", table(cells, head=["", *counts], class_="figures"))
    return section("Data", table([[key, number(value)] for key, value in _flattened(counts)], class_="stack"))


def time(facts: Facts, summary: dict[str, Any]) -> Markup:
    """What the wall time went into, and what failures cost."""
    found = summary["goodput"]
    if not found["wall_s"]:
        return Markup("")
    rows = [
        [bucket, duration(seconds), f"{seconds / found['wall_s']:.1%}"]
        for bucket, seconds in found["seconds"].items()
        if seconds
    ]
    share = "" if found["goodput"] is None else f"Goodput {found['goodput']:.1%}: training over all but other. "
    lost = f"{found['num_restarts']} restarts, {number(found['lost_steps'])} steps lost and repeated."
    return section("Time", tag("p", share + lost), table(rows, head=["", "time", "share"], class_="figures"))


def history(facts: Facts, summary: dict[str, Any]) -> Markup:
    """Checkpoints, restarts and whatever else happened, with the seconds since the first event."""
    events = [event for event in facts.events if event.get("event") not in ("samples", "proof")]
    if not events:
        return Markup("")
    checkpoints = [event for event in events if event.get("event") == "checkpoint"]
    hidden = {id(event) for event in checkpoints[1:-3]}
    shown = [event for event in events if id(event) not in hidden][-MAX_EVENTS:]
    start = events[0].get("time") or 0.0
    rows = []
    for event in shown:
        hidden_keys = ("event", "time", "run_dir", "decisions")
        details = {k: v for k, v in event.items() if k not in hidden_keys and not isinstance(v, dict)}
        clock = duration(event["time"] - start) if isinstance(event.get("time"), (int, float)) else ""
        rows.append([clock, event.get("event"), _details(_inside(facts, details))])
    note = f"{len(checkpoints)} checkpoints; {len(hidden)} of them are not listed." if hidden else None
    return section("History", tag("p", note) if note else None, table(rows, head=["after", "event", "details"]))


def reproduce(facts: Facts, summary: dict[str, Any]) -> Markup:
    """Commands that repeat this run and that use its result."""
    folder = shlex.quote(str(facts.run.path))
    libraries = facts.environment.get("libraries", {})
    # 2.13.0+cpu names a build that the default package index does not have.
    pins = " ".join(f"{name}=={str(version).split('+')[0]}" for name, version in libraries.items() if name != "burnish")
    commit = facts.environment.get("git_commit")
    lines = [f"cd {shlex.quote(str(facts.plan['cwd']))}"] if facts.plan.get("cwd") else []
    lines += (
        [f"# burnish {libraries.get('burnish', '')}" + (f", commit {commit}" if commit else "")] if libraries else []
    )
    lines += [f"pip install {pins}"] if pins else []
    again = shlex.quote(f"{summary['name']}-again"[-100:])
    lines += [f"burnish train {folder}/config.yaml name={again}"]
    lines += [f"burnish train {folder}/config.yaml --resume"] if summary["status"] != "finished" else []
    if summary["status"] == "finished":
        lines += [f"burnish {verb} {folder}" for verb in ("eval", "generate")]
        lines += [f"burnish export {folder} --format merged --out {shlex.quote(summary['name'] + '-merged')}"]
    return section("Reproduce and use", tag("div", tag("pre", "\n".join(lines)), class_="block"))


def config(facts: Facts, summary: dict[str, Any]) -> Markup:
    """The resolved configuration."""
    if not facts.config_yaml:
        return Markup("")
    text = tag("div", tag("pre", facts.config_yaml[:MAX_TEXT]), class_="block")
    return section("Configuration", tag("details", tag("summary", "config.yaml, every value written out"), text))


def environment(facts: Facts, summary: dict[str, Any]) -> Markup:
    """Versions and hardware."""
    rows = _flattened(facts.environment)
    if not rows:
        return Markup("")
    rows = [(key.removeprefix("libraries "), _value(key, value)) for key, value in rows]
    rows = [(key.removesuffix("_bytes").replace("_", " "), value) for key, value in rows]
    return section("Environment", table([list(row) for row in rows if row[1] not in ("–", "")], class_="stack"))


def section(title: str, *content: Any) -> Markup:
    """A part of the page under its heading."""
    return tag("section", tag("h2", title), *content)


def table(rows: list[list[Any]], *, head: list[str] | None = None, class_: str | None = None) -> Markup:
    """A table whose first column names the row; it scrolls sideways where it does not fit."""
    body = [tag("tr", *(tag("td" if i or head else "th", cell) for i, cell in enumerate(row))) for row in rows]
    top = tag("thead", tag("tr", *(tag("th", name) for name in head))) if head else None
    return tag("div", tag("table", top, tag("tbody", *body), class_=class_), class_="scroll")


def tile(name: str, value: Any, note: Any) -> Markup:
    """One headline: what it is, its value, and a remark."""
    return tag(
        "div",
        tag("small", name),
        tag("b", value),
        note if isinstance(note, Markup) else tag("span", note),
        class_="tile",
    )


def _metric(key: str, value: Any) -> str:
    """A metric with the same decimals wherever it stands, so that columns can be compared."""
    if not isinstance(value, (int, float)):
        return number(value)
    if key in SHARES:
        return f"{value:.1%}"
    return f"{value:.3f}" if isinstance(value, float) and 1e-2 <= abs(value) < 1e4 else number(value)


def _changed(key: str, change: dict[str, Any]) -> str:
    if key in SHARES:
        written = f"{100 * change['difference']:+.1f} points"
    else:
        written = f"{change['relative']:+.1%}" if change["relative"] is not None else ""
    return written.replace("-", "−")


def _better(change: dict[str, Any]) -> str:
    return "good" if change["is_better"] else "bad"


def _so_far(before: Any, after: Any) -> Markup:
    return tag("span", "before training" if after is None else "after training", class_="soft")


def _attempts(count: int) -> str:
    return "" if count < 2 else f"in {count} attempts"


def _points(records: list[dict[str, Any]], key: str) -> list[Point]:
    """(step, value) of the records that have the key; a value that is no number is a gap."""
    return [
        (record["step"], record[key] if isinstance(record[key], (int, float)) else None)
        for record in records
        if key in record
    ]


def _scaled(points: list[Point], factor: float) -> list[Point]:
    return [(x, None if y is None else y * factor) for x, y in points]


def _content(value: Any) -> Markup:
    """A prompt or an answer: text as it is, an image as a picture, a class with its probability, the rest as JSON."""
    if isinstance(value, list) and (drawn := picture(value)):
        return drawn
    if isinstance(value, dict) and isinstance(value.get("probability"), float):
        value = f"{value.get('label')} ({value['probability']:.1%})"
    if not isinstance(value, str):
        value = json.dumps(value, indent=2, ensure_ascii=False)
    text = value if len(value) <= MAX_TEXT else value[:MAX_TEXT] + f"\n… {len(value) - MAX_TEXT} more characters"
    return tag("pre", text or "(nothing)", dir="auto", class_=None if text else "soft")


def _inside(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with paths in the run directory written relative to it."""
    prefix = f"{facts.run.path}/"
    return {key: value.removeprefix(prefix) if isinstance(value, str) else value for key, value in fields.items()}


def _details(details: dict[str, Any]) -> str:
    return ", ".join(
        f"{key.removesuffix('_s').removesuffix('_bytes')} {_value(key, value)}" for key, value in details.items()
    )


def _value(key: str, value: Any) -> str:
    if isinstance(value, (dict, list)):
        written = json.dumps(value, ensure_ascii=False)
        return written if len(written) <= 300 else written[:300] + "…"
    if isinstance(value, (int, float)) and key.endswith("_bytes"):
        return size(value)
    if isinstance(value, (int, float)) and key.endswith("_s") and not key.endswith("_per_s"):
        return duration(value)
    return number(value)


def _flattened(fields: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested dicts as (`outer inner`, value) rows; lists joined."""
    rows: list[tuple[str, Any]] = []
    for key, value in fields.items():
        name = f"{prefix} {key}".strip()
        if isinstance(value, dict):
            rows += _flattened(value, name)
        elif isinstance(value, list):
            rows.append((name, ", ".join(_value("", item) for item in value[:20])))
        else:
            rows.append((name, value))
    return rows


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps[:10])) + (f" and {len(steps) - 10} more" if len(steps) > 10 else "")


def _metric_order(key: str) -> tuple[int, str]:
    return (HEADLINES.index(key) if key in HEADLINES else len(HEADLINES), key)


def _config(facts: Facts, section: str) -> dict[str, Any]:
    config = facts.plan.get("config")
    found = config.get(section) if isinstance(config, dict) else None
    return found if isinstance(found, dict) else {}
