"""Files and overrides -> Config: strict YAML, precedence, round trips, and one clear line per mistake."""

import json
import os

import pytest
from burnish.harness.config import Config
from burnish.harness.config_io import config_schema, config_to_yaml, load_config
from burnish.harness.errors import ConfigError
from burnish.harness.strict_yaml import parse_yaml
from yaml_cases import GOOD


def load(folder, text, *overrides):
    (folder / "c.yaml").write_text(text, encoding="utf-8")
    return load_config([str(folder / "c.yaml")], list(overrides))


def mistakes(folder, text, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    return str(caught.value).replace(f"{folder}{os.sep}", "").splitlines()


def test_files_and_overrides_are_merged_in_order(tmp_path):
    (tmp_path / "base.yaml").write_text(GOOD, encoding="utf-8")
    (tmp_path / "more.yaml").write_text(
        "train: {global_batch_size: 16}\ndata: {train: c.jsonl}\nseed: 1\n", encoding="utf-8"
    )
    paths = [str(tmp_path / "base.yaml"), str(tmp_path / "more.yaml")]
    config = load_config(paths, ["seed=2", "data.train.0.limit=5", "adapter.alpha=3", "optimizer.learning_rate=5e-5"])
    assert (config.train.max_steps, config.train.global_batch_size) == (10, 16)
    assert [(source.path, source.limit) for source in config.data.train] == [("c.jsonl", 5)]
    assert (config.seed, config.adapter.alpha, config.adapter.rank) == (2, 3.0, 8)
    assert config.optimizer.learning_rate == 5e-5


def test_a_choice_that_changes_replaces_its_section(tmp_path):
    assert load(tmp_path, GOOD, "adapter.method=full").adapter.method == "full"
    assert load(tmp_path, GOOD, "adapter.method=lora").adapter.rank == 8
    launch = load(tmp_path, GOOD, "launch.num_workers=2", "launch.type=ray").launch
    assert (launch.type, launch.num_workers) == ("ray", 2)
    assert load(tmp_path, GOOD, "optimizer.name=sgd").optimizer.learning_rate == 2e-4


def test_an_override_is_yaml(tmp_path):
    config = load(tmp_path, GOOD, "task={type: sequence_classification, labels: [a, b]}", "memory.budget=24GiB")
    assert config.task.labels == ["a", "b"]
    assert config.memory.budget == 24 * 2**30
    assert load(tmp_path, GOOD, "model.tokenizer=").model.tokenizer is None
    assert load(tmp_path, GOOD, "data.chat_template='{{ a = b }}'").data.chat_template == "{{ a = b }}"


def test_an_empty_section_means_its_defaults(tmp_path):
    assert load(tmp_path, GOOD + "eval:\nlaunch:\n") == load(tmp_path, GOOD)


def test_a_config_reads_back_from_its_own_yaml(tmp_path):
    config = load(
        tmp_path, GOOD, "data.train.0.where={a: ['1e3', 1, 1.0, true, 'no']}", 'data.chat_template=" a\\n\\n b \\n"'
    )
    text = config_to_yaml(config)
    assert load(tmp_path, text) == config
    assert list(parse_yaml(text).value) == list(Config.model_fields)


def test_a_json_file_is_a_config(tmp_path):
    assert load(tmp_path, json.dumps(parse_yaml(GOOD).value)) == load(tmp_path, GOOD)


def test_the_schema_describes_its_keys():
    schema = config_schema()
    assert "run directory" in schema["properties"]["name"]["description"]
    assert schema["additionalProperties"] is False


MISTAKES = [
    ("seed: 1.5", "c.yaml:11: seed: 1.5 is not allowed; give a whole number from 0 to 2147483647"),
    ("sede: 1", "c.yaml:11: sede: unknown key; did you mean seed?"),
    ("epochs: 1", "c.yaml:11: epochs: unknown key here; did you mean train.epochs?"),
    ("name: tiny", "c.yaml:11: name: already given in line 1; keep one"),
    (
        "memory: {zero_stage: 4}",
        "c.yaml:11: memory.zero_stage: 4 is not allowed; give auto or a whole number from 0 to 3",
    ),
    (
        "memory: {budget: lots}",
        "c.yaml:11: memory.budget: 'lots' is not allowed; "
        "give auto or a whole number from 1 to 10^18 or text such as 24GiB",
    ),
    (
        "schedule: {lr: cosin}",
        "c.yaml:11: schedule.lr: 'cosin' is not allowed; "
        "give one of constant, linear, cosine, wsd; did you mean cosine?",
    ),
    (
        "schedule: cosine",
        "c.yaml:11: schedule: 'cosine' is not allowed; give a section with lr, warmup_ratio, warmup_steps, …",
    ),
    ("quantization: nf4", "c.yaml:11: quantization: 'nf4' is not allowed; write quantization: {type: nf4}"),
    (
        "launch: {num_workers: 2}",
        "c.yaml:11: launch.num_workers: unknown key for type inline; it belongs to launch.type ray",
    ),
    ("launch: {type: rey}", "c.yaml:11: launch.type: 'rey' is not allowed; give one of inline, ray; did you mean ray?"),
    (
        "generation: {prompts: 4}",
        "c.yaml:11: generation.prompts: 4 is not allowed; give auto or a list of text of up to 200000 characters",
    ),
    ("generation: {top_p: 2}", "c.yaml:11: generation.top_p: 2 is not allowed; give a number above 0, up to 1"),
    (
        "tracking: {tensorboard: yes}",
        "c.yaml:11: tracking.tensorboard: 'yes' is not allowed; give true or false; write true",
    ),
    (
        "checkpoint: {keep: '2'}",
        "c.yaml:11: checkpoint.keep: '2' is not allowed; "
        "give a whole number from 1 to 10^12; remove the quotes around 2",
    ),
    (
        "checkpoint: {keep: 1e1}",
        "c.yaml:11: checkpoint.keep: 10.0 is not allowed; give a whole number from 1 to 10^12; write 10",
    ),
    ("runs_dir: 5", "c.yaml:11: runs_dir: 5 is not allowed; give text of up to 4096 characters; put it in quotes"),
]
OVERRIDES = [
    ("train.max_steps=0", "command line: train.max_steps: 0 is not allowed; give a whole number from 1 to 10^12"),
    ("train.epochs=1", "c.yaml:10: train: give exactly one of max_steps and epochs; null removes one"),
    ("adapter.rnak=1", "command line: adapter.rnak: unknown key; did you mean rank?"),
    ("adapter.rank=true", "command line: adapter.rank: true is not allowed; give a whole number from 1 to 1024"),
    ("adapter.rank.x=1", "command line: adapter.rank.x: adapter.rank is 8, not a section with keys"),
    (
        "adapter.method=lorra",
        "command line: adapter.method: 'lorra' is not allowed; "
        "give one of dora, freeze, full, lora, qlora; did you mean lora?",
    ),
    (
        "adapter.method=qlora",
        "command line: adapter.method: qlora needs quantization.type nf4 or int8 (or use method lora)",
    ),
    (
        "adapter.target_modules=['(']",
        "command line: adapter.target_modules.0: '(' is not allowed; "
        "it is no regular expression: missing ), unterminated subpattern at position 0",
    ),
    (
        "optimizer.learning_rate=.nan",
        "command line: optimizer.learning_rate: nan is not allowed; give a number above 0, up to 100",
    ),
    (
        "optimizer.betas=[0.9]",
        "command line: optimizer.betas: a list is not allowed; give a list of 2: a number from 0 to below 1",
    ),
    (
        "data.train=[]",
        "command line: data.train: an empty list is not allowed; give text or a section with path or a list of these",
    ),
    ("data.train=[{limit: 3}]", "command line: data.train.0.path: missing; give text of up to 4096 characters"),
    (
        "data.train.2.path=x",
        "command line: data.train.2: data.train is a list of 2; name an entry by its number, 0 to 1",
    ),
    (
        "data.train.0.where={a: [null]}",
        "command line: data.train.0.where.a.0: null is not allowed; "
        "give text or a whole number or a number or true or false or leave the key out",
    ),
    ("model.path=''", "command line: model.path: '' is not allowed; give text on one line without control characters"),
    (
        "task.type=image_clasification",
        "command line: task.type: 'image_clasification' is not allowed; "
        "give one of causal_lm, image_classification, sequence_classification; did you mean image_classification?",
    ),
    ("train", "command line: 'train' is no override; write section.key=value, for example train.max_steps=10"),
    (
        "train.max_steps=[1",
        "command line: train.max_steps: '[1' is not valid YAML; "
        "put text in quotes (not valid YAML: while parsing a flow sequence did not find expected ',' or ']')",
    ),
    ("a\nb.c=1", "command line: 'a\\nb': unknown key; valid here: "),
]


@pytest.mark.parametrize(("line", "sentence"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_in_a_file_is_one_clear_line(tmp_path, line, sentence):
    assert mistakes(tmp_path, GOOD + line + "\n") == [sentence]


@pytest.mark.parametrize(("override", "sentence"), OVERRIDES, ids=[repr(override) for override, _ in OVERRIDES])
def test_a_mistake_in_an_override_is_one_clear_line(tmp_path, override, sentence):
    (line,) = mistakes(tmp_path, GOOD, override)
    assert line.startswith(sentence)


def test_all_mistakes_are_told_together(tmp_path):
    lines = [line for line, _ in MISTAKES if not line.startswith(("memory: {budget", "launch: {type", "schedule: c"))]
    lines = [line for line in lines if not line.startswith(("generation: {top", "checkpoint: {keep: 1"))]
    found = mistakes(tmp_path, GOOD + "\n".join(lines) + "\n", "train.max_steps=0", "adapter.rnak=1", "x")
    assert len(found) == len(set(found)) == len(lines) + 3


def test_an_empty_file_names_every_missing_section(tmp_path):
    assert [line.split(":")[0] for line in mistakes(tmp_path, "")] == [
        "name",
        "model",
        "task",
        "data",
        "adapter",
        "train",
    ]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"[1, 2]", "c.yaml: a list is no config; write sections such as `model:`"),
        (b"a: [\n", "c.yaml:2: not valid YAML: while parsing a flow node did not find expected node content"),
        (b"a: b: c", "c.yaml:1: not valid YAML: mapping values are not allowed in this context"),
        (b"\xff\xfe", "is not UTF-8 text (byte 0); give a YAML file"),
        (b"\x00\x01", "c.yaml: not valid YAML: unacceptable character #x0000: control characters are not allowed"),
        (b"x" * 1_000_001, "is larger than 1 MB; give a YAML file"),
    ],
)
def test_a_file_that_is_no_yaml_mapping_is_refused(tmp_path, content, sentence):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config([str(tmp_path / "c.yaml")])
    assert str(caught.value).endswith(sentence)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named_with_its_neighbour(tmp_path):
    (tmp_path / "quickstart.yaml").write_text(GOOD, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"no such file; did you mean .*quickstart\.yaml\?"):
        load_config([str(tmp_path / "quikstart.yaml")])


@pytest.mark.parametrize("path", [".", "/dev/null", "a\0b", "x" * 5000, ""])
def test_what_is_no_file_is_refused(path):
    with pytest.raises(ConfigError):
        load_config([path])


def test_a_byte_order_mark_does_no_harm(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_config([str(tmp_path / "c.yaml")]).name == "tiny"
