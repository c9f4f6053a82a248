"""What stage 3 keeps in files, and the buffers between those and memory."""

from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .errors import TrainingError
from .offload import reserve_file


def in_file(folder: Path, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor of zeros in a file without a name: the kernel may write it out instead of keeping it in memory.

    Raises TrainingError where the disk is full.
    """
    try:
        path = reserve_file(folder, num_elements * dtype.itemsize)
    except OSError as error:
        raise TrainingError(f"memory.nvme_path: cannot write in {folder.parent}: {error.strerror}") from error
    tensor = torch.from_file(str(path), shared=True, size=num_elements, dtype=dtype)
    path.unlink()
    return tensor


class GradientsInFile(TorchFunctionMode):
    """Stage 3 while it is made: its fp32 sums of gradients begin in a file, as the master weights do.

    DeepSpeed 0.19 makes them in (pinned) memory whatever is offloaded, as the last zeros of `num_elements`.
    """

    def __init__(self, folder: Path, num_elements: int) -> None:
        super().__init__()
        self.folder, self.num_elements = folder, num_elements
        self.flat: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros and args[:1] == (self.num_elements,):
            self.flat = in_file(self.folder, self.num_elements, kwargs["dtype"])
            return self.flat
        if func is torch.Tensor.pin_memory and args[0] is self.flat:
            return self.flat
        return func(*args, **kwargs)


def free_buffers(optimizer: Any, model: torch.nn.Module) -> None:
    """Frees the page-locked buffers of what is in files: no tensor owns them, and DeepSpeed 0.19 keeps some for ever.

    Nothing can be read from files or written to them afterwards.
    """
    if (swapper := getattr(optimizer, "optimizer_swapper", None)) is not None:
        manager = swapper.swap_buffer_manager
        for buffer in manager.all_buffers:
            manager.aio_handle.free_cpu_locked_tensor(buffer)
        manager.all_buffers = []
    found = (getattr(param, "nvme_swapper", None) for param in model.parameters())
    for swapper in {id(swapper): swapper for swapper in found if swapper is not None}.values():
        for name in ("buffers", "partitioned_swap_buffer"):
            if (buffer := getattr(swapper, name)) is not None:
                swapper.aio_read_handle.free_cpu_locked_tensor(buffer)
                setattr(swapper, name, None)
