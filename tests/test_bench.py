"""The benchmark of steps: rows that are void or failed, disturbed rounds, groups, configurations, figures, mistakes."""

import json

import pytest
from burnish.bench import bench_step, errands, runner, stats, step_run
from burnish.bench.bench_step import BENCHMARK
from burnish.bench.benchmark import Choice, Setting
from burnish.bench.modes import MODES
from burnish.bench.pool import Crew, WorkerDied
from burnish.bench.step_cases import CASES, Case, cases
from burnish.bench.step_run import Measurement, Row, groups
from burnish.bench.table import as_text
from burnish.bench.workload import Workload
from burnish.harness.errors import ConfigError

MEBIBYTE, GIBIBYTE = 2**20, 2**30
PEAKS = {"bfloat16": {"bytes_per_s": 1e10, "flops_per_s": 1e9}}


class FakeWorker:
    """Answers from a list instead of a process."""

    def __init__(self, losses, time_s, *, num_trained=10, dies_at=None, others_s=(0.01,), is_cut_at=None):
        self.answered = {"num_trained": num_trained, "floor_bytes": 1, "loaded_bytes": 2, "device": "cpu"}
        self.answered |= {"room_bytes": GIBIBYTE, "flops_per_token": 1000}
        self.losses, self.time_s, self.others_s, self.count = losses, time_s, others_s, 0
        self.dies_at, self.is_cut_at, self.is_closed = dies_at, is_cut_at, False

    def build(self, workload):
        if self.dies_at == "build":
            raise WorkerDied("no such file")
        self.built, self.workload = self.answered, workload

    def step(self):
        if self.count == self.dies_at:
            raise WorkerDied("no memory")
        if self.count == self.is_cut_at:
            raise KeyboardInterrupt
        self.count += 1
        loss = self.losses[(self.count - 1) % len(self.losses)]
        others_s = self.others_s[self.count % len(self.others_s)]
        return {"time_s": self.time_s, "others_s": others_s, "loss": loss, "peak_bytes": MEBIBYTE}

    turn = step

    def close(self):
        self.is_closed = True

    kill = close


GOOD = [3.0, 2.9, 2.8]


@pytest.fixture
def fake(monkeypatch):
    """Runs the benchmark with these instead of processes: mode -> arguments of FakeWorker. Returns result and lines."""
    made = []

    def run(options=None, num_rounds=4, num_threads=1, **workers):
        workers = {name.replace("_", "-"): arguments for name, arguments in workers.items()}

        def start(self, mode):
            self.workers.append(FakeWorker(**workers[mode]))
            made.append(self.workers[-1])
            return made[-1]

        monkeypatch.setattr(Crew, "_start", start)
        monkeypatch.setattr(errands, "peaks", lambda device, num_threads: PEAKS)
        monkeypatch.setattr(errands, "with_unpacked_weights", lambda workload: workload)
        lines = []
        setting = Setting("cpu", num_threads, num_rounds, False, lines.append)
        choice = Choice(**{"modes": tuple(workers), "baseline": "peft"} | (options or {}))
        result = runner.run(BENCHMARK, setting, choice)
        assert all(worker.is_closed for worker in made)
        return json.loads(json.dumps(result)), lines

    run.made = made
    return run


def rows_of(result):
    return {row["mode"]: row for row in result["rows"]}


def facts_of(result):
    return rows_of(result)["peft"]["facts"]


def text_of(result):
    return "\n".join(map(as_text, BENCHMARK.tables(result)))


