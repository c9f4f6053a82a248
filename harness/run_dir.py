"""The run directory: where every file of a run lies, and how it is written so that a crash leaves it readable.

JSON is written whole (temporary file, then rename); JSONL is appended one line per system call. Imports no torch.
"""

import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from .config import Config
from .config_types import NAME_PATTERN
from .errors import ConfigError
from .paths import check_entries
from .plan import Plan
from .redact import redact

LIBRARIES = (
    *("burnish", "torch", "transformers", "peft", "deepspeed", "ray", "bitsandbytes"),
    *("accelerate", "safetensors", "tokenizers", "datasets", "numpy"),
)
FENCE = "fence.json"
"""See lock.py. It alone makes no run."""


class RunDir:
    """The paths of one run. Making the object touches no file; `create` and `open` do."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_yaml = self.path / "config.yaml"
        self.plan_json = self.path / "plan.json"
        self.env_json = self.path / "env.json"
        self.data_json = self.path / "data.json"
        self.metrics_jsonl = self.path / "metrics.jsonl"
        self.events_jsonl = self.path / "events.jsonl"
        self.samples_json = self.path / "samples.json"
        self.summary_json = self.path / "summary.json"
        self.report_html = self.path / "report.html"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"
        self.heartbeats = self.path / "heartbeats"
        self.hangs = self.path / "hangs"
        self.stop = self.path / "stop"
        """Its existence asks the workers to write a checkpoint and end."""
        self.fatal_json = self.path / "fatal.json"
        """Why a worker gave up: an error that a restart would not cure."""

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def is_run(self) -> bool:
        return self.plan_json.is_file() or self.config_yaml.is_file()

    @classmethod
    def create(cls, path: str | Path, *, mode: Literal["new", "resume", "fresh"]) -> "RunDir":
        """Makes or re-enters a run directory; never reuses one silently.

        new: the directory must not exist or be empty. resume: it must be a run; a stop request and a fatal error
        left by the last attempt are cleared. fresh: an old run is moved to <name>.old-<n>. Raises ConfigError.
        """
        run = cls(path)
        if run.path.exists() and not run.path.is_dir():
            raise ConfigError(f"{run.path} is a file, so no run can be kept there; choose another name")
        is_used = run.path.is_dir() and any(path.name != FENCE for path in run.path.iterdir())
        if mode == "resume":
            if not run.is_run:
                raise ConfigError(f"--resume: there is no run at {run.path}; drop --resume to start it")
            run.stop.unlink(missing_ok=True)
            run.fatal_json.unlink(missing_ok=True)
            return run
        if is_used and not run.is_run:
            raise ConfigError(f"{run.path} holds files that are not a run; choose another name or runs_dir")
        if is_used and mode == "new":
            raise ConfigError(
                f"{run.path} already holds a run; use --resume to go on with it, --fresh to move it aside "
                "and start again, or name=… for another one"
            )
        if is_used:
            run.path.rename(_free_name(run.path))
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the run directory {run.path} cannot be made: {error.strerror}") from None
        return run

    @classmethod
    def open(cls, path: str | Path) -> "RunDir":
        """The run at `path`, or at runs/`path`. Raises ConfigError if there is none."""
        candidates = [cls(path), cls(Path("runs") / path)]
        for run in candidates:
            if run.is_run:
                check_entries(run.path)
                return run
        known = sorted(folder.name for folder in Path("runs").glob("*") if cls(folder).is_run)
        hint = f"; there is {', '.join(known[:8])} in runs/" if known else ""
        raise ConfigError(f"{path} is no run directory (no plan.json or config.yaml in it){hint}")

    def load_plan(self) -> Plan:
        """Raises ConfigError if plan.json is missing or not a plan of this version."""
        try:
            return Plan.from_dict(json.loads(self.plan_json.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ConfigError(f"{self.path} has no plan.json: the run ended before it was planned") from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{self.plan_json} is not a plan of this version of burnish: {reason}") from None

    def load_config(self) -> Config:
        return self.load_plan().config

    def trained_folder(self) -> Path:
        """The folder with the result: adapter/ or model/. Raises ConfigError if the run has not finished one."""
        for folder in (self.adapter, self.model):
            if any(folder.glob("*.safetensors")):
                return folder
        raise ConfigError(f"{self.path} has no trained weights yet; finish it with `burnish train … --resume`")

    def write_json(self, path: Path, value: Any) -> None:
        write_json(path, value)

    def append_jsonl(self, path: Path, record: dict[str, Any]) -> None:
        append_jsonl(path, record)

    def read_jsonl(self, path: Path) -> list[dict[str, Any]]:
        return read_jsonl(path)

    def log_event(self, event: str, /, **fields: Any) -> None:
        """Appends one line to events.jsonl, stamped with the time in seconds since 1970."""
        append_jsonl(self.events_jsonl, {"event": event, "time": round(time.time(), 3), **fields})


def run_path(runs_dir: str | Path, name: str) -> Path:
    """runs_dir/name. Raises ConfigError if the name or a link in its place leads out of runs_dir."""
    path = Path(runs_dir) / name
    if not re.fullmatch(NAME_PATTERN, name) or path.resolve().parent != Path(runs_dir).resolve():
        raise ConfigError(f"name={name!r} does not name a folder directly inside {runs_dir}")
    return path


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    return aside


def finite(value: Any) -> Any:
    """The same JSON value with NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _dumps(value: Any, **options: Any) -> bytes:
    # Text read from a user's file may hold lone surrogates, which UTF-8 cannot encode; ensure_ascii escapes them.
    return json.dumps(finite(value), allow_nan=False, **options).encode("ascii")


