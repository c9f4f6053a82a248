"""The moments of a training step when memory may be fullest, with what there is beyond the engine's lasting state.

What layers, head and embedding take is the profile's; what gradients take on their way to the optimizer follows from
the engine: torch's own accumulation, or DeepSpeed's buckets and partitions (deepspeed/runtime/zero of 0.19). No torch.
"""

from dataclasses import dataclass

from .plan import Plan
from .profile_numbers import Activations, Profile
from .zero_config import BUCKET_ELEMENTS, LIVE_ELEMENTS, bucket_elements

FP32_BYTES = 4
DTYPE_BYTES = {"fp32": FP32_BYTES, "bf16": 2}
ROUND_PACKED = 128
"""A packed row is filled up to a multiple of this."""
FLATTENED_ELEMENTS = 500_000_000
"""Stage 0 and 1: gradients that DeepSpeed copies into one tensor to reduce them."""
GATHER_COPIES = {"cpu": 2.0, "cuda": 1.0}
"""Device -> bytes that a gathered byte takes: as measured with SmolLM2-135M on one and two ranks, LoRA and whole."""
GATHER_HOLES = 0.4
"""The same beside them on the C library's heap, between gathered parameters that come and go."""
QUANTIZED_BYTES = {"nf4": 0.5, "int8": 1.0}
OPTIMIZER_COPIES = {
    "adamw": {"cpu": 0, "cuda": 0},
    # On a CPU bitsandbytes unpacks both moments and computes in fp32 beside them.
    "adamw_8bit": {"cpu": 6, "cuda": 0},
    "sgd": {"cpu": 1, "cuda": 1},
    "rmsprop": {"cpu": 2, "cuda": 2},
    "adafactor": {"cpu": 3, "cuda": 3},
}
"""fp32 copies of the parameter that is updated at the time, which the optimizer makes on its way."""

Moment = dict[str, int]


@dataclass(frozen=True)
class Gradients:
    """What gradients take: bytes per trained weight all the time, bytes of those that backward has made, and copies."""

    kept: float
    """Per trained weight, from before the forward pass to the optimizer's step."""
    made: float
    """Per trained weight of what backward has come through."""
    buckets: int
    """During backward."""
    at_end: int
    """When backward has ended: copies on their way to other ranks."""


