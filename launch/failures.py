"""Errors on their way to the user: between processes as JSON, unexpected ones as a sentence and a file."""

import os
import tempfile
import traceback
from pathlib import Path
from typing import Any

from ..harness import errors
from ..harness.errors import BurnishError, TrainingError
from ..harness.redact import redact
from ..harness.run_dir import RunDir, read_json

KINDS: dict[str, type[BurnishError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, BurnishError)
}
MAX_CHARS = 300


def fatal_error(kind: str, message: str, **details: Any) -> BurnishError:
    """The error of that name; a TrainingError for a name from another version."""
    return KINDS[kind](message, **details) if kind in KINDS else TrainingError(message)


def write_fatal(run: RunDir, error: BurnishError) -> None:
    """Leaves the error for the driver and for workers that are started again: a restart would meet it again."""
    details = {name: redact(value) if isinstance(value, str) else value for name, value in vars(error).items()}
    run.write_json(run.fatal_json, {"kind": type(error).__name__, "message": redact(str(error)), "details": details})


def raise_fatal(run: RunDir) -> None:
    """Raises what a worker wrote to fatal.json; nothing if there is no such file."""
    fatal = read_json(run.fatal_json)
    if fatal is not None:
        raise fatal_error(fatal["kind"], fatal["message"], **fatal.get("details", {}))


def first_line(error: BaseException) -> str:
    """The error in one short line: its own message, or for a wrapped remote traceback the line that says what."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    base = getattr(error, "_base_exc", None) or getattr(error, "cause", None)
    if isinstance(base, BaseException):
        return f"{type(base).__name__}: {str(base).strip().splitlines()[0] if str(base).strip() else ''}"[:MAX_CHARS]
    return (lines[0] if lines else type(error).__name__)[:MAX_CHARS]


def write_traceback(error: BaseException, *, folder: Path | None = None) -> Path:
    """Writes the whole story to traceback.txt in the run directory, or to a temporary file; returns its path."""
    if folder is not None and folder.is_dir():
        path = folder / "traceback.txt"
        file = path.open("w", encoding="utf-8", errors="backslashreplace")
    else:
        handle, name = tempfile.mkstemp(prefix="burnish-error-", suffix=".txt")
        path = Path(name)
        file = os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace")
    with file:
        file.write(redact("".join(traceback.format_exception(error))))
    return path


def unexpected(error: BaseException) -> TrainingError:
    """An error that nobody foresaw, as one sentence with the file that holds the traceback."""
    path = write_traceback(error)
    return TrainingError(f"{type(error).__name__}: {first_line(error)} (unexpected; please report it with {path})")
