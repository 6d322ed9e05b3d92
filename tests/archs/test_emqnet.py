import jax
import jax.numpy as jnp
import numpy as np
import pytest

import archs
from archs import contracts

K = 3


@pytest.fixture(scope="module")
def network():
    model = archs.EMQNet(archs.MLP((8,), 4, 0.3), K, num_members=2, num_steps=40)
    inputs = jax.random.normal(jax.random.key(0), (3, 10, 5))
    return model, jax.jit(model.init)(jax.random.key(1), inputs), inputs


def plain(variables, pseudo_count=-100.0, **changes):
    """Variables whose aggregation is EMQ itself."""
    params = variables["params"] | {"pseudo_count": jnp.full(K, pseudo_count)}
    return {"params": params | changes}


def posteriors(shape, seed=0):
    return np.random.default_rng(seed).dirichlet(np.full(K, 0.5), shape)


def test_contracts(network):
    model, variables, inputs = network
    f = jax.jit(lambda x, mask: model.apply(variables, x, mask))
    mask = jnp.arange(10) < jnp.asarray([[10], [6], [1]])
    contracts.assert_permutation_invariant(f, inputs, mask, key=jax.random.key(2))
    # EM repeats rounding errors forty times.
    contracts.assert_padding_invariant(f, inputs, mask, rtol=1e-4)
    contracts.assert_finite_on_empty_set(f, inputs)
    contracts.assert_batch_independent(f, inputs, mask)
    contracts.assert_weights_are_multiplicities(
        lambda x, mask, weights: model.apply(variables, x, mask, weights),
        inputs,
        mask,
        key=jax.random.key(3),
        rtol=1e-4,
    )


def test_the_aggregate_is_what_expectation_maximization_finds(network):
    model, variables, _ = network
    likelihoods = posteriors((4, 30)).astype(np.float32)
    ours = model.clone(num_steps=2000).apply(
        plain(variables), jnp.log(likelihoods), method="aggregate"
    )
    expected = archs.expectation_maximization(
        jnp.asarray(likelihoods), jnp.full(K, 1 / K), tolerance=0, max_steps=2000
    )
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_more_steps_never_lower_the_likelihood(network):
    model, variables, _ = network
    q = posteriors((2, 20), 1).astype(np.float32)
    values = []
    for steps in (1, 2, 5, 20):
        p = model.clone(num_steps=steps).apply(
            plain(variables), jnp.log(q), method="aggregate"
        )
        values.append(np.log((np.asarray(p)[:, None] * q).sum(-1)).sum(-1))
    assert np.all(np.diff(values, axis=0) > -1e-4)


def test_weights_are_multiplicities(network):
    model, variables, _ = network
    features = jnp.log(posteriors((1, 4), 2)).astype(jnp.float32)
    apply = jax.jit(
        lambda x, weights: model.apply(variables, x, None, weights, method="aggregate")
    )
    counts = np.array([[2.0, 0.0, 1.0, 3.0]])
    repeated = jnp.repeat(features, counts[0].astype(int), axis=1)
    with_nan = features.at[:, 1].set(jnp.nan)
    np.testing.assert_allclose(
        apply(with_nan, counts),
        model.apply(variables, repeated, method="aggregate"),
        rtol=1e-5,
    )


def test_pseudo_counts_pull_towards_themselves(network):
    model, variables, _ = network
    features = jnp.log(jnp.asarray([[[0.98, 0.01, 0.01]] * 5]))
    apply = lambda count: np.asarray(  # noqa: E731
        model.apply(plain(variables, count), features, method="aggregate")
    )[0]
    assert apply(-100.0)[0] > 0.999
    # softplus(100) = 100 elements of each class beside the five of the bag.
    np.testing.assert_allclose(
        apply(100.0), [105 / 305, 100 / 305, 100 / 305], atol=1e-3
    )


def test_the_empty_bag_has_the_prevalences_of_the_pseudo_counts(network):
    model, variables, inputs = network
    count = jnp.asarray([1.0, 2.0, 5.0])
    variables = plain(variables, jnp.log(jnp.expm1(count)))
    out = model.apply(variables, inputs, jnp.zeros(inputs.shape[:2], bool))
    np.testing.assert_allclose(out, jnp.broadcast_to(count / 8, out.shape), rtol=1e-5)
    without_elements = model.apply(variables, inputs[:, :0])
    np.testing.assert_allclose(without_elements, out, rtol=1e-6)


def test_members_differ_and_are_averaged(network):
    model, variables, inputs = network
    logits = model.apply(variables, inputs, method="classify")
    assert logits.shape == (2, 3, 10, K)
    assert np.abs(logits[0] - logits[1]).max() > 1e-3
    encoded = model.apply(variables, inputs, method="encode")
    # At first calibration changes nothing.
    np.testing.assert_allclose(
        encoded, jax.nn.log_softmax(logits.mean(0)), rtol=1e-5, atol=1e-6
    )


def test_calibration_scales_mixes_and_shifts(network):
    model, variables, _ = network
    rng = np.random.default_rng(0)
    logits, mixing = rng.normal(size=(7, K)), rng.normal(size=(K, K))
    bias = rng.normal(size=K)
    changed = plain(variables, log_scale=jnp.log(2.0), mixing=mixing, bias=bias)
    found = model.apply(changed, logits, method="calibrate")
    expected = 2 * (logits + logits @ mixing) + bias
    expected -= np.log(np.exp(expected).sum(-1, keepdims=True))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_gradient_reaches_calibration_and_pseudo_counts(network):
    model, variables, _ = network
    features = jnp.asarray(posteriors((2, 6), 3), jnp.float32)

    def loss(params):
        z = model.apply({"params": params}, jnp.log(features), method="calibrate")
        p = model.apply({"params": params}, z, method="aggregate")
        return jnp.sum(p**2)

    params = variables["params"]
    gradient = jax.jit(jax.grad(loss))(params)
    value = jax.jit(loss)
    for name in ("log_scale", "bias", "mixing", "pseudo_count"):
        direction = jnp.asarray(
            np.random.default_rng(4).normal(size=params[name].shape), jnp.float32
        )
        step = 1e-2
        up = value(params | {name: params[name] + step * direction})
        down = value(params | {name: params[name] - step * direction})
        expected = (up - down) / (2 * step)
        found = jnp.sum(gradient[name] * direction)
        np.testing.assert_allclose(found, expected, rtol=0.03, atol=2e-4)
        assert np.any(gradient[name] != 0)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("mask", jnp.ones((3, 9), bool)), ("weights", jnp.ones((3, 9)))],
)
def test_a_wrong_shape_is_named(network, argument, value):
    model, variables, inputs = network
    with pytest.raises(ValueError, match=argument):
        model.apply(variables, inputs, **{argument: value})


def test_no_classifier_is_refused():
    model = archs.EMQNet(archs.MLP((8,), 4), K, num_members=0)
    with pytest.raises(ValueError, match="num_members must be 1 or more, not 0"):
        model.init(jax.random.key(0), jnp.ones((1, 2, 3)))
