"""The memory model against numbers worked out by hand and against those printed in the ZeRO paper."""

import json
from dataclasses import replace
from typing import Any

import pytest
from burnish.harness import zero_config
from burnish.harness.config import Config
from burnish.harness.memory import (
    SHARD_BYTES,
    Counts,
    Overhead,
    divided,
    predict,
    quantized_bytes,
    save_bytes,
    state_bytes,
)
from burnish.harness.moments import moments_of_step, size_of
from burnish.harness.plan import Plan, Resources, make_plan
from burnish.harness.profile_numbers import Activations, HeadLine, Line, Profile


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


NOTHING = Activations(Line(), Line(), (Line(),), (Line(),), (HeadLine(),), (Line(),))
LAYERS = Activations(
    layer_saved=Line(per_token=100.0),
    outside_saved=Line(fixed=50.0, per_token=10.0),
    forward_working=(Line(per_token=40.0),),
    backward_working=(Line(fixed=500.0, per_token=20.0), Line(per_token=60.0)),
    head=(HeadLine(per_token=8.0, per_row=30.0),),
    embedding_working=(Line(fixed=70.0),),
)
PROFILE = Profile(
    counts=Counts(1000, 1000),
    num_layers=4,
    layer=Counts(200, 200),
    embedding=Counts(100, 100),
    head=Counts(100, 100),
    largest_tensor=100,
    largest_trained=100,
    num_trained_tensors=10,
    trained_vectors=20,
    buffer_bytes=0,
    hidden_size=10,
    vocab_size=10,
    is_per_example=False,
    chunk_tokens={"cpu": 16, "cuda": 64},
    policies={"none": LAYERS, "selective": LAYERS, "full": replace(LAYERS, layer_saved=Line(per_token=5.0))},
    evaluation=NOTHING,
)


TOKENS = 4 * 1024
"""Of a micro-batch of two ranks with a global batch of 8."""


def small_plan(*, length: int = 8, micro: int = 2, micro_batches: int = 1, **changes: Any) -> Plan:
    train = {"max_steps": 3, "global_batch_size": micro * micro_batches, "micro_batch_size": micro}
    data = {"train": ["rows.jsonl"], "max_length": length}
    return make_plan_for(world_size=1, train=train, data=data, launch={"type": "inline"}, **changes)


def test_stage_2_reduces_a_bucket_at_a_time() -> None:
    """4000 bytes of fp32 gradients halved; a bucket of all 1000 in bf16; joined, in fp32 and in gloo's buffer."""
    plan = make_plan_for(world_size=2, zero_stage=2, train={"max_steps": 3, "global_batch_size": 8})
    accumulating = replace(plan, gradient_accumulation_steps=2)
    moments = moments_of_step(accumulating, PROFILE)
    assert moments["last layer"]["gradients"] == 2000
    assert moments["last layer"]["reduce_buckets"] == 1000 * 2
    assert moments["first layer"]["reduce_buckets"] == 1000 * (2 + 2 + 4 + 4)
    assert moments["first bucket"]["activations"] == 50 + 10 * TOKENS  # it holds what all layers have


def test_stage_3_reduces_a_bucket_when_backward_has_filled_it_and_never_frees_it() -> None:
    """Of 1000 weights a bucket of 500: the head's 100, and those of two layers of four."""
    plan = make_plan_for(world_size=2, zero_stage=3, train={"max_steps": 3, "global_batch_size": 8})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero_config, "BUCKET_ELEMENTS", 500)
        moments = moments_of_step(plan, PROFILE)
    layers = 4 * 100 * TOKENS
    assert moments["head"]["reduce_buckets"] == moments["last layer"]["reduce_buckets"] == 500 * 4
    assert moments["first bucket"]["reduce_buckets"] == 500 * (4 + 4 + 4)
    assert moments["first bucket"]["activations"] == 50 + 10 * TOKENS + layers // 2
    assert moments["optimizer"]["reduce_buckets"] == 500 * 4


def test_stage_1_keeps_two_gradients_and_copies_one() -> None:
    moments = moments_of_step(make_plan_for(world_size=2, zero_stage=1), PROFILE)
    assert moments["forward"]["gradients"] == 1000 * (4 + 2)
    assert moments["reduction"]["reduce_buckets"] == 4000


