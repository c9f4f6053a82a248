"""The RayJob for KubeRay: known fields of the right types alone, names Kubernetes takes, hostile text kept as it is."""

import subprocess
from dataclasses import replace
from importlib.metadata import version

import pytest
import yaml
from burnish.harness.config import Config
from burnish.harness.config_io import load_config
from burnish.harness.errors import ConfigError
from burnish.harness.plan import Resources, make_plan
from burnish.launch.manifest import MAX_NAME, ManifestOptions, job_name, manifest
from hypothesis import given, settings
from hypothesis import strategies as st

BASE = {
    "name": "My_Run.1",
    "model": {"path": "some/model"},
    "task": {"type": "causal_lm"},
    "data": {"train": "rows.jsonl"},
    "adapter": {"method": "lora"},
    "train": {"max_steps": 10, "global_batch_size": 16},
    "launch": {"type": "ray", "num_workers": 16},
}
GPU = Resources("cuda", 16, 128, 2**39, device_memory_bytes=2**36, num_nodes=2)
CPU = Resources("cpu", 0, 64, 2**38)
OPTIONS = ManifestOptions("registry.example/burnish:1.0", "shared-claim", memory_per_worker_bytes=2**33)

TEXTS = {"*": str}
CONTAINER = {
    "name": str,
    "image": str,
    "workingDir": str,
    "env": [{"name": str, "value": str}],
    "resources": {"requests": TEXTS, "limits": TEXTS},
    "securityContext": {"allowPrivilegeEscalation": bool, "capabilities": {"drop": [str]}},
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
}
POD = {
    "restartPolicy": str,
    "automountServiceAccountToken": bool,
    "terminationGracePeriodSeconds": int,
    "serviceAccountName": str,
    "priorityClassName": str,
    "securityContext": {
        **{"runAsNonRoot": bool, "runAsUser": int, "runAsGroup": int, "fsGroup": int, "fsGroupChangePolicy": str},
        "seccompProfile": {"type": str},
    },
    "volumes": [
        {
            "name": str,
            "persistentVolumeClaim": {"claimName": str},
            "emptyDir": {"medium": str, "sizeLimit": str},
            "configMap": {"name": str},
            "secret": {"secretName": str, "defaultMode": int},
        }
    ],
    "containers": [CONTAINER],
}
GROUP = {"rayStartParams": TEXTS, "template": {"spec": POD}}
RAY_JOB = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "namespace": str, "labels": TEXTS},
    "spec": {
        **{"submissionMode": str, "entrypoint": str, "shutdownAfterJobFinishes": bool, "backoffLimit": int},
        **dict.fromkeys(("activeDeadlineSeconds", "preRunningDeadlineSeconds", "ttlSecondsAfterFinished"), int),
        "rayClusterSpec": {
            "rayVersion": str,
            "enableInTreeAutoscaling": bool,
            "authOptions": {"mode": str},
            "headGroupSpec": GROUP,
            "workerGroupSpecs": [
                GROUP | {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int},
            ],
        },
    },
}
"""The fields of KubeRay's RayJob and of a pod that burnish may use, with their types; `*` stands for any key."""


def mistakes(value, schema, where=""):
    """Fields that the schema does not know, and values of another type."""
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{where}: {value!r} is no {schema.__name__}"]
    if isinstance(schema, list):
        items = enumerate(value) if isinstance(value, list) else ()
        return [one for i, item in items for one in mistakes(item, schema[0], f"{where}.{i}")] if value else [where]
    found = []
    for key, child in value.items() if isinstance(value, dict) else [("", value)]:
        known = schema.get(key, schema.get("*"))
        found += mistakes(child, known, f"{where}.{key}") if known else [f"{where}.{key}: unknown"]
    return found


