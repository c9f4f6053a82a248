"""The planner: what it takes on which hardware and why, what it never does, and that what it advises fits."""

import random
from dataclasses import replace

import made_up_memory
import pytest
from burnish.harness import calibration, candidates
from burnish.harness.calibration import Calibration
from burnish.harness.candidates import MARGIN, SETTINGS, survey
from burnish.harness.changes import changed, cheapest
from burnish.harness.errors import BurnishError, ConfigError, InfeasibleError
from burnish.harness.memory import Prediction, predict
from burnish.harness.plan import Plan, make_plan
from burnish.harness.planner import choose
from made_up_memory import GIB, cpu, gpus, make_config, profile, profile_for, ray


@pytest.fixture(autouse=True)
def by_hand(monkeypatch):
    monkeypatch.setattr(candidates, "predict", made_up_memory.predict)
    monkeypatch.setattr(calibration, "predict", made_up_memory.predict)


def chosen(resources, found=None, **sections):
    config = make_config(**sections)
    return choose(
        config, resources, found or profile_for(config), run_dir="runs/small", cwd=".", profile_of=profile_for
    )


def settings_of(choice):
    return tuple(choice.chosen.settings[name] for name in SETTINGS)


def reasons(choice):
    return {decision.key: decision.why for decision in choice.plan.decisions}


USUAL = (8, 0, "none", "none", "none", False)
"""167 M parameters in full: 2.79 GiB of weights and state, and 1 GiB of activations for 8 examples of 1024 tokens."""


@pytest.mark.parametrize(
    ("resources", "sections", "expected"),
    [
        (cpu(64), {}, USUAL),
        (gpus(1, 80), {}, USUAL),
        (gpus(1, 3.9), {}, (4, *USUAL[1:])),
        (gpus(4, 80), {"launch": ray(4)}, (2, 2, *USUAL[2:])),
        (cpu(64), {"launch": ray(4)}, (2, 2, *USUAL[2:])),
        (gpus(1, 80), {"optimizer": {"name": "adafactor"}}, USUAL),
        (gpus(2, 80), {"optimizer": {"name": "adafactor"}, "launch": ray(2)}, (4, *USUAL[1:])),
        (gpus(1, 80), {"train": {"global_batch_size": 22}}, (2, *USUAL[1:])),
        (gpus(1, 80), {"memory": {"zero_stage": 3}}, (8, 3, *USUAL[2:])),
        (gpus(1, 80), {"memory": {"activation_checkpointing": "full"}}, (8, 0, "none", "none", "full", False)),
    ],
)
def test_what_is_taken_where_there_is_room(resources, sections, expected):
    assert settings_of(chosen(resources, **sections)) == expected


def test_where_the_usual_settings_fit_the_plan_is_make_plans_own():
    for resources, launch in ((gpus(4, 80), ray(4)), (cpu(64), ray(2)), (cpu(64), {"type": "inline"})):
        config = make_config(launch=launch)
        plan = choose(config, resources, profile(), run_dir="runs/small", cwd=".").plan
        assert plan == make_plan(config, resources, run_dir="runs/small", cwd=".")


def test_milliseconds_decide_nothing():
    """A tiny model on two CPU workers: the latency of more collectives is more than 5 % of what it computes."""
    found = profile(hidden=32, layers=2, vocab=320)
    train = {"global_batch_size": 32, "micro_batch_size": 4}
    choice = chosen(cpu(64), found, launch=ray(2), data={"max_length": 64}, train=train)
    plain = [one for one in choice.candidates if one.plan.activation_checkpointing == "none"]
    steps = {one.plan.zero_stage: one.step_s for one in plain}
    assert steps[2] > 1.05 * steps[1]
    assert choice.plan.zero_stage == 2


def test_state_that_does_not_fit_one_gpu_is_kept_on_the_host_and_the_plan_says_why():
    choice = chosen(gpus(1, 2.5))
    assert choice.plan.offload_optimizer == "cpu"
    assert choice.plan.zero_stage in (2, 3)
    assert choice.plan.engine == "deepspeed"
    assert reasons(choice)["offload_optimizer"] == "none does not fit: 3.79 GiB of 2.38 GiB a GPU"
    assert reasons(choice)["zero_stage"] == "for offload_optimizer=cpu"
    assert choice.prediction.host_bytes > 0


def test_a_reason_names_what_the_usual_value_would_have_needed():
    choice = chosen(gpus(1, 3.9))
    assert reasons(choice)["micro_batch_size"] == "8 does not fit: 3.79 GiB of 3.7 GiB a GPU"


