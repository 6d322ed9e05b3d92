import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from archs import contracts, pooling

# What NumPy, SciPy and PyTorch say of the real elements alone, x [m, f].
REFERENCES = {
    "sum": lambda x: x.sum(0),
    "mean": lambda x: x.mean(0),
    "sqrt_sum": lambda x: x.sum(0) / np.sqrt(len(x)),
    "log_count": lambda x: np.log([1 + len(x)]),
    "max": lambda x: x.max(0),
    "min": lambda x: x.min(0),
    "median": lambda x: np.median(x, 0),
    "lower_median": lambda x: torch.from_numpy(x).median(0).values.numpy(),
    "std": lambda x: np.sqrt(x.var(0) + 1e-6),
    "logsumexp": lambda x: scipy.special.logsumexp(x, 0),
    0.25: lambda x: np.quantile(x, 0.25, axis=0),
    0.75: lambda x: np.quantile(x, 0.75, axis=0),
}
NAMES = tuple(REFERENCES)
DIFFERENTIABLE_IN_WEIGHTS = ("sum", "mean", "sqrt_sum", "log_count", "std", "logsumexp")
MERGEABLE = ("sum", "mean", "sqrt_sum", "log_count", "max", "min", "logsumexp")
BAGS, ELEMENTS, FEATURES = 3, 7, 2


@functools.cache
def compiled(name):
    def both(x, mask, weights=None):
        def loss(x):
            out = pooling.aggregate(x, mask, name, weights)
            return jnp.sum(jnp.sin(out)), out

        gradient, out = jax.grad(loss, has_aux=True)(x)
        return out, gradient

    return jax.jit(both)


def test_every_aggregation_is_tested():
    functions = {n.removesuffix("_pool") for n in dir(pooling) if n.endswith("_pool")}
    assert functions == {n for n in NAMES if isinstance(n, str)} | {"quantile"}


@pytest.mark.parametrize("name", NAMES)
@given(
    seed=st.integers(0, 2**32 - 1),
    counts=st.lists(st.integers(0, ELEMENTS), min_size=BAGS, max_size=BAGS),
    offset=st.sampled_from([0.0, -5.0, 100.0]),
    padding=st.sampled_from([0.0, 3e38, np.inf, -np.inf, np.nan]),
)
@settings(max_examples=25, deadline=None)
def test_masked_aggregates_are_those_of_the_real_elements(
    name, seed, counts, offset, padding
):
    rng = np.random.default_rng(seed)
    x = rng.normal(offset, 1, (BAGS, ELEMENTS, FEATURES)).astype(np.float32)
    # The real elements lie anywhere, not in front.
    mask = np.argsort(rng.random((BAGS, ELEMENTS))) < np.array(counts)[:, None]
    padded = np.where(mask[..., None], x, np.float32(padding))
    out, gradient = compiled(name)(padded, mask)
    assert not np.any(np.where(mask[..., None], 0, gradient))
    assert np.isfinite(gradient).all()
    for bag, real in enumerate(mask):
        if real.any():
            expected = REFERENCES[name](x[bag, real])
            np.testing.assert_allclose(out[bag], expected, rtol=1e-5, atol=1e-5)
            alone = jax.vmap(compiled(name), (0, None))(
                jnp.asarray(x[bag][None]), jnp.asarray(real)
            )[1][0]
            np.testing.assert_allclose(gradient[bag], alone, rtol=1e-5, atol=1e-5)
        else:
            assert not np.any(out[bag])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weights", [None, jnp.zeros((2, 0))])
def test_a_set_of_no_elements_at_all(name, weights):
    out = pooling.aggregate(jnp.zeros((2, 0, 3)), None, name, weights)
    np.testing.assert_array_equal(out, jnp.zeros_like(out))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name):
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, 6, 3), jnp.float64)
        mask = jnp.array([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 0]], bool)
        pool = functools.partial(pooling.aggregate, mask=mask, aggregation=name)
        check_grads(jax.jit(pool), (x,), order=1, modes=("rev",), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@given(
    seed=st.integers(0, 2**32 - 1),
    counts=st.lists(st.integers(0, ELEMENTS), min_size=BAGS, max_size=BAGS),
    absent=st.sampled_from([0.0, 3e38, np.inf, -np.inf, np.nan]),
)
@settings(max_examples=15, deadline=None)
def test_multiset_weights_are_multiplicities(name, seed, counts, absent):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(BAGS, ELEMENTS, FEATURES)).astype(np.float32)
    mask = np.argsort(rng.random((BAGS, ELEMENTS))) < np.array(counts)[:, None]
    times = rng.integers(0, 4, mask.shape) * mask
    given_x = np.where(times[..., None], x, np.float32(absent))
    # What padding weighs is of no importance either.
    weights = np.where(mask, times, rng.normal(size=mask.shape)).astype(np.float32)
    out, gradient = compiled(name)(given_x, mask, weights)
    assert np.isfinite(gradient).all()
    assert not np.any(gradient[times == 0])
    for bag, repeats in enumerate(times):
        if repeats.any():
            expected = REFERENCES[name](np.repeat(x[bag], repeats, 0))
            np.testing.assert_allclose(out[bag], expected, rtol=1e-5, atol=1e-5)
        else:
            assert not np.any(out[bag])


