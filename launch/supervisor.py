"""A parent that lives on when the run it watches is killed, cleans up after it, and starts it again.

The command forks before it has loaded any library: the child is the run (with Ray: its driver), the parent waits in a
few megabytes. An inline run is started again when the kernel killed it for want of memory; a driver when a signal
ended it, when Ray did because the head of the cluster is gone, or when the driver asks for it. An error of our own is
final. Signals that only the parent gets are passed on. Only on Linux: elsewhere the process stays one.
"""

import contextlib
import ctypes
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn

from ..harness.errors import TrainingError
from .interrupt import PASSED_ON, SIGNALS, TWIN_S, Terminated, end_at_once
from .leftovers import MARK, end_marked, remove_dead_folders, start_caretaker
from .processes import oom_kills

PR_SET_PDEATHSIG = 1
OOM_SCORE = "500"
"""Makes an inline run a likelier victim than its parent and other small processes."""
SENT_BY_THE_KERNEL = 0x80
"""si_code of what a terminal sends: it goes to all processes in the foreground, so the run has it already."""
RESTART = 75
"""Exit code of a driver that asks for another in its place (EX_TEMPFAIL); its last `error` event says why."""
FINAL = (0, 2, 3, 4, 5, 6, 130, 143)
"""Exit codes of our own. Ray's C++ ends a process that has lost the head of its cluster with 1."""
BY_USER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Who ends a run so early that it does not handle the signal yet, or by closing its terminal, wants no other."""
IMPATIENT_S = 5.0
"""How long a run may take to end after the second signal."""


@dataclass(frozen=True)
class Life:
    """Which of a command's processes this is: the first, or one after `restarts` that were lost."""

    restarts: int = 0
    since: float = 0.0
    """When the command began (seconds since 1970)."""
    killed_since: float | None = None
    """When an inline run began that was killed for want of memory (seconds since 1970)."""


Policy = Callable[[str], float]
"""Cause of a lost driver -> seconds to wait before the next. Raises TrainingError if there is to be none."""


def can_supervise() -> bool:
    """Whether this process may be split: no library that starts threads may have been loaded."""
    return sys.platform.startswith("linux") and "torch" not in sys.modules and "ray" not in sys.modules


def supervise(policy: Policy | None) -> Life:
    """Returns in children only, which go on as this process would have. `policy` is None for an inline run.

    The parent ends with the exit code of the last child (SystemExit). Raises TrainingError in the parent if a signal
    ended that, or the policy allows no other; KeyboardInterrupt when the user ends the wait for the next.
    """
    watched = {signal.SIGCHLD, signal.SIGHUP, *SIGNALS}
    parent, life = os.getpid(), Life(since=time.time())
    os.environ[MARK] = mark = secrets.token_hex(8)
    start_caretaker(mark)
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    while True:
        kills, start = oom_kills(), time.time()
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _become_the_run(parent, is_inline=policy is None)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
            return life
        status, asked = _waited(child, watched, is_apart=policy is not None)
        end_marked(mark)
        remove_dead_folders()
        ended_by = signal.Signals(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else None
        if ended_by is None and (os.WEXITSTATUS(status) in FINAL or policy is None):
            raise SystemExit(os.WEXITSTATUS(status))
        if asked is not None or ended_by in BY_USER:
            raise _ended_by_user(asked or ended_by)
        if policy is not None:
            _pause(policy(_cause(status)), watched)
            life = replace(life, restarts=life.restarts + 1)
        elif ended_by == signal.SIGKILL and oom_kills() > kills:
            life = replace(life, restarts=life.restarts + 1, killed_since=start)
        else:
            raise TrainingError(f"the run was ended by {signal.Signals(os.WTERMSIG(status)).name}")


def ask_for_restart() -> NoReturn:
    """Ends the driver so that its parent starts another; nothing of it may be kept from ending by a library's exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(RESTART)


def _cause(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"the driver was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    code = os.WEXITSTATUS(status)
    return {1: "the head of the Ray cluster is gone", RESTART: ""}.get(code, f"the driver ended with exit code {code}")


def _ended_by_user(ended_by: signal.Signals | None) -> BaseException:
    if ended_by == signal.SIGHUP:
        return TrainingError("the run was ended by SIGHUP: its terminal is gone; go on with --resume")
    return Terminated() if ended_by == signal.SIGTERM else KeyboardInterrupt()


def _become_the_run(parent: int, *, is_inline: bool) -> None:
    """The run does not outlive its parent, which users know as the command."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    if not is_inline:
        # Who signals the whole group of the command, as a terminal does, must not end Ray's daemons.
        os.setpgid(0, 0)
    else:
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(OOM_SCORE)
    for number in (signal.SIGTERM, *PASSED_ON.values()):
        signal.signal(number, end_at_once)


def _waited(child: int, watched: set[signal.Signals], *, is_apart: bool) -> tuple[int, signal.Signals | None]:
    """The status of the child once it has ended, and the signal with which the user asked for its end.

    A signal that only this process got is passed on to it, and every one to a child apart, in a group of its own. Who
    sends two does not wait for long.
    """
    asked: signal.Signals | None = None
    deadline, last = float("inf"), (0, 0.0)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done == child:
            return status, asked
        info = signal.sigtimedwait(watched, min(60.0, max(0.0, deadline - time.monotonic())))
        if info is None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            deadline = float("inf")
        if info is not None and info.si_signo == signal.SIGHUP and is_apart:
            os.kill(child, signal.SIGHUP)
        if info is None or info.si_signo not in SIGNALS:
            continue
        before, last = last, (info.si_signo, time.monotonic())
        if before[0] == last[0] and last[1] - before[1] < TWIN_S:
            continue
        if asked is not None:
            deadline = min(deadline, time.monotonic() + IMPATIENT_S)
        asked = signal.Signals(info.si_signo)
        if is_apart or info.si_code != SENT_BY_THE_KERNEL:
            os.kill(child, PASSED_ON[asked])


def _pause(seconds: float, watched: set[signal.Signals]) -> None:
    """Waits; a signal of the user's ends the wait, and the command."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        info = signal.sigtimedwait(watched, left)
        if info is not None and info.si_signo in BY_USER:
            raise _ended_by_user(signal.Signals(info.si_signo))
