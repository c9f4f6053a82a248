"""The lock of a run and its fence, between real processes; no training."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import tiny
import torch
from burnish.harness import checkpoint, faults, lock
from burnish.harness.config_io import load_config
from burnish.harness.engine import World
from burnish.harness.errors import ConfigError, SupersededError
from burnish.harness.run_dir import RunDir
from burnish.launch import training

STARTERS, RACERS = 5, 50
RACE = """
import os, sys, time
from burnish.harness import lock
from burnish.harness.errors import ConfigError

def race():
    while not os.path.exists(sys.argv[2]):
        time.sleep(0.002)
    start = time.monotonic()
    try:
        with lock.hold(sys.argv[1]):
            os.write(1, f"won {os.getpid()}\\n".encode())
            time.sleep(4)
    except ConfigError as error:
        os.write(1, f"{time.monotonic() - start:.3f} {error}\\n".encode())

for _ in range(int(sys.argv[3])):
    if os.fork() == 0:
        race()
        os._exit(0)
os.write(1, b"ready\\n")
for _ in range(int(sys.argv[3])):
    os.wait()
"""
HOLDER = """
import os, subprocess, sys, time
from burnish.harness import lock
with lock.hold(sys.argv[1]):
    child = os.fork()
    if child:
        started = subprocess.Popen(["sleep", "60"])
        print(child, started.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _no_faults_left():
    yield
    faults.disarm()


def test_of_many_starts_at_once_one_wins_and_the_others_name_it_within_two_seconds(tmp_path):
    command = [sys.executable, "-c", RACE, tmp_path / "run", tmp_path / "go", str(RACERS // STARTERS)]
    starters = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(STARTERS)]
    assert [starter.stdout.readline() for starter in starters] == ["ready\n"] * STARTERS
    (tmp_path / "go").touch()
    lines = [line for starter in starters for line in starter.stdout.read().splitlines()]
    for starter in starters:
        starter.wait(timeout=30)
    assert len(lines) == RACERS
    [winner] = [line for line in lines if line.startswith("won ")]
    refused = [line for line in lines if line != winner]
    assert max(float(line.split()[0]) for line in refused) < 2
    assert all(f"process {winner.split()[1]} on {socket.gethostname()}" in line for line in refused)


def test_a_holder_that_was_killed_frees_the_lock_at_once_and_its_children_do_not_keep_it(tmp_path):
    run = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, run], stdout=subprocess.PIPE, text=True)
    children = [int(pid) for pid in holder.stdout.readline().split()]
    try:
        with pytest.raises(ConfigError, match=f"process {holder.pid} on"), lock.hold(run):
            pass
        holder.kill()
        holder.wait()
        assert all(os.path.exists(f"/proc/{pid}") for pid in children)
        with lock.hold(run):
            assert lock.holder(run)["pid"] == os.getpid()
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def test_the_lock_outlives_a_run_directory_that_is_moved_aside(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with lock.hold(run):
        run.rename(tmp_path / "run.old-1")
        with pytest.raises(ConfigError, match="in use by process"), lock.hold(run):
            pass


def test_the_command_in_the_lock_holds_no_value_of_an_override(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/burnish", "train", "x.yaml", "model.path=hf_secret"])
    with lock.hold(tmp_path / "run"):
        assert lock.holder(tmp_path / "run")["command"] == "burnish train x.yaml model.path=…"
        assert (tmp_path / ".run.lock").stat().st_mode & 0o777 == 0o600


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be locked"), lock.hold(tmp_path / "file" / "run"):
        pass


def test_only_who_took_the_last_number_is_current(tmp_path):
    driver = lock.fence(tmp_path)
    workers = lock.fence(tmp_path, driver=driver)
    assert workers > driver
    assert [lock.is_current(tmp_path, number) for number in (driver, workers, 0)] == [False, True, False]
    assert lock.driver_of(tmp_path) == driver
    again = lock.fence(tmp_path, driver=driver)
    assert not lock.is_current(tmp_path, workers)
    later = lock.fence(tmp_path)
    assert driver < workers < again < later
    with pytest.raises(SupersededError):
        lock.fence(tmp_path, driver=driver)
    assert lock.is_current(tmp_path, later)


def test_a_directory_that_took_the_place_of_another_has_higher_numbers(tmp_path):
    (tmp_path / "run").mkdir()
    before = lock.fence(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "old")
    (tmp_path / "run").mkdir()
    time.sleep(0.002)
    assert lock.fence(tmp_path / "run") > before


def test_a_broken_fence_file_is_no_fence(tmp_path):
    for text in ("", "[]", '{"number": "x"}'):
        (tmp_path / "fence.json").write_text(text)
        assert lock.is_current(tmp_path, lock.fence(tmp_path))
    assert set(json.loads((tmp_path / "fence.json").read_text())) == {"number", "driver"}


@pytest.mark.parametrize("point", ["save.after_shard", "save.after_part", "save.before_manifest", "save.before_rename"])
def test_an_attempt_that_loses_the_fence_during_a_save_commits_nothing(tmp_path, point):
    number = lock.fence(tmp_path)

    def save(step):
        checkpoint.save(
            tmp_path,
            step,
            state=iter([("param/weight", torch.ones(4))]),
            trainer={"step": step},
            world=World(rank=0, local_rank=0, size=1, device="cpu"),
            barrier=lambda: None,
            keep=2,
            attempt=number,
            may_commit=lambda: lock.is_current(tmp_path, number),
        )

    save(1)
    faults.arm(point, lambda: lock.fence(tmp_path))
    with pytest.raises(SupersededError):
        save(2)
    faults.disarm()
    with pytest.raises(SupersededError):
        save(3)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


def test_a_run_that_another_attempt_has_taken_over_writes_nothing_more(tmp_path):
    run = RunDir(tmp_path / "runs" / "tiny")
    config = load_config([str(tiny.write_config(tmp_path, checkpoint={"every_steps": 2}))])
    files = {}

    def take_over(record):
        if record.get("kind") == "train" and record["step"] == 3:
            lock.fence(run.path)
            files.update({path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()})

    with pytest.raises(SupersededError):
        training.train(config, mode="new", report=take_over)
    assert files
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == files
