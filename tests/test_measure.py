"""Measuring a plan: real processes take its first steps, and what cannot be tried is one clear error."""

import os
from pathlib import Path
from typing import Any

import pytest
from burnish.harness.config import Config
from burnish.harness.errors import OutOfMemory, TrainingError
from burnish.harness.measure import measure
from burnish.harness.plan import Plan, Resources, make_plan
from burnish.harness.resident import bytes_now, peak_bytes, reset_peak

HIDDEN, VOCAB = 64, 512
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def plan_of(*, num_ranks: int = 1, memory: dict[str, Any] | None = None, **model: Any) -> Plan:
    config = Config.model_validate(
        {
            "name": "tried",
            "model": {"init": LLAMA | model, "dtype": "bf16"},
            "task": {"type": "causal_lm"},
            "data": {"train": "random tokens", "max_length": 32},
            "adapter": {"method": "full"},
            "train": {"max_steps": 2, "global_batch_size": 8 * num_ranks, "micro_batch_size": 2, "num_threads": 1},
            "memory": memory or {"zero_stage": 0 if num_ranks == 1 else 2},
            "launch": {"type": "inline"} if num_ranks == 1 else {"type": "ray", "num_workers": num_ranks},
        }
    )
    resources = Resources(device="cpu", num_devices=0, num_cpus=num_ranks, host_memory_bytes=2**34)
    return make_plan(config, resources, run_dir="", cwd="")


def test_a_plan_is_tried_in_a_process_of_its_own() -> None:
    measured = measure(plan_of())
    num_weights = VOCAB * HIDDEN + HIDDEN + 2 * (2 * HIDDEN**2 + 2 * HIDDEN**2 // 2 + 3 * HIDDEN * 128 + 2 * HIDDEN)
    assert measured.parts["weights"] == 2 * num_weights
    assert measured.parts["master_weights"] == 4 * num_weights
    assert measured.parts["gradients"] == pytest.approx(4 * num_weights, rel=0.01)
    assert measured.parts["optimizer_state"] == pytest.approx(8 * num_weights, rel=0.01)
    assert list(measured.phases) == ["load", "step", "evaluation", "save"]
    assert all(0 < value < 2**30 for value in measured.phases.values())
    assert measured.num_ranks == 1
    assert measured.step_s > 0
    first, second = measured.losses
    assert first == pytest.approx(second, rel=0.01)  # the learning rate is next to nothing
    assert measured.peak_bytes == max(measured.phases.values())


def test_what_does_not_fit_is_out_of_memory() -> None:
    with pytest.raises(OutOfMemory, match="memory"):
        measure(plan_of(vocab_size=10**13))


def test_another_failure_says_what_the_process_said() -> None:
    with pytest.raises(TrainingError, match="could not be tried") as failed:
        measure(plan_of(num_attention_heads=7))
    assert not isinstance(failed.value, OutOfMemory)


@pytest.mark.nightly
def test_two_ranks_are_tried_together() -> None:
    measured = measure(plan_of(num_ranks=2))
    assert measured.num_ranks == 2
    assert len(measured.losses) == 2


@pytest.mark.nightly
def test_what_was_offloaded_to_files_is_gone_afterwards(tmp_path: Path) -> None:
    files = {"offload_optimizer": "nvme", "offload_param": "nvme", "nvme_path": str(tmp_path / "files")}
    measured = measure(plan_of(memory={"zero_stage": 3} | files, vocab_size=2**15))
    assert measured.parts["gradients"] > 4 * 2**15 * HIDDEN
    assert list((tmp_path / "files").iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux resets peaks")
def test_the_peak_starts_anew() -> None:
    block = os.urandom(2**26)
    assert peak_bytes("cpu") >= bytes_now("cpu")
    del block
    reset_peak("cpu")
    assert peak_bytes("cpu") - bytes_now("cpu") < 2**25
