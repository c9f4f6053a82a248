"""Equalities between whole runs in fp32: what must not change the result does not change it."""

import random

import pytest
import torch
from burnish.harness.detectors import SPIKE_WINDOW
from burnish.harness.run_dir import RunDir
from ranks import KILLED, RankPool, losses, make_job, run_job
from safetensors.torch import load_file

LORA_DROPOUT = {"method": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two ranks joined by gloo."""
    with RankPool(2, tmp_path_factory.mktemp("pair")) as pool:
        yield pool


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """One rank in a process of its own."""
    with RankPool(1, tmp_path_factory.mktemp("single")) as pool:
        yield pool


def run(pool, folder, name, **changes):
    """The losses of a run called `name` on all ranks of the pool."""
    job = make_job(folder, world=pool.world, name=name, **changes)
    assert pool.run(job) is None
    return losses(job)


def test_zero_stages_0_1_2_3_give_equal_losses_with_dropout(pair, tmp_path):
    by_stage = [
        run(pair, tmp_path, f"zero{stage}", memory__zero_stage=stage, adapter=LORA_DROPOUT) for stage in (0, 1, 2, 3)
    ]
    assert by_stage[0][-1] < by_stage[0][0]
    for other in by_stage[1:]:
        assert other == pytest.approx(by_stage[0], rel=1e-5)


def test_two_ranks_equal_one_rank_with_twice_the_accumulation_with_dropout(pair, single, tmp_path):
    """The seed of a micro-batch is its number in the global batch, so dropout falls alike on one rank and on two."""
    changes = {"adapter": LORA_DROPOUT, "train__micro_batch_size": 2}
    two = run(pair, tmp_path, "two", **changes)
    one = run(single, tmp_path, "one", **changes)
    assert two == pytest.approx(one, rel=1e-5)


def test_every_factorisation_of_a_global_batch_of_8_gives_equal_losses(pair, single, tmp_path):
    reference = run(single, tmp_path, "w1m8", train__micro_batch_size=8)
    for pool, micros in ((single, (1, 2, 4)), (pair, (1, 2, 4))):
        for micro in micros:
            found = run(pool, tmp_path, f"w{pool.world}m{micro}", train__micro_batch_size=micro)
            assert found == pytest.approx(reference, rel=1e-5), (pool.world, micro)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_packed_equals_unpacked(single, tmp_path, method):
    adapter = {"method": "full"} if method == "full" else {"method": "lora", "rank": 4, "alpha": 8}
    unpacked = run(single, tmp_path, "unpacked", adapter=adapter)
    packed = run(single, tmp_path, "packed", adapter=adapter, data__packing=True)
    assert packed == pytest.approx(unpacked, rel=1e-4)


def test_full_fine_tuning_is_equal_at_every_stage(pair, single, tmp_path):
    changes = {
        "adapter": {"method": "full"},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1},
    }
    reference = run(single, tmp_path, "one", **changes)
    for stage in (0, 1, 2, 3):
        found = run(pair, tmp_path, f"zero{stage}", memory__zero_stage=stage, **changes)
        assert found == pytest.approx(reference, rel=1e-5), stage


def test_qlora_gives_equal_losses_at_stages_0_2_and_3(pair, tmp_path):
    changes = {"quantization": {"type": "nf4"}, "adapter": {"method": "qlora", "rank": 4, "alpha": 8, "dropout": 0.1}}
    reference = run(pair, tmp_path, "zero0", memory__zero_stage=0, **changes)
    assert reference[-1] < reference[0]
    for stage in (2, 3):
        found = run(pair, tmp_path, f"zero{stage}", memory__zero_stage=stage, **changes)
        assert found == pytest.approx(reference, rel=1e-4), stage


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.nightly), 2, 3])
def test_2_then_1_then_2_workers_give_the_losses_of_2(pair, single, tmp_path, stage):
    """The state is gathered when it is saved, so that any group loads it; with dropout."""
    changes = {
        "launch": {"type": "ray", "num_workers": [1, 2]},
        "adapter": LORA_DROPOUT,
        "memory__zero_stage": stage,
        "train": {"max_steps": 12, "global_batch_size": 8, "micro_batch_size": 2, "num_threads": 1},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
    }
    expected = run(pair, tmp_path, "fixed", **changes)
    for pool, stop, mode in ((pair, 3, "new"), (single, 7, "resume"), (pair, None, "resume")):
        job = make_job(tmp_path, world=2, name="elastic", mode=mode, stop_after_step=stop, **changes)
        assert pool.run(job) is None
    found, folder = losses(job), RunDir(job.plan["run_dir"])
    started = [event["world_size"] for event in folder.read_jsonl(folder.events_jsonl) if event["event"] == "start"]
    assert started == [2, 1, 2]
    assert found[:4] == expected[:4]
    assert found == pytest.approx(expected, rel=1e-6)
    assert expected[-1] != pytest.approx(expected[0], rel=1e-3)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_nan_in_one_rank_makes_every_rank_skip_the_step_and_changes_nothing(pair, tmp_path, stage):
    changes = {
        "adapter": LORA_DROPOUT,
        "memory__zero_stage": stage,
        "checkpoint": {"every_steps": 1, "keep": 6},
        "train": {"max_steps": 5, "global_batch_size": 8, "micro_batch_size": 2, "num_threads": 1},
    }
    faults = [{"rank": 1, "step": 3, "point": "step", "action": "nan"}]
    job = make_job(tmp_path, world=2, name="nan", faults=faults, **changes)
    assert pair.run(job) is None
    folder = RunDir(job.plan["run_dir"])
    records = [record for record in folder.read_jsonl(folder.metrics_jsonl) if record["kind"] == "train"]
    assert [record["skipped"] for record in records] == [False, False, True, False, False]
    events = [event for event in folder.read_jsonl(folder.events_jsonl) if event["event"] == "skipped_step"]
    assert [(event["step"], event["num_skipped"]) for event in events] == [(3, 1)]
    states = [load_file(folder.checkpoints / f"step_{step:08d}" / "state_00000.safetensors") for step in (2, 3, 4)]
    before, at, after = states
    assert all(torch.equal(before[name], at[name]) for name in before)
    assert not all(torch.equal(before[name], after[name]) for name in before)


JUMPS = {
    "adapter": LORA_DROPOUT,
    "memory__zero_stage": 2,
    "train": {"max_steps": SPIKE_WINDOW + 6, "global_batch_size": 8, "micro_batch_size": 2, "num_threads": 1},
}


def events_of(job, name):
    run = RunDir(job.plan["run_dir"])
    return [event for event in run.read_jsonl(run.events_jsonl) if event["event"] == name]


def test_a_step_whose_loss_jumps_is_left_out_on_every_rank_and_so_it_is_after_a_kill(pair, tmp_path):
    """The losses that a jump is told by are in the checkpoint."""
    jump = SPIKE_WINDOW + 3
    changes = JUMPS | {"checkpoint": {"every_steps": 2, "keep": 6}}
    changes["train"] = JUMPS["train"] | {"on_loss_spike": "skip"}
    faults = [{"rank": 1, "step": jump, "point": "step", "action": "jump"}]
    whole = make_job(tmp_path, world=2, name="whole", faults=faults, **changes)
    assert pair.run(whole) is None
    [event] = events_of(whole, "loss_spike")
    assert event["step"] == jump
    assert event["loss"] > 100 * event["limit"]
    assert [(one["step"], one["reason"]) for one in events_of(whole, "skipped_step")] == [(jump, "its loss jumped")]
    run = RunDir(whole.plan["run_dir"])
    records = [record for record in run.read_jsonl(run.metrics_jsonl) if record["kind"] == "train"]
    assert [record["step"] for record in records if record["skipped"]] == [jump]

    killed = make_job(tmp_path, world=2, name="killed", kill_after_step=jump - 1, **changes)
    assert pair.run(killed) == KILLED
    resumed = make_job(tmp_path, world=2, name="killed", mode="resume", faults=faults, **changes)
    assert pair.run(resumed) is None
    assert losses(resumed) == losses(whole)
    assert [one["step"] for one in events_of(resumed, "skipped_step")] == [jump]


def test_a_loss_that_jumps_is_only_noted_where_the_config_does_not_say_more(single, tmp_path):
    faults = [{"step": SPIKE_WINDOW + 3, "point": "step", "action": "jump"}]
    job = make_job(tmp_path, world=1, name="noted", faults=faults, **JUMPS | {"memory__zero_stage": 0})
    assert single.run(job) is None
    assert events_of(job, "loss_spike")[0]["step"] == SPIKE_WINDOW + 3
    assert events_of(job, "skipped_step") == []


FULL_DISK = (
    {"rank": 0, "step": 4, "point": "save.after_shard", "action": "full"},
    {"rank": 1, "step": 6, "point": "save.before_fsync", "action": "full"},
)
SAVES = {
    "adapter": LORA_DROPOUT,
    "memory__zero_stage": 2,
    "train": {"max_steps": 8, "global_batch_size": 8, "micro_batch_size": 2, "num_threads": 1},
}


def test_a_disk_that_is_full_for_a_while_costs_the_checkpoints_of_that_while(pair, tmp_path):
    """On either rank; the run goes on as if nothing had been, and saves again as soon as it can."""
    expected = run(pair, tmp_path, "whole", **SAVES)
    keeps = {"every_steps": 2, "keep": 8, "on_error": "skip"}
    job = make_job(tmp_path, world=2, name="full", faults=FULL_DISK, checkpoint=keeps, **SAVES)
    assert pair.run(job) is None
    assert losses(job) == expected
    folder = RunDir(job.plan["run_dir"])
    skipped = [event for event in folder.read_jsonl(folder.events_jsonl) if event["event"] == "skipped_checkpoint"]
    assert [event["step"] for event in skipped] == [4, 6]
    assert "No space left on device" in skipped[0]["reason"]
    assert "failed ranks: [1]" in skipped[1]["reason"]
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step_00000002", "step_00000008"]


@pytest.mark.parametrize(("on_error", "step"), [("stop", 4), ("skip", 8)])
def test_a_full_disk_ends_the_run_by_default_and_always_at_its_last_checkpoint(pair, tmp_path, on_error, step):
    faults = [{"rank": 0, "step": step, "point": "save.after_shard", "action": "full"}]
    keeps = {"every_steps": 2, "on_error": on_error}
    job = make_job(tmp_path, world=2, name="ends", faults=faults, checkpoint=keeps, **SAVES)
    with pytest.raises(RuntimeError, match=r"SaveError: (cannot write|.* could not be written; failed ranks: \[0\])"):
        pair.run(job)
    whole = sorted(path.name for path in RunDir(job.plan["run_dir"]).checkpoints.iterdir())
    assert whole[-1] == f"step_{step - 2:08d}"
    job = make_job(tmp_path, world=2, name="ends", mode="resume", checkpoint=keeps, **SAVES)
    assert pair.run(job) is None


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.nightly)])
def test_a_rank_that_sleeps_in_every_step_is_named_within_20_steps(pair, tmp_path, stage):
    faults = [{"rank": 1, "point": "step", "action": "sleep", "seconds": 0.1}]
    train = {"max_steps": 25, "global_batch_size": 8, "micro_batch_size": 4, "num_threads": 1}
    job = make_job(tmp_path, world=2, name="slow", faults=faults, memory__zero_stage=stage, train=train)
    assert pair.run(job) is None
    folder = RunDir(job.plan["run_dir"])
    [event] = [event for event in folder.read_jsonl(folder.events_jsonl) if event["event"] == "straggler"]
    assert event["rank"] == 1
    assert event["step"] <= 20
    assert event["ratio"] > 2


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_killed_at_a_random_step_resumes_bit_for_bit(pair, single, tmp_path, stage):
    """Stage 0 is the inline engine; the kill is SIGKILL of rank 0 between two checkpoints."""
    pool = single if stage == 0 else pair
    changes = {
        "memory__zero_stage": stage,
        "adapter": LORA_DROPOUT,
        "checkpoint": {"every_steps": 3},
        "train": {"max_steps": 12, "global_batch_size": 8, "micro_batch_size": 2, "num_threads": 1},
    }
    expected = run(pool, tmp_path, "whole", **changes)
    step = random.Random(stage).randint(4, 10)
    killed = make_job(tmp_path, world=pool.world, name="killed", kill_after_step=step, **changes)
    assert pool.run(killed) == KILLED
    resumed = make_job(tmp_path, world=pool.world, name="killed", mode="resume", **changes)
    assert pool.run(resumed) is None
    assert losses(resumed) == expected


def test_an_interrupted_run_has_its_checkpoint_and_its_own_process_can_finish_it(tmp_path):
    """The stop file is read before every step; here it is there from the start."""
    from burnish.harness.errors import Interrupted

    job = make_job(tmp_path, world=1, name="stopped", adapter=LORA_DROPOUT)
    stop = RunDir(job.plan["run_dir"]).stop
    stop.touch()
    with pytest.raises(Interrupted):
        run_job(job, 0, 1)
    stop.unlink()
    run_job(make_job(tmp_path, world=1, name="stopped", mode="resume", adapter=LORA_DROPOUT), 0, 1)
    whole = make_job(tmp_path, world=1, name="whole", adapter=LORA_DROPOUT)
    run_job(whole, 0, 1)
    assert losses(job) == losses(whole)
