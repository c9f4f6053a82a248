"""What a run's plan is made from: the model's profile, this hardware's calibration, and the resources asked about."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..harness import calibration as calibrations
from ..harness.calibration import Calibration
from ..harness.config import Config
from ..harness.devices import find_card
from ..harness.errors import BurnishError, ConfigError
from ..harness.plan import Decision, Plan, Resources, make_plan
from ..harness.planner import Choice, choose
from ..harness.profile_numbers import Activations, Counts, HeadLine, Line, Profile
from ..harness.run_dir import run_path

CUDA_CONTEXT_BYTES = 600 * 2**20
"""Taken off a GPU's memory where it is only asked about: the context and libraries of a process. An assumption."""
KIND = "accelerator_type:"
"""Begins the name of the resource in which Ray keeps the kind of a node's GPUs."""
MAX_CHARS = 120


@dataclass(frozen=True)
class Planned:
    """A plan and what it was made from; without a profile nothing is predicted."""

    plan: Plan
    resources: Resources
    profile: Profile | None
    choice: Choice | None
    calibration: Calibration | None
    profile_of: Callable[[Config], Profile]


@dataclass(frozen=True)
class Hardware:
    """Hardware to plan for; None is what is here. GPUs and bytes are those of one node."""

    num_gpus: int | None = None
    gpu_memory_bytes: int | None = None
    gpu_name: str | None = None
    num_nodes: int | None = None
    host_memory_bytes: int | None = None
    nvme_bytes: int | None = None

    @property
    def is_asked(self) -> bool:
        return self != Hardware()


def of_nodes(nodes: Sequence[Mapping[str, float]]) -> Resources:
    """The resources of a cluster from those of each node as Ray counts them: of nodes with GPUs where there are any.

    Ray tells what kind of GPU a node has, not its memory: that is from burnish's table, 0 for a kind not in it.
    """
    nodes = [node for node in nodes if node.get("GPU")] or [node for node in nodes if node.get("CPU")]
    num_gpus = int(sum(node.get("GPU", 0) for node in nodes))
    kinds = sorted({key.removeprefix(KIND) for node in nodes for key in node if key.startswith(KIND)})
    cards = [find_card(kind) for kind in kinds]
    known = [int(card.memory_bytes) - CUDA_CONTEXT_BYTES for card in cards if card is not None]
    return Resources(
        device="cuda" if num_gpus else "cpu",
        num_devices=num_gpus,
        num_cpus=int(sum(node.get("CPU", 0) for node in nodes)),
        host_memory_bytes=int(min((node.get("memory", 0) for node in nodes), default=0)),
        device_memory_bytes=min(known) if num_gpus and known and len(known) == len(kinds) else 0,
        device_name=kinds[0] if kinds else "",
        num_nodes=max(1, len(nodes)),
    )


