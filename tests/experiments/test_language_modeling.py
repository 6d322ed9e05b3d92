"""`LanguageModeling`: windows, states carried from one to the next, evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import archs
from data.sequences import spec
from experiments import loop
from experiments.optimizers import Optimizer
from experiments.tasks import LanguageModeling, sequence_report

TRAINING = loop.Training(num_steps=20, steps_per_call=10, log_every=10, eval_every=10)
SIZE = 7


class Text:
    """A stream of ids for each split."""

    spec = spec("text", SIZE, vocabulary_size=SIZE)

    def __init__(self, length=61):
        streams = np.random.default_rng(0).integers(0, SIZE, (3, length))
        splits = ("train", "validation", "test")
        self.arrays = {
            split: {"stream": jnp.asarray(stream, jnp.int32)}
            for split, stream in zip(splits, streams, strict=True)
        }


def recurrent(cell=None):
    stack = archs.RecurrentStack(cell or archs.LSTMCell(6))
    return archs.SequenceModel(stack, SIZE, vocabulary_size=SIZE, embedding_size=5)


def transformer():
    return archs.TransformerLanguageModel(
        SIZE, SIZE, num_layers=1, num_heads=2, hidden_size=8
    )


def modeling(model=None, **fields):
    fields = {"num_windows": 2, "window": 5, "evaluation_batch": 3} | fields
    return LanguageModeling(
        model or recurrent(), Text(), Optimizer(name="sgd"), TRAINING, **fields
    )


def test_windows_go_on_with_the_state_of_the_last():
    """Without learning, the windows of a row are read as one text."""
    task = modeling(window=5)
    optimizer = Optimizer(name="sgd", learning_rate=1e-30)
    task = LanguageModeling(
        task.model, task.dataset, optimizer, TRAINING, num_windows=2, window=5
    )
    state = loop.first_state(task, 0)
    stream = task.arrays["train"]["stream"][:60].reshape(2, 30)
    logits, _ = task.model.apply(task.variables(state), stream)
    losses = []
    step = jax.jit(task.train_step)
    for number in range(6):
        batch = task.sample(jax.random.key(0), number, task.arrays)
        assert bool(batch["reset"]) == (number == 0)
        np.testing.assert_array_equal(
            batch["inputs"], stream[:, 5 * number : 5 * number + 5]
        )
        state, measured = step(state, batch, jax.random.key(1))
        total, count = measured["cross_entropy"]
        window = slice(5 * number, 5 * number + 5)
        expected = optax.softmax_cross_entropy_with_integer_labels(
            logits[:, window], batch["targets"]
        )
        np.testing.assert_allclose(total / count, expected.mean(), rtol=1e-5)
        losses.append(float(total))
    # All begin again: with no state.
    batch = task.sample(jax.random.key(0), 6, task.arrays)
    assert bool(batch["reset"])
    _, measured = step(state, batch, jax.random.key(1))
    assert float(measured["cross_entropy"][0]) == pytest.approx(losses[0], rel=1e-5)


def test_a_learned_initial_state_is_learned_and_used():
    stack = archs.RecurrentStack(archs.LSTMCell(6), learned_initial_state=True)
    model = archs.SequenceModel(stack, SIZE, vocabulary_size=SIZE, embedding_size=5)
    task = modeling(model)
    state = loop.first_state(task, 0)
    layer = state.params["stack"]["layers_0"]
    layer["initial_state"] = jax.tree.map(
        lambda leaf: leaf + 0.5, layer["initial_state"]
    )
    step = jax.jit(task.train_step)
    first, second = (
        task.sample(jax.random.key(0), number, task.arrays) for number in (0, 1)
    )
    assert bool(first["reset"]) and not bool(second["reset"])
    logits, _ = model.apply(task.variables(state), first["inputs"])
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, first["targets"])
    after, measured = step(state, first, jax.random.key(1))
    total, count = measured["cross_entropy"]
    np.testing.assert_allclose(total / count, expected.mean(), rtol=1e-5)

    def h0(state):
        return state.params["stack"]["layers_0"]["initial_state"][0]

    assert (h0(after) != h0(state)).any()
    later, _ = step(after, second, jax.random.key(1))
    np.testing.assert_array_equal(h0(later), h0(after))


@pytest.mark.parametrize(
    ("model", "context", "stride"), [(recurrent(), 8, 5), (transformer(), 2, 3)]
)
def test_every_token_is_counted_once_with_its_context(model, context, stride):
    carries = isinstance(model, archs.SequenceModel)
    task = modeling(model, carry_state=carries, context=context)
    state = loop.first_state(task, 0)
    stream = np.asarray(task.arrays["test"]["stream"])
    prepared = task.prepare_evaluation(state, "test", task.arrays)
    evaluate = jax.jit(
        lambda index: task.eval_step(
            prepared, task.eval_batch("test", index, task.arrays)
        )
    )
    total = count = 0
    for index in range(task.num_eval_batches("test")):
        value, number = evaluate(index)["cross_entropy"]
        total, count = total + float(value), count + int(number)
    assert count == len(stream) - 1
    # The definition: each piece from what is up to `context` tokens before it.
    expected, width = 0.0, context + stride
    for start in range(0, 60, stride):
        begin = max(start - context, 0)
        # As long as all the others, so that it compiles once.
        inputs = np.pad(stream[begin : start + stride], (0, width))[None, :width]
        output = model.apply(prepared, inputs)
        logits = output[0] if carries else output
        told = logits[0, start - begin : start - begin + stride]
        expected += float(
            optax.softmax_cross_entropy_with_integer_labels(
                told, stream[start + 1 : start + 1 + stride]
            ).sum()
        )
    assert total == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("window", [1, 4, 5])
def test_a_transformer_meets_only_positions_it_was_trained_at(window):
    task = modeling(transformer(), carry_state=False, window=window)
    read = task.sample(jax.random.key(0), 0, task.arrays)["inputs"]
    evaluated = task.eval_batch("test", 0, task.arrays)["inputs"]
    assert read.shape[1] == evaluated.shape[1] == window


def test_samples_of_a_transformer_see_a_window():
    task = modeling(transformer(), carry_state=False, window=4)
    variables = task.variables(loop.first_state(task, 0))
    widths = []

    def predict(tokens, lengths):
        widths.append(tokens.shape[1])
        return task.model.apply(variables, tokens, lengths)

    step = sequence_report.window_step(predict)
    cache = sequence_report.window_cache(2, 4)
    text = task.arrays["test"]["stream"][:14].reshape(2, 7)
    for t in range(7):
        logits, cache = step(cache, text[:, t])
        expected = task.model.apply(variables, text[:, max(t - 3, 0) : t + 1])[:, -1]
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert set(widths) == {4}


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="TransformerLanguageModel has no state"):
        loop.first_state(modeling(transformer()), 0)
    with pytest.raises(ValueError, match="bidirectional stack reads"):
        stack = archs.RecurrentStack(archs.LSTMCell(6), bidirectional=True)
        modeling(archs.SequenceModel(stack, SIZE, vocabulary_size=SIZE))
    with pytest.raises(ValueError, match="bidirectional stack reads"):
        stack = archs.Bidirectional(archs.LSTMCell(6))
        modeling(archs.SequenceModel(stack, SIZE, vocabulary_size=SIZE))
    with pytest.raises(ValueError, match="temperatures must be > 0"):
        modeling(temperatures=(0.0,))
    with pytest.raises(ValueError, match=r"context must be below window \(5\)"):
        modeling(transformer(), carry_state=False, context=5)
    with pytest.raises(ValueError, match="window must be 1 or more, not 0"):
        modeling(window=0)
    with pytest.raises(ValueError, match=r"\(2, 5, 7\).*not \(2, 5, 3\)"):
        stack = archs.RecurrentStack(archs.LSTMCell(6))
        loop.first_state(
            modeling(archs.SequenceModel(stack, 3, vocabulary_size=SIZE)), 0
        )


def test_a_text_of_one_letter_is_soon_learned():
    class Same(Text):
        def __init__(self):
            super().__init__()
            self.arrays = {
                split: {"stream": jnp.tile(jnp.array([1, 2, 3]), 30)}
                for split in self.arrays
            }

    task = LanguageModeling(
        recurrent(),
        Same(),
        Optimizer(name="adam", learning_rate=0.03),
        TRAINING,
        num_windows=2,
        window=10,
    )
    run = loop.compile_steps(
        task, 0, jax.eval_shape(lambda: loop.first_state(task, 0)), 100
    )
    state, rows = run(loop.first_state(task, 0), task.arrays, 0)
    total, count = rows["cross_entropy"]
    assert total[-1] / count[-1] < 0.05 < total[0] / count[0]