@pytest.mark.parametrize("name", NAMES)
def test_multiset_gradient_is_that_of_all_copies(name):
    x = jax.random.normal(jax.random.key(0), (3, 5, 2))
    contracts.assert_weights_are_multiplicities(
        functools.partial(weighted, name), x, key=jax.random.key(1)
    )


@functools.partial(jax.jit, static_argnums=0)
def weighted(name, x, mask, weights):
    return pooling.aggregate(x, mask, name, weights)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_in_the_weights(name):
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, 6, 3), jnp.float64)
        weights = jax.random.uniform(jax.random.key(1), (2, 6), x.dtype, 0.5, 3)
        mask = jnp.array([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 0]], bool)

        def pool(weights):
            return pooling.aggregate(x, mask, name, weights)

        if name in DIFFERENTIABLE_IN_WEIGHTS:
            check_grads(
                jax.jit(pool), (weights,), order=1, modes=("rev",), atol=1e-6, rtol=1e-6
            )
        total = jax.jit(jax.grad(lambda w: pool(w).sum()))
        # Zero where the element is absent, even if all are.
        for w in (weights.at[0].set(0), weights.at[:, 2].set(0)):
            gradient = total(w)
            assert np.isfinite(gradient).all()
            assert not np.any(np.where(mask & (w > 0), 0, gradient))


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_one_are_no_weights(name):
    x = jax.random.normal(jax.random.key(0), (3, 6, 2))
    mask = jnp.arange(6) < jnp.array([[2], [6], [0]])
    with_ones = compiled(name)(x, mask, jnp.ones(mask.shape))
    without = compiled(name)(x, mask)
    for one, none in zip(with_ones, without, strict=True):
        np.testing.assert_allclose(one, none, rtol=1e-6, atol=1e-6)


def test_median_of_even_sets_is_numpys_and_lower_median_is_torchs():
    x = np.array([[4.0], [1], [3], [2]], np.float32)
    assert pooling.median_pool(x)[0] == np.median(x) == 2.5
    assert pooling.lower_median_pool(x)[0] == torch.from_numpy(x).median().item() == 2
    gradient = jax.grad(lambda x: pooling.median_pool(x)[0])(x)
    assert gradient.ravel().tolist() == [0, 0, 0.5, 0.5]


def test_median_ignores_padding_without_nanmedian():
    # A fill of NaN and nanmedian would lose the infinity of an honest element.
    x = jnp.array([[1.0], [jnp.inf], [jnp.nan], [2.0]])
    mask = jnp.array([True, True, False, True])
    assert pooling.median_pool(x, mask)[0] == 2
    assert pooling.quantile_pool(x, mask, quantile=1.0)[0] == jnp.inf


@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_median_with_fractional_weights_follows_its_definition(scale):
    rng = np.random.default_rng(0)
    for _ in range(20):
        x = rng.normal(size=6).astype(np.float32)
        w = (rng.integers(1, 9, 6) / 8).astype(np.float32)
        ordered, total = np.sort(x), np.cumsum(w[np.argsort(x)])
        lower = ordered[total >= w.sum() / 2][0]
        upper = ordered[total > w.sum() / 2][0]
        given_weights = w * np.float32(scale)
        found = weighted("median", x[:, None], None, given_weights)
        np.testing.assert_allclose(found[0], (lower + upper) / 2, rtol=1e-6)


