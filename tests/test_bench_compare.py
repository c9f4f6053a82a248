"""Comparing results: changes are found, noise is not; and a slowed operation is a regression."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from burnish.bench import bench_kernels, plain, runner, suite
from burnish.bench.benchmark import Benchmark, Choice, Figure, Item, Setting
from burnish.bench.compare import compare, tables
from burnish.bench.stats import quantiles, ratio_interval, student_quantile
from burnish.bench.table import as_text
from burnish.harness.errors import ConfigError
from burnish.kernels.registry import OPS


def figures(row):
    """Ratios (higher is better), times, bytes and counts, as far as the row has them."""
    return [
        Figure(f"{row['key']} · {name}", kind, quantiles(samples)["median"], samples if kind in SAMPLED else (), better)
        for name, kind, samples, better in row["figures"]
    ]


SAMPLED = ("ratio", "time")
FAKE = Benchmark("fake", "for tests", None, None, None, figures, None)


@pytest.fixture(autouse=True)
def fake_suite(monkeypatch):
    known = suite.benchmark
    monkeypatch.setattr(suite, "benchmark", lambda name: FAKE if name == "fake" else known(name))


def row(key, *found, state="ok", reason=None, **fields):
    return {"key": key, "state": state, "reason": reason, "figures": found, **fields}


def ratio(samples, *, better="higher"):
    return ("ratio", "ratio", list(samples), better)


def result(*rows, hardware="cpu-2", **fields):
    return {
        "benchmark": "fake",
        "hardware": hardware,
        "options": {"num_rounds": 5},
        "options_hash": "a",
        "environment": {"libraries": {"torch": "2"}},
        "is_interrupted": False,
        "rows": list(rows),
    } | fields


def only(old, new, **options):
    """The single change between two results of one row."""
    found = compare([result(row("op", old))], [result(row("op", new))], **options)
    [(verdict, change)] = [
        (name, change) for name in ("worse", "better", "same", "unclear") for change in getattr(found, name)
    ]
    assert change.verdict == verdict
    assert found.is_regression == (verdict == "worse")
    return change


def near(middle, *, num_samples=8, noise=0.02, seed=0):
    return list(middle * np.random.default_rng(seed).lognormal(0, noise, num_samples))


def test_a_speed_up_that_halves_is_worse_and_one_that_doubles_better():
    change = only(ratio(near(3.0)), ratio(near(1.5, seed=1)))
    assert change.verdict == "worse"
    assert change.worse_by.low < 2 < change.worse_by.high
    assert change.worse_by.middle == pytest.approx(2, rel=0.05)
    assert only(ratio(near(1.5)), ratio(near(3.0, seed=1))).verdict == "better"


def test_where_lower_is_better_the_directions_are_the_other_way_round():
    assert only(ratio(near(3.0), better="lower"), ratio(near(1.5), better="lower")).verdict == "better"
    assert only(ratio(near(1.5), better="lower"), ratio(near(3.0), better="lower")).verdict == "worse"


def test_a_change_within_the_tolerance_is_the_same_however_sure():
    assert only(ratio([2.0] * 5), ratio([1.85] * 5)).verdict == "same"
    assert only(ratio([2.0] * 5), ratio([1.85] * 5), tolerance=0.05).verdict == "worse"


def test_a_change_that_is_large_but_not_sure_is_unclear():
    assert only(ratio([2.0, 3.0, 4.0]), ratio([1.6, 2.4, 3.2])).verdict == "unclear"


def test_fewer_than_three_samples_prove_nothing():
    change = only(ratio([3.0, 3.0]), ratio([1.0, 1.0, 1.0]))
    assert change.verdict == "unclear"
    assert change.reason == "not enough samples: 2 and 3"
    assert only(ratio([3.0, 3.0]), ratio([3.0, 3.0, 3.1])).verdict == "same"


def test_one_slow_sample_moves_nothing():
    steady = near(2.0, num_samples=9)
    assert only(ratio(steady), ratio([*near(2.0, num_samples=8, seed=1), 0.1])).verdict == "same"
    assert only(ratio(steady), ratio([*near(1.2, num_samples=8, seed=1), 0.1])).verdict == "worse"


def test_absolute_times_are_compared_on_request_and_on_equal_hardware_only():
    slow, fast = ("time", "time", near(2.0), "lower"), ("time", "time", near(1.0, seed=1), "lower")
    old, new = [result(row("op", fast))], [result(row("op", slow))]
    unasked = compare(old, new)
    assert (unasked.worse, unasked.same) == ([], [])
    assert "1 absolute times were not compared: two runs differ in them by the machine" in unasked.notes
    assert [change.key for change in compare(old, new, with_times=True).worse] == ["op · time"]
    elsewhere = compare(old, [result(row("op", slow), hardware="cpu-4")], with_times=True)
    assert elsewhere.worse == []
    assert any("hardware differs" in note for note in elsewhere.notes)
    assert any("measured on different hardware (cpu-2, cpu-4)" in note for note in elsewhere.notes)


@pytest.mark.parametrize(
    ("kind", "before", "after", "verdict"),
    [
        ("bytes", 1000, 1040, "same"),
        ("bytes", 1000, 1060, "worse"),
        ("bytes", 1000, 900, "better"),
        ("bytes", 0, 0, "same"),
        ("bytes", 0, 8, "worse"),
        ("bytes", 8, 0, "better"),
        ("count", 100, 101, "worse"),
        ("count", 100, 100, "same"),
        ("count", 100, 99, "better"),
    ],
)
def test_bytes_have_a_tolerance_and_counts_have_none(kind, before, after, verdict):
    assert only(("what", kind, [before], "lower"), ("what", kind, [after], "lower")).verdict == verdict


@pytest.mark.parametrize(("after", "verdict"), [(950, "same"), (850, "worse"), (1200, "better")])
def test_the_largest_size_that_fits_has_a_tolerance(after, verdict):
    assert (
        only(("max_tokens", "count", [1000], "higher"), ("max_tokens", "count", [after], "higher")).verdict == verdict
    )


@pytest.mark.parametrize("state", ["void", "failed"])
def test_a_row_that_breaks_is_a_regression_without_any_figure(state):
    good, broken = row("op", ratio(near(2.0))), row("op", state=state, reason="result 0 is off by 0.3")
    found = compare([result(good)], [result(broken)])
    assert found.is_regression
    assert [change.reason for change in found.worse] == [f"is {state}: result 0 is off by 0.3"]
    assert "off by 0.3" in "\n".join(as_text(table) for table in tables(found))
    assert [change.reason for change in compare([result(broken)], [result(good)]).better] == [f"was {state}"]


def test_a_peer_that_breaks_is_no_regression_of_ours():
    good, broken = row("sft", ratio([1.0] * 3), mode="sft"), row("sft", state="failed", reason="killed", mode="sft")
    found = compare([result(good)], [result(broken)])
    assert not found.is_regression
    assert found.missing == [("fake", "sft", "is failed: killed")]
    own = [one | {"mode": "burnish-unfused"} for one in (good, broken)]
    assert compare([result(own[0])], [result(own[1])]).is_regression


def test_rows_figures_and_benchmarks_without_a_match_are_listed():
    both = row("op", ratio([1.0] * 3), ("bytes", "bytes", [1], "lower"))
    old = [result(both, row("gone", ratio([1.0] * 3)), row("late")), result(benchmark="other")]
    new = [result(row("op", ratio([1.0] * 3)), row("late", state="not measured", reason="no time"), row("new"))]
    found = compare(old, new)
    assert found.missing == [
        ("fake", "op · bytes", "this figure is not in the second result"),
        ("fake", "gone", "this row is not in the second result"),
        ("fake", "late", "no time"),
        ("other", "", "this benchmark is not in the second result"),
    ]
    assert "fake: 1 rows are in the second result alone" in found.notes
    assert not found.is_regression


def test_what_differs_besides_the_program_is_noted():
    other = {"options": {"num_rounds": 9}, "options_hash": "b", "is_interrupted": True}
    found = compare([result()], [result(**other, environment={"libraries": {"torch": "3", "peft": "1"}})])
    assert found.notes == [
        "fake: measured with different options: num_rounds 5 and 9",
        "fake: measured with different versions: peft None and 1; torch 2 and 3",
        "fake: the second run was interrupted",
    ]


def test_a_run_on_a_busy_machine_is_noted():
    quiet, busy = result(row("op", others_cores=0.05)), result(row("op"), row("other", facts={"others_cores": 1.5}))
    assert not [note for note in compare([quiet], [quiet]).notes if "cores" in note]
    [note] = [note for note in compare([quiet], [busy]).notes if "cores" in note]
    assert "up to 1.50 cores in 1 of 1 parts of the second run" in note


def test_of_many_rows_without_a_match_the_number_is_shown():
    old = result(row("op"), *(row(f"gone {i}", ratio(near(2.0))) for i in range(10)))
    found = compare([old], [result(row("op"))])
    assert len(found.missing) == 10
    text = "\n\n".join(as_text(table) for table in tables(found))
    assert "fake gone 2 " in text
    assert "fake gone 3 " not in text
    assert "fake: 7 more" in text


def test_results_that_cannot_be_compared_are_one_sentence():
    with pytest.raises(ConfigError, match="nothing to compare: fake on one side, other on the other"):
        compare([result()], [result(benchmark="other")])
    with pytest.raises(ConfigError, match="two results of fake on one side"):
        compare([result(), result()], [result()])


def test_the_table_shows_what_changed_with_its_interval_and_hides_what_did_not():
    old = result(row("a", ratio(near(2.0))), row("b", ratio(near(3.0))), row("c", ("peak", "bytes", [2**30], "lower")))
    new = result(row("a", ratio(near(2.0))), row("b", ratio(near(1.5))), row("c", ("peak", "bytes", [2**31], "lower")))
    found = compare([old], [new])
    text = "\n\n".join(as_text(table) for table in tables(found))
    [line] = [line for line in text.splitlines() if line.startswith("fake b · ratio")]
    assert "+100 %" in line
    assert " % to +" in line
    assert "1 GiB  2 GiB" in text
    assert "fake a · ratio" not in text
    assert "fake a · ratio" in "\n\n".join(as_text(table) for table in tables(found, with_same=True))
    assert found.to_dict()["worse"][0]["worse_by"]["low"] > 1.1


def noisy(rng, *, num_figures, drift):
    """A run: every figure's noise is 5 to 15 %, a tenth of the samples is slow, and the whole run drifts together."""
    factor = rng.lognormal(0, drift)
    rows = []
    for i in range(num_figures):
        samples = 2.0 * factor * rng.lognormal(0, rng.uniform(0.05, 0.15), (3, 5, 7, 20)[i % 4])
        samples *= np.where(rng.random(len(samples)) < 0.1, rng.uniform(0.5, 1, len(samples)), 1)
        rows.append(row(f"op {i}", ratio(samples)))
    return result(*rows)


