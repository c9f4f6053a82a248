"""Every YAML in configs/ parses, plans and survives being written and read again."""

from pathlib import Path

import pytest
from burnish.harness.config_io import config_to_yaml, load_config
from burnish.harness.plan import Resources, make_plan

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
CPU = Resources(device="cpu", num_devices=0, num_cpus=2, host_memory_bytes=16 * 2**30)
GPU = Resources(
    device="cuda", num_devices=8, num_cpus=64, host_memory_bytes=512 * 2**30, device_memory_bytes=80 * 10**9
)


def needs_gpu(config):
    """Runs that ask for GPUs; the rest must plan on a small CPU machine."""
    return config.launch.type == "ray" and config.launch.use_gpu is True


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_plans_and_round_trips(path, tmp_path):
    config = load_config([str(path)])
    resources = GPU if needs_gpu(config) else CPU
    plan = make_plan(config, resources, run_dir=str(tmp_path / "run"), cwd=str(tmp_path))
    assert plan.micro_batch_size * plan.gradient_accumulation_steps * plan.world_size == config.train.global_batch_size
    copy = tmp_path / "copy.yaml"
    copy.write_text(config_to_yaml(config), encoding="utf-8")
    assert load_config([str(copy)]) == config
