"""Peak bytes of a worker, by part: `predict(plan, profile)`. Pure; no torch.

A Profile is what `profile` found by running small real pieces of the model: counts of weights, and how many bytes a
layer and the head keep and use at a time. The lasting state follows from the counts; its division over ranks is that of
the ZeRO paper (arXiv 1910.02054, section 5): stage 1 divides optimizer state and master weights, stage 2 gradients as
well, stage 3 the weights too.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from .config import Quantization
from .moments import DTYPE_BYTES, FP32_BYTES, moments_of_step
from .plan import Plan
from .profile_numbers import Counts, Profile

NF4_BLOCK = 64
NF4_SCALE_BLOCK = 256
ADAM_8BIT_BLOCK = 256


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
    overhead = calibration or OVERHEAD[plan.device]
    lasting = state_bytes(plan, profile.counts)
    del lasting["total"], lasting["gradients"]
    moments = moments_of_step(plan, profile)
    fullest = max(moments.values(), key=lambda moment: sum(moment.values()))
    come_and_go = sum(fullest.values())
    fullest["allocator"] = overhead.process_bytes + round(overhead.allocator_share * come_and_go)
    device = lasting | fullest
    return Prediction(
        device=device, host={}, nvme={}, phases={"load": lasting["weights"], "step": sum(device.values())}
    )


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
