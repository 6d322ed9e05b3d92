import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

import archs
from archs import (
    CNN,
    MLP,
    HistNetQ,
    PrevalenceHead,
    absolute_error,
    contracts,
    sparsemax,
)

HISTOGRAMS = [
    archs.LinearHistogram(4),
    archs.HardHistogram(4),
    archs.AdaptiveHistogram(4),
    archs.CumulativeHistogram(archs.CubicHistogram(4)),
    archs.SoftHistogram(4),
    archs.SigmoidHistogram(4, slope=20.0),
]


def bags(shape=(4, 6, 5)):
    inputs = jax.random.normal(jax.random.key(0), shape)
    mask = jax.random.bernoulli(jax.random.key(2), 0.6, shape[:2])
    return inputs, mask.at[:, 0].set(True).at[1].set(False)


def network(histogram, **kwargs):
    head = PrevalenceHead((8,), 3, **kwargs)
    return HistNetQ(MLP((8,), 7, **kwargs), histogram, head)


def set_function(model, inputs):
    variables = jax.jit(model.init)(jax.random.key(1), inputs)
    return jax.jit(lambda *args: model.apply(variables, *args))


@pytest.mark.parametrize("histogram", HISTOGRAMS, ids=lambda h: type(h).__name__)
def test_contracts(histogram):
    inputs, mask = bags()
    f = set_function(network(histogram), inputs)
    for m in (None, mask):
        contracts.assert_permutation_invariant(f, inputs, m, key=jax.random.key(0))
        np.testing.assert_allclose(f(inputs, m).sum(-1), 1, rtol=1e-6)
    contracts.assert_padding_invariant(f, inputs, mask)
    contracts.assert_finite_on_empty_set(f, inputs)


@pytest.mark.parametrize("histogram", HISTOGRAMS[2:4], ids=["adaptive", "cumulative"])
def test_weights_are_multiplicities_and_parts_are_merged(histogram):
    inputs, mask = bags()
    model = network(histogram)
    f = set_function(model, inputs)
    key = jax.random.key(0)
    contracts.assert_weights_are_multiplicities(f, inputs, mask, key=key)
    bound = model.bind(jax.jit(model.init)(jax.random.key(1), inputs))
    features = jax.random.uniform(key, (4, 6, 7))
    weights = jax.random.uniform(key, mask.shape, maxval=3.0)
    aggregate = jax.jit(bound.aggregate)
    for w in (None, weights):
        contracts.assert_chunk_invariant(
            aggregate, bound.merge, features, mask, w, key=key
        )


@pytest.mark.parametrize("histogram", HISTOGRAMS[:3:2], ids=["linear", "adaptive"])
def test_a_bag_that_holds_all_twice_is_the_same(histogram):
    inputs, mask = bags()
    f = set_function(network(histogram), inputs)
    contracts.assert_duplication(f, inputs, mask)


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_a_thousand_elements_come_in_any_order(wide):
    with jax.enable_x64(wide):
        inputs, mask = bags((3, 1000, 5))
        f = set_function(network(archs.LinearHistogram(4)), inputs)
        assert f(inputs, mask).dtype == (jnp.float64 if wide else jnp.float32)
        contracts.assert_permutation_invariant(
            f, inputs, mask, key=jax.random.key(0), rtol=1e-12 if wide else 1e-5
        )


def test_contracts_with_images():
    inputs, mask = bags((3, 4, 8, 8, 1))
    model = HistNetQ(CNN((2, 3), 6), archs.LinearHistogram(4), PrevalenceHead((), 3))
    f = set_function(model, inputs)
    contracts.assert_permutation_invariant(f, inputs, mask, key=jax.random.key(0))
    contracts.assert_padding_invariant(f, inputs, mask)


def test_is_the_numpy_histogram_of_torch_sigmoids():
    inputs, mask = bags()
    model = network(archs.HardHistogram(4))
    variables = jax.jit(model.init)(jax.random.key(1), inputs)

    def net(params):
        layers = []
        for i in (0, 1):
            kernel, bias = params[f"Dense_{i}"]["kernel"], params[f"Dense_{i}"]["bias"]
            layer = torch.nn.Linear(*kernel.shape)
            layer.weight.data = torch.from_numpy(np.array(kernel.T))
            layer.bias.data = torch.from_numpy(np.array(bias))
            layers.append(layer)
        return torch.nn.Sequential(layers[0], torch.nn.LeakyReLU(0.01), layers[1])

    phi = net(variables["params"]["encoder"])
    head = net(variables["params"]["head"]["MLP_0"])
    values = torch.sigmoid(phi(torch.from_numpy(np.array(inputs)))).detach().numpy()
    histograms = np.zeros((4, 7, 4), np.float32)
    for bag, feature in np.ndindex(4, 7):
        real = values[bag, np.asarray(mask[bag]), feature]
        counts, _ = np.histogram(real, 4, (0, 1))
        histograms[bag, feature] = counts / max(len(real), 1)
    logits = head(torch.from_numpy(histograms.reshape(4, 28)))
    expected = torch.softmax(logits, -1).detach().numpy()
    found = model.apply(variables, inputs, mask)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_call_is_its_three_methods():
    inputs, mask = bags()
    model = network(archs.LinearHistogram(4))
    variables = jax.jit(model.init)(jax.random.key(1), inputs)
    bound = model.bind(variables)
    features = bound.encode(inputs, mask)
    assert features.shape == (4, 6, 7)
    assert 0 <= features.min() <= features.max() <= 1
    representation = bound.aggregate(features, mask)
    assert representation.shape == (4, 28)
    np.testing.assert_allclose(representation.sum(-1), [7, 0, 7, 7], rtol=1e-6)
    np.testing.assert_array_equal(
        bound.decode(representation), model.apply(variables, inputs, mask)
    )


