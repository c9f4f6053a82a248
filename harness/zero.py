"""The DeepSpeed engine, ZeRO stages 0 to 3, with and without offload. The only importer of deepspeed.

Stage 0 takes forward, backward and gradient reduction from DeepSpeed and the update from `engine.Masters`: DeepSpeed's
own update would accumulate bf16 gradients in bf16. From stage 1 on DeepSpeed updates its partitions, in fp32; beside a
GPU, offloaded ones with its AdamW for CPUs, which it builds on first use.
Environment: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and, on a CPU, DS_ACCELERATOR=cpu are set by the
caller before this module is imported.
"""

import contextlib
import functools
import io
import logging
import math
import os
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.ops import op_builder
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch.utils import cpp_extension

from .config import Config
from .engine import (
    DTYPES,
    Masters,
    Pieces,
    State,
    StepResult,
    World,
    buffer_pieces,
    cast_parameters,
    check_names,
    let_go,
    live_buffers,
    load_buffers,
    on_cpu,
    persistent_buffers,
    to_cpu,
)
from .errors import ConfigError
from .offload import one_builder_at_a_time, private_folder
from .optimizers import make_optimizer, parameter_groups
from .plan import Plan
from .zero_config import PERSISTENT_ELEMENTS, Extent, deepspeed_config, offload_config
from .zero_files import GradientsInFile, free_buffers, in_file
from .zero_gradients import clear_after_step, settle_unused
from .zero_state import flat_masters, gather_state, is_stage_3, partitions, scatter_state

NAMES = {"AsyncIOBuilder": "async_io", "CPUAdamBuilder": "cpu_adam"}
"""DeepSpeed's builders and what they build."""
COMPILERS = "2"
"""At a time: each takes 1.7 GB for a source file that includes torch's headers."""
MIN_FILE_BYTES = 2**20
"""Smaller tensors are not worth a file."""


class CpuAccelerator(CPU_Accelerator):
    """DeepSpeed's CPU without the shared-memory all-reduce of inference, whose build takes 24 s and a C++ compiler."""

    def create_op_builder(self, op_name: str) -> Any:
        return None if op_name == "ShareMemCommBuilder" else super().create_op_builder(op_name)


class Partitioned(deepspeed.zero.Init):
    """Partitions a model for stage 3, one parameter after the other, without what its frozen weights do not need.

    All ranks have read the same frozen weights, so only trained ones are broadcast. Quantised weights (of another dtype
    than the buffers for files) stay in host memory where the others go to files.
    """

    remote_device: Any

    def _set_dtype(self, ds_config: Any, dtype: torch.dtype) -> None:
        """DeepSpeed 0.19 takes another one than it is given where the processor computes no fp16."""
        self.dtype = dtype

    def _zero_init_param(self, param: torch.nn.Parameter) -> None:
        self._convert_to_deepspeed_param(param)
        if param.requires_grad:
            param.data = param.data.contiguous()
            dist.broadcast(param.data, 0)
        place = self.remote_device
        if place == "nvme" and param.dtype != self.dtype:
            self.remote_device = "cpu"
        param.partition()  # type: ignore[attr-defined]
        self.remote_device = place


