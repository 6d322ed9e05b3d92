"""The contracts hold for what keeps them and catch what breaks them."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import archs
from archs import contracts
from archs.pooling import mean_pool, merge_aggregates, std_pool, sum_pool

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


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_mean_keeps_the_contracts_of_multisets(dtype, with_mask):
    inputs, mask = bags(dtype)
    mask = mask if with_mask else None
    contracts.assert_batch_independent(mean, inputs, mask)
    contracts.assert_duplication(mean, inputs, mask)
    contracts.assert_duplication(lambda x, m: sum_pool(x, m), inputs, mask, factor=2)
    contracts.assert_weights_are_multiplicities(mean_pool, inputs, mask, key=KEY)
    contracts.assert_chunk_invariant(mean_pool, merge_aggregates, inputs, mask, key=KEY)


def largest_by_first_feature(x, mask):
    index = jnp.argmax(x[..., :1], axis=1, keepdims=True)
    return jnp.take_along_axis(x, index, axis=1)[:, 0]


def test_an_order_that_only_ties_show_is_seen():
    inputs, _ = bags()
    with pytest.raises(AssertionError, match="permutation invariance at ties is viol"):
        contracts.assert_permutation_invariant(
            largest_by_first_feature, inputs, key=KEY
        )


def is_sorted(x, mask):
    return jnp.all(jnp.diff(x[..., 0], axis=1) >= 0, axis=1) * 1.0


def test_an_order_that_only_sorted_elements_show_is_seen():
    inputs = jax.random.normal(KEY, (3, 9, 2))
    with pytest.raises(AssertionError, match="permutation invariance"):
        contracts.assert_permutation_invariant(is_sorted, inputs, key=KEY)


def test_bags_that_meet_are_seen():
    inputs, mask = bags()
    with pytest.raises(AssertionError, match=r"^batch independence is violated: out"):
        contracts.assert_batch_independent(mixes_bags, inputs, mask)


@pytest.mark.parametrize(("pool", "factor"), [(sum_pool, 1.0), (mean_pool, 2.0)])
def test_duplicates_that_count_otherwise_are_seen(pool, factor):
    inputs, mask = bags()
    with pytest.raises(AssertionError, match=rf"duplication \(factor {factor:g}\) is"):
        contracts.assert_duplication(pool, inputs, mask, factor=factor)


def importance_weights(x, mask, weights):
    # Weights that are normalised by their number instead of their sum.
    return mean_pool(x if weights is None else x * weights[..., None], mask)


def keeps_absent_elements(x, mask, weights):
    if weights is None:
        return mean_pool(x, mask)
    weights = jnp.where(mask, weights, 0)[..., None]
    total = jnp.maximum(weights.sum(1), 1)
    return (real(x, mask) * weights).sum(1) / total


def ignores_weights(x, mask, weights):
    return mean_pool(x, mask if weights is None else mask & (weights > 0))


def infinite_in_the_weights(x, mask, weights):
    if weights is None:
        return sum_pool(x, mask)
    # The derivative of the square root of zero.
    root = jnp.sqrt(jnp.where(mask, weights, 0))[..., None]
    return (jnp.where(root > 0, x, 0) * root**2).sum(1) + 0 * root.sum(1)


@pytest.mark.parametrize(
    ("f", "sentence"),
    [
        (ignores_weights, "multiplicity of weights is violated"),
        (importance_weights, "multiplicity of weights is violated: .* nan"),
        (keeps_absent_elements, "multiplicity of weights is violated: .* nan"),
        (infinite_in_the_weights, "gradient of the weights is violated"),
    ],
)
def test_weights_that_are_no_multiplicities_are_seen(f, sentence):
    inputs, mask = bags()
    with pytest.raises(AssertionError, match=sentence):
        contracts.assert_weights_are_multiplicities(f, inputs, mask, key=KEY)


def test_chunks_that_do_not_add_up_are_seen():
    inputs, mask = bags()

    def mean_of_parts(representations, totals):
        return representations.mean(0)

    for aggregate, merge in (
        (mean_pool, mean_of_parts),
        (lambda x, m, w: std_pool(x, m, w), merge_aggregates),
    ):
        with pytest.raises(AssertionError, match="chunk invariance is violated"):
            contracts.assert_chunk_invariant(aggregate, merge, inputs, mask, key=KEY)


@pytest.mark.parametrize("worst", [0.3, np.nan])
def test_an_error_that_grows_with_the_set_is_seen(worst):
    errors = {10: 0.01, 100: worst, 1000: 0.2}
    contracts.assert_size_generalization(errors.get, (10,), bound=0.1)
    with pytest.raises(AssertionError) as error:
        contracts.assert_size_generalization(errors.get, errors, bound=0.1)
    assert str(error.value) == (
        f"size generalization is violated: at set size 100 the error is {worst:.4g}, "
        "which exceeds the bound 0.1 (sizes tried: 10, 100, 1000)."
    )


@pytest.mark.parametrize(("size", "caught"), [(4, True), (10**6, False)])
def test_tolerances_grow_with_the_root_of_the_set_size(size, caught):
    # 1e-4 is no rounding error of a few terms, but may be one of a million.
    inputs = np.zeros((1, size, 1), np.float32)
    inputs[0, 0] = 1e-4

    def f(x, mask):
        return 1 + x[:, 0]

    if caught:
        with pytest.raises(AssertionError, match="exceeds the tolerance"):
            contracts.assert_permutation_invariant(f, inputs, key=KEY)
    else:
        contracts.assert_permutation_invariant(f, inputs, key=KEY)


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


def mean_over_orders(orders):
    """Janossy pooling: a recurrent network that reads the elements in given orders."""

    @jax.jit
    def f(x, mask):
        real = jnp.ones(x.shape[:2], bool) if mask is None else mask

        def step(state, i):
            new = jnp.tanh(0.5 * state + x[:, i])
            return jnp.where(real[:, i, None], new, state), None

        def last_state(order):
            return jax.lax.scan(step, jnp.zeros_like(x[:, 0]), order)[0]

        return jax.vmap(last_state)(orders).mean(0)

    return f


@pytest.mark.parametrize("with_mask", [False, True])
def test_a_mean_over_some_of_the_orders_is_seen(with_mask):
    inputs, mask = bags()
    mask = mask if with_mask else None
    orders = np.random.default_rng(0).permutation([*itertools.permutations(range(5))])

    def check(count):
        f = mean_over_orders(orders[:count])
        contracts.assert_permutation_invariant(f, inputs, mask, key=KEY)

    check(120)  # all there are
    for count in (1, 4, 60):
        with pytest.raises(AssertionError, match="permutation invariance is violated"):
            check(count)


SLOTS = jnp.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]])


def slot_attention(
    x, mask, *, slots=SLOTS, mask_logits=False, renormalise=True, epsilon=1e-8
):
    # The softmax is over the slots, which are the queries, and not over the elements.
    x = real(x, mask)
    logits = jnp.einsum("sd,bed->bse", slots, x)
    mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
    if mask_logits:
        logits = jnp.where(mask[:, None], logits, jnp.finfo(x.dtype).min)
    attention = jax.nn.softmax(logits, axis=1)
    if not mask_logits:
        attention = jnp.where(mask[:, None], attention, 0)
    if renormalise:
        attention /= attention.sum(-1, keepdims=True) + epsilon
    return jnp.einsum("bse,bed->bsd", attention, x)


@pytest.mark.parametrize(
    ("fault", "check", "sentence"),
    [
        # Every element spreads a mass of one over the slots, so copies add up.
        (
            {"renormalise": False},
            lambda f: contracts.assert_duplication(f, *bags()),
            r"duplication \(factor 1\) is violated",
        ),
        # Equally low logits of padding for all slots are equal shares, not zeros.
        (
            {"mask_logits": True},
            lambda f: contracts.assert_padding_invariant(f, *bags()),
            r"padding invariance \(padding of 0\) is violated",
        ),
        (
            {"epsilon": 0.0},
            lambda f: contracts.assert_finite_on_empty_set(f, bags()[0]),
            "finite output on the empty set is violated: .* is nan",
        ),
    ],
    ids=["not renormalised", "masked logits", "no epsilon"],
)
def test_slots_that_compete_for_elements_wrongly_are_seen(fault, check, sentence):
    check(slot_attention)
    with pytest.raises(AssertionError, match=sentence):
        check(functools.partial(slot_attention, **fault))


def test_slots_drawn_anew_at_each_call_are_seen():
    inputs, mask = bags()
    keys = iter(jax.random.split(KEY, 20))

    def check(key):
        def f(x, mask):
            return slot_attention(x, mask, slots=jax.random.normal(key(), (3, 2)))

        contracts.assert_permutation_invariant(f, inputs, mask, key=KEY)

    check(lambda: KEY)
    with pytest.raises(AssertionError, match="permutation invariance is violated"):
        check(lambda: next(keys))


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


def mean_step(x, lengths):
    return mean_pool(x, jnp.arange(x.shape[1]) < lengths[:, None])


def running_sum(x, lengths):
    real = jnp.arange(x.shape[1]) < lengths[:, None]
    return jnp.cumsum(jnp.where(real[..., None], x, 0), 1)


@pytest.mark.parametrize("f", [mean_step, running_sum])
def test_sequences_keep_to_their_lengths(f):
    contracts.assert_sequence_padding_invariant(f, bags()[0])


@pytest.mark.parametrize(
    "f",
    [
        lambda x, lengths: x.mean(1),
        lambda x, lengths: x[:, -1],
        # NaN times zero is NaN.
        lambda x, n: (x * (jnp.arange(x.shape[1]) < n[:, None])[..., None]).sum(1),
        # Each step sees the next.
        lambda x, lengths: jnp.roll(x, -1, 1),
    ],
    ids=["mean", "last", "product", "next"],
)
def test_padding_that_leaks_into_a_sequence_is_seen(f):
    with pytest.raises(AssertionError, match="padding invariance of a sequence"):
        contracts.assert_sequence_padding_invariant(f, bags()[0])


def test_padding_of_tokens_that_leaks_is_seen():
    tokens = jnp.array([[1, 2, 3, 4], [4, 3, 2, 1]])

    def count(tokens, lengths):
        real = jnp.arange(tokens.shape[1]) < lengths[:, None]
        return jnp.where(real, tokens, 0).sum(1, dtype=jnp.float32)

    contracts.assert_sequence_padding_invariant(count, tokens)
    with pytest.raises(AssertionError, match="padding invariance of a sequence"):
        # Zeros at the end are nothing, others are.
        contracts.assert_sequence_padding_invariant(
            lambda tokens, _: tokens.sum(1, dtype=jnp.float32), tokens
        )


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


def test_small_outputs_beside_large_ones_are_measured_apart():
    inputs, _ = bags()

    def f(x, mask):
        return 1e7 + x.mean(1), x[:, 0]

    with pytest.raises(AssertionError, match="permutation invariance"):
        contracts.assert_permutation_invariant(f, inputs, key=KEY)


def test_nothing_to_permute_is_refused():
    for contract in (
        contracts.assert_permutation_invariant,
        contracts.assert_permutation_equivariant,
    ):
        with pytest.raises(ValueError, match="bags with elements to be permuted"):
            contract(lambda x, mask: x, jnp.ones((2, 0, 3)), key=KEY)


@pytest.mark.parametrize(
    "contract",
    [contracts.assert_finite_on_empty_set, contracts.assert_batch_independent],
)
def test_what_compares_bags_needs_two(contract):
    inputs, _ = bags()
    with pytest.raises(ValueError, match="two bags or more"):
        contract(lambda x, mask: x.sum(1), inputs[:1])


def test_padding_among_the_elements_is_tried():
    inputs, _ = bags()

    def first_of_a_run(x, mask):  # right for padding at the front or at the end
        first = jnp.argmax(mask, 1)[:, None] + jnp.arange(x.shape[1] - 3)
        return jnp.take_along_axis(x, first[..., None], 1).sum(1)

    with pytest.raises(AssertionError, match="padding invariance"):
        contracts.assert_padding_invariant(first_of_a_run, inputs)


def test_a_large_bag_hides_no_violation_in_a_small_one():
    inputs = jax.random.normal(KEY, (2, 5, 3)) * jnp.array([1e7, 1.0])[:, None, None]

    def by_order(x, mask):
        return jnp.sum(x, 1) + 1e-3 * x[:, 0] * jnp.array([[0.0], [1.0]])

    with pytest.raises(AssertionError, match=r"output\[1, "):
        contracts.assert_permutation_invariant(by_order, inputs, key=KEY)

    def leaky(x, mask):
        x = jnp.where(mask[..., None], x, 0)
        return x.sum(1) + 1e-3 * (~mask).sum(1, keepdims=True) * jnp.ones(3)

    with pytest.raises(AssertionError, match=r"output\[1, "):
        contracts.assert_padding_invariant(leaky, inputs)


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


@pytest.mark.parametrize(
    ("weights", "error", "sentence"),
    [
        (jnp.ones((2, 3), int), TypeError, "weights must have a floating dtype"),
        (jnp.ones(3), ValueError, r"weights must have shape \(2, 3\).* is \(3,\)"),
    ],
)
def test_wrong_weights_are_refused(weights, error, sentence):
    with pytest.raises(error, match=sentence):
        contracts.check_weights(weights, (2, 3))
    contracts.check_weights(None, (2, 3))


def test_present_elements_are_real_and_weigh_something():
    mask = jnp.array([True, True, False])
    weights = jnp.array([0.0, 2.0, 1.0])
    assert contracts.present(None, None) is None
    assert contracts.present(mask, None) is mask
    assert contracts.present(None, weights).tolist() == [False, True, True]
    assert contracts.present(mask, weights).tolist() == [False, True, False]


# What the networks learn.

PHI, HEAD = archs.MLP((8,), 4), archs.MLP((8,), 3)
NETWORKS = {
    "DeepSets": archs.DeepSets(PHI, HEAD, ("mean", "max", "median")),
    "EquivariantNetwork": archs.EquivariantNetwork(
        archs.EquivariantLayer(4), head=HEAD, aggregation="mean"
    ),
    "SAB": archs.SetTransformer(HEAD, PHI, 8, 2, num_inducing_points=None),
    "ISAB": archs.SetTransformer(HEAD, PHI, 8, 2, num_inducing_points=3),
    "HistNetQ": archs.HistNetQ(
        PHI, archs.LinearHistogram(4), archs.PrevalenceHead((8,), 3)
    ),
    "GMNet": archs.GMNet(
        archs.PrevalenceHead((8,), 3),
        num_spaces=2,
        num_gaussians=4,
        latent_size=2,
        hidden_sizes=(6,),
    ),
    "EMQNet": archs.EMQNet(PHI, 3, num_steps=10),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_parameters_depend_on_no_order_and_no_padding(name):
    inputs, mask = bags()
    model = NETWORKS[name]
    variables = jax.jit(model.init)(KEY, inputs)
    params = variables.pop("params")

    @jax.jit
    def gradient(inputs, mask):
        def loss(params):
            out = model.apply({"params": params, **variables}, inputs, mask)
            return jnp.sum(jnp.sin(3 * out))

        return jax.grad(loss)(params)

    expected = gradient(inputs, mask)
    moved = gradient(inputs[:, ::-1], mask[:, ::-1])
    padded = jnp.where(mask[..., None], inputs, jnp.nan)
    for found in (moved, gradient(padded, mask)):
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    largest = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    assert largest > 1e-3
