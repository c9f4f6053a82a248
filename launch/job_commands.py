"""The verbs about jobs on a cluster: submit, jobs, status, logs, stop. Ray is imported when one of them runs."""

import argparse
import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..harness.config import Config
from ..harness.config_hardware import Ray
from ..harness.config_io import load_config, with_values
from ..harness.config_types import parse_bytes
from ..harness.errors import ConfigError, InfeasibleError, Interrupted, TrainingError
from ..harness.markup import duration, size
from ..harness.plan import Plan, Resources
from .commands import Answer, program, split_config
from .job_entry import RESULT
from .planning import of_nodes, planned
from .resources import worker_resources
from .staging import ENTRYPOINT, check_places, stage, stage_package

if TYPE_CHECKING:
    from .jobs import Job, Node, Server

PREFLIGHT_TIMEOUT_S = 300
"""For the job of the pre-flight: its own waits are shorter, and its start takes seconds."""
LAST_LINES = 3
UNLIMITED_BYTES = 2**50


def submit(options: argparse.Namespace, progress: TextIO) -> Answer:
    """Plans for the cluster, checks it, stages what the run needs, and queues it."""
    config = on_cluster(load_config(*split_config(options.config)))
    if options.manifest is not None:
        return _manifest(config, options.manifest)
    check_places(config)
    folder = Path(options.working_dir or ".").resolve()
    if not folder.is_dir():
        raise ConfigError(f"--working-dir={options.working_dir}: no such folder")
    server = _server(options)
    from .jobs import free_name

    name = free_name(options.name or config.name, server.jobs())
    nodes = server.nodes()
    with contextlib.chdir(folder):
        plan = plan_for(config, nodes)
    _show_plan(plan, server.url, progress)
    with tempfile.TemporaryDirectory(prefix="burnish-submit-") as temporary:
        staged, package = Path(temporary, "files"), Path(temporary, "package")
        staged.mkdir()
        total = stage(config, folder, staged)
        modules = stage_package(package)
        checked = None if options.no_preflight else _preflight(server, name, staged, modules, progress)
        is_shipped = checked is None or checked["ship"]
        metadata = {"burnish": version("burnish"), "run": config.name, "run_dir": f"{config.runs_dir}/{config.name}"}
        job = server.submit(
            name,
            f"{ENTRYPOINT} train",
            folder=str(staged),
            modules=modules if is_shipped else [],
            metadata=metadata,
        )
    travelled = f"config, {size(total)} of files" + (", burnish" if is_shipped else "") + f" to {server.url}"
    _line(progress, "sent", travelled)
    value = {"job": job, "address": server.url, **metadata, "preflight": checked}
    if options.follow:
        print(file=progress, flush=True)
        return _followed(server, job, progress, value)
    commands = [f"{program()} {verb} --address {server.url}" for verb in (f"logs {job} -f", f"status {job}")]
    lines = [f"job {job} is queued; next:", *(f"  {line}" for line in commands)]
    return Answer(value, "\n".join(["", *lines, f"  {program()} stop {job} --address {server.url}"]))


def jobs(options: argparse.Namespace, _progress: TextIO) -> Answer:
    """The jobs that the cluster remembers."""
    found = _server(options).jobs()
    rows = [("JOB", "STATUS", "STARTED", "TOOK", "RUN")]
    rows += [(job.id, job.status, _clock(job.start), _took(job), job.metadata.get("run_dir", "")) for job in found]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return Answer([asdict(job) for job in found], "\n".join(lines) if found else "no jobs have been submitted")


def status(options: argparse.Namespace, _progress: TextIO) -> Answer:
    """One job, and the last lines that it printed."""
    server = _server(options)
    job = server.job(options.job)
    last = [line for line in server.logs(job.id).splitlines() if line.strip()][-LAST_LINES:]
    lines = [f"{job.id}  {job.status}", f"  {'started':<10}{_clock(job.start)}, {_took(job)}"]
    lines += [f"  {'on':<10}{job.node}"] if job.node else []
    lines += [f"  {'run':<10}{job.metadata['run_dir']}"] if "run_dir" in job.metadata else []
    lines += [f"  {'exit code':<10}{job.exit_code}"] if job.exit_code is not None else []
    lines += [f"  {'said' if number == 0 else '':<10}{line.strip()}" for number, line in enumerate(last)]
    return Answer(asdict(job) | {"last_lines": last}, "\n".join(lines))


