"""Where saved tensors are kept: the gradients are the same bit for bit, and parameters stay where they are."""

import pytest
import torch
from burnish.harness.activations import Offloaded, apply_activation_policy, offload_activations
from burnish.harness.config import Config
from burnish.harness.errors import ConfigError
from burnish.harness.plan import Resources, make_plan
from engine_cases import VOCAB, loss_sum, make_config, make_model

IDS = torch.arange(32).reshape(2, 16) % VOCAB


def gradients(policy, *, offload):
    """Loss and gradients of a tiny Llama."""
    model = make_model("full")
    model.fused = {}
    apply_activation_policy(model, policy)
    if offload:
        offload_activations(model, min_bytes=0)
    loss = loss_sum(model, IDS)
    loss.backward()
    return float(loss.detach()), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_offloaded_activations_give_the_same_gradients_bit_for_bit(policy):
    loss, expected = gradients(policy, offload=False)
    found_loss, found = gradients(policy, offload=True)
    assert found_loss == loss
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Hooks(Offloaded):
    """Notes the memory of what is packed, and where it went."""

    def __enter__(self):
        super().__enter__()
        return self

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.kept, self.went = [], []

    def pack(self, tensor):
        packed = super().pack(tensor)
        (self.kept if packed is tensor else self.went).append((tensor.data_ptr(), packed))
        return packed


def test_what_is_saved_moves_to_other_memory_and_parameters_and_their_views_stay():
    layer, x = torch.nn.Linear(64, 64), torch.randn(8, 64, requires_grad=True)
    with Hooks(layer, min_bytes=0) as hooks:
        y = torch.relu(layer(x)) @ layer.weight
    assert {pointer for pointer, _ in hooks.kept} == {layer.weight.data_ptr()}
    assert all(host.data_ptr() != pointer for pointer, (_, host) in hooks.went)
    assert hooks.num_bytes == sum(host.nbytes for _, (_, host) in hooks.went) > 0
    y.sum().backward()


def test_small_tensors_stay():
    layer, x = torch.nn.Linear(64, 64), torch.randn(8, 64, requires_grad=True)
    with Hooks(layer, min_bytes=x.nbytes + 1) as hooks:
        layer(x)
    assert hooks.num_bytes == 0
    with Hooks(layer, min_bytes=x.nbytes) as hooks:
        layer(x)
    assert hooks.num_bytes == x.nbytes


def test_of_whole_checkpointed_layers_only_the_inputs_go():
    """The input of a layer is a hidden state [2, 16, 32] in fp32."""
    sizes = {}
    for policy in ("none", "full"):
        model = make_model("full")
        model.fused = {}
        apply_activation_policy(model, policy)
        with Hooks(model, min_bytes=2 * 16 * 32 * 4) as hooks:
            model.model(input_ids=IDS)
        sizes[policy] = [host.shape for _, (_, host) in hooks.went]
    assert len(sizes["full"]) < len(sizes["none"]) / 4
    assert set(sizes["full"]) == {torch.Size([2, 16, 32])}


def test_a_cpu_refuses_to_offload_to_itself():
    resources = Resources(device="cpu", num_devices=0, num_cpus=1, host_memory_bytes=2**30)
    for changes, key in (
        ({"memory__offload_activations": True}, "memory.offload_activations"),
        ({"optimizer__name": "adamw_8bit", "optimizer__paged": True}, "optimizer.paged"),
    ):
        config = make_config(**changes)
        assert isinstance(config, Config)
        with pytest.raises(ConfigError, match=key):
            make_plan(config, resources, run_dir="", cwd="")


def test_auto_is_off_on_a_cpu():
    resources = Resources(device="cpu", num_devices=0, num_cpus=1, host_memory_bytes=2**30)
    assert make_plan(make_config(), resources, run_dir="", cwd="").offload_activations is False