def test_histogram_of_a_union_is_the_mixture_of_histograms():
    inputs, _ = bags()
    model = network(archs.LinearHistogram(4))
    bound = model.bind(jax.jit(model.init)(jax.random.key(1), inputs))
    features = bound.encode(inputs)
    parts = bound.aggregate(features[:, :2]), bound.aggregate(features[:, 2:])
    mixture = parts[0] / 3 + parts[1] * 2 / 3
    np.testing.assert_allclose(bound.aggregate(features), mixture, atol=1e-6)


@pytest.mark.parametrize(
    "histogram", HISTOGRAMS[:3], ids=["linear", "hard", "adaptive"]
)
def test_every_parameter_receives_a_gradient(histogram):
    inputs, mask = bags()
    model = network(histogram)
    variables = jax.jit(model.init)(jax.random.key(1), inputs)

    @jax.jit
    @jax.grad
    def gradient(variables):
        out = model.apply(variables, inputs, mask)
        return jnp.sum((out - jnp.array([1.0, 0, 0])) ** 2)

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(variables)):
        assert np.isfinite(leaf).all(), path
        assert np.any(leaf), path


@pytest.mark.parametrize(
    ("histogram", "activation"),
    [(0, "softmax"), (1, "softmax"), (0, "sparsemax")],
    ids=["linear", "hard", "linear, sparsemax"],
)
def test_learns_prevalences_from_bags_without_labels(histogram, activation):
    head = PrevalenceHead((16,), 2, output_activation=activation)
    model = HistNetQ(MLP((8,), 4), HISTOGRAMS[histogram], head)
    optimizer = optax.adam(1e-2)

    def bags(key, num_bags=32, bag_size=64):
        # Two overlapping Gaussian classes, prevalences uniform on the simplex.
        share, member, noise = jax.random.split(key, 3)
        p = jax.random.uniform(share, (num_bags, 1))
        first = jax.random.uniform(member, (num_bags, bag_size)) < p
        x = jnp.where(first, 1.0, -1.0) + jax.random.normal(noise, first.shape)
        return x[..., None], jnp.concatenate([p, 1 - p], -1)

    def error(params, key):
        inputs, p = bags(key)
        return absolute_error(p, model.apply({"params": params}, inputs)).mean()

    def step(state, key):
        params, moments = state
        gradient = jax.grad(error)(params, key)
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(params, updates), moments), None

    @jax.jit
    def train(key):
        params = model.init(key, bags(key)[0])["params"]
        keys = jax.random.split(key, 300)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    test = jax.random.key(1)
    params = train(jax.random.key(0))
    # A constant answer has error 0.25; the draw of the bag alone costs 0.04.
    assert error(params, test) < 0.08


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("histogram", HISTOGRAMS, ids=lambda h: type(h).__name__)
def test_half_precision(histogram, dtype):
    inputs, mask = bags()
    f = set_function(network(histogram, dtype=dtype), inputs)
    out = f(inputs.astype(dtype), mask)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out.sum(-1), 1, rtol=1e-6)
    wide = set_function(network(histogram), inputs)(inputs, mask)
    np.testing.assert_allclose(out, wide, rtol=float(jnp.finfo(dtype).eps))


def test_dropout_acts_only_in_training():
    inputs, mask = bags()
    model = HistNetQ(
        MLP((16,), 7, dropout_rate=0.5),
        archs.LinearHistogram(4),
        PrevalenceHead((16,), 3, dropout_rate=0.5),
    )
    variables = jax.jit(model.init)(jax.random.key(1), inputs)
    out = model.apply(variables, inputs, mask)
    rngs = {"dropout": jax.random.key(2)}
    train = model.apply(variables, inputs, mask, train=True, rngs=rngs)
    again = model.apply(variables, inputs, mask, train=True, rngs=rngs)
    np.testing.assert_array_equal(train, again)
    assert not np.allclose(out, train, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "shape", "published"),
    [
        (
            HistNetQ(
                MLP((1024, 1024), 300, 0.5),
                archs.HardHistogram(32),
                PrevalenceHead((2048,) * 3, 2, 0.5),
            ),
            (1, 2, 300),
            29.77,
        ),
        (
            HistNetQ(CNN(), archs.HardHistogram(32), PrevalenceHead((1024,), 10, 0.1)),
            (1, 2, 28, 28, 1),
            8.86,
        ),
    ],
)
def test_parameter_counts_are_the_published_ones_but_for_the_histogram(
    model, shape, published
):
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
    millions = sum(leaf.size for leaf in jax.tree.leaves(variables)) / 1e6
    # The published histogram has weights, a few per feature and bin; ours has none.
    per_bin = variables["params"]["head"]["MLP_0"]["Dense_0"]["kernel"].shape[0] / 1e6
    assert 3 * per_bin < published - millions < 6 * per_bin


