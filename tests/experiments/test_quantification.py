import dataclasses
import io
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import archs
import data
from archs import quantification as measures_of
from data import samplers, sequences
from experiments import baselines, loop, metrics
from experiments.optimizers import Optimizer
from experiments.progress import Progress
from experiments.tasks import Quantification, prevalence, quantification_report
from experiments.tasks.quantification import PROTOCOLS

TRAINING = loop.Training(num_steps=200, steps_per_call=20, log_every=20, eval_every=100)
ENCODER = archs.MLP((8,), 4, 0.1)
HEAD = archs.PrevalenceHead((8,), 3)


def histnetq(dtype=None, **fields):
    return archs.HistNetQ(
        archs.MLP((8,), 4, dtype=dtype, **fields),
        archs.LinearHistogram(4),
        archs.PrevalenceHead((8,), 3, dtype=dtype),
    )


def deepsets(aggregation="mean"):
    return archs.DeepSets(ENCODER, HEAD, aggregation)


def quantification(dataset, model=None, **fields):
    fields = {"num_bags": 6, "bag_size": 12, "validation_bags": 25} | fields
    fields = {"test_bags": 30, "baselines": False} | fields
    optimizer = Optimizer(name="adam", learning_rate=0.05)
    return Quantification(model or histnetq(), dataset, optimizer, TRAINING, **fields)


def first_state(task, seed=0):
    inputs = jnp.zeros((task.num_bags, task.bag_size, 2))
    return jax.jit(task.init)(jax.random.key(seed), {"inputs": inputs})


def first_batch(task):
    """The first of training."""
    return jax.jit(task.sample)(jax.random.key(1), 0, task.arrays)


def any_batch():
    """One that no data is drawn for."""
    rng = np.random.default_rng(0)
    return {
        "inputs": jnp.asarray(rng.normal(1, 2, size=(6, 12, 2)), jnp.float32),
        "prevalence": jnp.asarray(rng.dirichlet(np.ones(3), 6), jnp.float32),
    }


def normalised(dataset, split):
    return (dataset.splits[split]["inputs"] - dataset.shift) / dataset.scale


@pytest.fixture(scope="module")
def trained(vectors, tmp_path_factory):
    task = quantification(vectors, mixed_bags=5)
    workdir = tmp_path_factory.mktemp("quantification")
    progress = Progress(200, io.StringIO())
    return task, loop.train(task, TRAINING, workdir, 0, progress), workdir


# Bags.


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_bags_are_the_same_for_every_model_and_seed(vectors, split):
    def bags(model, seed):
        task = quantification(vectors, model)
        return task.evaluation_bags(first_state(task, seed), split)

    indices, true, estimate = bags(histnetq(), 0)
    for model, seed in ((histnetq(), 1), (deepsets("max"), 0)):
        other_indices, other_true, other_estimate = bags(model, seed)
        np.testing.assert_array_equal(indices, other_indices)
        np.testing.assert_array_equal(true, other_true)
        assert (estimate != other_estimate).any()


def test_validation_and_test_have_bags_of_their_own(vectors):
    task = quantification(vectors, test_bags=25)
    state = first_state(task)
    validation, test = (
        task.evaluation_bags(state, split)[1] for split in ("validation", "test")
    )
    assert (validation != test).any()


@pytest.mark.parametrize("size", [None, 7])
def test_the_label_of_a_bag_is_the_prevalence_of_its_examples(vectors, size):
    task = quantification(vectors, evaluation_bag_size=size)
    indices, true, estimate = task.evaluation_bags(first_state(task), "test")
    assert indices.shape == (30, size or 12)
    assert true.shape == estimate.shape == (30, 3)
    labels = vectors.splits["test"]["labels"][indices]
    counted = np.stack([(labels == k).mean(1) for k in range(3)], axis=1)
    np.testing.assert_allclose(true, counted, atol=1e-6)
    assert len(np.unique(true, axis=0)) > 10


