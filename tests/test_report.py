"""The report: everything escaped, nothing loaded from outside, and right numbers for runs of every kind and state."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from burnish.harness.charts import MAX_BUCKETS, Series, chart, decimated, picture, smoothed, ticks, unbroken
from burnish.harness.errors import ConfigError
from burnish.harness.markup import Markup, duration, number, size, tag
from burnish.harness.plan import Decision
from burnish.harness.report import write_report
from burnish.harness.run_dir import RunDir, append_jsonl, read_json, write_json

START = 1_700_000_000.5
EVIL = "<script>alert('x')</script>\"'&\x00\ud800"


def make_run(path: Path, *, num_steps: int = 60, task: str = "causal_lm", text: str = "def add(a, b):") -> RunDir:
    """A run directory as the worker and the launcher leave it just before the last events."""
    run = RunDir.create(path, mode="new")
    run.config_yaml.write_text(f"name: {path.name}\nmodel:\n  path: package:some/model.gguf\n")
    decision = Decision("micro_batch_size", "4", "largest divisor up to 8 of the worker's share")
    write_json(
        run.plan_json,
        {
            "config": {
                "name": path.name,
                "task": {"type": task},
                "adapter": {"method": "lora"},
                "train": {"global_batch_size": 8},
            },
            "run_dir": str(path),
            "cwd": str(path.parent),
            "device": "cpu",
            "world_size": 2,
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "engine": "deepspeed",
            "zero_stage": 2,
            "decisions": [decision.__dict__],
        },
    )
    libraries = {"burnish": "0.1.0", "torch": "2.13.0", "bitsandbytes": "0.50.2"}
    write_json(run.env_json, {"python": "3.11.7", "libraries": libraries, "memory_bytes": 2**34, "git_commit": "abc"})
    write_json(run.data_json, {"counts": {"train": {"rows": 1000, "kept": 990, "rejected": {"empty": 10}}}})
    write_json(run.samples_json, [{"prompt": text, "reference": "Add.", "before": "I am a", "after": "Return a + b."}])
    add_event(run, "model", 0, name="some/model", dtype="bf16", total=134_515_008, trainable=4_884_480)
    add_event(run, "start", 1, total_steps=num_steps, steps_per_epoch=125.0)
    add_eval(run, "validation", 0, task=task)
    for step in range(1, num_steps + 1):
        add_step(run, step)
        if step % 20 == 0:
            add_eval(run, "validation", step, task=task)
            add_event(run, "checkpoint", 2 + step, step=step, path=f"checkpoints/step_{step:08d}", time_s=0.4)
    return run


def add_event(run: RunDir, event: str, after_s: float, /, **fields: Any) -> None:
    append_jsonl(run.events_jsonl, {"event": event, "time": START + after_s} | fields)


def add_step(run: RunDir, step: int) -> None:
    loss = 3.2 * math.exp(-step / 40) + 0.9 + 0.25 * math.sin(step * 2.3) * math.exp(-step / 90)
    fields = {"loss": loss, "lr": 2e-4 * (1 - step / 100), "grad_norm": 1.0 + 0.3 * math.sin(step), "tokens": 1500}
    fields |= {"time_s": 1.0, "tokens_per_s": 1500 + 80 * math.cos(step), "memory_bytes": 2**30 + step * 2**20}
    append_jsonl(
        run.metrics_jsonl, {"kind": "train", "step": step, "skipped": False, "time": START + 2 + step} | fields
    )


def add_eval(run: RunDir, split: str, step: int, *, task: str = "causal_lm") -> None:
    loss = 3.0 * math.exp(-step / 40) + 1.0
    extra = {"accuracy": 0.5 + step / 200, "macro_f1": 0.4 + step / 200}
    extra = {"perplexity": math.exp(loss)} if task == "causal_lm" else extra
    append_jsonl(run.metrics_jsonl, {"kind": "eval", "split": split, "step": step, "loss": loss} | extra)


def finish(run: RunDir) -> RunDir:
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").touch()
    add_event(run, "proof", 64, path="adapter", live=1.25, reloaded=1.25, difference=0.0)
    add_event(run, "finish", 65, run_dir=str(run.path), steps=60, peak_memory_bytes=3 * 2**30)
    return run


def html_of(run: RunDir) -> str:
    write_report(run)
    return run.report_html.read_text(encoding="utf-8")


class Checker(HTMLParser):
    """Collects tags and attributes, and fails on elements that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for key, value in attrs:
            self.attributes.setdefault(key, []).append(value or "")
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    return checker


