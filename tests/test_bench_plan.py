"""The benchmark of the planner: its configurations, what a row holds, and its tables, on made-up measurements."""

from typing import Any

import pytest
from burnish.bench import bench_plan, plan_cases, plan_tables
from burnish.bench.bench_plan import BENCHMARK
from burnish.bench.benchmark import Choice, Setting
from burnish.harness.errors import OutOfMemory
from burnish.harness.measure import Measured
from burnish.harness.memory import Prediction

GIB = 2**30
SETTING = Setting(device="cpu", num_threads=1, num_rounds=None, is_quick=True, say=lambda _: None)


def measured(step: int) -> Measured:
    phases = {"load": GIB // 2, "step": step, "evaluation": step, "save": step}
    return Measured(phases, {"weights": 100}, GIB // 2, 1.5, (3.0, 2.9), 1)


def predicted(step: int) -> Prediction:
    phases = {"load": GIB // 2, "step": step, "evaluation": step, "save": step}
    return Prediction({"weights": step // 4, "activations": 3 * step // 4}, {}, {}, phases)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.harness.profile.profile_of", lambda _config: None)
    monkeypatch.setattr("burnish.harness.memory.predict", lambda _plan, _profile: predicted(GIB))
    monkeypatch.setattr("burnish.harness.measure.measure", lambda _plan: measured(GIB * 5 // 4))
    monkeypatch.setattr(bench_plan, "available_bytes", lambda _device: 16 * GIB)


def rows(*indices: int) -> list[dict[str, Any]]:
    items = BENCHMARK.items("cpu", Choice())
    return [row for i in indices for row in BENCHMARK.measure(items[i], SETTING)]


def test_there_are_enough_configurations_of_every_kind() -> None:
    cases = plan_cases.CPU_CASES
    assert len(cases) >= 24
    assert len({case.key for case in cases}) == len(cases)
    assert {case.method for case in cases} == {"full", "freeze", "lora", "dora", "qlora"}
    assert {case.zero_stage for case in cases} == {0, 1, 2, 3}
    assert {case.policy for case in cases} == {"none", "selective", "full"}
    assert {case.num_ranks for case in cases} == {1, 2}
    assert {"llama-360M", "llama-0.6B", "llama-1.5B", "smollm2-135m"} == {case.model for case in cases}


def test_every_configuration_is_a_config_and_a_plan() -> None:
    for case in (*plan_cases.CPU_CASES, *plan_cases.GPU_CASES):
        assert case.config(1).train.micro_batch_size == case.batch[0]


def test_a_quick_run_takes_the_first_ones() -> None:
    assert len(BENCHMARK.items("cpu", Choice(is_quick=True))) == plan_cases.NUM_QUICK


def test_a_gpu_has_rows_of_its_own() -> None:
    keys = [item.key for item in BENCHMARK.items("cuda", Choice())]
    assert any("llama-8b qlora 1x2048" in key for key in keys)
    assert any("llama-70b qlora" in key for key in keys)


@pytest.mark.usefixtures("made_up")
def test_a_row_holds_both_and_the_table_their_difference() -> None:
    found = rows(0, 1)
    assert [row["state"] for row in found] == ["ok", "ok"]
    assert [figure.value for figure in BENCHMARK.figures(found[0])] == [GIB * 5 // 4, 1.25]
    table, others = plan_tables.tables({"rows": found, "device": "cpu"})
    assert table.rows[0][:4] == ("smollm2-135m lora 4x256 · 1 rank", "1 GiB", "1.25 GiB", "-20.0 %")
    assert table.rows[0][4] == "activations 768 MiB, weights 256 MiB"
    assert table.notes[0].startswith("0 of 2 predictions are within 10 %")
    assert others.rows[0][1:4] == ("512 MiB", "512 MiB", "+0.0 %")


@pytest.mark.usefixtures("made_up")
def test_what_finds_no_memory_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(_plan: Any) -> Measured:
        raise OutOfMemory("a process was killed")

    monkeypatch.setattr("burnish.harness.measure.measure", dies)
    (row,) = rows(0)
    assert (row["state"], row["reason"]) == ("failed", "a process was killed")
    assert plan_tables.tables({"rows": [row], "device": "cpu"}) == []


@pytest.mark.usefixtures("made_up")
def test_what_this_machine_has_not_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_plan, "available_bytes", lambda _device: GIB)
    (row,) = rows(0)
    assert row["state"] == "not measured"
