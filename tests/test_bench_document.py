"""The document made from results, and its verification: edits by hand, drift in both directions, and no false alarm."""

import json
import re

import numpy as np
import pytest
from burnish.bench import document, record, runner, suite
from burnish.bench.benchmark import Benchmark, Choice, Figure, Item, Setting, Table
from burnish.bench.stats import paired_ratios, quantiles
from burnish.bench.table import as_text
from burnish.bench.verify import (
    DRIFT,
    document_problems,
    line_problems,
    result_problems,
    tables,
    verify,
)
from burnish.harness.errors import ConfigError

README = "Losses stay.\n<!-- figures -->old text<!-- /figures -->\nThe end.\n"
KEYS = ("lora · small", "lora · large")


class Machine:
    """What the fake benchmark measures: `speed_up` with noise, `time_s`, `num_bytes`, `count`; None fails."""

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.speed_up, self.time_s, self.num_bytes, self.count = 3.0, 0.2, 2**20, 7
        self.noise, self.error, self.rounds_seen = 0.03, None, []

    def measure(self, item, setting):
        if self.error is not None:
            raise self.error
        if self.speed_up is None:
            yield {"key": item.key, "state": "failed", "reason": "out of memory"}
            return
        num_rounds = setting.num_rounds or 12
        self.rounds_seen.append((num_rounds, setting.num_threads))
        own = [float(self.time_s * self.rng.lognormal(0, self.noise)) for _ in range(num_rounds)]
        peer = [time_s * self.speed_up * float(self.rng.lognormal(0, self.noise)) for time_s in own]
        yield {
            "key": item.key,
            "state": "ok",
            "reason": None,
            "times_s": own,
            "time_s": quantiles(own),
            "ratio": paired_ratios(peer, own),
            "num_bytes": self.num_bytes,
            "count": self.count,
        }


def figures(row):
    return [
        Figure(f"{row['key']} · ratio", "ratio", row["ratio"]["median"], row["ratio"]["samples"], "higher"),
        Figure(f"{row['key']} · time", "time", row["time_s"]["median"], row["times_s"], "lower"),
        Figure(f"{row['key']} · bytes", "bytes", row["num_bytes"], (), "lower"),
        Figure(f"{row['key']} · count", "count", row["count"], (), "lower"),
    ]


def fake_tables(result):
    rows = [
        (row["key"], f"{1000 * row['time_s']['median']:.1f}", f"{row['ratio']['median']:.2f}")
        if row["state"] == "ok"
        else (row["key"], row["state"], "")
        for row in result["rows"]
    ]
    return [Table("Fakes", ("what", "ms", "faster by"), rows, ("a note",))]


@pytest.fixture
def machine(monkeypatch):
    found = Machine()
    fake = Benchmark(
        name="fake",
        summary="for tests",
        items=lambda device, _: [Item(f"{key} · {device}", (f"{key} · {device}",)) for key in KEYS],
        prepare=lambda _: {},
        measure=found.measure,
        figures=figures,
        tables=fake_tables,
    )
    monkeypatch.setattr(suite, "MODULES", {"fake": ""})
    monkeypatch.setattr(suite, "benchmark", lambda _: fake)
    return found


def setting(**fields):
    return Setting(**{"device": "cpu", "num_threads": 1, "num_rounds": None, "is_quick": False} | fields, say=print)


@pytest.fixture
def checkout(machine, tmp_path):
    """Results of this machine, and the documents made of them: the arguments of `verify`."""
    found = {"results": tmp_path / "results", "docs": tmp_path / "benchmarks.md", "readme": tmp_path / "README.md"}
    measure_into(found["results"] / record.hardware_here("cpu"))
    found["docs"].write_text("")
    found["readme"].write_text(README)
    found["scaling"] = tmp_path / "scaling.md"
    found["scaling"].write_text("")
    write(found)
    return found


def measure_into(folder):
    folder.mkdir(parents=True, exist_ok=True)
    runner.run(suite.benchmark("fake"), setting(), Choice(), path=folder / "fake.json")


def write(checkout):
    return document.write(
        results=checkout["results"],
        document=checkout["docs"],
        readme=checkout["readme"],
        scaling=checkout["scaling"],
    )


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def edit_result(checkout, change):
    """Changes a committed result, and makes the documents of it."""
    [path] = checkout["results"].glob("*/fake.json")
    result = json.loads(path.read_text())
    change(result)
    record.save(path, result)
    write(checkout)
    return path


