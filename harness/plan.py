"""make_plan(config, resources) -> Plan: every decision that depends on hardware, with its reason. Pure; no torch."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .config import Config
from .config_checks import needs_gpu
from .elastic import accumulation, is_elastic, micro_batch
from .errors import ConfigError, InfeasibleError

Offload = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True)
class Resources:
    """What the host or cluster has free. Devices and CPUs are counted over all nodes; bytes are per device and node."""

    device: Literal["cpu", "cuda"]
    num_devices: int
    num_cpus: int
    host_memory_bytes: int
    device_memory_bytes: int = 0
    device_name: str = ""
    num_nodes: int = 1
    nvme_bytes: int = 0
    """Free bytes below memory.nvme_path on each node; 0 where that is not given."""
    offload_places: tuple[Literal["cpu", "nvme"], ...] = ("cpu", "nvme")
    """Where state can be offloaded to, as far as tools and libraries of the host are concerned."""


@dataclass(frozen=True)
class Decision:
    """One value that burnish chose, and why."""

    key: str
    value: str
    why: str


@dataclass(frozen=True)
class Plan:
    """All that a worker needs. A rank is a function of the plan; resume is the plan plus the newest checkpoint."""

    config: Config
    run_dir: str
    cwd: str
    device: Literal["cpu", "cuda"]
    world_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    engine: Literal["torch", "deepspeed"]
    zero_stage: int
    offload_optimizer: Offload
    offload_param: Offload
    activation_checkpointing: Literal["none", "selective", "full"]
    offload_activations: bool
    num_threads: int
    decisions: tuple[Decision, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"config": self.config.model_dump(mode="json")}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Plan":
        decisions = tuple(Decision(**decision) for decision in fields["decisions"])
        return cls(**fields | {"config": Config.model_validate(fields["config"]), "decisions": decisions})


def make_plan(config: Config, resources: Resources, *, run_dir: str, cwd: str) -> Plan:
    """Decides world size, batch arithmetic, engine, ZeRO stage and threads.

    Raises InfeasibleError if the workers asked for cannot be had, ConfigError if the batch cannot be divided or
    a CPU lacks what the config asks for.
    """
    decisions: list[Decision] = []
    world_size, device = _world(config, resources, decisions)
    if device == "cpu" and (sentence := needs_gpu(config)):
        raise ConfigError(sentence)
    micro, accumulation = _batch(config, world_size, decisions)
    zero_stage, engine = _engine(config, world_size, decisions)
    return Plan(
        config=config,
        run_dir=run_dir,
        cwd=cwd,
        device=device,
        world_size=world_size,
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        engine=engine,
        zero_stage=zero_stage,
        offload_optimizer=_given(config.memory.offload_optimizer, "none"),
        offload_param=_given(config.memory.offload_param, "none"),
        activation_checkpointing=_activation_checkpointing(config, device, decisions),
        offload_activations=_given(config.memory.offload_activations, False),
        num_threads=_threads(config, resources, _per_node(config, resources, world_size, device), decisions),
        decisions=tuple(decisions),
    )


def _world(config: Config, resources: Resources, decisions: list[Decision]) -> tuple[int, Literal["cpu", "cuda"]]:
    if config.launch.type == "inline":
        decisions.append(Decision("world_size", "1", "launch.type inline is one process"))
        return 1, resources.device
    launch = config.launch
    use_gpu = resources.device == "cuda" if launch.use_gpu == "auto" else launch.use_gpu
    if use_gpu and resources.device != "cuda":
        raise InfeasibleError("launch.use_gpu is true but no GPU is visible; set it to false or run on a GPU machine")
    have = resources.num_devices if use_gpu else resources.num_cpus
    per_worker = launch.resources_per_worker.get("GPU" if use_gpu else "CPU", 1.0)
    least, most = launch.min_workers, launch.max_workers
    if least * per_worker > have:
        kind = "GPUs" if use_gpu else "CPU cores"
        if per_worker > have:
            raise InfeasibleError(f"one worker asks for {per_worker:g} {kind}, and there are {have}; ask for less")
        raise InfeasibleError(
            f"launch.num_workers={least} at {per_worker:g} {kind} each needs "
            f"{least * per_worker:g}, and there are {have}; use at most {int(have // per_worker)} workers"
        )
    room = min(most, int(have // per_worker))
    why = "launch.num_workers" if least == most else f"the most of launch.num_workers; there is room for {room}"
    decisions.append(Decision("world_size", str(most), why))
    if least < most:
        decisions.append(Decision("memory", f"for {least} of {most}", "fewer workers hold more each"))
    return most, "cuda" if use_gpu else "cpu"


def workers_per_node(plan: "Plan", resources: Resources) -> int:
    """The most workers that a node has at a time, without those of an elastic run that there is no room for yet."""
    return _per_node(plan.config, resources, plan.world_size, plan.device)


def _per_node(config: Config, resources: Resources, world_size: int, device: str) -> int:
    if is_elastic(config) and config.launch.type == "ray":
        have, name = (resources.num_devices, "GPU") if device == "cuda" else (resources.num_cpus, "CPU")
        per_worker = config.launch.resources_per_worker.get(name, 1.0)
        world_size = max(config.launch.min_workers, min(world_size, int(have // per_worker)))
    return -(-world_size // resources.num_nodes)


def _batch(config: Config, world_size: int, decisions: list[Decision]) -> tuple[int, int]:
    """Micro-batch and accumulation: micro * accumulation * world_size = global_batch_size (at least, if elastic)."""
    total, wanted = config.train.global_batch_size, config.train.micro_batch_size
    if is_elastic(config):
        micro = micro_batch(total, wanted, world_size)
        steps = accumulation(total, micro, world_size)
        if wanted == "auto":
            decisions.append(Decision("micro_batch_size", str(micro), "largest up to 8 with work for every worker"))
        why = f"{total // micro} micro-batches of {micro} on {world_size} workers, more each on fewer"
        decisions.append(Decision("gradient_accumulation_steps", str(steps), why))
        return micro, steps
    if total % world_size:
        below = total // world_size * world_size
        nearest = f"{below} or {below + world_size}" if below else str(world_size)
        raise ConfigError(f"train.global_batch_size={total} cannot be shared by {world_size} workers; use {nearest}")
    per_worker = total // world_size
    if wanted == "auto":
        micro = max(n for n in range(1, 9) if per_worker % n == 0)
        why = "largest divisor up to 8 of the worker's share"
        decisions.append(Decision("micro_batch_size", str(micro), why))
    elif per_worker % wanted:
        divisors = [n for n in range(1, min(per_worker, 4096) + 1) if per_worker % n == 0]
        valid = sorted(sorted(divisors, key=lambda n: abs(n - wanted))[:8])
        raise ConfigError(
            f"train.micro_batch_size={wanted} does not divide a worker's share of {per_worker} examples "
            f"(global_batch_size {total} / {world_size} workers); use one of {', '.join(map(str, valid))}"
        )
    else:
        micro = wanted
    why = f"{total} = {micro} micro-batch x {per_worker // micro} accumulation x {world_size} workers"
    decisions.append(Decision("gradient_accumulation_steps", str(per_worker // micro), why))
    return micro, per_worker // micro


def _given(value: Any, default: Any) -> Any:
    return default if value == "auto" else value


def _engine(config: Config, world_size: int, decisions: list[Decision]) -> tuple[int, Literal["torch", "deepspeed"]]:
    wanted, memory = config.memory.zero_stage, config.memory
    if wanted != "auto":
        stage, why = wanted, "memory.zero_stage"
    elif memory.offload_param in ("cpu", "nvme") or memory.offload_optimizer == "nvme":
        stage, why = 3, "what is offloaded is partitioned"
    elif memory.offload_optimizer == "cpu":
        stage, why = 2, "what is offloaded is partitioned"
    elif world_size == 1:
        stage, why = 0, "one worker has nothing to partition"
    elif config.optimizer.name in ("adafactor", "adamw_8bit"):
        stage, why = 0, f"the state of {config.optimizer.name} cannot be partitioned"
    else:
        stage, why = 2, "partitions gradients and optimizer state at no extra communication"
    engine: Literal["torch", "deepspeed"] = "torch" if world_size == 1 and stage == 0 else "deepspeed"
    decisions.append(Decision("zero_stage", str(stage), why))
    decisions.append(Decision("engine", engine, "DeepSpeed runs more than one worker and every ZeRO stage"))
    return stage, engine


def _activation_checkpointing(
    config: Config, device: str, decisions: list[Decision]
) -> Literal["none", "selective", "full"]:
    wanted = config.memory.activation_checkpointing
    if wanted != "auto":
        return wanted
    decisions.append(Decision("activation_checkpointing", "none", "nothing is computed twice"))
    return "none"


def _threads(config: Config, resources: Resources, per_node: int, decisions: list[Decision]) -> int:
    if config.train.num_threads is not None:
        return config.train.num_threads
    cores = max(1, resources.num_cpus // resources.num_nodes)
    threads = max(1, cores // per_node)
    decisions.append(Decision("num_threads", str(threads), f"{cores} cores / {per_node} workers a node"))
    return threads
