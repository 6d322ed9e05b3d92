import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from data import samplers

KEY = jax.random.key(0)
LABELS = np.random.default_rng(0).choice(4, 500, p=[0.5, 0.3, 0.15, 0.05])
# Beyond this a correct sampler fails once in 10,000 keys; the keys are fixed.
ALPHA = 1e-4


# Epochs.


@pytest.mark.parametrize("n,batch_size", [(1, 1), (2, 1), (10, 10), (37, 8), (100, 32)])
def test_every_example_comes_exactly_once_an_epoch(n, batch_size):
    steps = jnp.arange(3 * n)  # 3 * batch_size whole epochs
    indices = jax.vmap(lambda s: samplers.epoch_indices(KEY, s, n, batch_size))(steps)
    assert indices.dtype == jnp.int32
    epochs = np.asarray(indices).reshape(-1, n)
    np.testing.assert_array_equal(
        np.sort(epochs, axis=1), np.tile(np.arange(n), (len(epochs), 1))
    )
    if n >= 37:  # each epoch has an order of its own
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_epoch_indices_depend_on_key_and_step_only():
    draw = jax.jit(
        functools.partial(samplers.epoch_indices, num_examples=1000),
        static_argnames="batch_size",
    )
    first = draw(KEY, 7, batch_size=64)
    np.testing.assert_array_equal(first, draw(KEY, jnp.int32(7), batch_size=64))
    np.testing.assert_array_equal(
        first, samplers.epoch_indices(KEY, 7, 1000, 64)
    )  # not only under jit
    assert (first != draw(KEY, 8, batch_size=64)).any()
    assert (first != draw(jax.random.key(1), 7, batch_size=64)).any()
    # The order is of positions: other batch sizes cut the same sequence elsewhere.
    np.testing.assert_array_equal(
        draw(KEY, 3, batch_size=100),
        np.concatenate([draw(KEY, s, batch_size=50) for s in (6, 7)]),
    )


def test_epoch_indices_after_very_many_steps():
    # step * batch_size is far beyond 32 bits; Python's integers are not bounded.
    n, batch_size, step = 60_000, 4096, 2_000_000_011
    position = step * batch_size
    epoch, offset = divmod(position, n)
    assert n - offset >= batch_size
    # The same place of the same epoch, reached with another batch size.
    words = samplers._random_words(jax.random.fold_in(KEY, epoch % 2**32), n)
    expected = samplers._permute(words, offset + jnp.arange(batch_size), n)
    np.testing.assert_array_equal(
        samplers.epoch_indices(KEY, step, n, batch_size), expected
    )


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_an_epoch_are_equally_likely(n):
    keys = jax.random.split(KEY, 20_000)
    orders = jax.vmap(lambda k: samplers.epoch_indices(k, 0, n, n))(keys)
    codes = np.asarray(orders) @ (n ** np.arange(n))
    counts = np.unique(codes, return_counts=True)[1]
    assert len(counts) == np.prod(np.arange(1, n + 1))
    assert stats.chisquare(counts).pvalue > ALPHA