@pytest.mark.parametrize(
    "protocol", ["uniform", "dirichlet", "natural", "grid", "covariate_shift"]
)
def test_training_bags_are_labelled_by_their_examples(vectors, protocol):
    # The class is the feature, so that the label can be read from the inputs.
    splits = {
        name: {"inputs": split["labels"][:, None].astype(np.float32), **split}
        | {"inputs": split["labels"][:, None].astype(np.float32)}
        for name, split in vectors.splits.items()
    }
    spec = dataclasses.replace(vectors.spec, feature_shape=(1,))
    dataset = dataclasses.replace(
        vectors, spec=spec, splits=splits, shift=np.float32(0), scale=np.float32(1)
    )
    task = quantification(dataset, protocol=protocol, grid_points=5)
    sample = jax.jit(task.sample)
    first = sample(jax.random.key(0), 0, task.arrays)
    again = sample(jax.random.key(0), 0, task.arrays)
    later = sample(jax.random.key(0), 1, task.arrays)
    assert first["inputs"].shape == (6, 12, 1)
    counted = np.stack([(first["inputs"] == k).mean((1, 2)) for k in range(3)], axis=1)
    np.testing.assert_allclose(first["prevalence"], counted, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first["inputs"] != later["inputs"]).any()


def test_covariate_shift_moves_the_inputs_of_bags(vectors):
    still, moving = (
        quantification(
            vectors,
            bag_size=200,
            evaluation_protocol="covariate_shift",
            shift_strength=strength,
        )
        for strength in (0.0, 3.0)
    )

    def spread(task):
        indices, _, _ = task.evaluation_bags(first_state(task), "test")
        means = vectors.splits["test"]["inputs"][indices].mean(1)  # [bag, feature]
        return means.std(0).mean()

    assert spread(moving) > 3 * spread(still)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"shift_strength": -1.0}, "shift_strength must be >= 0"),
        ({"mixed_bags": 4, "protocol": "covariate_shift"}, "mixed_bags must be 0"),
    ],
)
def test_impossible_covariate_shifts_are_refused(vectors, fields, message):
    with pytest.raises(ValueError, match=message):
        quantification(vectors, **fields)


# Mixing.


@pytest.mark.parametrize("model", [histnetq(), deepsets()], ids=["HistNetQ", "mean"])
def test_a_mixture_is_the_bag_of_its_bags(vectors, model):
    task = quantification(vectors, model, mixed_bags=5)
    state = first_state(task)
    batch = first_batch(task)
    assert batch["weights"].shape == (5, 6)
    np.testing.assert_allclose(batch["weights"].sum(1), 1, rtol=1e-5)
    encode = jax.jit(lambda x: model.apply(state.variables, x, method="encode"))

    def representation(features):
        return model.apply(state.variables, features, method="aggregate")

    features = encode(batch["inputs"])  # [bag, element, f]
    # Bags of equal size, mixed with weights in whole numbers: those bags repeated.
    counts = np.array([[1, 0, 2, 0, 0, 1], [0, 3, 0, 0, 1, 0]])
    weights = counts / counts.sum(1, keepdims=True)
    mixed = weights @ representation(features)
    bags = np.stack(
        [np.concatenate(np.repeat(features, row, axis=0)) for row in counts]
    )
    np.testing.assert_allclose(mixed, representation(jnp.asarray(bags)), atol=1e-6)


def test_a_mixture_has_the_prevalence_of_its_bags(vectors):
    mixed = first_batch(quantification(vectors, mixed_bags=5))
    bags = first_batch(quantification(vectors))
    np.testing.assert_array_equal(mixed["inputs"], bags["inputs"])
    np.testing.assert_allclose(
        mixed["prevalence"], mixed["weights"] @ bags["prevalence"], atol=1e-6
    )


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("bag_size", [1, 12])
def test_mixtures_have_the_prevalences_of_bags_of_the_evaluation(
    vectors, protocol, bag_size
):
    task = quantification(
        vectors,
        protocol=protocol,
        bag_size=bag_size,
        num_bags=3000 // bag_size,
        mixed_bags=2000,
        mixture_sharpness=1.0,
        evaluation_bag_size=50,
        concentration=0.5,
    )
    found = first_batch(task)["prevalence"]
    asked = samplers.draw_prevalences(
        jax.random.key(2),
        2000,
        3,
        protocol=protocol,
        concentration=0.5,
        natural=task.natural_prevalence,
        bag_size=50,
        grid_points=task.grid_points,
    )
    np.testing.assert_allclose(found.mean(0), asked.mean(0), atol=0.03)
    if bag_size == 1:
        np.testing.assert_allclose(found.std(0), asked.std(0), atol=0.03)
    else:  # mixtures of mixed bags differ less
        assert (found.std(0) < asked.std(0) + 0.03).all()


