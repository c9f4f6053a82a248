"""Files that run code when they are unpickled, and the watch that nothing does: for the tests of malicious files."""

import contextlib
import json
import os
import time
from pathlib import Path

import torch

MAX_SECONDS = 20.0
"""Far more than any refusal takes here, and far less than waiting for a pipe."""
CODE = "import os\nos.mkdir({canary!r})\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
"""A module that runs as soon as it is imported."""


class Payload:
    """Makes a folder as soon as something unpickles it."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@contextlib.contextmanager
def watched(folder, monkeypatch):
    """The path that a payload makes where it runs; when the block ends, it must not be there, and not late.

    PyTorch's switch that makes torch.load run pickles is on.
    """
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, start = Path(folder) / "canary", time.monotonic()
    yield path
    assert not path.exists(), "the payload has run"
    assert time.monotonic() - start < MAX_SECONDS


def torch_file(path, canary):
    torch.save({"weight": torch.ones(2), "payload": Payload(canary)}, path)


def copied(folder, target, *, without=()):
    target.mkdir()
    for file in folder.iterdir():
        if file.name not in without:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def edited(folder, name, **changes):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
