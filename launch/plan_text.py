"""The answer of `burnish plan` as text of at most 100 columns."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from ..harness.markup import duration, size

WIDTH = 100
KEY, VALUE = 29, 11
"""Columns of a decision's key and value; the reason has the rest."""
PLACES = {"device": "device", "host": "host", "nvme": "nvme"}
COLUMNS = {
    "zero_stage": "zero",
    "offload_optimizer": "optimizer",
    "offload_param": "weights",
    "offload_activations": "activations",
    "activation_checkpointing": "recompute",
    "batch": "micro x acc.",
    "peak_bytes": "peak",
    "host_bytes": "host",
    "nvme_bytes": "nvme",
    "step_s": "step",
    "wire_bytes": "sent",
    "verdict": "",
}
"""Field of a candidate -> heading. Where state lies: none = on the device."""
OPTIONAL = ("offload_optimizer", "offload_param", "offload_activations", "host_bytes", "nvme_bytes", "wire_bytes")
"""Columns that are left out where all candidates have nothing in them."""


def render(answer: Mapping[str, Any]) -> str:
    """The whole answer."""
    return "\n".join(line.rstrip() for line in _lines(answer))


def _lines(answer: Mapping[str, Any]) -> Iterator[str]:
    yield from _heading(answer)
    if "prediction" in answer:
        yield from ("", *_prediction(answer))
    else:
        yield from ("", "state per worker (activations come on top)")
        yield from (
            f"  {spaced(name):<22}{size(value):>12}" for name, value in answer["state_bytes_per_worker"].items()
        )
        yield f"  {'of a budget of':<22}{size(answer['budget_bytes_per_worker']):>12}"
    yield from ("", "chosen")
    for decision in answer["plan"]["decisions"]:
        start = f"  {decision['key']:<{KEY}}{decision['value']:<{VALUE}} "
        yield from textwrap.wrap(decision["why"], WIDTH, initial_indent=start, subsequent_indent=" " * len(start))
    if "candidates" in answer:
        yield from ("", *_candidates(answer))
        yield from _other_results(answer)
        yield from ("", *_time(answer))
    if "verification" in answer:
        yield from ("", *_verification(answer["verification"]))


def spaced(name: str) -> str:
    return name.replace("_", " ")


def _heading(answer: Mapping[str, Any]) -> Iterator[str]:
    plan, batch, parameters = answer["plan"], answer["batch"], answer["parameters"]
    share = 100 * parameters["trainable"] / max(1, parameters["total"])
    device = (answer["resources"]["device_name"] if plan["device"] == "cuda" else "") or plan["device"]
    yield f"{plan['config']['name']}: {plan['world_size']} x {device}, run directory {plan['run_dir']}"
    yield ""
    yield (
        f"batch        {batch['global_batch_size']} examples a step = {batch['micro_batch_size']} micro-batch x "
        f"{batch['gradient_accumulation_steps']} accumulation x {batch['world_size']} workers"
    )
    yield (
        f"parameters   {parameters['total']:,} in all, {parameters['trainable']:,} trained ({share:.3g} %)"
        + (f", {parameters['quantized']:,} quantised" if parameters["quantized"] else "")
    )
    shape = answer.get("shape")
    if shape and shape["hidden_size"]:
        words = f", vocabulary {shape['vocab_size']:,}" if shape["vocab_size"] else ""
        yield f"shape        {shape['num_layers']} layers of {shape['hidden_size']:,}{words}"
    resources = answer["resources"]
    idle = resources["num_devices"] - plan["world_size"]
    if plan["device"] == "cuda" and idle > 0:
        use = f"launch.type=ray launch.num_workers={resources['num_devices']}"
        yield f"idle         {idle} of {resources['num_devices']} GPUs; {use} uses all"


def _prediction(answer: Mapping[str, Any]) -> Iterator[str]:
    prediction, limits = answer["prediction"], answer["limits"]
    places = [place for place in PLACES if any(prediction[place].values())] or ["device"]
    names = list(dict.fromkeys(name for place in places for name, value in prediction[place].items() if value))
    yield f"{'predicted peak of a worker':<28}" + "".join(f"{PLACES[place]:>12}" for place in places)
    for name in names:
        yield f"  {spaced(name):<26}" + "".join(f"{_size(prediction[place].get(name)):>12}" for place in places)
    totals = [sum(prediction[place].values()) for place in places]
    yield f"  {'total':<26}" + "".join(f"{size(total):>12}" for total in totals)
    if mapped := prediction["mapped_bytes"]:
        yield f"  {'of it in mapped files':<26}{size(mapped):>12}"
    yield f"  {'may use':<26}" + "".join(f"{size(limits[f'{place}_bytes']):>12}" for place in places)
    yield from textwrap.wrap(limits["why"], WIDTH, initial_indent="  limit: ", subsequent_indent="         ")
    yield "  phases: " + ", ".join(f"{name} {size(value)}" for name, value in prediction["phases"].items())


def _size(value: int | None) -> str:
    return size(value) if value else ""


