"""What a run writes into its directory, against what is free there. Pure; no torch."""

from .errors import InfeasibleError
from .markup import size
from .memory import checkpoint_bytes
from .moments import DTYPE_BYTES
from .plan import Plan
from .profile_numbers import Counts


def result_bytes(plan: Plan, counts: Counts) -> int:
    """An adapter, or the whole model, in the dtype of the model."""
    written = counts.trainable if plan.config.makes_adapter else counts.total
    return DTYPE_BYTES[plan.config.model.dtype] * written


def check_room(plan: Plan, counts: Counts, *, free_bytes: int, has_checkpoint: bool) -> None:
    """Raises InfeasibleError where the checkpoints that the run must hold at a time, and its result, find no room.

    A new checkpoint is whole before an old one is deleted. A run that goes on has one already, and one that only saves
    at its end never holds two.
    """
    num_new = 1 if has_checkpoint or plan.config.checkpoint.every_steps is None else 2
    one, result = checkpoint_bytes(plan, counts), result_bytes(plan, counts)
    needed = num_new * one + result
    if needed <= free_bytes:
        return
    fewer = "; checkpoint.every_steps= saves only at the end" if num_new > 1 and one + result <= free_bytes else ""
    raise InfeasibleError(
        f"{plan.config.name} does not fit on the disk of {plan.run_dir}: {num_new} x {size(one)} for checkpoints and "
        f"{size(result)} for the result are {size(needed)}, {size(free_bytes)} are free. Free some, or choose a "
        f"runs_dir with more{fewer}"
    )
