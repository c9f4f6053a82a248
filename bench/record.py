"""Results on disk: what a number is worth nothing without, the name of the hardware, and bench/results/. No torch."""

import hashlib
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..harness.errors import ConfigError
from ..harness.run_dir import environment, write_json
from .benchmark import Choice, Result, Setting

FORMAT = 1
REQUIRED = (
    *("benchmark", "device", "hardware", "time", "command", "environment", "options", "options_hash"),
    *("is_quick", "is_interrupted"),
)
"""Fields of every result besides `format` and `rows`."""
RESULTS = Path(__file__).resolve().parent / "results"
"""<hardware>/<benchmark>.json: the results kept in the repository."""
MATRIX_FEATURES = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
"""What decides a CPU's speed at matrix products, the best first."""


def opened(name: str, setting: Setting, choice: Choice, prepared: dict[str, Any]) -> Result:
    """A result without rows; it counts as interrupted until `closed`."""
    chosen = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(choice).items()}
    options = chosen | {"num_threads": setting.num_threads, "num_rounds": setting.num_rounds}
    found = described(setting.device)
    return {
        "format": FORMAT,
        "benchmark": name,
        "device": setting.device,
        "hardware": hardware(found, setting.device),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": ["burnish", *without_out(sys.argv[1:])],
        "environment": found,
        "options": options,
        "options_hash": hash_of(options),
        "is_quick": choice.is_quick,
        "is_interrupted": True,
        **prepared,
        "rows": [],
    }


def without_out(arguments: Sequence[str]) -> list[str]:
    """The arguments but for `--out PATH`: a path of this machine, and nothing that the figures depend on."""
    found = list(arguments)
    if "--out" in found:
        at = found.index("--out")
        del found[at : at + 2]
    return [argument for argument in found if not argument.startswith("--out=")]


def described(device: str) -> dict[str, Any]:
    """harness.run_dir.environment, and what decides the speed of this machine."""
    return environment() | {"cpu_features": cpu_features(), "gpu": gpu_name(device)}


def hardware_here(device: str) -> str:
    return hardware(described(device), device)


def hash_of(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def hardware(environment: dict[str, Any], device: str) -> str:
    """A folder name for machines whose figures may be compared: nvidia-h200, cpu-2-intel-xeon-processor-amx-bf16."""
    if device == "cuda":
        return slug(environment["gpu"] or "unknown-gpu")
    feature = next(iter(environment["cpu_features"]), "")
    return "-".join(filter(None, ("cpu", str(environment["num_cpus"]), slug(environment["cpu"]), slug(feature))))


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", " ", text.lower())).strip("-")


def cpu_features() -> list[str]:
    """Those of MATRIX_FEATURES that this machine has."""
    try:
        flags = set(re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].split())
    except (OSError, IndexError):
        return []
    return [feature for feature in MATRIX_FEATURES if feature in flags]


def gpu_name(device: str) -> str | None:
    if device != "cuda":
        return None
    import torch

    return torch.cuda.get_device_name()


def load(path: str | Path) -> Result:
    """A result file. Raises ConfigError if it is none."""
    try:
        found = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or 'no JSON'}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("rows"), list):
        raise ConfigError(f"{path}: not a result of burnish bench run (format {FORMAT})")
    if missing := [name for name in REQUIRED if name not in found]:
        raise ConfigError(f"{path}: not a whole result of burnish bench run: has no {', '.join(missing)}")
    if not all(isinstance(row, dict) and {"key", "state"} <= row.keys() for row in found["rows"]):
        raise ConfigError(f"{path}: not a whole result of burnish bench run: a row has no key or no state")
    return found


def load_all(path: str | Path) -> list[Result]:
    """The result file, or every result in the folder, by benchmark. Raises ConfigError if there is none.

    JSON in the folder that does not say `format`, as a summary beside the results, is none of ours.
    """
    path = Path(path)
    if not path.is_dir():
        return [load(path)]
    found = [load(file) for file in sorted(path.glob("*.json")) if not is_foreign(file)]
    if not found:
        inside = sorted({str(file.parent) for file in path.glob("*/*.json")})
        raise ConfigError(f"{path}: no result (*.json) in this folder" + (f"; give {inside[0]}" if inside else ""))
    return found


def is_foreign(path: Path) -> bool:
    """Whether the file is whole JSON of something else."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return not isinstance(found, dict) or "format" not in found


def save(path: str | Path, result: Result) -> None:
    write_json(path, result)
