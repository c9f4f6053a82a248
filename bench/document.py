"""docs/benchmarks.md and the figures in README.md, made from the committed results alone: same JSON, same bytes.

docs/scaling.md is made beside them, from a model.
"""

import re
import shlex
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..harness.errors import ConfigError
from ..harness.markup import duration, size
from ..harness.run_dir import write_bytes
from . import memory_tables, published, record, scaling_document, suite
from .bench_limit import gib
from .benchmark import NOT_MEASURED, Benchmark, Choice, Item, Result, Row, Table, completed
from .limit_cases import OWN, PEER, search_key
from .step_cases import row_key
from .table import as_markdown

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
GPU_HARDWARE = "nvidia-h200"
"""The folder of the results that the section on a GPU shows."""
WIDTH = 120

INTRO = """\
<!-- Made by `burnish bench docs` from bench/results. `burnish bench verify` finds what is edited here. -->

# Benchmarks

Every figure on this page was measured by burnish's own suite; what no machine has measured says so and nothing else.
The raw samples, the hardware, the versions, the commit and the command of each are in
`bench/results/<hardware>/<benchmark>.json`.

    make bench                    # the quick suite on the machine at hand, in less than ten minutes
    burnish bench run --record    # the whole suite; keeps its results in bench/results and writes this page
    burnish bench verify          # are these figures what the results say, and does this machine reproduce them?
    burnish bench report          # the same figures as one HTML page with plots

Contenders take turns in the same run. Times are medians, with quartiles where two numbers are given as a range; a ratio
is the median of the ratios of the same round. A row whose results or losses are not the reference's is void and gets no
figure. What is labelled a model or published was not measured here.
"""
NOTHING_YET = "No result is in the repository yet."
ON_A_GPU = """\
## On a GPU (NVIDIA H200)

What `python bench/gpu_session.py FOLDER` measures on such a machine, in nine minutes. What the kernels compile to is in
[kernels.md](kernels.md).
"""


def outputs(
    *,
    results: Path = record.RESULTS,
    document: Path = DOCUMENT,
    readme: Path = README,
    scaling: Path = scaling_document.DOCUMENT,
) -> dict[Path, tuple[str, str]]:
    """File -> (what it says, what the results say). Raises ConfigError for what cannot be read."""
    present = {path: text_of(path) for path in (document, readme, scaling)}
    made = {document: generate(results), readme: with_figures(present[readme], results)}
    made[scaling] = scaling_document.generate()
    return {path: (present[path], made[path]) for path in present}


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; the documents are in a checkout of burnish") from None


def write(
    *,
    results: Path = record.RESULTS,
    document: Path = DOCUMENT,
    readme: Path = README,
    scaling: Path = scaling_document.DOCUMENT,
) -> list[Path]:
    """Writes the files anew. Raises ConfigError."""
    made = outputs(results=results, document=document, readme=readme, scaling=scaling)
    for path, (_, text) in made.items():
        write_bytes(path, text.encode())
    return list(made)


def committed(results: Path) -> dict[str, dict[str, Result]]:
    """Hardware -> benchmark -> result, sorted. Raises ConfigError for a file that is no result."""
    found: dict[str, dict[str, Result]] = {}
    for path in sorted(results.glob("*/*.json")):
        found.setdefault(path.parent.name, {})[path.stem] = record.load(path)
    return found


def generate(results: Path = record.RESULTS) -> str:
    """docs/benchmarks.md. Raises ConfigError."""
    found = committed(results)
    on_gpu = found.pop(GPU_HARDWARE, {})
    parts = [INTRO, *(section(one) for one in found.values())]
    if not found:
        parts.append(NOTHING_YET + "\n")
    return "\n".join([*parts, gpu_section(on_gpu)])


def section(results: Mapping[str, Result]) -> str:
    """One kind of machine: what it is, and the tables of each benchmark."""
    machine = next(iter(results.values()))
    parts = [f"## {machine_name(machine)}\n\n{machine_facts(machine)}\n"]
    names = [name for name in suite.with_results(results) if name in results]
    parts += [benchmark_part(suite.benchmark(name), results[name]) for name in names]
    return "\n".join(parts)


def machine_name(result: Result) -> str:
    found = result["environment"]
    return str(found["gpu"]) if result["device"] == "cuda" else f"{found['num_cpus']} cores of {found['cpu']}"


def machine_facts(result: Result) -> str:
    found = result["environment"]
    features = ", ".join(found["cpu_features"]) or "no matrix instructions"
    facts = [
        f"`{result['hardware']}`",
        f"{found['num_cpus']} cores of {found['cpu']} ({features})",
        f"{size(found['memory_bytes'])} of memory",
        *([found["gpu"]] if found["gpu"] else []),
    ]
    return ", ".join(facts) + "."


