"""Running a benchmark and the verb `bench`, on a fake benchmark: files, progress, interruption, limits, mistakes."""

import json
import os
import re
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from burnish.bench import record, runner, suite
from burnish.bench.benchmark import Benchmark, Choice, Figure, Item, Setting, Table
from burnish.bench.pool import Worker, WorkerDied
from burnish.harness.errors import ConfigError
from burnish.launch.cli import main

CHOICE = Choice()


def fake(measure, *, keys=("one", "two", "three"), cost_s=1.0):
    """A benchmark of one row for each key."""
    return Benchmark(
        name="fake",
        summary="for tests",
        items=lambda _device, _choice: [Item(key, (key,), cost_s=cost_s) for key in keys],
        prepare=lambda _setting: {"peaks": {"fp32": 1.0}},
        measure=measure,
        figures=lambda row: [Figure(f"{row['key']} · time", "time", row["time_s"], (row["time_s"],), "lower")],
        tables=lambda result: [
            Table("fake", ("what", "state"), [(row["key"], row["state"]) for row in result["rows"]], ("a note",))
        ],
    )


def good(item, _setting):
    yield {"key": item.key, "state": "ok", "reason": None, "time_s": 1.5}


def setting(say=lambda _: None):
    return Setting("cpu", 1, None, False, say)


def test_a_result_names_hardware_versions_commit_options_and_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["burnish", "bench", "run", "fake"])
    path = tmp_path / "fake.json"
    runner.run(fake(good), setting(), CHOICE, path=path)
    result = record.load(path)
    assert [row["key"] for row in result["rows"]] == ["one", "two", "three"]
    assert result["command"] == ["burnish", "bench", "run", "fake"]
    assert result["hardware"].startswith("cpu-")
    assert {"cpu", "num_cpus", "cpu_features", "libraries", "git_commit"} <= result["environment"].keys()
    assert len(result["options_hash"]) == 64
    assert result["options"] == record.opened("fake", setting(), CHOICE, {})["options"]
    assert (result["is_interrupted"], result["is_quick"], result["peaks"]) == (False, False, {"fp32": 1.0})


@pytest.mark.parametrize("out", [["--out", "a/folder"], ["--out=a/folder"], []])
def test_a_result_does_not_hold_where_it_was_written(monkeypatch, out):
    monkeypatch.setattr(sys, "argv", ["burnish", "bench", "run", *out, "--quick"])
    assert record.opened("fake", setting(), CHOICE, {})["command"] == ["burnish", "bench", "run", "--quick"]


def test_other_options_have_another_hash():
    one, other = (record.opened("fake", setting(), choice, {}) for choice in (CHOICE, Choice(is_quick=True)))
    assert one["options_hash"] != other["options_hash"]
    assert record.hash_of({"a": 1, "b": 2}) == record.hash_of({"b": 2, "a": 1})


def test_the_file_is_whole_after_every_row_and_a_killed_run_keeps_them(tmp_path):
    path, seen = tmp_path / "fake.json", []

    def dies(item, _setting):
        seen.append([row["key"] for row in record.load(path)["rows"]] if path.exists() else None)
        if item.key == "three":
            raise RuntimeError("power cut")
        yield from good(item, _setting)

    with pytest.raises(RuntimeError, match="power cut"):
        runner.run(fake(dies), setting(), CHOICE, path=path)
    assert seen == [None, ["one"], ["one", "two"]]
    assert record.load(path)["is_interrupted"]


def test_an_interruption_keeps_what_there_is_and_names_the_rest(tmp_path):
    def interrupted(item, _setting):
        yield from good(item, _setting)
        if item.key == "two":
            raise KeyboardInterrupt

    lines = []
    result = runner.run(fake(interrupted), setting(lines.append), CHOICE, path=tmp_path / "fake.json")
    assert result["is_interrupted"]
    assert [row["state"] for row in result["rows"]] == ["ok", "ok", "not measured"]
    assert record.load(tmp_path / "fake.json") == json.loads(json.dumps(result))
    assert any("kept" in line for line in lines)


