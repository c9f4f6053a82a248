"""The `burnish` command: verbs, options, and errors as one sentence and an exit code. Imports no torch.

Exit codes: 0 ok, 2 config or usage, 3 does not fit, 4 data check failed, 5 training failed, 6 a benchmark got worse, a
document is wrong or a prediction was, 130 interrupted, 143 interrupted by SIGTERM.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from typing import Any, NoReturn, TextIO

from ..harness.errors import BurnishError, ConfigError, Interrupted
from ..harness.redact import redact

SEE_HELP = "burnish --help lists the verbs"


@dataclass(frozen=True)
class Verb:
    """One verb: what it does in a line, and its arguments. `commands` has the function of the same name."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]


class Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="+", metavar="CONFIG | section.key=value", help="YAML files, then overrides")


def _bytes(text: str) -> int:
    """A size such as 24GiB."""
    from ..harness.config_types import parse_bytes

    try:
        return int(parse_bytes(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number")
    return int(text)


def _plan(parser: argparse.ArgumentParser) -> None:
    _config(parser)
    ask = parser.add_argument_group("for other hardware than what is here (sizes and GPUs are those of one node)")
    ask.add_argument("--gpus", dest="num_gpus", type=_count, metavar="N", help="GPUs; 0 = plan for the CPU")
    ask.add_argument("--gpu-memory", dest="gpu_memory_bytes", type=_bytes, metavar="SIZE", help="of each GPU: 24GiB")
    ask.add_argument("--gpu-name", metavar="NAME", help="its memory and speed from a table: H100, A100, RTX 4090")
    ask.add_argument("--nodes", dest="num_nodes", type=_count, metavar="N", help="machines of this kind")
    ask.add_argument("--host-memory", dest="host_memory_bytes", type=_bytes, metavar="SIZE", help="free: 128GiB")
    ask.add_argument("--nvme", dest="nvme_bytes", type=_bytes, metavar="SIZE", help="free below memory.nvme_path: 1TiB")
    text = "run two steps here, compare what they take, and keep it for the next plan; exit 6 if 10 %% off or more"
    parser.add_argument("--verify", action="store_true", help=text)


def _train(parser: argparse.ArgumentParser) -> None:
    _config(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on from the run's newest checkpoint")
    how.add_argument("--fresh", action="store_true", help="move an old run of this name aside and start again")
    parser.add_argument("--dry-run", action="store_true", help="plan and check only; write nothing")


def _run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory, or its name in runs/")


def _trained(parser: argparse.ArgumentParser) -> None:
    _run(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help="run the Python code that its model brings")


def _eval(parser: argparse.ArgumentParser) -> None:
    _trained(parser)
    parser.add_argument(
        "--split", choices=("validation", "test"), action="append", help="default: every split there is"
    )


def _generate(parser: argparse.ArgumentParser) -> None:
    _trained(parser)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: generation.max_new_tokens")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 = greedy; default: generation.temperature")


def _export(parser: argparse.ArgumentParser) -> None:
    _trained(parser)
    parser.add_argument("--format", choices=("adapter", "merged"), default="adapter", help="default: adapter")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs-dir", default="runs", metavar="DIR", help="storage to check; default: runs")


def _config_verb(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("show", "schema"), help="the resolved config, or the JSON schema of a file")
    parser.add_argument("config", nargs="*", metavar="CONFIG | section.key=value", help="for show")


def _bench(parser: argparse.ArgumentParser) -> None:
    actions = ("run", "compare", "verify", "report", "docs", "profile")
    parser.add_argument("action", choices=actions, help="measure; judge two results; check the documents; write them")
    names = "run: kernels, step, memory, scale (default all), limit, plan; verify: the same; compare: OLD NEW; "
    names += "report: folders; profile: a mode"
    parser.add_argument("names", nargs="*", metavar="NAME", help=names)
    parser.add_argument("--quick", action="store_true", help="run: small cases, few rounds")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="run: only what matches; several times")
    parser.add_argument("--list", action="store_true", help="run: show what would be measured")
    parser.add_argument("--modes", metavar="A,B,...", help="run step: these modes, on one configuration")
    parser.add_argument("--baseline", metavar="MODE", help="run step: what the others are compared with; default: peft")
    parser.add_argument("--model", metavar="MODEL", help="run step, profile: a model's path, or a shape: llama-1b")
    parser.add_argument("--batch", metavar="BxT", help="run step, profile: sequences x tokens; default: 4x256")
    parser.add_argument("--rounds", type=int, metavar="N", help="measured steps or calls of each")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: every core")
    parser.add_argument("--seconds", type=int, metavar="N", help="begin nothing that would end later")
    parser.add_argument("--out", metavar="PATH", help="run: folder, default runs/bench; report: file")
    parser.add_argument("--resume", action="store_true", help="run: go on with an interrupted run in --out")
    parser.add_argument("--record", action="store_true", help="run: keep the results in bench/results, write the docs")
    parser.add_argument("--tolerance", metavar="SHARE", help="compare: how much worse is still the same; default: 10%%")
    parser.add_argument("--times", action="store_true", help="compare: absolute times as well, on the same machine")
    parser.add_argument("--docs-only", action="store_true", help="verify: measure nothing again")


def _address(parser: argparse.ArgumentParser) -> None:
    text = "URL of the cluster's dashboard: http://HOST:8265; default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS"
    parser.add_argument("--address", metavar="URL", help=text)


def _submit(parser: argparse.ArgumentParser) -> None:
    _config(parser)
    _address(parser)
    parser.add_argument("--follow", action="store_true", help="show what the job prints until it ends")
    parser.add_argument("--name", type=_job_name, metavar="ID", help="of the job; default: the run's name")
    parser.add_argument("--working-dir", metavar="DIR", help="where relative paths lie; default: the current folder")
    parser.add_argument("--no-preflight", action="store_true", help="queue the run without checking the nodes first")
    text = "write a RayJob for KubeRay instead; needs image=… and claim=…"
    parser.add_argument("--manifest", nargs="*", metavar="FIELD=VALUE", help=text)


def _job_name(text: str) -> str:
    from ..harness.config_types import NAME_PATTERN

    if not re.fullmatch(NAME_PATTERN, text):
        raise argparse.ArgumentTypeError(f"{text[:80]!r}: give letters, digits, dots, dashes and underscores")
    return text


def _job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB", help="its id, as burnish jobs shows it")
    _address(parser)


def _logs(parser: argparse.ArgumentParser) -> None:
    _job(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="until the job ends; exits with its exit code")


VERBS = {
    "train": Verb("fine-tune a model", _train),
    "plan": Verb("does a run fit, with which settings and why, and what would make it fit", _plan),
    "data": Verb("audit and preview the data of a config", _config),
    "eval": Verb("validation and test metrics of a finished run", _eval),
    "generate": Verb("answer prompts with a finished run", _generate),
    "export": Verb("adapter, or merged Hugging Face checkpoint", _export),
    "report": Verb("write report.html and summary.json of a run", _run),
    "doctor": Verb("what is installed, what is missing and what that switches off", _doctor),
    "submit": Verb("run a config as a job on a Ray cluster", _submit),
    "jobs": Verb("the jobs of a cluster", _address),
    "status": Verb("how a job gets on", _job),
    "logs": Verb("what a job prints", _logs),
    "stop": Verb("end a job; a run writes a checkpoint first", _job),
    "config": Verb("show a resolved config, or the schema", _config_verb),
    "bench": Verb("measure speed and memory here, next to PEFT, TRL and plain PyTorch", _bench),
}


def make_parser(verb: str) -> Parser:
    """The parser of one verb; every verb takes --json."""
    parser = Parser(prog=f"burnish {verb}", description=VERBS[verb].help, allow_abbrev=False)
    VERBS[verb].add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="the answer as JSON on stdout, and nothing else there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with _Output(is_json="--json" in arguments) as output:
        try:
            return output.answer(_dispatch(arguments, output, owns_process=argv is None))
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except BaseException as error:
            if isinstance(error, SystemExit | GeneratorExit):
                raise
            return output.fail(_explained(error))


def _dispatch(arguments: list[str], output: "_Output", *, owns_process: bool) -> Any:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return overview()
    if arguments[0] in ("-V", "--version"):
        return f"burnish {version('burnish')}"
    verb = arguments[0]
    if verb not in VERBS:
        raise ConfigError(f"{verb!r} is no verb of burnish{_did_you_mean(verb, VERBS)}; {SEE_HELP}")
    parser = make_parser(verb)
    options, unknown = parser.parse_known_intermixed_args(arguments[1:])
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        raise ConfigError(
            f"{unknown[0]!r} is no option of burnish {verb}{_did_you_mean(unknown[0].split('=')[0], known)}; "
            f"see burnish {verb} --help"
        )
    options.owns_process = owns_process
    from . import commands
    from .resources import has_gpu_driver

    if not has_gpu_driver():
        os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed guesses, and says so in the middle of the output
    return commands.COMMANDS[verb](options, output.progress)


def overview() -> str:
    """The text of `burnish --help`."""
    verbs = "\n".join(f"  {name:<10}{verb.help}" for name, verb in VERBS.items())
    return (
        "burnish fine-tunes pre-trained models from one YAML file.\n\n"
        f"usage: burnish VERB … [--json]\n\n{verbs}\n\n"
        "burnish VERB --help explains a verb; burnish --version tells the version.\n"
        "exit codes: 0 ok, 2 config or usage, 3 does not fit, 4 data check failed, 5 training failed,\n"
        "6 a benchmark got worse, a document is wrong or a prediction was, 130 interrupted, 143 by SIGTERM"
    )


def _did_you_mean(word: str, choices: Any) -> str:
    close = get_close_matches(word, list(choices), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _explained(error: BaseException) -> BurnishError:
    """The error as a sentence; what nobody foresaw goes to a file and is named in one line."""
    if isinstance(error, BurnishError):
        return error
    if isinstance(error, KeyboardInterrupt):
        from .interrupt import Terminated

        code = 143 if isinstance(error, Terminated) else 130
        return Interrupted("interrupted; nothing more was saved", exit_code=code)
    from .failures import unexpected

    return unexpected(error)


class _Output:
    """Where answers, progress and errors go. With JSON, whatever else is printed to stdout goes to stderr."""

    def __init__(self, *, is_json: bool) -> None:
        self.is_json = is_json
        self.answers: TextIO = sys.stdout
        self.saved_fd: int | None = None

    def __enter__(self) -> "_Output":
        if self.is_json and sys.stdout is sys.__stdout__:
            self.answers.flush()
            self.saved_fd = os.dup(1)
            self.answers = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
            os.dup2(2, 1)
        return self

    def __exit__(self, *_: object) -> None:
        self.answers.flush()
        if self.saved_fd is not None:
            sys.stdout.flush()
            os.dup2(self.saved_fd, 1)
            os.close(self.saved_fd)
            self.answers.close()

    @property
    def progress(self) -> TextIO:
        """Where a long command tells how it gets on."""
        return sys.stderr if self.is_json else sys.stdout

    def answer(self, value: Any) -> int:
        """Prints what a command returned: text, or an object with `value` (for JSON) and `text`."""
        if self.is_json:
            self.answers.write(json.dumps(getattr(value, "value", value), indent=2, default=str) + "\n")
        else:
            text = value if isinstance(value, str) else value.text
            self.answers.write(text + "\n" if text else "")
        self.answers.flush()
        return int(getattr(value, "exit_code", 0))

    def fail(self, error: BurnishError) -> int:
        message = redact(str(error))
        if self.is_json:
            self.answers.write(json.dumps({"error": message, "exit_code": error.exit_code}) + "\n")
        lines = message.splitlines() or [type(error).__name__]
        print("\n".join(f"burnish: error: {line}" for line in lines), file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
