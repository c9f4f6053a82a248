"""Weights without a spike: checkpoints are mapped and not read, and what has to be made of them is made once per host.

transformers decides which tensor of a checkpoint belongs where, and checks that none is missing; it is given tensors
that are mapped files, or *stand-ins* (one zero, expanded) for those whose data type has to change. What the model then
needs in another form than the files have (NF4 codes, weights cast to bf16) is made tensor by tensor and, on a CPU, put
into one file that every process of the host maps: `kept`.
"""

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .mapping import Range, make_header, map_tensor, read_header
from .pretrained import INDEX, Origin, find_file

logger = logging.getLogger(__name__)
Parts = dict[str, Tensor]
Keep = Callable[[str, Callable[[], Parts]], Parts]
"""(name, how to make these tensors) -> the tensors, made now or found in a file."""
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]

STAND_IN_BYTES = 1 << 20
"""Smaller tensors are cast when they are loaded."""
KEPT_BYTES = 64 << 20
"""Below this a file beside the run is not worth the memory that processes save by sharing it."""
SYNC_BYTES = 128 << 20
"""Written pages are memory that cannot be dropped until they are on the disk: they are sent there this often."""
MAX_TENSORS = 20_000
"""The kernel allows a process 65,530 mappings."""


@dataclass
class Dense:
    """A model whose weights lie in files. `stand_ins` maps a stand-in's address to itself and to its place."""

    model: Any
    info: dict[str, Any]
    stand_ins: dict[int, tuple[Tensor, str, Range]]

    def values(self, weight: Tensor) -> Tensor:
        """The values of one of the model's tensors, in the dtype of the model."""
        found = self.stand_ins.get(weight.data_ptr())
        return weight.detach() if found is None else map_tensor(*found[1:]).to(weight.dtype)

    def waiting(self) -> dict[str, nn.Parameter]:
        """Parameters that are stand-ins, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.data_ptr() in self.stand_ins}


def weight_files(origin: Origin, model_config: Any) -> list[str] | None:
    """The safetensors files of a model; None if there is anything unusual about them."""
    is_unusual = getattr(model_config, "transformers_weights", None) or getattr(type(model_config), "extra_files", ())
    if origin.gguf_file or is_unusual or hasattr(model_config, "quantization_config"):
        return None
    single = find_file(origin, "model.safetensors")
    if single is not None:
        return [single]
    index = find_file(origin, INDEX)
    if index is None:
        return None
    names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    if any(os.path.basename(name) != name or not name.endswith(".safetensors") for name in names):
        return None
    files = [find_file(origin, name) for name in names]
    return None if None in files else [file for file in files if file is not None]


def load_mapped(files: list[str], load: Callable[..., tuple[Any, dict[str, Any]]], dtype: torch.dtype) -> Dense | None:
    """The model that `load(state_dict=…)` makes of mapped tensors and stand-ins; None if these files need more.

    They do where transformers has to compute with a tensor that is a stand-in, or a file is broken.
    """
    state: dict[str, Tensor] = {}
    stand_ins: dict[int, tuple[Tensor, str, Range]] = {}
    try:
        places = {name: (file, place) for file in files for name, place in read_header(file).items()}
        if len(places) > MAX_TENSORS:
            return None
        for name, (file, place) in places.items():
            if place.dtype.is_floating_point and place.dtype != dtype and place.num_bytes >= STAND_IN_BYTES:
                state[name] = torch.zeros((), dtype=dtype).expand(place.shape)
                stand_ins[state[name].data_ptr()] = (state[name], file, place)
            else:
                state[name] = map_tensor(file, place)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # transformers says what is wrong with them
    model, info = load(state_dict=state)
    tensors = (*model.parameters(), *model.buffers())
    left = stand_ins.keys() - {tensor.data_ptr() for tensor in tensors}
    aside = {*info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if any(name not in aside for name, tensor in state.items() if tensor.data_ptr() in left):
        return None
    return Dense(model, info, stand_ins)


def name_origin(model: Any, origin: Origin) -> None:
    """What transformers does for a model that it loads by its name: remembers the name, reads generation settings."""
    model.name_or_path = model.config.name_or_path = origin.path
    if model.can_generate() and hasattr(model, "adjust_generation_fn"):
        hub = {"cache_dir": None, "force_download": False, "proxies": None, "local_files_only": False, "token": None}
        model.adjust_generation_fn(
            None, True, None, origin.path, revision=origin.revision, subfolder="", trust_remote_code=False, **hub
        )


def facts_of(files: list[str]) -> list[Any]:
    """What tells a changed file from the one that was read before."""
    found = []
    for file in files:
        status = os.stat(file)
        header = repr(sorted(read_header(file).items()))
        digest = hashlib.sha256(header.encode()).hexdigest()
        found.append([os.path.realpath(file), status.st_size, status.st_mtime_ns, digest])
    return found


def in_memory(_name: str, make: Callable[[], Parts]) -> Parts:
    """Keeps nothing."""
    return make()


@contextmanager
def kept(folder: Path, *, owner: str, facts: list[Any], shapes: Shapes) -> Iterator[Keep]:
    """A Keep over one file in the folder, for tensors `NAME.PART` of these shapes.

    The first process writes the file, tensor by tensor, while the others of the host wait; then all map it. `facts`
    say what the tensors are made of: a file of other facts is not used, and is removed if it has the same owner. Where
    the file cannot be written, tensors stay in memory, and a warning says so.
    """
    facts = [*facts, [version(name) for name in ("burnish", "torch", "bitsandbytes", "transformers")]]
    digest = hashlib.sha256(json.dumps([facts, repr(shapes)]).encode()).hexdigest()[:32]
    header = make_header(shapes, {"format": "pt", "facts": digest})
    size = len(header) + max((end for _, end in _offsets(header).values()), default=0)
    if not shapes or size - len(header) < KEPT_BYTES:
        yield in_memory
        return
    prefix = f"weights-{hashlib.sha256(owner.encode()).hexdigest()[:16]}"
    file = _KeptFile(folder / f"{prefix}-{digest}.safetensors", header, size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / f".{prefix}.lock", "w")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX)
        if file.is_whole():
            fcntl.flock(lock, fcntl.LOCK_UN)
        else:
            file.begin(others=f"{prefix}-*.safetensors")
    except OSError as error:
        _note(folder, size, error)
        yield in_memory
        return
    with lock:
        try:
            yield file
            file.finish()
        finally:
            file.drop()


def _note(folder: Path, size: int, error: OSError) -> None:
    logger.warning(
        "%s cannot hold %.1f GB of prepared weights (%s); each process makes its own",
        folder,
        size / 1e9,
        error.strerror,
    )


def _offsets(header: bytes) -> dict[str, tuple[int, int]]:
    entries = json.loads(header[8:])
    return {name: tuple(entry["data_offsets"]) for name, entry in entries.items() if name != "__metadata__"}


class _KeptFile:
    """The file of `kept`: whole and mapped, or being written."""

    def __init__(self, path: Path, header: bytes, size: int) -> None:
        self.path, self.header, self.size = path, header, size
        self.working = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.descriptor: int | None = None
        self.places: dict[str, dict[str, Range]] = {}
        self.unsynced = 0

    def is_whole(self) -> bool:
        """Whether the file is there with exactly this header and size."""
        try:
            with self.path.open("rb") as file:
                is_same = os.fstat(file.fileno()).st_size == self.size and file.read(len(self.header)) == self.header
            if is_same:
                self._find(self.path)
        except (OSError, ValueError):
            return False
        return is_same

    def begin(self, *, others: str) -> None:
        """Starts a new file, with the space that it needs. Raises OSError."""
        for old in (*self.path.parent.glob(others), *self.path.parent.glob(f".{others}.*.tmp")):
            old.unlink(missing_ok=True)
        self.descriptor = os.open(self.working, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.posix_fallocate(self.descriptor, 0, self.size)
            os.pwrite(self.descriptor, self.header, 0)
            self._find(self.working)
        except OSError:
            self.drop()
            raise

    def _find(self, path: Path) -> None:
        for key, place in read_header(str(path)).items():
            name, _, part = key.rpartition(".")
            self.places.setdefault(name, {})[part] = place

    def __call__(self, name: str, make: Callable[[], Parts]) -> Parts:
        here = self.places.get(name, {})
        if self.descriptor is None:
            return {part: map_tensor(str(self.path), place) for part, place in here.items()} if here else make()
        parts = make()
        try:
            for part, tensor in parts.items():
                self._write(tensor, here[part])
            return {part: map_tensor(str(self.working), place) for part, place in here.items()}
        except OSError as error:
            _note(self.path.parent, self.size, error)
            self.drop()
            self.places = {}
            return parts

    def _write(self, tensor: Tensor, place: Range) -> None:
        assert self.descriptor is not None
        assert (tensor.dtype, tuple(tensor.shape)) == (place.dtype, place.shape), (tensor.dtype, tensor.shape, place)
        data: Any = memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        done = 0
        while done < place.num_bytes:
            done += os.pwrite(self.descriptor, data[done:], place.start + done)
        self.unsynced += place.num_bytes
        if self.unsynced >= SYNC_BYTES:
            os.fdatasync(self.descriptor)
            self.unsynced = 0

    def finish(self) -> None:
        """Puts a written file in its place. A file that cannot be finished is dropped; what is mapped stays."""
        if self.descriptor is None:
            return
        try:
            os.fsync(self.descriptor)
            os.replace(self.working, self.path)
        except OSError as error:
            _note(self.path.parent, self.size, error)

    def drop(self) -> None:
        """Closes what is being written and removes it, unless it is in its place."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
            self.working.unlink(missing_ok=True)
