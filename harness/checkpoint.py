"""Checkpoints: atomic, checksummed, of every rank. Tensors are safetensors, everything else is JSON; no pickle.

    checkpoints/step_00000120/
        MANIFEST.json               step, world size, sha256 and size of every file, sha256 of itself
        state_00000.safetensors …   the engine's gathered state in shards of about half a GiB
        trainer.json                what the caller passed as `trainer`
        rng_00000.json …            random number generators, one file per rank

Order of a save: write into a hidden temporary folder -> fsync -> hash -> all ranks meet -> MANIFEST.json -> fsync ->
rename -> fsync of the parent -> delete the oldest. A folder without a manifest that verifies does not count. The
folder must be visible to all ranks.
"""

import base64
import errno
import hashlib
import json
import os
import random
import re
import shutil
import stat
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .engine import Pieces, State, World
from .errors import ConfigError, SaveError, SupersededError, TrainingError
from .faults import faultpoint
from .memory import SHARD_BYTES

MANIFEST = "MANIFEST.json"
SPARE_BYTES = 2**20
FORMAT = 2
"""Raised when the files of a checkpoint, or what they must agree with on resume, change."""
MAX_MANIFEST_BYTES = 10 * 2**20


def save(
    run_dir: str | Path,
    step: int,
    *,
    state: Pieces,
    trainer: dict[str, Any],
    world: World,
    barrier: Callable[[], None],
    keep: int,
    attempt: int = 0,
    may_commit: Callable[[], bool] = lambda: True,
) -> Path:
    """Writes checkpoints/step_<step> and keeps the newest `keep`. Collective.

    `state` is an engine's: rank 0 writes it piece by piece, and every rank takes it to its end whatever fails.
    `attempt` is the same on every rank and tells this attempt's temporary folder from a zombie's.

    Raises on every rank: TrainingError if a value is not finite, SaveError if a file cannot be written. Earlier
    checkpoints stay as they are and nothing is left of this one. Raises SupersededError where `may_commit` says no.
    """
    folder = Path(run_dir) / "checkpoints"
    final, temporary = folder / f"step_{step:08d}", folder / f".step_{step:08d}.{attempt}.tmp"
    problem: Exception | None = None
    pieces = _Counted(state)
    if not may_commit():
        raise SupersededError
    try:
        if world.rank == 0:
            clean(run_dir)
            temporary.mkdir(parents=True)
    except OSError as error:
        problem = error
    barrier()
    try:
        if problem is None:
            _write_part(temporary, pieces, trainer, world)
    except (OSError, SafetensorError, TrainingError) as error:
        problem = error
    deque(pieces, maxlen=0)
    barrier()
    parts = [temporary / f"part_{rank:05d}.json" for rank in range(world.size)]
    missing = [rank for rank, part in enumerate(parts) if not part.exists()]
    barrier()
    try:
        if world.rank == 0 and problem is None and not missing:
            faultpoint("save.before_manifest")
            _commit(temporary, final, parts, step=step, world_size=world.size, may_commit=may_commit)
            _prune(folder, keep=keep)
    except (OSError, SupersededError) as error:
        problem = error
    barrier()
    if problem is not None or missing or not verify(final, hashes=False):
        if world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        if not may_commit():
            raise SupersededError
        raise _explain(problem, folder, pieces.num_bytes, missing) from problem
    return final


