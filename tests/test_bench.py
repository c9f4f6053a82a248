"""The benchmarks: two modes side by side end to end, rows that are void, figures, mistakes."""

import io
import json
from importlib import import_module

import pytest
import tiny
import torch
from burnish.bench import bench_step, stats
from burnish.bench.bench_step import LOSS_TOLERANCE, groups, measure, summarise
from burnish.bench.modes import MODES
from burnish.bench.pool import WorkerDied
from burnish.bench.table import step_table
from burnish.bench.turns import Finished, Turns
from burnish.bench.workload import Workload
from burnish.launch.cli import main

MEBIBYTE = 2**20


def run_main(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_two_modes_end_to_end(capsys, tmp_path):
    """Fresh processes, the check of the losses, steps in turn, the table, and everything in the JSON file."""
    model, out = tiny.save_model(tmp_path / "model"), tmp_path / "result.json"
    capsys.readouterr()
    options = ["--modes", "peft-bf16,burnish", "--batch", "2x32", "--steps", "3", "--threads", "1"]
    code, text, err = run_main(capsys, "bench", "step", "--model", model, *options, "--out", out)
    assert (code, err) == (0, "")
    assert "tokens/s" in text
    assert "void" not in text

    result = json.loads(out.read_text())
    assert result["baseline"] == "peft-bf16"
    assert 3 <= len(result["rounds"]) <= 6
    assert {
        "time",
        "command",
        "environment",
        "config",
        "workload",
        "loss_tolerance",
        "fall_tolerance",
        "num_warmup",
    } <= result.keys()
    assert {"cpu", "num_cpus", "libraries", "git_commit"} <= result["environment"].keys()
    assert result["workload"]["num_threads"] == 1
    assert result["config"]["adapter"] | {"rank": 16, "alpha": 32.0, "dropout": 0.05} == result["config"]["adapter"]
    assert [row["mode"] for row in result["rows"]] == ["peft-bf16", "burnish"]
    for row in result["rows"]:
        assert row["state"] == "ok"
        assert len(row["losses"]) == len(result["rounds"])
        assert len(row["times_s"]) == len(row["ratio"]["samples"]) == len(result["counted_rounds"])
        assert len(row["warmup_times_s"]) == result["num_warmup"]
        assert row["check_losses"][0] > row["check_losses"][-1]
        assert row["peak_bytes"] > row["floor_bytes"] > MEBIBYTE
        assert row["ratio"]["q1"] <= row["ratio"]["median"] <= row["ratio"]["q3"]


def answers_of(mode, workload, *requests):
    """What the mode answers to the requests, in this process."""
    answers = io.StringIO()
    turns = Turns(io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), answers)
    found = MODES[mode]
    function = getattr(import_module(found.module, "burnish.bench"), found.function)
    with pytest.raises(Finished):
        function(workload, turns, **found.options)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    model = tiny.save_model(tmp_path_factory.mktemp("bench") / "model")
    return Workload(model={"path": str(model)}, num_sequences=4, length=32, rank=4, num_threads=torch.get_num_threads())


