import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from archs import (
    Transformer,
    TransformerClassifier,
    TransformerDecoder,
    TransformerEncoder,
    TransformerLanguageModel,
    TransformerLayer,
    attention,
    contracts,
    transformer,
)
from archs.attention import padding_mask
from archs.transformer import sinusoidal_encoding

FIELDS = {"num_layers": 1, "num_heads": 2, "hidden_size": 8}
VOCABULARY = 11
LENGTHS = jnp.array([6, 2, 4])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def tokens(seed, *shape):
    return jax.random.randint(jax.random.key(seed), shape, 1, VOCABULARY)


def close(ours, theirs, tolerance=1e-5):
    theirs = np.asarray(theirs)
    atol = tolerance * np.abs(theirs).max()
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=atol)


def tensor(x):
    return torch.from_numpy(np.array(x))


@functools.cache
def initialised(model, *inputs):
    """Variables of a model, with noise where they are initialised to constants."""
    inputs = [np.ones(x.shape, x.dtype) for x in inputs]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32),
        jax.jit(model.init)(jax.random.key(1), *inputs),
    )


def variables_of(model, *inputs):
    return initialised(model, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs))


def function_of(model, *inputs, **kwargs):
    variables = variables_of(model, *inputs)
    return jax.jit(functools.partial(model.apply, variables, **kwargs))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_layers_are_those_of_torch(decoder, activation, norm_first, masked):
    theirs_type = (
        torch.nn.TransformerDecoderLayer
        if decoder
        else torch.nn.TransformerEncoderLayer
    )
    theirs = theirs_type(
        8, 2, 12, 0.0, activation, batch_first=True, norm_first=norm_first
    )
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.5)
    state = {name: p.detach().numpy() for name, p in theirs.state_dict().items()}
    params = transformer.layer_from_torch(state)
    model = TransformerLayer(
        2,
        8,
        12,
        activation=activation,
        norm_first=norm_first,
        causal=decoder and masked,
        cross_attention=decoder,
    )
    inputs = [normal(0, 3, 5, 8), normal(1, 3, 6, 8)][: 1 + decoder]
    ours_masks, theirs_masks = {}, {}
    if masked and decoder:
        real = padding_mask(LENGTHS, 6)
        ours_masks = {"memory_mask": real}
        theirs_masks = {
            "memory_key_padding_mask": ~tensor(real),
            "tgt_mask": ~torch.ones(5, 5, dtype=torch.bool).tril(),
        }
    elif masked:
        pairs = jax.random.bernoulli(jax.random.key(2), 0.5, (5, 5))
        pairs = pairs | jnp.eye(5, dtype=bool)
        ours_masks = {"mask": pairs[None, None]}
        theirs_masks = {"src_mask": ~tensor(pairs)}

    def loss(params, inputs):
        out = model.apply({"params": params}, *inputs, **ours_masks)
        return jnp.sum(jnp.sin(out)), out

    (_, out), (d_params, d_inputs) = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    )(params, inputs)
    tensors = [tensor(x).requires_grad_() for x in inputs]
    expected = theirs(*tensors, **theirs_masks)
    torch.sin(expected).sum().backward()
    close(out, expected.detach())
    for found, x in zip(d_inputs, tensors, strict=True):
        close(found, x.grad)
    found = transformer.layer_to_torch(d_params)
    gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert found.keys() == gradients.keys()
    largest = max(np.abs(g).max() for g in gradients.values())
    for name, gradient in gradients.items():
        np.testing.assert_allclose(found[name], gradient, atol=1e-5 * largest)
    back = transformer.layer_to_torch(params, "x.")
    theirs.load_state_dict({name[2:]: tensor(p) for name, p in back.items()})


