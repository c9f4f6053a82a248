"""Random weights drawn one by one: the numbers are those of a model that is made at once, quantised or not."""

import pytest
import torch
from backbones import make_config
from burnish.harness import adapters, drawing, models, quantized
from test_loading import QUANTIZATIONS, assert_same, quantization_section, tensors_of
from transformers import AutoModelForCausalLM, LlamaConfig

INIT = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_random_weights_are_the_same_however_they_are_quantised(monkeypatch, quantization, dtype):
    monkeypatch.setattr(drawing, "MIN_ELEMENTS", 64)
    model = {"init": INIT, "dtype": dtype}
    dense = models.load_model(make_config("llama", None, model=model))
    torch.manual_seed(5)
    plain = AutoModelForCausalLM.from_config(LlamaConfig(**INIT), dtype=dense.dtype)
    assert_same(dense, plain)
    config = make_config("llama", None, model=model, **quantization_section(quantization))
    ready = models.load_model(config)
    changed = {name for name, module in ready.named_modules() if type(module).__name__.startswith("Linear")}
    linears = {
        name for name, module in ready.named_modules() if type(module).__name__ in ("Linear4bit", "Linear8bitLt")
    }
    assert len(linears) == 14
    assert changed - linears == {"lm_head"}
    for name, tensor in dense.state_dict().items():
        owner = name.removesuffix(".weight")
        if owner in linears:
            module = ready.get_submodule(owner)
            for part, expected in quantized.parts_of(module, tensor).items():
                assert torch.equal(tensors_of(ready)[part_name(name, part, quantization)], expected), (name, part)
        else:
            assert torch.equal(ready.state_dict()[name], tensor), name
    assert models.parameter_counts(adapters.adapt(ready, config)) == vars(models.count_parameters(config))


def part_name(weight, part, quantization):
    """Where `tensors_of` has a part of a quantised weight."""
    if part == "codes":
        return weight
    return f"{weight}.scb" if quantization["type"] == "int8" else f"{weight}.{part}"


@pytest.mark.parametrize(
    "read",
    [lambda weight: weight.mul_(weight.norm()), lambda weight: torch.nn.init.trunc_normal_(weight, std=0.1)],
    ids=["norm", "truncated"],
)
def test_a_model_that_reads_its_weights_while_it_is_made_is_made_in_full(monkeypatch, read):
    monkeypatch.setattr(drawing, "MIN_ELEMENTS", 4)

    def make():
        linear = torch.nn.Linear(8, 8)
        with torch.no_grad():
            read(linear.weight)
        return linear

    torch.manual_seed(3)
    expected = make()
    torch.manual_seed(3)
    made = drawing.outline(make)
    assert torch.equal(made.draw(made.model.weight), expected.weight)


def test_drawing_one_by_one_gives_what_drawing_all_gives(monkeypatch):
    monkeypatch.setattr(drawing, "MIN_ELEMENTS", 32)

    def make():
        module = torch.nn.Sequential(
            torch.nn.Embedding(9, 8, padding_idx=2), torch.nn.Linear(8, 7), torch.nn.Linear(7, 3)
        )
        torch.nn.init.xavier_normal_(module[1].weight)
        with torch.no_grad():
            module[1].weight[3:5].mul_(2)
        return module

    torch.manual_seed(3)
    expected = make().state_dict()
    after = torch.rand(3)
    torch.manual_seed(3)
    made = drawing.outline(make)
    assert torch.equal(torch.rand(3), after)
    assert made.model[0].weight.is_meta
    assert made.model[1].weight.is_meta
    assert not made.model[2].weight.is_meta
    for name, parameter in reversed(list(made.model.named_parameters())):
        assert torch.equal(made.draw(parameter), expected[name]), name