def _candidates(answer: Mapping[str, Any]) -> Iterator[str]:
    rows = [_cells(candidate) for candidate in answer["candidates"]]
    named = [name for name in COLUMNS if name not in OPTIONAL or {row[name] for row in rows} - {"none", "", "no"}]
    table = [{name: COLUMNS[name] for name in named}, *rows]
    yield (
        f"candidates   {answer['num_candidates']} in all, {answer['num_fitting']} fit; the fastest of each kind, "
        "> is taken"
    )
    widths = {name: max(len(row[name]) for row in table) for name in named}
    for row, mark in zip(table, ["", *(candidate["is_chosen"] for candidate in answer["candidates"])], strict=True):
        cells = [
            f"{row[name]:<{widths[name]}}" if name == "verdict" else f"{row[name]:>{widths[name]}}" for name in named
        ]
        yield f"{'>' if mark else ' '} " + "  ".join(cells)


def _cells(candidate: Mapping[str, Any]) -> dict[str, str]:
    over = candidate["over_bytes"]
    places = {"device": "", "host": " of host memory", "nvme": " on disk"}
    verdict = ", ".join(f"{size(value)}{places[place]} too much" for place, value in over.items())
    return {
        "zero_stage": str(candidate["zero_stage"]),
        "offload_optimizer": candidate["offload_optimizer"],
        "offload_param": candidate["offload_param"],
        "offload_activations": "cpu" if candidate["offload_activations"] else "none",
        "activation_checkpointing": candidate["activation_checkpointing"],
        "batch": f"{candidate['micro_batch_size']} x {candidate['gradient_accumulation_steps']}",
        "peak_bytes": size(candidate["peak_bytes"]),
        "host_bytes": _size(candidate["host_bytes"]),
        "nvme_bytes": _size(candidate["nvme_bytes"]),
        "step_s": seconds(candidate["step_s"]),
        "wire_bytes": _size(candidate["wire_bytes"]),
        "verdict": verdict,
    }


def _other_results(answer: Mapping[str, Any]) -> Iterator[str]:
    if not answer["other_results"]:
        return
    yield from ("", "never chosen by itself, for it changes the result")
    for row in answer["other_results"]:
        change = " ".join(f"{key}={value}" for key, value in row["changes"].items())
        verdict = "fits" if row["fits"] else "does not fit"
        found = row["settings"]
        how = f"zero {found['zero_stage']}, micro {found['micro_batch_size']}, {found['activation_checkpointing']}"
        yield f"  {change:<44}{size(row['peak_bytes']):>9}{seconds(row['step_s']):>9}  {verdict:<13} ({how})"


def _time(answer: Mapping[str, Any]) -> Iterator[str]:
    cost, speeds = answer["cost"], answer["speeds"]
    parts = {
        "compute": "compute_s",
        "communication": "communication_s",
        "offload": "offload_s",
        "optimizer": "optimizer_s",
    }
    told = ", ".join(f"{name} {seconds(cost[key])}" for name, key in parts.items() if cost[key])
    sent = f"; {size(cost['wire_bytes'])} sent by each worker" if cost["wire_bytes"] else ""
    moved = f"; {size(cost['offload_bytes'])} moved for offload" if cost["offload_bytes"] else ""
    found = answer["calibration"]
    is_measured = found is not None and found["flops_per_s"] is not None
    origin = "as plan --verify measured" if is_measured else "assumed, not measured"
    text = (
        f"{seconds(cost['step_s'])} a step of full-length examples ({told}){sent}{moved}. An estimate: "
        f"{speeds['name']} at {speeds['flops_per_s'] / 1e12:.3g} TFLOP/s ({origin})"
    )
    yield from textwrap.wrap(text, WIDTH, initial_indent="time         ", subsequent_indent=" " * 13)


def _verification(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{'verified: peak of a worker':<28}{'predicted':>12}{'measured':>12}{'error':>10}"
    for kind in ("phases", "parts"):
        yield f"  {kind}"
        for row in found[kind]:
            error = "" if row["error"] is None else f"{100 * row['error']:+.1f} %"
            sizes = f"{size(row['predicted_bytes']):>12}{size(row['measured_bytes']):>12}"
            yield f"    {spaced(row['name']):<24}{sizes}{error:>10}"
    verdict = "within" if found["ok"] else "beyond"
    yield f"  the peak is {100 * found['error']:+.1f} % off, {verdict} {100 * found['tolerance']:.0f} %"
    yield f"  a process that holds no weights has {size(found['baseline_bytes'])}, not counted above"
    count = found["num_micro_batches"]
    what = f"a step of {count} micro-batch{'es' if count > 1 else ''}"
    yield f"  {what} took {seconds(found['step_s'])}, estimated {seconds(found['estimated_step_s'])}"
    yield f"  kept in {found['calibration']} for the next plan"


def seconds(value: float) -> str:
    """As markup.duration, with milliseconds."""
    return duration(value) if value >= 1 else f"{1000 * value:.3g} ms"