def logs(options: argparse.Namespace, progress: TextIO) -> Answer:
    """What a job prints; with -f until it ends, and then with its exit code."""
    server = _server(options)
    if options.follow:
        return _followed(server, server.job(options.job).id, progress, {"job": options.job})
    text = server.logs(options.job)
    return Answer({"job": options.job, "logs": text}, text.rstrip("\n"))


def stop(options: argparse.Namespace, progress: TextIO) -> Answer:
    """Asks a job to write a checkpoint and end, and waits until it has."""
    server = _server(options)
    before = server.job(options.job)
    if before.has_ended:
        return Answer(asdict(before), f"{before.id} has ended already: {before.status}")
    _line(progress, "stopping", f"{before.id}; a run writes a checkpoint first")
    job = server.stop(before.id)
    again = "; submit the same config again to go on from its newest checkpoint" if "run" in job.metadata else ""
    return Answer(asdict(job), f"{job.id}: {job.status}{again}")


def _server(options: argparse.Namespace) -> "Server":
    # Ray reads the mode when it is imported, and without one keeps the token to itself.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    from .jobs import connect

    return connect(options.address)


def on_cluster(config: Config) -> Config:
    """The config of a run inside a cluster: Ray there is joined; one process becomes one worker."""
    if config.launch.type == "inline":
        return with_values(config, {"launch": {"type": "ray", "address": "auto"}})
    return with_values(config, {"launch.address": "auto"})


def plan_for(config: Config, nodes: Sequence["Node"]) -> Plan:
    """The plan of the run on these nodes. Raises InfeasibleError if its workers, or their memory, find no room."""
    assert isinstance(config.launch, Ray), config.launch
    if not nodes:
        raise InfeasibleError("the cluster has no node that is alive; start one with ray start --address=HEAD:6379")
    resources = of_nodes([node.resources for node in nodes])
    use_gpu = resources.device == "cuda" and config.launch.use_gpu is not False
    check_room(config.launch, nodes, worker_resources(config.launch, "cuda" if use_gpu else "cpu"))
    return planned(config, resources).plan


def check_room(launch: Ray, nodes: Sequence["Node"], wanted: Mapping[str, float]) -> None:
    """Raises InfeasibleError, saying have and need, if the nodes together never have room for the fewest workers.

    A worker lies on one node, so what is left over on each does not add up.
    """
    room = sum(
        min(math.floor(node.resources.get(name, 0.0) / amount + 1e-9) for name, amount in wanted.items())
        for node in nodes
    )
    if room >= launch.min_workers:
        return
    each = ", ".join(f"{_amount(name, amount)}" for name, amount in wanted.items())
    has = "; ".join(
        f"{node.address} has {', '.join(_amount(name, node.resources.get(name, 0.0)) for name in wanted)}"
        for node in nodes[:8]
    )
    more = f"; and {len(nodes) - 8} more nodes" if len(nodes) > 8 else ""
    raise InfeasibleError(
        f"launch.num_workers={launch.min_workers} at {each} each: the cluster has room for {room} ({has}{more}); lower "
        "launch.num_workers or launch.resources_per_worker, or add nodes"
    )


def _amount(name: str, amount: float) -> str:
    return f"{size(amount)} memory" if name == "memory" else f"{amount:g} {name}"


def _show_plan(plan: Plan, url: str, progress: TextIO) -> None:
    from .progress import Progress

    plan = replace(plan, config=with_values(plan.config, {"launch.address": url}))

    display = Progress(progress)
    display.report({"event": "plan", "plan": plan})
    display.close()


def _preflight(server: "Server", name: str, staged: Path, modules: list[str], progress: TextIO) -> dict[str, Any]:
    """Runs the pre-flight as a job of its own.

    Raises InfeasibleError if a check fails, TrainingError if there is no result.
    """
    from .jobs import free_name
    from .preflight import render

    _line(progress, "pre-flight", "versions, files, storage, ports and an all-reduce, on the nodes")
    job = server.submit(
        free_name(f"{name}-preflight", server.jobs()),
        f"{ENTRYPOINT} preflight",
        folder=str(staged),
        modules=modules,
        metadata={"preflight_of": name},
    )
    try:
        ended = server.wait(job, timeout_s=PREFLIGHT_TIMEOUT_S)
    except KeyboardInterrupt:
        server.client.stop_job(job)
        raise Interrupted(f"interrupted; {job} is being stopped and nothing was queued") from None
    text = server.logs(job)
    found = [line.removeprefix(RESULT) for line in text.splitlines() if line.startswith(RESULT)]
    if not ended.has_ended:
        server.client.stop_job(job)
    if not found:
        raise TrainingError(
            f"the pre-flight gave no result ({_last(text) or ended.message or ended.status}); see burnish logs {job}"
        )
    result: dict[str, Any] = json.loads(found[-1])
    print(render(result), file=progress, flush=True)
    if not result["ok"]:
        failed = [check for check in result["checks"] if check["state"] == "failed"]
        sentences = "; ".join(f"{check['name']}: {check['detail']}" for check in failed)
        raise InfeasibleError(f"the cluster is not fit for the run, and nothing was queued: {sentences}")
    return result


