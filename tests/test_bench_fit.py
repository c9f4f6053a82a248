"""The largest size that fits: searches on made-up peaks, shared probes, limits."""

import pytest
from burnish.bench.fit import Answer, Probe, bracket, known, peak_at, search, time_at
from burnish.bench.memory_cases import GIB, MIB
from burnish.bench.probes import refusal
from made_up import SHAPES, Machine, start

SIZES = range(32, 8193, 32)
SHARE = 0.02


def allow(_size):
    return None


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.15])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_answer_is_confirmed_on_both_sides_with_few_probes(shape, share, at_once, noise):
    machine = Machine(SHAPES[shape], noise=noise)
    curve = start(machine, 256, 1024)
    answer = search(SIZES, GIB, curve, machine, refuse=allow, share=share, at_once=at_once)
    assert answer.bound == "exact"
    above = min(size for size, probe in curve.items() if probe.peak_bytes > GIB)
    assert curve[answer.size].peak_bytes <= GIB < curve[above].peak_bytes
    assert answer.size < above <= max(answer.size + 32, (1 + share) * answer.size)
    if noise == 0:
        assert SHAPES[shape](answer.size) <= GIB < SHAPES[shape](above)
    assert SHAPES[shape](answer.size) <= (1 + noise) * GIB <= (1 + 2 * noise) * SHAPES[shape](above)
    is_rough = noise or shape in ("quadratic", "stairs")
    assert len(machine.asked) <= 2 + (14 if is_rough and share < 0.1 else 8 if is_rough else 4)


def test_a_linear_curve_takes_one_round_of_two():
    machine = Machine(SHAPES["linear"])
    curve = start(machine, 256, 1024)
    search(SIZES, GIB, curve, machine, refuse=allow, share=SHARE, at_once=2)
    assert len(machine.asked) == 4


def test_budgets_share_probes():
    """The second search begins where the first ended, and one within its bracket tries nothing."""
    machine = Machine(SHAPES["linear"])
    curve = start(machine, 256, 1024)
    first = search(SIZES, GIB, curve, machine, refuse=allow, share=SHARE, at_once=2)
    num_tried = len(machine.asked)
    assert search(SIZES, GIB + 1, curve, machine, refuse=allow, share=SHARE, at_once=2) == first
    assert len(machine.asked) == num_tried
    second = search(SIZES, 2 * GIB, curve, machine, refuse=allow, share=SHARE, at_once=2)
    assert second.size > 2 * first.size
    assert len(machine.asked) <= num_tried + 4


def test_a_death_for_want_of_memory_does_not_fit_and_is_bisected():
    machine = Machine(SHAPES["linear"], room=900 * MIB)
    curve = start(machine, 256, 1024)
    answer = search(SIZES, GIB, curve, machine, refuse=allow, share=SHARE, at_once=2)
    assert answer == Answer(1184, "exact")
    assert curve[1216].state == "out of memory"
    machine = Machine(SHAPES["steep"], room=400 * MIB)
    curve = start(machine, 256, 1024)
    assert search(SIZES, GIB, curve, machine, refuse=allow, share=SHARE, at_once=1) == Answer(32, "exact")


def test_nothing_fits_and_everything_fits():
    machine = Machine(lambda n: 2 * GIB + n)
    assert search(SIZES, GIB, {}, machine, refuse=allow, share=SHARE) == Answer(None, "exact")
    assert machine.asked == [32]
    machine = Machine(lambda n: MIB + n)
    curve = start(machine, 256, 1024)
    assert search(SIZES, GIB, curve, machine, refuse=allow, share=SHARE, at_once=2) == Answer(SIZES[-1], "all")
    assert max(curve) == SIZES[-1]


def test_growth_is_bounded_so_that_one_wrong_line_takes_no_machine_down():
    machine = Machine(lambda n: 300 * MIB + (n if n <= 1024 else MIB * n))
    curve = start(machine, 256, 1024)
    search(SIZES, GIB, curve, machine, refuse=allow, share=SHARE)
    assert max(machine.asked) <= 4 * 1024


def test_a_limit_ends_the_search_with_a_bound_and_a_reason():
    machine = Machine(SHAPES["linear"])
    curve = start(machine, 256, 1024)
    refuse = refusal(curve, available_bytes=4 * GIB, num_at_once=2, limit_s=1e9, loading_bytes=lambda _: 0.0)
    answer = search(SIZES, 4 * GIB, curve, machine, refuse=refuse, share=SHARE, at_once=2)
    assert (answer.bound, "4 GiB are free" in answer.reason) == ("at least", True)
    assert answer.size in curve
    most = max(SHAPES["linear"](size) for size in machine.asked if size not in (256, 1024))
    assert 0.9 * 0.4 * 4 * GIB < most <= 0.4 * 4 * GIB


def test_a_model_that_needs_too_much_while_it_is_made_is_not_tried():
    refuse = refusal({}, available_bytes=GIB, num_at_once=1, limit_s=1e9, loading_bytes=float)
    assert refuse(GIB // 2) is None
    assert "are free here" in refuse(GIB)


def test_a_step_that_would_take_too_long_is_not_tried():
    machine = Machine(SHAPES["flat"])
    curve = start(machine, 256, 1024)
    refuse = refusal(curve, available_bytes=2**50, num_at_once=1, limit_s=0.3, loading_bytes=lambda _: 0.0)
    answer = search(SIZES, 64 * GIB, curve, machine, refuse=refuse, share=SHARE)
    assert answer.bound == "at least"
    assert "a step would take about" in answer.reason
    assert 2500 <= answer.size <= 3000
    assert max(machine.asked) <= 3000


def test_a_failure_that_is_not_of_memory_ends_the_search():
    machine = Machine(SHAPES["linear"])
    curve = start(machine, 256, 1024)

    def broken(sizes):
        return [Probe(size, "failed", reason="in a step: KeyError: 'x'") for size in sizes]

    answer = search(SIZES, GIB, curve, broken, refuse=allow, share=SHARE)
    assert answer == Answer(1024, "at least", "in a step: KeyError: 'x'")
    assert known(SIZES, 3 * GIB, curve) == answer
    assert search(SIZES, GIB, {}, broken, refuse=allow, share=SHARE).size is None


def test_where_noise_contradicts_itself_the_smaller_size_counts():
    sized = {32: 10, 64: 30, 96: 15, 128: 40}
    curve = {size: Probe(size, "ok", peak_bytes=peak) for size, peak in sized.items()}
    assert bracket([32, 64, 96, 128], 20, curve) == (0, 1)


def test_estimates_beyond_the_largest_probe():
    machine = Machine(lambda n: 100 + 2 * n)
    assert (peak_at({}, 64), time_at({}, 64)) == (0.0, 0.0)
    one = start(machine, 64)
    assert peak_at(one, 128) == 2 * (100 + 128)
    assert time_at(one, 128) == pytest.approx(4 * 0.0064)
    two = one | start(machine, 256)
    assert peak_at(two, 1024) == 100 + 2048
    assert time_at(two, 1024) == pytest.approx(0.1024)
