"""Adapters: exactly what the config says is trained, and it is what PEFT would do."""

import pytest
import torch
from backbones import LABELS, make_config, save_backbone
from burnish.harness import adapters, models
from burnish.harness.errors import ConfigError
from burnish.harness.tasks import get_task
from peft import LoraConfig, get_peft_model

IDS = torch.arange(5, 17)[None]
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("backbones")
    return {kind: save_backbone(kind, root / kind) for kind in ("llama", "bert", "vit", "resnet", "bert_mlm")}


def adapted(kind, folder, **changes):
    config = make_config("bert" if kind == "bert_mlm" else kind, folder, **changes)
    labels = None if kind == "llama" else LABELS
    return adapters.adapt(models.load_model(config, labels=labels), config)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def refusal(kind, folder, **changes):
    with pytest.raises(ConfigError) as caught:
        adapted(kind, folder, **changes)
    return str(caught.value)


def test_all_linear_is_every_linear_layer_but_the_head(folders):
    found = {
        name.split(".lora_")[0].removeprefix("base_model.model.")
        for name in trained(adapted("llama", folders["llama"]))
    }
    model = models.load_model(make_config("llama", folders["llama"]))
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert found == linear - {"lm_head"}
    assert len(found) == 14


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_new_head_is_trained_whole_beside_the_adapters(folders, kind):
    model = adapted(kind, folders[kind])
    whole = {name for name in trained(model) if "lora_" not in name}
    assert whole == {f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")}
    assert not any("classifier.lora" in name for name in trained(model))


def test_a_pooler_that_the_checkpoint_lacks_is_trained_with_the_head(folders):
    names = trained(adapted("bert_mlm", folders["bert_mlm"]))
    assert any("pooler.dense.modules_to_save" in name for name in names)
    assert not any("pooler.dense.modules_to_save" in name for name in trained(adapted("bert", folders["bert"])))


def test_resnet_has_no_linear_layer_but_its_convolutions_can_carry_lora(folders):
    assert "convolution" in refusal("resnet", folders["resnet"])
    model = adapted("resnet", folders["resnet"], adapter__target_modules=["convolution"])
    assert any("convolution.lora_A" in name for name in trained(model))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_every_lora_option_gives_the_weights_and_logits_of_peft(folders, method):
    options = {
        "adapter": {
            "method": method, "rank": 4, "alpha": 8, "rslora": True, "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {r"layers\.1\..*v_proj": 3.0}, "target_modules": ["q_proj", r".*layers\.1\..*v_proj"],
        }
    }  # fmt: skip
    model = adapted("llama", folders["llama"], **options)
    base = models.load_model(make_config("llama", folders["llama"]))
    torch.manual_seed(5)
    targets = ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"]
    peft_config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, use_rslora=True, use_dora=method == "dora", target_modules=targets,
        rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\..*v_proj": 3.0},
    )  # fmt: skip
    theirs = get_peft_model(base, peft_config)
    ours, expected = model.state_dict(), theirs.state_dict()
    assert ours.keys() == expected.keys()
    for one in (model, theirs):
        torch.manual_seed(0)
        for name, parameter in one.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in theirs.state_dict().items())
    assert torch.equal(model.eval()(**TEXT).logits, theirs.eval()(**TEXT).logits)


