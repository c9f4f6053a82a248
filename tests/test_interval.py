"""How often a run saves: the published formulas, bounds of cost and loss, and ranks that agree."""

import math
import time
from itertools import pairwise

import pytest
import tiny
from burnish.harness import interval
from burnish.harness.config import Checkpoint
from burnish.harness.config_io import load_config
from burnish.harness.interval import (
    GPU_MTBF_S,
    LONGEST_S,
    MAX_COST,
    NODE_MTBF_S,
    Auto,
    Fixed,
    decide,
    mean_time_between_failures_s,
    optimum_s,
    published_mtbf_s,
)
from burnish.launch import training
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

seconds = st.floats(1e-3, 1e5)


def expected_s(interval_s, save_s, mtbf_s):
    """Per second of training, by Daly's complete model; a restart moves no minimum."""
    return mtbf_s * math.expm1((interval_s + save_s) / mtbf_s) / interval_s


@given(save_s=st.floats(0.01, 300), ratio=st.floats(10, 1e5))
def test_no_other_interval_is_expected_to_be_faster(save_s, ratio):
    mtbf_s = ratio * save_s
    best_s = optimum_s(save_s, mtbf_s)
    cost = expected_s(best_s, save_s, mtbf_s)
    for other in (0.5, 0.8, 0.95, 1.05, 1.25, 2.0):
        assert cost <= expected_s(other * best_s, save_s, mtbf_s) * (1 + 1e-4)


def test_the_optimum_by_hand():
    """A save of 50 s, a failure in 10,000 s: Young's sqrt(2 * 50 * 10000) is 1000 s; Daly's terms 1/60 and 1/3600."""
    assert optimum_s(50, 10_000) == pytest.approx(1000 * (1 + 1 / 60 + 1 / 3600) - 50)
    assert optimum_s(300, 100) == 100


@given(step_s=seconds, save_s=seconds, mtbf_s=st.floats(1, 1e9))
def test_saving_more_often_than_the_optimum_costs_little_and_loses_little(step_s, save_s, mtbf_s):
    found = decide(step_s=step_s, save_s=save_s, mtbf_s=mtbf_s)
    best_s = optimum_s(save_s, mtbf_s)
    assert min(best_s, LONGEST_S) <= found.interval_s <= best_s
    if found.interval_s < best_s:
        assert save_s <= MAX_COST * (found.every_steps * step_s + save_s) * (1 + 1e-9)
    assert found.bound == "cost" or found.interval_s <= LONGEST_S or found.interval_s == best_s
    assert (found.every_steps - 1) * step_s <= found.interval_s <= found.every_steps * step_s * (1 + 1e-9)


def test_what_bounds_the_interval():
    mtbf_s = published_mtbf_s("cuda", 1024)
    assert decide(step_s=1, save_s=5, mtbf_s=published_mtbf_s("cuda", 8)).bound == "longest"
    assert decide(step_s=1, save_s=5, mtbf_s=mtbf_s).bound == "optimum"
    assert decide(step_s=1, save_s=100, mtbf_s=published_mtbf_s("cuda", 8)).bound == "cost"
    assert decide(step_s=1, save_s=100, mtbf_s=published_mtbf_s("cuda", 8)).interval_s == pytest.approx(
        100 * (1 / 0.035 - 1)
    )


def test_where_machines_fail_often_saving_may_cost_more():
    """A save of 1,000 s, a failure in 7.9 h: any longer interval loses more than it saves."""
    found = decide(step_s=10, save_s=1000, mtbf_s=published_mtbf_s("cuda", 1024))
    assert found.bound == "optimum"
    assert 1000 / (found.interval_s + 1000) > MAX_COST


def test_more_machines_fail_more_often():
    assert published_mtbf_s("cuda", 1024) == pytest.approx(7.9 * 3600)
    assert published_mtbf_s("cpu", 1) == NODE_MTBF_S == published_mtbf_s("cuda", 8) == GPU_MTBF_S / 8


def test_a_run_that_fails_more_often_than_published_goes_by_its_own_rate():
    failures = [{"event": "worker_failure", "time": 1100.0}, {"event": "restart", "time": 1101.0}]
    assert mean_time_between_failures_s([], published_s=1e6, running_s=0) == 1e6
    assert mean_time_between_failures_s(failures, published_s=1e6, running_s=600) == 1e6
    assert mean_time_between_failures_s(3 * failures, published_s=1e6, running_s=600) == 200
    assert mean_time_between_failures_s(3 * failures, published_s=100, running_s=600) == 100


def test_failures_at_the_start_count_less_the_longer_the_run_goes_on():
    now, told = time.time(), []
    events = [{"event": "plan", "time": now - 60}] + 2 * [{"event": "worker_failure", "time": now - 30}]
    clock = iter(range(0, 10**9, 10))
    auto = Auto(
        first_step=0,
        is_first=True,
        published_s=1e6,
        events=events,
        share=lambda number: number,
        tell=told.append,
        clock=lambda: next(clock),
    )
    for done in range(1, 1000):
        if auto.is_due(done):
            auto.saved(done, 1.0)
    assert told[-1]["mtbf_s"] > 10 * told[0]["mtbf_s"]


