"""The contracts hold for what keeps them and catch what breaks them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from archs import contracts
from archs.pooling import mean_pool

KEY = jax.random.key(0)


def bags(dtype=jnp.float32):
    inputs = jax.random.normal(KEY, (3, 5, 2)).astype(dtype)
    mask = jnp.arange(5) < jnp.array([[2], [5], [3]])
    return inputs, mask


def real(x, mask):
    return x if mask is None else jnp.where(mask[..., None], x, 0)


def mean(x, mask):
    return mean_pool(x, mask)


def first_element(x, mask):
    return real(x, mask)[:, 0]


def weighted_by_position(x, mask):
    return jnp.einsum("bed,e->bd", real(x, mask), 1 + 1e-3 * jnp.arange(x.shape[1]))


def mean_over_padding(x, mask):
    return real(x, mask).mean(1)


def mask_by_product(x, mask):
    return (x * mask[..., None]).sum(1)


def forgets_the_mask(x, mask):
    return x.sum(1)


def squares_of_padding(x, mask):
    # Neither the value nor the gradient of a square tells while padding is zero.
    return real(x, mask).sum(1) + jnp.where(mask[..., None], 0, x**2).sum(1)


def gradient_leak(x, mask):
    # The value is masked, the gradient is not: 0 * inf at padding.
    return jnp.sum(jnp.where(mask[..., None], jnp.sqrt(jnp.abs(x)), 0), axis=1)


def divides_by_count(x, mask):
    return real(x, mask).sum(1) / mask.sum(1)[:, None]


def mixes_bags(x, mask):
    return mean_pool(x, mask) + real(x, mask).sum((0, 1))


def centered(x, mask):
    return x - mean_pool(x, mask)[:, None]


def difference_to_neighbour(x, mask):
    return x - jnp.roll(x, 1, axis=1)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_mean_keeps_every_contract(dtype, with_mask):
    inputs, mask = bags(dtype)
    mask = mask if with_mask else None
    contracts.assert_permutation_invariant(mean, inputs, mask, key=KEY)
    contracts.assert_padding_invariant(mean, inputs, mask)
    contracts.assert_finite_on_empty_set(mean, inputs)
    contracts.assert_permutation_equivariant(centered, inputs, mask, key=KEY)


def test_outputs_may_be_pytrees():
    inputs, mask = bags()

    def f(x, mask):
        return {"mean": mean(x, mask), "count": mask.sum(1)[:, None] * jnp.ones(2)}

    contracts.assert_permutation_invariant(f, inputs, mask, key=KEY)
    contracts.assert_padding_invariant(f, inputs, mask)
    contracts.assert_finite_on_empty_set(f, inputs)
    with pytest.raises(AssertionError, match=r"output\['order'\]\["):
        contracts.assert_permutation_invariant(
            lambda x, m: {"order": weighted_by_position(x, m)}, inputs, mask, key=KEY
        )


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("f", [first_element, weighted_by_position])
def test_an_order_is_seen(f, with_mask):
    inputs, mask = bags()
    with pytest.raises(AssertionError, match=r"^permutation invariance is violated: "):
        contracts.assert_permutation_invariant(
            f, inputs, mask if with_mask else None, key=KEY
        )


def test_each_bag_has_its_own_permutation():
    # One permutation for all bags would not notice a network that compares bags.
    inputs, _ = bags()
    with pytest.raises(AssertionError, match="permutation invariance"):
        contracts.assert_permutation_invariant(
            lambda x, mask: (x * jnp.roll(x, 1, axis=0)).sum(1), inputs, key=KEY
        )


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize(
    "f", [difference_to_neighbour, lambda x, mask: jnp.cumsum(x, axis=1)]
)
def test_a_neighbourhood_is_seen(f, with_mask):
    inputs, mask = bags()
    with pytest.raises(AssertionError, match="permutation equivariance is violated"):
        contracts.assert_permutation_equivariant(
            f, inputs, mask if with_mask else None, key=KEY
        )


@pytest.mark.parametrize(
    ("f", "sentence"),
    [
        (mean_over_padding, r"\(padding of 0\) is violated"),
        (forgets_the_mask, r"\(padding of 0\): gradient is violated"),
        (squares_of_padding, r"\(padding of 3.*e\+38\) is violated.* is inf"),
        (mask_by_product, r"\(padding of -inf\) is violated.* is nan"),
        (gradient_leak, r"gradient.* is violated"),
    ],
)
def test_padding_that_leaks_is_seen(f, sentence):
    inputs, mask = bags()
    with pytest.raises(AssertionError, match=f"padding invariance.*{sentence}"):
        contracts.assert_padding_invariant(f, inputs, mask)


@pytest.mark.parametrize(
    ("f", "sentence"),
    [
        (divides_by_count, "finite output on the empty set is violated: .* is nan"),
        (
            lambda x, mask: jnp.sqrt(((x * mask[..., None]) ** 2).sum(1)),
            "finite gradient on the empty set is violated: .* is nan",
        ),
        (mixes_bags, "independence of empty bags is violated"),
    ],
)
def test_an_undefined_empty_set_is_seen(f, sentence):
    inputs, _ = bags()
    with pytest.raises(AssertionError, match=sentence):
        contracts.assert_finite_on_empty_set(f, inputs)


def test_the_message_tells_the_worst_entry_and_the_tolerance():
    inputs = jnp.zeros((2, 3, 2)).at[1, 0, 1].set(4.0)
    with pytest.raises(AssertionError) as error:
        contracts.assert_permutation_invariant(lambda x, _: x[:, 0], inputs, key=KEY)
    assert str(error.value) == (
        "permutation invariance is violated: output[1, 1] is 0 where 4 was expected; "
        "the difference 4 exceeds the tolerance 4e-05 (1e-05 of the largest value)."
    )


@pytest.mark.parametrize(
    ("dtype", "error", "caught"),
    [
        (np.float32, 1e-6, False),
        (np.float32, 1e-4, True),
        (jnp.bfloat16, 1e-2, False),
        (jnp.bfloat16, 1e-1, True),
        (np.float64, 1e-13, False),
        (np.float64, 1e-10, True),
    ],
)
def test_tolerances_follow_the_dtype_and_the_scale(dtype, error, caught):
    with jax.enable_x64(True):
        inputs = jnp.ones((1, 2, 1), dtype).at[0, 0, 0].set(1 + error)
        for scale in (1e-20, 1.0, 1e20):

            def f(x, mask, scale=scale):
                return x[:, 0] * jnp.asarray(scale, x.dtype)

            def check(f=f):
                contracts.assert_permutation_invariant(f, inputs, key=KEY)

            if caught:
                with pytest.raises(AssertionError, match="exceeds the tolerance"):
                    check()
            else:
                check()
        contracts.assert_permutation_invariant(f, inputs, key=KEY, rtol=0.5)


def test_a_changing_shape_is_seen():
    inputs, mask = bags()
    with pytest.raises(AssertionError, match=r"has shape \(3, 8, 2\) where \(3, 5, 2"):
        contracts.assert_padding_invariant(real, inputs, mask)
