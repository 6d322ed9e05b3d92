import dataclasses
import io

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import archs
from experiments import loop
from experiments.optimizers import Optimizer
from experiments.progress import Progress
from experiments.tasks import LabelledQuantification

TRAINING = loop.Training(num_steps=150, steps_per_call=30, log_every=30, eval_every=150)


def task(dataset, num_members=3, **fields):
    model = archs.EMQNet(archs.MLP((16,), 8), dataset.spec.num_classes, num_members, 20)
    fields = {"num_bags": 30, "mixed_bags": 8, "evaluation_bag_size": 20} | fields
    fields = {"validation_bags": 40, "test_bags": 40, "baselines": False} | fields
    optimizer = Optimizer(name="adam", learning_rate=0.02)
    return LabelledQuantification(model, dataset, optimizer, TRAINING, **fields)


@pytest.fixture(scope="module")
def small(vectors):
    return task(vectors)


@pytest.fixture(scope="module")
def batch(small):
    return jax.jit(small.sample)(jax.random.key(1), 0, small.arrays)


def test_bags_are_labelled_by_the_examples_in_them(small, batch):
    labels = np.asarray(small.dataset.splits["train"]["labels"])
    found = labels[np.asarray(batch["indices"])]
    np.testing.assert_array_equal(batch["labels"], found)
    members = labels[np.asarray(batch["bags"])]  # [bag, element]
    expected = np.stack([(members == k).mean(1) for k in range(3)], axis=1)
    np.testing.assert_allclose(batch["prevalence"], expected, atol=1e-6)


def test_folds_share_every_class_evenly(small):
    fold = np.asarray(small.arrays["train"]["fold"])
    labels = np.asarray(small.arrays["train"]["labels"])
    for label in range(3):
        count = np.bincount(fold[labels == label], minlength=3)
        assert count.max() - count.min() <= 1


def gradient(small, batch, weight):
    """Of a step of plain gradient descent."""
    settings = {"bag_weight": weight, "validation_bags": 20}
    changed = task(small.dataset, **settings)
    object.__setattr__(changed, "optimizer", Optimizer(name="sgd", learning_rate=1.0))
    state = changed.init(jax.random.key(0), batch)
    state.model_state["cache"]["logits"] = jax.random.normal(
        jax.random.key(3), state.model_state["cache"]["logits"].shape
    )
    after, _ = jax.jit(changed.train_step)(state, batch, jax.random.key(2))
    return jax.tree.map(lambda a, b: np.asarray(a - b), state.params, after.params)


def test_bags_teach_the_calibration_and_labels_the_classifiers(small, batch):
    with_bags, without = gradient(small, batch, 1.0), gradient(small, batch, 0.0)
    for name in ("log_scale", "bias", "mixing", "pseudo_count"):
        assert np.abs(with_bags[name]).max() > 0
        assert np.abs(without[name]).max() == 0
    for name in ("classifiers_0", "classifiers_2"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
            with_bags[name],
            without[name],
        )


def test_a_member_never_learns_from_its_own_fold(small, batch):
    """Wrong labels in fold 1 leave classifier 1 as it is, and change the others."""
    wrong = jnp.where(batch["fold"] == 1, (batch["labels"] + 1) % 3, batch["labels"])
    right, changed = (
        gradient(small, batch | {"labels": labels}, 0.0)
        for labels in (batch["labels"], wrong)
    )
    kernel = lambda g, member: g[f"classifiers_{member}"]["Dense_0"]["kernel"]  # noqa: E731
    np.testing.assert_array_equal(kernel(right, 1), kernel(changed, 1))
    assert np.abs(kernel(right, 0) - kernel(changed, 0)).max() > 1e-4


def test_it_remembers_what_a_member_says_of_its_own_fold(small, batch):
    state = small.init(jax.random.key(0), batch)
    after, _ = jax.jit(small.train_step)(state, batch, jax.random.key(2))
    logits = small.model.apply(state.variables, batch["unchanged"], method="classify")
    expected = logits[batch["fold"], jnp.arange(len(batch["fold"])), 0]
    remembered = after.model_state["cache"]["logits"]
    np.testing.assert_allclose(remembered[batch["indices"]], expected, rtol=1e-4)
    others = np.delete(np.asarray(remembered), np.asarray(batch["indices"]), axis=0)
    assert not others.any()


