"""What would make a run fit: changes in the order of what they cost the user, each predicted before it is named.

First what leaves the results as they are (settings that the config fixes, a disk, idle GPUs), then what changes them (a
smaller optimizer state, a quantised base, shorter examples), last other hardware. Pure; no torch.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .calibration import Calibration
from .candidates import MARGIN, SETTINGS, Candidate, Survey, survey
from .config import Config
from .config_io import with_values
from .errors import BurnishError, ConfigError, InfeasibleError
from .markup import size
from .plan import Resources
from .profile_numbers import Profile
from .reasons import excess, written

ProfileOf = Callable[[Config], Profile] | None
MAX_WORKERS = 1024
LENGTH_STEP = 64
MAX_NAMED_PARTS = 4
BY_COST = (
    "micro_batch_size",
    "activation_checkpointing",
    "offload_activations",
    "zero_stage",
    "offload_optimizer",
    "offload_param",
)
"""Settings that the config may have fixed, the one that costs the least time first."""


@dataclass(frozen=True)
class Change:
    """`values` go into the config (dotted keys), and the run is planned on `resources`. `note` says what else to do."""

    values: Mapping[str, Any]
    resources: Resources
    note: str = ""

    def __or__(self, other: "Change") -> "Change":
        return Change(dict(self.values) | dict(other.values), self.resources, self.note or other.note)


@dataclass(frozen=True)
class Remedy:
    """A change that fits, and what the planner takes with it."""

    values: Mapping[str, Any]
    note: str
    best: Candidate

    @property
    def overrides(self) -> list[str]:
        """As they are typed on the command line."""
        return [f"{key}={written(value)}" for key, value in self.values.items()]


def refusal(
    found: Survey,
    config: Config,
    resources: Resources,
    profile: Profile,
    *,
    calibration: Calibration | None = None,
    profile_of: ProfileOf = None,
) -> InfeasibleError:
    """The error of a run that does not fit: what it needs by part, what there is, and the cheapest change."""
    sentence = (
        f"{config.name} does not fit: it needs {excess(found.best, found)} ({_parts(found.best)}; limit: "
        f"{found.limits.why})"
    )
    remedy = cheapest(config, resources, profile, calibration=calibration, profile_of=profile_of)
    if remedy is None:
        return InfeasibleError(f"{sentence}; no change that burnish knows makes it fit, use a smaller model")
    told = " ".join([*remedy.overrides, *([remedy.note] if remedy.note else [])])
    return InfeasibleError(
        f"{sentence}. The cheapest change that fits: {told} ({size(remedy.best.prediction.needed_bytes)})"
    )


def _parts(best: Candidate) -> str:
    """The largest parts of what is too large; the phase where that is not the step."""
    prediction, place = best.prediction, next(iter(best.over))
    phase = max(prediction.phases, key=lambda name: prediction.phases[name], default="step")
    if place == "device" and prediction.phases.get(phase, 0) > prediction.phases.get("step", 0):
        return f"in the phase {phase}; a step needs {size(prediction.phases['step'] - prediction.mapped_bytes)}"
    parts = {"device": prediction.device, "host": prediction.host, "nvme": prediction.nvme}[place]
    largest = sorted(parts.items(), key=lambda part: -part[1])[:MAX_NAMED_PARTS]
    told = ", ".join(f"{name.replace('_', ' ')} {size(value)}" for name, value in largest if value)
    is_mapped = place == "device" and prediction.mapped_bytes
    return f"{told}, less {size(prediction.mapped_bytes)} in pages of files" if is_mapped else told


def cheapest(
    config: Config,
    resources: Resources,
    profile: Profile,
    *,
    calibration: Calibration | None = None,
    profile_of: ProfileOf = None,
) -> Remedy | None:
    """The first change alone that fits; where none does, the first that does together with all before it.

    Then shorter examples, and last other hardware, or what the hardware has where memory.budget allows less.
    """
    known = _Known(config, profile, calibration, profile_of)
    changes = list(_changes(config, resources))
    for change in changes:
        if (remedy := known.tried(change)) is not None:
            return remedy
    together = Change({}, resources)
    for change in changes:
        if change.resources == resources:
            together = together | change
            if len(together.values) > len(change.values) and (remedy := known.tried(together)) is not None:
                return remedy
    if config.memory.budget != "auto":
        return known.shorter(together) or known.tried(Change({"memory.budget": "auto"}, resources))
    return known.shorter(together) or known.more_devices(together) or known.larger_device(together)


@dataclass(frozen=True)
class _Known:
    """What is needed to try a change."""

    config: Config
    profile: Profile
    calibration: Calibration | None
    profile_of: ProfileOf

    def tried(self, change: Change) -> Remedy | None:
        """The remedy if the change can be made and fits."""
        config = changed(self.config, change.values)
        profile = None if config is None else self._profile(config)
        if config is None or profile is None:
            return None
        try:
            found = survey(config, change.resources, profile, calibration=self.calibration)
        except BurnishError:
            return None
        return _remedy(change, found.best) if found.best.fits else None

    def _profile(self, config: Config) -> Profile | None:
        """None where the model would be another one and nobody can say what it takes."""
        same = all(getattr(config, name) == getattr(self.config, name) for name in ("model", "quantization", "adapter"))
        if same:
            return self.profile
        try:
            return None if self.profile_of is None else self.profile_of(config)
        except BurnishError:
            return None

    def shorter(self, change: Change) -> Remedy | None:
        """The longest max_length that fits, a multiple of LENGTH_STEP, found by bisection."""
        if self.profile.is_per_example:
            return None
        low, high, best = 0, (self.config.data.max_length - 1) // LENGTH_STEP, None
        while low < high:
            middle = (low + high + 1) // 2
            values = dict(change.values) | {"data.max_length": middle * LENGTH_STEP}
            remedy = self.tried(replace(change, values=values))
            low, high, best = (middle, high, remedy) if remedy else (low, middle - 1, best)
        return best

    def more_devices(self, change: Change) -> Remedy | None:
        """The fewest GPUs of this kind that are enough, of twice as many, four times as many, and so on."""
        have = change.resources
        if not _devices(self.config, have):
            return None
        per_node = max(1, have.num_devices // have.num_nodes)
        workers = getattr(self.config.launch, "max_workers", 1)
        while (workers := 2 * workers) <= MAX_WORKERS:
            nodes = max(have.num_nodes, -(-workers // per_node))
            more = replace(have, num_devices=nodes * per_node, num_cpus=nodes * have.num_cpus, num_nodes=nodes)
            values = dict(change.values) | {"launch.type": "ray", "launch.num_workers": workers}
            note = f"on {workers} GPUs in {nodes} nodes" if nodes > 1 else f"on {workers} GPUs"
            if (remedy := self.tried(Change(values, more, note))) is not None:
                return remedy
        return None

    def larger_device(self, change: Change) -> Remedy | None:
        """The memory that the leanest way to run needs, with what was changed before."""
        room = replace(change.resources, device_memory_bytes=2**60, host_memory_bytes=2**60, nvme_bytes=2**60)
        config = changed(self.config, change.values)
        profile = None if config is None else self._profile(config)
        if config is None or profile is None or config.memory.budget != "auto":
            return None
        found = survey(config, room, profile, calibration=self.calibration)
        leanest = min(found.candidates, key=lambda candidate: candidate.prediction.needed_bytes)
        device = leanest.plan.device
        wanted = leanest.prediction.needed_bytes / (1 - MARGIN[device])
        noun = "a GPU with" if device == "cuda" else "a host with"
        return _remedy(replace(change, note=f"and {noun} {size(wanted)} free for each worker"), leanest)


def _remedy(change: Change, best: Candidate) -> Remedy:
    """The change with every `auto` in it as it was decided; what stays as the config has it is left out."""
    keys = {key: name for name, key in SETTINGS.items()}
    decided = {key: best.settings[keys[key]] for key, value in change.values.items() if value == "auto" and key in keys}
    values = dict(change.values) | decided
    return Remedy(values, change.note, best)


def changed(config: Config, values: Mapping[str, Any]) -> Config | None:
    """The config with other values under dotted keys; None where that is no valid config."""
    try:
        return with_values(config, values)
    except ConfigError:
        return None


def _changes(config: Config, resources: Resources) -> Iterator[Change]:
    """In the order of what they cost."""
    for name in BY_COST:
        section = config.train if name == "micro_batch_size" else config.memory
        if getattr(section, name) != "auto":
            yield Change({SETTINGS[name]: "auto"}, resources)
    if config.memory.nvme_path is None and resources.nvme_bytes:
        yield Change({"memory.nvme_path": "FOLDER"}, resources, "with FOLDER on a fast local disk")
    yield from _more_workers(config, resources, have=_devices(config, resources))
    yield from (Change(values, resources) for values in other_results(config))


def other_results(config: Config) -> Iterator[Mapping[str, Any]]:
    """Values that train something else, or with other numbers; those that take less memory."""
    if config.optimizer.name == "adamw":
        yield {"optimizer.name": "adamw_8bit"}
    if config.adapter.method == "full":
        yield {"adapter.method": "lora"}
    if config.adapter.method != "freeze" and config.quantization.type != "nf4":
        yield {"adapter.method": "qlora", "quantization.type": "nf4"}


def _devices(config: Config, resources: Resources) -> int:
    use_gpu = resources.device == "cuda" and getattr(config.launch, "use_gpu", "auto") is not False
    return resources.num_devices if use_gpu else 0


def _more_workers(config: Config, resources: Resources, *, have: int) -> Iterator[Change]:
    """Workers on GPUs that are there and idle: twice as many, four times as many, and so on."""
    workers = getattr(config.launch, "max_workers", 1)
    while (workers := 2 * workers) <= min(have, MAX_WORKERS):
        yield Change({"launch.type": "ray", "launch.num_workers": workers}, resources)
