"""Paths: files of installed packages, local files, globs, URLs and hub ids, and what is said when there is none."""

import os
import sys

import pytest
from burnish.harness.errors import ConfigError
from burnish.harness.paths import is_hub_id, is_url, resolve_path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package that must not be imported, with one model file."""
    folder = tmp_path / "weights_pkg"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "model" / "tiny.gguf").write_bytes(b"x")
    (tmp_path / "secret.txt").write_text("x")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_a_package_file_is_found_without_importing_the_package(package):
    assert resolve_path("package:weights_pkg/model/tiny.gguf") == str(package / "model" / "tiny.gguf")
    assert resolve_path("package:weights_pkg/model") == str(package / "model")
    assert resolve_path("package:weights_pkg") == str(package)
    assert "weights_pkg" not in sys.modules


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("package:weights_pkg/model/tinny.gguf", r"no such file; did you mean model/tiny\.gguf\?"),
        ("package:weights_pkg/x", r"no such file; it has model/tiny\.gguf"),
        ("package:weights_pkg/../secret.txt", "must lie inside the package"),
        ("package:weights_pkg//etc/passwd", "must lie inside the package"),
        ("package:weights_pkg/a\0b", "must lie inside the package"),
        ("package:weights_pkg/" + "x" * 5000, "no such file"),
        ("package:no_such_package_here/x", "no installed package no_such_package_here"),
        ("package:weights_pkg.model/x", "write package:NAME/FILE"),
        ("package:", "write package:NAME/FILE"),
        ("package:os/x", "no installed package os"),
        ("package:__main__/x", "no installed package __main__"),
    ],
)
@pytest.mark.usefixtures("package")
def test_a_package_file_that_is_not_there_is_a_clear_error(path, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        resolve_path(path)
    assert len(str(caught.value)) < 400


def test_local_paths_are_relative_to_cwd(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("{}")
    assert resolve_path("data/train.jsonl", str(tmp_path)) == str(tmp_path / "data" / "train.jsonl")
    assert resolve_path("data", str(tmp_path)) == str(tmp_path / "data")
    assert resolve_path("data/*.jsonl", str(tmp_path)) == str(tmp_path / "data" / "*.jsonl")
    with pytest.raises(ConfigError, match=r"no such file; did you mean train\.jsonl\?"):
        resolve_path("data/trian.jsonl", str(tmp_path))
    with pytest.raises(ConfigError, match="matches no file"):
        resolve_path("data/*.csv", str(tmp_path))


def test_a_link_keeps_its_name(tmp_path):
    (tmp_path / "blob").write_text("x")
    os.symlink(tmp_path / "blob", tmp_path / "model.gguf")
    assert resolve_path("model.gguf", str(tmp_path)) == str(tmp_path / "model.gguf")


@pytest.mark.parametrize("path", ["gpt2", "owner/name", "owner/name.v1-2", "s3://a/b.jsonl", "stdlib:docstrings"])
def test_hub_ids_urls_and_built_in_sources_stay_as_they_are(path, tmp_path):
    assert resolve_path(path, str(tmp_path)) == path


@pytest.mark.parametrize(
    "path",
    ["./x", "../nope/x", "/nope", "~/no_such_file_here", "x.jsonl", "a/b.gguf", "a/b/c", "a b", "a\0b", "x" * 5000],
)
def test_what_looks_local_must_exist(path, tmp_path):
    with pytest.raises(ConfigError):
        resolve_path(path, str(tmp_path))


def test_urls_and_hub_ids_are_told_apart():
    assert is_url("hf://datasets/x")
    assert not is_url("C:/x")
    assert not is_url("owner/name")
    assert is_hub_id("owner/name")
    assert not is_hub_id("owner/name.jsonl")
    assert not is_hub_id("a/b/c")
