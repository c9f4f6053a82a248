"""All ways to run a config that are open to the planner, with predicted peaks and estimated times. Imports no torch.

Candidates are all values of what is `auto`; what the config fixes is never changed, and what changes results is not
among them. Of those whose predicted peaks fit, the fastest by `cost` is taken; within TIE of it, the one that differs
least from what `make_plan` takes by default. Nothing is random and nothing is measured.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from .calibration import Calibration
from .config import Config
from .config_checks import impossible_combinations
from .cost import Cost, estimate
from .devices import Speeds, speeds_of
from .elastic import is_elastic, micro_batches, smallest
from .memory import Prediction, predict
from .plan import Plan, Resources, make_plan, workers_per_node
from .profile_numbers import Profile

SETTINGS = {
    "micro_batch_size": "train.micro_batch_size",
    "zero_stage": "memory.zero_stage",
    "offload_optimizer": "memory.offload_optimizer",
    "offload_param": "memory.offload_param",
    "activation_checkpointing": "memory.activation_checkpointing",
    "offload_activations": "memory.offload_activations",
}
"""What is decided here: field of the plan -> key of the config."""
POLICIES = ("none", "selective", "full")
PLACES = ("none", "cpu", "nvme")
UNDIVIDED_OPTIMIZERS = ("adafactor", "adamw_8bit")
MAX_MICRO_BATCH = 64
"""Larger micro-batches gain nothing: the device is busy, and short examples are padded to the longest."""
TIE, TIE_S = 0.05, 0.01
"""Estimates of a step's time that are so near to each other, by share or in seconds, say nothing."""
MARGIN = {"cpu": 0.15, "cuda": 0.05}
"""Share of the memory that is kept free: as far as a prediction may be from what is measured."""
BASELINE_BYTES = {"cpu": 550 * 2**20, "cuda": 1536 * 2**20}
"""Host memory of a process that has imported everything and holds no weights: 523 MiB measured, with CUDA assumed."""

RAY_BYTES = 2350 * 2**20
"""Host memory of all of an embedded Ray's processes but the workers, the driver among them, as measured."""


@dataclass(frozen=True)
class Limits:
    """What one worker may use, with the safety margin taken off: on its device, in host memory, on disk.

    On a CPU the device is the host, and `host_bytes` is 0.
    """

    device_bytes: int
    host_bytes: int
    nvme_bytes: int
    why: str


@dataclass(frozen=True)
class Candidate:
    """One way to run the config: `over` has by how many bytes it is too large for the device, host and nvme."""

    plan: Plan
    prediction: Prediction
    cost: Cost
    over: Mapping[str, int]

    @property
    def settings(self) -> dict[str, Any]:
        return {name: getattr(self.plan, name) for name in SETTINGS}

    @property
    def step_s(self) -> float:
        return self.cost.step_s

    @property
    def wire_bytes(self) -> float:
        return self.cost.wire_bytes

    @property
    def fits(self) -> bool:
        return not self.over


@dataclass(frozen=True)
class Survey:
    """The candidate to take, all of them, and what they had to fit. Where none fits, `best` comes nearest."""

    best: Candidate
    candidates: tuple[Candidate, ...]
    default: Plan
    limits: Limits
    speeds: Speeds
    is_as_before: bool = False


def survey(
    config: Config,
    resources: Resources,
    profile: Profile,
    *,
    run_dir: str = "",
    cwd: str = "",
    calibration: Calibration | None = None,
    before: Plan | None = None,
) -> Survey:
    """Raises ConfigError and InfeasibleError as make_plan does; that nothing fits is no error here.

    `before` is the plan of the run that goes on: what it had is taken again where it still can be, for a step of
    another micro-batch is not the same bit for bit.
    """
    default = make_plan(config, resources, run_dir=run_dir, cwd=cwd)
    limits = limits_of(default, resources, calibration)
    speeds = _speeds(default, resources, calibration)
    candidates = []
    for filled in filled_configs(config, default, resources):
        plan = make_plan(filled, resources, run_dir=run_dir, cwd=cwd)
        # Of an elastic run, the smallest group holds the most on each worker.
        sizes = (plan, smallest(plan)) if is_elastic(config) else (plan,)
        prediction = max((predict(one, profile, calibration) for one in sizes), key=lambda one: one.peak_bytes)
        is_short = prediction.peak_bytes > limits.device_bytes
        cost = estimate(plan, profile, speeds, reread_bytes=prediction.mapped_bytes if is_short else 0)
        candidates.append(Candidate(plan, prediction, cost, over=_over(prediction, limits)))
    kept = _as_before(candidates, default, before)
    return Survey(kept or _pick(candidates, default), tuple(candidates), default, limits, speeds, kept is not None)


