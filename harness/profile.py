"""What a model takes, in plain numbers: one real layer of it is run at some sizes, and the result is kept on disk.

A peak is a line in tokens only as long as the same moment is the fullest. So every allocation and release of the run is
a line of its own, found from runs of three sizes that make the same ones; the peak at any size is the highest line.
"""

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from . import allocator, models
from .activations import apply_activation_policy
from .config import Config
from .evaluate import eval_mode
from .live_bytes import Timeline, live_bytes
from .moments import ROUND_PACKED
from .pretrained import load_config_of_model
from .profile_numbers import Activations, HeadLine, Line, Profile, Shapes
from .run_dir import write_json
from .shapes import shapes_of
from .small_model import backward_twice, frozen_layers, grow_vocabulary, layers_of, marked, small_model
from .synthetic import synthetic_batch
from .tasks import get_task
from .tasks.common import unwrap

FOLDER = Path("~/.cache/burnish/profiles")
VOCABULARIES = (2048, 4096)
"""Sizes that the vocabulary is cut to."""
TOKENS = ((2**29, 16), (2**26, 64), (0, 128))
"""Weights of a layer from which on -> tokens of the shortest run."""
PAIR_BYTES = 0.05
"""Below so many bytes for two tokens nothing is kept for pairs of tokens: it is rounding."""
GRID = [(2**size, 2**length) for size in range(4, 25) for length in range(4, size + 1, 2)]
"""Tokens and length of examples at which a line must be the highest one to be kept."""


@dataclass(frozen=True)
class Pieces:
    """Live bytes of one run, gradients left out: what is saved, and all values in each part of the run."""

    outside: float
    layer: float
    forward: np.ndarray
    head: np.ndarray
    backward: np.ndarray
    embedding: np.ndarray


def profile_of(config: Config, labels: list[str] | None = None, *, folder: Path | None = None) -> Profile:
    """The profile of config's model, method, quantisation and dtype, from the folder if it is there.

    No weights are loaded. Raises ConfigError.
    """
    file = (folder or FOLDER).expanduser() / f"{identity(config, labels)}.json"
    here: dict[str, Any] = {"is_in_files": models.has_plain_files(config), "is_on_heap": allocator.pool() is None}
    try:
        return replace(Profile.from_dict(json.loads(file.read_text(encoding="utf-8"))), **here)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, AssertionError):
        found = make_profile(config, labels)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, found.to_dict())
    except OSError:
        pass  # a read-only home folder costs only time
    return replace(found, **here)


