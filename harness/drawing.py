"""Random weights without the memory that all of them take: a model is made with its large tensors left out, what is
drawn into them is noted, and each is drawn when it is wanted. The numbers are those that the model would have anyway.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

MIN_ELEMENTS = 1 << 18
"""Smaller tensors are drawn at once."""
IS_META = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]
OVERWRITING = ("normal_", "uniform_", "zero_", "fill_")
"""Operations after which nothing is left of what a tensor held."""


@dataclass(frozen=True)
class Step:
    """One operation in place on (a view of) a tensor, and the state of the generator before it if it draws."""

    operation: Any
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Tensor | None


@dataclass
class Drawing:
    """A tensor that was left out, and what was done to it."""

    tensor: Tensor
    steps: list[Step] = field(default_factory=list)


class ValuesNeededError(Exception):
    """Something read a tensor that was left out, so its values are needed at once."""


class _Recorder(TorchDispatchMode):
    """Makes large floating-point tensors of `torch.empty` on the meta device and notes what is done to them."""

    def __init__(self) -> None:
        super().__init__()
        self.drawings: dict[int, Drawing] = {}
        self.scratch = torch.empty(0, dtype=torch.uint8)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format:
            return self._empty(func, args, kwargs)
        known = [arg for arg in args if isinstance(arg, Tensor) and self.drawing_of(arg) is not None]
        if known:
            self._note(func, known[0], args, kwargs)
        return func(*args, **kwargs)

    def drawing_of(self, tensor: Tensor) -> Drawing | None:
        is_left_out = tensor.device.type == "meta"
        return self.drawings.get(tensor.untyped_storage()._cdata) if is_left_out else None

    def _empty(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        device = kwargs.get("device")
        is_host = device is None or torch.device(device).type == "cpu"
        if not is_host or torch.Size(args[0]).numel() < MIN_ELEMENTS:
            return func(*args, **kwargs)
        tensor = func(*args, **kwargs | {"device": torch.device("meta"), "pin_memory": False})
        if not tensor.is_floating_point():
            return func(*args, **kwargs)
        self.drawings[tensor.untyped_storage()._cdata] = Drawing(tensor)
        return tensor

    def _scratch_like(self, tensor: Tensor) -> Tensor:
        """Memory laid out like the tensor: always the same, or the heap would be full of holes."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if extent * tensor.itemsize > self.scratch.numel():
            self.scratch = torch.empty(extent * tensor.itemsize, dtype=torch.uint8)
        flat = self.scratch[: extent * tensor.itemsize].view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride())

    def _note(self, func: Any, target: Tensor, args: Any, kwargs: Any) -> None:
        """Notes an operation in place; views pass. Raises ValuesNeededError for what would read the values."""
        name = func._schema.name.rpartition("::")[2]
        if not func._schema.is_mutable:
            if any(result.alias_info is not None for result in func._schema.returns):
                return
            raise ValuesNeededError(name)
        others = [arg for arg in (*args[1:], *kwargs.values()) if isinstance(arg, Tensor | torch.Generator)]
        if target is not args[0] or others:
            raise ValuesNeededError(name)
        draws = torch.Tag.nondeterministic_seeded in func.tags
        state = torch.get_rng_state() if draws else None
        if draws:  # into memory that is dropped, so that what comes next draws the numbers it would
            func(self._scratch_like(target), *args[1:], **kwargs)
        drawing = self.drawing_of(target)
        assert drawing is not None
        if name in OVERWRITING and target.shape == drawing.tensor.shape and target.is_contiguous():
            drawing.steps.clear()
        step = Step(func, target.shape, target.stride(), target.storage_offset(), args[1:], kwargs, state)
        drawing.steps.append(step)


class _Watcher(TorchFunctionMode):
    """Notices code that does nothing where a tensor is on the meta device, as torch's truncated normal numbers do."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == IS_META and self.recorder.drawing_of(args[0]) is not None:
            raise ValuesNeededError("is_meta")
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Outline:
    """A model whose large tensors are on the meta device."""

    model: Any
    drawings: dict[int, Drawing]

    def draw(self, tensor: Tensor) -> Tensor:
        """The values of one of the model's tensors; those that were not left out as they are."""
        drawing = self.drawings.get(tensor.untyped_storage()._cdata) if tensor.is_meta else None
        if drawing is None:
            return tensor.detach()
        shape = drawing.tensor.shape
        base = torch.empty(shape, dtype=drawing.tensor.dtype, device="cpu")
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            for step in drawing.steps:
                if step.state is not None:
                    torch.set_rng_state(step.state)
                step.operation(base.as_strided(step.size, step.stride, step.offset), *step.args, **step.kwargs)
        return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def outline(make: Callable[[], Any]) -> Outline:
    """The model that `make` makes, on the CPU, without memory for its large tensors.

    A model that reads its weights while it is made (truncated normal numbers do) is made in full.
    """
    state = torch.get_rng_state()
    recorder = _Recorder()
    try:
        with recorder, _Watcher(recorder):
            return Outline(make(), recorder.drawings)
    except ValuesNeededError:
        torch.set_rng_state(state)
        return Outline(make(), {})
