"""Peak bytes of a worker, by part: `predict(plan, profile)`. Pure; no torch.

A Profile is what `profile` found by running small real pieces of the model: counts of weights, and how many bytes a
layer and the head keep and use at a time. The lasting state follows from the counts; its division over ranks is that of
the ZeRO paper (arXiv 1910.02054, section 5): stage 1 divides optimizer state and master weights, stage 2 gradients as
well, stage 3 the weights too.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from .config import Quantization
from .plan import Plan

FP32_BYTES = 4
DTYPE_BYTES = {"fp32": FP32_BYTES, "bf16": 2}
NF4_BLOCK = 64
NF4_SCALE_BLOCK = 256
ADAM_8BIT_BLOCK = 256


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters. `quantized` of the `total` are kept in the quantised form; those are never trained."""

    total: int
    trainable: int
    quantized: int = 0

    def __post_init__(self) -> None:
        assert self.quantized >= 0, self
        assert 0 <= self.trainable <= self.total - self.quantized, self


@dataclass(frozen=True)
class Line:
    """Bytes by the size of a micro-batch: `per_pair` is of two tokens of one example, where attention keeps scores."""

    fixed: float = 0.0
    per_token: float = 0.0
    per_pair: float = 0.0

    def at(self, num_tokens: int, length: int) -> int:
        return math.ceil(self.fixed + num_tokens * (self.per_token + length * self.per_pair))


@dataclass(frozen=True)
class HeadCost:
    """Bytes that the head and the loss need at most: a chunk's logits exist for `chunk_tokens` at a time, if set."""

    fixed: float = 0.0
    per_token: float = 0.0
    per_logits_row: float = 0.0
    chunk_tokens: Mapping[str, int] | None = None
    """Device -> tokens of a chunk; None where all logits exist at a time."""

    def at(self, num_tokens: int, device: str) -> int:
        rows = num_tokens if self.chunk_tokens is None else min(num_tokens, self.chunk_tokens[device])
        return math.ceil(self.fixed + num_tokens * self.per_token + rows * self.per_logits_row)


@dataclass(frozen=True)
class Activations:
    """What forward and backward take under one activation policy, beyond weights and gradients."""

    layer_saved: Line
    """What one layer keeps from its forward to its backward."""
    outside_saved: Line
    """What is kept once: embeddings, positions, masks, and scratch that stays allocated."""
    forward_working: Line
    """The most that a layer's forward has beyond what is saved up to its end."""
    backward_working: Line
    """The most that a layer's backward has beyond what is saved up to it: recomputed activations among them."""
    head: HeadCost
    embedding_working: Line
    """The most that the backward of the embedding has, when nothing is saved any more."""


@dataclass(frozen=True)
class Profile:
    """A model under a config, in plain numbers. A model without a list of layers is one layer."""

    counts: Counts
    num_layers: int
    layer: Counts
    """Of the largest layer, adapters included."""
    embedding: Counts
    head: Counts
    """Of the output head; empty where it is the embedding."""
    largest_tensor: int
    """Weights of the largest parameter."""
    largest_quantized: int
    """Weights of the largest quantised matrix."""
    num_trained_tensors: int
    trained_small: int
    """Trained weights in tensors of one dimension."""
    buffer_bytes: int
    hidden_size: int
    vocab_size: int
    is_per_example: bool
    """Whether a token stands for a whole example (images)."""
    policies: Mapping[str, Activations]
    """none, selective and full."""
    evaluation: Activations
    """Forward alone, in evaluation."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Profile":
        """Raises TypeError or KeyError for what is no profile."""
        counts = {name: Counts(**fields[name]) for name in ("counts", "layer", "embedding", "head")}
        policies = {name: _activations(found) for name, found in fields["policies"].items()}
        return cls(**{**fields, **counts, "policies": policies, "evaluation": _activations(fields["evaluation"])})


def _activations(fields: Mapping[str, Any]) -> Activations:
    lines = {name: Line(**found) for name, found in fields.items() if name != "head"}
    return Activations(**lines, head=HeadCost(**fields["head"]))


class Overheads(Protocol):
    """What measurement adds to the arithmetic, for one kind of hardware."""

    @property
    def process_bytes(self) -> int:
        """What a training process takes beyond its tensors: code, kernels made on first use, Python's own objects."""

    @property
    def allocator_share(self) -> float:
        """Bytes lost to the allocator for each byte that comes and goes in a step."""


@dataclass(frozen=True)
class Overhead:
    process_bytes: int
    allocator_share: float


