"""The estimate of a step's time against numbers worked out by hand."""

from dataclasses import replace

import pytest
from burnish.harness.cost import estimate
from burnish.harness.devices import CARDS, GPU_SHARE, find_card, speeds_of
from burnish.harness.plan import make_plan
from burnish.harness.traffic import Hardware, Link, traffic_bytes, zero_traffic
from made_up_memory import GIB, gpus, make_config, profile, ray

INSTANT = replace(
    speeds_of("cuda", name="H100", num_threads=1, workers_per_node=1),
    flops_per_s=1e12,
    memory_bytes_per_s=float("inf"),
    host_bytes_per_s=float("inf"),
    pcie_bytes_per_s=float("inf"),
    nvme_bytes_per_s=float("inf"),
    overlap=0.0,
    fabric=Hardware("", 0, 0, 8, Link(float("inf"), 0), Link(float("inf"), 0)),
)
"""Multiplies 1e12 times a second; everything else takes no time."""


def cost_of(found, speeds=INSTANT, *, workers=1, resources=None, **sections):
    config = make_config(launch=ray(workers), **sections)
    plan = make_plan(config, resources or gpus(workers, 80), run_dir="", cwd="")
    return estimate(plan, found, speeds)


def test_the_work_of_a_step_by_hand():
    """8 layers of 12 * 1024² and a head of 1024 * 32000: 6 a weight; attention 6 * layers * hidden * length."""
    found = profile()
    multiplied = 8 * 12 * 1024 * 1024 + 1024 * 32_000
    tokens = 8 * 1024
    cost = cost_of(found)
    assert cost.flops == tokens * (6 * multiplied + 6 * 8 * 1024 * 1024)
    assert cost.compute_s == pytest.approx(cost.flops / 1e12)
    assert cost.step_s == pytest.approx(cost.compute_s)


def test_frozen_weights_cost_two_thirds():
    full, frozen = profile(), profile(rank=16)
    adapters = frozen.counts.trainable
    multiplied = 8 * 12 * 1024 * 1024 + 1024 * 32_000
    difference = cost_of(full).flops - cost_of(frozen, adapter={"method": "lora"}).flops
    assert difference == 8 * 1024 * (2 * multiplied - 6 * adapters)


def test_full_checkpointing_repeats_the_forward_of_the_layers():
    plain = cost_of(profile())
    again = cost_of(profile(), memory={"activation_checkpointing": "full"})
    assert again.flops - plain.flops == 8 * 1024 * (2 * 8 * 12 * 1024 * 1024 + 2 * 8 * 1024 * 1024)
    assert again.recompute_s == pytest.approx((again.flops - plain.flops) / 1e12)


def test_accumulation_repeats_micro_batches():
    one, eight = (cost_of(profile(), train={"micro_batch_size": micro}) for micro in (8, 1))
    assert one.flops == eight.flops
    slow = replace(INSTANT, memory_bytes_per_s=1e6)
    one, eight = (cost_of(profile(), slow, train={"micro_batch_size": micro}) for micro in (8, 1))
    assert eight.compute_s > 7 * one.compute_s  # the weights are read eight times


def test_one_worker_sends_nothing_and_several_what_zero_says():
    found = profile()
    assert cost_of(found).wire_bytes == 0
    for stage in (0, 1, 2, 3):
        cost = cost_of(found, workers=4, memory={"zero_stage": stage}, train={"micro_batch_size": 1})
        count = found.counts.total
        traffic = zero_traffic(
            stage,
            gradient_bytes=4 * count,
            trained_bytes=2 * count,
            weight_bytes=2 * count,
            num_layers=8,
            num_micro_batches=2,
        )
        assert cost.wire_bytes == traffic_bytes(traffic, 4)


