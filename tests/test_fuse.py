"""Fused = unfused: equal losses with our kernels and without, for every family, method, policy and ZeRO stage."""

import itertools
import statistics

import fusion_cases
import pytest
import torch
from burnish.harness import zero
from burnish.harness.tasks.common import unwrap
from burnish.harness.zero import deepspeed_config
from burnish.kernels.op import use_backend
from distributed import on_ranks
from fusion_cases import FAMILIES, loss_sum, make_config, make_model, train

METHODS = ("lora", "qlora", "dora")
POLICIES = ("none", "selective", "full")
EACH_POLICY = [
    pytest.param(method, policy, marks=() if policy == "none" or method == "lora" else pytest.mark.nightly)
    for method, policy in itertools.product(METHODS, POLICIES)
]
NIGHTLY = [pytest.param(method, marks=pytest.mark.nightly) for method in METHODS[1:]]
"""The methods that drop out by the same code as lora."""
REFERENCE: dict[tuple[str, str], list[float]] = {}


def reference(family, method):
    """Losses of PEFT's own modules."""
    if (family, method) not in REFERENCE:
        REFERENCE[family, method] = train(family, method, enabled=False)
    return REFERENCE[family, method]


@pytest.mark.parametrize(("method", "policy"), EACH_POLICY)
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_equals_unfused(family, method, policy):
    found = train(family, method, policy=policy)
    assert found == pytest.approx(reference(family, method), rel=1e-4)
    assert len(set(found)) > 1


def partitioning_everything(plan, num_trained):
    """The DeepSpeed settings, without the threshold under which stage 3 leaves tiny parameters whole."""
    settings = deepspeed_config(plan, num_trained)
    if plan.zero_stage == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings


COMBINATIONS = list(itertools.product(FAMILIES, METHODS, POLICIES, (2, 3)))
SAMPLE = [
    (family, method, policy, stage)
    for family, method, policy, stage in COMBINATIONS
    if (list(FAMILIES).index(family) + METHODS.index(method) + POLICIES.index(policy) + stage) % 3 == 0
]
"""For every family and stage, each method and each policy once."""


def losses_of(rank, world, combinations):
    """Losses of every combination of family, method, policy and ZeRO stage, on this rank."""
    zero.deepspeed_config = partitioning_everything
    return {
        (family, method, policy, stage): train(family, method, rank=rank, world=world, stage=stage, policy=policy)
        for family, method, policy, stage in combinations
    }


@pytest.mark.parametrize("combinations", [SAMPLE, pytest.param(COMBINATIONS, marks=pytest.mark.nightly)])
def test_fused_under_zero_equals_unfused_without(tmp_path, combinations):
    [found, _] = on_ranks(2, tmp_path, losses_of, combinations)
    wrong = {
        key: losses for key, losses in found.items() if losses != pytest.approx(reference(key[0], key[1]), rel=1e-4)
    }
    assert not wrong, sorted(wrong)
    assert found.keys() == set(combinations)


@pytest.mark.parametrize("method", ["lora", *NIGHTLY])
@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_falls_alike_whatever_is_recomputed(family, method):
    """The seed comes from torch's generator, which checkpointing restores."""
    expected = train(family, method, p=0.1, policy="none", steps=4)
    for policy in ("selective", "full"):
        assert train(family, method, p=0.1, policy=policy, steps=4) == pytest.approx(expected, rel=1e-5)
    assert train(family, method, p=0.0, steps=4) != pytest.approx(expected, rel=1e-5)


def losses_over_seeds(model, family, num=60):
    found = []
    with torch.no_grad():
        for seed in range(num):
            torch.manual_seed(1000 + seed)
            loss, count = loss_sum(model, family, 0, slice(None))
            found.append(float(loss) / count)
    return found


@pytest.mark.parametrize("method", ["lora", *NIGHTLY])
@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_has_pefts_statistics(family, method):
    """Masks differ from PEFT's, so the loss agrees in mean and spread over seeds, not seed by seed."""
    both = []
    for enabled in (True, False):
        model = make_model(family, make_config(family, method, p=0.1, enabled=enabled))
        both.append(losses_over_seeds(model, family))
    means, spreads = [statistics.mean(x) for x in both], [statistics.stdev(x) for x in both]
    error = (spreads[0] ** 2 / len(both[0]) + spreads[1] ** 2 / len(both[1])) ** 0.5
    assert abs(means[0] - means[1]) < 4 * error
    assert 0.5 < spreads[0] / spreads[1] < 2


EXPECTED = {
    "llama": {"linears": 14, "groups": 4, "norms": 5, "mlps": 2, "attentions": 2, "loss": True},
    "qwen3": {"linears": 14, "groups": 4, "norms": 9, "mlps": 2, "attentions": 2, "loss": True},
    "gemma3": {"linears": 14, "groups": 4, "norms": 13, "mlps": 2, "attentions": 2, "loss": True},
    "gpt2": {"linears": 8, "norms": 5, "activations": 2, "loss": True},
    "bert": {"linears": 13, "groups": 2, "norms": 5, "activations": 2},
    "vit": {"linears": 12, "groups": 2, "norms": 5, "activations": 2},
    "t5": {"norms": 12, "mlps": 4},
}


@pytest.mark.parametrize("family", EXPECTED)
def test_structure_is_recognised(family):
    fused = unwrap(make_model(family, make_config(family, "lora"))).fused
    assert {name: fused[name] for name in EXPECTED[family]} == EXPECTED[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_parameters_are_those_of_peft(family):
    names = [
        [name for name, _ in make_model(family, make_config(family, "lora", enabled=on)).named_parameters()]
        for on in (True, False)
    ]
    assert names[0] == names[1]


def test_the_module_table_names_seven_families():
    assert set(fusion_cases.FAMILIES) == {"llama", "qwen3", "gemma3", "gpt2", "bert", "vit", "t5"}


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama", "lora"),
        ("gemma3", "dora"),
        ("bert", "qlora"),
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in itertools.product(("llama", "gpt2"), METHODS[1:])),
    ],
)
def test_whole_models_on_the_triton_kernels_equal_those_on_the_cpu(family, method):
    """In the interpreter where there is no GPU; with dropout, because both draw the same masks."""
    with use_backend("triton"):
        found = train(family, method, p=0.1, steps=2)
    assert found == pytest.approx(train(family, method, p=0.1, steps=2), rel=1e-5)