@pytest.mark.parametrize("name", ["median", "lower_median", 0.25, 0.5])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_order_statistics_of_any_weights_depend_on_no_order(name, scale):
    # Tenths and thirds: sums of them differ in the last digit with their order.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 12, 1)).astype(np.float32)
    w = rng.choice(np.array([0.1, 0.2, 0.3, 1 / 3, 0.0], np.float32), (200, 12))
    w *= np.float32(scale)
    out = weighted(name, x, None, w)
    order = np.argsort(rng.random((200, 12)), axis=1)
    moved = np.take_along_axis(x, order[..., None], 1)
    others = weighted(name, moved, None, np.take_along_axis(w, order, 1))
    np.testing.assert_array_equal(out, others)
    # Nor on padding, whatever it holds.
    nothing = np.full((200, 21), np.nan, np.float32)
    padded = np.concatenate([x, nothing[..., None]], 1)
    mask = np.arange(33) < np.full((200, 1), 12)
    found = weighted(name, padded, mask, np.concatenate([w, nothing], 1))
    np.testing.assert_array_equal(out, found)


@pytest.mark.parametrize(
    ("size", "heavy"), [(65_536, 30_000), (33_000, 32_000), (4096, 2**18)]
)
@pytest.mark.parametrize(("name", "quantile"), [("median", 0.5), (0.005, 0.005)])
def test_a_heavy_element_among_many_light_ones(size, heavy, name, quantile):
    x = np.arange(size, dtype=np.float32)
    weights = np.where(x < size - 1, 1, np.float32(heavy))
    found = weighted(name, x[:, None], None, weights)
    expected = np.quantile(np.repeat(x, weights.astype(int)), quantile)
    np.testing.assert_allclose(found, [expected], rtol=1e-5)


def test_the_lightest_element_is_there():
    x, weights = np.array([[1.0], [2], [3]], "f"), np.array([1e-12, 1, 1], "f")
    assert pooling.quantile_pool(x, None, weights, quantile=0.0) == 1


def test_float64_weights_are_told_apart():
    with jax.enable_x64(True):
        x = jnp.arange(2000.0, dtype=jnp.float64)[:, None]
        w = jnp.ones(2000, jnp.float64).at[:1000].add(1e-7)
        assert weighted("median", x, None, w) == 999


def test_quantiles_of_more_elements_than_float32_can_count():
    x = jnp.zeros((2**24 + 4, 1))
    assert pooling.quantile_pool(x, quantile=1.0) == 0


def test_median_of_the_largest_numbers_is_finite():
    for dtype in (jnp.float16, jnp.float32):
        top = jnp.finfo(dtype).max
        assert pooling.median_pool(jnp.full((2, 1), top, dtype)) == top


@pytest.mark.parametrize("weight", [0.1, 1 / 3, 0.7, 1e30, 1e-30])
def test_median_of_equal_weights_is_that_without(weight):
    x = jax.random.normal(jax.random.key(0), (50, 8, 2))
    weights = jnp.full((50, 8), weight)
    for name in ("median", "lower_median"):
        found = weighted(name, x, None, weights)
        np.testing.assert_array_equal(found, weighted(name, x, None, None))


@pytest.mark.parametrize("name", ["median", "lower_median", 0.25, "max", "min"])
def test_gradient_at_ties_is_shared_and_permutation_equivariant(name):
    x = jnp.array([[1.0], [1], [1], [1], [5], [-3], [1]])
    gradient = compiled(name)(x, None)[1].ravel()
    for order in (slice(None, None, -1), jnp.array([3, 4, 6, 0, 5, 1, 2])):
        moved = compiled(name)(x[order], None)[1].ravel()
        np.testing.assert_array_equal(moved, gradient[order])


@pytest.mark.parametrize(("name", "theirs"), [("max", torch.amax), ("min", torch.amin)])
def test_max_gradient_at_ties_is_that_of_torch_amax(name, theirs):
    # torch.max(dim) gives it all to one element, torch.amax shares as we do.
    x = np.array([[1, 2], [1, 3], [0, 3], [1, 2.5]], np.float32)
    leaf = torch.from_numpy(x).requires_grad_()
    theirs(leaf, 0).sum().backward()
    ours = jax.grad(lambda x: pooling.aggregate(x, None, name).sum())(x)
    np.testing.assert_array_equal(ours, leaf.grad.numpy())


def test_max_of_negative_features_is_not_the_padding():
    x = jnp.array([[-2.0], [-1], [0]])
    mask = jnp.array([True, True, False])
    assert pooling.max_pool(x, mask)[0] == -1
    assert pooling.min_pool(-x, mask)[0] == 1


