"""The torch engine, in this process."""

import random

import pytest
import torch
from burnish.harness import checkpoint
from burnish.harness.engine import World
from burnish.harness.errors import ConfigError
from engine_cases import GLOBAL_MICRO_BATCHES, LR, loss_sum, make_model, micro_batch, new_engine, state_of, train_step


def steps(engine, first, last):
    return [train_step(engine, step, 0, 1) for step in range(first, last)]


def equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def test_fp32_training_equals_a_plain_torch_loop():
    engine, model = new_engine("full", optimizer__weight_decay=0.0), make_model("full")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(5):
        count = sum(2 * (micro_batch(step, cell).shape[1] - 1) for cell in range(GLOBAL_MICRO_BATCHES))
        total = sum(loss_sum(model, micro_batch(step, cell)) for cell in range(GLOBAL_MICRO_BATCHES)) / count
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = LR * (1 - step / 20)
        optimizer.step()
        assert train_step(engine, step, 0, 1) == (pytest.approx(total.item()), pytest.approx(norm.item()), False)


def test_bf16_training_keeps_fp32_masters_gradients_and_buffers():
    engine = new_engine("full", model__dtype="bf16")
    rotary = engine.model.model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32
    tokens = micro_batch(0, 0)
    engine.backward(loss_sum(engine.module, tokens), is_last=True)
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    assert {p.grad.dtype for p in engine.model.parameters()} == {torch.float32}
    engine.step(1e-6)
    masters = {name: value for name, value in state_of(engine).items() if name.startswith("param/")}
    assert {value.dtype for value in masters.values()} == {torch.float32}
    live = engine.trained_state()
    assert all(torch.equal(live[name.removeprefix("param/")], value.bfloat16()) for name, value in masters.items())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in masters.values())


def test_bf16_gradients_of_many_micro_batches_are_summed_in_fp32():
    """1 + 256 x 2^-9 = 1.5; a bf16 sum would stay at 1."""
    engine = new_engine("buffers", model__dtype="bf16")
    bias = engine.model.head.bias
    engine.backward(bias.sum(), is_last=False)
    for i in range(256):
        engine.backward(bias.sum() * 2**-9, is_last=i == 255)
    assert bias.grad.tolist() == [1.5] * len(bias)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "sgd", "rmsprop", "adafactor"])
def test_resumed_equals_uninterrupted_bit_for_bit_with_dropout(tmp_path, optimizer, dtype):
    changes = {"optimizer__name": optimizer, "model__dtype": dtype}
    kind = "full" if optimizer == "adamw_8bit" else "lora"
    whole = new_engine(kind, **changes)
    expected = steps(whole, 0, 8)
    stop = random.Random(optimizer + dtype).randint(1, 7)
    first = new_engine(kind, **changes)
    steps(first, 0, stop)
    path = checkpoint.save(
        tmp_path,
        stop,
        state=first.state(),
        trainer={},
        world=World(rank=0, local_rank=0, size=1, device="cpu"),
        barrier=first.barrier,
        keep=1,
    )
    second = new_engine(kind, **changes)
    second.load_state(checkpoint.load(path, 0)[0])
    assert equal(state_of(second), state_of(first))
    assert steps(second, stop, 8) == expected[stop:]
    assert equal(state_of(second), state_of(whole))


def test_a_state_from_before_the_first_step_can_be_loaded():
    first, second = new_engine("full"), new_engine("full")
    steps(second, 0, 2)
    second.load_state(state_of(first))
    assert steps(second, 0, 3) == steps(first, 0, 3)


def test_running_statistics_are_saved_and_restored():
    first, second = new_engine("buffers"), new_engine("buffers")
    steps(first, 0, 3)
    assert state_of(first)["buffer/norm.num_batches_tracked"] == 3 * GLOBAL_MICRO_BATCHES
    assert "norm.running_mean" in first.trained_state()
    second.load_state(state_of(first))
    assert equal(state_of(first), state_of(second))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_non_finite_gradient_skips_the_step_and_changes_nothing(dtype):
    engine = new_engine("full", model__dtype=dtype)
    steps(engine, 0, 1)
    before = state_of(engine)
    loss, norm, skipped = train_step(engine, 1, 0, 1, poison=True)
    assert skipped
    assert norm != norm
    assert loss != loss
    assert equal(state_of(engine), before)
    assert not train_step(engine, 1, 0, 1)[2]


def test_a_state_of_another_model_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"another model: .* the first is"):
        new_engine("full").load_state(state_of(new_engine("lora")))


def test_a_gradient_that_is_not_contiguous_is_applied_in_the_right_order():
    torch.manual_seed(0)
    engine = new_engine("buffers", optimizer__name="adamw", optimizer__weight_decay=0.0)
    weight = engine.model.head.weight
    scale = torch.randn(weight.shape[1], weight.shape[0])
    before = weight.detach().clone()
    engine.backward((weight.t() * scale).sum(), is_last=True)
    engine.step(0.1)
    assert torch.allclose(weight, before - 0.1 * scale.t().sign(), atol=1e-4)


def test_a_released_engine_holds_no_bytes():
    engine = new_engine("full", model__dtype="bf16")
    steps(engine, 0, 2)
    masters = list(engine.masters.masters.values())
    engine.release()
    assert sum(tensor.untyped_storage().nbytes() for tensor in [*engine.model.parameters(), *masters]) == 0
    assert not engine.masters.optimizer.state
    engine.close()
