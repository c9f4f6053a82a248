"""Many ranks on several Ray nodes of one machine train to the end, killed ones too; and half an hour of one run."""

import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from burnish.harness.run_dir import RunDir
from burnish.launch.processes import descendants
from burnish.launch.resources import available_bytes
from soak import command_of

BYTES_PER_RANK = 640 * 2**20
"""A process of its own, with a share of the cluster's."""
SOAK = Path(__file__).with_name("soak.py")


@pytest.mark.nightly
def test_many_ranks_train_to_the_end_also_when_one_is_killed():
    num_ranks = next((n for n in (32, 16) if n * BYTES_PER_RANK < available_bytes()), None)
    if num_ranks is None:
        pytest.skip("16 ranks need 10 GiB of memory")
    command = [sys.executable, str(SOAK), "--ranks", str(num_ranks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [case["restarts"] for case in cases] == [0, 1]
    assert cases[1]["lost_steps"] == 2
    assert cases[0]["losses"] == cases[1]["losses"]
    assert cases[0]["loss_difference"] < 1e-5


LONG_S, WARM_S, SAMPLE_S = 1800, 240, 10
NUM_AVERAGED = 18


def held(pid):
    """Resident bytes and open files of each worker below this process."""
    found = {}
    for worker in (child.pid for child in descendants(pid) if b"RayTrainWorker" in command_of(child.pid)):
        pages = int(Path(f"/proc/{worker}/statm").read_text().split()[1])
        found[worker] = (pages * 4096, len(list(Path(f"/proc/{worker}/fd").iterdir())))
    return found


@pytest.mark.nightly
def test_half_an_hour_of_steps_checkpoints_and_evaluations_grows_in_neither_memory_nor_open_files(tmp_path):
    config = tiny.write_config(
        tmp_path,
        launch={"type": "ray", "num_workers": 2},
        memory={"zero_stage": 2},
        train={"max_steps": 10**6, "global_batch_size": 8, "micro_batch_size": 2, "num_threads": 1},
        checkpoint={"every_steps": 200},
        eval={"every_steps": 500},
        tracking={"tensorboard": True},
    )
    command = [Path(sys.executable).with_name("burnish"), "train", config]
    samples, began = [], time.monotonic()
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while time.monotonic() - began < LONG_S:
            time.sleep(SAMPLE_S)
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            if time.monotonic() - began > WARM_S:
                samples.append(held(process.pid))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    workers = samples[0].keys()
    assert len(workers) == 2
    assert all(sample.keys() == workers for sample in samples)
    run = RunDir(tmp_path / "runs" / "tiny")
    print(f"{run.read_jsonl(run.metrics_jsonl)[-1]['step']} steps", samples[0], samples[-1])
    for worker in workers:
        memory, files = zip(*(sample[worker] for sample in samples), strict=True)
        early, late = (statistics.median(part) for part in (memory[:NUM_AVERAGED], memory[-NUM_AVERAGED:]))
        assert late < 1.05 * early
        assert max(files[-NUM_AVERAGED:]) <= max(files[:NUM_AVERAGED])
