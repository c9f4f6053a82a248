"""Sixteen ranks or more on several Ray nodes of one machine train to the end, also when one is killed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from burnish.launch.resources import available_bytes

BYTES_PER_RANK = 640 * 2**20
"""A process of its own, with a share of the cluster's."""
SOAK = Path(__file__).with_name("soak.py")


@pytest.mark.nightly
def test_many_ranks_train_to_the_end_also_when_one_is_killed():
    num_ranks = next((n for n in (32, 16) if n * BYTES_PER_RANK < available_bytes()), None)
    if num_ranks is None:
        pytest.skip("16 ranks need 10 GiB of memory")
    command = [sys.executable, str(SOAK), "--ranks", str(num_ranks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [case["restarts"] for case in cases] == [0, 1]
    assert cases[1]["lost_steps"] == 2
    assert cases[0]["losses"] == cases[1]["losses"]
    assert cases[0]["loss_difference"] < 1e-5
