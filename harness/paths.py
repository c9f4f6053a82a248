"""What a path in a config means: a file in an installed package, a local file or folder, a URL, or a hub id."""

import os
import re
from difflib import get_close_matches
from glob import has_magic, iglob
from importlib.util import find_spec
from pathlib import Path

from .errors import ConfigError

PACKAGE = "package:"
BUILT_IN = re.compile(r"(stdlib|sklearn):\w+")
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,95})?")
PROTOCOLS = (
    *("file", "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "hf", "hdfs"),
    *("ftp", "sftp", "ssh", "smb", "memory"),
)
"""What URLs may begin with: file systems that hand out bytes and do nothing else."""
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".arrow", ".gz", ".zst", ".yaml", ".yml")
MODEL_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".jinja")


def is_url(path: str) -> bool:
    """Whether fsspec should open it (`s3://…`, `https://…`)."""
    return bool(URL.match(path))


def is_hub_id(path: str) -> bool:
    """Whether it is spelled like `name` or `owner/name` on the Hugging Face hub, and not like a local file."""
    return (
        bool(HUB_ID.fullmatch(path)) and not path.lower().endswith(DATA_SUFFIXES + MODEL_SUFFIXES) and ".." not in path
    )


def resolve_path(path: str, cwd: str = ".") -> str:
    """`package:NAME/FILE`, a glob, and whatever exists below `cwd` -> absolute path.

    A URL, a hub id and a built-in source (`stdlib:docstrings`) stay as they are.

    Raises ConfigError for a package or file that is missing, and for anything that is neither.
    """
    if path.startswith(PACKAGE):
        return _package_file(path)
    if is_url(path):
        return _checked_url(path)
    if BUILT_IN.fullmatch(path):
        return path
    try:
        local = Path(os.path.abspath(Path(cwd) / Path(path).expanduser()))
        if local.is_file() or local.is_dir() or (has_magic(path) and next(iglob(str(local), recursive=True), None)):
            return str(local)
        if local.exists():
            raise ConfigError(f"{_short(path)} is a pipe, socket or device; give a file or a folder")
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{_short(path)} cannot be a path: {error}") from None
    if is_hub_id(path):
        return path
    if has_magic(path):
        raise ConfigError(f"{_short(path)}: matches no file")
    siblings = [entry.name for entry in local.parent.iterdir()] if _is_readable_folder(local.parent) else []
    raise ConfigError(f"{_short(path)}: no such file{_did_you_mean(local.name, siblings)}")


def _checked_url(url: str) -> str:
    """Some file systems of fsspec run templates or commands that the URL, or what it points to, holds."""
    protocol = url.partition("://")[0].lower()
    if "::" in url:
        raise ConfigError(f"{_short(url)}: URLs chained with :: are not opened; give the URL of the file itself")
    if protocol not in PROTOCOLS:
        raise ConfigError(f"{_short(url)}: {protocol}:// is not opened; use {', '.join(PROTOCOLS)}, or a local copy")
    return url


def check_entries(folder: str | Path) -> None:
    """Raises ConfigError if the folder holds a pipe, socket or device, also behind a link: reading it may never end."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not (entry.is_file() or entry.is_dir()) and os.path.exists(entry.path):
                raise ConfigError(f"{_short(entry.path)} is a pipe, socket or device; remove it")


def _package_file(path: str) -> str:
    """Finds the file without importing the package: a top-level name is only looked up."""
    name, _, inside = path.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier():
        raise ConfigError(f"{_short(path)}: write package:NAME/FILE, or package:NAME for its folder")
    if Path(inside).is_absolute() or ".." in Path(inside).parts or not inside.isprintable():
        raise ConfigError(f"{_short(path)}: the file must lie inside the package; remove what leads out of it")
    try:
        spec = find_spec(name)
    except ValueError:  # a module made at run time has no spec
        spec = None
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    if not roots:
        raise ConfigError(f"{_short(path)}: no installed package {name}; install it into this environment with pip")
    for root in roots:
        if os.path.exists(root / inside):
            return os.path.abspath(root / inside)
    files = [str(file.relative_to(root)) for root in roots for file in _files(root)]
    raise ConfigError(f"{_short(path)}: package {name} has no such file{_did_you_mean(inside, files)}")


def _files(root: Path) -> list[Path]:
    """The package's data files, without code and caches."""
    return [file for file in root.rglob("*") if file.suffix not in (".py", ".pyc", ".pyi") and file.is_file()]


def _is_readable_folder(folder: Path) -> bool:
    try:
        return next(folder.iterdir(), None) is not None
    except (OSError, ValueError):  # a name that no file can have
        return False


def _did_you_mean(word: str, choices: list[str]) -> str:
    close = get_close_matches(word[:200], choices, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; it has {', '.join(sorted(choices)[:5])}" if 0 < len(choices) <= 5 else ""


def _short(path: str) -> str:
    return repr(path if len(path) <= 100 else path[:100] + "…")
