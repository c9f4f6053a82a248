"""The wheel holds what the tree holds, and asks for what the code imports."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LAYERS = ("bench", "harness", "kernels", "launch")
NOT_IMPORTED = {
    "accelerate": "transformers loads quantised weights with it, and peft imports it",
    "gguf": "transformers reads GGUF files with it",
    "jinja2": "transformers renders chat templates with it",
    "tensorboard": "torch.utils.tensorboard writes with it",
}
"""Requirements that our sources do not import, and who does."""
OTHERS_BRING = {
    "liger_kernel": "a peer of the kernel benchmark, measured only where it is installed",
    "pytest": "it collects the benchmarks itself; the extra `dev` brings it",
    "tokenizers": "transformers requires it",
    "trl": "a mode of the benchmark, imported where it is asked for; the extra `dev` brings it",
    "unsloth": "a mode of the benchmark, measured only where it is installed",
}
"""Modules that our sources import and that are no requirement of their own."""


def packages_in_tree():
    return {"burnish.kernels"} | {
        ".".join(("burnish", *path.parent.relative_to(ROOT).parts))
        for layer in LAYERS
        for path in (ROOT / layer).rglob("__init__.py")
    }


def test_every_package_of_the_tree_is_listed():
    """A package that is not listed works in an editable install and is missing from the wheel."""
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_in_tree()


def test_every_folder_with_code_is_a_package_but_kernels():
    """A package `kernels` in the project's root would hide Hugging Face's of that name from transformers."""
    folders = {path.parent for layer in LAYERS for path in (ROOT / layer).rglob("*.py")}
    without = {str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()}
    assert without == {"kernels"}
    assert not (ROOT / "__init__.py").exists()


def test_the_wheel_holds_every_module_and_the_licence(tmp_path):
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("building a wheel needs setuptools 77")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for layer in LAYERS:
        shutil.copytree(ROOT / layer, tree / layer, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", tmp_path]
    subprocess.run([*map(str, command), str(tree)], check=True, capture_output=True, timeout=300)
    [wheel] = tmp_path.glob("burnish-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"burnish/{path.relative_to(ROOT)}"
        for layer in LAYERS
        for path in (ROOT / layer).rglob("*")
        if path.is_file() and path.suffix != ".pyc" and "results" not in path.parts
    }
    assert wanted <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [
        name for name in names if name.startswith(("burnish/tests", "tests/", *(f"{layer}/" for layer in LAYERS)))
    ]


def imported():
    """Third-party top-level modules that the sources import."""
    found = set()
    for layer in LAYERS:
        for path in (ROOT / layer).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - OTHERS_BRING.keys()


def test_what_is_imported_is_required_and_what_is_required_is_used():
    required = {canonicalize_name(Requirement(line).name) for line in PROJECT["project"]["dependencies"]}
    owners = packages_distributions()
    used = {canonicalize_name(owners[module][0]) for module in imported()}
    assert used <= required
    assert required - used == set(NOT_IMPORTED)


def test_constraints_pin_each_requirement_to_one_version_without_a_local_tag():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}
    assert len(pins) == len(lines)
    assert all(len(pin.specifier) == 1 and "+" not in str(pin) and pin.url is None for pin in pins.values())
    extras = PROJECT["project"]["optional-dependencies"].values()
    for line in [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]:
        wanted = Requirement(line)
        [pinned] = pins[canonicalize_name(wanted.name)].specifier
        assert pinned.version in wanted.specifier, line


def test_the_version_is_the_projects():
    done = subprocess.run(
        [sys.executable, "-m", "burnish.launch.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"burnish {PROJECT['project']['version']}"


def test_the_readme_names_every_file_of_the_tree_and_no_other():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    tracked = {name for name in done.stdout.splitlines() if (ROOT / name).exists()}
    named = re.findall(
        r"^\| `([^`]+)` \| [^|]", (ROOT / "README.md").read_text().partition("## Every file")[2], re.MULTILINE
    )
    assert len(named) == len(set(named))
    assert set(named) == tracked
