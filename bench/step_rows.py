"""What was measured of a configuration as rows of JSON, with the raw samples. No torch here."""

from collections.abc import Mapping, Sequence
from typing import Any

from .benchmark import NOT_MEASURED, Row
from .modes import MODES
from .stats import paired_ratios, quantiles
from .step_cases import row_key
from .step_run import FALL_TOLERANCE, LOSS_TOLERANCE, MAX_ROUNDS, NUM_CHECK_STEPS, Measurement, is_quiet
from .step_run import Row as Measured

BUILT = ("floor_bytes", "loaded_bytes", "num_trained", "flops_per_token")
"""What a row takes over from `Turns.ready`."""


def counted(found: Measurement) -> list[int]:
    """Numbers of the rounds that the figures are made of: the quiet ones, or all where there are not enough of them."""
    everyone = list(range(len(found.rounds)))
    quiet = [number for number in everyone if is_quiet(found.others[number])]
    modes, quiet_modes = ({mode for n in numbers for mode in found.rounds[n]} for numbers in (everyone, quiet))
    return quiet if quiet_modes == modes and 2 * MAX_ROUNDS * len(quiet) >= len(everyone) else everyone


def others_cores(found: Measurement) -> float:
    """Cores that other processes used in the counted steps, on average."""
    cores = [value for number in counted(found) for value in found.others[number].values()]
    return sum(cores) / len(cores) if cores else 0.0


def rows_of(found: Measurement, *, peaks: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """The rows as JSON, with the raw samples; the baseline's has the `facts` of the configuration."""
    return [json_row(row, found, peaks) for row in found.rows.values()]


def json_row(row: Measured, found: Measurement, peaks: Mapping[str, Mapping[str, float]]) -> Row:
    case = found.case
    rounds = [found.rounds[number] for number in counted(found)]
    times = [turn[row.mode] for turn in rounds if row.mode in turn]
    is_late = row.state == "ok" and not times
    result: Row = {
        "key": row_key(case.name, row.mode),
        "state": NOT_MEASURED if is_late else row.state,
        "reason": "the run was interrupted before its first step" if is_late else row.reason,
        "case": case.name,
        "mode": row.mode,
        "summary": MODES[row.mode].summary,
    }
    if row.mode == case.baseline:
        result["facts"] = facts(found)
    if result["state"] == NOT_MEASURED:
        return result
    result |= {
        "check_losses": row.check_losses,
        "losses": row.losses,
        "warmup_times_s": row.warmup_times_s,
        "times_s": times,
        "peak_bytes": row.peak_bytes,
    } | {name: row.built.get(name) for name in BUILT}
    if row.state == "ok":
        dtype = "float32" if row.mode == "fp32" else "bfloat16"
        result |= speed(row, found, times, peaks.get(dtype, {}).get("flops_per_s"))
        result |= {name: ratio for name, ratio in ratios(row.mode, found, rounds).items() if ratio is not None}
    return result


def speed(row: Measured, found: Measurement, times: Sequence[float], peak: float | None) -> Row:
    """`mfu`: FLOPs of the model per second, over those of a large matrix product on this machine; None if not known."""
    time_s = quantiles(times)
    tokens_per_s = found.workload.tokens / time_s["median"]
    mfu = tokens_per_s * row.built["flops_per_token"] / peak if peak else None
    return {"time_s": time_s, "tokens_per_s": tokens_per_s, "mfu": mfu}


def ratios(mode: str, found: Measurement, rounds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any] | None]:
    """`ratio`: how many times faster than the baseline; `faster`: how many times faster burnish's own mode is."""
    baseline, own = found.case.baseline, found.case.own
    return {
        "ratio": paired(found, rounds, baseline, mode),
        "faster": None if mode == own else paired(found, rounds, mode, own),
    }


def paired(
    found: Measurement, rounds: Sequence[Mapping[str, float]], slow: str | None, fast: str | None
) -> dict[str, Any] | None:
    """Times of one mode over those of another in the same rounds; None where one of them has no valid ones."""
    if slow is None or fast is None or not {slow, fast} <= set(found.modes()):
        return None
    both = [turn for turn in rounds if slow in turn and fast in turn]
    return paired_ratios([turn[slow] for turn in both], [turn[fast] for turn in both]) if both else None


def facts(found: Measurement) -> dict[str, Any]:
    """What holds for all rows of a configuration."""
    case, workload = found.case, found.workload
    method = "qlora" if MODES[case.baseline].is_quantized else "lora"
    return {
        "workload": workload.to_dict(),
        "config": workload.config(method=method).model_dump(mode="json"),
        "baseline": case.baseline,
        "own": case.own,
        "num_warmup": case.num_warmup,
        "num_check_steps": NUM_CHECK_STEPS,
        "loss_tolerance": LOSS_TOLERANCE,
        "fall_tolerance": FALL_TOLERANCE,
        "is_interrupted": found.is_interrupted,
        "others_cores": others_cores(found),
        "rounds": found.rounds,
        "others_cores_by_round": found.others,
        "counted_rounds": counted(found),
    }
