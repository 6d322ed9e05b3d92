import dataclasses
import io
import itertools
import json
import re
import zipfile
from pathlib import Path
from typing import ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

import archs
import data
from data.sequences import spec
from experiments import config as configs
from experiments import loop, runner
from experiments.optimizers import Optimizer
from experiments.tasks import SetPrediction, groups, set_objectives

SHIPPED = Path(__file__).parents[2] / "experiments" / "configs"
TRAINING = loop.Training(num_steps=20, steps_per_call=10, log_every=10, eval_every=10)
PHI = archs.MLP((8,), 4)


def deepsets(features=1, aggregation="max"):
    return archs.DeepSets(PHI, archs.MLP((), features), aggregation)


def set_prediction(model=None, dataset=None, **fields):
    fields = {"objective": "absolute_error", "num_sets": 8} | fields
    fields = {"validation_sets": 12, "test_sets": 25, "evaluation_batch": 10} | fields
    dataset = dataset or data.MaxOfNumbers(test_max_size=20)
    return SetPrediction(
        model or deepsets(), dataset, Optimizer(name="adam"), TRAINING, **fields
    )


@dataclasses.dataclass(frozen=True)
class Positions:
    """Sets of two numbers; what is asked for has the shape of the elements."""

    arrays: ClassVar[dict] = {"train": {}, "validation": {}, "test": {}}
    spec = data.MaxOfNumbers().spec

    def sample(self, key, num_sets, split, arrays):
        numbers = jax.random.normal(key, (num_sets, 2, 1))
        mask = jnp.ones((num_sets, 2), bool).at[::2, 1].set(False)
        return {"inputs": numbers, "mask": mask, "target": numbers[..., 0]}


class ByElement(nn.Module):
    """Answers element by element."""

    inside: str = "mean"

    @nn.compact
    def __call__(self, inputs, mask=None, weights=None, *, train=False):
        y = archs.EquivariantLayer(1, self.inside)(inputs, mask)[..., 0]
        return y


# Objectives, against closed forms.


def test_measures_of_numbers():
    prediction = jnp.array([[1.4], [-2.0], [7.6]])
    batch = {"target": jnp.array([[1.0], [2.0], [8.0]])}
    absolute = set_objectives.absolute_error(prediction, batch)
    np.testing.assert_allclose(absolute["absolute_error"], [0.4, 4, 0.4], rtol=1e-5)
    squared = set_objectives.squared_error(prediction, batch)
    assert next(iter(squared)) == "squared_error"
    np.testing.assert_allclose(squared["squared_error"], [0.16, 16, 0.16], rtol=1e-5)
    exact = set_objectives.digit_sum(prediction, batch)
    assert next(iter(exact)) == "absolute_error"
    np.testing.assert_array_equal(exact["exact"], [True, False, True])


def test_poisson_counts_are_those_of_scipy():
    prediction = jnp.linspace(-20, 30, 60)[:, None]
    target = (jnp.arange(60) % 11.0)[:, None]
    found = set_objectives.poisson_count(prediction, {"target": target})
    rate = np.logaddexp(0, np.asarray(prediction, np.float64))[:, 0]
    expected = -stats.poisson.logpmf(np.asarray(target)[:, 0], rate)
    np.testing.assert_allclose(
        found["negative_log_likelihood"], expected, rtol=1e-5, atol=1e-5
    )
    mode = np.array([stats.poisson.pmf(np.arange(100), r).argmax() for r in rate])
    np.testing.assert_array_equal(found["accuracy"], mode == target[:, 0])
    assert 0 < found["accuracy"].sum() < 60


def test_poisson_counts_stay_finite():
    prediction = jnp.array([[-1e4], [-200.0], [1e4]])

    def loss(prediction):
        batch = {"target": jnp.array([[3.0], [0.0], [1.0]])}
        measured = set_objectives.poisson_count(prediction, batch)
        return measured["negative_log_likelihood"].sum()

    value, gradient = jax.value_and_grad(loss)(prediction)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "objective", ["absolute_error", "squared_error", "digit_sum", "poisson_count"]
)
def test_shapes_that_would_broadcast_are_refused(objective):
    batch = {"target": jnp.zeros((5, 1))}
    with pytest.raises(ValueError, match=r"target's shape \(5, 1\), not \(5,\)"):
        getattr(set_objectives, objective)(jnp.zeros(5), batch)