def test_torch_layers_without_biases():
    theirs = torch.nn.TransformerDecoderLayer(
        8, 2, 12, 0.0, batch_first=True, bias=False
    )
    state = {name: p.detach().numpy() for name, p in theirs.state_dict().items()}
    model = TransformerLayer(2, 8, 12, norm_first=False, cross_attention=True)
    x, memory = normal(0, 3, 5, 8), normal(1, 3, 6, 8)
    params = transformer.layer_from_torch(state)
    out = model.apply({"params": params}, x, memory)
    close(out, theirs(tensor(x), tensor(memory)).detach())


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary", None])
def test_only_without_positions_the_order_is_nothing(positions):
    inputs, mask = normal(0, 3, 6, 5), padding_mask(LENGTHS, 6)
    model = TransformerClassifier(3, **FIELDS, positions=positions, max_length=9)
    variables = variables_of(model, inputs)

    @jax.jit
    def both(x, mask):
        encoded = model.apply(
            variables, x, mask=mask, method=lambda m, x, mask: m.encoder(x, mask=mask)
        )
        return encoded, model.apply(variables, x, mask=mask)

    for i, contract in enumerate(
        (
            contracts.assert_permutation_equivariant,
            contracts.assert_permutation_invariant,
        )
    ):
        run = functools.partial(
            contract,
            lambda x, mask, i=i: both(x, mask)[i],
            inputs,
            mask,
            key=jax.random.key(0),
        )
        if positions is None:
            run()
        else:
            with pytest.raises(AssertionError, match="is violated"):
                run()


def test_an_encoder_is_equivariant_where_the_slide_says_invariant():
    inputs, mask = normal(0, 3, 6, 5), padding_mask(LENGTHS, 6)
    f = function_of(TransformerEncoder(**FIELDS, positions=None), inputs)

    def encode(x, mask):
        return f(x, mask=mask)

    key = jax.random.key(0)
    contracts.assert_permutation_equivariant(encode, inputs, mask, key=key)
    with pytest.raises(AssertionError, match="invariance is violated"):
        contracts.assert_permutation_invariant(encode, inputs, mask, key=key)


