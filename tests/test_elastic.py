"""Elastic runs: what is planned for them, and that rows and their order do not depend on the number of workers.

Whole runs of 2, 1, 2 ranks are in test_equalities, those with Ray in test_ray_faults.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from burnish.harness import elastic
from burnish.harness.config import Config
from burnish.harness.data.loader import Loader
from burnish.harness.data.sampler import ABSENT, Sampler
from burnish.harness.errors import ConfigError, InfeasibleError
from burnish.harness.plan import Resources, make_plan, workers_per_node
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_memory import cpu, make_config, profile, ray

LENGTHS = np.random.default_rng(0).integers(1, 40, 50)


class Rows:
    """A store whose examples are their own numbers."""

    lengths = LENGTHS
    num_supervised = np.ones(len(LENGTHS), dtype=np.int64)

    def __getitem__(self, index):
        return index


TASK = SimpleNamespace(ignore=lambda index: ABSENT, collate=lambda examples, *_, pad_to: examples)


def cells_of_step(sampler, step, *, micro, world, packing):
    """{number of the cell: its rows} over all ranks, without the empty ones."""
    found = {}
    config = SimpleNamespace(data=SimpleNamespace(packing=packing))
    for rank in range(world):
        loader = Loader(Rows(), sampler, TASK, None, config, micro_batch_size=micro, world_size=world, rank=rank)
        part = loader.step(step)
        assert len(part.micro_batches) == elastic.accumulation(sampler.global_batch_size, micro, world)
        found |= dict(zip(part.cells, part.micro_batches, strict=True))
    num_cells = sampler.global_batch_size // micro
    assert all(rows == [ABSENT] for number, rows in found.items() if number >= num_cells)
    return {number: rows for number, rows in sorted(found.items()) if number < num_cells}


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 24), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.booleans())
def test_rows_and_their_order_do_not_depend_on_the_number_of_workers(data, batch, worlds, packing):
    """Each world takes some steps, then the next one goes on; the rows are those of one worker, cell by cell."""
    micro = data.draw(st.sampled_from([n for n in range(1, batch + 1) if batch % n == 0]))
    seed, epochs = data.draw(st.integers(0, 99)), data.draw(st.floats(0.2, 2))
    sampler = Sampler(np.zeros(50, dtype=np.uint16), [1.0], seed=seed, global_batch_size=batch, epochs=epochs)
    step = data.draw(st.integers(0, sampler.total_steps - 1))
    for world in worlds:
        expected = cells_of_step(sampler, step, micro=micro, world=1, packing=packing)
        assert cells_of_step(sampler, step, micro=micro, world=world, packing=packing) == expected
        step = (step + data.draw(st.integers(1, 3))) % sampler.total_steps


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40))
def test_every_micro_batch_that_is_offered_divides_the_batch_and_gives_all_workers_work(batch, workers):
    offered = elastic.micro_batches(batch, workers)
    assert all(batch % micro == 0 and batch // micro >= workers for micro in offered)
    if batch < workers:
        with pytest.raises(ConfigError, match=f"use at least {workers}, or at most {batch}"):
            elastic.micro_batch(batch, "auto", workers)
    else:
        assert elastic.micro_batch(batch, "auto", workers) in offered
        assert all(elastic.micro_batch(batch, micro, workers) == micro for micro in offered)


def elastic_plan(num_workers, *, batch=8, micro="auto", cpus=8):
    config = Config.model_validate(
        {
            "name": "tiny",
            "model": {"path": "some/model"},
            "task": {"type": "causal_lm"},
            "data": {"train": "train.jsonl"},
            "adapter": {"method": "lora"},
            "train": {"max_steps": 10, "global_batch_size": batch, "micro_batch_size": micro},
            "launch": {"type": "ray", "num_workers": num_workers},
        }
    )
    resources = Resources(device="cpu", num_devices=0, num_cpus=cpus, host_memory_bytes=2**34)
    return make_plan(config, resources, run_dir="runs/tiny", cwd="."), resources


def test_a_worker_derives_its_plan_from_the_group_it_is_in():
    plan, _ = elastic_plan([1, 4])
    found = [elastic.plan_for(plan, world) for world in (1, 2, 3, 4)]
    assert [one.gradient_accumulation_steps for one in found] == [4, 2, 2, 1]
    assert {(one.micro_batch_size, one.zero_stage, one.engine) for one in found} == {(2, 2, "deepspeed")}
    assert elastic.plan_for(plan, 4) == plan
    assert elastic.smallest(plan).world_size == 1


def test_a_range_is_planned_for_all_its_sizes_and_starts_with_what_there_is():
    plan, resources = elastic_plan([2, 16], batch=48, cpus=3)
    assert (plan.world_size, plan.micro_batch_size) == (16, 3)
    assert workers_per_node(plan, resources) == 3
    with pytest.raises(InfeasibleError, match="num_workers=4 at 1 CPU cores each needs 4, and there are 3"):
        elastic_plan([4, 16], batch=48, cpus=3)
    with pytest.raises(ConfigError, match=r"micro_batch_size=5 .* use one of 1, 3$"):
        elastic_plan([1, 2], batch=6, micro=5)
    with pytest.raises(ValueError, match=r"num_workers: \[4, 2\] is \[min, max\]"):
        elastic_plan([4, 2])


def test_memory_is_planned_for_the_smallest_group():
    """Where one worker has the whole optimizer state, it needs what one worker of a fixed run needs."""
    from burnish.harness.candidates import survey

    def peak(num_workers):
        config = make_config(launch=ray(num_workers), memory={"zero_stage": 3}, train={"micro_batch_size": 1})
        return survey(config, cpu(64), profile()).best.prediction.peak_bytes

    assert peak([1, 2]) == max(peak(1), peak(2)) > peak(2)