def test_std_of_a_constant_set_has_gradient_zero():
    x = jnp.full((5, 2), 1e4)
    gradient = jax.grad(lambda x: pooling.std_pool(x).sum())(x)
    np.testing.assert_array_equal(gradient, np.zeros((5, 2)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_tolerance_of_large_sets_with_an_offset(name, offset):
    x = offset + jax.random.normal(jax.random.key(0), (1, 5000, 2))
    contracts.assert_permutation_invariant(
        lambda x, mask: compiled(name)(x, mask)[0], x, key=jax.random.key(1)
    )


def test_sum_grows_mean_forgets_and_sqrt_sum_keeps_its_spread():
    x = jax.random.normal(jax.random.key(0), (500, 400, 1))
    spread = {
        name: pooling.aggregate(x, None, name).std()
        / pooling.aggregate(x[:, :4], None, name).std()
        for name in ("sum", "mean", "sqrt_sum")
    }
    assert 8 < spread["sum"] < 12
    assert 0.08 < spread["mean"] < 0.12
    assert 0.9 < spread["sqrt_sum"] < 1.1


@pytest.mark.parametrize("count", [1, 2, 9, 10])
def test_quantiles_are_numpys_whatever_the_bandwidth(count):
    x = np.random.default_rng(count).normal(size=(count, 3)).astype(np.float32)
    quantiles = (0.0, 0.1, 0.5, 0.83, 1.0)
    expected = np.quantile(x, quantiles, axis=0)

    @jax.jit
    def both(x):
        sharp, smooth = (pooling.Quantiles(quantiles, h) for h in (0.0, 0.5))
        return sharp.apply({}, x), smooth.apply({}, x)

    for found in both(x):
        np.testing.assert_allclose(found, expected.ravel(), rtol=1e-5, atol=1e-6)


def test_bandwidth_is_the_implicit_gradient_of_a_smoothed_quantile():
    rng = np.random.default_rng(0)
    x, bandwidth = rng.normal(size=9), 0.4
    weights = rng.integers(1, 3, 9).astype(np.float64)
    median = np.median(np.repeat(x, weights.astype(int)))
    assert median in x
    deviation = (weights @ np.abs(x - median)) / weights.sum()

    def smooth_level(v, x):
        return weights @ scipy.stats.norm.cdf((v - x) / (bandwidth * deviation))

    def smooth_median(x):
        level = smooth_level(median, x0)
        return scipy.optimize.brentq(
            lambda v: smooth_level(v, x) - level, -9, 9, xtol=1e-14
        )

    x0 = x
    steps = 1e-5 * np.eye(9)
    expected = [(smooth_median(x + d) - smooth_median(x - d)) / 2e-5 for d in steps]
    with jax.enable_x64(True):
        pool = functools.partial(pooling.quantile_pool, bandwidth=bandwidth)
        gradient = jax.jit(jax.grad(lambda x: pool(x, None, weights)[0]))
        found = gradient(jnp.asarray(x[:, None]))
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("bandwidth", [0.0, 0.5])
def test_gradient_of_quantiles_sums_to_one_and_a_bandwidth_spreads_it(bandwidth):
    x = jax.random.normal(jax.random.key(0), (4, 10, 3))
    mask = jnp.arange(10) < jnp.array([[10], [3], [1], [0]])
    module = pooling.Quantiles((0.25, 0.9), bandwidth)
    total = jax.jit(jax.grad(lambda x: module.apply({}, x, mask).sum()))
    gradient = total(jnp.where(mask[..., None], x, jnp.nan))
    np.testing.assert_allclose(
        gradient.sum(1), np.array([2, 2, 2, 0])[:, None] * np.ones((4, 3)), rtol=1e-5
    )
    reached = (gradient[0] > 1e-3).sum(0)
    assert (reached >= 7).all() if bandwidth else (reached <= 4).all()
    constant = total(jnp.ones_like(x))
    np.testing.assert_allclose(constant[0], np.full((10, 3), 0.2), rtol=1e-5)


def test_bandwidth_lets_many_elements_move_towards_a_target_median():
    # With the exact gradient one element moves at a time until it is overtaken.
    def train(bandwidth):
        def loss(x):
            return ((pooling.quantile_pool(x, bandwidth=bandwidth) - 3) ** 2).sum()

        gradient = jax.jit(jax.grad(loss))
        x = jax.random.normal(jax.random.key(0), (51, 1))
        for _ in range(20):
            x = x - 2.0 * gradient(x)
        return loss(x)

    assert train(1.0) < 0.5 * train(0.0)


@jax.jit
def power_mean(exponent, x, mask=None, weights=None):
    variables = {"params": {"exponent": jnp.full(x.shape[-1], exponent, x.dtype)}}
    return pooling.PowerMean().apply(variables, x, mask, weights)


@pytest.mark.parametrize(
    "exponent", [-8.0, -1.0, -0.02, -1e-5, 0.0, 1e-5, 0.02, 0.3, 1.0, 2.0, 30.0]
)
@pytest.mark.parametrize("spread", [0.0, 0.05, 3.0])
def test_power_mean_is_scipys(exponent, spread):
    rng = np.random.default_rng(0)
    x = (1 + spread * rng.normal(size=(2, 8, 3))).astype(np.float32)
    weights = rng.integers(0, 4, (2, 8)).astype(np.float32)
    y = np.logaddexp(0, x.astype(np.float64)) + 1e-6
    expected = scipy.stats.pmean(y, exponent, axis=1, weights=weights[..., None])
    out = power_mean(exponent, x, None, weights)
    np.testing.assert_allclose(out, expected, rtol=1e-5)


@pytest.mark.parametrize("exponent", [-2.0, 0.0, 0.01, 1.0, 7.0])
def test_power_mean_learns_its_exponent(exponent):
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, 6, 3), jnp.float64)
        mask = jnp.array([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 0]], bool)
        weights = jnp.linspace(0.5, 2, 12).reshape(2, 6)
        check_grads(
            lambda p, x, w: power_mean(p, x, mask, w),
            (exponent, x, weights),
            order=1,
            modes=("rev",),
            atol=1e-5,
            rtol=1e-5,
        )


