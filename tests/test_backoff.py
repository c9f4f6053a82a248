"""Runs that find no memory: what counts as that, what is given up, equal results, and the end with nothing left."""

import errno
import gc
import io
import json
import random
import subprocess
import sys

import pytest
import tiny
import torch
from burnish.harness import backoff, faults
from burnish.harness.config_io import load_config
from burnish.harness.errors import ConfigError, Interrupted, OutOfMemory
from burnish.harness.plan import Resources, make_plan
from burnish.harness.run_dir import RunDir
from burnish.launch import attempts, training
from burnish.launch.progress import Progress
from tiny import losses

GIB = 2**30
CPU_ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:125] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "123456 bytes. Error code 12 (Cannot allocate memory)"
)
POOL = "can't allocate memory: you tried to allocate 3145728 bytes"
GPU_ALLOCATOR = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 139.81 GiB"
NO_MEMORY = {
    "the CPU's allocator": RuntimeError(CPU_ALLOCATOR),
    "burnish's allocator": RuntimeError(POOL),
    "a GPU's allocator": torch.OutOfMemoryError(GPU_ALLOCATOR),
    "CUDA": RuntimeError("CUDA error: out of memory"),
    "a library of CUDA": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "Python": MemoryError(),
    "C++": RuntimeError("std::bad_alloc"),
    "the kernel": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "a mapped file": RuntimeError("unable to mmap 123 bytes from file <x>: Cannot allocate memory (12)"),
    "a worker": OutOfMemory("out of memory"),
}
OTHERS = {
    "Ctrl-C": KeyboardInterrupt(),
    "the user's exit": SystemExit("out of memory"),
    "a user's mistake": ConfigError("memory.budget: out of memory"),
    "a GPU's shared memory": RuntimeError("out of resource: shared memory, Required: 264192, Hardware limit: 232448"),
    "a connection": RuntimeError("connection reset by peer"),
    "a full disk": OSError(errno.ENOSPC, "No space left on device"),
    "our own": AssertionError("out of memory"),
}
CPU = Resources(device="cpu", num_devices=0, num_cpus=2, host_memory_bytes=16 * GIB)
GPU = Resources(device="cuda", num_devices=1, num_cpus=8, host_memory_bytes=64 * GIB, device_memory_bytes=24 * GIB)


@pytest.mark.parametrize("error", NO_MEMORY.values(), ids=NO_MEMORY)
def test_who_finds_no_memory_is_understood(error):
    assert backoff.found_no_memory(error)


@pytest.mark.parametrize("error", OTHERS.values(), ids=OTHERS)
def test_other_errors_are_not_taken_for_it(error):
    assert not backoff.found_no_memory(error)


def test_an_error_that_came_of_it_counts_and_one_that_came_meanwhile_does_not():
    of_it, meanwhile = RuntimeError("the step failed"), RuntimeError("the step failed")
    of_it.__cause__, meanwhile.__context__ = MemoryError(), MemoryError()
    assert backoff.found_no_memory(of_it)
    assert not backoff.found_no_memory(meanwhile)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [(CPU_ALLOCATOR, 123456), (POOL, 3 * 2**20), (GPU_ALLOCATOR, 2.5 * GIB), ("bad_alloc", 0)],
)
def test_the_error_says_where_it_was_and_how_much_was_wanted(text, wanted):
    found = backoff.explained(RuntimeError(text), phase="step", step=3)
    assert (found.wanted_bytes, found.step, found.phase) == (wanted, 3, "step")
    assert "out of memory in step 4" in str(found)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """One model for all runs: the planner profiles it once."""
    return tmp_path_factory.mktemp("model")


@pytest.fixture
def config_of(model_folder, tmp_path):
    """Overrides and changes of the tiny config -> a config whose runs lie in this test's folder."""

    def make(*overrides, **changes):
        path = tiny.write_config(model_folder, runs_dir=str(tmp_path / "runs"), **changes)
        return load_config([str(path)], overrides)

    return make


def ladder(config, resources, *, phase="step"):
    """What is given up, one after the other, until nothing is left."""

    def replan(changed):
        return make_plan(changed, resources, run_dir="", cwd="")

    plan, found = replan(config), []
    while (smaller := backoff.smaller(plan, asked=config, phase=phase, replan=replan)) is not None:
        plan, change = smaller
        found.append(str(change))
        total = plan.micro_batch_size * plan.gradient_accumulation_steps * plan.world_size
        assert total == config.train.global_batch_size
    return found


def test_first_the_micro_batch_is_halved_then_more_is_recomputed(config_of):
    assert ladder(config_of(), CPU) == [
        "train.micro_batch_size 4 → 2",
        "train.micro_batch_size 2 → 1",
        "memory.activation_checkpointing none → selective",
        "memory.activation_checkpointing selective → full",
    ]


def test_a_micro_batch_that_is_no_power_of_two_goes_to_the_next_divisor(config_of):
    config = config_of("train.global_batch_size=18", "train.micro_batch_size=9")
    assert ladder(config, CPU)[:2] == ["train.micro_batch_size 9 → 3", "train.micro_batch_size 3 → 1"]


