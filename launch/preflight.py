"""Is a cluster fit for a run, asked on its own nodes: versions, storage, files, ports, and an all-reduce.

One small actor on each node looks at what is there; the all-reduce is between actors that are placed as the workers
will be. Every wait is bounded, and what fails names the node and says what to do.
"""

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from glob import has_magic
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ..harness.config import Config
from ..harness.config_hardware import Ray
from ..harness.errors import InfeasibleError
from ..harness.markup import size
from ..harness.paths import PACKAGE
from .failures import first_line
from .probe import CONNECT_TIMEOUT_S, LIBRARIES, REDUCE_BYTES, REDUCE_TIMEOUT_S, Probe, versions
from .ray_cluster import cluster, cluster_resources
from .resources import detect, worker_resources
from .staging import local_paths, source_digest

State = Literal["ok", "failed", "skipped"]
START_TIMEOUT_S = 60
"""For an actor to start on every node: Python, and unpacking what travels with the job."""
CHECK_TIMEOUT_S = 30
PLACE_TIMEOUT_S = 20
FOLDER = ".preflight"


@dataclass(frozen=True)
class Check:
    """One question: `detail` is what was found, `advice` what to do where it failed."""

    name: str
    state: State
    detail: str
    advice: str = ""


def check_cluster(config: Config) -> dict[str, Any]:
    """Every check as JSON: {ok, ship, seconds, nodes, checks}; `ship` = burnish must travel with the run.

    Connects to launch.address. Raises ConfigError if there is no connection.
    """
    start, launch = time.monotonic(), config.launch
    assert isinstance(launch, Ray), launch
    looks: dict[str, dict[str, Any]] = {}
    with cluster(launch, detect()), _probes() as (probes, lost):
        checks = [*lost, *_on_nodes(config, probes, looks, is_staged=True)]
        checks += [_ports(probes), _all_reduce(config, launch)]
        ship = any(look["installed"] != look["digest"] for look in looks.values())
    return {
        "ok": all(check.state != "failed" for check in checks),
        "ship": ship,
        "seconds": round(time.monotonic() - start, 1),
        "nodes": sorted(probes),
        "checks": [asdict(check) for check in checks],
    }


def require(config: Config) -> None:
    """The quick checks, over a connection that is there: versions, files and storage of every node.

    Raises InfeasibleError, a line for each that fails.
    """
    with _probes() as (probes, lost):
        checks = [*lost, *_on_nodes(config, probes, {}, is_staged=False)]
    failed = [check for check in checks if check.state == "failed"]
    if failed:
        raise InfeasibleError("\n".join(f"{check.name}: {check.detail}; {check.advice}" for check in failed))


def render(result: dict[str, Any]) -> str:
    """The checks as lines."""
    marks = {"ok": "ok", "failed": "FAILED", "skipped": "--"}
    lines = []
    for check in result["checks"]:
        lines.append(f"  {marks[check['state']]:<8}{check['name']:<12}{check['detail']}")
        if check["state"] == "failed":
            lines.append(f"  {'':<20}{check['advice']}")
    return "\n".join(lines)


@contextmanager
def _probes() -> Iterator[tuple[dict[str, Any], list[Check]]]:
    """An actor on the nodes of workers and driver, by address, and a failed check for nodes where none starts."""
    own = ray.get_runtime_context().get_node_id()
    alive = [node for node in ray.nodes() if node["Alive"] and (_can_work(node) or node["NodeID"] == own)]
    nodes = {node["NodeManagerAddress"]: node["NodeID"] for node in alive}
    kind: Any = ray.remote(num_cpus=0, max_restarts=0)(Probe)
    actors = {
        address: kind.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for address, node in nodes.items()
    }
    try:
        found = _asked(actors, lambda actor, _: actor.free.remote("/"), timeout_s=START_TIMEOUT_S)
        silent = sorted(actors.keys() - {address for address, answer in found.items() if not _is_error(answer)})
        advice = "look at its raylet.out and runtime_env_setup-*.log below Ray's folder on that node"
        detail = f"{', '.join(silent)}: no worker starts within {START_TIMEOUT_S} s"
        yield (
            {address: actor for address, actor in actors.items() if address not in silent},
            [Check("workers", "failed", detail, advice)] if silent else [],
        )
    finally:
        for actor in actors.values():
            ray.kill(actor)