@pytest.fixture
def optimized():
    """What is compiled is optimised as it is outside of tests."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


# The gradient of a maximum compares it with the elements; without optimisation XLA
# normalises them a second time, with another rounding, and finds none that is equal.
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_classifier_without_positions_is_of_sets(pooling):
    inputs, mask = normal(0, 3, 6, 5), padding_mask(LENGTHS, 6)
    model = TransformerClassifier(3, **FIELDS, positions=None, pooling=pooling)
    apply = function_of(model, inputs)

    def f(x, mask):
        return apply(x, mask=mask)

    contracts.assert_padding_invariant(f, inputs, mask)
    contracts.assert_finite_on_empty_set(f, inputs)
    contracts.assert_batch_independent(f, inputs, mask)
    contracts.assert_duplication(f, inputs, mask)


def sequence_models():
    decoder = TransformerDecoder(
        4, **FIELDS, max_length=9, positions="rotary", cross_attention=False
    )
    return {
        "encoder": TransformerEncoder(**FIELDS),
        "causal encoder": TransformerEncoder(
            **FIELDS, causal=True, positions="learned", max_length=9
        ),
        "decoder": decoder,
        "language model": TransformerLanguageModel(4, **FIELDS, norm_first=False),
    }


@pytest.mark.parametrize("name", sequence_models())
def test_what_follows_the_end_changes_nothing(name):
    model, inputs = sequence_models()[name], normal(0, 3, 6, 5)
    variables = variables_of(model, inputs)

    @jax.jit
    def run(inputs, lengths):
        def loss(variables, inputs):
            out = model.apply(variables, inputs, lengths=lengths)
            return jnp.sum(jnp.sin(out)), out

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables, inputs)

    (_, expected), gradients = run(inputs, LENGTHS)
    real = padding_mask(LENGTHS, 6)[..., None]
    assert not np.where(real, 0, expected).any()
    for content in (np.nan, 1e30, -np.inf):
        (_, out), found = run(jnp.where(real, inputs, content), LENGTHS)
        np.testing.assert_array_equal(out, expected)
        jax.tree.map(np.testing.assert_array_equal, found, gradients)
    alone = function_of(model, inputs)
    for i, length in enumerate(LENGTHS):
        close(expected[i, :length], alone(inputs[i : i + 1, :length])[0])
    # A sequence without a single step.
    (_, out), found = run(inputs, jnp.array([6, 0, 4]))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((out, found)))
    assert not out[1].any()


def test_tokens_that_follow_the_end_change_nothing():
    model = TransformerEncoder(**FIELDS, vocabulary_size=VOCABULARY)
    ids, real = tokens(0, 3, 6), padding_mask(LENGTHS, 6)
    variables = variables_of(model, ids)

    @jax.jit
    def run(ids):
        def loss(variables):
            return jnp.sum(jnp.sin(model.apply(variables, ids, LENGTHS)))

        return jax.value_and_grad(loss)(variables)

    for content in (0, -7, 10**6):  # no tokens at all, some of them
        found = run(jnp.where(real, ids, content))
        jax.tree.map(np.testing.assert_array_equal, found, run(ids))
    assert np.isfinite(found[0])


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
def test_the_future_changes_nothing(positions):
    inputs = normal(0, 2, 5, 4)
    model = TransformerLanguageModel(
        3, **FIELDS, positions=positions, max_length=5, norm_first=False
    )
    apply = function_of(model, inputs)
    jacobian = jax.jit(jax.jacrev(lambda x: apply(x).sum((0, 2))))(inputs)
    seen = np.abs(jacobian).max((1, 3)) > 0
    np.testing.assert_array_equal(seen, np.tri(5, dtype=bool))


def test_the_encoders_future_counts():
    inputs = normal(0, 2, 5, 4)
    apply = function_of(TransformerEncoder(**FIELDS), inputs)
    jacobian = jax.jit(jax.jacrev(lambda x: jnp.sin(apply(x)).sum((0, 2))))(inputs)
    assert (np.abs(jacobian).max((1, 3)) > 0).all()


def test_sinusoidal_is_its_formula():
    found = sinusoidal_encoding(jnp.arange(50), 6)
    for p, i in np.ndindex(50, 3):
        angle = p / 10_000 ** (2 * i / 6)
        np.testing.assert_allclose(found[p, 2 * i], math.sin(angle), atol=5e-6)
        np.testing.assert_allclose(found[p, 2 * i + 1], math.cos(angle), atol=5e-6)
    grid = sinusoidal_encoding(jnp.array([[3, 7]]), 6)
    np.testing.assert_allclose(grid[0], found[jnp.array([3, 7])], atol=1e-6)


def language_model(**kwargs):
    fields = {**FIELDS, "vocabulary_size": VOCABULARY, "max_length": 9, **kwargs}
    return TransformerLanguageModel(**fields)


def whole_and_steps(model, variables, cache, target, expected, prefixes):
    """Compares prefixes fed at once and steps fed one by one with the whole."""
    prefill, step = (
        jax.jit(functools.partial(model.apply, variables, method=method))
        for method in ("prefill", "decode_step")
    )
    for prefix in prefixes:
        state, out = cache, []
        if prefix:
            logits, state = prefill(state, target[:, :prefix])
            out.append(logits)
        for time in range(prefix, target.shape[1]):
            logits, state = step(state, target[:, time])
            out.append(logits[:, None])
        close(jnp.concatenate(out, axis=1), expected)


@pytest.mark.parametrize(
    ("positions", "tied"),
    [("sinusoidal", True), ("learned", False), ("rotary", True), (None, False)],
)
def test_steps_of_the_language_model_are_the_whole(positions, tied):
    model = language_model(
        positions=positions, tied_embeddings=tied, norm_first=not tied, num_layers=2
    )
    target = tokens(0, 3, 7)
    variables = variables_of(model, target)
    expected = jax.jit(model.apply)(variables, target)
    # The cache may be longer than the sequence.
    cache = model.apply(variables, 3, 9, method="init_cache")
    whole_and_steps(model, variables, cache, target, expected, (0, 4))


@pytest.mark.parametrize("positions", ["sinusoidal", "rotary"])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_steps_of_the_transformer_are_the_whole(positions, lengths):
    model = Transformer(VOCABULARY, 7, **FIELDS, positions=positions)
    source, target = tokens(0, 3, 6) % 7, tokens(1, 3, 5)
    variables = variables_of(model, source, target)
    expected = jax.jit(model.apply)(variables, source, target, lengths)

    @jax.jit
    def start(source):
        memory = model.apply(variables, source, lengths, method="encode")
        return model.apply(variables, memory, 5, method="init_cache")

    cache = start(source)
    assert {len(x) for x in jax.tree.leaves(cache)} == {3}
    whole_and_steps(model, variables, cache, target, expected, (0, 3))


def test_prompts_of_several_lengths():
    model = language_model(positions="rotary")
    target, lengths = tokens(0, 3, 9), jnp.array([4, 1, 2])
    variables = variables_of(model, target)
    prefill, step = (
        jax.jit(functools.partial(model.apply, variables, method=method))
        for method in ("prefill", "decode_step")
    )
    expected = jax.jit(model.apply)(variables, target)
    cache = model.apply(variables, 3, 9, method="init_cache")
    logits, cache = prefill(cache, target[:, :4], lengths)
    real = padding_mask(lengths, 4)[..., None]
    close(logits, jnp.where(real, expected[:, :4], 0))
    for i in range(4):
        follow = target[jnp.arange(3), lengths + i]
        logits, cache = step(cache, follow)
        close(logits, expected[jnp.arange(3), lengths + i])


def test_padding_of_a_chunk_may_reach_past_the_end_of_the_cache():
    model = language_model(positions="rotary")
    target = tokens(0, 3, 9)
    variables = variables_of(model, target)
    prefill = jax.jit(functools.partial(model.apply, variables, method="prefill"))
    cache = model.apply(variables, 3, 9, method="init_cache")
    _, cache = prefill(cache, target[:, :7])
    chunk = jnp.pad(target[:, 7:], ((0, 0), (0, 2)))
    logits, _ = prefill(cache, chunk, jnp.full(3, 2))
    close(logits[:, :2], jax.jit(model.apply)(variables, target)[:, 7:])


def test_attention_weights_are_torchs_of_the_last_layer():
    model = Transformer(VOCABULARY, 7, **FIELDS | {"num_layers": 2})
    source, target = tokens(0, 3, 6) % 7, tokens(1, 3, 5)
    variables = variables_of(model, source, target)
    arguments = variables, source, target, LENGTHS
    weights = np.asarray(model.apply(*arguments, method="attention_weights"))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    for row, length in zip(weights, LENGTHS, strict=True):
        assert (row[:, :length] > 0).all() and not row[:, length:].any()
    _, found = model.apply(
        *arguments, capture_intermediates=True, mutable="intermediates"
    )
    layer = found["intermediates"]["decoder"]["layers_1"]
    (queries,) = layer["memory_norm"]["__call__"]
    memory = model.apply(variables, source, LENGTHS, method="encode")
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    params = variables["params"]["decoder"]["layers_1"]["memory_attention"]
    state = attention.to_torch(params)
    theirs.load_state_dict({name: tensor(p) for name, p in state.items()})
    states = tensor(memory["states"])
    _, expected = theirs(
        tensor(queries), states, states, key_padding_mask=~tensor(memory["mask"])
    )
    close(weights, expected.detach())


def test_padding_of_the_source_changes_nothing():
    model = Transformer(VOCABULARY, None, **FIELDS)
    source, target = normal(0, 3, 6, 5), tokens(1, 3, 5)
    apply = function_of(model, source, target)
    target_lengths = jnp.array([5, 3, 0])
    expected = apply(source, target, LENGTHS, target_lengths)
    real = padding_mask(LENGTHS, 6)[..., None]
    out = apply(jnp.where(real, source, jnp.nan), target, LENGTHS, target_lengths)
    np.testing.assert_array_equal(out, expected)
    for i, (n, m) in enumerate(zip(LENGTHS, target_lengths, strict=True)):
        if m:
            alone = apply(source[i : i + 1, :n], target[i : i + 1, :m])
            close(expected[i, :m], alone[0])
    # A source of which nothing is left says nothing, in a defined way.
    empty = apply(source, target, jnp.zeros(3, int))
    assert np.isfinite(empty).all()


def count(model, *inputs):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return sum(math.prod(p.shape) for p in jax.tree.leaves(shapes))


def test_parameters_are_counted():
    n, d, f, v = 3, 8, 32, VOCABULARY
    attention, norm, feedforward = 4 * d * d + 4 * d, 2 * d, 2 * d * f + f + d
    layer = attention + feedforward + 2 * norm
    fields = {**FIELDS, "num_layers": n}
    ids = tokens(0, 2, 5)
    vectors = normal(0, 2, 5, d)
    assert count(TransformerEncoder(**fields), vectors) == n * layer + norm
    post = TransformerEncoder(**fields, norm_first=False, vocabulary_size=v)
    assert count(post, ids) == n * layer + v * d
    learned = language_model(num_layers=n, positions="learned")
    assert count(learned, ids) == n * layer + norm + v * d + 9 * d + v * d + v
    tied = language_model(num_layers=n, tied_embeddings=True)
    assert count(tied, ids) == n * layer + norm + v * d
    both = 2 * (n * layer + norm) + n * (attention + norm)
    assert count(Transformer(v, v, **fields), ids, ids) == both + 3 * v * d + v
    # The base model of Vaswani et al. 2017, whose 37,000 tokens share one table: 65 M.
    base = Transformer(37_000, None, 6, 8, 512, norm_first=False, tied_embeddings=True)
    assert round(count(base, normal(0, 2, 2, 512), ids) / 1e6) == 63


def test_initial_language_model_knows_nothing():
    ids = tokens(0, 8, 9)
    model = language_model(hidden_size=64)
    logits, _ = jax.jit(model.init_with_output)(jax.random.key(0), ids)
    loss = -jnp.mean(jax.nn.log_softmax(logits)[:, :-1, 1])
    assert abs(loss - math.log(VOCABULARY)) < 1
    assert 0.3 < jnp.std(logits) < 2


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
def test_half_precision_stays(positions):
    fields = {**FIELDS, "positions": positions, "max_length": 9}
    half = {**fields, "dtype": jnp.bfloat16}
    model = Transformer(VOCABULARY, 7, **half, tied_embeddings=positions == "rotary")
    source, target = tokens(0, 3, 6) % 7, tokens(1, 3, 5)
    variables = variables_of(model, source, target)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))
    out = jax.jit(model.apply)(variables, source, target)
    assert out.dtype == jnp.bfloat16
    exact = jax.jit(model.clone(dtype=None).apply)(variables, source, target)
    np.testing.assert_allclose(out.astype(float), exact, atol=0.1)

    def step(source, tokens):
        memory = model.apply(variables, source, method="encode")
        cache = model.apply(variables, memory, 5, method="init_cache")
        return model.apply(variables, cache, tokens, method="decode_step")

    logits, cache = jax.eval_shape(step, source, target[:, 0])
    assert logits.dtype == jnp.bfloat16
    dtypes = {x.dtype for x in jax.tree.leaves(cache)}
    assert dtypes == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.int32)}


def test_dropout():
    model = language_model(dropout_rate=0.5, attention_dropout_rate=0.5)
    ids = tokens(0, 2, 6)
    variables = variables_of(model, ids)
    train = jax.jit(functools.partial(model.apply, variables, train=True))
    first, second = (train(ids, rngs={"dropout": jax.random.key(i)}) for i in (0, 1))
    again = train(ids, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 0.1
    plain = jax.jit(language_model().apply)(variables, ids)
    np.testing.assert_array_equal(jax.jit(model.apply)(variables, ids), plain)


@pytest.mark.parametrize(
    ("model", "inputs", "error", "message"),
    [
        (TransformerEncoder(activation="tanh"), normal(0, 2, 3, 4), ValueError, "gelu"),
        (TransformerEncoder(positions="sine"), normal(0, 2, 3, 4), ValueError, "sine"),
        (
            TransformerEncoder(positions="learned"),
            normal(0, 2, 3, 4),
            ValueError,
            "max_length",
        ),
        (
            TransformerEncoder(positions="learned", max_length=2),
            normal(0, 2, 3, 4),
            ValueError,
            "sequences of 3 steps",
        ),
        (TransformerEncoder(), normal(0, 2, 3), ValueError, "inputs must be integers"),
        (TransformerEncoder(), tokens(0, 2, 3), TypeError, "vocabulary size is None"),
        (
            TransformerEncoder(vocabulary_size=3),
            normal(0, 2, 3, 4),
            TypeError,
            "must be integers where",
        ),
        (
            TransformerEncoder(hidden_size=9, num_heads=3),
            normal(0, 2, 3, 4),
            ValueError,
            "size must be even",
        ),
        (TransformerClassifier(), normal(0, 2, 3, 4), ValueError, "num_classes"),
        (
            TransformerClassifier(3, pooling="sum"),
            normal(0, 2, 3, 4),
            ValueError,
            "'sum' was given",
        ),
        (TransformerLanguageModel(), normal(0, 2, 3, 4), ValueError, "num_classes or"),
        (
            TransformerLanguageModel(3, 5, tied_embeddings=True),
            tokens(0, 2, 3),
            ValueError,
            "tied_embeddings needs",
        ),
    ],
)
def test_errors(model, inputs, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(model.init, jax.random.key(0), inputs)
