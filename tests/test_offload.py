"""Offload: the same losses and states as without, in whatever memory; and what a host must have for it."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from burnish.harness import checkpoint, offload
from burnish.harness.errors import ConfigError
from burnish.harness.zero_config import BUCKET_ELEMENTS, Extent, deepspeed_config, offload_config
from distributed import on_ranks
from engine_cases import make_config, make_plan, new_engine, state_of, train_step

STEPS, SAVED_STEP = 10, 4
IN_MEMORY = ((1, "cpu", "none"), (2, "cpu", "none"), (3, "cpu", "none"), (3, "none", "cpu"), (3, "cpu", "cpu"))
IN_FILES = ((3, "nvme", "none"), (3, "none", "nvme"), (3, "nvme", "nvme"))
"""Stage, offload_optimizer, offload_param: everything that is allowed. Files need an operator that is built first."""
RUNS = (("full", "fp32"), ("lora", "fp32"), ("full", "bf16"))
NOWHERE = ((2, "none", "none"), (1, "none", "none"), (3, "none", "none"))
CHANGES = (((2, "cpu", "none"), (0, "none", "none")), ((1, "none", "none"), (3, "cpu", "cpu")))
CHANGES_IN_FILES = (((3, "nvme", "nvme"), (2, "cpu", "none")), ((2, "cpu", "none"), (3, "nvme", "nvme")))
"""Where a checkpoint is saved, and where it goes on."""


def with_files(memory, files):
    """Parameters of a test: what needs files is for the nightly run."""
    return [*memory, *(pytest.param(*values, marks=pytest.mark.nightly) for values in files)]


ALL = with_files(IN_MEMORY, [(place,) for place in IN_FILES])


def memory(place, folder):
    _, optimizer, param = place
    return {
        "memory__offload_optimizer": optimizer,
        "memory__offload_param": param,
        "memory__nvme_path": str(folder / "nvme"),
    }


def engine_of(kind, dtype, place, folder, *, rank, world):
    """An engine of the toys, offloaded as the place says."""
    options = {"stage": place[0], "engine": "deepspeed", "model__dtype": dtype} | memory(place, folder)
    return new_engine(kind, rank=rank, world=world, **options)


def train(engine, rank, world, first, last):
    found = []
    for step in range(first, last):
        engine.model.step = step
        found.append(train_step(engine, step, rank, world))
    return found


def run_all(rank, world, name, places, changes):
    """Every training of this file in these places, on this rank."""
    folder, found = Path(name), {}
    for place in places:
        for kind, dtype in RUNS:
            engine = engine_of(kind, dtype, place, folder, rank=rank, world=world)
            found[place, kind, dtype] = train(engine, rank, world, 0, STEPS)
            engine.close()
        found[place, "nan"] = _poisoned(rank, world, place, folder)
    for place in (*NOWHERE, *places):
        engine = engine_of("experts", "fp32", place, folder, rank=rank, world=world)
        found[place, "experts"] = train(engine, rank, world, 0, STEPS)
        engine.close()
    for source, target in changes:
        found[source, target] = _resumed(rank, world, source, target, folder)
    if places == IN_FILES:
        found["files"] = _in_files(rank, world, folder)
    return found


def _poisoned(rank, world, place, folder):
    """(skipped, state is unchanged, the next step is skipped) with a NaN in the loss of one rank."""
    engine = engine_of("full", "bf16", place, folder, rank=rank, world=world)
    train(engine, rank, world, 0, 1)
    before = state_of(engine)
    _, _, skipped = train_step(engine, 1, rank, world, poison=True)
    after = state_of(engine)
    is_same = rank > 0 or _is_equal(before, after)
    result = skipped, is_same, train_step(engine, 1, rank, world)[2]
    engine.close()
    return result


def _is_equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def _resumed(rank, world, source, target, folder):
    """Steps of a run saved in one place and continued in another; and whether the state came through unchanged."""
    first = engine_of("wide", "fp32", source, folder, rank=rank, world=world)
    found = train(first, rank, world, 0, SAVED_STEP)
    saved, run_dir = state_of(first), folder / f"{source}-{target}"
    options = {"state": saved.items(), "trainer": {}, "world": first.world, "barrier": first.barrier, "keep": 1}
    checkpoint.save(run_dir, SAVED_STEP, **options)
    first.close()
    second = engine_of("wide", "fp32", target, folder, rank=rank, world=world)
    second.load_state(checkpoint.load(checkpoint.newest(run_dir)[0], rank)[0])
    again = state_of(second)
    found += train(second, rank, world, SAVED_STEP, STEPS)
    second.close()
    return found, rank > 0 or _is_equal(saved, again)


def _in_files(rank, world, folder):
    """What lies in memory and in files while everything is offloaded to files, and what is left behind."""
    engine = engine_of("wide", "fp32", (3, "nvme", "nvme"), folder, rank=rank, world=world)
    train(engine, rank, world, 0, 2)
    masters = [flat.numel() for flat in engine.deepspeed.optimizer.fp32_partitioned_groups_flat]
    files = [path.name for path in engine.folder.rglob("*.swp")]
    mode, place = stat.S_IMODE(engine.folder.stat().st_mode), engine.folder
    found = {"masters": masters, "files": files, "mode": mode, "name": place.name, "locked_kb": locked_kb()}
    found["sums_in"] = file_of(engine.deepspeed.optimizer.grad_partitions_flat_buffer)
    engine.barrier()
    engine.close()
    return found | {"is_gone": not place.exists(), "locked_kb_after": locked_kb()}


def locked_kb():
    """Of this process's memory, what the kernel may not take."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmLck"))