def newest(run_dir: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files all have the recorded hashes, and the paths of newer broken ones."""
    broken: list[str] = []
    for path in reversed(_step_folders(Path(run_dir) / "checkpoints")):
        if verify(path):
            return path, broken
        broken.append(str(path))
    return None, broken


def load(path: str | Path, rank: int) -> tuple[State, dict[str, Any], dict[str, Any] | None]:
    """(state, trainer, rng) of a verified checkpoint. `rng` is None for a rank that the saving run did not have.

    Raises ConfigError for the format of another version of burnish.
    """
    manifest = json.loads((Path(path) / MANIFEST).read_text())
    if manifest.get("format") != FORMAT:
        raise ConfigError(
            f"cannot resume: {path} has checkpoint format {manifest.get('format')}, this burnish reads {FORMAT}; "
            "use the version that wrote it, or start again with --fresh"
        )
    files = manifest["files"]
    state: State = {}
    for name in sorted(files):
        if name.endswith(".safetensors"):
            state |= load_file(Path(path) / name)
    trainer = json.loads((Path(path) / "trainer.json").read_text())
    rng_name = f"rng_{rank:05d}.json"
    rng = json.loads((Path(path) / rng_name).read_text()) if rng_name in files else None
    return state, trainer, rng


def check_same(trainer: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raises ConfigError naming the first entry of `identity` that differs from the checkpoint's."""
    for key, value in identity.items():
        if trainer.get(key) != value:
            raise ConfigError(
                f"cannot resume: {key} differs from the checkpoint ({trainer.get(key)!r} was saved, now it is "
                f"{value!r}); restore it, or start again with --fresh"
            )


def verify(path: Path, *, hashes: bool = True) -> bool:
    """Whether the manifest is intact and every file has its size (and, with `hashes`, its sha256)."""
    try:
        if not _is_plain_file(path / MANIFEST, most=MAX_MANIFEST_BYTES):
            return False
        text = (path / MANIFEST).read_bytes()
        manifest = json.loads(text)
        if path.is_symlink() or text != _manifest_bytes(manifest) or path.name != f"step_{manifest['step']:08d}":
            return False
        return all(
            _is_plain(name)
            and _is_plain_file(path / name)
            and (path / name).stat().st_size == entry["bytes"]
            and (not hashes or _sha256(path / name) == entry["sha256"])
            for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def rng_state() -> dict[str, Any]:
    """Python's, NumPy's and torch's generators as JSON-able values."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(state) for state in cuda],
    }


def set_rng_state(state: dict[str, Any] | None) -> None:
    """Restores `rng_state()`; None leaves the generators alone. CUDA states are used if the number of GPUs agrees."""
    if state is None:
        return
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(state["torch"]))
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_decode(text) for text in state["cuda"]])


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _write_part(temporary: Path, state: Pieces, trainer: dict[str, Any], world: World) -> None:
    """This rank's files, on disk before their hashes are; the part file appears last."""
    names = [f"rng_{world.rank:05d}.json"]
    _write_json(temporary / names[0], rng_state())
    if world.rank == 0:
        names += _write_state(temporary, state)
        names.append("trainer.json")
        _write_json(temporary / names[-1], trainer)
    faultpoint("save.before_fsync")
    for name in names:
        _fsync(temporary / name)
    faultpoint("save.after_fsync")
    files = {name: {"bytes": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)} for name in names}
    part = temporary / f"part_{world.rank:05d}.json"
    _write_json(part.with_suffix(".new"), files)
    part.with_suffix(".new").rename(part)
    faultpoint("save.after_part")


def _write_state(temporary: Path, state: Pieces) -> list[str]:
    """The names of the files."""
    names: list[str] = []
    for shard in shards(state):
        needed, free = sum(tensor.nbytes for tensor in shard.values()) + SPARE_BYTES, shutil.disk_usage(temporary).free
        if free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        names.append(f"state_{len(names):05d}.safetensors")
        save_file(shard, temporary / names[-1])
        del shard  # before the next one is made
        faultpoint("save.after_shard")
    return names


def _commit(
    temporary: Path, final: Path, parts: list[Path], *, step: int, world_size: int, may_commit: Callable[[], bool]
) -> None:
    """Manifest, then the rename that makes the checkpoint count."""
    files: dict[str, Any] = {}
    for part in parts:
        files |= json.loads(part.read_text())
        part.unlink()
    manifest = {"format": FORMAT, "step": step, "world_size": world_size, "files": files}
    (temporary / MANIFEST).write_bytes(_manifest_bytes(manifest))
    _fsync(temporary / MANIFEST)
    _fsync(temporary)
    faultpoint("save.before_rename")
    if not may_commit():
        raise SupersededError
    if final.exists():
        # Only a broken folder can be in the way: training goes on from the newest whole one.
        final.rename(_unused(final.with_name(f"{final.name}.broken")))
    temporary.rename(final)
    faultpoint("save.after_rename")
    _fsync(final.parent)


def _unused(path: Path) -> Path:
    number = 0
    while path.exists():
        number += 1
        path = path.with_suffix(f".broken-{number}")
    return path


def _prune(folder: Path, *, keep: int) -> None:
    """Deletes the oldest whole checkpoints beyond `keep`; broken ones are left for their owner to look at."""
    whole = [path for path in _step_folders(folder) if verify(path, hashes=False)]
    for path in whole[:-keep]:
        # Renamed first: a half-deleted folder must not look like a checkpoint.
        doomed = path.with_name(f".{path.name}.tmp")
        path.rename(doomed)
        faultpoint("save.in_prune")
        shutil.rmtree(doomed)


def clean(run_dir: str | Path) -> None:
    """Removes what interrupted saves have left. Only while no other process saves there."""
    folder = Path(run_dir) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(".step_*.tmp"):
        shutil.rmtree(path)


def _step_folders(folder: Path) -> list[Path]:
    """step_<n> folders, oldest first."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def _explain(problem: Exception | None, folder: Path, num_bytes: int, missing: list[int]) -> TrainingError:
    if isinstance(problem, TrainingError):
        return problem
    if problem is None:
        return SaveError(f"the checkpoint in {folder} could not be written; failed ranks: {missing or [0]}")
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    return SaveError(
        f"cannot write a checkpoint to {folder}: {problem} ({num_bytes + SPARE_BYTES} bytes are needed, {free} bytes "
        "are free there); earlier checkpoints are untouched"
    )


class _Counted(Pieces):
    """A state with the bytes of what was taken of it."""

    def __init__(self, state: Pieces) -> None:
        self.state, self.num_bytes = iter(state), 0

    def __next__(self) -> tuple[str, torch.Tensor]:
        name, tensor = next(self.state)
        self.num_bytes += tensor.nbytes
        return name, tensor


def shards(state: Pieces) -> Iterator[State]:
    """The state in files of at most SHARD_BYTES (a larger tensor has one of its own), each as soon as it is full.

    Raises TrainingError for a value that is not finite.
    """
    shard: State = {}
    size = 0
    for name, tensor in state:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise TrainingError(f"{name} has non-finite values; the checkpoint is not written")
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """Canonical text with the hash of the rest inside, so that every flipped bit shows."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body | {"sha256": digest}, sort_keys=True, indent=1).encode()


def _is_plain(name: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9_]+\.[a-z]+", name))


def _is_plain_file(path: Path, *, most: float = float("inf")) -> bool:
    """A file of at most so many bytes. Links, pipes and devices are none: reading them may never end."""
    found = path.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_size <= most


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
