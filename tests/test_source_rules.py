"""Rules of security, read from the sources: what no line of burnish may do. Each rule catches its offender."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = sorted(path for layer in ("harness", "kernels", "launch") for path in (ROOT / layer).rglob("*.py"))
BENCH = sorted((ROOT / "bench").rglob("*.py"))
NETWORK = {"urllib", "requests", "httpx", "aiohttp", "http", "socket", "ftplib", "smtplib", "urllib3", "websockets"}
ALLOWED_IMPORTS = {
    "harness/lock.py": {"socket"},
    "harness/watchdog.py": {"socket"},
    "launch/jobs.py": {"urllib"},
    "launch/probe.py": {"socket"},
}
"""Host names; the cluster whose address the user gives, and its nodes among each other."""


def dotted(node):
    """a.b.c of a call's function; '' for anything that is no chain of names."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed([*parts, node.id])) if isinstance(node, ast.Name) else ".".join(["?", *reversed(parts)])


def keyword(call, name):
    return next((word.value for word in call.keywords if word.arg == name), None)


def is_true(node):
    return isinstance(node, ast.Constant) and node.value is True


def asks_for_remote_code(call):
    """from_pretrained and from_config of transformers' Auto classes: unset, they ask on a terminal, and wait."""
    name = dotted(call.func)
    owner, _, method = name.rpartition(".")
    if method not in ("from_pretrained", "from_config") or owner.rpartition(".")[2] in NO_REMOTE_CODE:
        return False
    return keyword(call, "trust_remote_code") is None


NO_REMOTE_CODE = {"PeftModel", "Embedding", "AutoHfQuantizer", "GgufConfig"}
"""Classes whose loaders take no code: an adapter, a table of vectors, settings."""


def violations(tree):
    """(line, rule) of everything forbidden in a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "bare except"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                top = name.partition(".")[0]
                if top in ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve") and not getattr(
                    node, "level", 0
                ):
                    yield node.lineno, f"import {top}"
                if top in NETWORK and not getattr(node, "level", 0):
                    yield node.lineno, f"import {top}"
        if isinstance(node, ast.Call):
            yield from ((node.lineno, rule) for rule in forbidden_calls(node))


def forbidden_calls(call):
    name = dotted(call.func)
    last = name.rpartition(".")[2]
    weights_only = keyword(call, "weights_only")
    if name == "torch.load" and not is_true(weights_only):
        yield "torch.load without weights_only=True"
    if last == "load" and name.startswith(("numpy.", "np.")) and is_true(keyword(call, "allow_pickle")):
        yield "np.load of objects"
    if name in ("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"):
        yield "yaml.load"
    if is_true(keyword(call, "shell")) or name in ("os.system", "os.popen", "subprocess.getoutput"):
        yield "a shell"
    if name in ("eval", "exec", "__import__"):
        yield "eval or exec"
    if last in ("extractall", "extract") and keyword(call, "filter") is None:
        yield "an archive unpacked without a filter"
    if name in ("tempfile.mktemp", "mktemp"):
        yield "tempfile.mktemp"
    if asks_for_remote_code(call):
        yield f"{last} without trust_remote_code"
    if is_true(keyword(call, "trust_remote_code")):
        yield "trust_remote_code=True"


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_of_the_product_breaks_a_rule(path):
    allowed = {f"import {name}" for name in ALLOWED_IMPORTS.get(str(path.relative_to(ROOT)), ())}
    assert [found for found in violations(ast.parse(path.read_text())) if found[1] not in allowed] == []


@pytest.mark.parametrize("path", BENCH, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_of_the_benchmarks_runs_what_it_reads(path):
    """Their peers are loaded as their users load them, on this machine's own network."""
    rules = [rule for _, rule in violations(ast.parse(path.read_text()))]
    assert [rule for rule in rules if "trust_remote_code" not in rule and "import socket" not in rule] == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from requests import get",
        "import urllib.request",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=Loader)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "eval(text)",
        "exec(text)",
        "archive.extractall(folder)",
        "tempfile.mktemp()",
        "AutoModel.from_pretrained(path)",
        "auto.from_config(config, dtype=dtype)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "try:\n    x\nexcept:\n    pass",
    ],
)
def test_every_rule_catches_its_offender(line):
    assert list(violations(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path, weights_only=True)",
        "subprocess.run([program])",
        "model.eval()",
        "archive.extractall(folder, filter='data')",
        "AutoModel.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)",
        "from .socket import x",
    ],
)
def test_no_rule_catches_the_innocent(line):
    assert not list(violations(ast.parse(line)))