def test_a_finished_run_is_summarised(tmp_path: Path) -> None:
    run = finish(make_run(tmp_path / "small"))
    summary = write_report(run)
    assert summary == read_json(run.summary_json)
    assert summary["name"] == "small"
    assert summary["status"] == "finished"
    assert (summary["steps"], summary["total_steps"]) == (60, 60)
    assert summary["validation"]["before"]["loss"] == 4.0
    assert summary["validation"]["after"]["step"] == 60
    change = summary["validation"]["change"]["loss"]
    assert change["difference"] == pytest.approx(3 * math.exp(-1.5) - 3)
    assert change["relative"] == pytest.approx((3 * math.exp(-1.5) + 1) / 4 - 1)
    assert change["is_better"]
    assert summary["wall_time_s"] == 65
    assert summary["tokens"] == 90_000
    assert summary["tokens_per_s"] == 1500
    assert summary["peak_memory_bytes"] == 3 * 2**30
    assert summary["paths"]["adapter"] == "adapter"
    assert summary["versions"]["torch"] == "2.13.0"
    assert summary["proof"]["difference"] == 0


def test_the_page_shows_all_that_it_should(tmp_path: Path) -> None:
    html = html_of(finish(make_run(tmp_path / "small")))
    check(html)
    for title in ("Curves", "Validation and test", "Before and after", "Plan", "Proof of the save", "Data", "History"):
        assert f"<h2>{title}</h2>" in html
    for title in ("Loss", "Learning rate", "Gradient norm", "Tokens per second", "Memory (GiB)"):
        assert f"<b>{title}</b>" in html
    assert "largest divisor up to 8 of the worker&#x27;s share" in html
    assert "8 examples a step = 4 per micro-batch × 1 accumulated × 2 workers" in html
    assert "name: small" in html
    assert f"burnish train {tmp_path}/small/config.yaml name=small-again" in html
    assert "pip install torch==2.13.0 bitsandbytes==0.50.2" in html
    assert "Return a + b." in html
    assert "3.63% of 134.5M" in html


def test_the_page_needs_nothing_from_outside_and_runs_no_script(tmp_path: Path) -> None:
    html = html_of(finish(make_run(tmp_path / "small")))
    checker = check(html)
    assert not checker.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not checker.attributes.keys() & {"src", "href", "srcset", "onload", "onclick", "action", "xlink:href"}
    assert not re.search(r"url\(|@import|https?:", html)
    assert "default-src &#x27;none&#x27;" in html or "default-src 'none'" in html


def test_hostile_content_stays_text_everywhere(tmp_path: Path) -> None:
    run = make_run(tmp_path / "small", text=EVIL)
    add_event(run, EVIL, 70, **{EVIL: EVIL})
    append_jsonl(run.metrics_jsonl, {"kind": "eval", "split": EVIL, "step": 61, "loss": 1.0, EVIL: 2.0})
    write_json(run.env_json, {EVIL: EVIL, "libraries": {EVIL: EVIL}, "git_commit": EVIL})
    write_json(run.data_json, {"counts": {EVIL: EVIL}})
    plan = read_json(run.plan_json)
    plan |= {"cwd": EVIL, "engine": EVIL, "decisions": [{"key": EVIL, "value": EVIL, "why": EVIL}]}
    plan["config"] |= {"name": EVIL, "task": {"type": EVIL}, "model": {"path": EVIL}}
    write_json(run.plan_json, plan)
    run.config_yaml.write_text("</pre><script>alert(1)</script>")
    checker = check(html_of(run))
    assert "script" not in checker.tags
    assert "<script" not in run.report_html.read_text(encoding="utf-8")
    assert "\x00" not in run.report_html.read_text(encoding="utf-8")


