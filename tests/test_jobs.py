"""Jobs on a Ray cluster: what is asked of its job server, what travels, and every mistake as one sentence.

A fake client stands for the server; test_clusters has a real one.
"""

import io
import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from burnish.harness.config_hardware import Ray
from burnish.harness.config_io import load_config
from burnish.harness.errors import ConfigError, InfeasibleError, Interrupted, TrainingError
from burnish.launch import job_commands, job_entry, jobs
from burnish.launch.cli import main
from burnish.launch.jobs import Job, Node, Server, free_name
from job_cases import job_config
from ray.job_submission import JobStatus

URL = "http://10.0.0.1:8265"
TOKEN = "a7" * 32


class FakeClient:
    """Remembers what it is asked. `logs` are what each job prints, by the end of its id."""

    def __init__(self, **statuses):
        self.found = {name: details(name, status) for name, status in statuses.items()}
        self.submitted, self.logs, self.tails, self.stopped = [], {}, [], []

    def list_jobs(self):
        return list(self.found.values())

    def get_job_info(self, name):
        if name not in self.found:
            raise RuntimeError(f"Request failed with status code 404: Job {name} does not exist.")
        return self.found[name]

    def submit_job(self, **asked):
        folder, modules = asked["runtime_env"]["working_dir"], asked["runtime_env"].get("py_modules", [])
        files = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
        config = yaml.safe_load(Path(folder, "config.yaml").read_text())
        shipped = sorted(str(path) for module in modules for path in Path(module).rglob("*.py"))
        self.submitted.append(asked | {"files": files, "config": config, "shipped": shipped})
        self.found[asked["submission_id"]] = details(asked["submission_id"], "SUCCEEDED")
        return asked["submission_id"]

    def get_job_logs(self, name):
        self.get_job_info(name)
        return next((text for end, text in self.logs.items() if name.endswith(end)), "")

    async def tail_job_logs(self, name):
        for piece in self.tails.pop(0) if self.tails else [self.get_job_logs(name)]:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def stop_job(self, name):
        self.stopped.append(name)
        self.found[name] = details(name, "STOPPED")


