"""Tensors that lie in files: ranges of safetensors files mapped into memory, each for as long as a tensor is alive.

A mapping is private: what is written to such a tensor (a trained weight) goes to a copy of the page that belongs to
this process. Pages that nobody wrote to are the kernel's cache of the file: all processes of a host share them, and
the kernel drops and reads them again as it needs memory.
"""

import ctypes
import json
import mmap
import os
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The data types of safetensors that are mapped."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 64
"""Bytes to which tensors in a file of ours are aligned: a cache line, as torch's own allocator does."""
MAX_HEADER_BYTES = 100 << 20
_mapped: set[int] = set()
"""Addresses of the storages that are mapped now."""


@dataclass(frozen=True)
class Range:
    """Where a tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def is_mapped(tensor: Tensor) -> bool:
    """Whether the tensor's memory is a mapped file."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() in _mapped


def map_tensor(path: str, place: Range) -> Tensor:
    """The tensor at this place of the file, without reading it. Raises OSError."""
    if place.num_bytes == 0:
        return torch.empty(place.shape, dtype=place.dtype)
    first = place.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    inside, length = place.start - first, place.start - first + place.num_bytes
    descriptor = os.open(path, os.O_RDONLY)
    try:
        address = _library().mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, descriptor, first)
    finally:
        os.close(descriptor)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    memory = (ctypes.c_ubyte * length).from_address(address)
    _mapped.add(address + inside)
    weakref.finalize(memory, _unmap, address, length, address + inside)
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=place.num_bytes, offset=inside)
    if (address + inside) % place.dtype.itemsize:
        flat = flat.clone()
    return flat.view(place.dtype).view(place.shape)


def _library() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_ssize_t)
    library.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return library


def _unmap(address: int, length: int, storage: int) -> None:
    _mapped.discard(storage)
    _library().munmap(address, length)


def read_header(path: str) -> dict[str, Range]:
    """Where every tensor of a safetensors file lies. Raises OSError or ValueError for a broken or strange file."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"{path}: a header of {length} bytes in a file of {size}")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    ranges = {}
    for name, entry in entries.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} is of type {entry['dtype']}")
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        place = Range(dtype, shape, 8 + length + begin, end - begin)
        if begin < 0 or place.num_bytes != torch.Size(shape).numel() * dtype.itemsize or 8 + length + end > size:
            raise ValueError(f"{path}: {name} does not lie in the file")
        ranges[name] = place
    return ranges


def make_header(shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """The first bytes of a safetensors file that holds these tensors in this order, each aligned."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in shapes.items():
        if end % ALIGNMENT:  # the format knows no gaps
            missing = -end % ALIGNMENT
            entries[f"padding.{end}"] = {"dtype": "U8", "shape": [missing], "data_offsets": [end, end + missing]}
            end += missing
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-(len(text) + 8) % mmap.ALLOCATIONGRANULARITY)
    return len(text).to_bytes(8, "little") + text