def test_long_epochs_look_shuffled():
    n, repeats = 200, 1000
    keys = jax.random.split(KEY, repeats)
    orders = np.asarray(jax.vmap(lambda k: samplers.epoch_indices(k, 0, n, n))(keys))
    # What comes first, and how far apart neighbours are (mod n), are uniform.
    firsts = np.bincount(orders[:, 0] // 10, minlength=20)
    assert stats.chisquare(firsts).pvalue > ALPHA
    gaps = (orders[:, 1] - orders[:, 0]) % n - 1
    assert stats.kstest((gaps + 0.5) / (n - 1), "uniform").pvalue > ALPHA
    # Fixed points are Poisson(1); ascents have mean (n-1)/2 and variance (n+1)/12.
    fixed = (orders == np.arange(n)).sum(axis=1)
    assert abs(fixed.mean() - 1) < 4 / np.sqrt(repeats)
    ascents = (np.diff(orders, axis=1) > 0).sum(axis=1)
    deviation = np.sqrt((n + 1) / 12)
    assert abs(ascents.mean() - (n - 1) / 2) < 4 * deviation / np.sqrt(repeats)
    assert abs(ascents.var() / deviation**2 - 1) < 4 * np.sqrt(2 / repeats)


@pytest.mark.parametrize("n,batch_size", [(10, 11), (10, 0), (2**20, 2**12)])
def test_impossible_batch_sizes_are_refused(n, batch_size):
    with pytest.raises(ValueError, match="batch_size must be"):
        samplers.epoch_indices(KEY, 0, n, batch_size)


# Class tables.


def test_class_table_groups_the_examples():
    table = samplers.class_table(LABELS, 6)
    for k in range(6):
        members = table.order[table.start[k] : table.start[k] + table.count[k]]
        np.testing.assert_array_equal(members, np.nonzero(k == LABELS)[0])


@pytest.mark.parametrize("labels", [[], [0, 4], [-1, 0], [[0, 1]]])
def test_class_table_refuses_bad_labels(labels):
    with pytest.raises(ValueError, match="labels must"):
        samplers.class_table(np.array(labels, int), 4)


# Prevalences.


def prevalences(num_classes=4, num_bags=4000, **kwargs):
    drawn = samplers.draw_prevalences(KEY, num_bags, num_classes, **kwargs)
    assert drawn.shape == (num_bags, num_classes) and drawn.dtype == jnp.float32
    drawn = np.asarray(drawn, np.float64)
    assert (drawn >= 0).all()
    np.testing.assert_allclose(drawn.sum(axis=1), 1, atol=1e-5)
    return drawn


@pytest.mark.parametrize(
    "num_classes,kwargs,alpha",
    [
        (2, {}, [1, 1]),
        (5, {"protocol": "uniform"}, [1] * 5),
        (3, {"protocol": "dirichlet"}, [1] * 3),
        (4, {"protocol": "dirichlet", "concentration": 0.3}, [0.3] * 4),
        (
            3,
            {"protocol": "dirichlet", "concentration": np.array([0.5, 2.0, 7.0])},
            [0.5, 2, 7],
        ),
    ],
)
def test_marginals_are_those_of_the_dirichlet_distribution(num_classes, kwargs, alpha):
    drawn = prevalences(num_classes, **kwargs)
    for k, a in enumerate(alpha):
        beta = stats.beta(a, sum(alpha) - a)
        assert stats.kstest(drawn[:, k], beta.cdf).pvalue > ALPHA
    # Sums of two coordinates are Beta as well: the coordinates depend as they should.
    if num_classes > 2:
        beta = stats.beta(alpha[0] + alpha[1], sum(alpha[2:]))
        assert stats.kstest(drawn[:, :2].sum(axis=1), beta.cdf).pvalue > ALPHA


def test_natural_prevalences_are_those_of_independent_draws():
    natural, bag_size = np.array([0.6, 0.25, 0.15, 0.0]), 20
    drawn = prevalences(protocol="natural", natural=natural, bag_size=bag_size)
    counts = drawn * bag_size
    np.testing.assert_allclose(counts, counts.round(), atol=1e-4)
    assert (counts[:, 3] == 0).all()
    for k in range(3):
        found = np.bincount(counts[:, k].round().astype(int), minlength=bag_size + 1)
        expected = stats.binom.pmf(np.arange(bag_size + 1), bag_size, natural[k])
        often = expected * len(drawn) >= 5
        table = np.array([found, expected * len(drawn)])
        table = np.column_stack([table[:, often], table[:, ~often].sum(axis=1)])
        assert stats.chisquare(*table).pvalue > ALPHA
    covariance = np.cov(counts[:, 0], counts[:, 1])[0, 1]
    assert covariance == pytest.approx(-bag_size * 0.6 * 0.25, rel=0.15)


def test_grid_prevalences_are_uniform_over_the_grid():
    drawn = prevalences(3, protocol="grid", grid_points=5) * 4
    np.testing.assert_array_equal(drawn, drawn.round())
    counts = np.unique(drawn, axis=0, return_counts=True)[1]
    assert len(counts) == 15  # binomial(6, 2)
    assert stats.chisquare(counts).pvalue > ALPHA


def test_published_prevalences_are_not_uniform():
    drawn = prevalences(10, 20_000, protocol="published", bag_size=500)
    counts = 500 * drawn
    np.testing.assert_allclose(counts, counts.round(), atol=1e-3)
    np.testing.assert_allclose(drawn.sum(1), 1, rtol=1e-5)
    # As the published code does it.
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.integers(5, 495, (20_000, 9)), axis=1)
    expected = np.diff(cuts, prepend=0, append=500, axis=1) / 500
    np.testing.assert_allclose(drawn.mean(0), expected.mean(0), atol=0.003)
    for k in (0, 4, 9):
        assert stats.ks_2samp(drawn[:, k], expected[:, k]).pvalue > ALPHA
    assert drawn[:, 0].min() > 0 and drawn[:, 9].min() > 0
    assert drawn[:, [0, 9]].mean() > 1.08 * drawn[:, 1:9].mean()


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"protocol": "app"}, "protocol must be"),
        ({"protocol": "natural", "bag_size": 5}, "needs natural and bag_size"),
        ({"protocol": "natural", "bag_size": 5, "natural": np.ones(3) / 3}, "shape"),
        ({"protocol": "grid", "grid_points": 1}, "grid_points must be"),
        ({"protocol": "published"}, "needs a bag_size of 2 or more"),
        ({"protocol": "published", "bag_size": 1}, "needs a bag_size of 2 or more"),
    ],
)
def test_incomplete_protocols_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        samplers.draw_prevalences(KEY, 2, 4, **kwargs)


