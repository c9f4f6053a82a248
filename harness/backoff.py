"""When a run finds no memory: how such an error is told from others, and what to give up next. Imports no torch.

First the micro-batch is halved and accumulation doubled: the loss is a sum over the global batch, so the result stays
the same but for rounding. What is drawn or averaged per micro-batch is not: dropout masks, NEFTune, and BatchNorm.
Where the micro-batch is 1, what the config leaves to `auto` is given up in the order of what it costs.
"""

import errno
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from .config import Config
from .config_io import with_values
from .elastic import micro_batches
from .errors import BurnishError, ConfigError, InfeasibleError, OutOfMemory
from .plan import Decision, Plan

Phase = Literal["load", "evaluation", "step", "save", "finish"]
Settings = dict[str, Any]
"""Dotted keys of a config and their values."""

EVENT = "out_of_memory"
SIGNS = (
    "out of memory",
    "allocate memory",
    "bad_alloc",
    "alloc_failed",
    "cudaerrormemoryallocation",
    "running low on memory",
    "oom killer",
    "oomkilled",
)
"""What the message of an error that found no memory holds, in small letters. PyTorch, CUDA's libraries, the C++
runtime, the kernel (ENOMEM is "Cannot allocate memory") and Ray's memory monitor."""
KINDS = (MemoryError, RuntimeError, OSError)
"""Types that such errors have; torch.OutOfMemoryError and those of CUDA are RuntimeErrors."""
UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
ASKED = re.compile(r"tr(?:ied|ying) to allocate ([\d.]+) ?(bytes|[kmg]i?b)", re.IGNORECASE)
MAX_CHARS = 200
WORDS: dict[str, str] = {
    "load": "while the model was loaded",
    "evaluation": "in an evaluation after step {step}",
    "step": "in step {next}",
    "save": "while a checkpoint was written after step {step}",
    "finish": "while the result was saved after step {step}",
}
CHECKPOINTING = ("none", "selective", "full")


@dataclass(frozen=True)
class Change:
    """One thing that a run gives up for memory: keys of the config and their values before and after."""

    before: Mapping[str, Any]
    after: Mapping[str, Any]

    def __str__(self) -> str:
        return ", ".join(f"{key} {self.before[key]} → {value}" for key, value in self.after.items())


def found_no_memory(error: BaseException) -> bool:
    """Whether this error, or the one it came of, says that there was no memory for something.

    What nobody can cure by a smaller batch is not: a kernel that asks for more shared memory than a GPU has.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError | OutOfMemory) or type(seen).__name__ == "OutOfMemoryError":
            return True
        if isinstance(seen, BurnishError) or not isinstance(seen, Exception):
            return False
        if isinstance(seen, OSError) and seen.errno == errno.ENOMEM:
            return True
        if isinstance(seen, KINDS) and says_no_memory(str(seen)):
            return True
        seen = seen.__cause__
    return False


def says_no_memory(text: str) -> bool:
    """Whether a message is that of an error that found no memory."""
    return any(sign in text.lower() for sign in SIGNS)


def explained(error: BaseException, *, phase: Phase, step: int) -> OutOfMemory:
    """The error as OutOfMemory after `step` done steps. It keeps no frame, and with it no tensor, alive."""
    lines = str(error).strip().splitlines()
    reason = lines[0][:MAX_CHARS] if lines else type(error).__name__
    asked = ASKED.search(str(error))
    wanted_bytes = int(float(asked[1]) * UNITS[asked[2].lower()]) if asked else 0
    return out_of_memory(reason, phase=phase, step=step, wanted_bytes=wanted_bytes)


def out_of_memory(reason: str, *, phase: Phase, step: int, wanted_bytes: int = 0) -> OutOfMemory:
    """`phase` is what the run was doing after `step` done steps."""
    message = f"out of memory {where(phase, step)}: {reason}; a smaller train.micro_batch_size needs less"
    return OutOfMemory(message, reason=reason, phase=phase, step=step, wanted_bytes=wanted_bytes)


def where(phase: str, step: int) -> str:
    return WORDS[phase].format(step=step, next=step + 1)


def smaller(failed: Plan, *, asked: Config, phase: str, replan: Callable[[Config], Plan]) -> tuple[Plan, Change] | None:
    """The plan that gives up one thing more than the failed one, and what that is; None where nothing is left.

    `asked` is the config as the user gave it: what it sets itself stays, but for the micro-batch. `replan` makes the
    plan of a config; what it refuses is passed over.
    """
    for change in changes(failed, asked=asked, phase=phase):
        config = with_values(failed.config, decided(failed) | dict(change.after))
        try:
            plan = replan(config)
        except (ConfigError, InfeasibleError):
            continue
        made = tuple(
            Decision(key.rpartition(".")[2], str(value), f"{change.before[key]} found no memory")
            for key, value in change.after.items()
        )
        names = {decision.key for decision in made}
        others = tuple(decision for decision in plan.decisions if decision.key not in names)
        return replace(plan, decisions=others + made), change
    return None


def changes(plan: Plan, *, asked: Config, phase: str) -> Iterator[Change]:
    """What may be given up next, the cheapest first. A model that does not load is not helped by smaller batches."""
    if phase != "load":
        own = asked.eval.micro_batch_size
        if phase == "evaluation" and own is not None and (now := plan.config.eval.micro_batch_size or own) > 1:
            yield Change({"eval.micro_batch_size": now}, {"eval.micro_batch_size": now // 2})
        if plan.micro_batch_size > 1:
            share, rest = divmod(plan.config.train.global_batch_size, plan.world_size)
            whole = plan.config.train.global_batch_size if rest else share
            less = divisor(whole, at_most=plan.micro_batch_size // 2)
            yield Change({"train.micro_batch_size": plan.micro_batch_size}, {"train.micro_batch_size": less})
    values = decided(plan)
    for settings in lower(plan, asked=asked, phase=phase):
        is_new = any(values[key] != value for key, value in settings.items())
        if is_new and all(_get(asked, key) == "auto" or values[key] == value for key, value in settings.items()):
            after = {key: value for key, value in settings.items() if values[key] != value}
            yield Change({key: values[key] for key in after}, after)


def lower(plan: Plan, *, asked: Config, phase: str) -> Iterator[Settings]:
    """Settings that need less memory than the plan's, by what they cost: recomputing, then moving bytes."""
    has_gpu, has_disk = plan.device == "cuda", asked.memory.nvme_path is not None
    if phase != "load":
        now = CHECKPOINTING.index(plan.activation_checkpointing)
        for policy in CHECKPOINTING[now + 1 :]:
            yield {"memory.activation_checkpointing": policy}
        if has_gpu:
            yield {"memory.offload_activations": True}
            yield {"memory.offload_optimizer": "cpu", "memory.zero_stage": max(2, plan.zero_stage)}
    if has_gpu:
        yield {"memory.offload_param": "cpu", "memory.zero_stage": 3}
    if has_disk:
        if phase != "load":
            yield {"memory.offload_optimizer": "nvme", "memory.zero_stage": 3}
        yield {"memory.offload_param": "nvme", "memory.zero_stage": 3}


