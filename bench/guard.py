"""What every operation and a whole training step start, save and allocate on a CPU, compared with what is recorded.

Counts do not depend on how busy a machine is: a change that makes one larger has made the code worse, and a test fails.
`python -m burnish.bench.guard` prints them as JSON; `--record FILE` writes the file that the test compares with.
A count belongs to a way: `native` (C++) in fp32, `native-amx` (C++ with matrix tiles) in bf16, `torch` in fp32. A
machine has the ways that its processor and compiler allow. Everything runs in one thread.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from ..harness import models
from ..harness.plan import Resources, make_plan
from ..harness.run_dir import write_json
from ..harness.tasks import get_task
from ..kernels import native
from ..kernels.lora_cpu import uses_tiles
from ..kernels.op import Backend, Op, use_backend
from ..kernels.registry import OPS
from .counts import num_launches, peak_bytes, saved_bytes
from .op_runs import Run, in_dtype
from .peers import draw_adapter
from .workload import Workload

COUNTS = ("num_launches", "saved_bytes", "peak_bytes")
CASES_EACH = 3
"""Cases of an operation that are counted: the first ones its tests have."""
FP32, BF16 = torch.float32, torch.bfloat16
WAYS: dict[str, tuple[Backend, torch.dtype]] = {
    "native": ("native", FP32),
    "native-amx": ("native", BF16),
    "torch": ("torch", FP32),
}
SHAPE: dict[str, Any] = {"model_type": "llama", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512}
SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
STEP = Workload(model={"init": SHAPE}, num_sequences=2, length=64, rank=8)


def ways_here() -> list[str]:
    """The names of WAYS that this machine can go."""
    has_library = native.library() is not None
    has = {"native": has_library, "native-amx": has_library and uses_tiles(BF16, "native"), "torch": True}
    return [name for name in WAYS if has[name]]


def counted() -> dict[str, dict[str, int]]:
    """Every count by `<what> · <way>`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {key: count for way in ways_here() for key, count in counted_on(way).items()}
    finally:
        torch.set_num_threads(threads)


def counted_on(way: str) -> dict[str, dict[str, int]]:
    backend, dtype = WAYS[way]
    found = {}
    with use_backend(backend):
        for op in OPS.values():
            for number, run in enumerate(runs_of(op, dtype)):
                found[f"{op.name} {number} · {way}"] = counts_of(run)
        for name, sections in STEPS.items():
            found[f"step {name} · {way}"] = counts_of(step_run(sections, dtype))
    return found


def runs_of(op: Op, dtype: torch.dtype) -> list[Run]:
    if dtype not in op.dtypes:
        return []
    generator = torch.Generator().manual_seed(0)
    inputs = [op.make_inputs(case, dtype, "cpu", generator) for case in op.cases[:CASES_EACH]]
    return [Run.prepare(op.function, in_dtype(one, dtype) | dict(op.options)) for one in inputs]


def counts_of(run: Run) -> dict[str, int]:
    """The second call's: the first one may prepare what later calls reuse."""
    run()
    return {"num_launches": num_launches(run), "saved_bytes": saved_bytes(run), "peak_bytes": peak_bytes(run)}


STEPS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora unfused": {"kernels": {"enabled": False}},
    "lora full checkpointing": {"memory": {"activation_checkpointing": "full"}},
    "dora": {"adapter": {"method": "dora", "rank": STEP.rank}},
}


def step_run(sections: dict[str, Any], dtype: torch.dtype) -> Run:
    """Loss and gradients of every adapter of the model of STEP, as a run does them."""
    name = "bf16" if dtype == BF16 else "fp32"
    config = STEP.config(**{"model": {"init": SHAPE, "dtype": name}} | sections)
    resources = Resources(device="cpu", num_devices=0, num_cpus=1, host_memory_bytes=2**34)
    model = models.build(make_plan(config, resources, run_dir="", cwd=""))
    draw_adapter(model, STEP.seed)
    task = get_task(config.task.type)
    ids = STEP.batch(0, SHAPE["vocab_size"])
    is_learned = torch.ones_like(ids, dtype=torch.bool)
    is_learned[:, 0] = False
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "loss_mask": is_learned}
    trained = [param for param in model.parameters() if param.requires_grad]
    return Run.prepare(lambda **_: task.loss(model, batch, config), {"trained": trained})


def problems(found: dict[str, dict[str, int]], recorded: dict[str, dict[str, int]]) -> list[str]:
    """Every count that is larger than recorded, and whatever was not recorded at all."""
    texts = [f"{key} is not recorded" for key in found.keys() - recorded.keys()]
    return texts + [
        f"{key}: {name} was {recorded[key][name]}, now {counts[name]}"
        for key, counts in found.items()
        if key in recorded
        for name in COUNTS
        if counts[name] > recorded[key][name]
    ]


def main() -> int:
    found = {"torch": torch.__version__.split("+")[0], "counts": counted()}
    if sys.argv[1:2] == ["--record"] and len(sys.argv) == 3:
        write_json(Path(sys.argv[2]), found)
    elif sys.argv[1:]:
        print("usage: python -m burnish.bench.guard [--record FILE]", file=sys.stderr)
        return 2
    else:
        print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