def test_an_interruption_before_anything_was_measured_is_one(tmp_path):
    def interrupted(_item, _setting):
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        runner.run(fake(interrupted), setting(), CHOICE)


def test_a_resumed_run_measures_only_what_is_missing(tmp_path):
    """`two` failed, which is an answer; `three` was not reached."""
    path, seen = tmp_path / "fake.json", []

    def measure(item, _setting):
        seen.append(item.key)
        if item.key == "three" and len(seen) == 3:
            raise KeyboardInterrupt
        yield {"key": item.key, "state": "failed" if item.key == "two" else "ok", "reason": None, "time_s": len(seen)}

    before = runner.run(fake(measure), setting(), CHOICE, path=path, is_resumed=True)
    assert before["is_interrupted"]
    result = runner.run(fake(measure), setting(), CHOICE, path=path, is_resumed=True)
    assert seen == ["one", "two", "three", "three"]
    assert [(row["key"], row["time_s"]) for row in result["rows"]] == [("one", 1), ("two", 2), ("three", 4)]
    assert not result["is_interrupted"]
    assert record.load(path) == json.loads(json.dumps(result))
    runner.run(fake(measure), setting(), CHOICE, path=path)
    assert len(seen) == 7, "without --resume all is measured"


def test_a_resumed_item_is_told_what_there_is_of_it(tmp_path):
    path, seen = tmp_path / "fake.json", []
    benchmark = replace(fake(None), items=lambda _device, _choice: [Item("one", ("a", "b"))])

    def measure(item, _setting):
        seen.append([row["key"] for row in item.before])
        yield {"key": "a", "state": "ok", "reason": None, "time_s": 1.0}
        if len(seen) == 1:
            raise KeyboardInterrupt
        yield {"key": "b", "state": "ok", "reason": None, "time_s": 1.0}

    for _ in range(2):
        result = runner.run(replace(benchmark, measure=measure), setting(), CHOICE, path=path, is_resumed=True)
    assert seen == [[], ["a"]]
    assert [(row["key"], row["state"]) for row in result["rows"]] == [("a", "ok"), ("b", "ok")]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda found: found.update(hardware="nvidia-h200"), "another hardware"),
        (lambda found: found.update(options_hash="0"), "another options"),
        (lambda found: found["environment"].update(git_commit="abc"), "with the git_commit abc"),
        (lambda found: found["environment"]["libraries"].update(torch="1.0"), "with the libraries"),
    ],
)
def test_a_run_that_measured_something_else_is_not_gone_on_with(tmp_path, change, why):
    path = tmp_path / "fake.json"
    before = runner.run(fake(good), setting(), CHOICE)
    change(before)
    record.save(path, before)
    with pytest.raises(ConfigError, match=why):
        runner.run(fake(good), setting(), CHOICE, path=path, is_resumed=True)


