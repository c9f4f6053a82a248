"""Causal language models: the loss does not depend on padding, packing or where the head runs."""

import inspect

import numpy as np
import pytest
import torch
from backbones import make_config, save_backbone
from burnish.harness import models
from burnish.harness.errors import ConfigError
from burnish.harness.evaluate import evaluate
from burnish.harness.generate import generate
from burnish.harness.tasks import common, get_task
from torch.nn.functional import cross_entropy

TASK = get_task("causal_lm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_backbone("llama", tmp_path_factory.mktemp("llama"))


def load(folder, **changes):
    config = make_config("llama", folder, **changes)
    return config, models.load_model(config), TASK.load_processor(config)


def make_examples(num=4, seed=0):
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(num):
        size = int(rng.integers(3, 12))
        mask = rng.integers(0, 2, size).astype(np.uint8)
        mask[0], mask[-1] = 0, 1
        examples.append({"input_ids": rng.integers(5, 300, size).astype(np.int32), "loss_mask": mask})
    return examples


def loss_and_grads(model, batch, config):
    model.zero_grad()
    loss = TASK.loss(model, batch, config)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(one, other, tolerance=1e-5):
    assert torch.allclose(one[0], other[0], rtol=tolerance)
    for name, grad in one[1].items():
        assert torch.allclose(grad, other[1][name], atol=tolerance, rtol=1e-4), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_give_the_loss_and_gradients_of_padded_rows_and_of_single_rows(folder, attention):
    config, model, tokenizer = load(folder, model__attn_implementation=attention)
    packed_config = make_config("llama", folder, data__packing=True)
    examples = make_examples()
    padded = loss_and_grads(model, TASK.collate(examples, tokenizer, config), config)
    packed = loss_and_grads(model, TASK.collate(examples, tokenizer, packed_config), packed_config)
    model.zero_grad()
    singles = sum(TASK.loss(model, TASK.collate([e], tokenizer, config), config) for e in examples)
    singles.backward()
    alone = singles.detach(), {name: p.grad for name, p in model.named_parameters()}
    assert_same(packed, padded)
    assert_same(packed, alone)


def test_the_logits_of_a_packed_row_are_those_of_its_examples(folder):
    config, model, tokenizer = load(folder, data__packing=True)
    examples = make_examples()
    batch = TASK.collate(examples, tokenizer, config)
    packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
    alone = [model(input_ids=torch.from_numpy(e["input_ids"].astype(np.int64))[None]).logits[0] for e in examples]
    alone = torch.cat(alone)
    assert len(packed) == 128, "filled up to a round width"
    assert torch.allclose(packed[: len(alone)], alone, atol=1e-5)


def test_running_the_head_on_supervised_columns_only_changes_nothing(folder, monkeypatch):
    config, model, tokenizer = load(folder)
    batch = TASK.collate(make_examples(), tokenizer, config)
    kept = loss_and_grads(model, batch, config)
    monkeypatch.setattr("burnish.harness.tasks.causal_lm.accepts", lambda model, name: name != "logits_to_keep")
    assert "logits_to_keep" in inspect.signature(model.forward).parameters
    assert_same(kept, loss_and_grads(model, batch, config))


def test_the_loss_is_the_plain_sum_over_supervised_tokens(folder):
    config, model, tokenizer = load(folder)
    example = make_examples(1)[0]
    ids = torch.from_numpy(example["input_ids"].astype(np.int64))
    targets = torch.where(torch.from_numpy(example["loss_mask"]).bool(), ids, common.IGNORE)[1:]
    expected = cross_entropy(model(input_ids=ids[None]).logits[0, :-1], targets, reduction="sum")
    batch = TASK.collate([example], tokenizer, config)
    assert torch.allclose(TASK.loss(model, batch, config), expected)
    assert TASK.num_supervised(example) == int((targets != common.IGNORE).sum())


def test_padding_to_a_width_changes_nothing(folder):
    config, model, tokenizer = load(folder)
    examples = make_examples()
    narrow, wide = (TASK.collate(examples, tokenizer, config, width) for width in (None, 32))
    assert wide["input_ids"].shape[1] == 32
    assert torch.allclose(TASK.loss(model, narrow, config), TASK.loss(model, wide, config), rtol=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_ignored_examples_give_a_zero_loss_with_zero_gradients(folder, packing):
    config, model, tokenizer = load(folder, data__packing=packing)
    batch = TASK.collate([TASK.ignore(e) for e in make_examples()], tokenizer, config)
    loss, grads = loss_and_grads(model, batch, config)
    assert loss == 0
    assert all(not grad.any() for grad in grads.values())


def test_an_example_of_one_token_has_no_target(folder):
    config, model, tokenizer = load(folder)
    batch = TASK.collate(
        [{"input_ids": np.array([7], np.int32), "loss_mask": np.array([0], np.uint8)}], tokenizer, config
    )
    assert TASK.loss(model, batch, config) == 0


def test_label_smoothing_is_that_of_torch_and_is_not_in_the_evaluation(folder):
    config, model, tokenizer = load(folder, task__label_smoothing=0.1)
    plain = make_config("llama", folder)
    batch = TASK.collate(make_examples(), tokenizer, config)
    logits, targets = (t for t in get_logits(model, batch))
    expected = cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1)
    assert torch.allclose(TASK.loss(model, batch, config), expected)
    assert TASK.evaluate(model, batch, config)["loss_sum"].item() == pytest.approx(
        TASK.loss(model, batch, plain).item()
    )


def get_logits(model, batch):
    from burnish.harness.tasks.causal_lm import supervised_logits

    return supervised_logits(model, batch)


def test_neftune_noise_has_the_papers_size_and_is_for_training_only(folder):
    config, model, tokenizer = load(folder, task__neftune_alpha=5.0)
    example = make_examples(1)[0]
    batch = TASK.collate([example], tokenizer, config)
    quiet = model.eval() and TASK.loss(model, batch, config)
    assert torch.equal(quiet, TASK.loss(model, batch, make_config("llama", folder)))
    clean, seen = model.get_input_embeddings()(batch["input_ids"]), []
    with common.neftune(model.train(), alpha=5.0, lengths=batch["attention_mask"].sum(1, keepdim=True)):
        seen.append(model.get_input_embeddings()(batch["input_ids"]))
    bound = 5.0 / (len(example["input_ids"]) * 32) ** 0.5
    noise = (seen[0] - clean).abs().max().item()
    assert 0.7 * bound < noise <= bound
    assert torch.equal(model.get_input_embeddings()(batch["input_ids"]), clean)
    torch.manual_seed(0)
    first = TASK.loss(model, batch, config)
    torch.manual_seed(0)
    assert torch.equal(first, TASK.loss(model, batch, config))


def test_evaluation_gives_loss_perplexity_and_token_accuracy_of_all_batches(folder):
    config, model, tokenizer = load(folder)
    examples = make_examples(6)
    one = evaluate(model, [TASK.collate(examples, tokenizer, config)], TASK, config)
    two = evaluate(
        model, [TASK.collate(part, tokenizer, config) for part in (examples[:1], examples[1:])], TASK, config
    )
    assert one == pytest.approx(two, rel=1e-5)
    assert one["perplexity"] == pytest.approx(np.exp(one["loss"]))
    assert set(one) == {"loss", "perplexity", "token_accuracy"}


def test_packing_is_refused_where_state_leaks_from_one_example_to_the_next(folder):
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    with pytest.raises(ConfigError, match=r"data\.packing"):
        models.check_packing(mamba)
    models.check_packing(load(folder)[1])


def test_packing_is_refused_in_a_hybrid_that_takes_position_ids_but_keeps_a_state():
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    with pytest.raises(ConfigError, match="see each other"):
        models.check_packing(Qwen3NextForCausalLM(config).eval())


def test_answers_stop_at_the_end_token_and_do_not_depend_on_the_global_random_state(folder):
    config, model, tokenizer = load(folder, generation__temperature=1.0, generation__max_new_tokens=8)
    prompts = ["say red cat", [{"role": "user", "content": "say red cat"}]]
    torch.manual_seed(1)
    first = generate(model, tokenizer, TASK, prompts, config)
    torch.manual_seed(2)
    assert generate(model, tokenizer, TASK, prompts, config) == first
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    greedy = make_config("llama", folder)
    model.generation_config.eos_token_id = 0  # greedy over equal logits picks token 0
    assert generate(model, tokenizer, TASK, prompts[:1], greedy) == [""]
