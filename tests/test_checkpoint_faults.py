"""Checkpoints under 200 kills, 1,000 damages and a disk that fills up: never a torn one used, always a whole one.

Files only: nothing is trained here. The kills happen in children of one helper process that has imported torch once.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from burnish.harness import checkpoint
from burnish.harness.errors import TrainingError
from test_checkpoint import POINTS, assert_whole, save

KILLS = 200
DAMAGES = 1000
HELPER = "import sys; sys.path.insert(0, sys.argv[1]); import test_checkpoint_faults as t; t.kill_many(*sys.argv[2:])"


def save_for_ever(run_dir, first_step):
    """What a child does until it is killed."""
    torch.set_num_threads(1)
    for step in range(first_step, 10**6):
        save(run_dir, step)


def kill_many(run_dir, count, seed):
    """Kills a saving child `count` times, at every fault point and then at random instants; prints what was left."""
    from burnish.harness import faults

    rng, left = random.Random(int(seed)), []
    path = save(run_dir, 1)
    for number in range(int(count)):
        checkpoint.clean(run_dir)
        assert not list(path.parent.glob(".*")), "the next start removes what is left"
        point = POINTS[number] if number < len(POINTS) else None
        before = checkpoint.newest(run_dir)[0]
        child = os.fork()
        if child == 0:
            try:
                if point:
                    faults.arm(point, lambda: os.kill(os.getpid(), signal.SIGKILL))
                save_for_ever(run_dir, int(before.name.removeprefix("step_")) + 1)
            finally:
                os._exit(1)
        if point is None:
            time.sleep(rng.uniform(0.0, 0.06))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status), (number, point, status)
        path, broken = checkpoint.newest(run_dir)
        assert not broken, (number, point, broken)
        assert path.name >= before.name, (number, point)
        assert_whole(path)
        left.append(len(list(path.parent.glob(".*"))))
    print(json.dumps({"left": left, "step": int(path.name.removeprefix("step_"))}))


def killed(run_dir, count, seed):
    """What `kill_many` printed, run in a process of its own."""
    command = [sys.executable, "-c", HELPER, str(Path(__file__).parent), str(run_dir), str(count), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def assert_never_torn(found, count):
    assert len(found["left"]) == count
    assert max(found["left"]) == 1, "some kills interrupt a save, and none leaves more than one temporary folder"


def test_a_saver_killed_15_times_leaves_a_whole_checkpoint_every_time(tmp_path):
    assert_never_torn(killed(tmp_path, 15, seed=1), 15)


@pytest.mark.nightly
def test_a_saver_killed_at_200_random_instants_leaves_a_whole_checkpoint_every_time(tmp_path):
    assert_never_torn(killed(tmp_path, KILLS, seed=0), KILLS)


def flip(content, rng):
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def truncate(content, rng):
    del content[rng.randrange(len(content)) :]


def insert(content, rng):
    content.insert(rng.randrange(len(content) + 1), rng.randrange(256))


def zero_a_block(content, rng):
    """What a disk returns for a sector that was never written."""
    start = rng.randrange(len(content))
    block = content[start : start + 512]
    content[start : start + 512] = bytes(len(block)) if any(block) else b"\xff" * len(block)


EDITS = {"flip": flip, "truncate": truncate, "insert": insert, "zero": zero_a_block}
MOVES = ("delete", "rename", "from another step", "from another file", "folder renamed", "link", "fifo", "manifest")


def damage(newest, older, rng):
    """One fault in the newest checkpoint; returns what was done, in words, for the message of a failure."""
    kind = rng.choice([*EDITS] * 3 + [*MOVES])
    names = sorted(path.name for path in newest.iterdir())
    name = rng.choice(names)
    file = newest / name
    content = bytearray(file.read_bytes())
    if kind in EDITS:
        EDITS[kind](content, rng)
        file.write_bytes(content)
    elif kind == "delete":
        file.unlink()
    elif kind == "rename":
        file.rename(newest / rng.choice(["state_00009.safetensors", "x.json", f"{name}.bak"]))
    elif kind in ("from another step", "manifest"):
        name = "MANIFEST.json" if kind == "manifest" else "state_00000.safetensors"
        shutil.copyfile(older / name, newest / name)
    elif kind == "from another file":
        file.write_bytes((newest / rng.choice([other for other in names if other != name])).read_bytes())
    elif kind == "folder renamed":
        shutil.rmtree(newest)
        shutil.copytree(older, newest)
    else:
        file.unlink()
        # A link to another file of the right content is refused too: what it points to may change after the check.
        elsewhere = newest.parent / "elsewhere"
        elsewhere.write_bytes(content)
        file.symlink_to(elsewhere) if kind == "link" else os.mkfifo(file)
    return kind, name


def test_every_one_of_1000_random_damages_is_found_and_the_previous_checkpoint_chosen(tmp_path):
    rng, kinds = random.Random(6), set()
    older, newest = (save(tmp_path, step) for step in (1, 2))
    originals = {path.name: path.read_bytes() for path in newest.iterdir()}
    for _ in range(DAMAGES):
        done = damage(newest, older, rng)
        kinds.add(done[0])
        assert checkpoint.newest(tmp_path) == (older, [str(newest)]), done
        shutil.rmtree(newest)
        newest.mkdir()
        for name, content in originals.items():
            (newest / name).write_bytes(content)
    assert kinds == {*EDITS, *MOVES}
    assert checkpoint.newest(tmp_path) == (newest, [])


@pytest.mark.parametrize("kind", ["fifo", "link", "huge manifest", "deep manifest", "folder is a link"])
def test_what_is_no_plain_checkpoint_is_passed_over_at_once(tmp_path, kind):
    older, newest = (save(tmp_path, step) for step in (1, 2))
    manifest = newest / "MANIFEST.json"
    if kind == "folder is a link":
        newest.rename(tmp_path / "elsewhere")
        newest.symlink_to(tmp_path / "elsewhere")
    elif kind == "huge manifest":
        manifest.write_bytes(b" " * (checkpoint.MAX_MANIFEST_BYTES + 1))
    elif kind == "deep manifest":
        manifest.write_bytes(b"[" * 10**6)
    else:
        manifest.unlink()
        os.mkfifo(manifest) if kind == "fifo" else manifest.symlink_to("/dev/zero")
    start = time.perf_counter()
    assert checkpoint.newest(tmp_path) == (older, [str(newest)])
    assert time.perf_counter() - start < 1


def assert_refused_whole(run_dir, why=r"cannot write a checkpoint to "):
    """The save of step 2 fails, names the place and the bytes, and step 1 is all there is."""
    with pytest.raises(TrainingError, match=why) as caught:
        save(run_dir, 2)
    message = str(caught.value)
    assert str(run_dir) in message
    assert "bytes are needed" in message
    assert "bytes are free" in message
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000001"]
    assert_whole(checkpoint.newest(run_dir)[0])


def test_a_write_cut_short_at_any_size_leaves_the_previous_checkpoint(tmp_path):
    sizes = sorted(path.stat().st_size for path in save(tmp_path, 1).iterdir())
    limits = sorted({1, *sizes[:-1], *(size - 1 for size in sizes), *(size // 2 for size in sizes)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            assert_refused_whole(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_whole(save(tmp_path, 2))


@pytest.mark.nightly
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_fills_up_at_any_point_leaves_the_previous_checkpoint(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    size = 4 * 2**20
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount], check=True)
    try:
        save(mount, 1)
        filler = mount / "filler"
        for free in range(4096, 60_000, 4096):  # a checkpoint here takes some 40 kB
            filler.write_bytes(b"\1" * (shutil.disk_usage(mount).free - free))
            assert_refused_whole(mount, why="bytes are")
            filler.unlink()
        assert_whole(save(mount, 2))
    finally:
        subprocess.run(["umount", mount], check=True)
