"""The schema: what it takes, what it refuses, what it imports."""

import subprocess
import sys

import pytest
from burnish.harness.config import Adamw, Config
from burnish.harness.config_hardware import Inline
from burnish.harness.config_types import parse_bytes
from pydantic import ValidationError

MINIMAL = {
    "name": "tiny",
    "model": {"path": "some/model"},
    "task": {"type": "causal_lm"},
    "data": {"train": "train.jsonl"},
    "adapter": {"method": "lora"},
    "train": {"max_steps": 10},
}


def config_with(**sections):
    return Config.model_validate(MINIMAL | sections)


def refused(**sections):
    with pytest.raises(ValidationError) as caught:
        config_with(**sections)
    return str(caught.value)


def test_a_minimal_config_has_defaults():
    config = config_with()
    assert config.optimizer == Adamw()
    assert config.launch == Inline()
    assert [source.path for source in config.data.train] == ["train.jsonl"]


def test_a_choice_with_a_default_may_leave_its_name_out():
    assert config_with(optimizer={"learning_rate": 1e-3}).optimizer.name == "adamw"
    assert config_with(quantization={}).quantization.type == "none"
    assert config_with(launch={}).launch.type == "inline"


@pytest.mark.parametrize("value", [True, "3", 1.5, float("nan"), None, [1]])
def test_an_integer_is_only_an_integer(value):
    refused(train={"max_steps": 10, "global_batch_size": value})


@pytest.mark.parametrize("value", [True, 1.0, "2", 4, -1])
def test_zero_stage_is_auto_or_0_to_3(value):
    refused(memory={"zero_stage": value})


def test_a_float_may_be_written_as_an_integer():
    assert config_with(optimizer={"learning_rate": 1}).optimizer.learning_rate == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0, True, "1e-4"])
def test_a_learning_rate_is_finite_and_positive(value):
    refused(optimizer={"learning_rate": value})


def test_betas_are_a_list_or_a_pair():
    assert config_with(optimizer={"betas": [0.9, 0.95]}) == config_with(optimizer={"betas": (0.9, 0.95)})
    refused(optimizer={"betas": [0.9]})
    refused(optimizer={"betas": [0.9, 1.0]})


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * 2**30), ("512 MB", 512 * 10**6), ("1.5kib", 1536), ("7", 7), (9, 9)]
)
def test_sizes_have_units(text, size):
    assert parse_bytes(text) == size
    assert config_with(memory={"budget": text}).memory.budget == size


@pytest.mark.parametrize("value", ["lots", "12QB", "0", 0, -1, True, "9" * 400, "9" * 15 + "TB", 1.5])
def test_sizes_without_sense_are_refused(value):
    refused(memory={"budget": value})


@pytest.mark.parametrize("labels", [[], ["one"], ["a", "a"], ["a", ""], [1, 2], "ab"])
def test_labels_are_unique_and_not_empty(labels):
    refused(task={"type": "sequence_classification", "labels": labels})


@pytest.mark.parametrize(
    "init",
    [
        {},
        {"hidden_size": 3},
        {"model_type": 5},
        {"model_type": "../x"},
        {"model_type": "vit", "auto_map": {}},
        {"model_type": "vit", "a b": 1},
        {"model_type": "vit", "eps": float("nan")},
        {"model_type": "vit", "eps": object()},
    ],
)
def test_init_is_a_plain_transformers_config(init):
    refused(model={"init": init})


def test_a_model_comes_from_one_place():
    refused(model={})
    refused(model={"path": "x", "init": {"model_type": "vit"}})
    assert config_with(model={"init": {"model_type": "vit", "layers": [1, 2]}}).model.path is None


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"adapter": {"method": "qlora"}}, "adapter.method"),
        ({"quantization": {"type": "nf4"}}, "quantization.type"),
        ({"task": {"type": "image_classification"}, "data": {"train": "x", "packing": True}}, "data.packing"),
        ({"data": {"train": [{"path": "x", "format": "image"}]}}, "data.train.0.format"),
        ({"data": {"train": "x", "validation": "y", "split": {"validation": 0.1}}}, "data.split.validation"),
        ({"optimizer": {"name": "adafactor"}, "memory": {"zero_stage": 2}}, "memory.zero_stage"),
        ({"schedule": {"warmup_steps": 11}}, "schedule.warmup_steps"),
        ({"schedule": {"lr": "wsd", "warmup_ratio": 0.5, "decay_ratio": 0.6}}, "schedule.decay_ratio"),
        ({"optimizer": {"name": "sgd", "nesterov": True}}, "optimizer.nesterov"),
    ],
)
def test_impossible_combinations_are_refused_by_key(sections, key):
    assert f"{key}: " in refused(**sections)


def test_several_impossible_combinations_are_told_at_once():
    message = refused(adapter={"method": "qlora"}, schedule={"warmup_steps": 11})
    assert "adapter.method" in message
    assert "schedule.warmup_steps" in message


def test_quantised_base_with_qlora_is_fine():
    config = config_with(adapter={"method": "qlora"}, quantization={"type": "nf4"})
    assert config.quantization.double_quant


@pytest.mark.parametrize("pattern", ["(", "*", "a{99999999999999999999}"])
def test_a_broken_regular_expression_is_refused(pattern):
    refused(adapter={"method": "freeze", "trainable": [pattern]})


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "-x", "x" * 101, "a\n", "é"])
def test_a_run_name_is_a_plain_folder_name(name):
    refused(name=name)


def test_config_and_plan_import_no_torch():
    code = (
        "import sys, burnish.harness.config, burnish.harness.config_io, burnish.harness.plan, burnish.harness.paths\n"
        "print(*{'torch', 'transformers', 'ray', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("", "")