def text_of(found):
    return "\n\n".join(as_text(table) for table in tables(found))


def test_what_was_just_measured_holds(checkout, machine):
    found = verify(setting(), **checkout)
    assert found.problems == []
    assert (found.num_figures, found.num_checked, found.unchecked) == (8, 8, {})
    assert machine.rounds_seen[-1] == (7, 1)
    assert "the documents hold" in text_of(found)
    assert found.to_dict()["is_ok"]


@pytest.mark.parametrize("name", ["docs", "readme"])
def test_a_figure_edited_by_hand_is_found(checkout, name):
    if name == "readme":
        edit(checkout["readme"], "[benchmarks]", "9.9 times [benchmarks]")
        says = "9.9 times"
    else:
        digits = re.search(r"\| \d+\.\d \| (\d\.\d\d) \|", checkout["docs"].read_text())[1]
        says = f"{digits[:-1]}{(int(digits[-1]) + 1) % 10}"
        edit(checkout["docs"], f"| {digits} |", f"| {says} |")
    found = verify(setting(), is_remeasured=False, **checkout)
    [problem] = found.problems
    assert re.match(rf"{checkout[name].name} line \d+: says '.*{says}.*', the results say '.*'", problem)
    assert "1 problems" in text_of(found)
    write(checkout)
    assert verify(setting(), is_remeasured=False, **checkout).problems == []


def test_lines_that_are_missing_or_too_many_are_named():
    assert list(line_problems("a\nc", "a\nb\nc")) == ["before line 2: the results say 'b', which is missing"]
    assert list(line_problems("a\nb\nc", "a\nc")) == ["line 2: says 'b', of which the results say nothing"]
    assert list(line_problems("a", "a")) == []


def test_of_a_long_line_only_what_differs_is_shown_with_what_is_next_to_it():
    words = [str(number) for number in range(40)]
    here, there = " ".join(words), " ".join([*words[:20], "x", *words[21:]])
    [problem] = line_problems(here, there)
    assert problem == (
        "line 1: says '… 14 15 16 17 18 19 20 21 22 23 24 25 26 …', "
        "the results say '… 14 15 16 17 18 19 x 21 22 23 24 25 26 …'"
    )
    assert list(line_problems("1 2", "1 2 2")) == ["line 1: says '1 2', the results say '1 2 2'"]


def test_documents_that_are_not_there_or_have_no_place_for_figures_are_one_sentence(checkout, tmp_path):
    checkout["readme"].write_text("nothing marked")
    assert document_problems(**checkout) == ["README.md has no <!-- figures --> … <!-- /figures --> around its figures"]
    [problem] = document_problems(**checkout | {"docs": tmp_path / "nowhere.md"})
    assert "nowhere.md: No such file" in problem


def median_of_ratio(result):
    result["rows"][0]["ratio"]["median"] *= 1.2


def sample(result):
    result["rows"][0]["times_s"][0] *= 1.001


