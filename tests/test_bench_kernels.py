"""The benchmark of the operations."""

import json
from dataclasses import replace

import pytest
import torch
from burnish.bench import bench_kernels, contenders, runner, shapes
from burnish.bench.bench_kernels import BENCHMARK
from burnish.bench.benchmark import NOT_MEASURED, Choice, Setting, completed
from burnish.bench.stopwatch import Stopwatch
from burnish.bench.table import as_markdown, as_text
from burnish.kernels.registry import OPS

SMALL = {"M": 32, "K": 48, "p": 0.1}
LINEAR = {"M": 24, "K": 32, "N": (16, 8), "r": 4, "p": 0.1}
DROPOUT = replace(OPS["dropout"], bench_cases=(SMALL, SMALL))
LORA = replace(OPS["lora_linear"], bench_cases=(LINEAR,))
PEAK = {"bytes_per_s": 1e9, "flops_per_s": 1e9}


@pytest.fixture
def ops(monkeypatch):
    """Chooses the operations there are, each on its bench_cases; no time is spent on the peaks."""
    monkeypatch.setattr(Stopwatch, "peaks", lambda *_: PEAK)
    monkeypatch.setattr(bench_kernels, "peaks_of", lambda *_: {"bfloat16": PEAK, "float32": PEAK})

    def choose(*found):
        by_name = {op.name: op for op in found}
        monkeypatch.setattr(bench_kernels, "OPS", by_name)
        monkeypatch.setattr(shapes, "OPS", by_name)
        monkeypatch.setattr(shapes, "CASES", {})

    choose(DROPOUT)
    return choose


def measured(*, is_quick=True, path=None, num_rounds=3):
    setting = Setting("cpu", torch.get_num_threads(), num_rounds, is_quick, lambda _: None)
    return runner.run(BENCHMARK, setting, Choice(is_quick=is_quick), path=path)


def told(result):
    return "\n".join(as_text(table) + as_markdown(table) for table in BENCHMARK.tables(result))


def figures(result):
    return {figure.key: figure for row in result["rows"] for figure in BENCHMARK.figures(row)}


def wrong(op):
    def function(x, **options):
        return op.reference(x, **options) * 1.05

    return replace(op, function=function)


