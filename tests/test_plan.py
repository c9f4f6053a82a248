"""make_plan: batch arithmetic, what is refused, and the way through JSON."""

import json

import pytest
from burnish.harness.config import Config
from burnish.harness.errors import ConfigError, InfeasibleError
from burnish.harness.plan import Plan, Resources, make_plan

BASE = {
    "name": "tiny",
    "model": {"path": "some/model"},
    "task": {"type": "causal_lm"},
    "data": {"train": "train.jsonl", "max_row_bytes": "1MB"},
    "adapter": {"method": "lora"},
    "train": {"max_steps": 10},
}
CPU = Resources(device="cpu", num_devices=0, num_cpus=8, host_memory_bytes=16 * 2**30)
GPU = Resources(device="cuda", num_devices=4, num_cpus=32, host_memory_bytes=2**38, device_memory_bytes=2**36)


def plan_of(resources=CPU, **sections):
    return make_plan(Config.model_validate(BASE | sections), resources, run_dir="runs/tiny", cwd=".")


def ray(num_workers, **options):
    return {"type": "ray", "num_workers": num_workers} | options


def batch(total, micro="auto"):
    return {"max_steps": 10, "global_batch_size": total, "micro_batch_size": micro}


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("micro", ["auto", 1, 2])
def test_micro_times_accumulation_times_workers_is_the_global_batch(workers, micro):
    plan = plan_of(launch=ray(workers), train=batch(24, micro))
    assert plan.micro_batch_size * plan.gradient_accumulation_steps * plan.world_size == 24


def test_auto_takes_the_largest_divisor_up_to_8():
    assert plan_of(train=batch(24)).micro_batch_size == 8
    assert plan_of(train=batch(7)).micro_batch_size == 7
    assert plan_of(train=batch(11)).micro_batch_size == 1


def test_a_large_micro_batch_is_taken_if_it_divides():
    assert plan_of(train=batch(8192, 8192)).gradient_accumulation_steps == 1


def test_a_batch_that_workers_cannot_share_is_refused_with_the_nearest_ones():
    with pytest.raises(ConfigError, match="global_batch_size=10 cannot be shared by 4 workers; use 8 or 12"):
        plan_of(launch=ray(4), train=batch(10))
    with pytest.raises(ConfigError, match=r"use 4$"):
        plan_of(launch=ray(4), train=batch(3))


def test_a_micro_batch_that_does_not_divide_is_refused_with_the_valid_ones():
    with pytest.raises(ConfigError, match=r"micro_batch_size=5 .* use one of 1, 2, 3, 4, 6, 12"):
        plan_of(train=batch(12, 5))
    with pytest.raises(ConfigError) as caught:
        plan_of(train=batch(10**12, 999))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("resources", "launch", "sentence"),
    [
        (CPU, ray(9), "use at most 8 workers"),
        (CPU, ray(2, use_gpu=True), "no GPU is visible"),
        (GPU, ray(5), "use at most 4 workers"),
        (CPU, ray(4, resources_per_worker={"CPU": 3}), "use at most 2 workers"),
        (GPU, ray(1, resources_per_worker={"GPU": 5}), "one worker asks for 5 GPUs, and there are 4"),
    ],
)
def test_workers_that_cannot_be_had_are_infeasible(resources, launch, sentence):
    with pytest.raises(InfeasibleError, match=sentence):
        plan_of(resources, launch=launch, train=batch(360))


def test_the_engine_follows_workers_and_stage():
    assert (plan_of().engine, plan_of().zero_stage) == ("torch", 0)
    assert (plan_of(launch=ray(2)).engine, plan_of(launch=ray(2)).zero_stage) == ("deepspeed", 2)
    assert plan_of(memory={"zero_stage": 3}).engine == "deepspeed"
    adafactor = plan_of(launch=ray(2), optimizer={"name": "adafactor"})
    assert (adafactor.engine, adafactor.zero_stage) == ("deepspeed", 0)


def test_workers_use_gpus_where_there_are_some():
    assert plan_of(GPU, launch=ray(2)).device == "cuda"
    assert plan_of(GPU, launch=ray(2, use_gpu=False)).device == "cpu"
    assert plan_of(CPU, launch=ray(2)).device == "cpu"


def test_threads_are_the_cores_shared_by_a_nodes_workers():
    assert plan_of(launch=ray(2)).num_threads == 4
    assert plan_of(launch=ray(8)).num_threads == 1
    assert plan_of(train={"max_steps": 1, "num_threads": 3}).num_threads == 3
    two_nodes = Resources(device="cpu", num_devices=0, num_cpus=8, host_memory_bytes=2**34, num_nodes=2)
    assert plan_of(two_nodes, launch=ray(4)).num_threads == 2


def test_every_decision_says_why():
    assert all(decision.why for decision in plan_of(launch=ray(2)).decisions)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"launch": ray(2, resources_per_worker={"CPU": 1})},
        {"optimizer": {"name": "adamw_8bit", "betas": [0.9, 0.95]}},
        {"quantization": {"type": "nf4"}, "adapter": {"method": "qlora", "rank_pattern": {"q.*": 4}}},
        {"model": {"init": {"model_type": "vit", "depths": [1, 2], "eps": 1e-5, "act": None}}},
        {"data": {"train": [{"path": "x", "where": {"lang": ["py", 1, 1.5, True]}}], "max_row_bytes": "2MiB"}},
    ],
)
def test_a_plan_survives_json(sections):
    plan = plan_of(**sections)
    assert Plan.from_dict(json.loads(plan.to_json())) == plan


def test_a_plan_is_a_pure_function():
    assert plan_of(launch=ray(2)) == plan_of(launch=ray(2))
