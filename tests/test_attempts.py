"""What tells that a process was killed for want of memory, and where it was; signals that reach a run twice."""

import signal
import time

import pytest
from burnish.harness import backoff
from burnish.harness.errors import OutOfMemory
from burnish.harness.run_dir import RunDir
from burnish.launch import attempts, interrupt, processes
from burnish.launch.ray_train import died_for_memory
from ray.exceptions import ActorDiedError, RayTaskError


def test_the_newest_cgroup_that_counts_kills_is_read(tmp_path):
    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert processes.oom_kills(tmp_path) == 0
    write("proc/vmstat", "nr_free_pages 12\noom_kill 7\n")
    assert processes.oom_kills(tmp_path) == 7
    write("proc/self/cgroup", "0::/box\n")
    write("sys/fs/cgroup/box/memory.events", "low 0\nhigh 0\nmax 4\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert processes.oom_kills(tmp_path) == 2
    write("proc/self/cgroup", "4:memory:/jail\n0::/\n")
    write("sys/fs/cgroup/memory/jail/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    assert processes.oom_kills(tmp_path) == 5


def test_a_killed_process_was_where_its_files_say(tmp_path):
    run = RunDir(tmp_path)
    with pytest.raises(OutOfMemory, match="before training began"):
        attempts.killed(run)
    run.log_event("plan")
    assert attempts.killed(run).phase == "load"
    run.log_event("start", total_steps=9)
    run.append_jsonl(run.metrics_jsonl, {"kind": "train", "step": 3, "time": time.time() + 1})
    assert (attempts.killed(run).phase, attempts.killed(run).step) == ("step", 3)
    run.log_event(backoff.EVENT)
    assert (attempts.killed(run).phase, attempts.killed(run).step) == ("load", 0)
    with pytest.raises(OutOfMemory, match="before training began"):
        attempts.killed(run, since=time.time() + 1)


def test_a_signal_that_reaches_a_run_itself_and_through_its_parent_counts_once(tmp_path, monkeypatch):
    notices = []
    with interrupt.Interrupts(notices.append) as interrupts:
        interrupts.arm(tmp_path / "stop")
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(interrupt.PASSED_ON[signal.SIGTERM])
        assert len(notices) == 1
        assert interrupt.exit_code(tmp_path / "stop") == 143
        monkeypatch.setattr(interrupt, "TWIN_S", 0.0)
        with pytest.raises(interrupt.Terminated):
            signal.raise_signal(interrupt.PASSED_ON[signal.SIGTERM])


def test_a_worker_that_is_gone_counts_only_with_a_sign_of_memory():
    gone, raised = ActorDiedError(), RayTaskError("train", "Traceback …", ValueError("out of memory"))
    assert died_for_memory({1: gone}, has_killed=True)
    assert not died_for_memory({1: gone}, has_killed=False)
    assert not died_for_memory({0: raised}, has_killed=True)
    assert not died_for_memory({}, has_killed=True)
