"""Why the planner took what it took: one sentence for every value that was `auto`. Pure; no torch."""

from typing import Any

from .calibration import Calibration
from .candidates import SETTINGS, Candidate, Survey
from .markup import size
from .plan import Decision

DERIVED = ("gradient_accumulation_steps", "engine")
"""Decisions of make_plan that follow from the settings."""
OFFLOADS = ("offload_optimizer", "offload_param")


def decisions(survey: Survey, calibration: Calibration | None = None) -> tuple[Decision, ...]:
    """Those of make_plan, and in their places the reasons for what differs from them."""
    default, plan = survey.default, survey.best.plan
    derived = {row.key: row for row in plan.decisions if row.key in DERIVED}
    changed = [name for name in SETTINGS if getattr(plan, name) != getattr(default, name)]
    own = {name: Decision(name, written(getattr(plan, name)), why(name, survey)) for name in changed}
    rows = [derived.get(row.key, own.pop(row.key, row)) for row in default.decisions]
    place = next((i for i, row in enumerate(rows) if row.key == "num_threads"), len(rows))
    rows[place:place] = own.values()
    if calibration is not None:
        times = "once" if calibration.num_samples == 1 else f"{calibration.num_samples} times"
        rows.append(Decision("calibration", "used", f"plan --verify ran {times} on {calibration.hardware}"))
    return tuple(rows)


def why(name: str, survey: Survey) -> str:
    """What the value of `make_plan` would have meant, with everything else as it was chosen."""
    if survey.is_as_before:
        return "as the run was planned before"
    usual = getattr(survey.default, name)
    twin = nearest(survey.best, survey, name, usual)
    if name == "zero_stage":
        lost = [
            f"{place}={survey.best.settings[place]}"
            for place in OFFLOADS
            if survey.best.settings[place] != "none" and (twin is None or twin.settings[place] == "none")
        ]
        if lost:
            return f"for {' and '.join(lost)}"
    if twin is None:
        return f"{written(usual)} cannot be had with the rest"
    if not twin.fits:
        return f"{written(usual)} does not fit: {excess(twin, survey)}"
    percent = 100 * (twin.step_s / survey.best.step_s - 1)
    return f"{written(usual)} would take {percent:.0f} % longer by the estimate"


def nearest(candidate: Candidate, survey: Survey, name: str, value: Any) -> Candidate | None:
    """Of the candidates with another value of one setting, the one that differs least in the others."""
    found = [other for other in survey.candidates if other.settings[name] == value]
    return min(found, key=lambda other: _distance(candidate, other), default=None)


def _distance(one: Candidate, other: Candidate) -> int:
    return sum(value != other.settings[name] for name, value in one.settings.items())


def excess(candidate: Candidate, survey: Survey) -> str:
    """What a candidate that does not fit needs, and what there is, for each place that is too small."""
    prediction, limits = candidate.prediction, survey.limits
    device = "GPU" if candidate.plan.device == "cuda" else "worker"
    told = {
        "device": f"{size(prediction.needed_bytes)} of {size(limits.device_bytes)} a {device}",
        "host": f"{size(prediction.host_bytes)} of {size(limits.host_bytes)} of host memory a worker",
        "nvme": f"{size(prediction.nvme_bytes)} of {size(limits.nvme_bytes)} on disk a worker",
    }
    return ", ".join(told[place] for place in candidate.over)


def written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
