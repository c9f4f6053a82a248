"""The memory model against numbers worked out by hand and against those printed in the ZeRO paper."""

from typing import Any

import pytest
from burnish.harness.config import Config
from burnish.harness.memory import Counts, divided, quantized_bytes, state_bytes
from burnish.harness.plan import Plan, Resources, make_plan


def make_plan_for(*, world_size: int = 4, zero_stage: int = 0, dtype: str = "bf16", **changes: Any) -> Plan:
    config = Config.model_validate(
        {
            "name": "small",
            "model": {"path": "some/model", "dtype": dtype},
            "task": {"type": "causal_lm"},
            "data": {"train": ["rows.jsonl"]},
            "adapter": {"method": "full"},
            "optimizer": {"name": "adamw"},
            "train": {"max_steps": 3, "global_batch_size": 16},
            "memory": {"zero_stage": zero_stage},
            "launch": {"type": "ray", "num_workers": world_size},
        }
        | changes
    )
    resources = Resources(device="cpu", num_devices=0, num_cpus=64, host_memory_bytes=2**40)
    return make_plan(config, resources, run_dir="runs/small", cwd=".")


@pytest.mark.parametrize(("zero_stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_division_gives_figure_1_of_the_zero_paper(zero_stage: int, gigabytes: float) -> None:
    """7.5 B parameters on 64 GPUs: 2 bytes of weights and of gradients, 4 + 8 of masters and Adam's moments."""
    count = 7_500_000_000
    parts = divided(
        weights=2 * count,
        gradients=2 * count,
        master_weights=4 * count,
        optimizer_state=8 * count,
        world_size=64,
        zero_stage=zero_stage,
    )
    assert round(parts["total"] / 1e9, 1) == gigabytes


@pytest.mark.parametrize(
    ("zero_stage", "expected"),
    [
        (0, {"weights": 2000, "gradients": 4000, "master_weights": 4000, "optimizer_state": 8000, "total": 18000}),
        (1, {"weights": 2000, "gradients": 4000, "master_weights": 1000, "optimizer_state": 2000, "total": 9000}),
        (2, {"weights": 2000, "gradients": 1000, "master_weights": 1000, "optimizer_state": 2000, "total": 6000}),
        (3, {"weights": 500, "gradients": 1000, "master_weights": 1000, "optimizer_state": 2000, "total": 4500}),
    ],
)
def test_each_stage_divides_one_thing_more(zero_stage: int, expected: dict[str, int]) -> None:
    assert state_bytes(make_plan_for(zero_stage=zero_stage), Counts(total=1000, trainable=1000)) == expected


@pytest.mark.parametrize(("zero_stage", "expected"), [(0, 0), (1, 1000), (2, 1000), (3, 0)])
def test_fp32_has_masters_only_where_deepspeed_copies_its_share(zero_stage: int, expected: int) -> None:
    parts = state_bytes(make_plan_for(dtype="fp32", zero_stage=zero_stage), Counts(total=1000, trainable=1000))
    assert parts["master_weights"] == expected


def test_fp32_needs_no_master_weights() -> None:
    parts = state_bytes(make_plan_for(dtype="fp32"), Counts(total=1000, trainable=1000))
    assert parts == {
        "weights": 4000,
        "gradients": 4000,
        "master_weights": 0,
        "optimizer_state": 8000,
        "total": 16000,
    }


def test_an_adapter_pays_for_itself_only() -> None:
    parts = state_bytes(make_plan_for(adapter={"method": "lora"}), Counts(total=1010, trainable=10))
    assert parts == {
        "weights": 2020,
        "gradients": 40,
        "master_weights": 40,
        "optimizer_state": 80,
        "total": 2180,
    }


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ({"name": "adamw"}, 8 * 1000),
        ({"name": "adamw_8bit"}, 2 * (1000 + 4 * 4)),
        ({"name": "sgd"}, 0),
        ({"name": "sgd", "momentum": 0.9}, 4 * 1000),
        ({"name": "rmsprop"}, 4 * 1000),
        ({"name": "rmsprop", "momentum": 0.9}, 8 * 1000),
        ({"name": "adafactor"}, 0),
    ],
)
def test_each_optimizer_keeps_its_own_state(optimizer: dict[str, Any], expected: int) -> None:
    plan = make_plan_for(optimizer=optimizer)
    assert state_bytes(plan, Counts(total=1000, trainable=1000))["optimizer_state"] == expected


def test_a_share_is_rounded_up() -> None:
    plan = make_plan_for(zero_stage=3, world_size=8, dtype="fp32")
    assert state_bytes(plan, Counts(total=1001, trainable=1001))["weights"] == 501


def test_nf4_takes_half_a_byte_and_its_scales() -> None:
    count = 64 * 256 * 10
    plain = make_plan_for(adapter={"method": "qlora"}, quantization={"type": "nf4", "double_quant": False})
    double = make_plan_for(adapter={"method": "qlora"}, quantization={"type": "nf4", "double_quant": True})
    assert quantized_bytes(plain.config.quantization, count) == count // 2 + 4 * 2560
    assert quantized_bytes(double.config.quantization, count) == count // 2 + 2560 + 4 * 10
    counts = Counts(total=count + 1000, trainable=100, quantized=count)
    assert state_bytes(double, counts)["weights"] == 2 * 1000 + count // 2 + 2560 + 40


def test_double_quantisation_saves_what_the_qlora_paper_says() -> None:
    count = 64 * 256 * 1000
    plain = make_plan_for(adapter={"method": "qlora"}, quantization={"type": "nf4", "double_quant": False})
    double = make_plan_for(adapter={"method": "qlora"}, quantization={"type": "nf4", "double_quant": True})
    saved = quantized_bytes(plain.config.quantization, count) - quantized_bytes(double.config.quantization, count)
    assert round(8 * saved / count, 3) == 0.373


def test_int8_takes_a_byte() -> None:
    plan = make_plan_for(adapter={"method": "qlora"}, quantization={"type": "int8"})
    assert quantized_bytes(plan.config.quantization, 1000) == 1000


def test_impossible_counts_are_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        Counts(total=10, trainable=8, quantized=5)
