"""A small valid config, and any tree of values that YAML can hold: for the tests of files and of broken input."""

from hypothesis import strategies as st

GOOD = """\
name: tiny
model: {path: some/model}
task: {type: causal_lm}
data:
  train:
    - {path: a.jsonl, weight: 2}
    - path: b.jsonl
adapter: {method: lora, rank: 8}
optimizer: {learning_rate: 1e-4}
train: {max_steps: 10}
"""

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | texts
    | st.sampled_from(
        [
            "no",
            "1e-4",
            "010",
            "~",
            "",
            "1_0",
            "0x1",
            "a: b",
            "# x",
            "- ",
            "é😀",
            "\n",
            " x",
            "\x85",
            "\ufeff",
            "=",
            "<<",
        ]
    )
)
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4))