def test_what_the_user_set_is_not_given_up(config_of):
    config = config_of("train.micro_batch_size=1", "memory.activation_checkpointing=none")
    assert ladder(config, CPU) == []


def test_on_a_gpu_bytes_are_moved_to_the_host_last(config_of):
    config = config_of("train.micro_batch_size=1", "memory.activation_checkpointing=full")
    found = ladder(config, GPU)
    assert found[0] == "memory.offload_activations False → True"
    assert any("offload_optimizer none → cpu" in change for change in found)
    assert "offload_param none → cpu" in found[-1]


def test_a_model_that_does_not_load_is_not_helped_by_a_smaller_batch(config_of):
    assert ladder(config_of(), CPU, phase="load") == []
    assert all("offload_param" in change for change in ladder(config_of(), GPU, phase="load"))


def test_an_evaluation_with_a_micro_batch_of_its_own_halves_that(config_of):
    config = config_of("eval.micro_batch_size=16")
    assert ladder(config, CPU, phase="evaluation")[:2] == [
        "eval.micro_batch_size 16 → 8",
        "eval.micro_batch_size 8 → 4",
    ]


def test_a_resumed_run_keeps_what_was_given_up_unless_the_user_decides_otherwise(config_of):
    events = [{"event": backoff.EVENT, "given_up": {"train.micro_batch_size": 2}}, {"event": "interrupt"}]
    config = config_of()
    assert backoff.kept(config, before=config, events=events) == {"train.micro_batch_size": 2}
    assert backoff.kept(config, before=config, events=events[1:]) == {}
    changed = config_of("train.micro_batch_size=8")
    assert backoff.kept(changed, before=config, events=events) == {}
    more_workers = config_of("launch.type=ray", "launch.num_workers=8")
    assert backoff.kept(more_workers, before=config, events=events) == {"train.micro_batch_size": 1}


@pytest.fixture(autouse=True)
def no_faults_left():
    yield
    faults.disarm()


def too_large(run, *, fits, from_step=0):
    """Fails like the CPU's allocator while the plan's micro-batch is larger than `fits`, from a step on."""

    def fail():
        if run.load_plan().micro_batch_size > fits and len(losses(run)) >= from_step:
            raise RuntimeError(CPU_ALLOCATOR)

    faults.arm("step.micro_batch", fail)


def train(config, **options):
    seen = []
    run = training.train(config, mode=options.pop("mode", "new"), report=seen.append, **options)
    return run, seen


def events(run, name=backoff.EVENT):
    return [event for event in run.read_jsonl(run.events_jsonl) if event["event"] == name]


@pytest.mark.parametrize("from_step", [0, 6])
def test_a_run_whose_micro_batch_is_too_large_ends_with_the_losses_of_one_started_small(tmp_path, from_step, config_of):
    changes = {"checkpoint": {"every_steps": 4}, "train__micro_batch_size": 8}
    config = config_of(**changes)
    run = RunDir(tmp_path / "runs" / "tiny")
    too_large(run, fits=2, from_step=from_step)
    _, seen = train(config)
    small, _ = train(config_of("name=small", "train.micro_batch_size=2"))
    assert losses(run) == pytest.approx(losses(small), rel=1e-5)
    assert len(losses(run)) == 10
    first, second = events(run)
    assert (first["micro_batch_size_before"], first["micro_batch_size"], second["micro_batch_size"]) == (8, 4, 2)
    assert (first["gradient_accumulation_steps"], second["gradient_accumulation_steps"]) == (2, 4)
    assert (first["wanted_bytes"], first["phase"], first["change"]) == (123456, "step", "train.micro_batch_size 8 → 4")
    assert first["step"] == from_step
    assert [event["path"][-8:] for event in events(run, "resume")] == ["00000004"] * (2 if from_step else 0)
    shown = [event["change"] for event in seen if event.get("event") == backoff.EVENT]
    assert shown == [first["change"], second["change"]]
    assert run.load_plan().micro_batch_size == 2
    assert load_config([str(run.config_yaml)]).train.micro_batch_size == 8
    assert json.loads(run.summary_json.read_text())["status"] == "finished"


def test_what_was_given_up_is_shown_on_the_terminal(tmp_path, config_of):
    run, text = RunDir(tmp_path / "runs" / "tiny"), io.StringIO()
    too_large(run, fits=2)
    training.train(config_of(), mode="new", report=Progress(text).report)
    assert "out of memory in step 1, 121 KiB more were asked for" in text.getvalue()
    assert "goes on with train.micro_batch_size 4 → 2 (accumulation 4)" in text.getvalue()


def test_a_resumed_run_starts_with_the_micro_batch_that_it_backed_off_to(tmp_path, config_of):
    config, run = config_of(), RunDir(tmp_path / "runs" / "tiny")
    too_large(run, fits=1)

    def stop_at_step_3(record):
        if record.get("kind") == "train" and record["step"] == 3:
            run.stop.touch()

    with pytest.raises(Interrupted):
        training.train(config, mode="new", report=stop_at_step_3)
    assert len(events(run)) == 2
    train(config, mode="resume")
    assert len(events(run)) == 2
    assert len(losses(run)) == 10
    with pytest.raises(ConfigError, match=r"global_batch_size"):
        train(config_of("train.global_batch_size=16"), mode="resume")


