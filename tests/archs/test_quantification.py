import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from archs import quantification as q

EPSILON = 1 / (2 * 250)
MEASURES = {
    "absolute_error": {},
    "normalized_absolute_error": {},
    "squared_error": {},
    "relative_absolute_error": {"epsilon": EPSILON},
    "normalized_relative_absolute_error": {"epsilon": EPSILON},
    "kl_divergence": {"epsilon": EPSILON},
    "normalized_kl_divergence": {"epsilon": EPSILON},
    "match_distance": {},
    "normalized_match_distance": {},
}
NORMALIZED = [name for name in MEASURES if name.startswith("normalized")]


@functools.cache
def measure(name):
    return jax.jit(functools.partial(getattr(q, name), **MEASURES[name]))


def prevalences(seed, num_classes=4, num_bags=6, concentration=0.5):
    rng = np.random.default_rng(seed)
    alpha = np.full(num_classes, concentration)
    return rng.dirichlet(alpha, (2, num_bags)).astype(np.float32)


def gaussian_world(seed=0, num_classes=3, n=4000, shift=(0.7, 0.2, 0.1)):
    """Exact posteriors under a uniform prior of Gaussian classes; two samples."""
    rng = np.random.default_rng(seed)
    means = np.arange(num_classes) * 1.5

    def sample(p):
        labels = rng.choice(num_classes, n, p=p)
        x = rng.normal(means[labels], 1)
        density = scipy.stats.norm.pdf(x[:, None], means)
        posteriors = density / density.sum(-1, keepdims=True)
        return posteriors.astype(np.float32), labels.astype(np.int32)

    uniform = np.full(num_classes, 1 / num_classes)
    return sample(uniform), sample(np.array(shift))


@pytest.mark.parametrize("name", MEASURES)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_a_measure_is_zero_for_the_truth_alone(name, seed):
    p, estimate = prevalences(seed)
    f = measure(name)
    np.testing.assert_allclose(f(p, p), 0, atol=1e-6)
    error = np.asarray(f(p, estimate))
    assert error.shape == (6,)
    assert (error > 0).all()
    if name in NORMALIZED:
        assert (error <= 1 + 1e-5).all()
    # Classes have no order, but for the match distances, which may be read backwards.
    order = [3, 2, 1, 0] if "match" in name else [2, 0, 3, 1]
    np.testing.assert_allclose(f(p[:, order], estimate[:, order]), error, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "closed_form"),
    [
        ("absolute_error", 2 * 0.25 / 3),
        ("normalized_absolute_error", 2 * 0.25 / (2 * (1 - 0.25))),
        ("squared_error", 2 * 0.25**2 / 3),
        ("match_distance", 0.25 + 0.25),
        ("normalized_match_distance", 0.5 / 2),
    ],
)
def test_closed_forms(name, closed_form):
    p, estimate = jnp.array([0.5, 0.25, 0.25]), jnp.array([0.25, 0.25, 0.5])
    np.testing.assert_allclose(measure(name)(p, estimate), closed_form, rtol=1e-6)


def test_smoothed_closed_forms():
    p, estimate = jnp.array([1.0, 0.0]), jnp.array([0.5, 0.5])
    epsilon = 0.25  # p' = (5/6, 1/6), p̂' = (1/2, 1/2)
    kld = scipy.stats.entropy([5 / 6, 1 / 6], [0.5, 0.5])
    rae = ((1 / 3) / (5 / 6) + (1 / 3) / (1 / 6)) / 2
    for name, expected in {
        "kl_divergence": kld,
        "normalized_kl_divergence": 2 * np.exp(kld) / (1 + np.exp(kld)) - 1,
        "relative_absolute_error": rae,
        "normalized_relative_absolute_error": rae / ((1 + 5) / 2),
    }.items():
        found = getattr(q, name)(p, estimate, epsilon=epsilon)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_everything_on_the_rarest_class_has_normalized_error_one():
    p, worst = jnp.array([0.6, 0.3, 0.1]), jnp.array([0.0, 0.0, 1.0])
    np.testing.assert_allclose(q.normalized_absolute_error(p, worst), 1, rtol=1e-6)
    error = q.normalized_relative_absolute_error(p, worst, epsilon=0.0)
    np.testing.assert_allclose(error, 1, rtol=1e-6)