OTHER_LOSSES = {
    "another start": [3.03, 2.9, 2.8],
    "a smaller fall": [3.0, 2.9, 2.83],
    "a larger fall": [3.0, 2.9, 2.77],
    "no fall": [3.0, 3.0, 3.0],
    "not a number": [3.0, float("nan"), 2.8],
    "not finite at the end": [3.0, 2.9, float("inf")],
}


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_a_mode_with_other_losses_is_void_and_gets_no_figure(fake, name):
    result, _ = fake(
        peft={"losses": GOOD, "time_s": 2.0},
        burnish={"losses": OTHER_LOSSES[name], "time_s": 0.1},
        peft_bf16={"losses": [3.001, 2.88, 2.81], "time_s": 1.0},
    )
    rows = rows_of(result)
    assert rows["burnish"]["state"] == "void"
    assert not {"ratio", "faster", "tokens_per_s", "mfu", "time_s"} & rows["burnish"].keys()
    assert rows["peft-bf16"]["ratio"]["median"] == 2.0
    assert not any("faster" in row for row in rows.values())
    lines = text_of(result).splitlines()
    assert next(line for line in lines if line.startswith("burnish ")).split() == ["burnish", "void"]
    assert sum(line.startswith("burnish is void: its ") for line in lines) == 1


def test_a_mode_that_trains_fewer_weights_is_void(fake):
    result, _ = fake(peft={"losses": GOOD, "time_s": 2.0}, burnish={"losses": GOOD, "time_s": 1.0, "num_trained": 9})
    assert rows_of(result)["burnish"]["state"] == "void"


def test_what_a_row_says(fake):
    """Speed, MFU over the measured peak, both ratios, and figures with the samples behind them."""
    result, _ = fake(peft={"losses": GOOD, "time_s": 2.0}, burnish={"losses": GOOD, "time_s": 0.5})
    rows = rows_of(result)
    assert rows["burnish"]["tokens_per_s"] == 2048
    assert rows["burnish"]["mfu"] == pytest.approx(2048 * 1000 / 1e9)
    assert rows["burnish"]["ratio"]["samples"] == rows["peft"]["faster"]["samples"] == [4.0] * 4
    assert "faster" not in rows["burnish"]
    figures = {figure.key: figure for row in result["rows"] for figure in BENCHMARK.figures(row)}
    assert len(figures) == 7
    faster = figures["smollm2-135m 4x256 · peft · burnish is faster by"]
    assert (faster.kind, faster.value, faster.samples, faster.better) == ("ratio", 4.0, [4.0] * 4, "higher")
    assert figures["smollm2-135m 4x256 · peft · peak memory"].value == MEBIBYTE
    facts = facts_of(result)
    assert facts["config"]["adapter"] | {"rank": 16, "alpha": 32.0, "dropout": 0.05} == facts["config"]["adapter"]
    assert "facts" not in rows["burnish"]


@pytest.mark.parametrize("dies_at", ["build", 3])
def test_a_mode_that_dies_leaves_the_others_their_rows(fake, dies_at):
    result, lines = fake(
        peft={"losses": GOOD, "time_s": 2.0},
        sft={"losses": GOOD, "time_s": 3.0, "dies_at": dies_at},
        burnish={"losses": GOOD, "time_s": 1.0},
    )
    rows, reason = rows_of(result), "no such file" if dies_at == "build" else "no memory"
    assert (rows["sft"]["state"], rows["sft"]["reason"]) == ("failed", reason)
    assert rows["burnish"]["ratio"]["median"] == 2.0
    assert f"sft: {reason}" in lines
    assert f"sft is failed: {reason}" in text_of(result)


def test_disturbed_rounds_are_left_out_and_taken_again(fake):
    result, lines = fake(
        peft={"losses": GOOD, "time_s": 2.0, "others_s": (0.01, 0.01, 1.9)},
        burnish={"losses": GOOD, "time_s": 1.0},
    )
    told = [line for line in lines if line.startswith("round")]
    disturbed = [number for number, line in enumerate(told) if "disturbed" in line]
    facts = facts_of(result)
    assert disturbed
    assert len(facts["rounds"]) == 4 + len(disturbed)
    assert facts["counted_rounds"] == [n for n in range(len(facts["rounds"])) if n not in disturbed]
    assert all(len(row["times_s"]) == len(row["ratio"]["samples"]) == 4 for row in result["rows"])
    assert f"{len(disturbed)} of {len(facts['rounds'])} rounds were disturbed" in text_of(result)


