"""A memory model that can be worked out by hand, and profiles of models that do not exist: for tests of the planner."""

from burnish.harness.config import Config
from burnish.harness.memory import DTYPE_BYTES, Overhead, Prediction, Profile, state_bytes
from burnish.harness.plan import Resources
from burnish.harness.profile_numbers import Activations, Counts, HeadLine, Line

GIB = 2**30
SAVED = {"none": 16, "selective": 8, "full": 1}
"""Bytes that a layer saves for each token and hidden unit."""
NOTHING = (Line(),)
NO_OVERHEAD = {"cpu": Overhead(0, 0.0), "cuda": Overhead(0, 0.0)}


def profile(*, hidden=1024, layers=8, vocab=32_000, rank=None, quantized=False):
    """A Llama whose layers have 12 hidden² weights, with an untied head; LoRA of 18 rank hidden weights a layer."""
    matrices = 12 * hidden * hidden
    lora = 0 if rank is None else 18 * rank * hidden
    embedding = vocab * hidden
    total = layers * (matrices + lora) + 2 * embedding
    trainable = total if rank is None else layers * lora
    packed = layers * matrices if quantized else 0
    policies = {
        name: Activations(Line(per_token=saved * hidden), Line(), NOTHING, NOTHING, (HeadLine(),), NOTHING)
        for name, saved in SAVED.items()
    }
    is_whole = rank is None
    return Profile(
        counts=Counts(total, trainable, packed),
        num_layers=layers,
        layer=Counts(matrices + lora, matrices if is_whole else lora, matrices if quantized else 0),
        embedding=Counts(embedding, embedding if is_whole else 0),
        head=Counts(embedding, embedding if is_whole else 0),
        largest_tensor=max(embedding, 4 * hidden * hidden),
        largest_trained=max(embedding, 4 * hidden * hidden) if is_whole else 4 * rank * hidden,
        num_trained_tensors=layers * 7 * (1 if is_whole else 2),
        trained_vectors=0,
        buffer_bytes=0,
        hidden_size=hidden,
        vocab_size=vocab,
        is_per_example=False,
        chunk_tokens=None,
        policies=policies,
        evaluation=policies["full"],
    )


def profile_for(config):
    """What profiling the config would give."""
    is_full = config.adapter.method in ("full", "freeze")
    return profile(
        rank=None if is_full else config.adapter.rank,
        quantized=config.quantization.type != "none",
        **(config.model.init or {"model_type": "x"}).get("made_up", {}),
    )


def predict(plan, profile, calibration=None):
    """Weights, state and what the layers save: nothing else, and no overhead but the calibrated share of the latter."""
    parts = state_bytes(plan, profile.counts)
    del parts["total"]
    tokens = plan.micro_batch_size * plan.config.data.max_length
    saved = profile.num_layers * profile.policies[plan.activation_checkpointing].layer_saved.at(tokens, 1)
    share = 0.0 if calibration is None else calibration.allocator_share
    device = parts | {"activations": saved, "allocator": round(share * saved)}
    places = {"device": device, "cpu": {}, "nvme": {}}
    for name in ("optimizer_state", "master_weights"):
        _move(places, name, plan.offload_optimizer)
    _move(places, "weights", plan.offload_param)
    if plan.offload_activations:
        _move(places, "activations", "cpu")
    phases = {"load": device.get("weights", 0), "step": sum(device.values())}
    return Prediction(device=device, host=places["cpu"], nvme=places["nvme"], phases=phases)


def _move(places, name, place):
    if place != "none":
        places[place][name] = places["device"].pop(name)


def weight_bytes(found, dtype="bf16"):
    return DTYPE_BYTES[dtype] * found.counts.total


def make_config(**sections):
    fields = {
        "name": "small",
        "model": {"path": "some/model"},
        "task": {"type": "causal_lm"},
        "data": {"train": "rows.jsonl", "max_length": 1024},
        "adapter": {"method": "full"},
        "train": {"max_steps": 10, "global_batch_size": 8},
    }
    for name, values in sections.items():
        fields[name] = fields.get(name, {}) | values
    return Config.model_validate(fields)


def ray(num_workers, **options):
    return {"type": "ray", "num_workers": num_workers} | options


def cpu(gib, **changes):
    fields = {"device": "cpu", "num_devices": 0, "num_cpus": 8, "host_memory_bytes": int(gib * GIB)}
    return Resources(**fields | changes)


def gpus(count, gib, *, host_gib=256, **changes):
    fields = {"device": "cuda", "num_devices": count, "num_cpus": 32, "host_memory_bytes": int(host_gib * GIB)}
    fields |= {"device_memory_bytes": int(gib * GIB), "device_name": "NVIDIA H100 80GB HBM3"}
    return Resources(**fields | changes)
