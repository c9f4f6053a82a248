"""Engines: what runs backward passes and optimizer steps. The plain torch engine is here, DeepSpeed's in `zero`.

An engine's update equals the gradient of the SUM of all losses given to it, over micro-batches and ranks. Trained
parameters have fp32 masters where the model is bf16, and their gradients are accumulated in fp32.

The resume state is one flat dict, the same for every engine and world size (P = parameter name, as in the model):

    param/P            fp32 master of a trained parameter, in its own shape
    optim/KEY/P        optimizer state KEY of P: in P's shape, or a scalar (`step`)
    buffer/B           persistent buffers (running statistics of BatchNorm)
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from .config import Config
from .errors import ConfigError
from .optimizers import make_optimizer
from .plan import Plan

State = dict[str, torch.Tensor]
Pieces = Iterator[tuple[str, torch.Tensor]]
"""A state, one named tensor at a time."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class World:
    """This process among all. `device` is a torch device string; `cuda` is the current one."""

    rank: int
    local_rank: int
    size: int
    device: str


@dataclass(frozen=True)
class StepResult:
    """`grad_norm` is the global norm before clipping; a step with a non-finite norm is skipped and changes nothing."""

    grad_norm: float
    skipped: bool


class Engine(Protocol):
    """One model in training. Every method but `backward` is collective: all ranks call it in the same order."""

    model: torch.nn.Module
    """The model itself, for saving, generating and its parameters' names."""
    module: torch.nn.Module
    """What to call for a forward pass: the model, or DeepSpeed's wrapper of it."""

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """Adds the gradient of a scalar loss; `is_last` marks the last micro-batch before `step`."""

    def step(self, lr: float) -> StepResult:
        """One optimizer step with this learning rate on the gradients since the last one."""

    def trained_state(self) -> State | None:
        """Trained parameters as the forward pass sees them, and persistent buffers, on the CPU of rank 0; else None.

        Parameters may be those of the engine itself: they are right until its next step.
        """

    def state(self) -> Pieces:
        """All that is needed to resume, contiguous on the CPU of rank 0; nothing elsewhere. All ranks go to its end.

        Tensors may be those of the engine itself: they are right until its next step.
        """

    def load_state(self, state: State) -> None:
        """Restores `state()`, saved by any engine at any world size; every rank passes all of it.

        Raises ConfigError if the parameters differ from this model's.
        """

    def barrier(self) -> None:
        """Waits for all ranks."""

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks of a 1-d float64 CPU tensor."""

    def release(self) -> None:
        """Lets go of weights, gradients and optimizer state; only `barrier` and `close` may follow."""

    def close(self) -> None:
        """Releases what can be released; the engine is of no use afterwards."""


def shared_number(engine: Engine, world: World, number: float) -> float:
    """Rank 0's number, on every rank. Collective."""
    [found] = engine.all_reduce_sum(torch.tensor([number if world.rank == 0 else 0.0], dtype=torch.float64))
    return float(found)


def make_engine(plan: Plan, model: torch.nn.Module, world: World) -> Engine:
    """The plan's engine around the model, which is moved to the device and cast to `model.dtype` in place."""
    if plan.engine == "deepspeed":
        from .zero import ZeroEngine

        return ZeroEngine(plan, model, world)
    return TorchEngine(plan, model, world)


class TorchEngine:
    """One process, PyTorch alone."""

    def __init__(self, plan: Plan, model: torch.nn.Module, world: World) -> None:
        assert world.size == 1, world
        self.model = self.module = model
        cast_parameters(model, DTYPES[plan.config.model.dtype])
        model.to(world.device)
        self.masters = Masters(plan.config, model)

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> StepResult:
        return self.masters.step(lr)

    def trained_state(self) -> State:
        return self.masters.trained_state() | persistent_buffers(self.model)

    def state(self) -> Pieces:
        yield from self.masters.state()
        yield from buffer_pieces(self.model)

    def load_state(self, state: State) -> None:
        check_names(state, self.model)
        self.masters.load_state(state)
        load_buffers(self.model, state)

    def barrier(self) -> None:
        """One process waits for nobody."""

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def release(self) -> None:
        self.masters.release()
        let_go(self.model.parameters())

    def close(self) -> None:
        self.masters.drop_gradients()


