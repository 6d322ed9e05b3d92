import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from archs import pooling

# What NumPy, SciPy and PyTorch say of the real elements alone, x [m, f].
REFERENCES = {
    "sum": lambda x: x.sum(0),
    "mean": lambda x: x.mean(0),
    "max": lambda x: x.max(0),
    "min": lambda x: x.min(0),
    "median": lambda x: np.median(x, 0),
    "lower_median": lambda x: torch.from_numpy(x).median(0).values.numpy(),
    "std": lambda x: np.sqrt(x.var(0) + 1e-6),
    "logsumexp": lambda x: scipy.special.logsumexp(x, 0),
}
NAMES = tuple(REFERENCES)
BAGS, ELEMENTS, FEATURES = 3, 7, 2


@functools.cache
def compiled(name):
    def both(x, mask):
        def loss(x):
            out = pooling.aggregate(x, mask, name)
            return jnp.sum(jnp.sin(out)), out

        gradient, out = jax.grad(loss, has_aux=True)(x)
        return out, gradient

    return jax.jit(both)


def test_every_aggregation_is_tested():
    functions = {n.removesuffix("_pool") for n in dir(pooling) if n.endswith("_pool")}
    assert functions == set(NAMES)


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
def test_gradients_are_those_of_finite_differences(name):
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, 6, 3), jnp.float64)
        mask = jnp.array([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 0]], bool)
        pool = functools.partial(pooling.aggregate, mask=mask, aggregation=name)
        check_grads(jax.jit(pool), (x,), order=1, modes=("rev",), atol=1e-6, rtol=1e-6)


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


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_accumulates_in_float32(name):
    x = jnp.ones((1, 4096, 1), jnp.bfloat16)
    out = pooling.aggregate(x, None, name)
    assert out.dtype == jnp.bfloat16
    expected = REFERENCES[name](np.ones((4096, 1), np.float32))
    np.testing.assert_allclose(np.float32(out[0]), expected, rtol=5e-3)


@pytest.mark.parametrize("name", NAMES)
def test_duplicating_every_element(name):
    x = jax.random.normal(jax.random.key(0), (5, 3))
    twice = pooling.aggregate(jnp.concatenate([x, x]), None, name)
    once = pooling.aggregate(x, None, name)
    change = {"sum": once, "logsumexp": jnp.log(2.0)}.get(name, 0)
    if name == "lower_median":  # of five elements the third, of ten the fifth
        change = 0
    np.testing.assert_allclose(twice, once + change, rtol=1e-5, atol=1e-6)


def test_several_aggregates_stand_side_by_side():
    x = jax.random.normal(jax.random.key(0), (4, 5, 3))
    mask = jnp.arange(5) < jnp.arange(1, 5)[:, None]
    out = pooling.aggregate(x, mask, ("mean", "max"))
    np.testing.assert_array_equal(out[:, :3], pooling.mean_pool(x, mask))
    np.testing.assert_array_equal(out[:, 3:], pooling.max_pool(x, mask))


def test_chunks_of_a_sum_add_up():
    x = jax.random.normal(jax.random.key(0), (2, 9, 3))
    parts = pooling.sum_pool(x[:, :4]) + pooling.sum_pool(x[:, 4:])
    np.testing.assert_allclose(parts, pooling.sum_pool(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["average", (), ("mean", "mode")])
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
