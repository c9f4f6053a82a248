"""The image configs as shipped: pre-trained on five digits, fine-tuned on the other five, better than no training."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parent.parent / "configs"
MOST_FREQUENT_DIGIT = 0.25
"""No digit makes up more of a validation split."""


@pytest.mark.parametrize(
    ("backbone", "least"), [("resnet", 0.75), pytest.param("vit", 0.80, marks=pytest.mark.nightly)]
)
def test_a_backbone_pre_trained_on_five_digits_learns_the_other_five(tmp_path, backbone, least):
    for name in (f"digits_{backbone}_pretrain", f"digits_{backbone}"):
        command = [sys.executable, "-m", "burnish.launch.cli", "train", str(CONFIGS / f"{name}.yaml"), "--json"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-2000:]
    lines = (tmp_path / "runs" / f"digits-{backbone}" / "metrics.jsonl").read_text().splitlines()
    evals = [record for record in map(json.loads, lines) if record["kind"] == "eval"]
    assert evals[-1]["accuracy"] > max(least, evals[0]["accuracy"], MOST_FREQUENT_DIGIT)
    assert evals[-1]["macro_f1"] > evals[0]["macro_f1"]
