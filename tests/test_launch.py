"""What the launchers are made of: resources, signals, following files, ending processes, resuming, failures."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny
from burnish.harness.config_io import load_config
from burnish.harness.errors import ConfigError, DataError, TrainingError
from burnish.harness.plan import Resources
from burnish.harness.run_dir import RunDir
from burnish.launch import failures, processes, resources, training
from burnish.launch.interrupt import Interrupts
from burnish.launch.tail import Tail

GIB = 2**30


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_this_host_has_at_least_one_core_and_some_memory():
    found = resources.detect()
    assert found.num_cpus >= 1
    assert found.host_memory_bytes > GIB // 4
    assert found.device in ("cpu", "cuda")


def test_a_cgroup_of_version_2_limits_cores_and_memory(tmp_path):
    write(tmp_path / "proc/self/cgroup", "0::/box/inner\n")
    write(tmp_path / "sys/fs/cgroup/box/cpu.max", "100000 100000\n")
    write(tmp_path / "sys/fs/cgroup/box/inner/cpu.max", "max 100000\n")
    write(tmp_path / "sys/fs/cgroup/box/memory.max", f"{GIB // 8}\n")
    write(tmp_path / "sys/fs/cgroup/box/inner/memory.max", "max\n")
    assert resources.num_cpus(tmp_path) == 1
    assert resources.memory_bytes(tmp_path) == GIB // 8


def test_a_cgroup_of_version_1_limits_cores_and_memory(tmp_path):
    write(tmp_path / "proc/self/cgroup", "4:memory:/box\n3:cpu,cpuacct:/box\n")
    write(tmp_path / "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us", "50000\n")
    write(tmp_path / "sys/fs/cgroup/cpu/box/cpu.cfs_period_us", "100000\n")
    write(tmp_path / "sys/fs/cgroup/memory/box/memory.limit_in_bytes", f"{GIB // 4}\n")
    assert resources.num_cpus(tmp_path) == 1
    assert resources.memory_bytes(tmp_path) == GIB // 4


def test_without_limits_the_whole_machine_counts(tmp_path):
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    write(tmp_path / "sys/fs/cgroup/cpu.max", "max 100000\n")
    assert resources.num_cpus(tmp_path) == len(os.sched_getaffinity(0))
    assert resources.memory_bytes(tmp_path) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_the_first_signal_asks_for_a_checkpoint_and_the_second_ends(tmp_path):
    notices = []
    before = signal.getsignal(signal.SIGINT)
    with Interrupts(notices.append) as interrupts:
        interrupts.arm(tmp_path / "stop")
        signal.raise_signal(signal.SIGINT)
        assert (tmp_path / "stop").exists()
        assert len(notices) == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before


def test_before_training_there_is_nothing_to_save_so_the_first_signal_ends(tmp_path):
    with Interrupts(print), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert list(tmp_path.iterdir()) == []


def append(path, *records):
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_a_tail_gives_each_record_once_and_waits_for_the_end_of_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append(path, {"step": 0})
    tail = Tail(path)
    assert tail.poll() == []
    append(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": ')
    assert tail.poll() == [{"step": 1}]
    assert tail.poll() == []
    with path.open("a") as file:
        file.write('2}\nnot json\n{"step": 3}\n')
    assert tail.poll() == [{"step": 2}, {"step": 3}]


def test_a_tail_survives_that_a_resumed_run_rewrites_the_file(tmp_path):
    path, later = tmp_path / "metrics.jsonl", time.time() + 60
    tail = Tail(path)
    append(path, *({"step": step, "time": later + step} for step in (1, 2, 3)))
    assert len(tail.poll()) == 3
    fresh = tmp_path / "fresh"
    append(fresh, {"step": 1, "time": later + 1}, {"step": 2, "time": later + 10})
    os.replace(fresh, path)
    assert tail.poll() == [{"step": 2, "time": later + 10}]
    append(path, {"step": 3, "time": later + 11})
    assert [record["step"] for record in tail.poll()] == [3]


def test_processes_that_do_not_end_by_themselves_are_killed():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    try:
        deadline = time.time() + 30
        while len(found := processes.descendants(parent.pid)) < 1 and time.time() < deadline:
            time.sleep(0.02)
        [child] = found
        assert child in processes.descendants(os.getpid())
        assert processes.end([child], grace_s=0.1) == [child]
        assert parent.wait(timeout=30) == 0
        assert not child.is_alive()
        assert processes.end([child], grace_s=0.1) == []
    finally:
        parent.kill()
        parent.wait()


def test_an_error_crosses_processes_with_its_exit_code(tmp_path):
    run = RunDir(tmp_path)
    failures.raise_fatal(run)
    run.write_json(run.fatal_json, {"kind": "DataError", "message": "rows.jsonl:3 is broken"})
    with pytest.raises(DataError, match=r"rows\.jsonl:3") as raised:
        failures.raise_fatal(run)
    assert raised.value.exit_code == 4
    assert isinstance(failures.fatal_error("OfAnotherVersion", "x"), TrainingError)


def config_of(folder, *overrides):
    return load_config([str(tiny.write_config(folder))], overrides)


def test_a_resumed_run_must_be_the_same_run_but_may_run_elsewhere(tmp_path):
    old = config_of(tmp_path)
    elsewhere = ["launch.type=ray", "launch.num_workers=2", "tracking.tensorboard=true", "train.num_threads=2"]
    training.check_same_config(old, config_of(tmp_path, *elsewhere))
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate was 0\.01, now 0\.5") as raised:
        training.check_same_config(old, config_of(tmp_path, "optimizer.learning_rate=0.5", "seed=8"))
    assert "seed was 7, now 8" in str(raised.value)


def train(config, mode="new"):
    return training.train(config, mode=mode, report=lambda record: None)


def test_a_run_directory_is_resumed_by_its_path_and_refused_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, "runs_dir=runs")
    run = train(config)
    assert training.resumed_config([str(run.path)], []) == config
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(ConfigError, match="where the run was started"):
        training.resumed_config([str(run.path)], [])


def test_a_mistake_found_before_the_first_step_leaves_no_run_behind(tmp_path):
    config = config_of(tmp_path, "adapter.target_modules=[nonsense]")
    with pytest.raises(ConfigError, match="nonsense"):
        train(config)
    assert not (tmp_path / "runs" / "tiny").exists()


def test_fresh_moves_the_old_run_aside_and_a_failure_after_the_first_step_is_noted(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    train(config)
    monkeypatch.setattr("burnish.harness.loop.MAX_SKIPPED_IN_A_ROW", 0)  # every step counts as one too many
    with pytest.raises(TrainingError, match="not finite"):
        train(config, "fresh")
    assert (tmp_path / "runs" / "tiny.old-1" / "adapter").is_dir()
    run = RunDir(tmp_path / "runs" / "tiny")
    assert run.read_jsonl(run.events_jsonl)[-1]["event"] == "error"
    assert json.loads(run.summary_json.read_text())["status"] == "failed"


def test_a_plan_for_more_workers_than_there_are_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "find_resources", lambda config: Resources("cpu", 0, 1, 8 * GIB))
    with pytest.raises(Exception, match="use at most 1 workers"):
        train(config_of(tmp_path, "launch.type=ray", "launch.num_workers=2"))
    assert not (tmp_path / "runs").exists()