def made(resources=GPU, options=OPTIONS, **sections):
    """(ConfigMap, RayJob) as Kubernetes reads them."""
    config = Config.model_validate(BASE | sections)
    plan = make_plan(config, resources, run_dir="runs/x", cwd=".")
    return tuple(yaml.safe_load_all(manifest(config, plan, options)))


def cluster_of(job):
    return job["spec"]["rayClusterSpec"]


def containers(job):
    [workers] = cluster_of(job)["workerGroupSpecs"]
    return [part["template"]["spec"]["containers"][0] for part in (cluster_of(job)["headGroupSpec"], workers)]


def test_the_schema_of_this_test_finds_unknown_fields_and_wrong_types():
    _, job = made()
    assert mistakes(job, RAY_JOB) == []
    job["spec"]["backofLimit"] = 3
    cluster_of(job)["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    containers(job)[1]["env"][0]["valueFrom"] = {}
    job["spec"]["ttlSecondsAfterFinished"] = True
    assert len(mistakes(job, RAY_JOB)) == 4


def test_the_job_is_what_kuberay_takes():
    about = {"secret": "hub", "service_account": "runner", "queue": "team-a", "priority_class": "high"}
    config_map, job = made(options=replace(OPTIONS, **about))
    assert mistakes(job, RAY_JOB) == []
    assert (job["apiVersion"], job["kind"], config_map["kind"]) == ("ray.io/v1", "RayJob", "ConfigMap")
    assert job["metadata"] == {
        **{"name": "my-run-1", "namespace": "default"},
        "labels": {"kueue.x-k8s.io/queue-name": "team-a"},
    }
    spec, cluster = job["spec"], cluster_of(job)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == version("ray")
    assert spec["backoffLimit"] == 3
    assert spec["shutdownAfterJobFinishes"]
    for container in containers(job):
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert {"/mnt/shared", "/dev/shm", "/etc/burnish", "/etc/burnish-secret"} == mounts.keys()
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]
        assert {"name": "RAY_USAGE_STATS_REPORT_URL", "value": "http://127.0.0.1:9"} in container["env"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]


