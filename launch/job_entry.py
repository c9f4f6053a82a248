"""What a job does on the cluster: `python -m burnish.launch.job_entry preflight | train`, in the folder that travelled.

Training goes on where an earlier job of the same run has left it, so submitting again is resuming.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from ..harness.config import Config
from ..harness.config_io import load_config
from ..harness.errors import BurnishError, ConfigError
from ..harness.run_dir import RunDir, run_path
from .staging import CONFIG_FILE

STAGED = ".staged"
"""Folder beside the runs for what travelled; named by content, so jobs that bring the same share it."""
RESULT = "burnish-preflight: "
"""Begins the line in which a pre-flight job answers with JSON."""


def main() -> int:
    """Runs the action that is named, and returns its exit code."""
    try:
        return {"preflight": preflight, "train": train}[sys.argv[1]]()
    except BurnishError as error:
        print("\n".join(f"burnish: error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return error.exit_code


def preflight() -> int:
    """Checks the cluster for the config in this folder and prints the result as one line of JSON."""
    from .preflight import check_cluster

    result = check_cluster(load_config([CONFIG_FILE], []))
    print(RESULT + json.dumps(result), flush=True)
    return 0


def train() -> int:
    """Becomes `burnish train` in a copy of this folder that every node sees."""
    config = load_config([CONFIG_FILE], [])
    os.chdir(_moved(config, Path.cwd()))
    resume = ["--resume"] if RunDir(run_path(config.runs_dir, config.name)).is_run else []
    command = [sys.executable, "-m", "burnish.launch.cli", "train", CONFIG_FILE, *resume]
    os.execv(command[0], command)


def _moved(config: Config, folder: Path) -> Path:
    """A copy of the folder below runs_dir. Raises ConfigError if it cannot be made."""
    shared = Path(config.runs_dir) / STAGED / folder.name
    if shared.is_dir():
        return shared
    unfinished = shared.with_name(f"{shared.name}.{os.getpid()}.tmp")
    try:
        shutil.copytree(folder, unfinished)
        os.replace(unfinished, shared)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if shared.is_dir():
            return shared
        raise ConfigError(f"runs_dir={config.runs_dir} cannot be written on the cluster: {error.strerror}") from None
    return shared


if __name__ == "__main__":
    sys.exit(main())