def test_classification_shows_accuracy_in_points_and_has_its_curves(tmp_path: Path) -> None:
    run = finish(make_run(tmp_path / "sorted", task="sequence_classification"))
    html = html_of(run)
    assert "Validation accuracy" in html
    assert "Validation macro F1" in html
    assert "+30.0 points" in html
    assert "<b>Accuracy (%)</b>" in html
    assert "<b>Macro F1 (%)</b>" in html
    assert "perplexity" not in html
    change = read_json(run.summary_json)["validation"]["change"]["accuracy"]
    assert change["difference"] == pytest.approx(0.3)
    assert change["is_better"]


def test_a_run_that_got_worse_is_not_painted_green(tmp_path: Path) -> None:
    run = make_run(tmp_path / "small", num_steps=10)
    append_jsonl(
        run.metrics_jsonl, {"kind": "eval", "split": "validation", "step": 10, "loss": 5.0, "perplexity": 148.0}
    )
    html = html_of(run)
    assert '<span class="bad">+25.0%</span>' in html
    assert not read_json(run.summary_json)["validation"]["change"]["loss"]["is_better"]


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], "unfinished"),
        (["interrupt"], "interrupted"),
        (["interrupt", "model", "start"], "unfinished"),
        (["interrupt", "model", "start", "finish"], "finished"),
        (["error"], "failed"),
    ],
)
def test_the_status_is_that_of_the_last_attempt(tmp_path: Path, events: list[str], expected: str) -> None:
    run = make_run(tmp_path / "small", num_steps=5)
    for i, name in enumerate(events):
        add_event(run, name, 100 + i)
    assert write_report(run)["status"] == expected
    assert expected in html_of(run)


def test_a_run_that_was_told_to_stop_is_interrupted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "small", num_steps=5)
    run.stop.touch()
    assert write_report(run)["status"] == "interrupted"


def test_image_samples_are_drawn_and_classes_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits", num_steps=5, task="image_classification")
    answer = {"label": "<7>", "probability": 0.984}
    write_json(run.samples_json, [{"prompt": [[0, 16], [8, 0]], "reference": "7", "before": answer, "after": answer}])
    html = html_of(run)
    check(html)
    assert html.count("<rect") == 4
    assert 'fill="#ffffff"' in html
    assert "&lt;7&gt; (98.4%)" in html
    assert "Examples per second" in html


def test_only_images_are_drawn_as_pictures() -> None:
    assert picture(["a", "b"]) is None
    assert picture([[1, 2], [3]]) is None
    assert picture([1, 2, 3]) is None
    assert picture([]) is None
    assert (picture([[[0, 0, 255]] * 100] * 100) or "").count('fill="#0000ff"') == 25 * 25


def test_time_between_attempts_does_not_count(tmp_path: Path) -> None:
    run = make_run(tmp_path / "small", num_steps=20)
    add_event(run, "interrupt", 30)
    add_event(run, "model", 5000)
    add_event(run, "start", 5001)
    add_event(run, "finish", 5010)
    summary = write_report(run)
    assert summary["num_attempts"] == 2
    assert summary["wall_time_s"] == 40
    assert "in 2 attempts" in html_of(run)


def test_a_run_that_never_began_has_a_report_too(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "small", mode="new")
    run.config_yaml.write_text("name: small\n")
    html = html_of(run)
    check(html)
    assert read_json(run.summary_json)["status"] == "unfinished"
    assert "Curves" not in html


