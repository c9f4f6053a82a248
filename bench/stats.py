"""Figures that a few slow samples do not move: medians, quartiles and ratios of samples, and how sure they are."""

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_RESAMPLINGS = 1000
MAX_FREEDOM = 200
"""Student's distribution is as good as the normal one from here on."""


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


@dataclass(frozen=True)
class Interval:
    """A ratio and the bounds it lies between at the confidence asked for."""

    low: float
    middle: float
    high: float


def ratio_interval(below: Sequence[float], above: Sequence[float], *, error_rate: float) -> Interval:
    """median(above) / median(below) of independent positive samples, at least two on each side, and its bounds.

    `error_rate` is the probability that the truth lies outside them.

    The middle +- Student's t times the standard error, on a logarithmic scale. The error is the bootstrap's: the
    standard deviation of the medians of resampled samples, which an outlier does not move. The degrees of freedom are
    twice those of the smaller side, as if both were of its size. Quantiles of the bootstrap itself would be too narrow:
    they never leave the samples, so that with three on each side one comparison of equal things in ten would find a
    difference, at whatever confidence.
    """
    logs = [np.log(np.asarray(samples, dtype=float)) for samples in (below, above)]
    middle = float(np.median(logs[1]) - np.median(logs[0]))
    error = math.sqrt(sum(map(resampled_variance, logs)))
    freedom = 2 * (min(len(below), len(above)) - 1)
    reach = student_quantile(1 - error_rate / 2, min(freedom, MAX_FREEDOM)) * error
    return Interval(*(math.exp(middle + side * reach) for side in (-1, 0, 1)))


def resampled_variance(values: np.ndarray[Any, Any]) -> float:
    """Variance of the median of as many values drawn with replacement; the same draws every time."""
    return float(np.var(np.median(values[draws(len(values))], axis=1)))


@functools.cache
def draws(num_samples: int) -> np.ndarray[Any, Any]:
    """Which samples each resampling takes [NUM_RESAMPLINGS, num_samples]."""
    return np.random.default_rng(0).integers(0, num_samples, (NUM_RESAMPLINGS, num_samples))


@functools.cache
def student_quantile(probability: float, freedom: int) -> float:
    """The t that Student's distribution of even freedom stays below with `probability`, at least one half."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if central_probability(angle, freedom) < 2 * probability - 1 else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def central_probability(angle: float, freedom: int) -> float:
    """Probability that |t| is below sqrt(freedom) tan(angle), for even freedom.

    A finite sum: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.4.
    """
    assert freedom % 2 == 0, freedom
    total, term = 0.0, 1.0
    for power in range(0, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    return math.sin(angle) * total
