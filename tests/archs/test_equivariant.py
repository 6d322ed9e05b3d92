import jax
import jax.numpy as jnp
import numpy as np
import pytest

import archs
from archs import contracts, set_transformer

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 5, 3)), jnp.float32)
MASK = jnp.asarray([[True] * 5, [True, False, True, True, False]])

LAYERS = {
    "deepsets": dict(layer=archs.EquivariantLayer(8, "max"), activation="tanh"),
    "deepsets++": dict(
        layer=archs.EquivariantLayer(8, "mean"),
        activation="relu",
        normalization="set",
        residual=True,
    ),
    "layer norm": dict(
        layer=archs.EquivariantLayer(8, "mean"),
        activation="relu",
        normalization="layer",
    ),
    "sab": dict(layer=set_transformer.SAB(8, 2)),
    "isab": dict(layer=set_transformer.ISAB(8, 2, num_inducing_points=3)),
}
AGGREGATIONS = [None, "max", ("mean", "max")]


def network(kind="deepsets", **fields):
    fields = dict(num_layers=2, encoder=archs.MLP((), 8)) | LAYERS[kind] | fields
    return archs.EquivariantNetwork(head=archs.MLP((6,), 4), **fields)


def applied(model, inputs=X):
    variables = model.init(KEY, inputs)
    return variables, jax.jit(
        lambda x, mask=None, weights=None: model.apply(variables, x, mask, weights)
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_answers_move_with_their_elements(kind):
    _, f = applied(network(kind))
    y = f(X, MASK)
    assert y.shape == (2, 5, 4)
    assert not y[~MASK].any() and y[MASK].all()
    contracts.assert_permutation_equivariant(f, X, MASK, key=KEY)
    # What is absent changes neither the answers nor their gradients.
    contracts.assert_padding_invariant(lambda x, m: f(x, m).sum(1), X, MASK)
    contracts.assert_finite_on_empty_set(lambda x, m: f(x, m).sum(1), X)


@pytest.mark.parametrize("aggregation", ["max", ("mean", "max")])
def test_pooled_it_is_invariant(aggregation):
    _, f = applied(network(aggregation=aggregation))
    assert f(X, MASK).shape == (2, 4)
    contracts.assert_permutation_invariant(f, X, MASK, key=KEY)
    contracts.assert_padding_invariant(f, X, MASK)
    contracts.assert_finite_on_empty_set(f, X)


@pytest.mark.parametrize("kind", LAYERS)
def test_weights_are_multiplicities(kind):
    layer = dict(layer=archs.EquivariantLayer(8, "mean")) if kind == "deepsets" else {}
    _, f = applied(network(kind, **layer))
    counts = np.array([2, 1, 0, 3, 1])
    x = X[:1].at[0, 2].set(jnp.nan)
    found = f(x, None, jnp.asarray(counts[None], jnp.float32))
    repeated = f(jnp.repeat(x, counts, axis=1))[0]
    np.testing.assert_allclose(np.repeat(found[0], counts, axis=0), repeated, atol=1e-5)
    assert not found[0, 2].any()


def test_it_is_what_its_layers_make_of_it():
    variables, f = applied(network())
    params = variables["params"]
    x = np.asarray(X)
    x = (
        x @ params["encoder"]["Dense_0"]["kernel"]
        + params["encoder"]["Dense_0"]["bias"]
    )
    for i in range(2):
        own, shared = (params[f"layer_{i}"][f"Dense_{j}"] for j in range(2))
        top = x.max(1, keepdims=True)
        x = np.tanh(x @ own["kernel"] + own["bias"] + top @ shared["kernel"])
    head = params["head"]
    x = x @ head["Dense_0"]["kernel"] + head["Dense_0"]["bias"]
    x = np.where(x > 0, x, 0.01 * x)
    expected = x @ head["Dense_1"]["kernel"] + head["Dense_1"]["bias"]
    np.testing.assert_allclose(f(X), expected, atol=1e-5)
    kernels = [params[f"layer_{i}"]["Dense_0"]["kernel"] for i in range(2)]
    assert (kernels[0] != kernels[1]).any()


def test_residual_layers_add_what_they_make_of_normalised_elements():
    variables, f = applied(
        network("deepsets++", num_layers=1, encoder=archs.MLP((), 8))
    )
    params = jax.tree.map(np.asarray, variables["params"])
    x = np.asarray(X) @ params["encoder"]["Dense_0"]["kernel"]
    x += params["encoder"]["Dense_0"]["bias"]
    norm = (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)
    norm = np.maximum(norm, 0)
    own, shared = (params["layer_0"][f"Dense_{j}"] for j in range(2))
    mean = norm.mean(1, keepdims=True)
    x = x + norm @ own["kernel"] + own["bias"] + mean @ shared["kernel"]
    expected = archs.MLP((6,), 4).apply({"params": params["head"]}, x.reshape(10, 8))
    np.testing.assert_allclose(f(X), expected.reshape(2, 5, 4), atol=1e-4)


def test_residual_layers_keep_the_width():
    with pytest.raises(ValueError, match="keep the width .* give an encoder"):
        network("deepsets++", encoder=None).init(KEY, X)


def test_an_answer_depends_on_the_whole_set():
    _, f = applied(network())
    moved = f(X.at[:, 0].add(3.0))
    assert (jnp.abs(moved - f(X))[:, 1:] > 1e-4).any()


def test_its_parts_are_those_of_a_set_network():
    model = network(aggregation="max", dropout_rate=0.5)
    variables, f = applied(model)
    features = model.apply(variables, X, MASK, method="encode")
    pooled = model.apply(variables, features, MASK, method="aggregate")
    assert features.shape == (2, 5, 8) and pooled.shape == (2, 8)
    out = model.apply(variables, pooled, method="decode")
    np.testing.assert_allclose(out, f(X, MASK), atol=1e-6)
    noisy = [
        model.apply(variables, X, train=True, rngs={"dropout": jax.random.key(i)})
        for i in range(2)
    ]
    assert (noisy[0] != noisy[1]).any()


def test_an_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match="normalization must be one of .* but 'batch'"):
        network(normalization="batch").init(KEY, X)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation must name .* but 'tan'"):
        network(activation="tan").init(KEY, X)
    with pytest.raises(ValueError, match="inputs must have shape"):
        network(encoder=None).init(KEY, X[0])
