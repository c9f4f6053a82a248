"""The verbs of the command line: each takes its parsed options and returns an Answer."""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..harness.config import Config
from ..harness.config_io import config_schema, config_to_yaml, load_config
from ..harness.errors import ConfigError, Interrupted, LostError
from ..harness.lock import hold
from ..harness.run_dir import RunDir, read_json, run_path

if TYPE_CHECKING:
    from ..harness.export import LoadedRun

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
OVERRIDE = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*=.*", re.DOTALL)


@dataclass(frozen=True)
class Answer:
    """What a verb found: `value` for --json, `text` for people."""

    value: Any
    text: str
    exit_code: int = 0


def train(options: argparse.Namespace, progress: TextIO) -> Answer:
    from . import training
    from .attempts import Restarts
    from .progress import Progress
    from .supervisor import Life, ask_for_restart, can_supervise, supervise

    if options.dry_run:
        return plan(options, progress)
    paths, overrides = split_config(options.config)
    if not options.resume and any(RunDir(path).is_run for path in paths):
        raise ConfigError(f"{paths[0]} is a run directory; add --resume to go on with it, or give its config.yaml")
    config = training.resumed_config(paths, overrides) if options.resume else load_config(paths, overrides)
    mode: training.Mode = "resume" if options.resume else "fresh" if options.fresh else "new"
    run = RunDir(run_path(Path.cwd() / config.runs_dir, config.name))
    display = Progress(progress)
    with hold(run.path):
        launch = config.launch
        policy = Restarts(run, launch.max_failures, display.report) if launch.type == "ray" else None
        is_split = options.owns_process and can_supervise()
        life = supervise(policy) if is_split else Life()
        try:
            training.train(config, mode=mode, report=display.report, life=life)
        except Interrupted as error:
            how = f"{program()} train {shlex.join(options.config)} --resume"
            raise Interrupted(f"{error}; go on with: {how}", exit_code=error.exit_code) from None
        except LostError:
            if not (is_split and policy):
                raise
            display.close()
            ask_for_restart()
        finally:
            display.close()
    summary = training.write_report(run)
    display.finish(run, summary, program=program())
    return Answer(summary | {"run_dir": str(run.path)}, "")


def plan(options: argparse.Namespace, _progress: TextIO) -> Answer:
    from .estimate import estimate
    from .plan_text import render
    from .planning import Hardware, planned, supposed
    from .training import find_resources

    config = load_config(*split_config(options.config))
    hardware = Hardware(**{name: getattr(options, name, None) for name in Hardware.__dataclass_fields__})
    is_verified = getattr(options, "verify", False)
    if is_verified and hardware.is_asked:
        raise ConfigError("--verify measures on this machine, so it goes with no other hardware; leave one of them out")
    resources = supposed(find_resources(config), hardware)
    found = planned(config, resources)
    answer = estimate(found.plan, resources, found)
    if not is_verified:
        return Answer(answer, render(answer))
    from .verification import verify

    answer["verification"] = verify(found)
    return Answer(answer, render(answer), exit_code=0 if answer["verification"]["ok"] else 6)


def data(options: argparse.Namespace, progress: TextIO) -> Answer:
    from ..harness.data.audit import audit, render

    config = load_config(*split_config(options.config))
    found = audit(config, os.getcwd(), config.runs_dir)
    text = render(found)
    return Answer(found, text if progress.isatty() else COLOURS.sub("", text))


def evaluate(options: argparse.Namespace, _progress: TextIO) -> Answer:
    from ..harness.data.loader import eval_batches
    from ..harness.data.prepare import prepare_data
    from ..harness.data.store import Store
    from ..harness.evaluate import evaluate as measure
    from ..harness.tasks import get_task

    with loaded(options.run, trusts_code=options.trust_remote_code) as run:
        config, task = run.config, get_task(run.config.task.type)
        prepared = prepare_data(config, os.getcwd(), config.runs_dir)
        found = {}
        for split in options.split or ("validation", "test"):
            folder = getattr(prepared, split)
            if folder is None:
                if options.split:
                    raise ConfigError(f"--split {split}: the run's config has no {split} data")
                continue
            batches = eval_batches(
                Store(folder),
                task,
                run.processor,
                config,
                micro_batch_size=config.eval.micro_batch_size or 8,
                world_size=1,
                rank=0,
                max_examples=config.eval.max_examples,
            )
            found[split] = measure(run.model, batches, task, config)
    if not found:
        raise ConfigError("the run's config has neither validation nor test data; give data.validation or data.split")
    lines = [f"{split}: " + ", ".join(f"{k} {v:.6g}" for k, v in metrics.items()) for split, metrics in found.items()]
    return Answer(found, "\n".join(lines))


