"""Peak bytes of a worker, by part: `predict(plan, profile)`. Pure; no torch.

A Profile is what `profile` found by running small real pieces of the model: counts of weights, and how many bytes a
layer and the head keep and use at a time. The lasting state follows from the counts; its division over ranks is that of
the ZeRO paper (arXiv 1910.02054, section 5): stage 1 divides optimizer state and master weights, stage 2 gradients as
well, stage 3 the weights too.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from .config import Quantization
from .moments import DTYPE_BYTES, FP32_BYTES, head_bytes, highest, moments_of_step, size_of
from .plan import Plan
from .profile_numbers import Counts, Profile
from .zero_config import MIN_PARAMETER_BUFFERS, OPTIMIZER_BUFFERS, SUB_GROUP_ELEMENTS

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


OVERHEAD: dict[str, Overhead] = {"cpu": Overhead(80 * 2**20, 0.05), "cuda": Overhead(0, 0.03)}
"""Device -> what holds where nothing was measured: of torch 2.13 and the configurations of the benchmark `plan`."""
HEAP_SHARE = 0.3
"""The allocator's share where CPU tensors come from glibc's heap, which keeps holes between blocks of many sizes."""


@dataclass(frozen=True)
class Prediction:
    """Peak bytes of one worker, by part, on its device, in its share of host memory and in files on nvme.

    On a CPU the device is the host and `host` is empty. `phases` has the device's peak in each phase (load, step,
    evaluation, save); the parts in `device` are those of the step. `needed_bytes` is what must fit.
    """

    device: Mapping[str, int]
    host: Mapping[str, int]
    nvme: Mapping[str, int]
    phases: Mapping[str, int]
    mapped_bytes: int = 0
    """Of the step and what follows: pages of files (weights, sums of gradients), which the kernel drops or writes out
    where there is no room."""
    mapped_in_load_bytes: int = 0
    """Of loading: those of the weights."""

    @property
    def peak_bytes(self) -> int:
        return max([sum(self.device.values()), *self.phases.values()])

    @property
    def needed_bytes(self) -> int:
        later = max([sum(self.device.values()), *(size for name, size in self.phases.items() if name != "load")])
        return max(later - self.mapped_bytes, self.phases.get("load", 0) - self.mapped_in_load_bytes)

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def nvme_bytes(self) -> int:
        return sum(self.nvme.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"peak_bytes": self.peak_bytes, "needed_bytes": self.needed_bytes}


SHARD_BYTES = 512 * 2**20
"""Of a file of a checkpoint, unless one tensor has more; so much is gathered before it is written."""


def predict(plan: Plan, profile: Profile, calibration: Overheads | None = None) -> Prediction:
    """The peak of the rank that has most, in steps with full-length examples.

    On a CPU freed memory stays with the process, so that no later phase has less than the step.
    """
    overhead = calibration or default_overhead(plan.device, profile)
    lasting = lasting_bytes(plan, profile)
    moments = moments_of_step(plan, profile)
    fullest = max(moments.values(), key=lambda moment: sum(moment.values()))
    device, host, nvme = placed(plan, profile, lasting | fullest)
    come_and_go = sum(size for name, size in device.items() if name in fullest)
    device["allocator"] = round(overhead.allocator_share * come_and_go)
    device["process"] = overhead.process_bytes
    # Sums of gradients in a file are summed there: on a CPU its pages are this process's, as long as there is room.
    pages = nvme.get("gradients", 0) if plan.device == "cpu" else 0
    device["gradients"] = device.get("gradients", 0) + pages
    step = sum(device.values())
    stays = plan.zero_stage in (1, 3) and plan.offload_optimizer != "nvme"
    kept = moments["optimizer"]["gradients"] if stays else 0
    at_rest = step - come_and_go - device["allocator"] + kept + moments["forward"]["gather_buffers"]
    is_kept = plan.device == "cpu"
    mapped = mapped_bytes(plan, profile)
    phases = {
        # Half of what a process adds comes with its first step: kernels are prepared then.
        "load": overhead.process_bytes // 2 + load_bytes(plan, profile, lasting, kept),
        "step": step,
        "evaluation": max(step if is_kept else 0, at_rest + evaluation_bytes(plan, profile)),
        "save": max(step if is_kept else 0, at_rest + save_bytes(plan, profile)),
    }
    return Prediction(
        device={name: size for name, size in device.items() if size},
        host=host,
        nvme=nvme,
        phases=phases,
        mapped_bytes=mapped + pages,
        mapped_in_load_bytes=mapped,
    )


def default_overhead(device: str, profile: Profile) -> Overhead:
    overhead = OVERHEAD[device]
    return replace(overhead, allocator_share=HEAP_SHARE) if device == "cpu" and profile.is_on_heap else overhead


def mapped_bytes(plan: Plan, profile: Profile) -> int:
    """Quantised weights that stay in their prepared file: on a CPU, where no engine makes copies of its own."""
    if plan.device != "cpu" or plan.engine != "torch" or not profile.is_in_files:
        return 0
    return quantized_bytes(plan.config.quantization, profile.counts.quantized)


def lasting_bytes(plan: Plan, profile: Profile) -> dict[str, int]:
    """What stays from step to step on one rank: weights, constants of quantisation, masters, optimizer state."""
    parts = state_bytes(plan, profile.counts)
    quantization, count = plan.config.quantization, profile.counts.quantized
    packed = count if quantization.type == "int8" else -(-count // 2)
    constants = quantized_bytes(quantization, count) - packed if count else 0
    # Stage 3 partitions parameters; the constants are none, and every rank keeps all of them.
    share = plan.world_size if plan.zero_stage == 3 else 1
    weights = parts["weights"] - constants // share + profile.buffer_bytes
    own = {name: parts[name] for name in ("master_weights", "optimizer_state")}
    return {"weights": weights, "quantization_constants": constants} | own


def placed(
    plan: Plan, profile: Profile, parts: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """The parts on the device, in host memory and in files, with the buffers between them. On a CPU host is device."""
    device, host, nvme = dict(parts), dict[str, int](), dict[str, int]()
    below = {"cpu": device if plan.device == "cpu" else host, "nvme": nvme}
    memory = below["cpu"]
    if plan.offload_optimizer != "none":
        for name in ("master_weights", "optimizer_state", "gradients"):
            if name in device:
                below[plan.offload_optimizer][name] = device.pop(name)
    if plan.offload_optimizer == "nvme" and "master_weights" in parts:
        memory["optimizer_buffers"] = OPTIMIZER_BUFFERS * FP32_BYTES * updated_at_once(plan, profile)
    if plan.offload_param != "none" and "weights" in device:
        dtype_bytes = DTYPE_BYTES[plan.config.model.dtype]
        stays = "cpu" if profile.counts.quantized else plan.offload_param
        below[stays]["weights"] = device.pop("weights")
        if plan.offload_param == "nvme":
            piece = -(-profile.largest_tensor // plan.world_size)
            memory["parameter_buffers"] = dtype_bytes * (MIN_PARAMETER_BUFFERS * piece + written_at_once(plan, profile))
    if plan.offload_activations and "activations" in device and plan.device == "cuda":
        host["activations"] = device.pop("activations")
    return device, host, nvme


def updated_at_once(plan: Plan, profile: Profile) -> int:
    """Elements of one rank whose state is read from files, updated and written together."""
    return min(profile.counts.trainable, max(SUB_GROUP_ELEMENTS, -(-profile.largest_trained // plan.world_size)))


def written_at_once(plan: Plan, profile: Profile) -> int:
    """Elements of updated weights on their way to files: those that the optimizer updates together, on all ranks."""
    if plan.offload_optimizer != "nvme":
        return profile.counts.trainable
    return min(profile.counts.trainable, max(SUB_GROUP_ELEMENTS * plan.world_size, profile.largest_trained))


def load_bytes(plan: Plan, profile: Profile, lasting: Mapping[str, int], kept: int) -> int:
    """While weights arrive, one tensor at a time beside what is there; then while the engine makes its copies.

    A GGUF file is unpacked as a whole, in fp32. DeepSpeed copies trained weights into one tensor and, in stages 2 and
    3, allocates this rank's share of the gradients once before it begins. What goes to files goes there piece by piece:
    master weights by way of one in fp32, optimizer state by way of a gradient of zeros.
    """
    dtype_bytes, counts = DTYPE_BYTES[plan.config.model.dtype], profile.counts
    if (plan.config.model.path or "").endswith(".gguf"):
        arriving = FP32_BYTES * counts.total
    else:
        weights = (counts.total - counts.quantized) * dtype_bytes
        arriving = weights + quantized_bytes(plan.config.quantization, counts.quantized)
        arriving += dtype_bytes * profile.largest_tensor
    before = {name: size for name, size in lasting.items() if name != "optimizer_state"} | {"gradients": kept}
    made = sum(placed(plan, profile, before)[0].values())
    if plan.zero_stage and plan.offload_param != "nvme":
        made += dtype_bytes * counts.trainable
    if plan.offload_optimizer == "nvme":
        made += 2 * FP32_BYTES * updated_at_once(plan, profile)
    elif plan.zero_stage > 1:
        made += FP32_BYTES * counts.trainable // plan.world_size
    return max(arriving, made)


def evaluation_bytes(plan: Plan, profile: Profile) -> int:
    """What one batch of the evaluation takes."""
    num_examples = plan.config.eval.micro_batch_size or plan.micro_batch_size
    tokens, length = size_of(plan, profile, num_examples=num_examples)
    found = profile.evaluation
    saved = found.layer_saved.at(tokens, length) + found.outside_saved.at(tokens, length)
    return saved + max(highest(found.forward_working, tokens, length), head_bytes(plan, profile, found, tokens))


def checkpoint_bytes(plan: Plan, counts: Counts) -> int:
    """Of a checkpoint: what is trained in fp32 and the optimizer's whole state."""
    optimizer = plan.config.optimizer
    return FP32_BYTES * counts.trainable + OPTIMIZER_BYTES[optimizer.name](counts.trainable, optimizer)


def save_bytes(plan: Plan, profile: Profile) -> int:
    """Copies that rank 0 makes to save: of partitioned state a file, the tensor that ends it and one of gloo's.

    Nothing where one rank has all of it in memory: that is written as it is. Beside a GPU the file is on the host.
    """
    whole = FP32_BYTES * profile.largest_trained
    if plan.zero_stage == 0 or (plan.world_size == 1 and plan.offload_optimizer != "nvme"):
        return 0
    if plan.device == "cuda":
        return whole
    return min(checkpoint_bytes(plan, profile.counts), SHARD_BYTES) + (2 if plan.world_size > 1 else 1) * whole


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
