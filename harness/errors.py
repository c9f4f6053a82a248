"""The errors a user can cause, each with the exit code of the command line."""


class BurnishError(Exception):
    """A clear sentence for the user; the command line prints it and exits with `exit_code`."""

    exit_code = 5


class ConfigError(BurnishError, ValueError):
    """A wrong key, value, path or combination: exit 2."""

    exit_code = 2


class InfeasibleError(BurnishError):
    """The run does not fit the hardware at hand: exit 3."""

    exit_code = 3


class DataError(BurnishError):
    """The data check failed: exit 4."""

    exit_code = 4


class TrainingError(BurnishError):
    """Training, saving or verification failed: exit 5."""

    exit_code = 5


class SaveError(TrainingError):
    """A checkpoint could not be written, a full disk for instance; earlier ones are untouched."""


class OutOfMemory(TrainingError):  # noqa: N818
    """A worker found no memory; a smaller micro-batch may: exit 3 where nothing is left to give.

    `phase` says what it was doing (see backoff.Phase) after `step` done steps, `reason` what the failed allocation
    said, and `wanted_bytes` how much it asked for; 0 where that is not known.
    """

    exit_code = 3

    def __init__(
        self, message: str, *, reason: str = "", phase: str = "step", step: int = 0, wanted_bytes: int = 0
    ) -> None:
        super().__init__(message)
        self.reason, self.phase, self.step, self.wanted_bytes = reason, phase, step, wanted_bytes


class Interrupted(BurnishError):  # noqa: N818
    """The user stopped the run and a checkpoint was written: exit 130, after SIGTERM 143."""

    def __init__(self, message: str, *, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class LostError(TrainingError):
    """What ran the workers is gone (Ray's head, its controller): a new driver may go on from the newest checkpoint."""


class SupersededError(TrainingError):
    """This attempt is a zombie: a later one has the run, and this one may write nothing any more."""

    def __init__(self, message: str = "a later attempt has taken over this run, so this one ends") -> None:
        super().__init__(message)