def test_the_disk_is_used_only_where_there_is_one():
    tight = {"host_gib": 2}
    with pytest.raises(InfeasibleError):
        chosen(gpus(1, 2.2, **tight))
    nvme = gpus(1, 2.2, **tight, nvme_bytes=2**40)
    choice = chosen(nvme, memory={"nvme_path": "/somewhere"})
    assert choice.plan.offload_optimizer == "nvme"
    assert choice.plan.zero_stage == 3


def test_a_cpu_offloads_to_its_own_memory_never():
    choice = chosen(cpu(64))
    assert {candidate.plan.offload_optimizer for candidate in choice.candidates} == {"none"}
    assert not any(candidate.plan.offload_activations for candidate in choice.candidates)


def test_one_worker_partitions_nothing():
    choice = chosen(gpus(1, 80))
    for candidate in choice.candidates:
        is_offloaded = (candidate.plan.offload_optimizer, candidate.plan.offload_param) != ("none", "none")
        assert (candidate.plan.zero_stage > 0) == is_offloaded


def test_what_the_config_fixes_is_kept_and_auto_stays_in_the_config():
    memory = {"zero_stage": 1, "activation_checkpointing": "selective"}
    choice = chosen(gpus(2, 80), launch=ray(2), memory=memory, train={"micro_batch_size": 2})
    assert settings_of(choice) == (2, 1, "none", "none", "selective", False)
    assert choice.plan.config == make_config(launch=ray(2), memory=memory, train={"micro_batch_size": 2})
    assert choice.plan.config.memory.offload_param == "auto"
    assert {candidate.plan.zero_stage for candidate in choice.candidates} == {1}


def test_workers_of_a_cpu_share_its_memory():
    alone, two = (chosen(cpu(16), launch=ray(n)) for n in (1, 2))
    assert alone.limits.device_bytes > 1.9 * two.limits.device_bytes


def test_weights_in_files_need_not_fit_and_what_must_read_them_again_is_slower(monkeypatch):
    """2 GiB of 3 are in files: 2 GiB are enough, but then every pass reads them."""

    def in_files(plan, profile, calibration=None):
        return replace(Prediction({"weights": 3 * GIB}, {}, {}, {}), mapped_bytes=2 * GIB)

    monkeypatch.setattr(candidates, "predict", in_files)
    ample, scarce = chosen(cpu(8)), chosen(cpu(2))
    assert ample.chosen.cost.offload_bytes == 0
    assert scarce.chosen.cost.offload_bytes == 2 * 2 * GIB
    assert scarce.chosen.step_s > ample.chosen.step_s
    with pytest.raises(InfeasibleError, match=r"needs 1 GiB of"):
        chosen(cpu(1.5))


def test_a_budget_overrides_the_devices_memory():
    choice = chosen(gpus(1, 80), memory={"budget": 5 * GIB})
    assert choice.limits.device_bytes == int((1 - MARGIN["cuda"]) * 5 * GIB)


def test_a_run_that_goes_on_keeps_its_settings_while_they_fit():
    tight, roomy, tighter = gpus(1, 3.9), gpus(1, 80), gpus(1, 3.3)
    first = chosen(tight).plan
    assert first.micro_batch_size == 4
    again = choose(make_config(), roomy, profile(), run_dir="runs/small", cwd=".", before=first)
    assert again.plan.micro_batch_size == 4
    assert reasons(again)["micro_batch_size"] == "as the run was planned before"
    assert choose(make_config(), tighter, profile(), run_dir="", cwd="", before=first).plan.micro_batch_size < 4
    fixed = make_config(train={"micro_batch_size": 2})
    assert choose(fixed, roomy, profile(), run_dir="", cwd="", before=first).plan.micro_batch_size == 2
    two = make_config(launch=ray(2))
    assert choose(two, gpus(2, 80), profile(), run_dir="", cwd="", before=first).plan.zero_stage == 2


def test_the_same_config_and_resources_give_the_same_plan():
    plans = [chosen(gpus(4, 3), launch=ray(4)).plan.to_json() for _ in range(3)]
    assert plans[0] == plans[1] == plans[2]


def test_a_chosen_plan_survives_json():
    plan = chosen(gpus(1, 2.5)).plan
    assert Plan.from_dict(plan.to_dict()) == plan


def test_calibration_is_said_and_makes_predictions_larger():
    found = Calibration("x", 3, process_bytes=0, allocator_share=0.5, flops_per_s=1e14, baseline_bytes=0)
    config = make_config()
    choice = choose(config, gpus(1, 80), profile(), run_dir="", cwd="", calibration=found)
    assert reasons(choice)["calibration"] == "plan --verify ran 3 times on x"
    plain = chosen(gpus(1, 80))
    assert choice.prediction.peak_bytes == plain.prediction.peak_bytes + GIB // 2


