"""Estimated seconds of a step, and the bytes it sends and moves: what the planner orders its candidates by. No torch.

A model, not a measurement: multiplications at a stated speed, what memory, links, PCIe and disks carry at theirs. The
examples are taken to be as long as data.max_length allows. Only what differs between candidates has to be right.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from .devices import Speeds
from .memory import DTYPE_BYTES, FP32_BYTES, OPTIMIZER_BYTES, quantized_bytes
from .plan import Plan
from .profile_numbers import Activations, Profile
from .traffic import overlapped_step_s, traffic_bytes, traffic_s, zero_traffic

DEQUANTIZED_BYTES = 2 + 2
"""A weight is written once more in bf16 and read again, each time that a layer is used."""


@dataclass(frozen=True)
class Cost:
    """One optimizer step of one worker. The parts overlap as `Speeds.overlap` says, so they add up to more."""

    step_s: float
    compute_s: float
    """Forward, backward and what activation checkpointing repeats."""
    recompute_s: float
    optimizer_s: float
    communication_s: float
    offload_s: float
    flops: float
    wire_bytes: float
    """Sent to other workers."""
    offload_bytes: float
    """Between device and host, and from and to the disk."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(plan: Plan, profile: Profile, speeds: Speeds, *, reread_bytes: int = 0) -> Cost:
    """The cost of a step with full-length examples on every worker.

    `reread_bytes`: of weights in files that do not stay in memory and are read from disk in every pass.
    """
    forward, backward, recompute = _pass_flops(plan, profile)
    micro_batches = plan.gradient_accumulation_steps
    policy = profile.policies[plan.activation_checkpointing]
    again_bytes = 2 * (_saved_bytes(plan, profile, profile.policies["none"]) - _saved_bytes(plan, profile, policy))
    recompute_s = recompute / speeds.flops_per_s + max(0.0, again_bytes) / speeds.memory_bytes_per_s
    stored, unpacked = _weight_traffic(plan, profile)
    passes = 3 if plan.activation_checkpointing == "full" else 2
    pass_s = [max(flops / speeds.flops_per_s, stored / speeds.memory_bytes_per_s) for flops in (forward, backward)]
    compute_s = micro_batches * (sum(pass_s) + recompute_s + passes * unpacked / speeds.memory_bytes_per_s)
    optimizer_s = _optimizer_s(plan, profile, speeds)
    traffic = _traffic(plan, profile)
    # Where the workers do not fill whole nodes, the model counts smaller nodes.
    per_node = math.gcd(plan.world_size, speeds.fabric.gpus_per_node)
    communication_s = traffic_s(traffic, plan.world_size, replace(speeds.fabric, gpus_per_node=per_node))
    offload_s, offload_bytes = _offload(plan, profile, speeds)
    reread = micro_batches * passes * reread_bytes
    offload_s, offload_bytes = offload_s + reread / speeds.nvme_bytes_per_s, offload_bytes + reread
    return Cost(
        step_s=overlapped_step_s(compute_s, communication_s + offload_s, speeds.overlap) + optimizer_s,
        compute_s=compute_s,
        recompute_s=micro_batches * recompute_s,
        optimizer_s=optimizer_s,
        communication_s=communication_s,
        offload_s=offload_s,
        flops=micro_batches * (forward + backward + recompute),
        wire_bytes=traffic_bytes(traffic, plan.world_size),
        offload_bytes=offload_bytes,
    )


def tokens_of(plan: Plan, profile: Profile) -> tuple[int, int]:
    """Tokens of a full micro-batch, and of one example; an image counts as one."""
    length = 1 if profile.is_per_example else plan.config.data.max_length
    return plan.micro_batch_size * length, length


def _pass_flops(plan: Plan, profile: Profile) -> tuple[float, float, float]:
    """Multiplications and additions of a micro-batch: forward, backward, and the forward of the layers once more.

    A weight costs 2 per token forward, 2 for the gradient of its input and 2 for its own, which frozen weights do
    without; causal attention costs 2 * hidden * length forward and twice that backward, per layer and token
    (PaLM, arXiv 2204.02311, appendix B, which counts the masked half as well). An embedding multiplies nothing unless
    it is the head too.
    """
    tokens, length = tokens_of(plan, profile)
    is_tied = profile.head.total == 0
    multiplied = profile.counts.total - (0 if is_tied else profile.embedding.total)
    trained = profile.counts.trainable - (0 if is_tied else profile.embedding.trainable)
    attention = 0 if profile.is_per_example else 2 * profile.num_layers * profile.hidden_size * length
    outside = profile.embedding.total if is_tied else profile.head.total
    forward = tokens * (2 * multiplied + attention)
    backward = tokens * (2 * multiplied + 2 * trained + 2 * attention)
    recompute = tokens * (2 * (multiplied - outside) + attention)
    return forward, backward, recompute if plan.activation_checkpointing == "full" else 0.0


