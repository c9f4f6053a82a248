"""Several workers on this machine: where a step's time goes, bytes on the wire, and a model of many GPUs.

The workers are actors of a Ray on this machine, one core (or GPU) each, with the engine, loader and step of a run.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from ..harness.traffic import Hardware, Link
from . import scale_tables
from .benchmark import Benchmark, Choice, Figure, Item, Row, Setting, not_measured
from .scale_cluster import Cluster, RankFailed, first_line
from .scale_job import LORA_RANK, MODELS, Job, write_rows
from .scale_run import described, measure, row_of
from .scaling import LLAMA_8B, LLAMA_70B, Shape, Work, simulate
from .stats import quantiles

NUM_WORKERS = {"cpu": (4, 2, 1), "cuda": (8, 4, 2, 1)}
"""The most first: ranks of a layout with fewer have then all built the same models, see scale_cluster."""
STAGES = {"cpu": (0, 1, 2, 3), "cuda": (0, 2, 3)}
LORA_STAGES = (2,)
QUICK_WORKERS, QUICK_STAGES = (2, 1), (2, 3)
MODEL = {"cpu": "llama-34m", "cuda": "llama-130m"}
BATCH = {"cpu": (2, 128), "cuda": (8, 2048)}
"""Sequences and tokens of each, per worker."""
NUM_THREADS = {"cpu": 1, "cuda": 4}
NUM_ROUNDS, NUM_APART = 7, 3
QUICK_ROUNDS, QUICK_APART = 5, 2
START_S = 25.0
"""Ray and the ranks, paid by the first layout."""
GPU_LAYOUT_S = 12.0
LAYER_MODEL, LAYER_BATCH = "llama-8b-4-layers", (2, 4096)
LAYER_WARMUP, LAYER_STEPS = 3, 7

SIMULATED_GPUS = (8, 64, 256, 1024)
SIMULATED_STAGES = (1, 2, 3)
SIMULATED_BATCH = (2, 4096)
LINK_SHARE = 0.8
"""Of a link's speed that collectives reach: an assumption."""
H200 = Hardware(
    name="H200 SXM, 8 a node, NVLink 4, 400 Gb/s InfiniBand a GPU",
    peak_flops_per_s=989e12,
    memory_bytes=141e9,
    gpus_per_node=8,
    inside=Link(bytes_per_s=LINK_SHARE * 450e9, latency_s=3e-6),
    between=Link(bytes_per_s=LINK_SHARE * 50e9, latency_s=5e-6),
)
"""Peak of dense bf16, memory and NVLink (900 GB/s both ways together) from NVIDIA's data sheet; latencies assumed."""
ASSUMED_MFU = 0.4
"""Share of the peak that training computes at where no GPU was measured: an assumption."""
OVERLAP = 0.5
"""Share of the communication that hides behind computing: an assumption; the bounds are with none and with all."""

CLUSTER = Cluster()
"""One for all layouts of a run: ended by the first item that needs none, by an interruption or with the process."""


def items(device: str, choice: Choice) -> list[Item]:
    return [*layer_items(device), *worker_items(device, choice), *simulation_items()]


def layer_items(device: str) -> list[Item]:
    """On a GPU: how fast it computes whole steps of 8B's layers, for the model of many."""
    if device != "cuda":
        return []
    num_sequences, length = LAYER_BATCH
    found = []
    for adapter in ("full", "lora"):
        job = Job(LAYER_MODEL, adapter, 0, 1, num_sequences, length, device, NUM_THREADS[device])
        key = f"4 layers of Llama-3 8B, {adapter}"
        found.append(Item(key, (key,), {"kind": "compute", "job": job.to_dict()}, cost_s=40.0))
    return found


