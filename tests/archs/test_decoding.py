import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from archs import (
    GRUCell,
    RecurrentEncoderDecoder,
    RecurrentStack,
    Transformer,
    decoding,
)
from archs.decoding import beam_search, greedy, keep_probable, sample

PADDING, BOS, EOS, SIZE, LENGTH = 0, 1, 2, 5, 4


def chain(seed, batch=3, sharpness=1.0):
    """A Markov chain of its own for each sequence: step and cache.

    Its transitions lie in the cache, so that a beam that loses track of whose they are
    goes astray. No sequence holds padding or BOS.
    """
    logits = np.random.default_rng(seed).normal(size=(batch, SIZE, SIZE)) * sharpness
    logits[:, :, [PADDING, BOS]] = -np.inf
    cache = {"logits": jnp.asarray(logits, jnp.float32), "time": jnp.zeros(batch, int)}
    return step, cache


def step(cache, tokens):
    logits = cache["logits"][jnp.arange(len(tokens)), tokens]
    # Not homogeneous: the time must go with the sequence, too.
    logits = logits * (1 + 0.3 * cache["time"][:, None])
    return logits, {**cache, "time": cache["time"] + 1}


def first(batch=3):
    return jnp.full(batch, BOS)


def log_probability(cache, row, sequence):
    total, last = 0.0, BOS
    for time, token in enumerate(sequence):
        logits = np.asarray(cache["logits"], np.float64)[row, last] * (1 + 0.3 * time)
        total += logits[token] - np.logaddexp.reduce(logits)
        last = token
    return total


def all_sequences():
    """Everything the chain may say: up to its first EOS, or LENGTH tokens."""
    others = [t for t in range(SIZE) if t not in (PADDING, BOS, EOS)]
    for length in range(LENGTH):
        for words in itertools.product(others, repeat=length):
            yield (*words, EOS)
    yield from itertools.product(others, repeat=LENGTH)


def penalised(log_p, length, penalty):
    return log_p / ((5 + length) / 6) ** penalty


run_greedy = jax.jit(lambda cache: greedy(step, cache, first(), LENGTH, EOS))


@functools.partial(jax.jit, static_argnums=1)
def run_beam(cache, beam_size, length_penalty=0.0):
    return beam_search(step, cache, first(), LENGTH, EOS, beam_size, length_penalty)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_greedy_takes_the_most_probable(seed):
    _, cache = chain(seed)
    tokens, lengths, log_p = run_greedy(cache)
    for row in range(3):
        last, expected = BOS, []
        while len(expected) < LENGTH and last != EOS:
            last = int(np.argmax(cache["logits"][row, last]))
            expected.append(last)
        assert tokens[row].tolist() == expected + [0] * (LENGTH - len(expected))
        assert lengths[row] == len(expected)
        np.testing.assert_allclose(
            log_p[row], log_probability(cache, row, expected), rtol=1e-5
        )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 2))
def test_a_beam_of_one_is_greedy(seed, penalty):
    _, cache = chain(seed)
    beam = run_beam(cache, 1, penalty)
    for one, other in zip(beam, run_greedy(cache), strict=True):
        np.testing.assert_allclose(one[:, 0], other, rtol=1e-6)