def _saved_bytes(plan: Plan, profile: Profile, policy: Activations) -> float:
    tokens, length = tokens_of(plan, profile)
    return profile.num_layers * policy.layer_saved.at(tokens, length) + policy.outside_saved.at(tokens, length)


def _weight_traffic(plan: Plan, profile: Profile) -> tuple[float, float]:
    """Bytes read of the stored weights in a pass, and those of unpacking what is quantised."""
    counts, config = profile.counts, plan.config
    whole = DTYPE_BYTES[config.model.dtype] * (counts.total - counts.quantized)
    packed = quantized_bytes(config.quantization, counts.quantized)
    return whole + packed, packed + DEQUANTIZED_BYTES * counts.quantized


def _state_bytes(plan: Plan, profile: Profile) -> float:
    """Optimizer state and master weights of one worker's share."""
    trained = profile.counts.trainable
    masters = FP32_BYTES * trained if plan.config.model.dtype != "fp32" or plan.zero_stage in (1, 2) else 0
    share = plan.world_size if plan.zero_stage >= 1 else 1
    return (OPTIMIZER_BYTES[plan.config.optimizer.name](trained, plan.config.optimizer) + masters) / share


def _update_bytes(plan: Plan, profile: Profile) -> float:
    """The gradients that go to the optimizer and the weights that come back, of one worker's share."""
    share = plan.world_size if plan.zero_stage >= 1 else 1
    return (FP32_BYTES + DTYPE_BYTES[plan.config.model.dtype]) * profile.counts.trainable / share


def _optimizer_s(plan: Plan, profile: Profile, speeds: Speeds) -> float:
    """State is read and written, gradients read, weights written, where the optimizer runs."""
    is_on_host = plan.offload_optimizer != "none"
    moved = 2 * _state_bytes(plan, profile) + _update_bytes(plan, profile)
    return moved / (speeds.host_bytes_per_s if is_on_host else speeds.memory_bytes_per_s)


def _traffic(plan: Plan, profile: Profile) -> list[Any]:
    counts = profile.counts
    dtype_bytes = DTYPE_BYTES[plan.config.model.dtype]
    stored, _ = _weight_traffic(plan, profile)
    if plan.world_size == 1:
        return []
    return zero_traffic(
        plan.zero_stage,
        gradient_bytes=FP32_BYTES * counts.trainable,
        trained_bytes=dtype_bytes * counts.trainable,
        weight_bytes=stored,
        num_layers=max(1, profile.num_layers),
        num_micro_batches=plan.gradient_accumulation_steps,
    )


def _offload(plan: Plan, profile: Profile, speeds: Speeds) -> tuple[float, float]:
    """Seconds and bytes of what is moved between device, host and disk.

    Optimizer: gradients down, weights up (ZeRO-Offload, arXiv 2101.06840, section 4); on a disk the state is read and
    written too (ZeRO-Infinity, arXiv 2104.07857, section 5). Weights come up for forward and for backward of every
    micro-batch. Saved activations go down and come back.
    """
    on_bus = on_disk = 0.0
    if plan.offload_optimizer != "none":
        on_bus += _update_bytes(plan, profile)
    if plan.offload_optimizer == "nvme":
        on_disk += 2 * _state_bytes(plan, profile)
    if plan.offload_param != "none":
        moved = 2 * plan.gradient_accumulation_steps * _weight_traffic(plan, profile)[0] / plan.world_size
        on_bus += moved
        on_disk += moved if plan.offload_param == "nvme" else 0
    if plan.offload_activations:
        policy = profile.policies[plan.activation_checkpointing]
        on_bus += 2 * plan.gradient_accumulation_steps * _saved_bytes(plan, profile, policy)
    if plan.device == "cpu":
        on_bus = 0.0
    return on_bus / speeds.pcie_bytes_per_s + on_disk / speeds.nvme_bytes_per_s, on_bus + on_disk