def test_on_a_machine_that_is_always_busy_all_rounds_count_and_the_table_says_so(fake):
    result, _ = fake(
        peft={"losses": GOOD, "time_s": 2.0, "others_s": (1.0,)},
        burnish={"losses": GOOD, "time_s": 1.0, "others_s": (1.0,)},
    )
    facts = facts_of(result)
    assert len(facts["rounds"]) == len(facts["counted_rounds"]) == 8
    assert facts["others_cores"] == pytest.approx(0.98 * 0.75)
    assert "other processes used 0.74 cores" in text_of(result)


def test_a_broken_baseline_leaves_no_ratio(fake):
    result, _ = fake(
        peft={"losses": GOOD, "time_s": 2.0, "dies_at": 0},
        sft={"losses": GOOD, "time_s": 2.0},
        burnish={"losses": GOOD, "time_s": 1.0},
    )
    row = rows_of(result)["burnish"]
    assert row["tokens_per_s"] == 1024
    assert "ratio" not in row
    assert rows_of(result)["sft"]["faster"]["median"] == 2.0
    assert "sft " in text_of(result)


def test_a_package_that_is_not_installed_is_told_and_nothing_is_started(fake):
    result, lines = fake(
        peft={"losses": GOOD, "time_s": 2.0},
        unsloth={"losses": GOOD, "time_s": 2.0, "dies_at": "build"},
        sft_liger={"losses": GOOD, "time_s": 2.0, "dies_at": "build"},
    )
    rows = rows_of(result)
    assert {rows[mode]["state"] for mode in ("unsloth", "sft-liger")} == {"not measured"}
    assert rows["unsloth"]["reason"] == "unsloth is not installed"
    assert rows["sft-liger"]["reason"] == "liger_kernel is not installed"
    assert "unsloth: unsloth is not installed" in lines
    assert "sft-liger is not measured: liger_kernel is not installed" in text_of(result)


def test_ctrl_c_keeps_the_rounds_that_were_taken(fake):
    """Three steps of the check, one to warm up, two in turn; then the user has had enough."""
    cut = {"losses": GOOD, "time_s": 1.0, "is_cut_at": 4}
    result, _ = fake(peft={"losses": GOOD, "time_s": 2.0}, burnish=cut)
    rows = rows_of(result)
    assert result["is_interrupted"]
    assert [row["state"] for row in rows.values()] == ["ok", "ok"]
    assert 0 < len(rows["burnish"]["times_s"]) < 4
    assert "interrupted: not all" in text_of(result)


def test_ctrl_c_before_the_first_round_is_passed_on(fake):
    with pytest.raises(KeyboardInterrupt):
        fake(peft={"losses": GOOD, "time_s": 2.0}, burnish={"losses": GOOD, "time_s": 1.0, "is_cut_at": 1})
    assert all(worker.is_closed for worker in fake.made)


def test_checks_share_the_threads_and_timed_steps_have_all(fake):
    fake(num_threads=5, peft={"losses": GOOD, "time_s": 2.0}, burnish={"losses": GOOD, "time_s": 1.0})
    works = [(worker.workload.dropout > 0, worker.workload.num_threads) for worker in fake.made]
    assert sorted(works) == [(False, 2), (False, 2), (True, 5), (True, 5)]


def measured(modes, *, device, peaks, loaded=0, room=GIBIBYTE):
    """A measurement after its checks."""
    built = {"loaded_bytes": loaded, "room_bytes": room}
    rows = {mode: Row(mode, built=built, check_peak_bytes=peak) for mode, peak in zip(modes, peaks, strict=True)}
    case = Case("case", {}, "4x256", tuple(modes), baseline="peft", own="burnish")
    return Measurement(case, device, Workload(), 5, rows)


def test_more_modes_than_may_be_alive_run_in_groups_beside_baseline_and_burnish():
    modes = list(MODES)
    common, parts = groups(measured(modes, device="cpu", peaks=[0] * len(modes)))
    assert common == ["peft", "burnish"]
    assert all(0 < len(part) + 2 <= step_run.MAX_ALIVE["cpu"] for part in parts)
    assert sorted([*common, *(mode for part in parts for mode in part)]) == sorted(modes)
    assert groups(measured(["peft", "burnish"], device="cpu", peaks=[0, 0])) == (["peft", "burnish"], [[]])


