"""The model of failures at scale: numbers by hand, and a simulation that agrees with the formula."""

import math

import pytest
from burnish.bench import failures, scaling_document
from burnish.bench.bench_scale import H200
from burnish.bench.failures import LLAMA, RSC, RSC_LARGE, TOLERANCE, expected_share, simulate
from burnish.bench.scaling import LLAMA_8B, Work
from burnish.harness import interval
from hypothesis import given, settings
from hypothesis import strategies as st

FULL = Work(LLAMA_8B, None, num_sequences=2, length=4096)
LORA = Work(LLAMA_8B, 16, num_sequences=2, length=4096)


def test_published_rates_by_hand():
    """54 days of 24 hours over 419 failures are 3.09 h on 16,384 GPUs; 7.9 h on 1,024 are 1,011 h on 8."""
    assert LLAMA.mtbf_s(16384) == pytest.approx(3.093 * 3600, rel=1e-3)
    assert LLAMA.per_day(16384) == pytest.approx(7.759, rel=1e-3)
    assert RSC.mtbf_s(8) == pytest.approx(1011.2 * 3600)
    assert RSC_LARGE.mtbf_s(16384) == 1.8 * 3600
    assert RSC.mtbf_s(1024) == interval.published_mtbf_s("cuda", 1024)


def test_bytes_and_times_of_a_checkpoint_by_hand():
    """8B in full: 12 bytes for each of 8.03e9 parameters; LoRA of rank 16 has 41.9 million."""
    assert failures.checkpoint_bytes(FULL) == 12 * 8_030_261_248
    assert failures.checkpoint_bytes(LORA) == 12 * 41_943_040
    assert failures.save_s(LORA, 1, H200) == pytest.approx(0.503 / 1.0 + 0.503 / 1.5, rel=1e-3)
    assert failures.save_s(FULL, 64, H200) > failures.save_s(FULL, 1, H200)
    assert failures.restart_s(LORA) == pytest.approx(60 + 0.503 / 2 + 0.503 / 1.5, rel=1e-3)


def test_without_failures_only_saving_takes_time():
    share = expected_share(interval_s=900, save_s=100, restart_s=300, mtbf_s=1e12)
    assert share == pytest.approx(0.9)


def test_a_failure_a_minute_leaves_nothing_of_an_hour():
    course = simulate(interval_s=3600, save_s=10, restart_s=10, mtbf_s=60, num_nodes=4, num_failures=1000)
    assert course.trained_s == course.saved_s == 0
    assert course.lost_s > 5 * course.restarted_s > 0


def test_a_simulation_is_that_of_its_seed_and_accounts_for_every_second():
    case = {"interval_s": 600, "save_s": 20, "restart_s": 90, "mtbf_s": 7200, "num_nodes": 16, "num_failures": 500}
    course = simulate(**case, seed=1)
    assert course == simulate(**case, seed=1) != simulate(**case, seed=2)
    total_s = course.trained_s + course.saved_s + course.lost_s + course.restarted_s
    assert total_s == pytest.approx(500 * 7200, rel=5 / math.sqrt(500))
    assert course.trained_s / 600 == pytest.approx(course.saved_s / 20)
    assert course.restarted_s <= 500 * 90


@settings(max_examples=30, deadline=None)
@given(
    mtbf_s=st.floats(1800, 1e6),
    save_s=st.floats(0.1, 120),
    restart_s=st.floats(10, 900),
    num_nodes=st.integers(1, 256),
    seed=st.integers(0, 2**32),
)
def test_simulation_and_formula_agree(mtbf_s, save_s, restart_s, num_nodes, seed):
    """Within five standard errors; a failure costs about half an interval and a restart, give or take as much."""
    found = interval.decide(step_s=1, save_s=save_s, mtbf_s=mtbf_s)
    case = {"interval_s": found.interval_s, "save_s": save_s, "restart_s": restart_s, "mtbf_s": mtbf_s}
    expected = expected_share(**case)
    course = simulate(**case, num_nodes=num_nodes, num_failures=4000, seed=seed)
    assert abs(course.share - expected) <= 5 * (1 - expected) / math.sqrt(4000) + 1e-4


def test_the_interval_of_the_harness_is_the_best_in_the_simulation():
    case = {"save_s": 10.0, "restart_s": 120.0, "mtbf_s": RSC.mtbf_s(1024), "num_nodes": 128}
    best_s = interval.decide(step_s=1, save_s=10, mtbf_s=case["mtbf_s"]).interval_s
    shares = {factor: simulate(interval_s=factor * best_s, **case).share for factor in (0.25, 1, 4)}
    assert shares[1] > shares[0.25] + TOLERANCE
    assert shares[1] > shares[4] + TOLERANCE


def test_every_row_of_the_document_has_formula_and_simulation_within_the_stated_tolerance():
    rows = [row for row in scaling_document.saving_table().rows if "does not fit" not in row]
    shares = [[float(cell.removesuffix(" %")) / 100 for cell in row[-2:]] for row in rows]
    assert len(shares) >= 12
    assert max(abs(formula - simulated) for formula, simulated in shares) <= TOLERANCE


def test_no_row_of_the_document_loses_a_point_against_the_optimum_but_by_saving_more_often():
    """The columns from the right: simulated, expected, share of saving, the optimum's share."""
    for row in scaling_document.saving_table().rows:
        if "does not fit" not in row:
            best, saving, share = (float(cell.removesuffix(" %")) for cell in (row[-4], row[-3], row[-2]))
            assert share >= best - 1.1 or saving <= 100 * interval.MAX_COST


def test_the_document_is_the_same_every_time_and_says_what_was_recorded(tmp_path):
    assert scaling_document.generate() == scaling_document.generate()
    assert "## Soak" not in scaling_document.generate(tmp_path / "nothing.json")
