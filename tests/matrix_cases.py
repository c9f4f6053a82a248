"""The compatibility matrix: every combination of method, quantisation, ZeRO stage, offload and packing, run or refused.

`python tests/matrix_cases.py` runs all of them (ten minutes) and writes docs/compatibility.json and .md. All runs have
one rank, under DeepSpeed as soon as there is a stage or an offload; test_zero and test_offload have two.
"""

import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import ranks
import tiny
import torch
from burnish.harness.errors import BurnishError, ConfigError
from burnish.harness.run_dir import RunDir
from distributed import on_ranks
from transformers import LlamaConfig, LlamaForCausalLM

DOCS = Path(__file__).resolve().parents[1] / "docs"
RECORD, DOCUMENT = DOCS / "compatibility.json", DOCS / "compatibility.md"
STEPS, SAVED_STEP, REL = 4, 2, 1e-4
CHUNK, AT_ONCE = 12, 4
"""Runs of one set of processes, and sets at the same time where all combinations are run."""
RUN_ONE_IN = 8
"""Of the sample."""
OK = "ok"
FACTS = ("run", "resume", "adapter", "merged")
"""Ran with the losses of the same run without ZeRO and offload; resumed with the same losses; exported, if padded."""
OFFLOADS = {
    "none": ("none", "none"),
    "optimizer cpu": ("cpu", "none"),
    "optimizer nvme": ("nvme", "none"),
    "parameters cpu": ("none", "cpu"),
    "parameters nvme": ("none", "nvme"),
    "both cpu": ("cpu", "cpu"),
    "both nvme": ("nvme", "nvme"),
}
"""Name -> memory.offload_optimizer, memory.offload_param."""
METHODS = ("full", "freeze", "lora", "dora", "qlora")
QUANTIZATIONS = ("none", "nf4", "int8")
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, order=True)
class Cell:
    """One combination."""

    method: str
    quantization: str
    zero_stage: int
    offload: str
    packing: bool

    @property
    def key(self) -> str:
        packing = "packed" if self.packing else "padded"
        return f"{self.method}, {self.quantization}, ZeRO {self.zero_stage}, {self.offload}, {packing}"

    @property
    def reference(self) -> "Cell":
        """The same run without ZeRO and offload."""
        return Cell(self.method, self.quantization, 0, "none", self.packing)


def all_cells() -> list[Cell]:
    return [Cell(*values) for values in product(METHODS, QUANTIZATIONS, STAGES, OFFLOADS, (False, True))]


def sample(recorded: dict[str, dict[str, str]]) -> list[Cell]:
    """Refused cells that together show every pair of values of two axes, and a few of those that do so and run.

    Without files, whose operator takes minutes to build.
    """
    cells = [cell for cell in all_cells() if "nvme" not in cell.offload]
    refused = [cell for cell in cells if recorded[cell.key]["run"] != OK]
    running = [cell for cell in cells if recorded[cell.key]["run"] == OK]
    return _covering(refused) + _covering(running)[::RUN_ONE_IN]


def _covering(cells: list[Cell]) -> list[Cell]:
    """Greedy: the cell with the most pairs that are not shown yet, until all that the cells have are."""
    pairs_of = {cell: set(combinations(asdict(cell).items(), 2)) for cell in cells}
    left = set().union(*pairs_of.values())
    chosen = []
    while left:
        best = max(cells, key=lambda cell: len(pairs_of[cell] & left))
        chosen.append(best)
        left -= pairs_of[best]
    return chosen


def save_model(folder: Path) -> None:
    """A 2-layer Llama whose feed-forward weights are just large enough to go to files (1 MiB in fp32)."""
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    tiny.write_rows(folder / "rows.jsonl", num_rows=24)


