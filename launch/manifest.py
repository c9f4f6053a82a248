"""A KubeRay RayJob as YAML: `manifest(config, plan, options)`. Pure; imports neither torch nor Ray.

The stream holds a ConfigMap with the run's config and the script that starts it, and the RayJob that mounts both. No
value of the config or of the options reaches a shell. Secrets are named, never contained: their files are mounted.
Field names are those of ray-operator/apis/ray/v1/rayjob_types.go and raycluster_types.go of KubeRay.
"""

import math
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import PurePosixPath
from typing import Any

from ..harness.config import Config
from ..harness.config_hardware import Ray
from ..harness.config_io import config_to_yaml, with_values
from ..harness.errors import ConfigError
from ..harness.plan import Plan
from ..harness.strict_yaml import dump_yaml

MAX_NAME = 47
"""KubeRay appends to a RayJob's name; pods and services may have 63 characters."""
MAX_CONFIG_BYTES = 1_000_000
LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
SUBDOMAIN = rf"(?=.{{1,253}}$){LABEL}(\.{LABEL})*"
LABEL_VALUE = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
IMAGE = r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,499}"
MOUNT = r"(/[A-Za-z0-9][A-Za-z0-9._-]*)+"
RESERVED = ("/dev", "/etc", "/proc", "/sys", "/tmp", "/usr", "/bin", "/lib")
CONFIG_FOLDER, SECRET_FOLDER = "/etc/burnish", "/etc/burnish-secret"
TOKEN_FILE = "hf_token"
"""The key of the Secret that is the Hugging Face token, if it has it."""
SCRIPT = """\
#!/bin/sh
# Runs the command it is given; where an earlier attempt has left the run, the command goes on with it.
umask 077
if [ -e "$BURNISH_RUN/config.yaml" ]; then
  set -- "$@" --resume
fi
exec "$@"
"""
PROCESS_BYTES = 550 * 2**20
"""What a worker takes before it holds weights, and RAY_BYTES what Ray takes on a node: see docs/memory.md."""
RAY_BYTES = 2400 * 2**20
SPARE = 0.15
OBJECT_STORE_BYTES = 256 * 2**20
"""Only plans and results go through the object store."""
SHARED_MEMORY_BYTES = 2**30
"""/dev/shm beside the object store, for a node and again for each of its workers: NCCL's buffers."""
HEALTH = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
"""Read by the head: a node that is cut off counts as lost after 8 s instead of 64."""
GRACE_S = 120
"""Between SIGTERM and SIGKILL of a pod: time for a step and a checkpoint."""

NOBODY = "http://127.0.0.1:9"
"""Where Ray sends that its statistics are off."""


@dataclass(frozen=True)
class ManifestOptions:
    """What Kubernetes needs to know and the config does not say. Bytes and GPUs are those of one pod of workers."""

    image: str
    """Has burnish and the Ray of this machine."""
    claim: str
    """PersistentVolumeClaim that every pod mounts (ReadWriteMany): runs, caches, data."""
    name: str | None = None
    """Of the RayJob; made from the run's name if left out."""
    namespace: str = "default"
    mount_path: str = "/mnt/shared"
    service_account: str | None = None
    secret: str | None = None
    """Secret whose keys become files that only the run reads; `hf_token` is the token for the hub."""
    gpus_per_node: int = 8
    memory_per_worker_bytes: int | None = None
    """Predicted host memory of a worker; needed where `node_memory_bytes` is not given."""
    node_memory_bytes: int | None = None
    head_cpus: int = 2
    head_memory_bytes: int = 8 * 2**30
    queue: str | None = None
    """Kueue's local queue."""
    priority_class: str | None = None
    retries: int = 3
    """New clusters after a failed one; each goes on from the newest checkpoint."""
    deadline_s: int = 7 * 86400
    start_deadline_s: int = 1800
    """Longest wait for pods."""
    keep_s: int = 600
    """How long the cluster stays after the end."""
    user: int = 1000
    """User and group that every container runs as; not 0."""


