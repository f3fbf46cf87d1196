"""The house keeps its floors: imports point down, and importing is light."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "jaxrobust"
FLOORS = [
    {"balls", "bisection", "files", "flops", "identity", "keys", "losses", "metrics", "parallel",
     "processes"},
    {"attacks", "data", "inference", "models", "salience", "smoothing", "weights"},
    {"checkpoint", "evaluation", "training"},
    {"cropd", "safeclip", "selective", "sipat", "text"},
]  # fmt: skip
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor(name):
    return next(i for i, names in enumerate(FLOORS) if name in names)


def imported(path):
    """Names of everything that a file imports, also inside functions, as dotted paths."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    if path == PACKAGE / "__init__.py":
        return
    here = room(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "jaxrobust" or parts[1] == here:
            continue
        assert floor(parts[1]) <= floor(here), f"{path} imports {name} from above"
        if floor(here) == 3:
            assert floor(parts[1]) < 3, f"{path} imports its neighbour {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_models_import_flax_and_nothing_imports_tensorflow_or_torch(path):
    tops = {name.split(".")[0] for name in imported(path)}
    assert not tops & {"tensorflow", "torch"}
    assert "flax" not in tops or room(path) == "models"


def test_rooms_of_one_floor_do_not_import_each_other_in_a_circle():
    edges = {}
    for path in MODULES:
        if path == PACKAGE / "__init__.py":
            continue
        names = (name.split(".") for name in imported(path))
        edges.setdefault(room(path), set()).update(
            parts[1] for parts in names if parts[0] == "jaxrobust" and parts[1] != room(path)
        )

    def reaches(start, goal, seen):
        return any(
            step == goal or (step not in seen and reaches(step, goal, seen | {step}))
            for step in edges.get(start, ())
        )

    for name in edges:
        assert not reaches(name, name, set()), f"{name} imports itself through others"


def test_import_is_light_and_starts_no_device():
    program = """
import sys, time, jax
begun = time.process_time()  # a busy machine is not our import's fault
import jaxrobust
seconds = time.process_time() - begun
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a device was started"
heavy = {"tensorflow", "torch", "tensorflow_datasets", "sklearn", "matplotlib", "pandas", "orbax"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
print(seconds)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    # Three seconds is the promise; loaded machines get some slack.
    assert float(run.stdout) < 6
