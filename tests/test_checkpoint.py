"""Files only, no training: what is saved comes back, and a save that fails leaves the checkpoints before it."""

import errno
import json
import random
import resource
import threading
import weakref

import numpy as np
import pytest
import torch
from burnish.harness import checkpoint, faults
from burnish.harness.engine import World
from burnish.harness.errors import ConfigError, TrainingError

POINTS = (
    "save.after_shard",
    "save.before_fsync",
    "save.after_fsync",
    "save.after_part",
    "save.before_manifest",
    "save.before_rename",
    "save.after_rename",
    "save.in_prune",
)
ALONE = World(rank=0, local_rank=0, size=1, device="cpu")


@pytest.fixture(autouse=True)
def _no_faults_left():
    yield
    faults.disarm()


def make_state(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "param/weight": torch.randn(40, 30, generator=generator),
        "optim/exp_avg/weight": torch.randn(40, 30, generator=generator),
        "optim/step/weight": torch.tensor(float(step)),
        "optim/state1/weight": torch.randint(0, 255, (40, 30), generator=generator, dtype=torch.uint8),
    }


def save(run_dir, step, *, keep=2, state=None, pieces=None):
    return checkpoint.save(
        run_dir,
        step,
        state=pieces or iter((state or make_state(step)).items()),
        trainer={"step": step, "data": "abc"},
        world=ALONE,
        barrier=lambda: None,
        keep=keep,
    )


def assert_whole(path):
    state, trainer, rng = checkpoint.load(path, 0)
    expected = make_state(trainer["step"])
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert rng is not None


def test_a_checkpoint_comes_back_bit_for_bit_and_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    path, broken = checkpoint.newest(tmp_path)
    assert path.name == "step_00000003"
    assert not broken
    assert_whole(path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["step_00000002", "step_00000003"]
    assert {p.suffix for p in path.iterdir()} == {".json", ".safetensors"}


def test_a_state_larger_than_a_shard_is_cut_and_joined_again(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 5000)
    path = save(tmp_path, 1)
    assert len(list(path.glob("state_*.safetensors"))) == 3
    assert_whole(path)


class Pieces:
    """Tensors made when they are asked for, with how many of them are alive."""

    def __init__(self, count):
        self.count, self.num_made, self.alive, self.most_alive = count, 0, weakref.WeakSet(), 0

    def __iter__(self):
        for number in range(self.count):
            tensor = torch.full((250,), float(number))
            self.alive.add(tensor)
            self.num_made += 1
            self.most_alive = max(self.most_alive, len(self.alive))
            yield f"param/{number}", tensor
            del tensor


def test_no_more_is_in_memory_than_one_file_and_the_piece_that_ends_it(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 5000)
    pieces = Pieces(23)
    path = save(tmp_path, 1, pieces=iter(pieces))
    assert pieces.most_alive == 5 + 1
    assert len(list(path.glob("state_*.safetensors"))) == 5
    state = checkpoint.load(path, 0)[0]
    assert all(torch.equal(state[f"param/{number}"], torch.full((250,), float(number))) for number in range(23))


@pytest.mark.parametrize("point", ["save.after_shard", "save.before_fsync", None])
def test_a_save_that_fails_takes_the_state_to_its_end_and_knows_its_bytes(tmp_path, monkeypatch, point):
    """Making the pieces is collective: the other ranks would wait for ever."""

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 5000)
    pieces = Pieces(23)
    if point:
        faults.arm(point, full)
    else:
        (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(TrainingError, match=f"{23 * 1000 + checkpoint.SPARE_BYTES} bytes are needed"):
        save(tmp_path, 1, pieces=iter(pieces))
    assert pieces.num_made == 23


def test_training_on_from_the_previous_checkpoint_moves_the_broken_one_aside(tmp_path):
    save(tmp_path, 1)
    broken = save(tmp_path, 2)
    (broken / "trainer.json").write_text("{}")
    assert_whole(save(tmp_path, 2))
    assert broken.with_name("step_00000002.broken").is_dir()


def test_a_manifest_that_names_files_outside_its_folder_does_not_verify(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    outside = tmp_path / "outside.json"
    outside.write_text("{}")
    manifest["files"]["../../outside.json"] = {"bytes": 2, "sha256": checkpoint._sha256(outside)}
    (path / "MANIFEST.json").write_bytes(checkpoint._manifest_bytes(manifest))
    assert not checkpoint.verify(path)


def test_non_finite_weights_are_refused_and_the_previous_checkpoint_stays(tmp_path):
    save(tmp_path, 1)
    bad = make_state(2)
    bad["param/weight"][3, 4] = float("nan")
    with pytest.raises(TrainingError, match="param/weight has non-finite values"):
        save(tmp_path, 2, state=bad)
    assert checkpoint.newest(tmp_path)[0].name == "step_00000001"


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_behind(tmp_path):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path, 1)
    for point in POINTS[:6]:
        faults.arm(point, full)
        with pytest.raises(TrainingError, match=r"No space left.* bytes are needed, .* bytes are free") as caught:
            save(tmp_path, 2)
        assert str(tmp_path) in str(caught.value)
        faults.disarm()
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert_whole(save(tmp_path, 2))


def test_a_write_that_the_system_cuts_short_is_one_clear_error(tmp_path):
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (7000, before[1]))
    try:
        with pytest.raises(TrainingError, match="cannot write a checkpoint"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.newest(tmp_path)[0].name == "step_00000001"


def on_threads(run_dir, count, action=None):
    """A save by `count` ranks that are threads; returns their results or errors."""
    meeting, results = threading.Barrier(count), {}

    def work(rank):
        if action:
            action(rank)
        try:
            results[rank] = checkpoint.save(
                run_dir,
                1,
                state=make_state(1).items() if rank == 0 else (),
                trainer={"step": 1},
                world=World(rank=rank, local_rank=rank, size=count, device="cpu"),
                barrier=lambda: meeting.wait(timeout=20) and None,
                keep=1,
            )
        except TrainingError as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_every_rank_leaves_its_generators_and_a_new_rank_has_none(tmp_path):
    results = on_threads(tmp_path, 3)
    assert set(results.values()) == {tmp_path / "checkpoints" / "step_00000001"}
    assert all(checkpoint.load(results[0], rank)[2] is not None for rank in range(3))
    assert checkpoint.load(results[0], 3)[2] is None


def test_when_one_rank_cannot_write_every_rank_says_so(tmp_path):
    def fail():
        if threading.current_thread() is threads[2]:
            raise OSError(errno.ENOSPC, "No space left on device")

    threads = {}
    faults.arm("save.after_fsync", fail)
    results = on_threads(tmp_path, 3, lambda rank: threads.__setitem__(rank, threading.current_thread()))
    assert all(isinstance(result, TrainingError) for result in results.values())
    assert "failed ranks: [2]" in str(results[0])
    assert checkpoint.newest(tmp_path) == (None, [])
    assert not list((tmp_path / "checkpoints").iterdir())


def test_random_generators_go_on_where_they_were():
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    draw()
    state = json.loads(json.dumps(checkpoint.rng_state()))
    expected = [draw(), draw()]
    checkpoint.set_rng_state(state)
    assert [draw(), draw()] == expected


def test_resuming_with_other_data_is_refused():
    checkpoint.check_same({"data": "abc", "seed": 1}, {"data": "abc"})
    with pytest.raises(ConfigError, match="data differs from the checkpoint"):
        checkpoint.check_same({"data": "abc"}, {"data": "abd"})