def random_case(rng):
    """A config, resources and a profile; none of them need fit."""
    workers = rng.choice([1, 1, 2, 4, 8])
    memory = {
        "zero_stage": rng.choice(["auto", "auto", 0, 1, 2, 3]),
        "offload_optimizer": rng.choice(["auto", "auto", "none", "cpu"]),
        "offload_param": rng.choice(["auto", "auto", "none"]),
        "activation_checkpointing": rng.choice(["auto", "none", "selective", "full"]),
        "nvme_path": rng.choice([None, "/somewhere"]),
    }
    method = rng.choice(["full", "lora", "qlora"])
    sections = {
        "memory": memory,
        "launch": ray(workers),
        "adapter": {"method": method},
        "quantization": {"type": "nf4" if method == "qlora" else "none"},
        "optimizer": {"name": rng.choice(["adamw", "adamw", "sgd", "adamw_8bit"])},
        "data": {"max_length": rng.choice([64, 512, 2048, 8192])},
        "train": {"global_batch_size": 8 * rng.choice([1, 2, 3]), "micro_batch_size": rng.choice(["auto", 1])},
    }
    nvme = rng.choice([0, 2**34, 2**40])
    size = 2 ** rng.uniform(-1, 7)
    resources = gpus(workers, size, host_gib=2 ** rng.uniform(2, 8), nvme_bytes=nvme)
    if rng.random() < 0.3:
        resources = cpu(size, nvme_bytes=nvme)
    found = profile(
        hidden=rng.choice([256, 1024, 4096]),
        layers=rng.choice([2, 32]),
        rank=None if method == "full" else 16,
        quantized=method == "qlora",
    )
    return sections, resources, found