class Ranks:
    """Several Autos that take steps on one made-up clock; rank 0's speaks for all."""

    def __init__(self, num_ranks=3, *, first_step=0, mtbf_s=1e6, save_times_s=()):
        self.now, self.events, self.number, self.num_looks = 0.0, [], 0.0, 0
        self.autos = [
            Auto(
                first_step=first_step,
                is_first=rank == 0,
                published_s=mtbf_s,
                events=[{"event": "checkpoint", "time": 0.0, "time_s": time_s} for time_s in save_times_s],
                share=self.share,
                tell=self.events.append,
                # Clocks of hosts differ; only rank 0's counts.
                clock=lambda rank=rank: (1 + rank) * self.now,
            )
            for rank in range(num_ranks)
        ]

    def share(self, number):
        """The sum over ranks, as an all-reduce gives it: rank 0 asks first here."""
        self.num_looks += 1
        self.number = number or self.number
        return self.number

    def step(self, done, time_s, *, save_s):
        self.now += time_s
        self.number = 0.0
        [is_due] = {auto.is_due(done) for auto in self.autos}
        if is_due:
            self.now += save_s
            for auto in self.autos:
                auto.saved(done, save_s)
        return is_due

    def run(self, times_s, *, save_s, first_step=0):
        """The steps after which was saved."""
        return [
            done for done, time_s in enumerate(times_s, start=first_step + 1) if self.step(done, time_s, save_s=save_s)
        ]


@given(
    times_s=st.lists(st.floats(0.01, 100), min_size=1, max_size=300),
    save_s=st.floats(0.1, 30),
    mtbf_s=st.floats(100, 1e7),
)
def test_ranks_agree_and_save_no_more_often_than_decided_whatever_the_steps_take(times_s, save_s, mtbf_s):
    ranks = Ranks(mtbf_s=mtbf_s, save_times_s=[save_s])
    saves = ranks.run(times_s, save_s=save_s)
    least_s = min(decide(step_s=1, save_s=save_s, mtbf_s=mtbf_s).interval_s, LONGEST_S)
    for before, after in pairwise([0, *saves]):
        assert sum(times_s[before:after]) >= least_s * (1 - 1e-9)
    assert Ranks(mtbf_s=mtbf_s, save_times_s=[save_s]).run(times_s, save_s=save_s) == saves


def test_steps_of_one_speed_are_saved_at_the_interval_with_few_looks():
    ranks = Ranks(num_ranks=1, mtbf_s=20_000, save_times_s=[4.0])
    saves = ranks.run([1.0] * 2000, save_s=4.0)
    interval_s = decide(step_s=1, save_s=4, mtbf_s=20_000).interval_s
    assert {after - before for before, after in pairwise([0, *saves])} == {math.ceil(interval_s)}
    assert ranks.num_looks <= 20 * len(saves)
    assert [event["every_steps"] for event in ranks.events] == [math.ceil(interval_s)]


def test_a_run_that_becomes_slower_is_saved_after_fewer_steps():
    ranks = Ranks(mtbf_s=20_000, save_times_s=[4.0])
    saves = ranks.run([1.0] * 200 + [10.0] * 200, save_s=4.0)
    times_s = [1.0] * 200 + [10.0] * 200
    interval_s = decide(step_s=1, save_s=4, mtbf_s=20_000).interval_s
    assert sum(times_s[: saves[0]]) <= 2 * interval_s
    assert saves[2] - saves[1] == math.ceil(interval_s / 10)
    assert [event["event"] for event in ranks.events] == ["checkpoint_interval"] * len(ranks.events)
    assert len(ranks.events) >= 2


def test_a_short_run_is_not_saved_on_the_way():
    assert Ranks().run([0.5] * 400, save_s=1.0) == []


def test_a_run_that_goes_on_counts_from_its_first_step():
    ranks = Ranks(first_step=1000, mtbf_s=20_000, save_times_s=[4.0])
    [first, *_] = ranks.run([1.0] * 500, save_s=4.0, first_step=1000)
    assert first == 1000 + math.ceil(decide(step_s=1, save_s=4, mtbf_s=20_000).interval_s)


def test_a_number_is_a_number_of_steps():
    assert [done for done in range(1, 10) if Fixed(3).is_due(done)] == [3, 6, 9]
    assert not Fixed(None).is_due(3)
    assert [Checkpoint(every_steps=value).every_steps for value in ("auto", 7, None)] == ["auto", 7, None]
    assert Checkpoint().every_steps == "auto"
    for wrong in ("often", 0, 1.5):
        with pytest.raises(ValidationError):
            Checkpoint(every_steps=wrong)


def trained(folder, name, every_steps):
    """(events, losses) of a whole run of 20 steps."""
    adapter = {"method": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}
    changes = {"adapter": adapter, "train__max_steps": 20, "generation": {"prompts": []}}
    path = tiny.write_config(folder, name=name, checkpoint={"every_steps": every_steps}, **changes)
    run = training.train(load_config([str(path)]), mode="new", report=lambda record: None)
    return run.read_jsonl(run.events_jsonl), tiny.losses(run)


def test_a_run_saves_by_itself_says_how_often_and_computes_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(interval, "ASSUMED_SAVE_S", 1e-4)
    monkeypatch.setattr(interval, "LONGEST_S", 0.02)
    events, losses = trained(tmp_path, "auto", "auto")
    saves = [event["step"] for event in events if event["event"] == "checkpoint"]
    assert len(saves) > 1
    assert saves[-1] == 20
    [told, *_] = [event for event in events if event["event"] == "checkpoint_interval"]
    assert told["every_steps"] >= 1
    assert told["bound"] == "longest"
    assert trained(tmp_path, "never", None)[1] == losses