def test_adapters_have_the_dtype_of_the_model(folders):
    model = adapted("llama", folders["llama"], model__dtype="bf16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_initial_adapter_depends_on_the_seed_alone(folders):
    torch.manual_seed(99)
    one = adapted("llama", folders["llama"]).state_dict()
    two = adapted("llama", folders["llama"]).state_dict()
    other = adapted("llama", folders["llama"], seed=6).state_dict()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert not all(torch.equal(value, other[name]) for name, value in one.items())


def test_freeze_trains_the_last_layers_the_head_and_the_patterns_only(folders):
    names = trained(adapted("bert", folders["bert"], adapter={"method": "freeze", "last_layers": 1}))
    assert names == {name for name in names if name.startswith(("bert.encoder.layer.1.", "classifier."))}
    assert "classifier.weight" in names
    assert len([name for name in names if ".layer.1." in name]) == 16
    only = adapted("bert", folders["bert"], adapter={"method": "freeze", "trainable": ["LayerNorm"], "head": False})
    assert trained(only) == {name for name, _ in only.named_parameters() if "LayerNorm" in name}


def test_freeze_finds_the_stages_of_a_convolutional_network(folders):
    names = trained(adapted("resnet", folders["resnet"], adapter={"method": "freeze", "last_layers": 1, "head": False}))
    assert names
    assert all(name.startswith("resnet.encoder.stages.1.") for name in names)


def test_the_head_of_a_tied_language_model_is_its_embedding(folders):
    model = adapted("llama", folders["llama"], adapter={"method": "freeze"})
    assert trained(model) == {"model.embed_tokens.weight"}


def test_frozen_batch_norms_keep_their_statistics_and_trained_ones_move(folders):
    model = adapted("resnet", folders["resnet"], adapter={"method": "freeze", "last_layers": 1}).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(pixel_values=torch.randn(4, 1, 8, 8))
    moved = {name for name, value in model.named_buffers() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("resnet.encoder.stages.1.") for name in moved)


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ({"method": "lora", "target_modules": ["q_pro"]}, "q_proj"),
        ({"method": "lora", "rank_pattern": {"qproj": 2}}, "q_proj"),
        ({"method": "lora", "modules_to_save": ["lm_hea"]}, "lm_head"),
        ({"method": "lora", "modules_to_save": ["embed_tokens"]}, "shares its weights"),
        ({"method": "freeze", "trainable": ["embed_token_"]}, "embed_tokens"),
        ({"method": "freeze", "last_layers": 9}, "2 layers"),
        ({"method": "lora", "target_modules": ["norm"]}, "target_modules"),
    ],
)
def test_a_pattern_that_fits_nothing_names_what_is_there(folders, adapter, expected):
    assert expected in refusal("llama", folders["llama"], adapter=adapter)


@pytest.mark.parametrize("quantization", [{"type": "nf4"}, {"type": "nf4", "double_quant": False}, {"type": "int8"}])
def test_qlora_trains_finite_adapters_over_an_unchanged_base(folders, quantization):
    config = make_config("llama", folders["llama"], quantization=quantization, adapter__method="qlora")
    model = adapters.adapt(models.load_model(config), config).train()
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    plain = models.load_model(make_config("llama", folders["llama"]))
    batch = TEXT | {"loss_mask": IDS > 8}
    loss = get_task("causal_lm").loss(model, batch, config)
    assert loss.item() == pytest.approx(get_task("causal_lm").loss(plain, batch, config).item(), rel=0.05)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert any(p.grad.any() for p in model.parameters() if p.requires_grad)
    optimizer.step()
    assert get_task("causal_lm").loss(model, batch, config) < loss
    model.eval()(**TEXT)  # eval mode repacks weights on some CPUs unless it is told not to
    assert all(torch.equal(value, frozen[name]) for name, value in model.named_parameters() if name in frozen)


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("type", ["nf4", "int8"])
def test_the_counts_of_a_quantised_base_are_known_before_it_is_loaded(folders, kind, type):
    config = make_config(kind, folders[kind], quantization={"type": type}, adapter__method="qlora")
    labels = None if kind == "llama" else LABELS
    model = adapters.adapt(models.load_model(config, labels=labels), config)
    counts = models.count_parameters(config, labels)
    assert vars(counts) == models.parameter_counts(model)
    assert counts.quantized > 0


def test_no_head_is_quantised(folders):
    config = make_config("bert", folders["bert"], quantization={"type": "nf4"}, adapter__method="qlora")
    model = models.load_model(config, labels=LABELS)
    assert type(model.classifier) is torch.nn.Linear
    assert type(model.bert.pooler.dense) is torch.nn.Linear
    assert type(model.bert.encoder.layer[0].attention.self.query).__name__ == "Linear4bit"