def test_stages_2_and_3_reduce_every_micro_batch_and_1_and_0_once():
    def sent(stage, micro_batches):
        sizes = {"gradient_bytes": 4e6, "trained_bytes": 2e6, "weight_bytes": 2e6}
        return traffic_bytes(zero_traffic(stage, **sizes, num_micro_batches=micro_batches), 4)

    assert [sent(stage, 4) - sent(stage, 1) for stage in (0, 1)] == [0, 0]
    assert sent(2, 4) - sent(2, 1) == 3 * 4e6 * 3 / 4
    assert sent(3, 4) == 4 * sent(3, 1)


def test_offload_moves_gradients_down_and_weights_up():
    found = profile()
    cost = cost_of(found, memory={"offload_optimizer": "cpu"})
    assert cost.offload_bytes == (4 + 2) * found.counts.total
    disk = cost_of(found, memory={"offload_optimizer": "nvme", "nvme_path": "/somewhere"})
    assert disk.offload_bytes == cost.offload_bytes + 2 * (8 + 4) * found.counts.total
    slow = replace(INSTANT, pcie_bytes_per_s=1e9)
    assert cost_of(found, slow, memory={"offload_optimizer": "cpu"}).offload_s == cost.offload_bytes / 1e9


def test_offloaded_weights_come_up_twice_for_every_micro_batch():
    found = profile()
    cost = cost_of(found, memory={"offload_param": "cpu"}, train={"micro_batch_size": 2})
    assert cost.offload_bytes == 4 * 2 * 2 * found.counts.total


def test_weights_that_do_not_stay_in_memory_are_read_in_every_pass():
    plan = make_plan(make_config(train={"micro_batch_size": 4}), gpus(1, 80), run_dir="", cwd="")
    slow = replace(INSTANT, nvme_bytes_per_s=1e9)
    cost, usual = estimate(plan, profile(), slow, reread_bytes=10**9), estimate(plan, profile(), slow)
    assert plan.gradient_accumulation_steps == 2
    assert cost.step_s - usual.step_s == pytest.approx(4)
    again = replace(plan, activation_checkpointing="full")
    assert estimate(again, profile(), slow, reread_bytes=10**9).offload_s == pytest.approx(6)


def test_what_overlaps_hides_behind_computing():
    sections = {"workers": 2, "resources": gpus(2, 80)}
    fabric = Hardware("", 0, 0, 2, Link(1e9, 0), Link(1e9, 0))
    apart, beside = (cost_of(profile(), replace(INSTANT, fabric=fabric, overlap=x), **sections) for x in (0, 1))
    assert apart.step_s == pytest.approx(apart.compute_s + apart.communication_s)
    assert beside.step_s == pytest.approx(max(beside.compute_s, beside.communication_s))


def test_workers_that_do_not_fill_whole_nodes_are_estimated_too():
    resources = replace(gpus(4, 80), num_nodes=2)
    cost = cost_of(profile(), workers=3, resources=resources, train={"global_batch_size": 9})
    assert cost.wire_bytes > 0


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("h100", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("RTX4090", "RTX 4090"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA RTX A6000", "A6000"),
    ],
)
def test_cards_are_found_by_their_names(name, card):
    assert find_card(name).name == card


def test_an_unknown_card_is_as_slow_as_the_slowest_that_is_known():
    assert find_card("Tesla T4") is None
    speeds = speeds_of("cuda", name="Tesla T4", num_threads=1, workers_per_node=1)
    assert speeds.flops_per_s == GPU_SHARE * min(card.flops_per_s for card in CARDS)
    assert speeds.name == "Tesla T4"


def test_workers_share_what_a_node_has_once():
    one, four = (speeds_of("cpu", name="", num_threads=2, workers_per_node=n) for n in (1, 4))
    assert one.nvme_bytes_per_s == 4 * four.nvme_bytes_per_s
    assert one.memory_bytes_per_s == 4 * four.memory_bytes_per_s
    assert one.flops_per_s == four.flops_per_s


def test_the_sizes_of_cards_are_as_sold():
    assert all(card.memory_bytes <= 192 * GIB and card.memory_bytes % 1e9 == 0 for card in CARDS)
