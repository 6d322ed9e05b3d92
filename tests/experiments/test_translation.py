"""`Translation`: what is learned from a pair, and dates as the first language."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import archs
import data
from data.sequences import BOS, EOS
from experiments import loop
from experiments.optimizers import Optimizer
from experiments.tasks import Translation

SHIPPED = Path(__file__).parents[2] / "experiments" / "configs"
TRAINING = loop.Training(num_steps=20, steps_per_call=10, log_every=10, eval_every=10)
DATES = data.DateTranslation()


def network(**fields):
    stack = archs.RecurrentStack(archs.GRUCell(8))
    return archs.RecurrentEncoderDecoder(
        stack,
        stack,
        DATES.spec.vocabulary_size,
        source_vocabulary_size=DATES.spec.source_vocabulary_size,
        embedding_size=8,
        attention_size=8,
        **fields,
    )


def translation(model=None, **fields):
    fields = {"num_pairs": 4, "validation_pairs": 6, "test_pairs": 6} | fields
    fields = {"evaluation_batch": 4} | fields
    return Translation(
        model or network(), DATES, Optimizer(name="adam"), TRAINING, **fields
    )


@pytest.fixture(scope="module")
def task():
    return translation()


@pytest.fixture(scope="module")
def state(task):
    return loop.first_state(task, 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_smoothed_cross_entropy_of_the_next_token(smoothing, task):
    sgd = Optimizer(name="sgd", learning_rate=1.0)
    task = dataclasses.replace(task, label_smoothing=smoothing, optimizer=sgd)
    state = loop.first_state(task, 0)
    batch = task.sample(jax.random.key(0), jnp.int32(0), task.arrays)
    targets, lengths = map(np.array, (batch["targets"], batch["target_lengths"]))
    assert (targets[:, 0] == BOS).all()
    assert (targets[np.arange(4), lengths - 1] == EOS).all()
    # Of several lengths, and after the end anything.
    lengths -= [0, 1, 5, 2]
    past = np.arange(targets.shape[1]) >= lengths[:, None]
    targets = np.where(
        past, np.random.default_rng(0).integers(4, 9, past.shape), targets
    )
    batch |= {"targets": jnp.asarray(targets), "target_lengths": jnp.asarray(lengths)}

    def by_hand(params, smoothing):
        arguments = batch["inputs"], batch["targets"], batch["lengths"]
        logits = task.model.apply({"params": params}, *arguments)
        log_p = jax.nn.log_softmax(logits)
        terms = []
        for i in range(4):
            for t in range(lengths[i] - 1):
                share = np.full(log_p.shape[-1], smoothing / log_p.shape[-1])
                share[targets[i, t + 1]] += 1 - smoothing
                terms.append(-(share * log_p[i, t]).sum())
        return sum(terms) / len(terms)

    after, measured = jax.jit(task.train_step)(state, batch, jax.random.key(0))
    total, count = measured["cross_entropy"]
    assert count == (lengths - 1).sum()
    plain = float(by_hand(state.params, 0.0))
    assert total / count == pytest.approx(plain, rel=1e-5)
    gradient = jax.grad(by_hand)(state.params, smoothing)
    jax.tree.map(
        lambda new, old, g: np.testing.assert_allclose(
            np.asarray(new), np.asarray(old - g), atol=2e-6
        ),
        after.params,
        state.params,
        gradient,
    )


def test_translations_are_what_beam_search_finds(task, state):
    batch = task.eval_batch("test", jnp.int32(0), task.arrays)
    translate = jax.jit(task.translate)
    tokens, log_p = translate(state, batch["inputs"], batch["lengths"])
    assert tokens.shape == (4, task.longest_target)
    # Its probability is what the whole model says of it.
    target = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=BOS)
    count = (tokens != 0).sum(1)
    logits = task.model.apply(
        state.variables, batch["inputs"], target[:, :-1], batch["lengths"], count
    )
    every = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[
        ..., 0
    ]
    real = jnp.arange(tokens.shape[1]) < count[:, None]
    np.testing.assert_allclose(jnp.where(real, every, 0).sum(1), log_p, rtol=1e-4)


def test_a_source_is_read_to_its_end_and_no_further(task, state):
    batch = task.sample(jax.random.key(0), jnp.int32(0), task.arrays)
    task.check_contracts(state, batch)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\), not 1.0"),
        ({"beam_size": 0}, "beam_size must be 1 or more, not 0"),
        ({"model": archs.MLP((), 4)}, "MLP has no decode_step"),
    ],
)
def test_impossible_values_are_named(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        translation(**fields)


@pytest.mark.parametrize("model", ["gru", "transformer"])
def test_the_config_of_dates_runs(model, main, tmp_path):
    done = main(
        f"--config={SHIPPED}/translation.py:{model}_dates",
        f"--workdir={tmp_path}",
        "--config.training.num_steps=2",
        "--config.training.steps_per_call=1",
        "--config.task.num_pairs=4",
        "--config.task.test_pairs=6",
        "--config.task.validation_pairs=5",
        "--config.task.evaluation_batch=6",
        "--config.task.beam_size=2",
    )
    assert done.code == 0, done.err
    assert len((tmp_path / "translations.tsv").read_text().splitlines()) == 1 + 6


@pytest.mark.slow
def test_dates_are_learned(main, tmp_path):
    done = main(
        f"--config={SHIPPED}/translation.py:gru_dates",
        f"--workdir={tmp_path}",
        "--config.training.num_steps=300",
        "--config.task.test_pairs=60",
        "--config.task.validation_pairs=50",
        "--config.task.beam_size=2",
    )
    assert done.code == 0, done.err
    measured = json.loads((tmp_path / "evaluation.json").read_text())["test"]
    assert measured["exact"] > 0.9 and measured["bleu"] > 90
    rows = (tmp_path / "translations.tsv").read_text().splitlines()[1:]
    same = [row.split("\t")[1] == row.split("\t")[2] for row in rows]
    assert np.mean(same) == pytest.approx(measured["exact"])
