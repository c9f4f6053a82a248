"""Runs under Ray that meet trouble. The undisturbed ones are in test_end_to_end."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import tiny
from burnish.harness.config_hardware import Ray
from burnish.harness.config_io import load_config
from burnish.harness.errors import ConfigError, TrainingError
from burnish.harness.run_dir import RunDir
from burnish.launch import processes, training
from burnish.launch.ray_cluster import cluster
from burnish.launch.ray_train import deterministic
from burnish.launch.resources import detect

WORKER = b"ray::RayTrainWorker"


def kill_a_worker(metrics, *, after_step):
    """Waits until that many steps are in the metrics file, then kills one of this process's Ray workers."""
    deadline = time.time() + 120
    while time.time() < deadline and (not metrics.exists() or metrics.read_bytes().count(b'"train"') < after_step):
        time.sleep(0.02)
    for process in processes.descendants(os.getpid()):
        if WORKER in Path(f"/proc/{process.pid}/cmdline").read_bytes():
            os.kill(process.pid, signal.SIGKILL)
            return


def losses(run):
    return [record["loss"] for record in run.read_jsonl(run.metrics_jsonl) if record["kind"] == "train"]


def test_a_killed_worker_is_replaced_and_the_losses_are_those_of_an_undisturbed_run(tmp_path):
    changes = {
        "adapter": {"method": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
        "train": {"max_steps": 80, "global_batch_size": 8, "micro_batch_size": 4, "num_threads": 1},
        "checkpoint": {"every_steps": 10},
        "launch": {"type": "ray", "num_workers": 2, "max_failures": 1},
    }
    path = tiny.write_config(tmp_path, **changes)
    run = RunDir(tmp_path / "runs" / "tiny")
    killer = threading.Thread(target=kill_a_worker, args=(run.metrics_jsonl,), kwargs={"after_step": 25})
    killer.start()
    seen = []
    training.train(load_config([str(path)]), mode="new", report=seen.append)
    killer.join()
    events = [event["event"] for event in run.read_jsonl(run.events_jsonl)]
    assert events.count("worker_failure") == 1
    assert events.count("resume") == 1
    assert "worker_failure" in [record.get("event") for record in seen]
    assert not [p for p in processes.descendants(os.getpid()) if b"ray" in Path(f"/proc/{p.pid}/cmdline").read_bytes()]
    again = tiny.write_config(tmp_path, name="undisturbed", **changes)
    undisturbed = training.train(load_config([str(again)]), mode="new", report=lambda record: None)
    assert len(losses(run)) == 80
    assert losses(run) == losses(undisturbed)
    assert json.loads(run.summary_json.read_text())["status"] == "finished"


def test_a_process_may_start_one_cluster_after_the_other():
    for _ in range(2):
        with cluster(Ray(type="ray"), detect()):
            pass


def test_only_what_a_restart_may_cure_is_tried_again():
    assert isinstance(deterministic(ConfigError("a wrong key")), ConfigError)
    assert isinstance(deterministic(MemoryError("no room")), TrainingError)
    assert "micro_batch_size" in str(deterministic(MemoryError("no room")))
    assert deterministic(RuntimeError("connection reset by peer")) is None
