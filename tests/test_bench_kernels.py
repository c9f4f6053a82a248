"""The benchmark of the operations, and the session that measures on a GPU machine."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from burnish.bench import bench_kernels, gpu_session
from burnish.bench.gpu_session import Part
from burnish.bench.op_runs import Run
from burnish.bench.table import kernel_table
from burnish.kernels.registry import OPS
from burnish.launch.cli import main

SMALL = {"M": 32, "K": 48, "p": 0.1}
DROPOUT = replace(OPS["dropout"], bench_cases=(SMALL, SMALL))
PEAK = {"bytes_per_s": 1e9, "flops_per_s": 1e9}


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    """One operation on a small case, and no time spent on the peaks."""
    monkeypatch.setattr(bench_kernels, "OPS", {"dropout": DROPOUT})
    monkeypatch.setattr(bench_kernels.Stopwatch, "peaks", lambda *_: PEAK)


def wrong(op, *, function):
    return replace(op, function=function, is_exact=False)


def test_the_verb_measures_an_operation_against_its_reference(capsys, tmp_path):
    out = tmp_path / "kernels.json"
    code = main(
        ["bench", "kernels", "--ops", "dropout", "--quick", "--steps", "3", "--threads", "1", "--out", str(out)]
    )
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    assert "x reference" in captured.out
    result = json.loads(out.read_text())
    assert {"time", "command", "environment", "peaks", "num_rounds", "num_threads"} <= result.keys()
    [row] = result["rows"]  # equal cases are timed once
    assert row["state"] == "ok"
    assert [set(turn) for turn in row["rounds"]] == [{"burnish", "reference"}] * 3
    assert row["ratio"]["reference"]["median"] > 0
    assert row["num_bytes"] == 8.0 * 32 * 48
    assert row["share_of_peak"] == pytest.approx(row["num_bytes"] / 1e9 / row["time_s"]["burnish"]["median"])


def test_a_wrong_operation_is_void_and_gets_no_ratio(monkeypatch):
    op = wrong(DROPOUT, function=lambda x, **options: DROPOUT.reference(x, **options) * 1.05)
    monkeypatch.setattr(bench_kernels, "OPS", {"dropout": op})
    result = bench_kernels.measure(["dropout"], num_rounds=2, is_compiled=False, say=lambda _: None)
    [row] = result["rows"]
    assert row["state"] == "void"
    assert "off by" in row["reason"]
    assert "ratio" not in row
    assert "void" in kernel_table(result)


def test_an_operation_that_fails_leaves_the_others_their_rows(monkeypatch):
    def fails(**_):
        raise RuntimeError("no such instruction")

    ops = {"broken": replace(wrong(DROPOUT, function=fails), name="broken"), "dropout": DROPOUT}
    monkeypatch.setattr(bench_kernels, "OPS", ops)
    result = bench_kernels.measure(list(ops), num_rounds=2, is_compiled=False, say=lambda _: None)
    assert [(row["op"], row["state"]) for row in result["rows"]] == [("broken", "failed"), ("dropout", "ok")]
    assert "no such instruction" in kernel_table(result)


def test_what_is_compiled_takes_its_turn_as_well(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    result = bench_kernels.measure(["dropout"], num_rounds=2, is_compiled=True, say=lambda _: None)
    assert set(result["rows"][0]["ratio"]) == {"reference", "compiled"}


def test_a_compiler_that_fails_leaves_the_row_without_that_ratio(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fails)
    result = bench_kernels.measure(["dropout"], num_rounds=2, is_compiled=True, say=lambda _: None)
    [row] = result["rows"]
    assert row["not_compiled"] == "no compiler"
    assert set(row["ratio"]) == {"reference"}
    kernel_table(result)


def test_an_interruption_keeps_the_rows_there_are(monkeypatch):
    calls = []

    def interrupted(op, *_, **__):
        calls.append(op.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {"op": op.name, "case": "", "state": "void", "reason": "for a test"}

    monkeypatch.setattr(bench_kernels, "OPS", {"one": replace(DROPOUT, name="one"), "two": DROPOUT})
    monkeypatch.setattr(bench_kernels, "measure_case", interrupted)
    result = bench_kernels.measure(["one", "two"], num_rounds=2, is_compiled=False, say=lambda _: None)
    assert result["is_interrupted"]
    assert [row["op"] for row in result["rows"]] == ["one"]
    assert "interrupted" in kernel_table(result)


def test_saved_bytes_count_what_backward_needs_without_the_inputs():
    x = torch.randn(8, 8, requires_grad=True)
    assert bench_kernels.saved_bytes(Run.prepare(lambda x: x.exp(), {"x": x})) == 8 * 8 * 4
    assert bench_kernels.saved_bytes(Run.prepare(lambda x: x * x, {"x": x})) == 0


@pytest.mark.parametrize("name", OPS)
def test_the_cases_for_a_cpu_can_be_made_and_are_small(name):
    op = OPS[name]
    cases = bench_kernels.cases_on(op, "cpu")
    assert cases
    for case in cases:
        op.make_inputs(case, op.dtypes[0], "cpu", torch.Generator().manual_seed(0))
    assert all(isinstance(bench_kernels.describe(case), str) for case in cases)
    for of in (op.num_bytes, op.num_flops):
        assert all(0 < of(case) < 1e12 for case in cases) if of else True


def test_a_gpu_session_keeps_what_it_has(monkeypatch, tmp_path, capsys):
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


def test_the_parts_of_a_gpu_session_are_commands_there_are(tmp_path):
    from burnish.bench.modes import MODES
    from burnish.bench.workload import MODELS
    from burnish.launch.cli import make_parser

    for part in gpu_session.parts(tmp_path):
        if part.arguments[0] == "burnish.launch.cli":
            options = make_parser("bench").parse_args(part.arguments[2:])
            assert options.model in (None, *MODELS)
            assert set((options.modes or "peft").split(",")) <= set(MODES)
