import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from archs import (
    AdditiveAttention,
    MultiHeadAttention,
    attention,
    contracts,
    dot_product_attention,
)
from archs.attention import attend, causal_mask, padding_mask, rotate

BATCH, HEADS, QUERIES, KEYS, SIZE = 3, 2, 5, 6, 8
LENGTHS = np.array([6, 2, 4])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(ours, theirs, tolerance=1e-5):
    theirs = np.asarray(theirs)
    atol = tolerance * np.abs(theirs).max()
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=atol)


def arrays(module):
    return {name: p.detach().numpy() for name, p in module.state_dict().items()}


def tensor(x):
    return torch.from_numpy(np.array(x))


def masks(kind, queries, keys):
    """Our arguments and those of PyTorch, where True hides."""
    ours, theirs = {}, {}
    if "lengths" in kind:
        ours["lengths"] = jnp.array(LENGTHS)
        theirs["key_padding_mask"] = ~tensor(padding_mask(ours["lengths"], keys))
    if "causal" in kind:
        ours["causal"] = True
        theirs["attn_mask"] = ~tensor(causal_mask(queries, keys))
    if "pairs" in kind:
        pairs = jax.random.bernoulli(
            jax.random.key(9), 0.6, (BATCH, HEADS, queries, keys)
        )
        ours["mask"] = pairs.at[..., 0].set(True)
        flat = ours["mask"].reshape(-1, queries, keys)
        theirs["attn_mask"] = ~tensor(flat)
    return ours, theirs


@pytest.mark.parametrize("widths", [None, (8, 8, 8), (8, 5, 7)], ids=str)
@pytest.mark.parametrize("kind", ["", "lengths", "causal", "lengths causal", "pairs"])
def test_multi_head_is_that_of_torch(widths, kind):
    own = widths is None
    d_x, d_y, d_z = widths or (8, 8, 8)
    x = normal(0, BATCH, KEYS if own else QUERIES, d_x)
    inputs = (
        [x] if own else [x, normal(1, BATCH, KEYS, d_y), normal(2, BATCH, KEYS, d_z)]
    )
    ours, theirs = masks(kind, x.shape[1], KEYS)
    theirs_model = torch.nn.MultiheadAttention(
        8, HEADS, kdim=d_y, vdim=d_z, batch_first=True
    )
    for p in theirs_model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    params = attention.from_torch(arrays(theirs_model))
    model = MultiHeadAttention(HEADS, 8)

    # What padding asks of the others is nobody's business.
    real = np.ones((BATCH, x.shape[1], 1), np.float32)
    if own and "lengths" in kind:
        real[..., 0] = padding_mask(LENGTHS, KEYS)

    def loss(params, inputs):
        out = model.apply({"params": params}, *inputs, **ours) * real
        return jnp.sum(jnp.tanh(out)), out

    (_, out), (d_params, d_inputs) = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    )(params, inputs)
    tensors = [tensor(x).requires_grad_() for x in inputs]
    torch_inputs = tensors * 3 if own else tensors
    expected, _ = theirs_model(*torch_inputs, **theirs, need_weights=False)
    expected = expected * tensor(real)
    torch.tanh(expected).sum().backward()
    close(out, expected.detach())
    for found, x in zip(d_inputs, tensors, strict=True):
        close(found, x.grad)
    found = attention.to_torch(d_params)
    gradients = {name: p.grad.numpy() for name, p in theirs_model.named_parameters()}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # The gradient of the keys' bias is zero but for rounding.
        np.testing.assert_allclose(found[name], gradient, rtol=1e-5, atol=1e-5)
    theirs_model.load_state_dict(
        {name: tensor(p) for name, p in attention.to_torch(params).items()}
    )


