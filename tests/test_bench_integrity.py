"""Committed results agree with themselves: medians with samples, derived numbers with what they follow from."""

import pytest
from burnish.bench.stats import paired_ratios, quantiles
from burnish.bench.verify import DERIVED, medians


def test_medians_are_found_wherever_their_samples_lie():
    samples = [1.0, 2.0, 4.0]
    stored = {"q1": 1.5, "median": 2.0, "q3": 3.5}
    value = {
        "ratio": {"peft": stored | {"samples": samples}},
        "contenders": {"burnish": {"samples": samples, "time_s": stored}},
        "times_s": samples,
        "time_s": stored,
        "losses": [{"samples": [], "median": 5.0}],
    }
    wrong = [where for where, kept, computed in medians(value, "row") if kept != computed]
    assert wrong == ["row time_s q3", "row ratio peft q3", "row contenders burnish time_s q3"]


def kernel_result():
    times = {"burnish": [1.0, 2.0, 4.0], "reference": [3.0, 5.0, 8.0], "frozen": [1.0, 1.5, 3.0]}
    entries = {name: {"samples": samples, "time_s": quantiles(samples)} for name, samples in times.items()}
    row = {
        "key": "op",
        "contenders": entries | {"liger": {"samples": [], "time_s": None}},
        "ratio": {"reference": paired_ratios(times["reference"], times["burnish"])},
        "over_frozen": {"burnish": quantiles([1.0, 2 / 1.5, 4 / 3])},
        "floor_s": 0.5,
        "share_of_peak": 0.25,
    }
    return {"benchmark": "kernels", "rows": [row]}


def step_result():
    rounds = [{"peft": 3.0, "burnish": 1.0}, {"peft": 9.0, "burnish": 9.0}, {"peft": 8.0, "burnish": 2.0}]
    facts = {"rounds": rounds, "counted_rounds": [0, 2], "baseline": "peft", "own": "burnish"}
    facts["workload"] = {"num_sequences": 4, "length": 300}
    row = {"key": "case · peft", "case": "case", "mode": "peft", "facts": facts, "time_s": {"median": 5.5}}
    row |= {"tokens_per_s": 1200 / 5.5, "flops_per_token": 10.0, "mfu": 120 / 5.5, "faster": {"median": 3.5}}
    return {"benchmark": "step", "peaks": {"bfloat16": {"flops_per_s": 100.0}}, "rows": [row]}


def memory_result():
    probes = [{"tokens": 256, "peak_bytes": 10}, {"tokens": 512, "peak_bytes": 20}]
    row = {"key": "length", "kind": "length", "max_tokens": 512, "peak_bytes": 20, "probes": probes}
    return {"benchmark": "memory", "rows": [row]}


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (kernel_result, ("ratio", "reference", "median")),
        (kernel_result, ("over_frozen", "burnish", "median")),
        (kernel_result, ("share_of_peak",)),
        (step_result, ("time_s", "median")),
        (step_result, ("tokens_per_s",)),
        (step_result, ("mfu",)),
        (step_result, ("faster", "median")),
        (memory_result, ("peak_bytes",)),
    ],
)
def test_numbers_that_follow_from_others_are_computed_again(make, place):
    result = make()
    [row] = result["rows"]
    derived = DERIVED[result["benchmark"]]
    numbers = list(derived(row, result))
    assert numbers
    assert all(stored == pytest.approx(computed) for _, stored, computed in numbers)
    holder = row
    for name in place[:-1]:
        holder = holder[name]
    holder[place[-1]] *= 1.001
    wrong = [what for what, stored, computed in derived(row, result) if stored != pytest.approx(computed)]
    assert len(wrong) == 1
    assert wrong[0].startswith(row["key"])
