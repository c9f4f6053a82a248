"""The command line: its frozen surface, exit codes, and errors as one sentence."""

import json
import subprocess
import sys

import pytest
import yaml
from burnish.harness.errors import BurnishError, ConfigError
from burnish.launch import commands
from burnish.launch.cli import VERBS, main, make_parser, overview

SURFACE = {
    "train": ["CONFIG | section.key=value+", "--resume", "--fresh", "--dry-run", "--json"],
    "plan": [
        "CONFIG | section.key=value+",
        "--gpus N",
        "--gpu-memory SIZE",
        "--gpu-name NAME",
        "--nodes N",
        "--host-memory SIZE",
        "--nvme SIZE",
        "--verify",
        "--json",
    ],
    "data": ["CONFIG | section.key=value+", "--json"],
    "eval": ["RUN", "--trust-remote-code", "--split validation|test", "--json"],
    "generate": ["RUN", "--trust-remote-code", "--prompt TEXT", "--max-new-tokens N", "--temperature T", "--json"],
    "export": ["RUN", "--trust-remote-code", "--format adapter|merged", "--out DIR", "--json"],
    "report": ["RUN", "--json"],
    "doctor": ["--runs-dir DIR", "--json"],
    "bench": [
        "run|compare|verify|report|docs|profile",
        "NAME*",
        "--quick",
        "--only PATTERN",
        "--list",
        "--modes A,B,...",
        "--baseline MODE",
        "--model MODEL",
        "--batch BxT",
        "--rounds N",
        "--threads N",
        "--seconds N",
        "--out PATH",
        "--resume",
        "--record",
        "--tolerance SHARE",
        "--times",
        "--docs-only",
        "--json",
    ],
    "submit": [
        "CONFIG | section.key=value+",
        "--address URL",
        "--follow",
        "--name ID",
        "--working-dir DIR",
        "--no-preflight",
        "--manifest FIELD=VALUE",
        "--json",
    ],
    "jobs": ["--address URL", "--json"],
    "status": ["JOB", "--address URL", "--json"],
    "logs": ["JOB", "--address URL", "--follow", "--json"],
    "stop": ["JOB", "--address URL", "--json"],
    "config": ["show|schema", "CONFIG | section.key=value*", "--json"],
}
"""Verbs and options. A change here is a change for users' scripts: note it in the README."""


def described(action):
    values = "|".join(action.choices) if action.choices else action.metavar if action.nargs != 0 else None
    if not action.option_strings:
        return f"{values}{action.nargs or ''}"
    return " ".join([action.option_strings[-1], *([values] if values else [])])


def test_the_surface_is_frozen():
    found = {verb: [described(a) for a in make_parser(verb)._actions if a.dest != "help"] for verb in VERBS}
    assert found == SURFACE
    assert set(commands.COMMANDS) == set(SURFACE)


def run_main(capsys, *arguments):
    """Exit code, stdout and stderr of a command in this process."""
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    values = {
        "name": "tiny",
        "runs_dir": str(tmp_path / "runs"),
        "model": {"init": {"model_type": "llama"}},
        "task": {"type": "causal_lm"},
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "adapter": {"method": "full"},
        "optimizer": {"name": "adamw"},
        "train": {"max_steps": 1},
    }
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]])
def test_help_names_every_verb(capsys, arguments):
    code, out, _ = run_main(capsys, *arguments)
    assert code == 0
    assert all(verb in out for verb in VERBS)
    assert out.strip() == overview()


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_itself(capsys, verb):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert VERBS[verb].help in capsys.readouterr().out


