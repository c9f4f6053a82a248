"""A model of data-parallel training on many GPUs: the work of a step, its traffic, and its time. Pure; no torch."""

from dataclasses import asdict, dataclass
from typing import Any

from ..harness.memory import FP32_BYTES, divided
from ..harness.traffic import Hardware, Link, overlapped_step_s, sent_bytes, traffic_bytes, traffic_s, zero_traffic

BF16_BYTES = 2
ADAMW_BYTES = 2 * FP32_BYTES


@dataclass(frozen=True)
class Shape:
    """A Llama: head dimension hidden / num_heads, no biases, output layer of its own."""

    name: str
    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one block."""
        kv, mlp = self.hidden // self.num_heads * self.num_kv_heads, self.intermediate
        attention = [(self.hidden, self.hidden), (self.hidden, kv), (self.hidden, kv), (self.hidden, self.hidden)]
        return [*attention, (self.hidden, mlp), (self.hidden, mlp), (mlp, self.hidden)]

    @property
    def num_multiplied(self) -> int:
        """Weights that every token is multiplied with: all but the embedding and the norms."""
        return self.num_layers * sum(a * b for a, b in self.linears) + self.hidden * self.vocab_size

    @property
    def num_params(self) -> int:
        norms = (2 * self.num_layers + 1) * self.hidden
        return self.num_multiplied + self.hidden * self.vocab_size + norms

    def num_lora(self, rank: int) -> int:
        """Parameters of LoRA on every linear layer of the blocks."""
        return self.num_layers * sum(rank * (a + b) for a, b in self.linears)


@dataclass(frozen=True)
class Work:
    """What every GPU does in a step. `rank` None is full fine-tuning, else LoRA of that rank on all linear layers."""

    shape: Shape
    rank: int | None
    num_sequences: int
    length: int

    @property
    def name(self) -> str:
        return f"{self.shape.name}, {'full' if self.rank is None else f'LoRA rank {self.rank}'}"

    @property
    def tokens(self) -> int:
        return self.num_sequences * self.length

    @property
    def num_trained(self) -> int:
        return self.shape.num_params if self.rank is None else self.num_total - self.shape.num_params

    @property
    def num_total(self) -> int:
        return self.shape.num_params + (0 if self.rank is None else self.shape.num_lora(self.rank))

    def flops(self) -> float:
        """Of one step of one GPU, without recomputation.

        A weight costs 2 per token forward, 2 for the gradient of its input and 2 for its own, which frozen weights do
        without; causal attention costs 2 * hidden * length forward and twice that backward, per layer and token
        (PaLM, arXiv 2204.02311, appendix B, which counts the masked half as well).
        """
        adapters = 0 if self.rank is None else 6 * self.num_trained
        weights = (6 if self.rank is None else 4) * self.shape.num_multiplied
        attention = 6 * self.shape.num_layers * self.shape.hidden * self.length
        return float(self.tokens) * (weights + adapters + attention)


LLAMA_8B = Shape("Llama-3 8B", 4096, 14336, 32, 32, 8, 128256)
LLAMA_70B = Shape("Llama-3 70B", 8192, 28672, 80, 64, 8, 128256)
"""Shapes from the models' config.json."""


def calibrated(n: int, *, small_s: float, large_s: float, large_bytes: float) -> Link:
    """The link of a ring from two measured all-reduces: one of next to nothing, and one of many bytes."""
    assert n > 1, n
    moved_s = max(large_s - small_s, 1e-9)
    return Link(bytes_per_s=sent_bytes("all_reduce", large_bytes, n) / moved_s, latency_s=small_s / (2 * (n - 1)))


def one_node(n: int, link: Link) -> Hardware:
    """n ranks that share one kind of link."""
    return Hardware("measured", 0.0, 0.0, n, link, link)


def state_bytes(work: Work, *, num_gpus: int, stage: int) -> int:
    """Weights, gradients, masters and moments of one GPU, as harness.memory counts them; no activations."""
    return divided(
        weights=BF16_BYTES * work.num_total,
        gradients=FP32_BYTES * work.num_trained,
        master_weights=FP32_BYTES * work.num_trained,
        optimizer_state=ADAMW_BYTES * work.num_trained,
        world_size=num_gpus,
        zero_stage=stage,
    )["total"]


def stated(hardware: Hardware) -> dict[str, Any]:
    """The speeds of the hardware without nesting."""
    links = {"inside": hardware.inside, "between": hardware.between}
    flat = {f"{name}_{key}": value for name, link in links.items() for key, value in asdict(link).items()}
    return {key: value for key, value in asdict(hardware).items() if key not in links} | flat


def simulate(
    work: Work, *, num_gpus: int, stage: int, hardware: Hardware, flops_per_s: float, overlap: float
) -> dict[str, Any]:
    """One step of a model of num_gpus GPUs, each with the same work (weak scaling). Not a measurement.

    Efficiency is against one GPU that communicates nothing; `efficiency_bounds` are those without any overlap and with
    all that fits behind the computation. The optimizer's time and the start of kernels are left out.
    """
    traffic = zero_traffic(
        stage,
        gradient_bytes=FP32_BYTES * work.num_trained,
        trained_bytes=BF16_BYTES * work.num_trained,
        weight_bytes=BF16_BYTES * work.num_total,
        num_layers=work.shape.num_layers,
    )
    compute_s, communication_s = work.flops() / flops_per_s, traffic_s(traffic, num_gpus, hardware)
    step_s = overlapped_step_s(compute_s, communication_s, overlap)
    needed = state_bytes(work, num_gpus=num_gpus, stage=stage)
    return {
        "model": work.name,
        "num_gpus": num_gpus,
        "zero_stage": stage,
        "tokens_per_gpu": work.tokens,
        "length": work.length,
        "hardware": stated(hardware),
        "flops_per_s": flops_per_s,
        "overlap": overlap,
        "compute_s": compute_s,
        "communication_s": communication_s,
        "step_s": step_s,
        "tokens_per_s": num_gpus * work.tokens / step_s,
        "efficiency": compute_s / step_s,
        "efficiency_bounds": [compute_s / overlapped_step_s(compute_s, communication_s, part) for part in (0.0, 1.0)],
        "wire_bytes": traffic_bytes(traffic, num_gpus),
        "state_bytes": needed,
        "fits": needed <= hardware.memory_bytes,
        "is_model": True,
    }