EDITS = {
    "median of a ratio": (median_of_ratio, "lora · small · cpu ratio median is"),
    "median of times": (lambda one: one["rows"][1]["time_s"].update(median=1.0), "time_s median is 1"),
    "one sample": (lambda one: one["rows"][0].update(times_s=[1.0, 2.0, 3.0]), "its samples say 2"),
    "no commit": (lambda one: one["environment"].update(git_commit=None), "names no commit"),
    "other hardware": (lambda one: one.update(hardware="cpu-64"), "not on cpu-64"),
    "other options": (lambda one: one["options"].update(num_threads=64), "options_hash"),
    "a part": (lambda one: one["options"].update(only=["lora"]), "no whole run: only lora"),
    "interrupted": (lambda one: one.update(is_interrupted=True), "no whole run: is_interrupted"),
    "a row twice": (lambda one: one["rows"].append(one["rows"][0]), "2 rows lora · small · cpu"),
    "a row without samples": (lambda one: one["rows"][0].pop("ratio"), "KeyError 'ratio'"),
    "another benchmark": (lambda one: one.update(benchmark="other"), "'other' is no benchmark"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_result_edited_by_hand_is_found(checkout, name):
    change, expected = EDITS[name]
    [path] = checkout["results"].glob("*/fake.json")
    result = json.loads(path.read_text())
    assert result_problems(path, result) == []
    change(result)
    found = result_problems(path, result)
    assert any(expected in problem for problem in found), found


def test_an_edited_result_fails_the_verification_though_the_documents_agree_with_it(checkout):
    edit_result(checkout, median_of_ratio)
    found = verify(setting(), is_remeasured=False, **checkout)
    assert any("fake.json: lora · small · cpu ratio median is" in problem for problem in found.problems)


def test_a_file_that_is_no_result_is_one_sentence(checkout):
    (checkout["results"] / "cpu-9").mkdir()
    (checkout["results"] / "cpu-9" / "fake.json").write_text("{}")
    found = verify(setting(), is_remeasured=False, **checkout)
    assert any("cpu-9/fake.json: not a result" in problem for problem in found.problems)


@pytest.mark.parametrize("factor", [2.0, 0.5])
@pytest.mark.parametrize(("what", "kind"), [("speed_up", "ratio"), ("num_bytes", "bytes"), ("count", "count")])
def test_drift_is_found_in_both_directions(checkout, machine, what, kind, factor):
    setattr(machine, what, getattr(machine, what) * factor)
    found = verify(setting(), **checkout)
    assert [change.kind for change in found.drifted] == [kind] * 2
    assert len(found.problems) == 2
    better = (factor > 1) == (what == "speed_up")
    pattern = rf"documented .*, measured again .*: (2\.\d\d|1\.[89]\d) times {'better' if better else 'worse'}"
    assert all(re.search(pattern, problem) for problem in found.problems)


@pytest.mark.parametrize(("factor", "num_problems"), [(3.5, 2), (0.28, 2), (1.6, 0), (0.6, 0)])
def test_absolute_times_may_differ_by_a_factor_of_two(checkout, machine, factor, num_problems):
    machine.time_s *= factor
    assert DRIFT["time"] == 1.0
    assert len(verify(setting(), **checkout).problems) == num_problems


def test_noise_is_no_drift(checkout, machine):
    """20 verifications of ratios with 10 % noise that drift by 10 % together: 5 % of them may err."""
    machine.noise = 0.1
    measure_into(checkout["results"] / record.hardware_here("cpu"))
    write(checkout)
    drifted = 0
    for i in range(20):
        machine.speed_up = 3.0 * (1.1 if i % 2 else 0.9)
        drifted += bool(verify(setting(), **checkout).problems)
    assert drifted <= 1


def test_a_row_that_fails_now_is_a_problem(checkout, machine):
    machine.speed_up = None
    found = verify(setting(), **checkout)
    assert found.num_checked == 0
    assert any("lora · large · cpu: documented, and now is failed: out of memory" in one for one in found.problems)


def test_figures_of_other_hardware_are_not_checked_here(checkout, machine):
    here = record.hardware_here("cpu")
    result = json.loads((checkout["results"] / here / "fake.json").read_text())
    result["environment"]["num_cpus"] = 64
    result["hardware"] = record.hardware(result["environment"], "cpu")
    (checkout["results"] / here).rename(checkout["results"] / result["hardware"])
    record.save(checkout["results"] / result["hardware"] / "fake.json", result)
    write(checkout)
    machine.speed_up = 1.0
    found = verify(setting(), **checkout)
    assert (found.problems, found.num_figures, found.num_checked) == ([], 8, 0)
    assert found.unchecked == {f"measured on {result['hardware']}": 8}
    assert f"not measured again: measured on {result['hardware']}" in text_of(found)


def test_only_what_is_named_is_measured_again_and_what_takes_hours_only_then(checkout, monkeypatch):
    assert verify(setting(), names=["other"], **checkout).unchecked == {"not asked for": 8}
    monkeypatch.setattr(suite, "LONG", ("fake",))
    assert verify(setting(), **checkout).unchecked == {"takes hours: burnish bench verify fake": 8}
    assert verify(setting(), names=["fake"], **checkout).num_checked == 8


def test_what_the_time_does_not_reach_is_not_checked(checkout):
    found = verify(setting(), limit_s=0, **checkout)
    assert (found.problems, found.num_checked) == ([], 0)
    assert found.unchecked == {runner.OUT_OF_TIME: 8}


def test_the_document_is_the_same_bytes_every_time_and_shows_every_row(checkout):
    text = checkout["docs"].read_text()
    assert document.generate(checkout["results"]) == text
    assert text.startswith("<!-- Made by `burnish bench docs`")
    assert "### fake: for tests" in text
    for key in KEYS:
        assert f"| {key} · cpu |" in text
    assert "| lora, cuda | not measured | small; large |" in text
    [result] = [json.loads(path.read_text()) for path in checkout["results"].glob("*/fake.json")]
    for part in (result["environment"]["cpu"], result["time"][:10], result["hardware"]):
        assert part in text


def test_rows_of_a_gpu_result_fill_the_gpu_section_and_the_others_say_not_measured(checkout):
    [path] = checkout["results"].glob("*/fake.json")
    result = json.loads(path.read_text())
    result |= {"device": "cuda", "hardware": document.GPU_HARDWARE}
    result["environment"]["gpu"] = "NVIDIA H200"
    result["rows"] = [row | {"key": "lora · small · cuda"} for row in result["rows"][:1]]
    folder = checkout["results"] / document.GPU_HARDWARE
    folder.mkdir()
    record.save(folder / "fake.json", result)
    text = document.generate(checkout["results"]).partition("## On a GPU")[2]
    assert re.search(r"\| lora · small · cuda \| \d+\.\d \| \d\.\d\d \|", text)
    assert "| lora · large · cuda | not measured |" in text


def test_without_results_there_is_a_document_that_says_so(machine, tmp_path):
    text = document.generate(tmp_path)
    assert document.NOTHING_YET in text
    assert not re.search(r"\d\.\d\dx? \|", text.replace("1.05x", "").replace("1.3x", ""))


def test_the_document_names_every_benchmark_and_every_row_of_the_gpu_catalogue(tmp_path):
    text = document.generate(tmp_path)
    for name in suite.MODULES:
        section = text.partition(f"### {name}: ")[2].partition("\n### ")[0]
        cells = {cell for line in section.splitlines() for cell in re.split(r" \| |\| | \||; |, ", line)}
        items = suite.benchmark(name).items("cuda", Choice())
        assert items
        for key in (key for item in items for key in item.rows):
            assert set(re.split(" · |, ", key)) <= cells, key


def test_every_target_is_read_from_rows_of_the_gpu_catalogue():
    keys = {item.key for item in suite.benchmark("kernels").items("cuda", Choice())}
    assert {key for _, _, read, _ in document.TARGETS for key in read} <= keys
    frozen = {"time_s": {"median": 2e-3}}
    own = {"time_s": {"median": 2.1e-3}}
    row = {
        "contenders": {"burnish": own, "frozen": frozen},
        "ratio": {"bitsandbytes": {"median": 1.4}},
        "share_of_peak": 0.87,
        "case": {"M": 1000},
    }
    cells = [line[2] for line in document.targets_table(dict.fromkeys(keys, row)).rows]
    assert cells == ["1.05x", "87 %, 1.4x", "2.1 µs", "2.10 ms"]


def test_the_readme_quotes_the_steps_of_the_first_cpu():
    def step(mode, faster, gib):
        return {
            "key": f"{document.README_CASE} · {mode}",
            "state": "ok",
            "faster": {"median": faster},
            "peak_bytes": gib * 2**30,
        }

    rows = [step("burnish", None, 1.5), step("peft", 3.64, 4), step("sft", 7.75, 2.4)]
    result = {"environment": {"num_cpus": 2}, "rows": rows}
    sentence = document.figures_sentence({"cpu-2": {"step": result}})
    assert "On 2 CPU cores a step is 3.6 times faster than PEFT's" in sentence
    assert "7.8 times faster than SFTTrainer's, at 0.38 of PEFT's memory" in sentence
    rows[2]["state"] = "failed"
    assert not re.search(r"\d", document.figures_sentence({"cpu-2": {"step": result}}))


def test_the_readme_keeps_all_but_its_figures(tmp_path):
    text = document.with_figures(README, tmp_path)
    assert text.startswith("Losses stay.\n<!-- figures -->\n  How much faster")
    assert text.endswith("<!-- /figures -->\nThe end.\n")
    assert document.with_figures(text, tmp_path) == text
    with pytest.raises(ConfigError, match="figures"):
        document.with_figures("nothing", tmp_path)


def test_the_documents_of_this_repository_are_what_its_results_say():
    assert document_problems(results=record.RESULTS, docs=document.DOCUMENT, readme=document.README) == []


def test_the_results_of_this_repository_agree_with_themselves():
    for path in sorted(record.RESULTS.glob("*/*.json")):
        assert result_problems(path, record.load(path)) == []
