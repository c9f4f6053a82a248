"""`burnish doctor`: what is there, what is missing, and what that switches off."""

import json
from pathlib import Path

import pytest
from burnish.launch import doctor
from burnish.launch.cli import main


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return doctor.examine(str(tmp_path_factory.mktemp("runs")))


def checks(found):
    return {check["name"]: check for check in found["checks"]}


def test_everything_required_is_here(found):
    assert found["ok"]
    assert {"torch", "ray", "deepspeed", "transformers", "bitsandbytes"} <= checks(found).keys()


def test_it_looks_at_what_the_issue_of_a_user_may_be_about(found):
    wanted = {"GPU", "NCCL", "gloo", "triton", "g++", "ninja", "libaio", "bitsandbytes back end"}
    assert wanted | {"cores", "memory", "open files", "/dev/shm", "storage for runs"} <= checks(found).keys()


def test_whatever_is_missing_says_what_that_switches_off(found):
    assert all(check["switches_off"] for check in found["checks"] if check["state"] != "ok")
    text = doctor.render(found)
    assert all(check["switches_off"] in text for check in found["checks"] if check["state"] != "ok")


def test_the_answer_is_json_able(found):
    assert json.loads(json.dumps(found)) == found


def test_a_missing_required_package_is_exit_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "floors", lambda: {"a-package-that-is-not-there": ""})
    monkeypatch.setattr(doctor, "_probe", lambda code: "not asked")
    assert main(["doctor", "--json", "--runs-dir", str(tmp_path)]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert not answer["ok"]
    assert checks(answer)["a-package-that-is-not-there"]["state"] == "missing"


def test_a_probe_that_crashes_is_a_finding_and_not_a_crash():
    assert doctor._probe("import os; os.abort()") == "exit code -6"
    assert doctor._probe("raise RuntimeError('no such back end')") == "RuntimeError: no such back end"
    assert doctor._probe("print('noise'); print('{\"a\": 1}')") == {"a": 1}


def test_storage_that_cannot_be_written_is_named():
    check = doctor._storage("/proc/runs")
    assert check.state == "broken"
    assert "runs_dir" in check.switches_off


def test_the_file_system_of_a_folder_is_that_of_the_nearest_mount():
    assert doctor._file_system(Path("/proc/self")) == "proc"


@pytest.mark.parametrize(
    ("gxx", "library", "missing", "state", "detail"),
    [
        ("/usr/bin/g++", "libaio.so.1", [], "ok", "libaio.so.1"),
        ("/usr/bin/g++", "libaio.so.1", ["libaio"], "missing", "its header is missing"),
        ("/usr/bin/g++", None, ["libaio"], "missing", "library not found"),
        (None, "libaio.so.1", ["g++"], "missing", "not tried without g++"),
    ],
)
def test_libaio_is_here_when_a_program_can_be_built_with_it(monkeypatch, gxx, library, missing, state, detail):
    monkeypatch.setattr(doctor, "find_tool", lambda name: gxx)
    monkeypatch.setattr(doctor, "missing_tools", lambda *, with_files: missing)
    monkeypatch.setattr(doctor.ctypes.util, "find_library", lambda name: library)
    check = doctor._libaio()
    assert (check.state, check.detail) == (state, detail)
    assert check.state == "ok" or "libaio-dev" in check.switches_off


def test_a_missing_compiler_says_that_offload_is_off(monkeypatch):
    monkeypatch.setattr(doctor, "find_tool", lambda name: None)
    by_name = {check.name: check for check in doctor._compiler()}
    assert "memory.offload_optimizer" in by_name["g++"].switches_off
    assert "memory.offload_optimizer" in by_name["ninja"].switches_off
    assert "nvme" in by_name["libaio"].switches_off
