"""The sections of the schema about the hardware: memory, kernels, launch. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from .config_types import Bytes, Line, NotNegative, Section


class Memory(Section):
    budget: Literal["auto"] | Bytes = "auto"
    """Bytes a worker may use on its device; auto = what the device has free."""
    zero_stage: Literal["auto"] | Annotated[int, Field(ge=0, le=3)] = "auto"
    offload_optimizer: Literal["auto", "none", "cpu", "nvme"] = "auto"
    """Where optimizer state and master weights lie: none = on the device, cpu = host memory, nvme = files."""
    offload_param: Literal["auto", "none", "cpu", "nvme"] = "auto"
    """Where weights lie that no layer is using; needs ZeRO stage 3."""
    nvme_path: Line | None = None
    """Folder on a fast local disk for what is offloaded to nvme."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """What backward recomputes: none, selective = all but matrix products and attention, full = whole layers."""
    offload_activations: Literal["auto"] | bool = "auto"
    """Keep what the forward pass saves in pinned host memory; needs a GPU."""


class Kernels(Section):
    enabled: Literal["auto"] | bool = "auto"
    """Fused operations in place of the modules that they recognise; auto = where they can run, true = or refuse."""


class Inline(Section):
    """One process, no Ray."""

    type: Literal["inline"] = "inline"


NumWorkers = Annotated[int, Field(gt=0, le=100_000)]
Range = Annotated[tuple[NumWorkers, NumWorkers], Field(strict=False)]


class Ray(Section):
    type: Literal["ray"]
    address: Line | None = None
    """Address of an existing cluster; empty = start one on this machine for this run."""
    num_workers: NumWorkers | Range = 1
    """One process per device; [min, max] = as many of them as the cluster has room for, while it runs."""
    resources_per_worker: dict[Line, Annotated[float, Field(ge=0.001, le=1e6)]] = Field(default={})
    use_gpu: Literal["auto"] | bool = "auto"
    max_failures: NotNegative = 3
    """Restarts from the newest checkpoint after a worker, the driver or Ray's head dies."""
    hang_timeout_s: Annotated[float, Field(ge=1, le=1e6)] = 300.0
    """A rank that makes no progress for so long ends its attempt; evaluation, saving and the like have longer."""

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


Launch = Annotated[Inline | Ray, Field(discriminator="type")]