def benchmark_part(benchmark: Benchmark, result: Result) -> str:
    parts = [f"### {benchmark.name}: {benchmark.summary}", how_measured(result)]
    for table in benchmark.tables(result):
        parts += [f"#### {table.title}", as_markdown(table)]
    return "\n\n".join(parts) + "\n"


def how_measured(result: Result) -> str:
    """Command, date, commit, versions and options in a sentence."""
    found, options = result["environment"], result["options"]
    versions = ", ".join(f"{name} {version}" for name, version in found["libraries"].items())
    took = f", in {duration(result['time_s'])}" if "time_s" in result else ""
    return (
        f"`{shlex.join(result['command'])}` at commit `{found['git_commit']}` on {result['time'][:10]}{took}, "
        f"{options['num_threads']} threads. Python {found['python']}, {versions}."
    )


def gpu_section(results: Mapping[str, Result]) -> str:
    """Every row that would be measured on a GPU, filled where a result has it."""
    parts = [ON_A_GPU]
    if results:
        parts.append(machine_facts(next(iter(results.values()))) + "\n")
    parts.append("### Targets\n\n" + as_markdown(targets_table(rows_by_key(results.get("kernels")))) + "\n")
    for name in suite.with_results(results):
        benchmark = suite.benchmark(name)
        items = benchmark.items("cuda", Choice())
        if name in results:
            reason = "the result has no such row"
            parts.append(benchmark_part(benchmark, completed(results[name], items, reason=reason)))
        else:
            table = as_markdown(unmeasured_table(items))
            parts.append(f"### {name}: {benchmark.summary}\n\n{table}\n")
    return "\n".join([*parts, published_part()])


def unmeasured_table(items: Sequence[Item]) -> Table:
    """In as few lines as possible, each for all keys that differ in one part: "8b lora · peft" and "8b lora · sft"."""
    keys = [key for item in items for key in item.rows]
    lines = min((grouped(keys, varying) for varying in (1, 2, 3)), key=len)
    return Table("", ("what", "state", "rows"), [(what, NOT_MEASURED, "; ".join(rest)) for what, rest in lines.items()])


def grouped(keys: Sequence[str], varying: int) -> dict[str, list[str]]:
    """Other parts of a key -> the varying parts of all keys that have them; a dot or a comma ends a part."""
    lines: dict[str, list[str]] = {}
    for key in keys:
        parts = re.split(" · |, ", key)
        rest = [parts.pop(varying)] if varying < len(parts) else []
        lines.setdefault(", ".join(parts), []).extend(rest)
    return lines


def published_part() -> str:
    """What others publish about memory, each table with its source."""
    parts = ["### Published by others, not measured here"]
    for table in (published_contexts(), published_curves(), memory_tables.minimums()):
        parts += [f"#### {table.title}", as_markdown(table)]
    return "\n\n".join(parts) + "\n"


def published_contexts() -> Table:
    budgets = sorted({one.budget_gb for one in published.CONTEXTS})
    lines: dict[str, dict[float, str]] = {}
    for one in published.CONTEXTS:
        shown = "out of memory" if one.max_tokens is None else f"{one.max_tokens:,}"
        lines.setdefault(f"{one.model}, {one.label}", {})[one.budget_gb] = shown
    rows = [(name, *(line.get(budget, "") for budget in budgets)) for name, line in lines.items()]
    notes = [f"Published: {source}, {published.CONTEXT_SETTINGS}." for source in sources()]
    return Table("Longest sequence on a card", ("what", *(f"{budget:g} GB" for budget in budgets)), rows, notes)


def sources() -> list[str]:
    return list(dict.fromkeys(one.source for one in published.CONTEXTS))


def published_curves() -> Table:
    rows = [
        (name, *("out of memory" if needed is None else f"{needed:g} GB" for needed in curve))
        for name, curve in published.CURVES_GB.items()
    ]
    notes = [f"Published: {published.LLAMA_FACTORY}, {published.CURVE_SETTINGS}."]
    return Table("Memory by the length of the sequence", ("what", *published.CURVE_TOKENS), rows, notes)


def rows_by_key(result: Result | None) -> dict[str, Row]:
    """The rows that have figures."""
    return {row["key"]: row for row in result["rows"] if row["state"] == "ok"} if result else {}


