"""choose(config, resources, profile) -> Choice: every `auto` of memory and of the micro-batch, decided. No torch."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from .calibration import Calibration
from .candidates import Candidate, Limits, survey
from .changes import refusal
from .config import Config
from .devices import Speeds
from .memory import Prediction
from .plan import Plan, Resources
from .profile_numbers import Profile
from .reasons import decisions


@dataclass(frozen=True)
class Choice:
    """The plan that is taken, all candidates, and what they had to fit."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    default: Plan
    """What make_plan takes without a look at memory."""
    limits: Limits
    speeds: Speeds

    @property
    def plan(self) -> Plan:
        return self.chosen.plan

    @property
    def prediction(self) -> Prediction:
        return self.chosen.prediction


def choose(
    config: Config,
    resources: Resources,
    profile: Profile,
    *,
    run_dir: str,
    cwd: str,
    calibration: Calibration | None = None,
    profile_of: Callable[[Config], Profile] | None = None,
    before: Plan | None = None,
) -> Choice:
    """The plan of the config on these resources; its config is the one given, with every `auto` left in it.

    Raises ConfigError and InfeasibleError as make_plan does, and InfeasibleError where no candidate fits; it names the
    cheapest change that would. `profile_of` gives the profile of a config that loads or trains the model otherwise;
    without it such changes are not searched. `before` is the plan of the run that goes on, see `survey`.
    """
    found = survey(config, resources, profile, run_dir=run_dir, cwd=cwd, calibration=calibration, before=before)
    if not found.best.fits:
        raise refusal(found, config, resources, profile, calibration=calibration, profile_of=profile_of)
    plan = replace(found.best.plan, config=config, decisions=decisions(found, calibration))
    return Choice(replace(found.best, plan=plan), found.candidates, found.default, found.limits, found.speeds)