def test_modes_that_are_too_large_together_take_turns_in_several_groups():
    """On a CPU each keeps its peak; on a GPU its weights, and the largest of all activations is needed once."""
    modes = ["peft", "peft-bf16", "sft", "burnish"]
    peaks = [200 * MEBIBYTE] * 4
    assert groups(measured(modes, device="cpu", peaks=peaks))[1] == [["peft-bf16"], ["sft"]]
    assert groups(measured(modes, device="cpu", peaks=[100 * MEBIBYTE] * 4))[1] == [["peft-bf16", "sft"]]
    big = {"device": "cuda", "peaks": [80 * GIBIBYTE] * 4, "room": 139 * GIBIBYTE}
    assert groups(measured(modes, **big, loaded=16 * GIBIBYTE))[1] == [["peft-bf16"], ["sft"]]
    assert groups(measured(modes, **big, loaded=8 * GIBIBYTE))[1] == [["peft-bf16", "sft"]]


@pytest.mark.parametrize("device", CASES)
def test_the_catalogue_is_complete_without_the_hardware(device):
    items = BENCHMARK.items(device, Choice())
    keys = [key for item in items for key in item.rows]
    assert len(set(keys)) == len(keys)
    for case in cases(device, Choice()):
        assert {case.baseline, case.own} <= set(case.modes) <= MODES.keys()
        quantized = {MODES[mode].is_quantized for mode in case.modes}
        assert quantized == {"qlora" in case.name}
        method = "qlora" if "qlora" in case.name else "lora"
        assert case.workload(1).config(method=method).adapter.method == method
    result = {"rows": [{"key": key, "state": "not measured", "reason": "no such machine"} for key in keys]}
    tables = BENCHMARK.tables(result | {"device": device})
    assert [table.title for table in tables] == [item.key for item in items]
    assert all(row[1] == "not measured" for table in tables for row in table.rows)
    assert not any(table.notes for table in tables)


def test_a_quick_run_measures_one_configuration_of_the_full_one():
    (quick,), full = cases("cpu", Choice(is_quick=True)), cases("cpu", Choice())
    assert {"peft", "peft-bf16", "sft", "burnish"} == set(quick.modes)
    assert set(quick.item().rows) < set(full[0].item().rows)


def test_options_make_a_configuration_of_their_own():
    (case,) = cases("cuda", Choice(modes=("sft", "burnish-qlora"), model="some/folder", batch="2x64"))
    assert (case.name, case.model, case.baseline, case.own) == (
        "folder 2x64",
        {"path": "some/folder"},
        "sft",
        "burnish-qlora",
    )
    assert case.workload(3).tokens == 128
    (case,) = cases("cpu", Choice(model="llama-1b"))
    assert case.model["init"]["hidden_size"] == 2048
    assert "burnish" in case.modes


MISTAKES = {
    "mode": ({"modes": ("peft", "pfet")}, "'pfet' is no mode"),
    "baseline": ({"modes": ("peft",), "baseline": "sft"}, "not among the modes"),
    "batch": ({"batch": "4*256"}, "sequences x tokens"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_before_anything_starts(name):
    options, words = MISTAKES[name]
    with pytest.raises(ConfigError, match=words):
        BENCHMARK.items("cpu", Choice(**options))


def test_profile_knows_the_modes():
    with pytest.raises(ConfigError, match="'nothing' is no mode"):
        bench_step.profile("nothing", Workload(), num_warmup=1, num_rows=1, say=print)


def test_quartiles_and_paired_ratios():
    assert stats.quantiles([1.0, 2.0, 3.0, 4.0, 5.0]) == {"q1": 2.0, "median": 3.0, "q3": 4.0}
    assert stats.quantiles([7.0]) == {"q1": 7.0, "median": 7.0, "q3": 7.0}
    assert stats.paired_ratios([2.0, 8.0, 30.0], [1.0, 2.0, 3.0])["median"] == 4.0
