import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import data

KEY = jax.random.key(0)
STATISTICS = ("rotation", "correlation", "rank1", "random")


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def draw(dataset, key, num_sets, split):
    return dataset.sample(key, num_sets, split, dataset.arrays)


# What all of them promise.


@pytest.mark.parametrize(
    "dataset",
    [
        data.MaxOfNumbers(max_size=4, test_max_size=7),
        data.DigitSums(max_size=4, test_max_size=7),
        data.PopulationStatistics("rank1", min_size=1, max_size=4),
    ],
    ids=lambda dataset: type(dataset).__name__,
)
def test_sets_are_pure_functions_of_the_key(dataset):
    sizes = {"train": 4, "validation": 4}
    sizes["test"] = 4 if isinstance(dataset, data.PopulationStatistics) else 7
    for split, max_size in sizes.items():
        batch = draw(dataset, KEY, 400, split)
        shape = (400, max_size, *dataset.spec.feature_shape)
        assert batch["inputs"].shape == shape
        assert batch["inputs"].dtype == batch["target"].dtype == jnp.float32
        assert batch["target"].shape == (400, dataset.spec.num_classes)
        size = batch["mask"].sum(1)
        # The real elements come first, and every size is about as frequent.
        np.testing.assert_array_equal(
            batch["mask"], np.arange(max_size) < size[:, None]
        )
        counts = np.bincount(size, minlength=max_size + 1)
        assert counts[0] == 0
        assert stats.chisquare(counts[1:]).pvalue > 1e-4
        assert not batch["inputs"][~batch["mask"]].any()
        again = draw(dataset, KEY, 400, split)
        jax.tree.map(np.testing.assert_array_equal, batch, again)
        other = draw(dataset, jax.random.key(1), 400, split)
        assert (batch["inputs"] != other["inputs"]).any()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: data.MaxOfNumbers(max_size=0), "max_size must be 1 or more, not 0"),
        (lambda: data.MaxOfNumbers(high=-1.0), "high must be > 0, not -1.0"),
        (lambda: data.DigitSums(test_max_size=-1), "test_max_size must be 1 or more"),
        (
            lambda: data.PopulationStatistics(min_size=9, max_size=8),
            "max_size must be 9 or more, not 8",
        ),
        (lambda: data.PopulationStatistics("mean"), "statistic must be one of.*'mean'"),
    ],
)
def test_impossible_values_are_named(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


# Numbers.


def test_the_largest_number_is_the_target():
    batch = draw(data.MaxOfNumbers(), KEY, 300, "train")
    for inputs, mask, target in zip(*map(np.asarray, batch.values()), strict=True):
        assert target == inputs[mask].max()
    numbers = np.asarray(batch["inputs"][batch["mask"]]).ravel()
    assert stats.kstest(numbers, "uniform", (0, 100)).pvalue > 1e-4


@pytest.mark.parametrize("split", ["train", "test"])
def test_digits_add_up(split):
    batch = draw(data.DigitSums(), KEY, 300, split)
    inputs, mask = np.asarray(batch["inputs"]), np.asarray(batch["mask"])
    np.testing.assert_array_equal(inputs.sum(-1), mask)
    digits = np.where(mask, inputs.argmax(-1), 0)
    np.testing.assert_array_equal(digits.sum(1, keepdims=True), batch["target"])
    assert stats.chisquare(np.bincount(digits[mask], minlength=10)).pvalue > 1e-4


# Gaussians. The statistics are computed anew, in float64, from the covariance alone.


def entropy(covariance):
    return 0.5 * np.linalg.slogdet(2 * np.pi * np.e * covariance)[1]


def marginals(covariance):
    return sum(
        entropy(covariance[i : i + 1, i : i + 1]) for i in range(len(covariance))
    )


def halves(covariance):
    middle = len(covariance) // 2
    return entropy(covariance[:middle, :middle]) + entropy(covariance[middle:, middle:])


TRUE = {
    "rotation": lambda covariance: entropy(covariance[:1, :1]),
    "correlation": lambda covariance: halves(covariance) - entropy(covariance),
    "rank1": lambda covariance: marginals(covariance) - entropy(covariance),
    "random": lambda covariance: marginals(covariance) - entropy(covariance),
}


def distributions(statistic, num_sets, **fields):
    """Covariances [set, d, d] in float64, and targets [set]."""
    dataset = data.PopulationStatistics(statistic, **fields)
    draw = jax.jit(dataset.distributions, static_argnums=1)
    factor, target = draw(KEY, num_sets)
    factor = np.asarray(factor, np.float64)
    return factor @ factor.swapaxes(1, 2), np.asarray(target)[:, 0]


@pytest.mark.parametrize("statistic", STATISTICS)
def test_targets_are_those_of_the_covariance(statistic):
    covariance, target = distributions(statistic, 100)
    expected = [TRUE[statistic](each) for each in covariance]
    assert np.std(target) > 0.01
    np.testing.assert_allclose(target, expected, atol=2e-4 * np.abs(target).max())


@pytest.mark.parametrize("statistic", STATISTICS)
def test_points_have_that_covariance(statistic):
    # The sets of a sample share the key's parameters with `distributions`.
    dataset = data.PopulationStatistics(statistic, min_size=20_000, max_size=20_000)
    batch = draw(dataset, KEY, 2, "train")
    expected = np.asarray(batch["target"])[:, 0]
    for points, target in zip(np.asarray(batch["inputs"]), expected, strict=True):
        assert np.abs(points.mean(0) / points.std(0)).max() < 0.03
        found = TRUE[statistic](np.cov(points.T))
        # Of d (d - 1) / 2 correlations each adds about 1 / (2 n) to an information.
        assert abs(found - target) < 0.05


@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_sample_covariance_estimates_targets_without_bias(statistic):
    dataset = data.PopulationStatistics(statistic, min_size=50, max_size=80)
    batch = draw(dataset, KEY, 4000, "train")
    estimate = jax.jit(dataset.from_sample_covariance)(batch["inputs"], batch["mask"])
    assert estimate.shape == batch["target"].shape
    error = np.asarray(estimate - batch["target"], np.float64)
    # 4 standard errors; the biased ones are off by about d² / (4 n), 4 for d = 32.
    assert abs(error.mean()) < 4 * error.std() / 4000**0.5
    # Padding is no point.
    inputs = jnp.where(batch["mask"][..., None], batch["inputs"], jnp.nan)
    again = dataset.from_sample_covariance(inputs, batch["mask"])
    np.testing.assert_allclose(estimate, again, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_one_thing_varies_as_it_is_said_to(statistic):
    covariance, _ = distributions(statistic, 100)
    d = covariance.shape[1]
    if statistic == "rotation":
        # The numbers of MATLAB's rng(3); rand(2).
        base = np.array([[0.5508, 0.2909], [0.7081, 0.5108]])
        eigenvalues = np.linalg.eigvalsh(base @ base.T)
        for each in covariance:
            np.testing.assert_allclose(np.linalg.eigvalsh(each), eigenvalues, atol=1e-4)
    if statistic == "correlation":
        block = covariance[:, : d // 2, : d // 2]
        np.testing.assert_allclose(block, block[:1].repeat(100, 0), rtol=1e-4)
        np.testing.assert_allclose(block, covariance[:, d // 2 :, d // 2 :], rtol=1e-3)
        rho = covariance[:, 0, d // 2] / covariance[:, 0, 0]
        cross = covariance[:, : d // 2, d // 2 :]
        np.testing.assert_allclose(cross, rho[:, None, None] * block, rtol=1e-3)
        assert 0.3 < (rho > 0).mean() < 0.7
        assert np.abs(rho).min() >= 0.0099 and np.abs(rho).max() <= 0.9905
    if statistic == "rank1":
        eigenvalues = np.linalg.eigvalsh(covariance)
        np.testing.assert_allclose(eigenvalues[:, :-1], 1, atol=1e-4)
        assert stats.kstest(eigenvalues[:, -1], "uniform", (1, 1)).pvalue > 1e-4
    assert d == {"rotation": 2, "correlation": 16}.get(statistic, 32)


def test_legacy_labels_are_what_the_official_code_computes():
    covariance, target = distributions("rotation", 50)
    same, legacy = distributions("rotation", 50, legacy_labels=True)
    np.testing.assert_array_equal(covariance, same)
    s = covariance[:, 0, 0]
    np.testing.assert_allclose(legacy, 0.5 * np.log(2 * np.pi * np.e * s**2), atol=1e-5)
    assert np.abs(legacy - target).max() > 0.1

    covariance, target = distributions("correlation", 50)
    official, legacy = distributions("correlation", 50, legacy_labels=True)
    np.testing.assert_allclose(target, 8 * legacy, rtol=1e-5)
    for intended, drawn in zip(covariance, official, strict=True):
        upper = np.linalg.cholesky(intended).T
        np.testing.assert_allclose(drawn, upper @ upper.T, rtol=1e-3, atol=1e-6)
    # At a correlation of 0.6: label 0.2231, of a true 1.2299, where 1.7851 was meant.
    rho = covariance[:, 0, 8] / covariance[:, 0, 0]
    information = [TRUE["correlation"](each) for each in official]
    np.testing.assert_allclose(legacy, -0.5 * np.log(1 - rho**2), rtol=2e-3)
    np.testing.assert_allclose(information, 4 * np.log(1 + rho**2), rtol=2e-3)


@pytest.mark.parametrize("statistic", ["rank1", "random"])
def test_legacy_labels_of_the_others_are_right(statistic):
    for new, old in zip(
        distributions(statistic, 5),
        distributions(statistic, 5, legacy_labels=True),
        strict=True,
    ):
        np.testing.assert_array_equal(new, old)