def supposed(here: Resources, hardware: Hardware) -> Resources:
    """The resources with those of the hardware that are given. Raises ConfigError where a GPU's memory is not known."""
    nodes = hardware.num_nodes or here.num_nodes
    found = replace(here, num_nodes=nodes, num_cpus=here.num_cpus // here.num_nodes * nodes)
    if hardware.num_gpus == 0:
        found = replace(found, device="cpu", num_devices=0, device_memory_bytes=0, device_name="")
    elif hardware.num_gpus or hardware.gpu_memory_bytes or hardware.gpu_name:
        found = _with_gpus(found, hardware)
    elif here.device == "cuda":
        found = replace(found, num_devices=here.num_devices // here.num_nodes * nodes)
    if hardware.host_memory_bytes is not None:
        found = replace(found, host_memory_bytes=hardware.host_memory_bytes)
    return found if hardware.nvme_bytes is None else replace(found, nvme_bytes=hardware.nvme_bytes)


def _with_gpus(here: Resources, hardware: Hardware) -> Resources:
    card = find_card(hardware.gpu_name) if hardware.gpu_name else None
    name = hardware.gpu_name or here.device_name
    size = hardware.gpu_memory_bytes or (int(card.memory_bytes) if card else None)
    if size is None and hardware.gpu_name and card is None:
        raise ConfigError(f"--gpu-name {hardware.gpu_name} is not in burnish's table; give --gpu-memory as well")
    if size is None and here.device != "cuda":
        raise ConfigError("--gpus without a GPU here: give --gpu-memory, or --gpu-name")
    free = here.device_memory_bytes if size is None else max(0, size - CUDA_CONTEXT_BYTES)
    count = (hardware.num_gpus or max(1, here.num_devices // here.num_nodes)) * here.num_nodes
    return replace(here, device="cuda", num_devices=count, device_memory_bytes=free, device_name=name)


def planned(config: Config, resources: Resources, *, before: Plan | None = None) -> Planned:
    """The plan of the run in runs_dir/name; `before` is its plan so far, where it goes on.

    Raises ConfigError for a model that is not there or an adapter that does not fit it, InfeasibleError for a run that
    does not fit. A model that cannot be profiled is planned with its lasting state alone, and the plan says so.
    """
    cwd = os.getcwd()
    run_dir = str(run_path(Path(cwd) / config.runs_dir, config.name))
    plan = make_plan(config, resources, run_dir=run_dir, cwd=cwd)
    if plan.device == "cuda" and not resources.device_memory_bytes and config.memory.budget == "auto":
        reason = "the memory of the GPUs is not known; give memory.budget"
        profile, notes = None, [Decision("memory", "not predicted", reason)]
    else:
        profile, notes = _profile(config)
    calibration, note = calibrations.read(calibrations.hardware_name(plan.device, resources.device_name), plan.device)
    notes += [Decision("calibration", "not used", note)] if note else []
    if profile is None:
        return Planned(_noted(plan, notes), resources, None, None, calibration, profiler(config))
    choice = choose(
        config,
        resources,
        profile,
        run_dir=run_dir,
        cwd=cwd,
        calibration=calibration,
        profile_of=profiler(config),
        before=before,
    )
    chosen = replace(choice.chosen, plan=_noted(choice.plan, notes))
    return Planned(chosen.plan, resources, profile, replace(choice, chosen=chosen), calibration, profiler(config))


def profiler(config: Config) -> Callable[[Config], Profile]:
    """profile_of for variations of the config; torch is imported when it is first called."""
    labels = getattr(config.task, "labels", None)

    def profile(other: Config) -> Profile:
        from ..harness.profile import profile_of

        return profile_of(other, labels)

    return profile


def _noted(plan: Plan, notes: list[Decision]) -> Plan:
    return replace(plan, decisions=(*plan.decisions, *notes))


def _profile(config: Config) -> tuple[Profile | None, list[Decision]]:
    """The model's profile, or as much of it as can be found, with a note on what is missing."""
    try:
        return profiler(config)(config), []
    except BurnishError as error:
        if getattr(config.launch, "address", None) is None:
            raise
        return None, [Decision("memory", "not predicted", f"the model is not on this machine: {error}")]
    except Exception as error:  # a model that transformers builds and the profiler does not understand
        reason = f"the model could not be profiled ({type(error).__name__}: {' '.join(str(error).split())[:MAX_CHARS]})"
    try:
        profile = lasting_state(config)
    except BurnishError:
        raise
    except Exception:
        return None, [Decision("memory", "not predicted", reason)]
    return profile, [Decision("activations", "not counted", reason)]


def lasting_state(config: Config) -> Profile:
    """A profile with the numbers of weights and nothing that comes and goes. Raises ConfigError."""
    from ..harness.models import count_parameters

    counts = count_parameters(config, getattr(config.task, "labels", None))
    nothing = Activations(Line(), Line(), (Line(),), (Line(),), (HeadLine(),), (Line(),))
    return Profile(
        counts=counts,
        num_layers=1,
        layer=counts,
        embedding=Counts(0, 0),
        head=Counts(0, 0),
        largest_tensor=0,
        largest_trained=0,
        num_trained_tensors=0,
        trained_vectors=0,
        buffer_bytes=0,
        hidden_size=0,
        vocab_size=0,
        is_per_example=config.task.type == "image_classification",
        chunk_tokens=None,
        policies={"none": nothing, "selective": nothing, "full": nothing},
        evaluation=nothing,
    )