def file_of(tensor):
    """Path of the file whose pages the tensor is, also of a removed one; None for memory."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return line.split(maxsplit=5)[5] if len(line.split()) > 5 else None
    return None


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offload")
    return on_ranks(2, folder, run_all, str(folder), IN_MEMORY, CHANGES)


@pytest.fixture(scope="module")
def operator():
    """DeepSpeed's operator for files: built before the ranks start, for the first build takes minutes of their time."""
    build = "from burnish.harness import zero; zero._load('AsyncIOBuilder')"
    subprocess.run([sys.executable, "-c", build], env=os.environ | {"DS_ACCELERATOR": "cpu"}, check=True)


@pytest.fixture(scope="module")
def in_files(tmp_path_factory, operator):
    folder = tmp_path_factory.mktemp("offload")
    return on_ranks(2, folder, run_all, str(folder), IN_FILES, CHANGES_IN_FILES)


@pytest.fixture
def pair(request):
    """Results of both ranks, of the place or the change of place that the test is about."""
    return request.getfixturevalue("in_files" if "nvme" in str(request.node.callspec.params) else "in_memory")


@pytest.fixture(scope="module")
def torch_steps():
    """The same trainings by the torch engine: one rank with twice the accumulation."""
    kinds = (*RUNS, ("wide", "fp32"))
    return {(kind, dtype): train(new_engine(kind, model__dtype=dtype), 0, 1, 0, STEPS) for kind, dtype in kinds}


def values(steps, i):
    return [step[i] for step in steps]


@pytest.mark.parametrize("place", [*NOWHERE[1:], *ALL])
def test_experts_that_a_micro_batch_or_a_step_does_not_use_get_no_gradient_of_an_earlier_step(pair, place):
    found, expected = pair[0][place, "experts"], pair[0][NOWHERE[0], "experts"]
    assert values(found, 0) == pytest.approx(values(expected, 0), rel=1e-5)
    assert values(found, 1) == pytest.approx(values(expected, 1), rel=1e-4)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("place", ALL)
