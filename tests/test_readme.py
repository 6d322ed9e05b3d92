"""What the README shows works: its Python, its links, its files."""

import re
from pathlib import Path

import numpy as np
import pytest

from experiments import config as configs

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def block(text: str) -> str:
    (found,) = [code for code in PYTHON if text in code]
    return found


def test_archs_from_another_project():
    scope = {}
    exec(block("import archs"), scope)
    assert scope["prevalences"].shape == (8, 3)
    exec(block("chunks = "), scope)
    np.testing.assert_allclose(scope["estimate"], scope["prevalences"][:1], rtol=1e-5)


def test_the_estimator():
    scope = {}
    exec(block("Quantifier("), scope)
    assert scope["low"].shape == (3,)
    assert (scope["low"] <= scope["high"]).all()


def test_config(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(block("def get_config"))
    config = configs.load(str(file))
    assert config.dataset.name == "wine"
    assert config.model.rho.num_classes is None  # the dataset's
    assert config.training.eval_every == 100  # the default


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()


def test_shown_overrides_are_fields():
    shown = re.findall(r"--config\.([\w.]+)=(\S+?)(?:[`)\s]|$)", README)
    assert shown
    for field, value in shown:
        if not value.isupper() and ":" not in value:  # a placeholder
            file = str(ROOT / "experiments/configs/quantify.py:histnetq_digits")
            configs.load(file, {field: value})
