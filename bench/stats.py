"""Figures that a few slow samples do not move: medians, quartiles and ratios of samples taken side by side."""

import statistics
from collections.abc import Sequence


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """{q1, median, q3} of at least one sample, linear between neighbours."""
    if len(samples) == 1:
        return {"q1": samples[0], "median": samples[0], "q3": samples[0]}
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return {"q1": q1, "median": median, "q3": q3}


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, object]:
    """{q1, median, q3, samples} of numerator / denominator of the same turn."""
    samples = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return quantiles(samples) | {"samples": samples}
