"""What `burnish data CONFIG` shows: rows, lengths, duplicates, leakage, what is learned, samples with their mask."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from ..config import Config
from ..tasks import Example, get_task
from .prepare import SPLITS, prepare_data
from .store import Store

NUM_SAMPLES = 3
NUM_BINS = 10
NUM_EXAMPLES = 3
EXCERPT = 100
BAR = 40
GREEN, DIM, BOLD, RESET = "\x1b[32m", "\x1b[2m", "\x1b[1m", "\x1b[0m"


def audit(config: Config, cwd: str, runs_dir: str) -> dict[str, Any]:
    """Prepares the data (or finds it prepared) and measures every split. JSON-able. Raises as `prepare_data` does."""
    prepared = prepare_data(config, cwd, runs_dir)
    processor = get_task(config.task.type).load_processor(config)
    stores = {name: Store(folder) for name in SPLITS if (folder := getattr(prepared, name)) is not None}
    prints = {name: [_prints(store[i], processor) for i in range(len(store))] for name, store in stores.items()}
    splits = {}
    for name, store in stores.items():
        counts = prepared.counts[name]
        splits[name] = counts | {
            "lengths": _lengths(store.lengths) if "input_ids" in store.manifest["fields"] else None,
            "truncated_share": counts["truncated"] / counts["kept"],
            "supervised_share": _supervised_share(store),
            "duplicates": _duplicates(prints[name]),
        }
    held_out = [name for name in ("validation", "test") if name in stores]
    return {
        "splits": splits,
        "labels": prepared.labels,
        "label_counts": _label_counts(stores["train"], prepared.labels),
        "leakage": {name: _leakage(prints["train"], prints[name], stores[name], processor) for name in held_out},
        "stop_token": _stop_token(stores["train"], processor),
        "samples": _samples(stores["train"], processor),
    }


def _supervised_share(store: Store) -> float | None:
    """Learned tokens among all; None where a row has one target and not one per token."""
    if "loss_mask" not in store.manifest["fields"]:
        return None
    return float(store.num_supervised.sum() / store.lengths.sum())


def _text(example: Example, processor: Any) -> str:
    return processor.decode(example["input_ids"].tolist()) if "input_ids" in example else ""


def _prints(example: Example, processor: Any) -> dict[str, bytes]:
    """Hashes under which two examples are the same: all of it, its text but for case and spaces, its prompt."""
    whole = hashlib.sha256()
    for name in sorted(example):
        whole.update(example[name].tobytes())
    prints = {"exact": whole.digest()}
    if "input_ids" in example:
        normalised = " ".join(_text(example, processor).lower().split())
        prints["near"] = hashlib.sha256(normalised.encode()).digest()
    if "loss_mask" in example:
        learned = np.flatnonzero(example["loss_mask"])
        start = int(learned[0])
        if start > 1:
            prints["prompt"] = hashlib.sha256(example["input_ids"][:start].tobytes()).digest()
    return prints


def _duplicates(prints: list[dict[str, bytes]]) -> dict[str, int]:
    """Rows that repeat an earlier one."""
    return {
        kind: sum(count - 1 for count in Counter(each[kind] for each in prints if kind in each).values())
        for kind in ("exact", "near")
    }


def _leakage(
    train: list[dict[str, bytes]], other: list[dict[str, bytes]], store: Store, processor: Any
) -> dict[str, Any]:
    """Rows of a held-out split that training has as well: exactly, but for case and spaces, or with the same prompt."""
    found: dict[str, Any] = {}
    examples: list[str] = []
    for kind in ("exact", "near", "prompt"):
        known = {each[kind] for each in train if kind in each}
        rows = [i for i, each in enumerate(other) if each.get(kind) in known]
        found[kind] = len(rows)
        examples += [_excerpt(_text(store[i], processor) or f"row {i}") for i in rows]
    return (
        found
        | {"share": found["near" if found["near"] else "exact"] / max(len(other), 1)}
        | {"examples": list(dict.fromkeys(examples))[:NUM_EXAMPLES]}
    )


def _excerpt(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= EXCERPT else "…" + flat[-EXCERPT:]


def _lengths(lengths: np.ndarray) -> dict[str, Any]:
    counts, edges = np.histogram(lengths, bins=NUM_BINS if lengths.min() < lengths.max() else 1)
    bins = [
        {"from": float(low), "to": float(high), "count": int(count)}
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    median, p95 = np.percentile(lengths, [50, 95])
    return {
        "min": int(lengths.min()),
        "median": float(median),
        "mean": float(lengths.mean()),
        "p95": float(p95),
        "max": int(lengths.max()),
        "histogram": bins,
    }


def _label_counts(store: Store, labels: list[str] | None) -> dict[str, int] | None:
    if labels is None:
        return None
    counts = Counter(int(store[i]["label"].reshape(-1)[0]) for i in range(len(store)))
    return {name: counts[number] for number, name in enumerate(labels)}


def _stop_token(store: Store, processor: Any) -> dict[str, Any] | None:
    """Share of the rows in which the model learns to stop: a special token among what is learned. None without text."""
    if "loss_mask" not in store.manifest["fields"]:
        return None
    special = set(processor.all_special_ids) - {processor.unk_token_id}
    trained = Counter[int]()
    rows = 0
    for example in _examples(store):
        learned = example["input_ids"][example["loss_mask"].astype(bool)]
        stops = special.intersection(learned.tolist())
        trained.update(stops)
        rows += bool(stops)
    tokens = [processor.convert_ids_to_tokens(number) for number, _ in trained.most_common()]
    return {"share": rows / len(store), "tokens": tokens}


def _examples(store: Store) -> Iterator[Example]:
    return (store[i] for i in range(len(store)))


def _samples(store: Store, processor: Any) -> list[dict[str, Any]]:
    """The first rows as [text, is learned] per run of tokens; empty without text."""
    if "loss_mask" not in store.manifest["fields"]:
        return []
    samples = []
    for i in range(min(NUM_SAMPLES, len(store))):
        ids, mask = store[i]["input_ids"].tolist(), store[i]["loss_mask"].tolist()
        edges = [0, *(j for j in range(1, len(ids)) if mask[j] != mask[j - 1]), len(ids)]
        runs = [
            {"text": processor.decode(ids[start:end]), "learned": bool(mask[start]), "tokens": end - start}
            for start, end in pairwise(edges)
        ]
        samples.append({"row": i, "tokens": len(ids), "runs": runs})
    return samples


def render(found: dict[str, Any]) -> str:
    """The audit as text for a terminal; learned tokens are green, the others dim."""
    lines: list[str] = []
    for name, split in found["splits"].items():
        lines += _render_split(name, split)
    for name, leak in found["leakage"].items():
        lines.append(
            f"{BOLD}leakage train -> {name}{RESET}  exact {leak['exact']}, but for case and spaces {leak['near']}, "
            f"same prompt {leak['prompt']}"
        )
        lines += [f"    {_safe(example)}" for example in leak["examples"]]
    if found["label_counts"]:
        shown = ", ".join(f"{_safe(name)} {count}" for name, count in list(found["label_counts"].items())[:40])
        lines.append(f"{BOLD}labels{RESET}  {shown}")
    stop = found["stop_token"]
    if stop is not None:
        lines.append(
            f"{BOLD}stop token{RESET}  learned in {stop['share']:.1%} of the rows: {', '.join(stop['tokens'])}"
        )
    for sample in found["samples"]:
        lines.append(f"{BOLD}sample {sample['row']}{RESET}  {sample['tokens']} tokens, learned ones in green")
        lines.append(
            "".join(f"{GREEN if run['learned'] else DIM}{_safe(run['text'])}{RESET}" for run in sample["runs"])
        )
    return "\n".join(lines)


def _render_split(name: str, split: dict[str, Any]) -> list[str]:
    lengths, copies = split["lengths"], split["duplicates"]
    share = split["supervised_share"]
    lines = [
        f"{BOLD}{name}{RESET}  {split['kept']} of {split['rows']} rows kept, {split['bad']} bad, "
        f"{sum(split['dropped'].values())} left out, {split['truncated_share']:.1%} truncated"
        + ("" if share is None else f", {share:.1%} of the tokens learned"),
        f"  duplicates: {copies['exact']} exact, {copies['near']} but for case and spaces",
    ]
    lines += _render_lengths(lengths) if lengths is not None else []
    for kind, facts in split["rejected"].items():
        lines.append(f"  bad: {facts['count']} {kind}: {_safe(', '.join(facts['examples'][:5]))}")
    lines += [f"  left out: {count} {kind}" for kind, count in split["dropped"].items()]
    return lines


def _render_lengths(lengths: dict[str, Any]) -> list[str]:
    shown = f"{lengths['min']} to {lengths['max']}, median {lengths['median']:g}, p95 {lengths['p95']:g}"
    lines = [f"  tokens a row: {shown}"]
    top = max(each["count"] for each in lengths["histogram"])
    for each in lengths["histogram"]:
        bar = "█" * -(-each["count"] * BAR // max(top, 1))
        lines.append(f"  {each['from']:7.0f} … {each['to']:<7.0f} {bar} {each['count']}")
    return lines


def _safe(text: str) -> str:
    """Data must not steer the terminal: control characters are shown as pictures."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f]", lambda match: chr(0x2400 + min(ord(match[0]), 0x21)), text)