# Bags.

draw_bags = jax.jit(samplers.draw_bags, static_argnames=("bag_size", "replace"))


def recount(indices, num_classes):
    return np.stack([np.bincount(LABELS[i], minlength=num_classes) for i in indices])


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("bag_size,num_classes", [(1, 6), (7, 4), (500, 6)])
def test_the_label_is_the_bags_own_prevalence(replace, bag_size, num_classes):
    table = samplers.class_table(LABELS, num_classes)  # classes 4 and 5 are empty
    asked = prevalences(num_classes, 40, protocol="dirichlet", concentration=0.3)
    asked[0] = np.eye(num_classes)[-1]  # one class only: a rare or an empty one
    draw = functools.partial(
        draw_bags,
        table=table,
        prevalences=jnp.asarray(asked, jnp.float32),
        bag_size=bag_size,
        replace=replace,
    )
    indices, label = draw(KEY)
    assert indices.shape == (40, bag_size) and indices.dtype == jnp.int32
    assert label.shape == asked.shape and label.dtype == jnp.float32
    assert indices.min() >= 0 and indices.max() < len(LABELS)
    indices = np.asarray(indices)
    # Within half an ulp or so: compiled, a division is a product by the reciprocal.
    expected = recount(indices, num_classes) / bag_size
    np.testing.assert_allclose(label, expected, rtol=2e-7, atol=0)
    if not replace:
        assert all(len(np.unique(bag)) == bag_size for bag in indices)
    np.testing.assert_array_equal(indices, draw(KEY)[0])
    assert (indices != draw(jax.random.key(1))[0]).any()


def largest_remainder(share, total):
    exact = share * total
    counts = np.floor(exact)
    for k in np.argsort(-(exact - counts), kind="stable")[: int(total - counts.sum())]:
        counts[k] += 1
    return counts


@pytest.mark.parametrize("replace", [True, False])
def test_counts_are_the_largest_remainder_rounding(replace):
    table = samplers.class_table(LABELS, 4)
    asked = prevalences(4, 200)
    bag_size = 20  # every class has as many
    indices, _ = draw_bags(KEY, table, asked, bag_size, replace=replace)
    expected = [largest_remainder(p, bag_size) for p in asked]
    np.testing.assert_array_equal(recount(np.asarray(indices), 4), expected)


