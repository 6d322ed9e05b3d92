"""The table of results: means of bags, mean and spread over seeds."""

import json

import numpy as np
import pytest

from experiments import compare, config
from experiments.errors import UserError


def write_run(workdir, shift: float, model: str) -> None:
    workdir.mkdir()
    true = np.full((4, 2), 0.5)
    moved = true + np.array([shift, -shift])
    np.savez(workdir / "test_bags.npz", true=true, CC=true, **{model: moved})
    task = {"bag_size": 1, "evaluation_bag_size": 50}
    config = {"model": {"name": model}, "task": task}
    (workdir / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("model", ["HistNetQ", "SetTransformer"])
def test_mean_and_deviation_over_seeds(tmp_path, model):
    for seed, shift in enumerate([0.1, 0.3]):
        write_run(tmp_path / str(seed), shift, model)
    text = compare.table([("mine", tmp_path / "0"), ("mine", tmp_path / "1")])
    best, worst = text.splitlines()[2:]
    assert best == "| CC | 0.0000 ± 0.0000 | 0.000 ± 0.000 | 2 |"
    # Smoothing with epsilon = 1/100: (p + epsilon) / (1 + 2 epsilon).
    relative = np.array([0.1, 0.3]) / 0.51
    assert worst == (
        f"| mine | 0.2000 ± 0.1000 | {relative.mean():.3f} ± {relative.std():.3f} | 2 |"
    )


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(UserError, match="test_bags.npz is missing"):
        compare.table([("mine", tmp_path)])


@pytest.mark.parametrize("dataset", ["digits", "fashion_mnist"])
@pytest.mark.parametrize("row", compare.MODELS)
def test_rows_are_valid_configs(row, dataset):
    variant, fields = compare.MODELS[row][0], compare.overrides_of(row, dataset)
    file = f"{compare.ROOT}/experiments/configs/quantify.py:{variant}_{dataset}"
    overrides = {k.removeprefix("config."): str(v) for k, v in fields.items()}
    config.load(file, overrides)