@pytest.mark.parametrize("model", ["by hand", "real"])
def test_what_is_said_to_fit_never_needs_more_than_there_is(monkeypatch, model):
    if model == "real":
        monkeypatch.setattr(candidates, "predict", predict)
    rng = random.Random(0)
    fitted = refused = 0
    for _ in range(120):
        sections, resources, found = random_case(rng)
        try:
            config = make_config(**sections)
            choice = choose(config, resources, found, run_dir="", cwd="")
        except InfeasibleError:
            refused += 1
            continue
        except (ConfigError, ValueError):
            continue
        fitted += 1
        prediction, workers = choice.prediction, -(-choice.plan.world_size // resources.num_nodes)
        assert choice.chosen.fits
        device = (
            resources.device_memory_bytes if choice.plan.device == "cuda" else resources.host_memory_bytes / workers
        )
        assert prediction.peak_bytes <= device
        assert workers * prediction.host_bytes <= resources.host_memory_bytes
        assert workers * prediction.nvme_bytes <= resources.nvme_bytes
        assert all(
            getattr(config.memory, name) in ("auto", value)
            for name, value in choice.chosen.settings.items()
            if name != "micro_batch_size"
        )
        fastest = min(candidate.step_s for candidate in choice.candidates if candidate.fits)
        assert choice.chosen.step_s <= max(1.05 * fastest, fastest + 0.01)
    assert fitted > 20
    assert refused > 10


def test_the_change_that_is_advised_fits_when_it_is_made():
    rng = random.Random(1)
    advised = 0
    for _ in range(90):
        sections, resources, found = random_case(rng)
        try:
            config = make_config(**sections)
            if survey(config, resources, found).best.fits:
                continue
        except (BurnishError, ValueError):
            continue
        shape = {"hidden": found.hidden_size, "layers": found.num_layers}

        def profile_of(other, shape=shape):
            is_lora = other.adapter.method != "full"
            return profile(rank=16 if is_lora else None, quantized=other.quantization.type != "none", **shape)

        remedy = cheapest(config, resources, found, profile_of=profile_of)
        if remedy is None or remedy.note:
            continue
        advised += 1
        other = changed(config, remedy.values)
        assert survey(other, resources, profile_of(other)).best.fits
        assert survey(other, resources, profile_of(other)).best.settings == remedy.best.settings
    assert advised > 10


KEPT = {"activation_checkpointing": "none", "offload_activations": False}
ADVICE = {
    "a fixed micro-batch": (
        gpus(1, 3.5, host_gib=1),
        {"train": {"micro_batch_size": 8}, "memory": KEPT},
        "train.micro_batch_size=4 (",
    ),
    "a fixed policy": (
        gpus(1, 3.03, host_gib=1),
        {"train": {"micro_batch_size": 1}, "memory": KEPT},
        "memory.activation_checkpointing=selective (",
    ),
    "a fixed place": (
        gpus(1, 2.5),
        {"memory": {"offload_optimizer": "none", "offload_param": "none"}},
        "memory.offload_optimizer=cpu (",
    ),
    "idle GPUs": (gpus(4, 2.5, host_gib=1), {}, "launch.type=ray launch.num_workers=2 ("),
    "a disk that is not named": (
        gpus(1, 2.5, host_gib=1, nvme_bytes=2**40),
        {},
        "memory.nvme_path=FOLDER with FOLDER on a fast local disk (",
    ),
    "a smaller optimizer state": (gpus(1, 2.5, host_gib=1), {}, "optimizer.name=adamw_8bit ("),
    "an adapter": (gpus(1, 1.0, host_gib=1), {}, "adapter.method=lora ("),
    "a quantised base": (
        gpus(1, 0.35, host_gib=1),
        {"adapter": {"method": "lora"}},
        "adapter.method=qlora quantization.type=nf4 (",
    ),
}


@pytest.mark.parametrize("name", ADVICE)
def test_the_cheapest_change_is_named(name):
    resources, sections, words = ADVICE[name]
    with pytest.raises(InfeasibleError, match="does not fit: it needs") as raised:
        chosen(resources, **sections)
    assert f"The cheapest change that fits: {words}" in str(raised.value)
    assert raised.value.exit_code == 3


def test_shorter_examples_are_advised_at_the_longest_that_fits():
    sections = {"adapter": {"method": "qlora"}, "quantization": {"type": "nf4"}, "data": {"max_length": 2**17}}
    sections |= {"train": {"global_batch_size": 1}, "memory": {"activation_checkpointing": "full"}}
    config = make_config(optimizer={"name": "sgd"}, **sections)
    resources = gpus(1, 0.5, host_gib=1)
    remedy = cheapest(config, resources, profile_for(config), profile_of=profile_for)
    length = remedy.values["data.max_length"]
    assert 64 <= length < 2**17
    longer = changed(config, dict(remedy.values) | {"data.max_length": length + 64})
    assert not survey(longer, resources, profile_for(longer)).best.fits


def test_what_nothing_on_this_machine_cures_is_told_in_bytes_of_a_larger_one():
    config = make_config(adapter={"method": "freeze"}, optimizer={"name": "sgd"})
    with pytest.raises(InfeasibleError, match=r"and a host with .* free for each worker") as raised:
        choose(config, cpu(0.75), profile(), run_dir="", cwd="", profile_of=profile_for)
    assert len(str(raised.value)) < 500


def test_pages_of_files_that_need_no_memory_are_taken_off_the_parts_in_the_error(monkeypatch):
    def with_pages(*args, **options):
        return replace(made_up_memory.predict(*args, **options), mapped_bytes=2**26)

    monkeypatch.setattr(candidates, "predict", with_pages)
    with pytest.raises(InfeasibleError, match=r"MiB, less 64 MiB in pages of files; limit: "):
        chosen(cpu(0.75))


def test_a_budget_that_is_too_small_is_given_up_last():
    memory = {"budget": 2**20}
    with pytest.raises(InfeasibleError, match=r"The cheapest change that fits: memory\.budget=auto \("):
        chosen(gpus(1, 80), memory=memory)


def test_a_peak_of_another_phase_is_called_by_its_name(monkeypatch):
    def loads_twice(plan, profile, calibration=None):
        found = made_up_memory.predict(plan, profile, calibration)
        return replace(found, phases=found.phases | {"load": 2 * found.peak_bytes})

    monkeypatch.setattr(candidates, "predict", loads_twice)
    with pytest.raises(InfeasibleError, match=r"\(in the phase load; a step needs "):
        chosen(cpu(3))


def test_an_error_says_what_is_needed_by_part():
    with pytest.raises(InfeasibleError) as raised:
        chosen(gpus(1, 1.0, host_gib=1))
    assert "weights" in str(raised.value)
    assert "gradients" in str(raised.value)
    assert "the GPU's memory less a margin of 5%" in str(raised.value)


def test_a_candidate_more_never_makes_the_plan_slower():
    fixed = chosen(gpus(2, 4), launch=ray(2), memory={"zero_stage": 3})
    free = chosen(gpus(2, 4), launch=ray(2))
    assert free.chosen.step_s <= max(1.05 * fixed.chosen.step_s, fixed.chosen.step_s + 0.01)
    more = replace(gpus(2, 4), device_memory_bytes=80 * GIB)
    assert chosen(more, launch=ray(2)).chosen.step_s <= max(1.05 * free.chosen.step_s, free.chosen.step_s + 0.01)
