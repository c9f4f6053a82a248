"""A parent that lives on when the kernel kills an inline run for want of memory, and starts it again.

The command forks before it has loaded any library: the child is the run, the parent waits in a few megabytes. It passes
on the signals that it alone gets. Only on Linux: elsewhere nothing counts such kills, and the process stays one.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time

from ..harness.errors import TrainingError
from .interrupt import PASSED_ON, SIGNALS
from .processes import oom_kills

PR_SET_PDEATHSIG = 1
OOM_SCORE = "500"
"""Makes the run a likelier victim than its parent and other small processes."""
SENT_BY_THE_KERNEL = 0x80
"""si_code of what a terminal sends: it goes to all processes in the foreground, so the run has it already."""


def can_supervise() -> bool:
    """Whether this process may be split: no library that starts threads may have been loaded."""
    return sys.platform.startswith("linux") and "torch" not in sys.modules


def supervise() -> float | None:
    """Returns in children only, which go on as this process would have: None in the first one, and in one that follows
    another which was killed for want of memory, when that began (seconds since 1970).

    The parent ends with the exit code of the last child. Raises TrainingError in the parent if a signal ended that.
    """
    watched = {signal.SIGCHLD, signal.SIGHUP, *SIGNALS}
    killed_since, parent = None, os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    while True:
        kills, start = oom_kills(), time.time()
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _become_the_run(parent)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
            return killed_since
        status = _waited(child, watched)
        if os.WIFEXITED(status):
            os._exit(os.WEXITSTATUS(status))
        if os.WTERMSIG(status) != signal.SIGKILL or oom_kills() == kills:
            raise TrainingError(f"the run was ended by {signal.Signals(os.WTERMSIG(status)).name}")
        killed_since = start


def _become_the_run(parent: int) -> None:
    """The run does not outlive its parent, which users know as the command."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write(OOM_SCORE)
    signal.signal(PASSED_ON, signal.default_int_handler)


def _waited(child: int, watched: set[signal.Signals]) -> int:
    """The status of the child once it has ended. A signal that only this process got is passed on to it."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done == child:
            return status
        info = signal.sigwaitinfo(watched)
        if info.si_signo in SIGNALS and info.si_code != SENT_BY_THE_KERNEL:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, PASSED_ON)
