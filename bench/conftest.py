"""Lets pytest import the benchmarks under the name of the installed package: the repository's root has another."""

import importlib
from pathlib import Path
from typing import Any

import pytest


class _Module(pytest.Module):
    def _getobj(self) -> Any:
        return importlib.import_module(f"burnish.{self.path.parent.name}.{self.path.stem}")


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> pytest.Module:
    module: pytest.Module = _Module.from_parent(parent, path=module_path)
    return module
