"""Which tokens are learned, exactly, for every format and every loss_on."""

from types import SimpleNamespace

import pytest
import tiny
from burnish.harness.config import Data
from burnish.harness.data.format import encode_causal_lm, question, reference, render_prompt
from burnish.harness.errors import ConfigError
from burnish.harness.tasks import RowError
from hypothesis import given, settings
from hypothesis import strategies as st

END = "<|end|>"
TOKENIZER = tiny.make_tokenizer()
PLAIN = tiny.make_tokenizer()
PLAIN.chat_template = None
CHAT = [
    {"role": "system", "content": "be red"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "big cat"},
]
SHAREGPT = [
    {"from": "system", "value": "be red"},
    {"from": "human", "value": "one"},
    {"from": "gpt", "value": "two"},
    {"from": "human", "value": "three"},
    {"from": "gpt", "value": "big cat"},
]
WHOLE = (
    "<|system|>be red<|end|><|user|>one<|end|><|assistant|>two<|end|><|user|>three<|end|><|assistant|>big cat<|end|>"
)
ALPACA_PLAIN = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nsay\n\n### Input:\ncat\n\n### Response:\n"
)


def config(**data):
    return SimpleNamespace(data=Data.model_validate({"train": "rows.jsonl", **data}))


def encode(row, *, tokenizer=TOKENIZER, layout="auto", **data):
    return encode_causal_lm(row, tokenizer, config(**data), layout)


def pieces(example, tokenizer=TOKENIZER):
    """The decoded text as [(text, is learned), …]."""
    ids, mask = example["input_ids"].tolist(), example["loss_mask"].tolist()
    runs = []
    for i in range(len(ids)):
        if i == 0 or mask[i] != mask[i - 1]:
            runs.append(([], bool(mask[i])))
        runs[-1][0].append(ids[i])
    return [(tokenizer.decode(run), learned) for run, learned in runs]


def learned(example, tokenizer=TOKENIZER):
    return [text for text, is_learned in pieces(example, tokenizer) if is_learned]


def text(example, tokenizer=TOKENIZER):
    return tokenizer.decode(example["input_ids"].tolist())


PROMPT, ANSWER = "say red", "blue one"
DIALOGUE = f"<|user|>{PROMPT}{END}<|assistant|>"
LAST, EVERY = ["big cat" + END], ["two" + END, "big cat" + END]
CASES = [
    ({"messages": CHAT}, TOKENIZER, "completion", WHOLE, LAST),
    ({"messages": CHAT}, TOKENIZER, "assistant", WHOLE, EVERY),
    ({"conversations": SHAREGPT}, TOKENIZER, "completion", WHOLE, LAST),
    ({"conversations": SHAREGPT}, TOKENIZER, "assistant", WHOLE, EVERY),
    ({"prompt": CHAT[:2], "completion": CHAT[2:]}, TOKENIZER, "assistant", WHOLE, EVERY),
    ({"prompt": CHAT[:4], "completion": CHAT[4:]}, TOKENIZER, "assistant", WHOLE, LAST),
    ({"prompt": CHAT[:4], "completion": "big cat"}, TOKENIZER, "completion", WHOLE, LAST),
    ({"prompt": PROMPT, "completion": ANSWER}, TOKENIZER, "completion", DIALOGUE + ANSWER + END, [ANSWER + END]),
    ({"prompt": PROMPT, "completion": ANSWER}, TOKENIZER, "assistant", DIALOGUE + ANSWER + END, [ANSWER + END]),
    (
        {"system": "be red", "prompt": PROMPT, "completion": ANSWER},
        TOKENIZER,
        "completion",
        f"<|system|>be red{END}{DIALOGUE}{ANSWER}{END}",
        [ANSWER + END],
    ),
    (
        {"prompt": PROMPT, "completion": " " + ANSWER},
        PLAIN,
        "completion",
        f"{PROMPT} {ANSWER}{END}",
        [f" {ANSWER}{END}"],
    ),
    (
        {"instruction": "say", "input": "cat", "output": "dog"},
        TOKENIZER,
        "completion",
        f"<|user|>say\n\ncat{END}<|assistant|>dog{END}",
        ["dog" + END],
    ),
    (
        {"instruction": "say", "input": "", "output": "dog"},
        TOKENIZER,
        "completion",
        f"<|user|>say{END}<|assistant|>dog{END}",
        ["dog" + END],
    ),
    (
        {"instruction": "say", "input": "cat", "output": "dog"},
        PLAIN,
        "completion",
        ALPACA_PLAIN + "dog" + END,
        ["dog" + END],
    ),
]


@pytest.mark.parametrize(("row", "tokenizer", "loss_on", "whole", "answers"), CASES)
def test_exactly_the_answers_and_their_end_tokens_are_learned(row, tokenizer, loss_on, whole, answers):
    example = encode(row, tokenizer=tokenizer, loss_on=loss_on)
    assert text(example, tokenizer) == whole
    assert learned(example, tokenizer) == answers
    assert example["loss_mask"].dtype == "uint8"
    assert example["input_ids"].dtype == "int32"


@pytest.mark.parametrize(("row", "tokenizer", "loss_on", "whole", "answers"), CASES)
def test_loss_on_all_learns_all_but_the_first_token(row, tokenizer, loss_on, whole, answers):
    example = encode(row, tokenizer=tokenizer, loss_on="all")
    assert text(example, tokenizer) == whole
    assert example["loss_mask"].tolist() == [0] + [1] * (len(example["input_ids"]) - 1)


def test_a_plain_text_is_learned_whole_and_ends():
    example = encode({"text": "red green"})
    assert text(example) == "red green" + END
    assert example["loss_mask"].tolist() == [0] + [1] * (len(example["input_ids"]) - 1)