class ZeroEngine:
    """One rank of a DeepSpeed run."""

    def __init__(self, plan: Plan, model: torch.nn.Module, world: World) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # DeepSpeed 0.19 calls the older names of torch's collectives; torch warns at every call site.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
        self.world, self.stage, self.model = world, plan.zero_stage, model
        self.owns_group = _join(world)
        if torch.device(world.device).type == "cpu":
            set_accelerator(CpuAccelerator())
        self.resources = contextlib.ExitStack()
        uses_files = "nvme" in (plan.offload_optimizer, plan.offload_param)
        self.folder = self.resources.enter_context(private_folder(plan, rank=world.rank)) if uses_files else None
        self.is_offloaded = plan.offload_optimizer != "none"
        cast_parameters(model, DTYPES[plan.config.model.dtype])
        self.trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
        if self.stage < 3:
            model.to(world.device)
        self.masters = Masters(plan.config, model) if self.stage == 0 else None
        self.deepspeed = self._initialize(plan, model)
        self.module: torch.nn.Module = self.deepspeed
        self.is_first_backward = True
        self.has_buffers = bool(live_buffers(model))
        self.broadcast_buffers()

    def _initialize(self, plan: Plan, model: torch.nn.Module) -> Any:
        settings = deepspeed_config(plan, sum(param.numel() for param in self.trained.values()))
        extent = _extent(model, self.world.size)
        folder = None if self.folder is None else str(self.folder)
        for section, values in offload_config(plan, folder=folder, extent=extent).items():
            settings[section] = settings.get(section, {}) | values
        load_operators(plan)
        if self.masters:
            optimizer = self.masters.optimizer
        elif self.is_offloaded and plan.device == "cuda":
            optimizer = adamw_on_host(plan.config, self.trained)
        else:
            optimizer = make_optimizer(plan.config, self.trained.items())
        # The bf16 stage 1 prints memory figures whatever the log level.
        with contextlib.redirect_stdout(io.StringIO()):
            if self.stage == 3:
                _partition(model, plan, settings, self.world)
            else:
                for param in model.parameters():
                    if not param.requires_grad:
                        # DeepSpeed's mark for what it need not broadcast: every rank has read the same frozen weights.
                        param.ds_optim_param = True  # type: ignore[attr-defined]
            if plan.offload_param == "nvme":
                model.register_forward_pre_hook(lambda *_: _forget_order(self.deepspeed.optimizer))
            with self._gradients_in_file(plan) as placed:
                engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        assert placed is None or engine.optimizer.grad_partitions_flat_buffer is placed.flat
        return engine

    def _gradients_in_file(self, plan: Plan) -> "contextlib.AbstractContextManager[GradientsInFile | None]":
        """What puts sums of gradients into a file where the plan has the optimizer's state in files."""
        if self.folder is None or plan.offload_optimizer != "nvme":
            return contextlib.nullcontext()
        pieces = (param.partition_numel() for param in self.trained.values())  # type: ignore[attr-defined]
        return GradientsInFile(self.folder, sum(pieces))

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        if is_last and self.masters:
            self.masters.fill_gradients()
        self.deepspeed.set_gradient_accumulation_boundary(is_last)
        # DeepSpeed averages over ranks; the caller wants the sum.
        self.deepspeed.backward(loss * self.world.size, scale_wrt_gas=False)
        if not self.masters:
            settle_unused(
                self.deepspeed.optimizer,
                self.trained,
                is_first=self.is_first_backward,
                is_last=is_last,
                is_offloaded=self.is_offloaded,
            )
        self.is_first_backward = is_last

    def step(self, lr: float) -> StepResult:
        result = self.masters.step(lr) if self.masters else self._partitioned_step(lr)
        self.broadcast_buffers()
        return result

    def _partitioned_step(self, lr: float) -> StepResult:
        optimizer = self.deepspeed.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        self.deepspeed.step()
        grad_norm = float(self.deepspeed.get_global_grad_norm())
        skipped = not self.deepspeed.was_step_applied()
        assert skipped or math.isfinite(grad_norm), grad_norm
        if self.is_offloaded and not is_stage_3(optimizer):
            clear_after_step(optimizer, flat_masters(optimizer))
        return StepResult(grad_norm=grad_norm, skipped=skipped)

    def broadcast_buffers(self) -> None:
        """Makes the running statistics of all ranks those of rank 0, as DistributedDataParallel does."""
        if self.has_buffers and self.world.size > 1:
            for buffer in live_buffers(self.model).values():
                dist.broadcast(buffer, src=0)

    def trained_state(self) -> State | None:
        state = {}
        for name, param in self.trained.items():
            with deepspeed.zero.GatheredParameters([param], enabled=self.stage == 3):
                if self.world.rank == 0:
                    state[name] = self._keep(param) if self.stage == 3 else on_cpu(param)
        return state | persistent_buffers(self.model) if self.world.rank == 0 else None

    def state(self) -> Pieces:
        if self.masters is None:
            yield from gather_state(self.deepspeed.optimizer, self.trained)
        elif self.world.rank == 0:
            yield from self.masters.state()
        if self.world.rank == 0:
            yield from buffer_pieces(self.model)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the CPU of what is gathered; in a file where memory is so short that the state is in files."""
        if self.folder is None or tensor.nbytes < MIN_FILE_BYTES:
            return to_cpu(tensor)
        return in_file(self.folder, tensor.numel(), tensor.dtype).view(tensor.shape).copy_(tensor.detach())

    def load_state(self, state: State) -> None:
        check_names(state, self.model)
        if self.masters:
            self.masters.load_state(state)
        else:
            optimizer = self.deepspeed.optimizer
            has_integer_steps = isinstance(optimizer.optimizer, DeepSpeedCPUAdam)
            scatter_state(optimizer, self.trained, state, has_integer_steps=has_integer_steps)
        load_buffers(self.model, state)

    def barrier(self) -> None:
        dist.barrier()

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        total = values.to(self.world.device, copy=True)
        dist.all_reduce(total)
        return total.cpu()

    def release(self) -> None:
        if self.masters:
            self.masters.release()
        else:
            optimizer = self.deepspeed.optimizer
            optimizer.optimizer.state.clear()
            let_go(partitions(optimizer))
            free_buffers(optimizer, self.model)
        weights = list(self.model.parameters())
        let_go([*weights, *(param.ds_tensor for param in weights if hasattr(param, "ds_tensor"))])

    def close(self) -> None:
        self.deepspeed.destroy()
        free_buffers(self.deepspeed.optimizer, self.model)
        self.resources.close()
        if self.owns_group:
            # DeepSpeed's own function: it also forgets the groups that it made from this one.
            deepspeed.comm.destroy_process_group()


def _join(world: World) -> bool:
    """Joins the process group unless the caller (Ray Train) has; True if this call made it."""
    if dist.is_initialized():
        return False
    backend = "nccl" if torch.device(world.device).type == "cuda" else "gloo"
    if world.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend)
    return True


def _partition(model: torch.nn.Module, plan: Plan, settings: dict[str, Any], world: World) -> None:
    """Stage 3: leaves each rank its piece of every parameter, where the plan wants it; buffers go to the device."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(world.device)
        # A fused module computes with parameters of others: they are gathered around it as well.
        for parameter in getattr(module, "external_parameters", tuple)():
            deepspeed.zero.register_external_parameter(module, parameter)
    Partitioned(
        module=model,
        config_dict_or_path=settings,
        remote_device=None if plan.offload_param == "none" else plan.offload_param,
        pin_memory=plan.device == "cuda",
        dtype=DTYPES[plan.config.model.dtype],
    )


