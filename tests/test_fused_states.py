"""A fused model in the states a user can bring it into: other adapters, merged, compiled, autocast, generating."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from burnish.harness import fuse
from burnish.harness.models import apply_activation_policy
from burnish.harness.tasks.common import unwrap
from fusion_cases import FAMILIES, batch_of, loss_sum, make_config, make_model
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture
def pair():
    """The same tiny Llama with adapters, fused and not, in eval mode."""
    return [make_model("llama", make_config("llama", "lora", enabled=enabled)).eval() for enabled in (True, False)]


@torch.no_grad()
def logits(model, family="llama"):
    return model(**batch_of(family, 0)[0]).logits


def assert_equal(pair):
    torch.testing.assert_close(logits(pair[0]), logits(pair[1]), rtol=1e-4, atol=1e-5)


def add_second_adapter(model):
    torch.manual_seed(5)
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "v_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)


def test_without_its_adapter_the_model_is_the_base_model(pair):
    with_adapter = logits(pair[0])
    with pair[0].disable_adapter(), pair[1].disable_adapter():
        assert_equal(pair)
        assert not torch.allclose(logits(pair[0]), with_adapter)
    assert_equal(pair)


def test_another_adapter_can_be_added_chosen_and_joined(pair):
    for model in pair:
        add_second_adapter(model)
    first = logits(pair[0])
    for names in ("other", ["default", "other"], "default"):
        for model in pair:
            model.base_model.set_adapter(names)
        assert_equal(pair)
    torch.testing.assert_close(logits(pair[0]), first)


def test_merging_and_unmerging_in_place(pair):
    before = logits(pair[0])
    pair[0].merge_adapter()
    torch.testing.assert_close(logits(pair[0]), before, rtol=1e-4, atol=1e-5)
    pair[0].unmerge_adapter()
    torch.testing.assert_close(logits(pair[0]), before, rtol=1e-4, atol=1e-5)
    merged = pair[0].merge_and_unload()
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "t5"])
def test_generated_tokens_are_the_same(family):
    models = [make_model(family, make_config(family, "lora", enabled=on)).eval() for on in (True, False)]
    inputs = batch_of(family, 0)[0] | {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    inputs.pop("decoder_input_ids", None)
    assert torch.equal(*[model.generate(**inputs) for model in models])


def gradients(model, family="llama"):
    model.zero_grad()
    torch.manual_seed(0)
    loss, count = loss_sum(model, family, 0, slice(None))
    (loss / count).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_compiled_model_has_the_same_gradients():
    model = make_model("llama", make_config("llama", "lora"))
    expected = gradients(model)
    found = gradients(torch.compile(model, backend="eager"))
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[f"_orig_mod.{name}"] if f"_orig_mod.{name}" in found else found[name], gradient
        )


def test_autocast_is_pefts_autocast_up_to_rounding(pair):
    exact = logits(pair[0])
    with torch.autocast("cpu", torch.bfloat16):
        fused, unfused = logits(pair[0]).float(), logits(pair[1]).float()
    assert not torch.equal(fused, exact)
    assert (fused - exact).norm() <= 2 * (unfused - exact).norm()


@contextmanager
def saved_bytes():
    """Counts the distinct memory that autograd keeps for backward."""
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("family", FAMILIES)
def test_less_is_kept_for_backward(family):
    kept = []
    for enabled in (True, False):
        model = make_model(family, make_config(family, "lora", p=0.1, enabled=enabled))
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        with saved_bytes() as found:
            loss_sum(model, family, 0, slice(None))
        kept.append(sum(size for place, size in found.items() if place not in weights))
    assert kept[0] < 0.75 * kept[1]


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in ("mm", "addmm", "bmm")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("enabled", [True, False])
def test_the_selective_policy_repeats_no_matrix_product(enabled):
    counts = {}
    for policy in ("none", "selective", "full"):
        model = make_model("llama", make_config("llama", "lora", enabled=enabled))
        apply_activation_policy(model, policy)
        with Products() as products:
            gradients(model)
        counts[policy] = products.count
    assert counts["selective"] == counts["none"] < counts["full"]


def test_a_fusion_that_changes_the_output_is_undone(monkeypatch):
    model = make_model("llama", make_config("llama", "lora", enabled=False))
    classes = [type(module) for module in model.modules()]
    answers = iter([False])
    real = fuse.is_close
    monkeypatch.setattr(fuse, "outputs_of", lambda *_: torch.randn(3))
    monkeypatch.setattr(fuse, "is_close", lambda a, b, **k: real(a, b, **k) if a.shape != (3,) else next(answers))
    assert fuse.fuse(model).linears == 0
    assert [type(module) for module in model.modules()] == classes
    assert unwrap(model).training


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
sys.path.insert(0, sys.argv[1])
from fusion_cases import make_config, train, make_model
from burnish.harness.errors import ConfigError
from burnish.harness.config_hardware import Kernels
config = make_config("llama", "lora")
try:
    make_model("llama", config)
except ConfigError as error:
    print(error)
config = config.model_copy(update={"kernels": Kernels(enabled="auto")})
print(make_model("llama", config).get_base_model().fused)
print(len(train("llama", "lora", enabled=False, steps=2)))
"""


def test_without_triton_models_run_as_they_are():
    command = [sys.executable, "-c", WITHOUT_TRITON, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, fused, steps = done.stdout.strip().splitlines()[-3:]
    assert "Triton is not installed" in refused
    assert (fused, steps) == ("{}", "2")


def test_a_trained_bf16_model_is_fused_when_it_is_loaded_again():
    """Its logits differ by the rounding of all its layers, which must not look like another computation."""
    model = make_model("llama", make_config("llama", "lora", enabled=False)).to(torch.bfloat16)
    assert fuse.fuse(model).linears == 14