def test_a_model_of_another_width_is_refused(tmp_path, refused):
    message = refused(
        f"--config={SHIPPED}/max_regression.py",
        "--config.model.rho.features=2",
    )
    assert "config.model does not fit the dataset max_of_numbers" in message
    assert re.search(r"\(128, 1\), not \(128, 2\)", message)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"objective": "error"}, "objective must be one of absolute_error.*'error'"),
        ({"objective": "_check_same_shape"}, "objective must be one of"),
        ({"objective": "Mapping"}, "objective must be one of"),
        ({"test_sets": 0}, "test_sets must be 1 or more, not 0"),
    ],
)
def test_impossible_values_are_named(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        set_prediction(**fields)


# The task.


def test_evaluation_sets_are_the_same_for_every_model_and_seed():
    def sets(model, seed):
        task = set_prediction(model)
        return task.evaluation_sets(loop.first_state(task, seed), "test")

    outputs, measures, first = sets(deepsets(), 0)
    assert outputs["mask"].shape == (25, 20)
    assert first["inputs"].shape == (10, 20, 1)
    np.testing.assert_array_equal(first["prediction"], outputs["prediction"][:10])
    np.testing.assert_allclose(
        measures["absolute_error"],
        np.abs(outputs["prediction"] - outputs["target"])[:, 0],
        rtol=1e-5,
    )
    for model, seed in ((deepsets(), 1), (deepsets(aggregation="mean"), 0)):
        other, _, _ = sets(model, seed)
        np.testing.assert_array_equal(outputs["target"], other["target"])
        np.testing.assert_array_equal(outputs["mask"], other["mask"])
        assert (outputs["prediction"] != other["prediction"]).any()
    task = set_prediction(test_sets=12)
    state = loop.first_state(task, 0)
    validation, test = (
        task.evaluation_sets(state, split)[0]["target"]
        for split in ("validation", "test")
    )
    assert (validation != test).all()


@pytest.mark.parametrize(
    "model",
    [
        deepsets(aggregation="sum"),
        archs.SetTransformer(archs.MLP((), 1), PHI, 8, 2, num_inducing_points=None),
    ],
    ids=["DeepSets", "SetTransformer"],
)
def test_a_step_on_shared_elements_is_one_on_the_sets(model):
    dataset = data.ImageDigitSums("digits", shared_images=16)
    task = set_prediction(model, dataset)
    shared = task.sample(jax.random.key(0), 0, task.arrays)
    assert shared["elements"].shape == (16, 8, 8, 1)
    inputs, mask = task.arguments(shared)
    sets = {"inputs": inputs, "mask": mask, "target": shared["target"]}
    state = task.init(jax.random.key(1), shared)
    step = jax.jit(task.train_step)
    found, expected = (
        step(state, batch, jax.random.key(2)) for batch in (shared, sets)
    )
    chex.assert_trees_all_close(found, expected, rtol=2e-4, atol=1e-6)
    # Each image is encoded once, not once a set.
    flops = [
        step.lower(state, batch, jax.random.key(2)).compile().cost_analysis()["flops"]
        for batch in (shared, sets)
    ]
    # 64 images less, of 64 x 8 + 8 x 4 products, forward and for the weights.
    assert flops[1] - flops[0] > 64 * 2 * 2 * (64 * 8 + 8 * 4)


def test_shared_elements_need_a_set_network():
    class Sum(nn.Module):
        @nn.compact
        def __call__(self, inputs, mask, *, train=False):
            return jnp.where(mask, inputs.sum((2, 3, 4)), 0).sum(1, keepdims=True)

    loop.first_state(set_prediction(Sum(), data.ImageDigitSums("digits")), 0)
    shared = set_prediction(Sum(), data.ImageDigitSums("digits", shared_images=16))
    with pytest.raises(ValueError, match="Sum is no set network"):
        loop.first_state(shared, 0)


def test_the_last_batch_counts_only_the_sets_asked_for():
    task = set_prediction()
    state = loop.first_state(task, 0)
    _, measures, _ = task.evaluation_sets(state, "test")
    assert task.num_eval_batches("test") == 3
    found = loop.compile_evaluation(task)(state, "test")
    assert found == {
        "absolute_error": pytest.approx(measures["absolute_error"].mean(), rel=1e-5)
    }
    assert len(measures["absolute_error"]) == 25


def test_training_never_sees_a_set_twice():
    task = set_prediction()
    sample = jax.jit(task.sample)
    first = sample(jax.random.key(0), 0, {})
    jax.tree.map(np.testing.assert_array_equal, first, sample(jax.random.key(0), 0, {}))
    later = sample(jax.random.key(0), 1, {})
    assert not np.isin(later["inputs"][later["mask"]], first["inputs"]).any()


@pytest.mark.parametrize(
    ("objective", "monitor"),
    [
        ("squared_error", "squared_error"),
        ("digit_sum", "absolute_error"),
        ("poisson_count", "negative_log_likelihood"),
    ],
)
def test_the_first_measure_is_what_is_learned(objective, monitor):
    task = set_prediction(objective=objective)
    assert task.monitor == monitor
    state = loop.first_state(task, 0)
    batch = jax.jit(task.sample)(jax.random.key(0), 0, {})

    def loss(params):
        prediction = task.model.apply({"params": params}, *list(batch.values())[:2])
        return getattr(set_objectives, objective)(prediction, batch)[monitor].mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(state.params)
    _, measured = jax.jit(task.train_step)(state, batch, jax.random.key(0))
    total, count = measured[monitor]
    assert total / count == pytest.approx(float(value), rel=1e-5)
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradient)))
    assert measured["gradient_norm"][0] == pytest.approx(norm, rel=1e-4)


