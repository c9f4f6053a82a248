"""Data, adapters, checkpoints and whole runs made to run code, to read other files or to hang."""

import contextlib
import io
import json
import os
import pickle
import sys
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from backbones import make_config
from burnish.harness import checkpoint, export
from burnish.harness.config import Source
from burnish.harness.data.clean import Row
from burnish.harness.data.sources import read_source
from burnish.harness.errors import BurnishError, ConfigError, DataError
from burnish.harness.tasks import RowError, get_task
from burnish.launch.cli import main
from payloads import CODE, Payload, edited, torch_file, watched
from test_checkpoint import assert_whole, save
from test_export import finished_run
from tiny import write_config


@pytest.fixture
def canary(tmp_path, monkeypatch):
    with watched(tmp_path, monkeypatch) as path:
        yield path


def arrow_extension(name, payload):
    """A column whose metadata says that it is of a type that some libraries make by unpickling what follows."""
    metadata = {b"ARROW:extension:name": name.encode(), b"ARROW:extension:metadata": pickle.dumps(payload)}
    field = pyarrow.field("text", pyarrow.string(), metadata=metadata)
    return pyarrow.table({"text": ["hello"]}).cast(pyarrow.schema([field]))


def make_tar(path, canary):
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("../../escaped.txt")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))