def _on_nodes(
    config: Config, probes: dict[str, Any], looks: dict[str, dict[str, Any]], *, is_staged: bool
) -> list[Check]:
    """What every node has; fills `looks`. What `is_staged` is not on shared storage yet, so it is not looked for."""
    local = [path for path in local_paths(config, Path.cwd()) if not (is_staged and path.travels)]
    paths = [(path.key, os.path.abspath(path.path)) for path in local if not has_magic(path.path)]
    packages = sorted(set(_packages(config)))
    found = _asked(probes, lambda probe, _: probe.look.remote(packages, paths), timeout_s=CHECK_TIMEOUT_S)
    looks |= {address: answer for address, answer in found.items() if not _is_error(answer)}
    if broken := [f"{address}: {first_line(found[address])}" for address in sorted(found.keys() - looks.keys())]:
        advice = "look at the worker-*.err of Ray's logs on that node"
        return [Check("versions", "failed", "; ".join(broken), advice)]
    return [_same_versions(looks), _all_there(looks, num_wanted=len(packages) + len(paths)), _storage(config, probes)]


def _same_versions(looks: dict[str, dict[str, Any]]) -> Check:
    """All nodes against this one, which is the driver's."""
    own = versions() | {"burnish": source_digest()}
    different = []
    for address, look in sorted(looks.items()):
        theirs = look["versions"] | {"burnish": look["digest"]}
        odd = [f"{name} {theirs[name]} (driver: {own[name]})" for name in own if theirs[name] != own[name]]
        different += [f"{address} has {', '.join(odd)}"] if odd else []
    if different:
        advice = "install the same versions on every node, best by one image or constraints.txt"
        return Check("versions", "failed", "; ".join(different), advice)
    shown = ", ".join(f"{name} {own[name]}" for name in ("python", *LIBRARIES))
    return Check("versions", "ok", f"equal on {_counted(looks)}: {shown}")


def _all_there(looks: dict[str, dict[str, Any]], *, num_wanted: int) -> Check:
    lacking = sorted((address, look["missing"]) for address, look in looks.items() if look["missing"])
    missing = [f"{address} lacks {', '.join(names)}" for address, names in lacking]
    if missing:
        advice = "put files on storage that every node sees, and install packages on every node"
        return Check("files", "failed", "; ".join(missing), advice)
    return Check("files", "ok", f"{num_wanted} paths and packages of the config are on {_counted(looks)}")


def _storage(config: Config, probes: dict[str, Any]) -> Check:
    """Every node writes a file below runs_dir, and every node must then see all of them."""
    folder = f"{config.runs_dir}/{FOLDER}/{secrets.token_hex(8)}"
    names = {address: f"{number}" for number, address in enumerate(sorted(probes))}
    nonces = {name: secrets.token_hex(16) for name in names.values()}
    write = _asked(
        probes,
        lambda probe, address: probe.write.remote(folder, names[address], nonces[names[address]]),
        timeout_s=CHECK_TIMEOUT_S,
    )
    try:
        refused = {address: str(answer) for address, answer in write.items() if answer}
        if refused:
            told = "; ".join(f"{address}: {reason}" for address, reason in sorted(refused.items()))
            advice = "make it writable there for the user that Ray runs as, or set runs_dir"
            return Check("storage", "failed", f"runs_dir={config.runs_dir} cannot be written ({told})", advice)
        read = _asked(probes, lambda probe, _: probe.read.remote(folder, nonces), timeout_s=CHECK_TIMEOUT_S)
        blind = [address for address, answer in sorted(read.items()) if answer]
        if blind:
            detail = f"{', '.join(blind)} cannot see in runs_dir={config.runs_dir} what the other nodes write there"
            return Check(
                "storage", "failed", detail, "mount the same storage at that path on every node, or set runs_dir"
            )
        free = ray.get(next(iter(probes.values())).free.remote(folder), timeout=CHECK_TIMEOUT_S) if probes else 0
        return Check("storage", "ok", f"{config.runs_dir} is one place on {_counted(probes)}, {size(free)} free")
    except (RayError, GetTimeoutError) as error:
        return Check("storage", "failed", f"runs_dir={config.runs_dir}: {first_line(error)}", "look at that storage")
    finally:
        _asked(probes, lambda probe, _: probe.clear.remote(folder), timeout_s=CHECK_TIMEOUT_S)


