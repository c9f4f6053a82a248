"""Many ranks on one machine: a tiny model on several Ray nodes of `ray.cluster_utils.Cluster`, undisturbed and killed.

    python tests/soak.py [--ranks 16] [--nodes 4] [--steps 40] [--case undisturbed|killed] [--record]

trains on one process, then on all ranks to the end, without and with a killed worker, compares the losses and prints
what it took as JSON; with `--record` it writes it to docs/soak.json, which docs/scaling.md shows.
"""

import argparse
import json
import os
import secrets
import shlex
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path

import tiny

RECORD = Path(__file__).resolve().parents[1] / "docs" / "soak.json"
OBJECT_STORE_BYTES = 80 * 2**20
SAMPLE_S = 10.0
KILLED_AFTER, SAVED_EVERY = 0.6, 5
"""About what share of the steps is done when a worker is killed; steps between checkpoints."""
CASES = ("undisturbed", "killed")
KILLED = "killed"
LIBRARIES = ("torch", "ray", "deepspeed")


def pss_bytes(pids):
    """Proportional memory of the processes: shared pages count once over all that share them."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


class Memory(threading.Thread):
    """The most memory that the processes below this one had together, and the most that their ranks had."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.ranks_peak, self.is_over = 0, 0, threading.Event()

    def run(self):
        from burnish.launch.processes import descendants

        while not self.is_over.wait(SAMPLE_S):
            pids = [process.pid for process in descendants(os.getpid())]
            ranks = [pid for pid in pids if b"RayTrainWorker" in command_of(pid)]
            of_ranks = pss_bytes(ranks)
            self.ranks_peak = max(self.ranks_peak, of_ranks)
            self.peak = max(self.peak, of_ranks + pss_bytes(set(pids) - set(ranks) | {os.getpid()}))


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def start(folder, *, num_ranks, num_nodes, kill_step):
    """A cluster whose nodes declare a CPU for every rank, with token authentication and nothing started in advance.

    A rank in the middle is killed before that step, unless the file `killed` is there.
    """
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    (folder / "ray").mkdir()
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_TMPDIR": str(folder)})
    from burnish.launch.ray_cluster import SETTINGS  # imports Ray, which reads the mode then
    from ray.cluster_utils import Cluster

    # So many processes that start at once on few cores need longer than a real node's.
    SETTINGS["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "900"
    os.environ.update(SETTINGS)
    fault = {"rank": num_ranks // 2, "step": kill_step, "point": "step", "action": "kill"}
    os.environ["BURNISH_FAULTS"] = json.dumps([fault | {"once": str(folder / KILLED)}])
    common = {"object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    settings = {"prestart_worker_first_driver": False}
    cluster = Cluster(initialize_head=True, head_node_args=common | {"num_cpus": 1, "_system_config": settings})
    for _ in range(num_nodes):
        cluster.add_node(num_cpus=num_ranks // num_nodes, **common)
    return cluster


def config_path(folder, name, *, num_ranks, steps, launch):
    return tiny.write_config(
        folder,
        name=name,
        data={"train": [str(folder / "rows.jsonl")], "max_length": 64},
        train={"max_steps": steps, "global_batch_size": 2 * num_ranks, "micro_batch_size": 2, "num_threads": 1},
        adapter={"method": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
        generation={"prompts": []},
        memory={"zero_stage": 2 if launch["type"] == "ray" else 0},
        checkpoint={"every_steps": SAVED_EVERY},
        launch=launch,
    )


def train(path):
    """The finished run, and its losses."""
    from burnish.harness.config_io import load_config
    from burnish.launch import training

    run = training.train(load_config([str(path)]), mode="new", report=lambda record: None)
    return run, tiny.losses(run)


def measured(path, *, expected):
    """The figures of one run."""
    memory, began = Memory(), time.monotonic()
    memory.start()
    run, losses = train(path)
    memory.is_over.set()
    restarts = [event for event in run.read_jsonl(run.events_jsonl) if event["event"] == "restart"]
    assert len(losses) == len(expected), (len(losses), len(expected))
    return {
        "restarts": len(restarts),
        "lost_steps": sum(event["lost_steps"] for event in restarts),
        "time_s": round(time.monotonic() - began, 1),
        "peak_bytes": memory.peak,
        "peak_bytes_of_ranks": memory.ranks_peak,
        "loss_difference": max(abs(a - b) / b for a, b in zip(losses, expected, strict=True)),
        "losses": losses,
    }


def soak(folder, names, *, num_ranks, num_nodes, steps):
    """Yields the figures of each case; all on one cluster."""
    sizes = {"num_ranks": num_ranks, "steps": steps}
    kill_step = round(KILLED_AFTER * steps) // SAVED_EVERY * SAVED_EVERY + 3  # two steps after a checkpoint
    (folder / KILLED).touch()
    cluster = start(folder, num_ranks=num_ranks, num_nodes=num_nodes, kill_step=kill_step)
    launch = {"type": "ray", "num_workers": num_ranks, "max_failures": 2, "address": cluster.address}
    try:
        # After the nodes, which have the variables that this process had when it started them.
        _, expected = train(config_path(folder, "alone", launch={"type": "inline"}, **sizes))
        for name in names:
            if name == "killed":
                (folder / KILLED).unlink()
            path = config_path(folder, name, launch=launch | {"hang_timeout_s": 600}, **sizes)
            yield {"name": name, "num_nodes": num_nodes} | sizes | measured(path, expected=expected)
    finally:
        cluster.shutdown()


def note(case, command):
    """Writes a case into the record, in the place of an older one."""
    from burnish.harness.run_dir import environment, read_json, write_json

    found, record = environment(), read_json(RECORD, {"cases": []})
    machine = {name: found[name] for name in ("cpu", "num_cpus", "memory_bytes")}
    machine["libraries"] = ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)
    kept = {one["name"]: one for one in record["cases"]} | {case["name"]: case | {"command": command}}
    write_json(RECORD, machine | {"cases": [kept[name] for name in CASES if name in kept]})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    sizes = {"num_ranks": options.ranks, "num_nodes": options.nodes, "steps": options.steps}
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        for case in soak(Path(folder), options.case or CASES, **sizes):
            print(json.dumps(case), flush=True)
            if options.record:
                del case["losses"]
                note(case, f"python tests/soak.py {shlex.join(sys.argv[1:])}")


if __name__ == "__main__":
    main()