OVERHEAD: dict[str, Overhead] = {"cpu": Overhead(0, 0.0), "cuda": Overhead(0, 0.0)}
"""Device -> what holds where nothing was measured."""


@dataclass(frozen=True)
class Prediction:
    """Peak bytes of one worker, by part, on its device, in its share of host memory and in files on nvme.

    On a CPU the device is the host and `host` is empty. `phases` has the device's peak in each phase (load, step,
    evaluation, save); the parts in `device` are those of the step. `peak_bytes` is what must fit.
    """

    device: Mapping[str, int]
    host: Mapping[str, int]
    nvme: Mapping[str, int]
    phases: Mapping[str, int]

    @property
    def peak_bytes(self) -> int:
        return max([sum(self.device.values()), *self.phases.values()])

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def nvme_bytes(self) -> int:
        return sum(self.nvme.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"peak_bytes": self.peak_bytes}


def predict(plan: Plan, profile: Profile, calibration: Overheads | None = None) -> Prediction:
    """The peak of the rank that has most."""
    parts = state_bytes(plan, profile.counts)
    total = parts.pop("total")
    return Prediction(device=parts, host={}, nvme={}, phases={"load": parts["weights"], "step": total})


def state_bytes(plan: Plan, counts: Counts) -> dict[str, int]:
    """Bytes per rank by part, and their `total`."""
    config, trained = plan.config, counts.trainable
    dtype_bytes = DTYPE_BYTES[config.model.dtype]
    whole = counts.total - counts.quantized
    # DeepSpeed's stages 1 and 2 update a copy of the rank's share also where the weights are fp32 already.
    has_masters = config.model.dtype != "fp32" or plan.zero_stage in (1, 2)
    return divided(
        weights=whole * dtype_bytes + quantized_bytes(config.quantization, counts.quantized),
        # Both engines accumulate gradients in fp32: bf16 sums lose the small contributions of late micro-batches.
        gradients=FP32_BYTES * trained,
        master_weights=FP32_BYTES * trained if has_masters else 0,
        optimizer_state=OPTIMIZER_BYTES[config.optimizer.name](trained, config.optimizer),
        world_size=plan.world_size,
        zero_stage=plan.zero_stage,
    )


def divided(
    *, weights: int, gradients: int, master_weights: int, optimizer_state: int, world_size: int, zero_stage: int
) -> dict[str, int]:
    """The share of one rank (rounded up) of each part under a ZeRO stage, and the sum as `total`."""
    first_divided_stage = {
        "weights": (weights, 3),
        "gradients": (gradients, 2),
        "master_weights": (master_weights, 1),
        "optimizer_state": (optimizer_state, 1),
    }
    parts = {
        name: -(-size // world_size) if zero_stage >= stage else size
        for name, (size, stage) in first_divided_stage.items()
    }
    return parts | {"total": sum(parts.values())}


def quantized_bytes(quantization: Quantization, count: int) -> int:
    """Bytes of `count` quantised weights with their scales. int8 leaves out its one fp32 scale per row.

    nf4 has 4 bits per weight and a scale per 64 weights: fp32, or with double_quant 8 bits and a second fp32 scale
    per 256 scales (QLoRA, arXiv 2305.14314, section 3).
    """
    if quantization.type == "none":
        assert count == 0, count
        return 0
    if quantization.type == "int8":
        return count
    num_scales = -(-count // NF4_BLOCK)
    if quantization.double_quant:
        return -(-count // 2) + num_scales + FP32_BYTES * -(-num_scales // NF4_SCALE_BLOCK)
    return -(-count // 2) + FP32_BYTES * num_scales


def _adamw(count: int, optimizer: Any) -> int:
    return 2 * FP32_BYTES * count


def _adamw_8bit(count: int, optimizer: Any) -> int:
    """Two moments of 8 bits, each with an fp32 scale per 256 values (arXiv 2110.02861)."""
    return 2 * (count + FP32_BYTES * -(-count // ADAM_8BIT_BLOCK))


def _sgd(count: int, optimizer: Any) -> int:
    return FP32_BYTES * count if optimizer.momentum else 0


def _rmsprop(count: int, optimizer: Any) -> int:
    return FP32_BYTES * count * (2 if optimizer.momentum else 1)


def _adafactor(count: int, optimizer: Any) -> int:
    """One fp32 per row and per column of a matrix: sub-linear in the count, below 1 % of the weights, so left out."""
    return 0


OPTIMIZER_BYTES: dict[str, Callable[[int, Any], int]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "sgd": _sgd,
    "rmsprop": _rmsprop,
    "adafactor": _adafactor,
}