@pytest.mark.parametrize("beam_size", [1, 2])
def test_beams_tell_logits_apart_whose_probabilities_round_alike(beam_size):
    rng = np.random.default_rng(0)
    logits = np.full((200, SIZE, SIZE), -np.inf, np.float32)
    logits[:, :, EOS] = rng.uniform(-1, 0, size=(200, SIZE))
    logits[:, :, 3] = 0.1
    logits[:, :, 4] = np.nextafter(np.float32(0.1), np.float32(1))
    logits[:, 3, EOS] = -5  # what follows 3 is worse

    def same_at_all_times(cache, tokens):
        return cache[jnp.arange(len(tokens)), tokens], cache

    arguments = same_at_all_times, jnp.asarray(logits), first(200), LENGTH, EOS
    expected = jax.jit(lambda: greedy(*arguments))()
    tokens, _, log_p = jax.jit(lambda: beam_search(*arguments, beam_size))()
    assert (log_p[:, 0] >= expected[2] - 1e-6).all()
    if beam_size == 1:
        np.testing.assert_array_equal(tokens[:, 0], expected[0])


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.6, 2.0]))
def test_a_large_beam_is_exhaustive(seed, penalty):
    _, cache = chain(seed)
    sequences = list(all_sequences())
    tokens, lengths, log_p = run_beam(cache, 40, penalty)
    assert len(sequences) == 31
    for row in range(3):
        expected = {s: log_probability(cache, row, s) for s in sequences}
        found = {
            tuple(tokens[row, i, : lengths[row, i]].tolist()): float(log_p[row, i])
            for i in range(len(sequences))
        }
        assert found.keys() == expected.keys()
        for sequence, value in found.items():
            np.testing.assert_allclose(value, expected[sequence], rtol=1e-4)
        scores = penalised(log_p[row], lengths[row], penalty)[: len(sequences)]
        assert (np.diff(scores) <= 1e-6).all()
        assert np.isneginf(log_p[row, len(sequences) :]).all()
        # All that it may say is all of the probability.
        np.testing.assert_allclose(np.exp(log_p[row]).sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("beam_size", [2, 3, 4])
@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_no_beam_scores_below_greedy(beam_size, penalty):
    number = 3000
    _, cache = chain(0, number)

    @jax.jit
    def run(cache):
        beam = beam_search(step, cache, first(number), LENGTH, EOS, beam_size, penalty)
        return greedy(step, cache, first(number), LENGTH, EOS), beam

    (_, greedy_lengths, greedy_log_p), (_, lengths, log_p) = run(cache)
    scores = penalised(log_p, lengths, penalty)
    assert (np.diff(scores) <= 1e-6).all()  # the best first
    least = penalised(greedy_log_p, greedy_lengths, penalty)
    assert (scores[:, 0] >= least - 1e-5).all()


def test_the_greedy_sequence_is_not_dropped_half_way():
    # After a one of three tokens follows and then the end, after b one of two and
    # then one of three: the beam of two would be b's after two steps.
    a, b, *others = range(3, 10)
    c, d, e, f, g = others
    p = np.zeros((10, 10))
    p[BOS, [a, b, c]] = 0.4, 0.35, 0.25
    p[a, [c, d, e]] = 0.34, 0.33, 0.33
    p[b, [f, g]] = 0.5, 0.5
    p[f, [c, d, e]] = p[g, [c, d, e]] = 0.34, 0.33, 0.33
    p[[c, d, e], EOS] = 1

    def step(cache, tokens):
        return jnp.log(jnp.asarray(p))[tokens], cache

    tokens, lengths, log_p = beam_search(step, (), first(1), 5, EOS, beam_size=2)
    assert tokens[0, 0].tolist() == [a, c, EOS, PADDING, PADDING]
    np.testing.assert_allclose(np.exp(log_p[0]), [0.4 * 0.34, 0.35 * 0.17], rtol=1e-5)
    assert lengths.tolist() == [[3, 4]]


def test_a_wider_beam_is_better():
    gains = []
    for seed in range(60):
        _, cache = chain(seed)
        *_, log_p = run_greedy(cache)
        *_, narrow = run_beam(cache, 3)
        *_, best = run_beam(cache, 40)
        assert (narrow[:, 0] <= best[:, 0] + 1e-5).all()
        gains.append(narrow[:, 0] - log_p)
    assert np.mean(gains) > 0.02


def test_length_penalty_favours_length():
    _, cache = chain(0, sharpness=0.3)
    lengths = [run_beam(cache, 40, penalty)[1][:, 0].sum() for penalty in (0.0, 3.0)]
    assert lengths[0] < lengths[1]


def test_beams_are_padded_after_the_end():
    _, cache = chain(3)
    tokens, lengths, log_p = run_beam(cache, 3)
    for row, i in np.ndindex(3, 3):
        said = tokens[row, i, : lengths[row, i]]
        assert not tokens[row, i, lengths[row, i] :].any()
        assert EOS not in said[:-1]
        assert said[-1] == EOS or len(said) == LENGTH
        expected = log_probability(cache, row, said.tolist())
        np.testing.assert_allclose(log_p[row, i], expected, rtol=1e-5)


def draws(temperature=1.0, number=4000, **kwargs):
    """Frequencies of the first token after BOS, and what `sample` returned."""
    _, cache = chain(1, batch=1)
    cache = jax.tree.map(lambda x: jnp.repeat(x, number, axis=0), cache)
    run = functools.partial(sample, step, cache, first(number), LENGTH, EOS, **kwargs)
    out = jax.jit(run)(key=jax.random.key(0), temperature=temperature)
    logits = np.asarray(cache["logits"][0, BOS], np.float64)
    return np.bincount(out[0][:, 0], minlength=SIZE) / number, logits, out, cache


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_probabilities(temperature):
    found, logits, out, cache = draws(temperature)
    expected = softmax(logits / temperature)
    # Four standard errors.
    slack = 4 * np.sqrt(expected * (1 - expected) / 4000)
    assert (np.abs(found - expected) <= slack).all()
    for row in range(20):
        said = out[0][row, : out[1][row]].tolist()
        expected = log_probability(cache, row, said)
        np.testing.assert_allclose(out[2][row], expected, rtol=1e-4)
        assert EOS not in said[:-1]


def test_top_k_and_top_p_cut_the_frequencies():
    _, logits, *_ = draws(number=1)
    order = np.argsort(-logits)
    p = softmax(logits)
    between = p[order[0]] + 0.5 * p[order[1]]
    for kwargs in ({"top_k": 2}, {"top_p": float(between)}):
        found, *_ = draws(**kwargs)
        expected = np.where(np.isin(np.arange(SIZE), order[:2]), p, 0)
        expected /= expected.sum()
        assert not found[expected == 0].any()
        np.testing.assert_allclose(found, expected, atol=0.04)
    for kwargs in ({"top_k": 1}, {"top_p": 1e-6}):
        found, *_, out, cache = draws(number=20, **kwargs)
        expected = greedy(step, cache, first(20), LENGTH, EOS)
        jax.tree.map(np.testing.assert_allclose, out, expected)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 12) | st.none(),
    st.floats(0.01, 1) | st.none(),
)
def test_what_is_kept_is_the_smallest_set(seed, top_k, top_p):
    logits = np.random.default_rng(seed).normal(size=10).astype(np.float32) * 2
    kept = np.asarray(keep_probable(jnp.asarray(logits), top_k, top_p))
    chosen = np.isfinite(kept)
    np.testing.assert_array_equal(kept[chosen], logits[chosen])
    order = np.argsort(-logits)[: top_k or 10]
    p = softmax(logits[order].astype(np.float64))
    if top_p is None:
        assert set(np.flatnonzero(chosen)) == set(order)
        return
    number = chosen.sum()
    assert set(np.flatnonzero(chosen)) == set(order[:number])
    assert number == 1 or p[: number - 1].sum() < top_p + 1e-6
    assert number == len(order) or p[:number].sum() > top_p - 1e-6


