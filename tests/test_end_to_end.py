"""Whole runs through the command line, as a user types them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

BURNISH = [sys.executable, "-m", "burnish.launch.cli"]
RAY = {"type": "ray", "num_workers": 2}


def burnish(*arguments, cwd, expect=0, timeout=240):
    """Runs the command line; its standard output. The exit code must be `expect`, and no traceback may show."""
    done = subprocess.run([*BURNISH, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == expect, (done.returncode, done.stdout[-3000:], done.stderr[-3000:])
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


def records(run_dir, name):
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def train_losses(run_dir):
    found = [(r["step"], r["loss"]) for r in records(run_dir, "metrics.jsonl") if r["kind"] == "train"]
    assert [step for step, _ in found] == list(range(1, len(found) + 1))
    return [loss for _, loss in found]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished inline run: its folder and run directory."""
    folder = tmp_path_factory.mktemp("finished")
    config = tiny.write_config(folder, tracking={"tensorboard": True}, checkpoint={"every_steps": 4})
    burnish("train", config, cwd=folder)
    return folder, folder / "runs" / "tiny"


def test_a_run_leaves_everything_it_promises(finished):
    _, run_dir = finished
    names = {path.name for path in run_dir.iterdir()}
    wanted = {"config.yaml", "plan.json", "env.json", "metrics.jsonl", "events.jsonl", "checkpoints", "adapter"}
    assert wanted | {"report.html", "summary.json", "samples.json"} <= names
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"step_00000008", "step_00000010"}
    evals = {r["step"]: r["loss"] for r in records(run_dir, "metrics.jsonl") if r["kind"] == "eval"}
    assert set(evals) == {0, 10}
    assert evals[10] < evals[0]
    [proof] = [event for event in records(run_dir, "events.jsonl") if event["event"] == "proof"]
    assert proof["reloaded"] == pytest.approx(proof["live"], rel=1e-6)
    assert list(run_dir.rglob("*.tfevents.*"))


def test_a_finished_run_is_not_silently_reused(finished):
    folder, run_dir = finished
    before = (run_dir / "metrics.jsonl").read_bytes()
    burnish("train", folder / "config.yaml", cwd=folder, expect=2)
    assert (run_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("verb", [["plan"], ["data"], ["config", "show"]])
def test_verbs_about_a_config_answer_in_json(finished, verb):
    folder, _ = finished
    answer = json.loads(burnish(*verb, folder / "config.yaml", "--json", cwd=folder))
    assert answer


def test_verbs_about_a_run_answer_in_json(finished):
    folder, run_dir = finished
    evals = [r["loss"] for r in records(run_dir, "metrics.jsonl") if r["kind"] == "eval"]
    again = json.loads(burnish("eval", run_dir, "--json", cwd=folder))
    assert again["validation"]["loss"] == pytest.approx(evals[-1], rel=1e-5)
    assert json.loads(burnish("generate", run_dir, "--prompt", "say red cat", "--json", cwd=folder))
    assert json.loads(burnish("report", run_dir, "--json", cwd=folder))


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_export_writes_what_the_field_can_load(finished, tmp_path, form):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, run_dir = finished
    out = tmp_path / form
    assert json.loads(burnish("export", run_dir, "--format", form, "--out", out, "--json", cwd=folder))
    if form == "merged":
        model = AutoModelForCausalLM.from_pretrained(out)
    else:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), out)
    assert len(AutoTokenizer.from_pretrained(out)) == model.config.vocab_size


def interrupt(folder, config, *, after_step):
    """Starts a run, sends one SIGINT to the command after that step, and returns the exit code and stderr."""
    run_dir = folder / "runs" / "tiny"
    process = subprocess.Popen(
        [*BURNISH, "train", str(config)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.time() + 180
    metrics = run_dir / "metrics.jsonl"
    while time.time() < deadline and process.poll() is None:
        if metrics.exists() and sum(b'"train"' in line for line in metrics.read_bytes().splitlines()) >= after_step:
            os.kill(process.pid, signal.SIGINT)
            break
        time.sleep(0.02)
    _, stderr = process.communicate(timeout=180)
    return process.returncode, stderr


@pytest.mark.parametrize(
    "launch",
    [pytest.param({"type": "inline"}, id="inline"), pytest.param(RAY, id="ray", marks=pytest.mark.nightly)],
)
def test_one_sigint_writes_a_checkpoint_exits_130_and_resume_goes_on_bit_for_bit(tmp_path, launch):
    adapter = {"method": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}
    train = {"max_steps": 400, "global_batch_size": 8, "micro_batch_size": 4, "num_threads": 1}
    config = tiny.write_config(tmp_path, launch=launch, adapter=adapter, train=train)
    code, stderr = interrupt(tmp_path, config, after_step=5)
    assert code == 130, stderr
    assert "Traceback" not in stderr
    run_dir = tmp_path / "runs" / "tiny"
    done = len(train_losses(run_dir))
    assert 5 <= done < 400
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step_{done:08d}"]
    burnish("train", config, "--resume", cwd=tmp_path)
    resumed = train_losses(run_dir)
    burnish("train", config, "name=whole", cwd=tmp_path)
    assert resumed == train_losses(tmp_path / "runs" / "whole")


def test_ray_with_zero_2_equals_the_inline_run_and_leaves_no_process(tmp_path):
    inline = tiny.write_config(tmp_path, name="inline")
    burnish("train", inline, cwd=tmp_path)
    ray = tiny.write_config(tmp_path, name="ray", launch=RAY)
    burnish("train", ray, cwd=tmp_path)
    expected = train_losses(tmp_path / "runs" / "inline")
    assert train_losses(tmp_path / "runs" / "ray") == pytest.approx(expected, rel=1e-5)
    time.sleep(5)
    assert not [pid for pid in processes_that_name(str(tmp_path)) if pid != os.getpid()]


def processes_that_name(text):
    """Process ids whose command line or working directory names `text`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (
                text in (entry / "cmdline").read_text(errors="ignore") or text in os.readlink(entry / "cwd")
            ):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_qlora_trains_under_ray_with_zero_3(tmp_path):
    """Equality of the stages is in test_equalities; here the whole command with its proof."""
    changes = {"quantization": {"type": "nf4"}, "adapter": {"method": "qlora", "rank": 4}, "model__dtype": "bf16"}
    config = tiny.write_config(tmp_path, launch=RAY, memory__zero_stage=3, **changes)
    burnish("train", config, cwd=tmp_path)
    losses = train_losses(tmp_path / "runs" / "tiny")
    assert losses[-1] < losses[0]