def _ports(probes: dict[str, Any]) -> Check:
    """Each node connects to a port that the others have opened: to all of a few, to its two successors among many."""
    addresses = sorted(probes)
    if len(addresses) < 2:
        return Check("ports", "skipped", "one node")
    opened = _asked(probes, lambda probe, address: probe.listen.remote(address), timeout_s=CHECK_TIMEOUT_S)
    ports = {address: port for address, port in opened.items() if isinstance(port, int)}
    silent = [f"{address} opens no port" for address in addresses if address not in ports]
    reach = len(addresses) - 1 if len(addresses) <= 8 else 2

    def connect(probe: Any, address: str) -> Any:
        start = addresses.index(address)
        others = [addresses[(start + step) % len(addresses)] for step in range(1, reach + 1)]
        return probe.connect.remote([(other, ports[other]) for other in others if other in ports])

    found = _asked(probes, connect, timeout_s=CHECK_TIMEOUT_S)
    for address, answer in sorted(found.items()):
        if _is_error(answer):
            silent.append(f"{address} does not answer")
        elif answer:
            silent.append(f"{address} does not reach {', '.join(answer)}")
    if silent:
        return Check(
            "ports", "failed", "; ".join(silent), "open the ports between the nodes: training uses any of them"
        )
    return Check("ports", "ok", f"{_counted(addresses)} reach each other on ports that were free")


def _all_reduce(config: Config, launch: Ray) -> Check:
    """A sum over as many processes as the run has workers at least, each with a worker's resources."""
    count = launch.min_workers
    if count < 2:
        return Check("all-reduce", "skipped", "one worker")
    has_gpu = launch.use_gpu is not False and cluster_resources(config).device == "cuda"
    backend, wanted = "nccl" if has_gpu else "gloo", worker_resources(launch, "cuda" if has_gpu else "cpu")
    group = placement_group([wanted] * count, strategy="PACK")
    actors = []
    try:
        if not group.wait(PLACE_TIMEOUT_S):
            return Check("all-reduce", "skipped", f"{count} workers have no room at the moment: the cluster is in use")
        options: dict[str, Any] = {
            "num_cpus": wanted.get("CPU", 0),
            "num_gpus": wanted.get("GPU", 0),
            "max_restarts": 0,
        }
        kind: Any = ray.remote(**options)(Probe)
        actors = [
            kind.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank)).remote()
            for rank in range(count)
        ]
        meeting = ray.get(actors[0].meeting.remote(), timeout=START_TIMEOUT_S)
        running = [actor.reduce.remote(backend, rank, count, meeting) for rank, actor in enumerate(actors)]
        speed = min(ray.get(running, timeout=REDUCE_TIMEOUT_S))
        detail = f"{count} workers, {backend}: {speed / 1e6:,.0f} MB/s each way ({size(REDUCE_BYTES[backend])} tensor)"
        return Check("all-reduce", "ok", detail)
    except (RayError, GetTimeoutError) as error:
        variable = "NCCL_SOCKET_IFNAME" if has_gpu else "GLOO_SOCKET_IFNAME"
        where = ", ".join(sorted(_places(actors))) or "no node"
        advice = f"check the network between them; {variable} names the interface to use where a node has several"
        return Check("all-reduce", "failed", f"{count} workers on {where}, {backend}: {first_line(error)}", advice)
    finally:
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(group)


def _places(actors: list[Any]) -> set[str]:
    """Addresses of the nodes that the actors are on, of those that say so."""
    asked = [actor.meeting.remote() for actor in actors]
    ready, _ = ray.wait(asked, num_returns=len(asked), timeout=CONNECT_TIMEOUT_S) if asked else ([], [])
    found = set()
    for reference in ready:
        try:
            found.add(ray.get(reference)[0])
        except RayError:
            continue
    return found


def _asked(probes: dict[str, Any], ask: Callable[..., Any], *, timeout_s: float) -> dict[str, Any]:
    """Each node's answer, or the error in its place; what has not answered in time is a TimeoutError."""
    asked = {address: ask(probe, address) for address, probe in probes.items()}
    pending = list(asked.values())
    ready, _ = ray.wait(pending, num_returns=len(pending), timeout=timeout_s) if pending else ([], [])
    answers: dict[str, Any] = {}
    for address, reference in asked.items():
        try:
            answers[address] = ray.get(reference) if reference in ready else TimeoutError(f"no answer in {timeout_s} s")
        except RayError as error:
            answers[address] = error
    return answers


def _is_error(answer: Any) -> bool:
    return isinstance(answer, BaseException)


def _can_work(node: dict[str, Any]) -> bool:
    return any(node["Resources"].get(name) for name in ("CPU", "GPU"))


def _packages(config: Config) -> Iterator[str]:
    """Packages that the config names files of."""
    paths = [config.model.path, config.model.tokenizer]
    paths += [source.path for split in ("train", "validation", "test") for source in getattr(config.data, split) or []]
    yield from (path.removeprefix(PACKAGE).partition("/")[0] for path in paths if path and path.startswith(PACKAGE))


def _counted(nodes: Any) -> str:
    return f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}"