def test_offloaded_training_equals_the_torch_engine(pair, torch_steps, place, kind):
    """fp32: losses, gradient norms and skips; with dropout and accumulation."""
    found, expected = pair[0][place, kind, "fp32"], torch_steps[kind, "fp32"]
    assert values(found, 0) == pytest.approx(values(expected, 0), rel=1e-5)
    assert values(found, 1) == pytest.approx(values(expected, 1), rel=1e-4)
    assert not any(values(found, 2))


@pytest.mark.parametrize("place", ALL)
def test_bf16_accumulates_in_fp32_wherever_gradients_lie(pair, torch_steps, place):
    """The first norm is of four accumulated gradients: sums in bf16 would be off by 1e-3."""
    found, expected = pair[0][place, "full", "bf16"], torch_steps["full", "bf16"]
    assert found[0][:2] == pytest.approx(expected[0][:2], rel=1e-6)
    assert values(found, 0) == pytest.approx(values(expected, 0), rel=1e-3)


@pytest.mark.parametrize("place", ALL)
def test_a_nan_on_one_rank_skips_the_step_on_all_and_changes_nothing(pair, place):
    assert [pair[rank][place, "nan"] for rank in range(2)] == [(True, True, False)] * 2


@pytest.mark.parametrize(("source", "target"), with_files(CHANGES, CHANGES_IN_FILES))
def test_a_checkpoint_goes_on_in_another_place(pair, torch_steps, source, target):
    steps, is_same = pair[0][source, target]
    assert is_same
    assert values(steps, 0) == pytest.approx(values(torch_steps["wide", "fp32"], 0), rel=1e-4)


@pytest.mark.nightly
def test_state_that_is_offloaded_to_files_is_not_in_memory_and_files_are_private_and_go_with_their_buffers(in_files):
    for rank in range(2):
        found = in_files[rank]["files"]
        assert 0 in found["masters"]
        assert max(found["masters"]) * 4 < 2**20  # the norms are not worth a file
        assert any(name.startswith("exp_avg") for name in found["files"])
        assert any("param" in name for name in found["files"])
        assert found["mode"] == 0o700
        assert found["name"].startswith(f"burnish-toy-{rank}-")
        assert found["is_gone"]
        assert str(found["sums_in"]).endswith("(deleted)")  # gradients, in a file without a name
        assert found["locked_kb"] > 0 == found["locked_kb_after"]


def test_without_offload_nothing_of_it_is_in_the_settings():
    plan = make_plan(make_config(), stage=2, engine="deepspeed")
    assert offload_config(plan, folder=None, extent=Extent(1, 1)) == {"zero_optimization": {}}


def test_settings_say_where_everything_lies_and_how_large_the_buffers_are():
    config = make_config(
        memory__offload_optimizer="nvme", memory__offload_param="nvme", memory__nvme_path="disk", memory__zero_stage=3
    )
    plan = make_plan(config, stage=3, engine="deepspeed")
    settings = offload_config(plan, folder="/disk/run", extent=Extent(largest_piece=1000, pieces_at_once=7))
    optimizer, param = (settings["zero_optimization"][f"offload_{name}"] for name in ("optimizer", "param"))
    assert (optimizer["device"], optimizer["nvme_path"], optimizer["buffer_count"]) == ("nvme", "/disk/run", 4)
    assert (param["device"], param["buffer_size"], param["buffer_count"], param["max_in_cpu"]) == ("nvme", 1000, 8, 0)
    assert settings["aio"]["block_size"] == 2**20
    assert not optimizer["pin_memory"]
    assert deepspeed_config(plan, 10**9)["zero_optimization"]["reduce_bucket_size"] < BUCKET_ELEMENTS


def test_settings_are_plain_json():
    for stage in range(4):
        plan = make_plan(make_config(), stage=stage, engine="deepspeed")
        settings = deepspeed_config(plan, 1001)
        assert json.loads(json.dumps(settings)) == settings


