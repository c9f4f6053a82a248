"""What is special about runs under Ray. Whole runs are in test_end_to_end, disturbed ones in test_ray_faults."""

import contextlib
import os
import time
from http.client import HTTPException
from ipaddress import ip_address
from pathlib import Path
from urllib.request import urlopen

import pytest
import ray
from burnish.harness.config_hardware import Ray
from burnish.harness.errors import ConfigError, TrainingError
from burnish.harness.run_dir import RunDir
from burnish.launch.processes import descendants
from burnish.launch.ray_cluster import cluster
from burnish.launch.ray_train import cause_of, deterministic, died_for_memory, note_resize, reason_of
from burnish.launch.resources import detect
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError


def test_a_process_may_start_one_cluster_after_the_other():
    for _ in range(2):
        with cluster(Ray(type="ray"), detect()):
            pass


def listeners(pids):
    """(host, port) of every TCP socket on which one of the processes waits for connections."""
    inodes = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(file).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and inode in inodes:
                host, port = local.split(":")
                words = [int(host[i : i + 8], 16).to_bytes(4, "little") for i in range(0, len(host), 8)]
                address = ip_address(b"".join(words))
                found.add((str(getattr(address, "ipv4_mapped", None) or address), int(port, 16)))
    return found


def test_nothing_outside_the_machine_reaches_a_cluster_of_its_own():
    """Ray's own default is the machine's address, and three servers of metrics that answer without a token."""

    @ray.remote
    def work():
        time.sleep(1)  # two workers, beside the driver

    with cluster(Ray(type="ray"), detect()):
        ray.get([work.remote(), work.remote()])
        found = listeners([os.getpid(), *(child.pid for child in descendants(os.getpid()))])
        assert len(found) >= 6
        assert {host for host, _ in found} == {"127.0.0.1"}
        for host, port in found:
            with pytest.raises((OSError, HTTPException)):  # unauthorized, or no HTTP
                urlopen(f"http://{host}:{port}/metrics", timeout=5).read()


def test_only_what_a_restart_may_cure_is_tried_again():
    assert isinstance(deterministic(ConfigError("a wrong key")), ConfigError)
    assert isinstance(deterministic(MemoryError("no room")), TrainingError)
    assert "micro_batch_size" in str(deterministic(MemoryError("no room")))
    assert deterministic(RuntimeError("connection reset by peer")) is None


def test_a_dead_worker_explains_the_others_and_is_not_taken_for_one_that_found_no_memory(tmp_path):
    """Ray Train wraps the end of a process, and Ray names the usual causes, the OOM killer among them, for any."""
    usual = "End of file. Some common causes include: (1) the process was killed by the OOM killer due to high memory"
    dead = WorkerHealthCheckFailedError("A worker health check failed.", RayActorError(error_msg=usual))
    failures = {0: RuntimeError("Connection closed by peer"), 1: reason_of(dead)}
    assert isinstance(failures[1], RayActorError)
    assert not died_for_memory({1: dead}, has_killed=False)
    assert died_for_memory({1: dead}, has_killed=True)
    assert cause_of(RunDir(tmp_path), failures) == "rank 1 died"


def test_a_group_that_replaces_one_that_did_not_fail_is_a_restart_with_its_sizes(tmp_path):
    run = RunDir(tmp_path)

    def causes():
        return [event["cause"] for event in run.read_jsonl(run.events_jsonl) if event["event"] == "restart"]

    run.log_event("plan")
    note_resize(run, 1)
    run.log_event("start", world_size=1)
    assert causes() == []
    note_resize(run, 2)
    assert causes() == ["resized from 1 to 2 workers"]
    note_resize(run, 2)
    assert len(causes()) == 1