def _forget_order(optimizer: Any) -> None:
    """Stage 3: lets DeepSpeed watch each forward pass anew, where it reads nothing ahead.

    It notes the order of modules to read ahead; without that, it takes a module that computes with parameters of others
    for one out of order once there have been evaluations.
    """
    coordinator = optimizer.parameter_offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


def _extent(model: torch.nn.Module, world_size: int) -> Extent:
    """Sizes of the model's parameters; the modules of one that computes with others' weights count as one."""
    pieces_at_once = 1
    for module in model.modules():
        own = [*module.parameters(recurse=False), *getattr(module, "external_parameters", tuple)()]
        pieces_at_once = max(pieces_at_once, sum(param.numel() > PERSISTENT_ELEMENTS for param in own))
    largest = max(param.numel() for param in model.parameters())
    return Extent(largest_piece=-(-largest // world_size), pieces_at_once=pieces_at_once)


def adamw_on_host(config: Config, trained: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW for partitions in host memory, with the groups and numbers of `make_optimizer`."""
    options = config.optimizer
    assert options.name == "adamw", options
    groups = parameter_groups(trained.items(), options.weight_decay)
    return DeepSpeedCPUAdam(groups, lr=options.learning_rate, betas=options.betas, eps=options.eps, adamw_mode=True)


def load_operators(plan: Plan) -> None:
    """DeepSpeed's operators for the plan's offload. A first call builds them, so it comes before weights take memory.

    Raises ConfigError.
    """
    if "nvme" in (plan.offload_optimizer, plan.offload_param):
        _load("AsyncIOBuilder")
    if plan.offload_optimizer != "none" and plan.device == "cuda":
        _load("CPUAdamBuilder")


@functools.cache
def _load(builder: str) -> None:
    """Loads an operator, built with the host's compiler the first time (minutes). Raises ConfigError."""
    os.environ.setdefault("MAX_JOBS", COMPILERS)
    try:
        with one_builder_at_a_time(Path(cpp_extension._get_build_directory(NAMES[builder], verbose=False))):
            getattr(op_builder, builder)().load(verbose=False)
    except (RuntimeError, OSError, ImportError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[-1]
        raise ConfigError(
            f"memory.offload_optimizer: DeepSpeed's {NAMES[builder]} could not be built here ({reason}); "
            "`burnish doctor` says what is missing, or switch the offload off"
        ) from error
