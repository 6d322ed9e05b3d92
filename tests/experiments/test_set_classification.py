import json

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from sklearn import metrics as sklearn_metrics

from experiments import config as configs
from experiments import runner
from experiments.tasks import set_classification_report, set_objectives

POINT_CLOUDS = "experiments/configs/point_clouds.py"
OUTLIER = "experiments/configs/outlier.py"
RNG = np.random.default_rng(0)

MASK = np.array([[True] * 4, [True, False, True, False], [False, True, True, True]])
TARGET = np.array([2, 0, 3])
SCORES = RNG.normal(size=(3, 4)).astype(np.float32)


def test_classification_is_that_of_scikit_learn():
    logits, target = RNG.normal(size=(50, 4)), RNG.integers(0, 4, 50)
    found = set_objectives.classification(
        jnp.asarray(logits, jnp.float32), {"target": jnp.asarray(target)}
    )
    assert list(found) == ["cross_entropy", "accuracy"]
    probabilities = special.softmax(logits, axis=1)
    assert found["cross_entropy"].mean() == pytest.approx(
        sklearn_metrics.log_loss(target, probabilities), rel=1e-5
    )
    assert found["accuracy"].mean() == pytest.approx(
        sklearn_metrics.accuracy_score(target, logits.argmax(1))
    )


@pytest.mark.parametrize("axes", [2, 3])
def test_elements_are_classified_among_the_real_ones(axes):
    batch = {"mask": jnp.asarray(MASK), "target": jnp.asarray(TARGET)}
    # Whatever stands at padding.
    scores = jnp.where(MASK, SCORES, 1e9)
    scores = scores[..., None] if axes == 3 else scores
    found = set_objectives.element_classification(scores, batch)
    for s in range(3):
        log_p = special.log_softmax(SCORES[s, MASK[s]].astype(float))
        position = MASK[s, : TARGET[s]].sum()
        assert found["cross_entropy"][s] == pytest.approx(-log_p[position], rel=1e-5)
        assert found["accuracy"][s] == (log_p.argmax() == position)
    gradient = jax.grad(
        lambda x: set_objectives.element_classification(x, batch)["cross_entropy"].sum()
    )(scores).reshape(3, 4)
    np.testing.assert_allclose(gradient.sum(1), 0, atol=1e-6)
    assert not gradient[~MASK].any() and gradient[MASK].all()


@pytest.mark.parametrize(
    ("objective", "shape", "message"),
    [
        ("classification", (3,), r"logits of shape \(3, classes\).*not \(3,\)"),
        ("classification", (1, 4), r"not \(1, 4\)"),
        (
            "element_classification",
            (3, 5),
            r"one number .*shape \(3, 4\)",
        ),
        ("element_classification", (3, 4, 2), r"not \(3, 4, 2\)"),
    ],
)
def test_a_prediction_of_another_shape_is_refused(objective, shape, message):
    batch = {"mask": jnp.asarray(MASK), "target": jnp.asarray(TARGET)}
    with pytest.raises(ValueError, match=message):
        getattr(set_objectives, objective)(jnp.zeros(shape), batch)


def test_the_report_ranks_elements_as_scikit_learn_does():
    # In sets of 4 a random score has the measures that the report names chance.
    size = 3000
    outputs = {
        "mask": np.ones((size, 4), bool),
        "target": RNG.integers(0, 4, size),
        "prediction": RNG.normal(size=(size, 4, 1)).astype(np.float32),
    }
    first = {name: leaf[:10] for name, leaf in outputs.items()}
    first["inputs"] = RNG.uniform(-1, 1, (10, 4, 6, 6, 1))
    beside, drawn = set_classification_report.element_classification_sections(
        outputs, first, None
    )
    rows = {row["measure"]: row for row in beside.table}
    assert {name: row["chance"] for name, row in rows.items()} == {
        "accuracy": 0.25,
        "AUROC": 0.5,
        "AUPR": 0.25,
    }
    for row in rows.values():
        assert row["model"] == pytest.approx(row["chance"], abs=0.03)
    assert len(drawn.figure.axes) == 4 * set_classification_report.DRAWN_SETS

    sought = np.arange(4) == outputs["target"][:, None]
    outputs["prediction"] = np.where(sought, 5.0, outputs["prediction"][..., 0])
    beside, *rest = set_classification_report.element_classification_sections(
        outputs, first | {"inputs": np.zeros((10, 4, 2))}, None
    )
    assert not rest
    assert [row["model"] for row in beside.table] == pytest.approx([1, 1, 1], abs=0.01)


