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

from archs.histogram import (
    HardBinningHistogram,
    HardHistogram,
    LinearHistogram,
    RBFHistogram,
    SigmoidHistogram,
    SoftHistogram,
    hard_histogram,
    linear_histogram,
)

PUBLISHED = [SoftHistogram, RBFHistogram, SigmoidHistogram, HardBinningHistogram]
MODULES = [LinearHistogram, HardHistogram, *PUBLISHED]
FUNCTIONS = [linear_histogram, hard_histogram]
# [set, element, feature] and the number of bins; not only powers of two.
SHAPES = [((4, 3), 2), ((2, 5, 3), 7), ((2, 3, 4, 1), 32)]

values = functools.partial(
    hnp.arrays, np.float32, elements=st.floats(-0.5, 1.5, width=32)
)


def uniform(shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


def value_and_gradient(function, x, cotangent):
    value, pullback = jax.vjp(function, jnp.asarray(x))
    return value, pullback(jnp.asarray(cotangent))[0]


def apply(module, x, mask=None):
    """A module with its initial parameters as a function, and its output."""
    variables = module.init(jax.random.key(0), x, mask)
    return module.apply(variables, x, mask)


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
def test_sums_to_one(function, shape, num_bins):
    histogram = jax.jit(lambda x: function(x, num_bins))

    @settings(max_examples=25, deadline=None)
    @given(values(shape))
    def check(x):
        out = np.asarray(histogram(x))
        assert out.shape == (*shape[:-2], shape[-1], num_bins)
        np.testing.assert_allclose(out.sum(-1), 1, rtol=1e-6)
        assert (out >= 0).all()

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
    _, linear = value_and_gradient(
        lambda x: linear_histogram(x, num_bins), x, cotangent
    )
    _, hard = value_and_gradient(lambda x: hard_histogram(x, num_bins), x, cotangent)
    np.testing.assert_array_equal(hard, linear)
    assert np.abs(hard).max() > 0.01


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shape", "num_bins"), SHAPES)
def test_linear_gradient_is_the_finite_difference(shape, num_bins, masked):
    with jax.enable_x64(True):
        x = 1.4 * np.random.default_rng(0).random(shape) - 0.2
        mask = uniform(shape[:-1], 2) < 0.7 if masked else None
        cotangent = np.random.default_rng(1).random((*shape[:-2], shape[-1], num_bins))

        @jax.jit
        def loss(x):
            return jnp.sum(linear_histogram(x, num_bins, mask) * cotangent)

        gradient = np.asarray(jax.grad(loss)(x))
        step, differences = 1e-6, np.zeros(shape)
        for at in np.ndindex(shape):
            up, down = x.copy(), x.copy()
            up[at] += step
            down[at] -= step
            differences[at] = (loss(up) - loss(down)) / (2 * step)
    np.testing.assert_allclose(gradient, differences, atol=1e-7)
    assert (gradient != 0).any()
    assert (gradient == 0).any()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_mean_of_histogram_has_slope_one(function):
    num_bins = 8
    centers = (jnp.arange(num_bins) + 0.5) / num_bins
    x = np.linspace(0.07, 0.93, 40, dtype=np.float32)[:, None]
    slope = jax.grad(lambda x: jnp.sum(function(x, num_bins) @ centers))(x)
    np.testing.assert_allclose(slope * len(x), 1, rtol=1e-5)


@pytest.mark.parametrize("kind", MODULES)
def test_order_of_the_elements_does_not_matter(kind):
    x = uniform((2, 9, 3))
    shuffled = np.random.default_rng(1).permutation(x, axis=1)
    np.testing.assert_allclose(
        apply(kind(5), x), apply(kind(5), shuffled), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("padding", [0.3, np.nan, np.inf])
@pytest.mark.parametrize("kind", MODULES)
def test_padding_touches_neither_value_nor_gradients(kind, padding):
    module = kind(5)
    x = uniform((2, 4, 3))
    padded = np.full((3, 6, 3), padding, np.float32)
    padded[:2, [0, 2, 3, 5]] = x
    mask = np.zeros((3, 6), bool)
    mask[:2, [0, 2, 3, 5]] = True
    cotangent = uniform((3, 3, 5), 1)
    variables = module.init(jax.random.key(0), x)

    def pull(x, mask, cotangent):
        out, pullback = jax.vjp(lambda v, x: module.apply(v, x, mask), variables, x)
        return out, *pullback(cotangent)

    out, parameters, gradient = jax.jit(pull)(x, None, cotangent[:2])
    out_padded, parameters_padded, gradient_padded = jax.jit(pull)(
        padded, mask, cotangent
    )
    np.testing.assert_allclose(out_padded[:2], out, atol=1e-6)
    np.testing.assert_array_equal(out_padded[2], 0)
    np.testing.assert_allclose(gradient_padded[mask], gradient.reshape(8, 3), atol=1e-5)
    np.testing.assert_array_equal(gradient_padded[~mask], 0)
    for a, b in zip(
        jax.tree.leaves(parameters), jax.tree.leaves(parameters_padded), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("kind", MODULES)
def test_leading_axes_jit_and_vmap_agree(kind):
    module = kind(6)
    x = uniform((2, 3, 4, 5))
    mask = uniform((2, 3, 4), 1) < 0.6
    variables = module.init(jax.random.key(0), x)
    cotangent = uniform((2, 3, 5, 6), 2)

    def pull(x, mask, cotangent):
        return value_and_gradient(
            lambda x: module.apply(variables, x, mask), x, cotangent
        )

    expected = jax.jit(pull)(x, mask, cotangent)
    for axes in (jax.vmap(pull), jax.vmap(jax.vmap(pull))):
        for a, b in zip(expected, axes(x, mask, cotangent), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_kinds_are_the_grouped_convolutions(kind):
    num_bins, module = 6, kind(6)
    x = np.random.default_rng(0).random((2, 7, 3))
    cotangent = np.random.default_rng(1).standard_normal((2, 3, num_bins))
    with jax.enable_x64(True):
        bins = module.init(jax.random.key(0), jnp.asarray(x)).get("params", {})
        out, pullback = jax.vjp(
            lambda p, x: module.apply({"params": p}, x), bins, jnp.asarray(x)
        )
        gradients, gradient = pullback(jnp.asarray(cotangent))
        gradients = jax.tree.map(np.asarray, gradients)
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
    variables = module.init(jax.random.key(0), x)

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


@pytest.mark.parametrize("kind", MODULES)
def test_bfloat16_is_accumulated_in_float32(kind):
    x = jnp.asarray(uniform((1, 3000, 1)), jnp.bfloat16)
    module = kind(4)
    out = apply(module, x)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, apply(module, x.astype(jnp.float32)), rtol=1e-6)
    variables = module.init(jax.random.key(0), x)
    gradient = jax.grad(lambda x: module.apply(variables, x)[0, 0, 0])(x)
    assert gradient.dtype == jnp.bfloat16


@pytest.mark.parametrize("function", FUNCTIONS)
def test_not_a_number_among_real_values_shows(function):
    x = uniform((2, 5, 3))
    x[1, 2, 0] = np.nan
    broken = np.isnan(function(x, 4)).any(-1)
    np.testing.assert_array_equal(broken, [[False] * 3, [True, False, False]])


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize(
    ("num_bins", "shape", "mask_shape", "match"),
    [
        (1, (2, 3), (2,), "num_bins must be at least 2, got 1"),
        (4, (3,), (), r"x must be .*, got shape \(3,\)"),
        (4, (2, 5, 3), (5,), r"mask must have the shape \(2, 5\) .*, got \(5,\)"),
    ],
)
def test_wrong_arguments_are_named(kind, num_bins, shape, mask_shape, match):
    with pytest.raises(ValueError, match=match):
        apply(kind(num_bins), np.zeros(shape, np.float32), np.ones(mask_shape, bool))
