"""Hangs are named and ended, slow ranks and spikes of the loss are named, and nothing is said about clean runs."""

import json
import math
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from burnish.harness import watchdog
from burnish.harness.detectors import SPIKE_WINDOW, Spikes, Stragglers
from burnish.harness.errors import TrainingError
from burnish.harness.faults import VARIABLE
from burnish.harness.loop import _check_skipped, one_or_nan
from burnish.harness.run_dir import RunDir
from burnish.harness.watchdog import Beat, Watchdog, behind

RECORDED = json.loads((Path(__file__).parent / "recorded_steps.json").read_text())
RANK = """
import os, signal, sys, time, ctypes
from burnish.harness import watchdog
from burnish.harness.run_dir import RunDir
run, rank, what = RunDir(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
watchdog.GRACE_S = 1.0

def waits_for_the_other():
    while True:
        time.sleep(0.01)

with watchdog.Watchdog(run, rank=rank, timeout_s=1.0) as dog:
    dog.note("step", step=3)
    dog.note("step", step=3)
    if what == "waits":
        dog.note("step", step=3)
        waits_for_the_other()
    if what == "stops":
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "sleeps":
        time.sleep(60)
    if what == "keeps the lock":
        time.sleep(1.0)
        ctypes.PyDLL(None).sleep(60)
"""


def ranks(run, *kinds):
    """Exit codes of processes that hang in these ways, and how long the last one took to end."""
    start = time.monotonic()
    command = [sys.executable, "-c", RANK, str(run.path)]
    processes = [subprocess.Popen([*command, str(rank), kind]) for rank, kind in enumerate(kinds)]
    codes = [process.wait(timeout=60) for process in processes]
    return codes, time.monotonic() - start


def new_run(folder):
    return RunDir.create(folder / "run", mode="new")


@pytest.mark.parametrize(("kind", "code"), [("stops", -signal.SIGKILL), ("sleeps", watchdog.EXIT_CODE)])
def test_the_rank_that_hangs_is_named_and_every_process_ends(tmp_path, kind, code):
    run = new_run(tmp_path)
    codes, took_s = ranks(run, "waits", kind)
    assert codes == [watchdog.EXIT_CODE, code]
    assert took_s < 30
    [event] = run.read_jsonl(run.events_jsonl)
    assert (event["event"], event["rank"], event["phase"], event["step"]) == ("hang", 1, "step", 3)
    assert 1.0 <= event["waited_s"] < 10
    stacks = {path.name[:10]: path.read_text() for path in run.hangs.glob("rank_*.txt")}
    assert "waits_for_the_other" in stacks["rank_00000"]
    assert ("in <module>" in stacks["rank_00001"]) == (kind == "sleeps")


def test_a_process_that_holds_the_interpreter_lock_is_ended_with_its_stack(tmp_path):
    run = new_run(tmp_path)
    [code], _ = ranks(run, "keeps the lock")
    assert code == 1
    [stacks] = run.hangs.glob("rank_*.txt")
    assert "Timeout" in stacks.read_text()


def test_progress_is_no_hang_and_nothing_is_left(tmp_path):
    run, hung = new_run(tmp_path), threading.Event()
    with Watchdog(run, rank=0, timeout_s=1.0, on_hang=hung.set) as dog:
        beats = []
        for step in range(20):
            dog.note("step", step=step)
            beats += watchdog.read_beats(run)
            time.sleep(0.1)
    assert not hung.is_set()
    assert {beat.rank for beat in beats} == {0}
    assert max(beat.step for beat in beats) > 5
    assert not list(run.path.iterdir())


def test_some_phases_may_take_longer(tmp_path):
    run, hung = new_run(tmp_path), threading.Event()
    with Watchdog(run, rank=0, timeout_s=1.0, on_hang=hung.set) as dog:
        dog.note("evaluation", step=1)
        time.sleep(2.0)
        assert not hung.is_set()
        dog.note("step", step=1)
        assert hung.wait(10)


def test_work_that_took_long_before_may_take_long_again(tmp_path):
    run, hung = new_run(tmp_path), threading.Event()
    with Watchdog(run, rank=0, timeout_s=0.5, on_hang=hung.set) as dog:
        dog.note("first_step", step=0)
        time.sleep(1.2)
        dog.note("step", step=1)
        time.sleep(1.5)
        assert not hung.is_set()
        assert hung.wait(20)


def beat(rank, *, step=3, count=2, since=100.0, pid=2**22 + 1):
    return Beat(rank, step, "step", count, since, pid=pid, start_ticks=1, host="elsewhere")


def test_who_is_behind():
    assert behind([beat(0), beat(1, step=2), beat(2, since=99.0)]).rank == 1
    assert behind([beat(0), beat(1), beat(2, count=1)]).rank == 2
    assert behind([beat(0), beat(1, since=99.0)]).rank == 1


