"""Dropout: the share it drops, its mean, its independence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from archs import Dropout


def dropped(rate: float, x: jax.Array, seed: int = 0) -> np.ndarray:
    rngs = {"dropout": jax.random.key(seed)}
    return np.asarray(Dropout(rate).apply({}, x, train=True, rngs=rngs))


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.9])
def test_drops_the_rate_and_keeps_the_mean(rate):
    y = dropped(rate, jnp.ones((401, 257)))
    spread = np.sqrt(rate * (1 - rate) / y.size)
    assert abs((y == 0).mean() - rate) < 1 / 512 + 5 * spread
    assert abs(y.mean() - 1) < 5 * spread / (1 - rate)


def test_units_rows_and_columns_are_independent():
    kept = dropped(0.5, jnp.ones((512, 512))) > 0
    for shift in [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (3, 5)]:
        same = (kept == np.roll(kept, shift, (0, 1))).mean()
        assert abs(same - 0.5) < 5 * 0.5 / 512
    for axis in (0, 1):  # binomial counts: variance 128 per line of 512
        assert 90 < kept.sum(axis).var() < 175


def test_the_key_decides():
    x = jnp.ones((33,))
    np.testing.assert_array_equal(dropped(0.5, x, 1), dropped(0.5, x, 1))
    assert (dropped(0.5, x, 1) != dropped(0.5, x, 2)).any()


def test_gradient_is_that_of_the_kept_units():
    x = jnp.arange(1.0, 65.0)

    def total(x):
        rngs = {"dropout": jax.random.key(0)}
        return Dropout(0.25).apply({}, x, train=True, rngs=rngs).sum()

    np.testing.assert_allclose(
        jax.grad(total)(x), np.where(dropped(0.25, x) != 0, 256 / 192, 0)
    )


def test_identity_when_evaluating_or_at_rate_zero():
    x = jnp.arange(5.0)
    np.testing.assert_array_equal(Dropout(0.5).apply({}, x, train=False), x)
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, train=True), x)


def test_keeps_half_precision():
    assert dropped(0.5, jnp.ones(8, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_refuses_impossible_rates(rate):
    with pytest.raises(ValueError, match="rate must lie in"):
        dropped(rate, jnp.ones(3))