def test_masked_values_are_averaged_over_what_is_real(monkeypatch):
    def by_element(prediction, batch):
        return {"error": (jnp.abs(prediction - batch["target"]), batch["mask"])}

    monkeypatch.setattr(set_objectives, "by_element", by_element, raising=False)
    task = set_prediction(ByElement(), Positions(), objective="by_element")
    state = loop.first_state(task, 0)
    outputs, measures, _ = task.evaluation_sets(state, "test")
    error = np.abs(outputs["prediction"] - outputs["target"])[outputs["mask"]]
    found = loop.compile_evaluation(task)(state, "test")["error"]
    assert found == pytest.approx(error.mean(), rel=1e-5)
    np.testing.assert_array_equal(np.isnan(measures["error"]), ~outputs["mask"])
    batch = jax.jit(task.sample)(jax.random.key(0), 0, {})
    _, measured = jax.jit(task.train_step)(state, batch, jax.random.key(0))
    assert measured["error"][1] == batch["mask"].sum()


# Contracts.


class Leaky(nn.Module):
    """Breaks a contract: order (weights by place) or padding (no mask)."""

    contract: str
    by_element: bool

    @nn.compact
    def __call__(self, inputs, mask=None, weights=None, *, train=False):
        x = inputs[..., 0]
        if self.contract == "order":
            x = x * jnp.arange(1, x.shape[1] + 1)
        if self.contract == "order" and mask is not None:
            x = jnp.where(mask, x, 0)
        pooled = nn.Dense(1)(x.sum(1, keepdims=True))
        return jnp.broadcast_to(pooled, x.shape) + x if self.by_element else pooled


@pytest.mark.parametrize("by_element", [False, True])
def test_a_model_that_breaks_a_contract_is_named(by_element):
    kept = ByElement() if by_element else deepsets()
    for model, name in (
        (kept, None),
        (Leaky("order", by_element), "permutation (in|equi)variance|padding"),
        (Leaky("padding", by_element), "padding invariance"),
    ):
        dataset = Positions() if by_element else data.MaxOfNumbers(high=1.0)
        task = set_prediction(model, dataset)
        batch = jax.jit(task.sample)(jax.random.key(0), 0, {})
        state = loop.first_state(task, 0)
        if name is None:
            task.check_contracts(state, batch)
            continue
        with pytest.raises(AssertionError, match=name):
            task.check_contracts(state, batch)


# The report.