HOLDS = """
import sys, time
from burnish.harness.offload import private_folder
from burnish.harness.plan import Plan
import json
with private_folder(Plan.from_dict(json.loads(sys.argv[1])), rank=3) as folder:
    (folder / "file").write_text("x")
    print(folder, flush=True)
    time.sleep(60)
"""


def nvme_plan(folder, **changes):
    return make_plan(make_config(memory__offload_optimizer="nvme", memory__nvme_path=str(folder), **changes), stage=3)


def test_what_a_crash_left_is_removed_at_the_next_start_and_what_is_in_use_is_not(tmp_path):
    plan = nvme_plan(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", HOLDS, plan.to_json()], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    other = Path(process.stdout.readline().strip())
    try:
        assert (other / "file").exists()
        assert other.name.startswith("burnish-toy-3-")
        with offload.private_folder(plan, rank=0) as own:
            assert stat.S_IMODE(own.stat().st_mode) == 0o700
            assert (other / "file").exists()
        assert not own.exists()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with offload.private_folder(plan, rank=0):
        assert not other.exists()
    assert list(tmp_path.iterdir()) == []


def test_names_of_runs_do_not_lead_out_of_the_folder(tmp_path):
    config = nvme_plan(tmp_path).config.model_copy(update={"name": "../../x y"})
    with offload.private_folder(make_plan(config, stage=3), rank=0) as folder:
        assert folder.parent == tmp_path


@pytest.mark.parametrize("tools", [["g++"], ["ninja"], ["libaio"], ["g++", "ninja"]])
def test_what_is_missing_is_said_before_training_with_what_to_install(monkeypatch, tmp_path, tools):
    monkeypatch.setattr(offload, "missing_tools", lambda *, with_files: tools)
    with pytest.raises(ConfigError, match=r"memory\.offload_optimizer: nvme") as caught:
        offload.check(nvme_plan(tmp_path))
    assert all(offload.INSTALL[tool] in str(caught.value) for tool in tools)


def test_a_host_without_tools_lacks_them(monkeypatch):
    monkeypatch.setattr(offload, "find_tool", lambda name: None)
    assert offload.missing_tools(with_files=False) == ["g++", "ninja"]
    monkeypatch.setattr(offload, "find_tool", lambda name: "/bin/false")
    assert offload.missing_tools(with_files=True) == ["libaio"]


def test_a_run_without_offload_needs_no_tools(monkeypatch):
    monkeypatch.setattr(offload, "missing_tools", lambda **_: pytest.fail("asked"))
    offload.check(make_plan(make_config()))
    offload.check(make_plan(make_config(memory__offload_param="cpu"), stage=3))


def test_a_file_where_a_folder_should_be_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"memory\.nvme_path: cannot write in"),
        offload.private_folder(nvme_plan(tmp_path / "file"), rank=0),
    ):
        pass


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"memory__offload_param": "cpu", "memory__zero_stage": 2}, "memory.offload_param"),
        ({"memory__offload_optimizer": "cpu", "memory__zero_stage": 0}, "memory.offload_optimizer"),
        ({"memory__offload_optimizer": "nvme", "memory__nvme_path": "x", "memory__zero_stage": 2}, "nvme needs"),
        ({"memory__offload_optimizer": "nvme"}, "memory.nvme_path"),
        ({"memory__offload_optimizer": "cpu", "optimizer__name": "sgd"}, "optimizer.name adamw"),
    ],
)
def test_what_cannot_be_offloaded_is_refused_by_its_key(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_config(**changes)


@pytest.mark.parametrize(("world", "goes_to_all"), [(1, True), (2, True), (4, False)])
def test_gradients_go_to_their_owner_alone_where_that_saves_bytes(world, goes_to_all):
    settings = deepspeed_config(make_plan(make_config(), stage=2, world=world, engine="deepspeed"), 1000)
    assert settings["zero_optimization"]["use_multi_rank_bucket_allreduce"] is goes_to_all