def test_match_distance_is_the_earth_movers():
    for p, estimate in zip(*prevalences(0, 5), strict=True):
        positions = np.arange(5)
        expected = scipy.stats.wasserstein_distance(positions, positions, p, estimate)
        np.testing.assert_allclose(q.match_distance(p, estimate), expected, rtol=1e-5)


@pytest.mark.parametrize("name", MEASURES)
def test_measures_are_those_of_quapy(name):
    error = pytest.importorskip("quapy").error
    short = {
        "absolute_error": "ae",
        "normalized_absolute_error": "nae",
        "squared_error": "se",
        "relative_absolute_error": "rae",
        "normalized_relative_absolute_error": "nrae",
        "kl_divergence": "kld",
        "normalized_kl_divergence": "nkld",
        "match_distance": "md",
        "normalized_match_distance": "nmd",
    }[name]
    p, estimate = prevalences(1)
    theirs = error.match_distance if "md" in short else getattr(error, short)
    arguments = {"eps": EPSILON} if MEASURES[name] else {}
    expected = [theirs(a, b, **arguments) for a, b in zip(p, estimate, strict=True)]
    if short == "nmd":
        expected = np.array(expected) / 3
    np.testing.assert_allclose(measure(name)(p, estimate), expected, rtol=1e-4)


@pytest.mark.parametrize("name", MEASURES)
def test_gradients_are_those_of_finite_differences(name):
    with jax.enable_x64(True):
        p, estimate = (jnp.asarray(a, jnp.float64) for a in prevalences(2))
        f = functools.partial(getattr(q, name), p, **MEASURES[name])
        check_grads(jax.jit(f), (estimate,), order=1, modes=("rev",), eps=1e-6)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"\(6, 4\), but its shape is \(4,\)"):
        q.absolute_error(jnp.ones((6, 4)) / 4, jnp.ones(4) / 4)


def test_counting():
    posteriors = jnp.array([[0.6, 0.4, 0], [0.4, 0.5, 0.1], [0.7, 0.2, 0.1]])
    np.testing.assert_allclose(q.classify_and_count(posteriors), [2 / 3, 1 / 3, 0])
    np.testing.assert_allclose(
        q.probabilistic_classify_and_count(posteriors),
        [1.7 / 3, 1.1 / 3, 0.2 / 3],
        rtol=1e-6,
    )


def test_confusion_matrix_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    (posteriors, labels), _ = gaussian_world()
    found = q.confusion_matrix(posteriors, labels)
    expected = metrics.confusion_matrix(labels, posteriors.argmax(-1), normalize="true")
    np.testing.assert_allclose(found, expected.T, rtol=1e-5)
    soft = q.confusion_matrix(posteriors, labels, probabilistic=True)
    means = [posteriors[labels == j].mean(0) for j in range(3)]
    np.testing.assert_allclose(soft, np.transpose(means), rtol=1e-4)


def test_confusion_of_a_class_without_examples_is_the_identity():
    posteriors = jnp.array([[0.9, 0.05, 0.05], [0.4, 0.6, 0.0]])
    found = q.confusion_matrix(posteriors, jnp.array([0, 0]))
    np.testing.assert_allclose(found, [[0.5, 0, 0], [0.5, 1, 0], [0, 0, 1]])


def slsqp(matrix, target):
    num_classes = matrix.shape[1]
    return scipy.optimize.minimize(
        lambda p: np.sum((matrix @ p - target) ** 2),
        np.full(num_classes, 1 / num_classes),
        jac=lambda p: 2 * matrix.T @ (matrix @ p - target),
        method="SLSQP",
        bounds=[(0, 1)] * num_classes,
        constraints={
            "type": "eq",
            "fun": lambda p: p.sum() - 1,
            "jac": np.ones_like,
        },
        options={"ftol": 1e-16, "maxiter": 2000},
    ).x


@pytest.mark.parametrize(("num_classes", "inside"), [(2, 1), (3, 0), (10, 0.5)])
def test_simplex_least_squares_is_scipys(num_classes, inside):
    rng = np.random.default_rng(num_classes)
    alpha = np.ones(num_classes)
    matrix = rng.dirichlet(alpha, (20, num_classes)).transpose(0, 2, 1)
    matrix = matrix / 2 + np.eye(num_classes) / 2
    # Targets that a distribution explains exactly, and targets that none explains.
    target = rng.dirichlet(alpha / 2, 20)
    explained = np.einsum("nij,nj->ni", matrix, target)
    target = np.where(rng.random((20, 1)) < inside, explained, target)
    expected = [slsqp(*pair) for pair in zip(matrix, target, strict=True)]
    for x64, atol in ((False, 5e-6), (True, 1e-6)):
        with jax.enable_x64(x64):
            found = np.asarray(jax.jit(q.simplex_least_squares)(matrix, target))
        assert found.min() >= 0
        np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)
        np.testing.assert_allclose(found, expected, atol=atol)