def test_sets_alike_in_size_are_learned_from_as_all_are():
    """Padding is cut off to a size of `size_buckets`: gradients stay what they are."""
    dataset = data.GaussianMixtures(2, 10, num_components=3)
    task = set_prediction(deepsets(15, "mean"), dataset, objective="mixture")
    optimizer = Optimizer(name="sgd", learning_rate=1.0)
    task = dataclasses.replace(task, optimizer=optimizer)
    state = loop.first_state(task, 0)
    batch = jax.jit(task.sample)(jax.random.key(0), 0, task.arrays)
    plain = jax.jit(super(SetPrediction, task).train_step)
    cut = jax.jit(task.train_step)
    for largest in (2, 5, 10):
        mask = batch["mask"] & (jnp.arange(10) < largest)
        given = state, batch | {"mask": mask}, jax.random.key(1)
        found, expected = cut(*given), plain(*given)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            found,
            expected,
        )


def test_sets_alike_in_size_are_cut_to_a_handful_of_sizes():
    dataset = data.GaussianMixtures(2, 10, num_components=3)
    task = set_prediction(deepsets(15, "mean"), dataset, objective="mixture")
    state = loop.first_state(task, 0)
    batch = jax.jit(task.sample)(jax.random.key(0), 0, task.arrays)
    jaxpr = jax.make_jaxpr(task.train_step)(state, batch, jax.random.key(1))
    (switch,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond")
    branches = [str(branch) for branch in switch.params["branches"]]
    assert len(branches) == len(dataset.size_buckets) == 4
    for size, branch in zip(dataset.size_buckets, branches, strict=True):
        assert f"f32[{task.num_sets},{size},2]" in branch


def test_measures_by_size():
    sizes = np.array([3, 1, 3, 2])
    values = {"error": np.array([1.0, 5.0, 2.0, np.nan])}
    rows = groups.measures_by_size(sizes, values)
    assert [(row["elements"], row["sets"]) for row in rows] == [
        ("1", 1),
        ("2", 1),
        ("3", 2),
    ]
    assert [row["error"] for row in rows] == [5, None, 1.5]
    sizes = np.repeat(np.arange(1, 101), 3)
    rows = groups.measures_by_size(sizes, {"size": sizes * 1.0})
    assert len(rows) == groups.MAX_GROUPS
    assert rows[0]["elements"] == "1 to 9" and rows[-1]["elements"] == "93 to 100"
    assert sum(row["sets"] for row in rows) == 300
    assert rows[-1]["size"] == 96.5


# Whole runs of the shipped configs, cut short.

SHORT = (
    "--config.training.num_steps=2",
    "--config.training.steps_per_call=1",
    "--config.training.log_every=2",
    "--config.training.eval_every=2",
    "--config.task.num_sets=4",
    "--config.task.validation_sets=4",
    "--config.task.test_sets=8",
    "--config.task.evaluation_batch=4",
)


@pytest.mark.parametrize(
    ("variant", "overrides", "measures"),
    [
        ("max_regression.py:deepsets_max", (), {"absolute_error"}),
        ("max_regression.py:set_transformer", (), {"absolute_error"}),
        (
            "population_statistics.py:random",
            ("min_size=5", "max_size=6"),
            {"squared_error", "absolute_error"},
        ),
        ("digit_sum.py:text", ("test_max_size=12",), {"absolute_error", "exact"}),
        (
            "digit_sum.py:mnist",
            ("examples=digits", "test_max_size=12"),
            {"absolute_error", "exact"},
        ),
    ],
)
def test_a_shipped_config_runs(variant, overrides, measures, main, tmp_path):
    fields = [f"--config.dataset.{field}" for field in overrides]
    outcome = main(
        f"--config={SHIPPED}/{variant}", f"--workdir={tmp_path}", *SHORT, *fields
    )
    assert outcome.code == 0, outcome.err
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(evaluation["test"]) == measures
    saved = np.load(tmp_path / "test_sets.npz")
    for name in measures:
        mean = saved[name].mean()
        assert evaluation["test"][name] == pytest.approx(mean, rel=1e-4)
    report = (tmp_path / "report.html").read_text()
    assert "Test sets by size" in report and "True and predicted numbers" in report


@pytest.mark.parametrize(
    "file",
    [
        "max_regression.py",
        "population_statistics.py",
        "digit_sum.py",
        "unique_characters.py",
    ],
)
def test_unknown_variants_are_named(file, refused):
    assert "must be one of" in refused(f"--config={SHIPPED}/{file}:none")


def test_unique_characters_asks_for_its_images(refused):
    message = refused(f"--config={SHIPPED}/unique_characters.py")
    assert "source_dir is not set. Put images_background.zip" in message


def test_unique_characters_trains(tmp_path):
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "images_background_small1.zip", "w") as archive:
        for character, number in itertools.product(range(20), range(4)):
            buffer = io.BytesIO()
            Image.fromarray(rng.random((105, 105)) < 0.9).save(buffer, "PNG")
            name = f"alphabet/character{character:02d}/{number:04d}.png"
            archive.writestr(f"images_background_small1/{name}", buffer.getvalue())
    overrides = {
        "dataset.source_dir": str(tmp_path),
        "dataset.min_size": "2",
        "dataset.max_size": "4",
        "dataset.shared_characters": "6",
        "dataset.image_size": "8",
        "dataset.validation_fraction": "0.3",
        "dataset.test_fraction": "0.3",
        "model.encoder.channels": "(4,)",
        "model.encoder.num_groups": "2",
        "model.hidden_size": "8",
        "model.num_layers": "1",
        "task.num_sets": "4",
    }
    config = configs.load(f"{SHIPPED}/unique_characters.py", overrides)
    _, task, _ = runner.build(config)
    state = loop.first_state(task, 0)
    sample, step = jax.jit(task.sample), jax.jit(task.train_step)
    for number in range(2):
        batch = sample(jax.random.key(0), number, task.arrays)
        before = state.params
        state, row = step(state, batch, jax.random.key(number))
        assert np.isfinite(row["negative_log_likelihood"][0])
        moved = jax.tree.map(lambda a, b: (a != b).any(), before, state.params)
        assert moved["encoder"]["Conv_0"]["kernel"]