def test_equal_remainders_favour_no_class():
    table = samplers.class_table(LABELS, 4)
    asked = jnp.full((4000, 4), 0.25)
    _, label = draw_bags(KEY, table, asked, 1)
    np.testing.assert_allclose(label.mean(0), 0.25, atol=0.03)
    _, label = draw_bags(KEY, table, asked, 6)
    np.testing.assert_allclose(label.mean(0), 0.25, atol=0.01)
    assert sorted(np.unique(label)) == [np.float32(1 / 6), np.float32(2 / 6)]


def test_prevalences_that_the_bag_can_have_are_kept():
    table = samplers.class_table(LABELS, 4)
    asked = samplers.draw_prevalences(
        KEY, 200, 4, protocol="natural", natural=jnp.full(4, 0.25), bag_size=49
    )
    _, label = draw_bags(KEY, table, asked, 49)
    np.testing.assert_allclose(label, asked, rtol=2e-7, atol=0)


def test_an_empty_class_gives_its_share_in_proportion():
    table = samplers.class_table(np.array([0, 0, 2]), 3)
    _, label = draw_bags(KEY, table, jnp.array([[0.3, 0.6, 0.1]]), 40)
    np.testing.assert_array_equal(label, [[0.75, 0.0, 0.25]])


def test_without_replacement_a_short_class_is_taken_whole():
    table = samplers.class_table(LABELS, 4)
    count = np.asarray(table.count)
    asked = jnp.array([[0.0, 0.0, 0.0, 1.0], [0.0, 0.5, 0.0, 0.5]])
    indices, _ = draw_bags(KEY, table, asked, 200, replace=False)
    found = recount(np.asarray(indices), 4)
    assert (found[:, 3] == count[3]).all()
    # The rest of the first bag is in proportion to what the other classes have.
    expected = (200 - count[3]) * count[:3] / count[:3].sum()
    assert np.abs(found[0, :3] - expected).max() <= 1


@pytest.mark.parametrize("replace", [True, False])
def test_examples_of_a_class_are_equally_likely(replace):
    labels = np.repeat([0, 1], [7, 50])
    table = samplers.class_table(labels, 2)
    asked = jnp.full((3000, 2), 0.5)
    indices, _ = draw_bags(KEY, table, asked, 8, replace=replace)
    counts = np.bincount(np.asarray(indices).ravel(), minlength=57)
    for k in range(2):
        found = counts[labels == k]
        assert found.sum() == 3000 * 4
        assert stats.chisquare(found).pvalue > ALPHA


@pytest.mark.parametrize("replace", [True, False])
def test_the_order_of_a_bag_tells_nothing(replace):
    table = samplers.class_table(LABELS, 4)
    asked = jnp.tile(jnp.array([[0.4, 0.3, 0.2, 0.1]]), (2000, 1))
    indices, _ = draw_bags(KEY, table, asked, 10, replace=replace)
    assert len(np.unique(np.asarray(indices), axis=0)) == 2000  # no two bags alike
    classes = LABELS[np.asarray(indices)]  # [bag, element]
    # Each class is as often at each place,
    for k in range(4):
        assert stats.chisquare((classes == k).sum(axis=0)).pvalue > ALPHA
    # and neighbours agree as often as in a shuffled bag: sum of c(c-1)/(m(m-1)).
    agree = (classes[:, 1:] == classes[:, :-1]).mean()
    expected = (4 * 3 + 3 * 2 + 2 * 1) / 90
    assert abs(agree - expected) < 0.02


@pytest.mark.parametrize(
    "shape,bag_size,replace,message",
    [
        ((3, 5), 10, True, "prevalences must have shape"),
        ((4,), 10, True, "prevalences must have shape"),
        ((3, 4), 0, True, "bag_size must be at least 1, got 0"),
        ((3, 4), 501, False, "at most 500"),
    ],
)
def test_impossible_bags_are_refused(shape, bag_size, replace, message):
    table = samplers.class_table(LABELS, 4)
    with pytest.raises(ValueError, match=message):
        draw_bags(KEY, table, jnp.ones(shape) / 4, bag_size, replace=replace)