def test_an_operation_is_measured_against_its_reference(ops, tmp_path):
    result = measured(path=tmp_path / "kernels.json")
    assert json.loads((tmp_path / "kernels.json").read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    [row] = result["rows"]  # equal cases are measured once
    own, plain = (row["contenders"][name] for name in ("burnish", "reference"))
    assert (row["state"], own["state"], plain["state"]) == ("ok", "ok", "ok")
    assert len(own["samples"]) == len(plain["samples"]) == len(row["ratio"]["reference"]["samples"]) == 3
    assert row["ratio"]["reference"]["samples"][0] == plain["samples"][0] / own["samples"][0]
    assert row["num_bytes"] == 8.0 * 32 * 48
    assert row["floor_s"] == row["num_bytes"] / 1e9
    assert row["share_of_peak"] == row["floor_s"] / own["time_s"]["median"]
    assert (own["saved_bytes"], plain["saved_bytes"]) == (0, 2 * 32 * 48)
    assert own["peak_bytes"] == 2 * 2 * 32 * 48
    assert own["num_launches"] == 2
    assert "x ref" in told(result)
    assert figures(result)[f"{row['key']} · times faster than reference"].value == row["ratio"]["reference"]["median"]


def test_a_wrong_operation_is_void_and_prints_no_speed_up_anywhere(ops):
    ops(wrong(DROPOUT))
    result = measured()
    [row] = result["rows"]
    assert (row["state"], row["contenders"]["burnish"]["state"]) == ("void", "void")
    assert "off by" in row["reason"]
    assert not row.keys() & {"ratio", "over_frozen", "share_of_peak"}
    assert not any(entry["samples"] for entry in row["contenders"].values())
    assert not figures(result)
    table, _ = as_text(BENCHMARK.tables(result)[0]).split("\n\nms: burnish's")
    assert table.splitlines()[-1].split()[-1] == "void"


def test_a_contender_that_is_wrong_gets_no_ratio_and_the_others_do(ops, monkeypatch):
    def make(problem):
        run = bench_kernels.contenders_of(LORA, is_compiled=False)[0].make(problem)
        return replace(run, arranged=lambda value, grads: [value * 1.02, *grads])

    peer = contenders.Contender("peer", "a wrong peer", make)
    frozen = next(one for one in contenders.PEERS["lora_linear"] if one.name == "frozen")
    monkeypatch.setitem(contenders.PEERS, "lora_linear", (peer, frozen))
    ops(LORA)
    result = measured()
    [row] = result["rows"]
    assert row["state"] == "ok"
    assert row["contenders"]["peer"]["state"] == "void"
    assert set(row["ratio"]) == {"reference"}
    assert set(row["over_frozen"]) == {"burnish", "reference"}
    assert "faster than peer" not in " ".join(figures(result))
    assert "peer in lora_linear" in told(result)
    linears = BENCHMARK.tables(result)[1]
    assert tuple(linears.head) == ("linears", "burnish", "reference")


def test_the_frozen_products_are_a_denominator_and_no_contender(ops):
    ops(LORA)
    result = measured()
    [row] = result["rows"]
    frozen, own = (row["contenders"][name]["samples"] for name in ("frozen", "burnish"))
    figure = figures(result)[f"{row['key']} · over the frozen products"]
    assert "frozen" not in row["ratio"]
    assert figure.samples == [a / b for a, b in zip(own, frozen, strict=True)]
    assert figure.value == row["over_frozen"]["burnish"]["median"]
    assert row["contenders"]["unsloth-scheme"]["state"] == NOT_MEASURED
    assert "unsloth-scheme in lora_linear: not measured: the scheme has no dropout" in told(result)


def test_an_operation_that_fails_leaves_the_others_their_rows(ops):
    def fails(**_):
        raise RuntimeError("no such instruction")

    ops(replace(DROPOUT, function=fails, name="broken"), DROPOUT)
    result = measured()
    assert sorted((row["op"], row["state"]) for row in result["rows"]) == [("broken", "failed"), ("dropout", "ok")]
    assert "no such instruction" in told(result)


def test_what_is_compiled_takes_its_turn_as_well(ops, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    [row] = measured(is_quick=False)["rows"]
    assert set(row["ratio"]) == {"reference", "compiled"}
    assert row["contenders"]["compiled"]["num_launches"] is None


def test_a_compiler_that_fails_leaves_the_row_without_that_ratio(ops, monkeypatch):
    class CompilerError(Exception):
        pass

    def fails(*_, **__):
        raise CompilerError("no compiler")

    monkeypatch.setattr(torch, "compile", fails)
    result = measured(is_quick=False)
    [row] = result["rows"]
    compiled = row["contenders"]["compiled"]
    assert (compiled["state"], compiled["reason"]) == ("failed", "no compiler")
    assert set(row["ratio"]) == {"reference"}
    assert "no compiler" in told(result)


def test_an_interruption_keeps_the_rows_there_are(ops, monkeypatch, tmp_path):
    calls = []
    measure_one = bench_kernels._measured

    def interrupted(op, *arguments):
        calls.append(op.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure_one(op, *arguments)

    ops(DROPOUT, replace(DROPOUT, name="second"))
    monkeypatch.setattr(bench_kernels, "_measured", interrupted)
    result = measured(path=tmp_path / "kernels.json")
    kept = json.loads((tmp_path / "kernels.json").read_text())
    assert result["is_interrupted"]
    assert kept["is_interrupted"]
    assert [row["state"] for row in kept["rows"]] == ["ok", NOT_MEASURED]
    assert "interrupted" in told(result)


def test_a_result_without_a_gpu_lists_every_row_of_one():
    items = BENCHMARK.items("cuda", Choice())
    empty = {"benchmark": "kernels", "rows": [], "peaks": {}, "is_interrupted": False}
    operations, linears = BENCHMARK.tables(completed(empty, items, reason="no GPU"))
    assert {row[1] for row in [*operations.rows, *linears.rows]} == {NOT_MEASURED}
    assert len(operations.rows) == len(items)
    assert not any("no GPU" in note for note in operations.notes)


def test_the_table_fits_a_terminal(ops):
    ops(LORA, DROPOUT)
    tables = [replace(table, notes=()) for table in BENCHMARK.tables(measured())]
    assert max(len(line) for table in tables for line in as_text(table).splitlines()) <= 150


def test_calls_take_turns_and_each_starts_as_often():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    rounds = Stopwatch("cpu").in_turn(calls, num_rounds=6)
    assert [order[i] for i in range(0, 18, 3)] == ["a", "b", "c"] * 2
    assert [list(turn) for turn in rounds] == [["a", "b", "c"]] * 6


def test_on_a_gpu_the_clock_runs_while_the_work_is_done_and_not_while_it_is_queued(monkeypatch):
    log = []

    class Event:
        def __init__(self, **_):
            self.name = f"event {sum(entry.startswith('new') for entry in log)}"
            log.append(f"new {self.name}")

        def record(self):
            log.append(self.name)

        def synchronize(self):
            log.append(f"wait for {self.name}")

        def elapsed_time(self, other):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(f"sleep {cycles >= 1e6}"))
    stopwatch = Stopwatch("cpu")
    stopwatch.device = "cuda"
    [turn] = stopwatch.in_turn({"a": lambda: log.append("call")}, num_rounds=1)
    assert turn == {"a": 0.002}
    timed = ["sleep True", "event 0", "call", "event 1", "wait for event 1"]
    assert [entry for entry in log if not entry.startswith("new")] == ["wait", "call", "wait", *timed]


def test_copies_of_the_inputs_rotate_and_neighbours_start_on_different_ones():
    order = []
    calls = {name: [lambda place=(name, copy): order.append(place) for copy in range(2)] for name in "ab"}
    Stopwatch("cpu").in_turn(calls, num_rounds=4)
    assert [copy for name, copy in order if name == "a"] == [0, 1, 0, 1]
    assert [copy for name, copy in order if name == "b"] == [1, 0, 1, 0]