def changes_of(cell: Cell, folder: Path) -> dict[str, Any]:
    """The cell as changes of the config of `tiny`."""
    optimizer, param = OFFLOADS[cell.offload]
    adapters: dict[str, dict[str, Any]] = {
        "full": {"method": "full"},
        "freeze": {"method": "freeze", "last_layers": 1},
    }
    low_rank = {"method": cell.method, "rank": 4, "alpha": 8, "dropout": 0.0}
    quantization: dict[str, Any] = {"type": cell.quantization}
    if cell.quantization == "nf4":
        quantization["double_quant"] = True
    return {
        "adapter": adapters.get(cell.method, low_rank),
        "quantization": quantization,
        "memory": {"zero_stage": cell.zero_stage, "offload_optimizer": optimizer, "offload_param": param}
        | ({"nvme_path": str(folder / "nvme")} if "nvme" in (optimizer, param) else {}),
        "data__packing": cell.packing,
        "optimizer": {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1},
        "train": {"max_steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "num_threads": 1},
        "checkpoint": {"every_steps": SAVED_STEP, "keep": 2},
        "generation": {"prompts": []},
        "eval": {"max_examples": 4},
    }


def outcomes(cells: Iterable[Cell], folder: Path, *, at_once: int = 1) -> dict[str, dict[str, str]]:
    """Runs the cells and the references they are compared with: {key: {fact: "ok" or the sentence that refuses}}."""
    wanted = list(cells)
    found: dict[Cell, dict[str, Any]] = {}
    jobs = []
    for cell in dict.fromkeys([*wanted, *(cell.reference for cell in wanted)]):
        job = _job(cell, folder)
        if isinstance(job, str):
            found[cell] = {"run": job}
        else:
            jobs.append((cell, job))
    chunks = [jobs[start : start + CHUNK] for start in range(0, len(jobs), CHUNK)]
    with ThreadPoolExecutor(at_once) as pool:
        for chunk, results in zip(chunks, pool.map(partial(_run_chunk, folder), chunks), strict=True):
            found |= {cell: result for (cell, _), result in zip(chunk, results, strict=True)}
    for cell, facts in found.items():
        _compare(facts, found[cell.reference])
    return {
        cell.key: {fact: facts[fact] for fact in FACTS if fact in facts}
        for cell, facts in found.items()
        if cell in wanted
    }


def _run_chunk(folder: Path, chunk: list[tuple[Cell, ranks.Job]]) -> list[dict[str, Any]]:
    """The results of some jobs, run one after another by one set of processes."""
    place = Path(tempfile.mkdtemp(dir=folder))
    return on_ranks(1, place, run_cells, [job for _, job in chunk])[0]


def _job(cell: Cell, folder: Path) -> ranks.Job | str:
    """The prepared run of a cell, or the sentence with which its config is refused."""
    place = folder / f"run-{cell.key.replace(', ', '-').replace(' ', '')}"
    place.mkdir()
    for name in ("model", "rows.jsonl"):
        (place / name).symlink_to(folder / name)
    try:
        return ranks.make_job(place, world=1, name="cell", **changes_of(cell, folder))
    except ConfigError as error:
        return sentence_of(str(error))


def sentence_of(message: str) -> str:
    """What is said of a config file, without the file and the line: one sentence for every mistake."""
    return "; and ".join(re.sub(r"^\S+\.yaml:\d+: ", "", line) for line in message.splitlines())


def run_cells(rank: int, world: int, jobs: list[ranks.Job]) -> list[dict[str, Any]]:
    """Every job from the start, then from its middle checkpoint, then its exports; on this rank."""
    return [_run_cell(rank, world, job) for job in jobs]


def _run_cell(rank: int, world: int, job: ranks.Job) -> dict[str, Any]:
    from burnish.harness.export import export_run

    run = RunDir(job.plan["run_dir"])
    try:
        ranks.run_job(job, rank, world)
        losses = ranks.losses(job)
        torch.distributed.barrier()
        if rank == 0:
            shutil.rmtree(run.path / "checkpoints" / f"step_{STEPS:08d}")
        torch.distributed.barrier()
        ranks.run_job(job, rank, world)
        found: dict[str, Any] = {"losses": losses, "resumed": ranks.losses(job)}
    except BurnishError as error:
        return {"run": str(error)}
    if rank > 0 or job.plan["config"]["data"]["packing"]:
        return found
    for kind in ("adapter", "merged"):
        try:
            export_run(run.path, kind, run.path / kind / "export")
            found[kind] = OK
        except ConfigError as error:
            found[kind] = str(error).replace(str(run.path), "RUN")
    return found


def _compare(facts: dict[str, Any], reference: dict[str, Any]) -> None:
    """Turns losses into facts."""
    if "losses" not in facts:
        return
    facts["run"] = OK if _is_close(facts["losses"], reference["losses"]) else f"losses differ: {facts['losses']}"
    facts["resume"] = OK if facts["resumed"] == facts["losses"] else f"resumed losses differ: {facts['resumed']}"


def _is_close(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and all(abs(a - b) <= REL * abs(b) for a, b in zip(one, other, strict=True))


def read_record() -> dict[str, dict[str, str]]:
    """The recorded outcome of every cell by its key."""
    record = json.loads(RECORD.read_text())
    reasons = [OK, *record["reasons"]]
    return {
        key: {fact: reasons[number] for fact, number in zip(FACTS, numbers, strict=False)}
        for key, numbers in record["cells"].items()
    }


def record_of(found: dict[str, dict[str, str]]) -> str:
    """The JSON: reasons once, and for every cell 0 for ok or the number of the reason, by fact."""
    reasons = sorted({value for facts in found.values() for value in facts.values()} - {OK})
    numbers = {OK: 0} | {reason: number for number, reason in enumerate(reasons, start=1)}
    cells = (f"  {json.dumps(key)}: {[numbers[value] for value in facts.values()]}" for key, facts in found.items())
    listed = ",\n".join(f"  {json.dumps(reason, ensure_ascii=False)}" for reason in reasons)
    return '{\n "reasons": [\n' + listed + '\n ],\n "cells": {\n' + ",\n".join(cells) + "\n }\n}\n"


def document_of(recorded: dict[str, dict[str, str]]) -> str:
    """docs/compatibility.md: which combinations run, and why the others are refused."""
    notes: dict[str, int] = {}
    kinds = [
        ("full", "none"),
        ("freeze", "none"),
        ("lora", "none"),
        ("dora", "none"),
        ("qlora", "nf4"),
        ("qlora", "int8"),
    ]
    lines = [
        "# What goes with what",
        "",
        "Written by `python tests/matrix_cases.py` from what happened when every combination was run on a small Llama.",
        f"**yes**: on one rank, padded and packed, the {STEPS} losses are those of the run without ZeRO and offload "
        f"(to {REL:g}), the run resumed from step {SAVED_STEP} has them bit for bit, and the saved result reloads to "
        "the same loss. Numbers are reasons, in burnish's own words, below.",
        "",
        "| ZeRO | offload | " + " | ".join(method if q == "none" else f"{method} {q}" for method, q in kinds) + " |",
        "|---|---|" + "---|" * len(kinds),
    ]
    for stage, offload in product(STAGES, OFFLOADS):
        texts = [_stage_text(recorded, kind, stage, offload, notes) for kind in kinds]
        lines.append(f"| {stage} | {offload} | " + " | ".join(texts) + " |")
    lines += [
        "",
        "| method | " + " | ".join(f"quantization {q}" for q in QUANTIZATIONS) + " | export adapter | export merged |",
    ]
    lines.append("|---" * (len(QUANTIZATIONS) + 3) + "|")
    for method in METHODS:
        facts = [recorded[Cell(method, q, 0, "none", False).key] for q in QUANTIZATIONS]
        runs = next(each for each in facts if each["run"] == OK)
        texts = [_text(each["run"], notes) for each in facts] + [
            _text(runs[kind], notes) for kind in ("adapter", "merged")
        ]
        lines.append(f"| {method} | " + " | ".join(texts) + " |")
    lines += ["", *(f"{number}. {reason}" for reason, number in notes.items()), ""]
    return "\n".join(lines)


def _text(value: str, notes: dict[str, int]) -> str:
    return "yes" if value == OK else f"[{notes.setdefault(value, len(notes) + 1)}]"


def _stage_text(
    recorded: dict[str, dict[str, str]], kind: tuple[str, str], stage: int, offload: str, notes: dict[str, int]
) -> str:
    """One entry of the large table: of both packings, of runs and resumes, and of two ranks where they were run."""
    cells = [Cell(*kind, stage, offload, packing) for packing in (False, True)]
    values = {recorded[cell.key].get(fact, OK) for cell in cells for fact in ("run", "resume")} - {OK}
    if values:
        return " ".join(_text(value, notes) for value in sorted(values))
    return "yes"


def main() -> int:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder)
        found = outcomes(all_cells(), folder, at_once=AT_ONCE)
    RECORD.write_text(record_of(found))
    DOCUMENT.write_text(document_of(read_record()))
    print(f"{len(found)} combinations in {time.monotonic() - start:.0f} s: {RECORD}, {DOCUMENT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