# Mixtures.


def test_mixtures_of_single_examples_have_the_prevalences_aimed_at():
    labels = jnp.asarray(LABELS[:64])
    bags = jax.nn.one_hot(labels, 4)
    targets = samplers.draw_prevalences(KEY, 2000, 4)
    weights = samplers.mixture_weights(jax.random.key(1), bags, targets)
    assert weights.shape == (2000, 64)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    assert (weights >= 0).all()
    mixed = weights @ bags
    # Within a class the weights are random, so the prevalences scatter around the aim.
    np.testing.assert_allclose(mixed.mean(0), targets.mean(0), atol=0.03)
    for k in range(4):
        assert np.corrcoef(mixed[:, k], targets[:, k])[0, 1] > 0.8


def test_mixtures_of_a_class_that_is_absent_are_still_weights():
    bags = jnp.tile(jnp.array([[1.0, 0.0]]), (5, 1))
    weights = samplers.mixture_weights(KEY, bags, jnp.array([[0.0, 1.0]]))
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
    assert (weights > 0).all()


def test_mixtures_differ_from_one_another():
    bags = jax.nn.one_hot(jnp.arange(6) % 2, 2)
    targets = jnp.full((2, 2), 0.5)
    first, second = samplers.mixture_weights(KEY, bags, targets)
    assert (jnp.abs(first - second) > 1e-3).any()


# Bags made of bags.

# 40 bags of 4 to 30 of 30 examples of two classes; an example is 100 times its class.
SIZES = np.random.default_rng(1).integers(4, 31, 40)
PLACES = np.arange(30) < SIZES[:, None]
MEMBERS = np.random.default_rng(2).random((40, 30)) < np.linspace(0, 1, 40)[:, None]
SHARE = (MEMBERS & PLACES).sum(1) / SIZES
PREVALENCES = np.stack([1 - SHARE, SHARE], axis=1).astype(np.float32)


def make(function, num_bags=500, *, sizes=SIZES, **kwargs):
    draw = functools.partial(function, num_bags=num_bags, length=30, **kwargs)
    return jax.jit(draw)(KEY, jnp.asarray(PREVALENCES), jnp.asarray(sizes))


def own_share(bags):
    """Share of the second class in the examples of each bag."""
    members = MEMBERS[bags.bag, bags.element] & np.asarray(bags.mask)
    return members.sum(1) / bags.mask.sum(1)


@pytest.mark.parametrize(
    "function,kwargs",
    [
        (samplers.draw_whole_bags, {}),
        (samplers.mix_bags, {"real_bags": 1.0}),
        (samplers.join_bags, {"real_bags": 0.0}),
        (samplers.join_bags, {"real_bags": 0.4}),
    ],
)
def test_whole_bags_have_exact_labels(function, kwargs):
    bags = make(function, **kwargs)
    mask = np.asarray(bags.mask)
    assert PLACES[bags.bag, bags.element][mask].all()
    np.testing.assert_allclose(bags.prevalence[:, 1], own_share(bags), atol=1e-6)
    np.testing.assert_allclose(bags.prevalence.sum(1), 1, rtol=1e-6)


def test_joined_bags_are_two_bags_and_the_share_asked_for_is_one():
    bags = make(samplers.join_bags, 2000, real_bags=0.4)
    assert bags.bag.shape == (2000, 60)
    second = np.asarray(bags.mask)[:, 30:].any(1)
    assert stats.binomtest(int((~second).sum()), 2000, 0.4).pvalue > ALPHA
    sizes = SIZES[bags.bag[:, 0]] + second * SIZES[bags.bag[:, 59]]
    np.testing.assert_array_equal(bags.mask.sum(1), sizes)


