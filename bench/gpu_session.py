"""All that needs a GPU in one command: tests of the kernels and every benchmark; the results go into one folder.

`python bench/gpu_session.py FOLDER [SECONDS]` needs the requirements of burnish but no installation of it. The most
important comes first; what does not get its turn in SECONDS is named in FOLDER/summary.json as not measured.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_SECONDS = 540
GRACE_S = 15
"""Left to a part that is interrupted, to write what it has."""
SPARE_S = 10
"""Between the end of a benchmark's own time and the moment it is interrupted."""
TAIL_LINES = 30


@dataclass(frozen=True)
class Part:
    """One command: Python's arguments after -m, and the most seconds it may take."""

    name: str
    arguments: tuple[str, ...]
    limit_s: int


def parts(folder: Path) -> list[Part]:
    """What is run, the most important first. Each benchmark ends by itself before its limit and keeps what it has."""

    def bench(name: str, *, limit_s: int) -> Part:
        options = ("--seconds", str(limit_s - SPARE_S), "--out", str(folder))
        return Part(name, ("burnish.launch.cli", "bench", "run", name, *options), limit_s)

    tests = ("pytest", "-q", "-p", "no:cacheprovider", "tests/test_kernels.py")
    return [
        Part("tests", tests, 90),
        bench("kernels", limit_s=150),
        bench("step", limit_s=160),
        bench("memory", limit_s=110),
        bench("scale", limit_s=30),
    ]


def main() -> int:
    if not 2 <= len(sys.argv) <= 3:
        print("usage: python bench/gpu_session.py FOLDER [SECONDS]", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1]).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + float(sys.argv[2] if len(sys.argv) == 3 else DEFAULT_SECONDS)
    summary = []
    with tempfile.TemporaryDirectory(prefix="burnish-") as links:
        os.symlink(ROOT, Path(links) / "burnish")
        for part in parts(folder):
            limit_s = min(part.limit_s, deadline - time.monotonic() - GRACE_S)
            summary.append(run(part, folder, Path(links), limit_s) if limit_s > 0 else not_measured(part))
            (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
            print(f"{part.name}: {summary[-1]['state']}", flush=True)
    return 0 if all(result["state"] == "ok" for result in summary) else 1


def not_measured(part: Part) -> dict[str, object]:
    return {"name": part.name, "state": "not measured"}


def run(part: Part, folder: Path, links: Path, limit_s: float) -> dict[str, object]:
    """Runs one part with the package under its own name, in a session of its own; its output goes to NAME.log."""
    log = folder / f"{part.name}.log"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(links), *filter(None, sys.path[1:])])}
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *part.arguments],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        is_late = not ends(process, limit_s)
        if is_late:
            os.kill(process.pid, signal.SIGINT)
            if not ends(process, GRACE_S):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return {
        "name": part.name,
        "state": "out of time" if is_late else "ok" if process.returncode == 0 else "failed",
        "exit_code": process.returncode,
        "time_s": round(time.monotonic() - start, 1),
        "tail": lines[-TAIL_LINES:],
    }


def ends(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Waits for the process at most so long, and tells whether it ended."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
