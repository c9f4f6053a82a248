"""docs/scaling.md: the model of `scaling` and `failures` at 8 to 1,024 GPUs, and the soak as it was recorded."""

import functools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..harness.interval import LONGEST_S, MAX_COST, optimum_s
from ..harness.markup import duration, size
from ..harness.memory import FP32_BYTES
from ..harness.run_dir import read_json
from ..harness.traffic import traffic_bytes, zero_traffic
from . import failures
from .bench_scale import ASSUMED_MFU, H200, LINK_SHARE, OVERLAP, work_of
from .benchmark import Table
from .failures import RATES
from .scale_job import LORA_RANK
from .scaling import BF16_BYTES, LLAMA_8B, LLAMA_70B, Work, simulate
from .table import as_markdown

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT, SOAK = ROOT / "docs" / "scaling.md", ROOT / "docs" / "soak.json"
WIDTH = 120
NUM_GPUS = (8, 64, 512, 1024)
STAGES = (0, 1, 2, 3)
WORKS: Sequence[tuple[Work, int]] = (
    (work_of(LLAMA_8B, LORA_RANK), 2),
    (work_of(LLAMA_8B, None), 2),
    (work_of(LLAMA_70B, LORA_RANK), 3),
    (work_of(LLAMA_70B, None), 3),
)
"""What is trained, and the ZeRO stage that its time is modelled with."""
BOUNDS = {"optimum": "least expected time", "cost": f"{100 * MAX_COST:g} % of cost", "longest": duration(LONGEST_S)}
INTRO = f"""\
<!-- Made by `burnish bench docs` from bench/scaling_document.py. `burnish bench verify` finds what is edited here. -->

# Scaling

What 8 to 1,024 GPUs send, save and lose. All but what is called measured is a model: formulas that
`tests/test_scaling.py` and `tests/test_failures.py` hold to numbers worked out by hand, with published rates and stated
assumptions, and no measurement of such a cluster. What several workers take on a real machine is measured in
[benchmarks.md](benchmarks.md).

The GPUs are {H200.name}; collectives reach {LINK_SHARE:g} of a link's speed, computing {ASSUMED_MFU:g} of the peak, and
{OVERLAP:g} of the communication hides behind computing: assumptions. Each GPU takes 2 sequences of 4,096 tokens a step.
"""
WIRE = """\
## Bytes on the wire

Sent by each GPU in a step, on average: the formulas of the ZeRO paper (arXiv 1910.02054, section 7) with ring
collectives, gradients in fp32 and weights in bf16 (`harness/traffic.py`). Stages 0 to 2 send what is trained, whatever
the number of GPUs; stage 3 sends all weights twice, frozen ones as well, which is why LoRA stays on stage 2 while the
base fits a GPU.
"""
FAILURES = """\
## Failures

Failures of components are taken to be independent, so that the rate grows with the number of GPUs. Published rates
differ by a factor of six; `checkpoint.every_steps: auto` goes by the highest, and by the run's own once it has failed
twice and more often than that.
"""
SAVING = f"""\
## Checkpoints and the share of time that trains

A checkpoint holds masters and both moments of AdamW in fp32: 12 bytes for every trained parameter, and no frozen one.
The ranks gather it to the first, which writes it ({failures.WRITE_BYTES_PER_S / 1e9:g} GB/s, assumed) and hashes it
({failures.HASH_BYTES_PER_S / 1e9:g} GB/s on one core, assumed); training waits. A restart takes
{failures.START_S:g} s (assumed), then every node reads the checkpoint ({failures.READ_BYTES_PER_S / 1e9:g} GB/s each,
assumed) and every rank hashes it.

`auto` saves at the interval of least expected time (Young 1974; Daly, FGCS 22(3), 2006). Where that is longer than
{duration(LONGEST_S)}, it saves that often, or as often as {100 * MAX_COST:g} % of the time allows. The share is
training over time at the rate of Meta RSC (1,024): by Daly's complete model, and in a simulation of
{failures.NUM_FAILURES:,} failures of single nodes (`bench/failures.py`, seed 0), which lies within
{100 * failures.TOLERANCE:g} points of it.
"""
LIMITS = """\
With an adapter, saving costs next to nothing and a failure little more than the restart. Full fine-tuning of a large
model is limited by the one writer: faster storage raises its share. On few GPUs `auto` saves more often than the
optimum, so that a failure loses less; a number in `checkpoint.every_steps` overrides it.
"""
MEASURED = """\
## Soak: many simulated ranks on one machine

A tiny language model (2 layers of 32, LoRA, ZeRO-2, fp32) on `ray.cluster_utils.Cluster`: several Ray nodes on one
machine, each of which declares more CPUs than there are, and every rank a process of its own. Measured, while other
processes used the same cores; the times say how long so many processes take on so few cores, most of it to start, not
how fast burnish trains. With its memory for a rank, 32 of them want a machine with 24 GiB.
"""


