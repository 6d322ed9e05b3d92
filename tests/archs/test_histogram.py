"""Differentiable histograms against closed forms, NumPy, PyTorch and differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.interpolate import BSpline

from archs import contracts, histogram
from archs.histogram import (
    AdaptiveHistogram,
    CubicHistogram,
    CumulativeHistogram,
    HardBinningHistogram,
    HardHistogram,
    LinearHistogram,
    RBFHistogram,
    SigmoidHistogram,
    SoftHistogram,
)

# Compiled as a whole: operation by operation, compiling takes most of the time.
compiled = functools.partial(jax.jit, static_argnames="num_bins")
linear_histogram = compiled(histogram.linear_histogram)
hard_histogram = compiled(histogram.hard_histogram)
cubic_histogram = compiled(histogram.cubic_histogram)
adaptive_histogram = jax.jit(histogram.adaptive_histogram)


def cumulative(num_bins):
    return CumulativeHistogram(LinearHistogram(num_bins))


@compiled
def adaptive(x, num_bins, mask=None, weights=None):
    """`adaptive_histogram` with uneven centers, other ones for each feature."""
    centers = jnp.asarray(uneven_centers(x.shape[-1], num_bins))
    return adaptive_histogram(x, centers, mask, weights)


def uneven_centers(num_features, num_bins):
    gaps = np.random.default_rng(7).uniform(0.2, 1, (num_features, num_bins + 1))
    return np.cumsum(gaps, -1)[:, :-1] / np.sum(gaps, -1, keepdims=True)


PUBLISHED = [SoftHistogram, RBFHistogram, SigmoidHistogram, HardBinningHistogram]
SCATTERED = [LinearHistogram, HardHistogram, CubicHistogram, AdaptiveHistogram]
MODULES = [*SCATTERED, cumulative, *PUBLISHED]
FUNCTIONS = [linear_histogram, hard_histogram, cubic_histogram, adaptive]
# [set, element, feature] and the number of bins; not only powers of two.
SHAPES = [((4, 3), 2), ((2, 5, 3), 7), ((2, 3, 4, 1), 32)]

values = functools.partial(
    hnp.arrays, np.float32, elements=st.floats(-0.5, 1.5, width=32)
)
multiplicities = functools.partial(
    hnp.arrays, np.float32, elements=st.sampled_from([0.0, 0.5, 1.0, 2.0])
)


def uniform(shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


def value_and_gradient(function, x, cotangent):
    value, pullback = jax.vjp(function, jnp.asarray(x))
    return value, pullback(jnp.asarray(cotangent))[0]


@functools.cache
def initialized(module):
    """A module with its initial parameters as one compiled function."""

    @jax.jit
    def apply(x, mask=None, weights=None):
        variables = module.init(jax.random.key(0), x, mask, weights)
        return module.apply(variables, x, mask, weights)

    return apply


def finite_differences(loss, x, step=1e-6):
    gradient = np.zeros(x.shape)
    for at in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[at] += step
        down[at] -= step
        gradient[at] = (loss(up) - loss(down)) / (2 * step)
    return gradient


def triangular(x, num_bins):
    """Linear binning written out for every pair of value and bin."""
    centers = (np.arange(num_bins) + 0.5) / num_bins
    x = np.clip(np.asarray(x, np.float64), centers[0], centers[-1])
    votes = np.maximum(1 - num_bins * np.abs(x[..., None] - centers), 0)
    return votes.mean(-3)


def torch_published(kind, x, num_bins):
    """The published layers: grouped 1x1 convolutions over [bag, feature, element].

    Returns the histogram [bag, feature, num_bins] and the tensors of the centers and
    the widths in the layers' own signs.
    """
    features = x.shape[-1]
    rows = features * num_bins
    centers = (torch.arange(num_bins, dtype=x.dtype) + 0.5) / num_bins
    centers = centers.repeat(features).requires_grad_()
    width = {
        SoftHistogram: 2.0 * num_bins,
        RBFHistogram: 2.0 * num_bins,
        HardBinningHistogram: 0.5 / num_bins + 0.001,
        SigmoidHistogram: 1 / num_bins,
    }[kind]
    widths = torch.full((rows,), width, dtype=x.dtype, requires_grad=True)
    ones = torch.ones(rows, 1, 1, dtype=x.dtype)
    distance = torch.nn.functional.conv1d(
        x.transpose(1, 2), ones, -centers, groups=features
    )
    scale = functools.partial(torch.nn.functional.conv1d, groups=rows)
    if kind is SoftHistogram:
        votes = scale(distance.abs(), -widths[:, None, None], ones[:, 0, 0]).relu()
    elif kind is RBFHistogram:
        votes = torch.exp(-(scale(distance.abs(), widths[:, None, None]) ** 2))
    elif kind is HardBinningHistogram:
        votes = torch.pow(1.01, scale(distance.abs(), -ones, widths))
        votes = torch.nn.functional.threshold(votes, 1, 0)
    else:
        half = 0.5 / num_bins
        votes = torch.sigmoid(1000 * (distance + half))
        votes = votes - torch.sigmoid(1000 * (distance - half))
    histogram = votes.mean(2).reshape(-1, features, num_bins)
    return histogram, centers, widths


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("shape", "num_bins"), SHAPES)
def test_mass_is_one_and_the_mean_is_the_mean(function, shape, num_bins):
    votes = jax.jit(lambda *args: function(args[0], num_bins, *args[1:]))
    centers = (np.arange(num_bins) + 0.5) / num_bins * np.ones((shape[-1], 1))
    if function is adaptive:
        centers = uneven_centers(shape[-1], num_bins)

    @settings(max_examples=20, deadline=None)
    @given(
        values(shape),
        hnp.arrays(bool, shape[:-1]),
        multiplicities(shape[:-1]),
    )
    def check(x, mask, weights):
        out = np.asarray(votes(x, mask, weights))
        assert out.shape == (*shape[:-2], shape[-1], num_bins)
        assert (out >= 0).all()
        weights = np.where(mask, weights, 0)
        total = weights.sum(-1)[..., None]
        mass = np.broadcast_to(total > 0, (*shape[:-2], shape[-1]))
        np.testing.assert_allclose(out.sum(-1), mass, rtol=1e-6)
        if function is hard_histogram:
            return
        # The cubic votes near the ends fold what lies beyond, and pull inwards.
        mean = np.sum(out * centers, -1)
        inner = centers[:, 1:-1] if function is cubic_histogram else centers
        if inner.shape[-1]:
            clipped = np.clip(x, inner[:, 0], inner[:, -1])
            kept = ((clipped == x) | (weights[..., None] == 0)).all(-2)
            kept |= function is not cubic_histogram
            expected = (clipped * weights[..., None]).sum(-2) / np.maximum(total, 1e-9)
            np.testing.assert_allclose(mean[kept], expected[kept], atol=1e-5)

    check()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_mass_and_mean_hold_in_other_dtypes(function, dtype):
    num_bins, shape, wide = 7, (9, 3), dtype == jnp.float64
    centers = (np.arange(num_bins) + 0.5) / num_bins * np.ones((3, 1))
    if function is adaptive:
        centers = uneven_centers(3, num_bins)
    rtol, atol = (1e-13, 1e-12) if wide else (1e-6, 1e-5)
    if function is hard_histogram:  # moves a value to its bin's center
        atol += 0.5 / num_bins
    # The cubic votes near the ends fold what lies beyond, and pull inwards.
    ends = centers[0, [1, -2]] if function is cubic_histogram else (-0.5, 1.5)

    @settings(max_examples=20, deadline=None)
    @given(hnp.arrays(np.float64, shape, elements=st.floats(*ends)))
    def check(x):
        x = jnp.asarray(x, dtype)
        out = function(x, num_bins)
        assert out.dtype == (jnp.float64 if wide else jnp.float32)
        np.testing.assert_allclose(out.sum(-1), 1, rtol=rtol)
        # Of the values as the dtype rounds them.
        x = np.clip(np.asarray(x, np.float64), centers[:, 0], centers[:, -1])
        np.testing.assert_allclose((out * centers).sum(-1), x.mean(0), atol=atol)

    with jax.enable_x64(wide):
        check()


@pytest.mark.parametrize(("shape", "num_bins"), SHAPES)
def test_linear_is_the_triangular_kernel(shape, num_bins):
    x = 1.4 * uniform(shape) - 0.2
    np.testing.assert_allclose(
        linear_histogram(x, num_bins), triangular(x, num_bins), atol=2e-6
    )


def test_linear_values_at_edges_and_centers():
    x = np.array([-3.0, 0, 0.125, 0.25, 0.375, 0.5, 0.875, 1, 7], np.float32)
    votes = np.asarray(linear_histogram(x[:, None, None], 4))[:, 0]
    expected = [
        [1, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 0, 0, 0],
        [0.5, 0.5, 0, 0],
        [0, 1, 0, 0],
        [0, 0.5, 0.5, 0],
        [0, 0, 0, 1],
        [0, 0, 0, 1],
        [0, 0, 0, 1],
    ]
    np.testing.assert_array_equal(votes, expected)


@pytest.mark.parametrize(("shape", "num_bins"), SHAPES)
def test_hard_is_numpys_histogram(shape, num_bins):
    x = uniform(shape)
    expected = np.apply_along_axis(
        lambda v: np.histogram(v, num_bins, (0, 1))[0], -2, x
    )
    out = hard_histogram(x, num_bins) * shape[-2]
    np.testing.assert_allclose(out, np.moveaxis(expected, -2, -1), atol=1e-5)


def test_hard_values_at_edges():
    x = np.array([0, 0.125, 0.25, 0.75, 1, -1, 2], np.float32)
    votes = np.asarray(hard_histogram(x[:, None, None], 4))[:, 0]
    np.testing.assert_array_equal(votes, np.eye(4)[[0, 0, 1, 3, 3, 0, 3]])


@pytest.mark.parametrize(("shape", "num_bins"), SHAPES)
def test_hard_gradient_is_the_linear_one(shape, num_bins):
    x = uniform(shape)
    cotangent = uniform((*shape[:-2], shape[-1], num_bins), 1)

    def gradient(function):
        pull = functools.partial(value_and_gradient, lambda x: function(x, num_bins))
        return jax.jit(pull)(x, cotangent)[1]

    linear, hard = gradient(linear_histogram), gradient(hard_histogram)
    np.testing.assert_array_equal(hard, linear)
    assert np.abs(hard).max() > 0.01


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("shape", "num_bins"), SHAPES)
def test_gradients_are_the_finite_differences(function, shape, num_bins):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = rng.random(shape)
        x[..., 0, 0], x[..., 1, 0] = -0.3, 0.52
        mask = rng.random(shape[:-1]) < 0.8
        mask[..., 1] = True
        weights = rng.uniform(0.5, 3, shape[:-1])
        cotangent = rng.random((*shape[:-2], shape[-1], num_bins))

        @jax.jit
        def loss(x, weights):
            return jnp.sum(function(x, num_bins, mask, weights) * cotangent)

        of_x, of_weights = jax.jit(jax.grad(loss, (0, 1)))(x, weights)
        differences = finite_differences(lambda w: loss(x, w), weights)
        np.testing.assert_allclose(of_weights, differences, atol=1e-7)
        if function is not hard_histogram:
            differences = finite_differences(lambda x: loss(x, weights), x)
            np.testing.assert_allclose(of_x, differences, atol=1e-7)
    assert np.any(of_x) and np.any(of_weights)
    assert not np.all(of_x)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_of_the_centers_is_the_finite_difference(weighted):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = rng.random((2, 9, 3))
        weights = rng.uniform(0.5, 3, (2, 9)) if weighted else None
        cotangent = rng.random((2, 3, 5))
        centers = uneven_centers(3, 5)

        @jax.jit
        def loss(centers):
            return jnp.sum(adaptive_histogram(x, centers, None, weights) * cotangent)

        gradient = jax.jit(jax.grad(loss))(centers)
        differences = finite_differences(loss, centers)
    np.testing.assert_allclose(gradient, differences, atol=1e-7)
    assert np.all(gradient)


@pytest.mark.parametrize(("shape", "num_bins"), SHAPES)
def test_cubic_is_the_cubic_b_spline_of_scipy(shape, num_bins):
    x = np.random.default_rng(0).uniform(-0.2, 1.2, shape)
    spline = BSpline.basis_element(np.arange(-2.0, 3), extrapolate=False)
    beyond = 2 + num_bins  # so far that nothing is lost
    bins = np.arange(-beyond, num_bins + beyond)
    votes = np.nan_to_num(spline((x * num_bins - 0.5)[..., None] - bins))
    votes = votes.mean(-3)
    expected = votes[..., beyond:-beyond].copy()
    expected[..., 0] += votes[..., :beyond].sum(-1)
    expected[..., -1] += votes[..., -beyond:].sum(-1)
    found = cubic_histogram(x.astype(np.float32), num_bins)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize(("shape", "num_bins"), SHAPES)
def test_adaptive_is_numpys_interpolation(shape, num_bins):
    x = np.random.default_rng(0).uniform(-0.2, 1.2, shape).astype(np.float32)
    centers = uneven_centers(shape[-1], num_bins).astype(np.float32)
    x[..., 0, 0], x[..., -1, 0] = centers[0, 0], centers[0, -1]
    expected = np.stack(
        [
            np.stack([np.interp(x[..., f], row, vote) for vote in np.eye(num_bins)], -1)
            for f, row in enumerate(centers)
        ],
        axis=-2,
    ).mean(-3)
    found = adaptive_histogram(x, centers)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_adaptive_starts_as_the_linear_histogram():
    x = uniform((2, 50, 3))
    np.testing.assert_allclose(
        initialized(AdaptiveHistogram(12))(x), linear_histogram(x, 12), atol=2e-6
    )


def test_learned_bins_stay_ordered_and_their_parameters_receive_gradients():
    num_bins, module = 6, AdaptiveHistogram(6)
    grid = np.linspace(0, 1, 1001, dtype=np.float32)[:, None] * np.ones((1, 2), "f")
    first_moment = np.arange(num_bins, dtype=np.float32)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def curves(logits):
        # [value, feature, bin]: the votes of single values.
        votes = module.apply({"params": {"width_logits": logits}}, grid[:, None])
        return jnp.sum((votes @ first_moment) ** 2), votes

    @settings(max_examples=20, deadline=None)
    @given(
        hnp.arrays(np.float32, (2, num_bins), elements=st.floats(-1e4, 1e4, width=32))
    )
    def check(logits):
        (_, votes), gradient = curves(logits)
        np.testing.assert_allclose(votes.sum(-1), 1, rtol=1e-5)
        assert (np.diff(votes @ first_moment, axis=0) >= -1e-5).all()
        assert (votes[0, :, 0] == 1).all() and (votes[-1, :, -1] == 1).all()
        assert np.isfinite(gradient).all()

    check()
    assert np.all(curves(jnp.zeros((2, num_bins)))[1])


def test_centers_that_coincide_give_finite_gradients():
    centers = jnp.array([[0.2, 0.5, 0.5, 0.5]])
    x = jnp.array([[0.1], [0.3], [0.5], [0.9]])
    out = adaptive_histogram(x, centers)
    np.testing.assert_allclose(out, [[1 / 4 + 1 / 6, 1 / 12, 0, 1 / 2]], atol=1e-6)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(x, centers):
        return jnp.sum(jnp.sin(9 * adaptive_histogram(x, centers)))

    for gradient in gradients(x, centers):
        assert np.isfinite(gradient).all()


def test_cumulative_histogram_is_the_empirical_distribution():
    x = uniform((3, 20, 2))
    mask = np.ones((3, 20), bool)
    mask[1] = False
    out = initialized(CumulativeHistogram(HardHistogram(5)))(x, mask)
    edges = np.arange(1, 6) / 5
    expected = (x[..., None] < edges).mean(1) * mask[:, :1, None]
    np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("function", [linear_histogram, hard_histogram, adaptive])
def test_mean_of_histogram_has_slope_one(function):
    num_bins = 8
    centers = (np.arange(num_bins) + 0.5) / num_bins
    if function is adaptive:
        (centers,) = uneven_centers(1, num_bins)
    x = np.linspace(centers[0] + 0.01, centers[-1] - 0.01, 40, dtype=np.float32)
    x, centers = x[:, None], jnp.asarray(centers)
    slope = jax.jit(jax.grad(lambda x: jnp.sum(function(x, num_bins) @ centers)))(x)
    np.testing.assert_allclose(slope * len(x), 1, rtol=1e-5)


def test_cubic_votes_have_a_continuous_slope():
    num_bins = 8
    centers = (jnp.arange(num_bins) + 0.5) / num_bins
    x = np.linspace(-0.2, 1.2, 2801, dtype=np.float32)[:, None]
    slopes = jax.jit(
        jax.grad(lambda x: jnp.sum(cubic_histogram(x, num_bins) @ centers))
    )
    slope = np.asarray(slopes(x))[:, 0] * len(x)
    inner = (x[:, 0] >= centers[1]) & (x[:, 0] <= centers[-2])
    np.testing.assert_allclose(slope[inner], 1, rtol=1e-5)
    assert np.abs(np.diff(slope)).max() < 0.005
    assert slope[0] == slope[-1] == 0


@pytest.mark.parametrize("kind", MODULES)
def test_order_of_the_elements_does_not_matter(kind):
    x = uniform((2, 9, 3))
    shuffled = np.random.default_rng(1).permutation(x, axis=1)
    np.testing.assert_allclose(
        initialized(kind(5))(x), initialized(kind(5))(shuffled), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("kind", MODULES)
def test_padding_touches_neither_value_nor_gradients(kind):
    module = kind(5)
    x = uniform((2, 4, 3))
    mask = np.zeros((3, 6), bool)
    mask[:2, [0, 2, 3, 5]] = True
    cotangent = uniform((3, 3, 5), 1)
    variables = jax.jit(module.init)(jax.random.key(0), x)

    @jax.jit
    def pull(x, mask, cotangent):
        out, pullback = jax.vjp(lambda v, x: module.apply(v, x, mask), variables, x)
        return out, *pullback(cotangent)

    out, parameters, gradient = pull(x, None, cotangent[:2])
    for padding in (0.3, np.nan, np.inf):
        padded = np.full((3, 6, 3), padding, np.float32)
        padded[:2, [0, 2, 3, 5]] = x
        found, of_parameters, of_x = pull(padded, mask, cotangent)
        np.testing.assert_allclose(found[:2], out, atol=1e-6)
        np.testing.assert_array_equal(found[2], 0)
        np.testing.assert_allclose(of_x[mask], gradient.reshape(8, 3), atol=1e-5)
        np.testing.assert_array_equal(of_x[~mask], 0)
        for a, b in zip(
            jax.tree.leaves(parameters), jax.tree.leaves(of_parameters), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("kind", MODULES)
def test_weights_are_multiplicities(kind):
    contracts.assert_weights_are_multiplicities(
        initialized(kind(5)), uniform((3, 6, 2)), key=jax.random.key(0)
    )


@pytest.mark.parametrize("kind", [CubicHistogram, AdaptiveHistogram, SoftHistogram])
def test_the_gradient_of_a_weight_of_zero_is_zero(kind):
    x = uniform((1, 4, 2))
    x[0, 1] = np.nan
    weights = np.array([[1.0, 0, 2, 0.5]], np.float32)

    @jax.jit
    @jax.grad
    def gradient(weights):
        return jnp.sum(jnp.sin(3 * initialized(kind(5))(x, None, weights)))

    found = np.asarray(gradient(weights))
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found == 0, weights == 0)


@pytest.mark.parametrize("kind", [*SCATTERED, SoftHistogram])
def test_leading_axes_and_vmap_agree(kind):
    module = kind(6)
    x = uniform((2, 3, 4, 5))
    mask = uniform((2, 3, 4), 1) < 0.6
    weights = uniform((2, 3, 4), 3)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    cotangent = uniform((2, 3, 5, 6), 2)

    def pull(x, mask, weights, cotangent):
        return value_and_gradient(
            lambda x: module.apply(variables, x, mask, weights), x, cotangent
        )

    expected = jax.jit(pull)(x, mask, weights, cotangent)
    found = jax.jit(jax.vmap(jax.vmap(pull)))(x, mask, weights, cotangent)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("width", [4, 10, 33])
@pytest.mark.parametrize("max_size", [10**9, 200, 1])
def test_the_dense_form_is_the_scatter_and_the_gather(max_size, width):
    rng = np.random.default_rng(0)
    index = rng.integers(0, width - 3, (2, 11, 3), np.int32)
    votes = rng.random((2, 11, 3, 4), np.float32)
    np.testing.assert_allclose(
        histogram._dense_scatter(
            jnp.asarray(index), jnp.asarray(votes), width, max_size
        ),
        histogram._scatter(jnp.asarray(index), jnp.asarray(votes), width),
        rtol=1e-6,
    )
    table = rng.random((2, 3, width), np.float32)
    np.testing.assert_allclose(
        histogram._dense_gather(jnp.asarray(table), jnp.asarray(index), max_size),
        np.take_along_axis(table, index.transpose(0, 2, 1), -1).transpose(0, 2, 1),
        rtol=1e-6,
    )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_accelerators_scatter_nothing(function):
    def pull(x, cotangent):
        return value_and_gradient(lambda x: function(x, 8), x, cotangent)

    args = np.zeros((2, 50, 3), np.float32), np.zeros((2, 3, 8), np.float32)
    text = {
        platform: jax.jit(pull).trace(*args).lower(lowering_platforms=(platform,))
        for platform in ("cpu", "tpu", "cuda")
    }
    text = {platform: lowered.as_text() for platform, lowered in text.items()}
    assert "stablehlo.scatter" in text["cpu"]
    for platform in ("tpu", "cuda"):
        assert "stablehlo.scatter" not in text[platform]
        assert "stablehlo.dot_general" in text[platform]


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_kinds_are_the_grouped_convolutions(kind):
    num_bins, module = 6, kind(6)
    x = np.random.default_rng(0).random((2, 7, 3))
    cotangent = np.random.default_rng(1).standard_normal((2, 3, num_bins))
    with jax.enable_x64(True):
        bins = jax.jit(module.init)(jax.random.key(0), x).get("params", {})

        @jax.jit
        def pull(bins, x, cotangent):
            out, pullback = jax.vjp(
                lambda bins, x: module.apply({"params": bins}, x), bins, x
            )
            return out, *pullback(cotangent)

        out, gradients, gradient = jax.device_get(pull(bins, x, cotangent))
    torch_x = torch.tensor(x, requires_grad=True)
    expected, centers, widths = torch_published(kind, torch_x, num_bins)
    expected.backward(torch.tensor(cotangent))
    # The parameters are rounded to float32 in the initialisers.
    np.testing.assert_allclose(out, expected.detach(), atol=1e-6)
    np.testing.assert_allclose(gradient, torch_x.grad, rtol=1e-4, atol=1e-5)
    if kind is SigmoidHistogram:
        assert not bins
    else:
        for name, tensor in {"centers": centers, "widths": widths}.items():
            assert bins[name].shape == (3, num_bins)
            np.testing.assert_allclose(
                gradients[name].ravel(), tensor.grad, rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("kind", MODULES)
def test_never_holds_elements_by_features_by_bins(kind):
    shape, num_bins = (2, 100, 20), 64
    module = kind(num_bins)
    x = jnp.asarray(uniform(shape))
    variables = jax.jit(module.init)(jax.random.key(0), x)

    def pull(variables, x, cotangent):
        out, pullback = jax.vjp(module.apply, variables, x)
        return out, pullback(cotangent)

    memory = (
        jax.jit(pull)
        .lower(variables, x, jnp.ones((2, 20, num_bins)))
        .compile()
        .memory_analysis()
    )
    # A few copies of the values and of the histograms, not 64 of the values.
    assert memory.temp_size_in_bytes < 8 * x.nbytes + 8 * 2 * 20 * num_bins * 4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", MODULES)
def test_half_precision_is_accumulated_in_float32(kind, dtype):
    x = jnp.asarray(uniform((1, 3000, 1)), dtype)
    module = kind(4)
    function = initialized(module)
    out = function(x)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, function(x.astype(jnp.float32)), rtol=1e-6)
    gradient = jax.eval_shape(jax.grad(lambda x: function(x)[0, 0, 0]), x)
    assert gradient.dtype == dtype


@pytest.mark.parametrize("function", FUNCTIONS)
def test_not_a_number_among_real_values_shows(function):
    x = uniform((2, 5, 3))
    x[1, 2, 0] = np.nan
    broken = np.isnan(function(x, 4)).any(-1)
    np.testing.assert_array_equal(broken, [[False] * 3, [True, False, False]])


@pytest.mark.parametrize("kind", [*SCATTERED, *PUBLISHED])
def test_wrong_arguments_are_named(kind):
    x, real = np.zeros((2, 5, 3), np.float32), np.ones((2, 5), bool)
    for error, num_bins, args, match in [
        (ValueError, 1, (x,), "num_bins must be at least 2, got 1"),
        (ValueError, 4, (x[0, 0],), r"x must be .*, got shape \(3,\)"),
        (ValueError, 4, (x, real[0]), r"mask must .*\(2, 5\).* its shape is \(5,\)"),
        (TypeError, 4, (x, real * 1), "mask must have dtype bool"),
        (ValueError, 4, (x, None, x[..., 0].T), r"weights must .* shape is \(5, 2\)"),
        (TypeError, 4, (x, None, real), "weights must have a floating dtype"),
    ]:
        with pytest.raises(error, match=match):
            initialized(kind(num_bins))(*args)


def test_centers_of_another_shape_are_named():
    with pytest.raises(ValueError, match=r"centers .* 3 features, got shape \(2, 4\)"):
        adaptive_histogram(np.zeros((5, 3), np.float32), jnp.zeros((2, 4)))