def test_the_published_mixer_draws_from_two_bags_and_its_labels_are_noisy():
    sizes = np.full(40, 30)
    bags = make(samplers.mix_bags, 4000, sizes=sizes, real_bags=0.1)
    assert bags.bag.shape == (4000, 30) and np.asarray(bags.mask).all()
    order = np.asarray(bags.element)
    real = (order == np.arange(30)).all(1)
    assert stats.binomtest(int(real.sum()), 4000, 0.1).pvalue > ALPHA
    mixed = np.asarray(bags.bag)[~real]
    pair = np.stack([mixed.min(1), mixed.max(1)], 1)
    assert ((mixed == pair[:, :1]) | (mixed == pair[:, 1:])).all()
    label = np.asarray(bags.prevalence)[~real]
    two = (pair[:, 0] != pair[:, 1])[:, None]
    expected = PREVALENCES[pair].mean(1)
    np.testing.assert_allclose(label[two[:, 0]], expected[two[:, 0]], atol=1e-6)
    members = MEMBERS[mixed, order[~real]].mean(1)
    truth = (MEMBERS[:, :30].mean(1))[pair].mean(1)
    noise = (members - truth)[two[:, 0]]
    q = truth[two[:, 0]]
    # Binomial: examples are drawn with replacement.
    assert abs(noise.mean()) < 0.01
    assert noise.std() == pytest.approx(np.sqrt((q * (1 - q) / 30).mean()), rel=0.05)


def test_the_label_noise_of_the_published_mixer_on_bags_of_250():
    """Mean absolute error of the labels of T1A: 0.022."""
    rng = np.random.default_rng(0)
    share = rng.random(200)
    members = np.arange(250) < np.round(250 * share)[:, None]
    prevalence = np.stack([1 - members.mean(1), members.mean(1)], 1)
    draw = functools.partial(
        samplers.mix_bags, num_bags=3000, length=250, real_bags=0.0
    )
    bags = jax.jit(draw)(KEY, jnp.asarray(prevalence), jnp.full(200, 250))
    own = members[bags.bag, bags.element].mean(1)
    assert abs(own - bags.prevalence[:, 1]).mean() == pytest.approx(0.022, abs=0.001)


@pytest.mark.parametrize("num_mixtures", [6, 20])
def test_pair_weights_mix_two_bags_at_most(num_mixtures):
    keys = jax.random.split(KEY, 300)
    draw = functools.partial(
        samplers.pair_weights, num_mixtures=num_mixtures, num_bags=6, real_bags=0.3
    )
    weights = np.asarray(jax.jit(jax.vmap(draw))(keys)).reshape(-1, 6)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    assert (weights >= 0).all()
    number = (weights > 0).sum(1)
    assert set(number) == {1, 2}
    alone = int((number == 1).sum())
    assert stats.binomtest(alone, len(weights), 0.3).pvalue > ALPHA
    larger = weights[number == 2].max(1)  # max(w, 1 - w) is uniform in [1/2, 1]
    assert stats.kstest(larger, stats.uniform(0.5, 0.5).cdf).pvalue > ALPHA


def test_tilted_bags_move_by_the_strength_and_keep_the_classes_of_a_position():
    rng = np.random.default_rng(0)
    positions = rng.normal(size=(20_000, 2)).astype(np.float32)
    # P(y = 1 | x) depends on the first coordinate alone.
    odds = 1 / (1 + np.exp(-2 * positions[:, 0]))
    labels = jnp.asarray((rng.uniform(size=len(odds)) < odds).astype(np.int32))
    draw = jax.jit(
        functools.partial(
            samplers.draw_tilted_bags,
            num_classes=2,
            num_bags=200,
            bag_size=400,
            strength=1.5,
        )
    )
    indices, prevalence = draw(KEY, jnp.asarray(positions), labels)
    np.testing.assert_allclose(
        prevalence[:, 1], np.asarray(labels)[indices].mean(1), atol=1e-6
    )
    # Of normal positions the tilt s moves the mean by s: here by s ~ U(0, 1.5).
    moved = np.linalg.norm(positions[indices].mean(1), axis=1)
    assert abs(moved.mean() - 0.75) < 0.08 and 1.2 < moved.max() < 1.7
    # The classes of the examples at a position are those of the whole dataset.
    first, drawn = positions[indices, 0].ravel(), np.asarray(labels)[indices].ravel()
    for low in (-1.0, 0.0, 1.0):
        there = (first > low) & (first < low + 0.2)
        of_all = (positions[:, 0] > low) & (positions[:, 0] < low + 0.2)
        assert abs(drawn[there].mean() - np.asarray(labels)[of_all].mean()) < 0.03
    # And the prevalences shift with the inputs.
    assert prevalence[:, 1].std() > 0.1