def test_workers_get_what_the_plan_says():
    """16 workers with 8 threads each, 8 GPUs a pod: two pods; 8 * 1.15 * (8 GiB + 550 MiB) + 2.4 GB of Ray + 9.25."""
    _, job = made()
    [workers] = cluster_of(job)["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (2, 2, 2)
    assert not cluster_of(job)["enableInTreeAutoscaling"]
    resources = containers(job)[1]["resources"]
    assert resources["limits"] == resources["requests"]
    assert resources["limits"]["nvidia.com/gpu"] == "8"
    assert resources["limits"]["cpu"] == "64"
    assert int(resources["limits"]["memory"].removesuffix("Mi")) == -(-8 * (8192 + 550) * 115 // 100) + 2400 + 9472
    assert workers["rayStartParams"]["num-cpus"] == "8"
    assert "nvidia.com/gpu" not in containers(job)[0]["resources"]["limits"]


def test_a_pod_without_gpus_has_one_worker_and_no_more():
    launch = {"type": "ray", "num_workers": 4, "resources_per_worker": {"CPU": 2}}
    config_map, job = made(CPU, launch=launch)
    [workers] = cluster_of(job)["workerGroupSpecs"]
    assert workers["replicas"] == 4
    assert workers["rayStartParams"]["num-cpus"] == "2"
    assert containers(job)[1]["resources"]["limits"]["cpu"] == "16"
    assert yaml.safe_load(config_map["data"]["config.yaml"])["train"]["num_threads"] == 16


def test_an_elastic_range_is_the_range_of_pods():
    _, job = made(launch={"type": "ray", "num_workers": [8, 16]})
    [workers] = cluster_of(job)["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (1, 1, 2)
    assert cluster_of(job)["enableInTreeAutoscaling"]
    assert cluster_of(job)["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"]
    with pytest.raises(ConfigError, match="Kueue"):
        made(options=replace(OPTIONS, queue="a"), launch={"type": "ray", "num_workers": [8, 16]})


@pytest.mark.parametrize(
    ("changes", "sections", "words"),
    [
        ({"image": ""}, {}, "needs an image"),
        ({"claim": ""}, {}, "shared volume"),
        ({}, {"launch": {"type": "inline"}}, "launch.type=ray"),
        ({}, {"runs_dir": "/scratch/runs"}, "not on the shared volume"),
        ({}, {"runs_dir": "../runs"}, "not on the shared volume"),
        ({"memory_per_worker_bytes": None}, {}, "node_memory_bytes"),
        ({"gpus_per_node": 0}, {}, "at least 1"),
        ({"name": "My_Run"}, {}, "such as my-run"),
        ({"name": "a" * (MAX_NAME + 1)}, {}, "none that Kubernetes takes"),
        ({"namespace": "a.b"}, {}, "namespace"),
        ({"secret": "hf_abcdef=="}, {}, "not its value"),
        ({"mount_path": "shared"}, {}, "mount path"),
        ({"mount_path": "/etc/shared"}, {}, "image needs that folder"),
        ({"mount_path": "/mnt/../etc"}, {}, "mount path"),
        ({"user": 0}, {}, "user=0"),
        ({"image": "a b"}, {}, "image"),
        ({"queue": "a\n"}, {}, "queue"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(changes, sections, words):
    with pytest.raises(ConfigError, match=words):
        made(options=replace(OPTIONS, **changes), **sections)


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True)


@settings(max_examples=50, deadline=None)
@given(name=names)
def test_every_name_of_a_run_becomes_a_name_of_a_job(name):
    assert job_name(name) == job_name(job_name(name))
    made(options=replace(OPTIONS, name=job_name(name)), name=name)


lines = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=40)
blocks = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)
HOSTILE = ["$(HOME)", "a: b", "- x", "{{ .Values }}", "---", "'\"", "`id`; $(id) && id", "#", "on", "é😀", "%", "*a"]


@settings(max_examples=40, deadline=None)
@given(path=lines.filter(str.strip) | st.sampled_from(HOSTILE), prompt=blocks | st.sampled_from(HOSTILE))
def test_hostile_text_arrives_as_it_was_and_reaches_no_shell(tmp_path_factory, path, prompt):
    sections = {"model": {"path": path}, "generation": {"prompts": [prompt]}}
    config_map, job = made(**sections)
    assert mistakes(job, RAY_JOB) == []
    assert job["spec"]["entrypoint"] == "sh /etc/burnish/start.sh burnish train /etc/burnish/config.yaml"
    file = tmp_path_factory.mktemp("hostile") / "config.yaml"
    file.write_bytes(config_map["data"]["config.yaml"].encode())
    inside = load_config([str(file)])
    assert (inside.model.path, inside.generation.prompts) == (path, [prompt])
    assert (inside.launch.address, inside.runs_dir) == ("auto", "/mnt/shared/runs")


def test_kubernetes_expands_nothing_in_the_place_of_the_run():
    _, job = made(runs_dir="a $(HOME)")
    assert {"name": "BURNISH_RUN", "value": "/mnt/shared/a $$(HOME)/My_Run.1"} in containers(job)[0]["env"]


@pytest.mark.parametrize("is_there", [False, True])
def test_the_script_goes_on_with_a_run_that_is_there(tmp_path, is_there):
    config_map, _ = made()
    (tmp_path / "start.sh").write_text(config_map["data"]["start.sh"])
    run = tmp_path / "a $(run)"
    run.mkdir()
    if is_there:
        (run / "config.yaml").touch()
    command = ["sh", str(tmp_path / "start.sh"), "printf", "[%s]", "train", "a b"]
    done = subprocess.run(command, env={"BURNISH_RUN": str(run)}, capture_output=True, text=True, check=True)
    assert done.stdout == "[train][a b]" + ("[--resume]" if is_there else "")