def test_it_learns(small, tmp_path):
    state = loop.train(small, TRAINING, tmp_path, 0, Progress(150, io.StringIO()))
    measured = loop.compile_evaluation(small)(state, "test")
    start = jax.jit(small.init)(
        jax.random.key(0), {"inputs": jnp.zeros((30, 1, 2)), "labels": None}
    )
    before = loop.compile_evaluation(small)(start, "test")
    assert measured["absolute_error"] < 0.06 < before["absolute_error"]


def test_natural_examples_come_as_they_are_and_their_prior_is_taken_out(vectors):
    natural = task(vectors, num_members=1, natural_examples=True, num_bags=400)
    batch = jax.jit(natural.sample)(jax.random.key(0), 0, natural.arrays)
    prior = natural.natural_prevalence
    share = np.bincount(batch["labels"], minlength=3) / 400
    assert abs(share - prior).max() < 4 * np.sqrt(0.25 / 400)
    state = natural.init(jax.random.key(0), batch)
    _, measured = jax.jit(natural.train_step)(state, batch, jax.random.key(1))
    logits = natural.model.apply(
        state.variables, batch["inputs"], method="classify", train=False
    )[0, :, 0]
    posterior = prior * np.exp(logits)
    posterior /= posterior.sum(1, keepdims=True)
    expected = -np.log(posterior[np.arange(400), batch["labels"]]).mean()
    total, count = measured["cross_entropy"]
    assert total / count == pytest.approx(expected, rel=1e-4)


class Centred(nn.Module):
    """An encoder with a state of its own, which adds to the loss."""

    @nn.compact
    def __call__(self, x, *, train=False):
        extra = self.param("extra", nn.initializers.ones, ())
        if not self.is_initializing():
            self.sow("losses", "extra", extra)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        return nn.Dense(4)(x)


def test_batch_statistics_train_and_what_is_sown_is_learned(vectors, batch):
    changed = task(vectors, num_members=1)
    model = archs.EMQNet(Centred(), 3, num_steps=5)
    changed = dataclasses.replace(changed, model=model)
    state = changed.init(jax.random.key(0), batch)
    after, row = jax.jit(changed.train_step)(state, batch, jax.random.key(2))
    (stats,) = after.model_state["batch_stats"]["classifiers_0"]["encoder"].values()
    np.testing.assert_allclose(
        stats["mean"], 0.5 * batch["inputs"].mean((0, 1)), atol=1e-5
    )
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert np.isfinite(row["cross_entropy"][0])
    extra = after.params["classifiers_0"]["encoder"]["extra"]
    assert extra == pytest.approx(1 - 0.02)  # a step of Adam down its slope


def test_noise_has_the_spread_asked_for(vectors, small, batch):
    noisy = task(vectors, noise=0.5)
    found = jax.jit(noisy.sample)(jax.random.key(1), 0, noisy.arrays)
    noise = np.asarray(found["inputs"] - batch["inputs"])
    np.testing.assert_array_equal(found["indices"], batch["indices"])
    assert 0.35 < noise.std() < 0.65


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bag_size": 2}, "bag_size must be 1"),
        ({"mixed_bags": 0}, "mixed_bags 1 or more"),
        ({"bag_weight": -1.0}, "bag_weight must be 0 or more"),
        ({"max_shift": 1}, "for images"),
        ({"flip": True}, "for images"),
        ({"noise": -1.0}, "noise must be 0 or more"),
        ({"warmup_steps": 1}, "warmup_steps must be 0 here"),
        ({"remembered_bags": 1}, "remembered_bags must be 0 here"),
    ],
)
def test_impossible_settings_are_refused(vectors, fields, message):
    with pytest.raises(ValueError, match=message):
        task(vectors, **fields)


def test_a_model_without_classifiers_is_refused(vectors, small):
    model = archs.DeepSets(archs.MLP((), 4), archs.PrevalenceHead((), 3))
    with pytest.raises(ValueError, match="EMQNet, not DeepSets"):
        LabelledQuantification(model, vectors, small.optimizer, TRAINING)