def test_hundreds_of_figures_of_equal_programs_raise_no_alarm():
    """Of 20 comparisons of 200 figures one may err."""
    rng = np.random.default_rng(0)
    runs = [noisy(rng, num_figures=200, drift=0.03) for _ in range(21)]
    found = [compare([old], [new]) for old, new in itertools.pairwise(runs)]
    assert sum(bool(one.worse or one.better) for one in found) <= 1


def test_a_figure_among_hundreds_that_really_changed_is_found():
    rng = np.random.default_rng(1)
    old, new = (noisy(rng, num_figures=200, drift=0.03) for _ in range(2))
    slowed = {3: 1.6, 2: 3.0}  # 20 samples, 7 samples
    for i, factor in slowed.items():
        name, kind, samples, better = new["rows"][i]["figures"][0]
        new["rows"][i]["figures"] = ((name, kind, [sample / factor for sample in samples], better),)
    assert {change.key for change in compare([old], [new]).worse} == {f"op {i} · ratio" for i in slowed}


@pytest.mark.parametrize("num_samples", [3, 5, 20])
def test_an_interval_holds_the_truth_as_often_as_it_says(num_samples):
    rng = np.random.default_rng(2)
    intervals = [
        ratio_interval(rng.lognormal(0, 0.1, num_samples), rng.lognormal(0, 0.1, num_samples), error_rate=0.1)
        for _ in range(400)
    ]
    missed = sum(not interval.low <= 1 <= interval.high for interval in intervals)
    assert missed <= 60  # 40 are allowed for; 60 is three standard deviations more
    assert all(interval.low <= interval.middle <= interval.high for interval in intervals)


