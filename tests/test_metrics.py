"""Metrics: no repeated steps after a resume, no NaN in the JSON, and arithmetic that can be done by hand."""

import json
import mmap
from pathlib import Path

import pytest
from burnish.harness.config import Config
from burnish.harness.metrics import (
    MetricsWriter,
    eta_s,
    flops_per_token,
    memory_bytes,
    mfu,
    peak_memory_bytes,
    tokens_per_s,
)
from burnish.harness.run_dir import RunDir, read_jsonl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def make_config(*, tensorboard: bool) -> Config:
    return Config.model_validate(
        {
            "name": "small",
            "model": {"path": "some/model"},
            "task": {"type": "causal_lm"},
            "data": {"train": ["rows.jsonl"]},
            "adapter": {"method": "lora"},
            "optimizer": {"name": "adamw"},
            "train": {"max_steps": 3},
            "tracking": {"tensorboard": tensorboard},
        }
    )


def write_steps(run: RunDir, *, first: int, last: int, tensorboard: bool = False) -> None:
    writer = MetricsWriter(run, make_config(tensorboard=tensorboard))
    writer.start(first - 1)
    for step in range(first, last + 1):
        writer.log({"kind": "train", "step": step, "loss": 10.0 / step, "skipped": False})
        if step % 2 == 0:
            writer.log({"kind": "eval", "split": "validation", "step": step, "loss": 11.0 / step})
    writer.close()


def test_a_resumed_curve_has_no_repeated_and_no_missing_step(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_steps(run, first=1, last=7)
    write_steps(run, first=5, last=9)
    records = read_jsonl(run.metrics_jsonl)
    assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, 10))
    assert [record["step"] for record in records if record["kind"] == "eval"] == [2, 4, 6, 8]


def test_a_start_from_nothing_forgets_what_was_there(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_steps(run, first=1, last=3)
    MetricsWriter(run, make_config(tensorboard=False)).start(0)
    assert read_jsonl(run.metrics_jsonl) == []


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_steps(run, first=1, last=7, tensorboard=True)
    write_steps(run, first=5, last=9, tensorboard=True)
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 10))
    assert [event.step for event in board.Scalars("validation/loss")] == [2, 4, 6, 8]


def test_a_non_finite_number_is_named_and_the_line_stays_json(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    writer = MetricsWriter(run, make_config(tensorboard=False))
    writer.start(0)
    writer.log({"kind": "train", "step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.1})
    record = json.loads(run.metrics_jsonl.read_text(), parse_constant=pytest.fail)
    assert record["loss"] is None
    assert record["non_finite"] == ["loss", "grad_norm"]
    assert record["lr"] == 0.1


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    writer = MetricsWriter(run, make_config(tensorboard=True), is_writer=False)
    writer.start(0)
    writer.log({"kind": "train", "step": 1, "loss": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_memory_of_this_process_is_counted() -> None:
    before = memory_bytes("cpu")
    with mmap.mmap(-1, 64 * 2**20) as block:  # memory that no allocator has in reserve
        block.write(bytes(len(block)))
        assert memory_bytes("cpu") - before > 0.9 * len(block)
        assert peak_memory_bytes("cpu") >= memory_bytes("cpu") - 2**20


def test_throughput_is_taken_over_the_window_and_not_over_the_slow_start() -> None:
    slow = [{"kind": "train", "step": 1, "tokens": 100, "time_s": 100.0}]
    fast = [{"kind": "train", "step": step, "tokens": 100, "time_s": 0.5} for step in range(2, 12)]
    evals = [{"kind": "eval", "step": 11, "loss": 1.0}]
    assert tokens_per_s(slow + fast + evals, window=10) == 200.0
    assert tokens_per_s(evals) is None
    assert eta_s(slow + fast + evals, total_steps=31, window=10) == 10.0
    assert eta_s([], total_steps=31) is None


def test_full_fine_tuning_costs_6n_and_lora_little_more_than_4n() -> None:
    assert flops_per_token(1000, 1000) == 6000
    assert flops_per_token(1000, 10) == 4020
    assert flops_per_token(1000, 1000, attention_width=64, num_layers=2) == 6000 + 12 * 2 * 64


def test_mfu_is_unknown_without_a_peak() -> None:
    assert mfu(100.0, 6000, peak_flops=None) is None
    assert mfu(100.0, 6000, peak_flops=1_200_000) == 0.5
