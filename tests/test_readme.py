"""The README names every file of the project, and no other."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_table_of_the_readme_names_every_tracked_file_and_no_other():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## Every file")[1]
    named = re.findall(r"^\| `([^`]+)` \| \S", table, flags=re.MULTILINE)
    assert sorted(named) == sorted(listed.stdout.split())