def test_the_same_samples_have_the_same_interval():
    below, above = near(1.0), near(1.3, seed=1)
    assert ratio_interval(below, above, error_rate=0.01) == ratio_interval(below, above, error_rate=0.01)


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [(0.975, 2, 4.30265), (0.95, 4, 2.13185), (0.995, 10, 3.16927), (0.9995, 30, 3.64596)],
)
def test_quantiles_of_students_distribution_are_those_of_its_tables(probability, freedom, expected):
    assert student_quantile(probability, freedom) == pytest.approx(expected, rel=1e-5)


def delayed(function, delay_s):
    def call(*arguments, **options):
        time.sleep(delay_s)
        return function(*arguments, **options)

    return call


@pytest.fixture
def measured(monkeypatch):
    """Measures dropout, delayed, against its reference, delayed by 20 ms: a busy machine does not hide that much."""
    case = {"M": 32, "K": 48, "p": 0.1}
    item = Item("dropout", ("dropout",), {"op": "dropout", "case": case, "label": "small", "is_compiled": False})
    peak = {"bytes_per_s": 1e9, "flops_per_s": 1e9}
    monkeypatch.setattr(bench_kernels, "peaks_of", lambda *_: {"bfloat16": peak, "float32": peak})
    benchmark = replace(bench_kernels.BENCHMARK, items=lambda *_: [item])
    reference, op = plain.PLAIN["dropout"], OPS["dropout"]

    def late(problem):
        made = reference(problem)
        return replace(made, function=delayed(made.function, 0.02))

    monkeypatch.setitem(plain.PLAIN, "dropout", late)

    def run(delay_s):
        monkeypatch.setattr(bench_kernels, "OPS", {"dropout": replace(op, function=delayed(op.function, delay_s))})
        return runner.run(benchmark, Setting("cpu", 1, 9, True, lambda _: None), Choice(is_quick=True))

    return run


def test_a_slowed_operation_is_a_regression_and_a_second_run_is_none(measured):
    first, second, slowed = measured(0.01), measured(0.01), measured(0.03)
    assert [row["state"] for one in (first, second, slowed) for row in one["rows"]] == ["ok"] * 3
    assert not compare([first], [second]).is_regression
    found = compare([first], [slowed])
    assert found.is_regression
    [change] = found.worse
    assert (change.benchmark, change.kind) == ("kernels", "ratio")
    assert change.worse_by.low > 1.1