def manifest(config: Config, plan: Plan, options: ManifestOptions) -> str:
    """The YAML stream for `kubectl apply`. Raises ConfigError for what cannot work on Kubernetes."""
    launch = config.launch
    if not isinstance(launch, Ray):
        raise ConfigError("launch.type: a RayJob runs on Ray; set launch.type=ray and launch.num_workers")
    _check(options)
    runs_dir = _shared_runs_dir(config, options)
    name = options.name or job_name(config.name)
    # Ray counts the CPUs that workers ask for, so that each pod gets its own; threads are those of the plan.
    here = {"launch.address": "auto", "runs_dir": runs_dir, "train.num_threads": plan.num_threads}
    inside = with_values(config, here)
    files = {"config.yaml": config_to_yaml(inside), "start.sh": SCRIPT}
    if sum(len(text.encode()) for text in files.values()) > MAX_CONFIG_BYTES:
        raise ConfigError("the config is larger than a ConfigMap may be (1 MB); keep long prompts and labels in files")
    about = {"name": f"{name}-config", "namespace": options.namespace}
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": about, "data": files}
    labels = {"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {}
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "namespace": options.namespace} | ({"labels": labels} if labels else {}),
        "spec": {
            "submissionMode": "SidecarMode",
            "entrypoint": f"sh {CONFIG_FOLDER}/start.sh burnish train {CONFIG_FOLDER}/config.yaml",
            "backoffLimit": options.retries,
            "activeDeadlineSeconds": options.deadline_s,
            "preRunningDeadlineSeconds": options.start_deadline_s,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": options.keep_s,
            "rayClusterSpec": _cluster(plan, launch, options, name=name, run_dir=f"{runs_dir}/{config.name}"),
        },
    }
    return "---\n".join(dump_yaml(document) for document in (config_map, job))


def job_name(run: str) -> str:
    """A name that Kubernetes and KubeRay take, made from the name of a run."""
    name = re.sub("[^a-z0-9]+", "-", run.lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}"
    return name[:MAX_NAME].rstrip("-")


def _check(options: ManifestOptions) -> None:
    """Raises ConfigError for the first option that Kubernetes would refuse, or that nothing can run with."""
    if not options.image:
        raise ConfigError("a RayJob needs an image: give one that has burnish and the Ray of this machine")
    if not options.claim:
        raise ConfigError(
            "a RayJob needs a shared volume for runs and caches: give the name of a claim (ReadWriteMany)"
        )
    rules: tuple[tuple[str, str | None, str, str], ...] = (
        ("image", options.image, IMAGE, "an image such as registry/burnish:1.0"),
        ("name", options.name, rf"(?=.{{1,{MAX_NAME}}}$)[a-z]([-a-z0-9]*[a-z0-9])?", f"such as {job_name('My.Run')}"),
        ("namespace", options.namespace, LABEL, "up to 63 small letters, digits and dashes"),
        ("claim", options.claim, SUBDOMAIN, "the name of a PersistentVolumeClaim"),
        ("service account", options.service_account, SUBDOMAIN, "small letters, digits, dashes and dots"),
        ("secret", options.secret, SUBDOMAIN, "the name of a Secret, not its value"),
        ("queue", options.queue, LABEL_VALUE, "the name of a local queue"),
        ("priority class", options.priority_class, SUBDOMAIN, "the name of a PriorityClass"),
        ("mount path", options.mount_path, MOUNT, "an absolute path such as /mnt/shared"),
    )
    for what, value, pattern, wanted in rules:
        if value is not None and not re.fullmatch(pattern, value):
            raise ConfigError(f"{what} {value[:80]!r} is none that Kubernetes takes; give {wanted}")
    if any(PurePosixPath(options.mount_path).is_relative_to(path) for path in RESERVED):
        raise ConfigError(f"mount path {options.mount_path}: the image needs that folder itself; use /mnt/shared")
    least = {"gpus_per_node": 0, "retries": 0, "keep_s": 0}
    least |= dict.fromkeys(("head_cpus", "head_memory_bytes", "deadline_s", "start_deadline_s", "user"), 1)
    for field, low in least.items():
        if not low <= getattr(options, field) < (2**50 if field.endswith("_bytes") else 2**31):
            raise ConfigError(f"{field}={getattr(options, field)}: give a whole number from {low}")


def _shared_runs_dir(config: Config, options: ManifestOptions) -> str:
    """runs_dir on the shared volume: a relative one is placed there. Raises ConfigError for one elsewhere."""
    mount, path = PurePosixPath(options.mount_path), PurePosixPath(options.mount_path) / config.runs_dir
    if ".." in path.parts or not path.is_relative_to(mount):
        raise ConfigError(
            f"runs_dir: {config.runs_dir} is not on the shared volume, where every pod must find the run; give a "
            f"relative folder, or one below {mount}"
        )
    return str(path)


