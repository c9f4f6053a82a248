"""Every Triton kernel compiles for real GPUs: no spills, memory that exists, tensor cores; no worse than recorded.

The kernels compile in a process of their own, because here they are the interpreter's.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import triton
from burnish.kernels.compile_gate import ARCHITECTURES, Row, problems, read_record, regressions, table
from burnish.kernels.registry import OPS

DOCS = Path(__file__).resolve().parents[1] / "docs"
ROW = Row("op", "kernel", "BM=16 warps=4 stages=2", 90, 100, 0, 4096, True, True, 1000, 1.5)


@pytest.fixture(scope="module")
def rows():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "burnish.kernels.compile_gate"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return [Row(**row) for row in json.loads(done.stdout)]


def test_every_kernel_of_every_operation_compiles_for_every_architecture(rows):
    expected = sum(len(kernel.configs) for op in OPS.values() for kernel in op.kernels) * len(ARCHITECTURES)
    assert len(rows) == len({row.key for row in rows}) == expected
    assert not [text for row in rows for text in problems(row)]


def test_nothing_became_worse_than_the_record(rows):
    version, recorded = read_record(DOCS)
    if triton.__version__ != version:
        pytest.skip(f"the record was made with Triton {version}, this is {triton.__version__}")
    assert not regressions(rows, recorded)


def test_the_page_shows_the_record():
    version, recorded = read_record(DOCS)
    assert (DOCS / "kernels.md").read_text() == table(recorded, version)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"spill_bytes": 8}, "spills"), ({"shared_bytes": 10**6}, "shared"), ({"mma": False}, "tensor cores")],
)
def test_a_bad_kernel_is_a_problem(change, word):
    assert not problems(ROW)
    assert word in problems(replace(ROW, **change))[0]


@pytest.mark.parametrize("change", [{"instructions": 1200}, {"registers": 120}, {"shared_bytes": 8192}, {"arch": 80}])
def test_a_worse_kernel_is_a_regression(change):
    assert not regressions([ROW], [ROW])
    assert regressions([replace(ROW, **change)], [ROW])
    assert Row(**asdict(ROW)) == ROW