class Masters:
    """Trained parameters, their fp32 masters and the optimizer over the masters. An fp32 parameter is its own master.

    Autograd accumulates into fp32 `grad` of bf16 parameters by `Tensor.grad_dtype` (torch 2.10).
    """

    def __init__(self, config: Config, model: torch.nn.Module) -> None:
        self.max_norm = config.train.max_grad_norm
        self.live = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self.masters: dict[str, torch.nn.Parameter] = {}
        for name, param in self.live.items():
            param.data = param.data.contiguous()
            is_fp32 = param.dtype == torch.float32
            self.masters[name] = param if is_fp32 else torch.nn.Parameter(param.detach().float())
            if not is_fp32:
                param.grad_dtype = torch.float32
        self.optimizer = make_optimizer(config, self.masters.items())

    def step(self, lr: float) -> StepResult:
        """Clips, updates masters and live parameters, drops the gradients."""
        grads = [param.grad for param in self.live.values() if param.grad is not None]
        grad_norm = float(torch.nn.utils.get_total_norm(grads))
        skipped = not torch.isfinite(torch.tensor(grad_norm)).item()
        if not skipped:
            if self.max_norm > 0:
                scale = min(1.0, self.max_norm / (grad_norm + 1e-6))
                if scale < 1:
                    torch._foreach_mul_(grads, scale)
            self._update(lr)
        self.drop_gradients()
        return StepResult(grad_norm=grad_norm, skipped=skipped)

    def _update(self, lr: float) -> None:
        for name, param in self.live.items():
            # The fused kernels read gradients as if they were contiguous.
            self.masters[name].grad = None if param.grad is None else param.grad.contiguous()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.refresh()

    def refresh(self) -> None:
        """Copies the masters into the live parameters."""
        with torch.no_grad():
            for name, param in self.live.items():
                if self.masters[name] is not param:
                    param.copy_(self.masters[name])

    def fill_gradients(self) -> None:
        """Gives parameters without a gradient a zero one, so that all ranks reduce the same tensors."""
        for param in self.live.values():
            if param.grad is None:
                param.grad = torch.zeros_like(param, dtype=torch.float32)

    def drop_gradients(self) -> None:
        for name, param in self.live.items():
            param.grad = self.masters[name].grad = None

    def release(self) -> None:
        self.drop_gradients()
        self.optimizer.state.clear()
        let_go(self.masters.values())

    def trained_state(self) -> State:
        return {name: on_cpu(param) for name, param in self.live.items()}

    def state(self) -> Pieces:
        for name, master in self.masters.items():
            yield f"param/{name}", on_cpu(master)
            for key, value in self.optimizer.state.get(master, {}).items():
                if value is not None:
                    value = torch.as_tensor(value)
                    # Tables and counts are copied: parameters may share one, which files do not.
                    yield f"optim/{key}/{name}", (on_cpu if value.shape == master.shape else to_cpu)(value)

    def load_state(self, state: State) -> None:
        self.optimizer.state.clear()
        for full_name, value in state.items():
            kind, _, rest = full_name.partition("/")
            if kind == "param":
                self.masters[rest].data.copy_(value)
            elif kind == "optim":
                key, _, name = rest.partition("/")
                master = self.masters[name]
                # bitsandbytes counts steps in a Python integer, torch in a float tensor.
                is_count = value.ndim == 0 and not value.is_floating_point()
                found = int(value) if is_count else value.to(master.device, copy=True)
                self.optimizer.state[master][key] = found
        self.refresh()


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Casts floating-point parameters in place, as DeepSpeed does; buffers (rotary frequencies) keep their dtype."""
    for param in model.parameters():
        if param.dtype in FLOATS and param.dtype != dtype:
            param.data = param.data.to(dtype)


def persistent_buffers(model: torch.nn.Module) -> State:
    """Buffers that belong to the saved model, by name, as copies on the CPU."""
    return {name: to_cpu(buffer) for name, buffer in live_buffers(model).items()}


def buffer_pieces(model: torch.nn.Module) -> Pieces:
    """Buffers that belong to the saved model, as parts of the resume state."""
    for name, buffer in live_buffers(model).items():
        yield f"buffer/{name}", on_cpu(buffer)


def live_buffers(model: torch.nn.Module) -> State:
    """Buffers that belong to the saved model, by name."""
    return {
        f"{prefix}.{name}".lstrip("."): buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def load_buffers(model: torch.nn.Module, state: State) -> None:
    """Copies `buffer/` entries of a resume state into the model."""
    for name, buffer in live_buffers(model).items():
        buffer.copy_(state[f"buffer/{name}"])


def let_go(tensors: Iterable[torch.Tensor]) -> None:
    """Frees the memory of the tensors, whoever still holds them."""
    for tensor in tensors:
        tensor.data = tensor.data.new_empty(0)


def check_names(state: State, model: torch.nn.Module) -> None:
    """Raises ConfigError unless the state has exactly this model's trained parameters and buffers, in their shapes."""
    shapes = {f"param/{name}": _shape(param) for name, param in model.named_parameters() if param.requires_grad}
    shapes |= {f"buffer/{name}": tuple(buffer.shape) for name, buffer in live_buffers(model).items()}
    found = {name: tuple(value.shape) for name, value in state.items() if not name.startswith("optim/")}
    different = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
    if different:
        raise ConfigError(
            f"the checkpoint is of another model: {len(different)} tensors differ, the first is {different[0]} "
            f"(model {shapes.get(different[0], 'does not have it')}, checkpoint {found.get(different[0], 'does not')})"
        )


def _shape(param: torch.nn.Parameter) -> tuple[int, ...]:
    """The parameter's own shape, also where ZeRO-3 has partitioned it."""
    return tuple(getattr(param, "ds_shape", param.shape))


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where it is contiguous on the CPU, else a copy there."""
    return tensor.detach().to("cpu").contiguous()


def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU that shares no memory with the original."""
    return tensor.detach().to("cpu", copy=True).contiguous()