def limits_of(plan: Plan, resources: Resources, calibration: Calibration | None = None) -> Limits:
    """Of one worker: memory.budget or the device's memory, its part of the host's and of the disk, less the margin."""
    workers = workers_per_node(plan, resources)
    keep = 1 - MARGIN[plan.device]
    budget = plan.config.memory.budget
    baseline = BASELINE_BYTES[plan.device]
    if plan.device == "cpu" and calibration is not None:
        baseline = calibration.baseline_bytes
    is_embedded = plan.config.launch.type == "ray" and plan.config.launch.address is None
    total = resources.host_memory_bytes - (RAY_BYTES if is_embedded else 0)
    host = max(0, total // workers - baseline)
    margin = f"less a margin of {MARGIN[plan.device]:.0%}"
    nvme = int(keep * resources.nvme_bytes / workers)
    if budget != "auto":
        host = host if plan.device == "cuda" else 0
        return Limits(int(keep * budget), int(keep * host), nvme, f"memory.budget {margin}")
    if plan.device == "cuda":
        return Limits(int(keep * resources.device_memory_bytes), int(keep * host), nvme, f"the GPU's memory {margin}")
    shared = f"the host's memory, shared by {workers}" if workers > 1 else "the host's memory"
    besides = "Ray and a process" if is_embedded else "a process"
    return Limits(int(keep * host), 0, nvme, f"{shared}, less {besides} without weights, {margin}")


def filled_configs(config: Config, default: Plan, resources: Resources) -> Iterator[Config]:
    """The config with every `auto` filled in, in all ways that can run."""
    memory = config.memory
    is_gpu = default.device == "cuda"
    choices: dict[str, tuple[Any, ...]] = {
        "zero_stage": (0, 1, 2, 3),
        "offload_optimizer": _places(config, resources, is_gpu=is_gpu),
        "offload_param": _places(config, resources, is_gpu=is_gpu),
        "activation_checkpointing": POLICIES,
        "offload_activations": (False, True) if is_gpu else (False,),
    }
    options = [choices[name] if getattr(memory, name) == "auto" else (getattr(memory, name),) for name in choices]
    micros = _micro_batches(config, default)
    for values in product(*options):
        settings = dict(zip(choices, values, strict=True))
        if memory.zero_stage == "auto" and not _is_sensible(settings, config, default):
            continue
        filled = config.model_copy(update={"memory": memory.model_copy(update=settings)})
        if impossible_combinations(filled):
            continue
        for micro in micros:
            train = config.train.model_copy(update={"micro_batch_size": micro})
            yield filled.model_copy(update={"train": train})


def _places(config: Config, resources: Resources, *, is_gpu: bool) -> tuple[str, ...]:
    """Where what is offloaded may go. On a CPU, host memory is where it is already."""
    has_disk = config.memory.nvme_path is not None and resources.nvme_bytes > 0
    usable = {"cpu": is_gpu, "nvme": has_disk}
    return ("none", *(place for place in resources.offload_places if usable[place]))


def _is_sensible(settings: Mapping[str, Any], config: Config, default: Plan) -> bool:
    """Whether the stage has something to divide or to move, and moves it with the least that does."""
    stage = settings["zero_stage"]
    is_offloaded = settings["offload_optimizer"] != "none" or settings["offload_param"] != "none"
    if config.optimizer.name in UNDIVIDED_OPTIMIZERS:
        return stage == 0
    if default.world_size == 1:
        return stage == 0 if not is_offloaded else stage in (2, 3)
    return True


def _micro_batches(config: Config, default: Plan) -> list[int]:
    if config.train.micro_batch_size != "auto":
        return [default.micro_batch_size]
    valid = micro_batches(config.train.global_batch_size, default.world_size)
    found = [n for n in valid if n <= MAX_MICRO_BATCH]
    return sorted(found, key=lambda n: (n != default.micro_batch_size, -n))


def _speeds(plan: Plan, resources: Resources, calibration: Calibration | None) -> Speeds:
    workers = workers_per_node(plan, resources)
    speeds = speeds_of(plan.device, name=resources.device_name, num_threads=plan.num_threads, workers_per_node=workers)
    if calibration is None or calibration.flops_per_s is None:
        return speeds
    units = plan.num_threads if plan.device == "cpu" else 1
    return replace(speeds, flops_per_s=calibration.flops_per_s * units)


def _over(prediction: Prediction, limits: Limits) -> dict[str, int]:
    need = {
        "device": (prediction.needed_bytes, limits.device_bytes),
        "host": (prediction.host_bytes, limits.host_bytes),
        "nvme": (prediction.nvme_bytes, limits.nvme_bytes),
    }
    return {place: wanted - have for place, (wanted, have) in need.items() if wanted > have}


def _as_before(candidates: list[Candidate], default: Plan, before: Plan | None) -> Candidate | None:
    """The candidate with the settings of an earlier plan for as many workers, if it fits."""
    if before is None or before.device != default.device:
        return None
    if before.world_size != default.world_size and not is_elastic(default.config):
        return None
    wanted = {name: getattr(before, name) for name in SETTINGS}
    return next((one for one in candidates if one.fits and one.settings == wanted), None)


def _differences(candidate: Candidate, default: Plan) -> int:
    return sum(value != getattr(default, name) for name, value in candidate.settings.items())


def _pick(candidates: list[Candidate], default: Plan) -> Candidate:
    """The fastest that fits, or of those that tie with it the one nearest to the default; else the nearest to fit."""
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        return min(candidates, key=lambda candidate: (sum(candidate.over.values()), candidate.step_s))
    fastest_s = min(candidate.step_s for candidate in fitting)
    limit_s = max((1 + TIE) * fastest_s, fastest_s + TIE_S)
    tied = [candidate for candidate in fitting if candidate.step_s <= limit_s]
    return min(tied, key=lambda candidate: (_differences(candidate, default), candidate.step_s))