def test_whitened_components_have_unit_variance_and_the_most_variance():
    sizes = {"train": 500, "test": 40}
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(6, 6)) * np.array([5, 3, 1, 1, 1, 1])[:, None]
    inputs = {s: rng.normal(size=(n, 6)) @ mixing + 4 for s, n in sizes.items()}
    shaped = {split: x.reshape(-1, 2, 3) for split, x in inputs.items()}
    found = samplers.whitened_components(shaped, 3)
    assert {split: x.shape for split, x in found.items()} == {
        split: (n, 3) for split, n in sizes.items()
    }
    np.testing.assert_allclose(found["train"].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(np.cov(found["train"].T), np.eye(3), atol=1e-4)
    # The eigenvectors of the covariance of the train split, up to their signs.
    variances, vectors = np.linalg.eigh(np.cov(inputs["train"].T))
    mean = inputs["train"].mean(0)
    for split, values in inputs.items():
        expected = (values - mean) @ vectors[:, :-4:-1] / np.sqrt(variances[:-4:-1])
        np.testing.assert_allclose(abs(found[split]), abs(expected), atol=1e-3)
    few = {split: x[:2] for split, x in inputs.items()}
    assert samplers.whitened_components(few, 9)["test"].shape == (2, 2)


def test_without_strength_tilted_bags_are_drawn_evenly():
    positions = jax.random.normal(KEY, (50, 3))
    labels = jnp.arange(50) % 5
    indices, _ = samplers.draw_tilted_bags(KEY, positions, labels, 5, 100, 500, 0.0)
    counts = np.bincount(np.asarray(indices).ravel(), minlength=50)
    assert abs(counts / 1000 - 1).max() < 0.15


# Groups of sequences of alike lengths.

LENGTHS = np.sort(np.random.default_rng(3).geometric(0.1, 200))


def padded_steps(lengths, stops):
    groups = np.split(lengths, stops)
    return sum(len(group) * group.max() for group in groups if len(group))


@pytest.mark.parametrize(("num_buckets", "min_size"), [(1, 1), (3, 1), (3, 4), (9, 3)])
def test_no_other_cut_has_less_padding(num_buckets, min_size):
    lengths = np.sort(np.random.default_rng(num_buckets).integers(1, 9, 14))
    buckets = samplers.length_buckets(lengths, num_buckets, min_size)
    assert 1 <= len(buckets) <= num_buckets
    assert buckets[0][0] == 0 and buckets[-1][1] == len(lengths)
    for (start, stop, length), following in itertools.zip_longest(buckets, buckets[1:]):
        assert stop - start >= min_size
        assert length == lengths[start:stop].max()
        assert following is None or following[0] == stop
    best = min(
        padded_steps(lengths, stops)
        for k in range(num_buckets)
        for stops in itertools.combinations(range(1, len(lengths)), k)
        if np.diff([0, *stops, len(lengths)]).min() >= min_size
        # Examples of one length stay together.
        and all(lengths[s - 1] < lengths[s] for s in stops)
    )
    assert sum((b - a) * length for a, b, length in buckets) == best


def test_buckets_save_padding():
    lengths = LENGTHS
    steps = [
        sum((b - a) * length for a, b, length in samplers.length_buckets(lengths, k, 8))
        for k in (1, 2, 4, 8)
    ]
    assert steps[0] == len(lengths) * lengths.max()
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] < 1.25 * lengths.sum()


def test_few_examples_are_one_bucket():
    assert samplers.length_buckets([2, 3], 4, 10) == ((0, 2, 3),)


