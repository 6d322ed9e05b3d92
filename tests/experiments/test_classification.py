import dataclasses
import io
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import archs
from experiments import loop, metrics
from experiments.optimizers import Optimizer
from experiments.progress import Progress
from experiments.tasks import Classification

TRAINING = loop.Training(num_steps=60, steps_per_call=10, log_every=10, eval_every=20)


class Normalised(nn.Module):
    """A model with a state of its own."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        return nn.Dense(self.num_classes)(nn.relu(x))


def classifier(dataset, model=None, training=TRAINING, **optimizer):
    model = model or archs.Classifier(archs.MLP((8,), 4, 0.1), 3)
    optimizer = Optimizer(**{"name": "adam", "learning_rate": 0.05} | optimizer)
    return Classification(model, dataset, optimizer, training, batch_size=20)


def run(task, workdir, training=TRAINING):
    return loop.train(task, training, workdir, 0, Progress(60, io.StringIO()))


@pytest.fixture(scope="module", params=["plain", "batch normalisation"])
def trained(request, vectors, tmp_path_factory):
    model = Normalised() if "batch" in request.param else None
    task = classifier(vectors, model)
    workdir = tmp_path_factory.mktemp("classification")
    return task, run(task, workdir), workdir


def test_it_learns(trained):
    task, state, workdir = trained
    rows = metrics.read_rows(workdir)
    assert rows[0]["cross_entropy"] > 1.5 * rows[-1]["cross_entropy"]
    test = loop.compile_evaluation(task)(state, "test")
    assert test["accuracy"] > 0.8
    assert test["cross_entropy"] < 0.6
    train = [row for row in rows if row["split"] == "train"]
    assert set(train[0]) == {
        "step",
        "split",
        "cross_entropy",
        "accuracy",
        "learning_rate",
        "gradient_norm",
    }


def test_measures_are_those_of_scikit_learn(trained):
    from sklearn.metrics import accuracy_score, log_loss

    task, state, _ = trained
    for split in ("validation", "test"):
        posteriors = task.posteriors(state, split)
        labels = task.dataset.splits[split]["labels"]
        assert posteriors.shape == (len(labels), 3)
        np.testing.assert_allclose(posteriors.sum(1), 1, rtol=1e-5)
        exact = posteriors.astype(float)
        found = loop.compile_evaluation(task)(state, split)
        assert found["accuracy"] == pytest.approx(
            accuracy_score(labels, posteriors.argmax(1))
        )
        assert found["cross_entropy"] == pytest.approx(
            log_loss(labels, exact / exact.sum(1, keepdims=True)), rel=1e-4
        )


def test_posteriors_are_the_models_of_normalised_examples(trained):
    task, state, _ = trained
    inputs = (task.dataset.splits["test"]["inputs"] - 0.5) / 2
    logits = task.model.apply(state.variables, jnp.asarray(inputs))
    np.testing.assert_allclose(
        task.posteriors(state, "test"), jax.nn.softmax(logits), rtol=1e-4, atol=1e-6
    )


def test_an_epoch_has_every_example_once(vectors):
    task = classifier(vectors)
    sample = jax.jit(task.sample)
    batches = [sample(jax.random.key(0), step, task.arrays) for step in range(9)]
    rows = np.concatenate([batch["inputs"] for batch in batches])  # two epochs
    train = (vectors.splits["train"]["inputs"] - 0.5) / 2
    for epoch in (rows[:90], rows[90:]):
        np.testing.assert_allclose(np.sort(epoch, 0), np.sort(train, 0), rtol=1e-6)
    assert (rows[:90] != rows[90:]).any()


def test_batch_statistics_train_and_serve_at_evaluation(vectors):
    task = classifier(vectors, Normalised())
    state = jax.jit(task.init)(
        jax.random.key(0), task.sample(jax.random.key(1), 0, task.arrays)
    )
    batch = task.sample(jax.random.key(1), 0, task.arrays)
    after, _ = jax.jit(task.train_step)(state, batch, jax.random.key(2))
    (old,) = state.model_state["batch_stats"].values()
    (new,) = after.model_state["batch_stats"].values()
    x = nn.Dense(8).apply({"params": state.params["Dense_0"]}, batch["inputs"])
    np.testing.assert_allclose(
        new["mean"], 0.5 * old["mean"] + 0.5 * x.mean(0), atol=1e-5
    )
    # One example at a time gives what the batch gives: its own statistics are not
    # used.
    evaluation = task.eval_batch("test", jnp.int32(0), task.arrays)
    whole = task.model.apply(after.variables, evaluation["inputs"])
    single = task.model.apply(after.variables, evaluation["inputs"][:1])
    np.testing.assert_allclose(whole[:1], single, rtol=1e-5)
    shifted = after.replace(
        model_state=jax.tree.map(lambda leaf: leaf + 1, after.model_state)
    )
    assert (
        task.eval_step(after, evaluation)["cross_entropy"][0]
        != task.eval_step(shifted, evaluation)["cross_entropy"][0]
    )


def test_batch_statistics_survive_a_checkpoint(trained):
    task, state, workdir = trained
    _, restored = loop.best_state(workdir, task, 0)
    jax.tree.map(np.testing.assert_array_equal, state, restored)


def test_the_plateau_ends_training(vectors, tmp_path):
    training = dataclasses.replace(TRAINING, num_steps=2000, eval_every=10)
    task = classifier(
        vectors,
        training=training,
        schedule="plateau",
        plateau_patience=0,
        plateau_factor=0.1,
        end_learning_rate=1e-3,
    )
    run(task, tmp_path, training)
    rows = metrics.read_rows(tmp_path)
    assert rows[-1]["step"] < 2000
    used = sorted({round(r["learning_rate"], 8) for r in rows if r["split"] == "train"})
    assert used == [0.005, 0.05] or used == [0.001, 0.005, 0.05]


def test_evaluation_is_of_the_moving_average(vectors, tmp_path):
    task = classifier(vectors, ema_decay=0.99)
    run(task, tmp_path)
    _, state = loop.best_state(tmp_path, task, 0)
    found = loop.compile_evaluation(task)(state, "validation")
    plain = dataclasses.replace(task, optimizer=Optimizer(name="adam"))
    without = loop.compile_evaluation(plain)(
        state.replace(ema_params=None), "validation"
    )
    with_average = loop.compile_evaluation(plain)(
        state.replace(params=state.ema_params, ema_params=None), "validation"
    )
    assert found == with_average != without


@pytest.mark.parametrize("batch_size", [0, 91])
def test_an_impossible_batch_size_is_a_sentence(vectors, batch_size):
    with pytest.raises(ValueError, match="batch_size must lie between 1 and 90"):
        dataclasses.replace(classifier(vectors), batch_size=batch_size)


def test_a_model_of_other_shape_is_a_sentence(vectors):
    task = classifier(vectors, archs.MLP((8,), 5))
    with pytest.raises(ValueError, match=r"shape \(20, 3\).*not \(20, 5\)"):
        loop.initial_state(task, 0, task.arrays)


def test_bfloat16_computes_in_it_and_keeps_float32(vectors):
    model = archs.Classifier(archs.MLP((8,), 4, dtype=jnp.bfloat16), 3)
    task = classifier(vectors, model)
    state = loop.first_state(task, 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {
        jnp.dtype("float32")
    }
    batch = task.sample(jax.random.key(1), 0, task.arrays)
    after, row = jax.jit(task.train_step)(state, batch, jax.random.key(2))
    program = str(jax.make_jaxpr(task.train_step)(state, batch, jax.random.key(2)))
    assert "bf16[20,8] = dot_general" in program
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {
        jnp.dtype("float32")
    }
    assert row["cross_entropy"][0].dtype == jnp.float32
    assert math.isfinite(row["cross_entropy"][0])
