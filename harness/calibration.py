"""What `burnish plan --verify` found out about this hardware, kept for the next plan: one JSON file for each. No torch.

Every verification adds a sample; what counts is the median of the newest ones, so that one disturbed measurement
changes nothing. A file that is broken or of another kind is left alone and said to be.
"""

import json
import math
import os
import platform
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

from .errors import ConfigError
from .memory import OVERHEAD, Overhead, Prediction, predict
from .plan import Plan
from .profile_numbers import Profile

FORMAT = 1
MAX_SAMPLES = 15
FOLDER = Path("~/.cache/burnish/calibration")
MAX_SHARE = 1.0
"""Of what comes and goes in a step, lost to the allocator: more than this is no loss but a mistake."""
SMALL_BYTES = 128 * 2**20
LONG_S = 0.1
"""A shorter step says how long operations take to start."""
MAX_BYTES = 2**50


@dataclass(frozen=True)
class Sample:
    """One verification: what was measured beyond the arithmetic of `memory`, and how fast a step was."""

    residual_bytes: int
    """Measured peak of the step less the predicted one without any overhead; below 0 where less was measured."""
    transient_bytes: int
    """What comes and goes in the step, by the prediction."""
    flops: float
    """Of the measured step, of one GPU or of one thread of a CPU."""
    step_s: float
    baseline_bytes: int
    """Of a worker's process with everything imported and no weight loaded."""


@dataclass(frozen=True)
class Calibration:
    """What the samples of one kind of hardware say together; `flops_per_s` is None where no step took long enough."""

    hardware: str
    num_samples: int
    process_bytes: int
    allocator_share: float
    flops_per_s: float | None
    """Reached by one GPU, or by one thread of a CPU."""
    baseline_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def hardware_name(device: str, device_name: str = "") -> str:
    """Names what a calibration holds for: the GPU, or the processor of this machine."""
    return device_name or "GPU" if device == "cuda" else _processor()


def sample_of(
    plan: Plan, profile: Profile, *, step_bytes: int, baseline_bytes: int, step_s: float, flops: float
) -> Sample:
    """What a measured step says. The prediction is linear in the allocator's share, so two tell what comes and goes."""
    without, whole = (_step_bytes(predict(plan, profile, Overhead(0, share))) for share in (0.0, 1.0))
    threads = plan.num_threads if plan.device == "cpu" else 1
    return Sample(
        residual_bytes=step_bytes - without,
        transient_bytes=whole - without,
        flops=flops / threads,
        step_s=step_s,
        baseline_bytes=baseline_bytes,
    )


def _step_bytes(prediction: Prediction) -> int:
    return prediction.phases.get("step", prediction.peak_bytes)


def combine(hardware: str, device: str, samples: Sequence[Sample]) -> Calibration:
    """Medians. Steps in which little comes and goes tell what a process takes, the others what the allocator loses."""
    assert samples
    small = [max(0, one.residual_bytes) for one in samples if one.transient_bytes < SMALL_BYTES]
    process_bytes = round(median(small)) if small else OVERHEAD[device].process_bytes
    shares = [
        min(max(0.0, (one.residual_bytes - process_bytes) / one.transient_bytes), MAX_SHARE)
        for one in samples
        if one.transient_bytes >= SMALL_BYTES
    ]
    speeds = [one.flops / one.step_s for one in samples if one.step_s >= LONG_S]
    return Calibration(
        hardware=hardware,
        num_samples=len(samples),
        process_bytes=process_bytes,
        allocator_share=median(shares) if shares else OVERHEAD[device].allocator_share,
        flops_per_s=median(speeds) if speeds else None,
        baseline_bytes=round(median(sample.baseline_bytes for sample in samples)),
    )


def path_of(hardware: str, folder: Path | None = None) -> Path:
    return (FOLDER.expanduser() if folder is None else folder) / f"{re.sub(r'[^a-z0-9]+', '-', hardware.lower())}.json"


def read(hardware: str, device: str, *, folder: Path | None = None) -> tuple[Calibration | None, str]:
    """The calibration of the hardware, and a note where its file says nothing. Both are empty without a file."""
    path = path_of(hardware, folder)
    try:
        samples = _parse(path.read_text(encoding="utf-8"), hardware)
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, TypeError, KeyError) as error:
        return None, f"the calibration {path} is not used: {error}"
    return combine(hardware, device, samples), ""


def add(hardware: str, sample: Sample, *, folder: Path | None = None) -> Path:
    """Adds a sample to the file of the hardware, atomically; a file that cannot be read is begun anew."""
    path = path_of(hardware, folder)
    try:
        samples = _parse(path.read_text(encoding="utf-8"), hardware)
    except (OSError, ValueError, TypeError, KeyError):
        samples = []
    kept = [asdict(one) for one in [*samples, sample][-MAX_SAMPLES:]]
    text = json.dumps({"format": FORMAT, "hardware": hardware, "samples": kept}, indent=2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        raise ConfigError(f"the calibration cannot be written to {path}: {error.strerror}") from None
    return path


def _parse(text: str, hardware: str) -> list[Sample]:
    """Raises ValueError, TypeError or KeyError for what is no calibration of this hardware."""
    found = json.loads(text)
    if not isinstance(found, Mapping) or found.get("format") != FORMAT:
        raise ValueError("it is no calibration of this version")
    if found.get("hardware") != hardware:
        raise ValueError(f"it is of {str(found.get('hardware'))[:60]!r}")
    samples = [Sample(**one) for one in found["samples"]]
    if not samples:
        raise ValueError("it has no samples")
    for sample in samples:
        for field in fields(sample):
            value = getattr(sample, field.name)
            lowest = -MAX_BYTES if field.name == "residual_bytes" else 0
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or value < lowest or (field.name.endswith("_bytes") and value > MAX_BYTES):
                raise ValueError(f"{field.name} is {value!r}")
    return samples[-MAX_SAMPLES:]


def _processor() -> str:
    """The processor's model, as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.processor() or platform.machine() or "CPU"
