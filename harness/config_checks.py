"""Combinations of settings that make no sense together, each with the sentence that says what to do instead.

A sentence starts with the dotted key it is about. Every check sees a config whose sections are valid on their own.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import Config

FORMATS = {
    "causal_lm": ("auto", "chat", "prompt_completion", "alpaca", "text"),
    "sequence_classification": ("auto", "classification"),
    "image_classification": ("auto", "image"),
}


def _quantization(config: "Config") -> str | None:
    is_quantized, method = config.quantization.type != "none", config.adapter.method
    if method == "qlora" and not is_quantized:
        return "adapter.method: qlora needs quantization.type nf4 or int8 (or use method lora)"
    if is_quantized and method != "qlora":
        return f"quantization.type: a quantised base cannot be trained with adapter.method {method}; use qlora"
    return None


def _packing(config: "Config") -> str | None:
    if config.data.packing and config.task.type != "causal_lm":
        return f"data.packing: true is for task.type causal_lm only, not {config.task.type}; leave it out"
    return None


def _formats(config: "Config") -> str | None:
    allowed = FORMATS[config.task.type]
    for split in ("train", "validation", "test"):
        for number, source in enumerate(getattr(config.data, split) or []):
            if source.format not in allowed:
                return (
                    f"data.{split}.{number}.format: {source.format} is not for task.type {config.task.type}; "
                    f"use {', '.join(allowed)}"
                )
    return None


def _one_validation(config: "Config") -> str | None:
    for split in ("validation", "test"):
        if getattr(config.data, split) and getattr(config.data.split, split):
            return f"data.split.{split}: data.{split} has sources of its own; give one of the two"
    return None


def _optimizer_state(config: "Config") -> str | None:
    stage, optimizer = config.memory.zero_stage, config.optimizer.name
    if stage not in ("auto", 0) and optimizer in ("adafactor", "adamw_8bit"):
        return (
            f"memory.zero_stage: {stage} would tear the factored or block-wise state of optimizer.name {optimizer}; "
            "use zero_stage 0, or adamw"
        )
    return None


def _offload(config: "Config") -> str | None:
    memory, stage = config.memory, config.memory.zero_stage
    if memory.offload_param in ("cpu", "nvme") and stage not in ("auto", 3):
        return f"memory.offload_param: {memory.offload_param} needs zero_stage 3, not {stage}; leave zero_stage out"
    if memory.offload_optimizer in ("cpu", "nvme") and stage == 0:
        return f"memory.offload_optimizer: {memory.offload_optimizer} needs zero_stage 1, 2 or 3; leave zero_stage out"
    if memory.offload_optimizer == "nvme" and stage not in ("auto", 3):
        return f"memory.offload_optimizer: nvme needs zero_stage 3, not {stage}; leave zero_stage out"
    if "nvme" in (memory.offload_optimizer, memory.offload_param) and memory.nvme_path is None:
        return "memory.nvme_path: nvme offload needs a folder on a local disk"
    if memory.offload_optimizer in ("cpu", "nvme") and config.optimizer.name != "adamw":
        return (
            f"memory.offload_optimizer: {memory.offload_optimizer} works with optimizer.name adamw, not "
            f"{config.optimizer.name}; use one of the two"
        )
    return None


def needs_gpu(config: "Config") -> str | None:
    """What a run on a CPU cannot do although its config asks for it; None if there is nothing."""
    if config.memory.offload_activations is True:
        return "memory.offload_activations: true moves them from a GPU to the host; on a CPU leave it out"
    if config.optimizer.name == "adamw_8bit" and config.optimizer.paged:
        return "optimizer.paged: true moves state between a GPU and the host; on a CPU leave it out"
    return None


def _warmup(config: "Config") -> str | None:
    warmup, steps = config.schedule.warmup_steps, config.train.max_steps
    if warmup is not None and steps is not None and warmup > steps:
        return f"schedule.warmup_steps: {warmup} is more than train.max_steps ({steps}); use at most {steps}"
    return None


def _wsd(config: "Config") -> str | None:
    schedule = config.schedule
    if schedule.lr == "wsd" and schedule.warmup_steps is None and schedule.warmup_ratio + schedule.decay_ratio > 1:
        return "schedule.decay_ratio: warmup_ratio + decay_ratio must be at most 1 for wsd; lower one of them"
    return None


def _nesterov(config: "Config") -> str | None:
    if config.optimizer.name == "sgd" and config.optimizer.nesterov and config.optimizer.momentum == 0:
        return "optimizer.nesterov: true needs optimizer.momentum above 0, for example 0.9"
    return None


def _workers(config: "Config") -> str | None:
    if config.launch.type == "ray" and config.launch.min_workers > config.launch.max_workers:
        least, most = config.launch.min_workers, config.launch.max_workers
        return f"launch.num_workers: [{least}, {most}] is [min, max], the smaller number first; use [{most}, {least}]"
    return None


COMBINATIONS = (
    _quantization,
    _packing,
    _formats,
    _one_validation,
    _optimizer_state,
    _offload,
    _warmup,
    _wsd,
    _nesterov,
    _workers,
)


def impossible_combinations(config: "Config") -> list[str]:
    """One sentence for every combination that cannot run; empty if all is well."""
    return [sentence for check in COMBINATIONS if (sentence := check(config))]
