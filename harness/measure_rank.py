"""The process of one rank that tries a plan: `python -m burnish.harness.measure_rank RANK FOLDER`.

Reads a job from stdin and writes what it measured to stdout; whatever libraries print goes to stderr.
"""

import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import torch

from . import checkpoint, models
from .allocator import give_back_freed_memory, keep_freed_memory
from .data.loader import StepBatch
from .engine import Engine, StepResult, World, make_engine
from .evaluate import evaluate
from .loop import train_step
from .plan import Plan
from .resident import bytes_now, peak_bytes, reset_peak
from .synthetic import synthetic_batch
from .tasks import get_task
from .tasks.common import unwrap
from .worker import set_up_process

MAX_MICRO_BATCHES = 2
"""Of a step: the second one already meets the gradients of the first."""
GRADIENTS = ("fp32_groups_gradients_flat", "averaged_gradients", "grad_partitions_flat_buffer")
"""Where DeepSpeed's optimizers keep gradients."""


def main() -> None:
    answers = _own_stdout()
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    job = json.loads(sys.stdin.readline())
    plan = Plan.from_dict(job["plan"])
    answers.write(json.dumps(measured(plan, rank, folder, num_steps=job["num_steps"], labels=job["labels"])) + "\n")
    answers.close()
    sys.stderr.flush()
    os._exit(0)  # tearing a model down takes seconds and tells nothing


def _own_stdout() -> TextIO:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def measured(plan: Plan, rank: int, folder: Path, *, num_steps: int, labels: list[str] | None) -> dict[str, Any]:
    """Phases, parts, baseline_bytes, step_s and losses of this rank."""
    device = "cpu" if plan.device == "cpu" else f"cuda:{rank}"
    world = World(rank=rank, local_rank=rank, size=plan.world_size, device=device)
    set_up_process(plan, world)
    _import_all(plan, world, folder)
    give_back_freed_memory(plan.device)
    baseline = bytes_now(device)
    phases: dict[str, int] = {}

    def end_phase(name: str) -> None:
        phases[name] = peak_bytes(device) - baseline
        reset_peak(device)

    reset_peak(device)
    model = models.build(plan, labels)
    if plan.device == "cpu":
        keep_freed_memory()  # as a worker does
    engine = _Counting(make_engine(plan, model, world))
    end_phase("load")
    config, task = plan.config, get_task(plan.config.task.type)
    num_micro = min(MAX_MICRO_BATCHES, plan.gradient_accumulation_steps)
    batch = _step_batch(plan, model, rank * num_micro, num_micro)
    losses: list[float] = []
    step_s = 0.0
    for step in range(num_steps):
        start = time.perf_counter()
        report = train_step(engine, task, config, batch=batch, step=step, lr=1e-6, is_stopping=False)
        step_s = time.perf_counter() - start
        losses.append(report.loss)
    end_phase("step")
    parts = parts_of(engine.engine, plan) | {"gradients": engine.gradient_bytes}
    micro = config.eval.micro_batch_size or plan.micro_batch_size
    evaluate(engine.module, [_micro_batch(plan, model, micro, seed=0)], task, config, reduce=engine.all_reduce_sum)
    end_phase("evaluation")
    for shard in checkpoint.shards(engine.state()):
        del shard  # written, in a run
    end_phase("save")
    return {"phases": phases, "parts": parts, "baseline_bytes": baseline, "step_s": step_s, "losses": losses}


def _import_all(plan: Plan, world: World, folder: Path) -> None:
    """What the steps will import or load anyway, and a product of matrices: none of it is the model's."""
    from ..kernels import native

    import_module(".fuse", __package__)
    native.library()
    get_task(plan.config.task.type).auto_class()
    if plan.config.quantization.type != "none" or plan.config.optimizer.name == "adamw_8bit":
        import_module("bitsandbytes")
    if plan.engine == "deepspeed":
        import_module(".zero", __package__)
    if world.size > 1:
        backend = "nccl" if plan.device == "cuda" else "gloo"
        torch.distributed.init_process_group(
            backend, init_method=f"file://{folder}/rendezvous", rank=world.rank, world_size=world.size
        )
        torch.distributed.all_reduce(torch.ones(1, device=world.device))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(64, 64, dtype=dtype, device=world.device, requires_grad=True)
        (x @ x).sum().backward()


def _micro_batch(plan: Plan, model: Any, num_examples: int, *, seed: int) -> Any:
    num_ids = getattr(unwrap(model).config, "vocab_size", 0)
    length = plan.config.data.max_length
    return synthetic_batch(plan.config, num_examples=num_examples, length=length, num_ids=num_ids, seed=seed)


def _step_batch(plan: Plan, model: Any, first: int, num_micro: int) -> StepBatch:
    cells = [first + i for i in range(num_micro)]
    micro = [_micro_batch(plan, model, plan.micro_batch_size, seed=cell) for cell in cells]
    length = plan.config.data.max_length if plan.config.task.type == "causal_lm" else 2
    num_examples = num_micro * plan.micro_batch_size * plan.world_size
    return StepBatch(micro, cells, num_supervised=num_examples * (length - 1), num_tokens=num_examples * length)


class _Counting:
    """An engine that counts the bytes of gradients there are when a step of the optimizer begins."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.gradient_bytes = engine, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def step(self, lr: float) -> StepResult:
        parameters = self.engine.model.parameters()
        found = [p.grad for p in parameters if p.requires_grad and p.grad is not None]
        optimizer = getattr(getattr(self.engine, "deepspeed", None), "optimizer", None)
        for name in GRADIENTS:
            found += _tensors(getattr(optimizer, name, None))
        self.gradient_bytes = max(self.gradient_bytes, _storage_bytes(found))
        return self.engine.step(lr)


def parts_of(engine: Any, plan: Plan) -> dict[str, int]:
    """Bytes of weights, of masters that are not the weights themselves, and of the optimizer's state."""
    weights = []
    for parameter in engine.model.parameters():
        weights.append(getattr(parameter, "ds_tensor", parameter))
        state = getattr(parameter, "quant_state", None)
        weights += (
            _tensors([vars(state), vars(state.state2) if getattr(state, "state2", None) else {}]) if state else []
        )
    own = getattr(engine, "masters", None)
    optimizer = own.optimizer if own is not None else engine.deepspeed.optimizer.optimizer
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = {tensor.untyped_storage().data_ptr() for tensor in weights}
    return {
        "weights": _storage_bytes(weights),
        "master_weights": _storage_bytes([p for p in masters if p.untyped_storage().data_ptr() not in kept]),
        "optimizer_state": _storage_bytes(_tensors(list(optimizer.state.values()))),
    }


def _tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in lists and dicts of any depth."""
    if isinstance(value, torch.Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in inside for tensor in _tensors(item)]


def _storage_bytes(tensors: list[torch.Tensor]) -> int:
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type != "meta"
    }
    return sum(storages.values())


if __name__ == "__main__":
    main()