def test_no_item_begins_that_would_end_after_the_limit(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(runner.time, "perf_counter", lambda: clock.now)

    def slow(item, _setting):
        clock.now += 20  # twice what the item said
        yield from good(item, _setting)

    result = runner.run(fake(slow, cost_s=10.0), setting(), CHOICE, limit_s=55)
    assert [row["state"] for row in result["rows"]] == ["ok", "ok", "not measured"]
    assert result["rows"][-1]["reason"] == runner.OUT_OF_TIME
    assert result["time_s"] == 40


def test_progress_tells_what_is_left(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(runner.time, "perf_counter", lambda: clock.now)
    lines = []

    def slow(item, _setting):
        clock.now += 2
        yield from good(item, _setting)

    runner.run(fake(slow), setting(lines.append), CHOICE)
    assert lines == [
        "fake 1 of 3, about 3.0 s left: one",
        "fake 2 of 3, about 4.0 s left: two",
        "fake 3 of 3, about 2.0 s left: three",
    ]


@pytest.mark.parametrize(
    ("only", "keys"), [((), ["one", "two", "three"]), (("t*",), ["two", "three"]), (("ne", "three"), ["one", "three"])]
)
def test_patterns_choose_items(only, keys):
    result = runner.run(fake(good), setting(), Choice(only=only))
    assert [row["key"] for row in result["rows"]] == keys


def test_a_pattern_without_a_match_is_a_mistake():
    with pytest.raises(ConfigError, match="'four' is nothing that fake measures"):
        runner.run(fake(good), setting(), Choice(only=("one", "four")))


def test_an_unknown_benchmark_is_a_mistake():
    with pytest.raises(ConfigError, match="'kernel' is no benchmark; did you mean kernels"):
        suite.benchmark("kernel")


def test_a_result_that_lacks_something_is_named(tmp_path):
    result = record.opened("fake", setting(), CHOICE, {})
    for broken, words in (
        ({name: value for name, value in result.items() if name != "command"}, "has no command"),
        (result | {"rows": [{"state": "ok"}]}, "a row has no key"),
    ):
        record.save(tmp_path / "x.json", broken)
        with pytest.raises(ConfigError, match=words):
            record.load(tmp_path / "x.json")


def test_a_folder_of_folders_of_results_says_which_to_give(tmp_path):
    (tmp_path / "cpu-2").mkdir()
    record.save(tmp_path / "cpu-2" / "fake.json", {"format": 1})
    with pytest.raises(ConfigError, match=r"give .*cpu-2"):
        record.load_all(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 0, "rows": []}', None])
def test_a_file_that_is_no_result_is_named(tmp_path, content):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"x\.json"):
        record.load(path)
    if content is None:
        with pytest.raises(ConfigError, match="no result"):
            record.load_all(tmp_path)


def test_hardware_has_a_name_that_tells_matrix_units_apart():
    machine = {"num_cpus": 2, "cpu": "Intel(R) Xeon(R) Processor", "cpu_features": ["amx_bf16", "avx2"], "gpu": None}
    assert record.hardware(machine, "cpu") == "cpu-2-intel-xeon-processor-amx-bf16"
    assert record.hardware(machine | {"cpu_features": []}, "cpu") == "cpu-2-intel-xeon-processor"
    assert record.hardware(machine | {"gpu": "NVIDIA H200"}, "cuda") == "nvidia-h200"


@pytest.fixture
def verb(capsys, monkeypatch, tmp_path):
    """The verb with the fake benchmark as the only one, in an empty folder: arguments -> (code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    benchmark = SimpleNamespace(current=fake(good))
    monkeypatch.setattr(suite, "MODULES", {"fake": ""})
    monkeypatch.setattr(suite, "benchmark", lambda _name: benchmark.current)

    def run(*arguments, measure=None):
        if measure is not None:
            benchmark.current = fake(measure)
        code = main(["bench", *arguments])
        return code, *capsys.readouterr()

    return run


def test_a_run_prints_the_table_and_writes_json_and_page(verb, tmp_path):
    code, out, err = verb("run", "--out", "here")
    assert (code, err) == (0, "")
    assert "what   state" in out
    assert "a note" in out
    assert record.load(tmp_path / "here" / "fake.json")["is_interrupted"] is False
    assert (tmp_path / "here" / "report.html").read_text().startswith("<!doctype html>")


def test_other_json_in_the_folder_is_left_alone_and_a_damaged_result_said_before_anything_runs(verb, tmp_path):
    (tmp_path / "summary.json").write_text('[{"name": "tests", "state": "ok"}]')
    assert verb("run", "--out", ".")[0] == 0
    (tmp_path / "old.json").write_text('{"format": 1, "rows"')
    code, out, err = verb("run", "--out", ".")
    assert (code, out) == (2, "")
    assert "old.json: no JSON" in err


def test_a_result_of_burnish_that_is_wrong_is_exit_6_and_named(verb):
    def wrong(item, _setting):
        state = "void" if item.key == "two" else "ok"
        yield {"key": item.key, "state": state, "reason": "off by 0.1", "time_s": 1.0}

    code, out, _ = verb("run", measure=wrong)
    assert code == 6
    assert "wrong or failed: two: off by 0.1" in out


def test_a_peer_that_fails_is_no_error(verb):
    def fails(item, _setting):
        yield {"key": item.key, "state": "failed", "reason": "no memory", "mode": "peft"}

    assert verb("run", measure=fails)[0] == 0


def test_an_interrupted_run_is_exit_130_and_kept(verb, tmp_path):
    def interrupted(item, _setting):
        yield from good(item, _setting)
        raise KeyboardInterrupt

    assert verb("run", measure=interrupted)[0] == 130
    assert [row["state"] for row in record.load(tmp_path / "runs/bench/fake.json")["rows"]] == [
        "ok",
        "not measured",
        "not measured",
    ]


def test_a_terminated_run_is_kept_like_an_interrupted_one(verb, tmp_path):
    def terminated(item, _setting):
        yield from good(item, _setting)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    assert verb("run", measure=terminated)[0] == 130
    rows = record.load(tmp_path / "runs/bench/fake.json")["rows"]
    assert [row["state"] for row in rows] == ["ok", "not measured", "not measured"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_recorded_run_is_kept_with_the_documents(verb, tmp_path, monkeypatch):
    from burnish.bench import document

    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(document, "write", lambda: [tmp_path / "docs.md"])
    code, out, _ = verb("run", "--record")
    [path] = (tmp_path / "results").glob("*/fake.json")
    assert (code, path.parent.name) == (0, record.load(path)["hardware"])
    assert str(path) in out
    assert "docs.md" in out


def test_an_interrupted_run_is_not_recorded(verb, tmp_path, monkeypatch):
    def interrupted(item, _setting):
        yield from good(item, _setting)
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    assert verb("run", "--record", measure=interrupted)[0] == 130
    assert not (tmp_path / "results").exists()


def test_a_process_that_is_ended_with_the_run_says_so():
    worker = Worker("peft")
    worker.kill()
    with pytest.raises(WorkerDied, match="ended with the run"):
        worker.step()
    worker.close()


def test_a_list_measures_nothing(verb, tmp_path):
    code, out, _ = verb("run", "--list", "--only", "t*")
    assert (code, out.split("\n")) == (0, ["fake: two", "fake: three", ""])
    assert not (tmp_path / "runs").exists()


MISTAKES = {
    "no action": ([], "required"),
    "unknown action": (["everything"], "everything"),
    "rounds": (["run", "--rounds", "0"], "--rounds 0: at least 1"),
    "option of another": (["run", "--times"], "--times is an option of burnish bench compare"),
    "option with a dash": (["run", "--docs-only"], "--docs-only is an option of burnish bench verify"),
    "option of one benchmark": (["run", "--modes", "peft"], "--modes is an option of burnish bench run step"),
    "record and quick": (["run", "--record", "--quick"], "--record keeps a whole full run .* not with --quick"),
    "record and less time": (["run", "--record", "--seconds", "9"], "not with --seconds"),
    "unknown mode": (["profile", "burnis"], "'burnis' is no mode .* did you mean burnish"),
    "no model": (["profile", "burnish", "--model", "no.gguf"], "--model 'no.gguf': no such file"),
    "misspelled shape": (["profile", "burnish", "--model", "llama-1B"], "did you mean llama-1b"),
    "pattern": (["run", "--only", "nothing"], "'nothing' is nothing that fake measures"),
    "folder that is a file": (["run", "--out", "file"], "--out file"),
    "one result to compare": (["compare", "file"], "needs two results"),
    "comparing what is no result": (["compare", "file", "file"], "file: no JSON"),
    "tolerance": (["compare", "a", "b", "--tolerance", "much"], "--tolerance 'much'"),
    "names and nothing measured": (["verify", "fake", "--docs-only"], "measures nothing again"),
    "names for docs": (["docs", "kernels"], "takes no .kernels."),
    "profile of nothing": (["profile"], "needs one mode"),
    "profile of no mode": (["profile", "nothing"], "'nothing' is no mode"),
    "batch": (["profile", "burnish", "--batch", "4*256"], "sequences x tokens"),
    "report of no folder": (["report", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_2(verb, tmp_path, name):
    (tmp_path / "file").write_text("no result")
    arguments, words = MISTAKES[name]
    code, out, err = verb(*arguments)
    assert (code, out) == (2, "")
    assert re.search(words, err, re.IGNORECASE)
    assert err.count("\n") == 1