@settings(deadline=None)
@given(hnp.arrays(np.float32, (3, 5), elements=st.floats(-4, 4, width=32)))
def test_sparsemax_is_the_nearest_point_of_the_simplex(logits):
    p = np.asarray(sparsemax(jnp.asarray(logits)))
    assert p.min() >= 0
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)
    # The nearest point of a convex set: no corner is in the direction of the logits.
    np.testing.assert_array_less(
        ((np.eye(5)[:, None] - p) * (logits - p)).sum(-1), 1e-4
    )


def test_sparsemax_is_linear_where_all_are_present_and_zero_where_not():
    logits = jnp.array([[0.3, 0.5, 0.1], [2.0, 0.0, 1.5]])
    expected = [[1 / 3, 8 / 15, 2 / 15], [0.75, 0, 0.25]]
    np.testing.assert_allclose(sparsemax(logits), expected, rtol=1e-6, atol=1e-7)
    check_grads(sparsemax, (logits[0],), order=1, modes=["fwd", "rev"], rtol=1e-2)
    # What is absent can come back.
    jacobian = jax.jacobian(sparsemax)(logits[1])
    np.testing.assert_allclose(jacobian, np.eye(3) - 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_sparsemax_keeps_the_dtype(dtype):
    logits = jnp.array([0.5, 0.25, -2], dtype)
    found, gradient = jax.value_and_grad(lambda z: sparsemax(z)[0])(logits)
    assert found.dtype == gradient.dtype == dtype
    np.testing.assert_allclose(found.astype(float), 0.625)
    np.testing.assert_allclose(gradient.astype(float), [2 / 3, -1 / 3, -1 / 3], 1e-2)


@pytest.mark.parametrize("scale", [1e3, 1e7, 1e30])
def test_sparsemax_of_large_logits_sums_to_one(scale):
    logits = jnp.array([[1.0, 1, -2], [1, 0, 0], [-1, -1, -1]]) * scale
    expected = [[0.5, 0.5, 0], [1, 0, 0], [1 / 3, 1 / 3, 1 / 3]]
    np.testing.assert_allclose(sparsemax(logits), expected, atol=1e-6)


def test_a_class_that_sparsemax_leaves_out_is_learned_again():
    target = jnp.array([0.2, 0.3, 0.5])
    logits = jnp.array([5.0, 0.0, -3.0])
    np.testing.assert_array_equal(sparsemax(logits), [1, 0, 0])

    def step(logits, rate):
        error = jax.grad(lambda z: absolute_error(target, sparsemax(z)))(logits)
        return logits - rate * error, None

    learned, _ = jax.lax.scan(step, logits, jnp.linspace(0.1, 0, 500))
    np.testing.assert_allclose(sparsemax(learned), target, atol=0.01)


def test_head_with_sparsemax():
    inputs, mask = bags()
    model = HistNetQ(
        MLP((8,), 7),
        archs.LinearHistogram(4),
        PrevalenceHead((8,), 3, output_activation="sparsemax"),
    )
    f = set_function(model, inputs)
    contracts.assert_permutation_invariant(f, inputs, mask, key=jax.random.key(0))
    contracts.assert_padding_invariant(f, inputs, mask)
    head = PrevalenceHead((), 3, output_activation="sparsemax")
    weights = {"MLP_0": {"Dense_0": {"kernel": 9 * jnp.eye(3), "bias": jnp.zeros(3)}}}
    answer = head.apply({"params": weights}, jnp.array([[1.0, 0.0, 0.0]]))
    np.testing.assert_array_equal(answer, [[1, 0, 0]])


def test_wrong_arguments_are_named():
    head = PrevalenceHead((), 3, output_activation="relu")
    with pytest.raises(ValueError, match="softmax, sparsemax, not 'relu'"):
        head.init(jax.random.key(0), jnp.zeros((1, 2)))
    model = network(archs.LinearHistogram(4))
    with pytest.raises(ValueError, match=r"inputs must .*\(3, 2\)"):
        model.init(jax.random.key(0), jnp.zeros((3, 2)))
    with pytest.raises(TypeError, match="mask must have dtype bool.*int32"):
        model.init(jax.random.key(0), jnp.zeros((3, 2, 1)), jnp.ones((3, 2), int))
    with pytest.raises(ValueError, match=r"weights must .*\(3, 2\).*\(2, 3\)"):
        model.init(jax.random.key(0), jnp.zeros((3, 2, 1)), None, jnp.ones((2, 3)))
