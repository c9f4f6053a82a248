"""Room for a run's files: bytes by hand, and a refusal before anything is made."""

import pytest
import tiny
from burnish.harness import memory, room
from burnish.harness.config_io import load_config
from burnish.harness.errors import InfeasibleError
from burnish.harness.plan import Resources, make_plan
from burnish.harness.profile_numbers import Counts
from burnish.launch import training

COUNTS = Counts(total=1_000_000, trainable=100_000)


def plan_of(folder, **changes):
    config = load_config([str(tiny.write_config(folder, **changes))])
    resources = Resources(device="cpu", num_devices=0, num_cpus=2, host_memory_bytes=2**34)
    return make_plan(config, resources, run_dir=str(folder / "runs" / "demo"), cwd=str(folder))


def test_bytes_by_hand(tmp_path):
    """fp32 weights and two moments are 12 bytes each; the result is in the model's dtype, fp32 here."""
    lora = plan_of(tmp_path, adapter={"method": "lora", "rank": 4, "alpha": 8}, optimizer={"name": "adamw"})
    assert memory.checkpoint_bytes(lora, COUNTS) == 12 * 100_000
    assert room.result_bytes(lora, COUNTS) == 4 * 100_000
    full = plan_of(tmp_path, adapter={"method": "full"}, optimizer={"name": "sgd", "learning_rate": 0.1, "momentum": 0})
    counts = Counts(total=1_000_000, trainable=1_000_000)
    assert memory.checkpoint_bytes(full, counts) == room.result_bytes(full, counts) == 4_000_000


@pytest.mark.parametrize(
    ("every_steps", "has_checkpoint", "needed"),
    [("auto", False, 2_800_000), (5, False, 2_800_000), ("auto", True, 1_600_000), (None, False, 1_600_000)],
)
def test_what_must_be_there_at_a_time(tmp_path, every_steps, has_checkpoint, needed):
    lora = {"method": "lora", "rank": 4, "alpha": 8}
    plan = plan_of(tmp_path, adapter=lora, optimizer={"name": "adamw"}, checkpoint={"every_steps": every_steps})
    room.check_room(plan, COUNTS, free_bytes=needed, has_checkpoint=has_checkpoint)
    with pytest.raises(InfeasibleError, match=r"does not fit on the disk of .*runs/demo") as caught:
        room.check_room(plan, COUNTS, free_bytes=needed - 1, has_checkpoint=has_checkpoint)
    assert ("checkpoint.every_steps=" in str(caught.value)) == (needed == 2_800_000)


def test_train_refuses_before_it_makes_anything(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "free_disk_bytes", lambda path: 1000)
    config = load_config([str(tiny.write_config(tmp_path))])
    with pytest.raises(InfeasibleError, match="1000 B are free"):
        training.train(config, mode="new", report=lambda event: None)
    assert not (tmp_path / "runs" / config.name).exists()
