"""`SequencePrediction`: objectives, buckets, and every shipped config in short."""

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import archs
import data
from data.sequences import spec
from experiments import loop
from experiments.optimizers import Optimizer
from experiments.tasks import SequencePrediction, sequence_objectives

SHIPPED = Path(__file__).parents[2] / "experiments" / "configs"
TRAINING = loop.Training(num_steps=20, steps_per_call=10, log_every=10, eval_every=10)


def classifier(num_classes=2, vocabulary_size=200, **fields):
    stack = archs.RecurrentStack(archs.GRUCell(8), **fields)
    return archs.SequenceClassifier(
        stack, num_classes, vocabulary_size=vocabulary_size, embedding_size=4
    )


def prediction(model=None, dataset=None, **fields):
    fields = {"num_sequences": 8, "validation_sequences": 12} | fields
    fields = {"test_sequences": 25, "evaluation_batch": 10} | fields
    return SequencePrediction(
        model or classifier(),
        dataset or data.NumberAgreement(),
        Optimizer(name="adam"),
        TRAINING,
        **fields,
    )


class Stored:
    """Sequences of ids, their sum modulo 3 being the class, sorted by length."""

    def __init__(self, sizes=((40, 4), (24, 7), (16, 12))):
        rng = np.random.default_rng(0)
        lengths = np.repeat([length for _, length in sizes], [n for n, _ in sizes])
        inputs = rng.integers(1, 9, (len(lengths), sizes[-1][1]))
        inputs[np.arange(inputs.shape[1]) >= lengths[:, None]] = 0
        split = {
            "inputs": jnp.asarray(inputs, jnp.int32),
            "lengths": jnp.asarray(lengths, jnp.int32),
            "targets": jnp.asarray(inputs.sum(1) % 3, jnp.int32),
        }
        self.arrays = dict.fromkeys(("train", "validation", "test"), split)
        self.spec = spec(
            "stored",
            3,
            vocabulary_size=9,
            sizes=dict.fromkeys(self.arrays, len(inputs)),
        )
        stops = np.cumsum([n for n, _ in sizes]).tolist()
        self.buckets = tuple(
            (start, stop, length)
            for start, stop, (_, length) in zip([0, *stops], stops, sizes, strict=False)
        )

    def select(self, indices, split, arrays):
        return {name: array[indices] for name, array in arrays[split].items()}


# Objectives, against closed forms.


def test_cross_entropy_of_sequences_and_of_steps():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(3, 5, 4)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 4, (3, 5)))
    mask = jnp.asarray(rng.uniform(size=(3, 5)) < 0.7)
    batch = {"targets": targets, "target_mask": mask}
    values, found_mask = sequence_objectives.cross_entropy(logits, batch)[
        "cross_entropy"
    ]
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(probabilities, targets[..., None], -1))
    np.testing.assert_allclose(values, expected[..., 0], rtol=1e-5)
    np.testing.assert_array_equal(found_mask, mask)
    of_sequence = sequence_objectives.cross_entropy(
        logits[:, 0], {"targets": targets[:, 0]}
    )
    np.testing.assert_allclose(
        of_sequence["cross_entropy"], expected[:, 0, 0], rtol=1e-5
    )
    np.testing.assert_array_equal(
        of_sequence["accuracy"], probabilities[:, 0].argmax(-1) == targets[:, 0]
    )


def test_frames_are_independent_notes():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 6, 5)).astype(np.float32)
    frames = rng.integers(0, 2, (2, 6, 5)).astype(np.float32)
    mask = np.arange(6) < np.array([[6], [4]])
    found = sequence_objectives.frame_likelihood(
        logits, {"targets": frames, "target_mask": mask}
    )
    expected = -stats.bernoulli.logpmf(frames, 1 / (1 + np.exp(-logits))).sum(-1)
    np.testing.assert_allclose(found["frame_nll"][0], expected, rtol=1e-4)
    later = np.asarray(found["later_frame_nll"][1])
    np.testing.assert_array_equal(later.sum(1), [5, 3])
    assert not later[:, 0].any()
    means = [expected[0].mean(), expected[1, :4].mean()]
    np.testing.assert_allclose(found["sequence_nll"], means, rtol=1e-4)


def test_a_sequence_is_legal_if_all_its_steps_are():
    logits = jax.nn.one_hot(jnp.array([[0, 1, 2], [0, 1, 2]]), 3)
    legal = jnp.ones((2, 3, 3), bool).at[:, 2, 2].set(False)
    batch = {
        "targets": jnp.zeros((2, 3), jnp.int32),
        "target_mask": jnp.array([[True, True, True], [True, True, False]]),
        "legal": legal,
    }
    found = sequence_objectives.legal_symbol(logits, batch)
    np.testing.assert_array_equal(found["sequence_legal"], [0, 1])
    np.testing.assert_array_equal(found["legal"][0][0], [1, 1, 0])


