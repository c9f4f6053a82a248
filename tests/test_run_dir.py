"""The run directory: never reused silently, never left, readable after a crash."""

import json
import os
from pathlib import Path

import pytest
from burnish.harness.config import Config
from burnish.harness.errors import ConfigError
from burnish.harness.plan import Resources, make_plan
from burnish.harness.run_dir import RunDir, append_jsonl, environment, read_json, read_jsonl, run_path, write_json


def make_run(path: Path) -> RunDir:
    run = RunDir.create(path, mode="new")
    write_json(run.plan_json, {})
    return run


def make_config() -> Config:
    return Config.model_validate(
        {
            "name": "small",
            "model": {"path": "some/model"},
            "task": {"type": "causal_lm"},
            "data": {"train": ["rows.jsonl"]},
            "adapter": {"method": "lora"},
            "optimizer": {"name": "adamw"},
            "train": {"max_steps": 3},
        }
    )


def test_a_new_run_gets_an_empty_directory(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "runs" / "a", mode="new")
    assert run.path.is_dir()
    assert run.name == "a"
    assert not run.is_run


def test_a_run_directory_is_never_reused_silently(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"--resume .* --fresh"):
        RunDir.create(tmp_path / "a", mode="new")


def test_fresh_moves_every_old_run_aside(tmp_path: Path) -> None:
    for number in range(3):
        run = RunDir.create(tmp_path / "a", mode="fresh")
        write_json(run.plan_json, number)
    assert read_json(tmp_path / "a.old-1" / "plan.json") == 0
    assert read_json(tmp_path / "a.old-2" / "plan.json") == 1
    assert read_json(tmp_path / "a" / "plan.json") == 2


@pytest.mark.parametrize("mode", ["new", "fresh"])
def test_a_folder_that_is_no_run_is_neither_used_nor_moved(tmp_path: Path, mode: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not a run"):
        RunDir.create(tmp_path / "a", mode=mode)  # type: ignore[arg-type]
    assert (tmp_path / "a" / "thesis.tex").exists()


def test_a_file_in_the_place_of_the_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        RunDir.create(tmp_path / "a", mode="new")


def test_resume_needs_a_run_and_clears_what_ended_the_last_attempt(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run"):
        RunDir.create(tmp_path / "a", mode="resume")
    run = make_run(tmp_path / "a")
    run.stop.touch()
    write_json(run.fatal_json, {"error": "old"})
    RunDir.create(run.path, mode="resume")
    assert not run.stop.exists()
    assert not run.fatal_json.exists()
    assert run.is_run


def test_open_takes_a_path_or_a_name_in_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "a")
    assert RunDir.open(tmp_path / "runs" / "a").is_run
    assert RunDir.open("a").path == Path("runs/a")
    with pytest.raises(ConfigError, match=r"b is no run directory.*there is a in runs/"):
        RunDir.open("b")


@pytest.mark.parametrize("name", ["..", "../a", "/etc", "a/b", "", ".", "a\n", "x" * 101, "a\0b"])
def test_a_run_name_cannot_leave_the_runs_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="does not name a folder directly inside"):
        run_path(tmp_path, name)


def test_a_link_cannot_lead_a_run_out_of_the_runs_directory(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError):
        run_path(tmp_path / "runs", "a")
    assert run_path(tmp_path / "runs", "b") == tmp_path / "runs" / "b"


def test_the_plan_and_its_config_survive_the_disk(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "a", mode="new")
    resources = Resources(device="cpu", num_devices=0, num_cpus=2, host_memory_bytes=2**30)
    plan = make_plan(make_config(), resources, run_dir=str(run.path), cwd=str(tmp_path))
    run.write_json(run.plan_json, plan.to_dict())
    assert run.load_plan() == plan
    assert run.load_config() == plan.config


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"decisions": []}', '{"decisions": [1]}'])
def test_a_damaged_plan_is_a_sentence(tmp_path: Path, content: str) -> None:
    run = RunDir(tmp_path)
    run.plan_json.write_text(content)
    with pytest.raises(ConfigError, match="plan") as caught:
        run.load_plan()
    assert "\n" not in str(caught.value)


def test_the_trained_folder_is_the_one_with_weights(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.adapter.mkdir()
    with pytest.raises(ConfigError, match="--resume"):
        run.trained_folder()
    run.model.mkdir()
    (run.model / "model.safetensors").touch()
    assert run.trained_folder() == run.model
    (run.adapter / "adapter_model.safetensors").touch()
    assert run.trained_folder() == run.adapter


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert read_json(path) == {"old": 1}
    write_json(path, {"x": float("nan"), "y": [float("inf")], "text": "\ud800é"})
    assert json.loads(path.read_text()) == {"x": None, "y": [None], "text": "\ud800é"}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_torn_line_loses_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_jsonl(path) == []
    append_jsonl(path, {"step": 1, "text": "a\nb\u2028c"})
    append_jsonl(path, {"step": 2})
    path.write_bytes(path.read_bytes() + b'{"step": 3, "lo')
    assert [record["step"] for record in read_jsonl(path)] == [1, 2]
    append_jsonl(path, {"step": 4})
    assert [record["step"] for record in read_jsonl(path)] == [1, 2, 4]
    assert read_jsonl(path)[0]["text"] == "a\nb\u2028c"


def test_the_environment_names_versions_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hf_canary_value")
    found = environment()
    assert found["libraries"]["torch"]
    assert found["num_cpus"] >= 1
    assert found["memory_bytes"] > 2**20
    assert "canary" not in json.dumps(found)
