"""The guard that a busy machine cannot fool: counts against a record, and a ratio of CPU times of one run."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from burnish.bench import guard
from burnish.bench.counts import num_launches
from burnish.kernels.op import use_backend
from burnish.kernels.registry import OPS

RECORD = json.loads((Path(__file__).parent / "counts.json").read_text())
NUM_ROUNDS = 6
LEAST_SPEED_UP = 1.3
"""Unfused over fused in fp32, one thread, a model of two layers: 1.84 on a Xeon with AVX-512."""


@pytest.fixture(scope="module")
def counts():
    return guard.counted()


def test_nothing_starts_saves_or_allocates_more_than_recorded(counts):
    if torch.__version__.split("+")[0] != RECORD["torch"]:
        pytest.skip(f"the record was made with torch {RECORD['torch']}, this is {torch.__version__}")
    assert not guard.problems(counts, RECORD["counts"])


def test_every_operation_and_every_step_is_counted(counts):
    counted = {tuple(key.split(" · ")) for key in counts}
    for way in guard.ways_here():
        assert {what.rsplit(" ", 1)[0] for what, of in counted if of == way and not what.startswith("step")} == {
            op.name for op in OPS.values() if guard.WAYS[way][1] in op.dtypes
        }
        assert {what for what, of in counted if of == way and what.startswith("step")} == {
            f"step {name}" for name in guard.STEPS
        }


def test_fused_steps_start_and_save_less_than_unfused_ones(counts):
    for way in guard.ways_here():
        fused, unfused = counts[f"step lora · {way}"], counts[f"step lora unfused · {way}"]
        assert 4 * fused["saved_bytes"] < unfused["saved_bytes"]
        assert 2 * fused["peak_bytes"] < unfused["peak_bytes"]
        if way != "torch":
            assert fused["num_launches"] < unfused["num_launches"]


def test_an_operation_that_does_more_is_caught():
    """A copy of the input more, in a way that changes no result."""
    op = OPS["rms_norm"]
    [run, *_] = guard.runs_of(op, torch.float32)
    [worse, *_] = guard.runs_of(
        replace(op, function=lambda x, *args, **more: op.function(x.clone(), *args, **more)), torch.float32
    )
    before, after = ({"rms_norm 0 · torch": guard.counts_of(one)} for one in (run, worse))
    assert num_launches(worse) > num_launches(run)
    assert any("num_launches was" in text for text in guard.problems(after, before))
    assert not guard.problems(before, after)
    assert guard.problems(before, {}) == ["rms_norm 0 · torch is not recorded"]


def cpu_time_s(run):
    """CPU seconds of this thread: what other processes do does not count."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


@pytest.mark.skipif(guard.ways_here() == ["torch"], reason="no C++ compiler: the operations run in plain torch")
def test_a_fused_step_takes_less_cpu_time_than_an_unfused_one_of_the_same_run(monkeypatch):
    monkeypatch.setattr(guard, "STEP", replace(guard.STEP, num_sequences=4, length=256))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with use_backend("native"):
            runs = [guard.step_run(guard.STEPS[name], torch.float32) for name in ("lora", "lora unfused")]
            for run in runs:
                run()
            rounds = [[cpu_time_s(run) for run in runs] for _ in range(NUM_ROUNDS)]
    finally:
        torch.set_num_threads(threads)
    fused, unfused = (min(times) for times in zip(*rounds, strict=True))
    assert unfused > LEAST_SPEED_UP * fused, rounds