def test_power_mean_starts_where_it_is_told():
    variables = pooling.PowerMean(2.0).init(jax.random.key(0), jnp.ones((4, 3)))
    assert variables["params"]["exponent"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("exponent", [-40.0, 0.0, 1.0, 40.0])
@pytest.mark.parametrize("offset", [-60.0, 0.0, 60.0])
def test_power_mean_is_finite(exponent, offset):
    x = offset + jnp.array([[-3.0, 0.0, jnp.nan], [5.0, 0.0, jnp.nan]])[..., None]
    mask = jnp.array([[True, True, False], [False, False, False]])
    value = power_mean(exponent, x, mask)
    gradients = power_mean_gradients(exponent, x, mask)
    for leaf in jax.tree.leaves((value, gradients)):
        assert np.isfinite(leaf).all()
    assert not np.any(value[1])


@jax.jit
@functools.partial(jax.grad, argnums=(0, 1))
def power_mean_gradients(exponent, x, mask):
    return power_mean(exponent, x, mask).sum()


@pytest.mark.parametrize("count", [4, 5])
def test_lower_median_has_the_gradient_of_torch(count):
    x = np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)
    theirs = torch.from_numpy(x).requires_grad_()
    theirs.median(0).values.sum().backward()
    ours = jax.grad(lambda x: pooling.lower_median_pool(x).sum())(x)
    np.testing.assert_array_equal(ours, theirs.grad.numpy())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("elements", [0, 1, 5])
def test_finite_for_no_single_and_equal_elements(name, elements):
    x = jnp.full((2, elements, 3), -2.0)
    out, gradient = compiled(name)(x, None)
    assert np.isfinite(out).all()
    assert np.isfinite(gradient).all()
    if elements == 0:
        assert not np.any(out)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_accumulates_in_float32(name, dtype):
    x = jnp.ones((1, 4096, 1), dtype)
    out = pooling.aggregate(x, None, name)
    assert out.dtype == dtype
    expected = REFERENCES[name](np.ones((4096, 1), np.float32))
    np.testing.assert_allclose(np.float32(out[0]), expected, rtol=5e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "name",
    [*NAMES, pooling.PowerMean(), pooling.Quantiles()],
    ids=[*map(str, NAMES), "PowerMean", "Quantiles"],
)
def test_half_precision_rounds_nothing_but_the_answer(name, dtype):
    if isinstance(name, pooling.PowerMean):
        name = name.bind({"params": {"exponent": jnp.array([-2.0, 3.0])}})
    elif isinstance(name, pooling.Quantiles):
        name = name.bind({})
    x = (3 + jax.random.normal(jax.random.key(0), (3, 3000, 2))).astype(dtype)
    mask = jnp.arange(3000) < jnp.array([[3000], [7], [0]])
    x = jnp.where(mask[..., None], x, jnp.nan)
    weights = jax.random.uniform(jax.random.key(1), mask.shape, maxval=2).astype(dtype)

    pool = jax.jit(lambda x, weights: pooling.aggregate(x, mask, name, weights))
    found = pool(x, weights)
    expected = pool(x.astype(jnp.float32), weights.astype(jnp.float32))
    assert found.dtype == dtype and np.isfinite(expected).all()
    rtol = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.float32(found), expected, rtol=rtol)


