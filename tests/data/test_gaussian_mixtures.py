import functools

import jax
import numpy as np
import pytest
from scipy import special, stats

import data

KEY = jax.random.key(0)
# Beyond this a correct sampler fails once in 10,000 keys; the keys are fixed.
ALPHA = 1e-4


def draw(dataset, num_sets, key=KEY, split="train"):
    sample = jax.jit(dataset.sample, static_argnums=(1, 2))
    return jax.device_get(sample(key, num_sets, split, dataset.arrays))


@pytest.fixture(scope="module")
def batch():
    return draw(data.GaussianMixtures(), 400)


def test_shapes_are_those_of_the_spec():
    dataset = data.GaussianMixtures(5, 9, num_components=6, num_features=3)
    batch = draw(dataset, 7)
    assert batch["inputs"].shape == (7, 9, *dataset.spec.feature_shape)
    assert batch["inputs"].dtype == np.float32
    assert batch["mask"].shape == batch["components"].shape == (7, 9)
    assert batch["log_weights"].shape == (7, 6)
    assert batch["means"].shape == batch["scales"].shape == (7, 6, 3)
    assert dataset.spec.num_classes == 6 * (1 + 2 * 3)


def test_sizes_are_uniform_and_both_ends_occur():
    mask = draw(data.GaussianMixtures(2, 5), 2000, split="test")["mask"]
    size = mask.sum(1)
    np.testing.assert_array_equal(mask, np.arange(5) < size[:, None])
    assert stats.chisquare(np.bincount(size)[2:]).pvalue > ALPHA
    assert set(size) == {2, 3, 4, 5}


def test_sets_to_learn_from_share_a_size_which_is_uniform():
    dataset = data.GaussianMixtures(2, 5)
    masks = jax.vmap(lambda key: dataset.sample(key, 3, "train", {})["mask"])(
        jax.random.split(KEY, 2000)
    )
    size = np.asarray(masks).sum(2)  # [draw, set]
    assert (size == size[:, :1]).all()
    assert stats.chisquare(np.bincount(size[:, 0])[2:]).pvalue > ALPHA
    assert set(size[:, 0]) == {2, 3, 4, 5}


def test_every_element_is_near_the_mean_of_its_component(batch):
    centre = np.take_along_axis(batch["means"], batch["components"][..., None], 1)
    noise = (batch["inputs"] - centre)[batch["mask"]]
    assert stats.kstest(noise.ravel() / 0.3, "norm").pvalue > ALPHA
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.02
    assert not batch["inputs"][~batch["mask"]].any()
    np.testing.assert_array_equal(batch["scales"], np.float32(0.3))


def test_mixtures_are_drawn_as_published(batch):
    weights = np.exp(batch["log_weights"])
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    # The marginal of Dirichlet(1, 1, 1, 1).
    assert stats.kstest(weights[:, 0], stats.beta(1, 3).cdf).pvalue > ALPHA
    means = batch["means"]
    assert stats.kstest(means.ravel(), stats.uniform(-4, 8).cdf).pvalue > ALPHA
    counts = np.stack([(batch["components"] == k).sum(1) for k in range(4)], axis=1)
    z = (counts - 500 * weights) / np.sqrt(500 * weights * (1 - weights) + 1e-6)
    assert np.abs(z.mean()) < 0.1 and 0.9 < (z[:, :2] ** 2).mean() < 1.1


def test_the_true_mixture_has_the_published_likelihood():
    batch = draw(data.GaussianMixtures(), 1000)
    z = (batch["inputs"][:, :, None] - batch["means"][:, None]) / 0.3
    joint = batch["log_weights"][:, None] + stats.norm.logpdf(z).sum(-1)
    log_density = special.logsumexp(joint - 2 * np.log(0.3), axis=-1)
    per_set = np.where(batch["mask"], log_density, 0).sum(1) / batch["mask"].sum(1)
    # Lee et al. (2019), table 3.
    assert per_set.mean() == pytest.approx(-1.4726, abs=0.05)


def test_sets_depend_on_the_key_alone():
    draw_small = functools.partial(draw, data.GaussianMixtures(3, 8), 4)
    first, again = draw_small(), draw_small()
    jax.tree.map(np.testing.assert_array_equal, first, again)
    jax.tree.map(
        np.testing.assert_array_equal,
        draw_small(split="validation"),
        draw_small(split="test"),
    )
    other = draw_small(key=jax.random.key(1))
    assert (first["means"] != other["means"]).all()
    means = first["means"].reshape(4, -1)
    assert len(np.unique(means, axis=0)) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(min_size=0), "min_size must be 1 or more, not 0"),
        (dict(max_size=99), r"max_size must be min_size \(100\) or more, not 99"),
        (dict(num_components=0), "num_components must be 1 or more"),
        (dict(scale=0.0), "scale must be > 0"),
        (dict(bound=-1.0), "bound must be > 0"),
    ],
)
def test_impossible_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        data.GaussianMixtures(**fields)


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        ((100, 500), (100, 200, 300, 400, 500)),
        ((250, 501), (301, 401, 501)),
        ((5, 5), (5,)),
        # No smaller than the number of components.
        ((1, 10, 4), (4, 6, 8, 10)),
        ((1, 3, 4), ()),
    ],
)
def test_sizes_to_pad_to_are_fifths_of_the_largest(fields, sizes):
    assert data.GaussianMixtures(*fields).size_buckets == sizes
