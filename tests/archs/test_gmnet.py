"""GMNet against SciPy, NumPy and the contracts of set networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import multivariate_normal

from archs import (
    MLP,
    GaussianDensities,
    GMNet,
    PrevalenceHead,
    absolute_error,
    centered_kernel_alignment,
    contracts,
)


def bags(shape=(4, 6, 5)):
    inputs = jax.random.normal(jax.random.key(0), shape)
    mask = jax.random.bernoulli(jax.random.key(2), 0.6, shape[:2])
    return inputs, mask.at[:, 0].set(True).at[1].set(False)


def network(**kwargs):
    sizes = {"num_spaces": 3, "num_gaussians": 4, "latent_size": 2}
    return GMNet(PrevalenceHead((8,), 3), **sizes, hidden_sizes=(6,), **kwargs)


@functools.cache
def initialized(model):
    inputs, _ = bags()
    return jax.jit(model.init)(jax.random.key(1), inputs)


def set_function(model):
    variables = initialized(model)
    return jax.jit(lambda *args: model.apply(variables, *args))


@functools.cache
def training(model):
    """(variables, inputs, mask) -> what a training step estimates and collects."""

    @jax.jit
    def apply(variables, inputs, mask=None):
        return model.apply(
            variables,
            inputs,
            mask,
            train=True,
            rngs={"dropout": jax.random.key(3)},
            mutable=["batch_stats", "losses"],
        )

    return apply


@pytest.mark.parametrize("size", [1, 3, 5])
def test_densities_are_those_of_scipy(size):
    module = GaussianDensities(4)
    x = np.random.default_rng(0).random((6, size), np.float32)
    rng = np.random.default_rng(1)
    params = {
        "centers": rng.random((4, size), np.float32),
        "scales": rng.uniform(-2, 0, (4, size)).astype(np.float32),
        "factors": rng.normal(0, 1, (4, size * (size - 1) // 2)).astype(np.float32),
    }
    found = jax.jit(module.apply)({"params": params}, x)
    scales = jax.nn.softplus(params["scales"]) + 1e-3
    for g in range(4):
        factor = np.zeros((size, size))
        factor[np.tril_indices(size, -1)] = params["factors"][g]
        np.fill_diagonal(factor, 1 / scales[g])
        covariance = np.linalg.inv(factor @ factor.T)
        expected = multivariate_normal(params["centers"][g], covariance).pdf(x)
        assert expected.max() > 1e-3
        np.testing.assert_allclose(found[:, g], expected, rtol=1e-4, atol=1e-9)


def test_gaussians_start_as_far_as_their_neighbours():
    x = jnp.zeros((1, 5))
    params = jax.jit(GaussianDensities(100).init)(jax.random.key(0), x)["params"]
    centers = np.asarray(params["centers"])
    assert 0 <= centers.min() < 0.02 and 0.98 < centers.max() <= 1
    distances = np.linalg.norm(centers[:, None] - centers, axis=-1)
    np.fill_diagonal(distances, np.inf)
    scales = jax.nn.softplus(params["scales"]) + 1e-3
    np.testing.assert_allclose(scales, distances.min(1).mean() / 2, rtol=1e-4)
    assert not np.any(params["factors"])
    assert params["factors"].shape == (100, 10)


def test_narrow_and_far_gaussians_are_finite():
    module = GaussianDensities(2)
    params = {
        "centers": jnp.array([[0.5] * 5, [1e6] * 5]),
        "scales": jnp.full((2, 5), -1e3),
        "factors": jnp.full((2, 10), 1e3),
    }
    x = jnp.array([[0.5] * 5, [0.0] * 5])

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, x):
        densities = module.apply({"params": params}, x)
        return jnp.sum(densities), densities

    (_, densities), gradients = loss(params, x)
    assert np.isclose(densities[0, 0], (1000 / np.sqrt(2 * np.pi)) ** 5, rtol=1e-4)
    assert np.all(densities.at[0, 0].set(0) == 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def hsic(x, y):
    n = len(x)
    center = np.eye(n) - 1 / n
    kernel, other = x @ x.T, y @ y.T
    return np.trace(kernel @ center @ other @ center) / (n - 1) ** 2


def test_alignment_is_the_ratio_of_hilbert_schmidt_criteria():
    rng = np.random.default_rng(0)
    x, y = rng.random((20, 4)), rng.standard_normal((20, 3))
    alignment = jax.jit(centered_kernel_alignment)
    expected = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
    np.testing.assert_allclose(alignment(x, y), expected, rtol=1e-5)
    mask = np.arange(26) % 4 != 0
    padded = np.full((26, 7), np.nan)
    padded[np.flatnonzero(mask)] = np.concatenate([x, y], 1)[: mask.sum()]
    real = slice(0, mask.sum())
    x, y = x[real], y[real]
    expected = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
    found = alignment(padded[:, :4], padded[:, 4:], mask)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_alignment_is_invariant_to_rotation_shift_and_scale():
    rng = np.random.default_rng(0)
    x, y = rng.random((20, 4)), rng.random((20, 4))
    rotation = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    alignment = jax.jit(centered_kernel_alignment)
    np.testing.assert_allclose(alignment(x, x), 1, rtol=1e-5)
    np.testing.assert_allclose(alignment(x, 3e-4 * x @ rotation + 1), 1, rtol=1e-3)
    np.testing.assert_allclose(alignment(x, y), alignment(y, x), rtol=1e-5)
    np.testing.assert_allclose(
        alignment(100 * x @ rotation - 5, y), alignment(x, y), rtol=1e-4
    )
    # No invertible map: stretching one axis changes it.
    assert abs(alignment(x * [9, 1, 1, 1], y) - alignment(x, y)) > 0.01


def test_alignment_with_a_constant_is_zero_and_has_finite_gradients():
    x, y = np.random.default_rng(0).random((2, 20, 4))
    for constant in (np.ones((20, 4)), np.zeros((20, 4))):
        value, gradients = jax.jit(
            jax.value_and_grad(centered_kernel_alignment, (0, 1))
        )(constant, y)
        assert value == 0
        assert all(np.isfinite(leaf).all() for leaf in gradients)
    with pytest.raises(ValueError, match=r"\(20, 4\) and \(19, 4\)"):
        centered_kernel_alignment(x, y[1:])


def test_contracts():
    inputs, mask = bags()
    f = set_function(network())
    for m in (None, mask):
        contracts.assert_permutation_invariant(f, inputs, m, key=jax.random.key(0))
        np.testing.assert_allclose(f(inputs, m).sum(-1), 1, rtol=1e-6)
    contracts.assert_padding_invariant(f, inputs, mask)
    contracts.assert_finite_on_empty_set(f, inputs)
    contracts.assert_duplication(f, inputs, mask)
    contracts.assert_weights_are_multiplicities(f, inputs, mask, key=jax.random.key(0))


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_a_thousand_elements_come_in_any_order(wide):
    f = set_function(network())
    with jax.enable_x64(wide):
        inputs, mask = bags((3, 1000, 5))
        assert f(inputs, mask).dtype == (jnp.float64 if wide else jnp.float32)
        contracts.assert_permutation_invariant(
            f, inputs, mask, key=jax.random.key(0), rtol=1e-12 if wide else 1e-5
        )


def test_bags_of_no_elements_at_all():
    inputs, _ = bags()
    model = network()
    variables = initialized(model)
    expected = model.apply(variables, inputs, jnp.zeros(inputs.shape[:2], bool))
    found, collected = training(model)(variables, inputs[:, :0])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # Nor statistics of none.
    jax.tree.map(
        np.testing.assert_array_equal,
        collected["batch_stats"],
        variables["batch_stats"],
    )


def test_call_is_its_methods_and_parts_are_merged():
    inputs, mask = bags()
    model = network()
    bound = model.bind(initialized(model))
    features = jax.jit(bound.encode)(inputs, mask)
    assert features.shape == (4, 6, 12)
    representation = bound.aggregate(features, mask)
    assert representation.shape == (4, 12)
    np.testing.assert_array_equal(representation[1], 0)
    np.testing.assert_allclose(
        jax.jit(bound.decode)(representation),
        set_function(model)(inputs, mask),
        rtol=1e-6,
    )
    weights = jax.random.uniform(jax.random.key(0), mask.shape, maxval=3.0)
    contracts.assert_chunk_invariant(
        jax.jit(bound.aggregate),
        bound.merge,
        features,
        mask,
        weights,
        key=jax.random.key(0),
    )


def test_features_are_normalised_densities_of_the_latent_spaces():
    inputs, mask = bags()
    model = network(dropout_rate=0.0)
    variables = initialized(model)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None), out_axes=1)
    def spaces(params, x):
        points = MLP((6,), 2).apply({"params": params["MLP_0"]}, x)
        densities = GaussianDensities(4).apply(
            {"params": params["GaussianDensities_0"]}, jax.nn.sigmoid(points)
        )
        return points, densities

    x = inputs.reshape(24, 5)
    points, densities = spaces(variables["params"]["spaces"], x)
    densities = densities.reshape(24, 12)
    # Before training the moving averages are 0 and 1.
    features = model.apply(variables, inputs, method="encode")
    np.testing.assert_allclose(features.reshape(24, 12), densities, rtol=2e-4)
    _, collected = training(model)(variables, inputs, mask)
    real = densities[np.asarray(mask).ravel()]
    averages = collected["batch_stats"]["normalise"]
    np.testing.assert_allclose(averages["mean"], 0.1 * real.mean(0), rtol=1e-4)
    np.testing.assert_allclose(averages["var"], 0.9 + 0.1 * real.var(0), rtol=1e-4)
    pairs = [
        centered_kernel_alignment(points[:, i], points[:, j], mask.reshape(-1))
        for i, j in [(0, 1), (0, 2), (1, 2)]
    ]
    (found,) = jax.tree.leaves(collected["losses"])
    np.testing.assert_allclose(found, 0.01 * np.mean(pairs), rtol=1e-4)


def test_alignment_is_collected_only_on_demand():
    inputs, _ = bags()
    assert set(initialized(network())) == {"params", "batch_stats"}
    model = network(cka_weight=0.0)
    assert "losses" not in training(model)(initialized(network()), inputs)[1]


def test_every_parameter_receives_a_finite_gradient():
    inputs, mask = bags()
    model = network(encoder=MLP((6,), 5), dropout_rate=0.0)
    variables = initialized(model)

    @jax.jit
    @jax.grad
    def gradient(params, inputs, mask):
        out, collected = training(model)({**variables, "params": params}, inputs, mask)
        error = jnp.sum((out - jnp.array([1.0, 0, 0])) ** 2)
        return error + sum(jax.tree.leaves(collected["losses"]))

    for real in (mask, jnp.zeros_like(mask)):
        found = gradient(variables["params"], inputs, real)
        for path, leaf in jax.tree_util.tree_leaves_with_path(found):
            assert np.isfinite(leaf).all(), path
            assert np.any(leaf) or not real.any(), path


def test_lowering_the_alignment_separates_the_latent_spaces():
    inputs, _ = bags((2, 64, 5))
    model = network(cka_weight=1.0, dropout_rate=0.0)
    variables = initialized(model)
    optimizer = optax.adam(0.02)

    def alignment(params):
        _, collected = training(model)({**variables, "params": params}, inputs)
        return sum(jax.tree.leaves(collected["losses"]))

    def step(state, _):
        params, moments = state
        value, gradient = jax.value_and_grad(alignment)(params)
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(params, updates), moments), value

    params = variables["params"]
    run = jax.jit(lambda state: jax.lax.scan(step, state, None, 100)[1])
    values = run((params, optimizer.init(params)))
    assert values[-1] < 0.3 * values[0]


def test_dropout_acts_only_in_training():
    inputs, _ = bags()
    model = network(dropout_rate=0.5)
    still = network(dropout_rate=0.0)
    variables = initialized(model)
    out, _ = training(model)(variables, inputs)
    expected, _ = training(still)(variables, inputs)
    assert not np.allclose(out, expected, atol=1e-4)
    np.testing.assert_array_equal(
        set_function(model)(inputs), set_function(still)(inputs)
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    inputs, mask = bags()
    out = set_function(network(dtype=dtype))(inputs.astype(dtype), mask)
    assert out.dtype == jnp.float32
    wide, rtol = set_function(network())(inputs, mask), float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(out, wide, rtol=rtol)


def test_parameter_count_of_the_published_network():
    model = GMNet(PrevalenceHead((4000,), 28, 0.5))
    inputs = jnp.zeros((1, 2, 300))
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    mlp = 300 * 50 + 50 + 50 * 5 + 5
    gaussians = 100 * (5 + 5 * 6 // 2)  # a center and a triangle
    normalisation = 2 * 100
    head = 900 * 4000 + 4000 + 4000 * 28 + 28
    assert count == 9 * (mlp + gaussians + normalisation) + head


def test_learns_prevalences_from_bags_without_labels():
    model = GMNet(
        PrevalenceHead((16,), 2),
        num_spaces=2,
        num_gaussians=8,
        latent_size=2,
        hidden_sizes=(8,),
        dropout_rate=0.0,
    )
    optimizer = optax.adam(3e-3)

    def bags(key, num_bags=32, bag_size=64):
        # Two overlapping Gaussian classes, prevalences uniform on the simplex.
        share, member, noise = jax.random.split(key, 3)
        p = jax.random.uniform(share, (num_bags, 1))
        first = jax.random.uniform(member, (num_bags, bag_size)) < p
        x = jnp.where(first, 1.0, -1.0) + jax.random.normal(noise, first.shape)
        return x[..., None], jnp.concatenate([p, 1 - p], -1)

    def error(params, model_state, key):
        inputs, p = bags(key)
        estimate, collected = model.apply(
            {"params": params, **model_state},
            inputs,
            train=True,
            mutable=["batch_stats", "losses"],
        )
        regulariser = sum(jax.tree.leaves(collected.pop("losses")))
        return absolute_error(p, estimate).mean() + regulariser, collected

    def step(state, key):
        params, model_state, moments = state
        gradient, model_state = jax.grad(error, has_aux=True)(params, model_state, key)
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(params, updates), model_state, moments), None

    @jax.jit
    def train(key):
        variables = model.init(key, bags(key)[0])
        params, model_state = (
            variables["params"],
            {"batch_stats": variables["batch_stats"]},
        )
        keys = jax.random.split(key, 600)
        state = params, model_state, optimizer.init(params)
        params, model_state, _ = jax.lax.scan(step, state, keys)[0]
        inputs, p = bags(jax.random.key(1))
        estimate = model.apply({"params": params, **model_state}, inputs)
        return absolute_error(p, estimate).mean()

    # A constant answer has error 0.25; the draw of the bag alone costs 0.04.
    assert train(jax.random.key(0)) < 0.08


def test_wrong_arguments_are_named():
    inputs, key = jnp.zeros((3, 2, 1)), jax.random.key(0)
    with pytest.raises(ValueError, match=r"inputs must .*\(3, 2\)"):
        network().init(key, inputs[..., 0])
    with pytest.raises(ValueError, match=r"weights must .*\(3, 2\).*\(2, 3\)"):
        network().init(key, inputs, None, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="num_spaces must be 1 or more, not 0"):
        GMNet(PrevalenceHead((), 2), num_spaces=0).init(key, inputs)
    with pytest.raises(ValueError, match="num_gaussians must be 2 or more, not 1"):
        GaussianDensities(1).init(key, inputs)
