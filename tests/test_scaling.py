"""Formulas of collectives, ZeRO and the model of many GPUs, against numbers worked out by hand."""

from dataclasses import replace

import pytest
from burnish.bench import scaling
from burnish.bench.bench_scale import H200
from burnish.bench.scaling import LLAMA_8B, LLAMA_70B, Work, simulate
from burnish.harness import traffic
from burnish.harness.traffic import Link

MODEL_WORK = Work(LLAMA_8B, None, num_sequences=2, length=4096)
SPEED = 4e14


def test_one_rank_communicates_nothing():
    for op in traffic.RING_PASSES:
        assert traffic.sent_bytes(op, 1e9, 1) == traffic.ring_s(op, 1e9, 1, H200.inside) == 0
        assert traffic.collective_s(op, 1e9, 1, H200) == 0
    assert simulate(MODEL_WORK, num_gpus=1, stage=3, hardware=H200, flops_per_s=SPEED, overlap=0)["efficiency"] == 1


def test_a_ring_by_hand():
    """Four ranks, 400 bytes, 100 bytes/s, 1 s a hop: three hops a pass, each of 100 bytes."""
    link = Link(bytes_per_s=100, latency_s=1)
    assert traffic.ring_s("all_gather", 400, 4, link) == 3 * (1 + 1)
    assert traffic.ring_s("all_reduce", 400, 4, link) == 6 * (1 + 1)
    assert traffic.sent_bytes("all_reduce", 400, 4) == 600
    assert traffic.sent_bytes("reduce_scatter", 400, 4) == 300


def test_nodes_by_hand():
    """2 nodes of 8: 7 hops of 100/8 bytes inside, then one hop of 100/16 bytes between, per pass."""
    hardware = replace(H200, inside=Link(10, 0), between=Link(1, 0))
    assert traffic.collective_s("all_gather", 100, 16, hardware) == pytest.approx(7 * 100 / 8 / 10 + 100 / 16)
    assert traffic.collective_s("all_reduce", 100, 16, hardware) == pytest.approx(2 * (8.75 + 6.25))
    assert traffic.collective_s("all_gather", 100, 4, hardware) == pytest.approx(3 * 100 / 4 / 10)


@pytest.mark.parametrize(("stage", "passes"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_zero_sends_two_psi_and_stage_3_three_psi(stage, passes):
    """arXiv 1910.02054, section 7, with all parts in one dtype and without the factor (n-1)/n."""
    parts = traffic.zero_traffic(stage, gradient_bytes=7e9, trained_bytes=7e9, weight_bytes=7e9, num_layers=5)
    assert traffic.traffic_bytes(parts, 4) == pytest.approx(passes * 7e9 * 3 / 4)


def test_stage_3_gathers_frozen_weights_too():
    parts = traffic.zero_traffic(3, gradient_bytes=4, trained_bytes=2, weight_bytes=100)
    assert traffic.traffic_bytes(parts, 2) == 102


def test_shapes_have_the_parameters_of_the_models():
    assert LLAMA_8B.num_params == 8_030_261_248
    assert LLAMA_70B.num_params == 70_553_706_496
    assert LLAMA_8B.num_lora(16) == 41_943_040


def test_work_of_a_step_by_hand():
    """8B: 7 504 658 432 multiplied weights; attention 6 * 32 * 4096 * 4096 a token."""
    assert MODEL_WORK.flops() == 8192 * (6 * 7_504_658_432 + 6 * 32 * 4096 * 4096)
    lora = replace(MODEL_WORK, rank=16)
    assert lora.flops() == 8192 * (4 * 7_504_658_432 + 6 * 41_943_040 + 6 * 32 * 4096 * 4096)


def test_calibration_finds_the_link_that_made_the_times():
    link = Link(bytes_per_s=2e9, latency_s=3e-5)
    times = {size: traffic.ring_s("all_reduce", size, 4, link) for size in (0, 2**25)}
    found = scaling.calibrated(4, small_s=times[0], large_s=times[2**25], large_bytes=2**25)
    assert (found.bytes_per_s, found.latency_s) == pytest.approx((2e9, 3e-5))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_infinite_links_are_perfect_and_slower_ones_never_better(stage):
    def efficiency(num_gpus, *, speed, overlap=0.5):
        links = {"inside": Link(speed, 0), "between": Link(speed, 0)}
        hardware = replace(H200, **links)
        model = {"stage": stage, "hardware": hardware, "flops_per_s": SPEED, "overlap": overlap}
        return simulate(MODEL_WORK, num_gpus=num_gpus, **model)["efficiency"]

    assert efficiency(64, speed=float("inf")) == 1
    by_speed = [efficiency(64, speed=speed) for speed in (1e9, 1e10, 1e11)]
    by_size = [efficiency(num_gpus, speed=1e10) for num_gpus in (8, 64, 256, 1024)]
    by_overlap = [efficiency(64, speed=1e10, overlap=overlap) for overlap in (0, 0.5, 1)]
    assert by_speed == sorted(by_speed)
    assert by_size == sorted(by_size, reverse=True)
    assert by_overlap == sorted(by_overlap)
    assert by_speed[0] < by_speed[-1] < 1


def test_the_model_names_its_assumptions_and_what_does_not_fit():
    """70B in full: 18 bytes a parameter over 8 GPUs are 158.7 GB, over 64 19.8 GB."""
    work = Work(LLAMA_70B, None, 2, 4096)
    common = {"stage": 3, "hardware": H200, "flops_per_s": SPEED, "overlap": 0.5}
    small, large = (simulate(work, num_gpus=n, **common) for n in (8, 64))
    assert small["state_bytes"] == pytest.approx(18 * 70_553_706_496 / 8, rel=1e-6)
    assert not small["fits"]
    assert large["fits"]
    assert large["is_model"]
    assert {"overlap", "flops_per_s", "hardware", "tokens_per_gpu"} <= large.keys()
    assert large["efficiency_bounds"][0] <= large["efficiency"] <= large["efficiency_bounds"][1]
    assert not any(isinstance(value, dict) for value in large["hardware"].values())