@pytest.mark.parametrize("aggregation", ["max", "median", "std", ("mean", "max")])
def test_mixing_bags_is_refused_where_it_is_not_exact(vectors, aggregation):
    with pytest.raises(ValueError, match="mixed_bags: .* poolings that are linear"):
        quantification(vectors, deepsets(aggregation), mixed_bags=5)


@pytest.mark.parametrize("aggregation", ["mean", "max"])
def test_mixtures_of_single_examples_serve_every_pooling(vectors, aggregation):
    task = quantification(
        vectors,
        deepsets(aggregation),
        num_bags=40,
        bag_size=1,
        mixed_bags=5,
        evaluation_bag_size=9,
    )
    state = first_state(task)
    batch = first_batch(task)
    assert batch["inputs"].shape == (40, 1, 2)
    assert batch["prevalence"].shape == (5, 3)
    if aggregation == "max":
        assert batch["elements"].shape == (5, 9)
        np.testing.assert_allclose(
            batch["prevalence"] * 9, np.round(batch["prevalence"] * 9), atol=1e-5
        )
    after, row = jax.jit(task.train_step)(state, batch, jax.random.key(2))
    assert np.isfinite(row["absolute_error"][0]) and row["absolute_error"][1] == 5
    assert any(
        (a != b).any()
        for a, b in zip(
            jax.tree.leaves(state.params), jax.tree.leaves(after.params), strict=True
        )
    )


def test_a_set_transformer_learns_from_mixtures_with_dropout(vectors):
    model = archs.SetTransformer(
        archs.PrevalenceHead((), 3),
        hidden_size=8,
        num_heads=2,
        num_layers=1,
        num_inducing_points=2,
        dropout_rate=0.5,
    )
    fields = {"num_bags": 12, "bag_size": 1, "mixed_bags": 4, "evaluation_bag_size": 5}
    task = quantification(vectors, model, **fields)
    state, batch = first_state(task), first_batch(task)

    @jax.jit
    def estimate(seed):
        return model.apply(
            state.variables,
            batch,
            train=True,
            rngs={"dropout": jax.random.key(seed)},
            method=prevalence.bags_or_mixtures,
        )[0]

    assert batch["elements"].shape == (4, 5)
    assert np.abs(estimate(0) - estimate(1)).max() > 1e-3
    after, row = jax.jit(task.train_step)(state, batch, jax.random.key(2))
    assert np.isfinite(row["absolute_error"][0])
    moved = jax.tree.map(lambda a, b: (a != b).any(), state.params, after.params)
    assert moved["PMA_0"]["seeds"]