def test_damaged_files_are_survived(tmp_path: Path) -> None:
    run = make_run(tmp_path / "small", num_steps=5)
    for path in (run.plan_json, run.env_json, run.samples_json, run.data_json):
        path.write_text('{"torn": ')
    with run.metrics_jsonl.open("a") as file:
        file.write('{"kind": "train"}\n{"kind": "train", "step": "x"}\n[1]\n{"kind": "tra')
    check(html_of(run))


def test_a_non_finite_step_is_a_gap_and_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "small", num_steps=20)
    record = {"kind": "train", "step": 21, "loss": None, "non_finite": ["loss"], "tokens": 1, "time_s": 1.0}
    append_jsonl(run.metrics_jsonl, record)
    assert "Skipped or not finite at step 21" in html_of(run)


def test_a_folder_that_is_no_run_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        write_report(tmp_path)
    with pytest.raises(ConfigError):
        write_report(RunDir(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_long_run_makes_a_small_page_that_keeps_the_spikes(tmp_path: Path) -> None:
    points: list[tuple[float, float | None]] = [(step, math.sin(step)) for step in range(100_000)]
    points[54_321] = (54_321, 99.0)
    points[70_000] = (70_000, None)
    kept = decimated(points)
    assert len(kept) <= 2 * MAX_BUCKETS + 1
    assert (54_321, 99.0) in kept
    assert len(unbroken(kept)) == 2
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 100, count=4) == [0, 25, 50, 75, 100]
    assert ticks(1, 200, count=6, whole=True) == [50, 100, 150, 200]
    assert ticks(0, 3, count=6, whole=True) == [0, 1, 2, 3]
    assert ticks(0, 2e-4, count=4) == pytest.approx([0, 5e-5, 1e-4, 1.5e-4, 2e-4])
    assert ticks(-1, 1, count=2) == [-1, 0, 1]


def test_smoothing_keeps_a_constant_and_the_gaps() -> None:
    points: list[tuple[float, float | None]] = [(step, 2.0) for step in range(100)]
    points[50] = (50, None)
    values = [y for _, y in smoothed(points)]
    assert values[50] is None
    assert [y for y in values if y is not None] == pytest.approx([2.0] * 99)


@pytest.mark.parametrize("points", [[(0, 1.0)], [(0, 0.0)], [(3, 5.0), (4, 5.0)], [(0, 1e-30), (1, 1e30)], [(0, -2.0)]])
def test_a_chart_of_few_or_extreme_points_can_be_drawn(points: list[tuple[float, float | None]]) -> None:
    drawn = chart("Loss", [Series("training", points, "blue")], floor=0.0, width="half")
    assert "<svg" in drawn
    assert "nan" not in drawn


def test_a_chart_without_a_number_is_nothing() -> None:
    assert chart("Loss", [Series("a", [], "blue"), Series("b", [(1, None)], "blue")], width="half") == ""


def test_everything_but_markup_is_escaped() -> None:
    assert tag("p", "<b>", Markup("<i>")) == "<p>&lt;b&gt;<i></p>"
    assert tag("p", class_='"><script>', lang=None) == '<p class="&quot;&gt;&lt;script&gt;"></p>'


def test_numbers_are_written_for_people() -> None:
    assert [number(value) for value in (None, 0, 3, 1234, 12_345, 134_515_008, 2e-4, 0.00015, 2.34567, True)] == [
        "–", "0", "3", "1234", "12.35k", "134.5M", "2e-4", "1.5e-4", "2.346", "True",
    ]  # fmt: skip
    sizes = [size(value) for value in (None, 12, 2**20, 1.5 * 2**30, 1010 * 2**20)]
    assert sizes == ["–", "12 B", "1 MiB", "1.5 GiB", "1010 MiB"]
    assert [duration(value) for value in (None, 4.21, 192, 7500)] == ["–", "4.2 s", "3 min 12 s", "2 h 05 min"]


def test_the_summary_is_json_for_every_tool(tmp_path: Path) -> None:
    run = make_run(tmp_path / "small", num_steps=2)
    write_report(run)
    json.loads(run.summary_json.read_text(), parse_constant=pytest.fail)
