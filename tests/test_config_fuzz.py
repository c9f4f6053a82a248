"""No config, file or override causes anything but a clear error: property tests over broken input."""

import copy
import json
import re
from pathlib import Path

from burnish.harness.config import Config
from burnish.harness.config_io import config_schema, config_to_yaml, load_config
from burnish.harness.errors import ConfigError, InfeasibleError
from burnish.harness.plan import Resources, make_plan
from burnish.harness.strict_yaml import dump_yaml, parse_yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from yaml_cases import GOOD, scalars, texts, trees

PLACE = re.compile(r".*fuzz\.yaml(:\d+)?:? |command line: |\S+: ")
"""Every line of a refusal begins with the file and the line, the command line, or the key that is missing."""
JARGON = ("Traceback", "type=", "pydantic", "input_value", "function-", "constrained", "literal[", "<class")


def all_keys():
    """Every key of the schema by name, and a few that are none."""
    schema = config_schema()
    names = set(schema["properties"])
    for section in schema["$defs"].values():
        names |= set(section.get("properties", {}))
    return [*sorted(names), "rnak", "é", "a.b", "0", "lora", "[key]", "str", "\u202e", " "]


KEYS = all_keys()
WORDS = "24GiB auto ( none lora qlora nf4 ray inline sgd adamw_8bit adafactor causal_lm image x.jsonl \0 \x1b[31m 😀"
odd = st.sampled_from([float("nan"), float("inf"), 10**400, -(10**30), 1e308, "1" * 300, *WORDS.split(" ")])
values = st.recursive(
    scalars | odd,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | texts, inner, max_size=4),
    max_leaves=8,
)
mutations = st.tuples(
    st.integers(0, 10**6), st.sampled_from(["set", "add", "drop", "nest"]), st.sampled_from(KEYS) | texts, values
)
FULL = json.loads(Config.model_validate(parse_yaml(GOOD).value).model_dump_json())


def places_in(node):
    """Every (container, key) of a tree."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield node, key
        yield from places_in(child)


def mutated(tree, changes):
    tree = copy.deepcopy(tree)
    for number, kind, name, value in changes:
        places = list(places_in(tree))
        if not places:
            return tree
        container, key = places[number % len(places)]
        if kind == "set":
            container[key] = value
        elif kind == "drop":
            del container[key]
        elif kind == "nest":
            container[key] = {name: container[key]}
        elif isinstance(container, dict):
            container[name] = value
    return tree


class Paths:
    """One file to write over and over: a fresh folder per example would be the slowest part."""

    def __init__(self, folder):
        self.file = folder / "fuzz.yaml"

    def load(self, text, overrides=()):
        self.file.write_bytes(text.encode("utf-8", "surrogatepass"))
        return load_config([str(self.file)], overrides)


def assert_only_clear_errors(paths, text, overrides=()):
    resources = Resources(device="cpu", num_devices=0, num_cpus=2, host_memory_bytes=2**34)
    try:
        try:
            config = paths.load(text, overrides)
        except ConfigError as error:
            if error.exit_code != 2 or not all(PLACE.match(line) for line in str(error).split("\n")):
                raise AssertionError(str(error)) from error
            raise
        assert paths.load(config_to_yaml(config)) == config
        make_plan(config, resources, run_dir="runs/x", cwd=".")
    except (ConfigError, InfeasibleError) as error:
        message = str(error)
        lines = message.split("\n")
        complaints = [line for line in lines if not line.isprintable() or not 0 < len(line) < 1000]
        complaints += [word for word in JARGON if word in message and word not in f"{text} {overrides}"]
        if complaints or len(set(lines)) < len(lines):
            raise AssertionError(message) from error


def fuzz(num_examples):
    """2,000 cases in all."""
    return settings(max_examples=num_examples, deadline=None, suppress_health_check=list(HealthCheck))


@fuzz(250)
@given(tree=st.builds(mutated, st.sampled_from([FULL, parse_yaml(GOOD).value]), st.lists(mutations, max_size=4)))
def test_no_mutated_config_causes_anything_but_a_clear_error(tmp_path_factory, tree):
    paths = Paths(Path(tmp_path_factory.getbasetemp()))
    assert_only_clear_errors(paths, dump_yaml(tree))


@fuzz(1500)
@given(text=st.text(max_size=300) | trees.map(dump_yaml) | values.map(dump_yaml))
def test_no_text_causes_anything_but_a_clear_error(tmp_path_factory, text):
    assert_only_clear_errors(Paths(Path(tmp_path_factory.getbasetemp())), text)


@fuzz(250)
@given(
    st.lists(
        st.text(max_size=60)
        | st.builds(
            lambda keys, value: f"{'.'.join(keys)}={value}",
            st.lists(st.sampled_from(KEYS) | texts, min_size=1, max_size=4),
            st.text(max_size=30) | values.map(lambda value: json.dumps(value, ensure_ascii=False)),
        ),
        max_size=4,
    )
)
def test_no_override_causes_anything_but_a_clear_error(tmp_path_factory, overrides):
    assert_only_clear_errors(Paths(Path(tmp_path_factory.getbasetemp())), GOOD, overrides)