def generate(options: argparse.Namespace, _progress: TextIO) -> Answer:
    from ..harness.generate import generate as answer_all
    from ..harness.tasks import get_task

    with loaded(options.run, trusts_code=options.trust_remote_code) as run:
        changes = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
        config = changed_generation(RunDir.open(options.run), changes)
        prompts: list[Any] = options.prompt or own_prompts(options.run)
        answers = answer_all(run.model, run.processor, get_task(config.task.type), prompts, config)
    found = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    return Answer(found, "\n\n".join(f"> {item['prompt']}\n{item['answer']}" for item in found))


def export(options: argparse.Namespace, _progress: TextIO) -> Answer:
    from ..harness.export import export_run

    run, out = RunDir.open(options.run).path.resolve(), Path(options.out).absolute()
    with working_folder(run):
        result = export_run(run, options.format, out, trusts_code=options.trust_remote_code)
    difference, largest, kl = (result[key] for key in ("max_logit_difference", "max_logit", "mean_kl"))
    text = (
        f"{result['path']}: {options.format}, reloaded; largest logit difference to the run {difference:.3g} "
        f"(largest logit {largest:.3g}), mean KL divergence {kl:.2g}"
    )
    return Answer(result, text)


def report(options: argparse.Namespace, _progress: TextIO) -> Answer:
    from ..harness.report import write_report

    run = RunDir.open(options.run)
    return Answer(write_report(run), f"{run.report_html}\n{run.summary_json}")


def doctor(options: argparse.Namespace, _progress: TextIO) -> Answer:
    from .doctor import examine, render

    found = examine(options.runs_dir)
    return Answer(found, render(found), exit_code=0 if found["ok"] else 2)


def config(options: argparse.Namespace, _progress: TextIO) -> Answer:
    if options.action == "schema":
        import json

        schema = config_schema()
        return Answer(schema, json.dumps(schema, indent=2))
    if not options.config:
        raise ConfigError("burnish config show needs a config file")
    resolved = load_config(*split_config(options.config))
    return Answer(resolved.model_dump(mode="json"), config_to_yaml(resolved).rstrip())


def bench(options: argparse.Namespace, progress: TextIO) -> Answer:
    from .bench import run

    return run(options, progress)


def _about_jobs(verb: str) -> Callable[[argparse.Namespace, TextIO], Answer]:
    def run(options: argparse.Namespace, progress: TextIO) -> Answer:
        from . import job_commands

        found: Answer = getattr(job_commands, verb)(options, progress)
        return found

    return run


COMMANDS: dict[str, Callable[[argparse.Namespace, TextIO], Answer]] = {
    "train": train,
    "plan": plan,
    "data": data,
    "eval": evaluate,
    "generate": generate,
    "export": export,
    "report": report,
    "doctor": doctor,
    "config": config,
    "bench": bench,
} | {verb: _about_jobs(verb) for verb in ("submit", "jobs", "status", "logs", "stop")}


def split_config(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Files and `section.key=value` overrides, told apart by the equals sign. Raises ConfigError without a file."""
    overrides = [text for text in arguments if OVERRIDE.fullmatch(text) and not os.path.exists(text)]
    paths = [text for text in arguments if text not in overrides]
    if not paths:
        raise ConfigError("no config file given; for example configs/quickstart.yaml")
    return paths, overrides


@contextlib.contextmanager
def loaded(path: str, *, trusts_code: bool) -> Iterator["LoadedRun"]:
    """The trained model of a run, with the current folder where the run was started: its paths are relative to it."""
    import torch

    from ..harness.export import load_run

    run = RunDir.open(path).path.resolve()
    with working_folder(run):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        yield load_run(run, device=device, trusts_code=trusts_code)


def working_folder(run: Path) -> contextlib.AbstractContextManager[Any]:
    cwd = RunDir(run).load_plan().cwd
    return contextlib.chdir(cwd) if os.path.isdir(cwd) else contextlib.nullcontext()


def changed_generation(run: RunDir, changes: dict[str, Any]) -> Config:
    """The run's config with the generation options that were given. Raises ConfigError for values not allowed."""
    overrides = [f"generation.{key}={value}" for key, value in changes.items() if value is not None]
    return load_config([str(run.config_yaml)], overrides)


def own_prompts(path: str) -> list[Any]:
    """The prompts that the run answered before and after training."""
    run = RunDir.open(path)
    prompts = [sample["prompt"] for sample in read_json(run.samples_json, [])]
    if not prompts:
        raise ConfigError("this run has no prompts of its own; give --prompt TEXT")
    return prompts


def program() -> str:
    """How this program is called from the current folder, for commands to copy."""
    found = shutil.which("burnish")
    own = Path(sys.argv[0])
    if found and own.exists() and os.path.samefile(found, own):
        return "burnish"
    if own.name == "burnish" and own.exists():
        absolute = own.absolute()
        return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)
    return "burnish" if found else f"{Path(sys.executable)} -m burnish.launch.cli"
