"""The pre-flight: what every check says about nodes that agree, differ, see other storage, or do not answer.

Probes are called in this process, each with a disk of its own where that matters. test_clusters asks real nodes.
"""

import os
import socket
from pathlib import Path

import pytest
import yaml
from burnish.harness.config_hardware import Ray
from burnish.harness.config_io import load_config
from burnish.harness.errors import InfeasibleError
from burnish.launch import preflight, probe
from burnish.launch.staging import source_digest
from ray.exceptions import RayActorError


class Local:
    """Stands for the handle of an actor: `handle.method.remote(…)` calls at once; `changes` are given answers."""

    def __init__(self, disk=None, **changes):
        self.probe, self.disk, self.changes = probe.Probe(), disk, changes

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return Method(self, name)


class Method:
    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def remote(self, *given):
        if self.name in self.owner.changes:
            return self.owner.changes[self.name]
        if self.owner.disk is not None and self.name in ("write", "read", "clear", "free"):
            given = (str(self.owner.disk) + given[0], *given[1:])
        return getattr(self.owner.probe, self.name)(*given)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(
        preflight, "_asked", lambda probes, ask, timeout_s: {name: ask(one, name) for name, one in probes.items()}
    )
    monkeypatch.setattr(preflight.ray, "get", lambda value, timeout: value)


@pytest.fixture
def config(tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (work / "here.jsonl").write_text("{}\n")
    values = {
        "name": "tiny",
        "runs_dir": str(tmp_path / "runs"),
        "model": {"path": "package:yaml"},
        "task": {"type": "causal_lm"},
        "data": {"train": [str(tmp_path / "rows.jsonl"), "here.jsonl"]},
        "adapter": {"method": "full"},
        "train": {"max_steps": 1},
        "launch": {"type": "ray", "num_workers": 2, "address": "auto"},
    }
    (work / "config.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(work)
    return load_config(["config.yaml"])


def look(**changes):
    return probe.Probe().look([], []) | changes


def test_nodes_that_agree_pass(config):
    looks = {}
    probes = {"10.0.0.1": Local(), "10.0.0.2": Local()}
    checks = preflight._on_nodes(config, probes, looks, is_staged=True)
    assert [(check.name, check.state) for check in checks] == [("versions", "ok"), ("files", "ok"), ("storage", "ok")]
    assert "2 paths and packages" in checks[1].detail
    assert sorted(looks) == ["10.0.0.1", "10.0.0.2"]
    assert all(found["installed"] == found["digest"] == source_digest() for found in looks.values())
    assert os.listdir(config.runs_dir) == []


def test_a_node_with_another_version_is_named_with_both(config):
    theirs = look()["versions"] | {"torch": "2.0.0"}
    check = preflight._same_versions({"10.0.0.1": look(), "10.0.0.2": look(versions=theirs)})
    assert check.state == "failed"
    assert "10.0.0.2 has torch 2.0.0 (driver: " in check.detail
    assert "10.0.0.1" not in check.detail
    other = preflight._same_versions({"10.0.0.1": look(digest="feed")})
    assert "burnish feed" in other.detail


def test_a_node_that_lacks_a_file_or_package_is_named(config):
    probes = {"10.0.0.1": Local(), "10.0.0.2": Local(look=look(missing=["model.path=/mnt/model"]))}
    check = preflight._on_nodes(config, probes, {}, is_staged=True)[1]
    assert (check.state, check.detail) == ("failed", "10.0.0.2 lacks model.path=/mnt/model")
    assert probe.Probe().look(["yaml", "no_such_package"], [("data.train", "/nowhere/x")])["missing"] == [
        "no_such_package",
        "data.train=/nowhere/x",
    ]


def test_before_training_the_files_of_the_current_folder_count_too(config):
    check = preflight._on_nodes(config, {"10.0.0.1": Local()}, {}, is_staged=False)[1]
    assert "3 paths and packages" in check.detail


def test_a_node_that_does_not_answer_is_named(config):
    probes = {"10.0.0.1": Local(), "10.0.0.2": Local(look=RayActorError(error_msg="the actor died"))}
    [check] = preflight._on_nodes(config, probes, {}, is_staged=True)
    assert check.state == "failed"
    assert "10.0.0.2" in check.detail
    assert "10.0.0.1" not in check.detail


def test_storage_that_is_not_shared_names_the_nodes_that_are_apart(config, tmp_path):
    disks = [tmp_path / name for name in ("a", "b")]
    for disk in disks:
        os.makedirs(f"{disk}{tmp_path}")
    probes = {"10.0.0.1": Local(disks[0]), "10.0.0.2": Local(disks[0]), "10.0.0.3": Local(disks[1])}
    check = preflight._storage(config, probes)
    assert check.state == "failed"
    assert "10.0.0.3" in check.detail
    assert f"runs_dir={config.runs_dir}" in check.detail
    assert not [file for disk in disks for file in disk.rglob("*") if file.is_file()]


def test_storage_that_is_missing_on_a_node_is_not_covered_up_by_a_folder(config, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    check = preflight._storage(config, {"10.0.0.1": Local(), "10.0.0.2": Local(empty)})
    assert check.state == "failed"
    assert "10.0.0.2: No such file or directory" in check.detail
    assert os.listdir(empty) == []


def test_ports_that_do_not_answer_name_both_ends(monkeypatch):
    first, second = Local(), Local()
    assert preflight._ports({"127.0.0.1": first, "127.0.0.2": second}).state == "ok"
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    check = preflight._ports({"127.0.0.1": Local(listen=closed), "127.0.0.2": Local()})
    assert check.state == "failed"
    assert check.detail == "127.0.0.2 does not reach 127.0.0.1"
    assert preflight._ports({"127.0.0.1": Local()}).state == "skipped"


def test_one_worker_has_nobody_to_reduce_with(config):
    assert preflight._all_reduce(config, Ray(type="ray", num_workers=1)).state == "skipped"


def test_what_fails_ends_a_run_before_it_starts_with_a_line_for_each(config, monkeypatch):
    lost = preflight.Check("workers", "failed", "10.0.0.9: no worker starts", "look at its logs")

    class Probes:
        def __enter__(self):
            return {"10.0.0.1": Local(look=look(missing=["x"]))}, [lost]

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(preflight, "_probes", Probes)
    with pytest.raises(InfeasibleError) as raised:
        preflight.require(config)
    assert str(raised.value).splitlines() == [
        "workers: 10.0.0.9: no worker starts; look at its logs",
        "files: 10.0.0.1 lacks x; put files on storage that every node sees, and install packages on every node",
    ]


def test_the_table_shows_what_to_do_where_something_failed():
    checks = [
        {"name": "ports", "state": "ok", "detail": "2 nodes", "advice": ""},
        {"name": "storage", "state": "failed", "detail": "10.0.0.2 cannot see", "advice": "mount it"},
    ]
    lines = preflight.render({"checks": checks}).splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "FAILED", "mount"]


def test_the_current_folder_is_not_written_to(config):
    before = sorted(Path.cwd().iterdir())
    preflight._on_nodes(config, {"10.0.0.1": Local()}, {}, is_staged=True)
    assert sorted(Path.cwd().iterdir()) == before
