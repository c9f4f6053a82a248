"""The calibration file: medians, and what is broken or foreign is not used."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from burnish.harness import calibration
from burnish.harness.calibration import MAX_SAMPLES, Sample, add, combine, path_of, read, sample_of
from burnish.harness.candidates import MARGIN, limits_of, survey
from burnish.harness.errors import ConfigError
from burnish.harness.plan import make_plan
from made_up_memory import GIB, NO_OVERHEAD, cpu, gpus, make_config, predict, profile

SAMPLE = Sample(residual_bytes=GIB // 8, transient_bytes=GIB, flops=2e10, step_s=2.0, baseline_bytes=400)
NAME = "Some CPU @ 3.00GHz"


@pytest.fixture(autouse=True)
def by_hand(monkeypatch):
    monkeypatch.setattr(calibration, "predict", predict)
    monkeypatch.setattr(calibration, "OVERHEAD", NO_OVERHEAD)


def test_several_verifications_count_by_their_median(tmp_path):
    for residual, speed in ((GIB // 8, 1e10), (GIB, 1e3), (GIB // 4, 3e10)):
        add(NAME, replace(SAMPLE, residual_bytes=residual, flops=2 * speed), folder=tmp_path)
    found, note = read(NAME, "cpu", folder=tmp_path)
    assert note == ""
    assert (found.num_samples, found.allocator_share, found.flops_per_s) == (3, 0.25, 1e10)
    assert found.baseline_bytes == 400


def test_no_file_is_no_calibration_and_no_note(tmp_path):
    assert read(NAME, "cpu", folder=tmp_path) == (None, "")


BROKEN = {
    "cut off": '{"format": 1, "hard',
    "no JSON": "calibration: yes",
    "a list": "[]",
    "another version": json.dumps({"format": 99, "hardware": NAME, "samples": []}),
    "other hardware": json.dumps({"format": 1, "hardware": "a GPU", "samples": [vars(SAMPLE)]}),
    "no samples": json.dumps({"format": 1, "hardware": NAME, "samples": []}),
    "an unknown field": json.dumps({"format": 1, "hardware": NAME, "samples": [{"x": 1}]}),
    "text for a number": json.dumps({"format": 1, "hardware": NAME, "samples": [vars(SAMPLE) | {"flops": "1"}]}),
    "no number": json.dumps({"format": 1, "hardware": NAME, "samples": [vars(SAMPLE) | {"flops": math.nan}]}),
    "below nothing": json.dumps({"format": 1, "hardware": NAME, "samples": [vars(SAMPLE) | {"baseline_bytes": -1}]}),
    "beyond all": json.dumps({"format": 1, "hardware": NAME, "samples": [vars(SAMPLE) | {"residual_bytes": 2**60}]}),
    "bytes": b"\xff\xfe\x00".decode("latin-1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_or_foreign_file_is_noted_and_not_used(tmp_path, name):
    path = path_of(NAME, tmp_path)
    path.write_text(BROKEN[name], encoding="latin-1")
    found, note = read(NAME, "cpu", folder=tmp_path)
    assert found is None
    assert str(path) in note
    add(NAME, SAMPLE, folder=tmp_path)
    assert read(NAME, "cpu", folder=tmp_path)[0].num_samples == 1


def test_only_the_newest_samples_are_kept(tmp_path):
    for number in range(MAX_SAMPLES + 5):
        add(NAME, replace(SAMPLE, flops=float(number)), folder=tmp_path)
    kept = [one["flops"] for one in json.loads(path_of(NAME, tmp_path).read_text())["samples"]]
    assert kept == [float(number) for number in range(5, MAX_SAMPLES + 5)]
    assert [file.name for file in tmp_path.iterdir()] == ["some-cpu-3-00ghz.json"]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        add(NAME, SAMPLE, folder=tmp_path / "file")


@pytest.mark.parametrize("share", [0.0, 0.125, 0.5])
def test_a_sample_gives_back_the_share_that_the_measurement_was_made_with(share):
    """1 GiB of activations comes and goes."""
    plan = make_plan(make_config(), gpus(1, 80), run_dir="", cwd="")
    step_bytes = int(predict(plan, profile()).peak_bytes + share * GIB)
    sample = sample_of(plan, profile(), step_bytes=step_bytes, baseline_bytes=7, step_s=2.0, flops=1e12)
    found = combine(NAME, "cuda", [sample])
    assert found.allocator_share == pytest.approx(share)
    assert (found.flops_per_s, found.baseline_bytes) == (5e11, 7)


def test_a_measurement_below_the_prediction_never_lowers_it_and_a_wild_one_is_bounded():
    low, wild = (combine(NAME, "cpu", [replace(SAMPLE, residual_bytes=some)]) for some in (-(2**40), 2**40))
    assert (low.allocator_share, low.process_bytes) == (0.0, 0)
    assert wild.allocator_share == calibration.MAX_SHARE


def test_small_steps_tell_what_a_process_takes_and_short_ones_no_speed():
    small = replace(SAMPLE, residual_bytes=20 * 2**20, transient_bytes=2**20, step_s=0.01)
    found = combine(NAME, "cpu", [small])
    assert (found.process_bytes, found.flops_per_s) == (20 * 2**20, None)
    assert found.allocator_share == 0
    both = combine(NAME, "cpu", [small, SAMPLE])
    assert both.allocator_share == pytest.approx((GIB // 8 - 20 * 2**20) / GIB)
    assert both.flops_per_s == 1e10


def test_the_speed_of_a_cpu_is_that_of_a_thread():
    plan = make_plan(make_config(), cpu(64), run_dir="", cwd="")
    sample = sample_of(plan, profile(), step_bytes=0, baseline_bytes=0, step_s=1.0, flops=8e9)
    assert sample.flops == 1e9


def test_the_next_plan_uses_it(tmp_path, monkeypatch):
    monkeypatch.setattr("burnish.harness.candidates.predict", predict)
    add(NAME, Sample(GIB // 2, GIB, flops=4e9, step_s=2.0, baseline_bytes=5 * GIB), folder=tmp_path)
    found, _ = read(NAME, "cpu", folder=tmp_path)
    plain, calibrated = (survey(make_config(), cpu(64), profile(), calibration=one) for one in (None, found))
    assert calibrated.best.prediction.peak_bytes == plain.best.prediction.peak_bytes + GIB // 2
    assert calibrated.speeds.flops_per_s == 8 * 2e9
    plan = make_plan(make_config(), cpu(64), run_dir="", cwd="")
    assert limits_of(plan, cpu(64), found).device_bytes == int((1 - MARGIN["cpu"]) * 59 * GIB)


def test_this_machine_has_a_name_of_its_own():
    assert calibration.hardware_name("cuda", "NVIDIA H100") == "NVIDIA H100"
    assert calibration.hardware_name("cpu")
    assert path_of("A/../B").name == "a-b.json"
    assert path_of(NAME).is_relative_to(Path.home())
