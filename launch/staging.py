"""What travels with a job: the config, the local files it names, burnish itself where a cluster lacks it. No Ray here.

A folder is made that holds nothing else, so that neither runs nor environments nor a repository's history can travel.
On the cluster `job_entry` puts it on the shared storage, where every node finds the same files.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from glob import has_magic, iglob
from importlib.metadata import version
from pathlib import Path

from ..harness.config import Config, Source
from ..harness.config_io import config_to_yaml
from ..harness.errors import ConfigError
from ..harness.markup import size
from ..harness.paths import BUILT_IN, PACKAGE, is_url, resolve_path

CONFIG_FILE, SCRIPT_FILE = "config.yaml", "burnish-job.sh"
MAX_BYTES = 100 * 2**20
"""Ray keeps what travels in the memory of the head; larger files belong on shared storage."""
NEVER = (".git", ".venv", ".staged", "runs")
"""Folders that no job needs: history, environment, other runs."""
LAYERS = ("harness", "kernels", "launch")
ROOT = Path(__file__).resolve().parents[1]
SCRIPT = r"""# Runs burnish with the Python that Ray's own workers have: `python` may be another one on this host.
umask 077
raylet=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$PPID/status" 2>/dev/null)
python=$(tr '\0' '\n' < "/proc/${raylet:-self}/cmdline" | sed -n 's/^--python_worker_command=\([^ ]*\).*/\1/p')
exec "${python:-python3}" -m burnish.launch.job_entry "$@"
"""
ENTRYPOINT = f"exec sh {SCRIPT_FILE}"


@dataclass(frozen=True)
class LocalPath:
    """A path of the config that names files: the key it stands at, and whether it lies in the folder that travels."""

    key: str
    path: str
    travels: bool


def local_paths(config: Config, folder: Path) -> list[LocalPath]:
    """The files and folders of the config; hub ids, URLs, package files and built-in data are none.

    A relative path is looked for in `folder`. Raises ConfigError for one that is not there.
    """
    found = []
    for key, path in _named_paths(config):
        if path.startswith(PACKAGE) or is_url(path) or BUILT_IN.fullmatch(path):
            continue
        expanded = os.path.expanduser(path)
        if os.path.isabs(expanded):
            found.append(LocalPath(key, expanded, travels=False))
        elif resolve_path(path, str(folder)) != path:
            found.append(LocalPath(key, path, travels=True))
    return found


def check_places(config: Config) -> None:
    """Raises ConfigError if the run's directories are not where every node finds them."""
    if not os.path.isabs(config.runs_dir):
        raise ConfigError(
            f"runs_dir={config.runs_dir}: on a cluster runs lie on storage that every node sees; give its absolute "
            "path there, such as runs_dir=/mnt/shared/runs"
        )
    if config.memory.nvme_path is not None and not os.path.isabs(config.memory.nvme_path):
        raise ConfigError(f"memory.nvme_path={config.memory.nvme_path}: give the absolute path of a disk of the nodes")


def stage(config: Config, folder: Path, into: Path) -> int:
    """Fills the empty folder `into` with the config, the script and what travels of `folder`; returns the bytes.

    Raises ConfigError for what is missing, leads out of `folder` or into one that never travels, or is too large.
    """
    files: dict[str, Path] = {}
    for local in local_paths(config, folder):
        if local.travels:
            _check_inside(local.key, local.path, folder)
            files |= dict(_files(folder, local))
    total = sum(path.stat().st_size for path in files.values())
    if total > MAX_BYTES:
        largest = max(files.values(), key=lambda path: path.stat().st_size)
        raise ConfigError(
            f"{size(total)} would travel with the job, and {size(MAX_BYTES)} may; put {largest} and what else is large "
            "on storage that every node sees and give its absolute path"
        )
    for name, path in files.items():
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, into / name)
    (into / CONFIG_FILE).write_text(config_to_yaml(config), encoding="utf-8", errors="backslashreplace")
    (into / SCRIPT_FILE).write_text(SCRIPT, encoding="ascii")
    return total


def stage_package(into: Path) -> list[str]:
    """Copies burnish below `into` and returns the folders to add to the path of every process of a job."""
    package, about = into / "burnish", into / f"burnish-{version('burnish')}.dist-info"
    for layer in LAYERS:
        shutil.copytree(ROOT / layer, package / layer, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    # A package of its own, so that no module of an installed burnish is mixed in.
    (package / "__init__.py").touch()
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: burnish\nVersion: {version('burnish')}\n")
    return [str(package), str(about)]


def source_digest(root: Path = ROOT) -> str:
    """A hash of burnish's source files below `root`: equal where the same code is installed."""
    digest = hashlib.sha256()
    for layer in LAYERS:
        for path in sorted((root / layer).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                content = path.read_bytes()
                digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
                digest.update(content)
    return digest.hexdigest()[:16]


def _named_paths(config: Config) -> Iterator[tuple[str, str]]:
    yield from ((f"model.{name}", path) for name in ("path", "tokenizer") if (path := getattr(config.model, name)))
    for split in ("train", "validation", "test"):
        sources: list[Source] = getattr(config.data, split) or []
        yield from ((f"data.{split}", source.path) for source in sources)
    template = config.data.chat_template
    if template is not None and template != "none" and not {"\n", "{"} & set(template):
        yield "data.chat_template", template


def _check_inside(key: str, path: str, folder: Path) -> None:
    relative = Path(os.path.normpath(path))
    if ".." in relative.parts or not (folder / _before_magic(relative)).resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"{key}={path} leads out of {folder}, the folder that travels; give --working-dir a folder that holds it, "
            "or put it on storage that every node sees and give its absolute path"
        )
    never = next((part for part in relative.parts if part in NEVER), None)
    if never is not None:
        raise ConfigError(
            f"{key}={path}: {never}/ never travels with a job; put it on storage that every node sees and give its "
            "absolute path"
        )


def _before_magic(path: Path) -> Path:
    """The part of a glob that is a plain path."""
    parts = list(path.parts)
    first = next((number for number, part in enumerate(parts) if has_magic(part)), len(parts))
    return Path(*parts[:first])


def _files(folder: Path, local: LocalPath) -> Iterator[tuple[str, Path]]:
    """(path relative to the folder, file) of all that a path of the config stands for."""
    pattern = str(folder / local.path)
    roots = iglob(pattern, recursive=True) if has_magic(local.path) and not os.path.exists(pattern) else [pattern]
    for root in map(Path, roots):
        for path in [root] if root.is_file() else sorted(root.rglob("*")):
            inside = path.relative_to(folder)
            if not path.is_file() or any(part in (*NEVER, "__pycache__") for part in inside.parts):
                continue
            if not path.resolve().is_relative_to(folder.resolve()):
                raise ConfigError(f"{local.key}: {path} is a link out of {folder}, the folder that travels; copy it in")
            yield str(inside), path
