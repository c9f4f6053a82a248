"""What `burnish plan` answers: the plan, predicted memory and estimated time, the candidates, the alternatives."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from ..harness.candidates import Candidate, survey
from ..harness.changes import changed, other_results
from ..harness.errors import BurnishError
from ..harness.memory import state_bytes
from ..harness.plan import Plan, Resources
from ..harness.planner import Choice
from .planning import Planned

KIND = ("zero_stage", "offload_optimizer", "offload_param", "offload_activations", "activation_checkpointing")
"""Candidates that differ in the micro-batch alone are of one kind."""
NUM_FITTING, NUM_TOO_LARGE = 8, 5
"""Kinds of candidates that are shown."""


def estimate(plan: Plan, resources: Resources, planned: Planned | None = None) -> dict[str, Any]:
    """The plan with its parameter counts and bytes per worker, and all else that planning found out.

    Reads the model's config, no weights. Raises ConfigError for a model that is not there or an adapter that does not
    fit it.
    """
    from ..harness.models import count_parameters

    config = plan.config
    profile = None if planned is None else planned.profile
    counts = profile.counts if profile else count_parameters(config, getattr(config.task, "labels", None))
    answer = {
        "plan": plan.to_dict(),
        "batch": {
            "global_batch_size": config.train.global_batch_size,
            "micro_batch_size": plan.micro_batch_size,
            "gradient_accumulation_steps": plan.gradient_accumulation_steps,
            "world_size": plan.world_size,
        },
        "resources": asdict(resources),
        "parameters": {"total": counts.total, "trainable": counts.trainable, "quantized": counts.quantized},
        "state_bytes_per_worker": state_bytes(plan, counts),
        "budget_bytes_per_worker": budget_bytes(plan, resources),
    }
    if planned is None or planned.choice is None or profile is None:
        return answer
    choice = planned.choice
    shape = {"num_layers": profile.num_layers, "hidden_size": profile.hidden_size, "vocab_size": profile.vocab_size}
    return answer | {
        "shape": shape,
        "prediction": choice.prediction.to_dict(),
        "limits": asdict(choice.limits),
        "cost": choice.chosen.cost.to_dict(),
        "speeds": asdict(choice.speeds),
        "candidates": [row(candidate, choice) for candidate in shown(choice)],
        "num_candidates": len(choice.candidates),
        "num_fitting": sum(candidate.fits for candidate in choice.candidates),
        "other_results": list(alternatives(planned)),
        "calibration": planned.calibration.to_dict() if planned.calibration else None,
    }


def budget_bytes(plan: Plan, resources: Resources) -> int:
    """What a worker may use: memory.budget, the GPU's memory, or its share of the host's."""
    if plan.config.memory.budget != "auto":
        return plan.config.memory.budget
    if plan.device == "cuda":
        return resources.device_memory_bytes
    return resources.host_memory_bytes // -(-plan.world_size // resources.num_nodes)


def row(candidate: Candidate, choice: Choice) -> dict[str, Any]:
    """A candidate as one flat record."""
    return {
        **candidate.settings,
        "gradient_accumulation_steps": candidate.plan.gradient_accumulation_steps,
        "peak_bytes": candidate.prediction.peak_bytes,
        "host_bytes": candidate.prediction.host_bytes,
        "nvme_bytes": candidate.prediction.nvme_bytes,
        "step_s": candidate.step_s,
        "wire_bytes": candidate.wire_bytes,
        "fits": candidate.fits,
        "over_bytes": dict(candidate.over),
        "is_chosen": candidate.settings == choice.chosen.settings,
    }


def shown(choice: Choice) -> list[Candidate]:
    """The one that is taken, then the fastest of each other kind, then what the usual micro-batch is too large for."""
    kinds: dict[tuple[Any, ...], list[Candidate]] = {}
    for candidate in choice.candidates:
        kinds.setdefault(tuple(candidate.settings[name] for name in KIND), []).append(candidate)
    own = tuple(choice.chosen.settings[name] for name in KIND)
    kinds.pop(own)
    fastest = [min(some, key=_order) for some in kinds.values()]
    fitting = sorted((one for one in fastest if one.fits), key=_order)
    usual = [one for one in choice.candidates if one.plan.micro_batch_size == choice.default.micro_batch_size]
    too_large = sorted((one for one in usual if not one.fits), key=_order)
    return [choice.chosen, *fitting[:NUM_FITTING], *too_large[:NUM_TOO_LARGE]]


def _order(candidate: Candidate) -> tuple[Any, ...]:
    """What fits first, then the fastest; of what does not fit, what is nearest to it."""
    return (not candidate.fits, sum(candidate.over.values()), candidate.step_s)


def alternatives(planned: Planned) -> Iterable[dict[str, Any]]:
    """What training something else, or with other numbers, would take: never chosen by `auto`."""
    config = planned.plan.config
    for values in other_results(config):
        other = changed(config, values)
        if other is None:
            continue
        try:
            found = survey(other, planned.resources, planned.profile_of(other), calibration=planned.calibration)
        except BurnishError:
            continue
        yield {
            "changes": dict(values),
            "peak_bytes": found.best.prediction.peak_bytes,
            "step_s": found.best.step_s,
            "fits": found.best.fits,
            "settings": found.best.settings,
        }
