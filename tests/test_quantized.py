"""Embeddings and heads in NF4: what they compute, where they are refused, and that they train, fuse and export."""

import pytest
import torch
from backbones import LABELS, make_config, plan_of, save_backbone
from burnish.harness import adapters, export, models, quantized
from burnish.harness.errors import ConfigError
from burnish.harness.tasks import get_task
from burnish.kernels.nf4_dequant import Nf4Weight, nf4_dequant
from test_export import finished_run, logits
from transformers import AutoModelForCausalLM

IDS = torch.arange(5, 17)[None]
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "loss_mask": IDS > 8}
NF4 = {"type": "nf4", "embeddings": True}
UNTIED = {"tie_word_embeddings": False, "hidden_size": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_backbone("llama", tmp_path_factory.mktemp("untied"), **UNTIED)


def config_of(folder, kind="llama", quantization=NF4, **changes):
    return make_config(kind, folder, quantization=quantization, adapter__method="qlora", **changes)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("hidden_size", [64, 128, 40])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_embedding_in_nf4_looks_up_the_rows_of_its_dequantised_matrix(tmp_path, double_quant, hidden_size, dtype):
    folder = save_backbone("llama", tmp_path, tie_word_embeddings=False, hidden_size=hidden_size)
    model = models.load_model(config_of(folder, quantization=NF4 | {"double_quant": double_quant}, model__dtype=dtype))
    table = model.get_input_embeddings()
    assert type(table) is quantized.Nf4Embedding
    whole = nf4_dequant(Nf4Weight.from_quant_state(table.weight, table.weight.quant_state))
    dense = models.load_model(make_config("llama", folder, model__dtype=dtype)).get_input_embeddings().weight
    assert whole.shape == dense.shape
    assert whole.dtype == dense.dtype
    assert (whole - dense).abs().max() < 0.2 * dense.abs().max()
    ids = torch.tensor([[0, table.num_embeddings - 1, 7], [7, 255, 256]])
    assert torch.equal(table(ids), whole[ids])
    assert table(ids[:0]).shape == (0, 3, hidden_size)


def test_the_counts_are_known_before_anything_is_loaded(folder):
    config = config_of(folder)
    counts, model = models.count_parameters(config), models.load_model(config)
    num_rows = model.get_input_embeddings().num_embeddings
    assert vars(counts) == models.parameter_counts(adapters.adapt(model, config))
    plain = models.count_parameters(config_of(folder, quantization={"type": "nf4"}))
    assert counts.quantized - plain.quantized == 2 * num_rows * 64
    assert counts.total == plain.total


@pytest.mark.parametrize("kernels", [True, False])
def test_a_model_with_quantised_embeddings_trains_as_its_dequantised_self(folder, tmp_path, kernels):
    config = config_of(folder, kernels__enabled=kernels)
    model = models.build(plan_of(config, tmp_path))
    assert bool(getattr(model.get_base_model(), "fused", {}).get("loss")) == kernels
    dense = quantized.dequantized(models.load_model(config), torch.float32)
    assert type(dense.get_input_embeddings()) is torch.nn.Embedding
    plain = make_config("llama", folder, kernels__enabled=False)
    expected = adapters.adapt(dense, plain).train()
    losses = [get_task("causal_lm").loss(one, BATCH, config) for one in (model, expected)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    grads = []
    for one, loss in zip((model, expected), losses, strict=True):
        loss.backward()
        grads.append({name: p.grad for name, p in one.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6)


def test_a_classifier_keeps_its_head(tmp_path):
    folder = save_backbone("bert", tmp_path, hidden_size=64)
    config = config_of(folder, kind="bert")
    model = adapters.adapt(models.load_model(config, labels=LABELS), config)
    assert type(model.get_input_embeddings()) is quantized.Nf4Embedding
    assert any("classifier" in name for name, p in model.named_parameters() if p.requires_grad)
    assert vars(models.count_parameters(config, LABELS)) == models.parameter_counts(model)


def test_random_embeddings_are_quantised_too():
    fields = {"model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96}
    fields |= {"num_hidden_layers": 1, "num_attention_heads": 4, "tie_word_embeddings": False, "pad_token_id": 0}
    model = models.load_model(config_of(None, model={"init": fields, "dtype": "bf16"}))
    dense = models.load_model(make_config("llama", None, model={"init": fields, "dtype": "bf16"}))
    for name in ("model.embed_tokens", "lm_head"):
        module = model.get_submodule(name)
        parts = quantized.parts_of(module, dense.get_submodule(name).weight)
        assert torch.equal(module.weight, parts["codes"])


def test_what_cannot_be_quantised_is_refused_in_a_sentence(folder, tmp_path):
    tied = save_backbone("llama", tmp_path / "tied")
    vit = save_backbone("vit", tmp_path / "vit")
    for config, expected in (
        (config_of(tied), "one matrix"),
        (config_of(vit, kind="vit"), "no embedding of tokens"),
    ):
        for call in (models.load_model, models.count_parameters):
            with pytest.raises(ConfigError, match=rf"^quantization\.embeddings: .*{expected}.*leave it out$"):
                call(config, labels=None if config.task.type == "causal_lm" else LABELS)
    trained = config_of(folder, adapter__modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match="lm_head is quantised"):
        adapters.adapt(models.load_model(trained), trained)


def test_an_adapter_on_quantised_embeddings_is_saved_reloaded_and_merged(tmp_path):
    base = save_backbone("llama", tmp_path / "base", **UNTIED)
    changes = {"quantization": NF4, "adapter__method": "qlora"}
    plan, run, path, live, _ = finished_run("llama", tmp_path, base=base, **changes)
    reloaded = export.load_result(plan.config, path, labels=None)
    assert torch.equal(logits(reloaded), logits(live))
    result = export.export_run(run.path, "merged", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(parameter.is_floating_point() for parameter in merged.parameters())
    assert torch.allclose(logits(merged), logits(live), atol=0.02 * result["max_logit"])
