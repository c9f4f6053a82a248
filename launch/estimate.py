"""What `burnish plan` says: batch arithmetic, every choice with its reason, parameters and the bytes they cost."""

from typing import Any

from ..harness.markup import size
from ..harness.memory import state_bytes
from ..harness.plan import Plan, Resources


def estimate(plan: Plan, resources: Resources) -> dict[str, Any]:
    """The plan with its parameter counts and bytes per worker. Reads the model's config, no weights.

    Raises ConfigError for a model that is not there or an adapter that does not fit it.
    """
    from ..harness.models import count_parameters

    config = plan.config
    labels = getattr(config.task, "labels", None)
    counts = count_parameters(config, labels)
    return {
        "plan": plan.to_dict(),
        "batch": {
            "global_batch_size": config.train.global_batch_size,
            "micro_batch_size": plan.micro_batch_size,
            "gradient_accumulation_steps": plan.gradient_accumulation_steps,
            "world_size": plan.world_size,
        },
        "parameters": {"total": counts.total, "trainable": counts.trainable, "quantized": counts.quantized},
        "state_bytes_per_worker": state_bytes(plan, counts),
        "budget_bytes_per_worker": budget_bytes(plan, resources),
    }


def budget_bytes(plan: Plan, resources: Resources) -> int:
    """What a worker may use: memory.budget, the GPU's memory, or its share of the host's."""
    if plan.config.memory.budget != "auto":
        return plan.config.memory.budget
    if plan.device == "cuda":
        return resources.device_memory_bytes
    return resources.host_memory_bytes // -(-plan.world_size // resources.num_nodes)


def render(answer: dict[str, Any]) -> str:
    """The estimate as text."""
    plan, batch, parameters = answer["plan"], answer["batch"], answer["parameters"]
    share = 100 * parameters["trainable"] / max(1, parameters["total"])
    lines = [
        f"{plan['config']['name']}: {plan['world_size']} x {plan['device']}, run directory {plan['run_dir']}",
        "",
        f"batch        {batch['global_batch_size']} examples a step = {batch['micro_batch_size']} micro-batch x "
        f"{batch['gradient_accumulation_steps']} accumulation x {batch['world_size']} workers",
        f"parameters   {parameters['total']:,} in all, {parameters['trainable']:,} trained ({share:.2g} %)"
        + (f", {parameters['quantized']:,} quantised" if parameters["quantized"] else ""),
        "",
        "state per worker (activations come on top)",
        *(
            f"  {name.replace('_', ' '):<20}{size(value):>12}"
            for name, value in answer["state_bytes_per_worker"].items()
        ),
        f"  {'of a budget of':<20}{size(answer['budget_bytes_per_worker']):>12}",
        "",
        "chosen",
        *(f"  {row['key']:<30}{row['value']:<12}{row['why']}" for row in plan["decisions"]),
    ]
    return "\n".join(lines)