MISTAKES = {
    "verb": (["trian"], 2, "did you mean train?"),
    "option": (["train", "x.yaml", "--resum"], 2, "did you mean --resume?"),
    "no file": (["train", "train.max_steps=3"], 2, "no config file"),
    "no arguments": (["plan"], 2, "required"),
    "missing file": (["train", "nowhere.yaml"], 2, "no such file"),
    "two ways": (["train", "x.yaml", "--resume", "--fresh"], 2, "not allowed with"),
    "no run": (["eval", "nowhere"], 2, "no run directory"),
    "no run to export": (["export", "nowhere", "--out", "x"], 2, "no run directory"),
    "no out": (["export", "nowhere"], 2, "--out"),
    "bad format": (["export", "nowhere", "--out", "x", "--format", "pickle"], 2, "adapter"),
    "bad split": (["eval", "nowhere", "--split", "train"], 2, "validation"),
    "bad number": (["generate", "nowhere", "--temperature", "hot"], 2, "--temperature"),
    "bad size": (["plan", "x.yaml", "--gpu-memory", "24GIG"], 2, "give a size such as 24GiB"),
    "bad count": (["plan", "x.yaml", "--gpus", "four"], 2, "give a whole number"),
    "config without action": (["config"], 2, "required"),
    "config show without file": (["config", "show"], 2, "needs a config file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_an_exit_code(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    arguments, expected, words = MISTAKES[name]
    code, out, err = run_main(capsys, *arguments)
    assert code == expected
    assert out == ""
    assert err.startswith("burnish: error: ")
    assert err.count("\n") == 1
    assert words in err
    code, out, _ = run_main(capsys, *arguments, "--json")
    assert json.loads(out) == {"error": err.removeprefix("burnish: error: ").strip(), "exit_code": expected}


def test_every_mistake_in_a_config_is_named_at_once(capsys, config):
    code, _, err = run_main(capsys, "train", config, "trian.max_steps=3", "seed=x", "optimizer.name=adma")
    assert code == 2
    assert err.count("burnish: error: ") == 3


def test_workers_that_the_machine_does_not_have_are_exit_3(capsys, config):
    code, _, err = run_main(
        capsys, "train", config, "launch.type=ray", "launch.num_workers=512", "train.global_batch_size=512"
    )
    assert code == 3
    assert "use at most" in err


def test_config_show_gives_back_a_config_that_resolves_to_itself(capsys, config, tmp_path):
    code, out, _ = run_main(capsys, "config", "show", config, "train.max_steps=7")
    assert code == 0
    again = tmp_path / "again.yaml"
    again.write_text(out)
    assert run_main(capsys, "config", "show", again)[1] == out
    assert json.loads(run_main(capsys, "config", "show", config, "--json")[1])["train"]["max_steps"] == 1


def test_config_schema_is_json_with_or_without_the_option(capsys):
    plain, as_json = (json.loads(run_main(capsys, "config", "schema", *extra)[1]) for extra in ([], ["--json"]))
    assert plain == as_json
    assert "properties" in plain


ENDINGS = {
    "KeyboardInterrupt": (KeyboardInterrupt(), 130),
    "a bug": (RuntimeError("wires crossed"), 5),
    "a user's error": (ConfigError("say it once"), 2),
    "an error of several lines": (BurnishError("one\ntwo"), 5),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_whatever_happens_no_traceback_reaches_the_terminal(capsys, monkeypatch, tmp_path, name):
    error, expected = ENDINGS[name]

    def fails(*_):
        raise error

    monkeypatch.setitem(commands.COMMANDS, "report", fails)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, _, err = run_main(capsys, "report", "x")
    assert code == expected
    assert "Traceback" not in err
    files = list(tmp_path.glob("burnish-error-*"))
    assert len(files) == (name == "a bug")
    assert all("wires crossed" in file.read_text() and str(file) in err for file in files)


def test_a_reader_that_closes_the_pipe_ends_the_command_quietly(config):
    code = f"{sys.executable} -m burnish.launch.cli config schema | head -1"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


def test_json_keeps_stdout_to_itself_whatever_libraries_print(config):
    program = (
        "import sys; from burnish.launch import cli, commands\n"
        "def noisy(*_):\n"
        "    print('noise'); import os; os.write(1, b'more noise'); return commands.Answer({'a': 1}, 'a is 1')\n"
        "commands.COMMANDS['report'] = noisy\n"
        "sys.exit(cli.main(['report', 'x', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == {"a": 1}
    assert "noise" in done.stderr
