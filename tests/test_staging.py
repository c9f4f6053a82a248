"""What travels with a job: which files, burnish itself, and what the cluster makes of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from burnish.harness.config_io import load_config
from burnish.harness.errors import ConfigError
from burnish.launch import job_entry, staging
from job_cases import job_config


@pytest.fixture
def config(tmp_path, monkeypatch):
    return job_config(tmp_path, monkeypatch)


def test_what_travels_is_a_package_of_its_own_with_a_version(tmp_path):
    paths = [str(Path(module).parent) for module in staging.stage_package(tmp_path)]
    code = (
        "from burnish.launch import cli, staging as s; print(cli.__file__, cli.version('burnish'), s.source_digest())"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    file, number, digest = done.stdout.split()
    assert file.startswith(str(tmp_path))
    assert number
    assert digest == staging.source_digest()


def test_links_out_of_the_folder_and_large_files_do_not_travel(config, tmp_path, monkeypatch):
    (config.parent / "folder").mkdir()
    os.symlink("/etc/hostname", config.parent / "folder" / "rows.jsonl")
    linked = load_config([str(config)], ["data.train=folder"])
    with pytest.raises(ConfigError, match="a link out of"):
        staging.stage(linked, config.parent, tmp_path)
    monkeypatch.setattr(staging, "MAX_BYTES", 3)
    with pytest.raises(ConfigError, match=r"put .*rows\.jsonl"):
        staging.stage(load_config([str(config)], []), config.parent, tmp_path)


def test_a_pattern_travels_with_all_that_it_matches(config, tmp_path):
    (config.parent / "more.jsonl").write_text("{}\n")
    staging.stage(load_config([str(config)], ["data.train='*.jsonl'"]), config.parent, tmp_path)
    assert (tmp_path / "rows.jsonl").exists()
    assert (tmp_path / "more.jsonl").exists()


def test_a_job_trains_in_a_copy_that_every_node_sees_and_goes_on_where_an_earlier_one_ended(config, monkeypatch):
    commands = []
    monkeypatch.setattr(os, "execv", lambda program, command: commands.append((command, os.getcwd())))
    (config.parent.parent / "shared" / "runs").mkdir()
    for _ in range(2):
        os.chdir(config.parent)
        job_entry.train()
    (command, place), again = commands
    assert command[1:] == ["-m", "burnish.launch.cli", "train", "config.yaml"]
    assert again == (command, place)
    assert Path(place, "rows.jsonl").exists()
    assert Path(place).parent.name == ".staged"
    run_dir = config.parent.parent / "shared" / "runs" / "tiny"
    run_dir.mkdir()
    (run_dir / "plan.json").write_text("{}")
    os.chdir(config.parent)
    job_entry.train()
    assert commands[-1][0][-1] == "--resume"


def test_a_job_runs_with_the_python_of_rays_workers(tmp_path):
    """The shell's grandparent is the raylet, whose arguments hold the command of its workers."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    (tmp_path / staging.SCRIPT_FILE).write_text(staging.SCRIPT)
    job = f"import subprocess; subprocess.run({staging.ENTRYPOINT + ' train'!r}, shell=True)"
    raylet = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {job!r}])"
    command = [sys.executable, "-c", raylet, f"--python_worker_command={python} setup_worker.py --x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=30)
    assert done.stdout == "-m burnish.launch.job_entry train\n"