def details(name, status, **changes):
    fields = {
        "submission_id": name,
        "job_id": None,
        "status": JobStatus(status),
        "message": "",
        "start_time": 1_000,
        "end_time": 61_000 if status in jobs.ENDED else None,
        "driver_exit_code": None,
        "driver_info": None,
        "entrypoint": "sh",
        "metadata": {"run": "tiny", "run_dir": "/mnt/runs/tiny"},
        "runtime_env": {"env_vars": {"SECRET": TOKEN}},
    }
    return SimpleNamespace(**fields | changes)


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of two nodes with a core each; returns the client that the verbs speak to."""
    client, seen = FakeClient(), {}
    two = [{"node_ip": f"10.0.0.{n}", "resources_total": {"CPU": 1.0, "memory": 2.0**33}} for n in (2, 1)]
    monkeypatch.setattr(jobs, "list_nodes", lambda *_, **__: two)
    monkeypatch.setattr(jobs, "connect", lambda address: seen.update(address=address) or Server(URL, client))
    monkeypatch.setattr(job_commands, "planned", lambda config, resources: SimpleNamespace(plan=None, choice=None))
    monkeypatch.setattr(job_commands, "_show_plan", lambda *_: None)
    monkeypatch.setattr(jobs, "POLL_S", 0.0)
    return client


@pytest.fixture
def config(tmp_path, monkeypatch):
    return job_config(tmp_path, monkeypatch)


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def preflight_says(client, **changes):
    result = {"ok": True, "ship": False, "seconds": 1.0, "nodes": ["10.0.0.1"], "checks": []} | changes
    client.logs["preflight"] = f"Running entrypoint\n{job_entry.RESULT}{json.dumps(result)}\n"


def test_submitting_queues_a_job_with_the_config_and_the_files_that_it_names(capsys, cluster, config):
    preflight_says(cluster)
    (config.parent / "notes.txt").write_text("not asked for")
    code, out, _ = run(capsys, "submit", config, "train.max_steps=7", "--address", URL)
    assert code == 0
    before, job = cluster.submitted
    assert (before["submission_id"], job["submission_id"]) == ("tiny-preflight", "tiny")
    assert job["files"] == ["burnish-job.sh", "config.yaml", "rows.jsonl"]
    assert job["config"]["launch"]["address"] == "auto"
    assert job["config"]["train"]["max_steps"] == 7
    assert job["entrypoint"] == "exec sh burnish-job.sh train"
    assert all(f"burnish {verb} tiny" in out.replace(job_commands.program(), "burnish") for verb in ("logs", "status"))
    assert set(job["runtime_env"]) == {"working_dir", "env_vars"}
    assert job["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": str(jobs.STOP_WAIT_S)}
    assert TOKEN not in json.dumps(cluster.submitted, default=str) + out


def test_the_folder_that_travels_may_be_another_one(capsys, cluster, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("submit", config, "--no-preflight", "--working-dir")
    assert run(capsys, *arguments, config.parent)[0] == 0
    assert cluster.submitted[0]["files"] == ["burnish-job.sh", "config.yaml", "rows.jsonl"]
    code, _, err = run(capsys, *arguments, "nowhere")
    assert code == 2
    assert "--working-dir=nowhere" in err


def test_burnish_travels_with_the_run_where_a_node_lacks_it_and_always_with_the_pre_flight(capsys, cluster, config):
    preflight_says(cluster, ship=True)
    assert run(capsys, "submit", config)[0] == 0
    for asked in cluster.submitted:
        assert any(path.endswith("burnish/launch/cli.py") for path in asked["shipped"])
        assert not any("bench/" in path or "tests/" in path for path in asked["shipped"])


def test_a_failed_pre_flight_queues_nothing_and_names_the_node(capsys, cluster, config):
    check = {"name": "storage", "state": "failed", "detail": "10.0.0.2 cannot see", "advice": "mount it"}
    preflight_says(cluster, ok=False, checks=[check])
    code, out, err = run(capsys, "submit", config)
    assert code == 3
    assert "10.0.0.2 cannot see" in err
    assert "mount it" in out
    assert [asked["submission_id"] for asked in cluster.submitted] == ["tiny-preflight"]


def test_a_pre_flight_without_a_result_is_told_in_its_own_last_words(capsys, cluster, config):
    cluster.logs["preflight"] = "burnish: error: no connection to a Ray cluster\n"
    code, _, err = run(capsys, "submit", config)
    assert code == 5
    assert "no connection to a Ray cluster" in err
    assert "burnish logs tiny-preflight" in err


def test_workers_that_the_cluster_has_no_room_for_are_exit_3_with_have_and_need(capsys, cluster, config):
    code, _, err = run(capsys, "submit", config, "launch.num_workers=4", "train.global_batch_size=8")
    assert code == 3
    assert "launch.num_workers=4 at 1 CPU each: the cluster has room for 2 (10.0.0.1 has 1 CPU; 10.0.0.2" in err
    assert not cluster.submitted


def test_a_worker_needs_its_resources_on_one_node():
    nodes = [Node("a", {"CPU": 3.0}), Node("b", {"CPU": 3.0})]
    launch = Ray(type="ray", num_workers=3, resources_per_worker={"CPU": 2})
    with pytest.raises(InfeasibleError, match="room for 2"):
        job_commands.check_room(launch, nodes, {"CPU": 2.0})
    job_commands.check_room(launch, [*nodes, *nodes], {"CPU": 2.0})
    with pytest.raises(InfeasibleError, match=r"8 GiB memory"):
        job_commands.check_room(launch, nodes, {"CPU": 1.0, "memory": 2.0**33})


def test_an_inline_config_becomes_one_worker(config):
    inline = load_config([str(config)], ["launch={type: inline}"])
    launch = job_commands.on_cluster(inline).launch
    assert (launch.type, launch.address, launch.num_workers) == ("ray", "auto", 1)


def test_each_submission_has_a_name_of_its_own_and_one_that_runs_is_not_joined():
    def job(name, status):
        return Job(name, status, "", 1.0, None, None, None, "")

    assert free_name("tiny", []) == "tiny"
    assert free_name("tiny", [job("tiny", "FAILED"), job("tiny-2", "STOPPED"), job("tiny-x", "RUNNING")]) == "tiny-3"
    assert free_name("tiny", [job("tiny-2", "FAILED")]) == "tiny"
    with pytest.raises(ConfigError, match="burnish stop tiny-2"):
        free_name("tiny", [job("tiny", "FAILED"), job("tiny-2", "RUNNING")])


MISTAKES = {
    "relative runs_dir": (["runs_dir=runs"], "give its absolute path"),
    "leads out": (["data.train=../shared/model"], "leads out of"),
    "in runs": (["data.train=runs/rows.jsonl"], "runs/ never travels"),
    "in .git": (["data.train=.git/rows.jsonl"], ".git/ never travels"),
    "missing": (["data.train=row.jsonl"], "did you mean rows.jsonl?"),
    "relative nvme": (["memory.nvme_path=nvme"], "memory.nvme_path=nvme"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_travel_is_one_sentence(capsys, cluster, config, name):
    overrides, words = MISTAKES[name]
    for folder in ("runs", ".git"):
        (config.parent / folder).mkdir()
        (config.parent / folder / "rows.jsonl").write_text("{}\n")
    code, _, err = run(capsys, "submit", config, "--no-preflight", *overrides)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert not cluster.submitted


def test_following_prints_every_character_once_though_the_connection_breaks(cluster):
    cluster.found["tiny"] = details("tiny", "RUNNING")
    cluster.tails = [["one\n", "two", ConnectionResetError("gone")], ["one\ntwo\nthr", RuntimeError("gone")]]
    written = []

    def last(name):
        cluster.found["tiny"] = details("tiny", "FAILED", driver_exit_code=4)
        return "one\ntwo\nthree\n"

    cluster.get_job_logs = last
    job = Server(URL, cluster).follow("tiny", written.append)
    assert "".join(written) == "one\ntwo\nthree\n"
    assert job.final_code == 4


def test_a_server_that_stays_away_ends_the_following(cluster):
    cluster.found["tiny"] = details("tiny", "RUNNING")
    cluster.tails = [[ConnectionResetError("gone")] for _ in range(9)]
    with pytest.raises(TrainingError, match="the job goes on"):
        Server(URL, cluster).follow("tiny", print)


def test_following_exits_with_the_jobs_code_and_ctrl_c_leaves_it_running(cluster, monkeypatch):
    cluster.found |= {"bad": details("bad", "FAILED", driver_exit_code=3), "gone": details("gone", "STOPPED")}
    for name, code in (("bad", 3), ("gone", 130)):
        answer = job_commands.logs(Namespace(job=name, address=None, follow=True), io.StringIO())
        assert answer.exit_code == code

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "follow", interrupted)
    with pytest.raises(Interrupted, match="job bad goes on"):
        job_commands.logs(Namespace(job="bad", address=None, follow=True), io.StringIO())
    assert not cluster.stopped


def test_the_other_verbs_tell_about_jobs_and_never_their_environment(capsys, cluster):
    cluster.found |= {"tiny": details("tiny", "RUNNING"), "old": details("old", "SUCCEEDED")}
    cluster.logs["tiny"] = "one\ntwo\nthree\nfour\n"
    code, out, _ = run(capsys, "jobs")
    assert code == 0
    assert all(words in out for words in ("tiny", "RUNNING", "SUCCEEDED", "1 min", "/mnt/runs/tiny"))
    _, out, _ = run(capsys, "status", "tiny")
    assert all(words in out for words in ("RUNNING", "four", "/mnt/runs/tiny"))
    assert "one" not in out
    assert run(capsys, "logs", "tiny")[1] == "one\ntwo\nthree\nfour\n"
    for verb in (["jobs"], ["status", "tiny"], ["logs", "tiny"], ["stop", "old"]):
        code, out, _ = run(capsys, *verb, "--json")
        assert code == 0
        assert json.loads(out) is not None
        assert TOKEN not in out
    assert not cluster.stopped
    code, out, _ = run(capsys, "stop", "tiny")
    assert code == 0
    assert cluster.stopped == ["tiny"]
    assert "STOPPED; submit the same config again" in out
    code, _, err = run(capsys, "status", "tiyn")
    assert code == 2
    assert "did you mean tiny?" in err


def test_a_manifest_is_written_without_a_cluster(capsys, config, monkeypatch):
    monkeypatch.setattr(job_commands, "planned", lambda config, resources: SimpleNamespace(plan=None, choice=None))
    monkeypatch.setattr(jobs, "connect", None)
    seen = {}
    monkeypatch.setattr("burnish.launch.manifest.manifest", lambda *given: seen.update(options=given[2]) or "kind: X\n")
    options = ["image=registry/burnish:1", "claim=shared", "gpus_per_node=0", "node_memory_bytes=8GiB"]
    code, out, _ = run(capsys, "submit", config, "--manifest", *options)
    assert (code, out) == (0, "kind: X\n")
    assert (seen["options"].claim, seen["options"].node_memory_bytes) == ("shared", 2**33)
    for given, words in ((["image=x"], "claim"), (["imag=x"], "did you mean image"), (["retries=x"], "a whole number")):
        code, _, err = run(capsys, "submit", config, "--manifest", *given)
        assert code == 2
        assert words in err