def test_with_nothing_left_the_error_says_what_was_tried_and_what_needs_less(tmp_path, config_of):
    run = RunDir(tmp_path / "runs" / "tiny")
    too_large(run, fits=0)
    with pytest.raises(OutOfMemory) as raised:
        train(config_of())
    assert raised.value.exit_code == 3
    told = str(raised.value)
    assert "out of memory in step 1 with micro-batch 1, activation checkpointing full" in told
    assert "tried before: train.micro_batch_size 4 → 2; train.micro_batch_size 2 → 1; memory.activation" in told
    assert "Nothing is left to give up: " in told
    assert json.loads(run.summary_json.read_text())["status"] == "failed"


def test_what_the_planner_knows_to_need_less_comes_before_general_advice(config_of, tmp_path):
    config = config_of("train.micro_batch_size=1", "memory.activation_checkpointing=full")
    plan = make_plan(config, CPU, run_dir=str(tmp_path), cwd="")
    failure = backoff.out_of_memory("no room", phase="step", step=0)
    for known, told in {"train fewer": "train fewer", "": "quantise the weights .* lower data.max_length"}.items():
        never = attempts.Attempts(RunDir(tmp_path), config, replan=None, advice=lambda _, k=known: k, report=print)
        with pytest.raises(OutOfMemory, match=told):
            never.after(plan, failure)


def test_a_user_who_interrupts_is_not_taken_for_a_lack_of_memory(tmp_path, config_of):
    run, calls = RunDir(tmp_path / "runs" / "tiny"), []

    def interrupt():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt("out of memory")

    faults.arm("step.micro_batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(config_of())
    assert len(calls) == 3
    assert not events(run)


def test_who_asked_for_a_stop_does_not_get_another_attempt(tmp_path, config_of):
    run = RunDir(tmp_path / "runs" / "tiny")

    def fail():
        run.stop.touch()
        raise MemoryError

    faults.arm("step.micro_batch", fail)
    with pytest.raises(OutOfMemory):
        train(config_of())
    assert not events(run)


def test_an_attempt_that_found_no_memory_leaves_no_model_behind(tmp_path, config_of):
    config, run, alive = config_of(), RunDir(tmp_path / "runs" / "tiny"), []

    def fail():
        if run.load_plan().micro_batch_size > 1:
            alive.append(sum(type(one) is torch.nn.Embedding for one in gc.get_objects()))
            raise RuntimeError(CPU_ALLOCATOR)

    faults.arm("step.micro_batch", fail)
    train(config)
    assert len(alive) == 2
    assert alive[0] == alive[1]


LIMITED = """
import resource, sys
from burnish.harness.config_io import load_config
from burnish.launch import training

def limit(record):
    if record.get("event") == "start":
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[2]), -1))

training.train(load_config([sys.argv[1]]), mode="new", report=limit)
"""


@pytest.mark.nightly
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_under_a_real_limit_of_the_address_space_the_losses_are_those_of_a_run_started_small(tmp_path):
    """A step of the whole batch takes 350 MiB; 270 MiB of them are more than the process has already."""
    train_ = {"max_steps": 3, "global_batch_size": 1024, "micro_batch_size": 1024, "num_threads": 1}
    path = tiny.write_config(tmp_path, train=train_)
    draw = random.Random(0)
    texts = [" ".join(draw.choices(tiny.WORDS, k=60)) for _ in range(64)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [sys.executable, "-c", LIMITED, str(path), str(20 * 2**20)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    run = RunDir(tmp_path / "runs" / "tiny")
    [*_, event] = events(run)
    assert event["wanted_bytes"] > 2**20
    small, _ = train(load_config([str(path)], ["name=small", f"train.micro_batch_size={event['micro_batch_size']}"]))
    assert losses(run) == pytest.approx(losses(small), rel=1e-5)


FAILS_ONCE = """
import os

def fail():
    try:
        os.close(os.open({flag!r}, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    raise MemoryError

from burnish.harness import faults
faults.arm("step.micro_batch", fail)
"""


@pytest.mark.nightly
def test_two_workers_go_on_together_after_one_found_no_memory(tmp_path, monkeypatch, config_of):
    """Python runs sitecustomize.py when it starts: that is how the fault gets into the workers."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FAILS_ONCE.format(flag=str(tmp_path / "failed")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    launch = {"type": "ray", "num_workers": 2}
    run, seen = train(config_of(launch=launch, memory={"zero_stage": 2}))
    [event] = events(run)
    assert (event["micro_batch_size_before"], event["micro_batch_size"], event["step"]) == (4, 2, 0)
    assert [record["change"] for record in seen if record.get("event") == backoff.EVENT] == [event["change"]]
    inline, _ = train(config_of("name=inline", "train.micro_batch_size=2"))
    assert losses(run) == pytest.approx(losses(inline), rel=1e-4)  # two ranks add in another order than one
    assert len(losses(run)) == 10
