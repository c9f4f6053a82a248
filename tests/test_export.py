"""Results: what is saved reloads to what was trained, and anyone's tools can read it."""

import json

import pytest
import torch
from backbones import LABELS, make_config, plan_of, randomise_trained, save_backbone
from burnish.harness import export, models
from burnish.harness.errors import ConfigError, TrainingError
from burnish.harness.run_dir import RunDir
from burnish.harness.tasks import get_task
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

IDS = torch.arange(5, 17)[None]
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 64).view(1, 1, 8, 8)}


def finished_run(kind, folder, base=None, **changes):
    """A run directory whose trained weights were moved by hand; returns it with the live model."""
    config = make_config(kind, base or save_backbone(kind, folder / "base"), **changes)
    labels = None if kind == "llama" else LABELS
    run = RunDir.create(folder / "run", mode="new")
    plan = plan_of(config, run.path)
    run.write_json(run.plan_json, plan.to_dict())
    model = models.build(plan, labels)
    state = randomise_trained(model)
    path = export.save_final(plan, model, state, labels)
    return plan, run, path, model.eval(), labels


@torch.no_grad()
def logits(model, inputs=TEXT):
    return model.eval()(**inputs).logits


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_loads_the_adapter_and_gives_the_same_logits(tmp_path, method):
    _, run, path, live, _ = finished_run("llama", tmp_path, adapter__method=method)
    result = export.export_run(run.path, "adapter", tmp_path / "out")
    assert result["max_logit_difference"] == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "out")), logits(live))
    torch.testing.assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")), logits(live))
    names = load_file(path / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.") and ".default" not in name for name in names)


def test_an_adapter_folder_has_everything_to_use_it_elsewhere(tmp_path):
    plan, _, path, _, _ = finished_run("llama", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.chat_template
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["inference_mode"] is True
    card = (path / "README.md").read_text()
    assert "library_name: peft" in card
    assert f"base_model: {tmp_path / 'base'}" in card
    assert export.config_hash(plan.config) in card


@pytest.mark.parametrize(
    ("kind", "changes", "inputs", "auto"),
    [
        ("llama", {}, TEXT, AutoModelForCausalLM),
        ("llama", {"adapter__method": "dora"}, TEXT, AutoModelForCausalLM),
        ("llama", {"model__dtype": "bf16"}, TEXT, AutoModelForCausalLM),
        ("bert", {}, TEXT, AutoModelForSequenceClassification),
        ("vit", {}, PIXELS, AutoModelForImageClassification),
        ("resnet", {"adapter__target_modules": ["convolution"]}, PIXELS, AutoModelForImageClassification),
    ],
)
def test_a_merged_checkpoint_loads_without_peft_and_equals_the_adapter(tmp_path, kind, changes, inputs, auto):
    _, run, _, live, labels = finished_run(kind, tmp_path, **changes)
    result = export.export_run(run.path, "merged", tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    merged = auto.from_pretrained(tmp_path / "out")
    is_bf16 = "model__dtype" in changes
    if is_bf16:
        assert merged.dtype == torch.bfloat16
    inputs = {k: v.to(merged.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    assert torch.allclose(logits(merged, inputs), logits(live, inputs), atol=0.2 if is_bf16 else 1e-5)
    assert (result["max_logit_difference"] < 1e-4) or is_bf16
    if labels:
        assert merged.config.id2label == dict(enumerate(labels))
    assert "library_name: transformers" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("type", ["nf4", "int8"])
def test_qlora_is_merged_into_the_dequantised_base(tmp_path, type):
    _, run, _, live, _ = finished_run("llama", tmp_path, quantization={"type": type}, adapter__method="qlora")
    result = export.export_run(run.path, "merged", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(merged.config, "quantization_config")
    assert result["max_logit_difference"] < 0.02 * result["max_logit"]
    assert torch.allclose(logits(merged), logits(live), atol=0.02 * result["max_logit"])


@pytest.mark.parametrize(
    ("kind", "changes", "inputs"),
    [
        ("llama", {"adapter": {"method": "full"}}, TEXT),
        ("llama", {"adapter": {"method": "freeze", "last_layers": 1}}, TEXT),
        ("bert", {"adapter": {"method": "full"}}, TEXT),
        ("resnet", {"adapter": {"method": "full"}}, PIXELS),
        ("vit", {"adapter": {"method": "freeze", "last_layers": 1}}, PIXELS),
        ("llama", {"quantization": {"type": "nf4"}, "adapter__method": "qlora"}, TEXT),
        ("bert", {}, TEXT),
    ],
)
def test_reloaded_equals_live_for_every_method(tmp_path, kind, changes, inputs):
    plan, run, path, live, labels = finished_run(kind, tmp_path, **changes)
    loaded = export.load_run(run.path)
    assert torch.equal(logits(loaded.model, inputs), logits(live, inputs))
    assert loaded.labels == labels
    batch = inputs | ({"loss_mask": IDS > 8} if kind == "llama" else {"labels": torch.tensor([1])})
    task = get_task(plan.config.task.type)
    sums = task.evaluate(live, batch, plan.config)
    live_loss = task.summarise(sums)["loss"]
    assert export.prove(plan, path, batch, live_loss, labels=labels)["difference"] == 0
    with pytest.raises(TrainingError, match="reloads to loss"):
        export.prove(plan, path, batch, live_loss + 1, labels=labels)


def test_the_whole_model_is_saved_from_the_trained_tensors_without_a_copy_of_them(tmp_path):
    config = make_config("llama", save_backbone("llama", tmp_path / "base"), adapter={"method": "full"})
    state = randomise_trained(models.build(plan_of(config, tmp_path / "run")))
    model = export._whole_model(config, state, None)
    assert all(param.data_ptr() == state[name].data_ptr() for name, param in model.named_parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_batch_norm_statistics_are_part_of_the_result(tmp_path):
    config = make_config("resnet", save_backbone("resnet", tmp_path / "base"), adapter={"method": "full"})
    plan = plan_of(config, tmp_path / "run")
    model = models.build(plan, LABELS)
    model(pixel_values=torch.randn(8, 1, 8, 8))
    state = {n: t.detach().clone() for n, t in model.state_dict().items() if t.is_floating_point()}
    path = export.save_final(plan, model, state, LABELS)
    reloaded = export.load_result(config, path, labels=LABELS)
    assert torch.equal(logits(reloaded, PIXELS), logits(model, PIXELS))


def test_weights_that_are_empty_missing_or_not_finite_are_never_saved(tmp_path):
    config = make_config("llama", save_backbone("llama", tmp_path / "base"))
    plan = plan_of(config, tmp_path / "run")
    model = models.build(plan)
    state = randomise_trained(model)
    name = next(iter(state))
    for wrong in (torch.empty(0), torch.full_like(state[name], float("nan")), None):
        broken = {k: v for k, v in (state | {name: wrong}).items() if v is not None}
        with pytest.raises(TrainingError):
            export.save_final(plan, model, broken, None)
    assert list((tmp_path / "run").iterdir()) == []


def test_an_adapter_on_another_base_is_refused(tmp_path):
    _, run, _, _, _ = finished_run("llama", tmp_path)
    save_backbone("llama", tmp_path / "base", rms_norm_eps=1e-6, initializer_range=0.5)
    with pytest.raises(ConfigError, match="is not the base model"):
        export.load_run(run.path)


def test_a_pickled_adapter_is_never_loaded(tmp_path):
    plan, _, path, _, _ = finished_run("llama", tmp_path)
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(ConfigError, match="never loaded"):
        export.load_result(plan.config, path, labels=None)


def test_a_wrong_export_request_is_one_sentence_and_leaves_nothing(tmp_path):
    _, run, _, _, _ = finished_run("llama", tmp_path, adapter={"method": "full"})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for format, out, expected in (
        ("adapter", "out", "--format merged"),
        ("gguf", "out", "adapter, merged"),
        ("merged", "full", "not empty"),
    ):
        with pytest.raises(ConfigError, match=expected):
            export.export_run(run.path, format, tmp_path / out)
    assert not (tmp_path / "out").exists()
    assert export.export_run(run.path, "merged", tmp_path / "out")["max_logit_difference"] == 0
    assert not list(tmp_path.glob(".out*"))


def test_a_model_made_by_init_and_fine_tuned_from_its_folder_keeps_labels_and_images(tmp_path):
    _, run, path, live, _ = finished_run("vit", tmp_path, adapter={"method": "full"})
    again = make_config("vit", path)
    processor = models.load_processor(again)
    assert (processor.image_size, processor.num_channels, processor.mean) == (8, 1, (0.5,))
    torch.testing.assert_close(logits(models.load_model(again, labels=LABELS), PIXELS), logits(live, PIXELS))
    assert run.trained_folder() == path
