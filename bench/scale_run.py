"""One layout measured by its ranks, and the row that is made of it. No torch here until something is measured.

The ranks together and one worker alone, on rank 0, take steps in turn: efficiency is of steps of the same round.
Before that both train on one batch, the worker alone by accumulation: a layout whose losses are not the same is void.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from typing import Any

from ..harness.memory import FP32_BYTES
from ..harness.traffic import Collective, sent_bytes, traffic_bytes, traffic_s, zero_traffic
from .benchmark import Row
from .scale_cluster import Cluster, free_port
from .scale_job import Job, write_rows
from .scaling import BF16_BYTES, calibrated, one_node
from .stats import paired_ratios, quantiles

NUM_CHECK_STEPS = 3
LOSS_TOLERANCE = 2.0**-9
"""Largest relative difference of the first loss from that of one worker: the unit roundoff of bf16."""
FALL_TOLERANCE = 2.0**-4
"""The same for the fall of the loss over the check. Two and four ranks were 0.1% apart."""
IDLE_S = 0.5
SMALL_BYTES, LARGE_BYTES = 2**12, 2**25
"""All-reduces from which the link is calibrated."""
NUM_REDUCES = 5


@dataclass(frozen=True)
class Measured:
    """What the ranks answered; `alone`, `together` and `apart` hold the answers of all ranks for each step."""

    built: Mapping[str, Any]
    check_losses: Sequence[float]
    alone_losses: Sequence[float]
    alone: Sequence[Sequence[Mapping[str, float]]]
    together: Sequence[Sequence[Mapping[str, float]]]
    apart: Sequence[Sequence[Mapping[str, Any]]]
    others_cores: Sequence[float]
    idle_bytes_per_s: float
    small_s: Sequence[float]
    large_s: Sequence[float]
    checkpoint_s: float


def measure(job: Job, cluster: Cluster, *, num_rounds: int, num_apart: int) -> Measured:
    """Builds the layout, checks, times, takes apart, saves, ends it. Raises scale_cluster.RankFailed."""
    n, fields = job.num_workers, job.to_dict()
    cluster.grow(n, is_gpu=job.device == "cuda", zero_stage=job.zero_stage)
    folder, rows = str(cluster.folder / "run"), str(write_rows(cluster.folder, job))
    alone_losses = build_alone(job, cluster, folder, rows)
    port = free_port()
    built = cluster.call_each("build", [(fields, folder, rows, rank, port) for rank in range(n)])
    check_losses = cluster.call("check", NUM_CHECK_STEPS, num_ranks=n)[0]
    idle = idle_bytes_per_s()
    alone: list[list[dict[str, float]]] = []
    together: list[list[dict[str, float]]] = []
    others: list[float] = []
    for number in range(num_rounds):
        turns = [
            partial(take, alone, cluster, "step_solo", number, 1),
            partial(take, together, cluster, "step", number, n),
        ]
        for turn in turns if number % 2 == 0 else reversed(turns):
            others.append(others_cores(turn))
    apart = [cluster.call("take_apart", number, num_ranks=n) for number in range(num_apart)]
    small_s, large_s = (
        [max(times) for times in zip(*cluster.call("all_reduce", size, NUM_REDUCES, num_ranks=n), strict=True)]
        if n > 1
        else []
        for size in (SMALL_BYTES, LARGE_BYTES)
    )
    checkpoint_s = max(cluster.call("save", folder, num_ranks=n))
    cluster.call("leave", num_ranks=n)
    return Measured(
        built=built[0],
        check_losses=check_losses,
        alone_losses=alone_losses,
        alone=alone,
        together=together,
        apart=apart,
        others_cores=others,
        idle_bytes_per_s=idle,
        small_s=small_s,
        large_s=large_s,
        checkpoint_s=checkpoint_s,
    )


def take(answers: list[list[dict[str, float]]], cluster: Cluster, method: str, number: int, n: int) -> float:
    """One step of n ranks; its answers are added. Returns the seconds that the ranks worked."""
    answers.append(cluster.call(method, number, num_ranks=n))
    return sum(answer["cpu_s"] for answer in answers[-1])


def others_cores(turn: Callable[[], float]) -> float:
    """Cores that processes other than the ranks used during a turn, which returns what the ranks did."""
    from .turns import others_s

    start_s, start_others_s = time.perf_counter(), others_s()
    own_s = turn()
    return max(0.0, others_s() - start_others_s - own_s) / (time.perf_counter() - start_s)


def build_alone(job: Job, cluster: Cluster, folder: str, rows: str) -> list[float]:
    """Losses of one worker on the batch of all; rank 0 has its model afterwards. Builds it only where it must."""
    name = f"{job.model}, {job.adapter}"
    wanted = (name, job.num_workers)
    if wanted not in cluster.check_losses or cluster.alone != name:
        cluster.call("build_solo", job.to_dict(), folder, rows, num_ranks=1)
        cluster.alone = name
        cluster.check_losses[wanted] = cluster.call("check_solo", NUM_CHECK_STEPS, job.num_workers, num_ranks=1)[0]
    return cluster.check_losses[wanted]


def idle_bytes_per_s() -> float:
    """What others send over the loopback interface while the ranks do nothing; 0 where it is not counted."""
    from .collectives import loopback_bytes

    before = loopback_bytes()
    time.sleep(IDLE_S)
    after = loopback_bytes()
    return 0.0 if before is None or after is None else (after - before) / IDLE_S


def row_of(job: Job, found: Measured) -> Row:
    """All fields of the row but its key; void where the losses are not those of one worker."""
    reason = difference(found.check_losses, found.alone_losses)
    times = [max(rank["time_s"] for rank in ranks) for ranks in found.together]
    alone = [rank["time_s"] for (rank,) in found.alone]
    efficiency = paired_ratios(alone, times)
    time_s = quantiles(times)
    return {
        "state": "ok" if reason is None else "void",
        "reason": reason,
        **described(job),
        **found.built,
        "check_losses": list(found.check_losses),
        "alone_losses": list(found.alone_losses),
        "first_loss": found.check_losses[0],
        "times_s": times,
        "time_s": time_s,
        "alone_times_s": alone,
        "tokens_per_s": job.tokens / time_s["median"],
        "efficiency": efficiency["median"],
        "efficiency_samples": efficiency["samples"],
        "others_cores": median(found.others_cores),
        "checkpoint_s": found.checkpoint_s,
        **split_fields(found.apart),
        **traffic_fields(job, found),
        **link_fields(job, found),
    }


def described(job: Job) -> Row:
    """What is known of a layout before it is measured."""
    return {
        "kind": "workers",
        "num_workers": job.num_workers,
        "zero_stage": job.zero_stage,
        "adapter": job.adapter,
        "model": job.model,
        "tokens_per_worker": job.num_sequences * job.length,
        "num_threads": job.num_threads,
        "backend": "nccl" if job.device == "cuda" else "gloo",
    }


def difference(losses: Sequence[float], alone: Sequence[float]) -> str | None:
    """In what the losses are not those of one worker; None where they agree."""
    first = abs(losses[0] - alone[0]) / abs(alone[0])
    falls = losses[0] - losses[-1], alone[0] - alone[-1]
    if not first <= LOSS_TOLERANCE:
        return f"its first loss is {losses[0]:.5g}, that of one worker {alone[0]:.5g}"
    if not abs(falls[0] - falls[1]) <= FALL_TOLERANCE * abs(falls[1]):
        return f"its loss falls by {falls[0]:.4g} in the first steps, that of one worker by {falls[1]:.4g}"
    return None


def split_fields(apart: Sequence[Sequence[Mapping[str, Any]]]) -> Row:
    """The parts of a step: means over the ranks, medians over the steps.

    Communication is from when the last rank has come to a collective; waiting for it is in `other_s`, and beside it in
    `waiting_s`. `apart_s` is the whole step, taken apart: longer than one in which something overlaps.
    """
    from .collectives import Call, waited_s

    steps: list[dict[str, float]] = []
    for ranks in apart:
        calls = [[Call(*call) for call in rank["calls"]] for rank in ranks]
        waited = waited_s(calls)
        inside = [sum(call.end_s - call.start_s for call in own) for own in calls]
        whole, inputs = [rank["time_s"] for rank in ranks], [rank["input_s"] for rank in ranks]
        steps.append(
            {
                "compute_s": fmean(whole) - fmean(inputs) - fmean(inside),
                "communication_s": fmean(inside) - fmean(waited),
                "input_s": fmean(inputs),
                "other_s": fmean(waited),
                "apart_s": max(whole),
            }
        )
    parts = {name: median(step[name] for step in steps) for name in steps[0]}
    apart_s = parts.pop("apart_s")
    samples = [step["communication_s"] for step in steps]
    return {"split": parts, "waiting_s": parts["other_s"], "apart_s": apart_s, "communication_samples": samples}


def traffic_fields(job: Job, found: Measured) -> Row:
    """Bytes per rank and step, by ZeRO's formula, of the collectives called, and on the wire.

    `called_bytes` are those that rings send for the collectives called, `backend_bytes` those that gloo sends for them,
    `wire_bytes` what the loopback interface carried, without what others send in that time (None where NCCL goes past
    the interface). `collectives` are of the last step taken apart.
    """
    n = job.num_workers
    calls = found.apart[-1][0]["calls"]
    sums: Counter[str] = Counter()
    for op, num_bytes, *_ in calls:
        sums[op] += num_bytes
    counts = Counter(call[0] for call in calls)
    traffic = [Collective(op, sums[op], counts[op]) for op in sorted(sums)]
    wire = [carried(ranks[0], found.idle_bytes_per_s) / n for ranks in found.apart if is_counted(job, ranks[0])]
    return {
        "collectives": [{"op": part.op, "count": part.count, "bytes": part.num_bytes} for part in traffic],
        "formula_bytes": traffic_bytes(formula(job, found.built), n),
        "called_bytes": sum(sent_bytes(op, num_bytes, n) for op, num_bytes, *_ in calls),
        "backend_bytes": traffic_bytes(by_backend(traffic, job.device), n),
        "wire_bytes": median(wire) if wire else None,
        "wire_samples": wire,
        "idle_bytes_per_s": found.idle_bytes_per_s,
    }


def is_counted(job: Job, step: Mapping[str, Any]) -> bool:
    return job.device == "cpu" and step["loopback_bytes"] is not None


def carried(step: Mapping[str, Any], idle_bytes_per_s: float) -> float:
    """Bytes that the interface carried for all ranks in a step."""
    return max(0.0, step["loopback_bytes"] - idle_bytes_per_s * step["loopback_s"])


def formula(job: Job, built: Mapping[str, Any]) -> list[Collective]:
    """ZeRO's traffic of what was built: gradients in fp32, weights in bf16."""
    return zero_traffic(
        job.zero_stage,
        gradient_bytes=FP32_BYTES * built["num_trained"],
        trained_bytes=BF16_BYTES * built["num_trained"],
        weight_bytes=BF16_BYTES * built["num_total"],
        num_layers=job.fields["num_hidden_layers"],
    )