def test_the_template_can_be_given_switched_off_or_read_from_a_file(tmp_path):
    row = {"prompt": PROMPT, "completion": " " + ANSWER}
    assert text(encode(row, chat_template="none")) == f"{PROMPT} {ANSWER}{END}"
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }};{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    (tmp_path / "template.jinja").write_text(template)
    for given_as in (template, str(tmp_path / "template.jinja")):
        example = encode(row, tokenizer=PLAIN, chat_template=given_as)
        assert text(example, PLAIN) == f"[user]{PROMPT};[assistant] {ANSWER};"
        assert learned(example, PLAIN) == [f" {ANSWER};"]
    with pytest.raises(ConfigError, match="neither a Jinja template"):
        encode(row, chat_template="nowhere.jinja")
    with pytest.raises(ConfigError, match="no chat template"):
        encode({"messages": CHAT}, tokenizer=PLAIN)


def test_without_a_template_ids_and_mask_are_those_of_trl():
    from trl.data_utils import common_prefix_length

    for prompt, completion in [("say red", " blue"), ("say re", "d blue"), ("say ", "one"), ("one", "two" + END)]:
        example = encode({"prompt": prompt, "completion": completion}, chat_template="none")
        whole = completion if completion.endswith(END) else completion + END
        prompt_ids, ids = TOKENIZER(prompt)["input_ids"], TOKENIZER(prompt + whole)["input_ids"]
        start = common_prefix_length(prompt_ids, ids)
        assert example["input_ids"].tolist() == ids
        assert example["loss_mask"].tolist()[1:] == ([0] * start + [1] * (len(ids) - start))[1:]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "a", "completion": ""}, "empty"),
        ({"prompt": " \n", "completion": "b"}, "empty"),
        ({"prompt": None, "completion": "b"}, "empty"),
        ({"prompt": 3, "completion": "b"}, "wrong_type"),
        ({"prompt": "a", "completion": ["b"]}, "wrong_type"),
        ({"text": "\t"}, "empty"),
        ({"messages": []}, "empty"),
        ({"messages": "hello"}, "wrong_type"),
        ({"messages": {"role": "user"}}, "wrong_type"),
        ({"messages": ["hello"]}, "wrong_type"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown_role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown_role"),
        ({"conversations": [{"from": {}, "value": "x"}]}, "unknown_role"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no_answer"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no_answer"),
        ({"messages": [*CHAT[:2], {"role": "assistant", "content": ""}]}, "empty"),
        ({"messages": [*CHAT[:2], {"role": "assistant", "content": 3}]}, "wrong_type"),
        ({"instruction": "a", "input": 5, "output": "b"}, "wrong_type"),
        ({"messages": CHAT, "tools": "not json"}, "wrong_type"),
    ],
)
def test_a_wrong_row_has_a_kind(row, kind):
    with pytest.raises(RowError) as caught:
        encode(row)
    assert caught.value.kind == kind


def test_a_template_that_rewrites_earlier_answers_is_refused():
    template = (
        "{% for m in messages %}{{ m['role'] }}:{% if loop.last %}<think>{% endif %}{{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(RowError) as caught:
        encode({"messages": CHAT}, chat_template=template, loss_on="assistant")
    assert caught.value.kind == "template"
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RowError, match="roles must alternate"):
        encode({"messages": CHAT}, chat_template=refusing)


def test_the_truncation_policies():
    row = {"prompt": PROMPT, "completion": ANSWER}
    whole = encode(row)
    ids, mask = whole["input_ids"].tolist(), whole["loss_mask"].tolist()
    size = len(ids) - 1
    right = encode(row, max_length=size)
    assert (right["input_ids"].tolist(), right["loss_mask"].tolist()) == (ids[:size], mask[:size])
    assert right["num_truncated"].tolist() == [1]
    left = encode(row, max_length=size, truncation="left")
    assert (left["input_ids"].tolist(), left["loss_mask"].tolist()) == (ids[1:], mask[1:])
    assert "num_truncated" not in encode(row, max_length=size + 1)
    for policy in ("drop", "error"):
        with pytest.raises(RowError) as caught:
            encode(row, max_length=size, truncation=policy)
        assert caught.value.kind == "too_long"
    with pytest.raises(RowError) as caught:
        encode(row, max_length=2)
    assert caught.value.kind == "no_target"


def test_a_prompt_is_rendered_as_in_training():
    example = encode({"messages": CHAT})
    start = example["loss_mask"].tolist().index(1)
    assert render_prompt(question({"messages": CHAT}), TOKENIZER, config()) == example["input_ids"][:start].tolist()
    row = {"prompt": PROMPT, "completion": " " + ANSWER}
    for tokenizer in (TOKENIZER, PLAIN):
        example = encode(row, tokenizer=tokenizer)
        start = example["loss_mask"].tolist().index(1)
        assert render_prompt(PROMPT, tokenizer, config()) == example["input_ids"][:start].tolist()


def test_question_and_reference_of_every_format():
    assert question({"conversations": SHAREGPT}) == CHAT[:4]
    assert reference({"messages": CHAT}) == "big cat"
    assert question({"instruction": "a", "input": "b", "output": "c"}) == "a\n\nb"
    assert reference({"instruction": "a", "output": "c"}) == "c"
    assert question({"text": "one two"}) == "one two"
    assert reference({"text": "one two"}) is None
    assert reference({"text": "one two", "label": 3}) == 3


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda value: value.strip())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_any_conversation_is_learned_answer_by_answer(turns):
    messages = []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    example = encode({"messages": messages}, loss_on="assistant", max_length=10**6)
    ids = example["input_ids"][example["loss_mask"].astype(bool)].tolist()
    assert TOKENIZER.decode(ids) == "".join(answered + END for _, answered in turns)