@pytest.mark.parametrize("name", ["recurrent", "transformer"])
def test_beams_do_not_move_the_source(name):
    """Of the cache only what steps change is gathered."""
    if name == "recurrent":
        stack = RecurrentStack(GRUCell(8))
        model = RecurrentEncoderDecoder(stack, stack, 7, embedding_size=4)
    else:
        model = Transformer(7, 7, 1, 2, 8)
    source = jnp.ones((3, 11), int)
    variables = jax.eval_shape(model.init, jax.random.key(0), source, source)
    gathered = []

    def search(variables):
        memory = model.apply(variables, source, method="encode")
        cache = model.apply(variables, memory, 6, method="init_cache")
        assert any(11 in leaf.shape for leaf in jax.tree.leaves(cache))
        step = functools.partial(model.apply, variables, method="decode_step")
        return beam_search(step, cache, first(), 6, EOS, 4)

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "gather":
                gathered.append(equation.invars[0].aval.shape)
            for inner in jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(search)(variables).jaxpr)
    beams = [shape for shape in gathered if shape[:2] == (3, 4)]
    assert beams and not any(11 in shape for shape in beams)


def test_equal_logits_do_not_widen_the_set():
    kept = keep_probable(jnp.zeros((2, 6)), top_k=2)
    np.testing.assert_array_equal(np.isfinite(kept).sum(-1), 2)


def test_transformers_are_decoded():
    """Beams of a model, by its log-probabilities in one forward pass."""
    model = Transformer(
        7, 7, 1, 2, 8, positions="rotary", tied_embeddings=True, norm_first=False
    )
    source = jax.random.randint(jax.random.key(0), (3, 5), 3, 7)
    source_lengths = jnp.array([5, 2, 3])
    variables = jax.jit(model.init)(jax.random.key(1), source, source)

    @jax.jit
    def run(source):
        memory = model.apply(variables, source, source_lengths, method="encode")
        cache = model.apply(variables, memory, 6, method="init_cache")
        step = functools.partial(model.apply, variables, method="decode_step")
        tokens, lengths, log_p = beam_search(step, cache, first(), 6, EOS, 3)
        inputs = jnp.pad(tokens, ((0, 0), (0, 0), (1, 0)), constant_values=BOS)
        logits = jax.vmap(
            lambda inputs: model.apply(variables, source, inputs, source_lengths),
            in_axes=1,
            out_axes=1,
        )(inputs[..., :-1])
        gains = jnp.take_along_axis(
            jax.nn.log_softmax(logits), tokens[..., None], axis=-1
        )[..., 0]
        real = jnp.arange(6) < lengths[..., None]
        best = greedy(step, cache, first(), 6, EOS)
        one = beam_search(step, cache, first(), 6, EOS, 1)
        return log_p, jnp.sum(gains * real, axis=-1), best, one

    log_p, expected, best, one = run(source)
    np.testing.assert_allclose(log_p, expected, rtol=1e-4)
    for x, y in zip(best, one, strict=True):
        np.testing.assert_allclose(x, y[:, 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_k": 0}, "top_k must be"),
        ({"top_p": 1.5}, "top_p must lie"),
    ],
)
def test_errors(kwargs, message):
    _, cache = chain(0)
    with pytest.raises(ValueError, match=message):
        sample(step, cache, first(), LENGTH, EOS, jax.random.key(0), **kwargs)
    with pytest.raises(ValueError, match="beam_size must be"):
        decoding.beam_search(step, cache, first(), LENGTH, EOS, 0)
