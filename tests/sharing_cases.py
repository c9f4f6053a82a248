"""Trainings on ranks that map one file: what they wrote to it, which none of them may do."""

import os
from pathlib import Path
from typing import Any

import torch
from burnish.harness import loading, mapping, models
from burnish.harness.config import Config
from burnish.harness.engine import World, make_engine
from burnish.harness.plan import Resources, make_plan
from burnish.harness.tasks import get_task


def written_bytes() -> int:
    """Bytes of mapped weight files that this process has pages of its own for."""
    total, is_weights = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and len(rest) >= 4:
            is_weights = line.endswith(".safetensors")
        elif is_weights and first == "Anonymous:":
            total += int(rest[0]) << 10
    return total


def train(rank: int, world: int, folder: str, configs: list[str]) -> list[dict[str, Any]]:
    """For each config: losses of three steps, whether all frozen weights are still mapped, bytes written to them."""
    os.chdir(folder)
    loading.KEPT_BYTES = loading.STAND_IN_BYTES = 0
    results = []
    for text in configs:
        config = Config.model_validate_json(text)
        resources = Resources(device="cpu", num_devices=0, num_cpus=world, host_memory_bytes=8 << 30)
        plan = make_plan(config, resources, run_dir=folder, cwd=folder)
        model = models.build(plan)
        engine = make_engine(plan, model, World(rank=rank, local_rank=rank, size=world, device="cpu"))
        ids = torch.arange(5, 37).view(2, 16)[rank : rank + 1]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "loss_mask": torch.ones_like(ids) > 0}
        losses = []
        for _ in range(3):
            loss = get_task("causal_lm").loss(engine.module, batch, config) / 32
            engine.backward(loss, is_last=True)
            engine.step(1e-2)
            losses.append(float(engine.all_reduce_sum(loss.detach().double().reshape(1))))
        frozen = [p for p in model.parameters() if not p.requires_grad and p.numel() > 0]
        is_mapped = all(mapping.is_mapped(p) for p in frozen)
        results.append({"losses": losses, "is_mapped": is_mapped, "written_bytes": written_bytes()})
        engine.close()
    return results