@pytest.mark.parametrize("model", [histnetq(), deepsets("max")], ids=["mean", "max"])
def test_remembered_bags_teach_the_head(vectors, model):
    part = "phi" if isinstance(model, archs.DeepSets) else "encoder"
    model = model.clone(**{part: archs.MLP((8,), 4)})
    fields = {"num_bags": 12, "bag_size": 1, "mixed_bags": 4, "remembered_bags": 3}
    task = quantification(vectors, model, **fields, evaluation_bag_size=7)
    state, batch = first_state(task), first_batch(task)
    labels = vectors.splits["train"]["labels"]
    inputs = normalised(vectors, "train")
    counted = np.eye(3)[labels[batch["remembered"]]].mean(1)
    np.testing.assert_allclose(batch["prevalence"][4:], counted, atol=1e-6)
    np.testing.assert_allclose(batch["inputs"][:, 0], inputs[batch["indices"]])

    # What a step says of its examples is remembered, and nothing else is.
    after, row = jax.jit(task.train_step)(state, batch, jax.random.key(0))
    assert row["absolute_error"][1] == 7
    said = model.apply(state.variables, inputs[:, None], method="encode")[:, 0]
    seen = np.isin(np.arange(len(inputs)), batch["indices"])
    remembered = after.model_state["cache"]["features"]
    np.testing.assert_allclose(remembered, np.where(seen[:, None], said, 0), atol=1e-6)

    # Of what is remembered of all, bags are what they are, and teach the head alone.
    @jax.jit
    def estimate(params):
        method = prevalence.bags_or_mixtures
        found = model.apply({"params": params}, batch, said, train=True, method=method)
        return found[0][4:]

    bags = model.apply(state.variables, inputs[batch["remembered"]])
    np.testing.assert_allclose(estimate(state.params), bags, atol=1e-5)
    gradient = jax.grad(lambda params: estimate(params)[:, 0].sum())(state.params)
    moved = {name: optax.tree.norm(leaves) > 0 for name, leaves in gradient.items()}
    assert not moved.pop(part) and all(moved.values())


def test_remembered_bags_are_refused_without_mixtures(vectors):
    with pytest.raises(ValueError, match="remembered_bags must be 0 without mixtures"):
        quantification(vectors, remembered_bags=2)


def test_views_change_images_and_neither_labels_nor_evaluation():
    rng = np.random.default_rng(0)
    splits = {
        split: {
            "inputs": rng.random((n, 5, 4, 1), np.float32),
            "labels": np.arange(n, dtype=np.int32) % 3,
        }
        for split, n in (("train", 30), ("validation", 12), ("test", 12))
    }
    spec = sequences.spec("images", 3, feature_shape=(5, 4, 1))
    images = data.Dataset(spec, splits, np.float32(0), np.float32(1))
    plain = quantification(images)
    viewed = quantification(images, max_shift=1, flip=True)
    before, after = first_batch(plain), first_batch(viewed)
    np.testing.assert_array_equal(before["prevalence"], after["prevalence"])
    changed = (before["inputs"] != after["inputs"]).any((2, 3, 4))
    # One of 18 views is the image itself.
    assert 0.7 < changed.mean() < 1
    values = np.isin(np.asarray(after["inputs"]), np.asarray(before["inputs"]))
    assert values.all()
    state = jax.jit(plain.init)(jax.random.key(0), before)
    features = [
        task.prepare_evaluation(state, "test", task.arrays)[1]
        for task in (plain, viewed)
    ]
    np.testing.assert_array_equal(*features)


# Training and evaluation.


def test_it_learns(trained):
    task, state, workdir = trained
    rows = metrics.read_rows(workdir)
    validation = [row for row in rows if row["split"] == "validation"]
    assert list(validation[0]) == [
        "step",
        "split",
        *sorted(["absolute_error", "relative_absolute_error"]),
    ]
    untrained = loop.compile_evaluation(task)(first_state(task), "test")
    found = loop.compile_evaluation(task)(state, "test")
    assert found["absolute_error"] < 0.8 * untrained["absolute_error"]


def test_evaluation_measures_the_model_on_its_bags(trained):
    task, state, _ = trained
    indices, true, estimate = task.evaluation_bags(state, "test")
    inputs = normalised(task.dataset, "test")[indices]
    direct = task.model.apply(state.variables, jnp.asarray(inputs))
    np.testing.assert_allclose(estimate, direct, atol=1e-5)
    np.testing.assert_allclose(estimate.sum(1), 1, rtol=1e-5)
    smoothed = [(p + 1 / 24) / (1 + 3 / 24) for p in (true, np.asarray(direct))]
    expected = {
        "absolute_error": np.abs(true - direct).mean(),
        "relative_absolute_error": (
            np.abs(smoothed[0] - smoothed[1]) / smoothed[0]
        ).mean(),
    }
    found = loop.compile_evaluation(task)(state, "test")
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "absolute_error",
        "squared_error",
        "relative_absolute_error",
        "kl_divergence",
        "match_distance",
    ],
)
def test_every_loss_trains(vectors, name):
    task = quantification(vectors, loss=name, measures=())
    assert task.monitor == name
    state, batch = first_state(task), any_batch()
    step = jax.jit(
        lambda state, number: task.train_step(
            state,
            batch,
            jax.random.fold_in(jax.random.key(2), number),
        )
    )
    losses = []
    for number in range(40):
        state, row = step(state, number)
        losses.append(row[name][0] / row[name][1])
    assert losses[-1] < 0.7 * losses[0]


