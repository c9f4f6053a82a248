"""The moments of a training step when memory may be fullest, with what there is beyond the engine's lasting state.

What layers, head and embedding take is the profile's; what gradients take on their way to the optimizer follows from
the engine: torch's own accumulation, or DeepSpeed's buckets and partitions (deepspeed/runtime/zero of 0.19). No torch.
"""

from dataclasses import dataclass

from .plan import Plan
from .profile_numbers import Activations, Counts, Profile
from .zero_config import BUCKET_ELEMENTS, bucket_elements

FP32_BYTES = 4
DTYPE_BYTES = {"fp32": FP32_BYTES, "bf16": 2}
ROUND_PACKED = 128
"""A packed row is filled up to a multiple of this."""
FLATTENED_ELEMENTS = 500_000_000
"""Stage 0 and 1: gradients that DeepSpeed copies into one tensor to reduce them."""
GATHER_COPIES = {"cpu": 2.1, "cuda": 1.5}
"""Device -> bytes that a byte takes of what is gathered ahead: in one tensor with others until all of them were used,
in its own then, and in gloo's buffer under way. On a CPU as measured with Llamas of 0.1B to 0.6B on two ranks."""
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
    bucket: int = 0
    """During backward, from its first gradient on."""
    kept_bucket: int = 0
    """One that is never freed."""
    in_flight: int = 0
    """During backward, while a full bucket is reduced."""
    at_end: int = 0
    """When backward has ended: copies on their way to other ranks."""

    @property
    def buckets(self) -> int:
        return self.kept_bucket + self.bucket


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
    ahead, once, at_head, last = gathered(plan, profile)
    always, moving = {"reduce_buckets": gradients.kept_bucket}, {"reduce_buckets": gradients.buckets}
    reducing = {"reduce_buckets": gradients.buckets + gradients.in_flight}
    left = outside + round((saved - outside) * (1 - reduced_share(plan, profile)))
    ended = reducing["reduce_buckets"] + gradients.at_end
    found = {
        "forward": {"gradients": kept, "activations": saved, "working": forward} | ahead | always,
        "head": {"gradients": after_head, "activations": saved, "logits_loss": logits} | at_head | always,
        "last layer": {"gradients": after_head + in_layer, "activations": saved, "working": backward} | ahead | moving,
        "first layer": {"gradients": all_made, "activations": outside + layer, "working": backward} | last | reducing,
        "embedding": {"gradients": all_made, "working": embedding} | last | reducing,
        "reduction": {"gradients": all_made, "reduce_buckets": ended},
        "optimizer": {"gradients": all_made, "working": optimizer_working(plan, profile)} | always,
    }
    if gradients.in_flight:
        found["first bucket"] = {"gradients": all_made, "activations": left, "working": backward} | once | reducing
    return found


def reduced_share(plan: Plan, profile: Profile) -> float:
    """Of the layers, that backward has come through when the first bucket is full."""
    in_layers = profile.num_layers * profile.layer.trainable
    of_layers = max(0, bucket_elements(plan, profile.counts.trainable) - profile.head.trainable)
    return min(1.0, of_layers / in_layers) if in_layers else 0.0


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
    """DeepSpeed's stage 3 joins this rank's gradients in a tensor of their own before the update."""
    if plan.zero_stage == 3 and plan.offload_optimizer == "none":
        joined = FP32_BYTES * profile.counts.trainable // plan.world_size
    else:
        joined = 0
    return joined + OPTIMIZER_COPIES[plan.config.optimizer.name][plan.device] * FP32_BYTES * profile.largest_trained


def gradients_of(plan: Plan, profile: Profile) -> Gradients:
    """Of the plan's engine and stage, see the sources named above."""
    return GRADIENTS[plan.zero_stage](plan, profile)


def _accumulated_by_torch(plan: Plan, profile: Profile) -> Gradients:
    """fp32, added up over micro-batches; with more than one rank DeepSpeed copies them into one tensor to reduce."""
    is_added = plan.gradient_accumulation_steps > 1
    flattened = min(profile.counts.trainable, FLATTENED_ELEMENTS) if plan.engine == "deepspeed" else 0
    return Gradients(kept=4 if is_added else 0, made=0 if is_added else 4, at_end=FP32_BYTES * flattened)


def _in_whole_on_every_rank(plan: Plan, profile: Profile) -> Gradients:
    """Stage 1. bf16: gradients in bf16 and their fp32 sum stay allocated from step to step."""
    trained = profile.counts.trainable
    flattened = FP32_BYTES * min(trained, FLATTENED_ELEMENTS)
    if plan.config.model.dtype == "bf16":
        return Gradients(kept=FP32_BYTES + 2, made=0, at_end=flattened)
    is_added = plan.gradient_accumulation_steps > 1
    bucket = FP32_BYTES * bucket_elements(plan, trained)
    return Gradients(kept=4 if is_added else 0, made=0 if is_added else 4, at_end=bucket + 4 * trained)


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
        return Gradients(kept=share, made=0, bucket=num_buckets * dtype_bytes * bucket, in_flight=reduced)
    return Gradients(kept=0, made=dtype_bytes, at_end=reduced + round(share * trained))


def _all_partitioned(plan: Plan, profile: Profile) -> Gradients:
    """Stage 3: the same, with an fp32 bucket and an fp32 part of the sum that are never freed."""
    bucket = bucket_elements(plan, profile.counts.trainable)
    in_flight = (FP32_BYTES + gloo_bytes(plan)) * bucket
    return Gradients(kept=FP32_BYTES / plan.world_size, made=0, kept_bucket=FP32_BYTES * bucket, in_flight=in_flight)


def gloo_bytes(plan: Plan) -> int:
    """Of each fp32 number that ranks on CPUs reduce, in a buffer that gloo allocates."""
    return FP32_BYTES if plan.device == "cpu" and plan.world_size > 1 else 0


def gathered(plan: Plan, profile: Profile) -> list[Moment]:
    """Stage 3: while more is gathered ahead, with none of it under way, at the head, and when the layers are done.

    Ahead is one bucket in use and the next one. At the head there is what backward is about to use again.
    """
    if plan.zero_stage != 3:
        return [{"gather_buffers": 0}] * 4
    layer, embedding, head = (weighed(plan, one, 1) for one in (profile.layer, profile.embedding, profile.head))
    most, total = max(layer, embedding), weighed(plan, profile.counts, 1)
    ahead = min(total, most + (0 if plan.offload_param == "nvme" else 2 * BUCKET_ELEMENTS))
    at_head = min(total, max(most, head) + (0 if plan.offload_param != "none" else BUCKET_ELEMENTS))
    holes = GATHER_HOLES if plan.device == "cpu" and profile.is_on_heap else 0
    counts = (GATHER_COPIES[plan.device] + holes) * ahead + layer, (1 + holes) * ahead, at_head, most
    whole = weighed(plan, profile.counts, DTYPE_BYTES[plan.config.model.dtype])
    return [{"gather_buffers": round(whole * count / total)} for count in counts]


def weighed(plan: Plan, counts: Counts, each: int) -> float:
    """`each` for a weight as it is, and the bytes of a quantised one, whose tensors have an element for a byte."""
    packed = QUANTIZED_BYTES.get(plan.config.quantization.type, 0) * counts.quantized
    return each * (counts.total - counts.quantized) + packed


GRADIENTS = {0: _accumulated_by_torch, 1: _in_whole_on_every_rank, 2: _partitioned, 3: _all_partitioned}
