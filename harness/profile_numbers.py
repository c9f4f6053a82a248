"""What a profile is: a model in plain numbers, from which its memory at any size of a micro-batch follows. No torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters. `quantized` of the `total` are kept in the quantised form; those are never trained."""

    total: int
    trainable: int
    quantized: int = 0

    def __post_init__(self) -> None:
        assert self.quantized >= 0, self
        assert 0 <= self.trainable <= self.total - self.quantized, self


@dataclass(frozen=True)
class Line:
    """Bytes by the size of a micro-batch: `per_pair` is of two tokens of one example, where attention keeps scores."""

    fixed: float = 0.0
    per_token: float = 0.0
    per_pair: float = 0.0

    def at(self, num_tokens: int, length: int) -> int:
        return math.ceil(self.fixed + num_tokens * (self.per_token + length * self.per_pair))


@dataclass(frozen=True)
class HeadLine:
    """The same for the head and the loss: `per_row` is of a row of logits, of which a chunk may exist at a time."""

    fixed: float = 0.0
    per_token: float = 0.0
    per_row: float = 0.0

    def at(self, num_tokens: int, num_rows: int) -> int:
        return math.ceil(self.fixed + num_tokens * self.per_token + num_rows * self.per_row)


@dataclass(frozen=True)
class Activations:
    """What forward and backward take under one activation policy, beyond weights and gradients.

    A peak is the highest of some lines: which moment is the fullest depends on the size of the micro-batch.
    """

    layer_saved: Line
    """What one layer keeps from its forward to its backward."""
    outside_saved: Line
    """What is kept once: embeddings, positions, masks, and scratch that stays allocated."""
    forward_working: tuple[Line, ...]
    """What there is in a layer's forward beyond all that is saved at its end."""
    backward_working: tuple[Line, ...]
    """What there is in a layer's backward beyond all that is saved before it: recomputed activations among them."""
    head: tuple[HeadLine, ...]
    """What head and loss have, forward and backward, beyond all that the layers have saved."""
    embedding_working: tuple[Line, ...]
    """What there is in the backward of the embedding, when the layers have nothing saved any more."""

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Activations":

        def lines(name: str) -> tuple[Line, ...]:
            return tuple(Line(**line) for line in fields[name])

        return cls(
            layer_saved=Line(**fields["layer_saved"]),
            outside_saved=Line(**fields["outside_saved"]),
            forward_working=lines("forward_working"),
            backward_working=lines("backward_working"),
            head=tuple(HeadLine(**line) for line in fields["head"]),
            embedding_working=lines("embedding_working"),
        )


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """How many weights a model has under a config, and where. A model without a list of layers is one layer."""

    counts: Counts
    num_layers: int
    layer: Counts
    """Of the largest layer, adapters included."""
    embedding: Counts
    """Of the input embedding."""
    head: Counts
    """Of the output head; empty where its weights are those of the embedding."""
    largest_tensor: int
    """Weights of the largest parameter."""
    largest_trained: int
    """Weights of the largest trained parameter."""
    num_trained_tensors: int
    trained_vectors: int
    """Trained weights in tensors of one dimension."""
    buffer_bytes: int
    hidden_size: int
    vocab_size: int
    is_per_example: bool
    """Whether a token stands for a whole example (images)."""
    saving_share: float = 1.0
    """Of the layers, that save anything: those below the first trained one do not, unless the embedding is trained."""
    trained_share: float = 1.0
    """Of the layers, that have trained weights. A frozen one between trained ones saves less."""


@dataclass(frozen=True, kw_only=True)
class Profile(Shapes):
    """A model under a config, in plain numbers. `layer_saved` of its policies counts the share of layers that save."""

    chunk_tokens: Mapping[str, int] | None
    """Device -> tokens whose logits exist at a time; None where it is all."""
    policies: Mapping[str, Activations]
    """none, selective and full."""
    evaluation: Activations
    """Forward alone, in evaluation."""
    is_in_files: bool = False
    """Whether a CPU maps the quantised weights from prepared files: told by where the model is, not by its shape."""
    is_on_heap: bool = False
    """Whether CPU tensors come from the C library's heap: where there is no compiler for the pool of `allocator`."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Profile":
        """Raises TypeError or KeyError for what is no profile."""
        counts = {name: Counts(**fields[name]) for name in ("counts", "layer", "embedding", "head")}
        policies = {name: Activations.from_dict(found) for name, found in fields["policies"].items()}
        evaluation = Activations.from_dict(fields["evaluation"])
        return cls(**{**fields, **counts, "policies": policies, "evaluation": evaluation})
