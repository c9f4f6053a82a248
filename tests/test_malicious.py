"""Files made to run code, to read other files or to hang: each put where burnish reads; none does what it was made for.

Every payload leaves a canary, a file of its own, where it runs. PyTorch's switch that makes torch.load run pickles is
on all the time. What is loaded by subprocess elsewhere is loaded in this process here: it must survive.
"""

import contextlib
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from backbones import make_config, save_backbone
from burnish.harness import checkpoint, export, models
from burnish.harness.config import Source
from burnish.harness.config_io import load_config
from burnish.harness.data.clean import Row
from burnish.harness.data.sources import read_source
from burnish.harness.errors import BurnishError, ConfigError, DataError
from burnish.harness.tasks import RowError, get_task
from burnish.launch.cli import main
from safetensors.torch import save_file
from test_checkpoint import assert_whole, save
from test_export import finished_run
from tiny import make_tokenizer, write_config

MAX_SECONDS = 20.0
"""Far more than any refusal takes here, and far less than waiting for a pipe."""


class Payload:
    """Runs a function of Python's as soon as something unpickles it."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.fixture(autouse=True)
def _forced(monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    start = time.monotonic()
    yield path
    assert not path.exists(), "the payload has run"
    assert time.monotonic() - start < MAX_SECONDS


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_backbone("llama", tmp_path_factory.mktemp("malicious") / "llama")


def copied(folder, target, *, without=()):
    target.mkdir()
    for file in folder.iterdir():
        if file.name not in without:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def edited(folder, name, **changes):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def torch_file(path, canary):
    torch.save({"weight": torch.ones(2), "payload": Payload(canary)}, path)


def test_the_payloads_would_run(tmp_path):
    torch_file(tmp_path / "a.pt", tmp_path / "ran")
    torch.load(tmp_path / "a.pt")
    assert (tmp_path / "ran").is_dir()


PICKLES = ("pytorch_model.bin", "model.pt", "model.pth", "model.pkl", "adapter_model.bin", "training_args.bin")


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_in_a_model_folder_is_not_read(llama, tmp_path, canary, name):
    folder = copied(llama, tmp_path / "model", without=["model.safetensors"])
    torch_file(folder / name, canary)
    with pytest.raises(ConfigError, match="never loaded"):
        models.load_model(make_config("llama", folder))
    beside = copied(llama, tmp_path / "beside")
    torch_file(beside / name, canary)
    assert models.load_model(make_config("llama", beside))


@pytest.mark.parametrize("name", ["weights.bin", "weights.pkl", "weights.pt", "weights.ckpt", "weights.safetensors"])
def test_a_file_that_is_no_gguf_is_no_model(tmp_path, canary, name):
    torch_file(tmp_path / name, canary)
    with pytest.raises(ConfigError, match=r"model\.path"):
        models.load_model(make_config("llama", tmp_path / name))


@pytest.mark.parametrize("named", ["pytorch_model.bin", "pytorch_model.bin.index.json", "../../elsewhere.bin"])
def test_a_config_cannot_name_a_pickle_as_its_weights(llama, tmp_path, canary, named):
    folder = copied(llama, tmp_path / "model")
    torch_file(folder / "pytorch_model.bin", canary)
    edited(folder, "config.json", transformers_weights=named)
    with pytest.raises(ConfigError, match=r"only \.safetensors"):
        models.load_model(make_config("llama", folder))


CODE = "import os, pathlib\nos.mkdir({canary!r})\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"


@pytest.mark.parametrize("kind", ["own model type", "known model type", "tokenizer", "hub", "image processor"])
def test_code_beside_a_model_is_not_run(llama, tmp_path, canary, kind):
    folder = copied(llama, tmp_path / "model")
    for file in ("code.py", "configuration_code.py", "custom_generate/generate.py"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(CODE.format(canary=str(canary)))
    prefix = "owner/name--" if kind == "hub" else ""
    names = {"AutoConfig": "Config", "AutoModelForCausalLM": "Model", "AutoTokenizer": ["Tokenizer", "Tokenizer"]}
    spots = {
        key: [f"{prefix}code.{one}" for one in v] if isinstance(v, list) else f"{prefix}code.{v}"
        for key, v in names.items()
    }
    if kind == "tokenizer":
        edited(folder, "tokenizer_config.json", auto_map=spots, tokenizer_class="Tokenizer")
    elif kind == "image processor":
        (folder / "preprocessor_config.json").write_text(
            json.dumps({"auto_map": {"AutoImageProcessor": "code.Config"}})
        )
    else:
        edited(folder, "config.json", auto_map=spots, **({"model_type": "own"} if kind == "own model type" else {}))
    config = make_config("llama", folder)
    for load in (models.load_model, models.load_processor, models.count_parameters):
        with contextlib.suppress(ConfigError):
            load(config)


def test_a_model_made_from_fields_cannot_name_code(tmp_path, canary):
    fields = {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "owner/name--code.Model"}}
    with pytest.raises(ValueError, match="'auto_map' is no field"):
        make_config("llama", None, model={"init": fields, "tokenizer": str(tmp_path), "dtype": "fp32"})


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_experts_implementation"])
def test_a_config_cannot_fetch_a_kernel_from_the_hub(llama, tmp_path, canary, key):
    folder = copied(llama, tmp_path / "model")
    edited(folder, "config.json", **{key: "owner/kernel"})
    with pytest.raises(ConfigError, match="from the hub; such code is never run"):
        models.load_model(make_config("llama", folder))


def header(text, *, length=None):
    content = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(content) if length is None else length) + content


HUGE = {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}
HEADERS = {
    "length of 2^60": header("{}", length=2**60),
    "length of a gigabyte": header("{}", length=2**30),
    "nested a million deep": header("[" * 10**6),
    "huge tensor": header(json.dumps({"model.norm.weight": HUGE})),
    "negative offsets": header('{"model.norm.weight": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}')
    + bytes(4),
    "offsets past the end": header('{"model.norm.weight": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}'),
    "negative shape": header('{"model.norm.weight": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}')
    + bytes(4),
    "a list": header("[1, 2]"),
    "not UTF-8": header(b"\xff\xfe{}"),
    "empty": b"",
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_crafted_safetensors_header_is_one_clear_error(llama, tmp_path, canary, what):
    folder = copied(llama, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(HEADERS[what])
    with pytest.raises(BurnishError, match=r"model\.path"):
        models.load_model(make_config("llama", folder))


SHARDS = (
    *(
        "../elsewhere.safetensors",
        "/elsewhere.safetensors",
        "a/../../elsewhere.safetensors",
        "..\\elsewhere.safetensors",
    ),
    *(
        "model\0.safetensors",
        "x" * 300 + ".safetensors",
        "weights.bin",
        "MODEL.SAFETENSORS",
        "gone.safetensors",
        7,
        None,
    ),
)


@pytest.mark.parametrize("shard", SHARDS)
def test_a_shard_index_names_only_safetensors_beside_it(llama, tmp_path, canary, shard):
    folder = copied(llama, tmp_path / "model", without=["model.safetensors"])
    save_file({"model.norm.weight": torch.full((32,), 77.0)}, tmp_path / "elsewhere.safetensors")
    torch_file(folder / "weights.bin", canary)
    index = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"model\.path"):
        models.load_model(make_config("llama", folder))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_huge_settings_of_a_model_are_not_read(llama, tmp_path, canary, file):
    folder = copied(llama, tmp_path / "model", without=["model.safetensors"])
    (folder / file).write_bytes(b"[" * 11 * 2**20)
    with pytest.raises(ConfigError, match="larger than"):
        models.load_model(make_config("llama", folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "link to a device"])
def test_a_pipe_or_device_in_a_model_folder_is_refused_at_once(llama, tmp_path, canary, name, kind):
    folder = copied(llama, tmp_path / "model", without=[name])
    os.mkfifo(folder / name) if kind == "pipe" else (folder / name).symlink_to("/dev/zero")
    for load in (models.load_model, models.load_processor):
        with pytest.raises(ConfigError, match="is a pipe, socket or device"):
            load(make_config("llama", folder))


def gguf(*, version=3, tensors=0, pairs=0, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


TEXT_OF_2_60 = struct.pack("<Q", 2**60) + b"general.architecture"
GGUFS = {
    "not GGUF": b"\x80\x04payload",
    "too many pairs": gguf(pairs=2**60),
    "too many tensors": gguf(tensors=2**60),
    "a text of 2^60 bytes": gguf(pairs=1, rest=TEXT_OF_2_60),
    "version of the other byte order": gguf(version=3 << 24),
}


@pytest.mark.parametrize("what", GGUFS)
def test_a_crafted_gguf_file_is_one_clear_error(tmp_path, canary, what):
    (tmp_path / "model.gguf").write_bytes(GGUFS[what])
    with pytest.raises(BurnishError, match=r"model\.path"):
        models.load_model(make_config("llama", tmp_path / "model.gguf"))


TEMPLATES = (
    "{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}",
    "{{ ''.__class__.__mro__[-1].__subclasses__()[0] }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ lipsum.__globals__['os'].mkdir('CANARY') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% set x = messages.append(1) %}",
    "{{ ('{0.__class__.__init__.__globals__}').format(cycler) }}",
    "{% for a in range(10**12) %}x{% endfor %}",
    "{% import 'os' as os %}{{ os.mkdir('CANARY') }}",
    "{% include '/etc/passwd' %}",
    "{{ 1 // 0 }}",
)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("place", ["tokenizer", "config"])
def test_a_chat_template_cannot_leave_its_sandbox(tmp_path, canary, template, place):
    template, tokenizer = template.replace("CANARY", str(canary)), make_tokenizer()
    tokenizer.chat_template = template if place == "tokenizer" else None
    options = {} if place == "tokenizer" else {"data__chat_template": template}
    config = make_config("llama", None, model={"init": {"model_type": "llama"}, "tokenizer": "x"}, **options)
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(RowError):
        get_task("causal_lm").encode(row, tokenizer, config, [])


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


YAMLS = (
    "!!python/object/apply:os.mkdir ['CANARY']",
    "name: !!python/object/apply:os.mkdir ['CANARY']",
    "name: !!python/name:os.system",
    "name: !!python/module:os",
    "name: !!python/object/new:os.mkdir {args: ['CANARY']}",
    "<<: !!python/object/apply:os.mkdir ['CANARY']",
    "!!map {name: !!python/object/apply:subprocess.Popen [['mkdir', 'CANARY']]}",
)


@pytest.mark.parametrize("text", YAMLS)
def test_a_config_cannot_make_objects(tmp_path, canary, text):
    (tmp_path / "config.yaml").write_text(text.replace("CANARY", str(canary)))
    with pytest.raises(ConfigError):
        load_config([str(tmp_path / "config.yaml")])


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