def generate(soak: Path = SOAK) -> str:
    """docs/scaling.md: same code and same record, same bytes."""
    parts = [wrapped(INTRO)]
    for text, table in ((WIRE, wire_table()), (FAILURES, failures_table()), (SAVING, saving_table())):
        parts += [wrapped(text), as_markdown(table)]
    parts.append(wrapped(LIMITS))
    record = read_json(soak)
    if record is not None:
        parts += [wrapped(MEASURED), as_markdown(soak_table(record))]
    return "\n\n".join(parts) + "\n"


def wrapped(text: str) -> str:
    """The paragraphs, each in lines of the document's width."""
    return "\n\n".join(
        textwrap.fill(part, WIDTH, break_long_words=False, break_on_hyphens=False)
        for part in text.strip().split("\n\n")
    )


def wire_table() -> Table:
    head = ("what is trained", "GPUs", *(f"ZeRO-{stage}" for stage in STAGES))
    rows = [
        (work.name, f"{n:,}", *(size(wire_bytes(work, stage, n)) for stage in STAGES))
        for work, _ in WORKS
        for n in NUM_GPUS
    ]
    return Table("Bytes on the wire", head, rows)


def wire_bytes(work: Work, stage: int, num_gpus: int) -> float:
    traffic = zero_traffic(
        stage,
        gradient_bytes=FP32_BYTES * work.num_trained,
        trained_bytes=BF16_BYTES * work.num_trained,
        weight_bytes=BF16_BYTES * work.num_total,
    )
    return traffic_bytes(traffic, num_gpus)


def failures_table() -> Table:
    rows = [
        (f"{n:,}", *(f"{rate.per_day(n):.2g} a day, one in {duration(rate.mtbf_s(n))}" for rate in RATES))
        for n in NUM_GPUS
    ]
    return Table("Failures", ("GPUs", *(rate.name for rate in RATES)), rows, [f"Published: {r.source}." for r in RATES])


@functools.cache
def saving_table() -> Table:
    """Simulates hundreds of thousands of failures, once."""
    head = (
        *("what is trained", "GPUs", "step", "checkpoint", "save", "restart", "interval", "steps", "bound by"),
        *("share at the optimum", "saving costs", "share, formula", "share, simulated"),
    )
    rows = [saving_row(work, stage, n) for work, stage in WORKS for n in NUM_GPUS]
    return Table("Checkpoints", head, rows)


def saving_row(work: Work, stage: int, num_gpus: int) -> tuple[str, ...]:
    model = simulate(
        work,
        num_gpus=num_gpus,
        stage=stage,
        hardware=H200,
        flops_per_s=ASSUMED_MFU * H200.peak_flops_per_s,
        overlap=OVERLAP,
    )
    name = f"{work.name}, ZeRO-{stage}"
    if not model["fits"]:
        return (name, f"{num_gpus:,}", "does not fit", *[""] * 10)
    found = failures.chosen(work, num_gpus, step_s=model["step_s"], hardware=H200)
    times: dict[str, Any] = {
        "interval_s": found.every_steps * found.step_s,
        "save_s": found.save_s,
        "mtbf_s": found.mtbf_s,
    }
    times["restart_s"] = failures.restart_s(work)
    course = failures.simulate(**times, num_nodes=num_gpus // H200.gpus_per_node)
    best = times | {"interval_s": optimum_s(found.save_s, found.mtbf_s)}
    return (
        *(name, f"{num_gpus:,}", duration(model["step_s"]), size(failures.checkpoint_bytes(work))),
        *(duration(found.save_s), duration(times["restart_s"])),
        *(duration(times["interval_s"]), f"{found.every_steps:,}", BOUNDS[found.bound]),
        f"{100 * failures.expected_share(**best):.2f} %",
        f"{100 * found.save_s / (times['interval_s'] + found.save_s):.2f} %",
        f"{100 * failures.expected_share(**times):.2f} %",
        f"{100 * course.share:.2f} %",
    )


def soak_table(record: dict[str, Any]) -> Table:
    rows = [
        (
            *(case["name"], f"{case['num_ranks']}", f"{case['num_nodes']}", f"{case['steps']}"),
            *(f"{case['restarts']}", f"{case['lost_steps']}", duration(case["time_s"])),
            *(size(case["peak_bytes"]), size(case["peak_bytes_of_ranks"] / case["num_ranks"])),
            f"{case['loss_difference']:.1e}",
        )
        for case in record["cases"]
    ]
    head = (
        *("run", "ranks", "Ray nodes", "steps", "restarts", "steps again", "time", "memory of all processes"),
        *("of a rank", "losses differ from one process's by"),
    )
    notes = [
        *(f"{case['name']}: `{case['command']}`." for case in record["cases"]),
        f"{record['num_cpus']} cores of {record['cpu']}, {size(record['memory_bytes'])}, {record['libraries']}.",
        "Memory is proportional (PSS): pages that processes share are counted once. The difference is the largest of a "
        "step, relative.",
    ]
    return Table("Soak", head, rows, notes)
