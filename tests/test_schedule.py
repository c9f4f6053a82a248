import pytest
import torch
import transformers
from burnish.harness.schedule import learning_rate
from engine_cases import LR, make_config

TOTAL = 37


def rates(**schedule):
    config = make_config(**{f"schedule__{name}": value for name, value in schedule.items()})
    return [learning_rate(config, step, TOTAL) for step in range(TOTAL)]


def transformers_rates(make, **options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = make(optimizer, **options)
    found = []
    for _ in range(TOTAL):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 1, 5, TOTAL])
def test_constant_linear_and_cosine_equal_those_of_transformers(warmup):
    for name, make in (
        ("constant", transformers.get_constant_schedule_with_warmup),
        ("linear", transformers.get_linear_schedule_with_warmup),
        ("cosine", transformers.get_cosine_schedule_with_warmup),
    ):
        options = {} if name == "constant" else {"num_training_steps": TOTAL}
        expected = transformers_rates(make, num_warmup_steps=warmup, **options)
        assert rates(lr=name, warmup_steps=warmup) == pytest.approx(expected, abs=1e-15), name


def test_cosine_with_a_floor_equals_that_of_transformers():
    expected = transformers_rates(
        transformers.get_cosine_with_min_lr_schedule_with_warmup,
        num_warmup_steps=4,
        num_training_steps=TOTAL,
        min_lr_rate=0.1,
    )
    assert rates(lr="cosine", warmup_steps=4, min_lr_ratio=0.1) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_wsd_equals_that_of_transformers_after_a_warmup_from_zero(floor):
    """transformers warms up from the floor, burnish from 0 as in the other schedules."""
    expected = transformers_rates(
        transformers.get_wsd_schedule,
        num_warmup_steps=4,
        num_decay_steps=8,
        num_training_steps=TOTAL,
        decay_type="linear",
        min_lr_ratio=floor,
    )
    found = rates(lr="wsd", warmup_steps=4, decay_ratio=0.2, min_lr_ratio=floor)
    assert found[4:] == pytest.approx(expected[4:], abs=1e-15)
    assert found[:4] == rates(lr="linear", warmup_steps=4)[:4]


def test_warmup_ratio_rounds_up_and_steps_override_it():
    assert rates(lr="linear", warmup_ratio=0.1) == rates(lr="linear", warmup_steps=4)
    assert rates(lr="linear", warmup_ratio=0.9, warmup_steps=4) == rates(lr="linear", warmup_steps=4)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_short_runs_have_finite_rates_between_zero_and_the_peak(name, total):
    config = make_config(schedule__lr=name, schedule__warmup_ratio=0.5)
    assert all(0 <= learning_rate(config, step, total) <= LR for step in range(total + 2))
