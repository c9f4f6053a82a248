"""What `burnish plan` answers: text and JSON, other hardware, exit codes, and the comparison of --verify."""

import json

import made_up_memory
import pytest
import tiny
import yaml
from burnish.harness import calibration, measure
from burnish.harness.errors import ConfigError, InfeasibleError, OutOfMemory
from burnish.harness.measure import Measured
from burnish.harness.plan import Resources
from burnish.launch import planning, training
from burnish.launch.cli import main
from burnish.launch.planning import CUDA_CONTEXT_BYTES, Hardware, planned, supposed
from burnish.launch.resources import available_bytes, free_disk_bytes, offload_places
from made_up_memory import GIB, cpu, gpus, make_config, profile_for

HERE = cpu(64, num_cpus=4)


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """Profiles and predictions that can be worked out by hand, this machine, and an empty folder of calibrations."""
    monkeypatch.setattr(planning, "profiler", lambda config: profile_for)
    monkeypatch.setattr("burnish.harness.candidates.predict", made_up_memory.predict)
    monkeypatch.setattr(calibration, "predict", made_up_memory.predict)
    monkeypatch.setattr(calibration, "OVERHEAD", made_up_memory.NO_OVERHEAD)
    monkeypatch.setattr(calibration, "FOLDER", tmp_path / "calibration")
    monkeypatch.setattr(training, "find_resources", lambda config: HERE)


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "config.yaml"
    found.write_text(yaml.safe_dump(make_config().model_dump(mode="json", exclude_defaults=True)))
    return found


def run(capsys, *arguments):
    """Exit code, stdout and stderr of a command in this process."""
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def answer(capsys, *arguments):
    code, out, _ = run(capsys, "plan", *arguments, "--json")
    assert code == 0
    return json.loads(out)


def test_the_text_names_what_is_taken_what_it_needs_and_why(capsys, made_up, path):
    code, out, _ = run(capsys, "plan", path, "--gpus", 1, "--gpu-memory", "4.3GiB", "--gpu-name", "H100")
    assert code == 0
    assert "small: 1 x H100, run directory" in out
    assert "micro_batch_size             8           largest divisor up to 8" in out or "does not fit" in out
    for words in (
        "predicted peak of a worker",
        "may use",
        "phases: load",
        "candidates",
        "> ",
        "never chosen by itself",
    ):
        assert words in out
    assert "An estimate: H100 at 396 TFLOP/s (assumed, not measured)" in " ".join(out.split())
    assert max(len(line) for line in out.splitlines()) <= 120


def test_the_json_holds_the_same_numbers_as_the_text(capsys, made_up, path):
    found = answer(capsys, path)
    assert found["prediction"]["peak_bytes"] == sum(found["prediction"]["device"].values())
    assert found["state_bytes_per_worker"]["total"] == 18 * found["parameters"]["total"]
    assert found["limits"]["device_bytes"] <= found["budget_bytes_per_worker"]
    assert found["num_fitting"] <= found["num_candidates"]
    taken = [row for row in found["candidates"] if row["is_chosen"]]
    assert len(taken) == 1
    assert taken[0] == found["candidates"][0]
    assert taken[0]["peak_bytes"] == found["prediction"]["peak_bytes"]
    assert taken[0]["step_s"] == found["cost"]["step_s"]
    assert found["calibration"] is None
    assert {tuple(row["changes"].values()) for row in found["other_results"]} >= {("adamw_8bit",), ("lora",)}


def test_what_does_not_fit_is_shown_with_by_how_much(capsys, made_up, path):
    found = answer(capsys, path, "--gpus", 1, "--gpu-memory", "3.8GiB", "--gpu-name", "H100")
    too_large = [row for row in found["candidates"] if not row["fits"]]
    assert too_large
    for row in too_large:
        device = row["peak_bytes"] - found["limits"]["device_bytes"]
        assert row["over_bytes"].get("device", device) == device


@pytest.mark.parametrize("verb", ["plan", "train"])
def test_a_run_that_does_not_fit_is_exit_3_before_anything_starts(capsys, monkeypatch, made_up, path, tmp_path, verb):
    monkeypatch.setattr(training, "find_resources", lambda config: cpu(1.2))
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, verb, path)
    assert (code, out) == (3, "")
    assert err.count("\n") == 1
    assert "does not fit: it needs" in err
    assert "The cheapest change that fits: " in err
    assert all(path.suffix == ".lock" for path in (tmp_path / "runs").glob("*"))


