"""Attention: models on the CPU's kernel give the numbers they give on transformers' attention, whatever the mask."""

from copy import deepcopy

import pytest
import torch
from burnish.harness import attention as glue
from burnish.kernels import native
from burnish.kernels.attention import allowed_keys, attention, causal_ranges
from burnish.kernels.columns import are_adjacent, joined, split_columns
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen3Config,
    T5Config,
    ViTConfig,
)
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    find_packed_sequence_indices,
    packed_sequence_compatibility_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0}
GROUPED = SIZES | {"num_key_value_heads": 2}
WINDOW = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
DECODERS = {
    "llama": LlamaConfig(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "mistral": MistralConfig(**GROUPED, sliding_window=7),
    "gemma2": Gemma2Config(**GROUPED, head_dim=8, attn_logit_softcapping=5.0, **WINDOW),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=8, **WINDOW),
    "phi": PhiConfig(**SIZES, attention_dropout=0.0, resid_pdrop=0.0),
    "gpt2": GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, pad_token_id=0, **dict.fromkeys(["resid_pdrop"], 0.0)
    ),
}
BERT = BertConfig(**SIZES)
VIT = ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=12, patch_size=3
)
T5 = T5Config(
    vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, pad_token_id=0, decoder_start_token_id=0
)
BART_SIZES = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
NUM_TOKENS = 21


