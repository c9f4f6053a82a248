"""Models made to run code, to read other files or to hang: burnish refuses them or reads what is harmless.

They are loaded in this process, which must survive. Data, adapters and runs: test_malicious_data.py.
"""

import contextlib
import json
import os
import struct

import pytest
import torch
from backbones import make_config, save_backbone
from burnish.harness import models
from burnish.harness.config_io import load_config
from burnish.harness.errors import BurnishError, ConfigError
from burnish.harness.tasks import RowError, get_task
from payloads import CODE, copied, edited, torch_file, watched
from safetensors.torch import save_file
from tiny import make_tokenizer


@pytest.fixture
def canary(tmp_path, monkeypatch):
    with watched(tmp_path, monkeypatch) as path:
        yield path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_backbone("llama", tmp_path_factory.mktemp("malicious") / "llama")


def test_the_payloads_would_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
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