@pytest.mark.parametrize(
    ("lengths", "num_buckets"), [([2, 1], 1), ([], 1), ([[1]], 1), ([1], 0)]
)
def test_impossible_buckets_are_refused(lengths, num_buckets):
    with pytest.raises(ValueError, match="lengths must be|num_buckets and min_size"):
        samplers.length_buckets(lengths, num_buckets)


def test_an_epoch_of_buckets_visits_examples_once():
    buckets = ((0, 50, 3), (50, 57, 5), (57, 200, 9))
    batch_size = 7
    batches = 50 // 7 + 1 + 143 // 7
    draw = functools.partial(
        samplers.bucketed_batch, buckets=buckets, batch_size=batch_size
    )
    steps = jnp.arange(4 * batches)
    which, indices = jax.jit(jax.vmap(draw, (None, 0)))(KEY, steps)
    assert which.dtype == indices.dtype == jnp.int32
    which, indices = np.asarray(which), np.asarray(indices)
    bounds = np.array(buckets)[which]
    assert (bounds[:, :1] <= indices).all() and (indices < bounds[:, 1:2]).all()
    epochs = indices.reshape(4, -1)
    for epoch in epochs:
        assert len(set(epoch)) == batches * batch_size  # none twice
    orders = which.reshape(4, -1)
    for order in orders:
        np.testing.assert_array_equal(np.bincount(order), [7, 1, 20])
    assert len({tuple(order) for order in orders}) == 4
    # What is left over is not the same each time.
    assert len(np.unique(epochs)) == 200
    np.testing.assert_array_equal(draw(KEY, 5)[1], indices[5])
    assert (draw(jax.random.key(1), 5)[1] != indices[5]).any()


@pytest.mark.parametrize("batch_size", [0, 5])
def test_a_batch_must_fit_the_smallest_bucket(batch_size):
    with pytest.raises(ValueError, match=r"1\.\.4, the size of the smallest bucket"):
        samplers.bucketed_batch(KEY, 0, ((0, 9, 1), (9, 13, 2)), batch_size)


# Streams.


@pytest.mark.parametrize(
    ("size", "batch", "time"), [(61, 3, 5), (60, 3, 5), (26, 1, 5)]
)
def test_rows_of_a_stream_go_on_where_they_were(size, batch, time):
    stream = jnp.arange(size)
    windows = (size - 1) // (batch * time)
    step = jax.jit(
        functools.partial(samplers.stream_batch, batch_size=batch, time=time)
    )
    found = [jax.device_get(step(s, stream)) for s in range(2 * windows)]
    for epoch in (found[:windows], found[windows:]):
        rows = np.concatenate([b["inputs"] for b in epoch], axis=1)
        part = windows * time
        np.testing.assert_array_equal(rows, np.arange(batch * part).reshape(batch, -1))
        assert [bool(b["reset"]) for b in epoch] == [True] + [False] * (windows - 1)
        for b in epoch:
            np.testing.assert_array_equal(b["targets"], b["inputs"] + 1)
            np.testing.assert_array_equal(b["lengths"], [time] * batch)


def test_random_windows_come_from_everywhere():
    stream = jnp.arange(30) * 2
    windows = samplers.random_windows(KEY, stream, 4000, 6)
    np.testing.assert_array_equal(windows["targets"], windows["inputs"] + 2)
    np.testing.assert_array_equal(np.diff(windows["inputs"], axis=1), 2)
    starts = np.asarray(windows["inputs"][:, 0]) // 2
    assert stats.chisquare(np.bincount(starts, minlength=24)).pvalue > ALPHA
    assert windows["targets"].max() == 58


def test_streams_that_are_too_short_are_refused():
    with pytest.raises(ValueError, match="below the stream's length 15, got 3 and 5"):
        samplers.stream_batch(0, jnp.arange(15), 3, 5)
    with pytest.raises(ValueError, match=r"time must be in 1\.\.4.*got 5"):
        samplers.random_windows(KEY, jnp.arange(5), 2, 5)
