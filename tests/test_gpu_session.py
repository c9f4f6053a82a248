"""The session that measures on a GPU machine: commands there are, in nine minutes, and what it has is kept."""

import json
import sys

from burnish.bench import gpu_session, suite
from burnish.bench.benchmark import Choice
from burnish.bench.gpu_session import Part
from burnish.bench.modes import MODES
from burnish.bench.workload import MODELS
from burnish.launch.cli import make_parser


def test_a_session_keeps_what_it_has(monkeypatch, tmp_path, capsys):
    found = [
        Part("good", ("json.tool", "--help"), 60),
        Part("bad", ("json.tool", "nowhere.json"), 60),
        Part("slow", ("http.server", "0", "--bind", "127.0.0.1"), 2),
        Part("late", ("json.tool", "--help"), -1),
    ]
    monkeypatch.setattr(gpu_session, "parts", lambda _folder: found)
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", str(tmp_path / "results")])
    assert gpu_session.main() == 1
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    states = {part["name"]: part["state"] for part in summary}
    assert states == {"good": "ok", "bad": "failed", "slow": "out of time", "late": "not measured"}
    assert "usage: " in " ".join(summary[0]["tail"])
    assert "good: ok" in capsys.readouterr().out


def test_the_parts_are_commands_there_are_and_fit_in_nine_minutes(tmp_path):
    parts = gpu_session.parts(tmp_path)
    assert sum(part.limit_s for part in parts) <= gpu_session.DEFAULT_SECONDS
    commands = [part.arguments[2:] for part in parts if part.arguments[0] == "burnish.launch.cli"]
    options = [make_parser("bench").parse_args(command) for command in commands]
    assert [one.names for one in options] == [[name] for name in suite.MODULES]
    assert all(one.action == "run" and one.seconds > 0 and one.out == str(tmp_path) for one in options)
    assert all(one.model in (None, *MODELS) for one in options)
    assert all(set((one.modes or "peft").split(",")) <= set(MODES) for one in options)


def test_every_benchmark_has_rows_for_a_gpu():
    for name in suite.MODULES:
        items = suite.benchmark(name).items("cuda", Choice())
        keys = [key for item in items for key in item.rows]
        assert keys
        assert len(set(keys)) == len(keys)