def test_other_hardware_is_planned_for_without_being_here(capsys, made_up, path):
    asked = ("--gpus", 4, "--gpu-memory", "24GiB", "--nodes", 2, "--host-memory", "128GiB", "--nvme", "1TiB")
    found = answer(capsys, path, *asked, "launch.type=ray", "launch.num_workers=8")
    resources = found["resources"]
    assert (resources["device"], resources["num_devices"], resources["num_nodes"]) == ("cuda", 8, 2)
    assert resources["device_memory_bytes"] == 24 * GIB - CUDA_CONTEXT_BYTES
    assert (resources["host_memory_bytes"], resources["nvme_bytes"]) == (128 * GIB, 2**40)
    assert found["plan"]["world_size"] == 8
    assert found["cost"]["wire_bytes"] > 0


def test_idle_gpus_are_pointed_out(capsys, made_up, path):
    _, out, _ = run(capsys, "plan", path, "--gpus", 4, "--gpu-name", "A100")
    assert "3 of 4 GPUs; launch.type=ray launch.num_workers=4 uses all" in out


def test_hardware_that_is_not_known_is_a_mistake_in_one_sentence():
    with pytest.raises(ConfigError, match="give --gpu-memory"):
        supposed(HERE, Hardware(num_gpus=2))
    with pytest.raises(ConfigError, match="is not in burnish's table"):
        supposed(HERE, Hardware(gpu_name="Voodoo 2"))


def test_what_is_not_asked_about_is_what_is_here():
    here = gpus(2, 80, num_cpus=8)
    assert supposed(here, Hardware()) == here
    assert supposed(here, Hardware(host_memory_bytes=GIB)).device_memory_bytes == here.device_memory_bytes
    assert supposed(here, Hardware(num_gpus=0)).device == "cpu"
    assert supposed(here, Hardware(num_gpus=4)).device_memory_bytes == here.device_memory_bytes
    assert supposed(here, Hardware(num_nodes=3)).num_devices == 6
    assert supposed(HERE, Hardware(gpu_name="H100")).num_devices == 1


def measured(peak_bytes, **parts):
    phases = {"load": peak_bytes // 4, "step": peak_bytes, "evaluation": peak_bytes // 2, "save": peak_bytes // 3}
    return Measured(phases, parts, baseline_bytes=GIB, step_s=2.0, losses=(2.0, 1.9), num_ranks=1)


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.09, 0), (0.93, 0), (1.2, 6), (0.8, 6)])
def test_verify_compares_and_the_next_plan_uses_what_was_found(capsys, monkeypatch, made_up, path, factor, code):
    predicted = answer(capsys, path)["prediction"]["peak_bytes"]
    monkeypatch.setattr(measure, "measure", lambda plan, labels: measured(int(predicted * factor), weights=2**28))
    found_code, out, _ = run(capsys, "plan", path, "--verify")
    assert found_code == code
    assert ("within 10 %" in out) == (code == 0)
    assert "verified: peak of a worker" in out
    assert "weights" in out
    again = answer(capsys, path)
    assert again["calibration"]["num_samples"] == 1
    assert again["calibration"]["baseline_bytes"] == GIB
    assert "plan --verify ran once on" in run(capsys, "plan", path)[1]
    if factor > 1:
        assert again["prediction"]["peak_bytes"] == pytest.approx(predicted * factor, rel=1e-3)


def test_verify_in_json_has_every_phase_and_part(capsys, monkeypatch, made_up, path):
    predicted = answer(capsys, path)["prediction"]
    monkeypatch.setattr(
        measure, "measure", lambda plan, labels: measured(predicted["peak_bytes"], weights=1000, surprise=5)
    )
    found = answer(capsys, path, "--verify")["verification"]
    assert found["ok"]
    assert found["error"] == pytest.approx(0, abs=1e-6)
    assert [row["name"] for row in found["phases"]] == ["load", "step", "evaluation", "save"]
    parts = {row["name"]: row for row in found["parts"]}
    assert parts["weights"]["error"] == pytest.approx(predicted["device"]["weights"] / 1000 - 1)
    assert parts["surprise"] == {"name": "surprise", "predicted_bytes": None, "measured_bytes": 5, "error": None}
    assert parts["gradients"]["measured_bytes"] is None


