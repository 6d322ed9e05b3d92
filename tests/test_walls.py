"""Which part of the repository may import which."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
OURS = {"archs", "benchmarks", "data", "experiments", "run", "tests"}
# NumPy is a dependency of JAX itself.
LIBRARY = {"chex", "flax", "jax", "numpy", "optax"}


def imported(source: str) -> set[str]:
    """Top-level names that the source imports absolutely, at whatever depth."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def forbidden(part: str, names: set[str]) -> set[str]:
    """Those of the imported names that a file of this part may not import."""
    if part == "archs":
        return names - LIBRARY - sys.stdlib_module_names
    allowed = {
        "data": {"data"},
        "experiments": {"archs", "data", "experiments"},
        "run.py": {"experiments"},
    }
    return names & (OURS - allowed.get(part, OURS - {"run"}))


def sources() -> list[pathlib.Path]:
    parts = ["archs", "benchmarks", "data", "docs", "experiments", "tests"]
    nested = (path for part in parts for path in (ROOT / part).rglob("*.py"))
    return [*ROOT.glob("*.py"), *nested]


def test_imports_keep_the_walls():
    files = sources()
    assert {"archs", "data", "experiments", "run.py"} <= {
        path.relative_to(ROOT).parts[0] for path in files
    }
    offences = {}
    for path in files:
        relative = path.relative_to(ROOT)
        if names := forbidden(relative.parts[0], imported(path.read_text())):
            offences[str(relative)] = sorted(names)
    assert not offences


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("archs", "from data import load"),
        ("archs", "def f():\n    import ml_collections.config_dict"),
        ("archs", "import archs.pooling"),
        ("data", "from archs import pooling"),
        ("data", "import experiments.config as c"),
        ("experiments", "if True:\n    import run"),
        ("run.py", "import archs"),
        ("tests", "from run import main"),
    ],
)
def test_a_breach_is_seen(part, source):
    assert forbidden(part, imported(source))


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("archs", "import functools\nimport jax.numpy as jnp\nfrom . import pooling"),
        ("data", "import numpy\nfrom data import samplers"),
        ("experiments", "import archs, data, matplotlib.figure"),
        ("run.py", "from absl import app\nfrom experiments import runner"),
        ("tests", "import archs, torch"),
    ],
)
def test_what_is_allowed_passes(part, source):
    assert not forbidden(part, imported(source))