def identity(config: Config, labels: list[str] | None) -> str:
    """A hash of all that a profile depends on: the model's shape, how it is trained, our code and the libraries'."""
    sections = ("quantization", "task", "adapter", "kernels")
    shape = {key: value for key, value in load_config_of_model(config).to_dict().items() if key != "_name_or_path"}
    facts = {name: getattr(config, name).model_dump(mode="json") for name in sections}
    facts |= {"dtype": config.model.dtype, "attention": config.model.attn_implementation}
    facts |= {"packing": config.data.packing, "labels": labels, "model": shape}
    facts |= {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine()}
    facts |= {"cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    package = Path(__file__).parents[1]
    for path in sorted([*package.glob("harness/**/*.py"), *package.glob("kernels/**/*.[pc]*")]):
        if path.is_file() and path.suffix in (".py", ".cpp"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def make_profile(config: Config, labels: list[str] | None = None) -> Profile:
    """The profile, measured now. Raises ConfigError."""
    shapes = shapes_of(config, labels)
    vocabularies = [min(size, shapes.vocab_size) for size in VOCABULARIES]
    model = small_model(config, labels, vocab_size=vocabularies[0])
    sizes = sizes_of(config, shapes)
    base = unwrap(model)
    policies = pieces_by_policy(model, config, sizes, vocabularies[0])
    frozen: dict[str, list[Pieces]] = {}
    if shapes.trained_share < shapes.saving_share and not is_whole(model):
        with frozen_layers(base):
            frozen = pieces_by_policy(model, config, sizes, vocabularies[0])
    evaluated = [pieces_of(model, config, size, vocabularies[0], is_training=False) for size in sizes]
    grown: dict[str, list[Pieces]] = {}
    if vocabularies[1] > vocabularies[0] and not shapes.is_per_example and grow_vocabulary(model, vocabularies[1]):
        for name, is_training in (("training", True), ("evaluation", False)):
            grown[name] = [
                pieces_of(model, config, size, vocabularies[1], is_training=is_training) for size in sizes[:2]
            ]
    fit = partial(fitted, sizes=sizes, shapes=shapes, packing=config.data.packing)
    found = {name: fit(pieces, grown=grown.get("training")) for name, pieces in policies.items()}
    if is_whole(model):
        shapes = replace(shapes, num_layers=1, layer=shapes.counts)
    else:
        saved_frozen = {name: fit(pieces, grown=None).layer_saved for name, pieces in frozen.items()}
        found = {name: _averaged(one, saved_frozen.get(name, Line()), shapes) for name, one in found.items()}
    found |= {name: found["none"] for name in ("selective", "full") if name not in found}
    return Profile(
        **{field.name: getattr(shapes, field.name) for field in fields(shapes)},
        chunk_tokens=chunk_tokens(base, shapes, config),
        policies=found,
        evaluation=fit(evaluated, grown=grown.get("evaluation")),
    )


def pieces_by_policy(
    model: nn.Module, config: Config, sizes: Sequence[tuple[int, int]], vocab_size: int
) -> dict[str, list[Pieces]]:
    """Runs of all sizes under every activation policy that makes a difference to this model."""
    base, found = unwrap(model), {}
    for policy in ("full", "selective", "none"):
        if policy == "selective" and base.fused.get("linears"):
            continue
        if policy != "none" and not has_checkpointing(base):
            continue
        apply_activation_policy(model, policy)
        found[policy] = [pieces_of(model, config, size, vocab_size, is_training=True) for size in sizes]
        if policy != "none":
            base.gradient_checkpointing_disable()
    return found


def _averaged(found: Activations, frozen: Line, shapes: Shapes) -> Activations:
    """The same with what a layer saves on average, where some are frozen and some save nothing."""
    trained, share = found.layer_saved, shapes.trained_share
    frozen_share = max(0.0, shapes.saving_share - share)
    values = [getattr(trained, name.name) * share + getattr(frozen, name.name) * frozen_share for name in fields(Line)]
    return replace(found, layer_saved=Line(*values))


def has_checkpointing(base: Any) -> bool:
    return bool(getattr(base, "supports_gradient_checkpointing", False))


def sizes_of(config: Config, shapes: Shapes) -> list[tuple[int, int]]:
    """(examples, length) of the runs: one short example, one twice as long, two short ones."""
    if shapes.is_per_example:
        return [(2, 1), (4, 1), (4, 1)]
    length = next(tokens for weights, tokens in TOKENS if shapes.layer.total >= weights)
    if config.data.packing:
        return [(1, ROUND_PACKED), (2, ROUND_PACKED), (4, ROUND_PACKED)]
    return [(1, length), (1, 2 * length), (2, length)]


def pieces_of(model: nn.Module, config: Config, size: tuple[int, int], vocab_size: int, *, is_training: bool) -> Pieces:
    """One run: two passes over a micro-batch, of which the second counts."""
    task = get_task(config.task.type)
    batch = synthetic_batch(config, num_examples=size[0], length=size[1], num_ids=vocab_size)
    model.zero_grad(set_to_none=True)
    if is_training:
        line = live_bytes(partial(backward_twice, model, lambda: task.loss(model, batch, config)))
    else:
        line = live_bytes(partial(evaluate_twice, model, lambda: task.evaluate(model, batch, config)))
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    model.zero_grad(set_to_none=True)
    return cut_pieces(line, gradients, is_whole=is_whole(model), is_training=is_training)


def is_whole(model: nn.Module) -> bool:
    """Whether the model could not be cut to one layer: its layers are not in one list, or of several sizes."""
    layers = layers_of(unwrap(model))
    return layers is None or len(layers) != 1


def evaluate_twice(model: nn.Module, evaluate: Any, mark: Any) -> None:
    with eval_mode(model), torch.no_grad():
        evaluate()
        mark("second")
        with marked(model, mark):
            mark("forward")
            evaluate()
        mark("end")


def cut_pieces(line: Timeline, gradients: int, *, is_whole: bool, is_training: bool) -> Pieces:
    """The parts of the second pass. A model without layers is one layer, head and loss included."""
    start, end = line.at("forward"), line.at("end")
    if is_whole or not any(name == "head" for name, _ in line.marks):
        return whole_pieces(line, gradients, is_training=is_training)
    layer, layer_end, head = (line.at(name, after=start) for name in ("layer", "layer end", "head"))
    head_end = line.at("head end", after=head) if is_training else end
    has_embedding = any(name == "embedding" and place >= head_end for name, place in line.marks)
    embedding = line.at("embedding", after=head_end) if has_embedding else end
    live = line.live - gradients
    saved = line.bytes_at(head) - gradients
    layer_saved = line.bytes_at(layer_end) - line.bytes_at(layer)
    return Pieces(
        outside=saved - layer_saved,
        layer=layer_saved,
        forward=live[layer:head] - saved,
        head=live[head:head_end] - saved,
        backward=live[head_end:embedding] - saved,
        embedding=live[embedding:end],
    )


def whole_pieces(line: Timeline, gradients: int, *, is_training: bool) -> Pieces:
    start, end = line.at("forward"), line.at("end")
    turn = line.at("backward", after=start) if is_training else end
    saved = line.bytes_at(turn) - gradients
    live, nothing = line.live - gradients, np.zeros(0)
    return Pieces(0.0, saved, live[start:turn] - saved, nothing, live[turn:end] - saved, nothing)


def chunk_tokens(base: Any, shapes: Shapes, config: Config) -> dict[str, int] | None:
    """Tokens whose logits a fused head makes at a time."""
    head = base.get_output_embeddings() if config.task.type == "causal_lm" else None
    if not hasattr(head, "loss_of"):
        return None
    from ..kernels.linear_cross_entropy import MAX_CHUNK_BYTES, MAX_CHUNK_ROWS, MIN_CHUNK_ROWS

    row_bytes = shapes.vocab_size * (2 if config.model.dtype == "bf16" else 4)
    return {
        device: max(MIN_CHUNK_ROWS, min(MAX_CHUNK_ROWS[device], MAX_CHUNK_BYTES[device] // row_bytes))
        for device in MAX_CHUNK_ROWS
    }


def fitted(
    pieces: Sequence[Pieces],
    *,
    grown: Sequence[Pieces] | None,
    sizes: Sequence[tuple[int, int]],
    shapes: Shapes,
    packing: bool,
) -> Activations:
    """Lines through runs of three sizes, and, for the head, of two of them with a larger vocabulary."""
    through = partial(lines_through, sizes=sizes, packing=packing)

    def lines(name: str) -> tuple[Line, ...]:
        return highest(through(matching([getattr(one, name) for one in pieces])))

    def line(name: str) -> Line:
        return through([np.array([getattr(one, name)], float) for one in pieces])[0]

    head, per_row, embedding = through(matching([one.head for one in pieces])), 0.0, lines("embedding")
    if grown is not None:
        small, large = VOCABULARIES
        tokens = [count * length for count, length in sizes]
        more = [top(new.head) - top(old.head) for old, new in zip(pieces, grown, strict=False)]
        per_entry = (more[1] - more[0]) / (tokens[1] - tokens[0]) / (large - small)
        fixed = more[0] / (large - small) - per_entry * tokens[0]
        per_row, extra = per_entry * shapes.vocab_size, shapes.vocab_size - small
        head = [Line(one.fixed + fixed * extra, one.per_token - per_entry * small) for one in head]
        rows = max(0.0, top(grown[0].embedding) - top(pieces[0].embedding)) / (large - small)
        embedding = tuple(replace(one, fixed=one.fixed + rows * extra) for one in embedding)
    return Activations(
        layer_saved=line("layer"),
        outside_saved=line("outside"),
        forward_working=lines("forward"),
        backward_working=lines("backward"),
        head=tuple(HeadLine(one.fixed, one.per_token, per_row) for one in highest(head)),
        embedding_working=embedding,
    )


def top(values: np.ndarray) -> float:
    return float(values.max(initial=0))


def matching(values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The same moments of all runs; only the highest of each where the runs did not do the same."""
    if len({len(found) for found in values}) == 1:
        return [np.asarray(found, float) for found in values]
    return [np.array([top(found)], float) for found in values]


def lines_through(values: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]], *, packing: bool) -> list[Line]:
    """For each moment the line through its values in three runs of these (examples, length).

    Where all examples are one token long, or nothing depends on pairs of tokens, the first two runs decide.
    """
    table = np.stack(values)
    tokens = np.array([count * length for count, length in sizes], float)
    pairs = tokens * (tokens if packing else np.array([length for _, length in sizes], float))
    per_pair = np.zeros(table.shape[1])
    if max(length for _, length in sizes) > 1:
        per_pair = np.linalg.solve(np.stack([np.ones(3), tokens, pairs], axis=1), table)[2]
        per_pair = np.where(per_pair > PAIR_BYTES, per_pair, 0.0)
    rest = table - pairs[:, None] * per_pair
    per_token = (rest[1] - rest[0]) / (tokens[1] - tokens[0])
    fixed = rest[0] - per_token * tokens[0]
    return [Line(*map(float, found)) for found in zip(fixed, per_token, per_pair, strict=True)]


def highest(lines: Sequence[Line]) -> tuple[Line, ...]:
    """Those that are the highest somewhere."""
    if not lines:
        return (Line(),)
    table = np.array([[line.fixed, line.per_token, line.per_pair] for line in lines])
    grid = np.array([[1, tokens, tokens * length] for tokens, length in GRID], float)
    winners = dict.fromkeys(int(i) for i in (grid @ table.T).argmax(1))
    return tuple(lines[i] for i in sorted(winners))