@pytest.fixture
def restored_environment(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("restored_environment")
@pytest.mark.parametrize("mode", ["peft", "peft-bf16", "sft", "burnish", "burnish-unfused"])
def test_every_mode_takes_the_same_step(small, mode):
    """The losses are those of PEFT in fp32."""
    step = {"do": "step"}
    expected = [answer["loss"] for answer in answers_of("fp32", small.for_check(), step, step, step)[1:]]
    built, *answers = answers_of(mode, small.for_check(), step, step, step)
    assert built["num_trained"] == small.rank * 2 * (2 * 64 + 2 * 48 + 3 * 96)
    assert [answer["loss"] for answer in answers] == pytest.approx(expected, rel=LOSS_TOLERANCE)
    assert expected[-1] < expected[0]


def test_random_weights_of_a_shape_need_no_file(restored_environment):
    shape = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    workload = Workload(model={"init": shape}, length=16, num_threads=torch.get_num_threads()).for_check()
    losses = [answers_of(mode, workload, {"do": "step"})[1]["loss"] for mode in ("peft-bf16", "sft", "burnish")]
    assert losses == pytest.approx([losses[0]] * 3, rel=LOSS_TOLERANCE)


def test_a_profile_names_operations_and_their_shapes(small):
    *_, answer = answers_of("peft-bf16", small, {"do": "profile", "rows": 40})
    assert "aten::mm" in answer["profile"]
    assert "[[" in answer["profile"]


class FakeWorker:
    """Answers from a list instead of a process."""

    def __init__(self, losses, time_s, *, num_trained=10, dies_at=None, others_s=(0.01,)):
        self.built = {"num_trained": num_trained, "floor_bytes": 1, "loaded_bytes": 2, "device": "cpu"}
        self.losses, self.time_s, self.dies_at, self.others_s, self.count = losses, time_s, dies_at, others_s, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def step(self):
        if self.count == self.dies_at:
            raise WorkerDied("no memory")
        self.count += 1
        loss = self.losses[(self.count - 1) % len(self.losses)]
        others_s = self.others_s[self.count % len(self.others_s)]
        return {"time_s": self.time_s, "others_s": others_s, "loss": loss, "peak_bytes": MEBIBYTE}


GOOD = [3.0, 2.9, 2.8]


def fake(monkeypatch, **workers):
    """Runs `measure` with these instead of processes: mode -> arguments of FakeWorker."""
    names = {name.replace("_", "-"): arguments for name, arguments in workers.items()}
    monkeypatch.setattr(bench_step, "open_worker", lambda mode, _workload: FakeWorker(**names[mode]))
    lines = []
    found = measure(list(names), Workload(), baseline="peft", num_steps=4, num_warmup=1, say=lines.append)
    return summarise(found) | {"environment": {"cpu": "a processor"}, "workload": Workload().to_dict()}, lines


def rows_of(result):
    return {row["mode"]: row for row in result["rows"]}


OTHER_LOSSES = {
    "another start": [3.03, 2.9, 2.8],
    "a smaller fall": [3.0, 2.9, 2.83],
    "a larger fall": [3.0, 2.9, 2.77],
    "no fall": [3.0, 3.0, 3.0],
    "not a number": [3.0, float("nan"), 2.8],
    "not finite at the end": [3.0, 2.9, float("inf")],
}


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_a_mode_with_other_losses_is_void_and_gets_no_ratio(monkeypatch, name):
    result, _ = fake(
        monkeypatch,
        peft={"losses": GOOD, "time_s": 2.0},
        burnish={"losses": OTHER_LOSSES[name], "time_s": 0.1},
        peft_bf16={"losses": [3.001, 2.88, 2.81], "time_s": 1.0},
    )
    rows = rows_of(result)
    assert rows["burnish"]["state"] == "void"
    assert not {"ratio", "tokens_per_s"} & rows["burnish"].keys()
    assert rows["peft-bf16"]["ratio"]["median"] == 2.0
    line = next(line for line in step_table(result).splitlines() if line.startswith("burnish "))
    assert line.split() == ["burnish", "void"]


def test_a_mode_that_trains_fewer_weights_is_void(monkeypatch):
    result, _ = fake(
        monkeypatch,
        peft={"losses": GOOD, "time_s": 2.0},
        burnish={"losses": GOOD, "time_s": 1.0, "num_trained": 9},
    )
    assert rows_of(result)["burnish"]["state"] == "void"


def test_a_mode_that_dies_leaves_the_others_their_rows(monkeypatch):
    result, lines = fake(
        monkeypatch,
        peft={"losses": GOOD, "time_s": 2.0},
        sft={"losses": GOOD, "time_s": 3.0, "dies_at": 3},
        burnish={"losses": GOOD, "time_s": 1.0},
    )
    rows = rows_of(result)
    assert (rows["sft"]["state"], rows["sft"]["reason"]) == ("failed", "no memory")
    assert rows["burnish"]["ratio"]["median"] == 2.0
    assert "sft: no memory" in lines
    assert "sft is failed: no memory" in step_table(result)


def test_disturbed_rounds_are_left_out_and_taken_again(monkeypatch):
    result, lines = fake(
        monkeypatch,
        peft={"losses": GOOD, "time_s": 2.0, "others_s": (0.01, 0.01, 1.9)},
        burnish={"losses": GOOD, "time_s": 1.0},
    )
    disturbed = [number for number, line in enumerate(line for line in lines if "round" in line) if "disturbed" in line]
    assert disturbed
    assert len(result["rounds"]) == 4 + len(disturbed)
    assert result["counted_rounds"] == [n for n in range(len(result["rounds"])) if n not in disturbed]
    assert all(len(row["times_s"]) == len(row["ratio"]["samples"]) == 4 for row in result["rows"])
    assert f"{len(disturbed)} of {len(result['rounds'])} rounds were disturbed" in step_table(result)


def test_on_a_machine_that_is_always_busy_all_rounds_count_and_the_table_says_so(monkeypatch):
    result, _ = fake(
        monkeypatch,
        peft={"losses": GOOD, "time_s": 2.0, "others_s": (1.0,)},
        burnish={"losses": GOOD, "time_s": 1.0, "others_s": (1.0,)},
    )
    assert len(result["rounds"]) == len(result["counted_rounds"]) == 8
    assert result["others_cores"] == pytest.approx(0.98 * 0.75)
    assert "other processes used 0.74 cores" in step_table(result)


def test_a_broken_baseline_leaves_no_ratio(monkeypatch):
    result, _ = fake(
        monkeypatch,
        peft={"losses": GOOD, "time_s": 2.0, "dies_at": 0},
        burnish={"losses": GOOD, "time_s": 1.0},
    )
    row = rows_of(result)["burnish"]
    assert row["tokens_per_s"] == 1024
    assert "ratio" not in row
    step_table(result)


def test_more_modes_than_memory_holds_run_in_groups_with_baseline_and_burnish():
    found = groups(list(MODES), "peft")
    assert all(len(group) <= bench_step.MAX_ALIVE and {"peft", "burnish"} <= set(group) for group in found)
    assert {mode for group in found for mode in group} == set(MODES)
    assert groups(["peft", "burnish"], "peft") == [["peft", "burnish"]]


def test_quartiles_and_paired_ratios():
    assert stats.quantiles([1.0, 2.0, 3.0, 4.0, 5.0]) == {"q1": 2.0, "median": 3.0, "q3": 4.0}
    assert stats.quantiles([7.0]) == {"q1": 7.0, "median": 7.0, "q3": 7.0}
    assert stats.paired_ratios([2.0, 8.0, 30.0], [1.0, 2.0, 3.0])["median"] == 4.0


MISTAKES = {
    "mode": (["step", "--modes", "peft,pfet"], "'pfet' is no mode"),
    "profile": (["step", "--profile", "nothing"], "'nothing' is no mode"),
    "baseline": (["step", "--modes", "peft", "--baseline", "sft"], "not among the modes"),
    "batch": (["step", "--batch", "4*256"], "sequences x tokens"),
    "steps": (["step", "--steps", "0"], "at least 1"),
    "threads": (["step", "--threads", "0"], "at least 1"),
    "out": (["step", "--out", "no/such/folder/x.json"], "no such folder"),
    "what": (["everything"], "step"),
    "operation": (["kernels", "--ops", "dropuot"], "'dropuot' is no operation"),
    "option of another": (["kernels", "--modes", "peft"], "--modes is an option of burnish bench step"),
    "another's option": (["step", "--quick"], "--quick is an option of burnish bench kernels"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_2(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    arguments, words = MISTAKES[name]
    code, out, err = run_main(capsys, "bench", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
