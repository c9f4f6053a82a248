"""The planner's prediction of peak memory against what a run of the same plan has at most, by part and by phase."""

from collections.abc import Iterator
from typing import Any

from ..harness.errors import BurnishError
from ..harness.offload import missing_tools
from ..harness.plan import Resources, make_plan
from . import plan_tables
from .benchmark import Benchmark, Figure, Item, Row, Setting
from .plan_cases import Case, items
from .probes import available_bytes, host

MAX_SHARE = 0.8
"""Of the free memory: what is predicted to need more is not tried, for it may take the machine down with it."""


def prepare(setting: Setting) -> dict[str, Any]:
    return {"available_bytes": available_bytes(setting.device)}


def measure(item: Item, setting: Setting) -> Iterator[Row]:
    from ..harness.measure import measure as measured_of
    from ..harness.memory import predict
    from ..harness.profile import profile_of

    what: dict[str, Any] = dict(item.what)
    case = Case(**what | {"batch": tuple(what["batch"])})
    row: Row = {"key": item.key, "state": "ok", "reason": None} | dict(item.what)
    if case.is_in_files and (missing := missing_tools(with_files=True)):
        yield row | {"state": "not measured", "reason": f"this host lacks {', '.join(missing)}"}
        return
    config = case.config(max(1, setting.num_threads // case.num_ranks))
    try:
        plan = make_plan(config, resources(case), run_dir="", cwd="")
        predicted = predict(plan, profile_of(config))
        needed, free = case.num_ranks * predicted.peak_bytes, available_bytes(setting.device)
        if needed > MAX_SHARE * free:
            yield row | {"state": "not measured", "reason": f"needs {needed} bytes, and {free} are free here"}
            return
        measured = measured_of(plan)
    except BurnishError as error:
        yield row | {"state": "failed", "reason": str(error)}
        return
    ratio = predicted.peak_bytes / measured.peak_bytes
    setting.say(f"  {case.key}: {100 * (ratio - 1):+.1f} %")
    yield row | {"predicted": predicted.to_dict(), "measured": measured.to_dict()}


def resources(case: Case) -> Resources:
    """This host, with as many cores as the case has ranks: they may share one."""
    found = host()
    return Resources(
        device=found.device,
        num_devices=found.num_devices,
        num_cpus=max(found.num_cpus, case.num_ranks),
        host_memory_bytes=found.host_memory_bytes,
        device_memory_bytes=found.device_memory_bytes,
        device_name=found.device_name,
    )


def figures(row: Row) -> list[Figure]:
    """What the run had at most, and how far the prediction is from it: 1 is right, either way."""
    predicted, measured = row["predicted"]["peak_bytes"], row["measured"]["peak_bytes"]
    ratio = max(predicted / measured, measured / predicted)
    return [
        Figure(f"{row['key']} · run", "peak", measured, (), "lower"),
        Figure(f"{row['key']} · off by", "ratio", ratio, (), "lower"),
    ]


BENCHMARK = Benchmark(
    name="plan",
    summary="the planner's prediction of peak memory against what is measured",
    items=items,
    prepare=prepare,
    measure=measure,
    figures=figures,
    tables=plan_tables.tables,
)