def num_parameters(variant, *shape):
    """Of the model of a shipped config, for elements of a shape."""
    section = configs.load(f"{SHIPPED}/{variant}").model.to_dict()
    model = configs.build_module(section, spec=spec("x", 1), precision="float32")
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2, *shape)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("variant", "shape", "number"),
    [
        ("max_regression.py:deepsets_mean", (1,), 16_833),
        ("max_regression.py:set_transformer", (1,), 37_953),
        ("population_statistics.py:rotation", (2,), 13_081),
        # The paper's diagonal scales; 101,520 with the one scale of the official code.
        ("clustering.py:deepsets_mean", (2,), 101_520 + 4 * 129),
        # The official vocabulary has a padding and a ten besides the digits 1 to 9.
        ("digit_sum.py:text", (11,), 4161),
        # 784 x 300 x 100 x 30 x 1, with biases.
        ("digit_sum.py:mnist", (28, 28, 1), 235_500 + 30_100 + 3030 + 31),
    ],
)
def test_networks_have_the_official_number_of_parameters(variant, shape, number):
    assert num_parameters(variant, *shape) == number


@pytest.mark.parametrize("model", ["deepsets_mean", "set_transformer"])
def test_unique_characters_encodes_images(model):
    convolutions = 9 * 64 + 64 + 3 * (9 * 64 * 64 + 64) + 4 * 2 * 64  # and norms
    dense = 64 * 65  # of 64 to 64
    encoder = convolutions + (4 * 64 + 1) * 64  # 28 is halved to 2 x 2
    rest = {"deepsets_mean": 3 * dense + dense + 65, "set_transformer": 12 * dense}
    rest["set_transformer"] += 64 + 65  # the seed and the head
    found = num_parameters(f"unique_characters.py:{model}", 28, 28, 1)
    assert found == encoder + rest[model]


def test_a_maximum_is_soon_learned(measured):
    fields = {
        "training.num_steps": 300,
        "training.eval_every": 300,
        "task.validation_sets": 100,
        "task.test_sets": 1000,
    }
    test = measured(f"{SHIPPED}/max_regression.py:deepsets_max", fields)
    assert test["absolute_error"] < 0.1355  # published, after 20,000 steps


@pytest.mark.slow
def test_ten_digits_teach_the_sum_of_a_hundred(measured):
    assert measured(f"{SHIPPED}/digit_sum.py:text")["exact"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "published"), [("deepsets_mean", 2.133), ("deepsets_max", 0.1355)]
)
def test_max_regression_reaches_the_published_error(model, published, measured):
    test = measured(f"{SHIPPED}/max_regression.py:{model}")
    assert test["absolute_error"] < published
