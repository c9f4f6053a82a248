"""Who may import whom, read from the sources: bench, launch, harness, kernels; and one importer for each library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("bench", "harness", "kernels", "launch")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for layer in LAYERS
    for path in sorted((ROOT / layer).rglob("*.py"))
}
IMPORTERS = {
    "peft": {"bench.kernel_peers", "bench.limit_peer", "bench.peers", "harness.adapters"},
    "bitsandbytes": {"bench.kernel_peers", "harness.adapters", "harness.bnb", "harness.quantized"},
    "liger_kernel": {"bench.kernel_peers"},
    "deepspeed": {"bench.trainers", "harness.zero"},
    "ray": {
        "bench.scale_cluster",
        *("launch.jobs", "launch.preflight", "launch.probe", "launch.ray_cluster", "launch.ray_train"),
        "launch.worker_signals",
    },
    "rich": {"launch.progress"},
    "tensorboard": {"harness.metrics"},
    "trl": {"bench.trainers"},
    "unsloth": {"bench.peer_unsloth"},
}
"""Library -> the only modules that may import it."""
TORCH_FREE = (
    *("harness.errors", "harness.config", "harness.config_io", "harness.plan", "harness.memory", "harness.paths"),
    *("harness.run_dir", "harness.summary", "harness.report"),
    *("harness.planner", "harness.calibration", "launch.planning", "launch.plan_text", "launch.verification"),
    *("launch.job_commands", "launch.job_entry", "launch.staging"),
    *("launch.cli", "launch.commands", "launch.training", "launch.resources", "launch.estimate", "launch.doctor"),
    *("harness.interval", "launch.manifest"),
    *(
        "launch.bench",
        "bench.modes",
        "bench.bench_step",
        "bench.bench_memory",
        "bench.step_rows",
        "bench.table",
        "bench.page",
    ),
    *("bench.bench_scale", "bench.scaling", "bench.kernel_tables"),
    *("bench.compare", "bench.document", "bench.verify"),
)
SUBMODULES = {"torch.utils.tensorboard": "tensorboard"}


def imports(name, *, is_top_only=False):
    """Absolute names of what a module imports; only what runs on import where `is_top_only`."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    found = set()
    for node in at_import(tree) if is_top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found |= {origin} | {f"{origin}.{alias.name}" for alias in node.names}
    return found


def at_import(node):
    """The statements that run when the module is imported: not in functions, not under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from at_import(child)


def library(name):
    return SUBMODULES.get(name, name.partition(".")[0])


@pytest.mark.parametrize("name", MODULES)
def test_the_harness_does_not_know_the_launchers(name):
    if name.startswith("harness"):
        assert not {found for found in imports(name) if library(found) == "launch"}


@pytest.mark.parametrize("name", MODULES)
def test_the_benchmarks_are_known_to_their_verb_alone(name):
    if not name.startswith("bench") and name != "launch.bench":
        assert not {found for found in imports(name) if library(found) == "bench"}


@pytest.mark.parametrize("name", MODULES)
def test_kernels_know_torch_and_triton_alone(name):
    if name.startswith("kernels"):
        libraries = {library(found) for found in imports(name)} - set(sys.stdlib_module_names)
        assert libraries <= {"kernels", "torch", "triton"}


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_each_other_relatively(name):
    assert not {found for found in imports(name) if library(found) == "burnish"}


@pytest.mark.parametrize("third_party", IMPORTERS)
def test_each_library_has_its_importers_and_no_others(third_party):
    users = {name for name in MODULES if third_party in {library(found) for found in imports(name)}}
    assert users <= IMPORTERS[third_party]


def test_what_runs_before_training_imports_no_torch():
    code = (
        "import sys\nfrom importlib import import_module\n"
        f"for name in {sorted(TORCH_FREE)}:\n    import_module(f'burnish.{{name}}')\n"
        "    assert not {'torch', 'ray', 'transformers', 'rich'} & sys.modules.keys(), name"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "harness.faults"])
def test_environment_variables_are_read_by_no_module(name):
    """They may be set, for libraries that know no other way. The faults of tests come to workers through one."""
    reads = ("os.getenv", "os.environ.get", "os.environ[")
    lines = [line.strip() for line in MODULES[name].read_text().splitlines()]
    found = [line for line in lines if any(read in line for read in reads)]
    assert not [line for line in found if "] = " not in line]


def length(function):
    """Lines of a function's body without its docstring: a kernel's arguments alone may fill ten."""
    has_docstring = ast.get_docstring(function) is not None and len(function.body) > 1
    return function.end_lineno - function.body[1 if has_docstring else 0].lineno + 1


def test_no_module_is_longer_than_400_lines_and_no_function_longer_than_60():
    too_long = []
    for path in [*MODULES.values(), *(ROOT / "tests").glob("*.py")]:
        text = path.read_text()
        if text.count("\n") > 400:
            too_long.append(path.name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and length(node) > 60:
                too_long.append(f"{path.name}:{node.name}")
    assert not too_long
