"""Plan -> the DeepSpeed JSON. Sizes of buffers are explicit: memory is predicted from the same numbers. No torch."""

from dataclasses import dataclass
from typing import Any

from .plan import Plan

BUCKET_ELEMENTS = 50_000_000
"""Bounds the buckets of gradients on their way to the rank that owns them, and of weights on their way back."""
OFFLOAD_BUCKET_ELEMENTS = 10_000_000
"""The same where something is offloaded because memory is short."""
LIVE_ELEMENTS = 100_000_000
"""Stage 3: gathered parameters that are kept for their next use, in elements, at most."""
PERSISTENT_ELEMENTS = 100_000
"""Stage 3: parameters of at most this size are never partitioned."""
SUB_GROUP_ELEMENTS = 25_000_000
"""Optimizer state in files is read, updated and written in pieces of this size (or of one parameter, if larger)."""
ONE_SUB_GROUP = 10**12
OPTIMIZER_BUFFERS = 4
"""Of one piece each: master weights, gradient and the two moments of AdamW."""
MIN_PARAMETER_BUFFERS = 5
AIO = {
    "block_size": 2**20,
    "queue_depth": 8,
    "intra_op_parallelism": 1,
    "single_submit": False,
    "overlap_events": True,
}


@dataclass(frozen=True)
class Extent:
    """What the buffers of offloaded parameters follow from.

    `largest_piece` is the most elements of one parameter that one rank keeps; `pieces_at_once` the most parameters
    that one module computes with.
    """

    largest_piece: int
    pieces_at_once: int


def deepspeed_config(plan: Plan, num_trained: int) -> dict[str, Any]:
    """The settings of a plan, without offload. `num_trained` elements bound the reduction buckets."""
    is_partitioned = plan.zero_stage > 0
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "communication_data_type": "fp32",
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        # On a CPU the host's memory is the device's, and offloaded state is updated as any other.
        "zero_force_ds_cpu_optimizer": plan.device == "cuda",
        "zero_optimization": {"stage": plan.zero_stage},
    }
    if is_partitioned:
        bucket = bucket_elements(plan, num_trained)
        config["gradient_clipping"] = plan.config.train.max_grad_norm
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["bf16"] = {"enabled": plan.config.model.dtype == "bf16", "check_grad_overflow": True}
        config["zero_optimization"] |= {
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": plan.device == "cuda",
            "contiguous_gradients": True,
            "reduce_scatter": True,
            # Each gradient goes to the rank that owns it; in one all-reduce they would go to all. On 4 ranks joined by
            # gloo that saves a quarter of a step's bytes; its reduce between 2 ranks sends as much as its all-reduce.
            "use_multi_rank_bucket_allreduce": plan.device == "cpu" and plan.world_size <= 2,
        }
    if plan.zero_stage == 3:
        config["zero_optimization"] |= _gathering(plan)
    return config


def bucket_elements(plan: Plan, num_trained: int) -> int:
    """Elements of a reduction bucket: even, and no more than there are to reduce."""
    is_offloaded = (plan.offload_optimizer, plan.offload_param) != ("none", "none")
    return min(OFFLOAD_BUCKET_ELEMENTS if is_offloaded else BUCKET_ELEMENTS, num_trained + num_trained % 2)


def _gathering(plan: Plan) -> dict[str, int]:
    """Stage 3: how far ahead parameters are gathered, and how long they are kept."""
    return {
        # DeepSpeed 0.19 may read a parameter that it reads ahead from files into two of its buffers.
        "stage3_prefetch_bucket_size": 0 if plan.offload_param == "nvme" else BUCKET_ELEMENTS,
        "stage3_max_live_parameters": LIVE_ELEMENTS,
        "stage3_max_reuse_distance": 0 if plan.offload_param != "none" else BUCKET_ELEMENTS,
        "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
        "sub_group_size": SUB_GROUP_ELEMENTS if plan.offload_optimizer == "nvme" else ONE_SUB_GROUP,
    }


def offload_config(plan: Plan, *, folder: str | None, extent: Extent) -> dict[str, Any]:
    """The further settings of a plan with offload, to be merged: `zero_optimization` and `aio`; empty without.

    `folder` is where files of this rank go; None where nothing is offloaded to them.
    """
    zero: dict[str, Any] = {}
    pinned = plan.device == "cuda"
    if plan.offload_optimizer != "none":
        zero["offload_optimizer"] = {
            "device": plan.offload_optimizer,
            "nvme_path": folder,
            "pin_memory": pinned,
            "buffer_count": OPTIMIZER_BUFFERS,
            "pipeline_read": False,
            "pipeline_write": False,
            "fast_init": False,
        }
    if plan.offload_param != "none":
        zero["offload_param"] = {
            "device": plan.offload_param,
            "nvme_path": folder,
            "pin_memory": pinned,
            "buffer_count": max(MIN_PARAMETER_BUFFERS, extent.pieces_at_once + 1),
            "buffer_size": extent.largest_piece,
            "max_in_cpu": 0,
        }
    return {"zero_optimization": zero} | ({"aio": AIO} if folder is not None else {})
