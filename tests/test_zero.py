"""DeepSpeed ZeRO 0-3 on two CPU ranks. One pair of processes computes everything; the tests read its results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from burnish.harness import checkpoint
from distributed import on_ranks
from engine_cases import new_engine, state_of, train_step

STEPS = 10
STAGES = (0, 1, 2, 3)
RUNS = (("full", "fp32"), ("lora", "fp32"), ("full", "bf16"))
STAGE_0_OPTIMIZERS = ("adafactor", "adamw_8bit")


def train(engine, rank, world, first, last):
    return [train_step(engine, step, rank, world) for step in range(first, last)]


def run_all(rank, world, folder):
    """Every training of this file, on this rank."""
    results = {}
    for stage in STAGES:
        for kind, dtype in RUNS:
            results[stage, kind, dtype] = _whole_and_resumed(rank, world, stage, kind, dtype, Path(folder))
        results[stage, "nan"] = [_poisoned(rank, world, stage, dtype) for dtype in ("fp32", "bf16")]
    for optimizer in STAGE_0_OPTIMIZERS:
        engine = new_engine("full", rank=rank, world=world, engine="deepspeed", optimizer__name=optimizer)
        results[optimizer] = train(engine, rank, world, 0, STEPS)
        engine.close()
    results["changed stage"] = _changed_stage(rank, world, Path(folder))
    results["buffers"] = _running_statistics(rank, world)
    return results


def _engine(rank, world, stage, kind, dtype="fp32"):
    return new_engine(kind, rank=rank, world=world, stage=stage, engine="deepspeed", model__dtype=dtype)


def _whole_and_resumed(rank, world, stage, kind, dtype, folder):
    """Losses and norms of an uninterrupted run, then of one saved at step 4 and continued by a fresh engine."""
    whole = _engine(rank, world, stage, kind, dtype)
    run_dir = folder / f"{stage}-{kind}-{dtype}"
    found = train(whole, rank, world, 0, 4)
    saved = state_of(whole)
    checkpoint.save(
        run_dir,
        4,
        state=saved.items(),
        trainer={},
        world=whole.world,
        barrier=whole.barrier,
        keep=1,
    )
    found += train(whole, rank, world, 4, STEPS)
    final, live = state_of(whole), whole.trained_state()
    whole.close()
    resumed = _engine(rank, world, stage, kind, dtype)
    resumed.load_state(checkpoint.load(checkpoint.newest(run_dir)[0], rank)[0])
    again = state_of(resumed)
    rest = train(resumed, rank, world, 4, STEPS)
    last = state_of(resumed)
    resumed.close()
    return {
        "steps": found,
        "rest": rest,
        "is_same_after_load": rank > 0 or _is_equal(saved, again),
        "is_same_at_the_end": rank > 0 or _is_equal(final, last),
        "names": sorted(live) if rank == 0 else live,
        "is_live_the_master": rank > 0
        or all(torch.equal(value, final[f"param/{name}"].to(value.dtype)) for name, value in live.items()),
    }


def _is_equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def _poisoned(rank, world, stage, dtype):
    """(skipped, unchanged, next step skipped) with a NaN in the loss of one rank."""
    engine = _engine(rank, world, stage, "full", dtype)
    train(engine, rank, world, 0, 1)
    before = state_of(engine)
    _, _, skipped = train_step(engine, 1, rank, world, poison=True)
    after = state_of(engine)
    is_same = rank > 0 or _is_equal(before, after)
    result = skipped, is_same, train_step(engine, 1, rank, world)[2]
    engine.close()
    return result


def _changed_stage(rank, world, folder):
    """A state saved at stage 2 continued at stage 3, the reverse, and each again at stage 1 and 0."""
    found = {}
    for source, target in ((2, 3), (3, 2), (3, 1), (1, 0), (0, 3)):
        engine = _engine(rank, world, target, "full")
        engine.load_state(checkpoint.load(checkpoint.newest(folder / f"{source}-full-fp32")[0], rank)[0])
        found[source, target] = train(engine, rank, world, 4, STEPS)
        engine.close()
    return found


def _running_statistics(rank, world):
    engine = _engine(rank, world, 2, "buffers")
    train(engine, rank, world, 0, 3)
    result = engine.model.norm.running_mean.tolist()
    engine.close()
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def pair(folder):
    """Results of both ranks."""
    return on_ranks(2, folder, run_all, str(folder))


@pytest.fixture(scope="module")
def torch_steps():
    """The same trainings by the torch engine: one rank with twice the accumulation."""
    return {(kind, dtype): train(new_engine(kind, model__dtype=dtype), 0, 1, 0, STEPS) for kind, dtype in RUNS}


def assert_close(found, expected, *, rel):
    """Losses, norms and skips."""
    for i in range(2):
        assert [step[i] for step in found] == pytest.approx([step[i] for step in expected], rel=rel)
    assert not any(step[2] for step in found)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_at_any_stage_equal_one_torch_rank_with_twice_the_accumulation(pair, torch_steps, stage, kind):
    """fp32, losses and gradient norms, with LoRA dropout."""
    assert_close(pair[0][stage, kind, "fp32"]["steps"], torch_steps[kind, "fp32"], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_at_any_stage_follows_the_torch_engine(pair, torch_steps, stage):
    """The first step agrees. Later ones differ by flipped roundings to bf16, more so at stage 3, whose hooks change the
    order in which autograd adds bf16 gradients of activations."""
    found, expected = pair[0][stage, "full", "bf16"]["steps"], torch_steps["full", "bf16"]
    assert_close(found[:1], expected[:1], rel=1e-6)
    assert [step[0] for step in found] == pytest.approx([step[0] for step in expected], rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_equals_uninterrupted_bit_for_bit(pair, stage):
    for kind, dtype in RUNS:
        result = pair[0][stage, kind, dtype]
        assert result["is_same_after_load"]
        assert result["rest"] == result["steps"][4:]
        assert result["is_same_at_the_end"]


@pytest.mark.parametrize("stage", STAGES)
def test_only_what_is_trained_is_gathered_on_rank_0(pair, stage):
    result = pair[0][stage, "lora", "fp32"]
    assert result["is_live_the_master"]
    assert all("lora_" in name for name in result["names"])
    assert pair[1][stage, "lora", "fp32"]["names"] is None


@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_on_one_rank_skips_the_step_on_all_and_changes_nothing(pair, stage):
    for rank in range(2):
        assert pair[rank][stage, "nan"] == [(True, True, False)] * 2


def test_all_ranks_report_the_same_losses_and_norms(pair):
    for stage in STAGES:
        assert pair[0][stage, "full", "fp32"]["steps"] == pair[1][stage, "full", "fp32"]["steps"]


def test_a_state_goes_from_any_stage_to_any_other(pair):
    for (source, _), found in pair[0]["changed stage"].items():
        assert_close(found, pair[0][source, "full", "fp32"]["steps"][4:], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_state_of_two_ranks_goes_on_at_one(pair, folder, stage):
    engine = new_engine("lora")
    engine.load_state(checkpoint.load(checkpoint.newest(folder / f"{stage}-lora-fp32")[0], 0)[0])
    assert_close(train(engine, 0, 1, 4, STEPS), pair[0][stage, "lora", "fp32"]["steps"][4:], rel=1e-5)


def test_ranks_agree_on_running_statistics(pair):
    assert pair[0]["buffers"] == pair[1]["buffers"]
    assert any(pair[0]["buffers"])


@pytest.mark.parametrize("optimizer", STAGE_0_OPTIMIZERS)
def test_optimizers_whose_state_cannot_be_partitioned_run_on_two_ranks_at_stage_0(pair, optimizer):
    expected = train(new_engine("full", optimizer__name=optimizer), 0, 1, 0, STEPS)
    assert_close(pair[0][optimizer], expected, rel=1e-3 if optimizer == "adamw_8bit" else 1e-5)


ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from burnish.harness.zero_state import flat_masters
from engine_cases import new_engine, train_step
for stage in (2, 3):
    engine = new_engine("full", engine="deepspeed", stage=stage)
    found = [train_step(engine, step, 0, 1) for step in range(3)]
    flats = [range(flat.data_ptr(), flat.data_ptr() + flat.nbytes) for flat in flat_masters(engine.deepspeed.optimizer)]
    masters = [tensor.data_ptr() for name, tensor in engine.state() if name.startswith("param/")]
    assert all(any(master in flat for flat in flats) for master in masters), "copied, where one rank has all of it"
    weights = list(engine.model.parameters())
    engine.release()
    held = [*weights, *flat_masters(engine.deepspeed.optimizer), *(getattr(w, "ds_tensor", w) for w in weights)]
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == 0
    engine.close()
    assert not torch.distributed.is_initialized()
    expected_engine = new_engine("full")
    expected = [train_step(expected_engine, step, 0, 1) for step in range(3)]
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=1e-5), (found, expected)
"""


def test_one_process_needs_no_group_of_the_caller_no_port_and_no_compiler(tmp_path):
    """As in `launch.type: inline`; DeepSpeed prints nothing and builds nothing."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    quiet = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(tmp_path / "ops"), "PATH": "/nonexistent"}
    process = subprocess.run(
        [sys.executable, "-c", ALONE, str(Path(__file__).parent)],
        env=os.environ | ranks | quiet,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout == ""
    assert not (tmp_path / "ops").exists()