def test_stage_3_gathers_two_buckets_ahead_and_keeps_one_at_the_head() -> None:
    large = replace(PROFILE, counts=Counts(10**9, 1000), layer=Counts(10**7, 200))
    moments = moments_of_step(replace(make_plan_for(world_size=2, zero_stage=3), device="cuda"), large)
    assert moments["forward"]["gather_buffers"] == 2 * (1.5 * (10**7 + 100_000_000) + 10**7)
    assert moments["first bucket"]["gather_buffers"] == 2 * (10**7 + 100_000_000)
    assert moments["head"]["gather_buffers"] == 2 * (10**7 + 50_000_000)
    assert moments["embedding"]["gather_buffers"] == 2 * 10**7


def test_stage_3_gathers_no_more_than_there_is() -> None:
    moments = moments_of_step(make_plan_for(world_size=2, zero_stage=3), PROFILE)
    assert moments["forward"]["gather_buffers"] == moments["last layer"]["gather_buffers"] == 2 * (2.1 * 1000 + 200)
    assert moments["first bucket"]["gather_buffers"] == moments["head"]["gather_buffers"] == 2000
    assert moments["embedding"]["gather_buffers"] == 2 * 200


def test_stage_3_gathers_quantised_weights_by_the_bytes_of_their_tensors() -> None:
    """A bucket of 50 million elements holds 100 million packed weights."""
    counted = replace(PROFILE, counts=Counts(10**9, 1000, 10**9 - 1000), layer=Counts(10**7, 0, 10**7))
    plan = make_plan_for(
        world_size=2,
        zero_stage=3,
        quantization={"type": "nf4"},
        adapter={"method": "qlora", "rank": 8, "alpha": 8.0, "target_modules": "all-linear"},
    )
    moments = moments_of_step(plan, counted)
    assert moments["head"]["gather_buffers"] == pytest.approx(5 * 10**6 + 50 * 10**6, rel=1e-4)


def test_stage_3_joins_gradients_to_update_them() -> None:
    moments = moments_of_step(make_plan_for(world_size=2, zero_stage=3), PROFILE)
    assert moments["optimizer"]["working"] == 4 * 1000 // 2
    assert moments_of_step(make_plan_for(world_size=2, zero_stage=2), PROFILE)["optimizer"]["working"] == 0


def test_what_a_save_copies_is_a_file_of_partitioned_state_at_a_time() -> None:
    """12 bytes for each of 1000 weights, and a tensor of 100: gathered, and in a buffer of gloo's."""
    found = replace(PROFILE, largest_trained=100)
    plan = make_plan_for(world_size=2, zero_stage=2)
    assert save_bytes(plan, found) == 12 * 1000 + 2 * 400
    assert save_bytes(plan, replace(found, counts=Counts(10**9, 10**9))) == SHARD_BYTES + 2 * 400
    assert save_bytes(replace(plan, device="cuda"), found) == 400
    assert save_bytes(replace(plan, zero_stage=0), found) == 0
    alone = replace(plan, world_size=1)
    assert save_bytes(alone, found) == 0
    assert save_bytes(replace(alone, zero_stage=3, offload_optimizer="nvme"), found) == 12 * 1000 + 400


def test_a_profile_survives_json() -> None:
    assert Profile.from_dict(json.loads(json.dumps(PROFILE.to_dict()))) == PROFILE


def test_a_line_counts_tokens_and_pairs_of_tokens() -> None:
    assert Line(fixed=1.0, per_token=2.0, per_pair=0.5).at(num_tokens=8, length=4) == 1 + 2 * 8 + 8 * 4 // 2


def test_a_packed_row_is_filled_up() -> None:
    plan = small_plan(length=100, micro=3)
    packed = plan.config.model_copy(update={"data": plan.config.data.model_copy(update={"packing": True})})
    assert size_of(plan, PROFILE) == (300, 100)
    assert size_of(replace(plan, config=packed), PROFILE) == (384, 384)


def test_the_moments_of_a_step_by_hand() -> None:
    """Two sequences of 8 tokens are 16 tokens; gradients of 4 bytes a weight appear while backward goes down."""
    moments = moments_of_step(small_plan(), PROFILE)
    saved = 50 + 16 * 10 + 4 * 16 * 100
    moments = {name: {part: size for part, size in found.items() if size} for name, found in moments.items()}
    assert moments["forward"] == {"activations": saved, "working": 640}
    assert moments["head"] == {"gradients": 400, "activations": saved, "logits_loss": 16 * 38}
    assert moments["last layer"] == {"gradients": 400 + 800, "activations": saved, "working": 960}
    assert moments["first layer"] == {"gradients": 4000, "activations": 50 + 160 + 1600, "working": 960}
    assert moments["embedding"] == {"gradients": 4000, "working": 70}


