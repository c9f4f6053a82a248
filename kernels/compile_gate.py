"""Compiles every Triton kernel for real GPUs without having one, and reads what the code needs from the cubin.

`python -m burnish.kernels.compile_gate` prints one JSON row per kernel, configuration and architecture: registers,
bytes spilled, shared memory, tensor-core instructions, machine instructions and instructions per output element.
Options: operation names, to compile only theirs; or `--record FOLDER`, which writes kernels.json and kernels.md, the
table that later runs are compared with. TRITON_INTERPRET must not be set.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .op import Config, Kernel
from .registry import OPS

ARCHITECTURES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Compute capability -> shared memory that one block may use, in bytes (CUDA C Programming Guide, table of limits)."""
MMA = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
"""PTX of the tensor cores of each architecture."""
TOOLS = Path(nvidia.__file__).parent / "bin"


@dataclass(frozen=True)
class Row:
    """What one compiled kernel needs. `per_element` is 0 where the configuration counts no elements."""

    op: str
    kernel: str
    config: str
    arch: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    mma: bool
    needs_mma: bool
    instructions: int
    per_element: float

    @property
    def key(self) -> str:
        return f"{self.kernel}[{self.config}] sm_{self.arch}"


def compile_kernel(op: str, kernel: Kernel, config: Config, arch: int) -> Row:
    """Compiles one configuration. Raises what Triton raises where it cannot."""
    names = kernel.fn.arg_names
    types = {name: "constexpr" if name in config.constants else kernel.signature[name] for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name in names
        if types[name].startswith("*") or name in kernel.divisible
    }
    constants = {(names.index(name),): value for name, value in config.constants.items()}
    source = ASTSource(fn=kernel.fn, signature=types, constexprs=constants, attrs=aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    usage, count = _inspect(compiled.asm["cubin"])
    shown = ",".join(f"{name}={value}" for name, value in config.constants.items())
    return Row(
        op=op,
        kernel=kernel.fn.fn.__name__.strip("_"),
        config=f"{shown} warps={config.num_warps} stages={config.num_stages}",
        arch=arch,
        registers=usage["REG"],
        spill_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        mma=MMA[arch] in ptx or "mma.sync" in ptx,
        needs_mma=kernel.uses_mma,
        instructions=count,
        per_element=round(count * 32 * config.num_warps / config.elements, 2) if config.elements else 0.0,
    )


def _inspect(cubin: bytes) -> tuple[dict[str, int], int]:
    """Resource usage and number of machine instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name)
        code = _run(str(TOOLS / "cuobjdump"), "-sass", file.name)
    words = usage.replace("\n", " ").split()
    pairs = dict(word.split(":", 1) for word in words if ":" in word and word.split(":", 1)[1].isdigit())
    count = sum(";" in line and line.lstrip().startswith("/*") for line in code.splitlines())
    return {name: int(pairs[name]) for name in ("REG", "STACK", "LOCAL")}, count


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def jobs(only: list[str]) -> Iterator[tuple[str, int, int, int]]:
    """(operation, number of its kernel, number of the configuration, architecture)."""
    for name, op in OPS.items():
        if only and name not in only:
            continue
        for i, kernel in enumerate(op.kernels):
            for j in range(len(kernel.configs)):
                for arch in ARCHITECTURES:
                    yield name, i, j, arch


def _compile_job(job: tuple[str, int, int, int]) -> Row:
    name, i, j, arch = job
    kernel = OPS[name].kernels[i]
    try:
        return compile_kernel(name, kernel, kernel.configs[j], arch)
    except Exception as error:
        raise RuntimeError(f"{name}: {kernel.fn.fn.__name__} {kernel.configs[j]} sm_{arch}: {error}") from None


def compile_all(only: list[str]) -> list[Row]:
    """Every row, compiled by two processes."""
    with ProcessPoolExecutor(2) as pool:
        return list(pool.map(_compile_job, jobs(only), chunksize=1))


def problems(row: Row) -> list[str]:
    """What must not be: spills, too much shared memory, a matrix product without tensor cores."""
    found = []
    if row.spill_bytes:
        found.append(f"{row.key} spills {row.spill_bytes} bytes")
    if row.shared_bytes > ARCHITECTURES[row.arch]:
        found.append(f"{row.key} needs {row.shared_bytes} bytes of shared memory, {ARCHITECTURES[row.arch]} exist")
    if row.needs_mma and not row.mma:
        found.append(f"{row.key} uses no tensor cores")
    return found


def regressions(rows: list[Row], recorded: list[Row]) -> list[str]:
    """What is worse than recorded: 10 % more instructions, 16 more registers, more shared memory; unknown rows."""
    before = {row.key: row for row in recorded}
    found = [f"{row.key} is not in the record" for row in rows if row.key not in before]
    found += [f"{key} is recorded but not compiled" for key in sorted(before.keys() - {row.key for row in rows})]
    for row in rows:
        old = before.get(row.key, row)
        if row.instructions > 1.1 * old.instructions:
            found.append(f"{row.key} has {row.instructions} instructions, {old.instructions} are recorded")
        if row.registers > old.registers + 16:
            found.append(f"{row.key} has {row.registers} registers, {old.registers} are recorded")
        if row.shared_bytes > old.shared_bytes:
            found.append(f"{row.key} has {row.shared_bytes} bytes of shared memory, {old.shared_bytes} are recorded")
    return found


def table(rows: list[Row], version: str) -> str:
    """The rows as a page in Markdown: one line per kernel and configuration, the architectures beside each other."""
    heads = " | ".join(f"sm_{arch}" for arch in ARCHITECTURES)
    lines = [
        "# What the Triton kernels compile to",
        "",
        f"Made by `python -m burnish.kernels.compile_gate --record docs` with Triton {version}, without a GPU.",
        "Each cell: registers a thread / shared memory in KiB / machine instructions (those for an output element).",
        "No row spills a register. tc: the code contains tensor-core instructions on every architecture.",
        "",
        f"| operation | kernel and configuration | {heads} | |",
        "|---|---|" + "---|" * len(ARCHITECTURES) + "---|",
    ]
    by_config: dict[tuple[str, str, str], dict[int, Row]] = {}
    for row in rows:
        by_config.setdefault((row.op, row.kernel, row.config), {})[row.arch] = row
    for (op, kernel, config), cells in by_config.items():
        shown = " | ".join(_cell(cells[arch]) for arch in ARCHITECTURES)
        mma = "tc" if all(row.mma for row in cells.values()) else ""
        lines.append(f"| {op} | `{kernel}` {config} | {shown} | {mma} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    per_element = f" ({row.per_element:g})" if row.per_element else ""
    return f"{row.registers} / {row.shared_bytes / 1024:.0f} / {row.instructions}{per_element}"


def record(rows: list[Row], folder: Path) -> None:
    """Writes kernels.json and kernels.md."""
    lines = ",\n  ".join(json.dumps(asdict(row)) for row in rows)
    text = f'{{"triton": "{triton.__version__}", "rows": [\n  {lines}\n]}}\n'
    (folder / "kernels.json").write_text(text, encoding="utf-8")
    (folder / "kernels.md").write_text(table(rows, triton.__version__), encoding="utf-8")


def read_record(folder: Path) -> tuple[str, list[Row]]:
    """The version of Triton and the rows of kernels.json."""
    content = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))
    return content["triton"], [Row(**row) for row in content["rows"]]


def main(arguments: list[str]) -> int:
    """Prints the rows as JSON, or records them; the problems go to stderr and make the exit code 1."""
    is_recording = arguments[:1] == ["--record"]
    rows = compile_all([] if is_recording else arguments)
    found = [text for row in rows for text in problems(row)]
    if is_recording and not found:
        record(rows, Path(arguments[1]))
    elif not is_recording:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    for text in found:
        print(text, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
