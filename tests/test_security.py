"""Paths, bounds and versions: what leads out of its place, is too large or too old is refused at once."""

import json
import os
import re
import time
import tracemalloc
from pathlib import Path

import pytest
import tiny
from burnish.harness import export
from burnish.harness.config import Source
from burnish.harness.config_io import load_config
from burnish.harness.config_types import NAME_PATTERN
from burnish.harness.data.clean import Rejected
from burnish.harness.data.sources import read_source
from burnish.harness.errors import ConfigError
from burnish.harness.paths import resolve_path
from burnish.harness.run_dir import run_path
from burnish.launch import versions
from burnish.launch.cli import main
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

odd_names = st.sampled_from(["..", ".", "", "~", "CON", "/", "\0", "a/b", "../x", "/etc", "x" * 300, "a\nb", "-x", " "])
any_names = (
    odd_names | st.text(max_size=40) | st.builds("/".join, st.lists(odd_names | st.text(max_size=9), max_size=4))
)
many = settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))


@many
@given(name=any_names)
def test_no_name_of_a_run_leads_out_of_its_folder(tmp_path_factory, name):
    runs = Path(tmp_path_factory.getbasetemp()) / "runs"
    try:
        path = run_path(runs, name)
    except (ConfigError, ValueError):
        return
    assert re.fullmatch(NAME_PATTERN, name)
    assert path.resolve().parent == runs.resolve()


def test_a_link_in_the_place_of_a_run_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="does not name a folder directly inside"):
        run_path(tmp_path / "runs", "run")


@many
@given(path=any_names | st.builds("package:{}/{}".format, st.sampled_from(["json", "os", "..", ""]), any_names))
def test_no_path_is_more_than_a_clear_error(path):
    try:
        found = resolve_path(path, "/nowhere")
    except ConfigError:
        return
    if path.startswith("package:json/"):
        assert Path(found).resolve().is_relative_to(Path(json.__file__).resolve().parent)


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a pipe"])
def test_a_pipe_or_device_is_no_data(tmp_path, kind):
    path = tmp_path / "rows.jsonl"
    if kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe") if kind == "link to a pipe" else (tmp_path / "pipe").rename(path)
    with pytest.raises(ConfigError, match="is a pipe, socket or device"):
        list(read_source(Source(path=str(path)), cwd=".", task_type="causal_lm", max_row_bytes=100))
    for inside in (tmp_path, tmp_path / "*.jsonl"):  # found in a folder or by a glob, it is left out
        with pytest.raises(ConfigError):
            list(read_source(Source(path=str(inside)), cwd=".", task_type="causal_lm", max_row_bytes=100))


@pytest.mark.parametrize("kind", ["full", "file", "pipe", "link", "broken link", "zero byte", "300 characters"])
def test_an_export_goes_into_a_new_folder_only(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "full":
        out.mkdir()
        (out / "file").touch()
    elif kind == "file":
        out.touch()
    elif kind == "pipe":
        os.mkfifo(out)
    elif kind == "link":
        (tmp_path / "empty").mkdir()
        out.symlink_to("empty")
    elif kind == "broken link":
        out.symlink_to("nowhere")
    else:
        out = tmp_path / ("\0" if kind == "zero byte" else "x" * 300)
    with pytest.raises(ConfigError, match=r"--out"):
        export._check_out(out)


# Bounds


def bounded(read):
    """Runs it; it may take a second and 200 MB."""
    tracemalloc.start()
    start = time.perf_counter()
    try:
        return read()
    finally:
        seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (seconds < 10, peak < 200e6) == (True, True), (seconds, peak)


LEVELS = "\n".join([f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10) if i else '1'}]" for i in range(12)])
CONFIGS = {
    "large": "x: " + "a" * 10**6,
    "deep": "x: " + "[" * 10**5,
    "aliases": LEVELS,
    "many": "[" + "1," * 400_000 + "]",
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_beyond_the_limits_is_refused_at_once(tmp_path, what):
    (tmp_path / "config.yaml").write_text(CONFIGS[what])
    with pytest.raises(ConfigError, match=r"larger than|nested deeper|more than"):
        bounded(lambda: load_config([str(tmp_path / "config.yaml")]))


def test_a_row_beyond_the_limit_is_rejected_without_being_held(tmp_path):
    with (tmp_path / "rows.jsonl").open("wb") as file:
        file.truncate(300 * 2**20)  # one line of zeros that takes no place on the disk
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"prompt": "a", "completion": "b"}\n')
    source = Source(path=str(tmp_path / "rows.jsonl"))
    found = bounded(lambda: list(read_source(source, cwd=".", task_type="causal_lm", max_row_bytes=10**6)))
    assert [type(item).__name__ for item in found] == ["Rejected", "Row"]
    assert isinstance(found[0], Rejected)
    assert found[0].kind == "too_large"


# Versions


@pytest.mark.parametrize(
    ("have", "floor", "is_older"),
    [
        ("2.9.1", "2.10", True),
        ("2.13.0+cpu", "2.11", False),
        ("2.11", "2.11.0", False),
        ("5.17.0.dev0", "5.17", False),
        ("0.0", "0.1", True),
        ("10", "9.9", False),
        ("nonsense", "1", True),
    ],
)
def test_versions_are_compared_by_their_numbers(have, floor, is_older):
    assert versions.is_older(have, floor) == is_older


def test_the_floors_are_at_least_those_of_the_advisories():
    floors = versions.floors()
    known = {"torch": "2.10", "ray": "2.60", "transformers": "5.2.1", "accelerate": "1.14.1", "deepspeed": "0.15.1"}
    assert not [name for name, floor in known.items() if versions.is_older(floors[name], floor)]


def test_a_version_that_is_too_old_stops_a_run_at_its_start(monkeypatch, tmp_path, capsys):
    versions.check_versions()
    true = versions.version
    monkeypatch.setattr(versions, "version", lambda name: "2.54.0" if name == "ray" else true(name))
    config = tiny.write_config(tmp_path)
    assert main(["train", str(config)]) == 2
    assert "ray 2.54.0 is older than 2.60" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "tiny").exists()