def test_verify_is_of_this_machine(capsys, made_up, path):
    code, _, err = run(capsys, "plan", path, "--verify", "--gpus", 4)
    assert code == 2
    assert "--verify measures on this machine" in err


def test_a_run_that_dies_while_it_is_verified_is_exit_3(capsys, monkeypatch, made_up, path):
    def dies(plan, labels):
        raise OutOfMemory("a process was killed")

    monkeypatch.setattr(measure, "measure", dies)
    assert run(capsys, "plan", path, "--verify")[0] == 3


def test_a_model_that_cannot_be_profiled_is_planned_with_its_lasting_state(monkeypatch, tmp_path):
    def fails(config):
        raise RuntimeError("no such\noperation")

    monkeypatch.setattr(planning, "profiler", lambda config: fails)
    config = training.load_config([str(tiny.write_config(tmp_path))], [])
    found = planned(config, HERE)
    notes = {row.key: row.why for row in found.plan.decisions}
    assert notes["activations"] == "the model could not be profiled (RuntimeError: no such operation)"
    assert found.choice.prediction.device["weights"] > 0


def test_a_model_on_the_cluster_alone_is_planned_without_a_prediction(monkeypatch):
    def missing(config):
        raise ConfigError("no such folder")

    monkeypatch.setattr(planning, "profiler", lambda config: missing)
    far = make_config(launch={"type": "ray", "num_workers": 2, "address": "ray://head:10001"})
    found = planned(far, HERE)
    assert found.choice is None
    assert found.plan.zero_stage == 2
    assert "not on this machine" in found.plan.decisions[-1].why
    with pytest.raises(ConfigError):
        planned(make_config(), HERE)


def test_a_real_tiny_model_is_planned_and_refused_by_the_real_profile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = training.load_config([str(tiny.write_config(tmp_path))], [])
    found = planned(config, HERE)
    assert found.choice.chosen.fits
    assert found.plan.micro_batch_size == 4
    assert found.choice.prediction.device["weights"] > 0
    with pytest.raises(InfeasibleError, match="does not fit"):
        planned(config, Resources("cpu", 0, 1, 2**20))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_memory_that_is_taken_in_a_cgroup_is_not_available_and_files_are(tmp_path):
    write(tmp_path / "proc/self/cgroup", "0::/box/inner\n")
    write(tmp_path / "sys/fs/cgroup/box/memory.max", f"{GIB}\n")
    write(tmp_path / "sys/fs/cgroup/box/memory.current", f"{GIB // 2}\n")
    write(tmp_path / "sys/fs/cgroup/box/memory.stat", f"anon 5\ninactive_file {GIB // 8}\nactive_file {GIB // 8}\n")
    assert available_bytes(tmp_path) == GIB - GIB // 4
    write(tmp_path / "proc/meminfo", f"MemTotal: 99 kB\nMemAvailable:   {GIB // 4096} kB\n")
    assert available_bytes(tmp_path) == GIB // 4


def test_the_first_version_of_cgroups_is_read_too(tmp_path):
    write(tmp_path / "proc/self/cgroup", "4:memory:/box\n")
    write(tmp_path / "sys/fs/cgroup/memory/box/memory.limit_in_bytes", f"{GIB}\n")
    write(tmp_path / "sys/fs/cgroup/memory/box/memory.usage_in_bytes", f"{GIB // 4}\n")
    assert available_bytes(tmp_path) == GIB - GIB // 4


def test_a_disk_is_asked_about_before_its_folder_is_made(tmp_path):
    assert free_disk_bytes(str(tmp_path / "not" / "yet")) == pytest.approx(free_disk_bytes(str(tmp_path)), rel=0.1)


@pytest.mark.parametrize(
    ("missing", "places"),
    [([], ("cpu", "nvme")), (["libaio"], ("cpu",)), (["ninja"], ()), (["g++", "ninja"], ())],
)
def test_offload_goes_where_the_tools_are(monkeypatch, missing, places):
    monkeypatch.setattr("burnish.launch.resources.missing_tools", lambda with_files: missing)
    assert offload_places(with_files=True) == places