@pytest.mark.parametrize(
    ("objective", "shape", "batch"),
    [
        ("squared_error", (5,), {"targets": jnp.zeros((5, 1))}),
        ("squared_error", (5, 5), {"targets": jnp.zeros((5, 1))}),
        ("cross_entropy", (5, 3), {"targets": jnp.zeros((5, 4), jnp.int32)}),
        ("frame_likelihood", (5, 3, 1), {"targets": jnp.zeros((5, 3, 88))}),
    ],
)
def test_shapes_that_would_broadcast_are_refused(objective, shape, batch):
    mask = {"target_mask": jnp.ones(batch["targets"].shape[:2], bool)}
    with pytest.raises(ValueError, match="the model must return predictions of shape"):
        getattr(sequence_objectives, objective)(jnp.zeros(shape), batch | mask)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"objective": "error"}, "objective must be one of cross_entropy.*'error'"),
        ({"objective": "_check_shape"}, "objective must be one of"),
        ({"num_sequences": 0}, "num_sequences must be 1 or more, not 0"),
        ({"temperature": 0.0}, "temperature must be above 0, not 0.0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], not 0.0"),
        ({"first_note": 20}, r"first_note must be a key .* not 20"),
    ],
)
def test_impossible_values_are_named(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        prediction(**fields)


@pytest.mark.parametrize(
    ("dataset", "objective"),
    [
        (data.WordText("no.txt"), "cross_entropy"),
        (data.TinyShakespeare(), "cross_entropy"),
        (data.Chorales(), "frame_likelihood"),
        (data.EmbeddedReber(), "legal_symbol"),
    ],
)
def test_what_comes_next_is_not_to_be_read(dataset, objective):
    model = archs.SequenceModel(
        archs.RecurrentStack(archs.GRUCell(8), bidirectional=True), 9, 9
    )
    with pytest.raises(ValueError, match="targets are what comes next"):
        prediction(model, dataset, objective=objective)


# Buckets.


def test_a_step_is_that_of_the_batch_without_its_padding():
    dataset = Stored()
    model = classifier(3, 9)
    task = prediction(model, dataset)
    state = loop.first_state(task, 0)
    sample, step = jax.jit(task.sample), jax.jit(task.train_step)
    lengths = set()
    for number in range(6):
        batch = sample(jax.random.key(1), number, task.arrays)
        longest = int(batch["lengths"].max())
        lengths.add(longest)
        after, measured = step(state, batch, jax.random.key(2))

        def loss(params, inputs=batch["inputs"][:, :longest], batch=batch):
            logits = model.apply({"params": params}, inputs)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, batch["targets"]
            ).mean()

        assert (batch["lengths"] == longest).all()  # of one bucket
        value, gradient = jax.value_and_grad(loss)(state.params)
        total, count = measured["cross_entropy"]
        np.testing.assert_allclose(total / count, value, rtol=1e-5)
        update, _ = task.optimizer.transformation(20).update(
            gradient, state.opt_state, state.params
        )
        expected = optax.apply_updates(state.params, update)
        for a, b in zip(
            jax.tree.leaves(after.params), jax.tree.leaves(expected), strict=True
        ):
            # Adam's first step is the sign of the gradient: of tiny ones it may turn.
            assert np.mean(np.abs(np.asarray(a - b)) > 1e-5) < 0.02
    assert lengths == {4, 7, 12}


def test_stored_sequences_are_evaluated_once_each():
    task = prediction(classifier(3, 9), Stored(), evaluation_batch=30)
    state = loop.first_state(task, 0)
    sums = {}
    for index in range(task.num_eval_batches("test")):
        batch = task.eval_batch("test", jnp.int32(index), task.arrays)
        for name, (total, count) in task.eval_step(state, batch).items():
            old = sums.get(name, (0, 0))
            sums[name] = (old[0] + float(total), old[1] + float(count))
    split = task.arrays["test"]
    logits = task.model.apply(state.variables, split["inputs"], split["lengths"])
    correct = logits.argmax(-1) == split["targets"]
    assert sums["accuracy"] == (float(correct.sum()), 80)


def test_the_same_batch_whatever_has_been_drawn_before():
    task = prediction(classifier(3, 9), Stored())
    sample = jax.jit(task.sample)
    first = [sample(jax.random.key(0), i, task.arrays) for i in range(3)]
    again = sample(jax.random.key(0), 1, task.arrays)
    jax.tree.map(np.testing.assert_array_equal, first[1], again)
    assert (first[0]["inputs"] != first[2]["inputs"]).any()