def test_faults_name_who_and_when(tmp_path, monkeypatch):
    from burnish.harness import faults

    marker = tmp_path / "marker"
    wanted = [
        {"rank": 1, "step": 2, "point": "step", "action": "raise", "once": str(marker)},
        {"step": 3, "point": "save.after_part", "action": "nan"},
    ]
    monkeypatch.setenv(VARIABLE, json.dumps(wanted))
    monkeypatch.setattr(faults, "_armed", {})
    faults.arm_from_environment(0)
    faults.faultpoint("step", step=2)
    faults.arm_from_environment(1)
    faults.faultpoint("step", step=1)
    with pytest.raises(RuntimeError, match="injected at step"):
        faults.faultpoint("step", step=2)
    assert marker.exists()
    faults.faultpoint("step", step=2)
    faults.faultpoint("save.after_part")
    assert faults.loss_factor() == 1
    faults.faultpoint("step", step=3)
    faults.faultpoint("save.after_part")
    assert math.isnan(faults.loss_factor())
    faults.disarm()


@pytest.mark.parametrize("curve", RECORDED["losses"])
def test_recorded_losses_hold_no_spike_but_the_one_that_is_put_there(curve):
    losses = RECORDED["losses"][curve]
    assert len(losses) == 1000
    spikes = Spikes()
    assert [step for step, loss in enumerate(losses) if spikes.limit(loss) is not None] == []
    rng = random.Random(0)
    for step in rng.sample(range(SPIKE_WINDOW, 1000), 20):
        spikes = Spikes(losses[step - SPIKE_WINDOW : step])
        assert spikes.limit(2 * max(losses[step - SPIKE_WINDOW : step]))


def synthetic_times(rng, num_ranks):
    """Seconds and elements of a step: proportional to the elements, with noise of 20 % and hiccups of 1 in 50."""
    elements = [float(rng.randint(200, 2000)) for _ in range(num_ranks)]
    seconds = [1e-4 * size * rng.lognormvariate(0, 0.2) * (4 if rng.random() < 0.02 else 1) for size in elements]
    return seconds, elements


@pytest.mark.parametrize("num_ranks", [2, 8])
def test_a_rank_three_times_slower_is_named_within_20_steps_and_no_other_in_1000(num_ranks):
    rng = random.Random(num_ranks)
    clean, slow = Stragglers(num_ranks), Stragglers(num_ranks)
    steps = [synthetic_times(rng, num_ranks) for _ in range(1000)]
    assert not [found for seconds, elements in steps if (found := clean.see(seconds, elements))]
    named = [slow.see([3 * seconds[0], *seconds[1:]], [1000.0] * num_ranks) for seconds, _ in even(steps)]
    assert [list(found) for found in named if found] == [[0]]
    assert next(step for step, found in enumerate(named, start=1) if found) <= 20


def even(steps):
    """The same steps with micro-batches of 1,000 elements."""
    return [([1000 * time_s / size for time_s, size in zip(*step, strict=True)], None) for step in steps]


@pytest.mark.parametrize("curve", RECORDED["losses"])
def test_recorded_times_name_nobody_and_most_slowed_ranks_within_20_steps(curve):
    """They come from 2 cores on which 9 processes wanted to run: real ranks were slow now and then."""
    times, elements = RECORDED["times"][curve], RECORDED["elements"][curve]
    clean = Stragglers(2)
    assert not [step for step in zip(times, elements, strict=True) if clean.see(*step)]
    named = [
        slowed(times[begin : begin + 20], elements[begin : begin + 20], rank)
        for rank in (0, 1)
        for begin in range(0, 1000, 20)
    ]
    assert named.count(True) > 0.85 * len(named)


def slowed(times, elements, rank):
    """Whether a rank that takes three times as long, and no other, is named. Seconds count tenfold for tiny steps."""
    stragglers, names = Stragglers(2), []
    for seconds, sizes in zip(times, elements, strict=True):
        names += stragglers.see([10 * (3 if r == rank else 1) * time_s for r, time_s in enumerate(seconds)], sizes)
    return names == [rank]


def test_skipped_steps_end_a_run_after_5_in_a_row_or_1_percent():
    _check_skipped(10, 4, 5, 100)
    with pytest.raises(TrainingError, match="5 steps in a row were skipped"):
        _check_skipped(10, 5, 5, 1000)
    _check_skipped(900, 1, 10, 1000)
    with pytest.raises(TrainingError, match=r"11 steps were skipped.*\(up to step 901 of 1000"):
        _check_skipped(900, 1, 11, 1000)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_makes_its_gradient_so(value):
    weight = torch.ones(3, requires_grad=True)
    loss = weight.sum() + value  # its gradient alone would be 1
    (loss * one_or_nan(loss)).backward()
    assert weight.grad.isnan().all()
    weight.grad = None
    finite = weight.sum()
    (finite * one_or_nan(finite)).backward()
    assert (weight.grad == 1).all()