def test_probabilities_are_of_real_elements_alone():
    outputs = {"mask": MASK, "prediction": np.where(MASK, SCORES, np.nan)}
    found = set_classification_report.element_probabilities(outputs)
    np.testing.assert_allclose(found.sum(1), 1)
    assert not found[~MASK].any() and (found[MASK] > 0).all()


def quick(main, workdir, config, **fields):
    fields = {
        "task__num_sets": 4,
        "task__validation_sets": 4,
        "task__test_sets": 5,
        "task__evaluation_batch": 4,
        "training__num_steps": 2,
        "training__steps_per_call": 1,
        "training__eval_every": 2,
    } | fields
    outcome = main(
        f"--config={config}",
        f"--workdir={workdir}",
        *(f"--config.{k.replace('__', '.')}={v}" for k, v in fields.items()),
    )
    assert outcome.code == 0, outcome.err
    return json.loads((workdir / "evaluation.json").read_text())["test"]


SMALL = {
    "set_transformer": dict(
        model__hidden_size=8,
        model__num_heads=2,
        model__num_layers=1,
        model__num_inducing_points=3,
    ),
    "deepsets": dict(
        model__num_layers=1,
        model__layer__features=8,
        model__head__hidden_sizes=(8,),
    ),
}


@pytest.mark.parametrize("model", SMALL)
def test_the_point_cloud_config_runs(main, tmp_path, model):
    config = f"{POINT_CLOUDS}:{model}_solids_quick"
    test = quick(main, tmp_path, config, dataset__num_points=12, **SMALL[model])
    assert set(test) == {"cross_entropy", "accuracy"}
    assert "Confusion" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("model", SMALL)
def test_the_point_cloud_config_takes_modelnet(tmp_path, model):
    for split in ("train", "test"):
        with h5py.File(tmp_path / f"ply_data_{split}0.h5", "w") as file:
            file["data"] = np.zeros((4, 1200, 3), np.float32)
            file["label"] = np.arange(4, dtype=np.uint8)[:, None]
    fields = {"dataset.data_dir": str(tmp_path)}
    fields |= {"task.test_sets": "4", "task.evaluation_batch": "3"}
    config = configs.load(f"{POINT_CLOUDS}:{model}_modelnet40", fields)
    dataset, task, _ = runner.build(config)
    assert dataset.spec.sizes == {"train": 3, "validation": 1, "test": 4}
    batch = jax.eval_shape(task.sample, jax.random.key(0), 0, task.arrays)
    assert batch["inputs"].shape == (64, 1000, 3)
    # Every test cloud is classified once.
    batches = [task.eval_batch("test", index, task.arrays) for index in range(2)]
    found = np.concatenate([batch["target"][batch["counted"]] for batch in batches])
    np.testing.assert_array_equal(found, np.arange(4))
    assert task.num_eval_batches("test") == 2


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (
            "set_transformer",
            dict(
                model__encoder__features=8,
                model__layer__hidden_size=8,
                model__layer__num_heads=2,
            ),
        ),
        ("deepsets", dict(model__encoder__features=8, model__layer__features=8)),
    ],
)
def test_the_outlier_config_runs(main, tmp_path, model, fields):
    fields |= dict(dataset__set_size=4, model__encoder__hidden_sizes=(8,))
    fields |= dict(model__num_layers=1)
    test = quick(main, tmp_path, f"{OUTLIER}:{model}_digits", **fields)
    assert set(test) == {"cross_entropy", "accuracy"}
    report = (tmp_path / "report.html").read_text()
    assert "AUROC" in report and "Some sets" in report


@pytest.mark.parametrize(
    ("config", "variant"),
    [(POINT_CLOUDS, "set_transformer"), (OUTLIER, "digits"), (OUTLIER, "cnn")],
)
def test_an_unknown_variant_is_refused(refused, config, variant):
    message = refused(f"--config={config}:{variant}")
    assert f"there is no variant '{variant}'" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "steps", "accuracy"),
    [
        (f"{POINT_CLOUDS}:deepsets_solids_quick", 1000, 0.55),
        (f"{OUTLIER}:deepsets_digits", 600, 0.85),
    ],
)
def test_it_learns(main, tmp_path, config, steps, accuracy):
    test = quick(
        main,
        tmp_path,
        config,
        task__num_sets=32,
        task__validation_sets=100,
        task__test_sets=1000,
        task__evaluation_batch=100,
        training__num_steps=steps,
        training__steps_per_call=20,
        training__log_every=200,
        training__eval_every=steps,
    )
    assert test["accuracy"] > accuracy