def size_of(plan: Plan, profile: Profile, *, num_examples: int | None = None) -> tuple[int, int]:
    """Tokens of a full micro-batch, and of one example; an image counts as one token."""
    count = plan.micro_batch_size if num_examples is None else num_examples
    if profile.is_per_example:
        return count, 1
    length = plan.config.data.max_length
    tokens = count * length
    if plan.config.data.packing:
        tokens = length = -(-tokens // ROUND_PACKED) * ROUND_PACKED
    return tokens, length


def moments_of_step(plan: Plan, profile: Profile) -> dict[str, Moment]:
    """Name of a moment -> bytes by part, above weights, master weights and optimizer state."""
    policy, trained = profile.policies[plan.activation_checkpointing], profile.counts.trainable
    tokens, length = size_of(plan, profile)
    gradients = gradients_of(plan, profile)
    layer = policy.layer_saved.at(tokens, length)
    outside = policy.outside_saved.at(tokens, length)
    saved = outside + profile.num_layers * layer
    head_trained = profile.head.trainable or profile.embedding.trainable
    kept = round(gradients.kept * trained)
    after_head = kept + round(gradients.made * head_trained)
    in_layer = round(gradients.made * profile.layer.trainable)
    all_made = kept + round(gradients.made * trained)
    forward = highest(policy.forward_working, tokens, length)
    backward = highest(policy.backward_working, tokens, length)
    logits = head_bytes(plan, profile, policy, tokens)
    embedding = highest(policy.embedding_working, tokens, length)
    gathered = {"gather_buffers": gathered_bytes(plan, profile)}
    moving = gathered | {"reduce_buckets": gradients.buckets}
    ended = gradients.buckets + gradients.at_end
    return {
        "forward": {"gradients": kept, "activations": saved, "working": forward} | gathered,
        "head": {"gradients": after_head, "activations": saved, "logits_loss": logits} | gathered,
        "last layer": {"gradients": after_head + in_layer, "activations": saved, "working": backward} | moving,
        "first layer": {"gradients": all_made, "activations": outside + layer, "working": backward} | moving,
        "embedding": {"gradients": all_made, "working": embedding} | moving,
        "reduction": {"gradients": all_made, "reduce_buckets": ended},
        "optimizer": {"gradients": all_made, "working": optimizer_working(plan, profile)},
    }


def highest(lines: tuple, tokens: int, length: int) -> int:
    return max([0, *(line.at(tokens, length) for line in lines)])


def head_bytes(plan: Plan, profile: Profile, policy: Activations, tokens: int) -> int:
    rows = tokens if profile.chunk_tokens is None else chunk_rows(tokens, profile.chunk_tokens[plan.device])
    return max([0, *(line.at(tokens, rows) for line in policy.head)])


def chunk_rows(num_tokens: int, limit: int) -> int:
    """Rows of logits that exist at a time: chunks of a micro-batch are alike, see kernels/linear_cross_entropy.py."""
    num_chunks = max(1, -(-num_tokens // limit))
    return min(limit, max(16, -(-num_tokens // num_chunks // 16) * 16))


def optimizer_working(plan: Plan, profile: Profile) -> int:
    return OPTIMIZER_COPIES[plan.config.optimizer.name][plan.device] * FP32_BYTES * profile.largest_trained


def gradients_of(plan: Plan, profile: Profile) -> Gradients:
    """Of the plan's engine and stage, see the sources named above."""
    return GRADIENTS[plan.zero_stage](plan, profile)


def _accumulated_by_torch(plan: Plan, profile: Profile) -> Gradients:
    """fp32, added up over micro-batches; with more than one rank DeepSpeed copies them into one tensor to reduce."""
    is_added = plan.gradient_accumulation_steps > 1
    flattened = min(profile.counts.trainable, FLATTENED_ELEMENTS) if plan.engine == "deepspeed" else 0
    return Gradients(kept=4 if is_added else 0, made=0 if is_added else 4, buckets=0, at_end=FP32_BYTES * flattened)


def _in_whole_on_every_rank(plan: Plan, profile: Profile) -> Gradients:
    """Stage 1. bf16: gradients in bf16 and their fp32 sum stay allocated from step to step."""
    trained = profile.counts.trainable
    flattened = FP32_BYTES * min(trained, FLATTENED_ELEMENTS)
    if plan.config.model.dtype == "bf16":
        return Gradients(kept=FP32_BYTES + 2, made=0, buckets=0, at_end=flattened)
    is_added = plan.gradient_accumulation_steps > 1
    bucket = FP32_BYTES * bucket_elements(plan, trained)
    return Gradients(kept=4 if is_added else 0, made=0 if is_added else 4, buckets=0, at_end=bucket + 4 * trained)


def _partitioned(plan: Plan, profile: Profile) -> Gradients:
    """Stage 2: a bucket in the dtype of the weights, reduced in fp32, into this rank's part of the fp32 sum."""
    trained, dtype_bytes = profile.counts.trainable, DTYPE_BYTES[plan.config.model.dtype]
    bucket = bucket_elements(plan, trained)
    num_buckets = 2 if plan.device == "cuda" else 1
    is_filled_early = trained > bucket or plan.gradient_accumulation_steps > 1
    share = FP32_BYTES / plan.world_size
    # The pieces of one owner are joined, cast to fp32, and reduced in a buffer of gloo's own.
    reduced = (dtype_bytes + FP32_BYTES + gloo_bytes(plan)) * bucket
    if is_filled_early:
        return Gradients(kept=share, made=0, buckets=num_buckets * dtype_bytes * bucket + reduced, at_end=0)
    return Gradients(kept=0, made=dtype_bytes, buckets=0, at_end=reduced + round(share * trained))


def _all_partitioned(plan: Plan, profile: Profile) -> Gradients:
    """Stage 3: the same, with an fp32 bucket and an fp32 part of the sum that are never freed."""
    bucket = bucket_elements(plan, profile.counts.trainable)
    in_flight = (2 * FP32_BYTES + gloo_bytes(plan)) * bucket
    return Gradients(kept=FP32_BYTES / plan.world_size, made=0, buckets=in_flight, at_end=0)


def gloo_bytes(plan: Plan) -> int:
    """Of each fp32 number that ranks on CPUs reduce, in a buffer that gloo allocates."""
    return FP32_BYTES if plan.device == "cpu" and plan.world_size > 1 else 0


def gathered_bytes(plan: Plan, profile: Profile) -> int:
    """Stage 3: the layer at work, what is kept for its next use, and what is gathered ahead and then copied out."""
    if plan.zero_stage != 3:
        return 0
    counts = profile.counts
    quantized = QUANTIZED_BYTES.get(plan.config.quantization.type, 0.0) * counts.quantized
    whole = DTYPE_BYTES[plan.config.model.dtype] * (counts.total - counts.quantized) + quantized
    ahead = 0 if plan.offload_param == "nvme" else LIVE_ELEMENTS + BUCKET_ELEMENTS
    num_gathered = max(profile.layer.total, profile.embedding.total) + ahead
    copies = GATHER_COPIES[plan.device] + (GATHER_HOLES if plan.device == "cpu" and profile.is_on_heap else 0)
    return round(copies * whole * min(1.0, num_gathered / counts.total))


GRADIENTS = {0: _accumulated_by_torch, 1: _in_whole_on_every_rank, 2: _partitioned, 3: _all_partitioned}
