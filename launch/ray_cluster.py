"""The Ray cluster of a run: started for it on this machine and ended with it, or one that is already there.

An embedded cluster keeps its files in a private folder with a token of its own, so that no other user of the machine
and no web page can hand it work, and nothing is left behind.
"""

import contextlib
import functools
import logging
import os
import secrets
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._raylet import Config as RayConfig  # type: ignore[attr-defined]
from ray.exceptions import RayError

from ..harness.config import Config
from ..harness.config_hardware import Ray
from ..harness.errors import ConfigError, InfeasibleError
from ..harness.plan import Resources
from .leftovers import private_folder
from .planning import of_nodes
from .processes import descendants, end
from .resources import detect

OBJECT_STORE_BYTES = 128 * 2**20
"""Only plans and results go through the object store; data goes through files."""
END_GRACE_S = 10.0
"""How long Ray's processes may take to end by themselves."""
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "600",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
}
"""Read by Ray when it starts. A dead worker is noticed in half a second, a dead head in ten seconds; workers that the
cluster has no room for end in an error."""

EMBEDDED = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # for one machine alone: every server on the loopback address
    # Three servers of metrics, which answer without a token: none. A port that there is not is what switches two off.
    "RAY_enable_metrics_collection": "0",
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}
"""Of a cluster that nothing outside this machine is to reach."""


def cluster_resources(config: Config) -> Resources:
    """This host for an embedded cluster; the sum over the nodes, connecting to it, for `launch.address`."""
    assert isinstance(config.launch, Ray), config.launch
    if config.launch.address is None:
        return detect()
    _connect(config.launch.address)
    return of_nodes([node["Resources"] for node in ray.nodes() if node["Alive"]])


@contextlib.contextmanager
def cluster(launch: Ray, resources: Resources) -> Iterator[None]:
    """A connection to the run's cluster. An embedded one is ended, and its files removed, on the way out."""
    if launch.address is not None:
        _connect(launch.address)
        try:
            yield
        finally:
            ray.shutdown()
        return
    folder = private_folder()
    before = descendants(os.getpid())
    try:
        _start(resources, folder)
        yield
    finally:
        started = [process for process in descendants(os.getpid()) if process not in before]
        ray.shutdown()
        end(started, grace_s=END_GRACE_S)
        shutil.rmtree(folder, ignore_errors=True)


def check_capacity(launch: Ray, wanted: dict[str, float]) -> None:
    """Raises InfeasibleError if the workers, each with the resources `wanted`, can never run on the cluster."""
    have = ray.cluster_resources()
    for name, amount in wanted.items():
        needed = amount * launch.min_workers
        if needed > have.get(name, 0.0):
            raise InfeasibleError(
                f"launch.num_workers={launch.min_workers} at {amount:g} {name} each needs {needed:g}, and the Ray "
                f"cluster has {have.get(name, 0.0):g}; lower launch.num_workers or launch.resources_per_worker"
            )


def _connect(address: str) -> None:
    if ray.is_initialized():
        return
    _apply(SETTINGS)
    if not is_token_auth_enabled():
        raise ConfigError(
            f"launch.address={address}: a cluster without token authentication runs the code of whoever reaches it; "
            "start its nodes with RAY_AUTH_MODE=token, and set that and RAY_AUTH_TOKEN_PATH here"
        )
    try:
        _init(address=address)
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"launch.address={address}: no connection to a Ray cluster ({reason}); check the address, and that "
            "RAY_AUTH_MODE=token and its token are set here if the cluster asks for one"
        ) from None


def _start(resources: Resources, folder: Path) -> None:
    token = folder / "token"
    with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(_token())
    # Whatever the user's environment says: nobody talks to this cluster without its token, which is not in the home.
    _apply(SETTINGS | EMBEDDED | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)})
    with _home_of_ray(folder / "home"), _on_loopback():
        _init(
            address="local",
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_devices,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            _temp_dir=str(folder / "r"),  # Ray opens it to everybody, so its parent is closed; sockets want short paths
        )


@contextlib.contextmanager
def _home_of_ray(home: Path) -> Iterator[None]:
    """Ray's processes get a home with an empty description of their cluster.

    Without one the head asks the network which cloud it runs in, with statistics off too, and there is no switch for
    it (get_cluster_config_to_report in ray/_common/usage/usage_lib.py of Ray 2.60). Workers get the user's home back.
    """
    home.mkdir(mode=0o700)
    (home / "ray_bootstrap_config.yaml").write_text("{}\n", encoding="utf-8")
    before = os.path.expanduser("~")
    os.environ["HOME"] = str(home)
    try:
        yield
    finally:
        os.environ["HOME"] = before


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """What EMBEDDED says, for this process: it has read its environment when Ray was imported."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _apply(settings: dict[str, str]) -> None:
    """For the processes that Ray starts, and for this one, which read its environment when Ray was imported."""
    os.environ.update(settings)
    RayConfig.initialize("")


def _init(**options: Any) -> None:
    """ray.init without its output and without its signal handlers, which end the process with the signal's number."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@functools.cache
def _token() -> str:
    """One for the life of this process: Ray reads it once and shows it to every later cluster too."""
    return secrets.token_hex(32)