def test_torch_without_biases_and_with_those_we_have_not():
    x = normal(0, BATCH, KEYS, 8)
    theirs_model = torch.nn.MultiheadAttention(8, HEADS, bias=False, batch_first=True)
    params = attention.from_torch(arrays(theirs_model))
    out = MultiHeadAttention(HEADS, 8).apply({"params": params}, x)
    close(out, theirs_model(*[tensor(x)] * 3)[0].detach())
    theirs_model = torch.nn.MultiheadAttention(8, HEADS, add_bias_kv=True)
    with pytest.raises(ValueError, match="add_bias_kv=False"):
        attention.from_torch(arrays(theirs_model))


def test_weights_are_those_of_torch():
    x, y = normal(0, BATCH, QUERIES, 8), normal(1, BATCH, KEYS, 8)
    theirs_model = torch.nn.MultiheadAttention(8, HEADS, batch_first=True)
    ours, theirs = masks("lengths", QUERIES, KEYS)
    variables = {"params": attention.from_torch(arrays(theirs_model), "")}
    out, weights = MultiHeadAttention(HEADS, 8).apply(
        variables, x, y, return_weights=True, **ours
    )
    expected, expected_weights = theirs_model(
        tensor(x), tensor(y), tensor(y), average_attn_weights=False, **theirs
    )
    close(out, expected.detach())
    close(weights, expected_weights.detach())


def test_parameters_are_counted():
    init = MultiHeadAttention(2, 8).init
    variables = jax.eval_shape(init, jax.random.key(0), np.ones((1, 3, 5)))
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(variables))
    assert count == 3 * (5 * 8 + 8) + 8 * 8 + 8