def decided(plan: Plan) -> Settings:
    """What the plan decided, as values of the config: the next plan differs in nothing but what is given up."""
    return {
        "train.micro_batch_size": plan.micro_batch_size,
        "memory.zero_stage": plan.zero_stage,
        "memory.offload_optimizer": plan.offload_optimizer,
        "memory.offload_param": plan.offload_param,
        "memory.activation_checkpointing": plan.activation_checkpointing,
        "memory.offload_activations": plan.offload_activations,
    }


def event(plan: Plan, *, failed: Plan, error: OutOfMemory, change: Change, given_up: Settings) -> dict[str, Any]:
    """The fields of the line in events.jsonl. `given_up` is all that this run has given up, for whoever resumes it."""
    return {
        "phase": error.phase,
        "step": error.step,
        "reason": error.reason,
        "wanted_bytes": error.wanted_bytes or None,
        "change": str(change),
        "micro_batch_size_before": failed.micro_batch_size,
        "micro_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps_before": failed.gradient_accumulation_steps,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "given_up": given_up,
    }


def kept(config: Config, *, before: Config, events: Sequence[Mapping[str, Any]]) -> Settings:
    """What earlier attempts of a resumed run gave up, but for keys that the user has changed since.

    `before` is the user's config of the last attempt; another number of workers may need another micro-batch.
    """
    found = next((one.get("given_up") for one in reversed(events) if one.get("event") == EVENT), None)
    settings = {key: value for key, value in (found or {}).items() if _get(config, key) == _get(before, key)}
    if "train.micro_batch_size" in settings:
        valid = micro_batches(config.train.global_batch_size, getattr(config.launch, "max_workers", 1))
        fitting = [n for n in valid if n <= settings["train.micro_batch_size"]]
        settings["train.micro_batch_size"] = max(fitting, default=1)
    return settings


def exhausted(error: OutOfMemory, *, plan: Plan, tried: Sequence[str], advice: str = "") -> OutOfMemory:
    """The error of a run that has nothing left to give: what was tried, and what would need less."""
    settings = f"micro-batch {plan.micro_batch_size}, activation checkpointing {plan.activation_checkpointing}"
    if plan.zero_stage:
        settings += f", ZeRO stage {plan.zero_stage}"
    had = f"; tried before: {'; '.join(tried)}" if tried else ""
    message = f"out of memory {where(error.phase, error.step)} with {settings} ({error.reason}){had}"
    return OutOfMemory(
        f"{message}. Nothing is left to give up: {advice or advised(plan)}",
        reason=error.reason,
        phase=error.phase,
        step=error.step,
        wanted_bytes=error.wanted_bytes,
    )


def advised(plan: Plan) -> str:
    """What the user can change to need less memory, in the order of what it costs."""
    config, found = plan.config, []
    if plan.activation_checkpointing != "full":
        found.append("set memory.activation_checkpointing to full")
    if config.adapter.method in ("full", "freeze"):
        found.append("train an adapter (adapter.method lora)")
    if config.quantization.type == "none" and config.task.type == "causal_lm":
        found.append("quantise the weights (adapter.method qlora with quantization.type nf4)")
    if plan.offload_param == "none":
        found.append("keep weights elsewhere (memory.zero_stage 3 with memory.offload_param and memory.nvme_path)")
    if getattr(config.data, "max_length", None):
        found.append(f"lower data.max_length ({config.data.max_length})")
    return ", ".join([*found, "or give the run more memory"])


def divisor(number: int, *, at_most: int) -> int:
    """The largest divisor of the number that is not larger."""
    return next(value for value in range(max(1, min(at_most, number)), 0, -1) if number % value == 0)


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value