def _followed(server: "Server", job: str, progress: TextIO, value: dict[str, Any]) -> Answer:
    """The job's output as it comes, then its end; the exit code is the job's."""

    def write(text: str) -> None:
        progress.write(text)
        progress.flush()

    try:
        ended = server.follow(job, write)
    except KeyboardInterrupt:
        how = f"{program()} logs {job} -f --address {server.url}"
        raise Interrupted(f"no longer following; job {job} goes on: {how}") from None
    return Answer(value | asdict(ended), f"job {job}: {ended.status}", exit_code=ended.final_code)


def _manifest(config: Config, settings: Sequence[str]) -> Answer:
    """A RayJob for KubeRay, planned for pods as they are asked for; no cluster is spoken to."""
    from .manifest import ManifestOptions, manifest

    options = manifest_options(ManifestOptions, settings)
    assert isinstance(config.launch, Ray), config.launch
    most, gpus = config.launch.max_workers, options.gpus_per_node
    if config.launch.use_gpu is True and not gpus:
        raise ConfigError("launch.use_gpu is true and --manifest gpus_per_node=0; give the GPUs of a pod")
    use_gpu = gpus > 0 and config.launch.use_gpu is not False
    need = worker_resources(config.launch, "cuda" if use_gpu else "cpu")["GPU" if use_gpu else "CPU"] * most
    # As much as the workers ask for: Kubernetes decides what there is.
    resources = Resources(
        host_memory_bytes=options.node_memory_bytes or UNLIMITED_BYTES,
        device="cuda" if use_gpu else "cpu",
        num_devices=math.ceil(need) if use_gpu else 0,
        num_cpus=most if use_gpu else math.ceil(need),
        num_nodes=max(1, math.ceil(need / gpus)) if use_gpu else most,
    )
    found = planned(config, resources)
    if found.choice is not None and options.memory_per_worker_bytes is None:
        predicted = found.choice.prediction
        host = predicted.host_bytes if use_gpu else predicted.peak_bytes
        options = replace(options, memory_per_worker_bytes=host)
    text = manifest(config, found.plan, options)
    return Answer({"manifest": text}, text.rstrip("\n"))


def manifest_options(kind: Any, settings: Sequence[str]) -> Any:
    """FIELD=VALUE … as the options of a manifest. Raises ConfigError for an unknown field or an impossible value."""
    known = {field.name: field for field in fields(kind)}
    values: dict[str, Any] = {}
    for setting in settings:
        name, sign, text = setting.partition("=")
        if name not in known or not sign:
            close = get_close_matches(name, known, n=1)
            hint = (
                f"did you mean {close[0]}=…?"
                if close
                else f"values of the config go before it; its own are {', '.join(known)}"
            )
            raise ConfigError(f"--manifest {setting}: {hint}")
        try:
            is_number = "int" in str(known[name].type)
            values[name] = (int(parse_bytes(text)) if name.endswith("_bytes") else int(text)) if is_number else text
        except ValueError:
            wanted = "a size such as 64GiB" if name.endswith("_bytes") else "a whole number"
            raise ConfigError(f"--manifest {setting}: give {wanted}") from None
    for name in ("image", "claim"):
        if name not in values:
            raise ConfigError(f"--manifest needs image=… and claim=…: {name} is missing")
    return kind(**values)


def _line(progress: TextIO, name: str, text: str) -> None:
    print(f"  {name:<12}{text}", file=progress, flush=True)


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("burnish: error: ") if lines else ""


def _clock(when: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)) if when else "-"


def _took(job: "Job") -> str:
    return duration((job.end or time.time()) - job.start) if job.start else "-"