def reference(q, k, v, visible):
    """The equation, a query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    visible = np.broadcast_to(visible, (*q.shape[:3], k.shape[2]))
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for index in np.ndindex(*q.shape[:3]):
        chosen = np.flatnonzero(visible[index])
        if chosen.size:
            logits = k[index[:2]][chosen] @ q[index] / np.sqrt(q.shape[3])
            p = np.exp(logits - logits.max())
            out[index] = p @ v[index[:2]][chosen] / p.sum()
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "keys", "pairs"])
def test_dot_product_is_its_equation(causal, mask):
    q = normal(0, BATCH, HEADS, QUERIES, 4)
    k, v = normal(1, BATCH, HEADS, KEYS, 4), normal(2, BATCH, HEADS, KEYS, 3)
    visible = np.ones((BATCH, 1, QUERIES, KEYS), bool)
    arguments = {}
    if mask == "keys":
        arguments["mask"] = jax.random.bernoulli(jax.random.key(3), 0.5, (BATCH, KEYS))
        arguments["mask"] = arguments["mask"].at[1].set(False)
        visible = visible & np.asarray(arguments["mask"])[:, None, None]
    if mask == "pairs":
        arguments["mask"] = jax.random.bernoulli(
            jax.random.key(4), 0.4, (BATCH, 1, QUERIES, KEYS)
        )
        arguments["lengths"] = jnp.array([6, 0, 4])
        visible = np.asarray(arguments["mask"])
        visible = visible & (np.arange(KEYS) < np.array([6, 0, 4])[:, None, None, None])
    if causal:
        visible = visible & np.tri(QUERIES, KEYS, dtype=bool)
    run = functools.partial(dot_product_attention, causal=causal, **arguments)
    expected = reference(q, k, v, visible)
    close(run(q, k, v), expected)
    context, weights = run(q, k, v, return_weights=True)
    close(context, expected)
    some = np.broadcast_to(visible.any(-1), weights.shape[:3])
    np.testing.assert_allclose(weights.sum(-1), some, atol=1e-6)
    assert not np.asarray(weights)[~np.broadcast_to(visible, weights.shape)].any()


@pytest.mark.parametrize("block_size", [1, 40, 100])
@pytest.mark.parametrize("weighted", [False, True])
def test_causal_blocks_are_the_whole(block_size, weighted):
    q, k = normal(0, BATCH, HEADS, 7, 4), normal(1, BATCH, HEADS, KEYS, 4)
    v = normal(2, BATCH, HEADS, KEYS, 3)
    lengths = jnp.array([0, 6, 3])
    w = jnp.where(padding_mask(lengths, KEYS), 0.5, -jnp.inf) if weighted else None

    def loss(q, k, v, block_size):
        out = attend(q, k, v, w, causal=True, block_size=block_size)
        return jnp.sum(jnp.tanh(out)), out

    run = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3
    )
    expected = run(q, k, v, 10**6)
    visible = np.tri(7, KEYS, dtype=bool)
    if weighted:
        visible = visible & np.asarray(padding_mask(lengths, KEYS))[:, None, None]
    close(expected[0][1], reference(2 * q, k, v, visible))
    jax.tree.map(close, run(q, k, v, block_size), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_memory_is_linear_in_length(masked):
    def temporary(time):
        def loss(q, k, v):
            lengths = jnp.array([time - 7]) if masked else None
            return jnp.sum(dot_product_attention(q, k, v, lengths, causal=True) ** 2)

        x = jax.ShapeDtypeStruct((1, 2, time, 8), jnp.float32)
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # One array of logits would take 512 MB at the longer length.
    assert temporary(8192) < 2.2 * temporary(4096)
    assert temporary(8192) < 2**25


def test_the_future_changes_nothing():
    x = normal(0, 2, KEYS, 8)
    model = MultiHeadAttention(HEADS, 8, rotary=True)
    variables = model.init(jax.random.key(0), x)
    jacobian = jax.jit(
        jax.jacrev(lambda x: model.apply(variables, x, causal=True).sum((0, -1)))
    )(x)  # [query, batch, key, feature]
    seen = np.abs(jacobian).max((1, 3)) > 0
    np.testing.assert_array_equal(seen, np.tri(KEYS, dtype=bool))


@pytest.mark.parametrize("weights", [False, True])
def test_keys_are_a_set(weights):
    query = normal(0, 1, QUERIES, 8)
    model = MultiHeadAttention(HEADS, 8)
    variables = jax.jit(model.init)(jax.random.key(0), query)

    @jax.jit
    def f(x, mask):
        queries = jnp.broadcast_to(query, (len(x), *query.shape[1:]))
        out = model.apply(variables, queries, x, mask=mask, return_weights=weights)
        return out[0] if weights else out

    inputs = normal(1, BATCH, KEYS, 8)
    mask = padding_mask(jnp.array([6, 1, 4]), KEYS)
    contracts.assert_permutation_invariant(f, inputs, mask, key=jax.random.key(0))
    contracts.assert_padding_invariant(f, inputs, mask)
    contracts.assert_finite_on_empty_set(f, inputs)
    contracts.assert_batch_independent(f, inputs, mask)
    contracts.assert_duplication(f, inputs, mask)


def test_padding_of_self_attention_changes_nothing():
    inputs = normal(0, BATCH, KEYS, 8)
    mask = padding_mask(jnp.array([6, 1, 4]), KEYS)
    model = MultiHeadAttention(HEADS, 8, rotary=True)
    variables = jax.jit(model.init)(jax.random.key(0), inputs)

    @jax.jit
    def run(inputs):
        def loss(variables, inputs):
            out = model.apply(variables, inputs, mask=mask)
            return jnp.sum(jnp.sin(out)), out

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables, inputs)

    for content in (jnp.nan, jnp.inf):
        found = run(jnp.where(mask[..., None], inputs, content))
        jax.tree.map(np.testing.assert_array_equal, found, run(inputs))


def test_nothing_to_attend_to_gives_zero():
    x = normal(0, BATCH, HEADS, KEYS, 4)
    lengths = jnp.array([0, 3, 6])
    for arguments in ({}, {"mask": jnp.ones((1, 1, KEYS, KEYS), bool)}):
        out = dot_product_attention(x, x, x, lengths, **arguments)
        assert not out[0].any()
        assert np.abs(out[1:]).min() > 0


def additive(**kwargs):
    model = AdditiveAttention(4, **kwargs)
    q, keys = normal(0, BATCH, QUERIES, 3), normal(1, BATCH, KEYS, 5)
    return model, jax.jit(model.init)(jax.random.key(0), q, keys), q, keys


def test_additive_is_its_equation():
    model, variables, q, keys = additive()
    context, weights = jax.jit(model.apply)(variables, q, keys, jnp.array(LENGTHS))
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    context, weights = np.asarray(context), np.asarray(weights)
    for b, time in np.ndindex(BATCH, QUERIES):
        real = np.asarray(keys[b, : LENGTHS[b]], np.float64)
        u = real @ p["key"]["kernel"] + p["key"]["bias"]
        mixed = np.tanh(np.asarray(q[b, time], np.float64) @ p["query"]["kernel"] + u)
        votes = np.exp(mixed @ p["score"]["kernel"][:, 0])
        expected = votes / votes.sum()
        np.testing.assert_allclose(weights[b, time, : LENGTHS[b]], expected, rtol=1e-5)
        np.testing.assert_allclose(context[b, time], expected @ real, atol=1e-5)
        assert not weights[b, time, LENGTHS[b] :].any()


def test_additive_step_by_step_with_projected_keys():
    model, variables, q, keys = additive()
    mask = padding_mask(jnp.array(LENGTHS), KEYS)
    keys = jnp.where(mask[..., None], keys, jnp.nan)
    apply = jax.jit(model.apply, static_argnames="method")
    whole = apply(variables, q, keys, mask=mask)
    projected = apply(variables, keys, mask=mask, method="project_keys")
    for time in range(QUERIES):
        step = apply(variables, q[:, time], keys, mask=mask, projected_keys=projected)
        jax.tree.map(close, step, jax.tree.map(lambda x, t=time: x[:, t], whole))


def test_additive_attends_to_a_set():
    model, variables, q, _ = additive()

    @jax.jit
    def f(keys, mask):
        query = jnp.broadcast_to(q[:1], (len(keys), *q.shape[1:]))
        return model.apply(variables, query, keys, mask=mask)[0]

    keys, mask = normal(1, 2, KEYS, 5), padding_mask(jnp.array([6, 4]), KEYS)
    contracts.assert_permutation_invariant(f, keys, mask, key=jax.random.key(0))
    contracts.assert_padding_invariant(f, keys, mask)
    contracts.assert_finite_on_empty_set(f, keys)
    empty = f(keys, jnp.zeros_like(mask))
    assert not empty.any()


def test_rotary_scores_depend_on_relative_positions():
    q, k = normal(0, 1, 2, 6, 8), normal(1, 1, 2, 6, 8)
    positions = jnp.arange(6)

    def scores(shift):
        turned = rotate(q, positions + shift), rotate(k, positions + shift)
        return jnp.einsum("bhqd,bhkd->bhqk", *turned)

    close(scores(13), scores(0))
    # Not so if queries alone are shifted.
    moved = jnp.einsum(
        "bhqd,bhkd->bhqk", rotate(q, positions + 1), rotate(k, positions)
    )
    assert np.abs(moved - scores(0)).max() > 0.1
    per_row = rotate(q, positions[None] + 2)
    close(per_row, rotate(q, positions + 2))
    close(rotate(q, jnp.zeros(6, int)), q)


def test_rotary_is_a_complex_rotation():
    x = normal(0, 1, 1, 5, 6)
    pairs = np.asarray(x[..., :3]) + 1j * np.asarray(x[..., 3:])
    angles = np.arange(5)[:, None] * 10_000.0 ** (-np.arange(3) / 3)
    turned = pairs * np.exp(1j * angles)
    close(rotate(x, jnp.arange(5)), np.concatenate([turned.real, turned.imag], -1))


@pytest.mark.parametrize("rotary", [False, True])
def test_cached_steps_are_the_causal_whole(rotary):
    x = normal(0, 2, 7, 8)
    model = MultiHeadAttention(HEADS, 8, rotary=rotary)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    whole = jax.jit(functools.partial(model.apply, causal=True))(variables, x)
    decode = jax.jit(functools.partial(model.apply, method="decode"))
    cache = model.init_cache(2, 7)
    position, out = jnp.zeros(2, jnp.int32), []
    for part in (x[:, :3], x[:, 3:4], x[:, 4:6], x[:, 6:]):
        y, cache = decode(variables, part, cache, position)
        position, out = position + part.shape[1], [*out, y]
    close(jnp.concatenate(out, 1), whole)


def test_half_precision_stays():
    x = normal(0, 2, 5, 8).astype(jnp.bfloat16)
    lengths = jnp.array([5, 3])
    model = MultiHeadAttention(HEADS, 8, dtype=jnp.bfloat16)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))
    for kwargs in ({}, {"lengths": lengths}, {"causal": True}):
        half, full = (
            jax.jit(functools.partial(m.apply, **kwargs))
            for m in (model, model.clone(dtype=None))
        )
        out, exact = half(variables, x), full(variables, x.astype(float))
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype(float), exact, atol=0.05)
    assert model.init_cache(2, 3)["keys"].dtype == jnp.bfloat16
    additive = AdditiveAttention(4, dtype=jnp.bfloat16)
    init = additive.init_with_output
    (context, _), _ = jax.eval_shape(init, jax.random.key(0), x, x, lengths)
    assert context.dtype == jnp.bfloat16
    assert rotate(x[:, None], jnp.arange(5)).dtype == jnp.bfloat16


def test_dropout_of_weights():
    x = normal(0, 2, 50, 8)
    model = MultiHeadAttention(HEADS, 8, dropout_rate=0.5)
    variables = model.init(jax.random.key(0), x)
    apply = jax.jit(functools.partial(model.apply, train=True))
    outs = [apply(variables, x, rngs={"dropout": jax.random.key(i)}) for i in range(9)]
    expected = model.apply(variables, x)
    assert np.abs(outs[0] - expected).max() > 0.01
    spread = np.std(np.stack(outs), axis=0).max()
    assert np.abs(np.mean(np.stack(outs), axis=0) - expected).max() < 2 * spread


X = np.zeros((2, 5, 8), np.float32)


@pytest.mark.parametrize(
    ("fields", "inputs", "kwargs", "error", "message"),
    [
        ((3, 8), [X], {}, ValueError, "multiple of num_heads"),
        ((8, 8, True), [X], {}, ValueError, "even head width"),
        ((2, 8), [X[0]], {}, ValueError, "queries must have"),
        ((2, 8), [X, X[:1]], {}, ValueError, "queries must have"),
        ((2, 8), [X], {"lengths": np.ones(2)}, TypeError, "must have an integer dtype"),
        ((2, 8), [X], {"lengths": np.ones(3, int)}, ValueError, r"shape \(2,\)"),
        ((2, 8), [X], {"mask": np.ones((2, 4), bool)}, ValueError, r"shape \(2, 5\)"),
        (
            (2, 8),
            [X],
            {"mask": np.ones((3, 2, 5, 5), bool)},
            ValueError,
            r"broadcasts to \(2, 2, 5, 5\)",
        ),
        ((2, 8), [X], {"mask": np.ones((1, 1, 5, 5))}, TypeError, "dtype bool"),
    ],
)
def test_errors(fields, inputs, kwargs, error, message):
    with pytest.raises(error, match=message):
        MultiHeadAttention(*fields).init(jax.random.key(0), *inputs, **kwargs)


def test_errors_of_the_others():
    with pytest.raises(ValueError, match="query must have"):
        AdditiveAttention(4).init(jax.random.key(0), X, X[0])
    with pytest.raises(ValueError, match=r"queries must have shape \[batch, head"):
        dot_product_attention(X, X, X)