@pytest.mark.parametrize("num_classes", [4, 28])
def test_simplex_least_squares_meets_the_optimality_conditions(num_classes):
    # An ill-conditioned matrix, in float64: gradient equal on the support, not lower
    # beside it.
    rng = np.random.default_rng(0)
    alpha = np.ones(num_classes)
    with jax.enable_x64(True):
        matrix = rng.dirichlet(alpha, (20, num_classes)).transpose(0, 2, 1)
        target = rng.dirichlet(alpha, 20)
        p = np.asarray(jax.jit(q.simplex_least_squares)(matrix, target))
    assert p.dtype == np.float64
    residual = np.einsum("nij,nj->ni", matrix, p) - target
    gradient = np.einsum("nij,ni->nj", matrix, residual)
    lowest = gradient.min(-1, keepdims=True)
    np.testing.assert_allclose(np.where(p > 0, gradient - lowest, 0), 0, atol=1e-12)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-12)


def test_simplex_least_squares_of_equal_columns_is_a_solution():
    matrix = jnp.array([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    p = q.simplex_least_squares(matrix, jnp.array([0.3, 0.3, 0.4]))
    np.testing.assert_allclose(matrix @ p, [0.3, 0.3, 0.4], atol=1e-6)
    assert p.min() >= 0


METHODS = {
    "classify_and_count": lambda world: (),
    "probabilistic_classify_and_count": lambda world: (),
    "adjusted_classify_and_count": lambda world: (q.confusion_matrix(*world),),
    "probabilistic_adjusted_classify_and_count": lambda world: (
        q.confusion_matrix(*world, probabilistic=True),
    ),
    "expectation_maximization": lambda world: (jnp.full(3, 1 / 3),),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_ignore_padding_and_take_batches(name):
    world, (posteriors, _) = gaussian_world(n=60)
    method = jax.jit(getattr(q, name))
    arguments = METHODS[name](world)
    bags = jnp.asarray(posteriors.reshape(3, 20, 3))
    mask = jnp.arange(20) < jnp.array([[20], [5], [0]])
    found = method(jnp.where(mask[..., None], bags, jnp.nan), *arguments, mask)
    full = method(bags, *arguments)
    np.testing.assert_allclose(found[0], full[0], atol=1e-6)
    short = getattr(q, name)(bags[1, :5], *arguments)
    np.testing.assert_allclose(found[1], short, atol=1e-5)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("name", METHODS)
def test_methods_estimate_shifted_prevalences(name):
    world, (posteriors, labels) = gaussian_world(n=20_000)
    true = np.bincount(labels) / len(labels)
    found = jax.jit(getattr(q, name))(posteriors, *METHODS[name](world))
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-5)
    error = np.abs(found - true).mean()
    if name in ("classify_and_count", "probabilistic_classify_and_count"):
        assert error > 0.03  # biased towards the training prevalences
    else:
        assert error < 0.01


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_those_of_quapy(name):
    pytest.importorskip("quapy")
    os.environ.setdefault("N_JOBS", "1")
    from quapy import functional
    from quapy.method.aggregative import ACC, EMQ

    world, (posteriors, _) = gaussian_world(n=500)
    found = jax.jit(getattr(q, name))(posteriors, *METHODS[name](world))
    if name == "expectation_maximization":
        theirs, _ = EMQ.EM(np.full(3, 1 / 3), posteriors.astype(np.float64))
    elif name == "classify_and_count":
        theirs = functional.prevalence_from_labels(posteriors.argmax(-1), [0, 1, 2])
    elif name == "probabilistic_classify_and_count":
        theirs = functional.prevalence_from_probabilities(posteriors)
    else:
        soft = name.startswith("probabilistic")
        (confusion,) = METHODS[name](world)
        predicted = posteriors if soft else np.eye(3)[posteriors.argmax(-1)]
        theirs = ACC.solve_adjustment(
            class_conditional_rates=np.asarray(confusion, np.float64),
            unadjusted_counts=predicted.mean(0).astype(np.float64),
            method="inversion",
            solver="minimize",
        )
    np.testing.assert_allclose(found, theirs, atol=2e-4)


def test_the_bias_corrected_temperature_is_that_of_maximum_likelihood():
    _, (posteriors, labels) = gaussian_world(n=500)
    distorted = posteriors**2.5 * np.array([1, 0.3, 4], np.float32)
    distorted /= distorted.sum(-1, keepdims=True)
    distorted[0] = [1, 0, 0]  # the logarithm of what has underflown
    fit = jax.jit(q.bias_corrected_temperature)
    scale, bias = map(np.asarray, fit(distorted, labels))
    found = q.calibrate_posteriors(distorted, scale, bias)

    def loss(calibration):
        with np.errstate(divide="ignore"):
            logits = np.log(distorted.astype(np.float64)).clip(-87.3)
        logits = calibration[0] * logits + calibration[1:]
        return -scipy.special.log_softmax(logits, -1)[range(500), labels].mean()

    best = scipy.optimize.minimize(loss, [1.0, 0, 0, 0])
    assert loss([scale, *bias]) < best.fun + 1e-6
    calibrated = (best.x[1:] - best.x[1:].mean(), bias - bias.mean())
    np.testing.assert_allclose(scale, best.x[0], rtol=2e-3)
    np.testing.assert_allclose(*calibrated, atol=5e-3)
    assert loss([scale, *bias]) < loss([1, 0, 0, 0]) - 0.1
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    # Classes told apart without fail have no largest likelihood, but stay finite.
    sure = q.calibrate_posteriors(np.eye(3, dtype="f"), *fit(np.eye(3), np.arange(3)))
    np.testing.assert_allclose(sure, np.eye(3), atol=1e-5)


def test_calibrated_posteriors_are_those_of_abstention():
    calibration = pytest.importorskip("abstention.calibration")
    _, (posteriors, labels) = gaussian_world(n=500)
    ours = q.calibrate_posteriors(
        posteriors, *q.bias_corrected_temperature(posteriors, labels)
    )
    fit = calibration.TempScaling(bias_positions="all")
    logits = np.log(posteriors.astype(np.float64))
    theirs = fit(logits, np.eye(3)[labels])(logits)
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_expectation_maximization_increases_the_likelihood():
    _, (posteriors, _) = gaussian_world(n=300)
    prior = np.full(3, 1 / 3, np.float32)
    steps = [
        q.expectation_maximization(posteriors, prior, tolerance=0.0, max_steps=n)
        for n in (0, 1, 2, 3, 5, 10, 100, 1000)
    ]
    likelihood = [np.log(posteriors @ (p / prior)).sum() for p in np.array(steps, "d")]
    assert (np.diff(likelihood) > -1e-4).all()
    assert likelihood[-1] > likelihood[0] + 1

    def negative(logits):
        p = np.exp(logits) / np.exp(logits).sum()
        return -np.log(posteriors @ (p / prior)).sum()

    best = scipy.optimize.minimize(negative, np.zeros(3)).x
    best = np.exp(best) / np.exp(best).sum()
    np.testing.assert_allclose(steps[-1], best, atol=1e-3)


def test_expectation_maximization_without_training_examples_of_a_class():
    posteriors = jnp.array([[0.7, 0.3, 0.0], [0.1, 0.9, 0.0]])
    found = q.expectation_maximization(posteriors, jnp.array([0.5, 0.5, 0.0]))
    assert np.isfinite(found).all()
    assert found[2] == 0
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-6)


def test_what_no_class_could_have_been_says_nothing_to_expectation_maximization():
    prior = jnp.array([0.5, 0.5, 0.0])
    bag = jnp.array([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0], [0.0, 0.0, 1.0]])
    # Slowly: it counts as the prevalences themselves.
    found, expected = (
        q.expectation_maximization(posteriors, prior, tolerance=1e-7)
        for posteriors in (bag, bag[:2])
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_array_equal(q.expectation_maximization(bag[2:], prior), prior)


def test_masks_of_wrong_shape_or_dtype_are_refused():
    posteriors = jnp.ones((2, 5, 3)) / 3
    for method in (
        q.classify_and_count,
        q.probabilistic_classify_and_count,
        lambda x, mask: q.expectation_maximization(x, jnp.ones(3) / 3, mask),
    ):
        with pytest.raises(ValueError, match=r"mask must have shape \(2, 5\)"):
            method(posteriors, jnp.ones(5, bool))
        with pytest.raises(TypeError, match="mask must have dtype bool"):
            method(posteriors, jnp.ones((2, 5)))
