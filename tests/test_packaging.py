"""What `pip install .` puts into other people's environments."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = ["archs", "data", "experiments", "tests"]

IMPORT_ALL = """
import importlib, pkgutil, sys
import chex, flax.linen, jax, optax
before = {name.partition(".")[0] for name in sys.modules}
import archs
for module in pkgutil.walk_packages(archs.__path__, "archs."):
    importlib.import_module(module.name)
    print("module", module.name)
after = {name.partition(".")[0] for name in sys.modules}
print("file", archs.__file__)
print("new", *sorted(after - before - set(sys.stdlib_module_names)))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """The wheel of this checkout, built from a copy so that no build/ is left here."""
    copy = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ["LICENSE", "README.md", "pyproject.toml", "run.py", "setup.cfg"]:
        shutil.copy(ROOT / name, copy)
    out = tmp_path_factory.mktemp("wheel")
    build = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(out)],
        cwd=copy,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_archs_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read("archs-0.1.0.dist-info/METADATA").decode()
    ours = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "archs").rglob("*.py")
    }
    assert names == ours
    assert "License-Expression: Apache-2.0" in metadata
    required = {
        line.partition(": ")[2].partition("<")[0].partition(">")[0]
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    }
    assert required == {"chex", "flax", "jax", "optax"}


def test_every_module_imports_from_the_wheel_and_brings_nothing_else(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        modules = {
            name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            for name in archive.namelist()
            if name.endswith(".py")
        }
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["file", str(site / "archs" / "__init__.py")] in lines
    assert {line[1] for line in lines if line[0] == "module"} == modules - {"archs"}
    assert ["new", "archs"] in lines