def write_json(path: str | Path, value: Any) -> None:
    """Writes the file whole: a reader sees the old content or the new, also after a crash."""
    write_bytes(path, _dumps(value, indent=2) + b"\n")


def write_jsonl(path: str | Path, records: Iterable[dict[str, Any]]) -> None:
    """Writes all lines of the file anew, whole."""
    write_bytes(path, b"".join(_dumps(record) + b"\n" for record in records))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Replaces the file in one rename, after the content is on the disk."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: str | Path, default: Any = None) -> Any:
    """The file's value, or `default` if the file is missing or no JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return default


def append_jsonl(path: str | Path, record: dict[str, Any]) -> None:
    """Appends one line in one write, without secrets. After a torn line (a crash) it starts on a line of its own."""
    with Path(path).open("ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
        is_torn = file.read(1) not in (b"", b"\n")
        file.write((b"\n" if is_torn else b"") + redact(_dumps(record).decode("ascii")).encode() + b"\n")


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The records of the file, [] if it is missing. Lines that a crash tore are left out."""
    records = []
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def environment() -> dict[str, Any]:
    """Versions and hardware of this process's machine. Holds no environment variable, user or host name."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": found,
        "cpu": _first_match("/proc/cpuinfo", r"model name\s*:\s*(.+)") or platform.processor(),
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": 1024 * int(_first_match("/proc/meminfo", r"MemTotal:\s*(\d+) kB") or 0),
        "gpus": [
            name
            for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
            if (name := _first_match(str(file), r"Model:\s*(.+)"))
        ],
        "nvidia_driver": _first_match("/proc/driver/nvidia/version", r"Module.*?\s(\d+\.[\d.]+)\s"),
        "git_commit": _git_commit(Path(__file__).resolve().parents[1]),
    }


def _first_match(file: str, pattern: str) -> str | None:
    try:
        match = re.search(pattern, Path(file).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return match[1].strip() if match else None


def _git_commit(folder: Path) -> str | None:
    """Commit of the checkout that burnish runs from, marked +changes if files differ; None if it is none."""
    if not (folder / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