def pair(auto, config):
    """The same random model twice, in eval mode: as transformers makes it, and switched."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(auto.from_config(deepcopy(config), dtype=torch.float32).eval())
    assert glue.use_fast_attention(models[1])
    return models


def ids(batch=3, length=NUM_TOKENS):
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(side):
    mask = torch.ones(3, NUM_TOKENS, dtype=torch.long)
    for row, count in enumerate((0, 4, 9)):
        mask[row, NUM_TOKENS - count :] = 0
    return mask if side == "right" else mask.flip(1)


def packed_positions():
    return torch.cat([torch.arange(n) for n in (5, 9, 1, 6)]).expand(3, -1)


MASKS = {
    "causal": {},
    "right": {"attention_mask": padding("right")},
    "left": {"attention_mask": padding("left")},
    "packed": {"position_ids": packed_positions(), "use_cache": False},
}


def results(model, inputs, keep=None):
    """Logits where `keep` says, and the gradient of every parameter for a loss on them."""
    logits = model(**inputs).logits
    logits = logits if keep is None else logits[keep.bool()]
    logits.log_softmax(-1).square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach(), grads


def assert_equal(found, expected):
    (logits, grads), (other, others) = found, expected
    torch.testing.assert_close(logits, other, rtol=1e-5, atol=1e-5)
    assert grads.keys() == others.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], others[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel and sdpa are called."""
    counts = {"attention": 0, "sdpa_attention_forward": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name in counts:
        monkeypatch.setattr(glue, name, counted(name, getattr(glue, name)))
    return counts


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_give_the_same_logits_and_gradients(name, mask, calls):
    plain, fast = pair(AutoModelForCausalLM, DECODERS[name])
    if name == "gpt2" and mask == "packed":
        pytest.skip("GPT-2 does not read packed positions")
    inputs = {"input_ids": ids(), **MASKS[mask]}
    keep = inputs.get("attention_mask")
    assert_equal(results(fast, inputs, keep), results(plain, inputs, keep))
    assert calls == {"attention": 2, "sdpa_attention_forward": 0}


@pytest.mark.parametrize("mask", ["causal", "right", "left"])
def test_bert_gives_the_same_logits_and_gradients(mask, calls):
    plain, fast = pair(AutoModelForMaskedLM, BERT)
    inputs = {"input_ids": ids(), **MASKS[mask]}
    keep = inputs.get("attention_mask")
    assert_equal(results(fast, inputs, keep), results(plain, inputs, keep))
    assert calls == {"attention": 2, "sdpa_attention_forward": 0}


def test_vit_gives_the_same_logits_and_gradients(calls):
    plain, fast = pair(AutoModelForImageClassification, VIT)
    inputs = {"pixel_values": torch.randn(2, 3, 12, 12)}
    assert_equal(results(fast, inputs), results(plain, inputs))
    assert calls == {"attention": 2, "sdpa_attention_forward": 0}


def test_bart_gives_the_same_logits_and_gradients_across_encoder_and_decoder(calls):
    sizes = {f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in BART_SIZES.items()}
    config = BartConfig(vocab_size=64, d_model=32, max_position_embeddings=64, dropout=0.0, **sizes)
    plain, fast = pair(AutoModelForSeq2SeqLM, config)
    inputs = {"input_ids": ids(), "attention_mask": padding("right"), "decoder_input_ids": ids(3, 8)}
    assert_equal(results(fast, inputs), results(plain, inputs))
    assert calls == {"attention": 6, "sdpa_attention_forward": 0}


def test_t5_falls_back_because_of_its_position_bias(calls):
    plain, fast = pair(AutoModelForSeq2SeqLM, T5)
    inputs = {"input_ids": ids(), "attention_mask": padding("right"), "decoder_input_ids": ids(3, 8)}
    assert_equal(results(fast, inputs), results(plain, inputs))
    assert calls["sdpa_attention_forward"] > 0


def test_attention_dropout_falls_back_while_training(calls):
    plain, fast = pair(AutoModelForMaskedLM, BERT)
    for mask in ("causal", "left"):
        found = []
        for model in (plain, fast):
            torch.manual_seed(4)
            found.append(results(model.train(), {"input_ids": ids(), **MASKS[mask]}))
        assert_equal(*found)
    assert calls == {"attention": 0, "sdpa_attention_forward": 4}


def test_a_mask_with_holes_falls_back(calls):
    plain, fast = pair(AutoModelForCausalLM, DECODERS["llama"])
    mask = torch.ones(3, NUM_TOKENS, dtype=torch.long)
    mask[1, 5:8] = 0
    inputs = {"input_ids": ids(), "attention_mask": mask}
    assert_equal(results(fast, inputs, mask), results(plain, inputs, mask))
    assert calls == {"attention": 0, "sdpa_attention_forward": 2}


def test_a_four_dimensional_mask_of_the_callers_falls_back(calls):
    plain, fast = pair(AutoModelForCausalLM, DECODERS["llama"])
    mask = torch.ones(3, 1, NUM_TOKENS, NUM_TOKENS, dtype=torch.bool).tril()
    inputs = {"input_ids": ids(), "attention_mask": mask}
    assert_equal(results(fast, inputs), results(plain, inputs))
    assert calls == {"attention": 0, "sdpa_attention_forward": 2}


def test_gradient_checkpointing_changes_nothing():
    _, plain = pair(AutoModelForCausalLM, DECODERS["gemma3"])
    _, saving = pair(AutoModelForCausalLM, DECODERS["gemma3"])
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = {"input_ids": ids(), "attention_mask": padding("left"), "use_cache": False}
    (logits, grads), (other, others) = (results(model.train(), inputs) for model in (plain, saving))
    assert torch.equal(logits, other)
    assert all(torch.equal(grads[name], others[name]) for name in others)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_gives_the_same_tokens(name, cache):
    if name == "phi" and cache == "static":
        pytest.skip("the same cache as llama")
    models = pair(AutoModelForCausalLM, DECODERS[name])
    inputs = {"input_ids": ids(length=NUM_TOKENS), "attention_mask": padding("left")}
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    plain, fast = (model.generate(**inputs, **options, disable_compile=True, eos_token_id=None) for model in models)
    assert torch.equal(plain, fast)


def test_a_cache_is_continued_with_several_tokens_at_once():
    plain, fast = pair(AutoModelForCausalLM, DECODERS["mistral"])
    found = []
    for model in (plain, fast):
        with torch.no_grad():
            cache = model(ids()[:, :9], use_cache=True).past_key_values
            found.append(model(ids()[:, 9:], past_key_values=cache).logits)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_training_after_generation_in_inference_mode():
    _, fast = pair(AutoModelForCausalLM, DECODERS["llama"])
    with torch.inference_mode():
        fast(ids())
    fast(ids()).logits.sum().backward()


@pytest.mark.parametrize("is_padded", [False, True])
def test_ranges_stand_for_the_masks_of_transformers(is_padded):
    positions = packed_positions()
    numbers = find_packed_sequence_indices(positions)
    functions = {
        "causal": causal_mask_function,
        "full": bidirectional_mask_function,
        "window": sliding_window_causal_mask_function(6),
        "both sides": sliding_window_bidirectional_mask_function(4),
        "chunked": chunked_causal_mask_function(5, torch.tensor([0, 4, 9])),
        "packed": packed_sequence_compatibility_function(causal_mask_function, positions, numbers),
        "packed window": packed_sequence_compatibility_function(
            sliding_window_causal_mask_function(3), positions, numbers
        ),
        "unknown": and_masks(causal_mask_function, lambda batch, head, query, key: key >= batch),
    }
    for name, function in functions.items():
        shape = {"batch_size": 3, "q_length": NUM_TOKENS, "kv_length": NUM_TOKENS, "mask_function": function}
        mask = padding("left").bool() if is_padded else None
        options = {"attention_mask": mask, "allow_is_causal_skip": False}
        ranges = glue.make_mask(**shape, **options)
        assert ranges.shape == (3, 1, NUM_TOKENS, 2), name
        assert torch.equal(allowed_keys(ranges, NUM_TOKENS), sdpa_mask(**shape, **options)), name


def test_the_usual_masks_are_made_without_a_mask_of_all_pairs(monkeypatch):
    monkeypatch.setattr(glue, "sdpa_mask", None)
    _, fast = pair(AutoModelForCausalLM, DECODERS["gemma3"])
    for mask in MASKS.values():
        fast(ids(), **mask)


def test_models_whose_attention_is_their_own_are_left_alone():
    sinks = AutoModelForCausalLM.from_config(
        GptOssConfig(**GROUPED, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    )
    eager = AutoModelForCausalLM.from_config(deepcopy(DECODERS["llama"]), attn_implementation="eager")
    for model in (sinks, eager, torch.nn.Linear(2, 2)):
        assert not glue.use_fast_attention(model)
    assert sinks.config._attn_implementation == eager.config._attn_implementation == "eager"


def test_the_implementation_is_not_saved_with_the_model(tmp_path):
    _, fast = pair(AutoModelForCausalLM, DECODERS["llama"])
    fast.save_pretrained(tmp_path)
    assert glue.NAME not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_packed_projections_come_back_as_one_buffer(dtype):
    packed = torch.randn(2, 40, (6 + 2 * 2) * 16, dtype=dtype, requires_grad=True)
    parts = [x.view(2, 40, -1, 16) for x in split_columns(packed, (96, 32, 32))]
    ranges = causal_ranges(2, 40, 40).contiguous()
    seen = []
    for part in parts:
        part.register_hook(seen.append)
    attention(*parts, ranges, scale=0.25).square().sum().backward()
    seen.sort(key=torch.Tensor.data_ptr)
    assert are_adjacent(seen, dim=2)
    assert packed.grad.data_ptr() == joined(seen, dim=2).data_ptr()


def test_attention_takes_gradients_twice_and_any_strides():
    q, k, v = (torch.randn(2, 3, 16, 30).transpose(1, 3).transpose(1, 2).requires_grad_() for _ in range(3))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [2, 30, 16, 3], last stride 480
    o = attention(q, k, v, causal_ranges(2, 30, 30).contiguous(), scale=0.5)
    first, second = (torch.autograd.grad(o.sum(), (q, k, v), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_attention_under_autocast_runs_in_the_autocast_dtype():
    q, k, v = (torch.randn(1, 20, 2, 16) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        o = attention(q, k.bfloat16(), v, causal_ranges(1, 20, 20).contiguous(), scale=0.25)
    assert o.dtype == torch.bfloat16


def test_long_rows_on_few_heads_are_shared_by_the_threads():
    """One head and several threads: the gradients of keys are sums over parts, whatever the number of threads."""
    q, k, v = (torch.randn(1, 700, 1, 32, requires_grad=True) for _ in range(3))
    ranges = causal_ranges(1, 700, 700).contiguous()
    threads, found = torch.get_num_threads(), []
    for number in (1, 3):
        torch.set_num_threads(number)
        found.append(torch.autograd.grad(attention(q, k, v, ranges, scale=0.2).square().sum(), (q, k, v)))
    torch.set_num_threads(threads)
    for one, three in zip(*found, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_together_is_refused():
    q, k = torch.randn(1, 5, 3, 8), torch.randn(1, 5, 2, 8)
    ranges = causal_ranges(1, 5, 5)
    for arguments in ((q, k, k, ranges), (k, k, k, ranges.long()), (k, k, k, ranges[:, :4]), (k, k, q, ranges)):
        with pytest.raises(ValueError):
            attention(*arguments, scale=1.0)
    with pytest.raises(ValueError):
        attention(k, k, k, ranges, scale=0.0)