def dataset_folder(folder, files):
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": name} for name in files], "_fingerprint": "x", "_format_type": None}
    state |= {"_format_columns": None, "_format_kwargs": {}, "_output_all_columns": False, "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def make_data(path, canary):
    suffix = path.suffix
    if suffix == ".npy":
        np.save(path, np.array([Payload(canary)], dtype=object), allow_pickle=True)
    elif suffix == ".npz":
        np.savez(path, rows=np.array([Payload(canary)], dtype=object))
    elif suffix == ".tar":
        make_tar(path, canary)
    elif suffix in (".pt", ".bin", ".pth"):
        torch_file(path, canary)
    else:  # a pickle under any other name
        path.write_bytes(pickle.dumps(Payload(canary)))
    return path


def rows(path, **options):
    source = Source.model_validate({"path": str(path), **options})
    return list(read_source(source, cwd=".", task_type="causal_lm", max_row_bytes=1000))


DATA = (
    "rows.npy",
    "rows.npz",
    "rows.tar",
    "rows.pt",
    "rows.pkl",
    "rows.pickle",
    "rows.parquet",
    "rows.json",
    "rows.jsonl",
)


@pytest.mark.parametrize("name", [*DATA, "rows.arrow", "rows.csv", "rows.txt", "rows.jsonl.gz"])
def test_a_data_file_that_is_a_pickle_or_an_archive_gives_no_row(tmp_path, canary, name):
    (tmp_path / "a" / "b").mkdir(parents=True)
    path = make_data(tmp_path / "a" / "b" / name, canary)
    with contextlib.suppress(BurnishError):
        assert not [item for item in rows(path) if isinstance(item, Row)]
    assert not (tmp_path / "escaped.txt").exists()


@pytest.mark.parametrize("name", ["ray.data.arrow_tensor", "ray.data.arrow_pickled_object", "arrow.py_extension_type"])
def test_a_parquet_file_cannot_bring_a_type_that_is_unpickled(tmp_path, canary, name):
    import ray.data

    pyarrow.parquet.write_table(arrow_extension(name, Payload(canary)), tmp_path / "rows.parquet")
    with contextlib.suppress(DataError):  # Ray's own type refuses text
        assert [row.values["text"] for row in rows(tmp_path / "rows.parquet")] == ["hello"]
    folder = dataset_folder(tmp_path / "saved", ["data.arrow"])
    with pyarrow.OSFile(str(folder / "data.arrow"), "wb") as file:
        table = arrow_extension("burnish.test", Payload(canary))
        with pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    assert [row.values["text"] for row in rows(folder)] == ["hello"]
    assert "ray.data" in sys.modules
    assert ray.data


@pytest.mark.parametrize("named", ["../outside.arrow", "/outside.arrow", "pipe.arrow", ".", "a/../../outside.arrow"])
def test_a_datasets_folder_names_only_files_of_its_own(tmp_path, canary, named):
    folder = dataset_folder(tmp_path / "saved", [named])
    os.mkfifo(folder / "pipe.arrow")
    (tmp_path / "outside.arrow").write_bytes(b"")
    with pytest.raises(BurnishError, match="no file of this folder"):
        rows(folder)


@pytest.mark.parametrize("name", ["picture.eps", "pipe.png", "device.png", "rows.pkl"])
def test_a_row_cannot_have_its_image_opened_by_another_program_or_for_ever(tmp_path, canary, name):
    path = tmp_path / name
    if name == "pipe.png":
        os.mkfifo(path)
    elif name == "device.png":
        path.symlink_to("/dev/zero")
    elif name == "rows.pkl":
        make_data(path, canary)
    else:
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%pipe%touch " + str(canary).encode())
    task = get_task("image_classification")
    config = make_config("vit", None, model={"init": {"model_type": "vit", "image_size": 8}})
    with pytest.raises(RowError):
        task.encode({"image": str(path), "label": "a"}, task.load_processor(config), config, ["a"])


URLS = (
    "reference://x",
    "simplecache::https://h/x.jsonl",
    "zip://x::s3://b/x.zip",
    "git://h/x.jsonl",
    "github://o:r@/x",
)


@pytest.mark.parametrize("url", [*URLS, "jupyter://h/x.jsonl", "dask://h/x.jsonl", "libarchive://x::file://y.tar"])
def test_urls_of_file_systems_that_run_something_are_not_opened(canary, url):
    with pytest.raises(ConfigError, match=r"not opened|no such file"):
        rows(url)


TRUSTED_BY_OTHERS = (
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin", "scaler.pt"),
    *("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "pytorch_model.bin"),
    *("zero_pp_rank_0_mp_rank_00_model_states.pt", "zero/layer/fp32.pt", "zero/layer/exp_avg.pt", "state_00001.pt"),
)


def plant(folder, canary):
    for name in TRUSTED_BY_OTHERS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch_file(folder / name, canary)
    (folder / "latest").write_text("../../elsewhere")
    (folder / "latest_universal").write_text("zero")


def test_pickles_in_a_checkpoint_are_not_read(tmp_path, canary):
    path = save(tmp_path, 1)
    plant(path, canary)
    plant(tmp_path / "checkpoints" / "step_00000002", canary)
    found, broken = checkpoint.newest(tmp_path)
    assert found == path
    assert [name.rpartition("/")[2] for name in broken] == ["step_00000002"]
    assert_whole(found)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    name = "optimizer.pt"
    manifest["files"][name] = {"bytes": (path / name).stat().st_size, "sha256": checkpoint._sha256(path / name)}
    (path / "MANIFEST.json").write_bytes(checkpoint._manifest_bytes(manifest))
    assert_whole(checkpoint.newest(tmp_path)[0])


SETTINGS = {
    "megatron": {"megatron_config": {"a": 1}, "megatron_core": "payload"},
    "auto mapping": {"auto_mapping": {"base_model_class": "Model", "parent_library": "payload"}},
    "file of a cache": {"init_lora_weights": "corda", "corda_config": {"cache_file": "evil.pt"}},
    "other method": {"peft_type": "PREFIX_TUNING"},
    "unknown": {"runtime_hook": "payload"},
}


def test_an_adapter_with_a_pickle_or_settings_that_import_is_refused(tmp_path, canary, monkeypatch):
    plan, _, folder, *_ = finished_run("llama", tmp_path)
    (tmp_path / "payload.py").write_text(CODE.format(canary=str(canary)))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    saved = (folder / "adapter_config.json").read_text()
    for changes in SETTINGS.values():
        edited(folder, "adapter_config.json", **changes)
        with pytest.raises(ConfigError, match="which burnish does not write"):
            export.load_result(plan.config, folder, labels=None)
        (folder / "adapter_config.json").write_text(saved)
    plant(folder, canary)
    assert export.load_result(plan.config, folder, labels=None)
    (folder / "adapter_model.safetensors").rename(tmp_path / "kept")
    torch_file(folder / "adapter_model.bin", canary)
    with pytest.raises(ConfigError, match="a pickled adapter is never loaded"):
        export.load_result(plan.config, folder, labels=None)
    os.mkfifo(folder / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="is a pipe"):
        export.load_result(plan.config, folder, labels=None)


def test_an_adapter_of_another_base_of_the_same_shape_is_refused(tmp_path):
    plan, _, folder, *_ = finished_run("llama", tmp_path)
    base = tmp_path / "base" / "model.safetensors"
    content = bytearray(base.read_bytes())
    content[-2] ^= 0xFF  # the last weight
    base.write_bytes(content)
    with pytest.raises(ConfigError, match="is not the base model that"):
        export.load_result(plan.config, folder, labels=None)


def test_a_run_directory_full_of_pickles_trains_on_and_answers(tmp_path, canary, capsys):
    config = write_config(tmp_path, train__max_steps=2, checkpoint={"every_steps": 1, "keep": 2})
    assert main(["train", str(config)]) == 0
    run = tmp_path / "runs" / "tiny"
    for folder in (
        run,
        run / "adapter",
        *(run / "checkpoints").iterdir(),
        tmp_path / "model",
        tmp_path / "runs" / ".cache",
    ):
        plant(folder, canary)
    plant(run / "checkpoints" / "step_00000009", canary)
    for command in (
        ["train", str(config), "--resume"],
        ["eval", str(run)],
        ["generate", str(run), "--max-new-tokens", "1"],
        ["report", str(run)],
        ["export", str(run), "--out", str(tmp_path / "adapter")],
        ["export", str(run), "--format", "merged", "--out", str(tmp_path / "merged")],
    ):
        assert main(command) == 0, capsys.readouterr().err
    assert not (tmp_path / "merged" / "optimizer.pt").exists()


@pytest.mark.parametrize("name", ["events.jsonl", "metrics.jsonl", "samples.json", "env.json", "adapter/burnish.json"])
@pytest.mark.parametrize("kind", ["pipe", "deep"])
def test_a_run_of_someone_else_cannot_make_its_reader_hang(tmp_path, canary, capsys, name, kind):
    _, run, *_ = finished_run("llama", tmp_path)
    (run.path / name).unlink(missing_ok=True)
    os.mkfifo(run.path / name) if kind == "pipe" else (run.path / name).write_text("[" * 10**6)
    for command in ("report", "eval"):
        assert main([command, str(run.path)]) in (0, 2, 4)
        assert "unexpected" not in capsys.readouterr().err


def test_a_run_of_someone_else_cannot_say_that_its_code_is_trusted(tmp_path, canary, capsys):
    plan, run, *_ = finished_run("llama", tmp_path)
    saved = plan.to_dict()
    saved["config"]["model"]["trust_remote_code"] = True
    run.write_json(run.plan_json, saved)
    (tmp_path / "base" / "code.py").write_text(CODE.format(canary=str(canary)))
    edited(tmp_path / "base", "config.json", auto_map={"AutoConfig": "code.Config"}, model_type="own")
    for command in (["eval"], ["generate", "--prompt", "x"], ["export", "--out", str(tmp_path / "out")]):
        assert main([command[0], str(run.path), *command[1:]]) == 2
        assert "add --trust-remote-code to run it" in capsys.readouterr().err
