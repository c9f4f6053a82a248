import pytest
import torch
from burnish.harness.config import Config
from burnish.harness.optimizers import OPTIMIZERS, make_optimizer
from burnish.kernels import native
from burnish.kernels.adapter_adamw import AdapterAdamW
from engine_cases import make_config


def config_with(name: str, **options: object) -> Config:
    fields = make_config().model_dump(mode="json") | {"optimizer": {"name": name, "learning_rate": 1e-2} | options}
    return Config.model_validate(fields)


def fit(name: str, steps: int = 60) -> tuple[list[float], torch.optim.Optimizer]:
    """Losses of a linear regression in 64 x 128 weights and a bias."""
    torch.manual_seed(0)
    model = torch.nn.Linear(128, 64)
    inputs, targets = torch.randn(256, 128), torch.randn(256, 128) @ torch.randn(128, 64) / 10
    optimizer = make_optimizer(config_with(name), model.named_parameters())
    losses = []
    for _ in range(steps):
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(name):
    losses, _ = fit(name)
    assert losses[-1] < 0.98 * losses[0]


def test_8_bit_adamw_keeps_uint8_moments_and_follows_fp32_adamw():
    exact, _ = fit("adamw")
    found, optimizer = fit("adamw_8bit")
    assert found == pytest.approx(exact, rel=0.02)
    state = next(iter(optimizer.state.values()))
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8


def test_adamw_is_the_same_with_and_without_a_compiler(monkeypatch):
    if native.library() is None:
        pytest.skip("no C++ compiler")
    found, optimizer = fit("adamw", steps=10)
    monkeypatch.setattr(native, "library", lambda: None)
    expected, plain = fit("adamw", steps=10)
    assert type(plain) is torch.optim.AdamW
    assert type(optimizer) is AdapterAdamW
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_spares_vectors_and_frozen_parameters_are_left_out(name):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4))
    model[2].requires_grad_(False)
    optimizer = make_optimizer(config_with(name, weight_decay=0.3), model.named_parameters())
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[id(model[0].weight)] == 0.3
    assert {decay[id(p)] for p in (model[0].bias, model[1].weight, model[1].bias)} == {0.0}
    assert len(decay) == 4


def test_every_optimizer_of_the_schema_is_in_the_table():
    names = {option["properties"]["name"]["const"] for option in _schema_options()}
    assert names == set(OPTIMIZERS)


def _schema_options() -> list[dict]:
    schema = Config.model_json_schema()
    return [schema["$defs"][ref["$ref"].rsplit("/", 1)[1]] for ref in schema["properties"]["optimizer"]["oneOf"]]
