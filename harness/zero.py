"""The DeepSpeed engine: Plan -> DeepSpeed configuration and engine, ZeRO stages 0 to 3. The only importer of deepspeed.

Stage 0 takes forward, backward and gradient reduction from DeepSpeed and the update from `engine.Masters`: DeepSpeed's
own update would accumulate bf16 gradients in bf16. From stage 1 on DeepSpeed updates its partitions, in fp32.
Environment: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and, on a CPU, DS_ACCELERATOR=cpu are set by the
caller before this module is imported.
"""

import contextlib
import io
import logging
import math
import warnings
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from .engine import (
    DTYPES,
    Masters,
    State,
    StepResult,
    World,
    cast_parameters,
    check_names,
    live_buffers,
    load_buffers,
    persistent_buffers,
    to_cpu,
)
from .optimizers import make_optimizer
from .plan import Plan
from .zero_state import gather_state, scatter_state

BUCKET_ELEMENTS = 50_000_000


class CpuAccelerator(CPU_Accelerator):
    """DeepSpeed's CPU without the shared-memory all-reduce of inference, whose build takes 24 s and a C++ compiler."""

    def create_op_builder(self, op_name: str) -> Any:
        return None if op_name == "ShareMemCommBuilder" else super().create_op_builder(op_name)


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
        cast_parameters(model, DTYPES[plan.config.model.dtype])
        model.to(world.device)
        if self.stage == 3:
            _share_parameters(model)
        self.trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self.masters = Masters(plan.config, model) if self.stage == 0 else None
        optimizer = self.masters.optimizer if self.masters else make_optimizer(plan.config, self.trained.items())
        num_trained = sum(param.numel() for param in self.trained.values())
        # The bf16 stage 1 prints memory figures whatever the log level.
        with contextlib.redirect_stdout(io.StringIO()):
            self.deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=deepspeed_config(plan, num_trained)
            )
        self.module: torch.nn.Module = self.deepspeed
        self.has_buffers = bool(live_buffers(model))
        self.broadcast_buffers()

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        if is_last and self.masters:
            self.masters.fill_gradients()
        self.deepspeed.set_gradient_accumulation_boundary(is_last)
        # DeepSpeed averages over ranks; the caller wants the sum.
        self.deepspeed.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self, lr: float) -> StepResult:
        result = self.masters.step(lr) if self.masters else self._partitioned_step(lr)
        self.broadcast_buffers()
        return result

    def _partitioned_step(self, lr: float) -> StepResult:
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self.deepspeed.step()
        grad_norm = float(self.deepspeed.get_global_grad_norm())
        skipped = not self.deepspeed.was_step_applied()
        assert skipped or math.isfinite(grad_norm), grad_norm
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
                    state[name] = to_cpu(param)
        return state | persistent_buffers(self.model) if self.world.rank == 0 else None

    def state(self) -> State | None:
        state = self.masters.state() if self.masters else gather_state(self.deepspeed.optimizer, self.trained)
        if self.world.rank != 0:
            return None
        assert state is not None
        return state | {f"buffer/{name}": buffer for name, buffer in persistent_buffers(self.model).items()}

    def load_state(self, state: State) -> None:
        check_names(state, self.model)
        if self.masters:
            self.masters.load_state(state)
        else:
            scatter_state(self.deepspeed.optimizer, self.trained, state)
        load_buffers(self.model, state)

    def barrier(self) -> None:
        dist.barrier()

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        total = values.to(self.world.device, copy=True)
        dist.all_reduce(total)
        return total.cpu()

    def close(self) -> None:
        self.deepspeed.destroy()
        if self.owns_group:
            # DeepSpeed's own function: it also forgets the groups that it made from this one.
            deepspeed.comm.destroy_process_group()


def _share_parameters(model: torch.nn.Module) -> None:
    """Lets stage 3 gather, around a fused module, the parameters of others that it computes with."""
    for module in model.modules():
        for parameter in getattr(module, "external_parameters", tuple)():
            deepspeed.zero.register_external_parameter(module, parameter)


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


def deepspeed_config(plan: Plan, num_trained: int) -> dict[str, Any]:
    """The DeepSpeed JSON of a plan, every value explicit. `num_trained` elements bound the reduction buckets."""
    bucket = min(BUCKET_ELEMENTS, num_trained + num_trained % 2)
    is_partitioned = plan.zero_stage > 0
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "communication_data_type": "fp32",
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": plan.zero_stage},
    }
    if is_partitioned:
        config["gradient_clipping"] = plan.config.train.max_grad_norm
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["bf16"] = {"enabled": plan.config.model.dtype == "bf16", "check_grad_overflow": True}
        config["zero_optimization"] |= {
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": plan.device == "cuda",
            "contiguous_gradients": True,
        }
    return config