LAYER = [f"lora_linear · llama-8b {name} · M=8192 r=16" for name in ("qkv", "o", "gate+up", "down")]
DEQUANT = "nf4_dequant · llama-8b up"
LOSS = "linear_cross_entropy · llama-8b · M=8192"
ADAMW = "adapter_adamw · llama-8b all linears · r=16"


def own_s(row: Row, name: str = "burnish") -> float:
    return float(row["contenders"][name]["time_s"]["median"])


def over_layer(*rows: Row) -> str:
    frozen = sum(own_s(row, "frozen") for row in rows)
    return f"{sum(map(own_s, rows)) / frozen:.2f}x"


def of_bandwidth(row: Row) -> str:
    peer = row["ratio"].get("bitsandbytes")
    return (
        f"{100 * row['share_of_peak']:.0f} %, {peer['median']:.1f}x" if peer else f"{100 * row['share_of_peak']:.0f} %"
    )


def by_token(row: Row) -> str:
    return f"{1e6 * own_s(row) / row['case']['M']:.1f} µs"


TARGETS: Sequence[tuple[str, str, Sequence[str], Callable[..., str]]] = (
    (
        "LoRA over a whole Llama-3-8B layer (r = 16, dropout 0.1, M = 8192), against its frozen products",
        "at most 1.05x",
        LAYER,
        over_layer,
    ),
    ("`nf4_dequant`", "85 % of memory bandwidth, 1.3x bitsandbytes", [DEQUANT], of_bandwidth),
    (
        "`linear_cross_entropy` (K = 4096, V = 128256), a token",
        "at most 3.0 µs (12.3 ms for M = 4096)",
        [LOSS],
        by_token,
    ),
    (
        "`adapter_adamw` (41.9 million parameters)",
        "at most 0.2 ms",
        [ADAMW],
        lambda row: f"{1000 * own_s(row):.2f} ms",
    ),
)
"""What, the target, the rows of the kernels benchmark it is read from, and how."""


def targets_table(rows: Mapping[str, Row]) -> Table:
    cells = [
        (what, target, read(*(rows[key] for key in keys)) if set(keys) <= rows.keys() else NOT_MEASURED)
        for what, target, keys, read in TARGETS
    ]
    return Table("", ("what", "target", "measured"), cells)


MARKED = re.compile(r"(<!-- figures -->)(.*?)(<!-- /figures -->)", re.DOTALL)
README_CASE = "smollm2-135m lora 4x256"
README_LIMIT = ("1.5B", "qlora")
LINK = "[benchmarks](docs/benchmarks.md)"


def with_figures(text: str, results: Path) -> str:
    """The README with the sentence of `figures_sentence` between its marks. Raises ConfigError if it has none."""
    if not MARKED.search(text):
        raise ConfigError("README.md has no <!-- figures --> … <!-- /figures --> around its figures")
    lines = textwrap.wrap(figures_sentence(committed(results)), WIDTH, initial_indent="  ", subsequent_indent="  ")
    return MARKED.sub(lambda found: "\n".join([found[1], *lines]) + found[3], text, count=1)


def figures_sentence(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The step on the first CPU that has PEFT's, SFTTrainer's and burnish's; then the smallest limit of memory."""
    usual = "How much faster a step is, and in how much memory"
    found = next(filter(None, map(step_sentence, results.values())), usual)
    limit = next(filter(None, map(limit_sentence, results.values())), "")
    return f"{found}{limit} ({LINK})."


def step_sentence(benchmarks: Mapping[str, Any]) -> str | None:
    rows = rows_by_key(benchmarks.get("step"))
    own, peft, sft = (rows.get(row_key(README_CASE, mode)) for mode in ("burnish", "peft", "sft"))
    if not (own and peft and sft):
        return None
    num_cpus = benchmarks["step"]["environment"]["num_cpus"]
    share = own["peak_bytes"] / peft["peak_bytes"]
    return (
        f"On {num_cpus} CPU cores a step is {peft['faster']['median']:.1f} times faster than PEFT's as installed and "
        f"{sft['faster']['median']:.1f} times faster than SFTTrainer's, at {share:.2f} of PEFT's memory"
    )


def limit_sentence(benchmarks: Mapping[str, Any]) -> str | None:
    rows = rows_by_key(benchmarks.get("limit"))
    searched = (rows.get(search_key(*README_LIMIT, mode), {}) for mode in (OWN, PEER))
    own, peer = (row.get("smallest_limit_bytes") for row in searched)
    if not (own and peer):
        return None
    return f"; QLoRA of 1.5 billion weights completes under a memory limit of {gib(own)}, with {PEER} under {gib(peer)}"