def worker_items(device: str, choice: Choice) -> list[Item]:
    workers = QUICK_WORKERS if choice.is_quick else NUM_WORKERS[device]
    layouts = [
        (adapter, stage, n)
        for adapter, stages in (("full", STAGES[device]), ("lora", LORA_STAGES))
        for stage in stages
        for n in workers
        if not choice.is_quick or (adapter == "full" and stage in QUICK_STAGES)
    ]
    found = []
    for number, (adapter, stage, n) in enumerate(layouts):
        num_sequences, length = BATCH[device]
        job = Job(MODEL[device], adapter, stage, n, num_sequences, length, device, NUM_THREADS[device])
        key = key_of(job)
        cost_s = (START_S if number == 0 else 0.0) + (6.0 + 4.0 * n if device == "cpu" else GPU_LAYOUT_S)
        found.append(Item(key, (key,), {"kind": "workers", "job": job.to_dict()}, cost_s=cost_s))
    return found


def key_of(job: Job) -> str:
    """2 workers, ZeRO-3, full"""
    return f"{job.num_workers} worker{'s' if job.num_workers > 1 else ''}, ZeRO-{job.zero_stage}, {job.adapter}"


def simulation_items() -> list[Item]:
    found = []
    for shape in (LLAMA_8B, LLAMA_70B):
        for rank in (None, LORA_RANK):
            work = work_of(shape, rank)
            rows = tuple(simulation_key(work, stage, n) for stage in SIMULATED_STAGES for n in SIMULATED_GPUS)
            what = {"kind": "simulation", "shape": shape.name, "rank": rank}
            found.append(Item(f"model of {work.name}", rows, what, cost_s=0.05))
    return found


def work_of(shape: Shape, rank: int | None) -> Work:
    num_sequences, length = SIMULATED_BATCH
    return Work(shape, rank, num_sequences, length)


def simulation_key(work: Work, stage: int, num_gpus: int) -> str:
    return f"model of {work.name}, ZeRO-{stage}, {num_gpus} GPUs"


def prepare(setting: Setting) -> dict[str, Any]:
    from ..launch.resources import detect

    found = detect()
    return {"num_cores": found.num_cpus, "num_gpus": found.num_devices, "scaling": "weak"}


def run_item(item: Item, setting: Setting, *, cluster: Cluster) -> Iterator[Row]:
    try:
        yield from KINDS[item.what["kind"]](item, setting, cluster)
    except BaseException:
        cluster.stop()
        raise


def measure_workers(item: Item, setting: Setting, cluster: Cluster) -> Iterator[Row]:
    job = Job.from_dict(dict(item.what["job"]))
    if why := too_many(job):
        yield from not_measured(item, why)
        return
    num_rounds = setting.num_rounds or (QUICK_ROUNDS if setting.is_quick else NUM_ROUNDS)
    num_apart = QUICK_APART if setting.is_quick else NUM_APART
    try:
        found = measure(job, cluster, num_rounds=num_rounds, num_apart=num_apart)
        row = row_of(job, found)
    except (RankFailed, ValueError) as error:
        row = described(job) | {"state": "failed", "reason": first_line(error)}
    yield {"key": item.key} | row


def too_many(job: Job) -> str | None:
    """Why this machine cannot hold so many workers. Cores they share; every one needs a GPU of its own."""
    if job.device == "cpu":
        return None
    import torch

    count = torch.cuda.device_count()
    return f"this machine has {count} GPU{'s' if count != 1 else ''}" if job.num_workers > count else None