def test_later_micro_batches_meet_all_gradients_from_the_start() -> None:
    moments = moments_of_step(small_plan(micro_batches=2), PROFILE)
    assert {moment["gradients"] for moment in moments.values()} == {4000}


def test_the_fullest_moment_depends_on_the_length() -> None:
    few = predict(small_plan(length=2, micro=1), PROFILE, Overhead(0, 0.0))
    many = predict(small_plan(length=4096, micro=1), PROFILE, Overhead(0, 0.0))
    assert few.device["gradients"] == 4000
    assert many.device["activations"] == 50 + 4096 * 10 + 4 * 4096 * 100
    assert many.device["working"] == 4096 * 60


def test_logits_exist_for_a_chunk_of_tokens() -> None:
    plan = small_plan(length=100, micro=1)
    whole = replace(PROFILE, chunk_tokens=None)
    chunked, at_once = (moments_of_step(plan, one)["head"]["logits_loss"] for one in (PROFILE, whole))
    assert (chunked, at_once) == (100 * 8 + 16 * 30, 100 * 8 + 100 * 30)


def test_checkpointing_takes_what_its_profile_says() -> None:
    plan = small_plan(length=4096, micro=1)
    full = replace(plan, activation_checkpointing="full")
    saved = [moments_of_step(one, PROFILE)["forward"]["activations"] for one in (plan, full)]
    assert saved[0] - saved[1] == 4 * 4096 * 95


def test_what_is_lost_is_a_share_of_what_comes_and_goes() -> None:
    plan = small_plan(length=4096, micro=1)
    without, lossy = predict(plan, PROFILE, Overhead(0, 0.0)), predict(plan, PROFILE, Overhead(1000, 0.1))
    come_and_go = sum(without.device.values()) - sum(
        without.device.get(name, 0) for name in ("weights", "master_weights", "optimizer_state")
    )
    assert lossy.phases["step"] - without.phases["step"] == 1000 + round(0.1 * come_and_go)


def test_quantised_weights_in_files_need_no_memory_of_their_own() -> None:
    plan = small_plan(quantization={"type": "nf4"}, adapter={"method": "qlora"})
    found = replace(PROFILE, counts=Counts(1000, 60, 640), layer=Counts(200, 12, 160))
    kept, mapped = predict(plan, found), predict(plan, replace(found, is_in_files=True))
    assert mapped.peak_bytes == kept.peak_bytes == kept.needed_bytes
    assert kept.needed_bytes - mapped.needed_bytes == quantized_bytes(plan.config.quantization, 640) == 334
    for other in (replace(plan, device="cuda"), replace(plan, engine="deepspeed")):
        assert predict(other, replace(found, is_in_files=True)).mapped_bytes == 0


def test_buffers_of_weights_in_files_hold_what_is_read_and_what_the_optimizer_writes_together() -> None:
    memory = {"zero_stage": 3, "offload_optimizer": "nvme", "offload_param": "nvme", "nvme_path": "disk"}
    plan = small_plan(memory=memory)
    assert predict(plan, PROFILE).device["parameter_buffers"] == 2 * (5 * 100 + 1000)
    large = replace(PROFILE, counts=Counts(10**9, 10**9))
    for largest, elements in ((100, 25_000_000), (10**8, 10**8)):
        buffers = predict(plan, replace(large, largest_trained=largest)).device["parameter_buffers"]
        assert buffers == 2 * (5 * 100 + elements)
    made = predict(plan, replace(large, largest_trained=10**8), Overhead(0, 0.0))
    buffers = made.device["optimizer_buffers"] + made.device["parameter_buffers"]
    assert made.phases["load"] == buffers + 2 * 4 * 10**8  # masters and states are made through two more of them
    in_memory = small_plan(memory=memory | {"offload_optimizer": "none"})
    assert predict(in_memory, large).device["parameter_buffers"] == 2 * (5 * 100 + 10**9)


def test_sums_of_gradients_in_a_file_are_pages_of_the_process_but_need_no_memory() -> None:
    memory = {"zero_stage": 3, "offload_optimizer": "nvme", "offload_param": "nvme", "nvme_path": "disk"}
    plan = small_plan(memory=memory)
    found = predict(plan, PROFILE)
    assert found.device["gradients"] == found.nvme["gradients"] == found.mapped_bytes == 4000
    assert found.peak_bytes == found.needed_bytes + 4000
    assert "gradients" not in predict(replace(plan, device="cuda"), PROFILE).device
    loaded = replace(found, phases=found.phases | {"load": found.peak_bytes - 100})
    assert loaded.needed_bytes == loaded.peak_bytes - 100  # they come with the first step