def by_backend(traffic: Sequence[Collective], device: str) -> list[Collective]:
    """The collectives as the backend runs them: gloo's reduce-scatter is an all-reduce of which each rank keeps a part.

    (torch, ProcessGroupGloo.cpp, reduce_scatter_tensor_coalesced.)
    """
    ops = {"reduce_scatter": "all_reduce"} if device == "cpu" else {}
    return [Collective(ops.get(part.op, part.op), part.num_bytes, part.count) for part in traffic]


def link_fields(job: Job, found: Measured) -> Row:
    """The link that all-reduces show, and what the model of `scaling` says of communication with it.

    `model_communication_s` is of ZeRO's formula, `model_calls_s` of the collectives called, as the backend runs them.
    """
    n = job.num_workers
    if n == 1:
        return {"link": None, "model_communication_s": 0.0, "model_calls_s": 0.0}
    link = calibrated(n, small_s=median(found.small_s), large_s=median(found.large_s), large_bytes=LARGE_BYTES)
    calls = [Collective(op, num_bytes) for op, num_bytes, *_ in found.apart[-1][0]["calls"]]
    return {
        "link": {"bytes_per_s": link.bytes_per_s, "latency_s": link.latency_s},
        "model_communication_s": traffic_s(formula(job, found.built), n, one_node(n, link)),
        "model_calls_s": traffic_s(by_backend(calls, job.device), n, one_node(n, link)),
    }
