"""`burnish plan --verify`: two steps of the plan are run, and what they took is set beside what was predicted."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..harness import calibration
from ..harness.cost import estimate
from ..harness.errors import ConfigError
from .planning import Planned

TOLERANCE = 0.10
"""Largest relative error of the predicted peak."""
MEASURED_MICRO_BATCHES = 2
"""More of them in a step have no higher peak, so `measure` takes no more."""


def verify(planned: Planned) -> dict[str, Any]:
    """Predicted against measured by phase and by part; the calibration of this hardware gets a sample.

    Raises ConfigError where there is nothing to compare or no way to measure here, OutOfMemory where the steps found
    no memory.
    """
    from ..harness.measure import measure

    plan, profile, choice = planned.plan, planned.profile, planned.choice
    if getattr(plan.config.launch, "address", None) is not None:
        raise ConfigError("--verify measures on this machine, and launch.address is elsewhere; leave one of them out")
    if profile is None or choice is None:
        raise ConfigError("--verify: nothing was predicted for this model, so there is nothing to verify")
    prediction = choice.prediction
    measured = measure(plan, labels=getattr(plan.config.task, "labels", None))
    tried = replace(plan, gradient_accumulation_steps=min(MEASURED_MICRO_BATCHES, plan.gradient_accumulation_steps))
    cost = estimate(tried, profile, choice.speeds)
    phases = compared(prediction.phases, measured.phases)
    hardware = calibration.hardware_name(plan.device, planned.resources.device_name)
    sample = calibration.sample_of(
        plan,
        profile,
        step_bytes=measured.phases["step"],
        baseline_bytes=measured.baseline_bytes,
        step_s=measured.step_s,
        flops=cost.flops,
    )
    error = prediction.peak_bytes / measured.peak_bytes - 1
    return {
        "phases": phases,
        "parts": compared(prediction.device, measured.parts),
        "predicted_bytes": prediction.peak_bytes,
        "measured_bytes": measured.peak_bytes,
        "error": error,
        "tolerance": TOLERANCE,
        "ok": abs(error) <= TOLERANCE,
        "baseline_bytes": measured.baseline_bytes,
        "step_s": measured.step_s,
        "num_micro_batches": tried.gradient_accumulation_steps,
        "estimated_step_s": cost.step_s,
        "losses": list(measured.losses),
        "calibration": str(calibration.add(hardware, sample)),
    }


def compared(predicted: Mapping[str, int], measured: Mapping[str, int]) -> list[dict[str, Any]]:
    """One record for each name in either; the error is relative to what was measured, where both are known."""
    return [
        {
            "name": name,
            "predicted_bytes": predicted.get(name),
            "measured_bytes": measured.get(name),
            "error": predicted[name] / measured[name] - 1 if name in predicted and measured.get(name) else None,
        }
        for name in dict.fromkeys([*predicted, *measured])
        if predicted.get(name) or measured.get(name)
    ]