def _cluster(plan: Plan, launch: Ray, options: ManifestOptions, *, name: str, run_dir: str) -> dict[str, Any]:
    """One pod for the head, on which no worker runs, and equal pods for the workers, as many as the range asks for."""
    per_node = workers_per_node(plan, launch, options)
    low, high = (math.ceil(count / per_node) for count in (launch.min_workers, launch.max_workers))
    if low < high and options.queue:
        raise ConfigError(
            "launch.num_workers: Kueue admits no RayJob that grows and shrinks; give one number, or leave the queue out"
        )
    env = {
        "BURNISH_RUN": run_dir,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_USAGE_STATS_REPORT_URL": NOBODY,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "HF_HOME": f"{options.mount_path}/.huggingface",
    }
    env |= {"HF_TOKEN_PATH": f"{SECRET_FOLDER}/{TOKEN_FILE}"} if options.secret else {}
    has = _node(plan, launch, options, per_node)
    head_has = {"cpu": str(options.head_cpus), "memory": _mebibytes(options.head_memory_bytes)}
    head = _pod("ray-head", options, env=env | HEALTH, has=head_has, num_workers=0, name=name)
    workers = _pod("ray-worker", options, env=env, has=has, num_workers=per_node, name=name)
    # KubeRay's autoscaler, which only a range of workers needs, asks Kubernetes for pods from within the head's.
    head["spec"]["automountServiceAccountToken"] = low < high
    store = {"object-store-memory": str(OBJECT_STORE_BYTES)}
    group = {
        "groupName": "workers",
        "replicas": low,
        "minReplicas": low,
        "maxReplicas": high,
        "rayStartParams": store | {"num-cpus": str(per_node * _cpus_per_worker(launch))},
        "template": workers,
    }
    return {
        "rayVersion": metadata.version("ray"),
        "enableInTreeAutoscaling": low < high,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {"rayStartParams": store | {"num-cpus": "0"}, "template": head},
        "workerGroupSpecs": [group],
    }


def workers_per_node(plan: Plan, launch: Ray, options: ManifestOptions) -> int:
    """Workers that a pod's GPUs are enough for; one on a CPU. Raises ConfigError where they are for none."""
    if plan.device == "cpu":
        return 1
    wanted = launch.resources_per_worker.get("GPU", 1.0)
    fitting = int(options.gpus_per_node // wanted)
    if fitting < 1:
        raise ConfigError(
            f"gpus_per_node={options.gpus_per_node}: a worker takes {wanted:g} GPUs of one pod; give at least "
            f"{math.ceil(wanted)}"
        )
    return min(fitting, launch.max_workers)


def _node(plan: Plan, launch: Ray, options: ManifestOptions, per_node: int) -> dict[str, str]:
    """CPUs, memory and GPUs of a pod of workers."""
    cpus = per_node * max(_cpus_per_worker(launch), plan.num_threads)
    size = options.node_memory_bytes
    if size is None:
        if options.memory_per_worker_bytes is None:
            raise ConfigError(
                "the memory of a worker could not be predicted here; give node_memory_bytes, that of a pod of workers"
            )
        workers = per_node * math.ceil((1 + SPARE) * (options.memory_per_worker_bytes + PROCESS_BYTES))
        size = workers + RAY_BYTES + _shared_memory_bytes(per_node)
    found = {"cpu": str(cpus), "memory": _mebibytes(size)}
    if plan.device == "cuda":
        found["nvidia.com/gpu"] = str(math.ceil(per_node * launch.resources_per_worker.get("GPU", 1.0)))
    return found


def _cpus_per_worker(launch: Ray) -> int:
    """What Ray sets aside for a worker; preparing the data takes one before there are workers."""
    return math.ceil(launch.resources_per_worker.get("CPU", 1.0))


def _shared_memory_bytes(num_workers: int) -> int:
    return OBJECT_STORE_BYTES + (1 + num_workers) * SHARED_MEMORY_BYTES


def _mebibytes(num_bytes: int) -> str:
    return f"{math.ceil(num_bytes / 2**20)}Mi"


def _pod(
    container: str, options: ManifestOptions, *, env: dict[str, str], has: dict[str, str], num_workers: int, name: str
) -> dict[str, Any]:
    """A pod template of one Ray container that may do nothing but run: no root, no privileges, no token of the API."""
    shared_memory = {"medium": "Memory", "sizeLimit": _mebibytes(_shared_memory_bytes(num_workers))}
    volumes: list[dict[str, Any]] = [
        {"name": "shared", "persistentVolumeClaim": {"claimName": options.claim}},
        {"name": "shared-memory", "emptyDir": shared_memory},
        {"name": "config", "configMap": {"name": f"{name}-config"}},
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "shared", "mountPath": options.mount_path},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
    ]
    if options.secret:
        volumes.append({"name": "secret", "secret": {"secretName": options.secret, "defaultMode": 0o440}})
        mounts.append({"name": "secret", "mountPath": SECRET_FOLDER, "readOnly": True})
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": GRACE_S,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": options.user,
            "runAsGroup": options.user,
            "fsGroup": options.user,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": volumes,
        "containers": [
            {
                "name": container,
                "image": options.image,
                "workingDir": options.mount_path,
                # Kubernetes puts the value of a variable in the place of $(NAME); $$ is a dollar sign.
                "env": [{"name": key, "value": value.replace("$", "$$")} for key, value in env.items()],
                "resources": {"requests": dict(has), "limits": dict(has)},
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": mounts,
            }
        ],
    }
    if options.service_account:
        spec["serviceAccountName"] = options.service_account
    if options.priority_class:
        spec["priorityClassName"] = options.priority_class
    return {"spec": spec}