def test_bfloat16_computes_in_it_and_answers_in_float32(vectors):
    task = quantification(vectors, histnetq(jnp.bfloat16))
    state = first_state(task)
    batch = any_batch()
    key = jax.random.key(2)
    assert "bf16[72,8] = dot_general" in str(
        jax.make_jaxpr(task.train_step)(state, batch, key)
    )
    after, row = jax.jit(task.train_step)(state, batch, key)
    kinds = {leaf.dtype for leaf in jax.tree.leaves((after.params, row))}
    assert kinds == {jnp.dtype("float32")}
    _, true, estimate = task.evaluation_bags(after, "test")
    assert true.dtype == estimate.dtype == np.float32
    exact = quantification(vectors).evaluation_bags(after, "test")[2]
    np.testing.assert_allclose(estimate, exact, atol=0.02)
    assert (estimate != exact).any()


class Centred(nn.Module):
    """An encoder with a state of its own."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        return nn.Dense(4)(x)


def test_the_first_steps_learn_from_the_loss_of_the_warmup(vectors):
    rae = "relative_absolute_error"
    plain = quantification(vectors)
    batch, state = any_batch(), first_state(plain)

    def params_after(task, steps):
        before = state.replace(steps=jnp.int32(steps))
        after, row = jax.jit(task.train_step)(before, batch, jax.random.key(2))
        assert np.isfinite(row[task.loss][0])
        return after.params

    warm = quantification(vectors, loss=rae, warmup_steps=3)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, params_after(warm, 2), params_after(plain, 2))
    later = quantification(vectors, loss=rae)
    jax.tree.map(close, params_after(warm, 3), params_after(later, 3))


def test_batch_statistics_train(vectors):
    model = archs.HistNetQ(Centred(), archs.LinearHistogram(4), HEAD)
    task = quantification(vectors, model)
    state = first_state(task)
    batch = any_batch()
    after, _ = jax.jit(task.train_step)(state, batch, jax.random.key(2))
    (stats,) = after.model_state["batch_stats"]["encoder"].values()
    np.testing.assert_allclose(
        stats["mean"], 0.5 * batch["inputs"].mean((0, 1)), atol=1e-5
    )
    before = loop.compile_evaluation(task)(state, "validation")
    moved = state.replace(model_state=after.model_state)
    assert loop.compile_evaluation(task)(moved, "validation") != before


# Contracts.


class Ordered(archs.DeepSets):
    """Weighs an element by its place: no set network."""

    def aggregate(self, features, mask=None, weights=None):
        place = jnp.arange(features.shape[1])[:, None]
        mask = 1 if mask is None else mask[..., None]
        return (place * features * mask).mean(1)


class Padded(archs.DeepSets):
    """Averages over padding too."""

    def aggregate(self, features, mask=None, weights=None):
        return features.mean(1)


def test_set_networks_keep_their_contracts(vectors):
    for model in (histnetq(), deepsets(), deepsets(("max", "std"))):
        task = quantification(vectors, model)
        batch = any_batch()
        task.check_contracts(first_state(task), batch)


@pytest.mark.parametrize(("model", "name"), [(Ordered, "permutation"), (Padded, "pad")])
@pytest.mark.parametrize("bag_size", [1, 12])
def test_a_model_that_breaks_a_contract_is_found(vectors, model, name, bag_size):
    task = quantification(vectors, model(ENCODER, HEAD), num_bags=24, bag_size=bag_size)
    inputs = any_batch()["inputs"].reshape(-1, bag_size, 2)
    with pytest.raises(AssertionError, match=name):
        task.check_contracts(first_state(task), {"inputs": inputs})


def test_what_is_no_set_network_is_refused(vectors):
    with pytest.raises(ValueError, match="MLP is no set network"):
        quantification(vectors, archs.MLP((), 3))


# Beside the model.


@pytest.fixture(scope="module")
def posteriors(vectors, tmp_path_factory):
    return baselines.train_classifier(
        ENCODER,
        vectors,
        tmp_path_factory.mktemp("classifier"),
        1000,
        0,
        Progress(1000, io.StringIO()),
    )


def test_baselines_count_what_the_classifier_says(vectors, posteriors):
    assert posteriors.accuracy > 0.75
    task = quantification(vectors, test_bags=60)
    indices, true, _ = task.evaluation_bags(first_state(task), "test")
    found = baselines.estimates(posteriors, vectors, indices)
    bags = posteriors.test[indices]  # [bag, element, K]
    counts = np.eye(3)[bags.argmax(-1)].mean(1)
    np.testing.assert_allclose(found["CC"], counts, atol=1e-5)
    np.testing.assert_allclose(found["PCC"], bags.mean(1), atol=1e-5)
    labels = vectors.splits["validation"]["labels"]
    # confusion[k, j]: how often an example of class j is called k.
    for name, votes, counted in (
        ("ACC", np.eye(3)[posteriors.validation.argmax(-1)], counts),
        ("PACC", posteriors.validation, bags.mean(1)),
    ):
        confusion = np.stack([votes[labels == j].mean(0) for j in range(3)], axis=1)
        solved = counted @ np.linalg.inv(confusion).T
        inside = (solved >= 0).all(1)
        assert inside.sum() > 5
        np.testing.assert_allclose(found[name][inside], solved[inside], atol=2e-3)
    for estimate in found.values():
        assert estimate.shape == (60, 3)
        np.testing.assert_allclose(estimate.sum(1), 1, rtol=1e-4)
        assert (estimate >= -1e-6).all()
        assert np.abs(estimate - true).mean() < 0.15
    again = measures_of.expectation_maximization(jnp.asarray(bags), jnp.full(3, 1 / 3))
    np.testing.assert_allclose(found["EMQ"], again, atol=1e-4)
    calibration = measures_of.bias_corrected_temperature(
        jnp.asarray(posteriors.validation), jnp.asarray(labels)
    )
    calibrated = measures_of.calibrate_posteriors(jnp.asarray(bags), *calibration)
    again = measures_of.expectation_maximization(calibrated, jnp.full(3, 1 / 3))
    np.testing.assert_allclose(found["EMQ-BCTS"], again, atol=1e-4)


def test_baselines_are_reused(vectors, tmp_path):
    def train():
        progress = Progress(40, io.StringIO())
        found = baselines.train_classifier(ENCODER, vectors, tmp_path, 40, 0, progress)
        return found, progress._stream.getvalue()

    first, shown = train()
    again, shown_again = train()
    assert "validation" in shown and "validation" not in shown_again
    np.testing.assert_array_equal(first.test, again.test)


def test_the_report_sets_them_side_by_side(vectors, tmp_path):
    task = quantification(vectors, baselines=True, baseline_steps=40)
    state = first_state(task)
    sections = task.report(state, tmp_path, 0)
    rows = {row["method"]: row for row in sections[0].table}
    methods = {"CC", "PCC", "ACC", "PACC", "EMQ", "EMQ-BCTS"}
    assert set(rows) == {"HistNetQ", *methods}
    saved = np.load(tmp_path / "test_bags.npz")
    _, true, estimate = task.evaluation_bags(state, "test")
    np.testing.assert_array_equal(saved["true"], true)
    np.testing.assert_allclose(saved["HistNetQ"], estimate, atol=1e-6)
    error = np.abs(true - estimate).mean(1)
    shown = rows["HistNetQ"]["absolute error"]
    assert shown == f"{error.mean():.4f} ± {error.std():.4f}"
    histograms = quantification_report.class_histograms(task, state)
    assert histograms.shape == (3, 4, 4)
    np.testing.assert_allclose(histograms.sum(-1), 1, rtol=1e-4)