def test_those_shown_are_of_all_lengths():
    task = prediction(classifier(3, 9), Stored())
    state = loop.first_state(task, 0)
    _, _, shown = task.evaluation_sequences(state, "test", 5)
    split = task.arrays["test"]
    which = [0, 19, 39, 59, 79]
    np.testing.assert_array_equal(shown["inputs"], split["inputs"][np.array(which)])
    assert shown["lengths"].tolist() == [4, 4, 4, 7, 12]
    logits = task.model.apply(state.variables, split["inputs"], split["lengths"])
    np.testing.assert_allclose(
        shown["prediction"], logits[np.array(which)], rtol=1e-4, atol=1e-5
    )
    generated = prediction()
    _, _, shown = generated.evaluation_sequences(
        loop.first_state(generated, 0), "test", 5
    )
    assert len(shown["prediction"]) == len(shown["lengths"]) == 5


# Contracts.


class ReadsPadding(nn.Module):
    """Forgets the lengths."""

    @nn.compact
    def __call__(self, inputs, lengths=None, *, train=False):
        return nn.Dense(2)(nn.Embed(200, 4)(inputs).mean(1))


def test_a_model_that_reads_padding_is_found_out():
    task = prediction(ReadsPadding())
    state = loop.first_state(task, 0)
    batch = task.sample(jax.random.key(0), 0, task.arrays)
    with pytest.raises(AssertionError, match="padding invariance of a sequence"):
        task.check_contracts(state, batch)
    task = prediction()
    task.check_contracts(loop.first_state(task, 0), batch)


# Shipped configs, in short.

SHORT = [
    "--config.training.num_steps=4",
    "--config.training.steps_per_call=2",
    "--config.training.log_every=2",
    "--config.training.eval_every=4",
]
FEW = [
    "--config.task.num_sequences=4",
    "--config.task.validation_sequences=8",
    "--config.task.test_sequences=8",
    "--config.task.evaluation_batch=8",
]
VARIANTS = {
    "adding_problem.py:rnn": ["--config.dataset.length=12"],
    "adding_problem.py:gru": ["--config.dataset.length=12"],
    "adding_problem.py:lstm": ["--config.dataset.length=12"],
    "copy_memory.py:gru": ["--config.dataset.delay=5"],
    "copy_memory.py:lstm": ["--config.dataset.delay=5"],
    "number_agreement.py:lstm": [],
    "number_agreement.py:plain_gru": [],
    "roma.py:forward": [],
    "embedded_reber.py:peephole": [],
    "time_delay.py:lstm": ["--config.dataset.delay=3"],
    "time_delay.py:peephole": ["--config.dataset.delay=3"],
    "sequential_images.py:lstm_digits": [],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_shipped_configs_run(variant, main, tmp_path):
    done = main(
        f"--config={SHIPPED}/{variant}",
        f"--workdir={tmp_path}",
        *SHORT,
        *FEW,
        *VARIANTS[variant],
    )
    assert done.code == 0, done.err
    measured = json.loads((tmp_path / "evaluation.json").read_text())["test"]
    assert all(np.isfinite(list(measured.values())))
    assert "<h2>" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "test_sequences.npz").exists()


def test_agreement_is_learned_and_shown_by_attractors(main, tmp_path):
    done = main(
        f"--config={SHIPPED}/number_agreement.py:gru",
        f"--workdir={tmp_path}",
        "--config.training.num_steps=200",
        "--config.training.eval_every=200",
        "--config.task.test_sequences=500",
    )
    assert done.code == 0, done.err
    measured = json.loads((tmp_path / "evaluation.json").read_text())["test"]
    assert measured["accuracy"] > 0.95
    report = (tmp_path / "report.html").read_text()
    assert "Test sequences by attractors" in report


@pytest.mark.parametrize(
    ("direction", "accuracy"), [("forward", 0.5), ("bidirectional", 1)]
)
def test_only_a_bidirectional_network_knows_which_roma(
    direction, accuracy, main, tmp_path
):
    done = main(
        f"--config={SHIPPED}/roma.py:{direction}",
        f"--workdir={tmp_path}",
        "--config.training.num_steps=100",
        "--config.task.test_sequences=2000",
    )
    assert done.code == 0, done.err
    measured = json.loads((tmp_path / "evaluation.json").read_text())["test"]
    assert abs(measured["accuracy"] - accuracy) < 0.04


def test_unknown_variants_are_named(refused):
    message = refused(f"--config={SHIPPED}/roma.py:backward")
    assert "there is no variant 'backward': it must be one of forward" in message
