"""burnish's own step, through the code that an inline run goes through: build, engine, train_step."""

from typing import Any

import torch
from torch import nn

from ..harness import adapters, models
from ..harness.data.loader import StepBatch
from ..harness.engine import World, make_engine
from ..harness.loop import train_step
from ..harness.plan import Plan, make_plan
from ..harness.tasks import get_task
from ..harness.worker import set_up_process
from ..launch.resources import detect
from .peers import draw_adapter, quantized
from .turns import Turns
from .workload import Workload


def run_burnish(
    workload: Workload, turns: Turns, *, method: str = "lora", is_fused: bool = True, checkpointing: str = "auto"
) -> None:
    """The steps of a run that this config would do; without the fused kernels where `is_fused` is False."""
    sections: dict[str, Any] = {"memory": {"activation_checkpointing": checkpointing}}
    sections |= {} if is_fused else {"kernels": {"enabled": False}}
    config = workload.config(method=method, **sections)
    plan = make_plan(config, detect(), run_dir="", cwd="")
    world = World(rank=0, local_rank=0, size=1, device=plan.device)
    set_up_process(plan, world)
    task = get_task(config.task.type)
    turns.mark_floor()
    model = built_from_random(plan, workload) if "init" in workload.model else models.build(plan)
    num_trained = draw_adapter(model, workload.seed)
    vocab_size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    engine = make_engine(plan, model, world)
    turns.ready(model, num_trained=num_trained, length=workload.length)
    while True:
        number = turns.begin()
        ids = workload.batch(number, vocab_size)
        is_learned = torch.ones_like(ids, dtype=torch.bool)
        is_learned[:, 0] = False
        micro = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "loss_mask": is_learned}
        batch = StepBatch([micro], [0], num_supervised=int(is_learned.sum()), num_tokens=ids.numel())
        lr = config.optimizer.learning_rate
        report = train_step(engine, task, config, batch=batch, step=number, lr=lr, is_stopping=False)
        turns.end(report.loss)


def built_from_random(plan: Plan, workload: Workload) -> nn.Module:
    """models.build of random weights: drawn on the device and, unlike a run's, quantised where the plan says so."""
    config, device = plan.config, plan.device
    with torch.device(device):
        model = models.load_model(workload.config(), device=device)
    if config.quantization.type != "none":
        model = quantized(model, device)
        adapters.keep_nf4_layout(model)
    model = models.with_kernels(adapters.adapt(model, config), config)
    models.apply_activation_policy(model, plan.activation_checkpointing)
    return model.train()