def measure_layers(item: Item, setting: Setting, cluster: Cluster) -> Iterator[Row]:
    """Whole steps of one worker without DeepSpeed, and the operations per second that they come to."""
    job = Job.from_dict(dict(item.what["job"]))
    head = {"key": item.key, "kind": "compute", "adapter": job.adapter, "model": job.model}
    try:
        times = layer_times(job, cluster)
    except RankFailed as error:
        yield head | {"state": "failed", "reason": first_line(error)}
        return
    fields = MODELS[job.model]
    shape = Shape(
        job.model,
        *(fields[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")),
        *(fields[key] for key in ("num_attention_heads", "num_key_value_heads", "vocab_size")),
    )
    flops = Work(shape, LORA_RANK if job.adapter == "lora" else None, job.num_sequences, job.length).flops()
    speed = flops / quantiles(times)["median"]
    cluster.flops_per_s[job.adapter] = speed
    yield head | {
        "state": "ok",
        "reason": None,
        "times_s": times,
        "time_s": quantiles(times),
        "num_flops": flops,
        "flops_per_s": speed,
        "tokens_per_s": job.tokens / quantiles(times)["median"],
    }


def layer_times(job: Job, cluster: Cluster) -> list[float]:
    cluster.grow(1, is_gpu=job.device == "cuda", zero_stage=0)
    folder, rows = str(cluster.folder / "run"), str(write_rows(cluster.folder, job))
    cluster.call("build_solo", job.to_dict(), folder, rows, num_ranks=1)
    cluster.alone = None
    steps = [cluster.call("step_solo", number, num_ranks=1)[0] for number in range(LAYER_WARMUP + LAYER_STEPS)]
    cluster.call("leave_solo", num_ranks=1)
    return [step["time_s"] for step in steps[LAYER_WARMUP:]]


def run_simulation(item: Item, setting: Setting, cluster: Cluster) -> Iterator[Row]:
    """A model of many GPUs, from the speed of this machine's GPU where it was measured."""
    cluster.stop()
    rank = item.what["rank"]
    work = work_of(next(shape for shape in (LLAMA_8B, LLAMA_70B) if shape.name == item.what["shape"]), rank)
    measured = cluster.flops_per_s.get("full" if rank is None else "lora")
    speed = measured or ASSUMED_MFU * H200.peak_flops_per_s
    for stage in SIMULATED_STAGES:
        for n in SIMULATED_GPUS:
            found = simulate(work, num_gpus=n, stage=stage, hardware=H200, flops_per_s=speed, overlap=OVERLAP)
            row = {"key": simulation_key(work, stage, n), "kind": "simulation", "state": "ok", "reason": None}
            row |= found | {"is_speed_measured": measured is not None, "link_share": LINK_SHARE}
            if not found["fits"]:
                why = f"does not fit: {found['state_bytes'] / 1e9:.0f} GB of weights, gradients and moments a GPU"
                row |= {"state": "not measured", "reason": why}
            yield row


KINDS = {"workers": measure_workers, "compute": measure_layers, "simulation": run_simulation}


def figures(row: Row) -> list[Figure]:
    """Of the model only the bytes: its other numbers are those of the assumptions."""
    key = row["key"]
    if row["kind"] == "simulation":
        return [Figure(f"{key} · bytes sent", "bytes", row["wire_bytes"], (), "lower")]
    found = [Figure(f"{key} · step", "time", row["time_s"]["median"], row["times_s"], "lower")]
    if row["kind"] == "compute":
        return found
    samples = row["efficiency_samples"]
    found += [
        Figure(f"{key} · efficiency", "ratio", row["efficiency"], samples, "higher"),
        Figure(f"{key} · checkpoint", "time", row["checkpoint_s"], (row["checkpoint_s"],), "lower"),
    ]
    if row["num_workers"] > 1:
        communication_s = row["split"]["communication_s"]
        found.append(Figure(f"{key} · bytes in collectives", "count", row["called_bytes"], (), "lower"))
        found.append(Figure(f"{key} · communication", "time", communication_s, row["communication_samples"], "lower"))
        if row["wire_bytes"] is not None:
            found.append(Figure(f"{key} · bytes on the wire", "bytes", row["wire_bytes"], row["wire_samples"], "lower"))
    return found


BENCHMARK = Benchmark(
    name="scale",
    summary="1, 2 and 4 workers on Ray on this machine, bytes on the wire, and a model of many GPUs",
    items=items,
    prepare=prepare,
    measure=partial(run_item, cluster=CLUSTER),
    figures=figures,
    tables=scale_tables.tables,
)