@pytest.mark.parametrize("name", NAMES)
def test_duplicating_every_element(name):
    x = jax.random.normal(jax.random.key(0), (5, 3))
    twice = pooling.aggregate(jnp.concatenate([x, x]), None, name)
    once = pooling.aggregate(x, None, name)
    change = {
        "sum": once,
        "sqrt_sum": (np.sqrt(2) - 1) * once,
        "log_count": np.log(11 / 6),
        "logsumexp": np.log(2),
    }.get(name, 0)
    np.testing.assert_allclose(twice, once + change, rtol=1e-5, atol=1e-6)


def test_several_aggregates_stand_side_by_side():
    x = jax.random.normal(jax.random.key(0), (4, 5, 3))
    mask = jnp.arange(5) < jnp.arange(1, 5)[:, None]
    out = pooling.aggregate(x, mask, ("mean", "log_count", 0.25, "max"))
    assert out.shape == (4, 10)
    np.testing.assert_array_equal(out[:, :3], pooling.mean_pool(x, mask))
    np.testing.assert_array_equal(out[:, 3], np.log1p(np.arange(1, 5, dtype="f")))
    np.testing.assert_array_equal(
        out[:, 4:7], pooling.quantile_pool(x, mask, quantile=0.25)
    )
    np.testing.assert_array_equal(out[:, 7:], pooling.max_pool(x, mask))


@pytest.mark.parametrize("aggregation", [*MERGEABLE, MERGEABLE, pooling.PowerMean()])
def test_chunks_are_merged_to_the_whole(aggregation):
    x = jax.random.normal(jax.random.key(0), (2, 9, 3))
    mask = jax.random.bernoulli(jax.random.key(1), 0.7, (2, 9))
    weights = jax.random.uniform(jax.random.key(2), (2, 9), maxval=3)
    if isinstance(aggregation, pooling.PowerMean):
        variables = {"params": {"exponent": jnp.array([-2.0, 0.0, 3.0])}}
        aggregation = aggregation.bind(variables)
    for w in (None, weights):
        contracts.assert_chunk_invariant(
            jax.jit(lambda x, mask, w: pooling.aggregate(x, mask, aggregation, w)),
            functools.partial(pooling.merge_aggregates, aggregation=aggregation),
            x,
            mask,
            w,
            key=jax.random.key(3),
        )


@pytest.mark.parametrize(
    "aggregation",
    [*(name for name in NAMES if name not in MERGEABLE), pooling.Quantiles()],
)
def test_what_cannot_be_merged_is_named(aggregation):
    with pytest.raises(ValueError, match="does not follow from those of its parts"):
        pooling.merge_aggregates(jnp.zeros((2, 4, 3)), jnp.ones((2, 4)), aggregation)


@pytest.mark.parametrize("aggregation", ["average", (), ("mean", "mode"), 1.0, 0, 1.5])
def test_unknown_aggregation_is_a_sentence(aggregation):
    with pytest.raises(ValueError, match=r"aggregation must name .*lower_median"):
        pooling.aggregate(jnp.zeros((2, 3)), None, aggregation)


@pytest.mark.parametrize(
    ("mask", "error"),
    [(jnp.ones(3, bool), ValueError), (jnp.ones((2, 3)), TypeError)],
)
def test_wrong_masks_are_refused(mask, error):
    with pytest.raises(error, match="mask must have"):
        pooling.aggregate(jnp.zeros((2, 3, 4)), mask, "mean")


@pytest.mark.parametrize(
    ("weights", "error"),
    [(jnp.ones(3), ValueError), (jnp.ones((2, 3), int), TypeError)],
)
def test_wrong_weights_are_refused(weights, error):
    with pytest.raises(error, match="weights must have"):
        pooling.aggregate(jnp.zeros((2, 3, 4)), None, "mean", weights)


@pytest.mark.parametrize("wrong", [{"quantile": 1.1}, {"bandwidth": -1.0}])
def test_wrong_quantiles_are_named(wrong):
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))} must"):
        pooling.quantile_pool(jnp.zeros((3, 1)), **wrong)
