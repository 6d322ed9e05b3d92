import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
from sklearn import mixture as sklearn_mixture

import archs
from archs import contracts

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
SETS, ELEMENTS, COMPONENTS, FEATURES = 3, 40, 4, 2


def mixture_of(sets=SETS, seed=0):
    rng = np.random.default_rng(seed)
    shape = (sets, COMPONENTS, FEATURES)
    weights = rng.dirichlet(np.ones(COMPONENTS), sets)
    return archs.GaussianMixture(
        jnp.asarray(np.log(weights), jnp.float32),
        jnp.asarray(rng.uniform(-2, 2, shape), jnp.float32),
        jnp.asarray(rng.uniform(0.3, 1.5, shape), jnp.float32),
    )


@pytest.fixture(scope="module")
def sets():
    rng = np.random.default_rng(1)
    x = rng.normal(0, 2, (SETS, ELEMENTS, FEATURES)).astype(np.float32)
    mask = np.arange(ELEMENTS) < np.array([[40], [25], [7]])
    return jnp.asarray(x), jnp.asarray(mask)


def scipy_log_density(mixture, s, x):
    return special.logsumexp(
        [
            mixture.log_weights[s, k]
            + stats.multivariate_normal.logpdf(
                x, mixture.means[s, k], np.diag(mixture.scales[s, k] ** 2)
            )
            for k in range(COMPONENTS)
        ],
        axis=0,
    )


def as_sklearn(mixture, s, **fields):
    model = sklearn_mixture.GaussianMixture(
        COMPONENTS,
        covariance_type="diag",
        weights_init=special.softmax(np.asarray(mixture.log_weights[s], np.float64)),
        means_init=np.asarray(mixture.means[s]),
        precisions_init=1 / np.asarray(mixture.scales[s], np.float64) ** 2,
        **fields,
    )
    return model


def test_the_likelihood_is_that_of_scipy(sets):
    x, mask = sets
    mixture = mixture_of()
    found = archs.mixture_log_likelihood(mixture, x, mask)
    for s in range(SETS):
        elements = np.asarray(x[s])[np.asarray(mask[s])]
        expected = scipy_log_density(mixture, s, elements).sum()
        np.testing.assert_allclose(found[s], expected, rtol=1e-5)


def test_the_posterior_is_bayes_rule(sets):
    x, _ = sets
    mixture = mixture_of()
    found = archs.mixture_posterior(mixture, x)
    for k in range(COMPONENTS):
        joint = mixture.log_weights[0, k] + stats.norm.logpdf(
            x[0], mixture.means[0, k], mixture.scales[0, k]
        ).sum(-1)
        expected = np.exp(joint - scipy_log_density(mixture, 0, x[0]))
        np.testing.assert_allclose(found[0, :, k], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("num_steps", [1, 5])
def test_expectation_maximisation_is_that_of_scikit_learn(sets, num_steps):
    x, mask = sets
    x, mask, mixture = x[:2], mask[:2], mixture_of(2)
    found = jax.jit(lambda m: archs.fit_mixture(m, x, mask, num_steps=num_steps))(
        mixture
    )
    for s in range(2):
        elements = np.asarray(x[s], np.float64)[np.asarray(mask[s])]
        peer = as_sklearn(mixture, s, max_iter=num_steps, tol=0).fit(elements)
        np.testing.assert_allclose(
            np.exp(found.log_weights[s]), peer.weights_, atol=1e-4
        )
        np.testing.assert_allclose(found.means[s], peer.means_, atol=1e-3)
        np.testing.assert_allclose(found.scales[s] ** 2, peer.covariances_, rtol=1e-2)


def test_a_step_never_lowers_the_likelihood(sets):
    x, mask = sets
    step = jax.jit(lambda m: archs.mixture_em_step(m, x, mask))
    likelihood = jax.jit(lambda m: archs.mixture_log_likelihood(m, x, mask))
    mixture = archs.initial_mixture(KEY, x, COMPONENTS, mask)
    values = []
    for _ in range(15):
        values.append(likelihood(mixture))
        mixture = step(mixture)
    values = np.stack(values)
    assert (np.diff(values, axis=0) > -1e-2).all()
    assert (values[-1] > values[0] + 1).all()


@pytest.mark.parametrize("contents", [0.0, 1e30, np.nan, -np.inf])
def test_padding_changes_nothing(sets, contents):
    x, mask = sets
    mixture = mixture_of()
    dirty = jnp.where(mask[..., None], x, contents)

    @jax.jit
    def measure(x, mixture):
        def value(x, mixture):
            after = archs.mixture_em_step(mixture, x, mask)
            likelihoods = [
                archs.mixture_log_likelihood(m, x, mask) for m in (mixture, after)
            ]
            return sum(y.sum() for y in likelihoods), (after, likelihoods)

        return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(x, mixture)

    expected, found = measure(x, mixture), measure(dirty, mixture)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), expected, found)
    assert not np.asarray(found[1][0])[~np.asarray(mask)].any()


def test_weights_are_multiplicities(sets):
    x, mask = sets
    counts = np.asarray(RNG.integers(0, 3, mask.shape) * mask, np.float32)
    counts[:, 0] = 1
    mixture = mixture_of()
    x = jnp.where(counts[..., None] > 0, x, jnp.nan)
    likelihood = archs.mixture_log_likelihood(mixture, x, mask, jnp.asarray(counts))
    after = archs.mixture_em_step(mixture, x, mask, jnp.asarray(counts))
    start = archs.initial_mixture(KEY, x, 2, mask, jnp.asarray(counts))
    assert all(np.isfinite(leaf).all() for leaf in start)
    for s in range(SETS):
        repeated = np.repeat(x[s], counts[s].astype(int), axis=0)[None]
        one = jax.tree.map(lambda leaf: leaf[s : s + 1], mixture)  # noqa: B023
        np.testing.assert_allclose(
            likelihood[s], archs.mixture_log_likelihood(one, repeated)[0], rtol=1e-5
        )
        for found, expected in zip(
            after, archs.mixture_em_step(one, repeated), strict=True
        ):
            np.testing.assert_allclose(found[s], expected[0], rtol=1e-3, atol=1e-4)


def test_order_changes_nothing(sets):
    x, mask = sets

    def f(x, mask):
        mixture = mixture_of()
        after = archs.mixture_em_step(mixture, x, mask)
        return archs.mixture_log_likelihood(after, x, mask)

    contracts.assert_permutation_invariant(f, x, mask, key=KEY)
    contracts.assert_permutation_equivariant(
        lambda x, mask: archs.mixture_posterior(mixture_of(), x), x, mask, key=KEY
    )


def test_empty_components_and_sets_stay_as_they_are(sets):
    x, _ = sets
    mixture = mixture_of()
    far = mixture._replace(means=mixture.means.at[:, 0].set(1e4))
    nothing = jnp.zeros(x.shape[:2], bool).at[1:].set(True)

    def loss(x, m):
        after = archs.mixture_em_step(m, x, nothing)
        return archs.mixture_log_likelihood(after, x, nothing).sum(), after

    (_, after), gradient = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    )(x, far)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after, gradient)))
    # Component 0 of sets with elements, and the whole mixture of the set without.
    np.testing.assert_array_equal(after.means[:, 0], far.means[:, 0])
    np.testing.assert_array_equal(after.scales[:, 0], far.scales[:, 0])
    assert (after.log_weights[1:, 0] < -15).all()
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), after, far)
    assert archs.mixture_log_likelihood(far, x, nothing)[0] == 0
    start = archs.initial_mixture(KEY, x, COMPONENTS, nothing)
    assert all(np.isfinite(leaf).all() for leaf in start)
    masked = archs.initial_mixture(KEY, x, COMPONENTS, nothing & False)
    none = archs.initial_mixture(KEY, x[:, :0], COMPONENTS)
    jax.tree.map(np.testing.assert_array_equal, none, masked)


def test_elements_far_away_have_a_finite_gradient():
    mixture = mixture_of(1)
    x = jnp.array([[[1e17, -1e20]]])
    gradient = jax.grad(lambda m: archs.mixture_log_likelihood(m, x).sum())(mixture)
    assert all(np.isfinite(leaf).all() for leaf in gradient)


def test_identical_elements_are_no_trouble():
    x = jnp.ones((1, 5, 2))
    mixture = archs.fit_mixture(archs.initial_mixture(KEY, x, 3), x, num_steps=20)
    assert all(np.isfinite(leaf).all() for leaf in mixture)
    np.testing.assert_allclose(mixture.means, 1)


def test_k_means_plus_plus_finds_far_clusters_and_elements_only():
    centres = np.array([[-50.0, 0], [50, 0], [0, 50], [0, -50]])
    x = (centres[:, None] + RNG.normal(size=(4, 25, 2))).reshape(1, 100, 2)
    x = jnp.asarray(np.repeat(x, 20, axis=0), jnp.float32)
    mixture = archs.initial_mixture(KEY, x, 4)
    distance = np.abs(mixture.means[:, :, None] - x[:, None]).sum(-1).min(-1)
    np.testing.assert_array_equal(distance, 0)
    nearest = np.argmin(
        np.linalg.norm(mixture.means[:, :, None] - centres, axis=-1), -1
    )
    hit = [len(set(row)) == 4 for row in nearest]
    assert np.mean(hit) > 0.9
    assert len({tuple(m.ravel()) for m in np.asarray(mixture.means)}) > 5


def test_fitting_recovers_the_mixture():
    centres = np.array([[-3.0, 0], [3, 0], [0, 3], [0, -3]])
    labels = RNG.choice(4, 2000, p=[0.4, 0.3, 0.2, 0.1])
    x = centres[labels] + RNG.normal(0, [0.3, 0.5], (2000, 2))
    x = jnp.asarray(x, jnp.float32)[None]
    start = archs.initial_mixture(KEY, x, 4)
    found = jax.jit(lambda m: archs.fit_mixture(m, x, num_steps=50))(start)
    order = np.argsort(-np.asarray(found.log_weights[0]))
    np.testing.assert_allclose(
        np.exp(found.log_weights[0])[order], [0.4, 0.3, 0.2, 0.1], atol=0.04
    )
    np.testing.assert_allclose(found.means[0][order], centres, atol=0.15)
    np.testing.assert_allclose(found.scales[0], np.tile([0.3, 0.5], (4, 1)), atol=0.08)


def test_any_output_is_a_mixture():
    output = 200 * jax.random.normal(KEY, (2, 3, 5))
    output = output.at[0].set(-1e4)
    mixture = archs.mixture_parameters(output)
    np.testing.assert_allclose(np.exp(mixture.log_weights).sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(mixture.means, output[..., 1:3])
    np.testing.assert_allclose(
        mixture.scales, np.logaddexp(0, np.asarray(output[..., 3:])) + 1e-3, rtol=1e-5
    )

    def loss(output):
        x = jnp.ones((2, 4, 2))
        return archs.mixture_log_likelihood(archs.mixture_parameters(output), x).sum()

    value, gradient = jax.value_and_grad(loss)(output)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 4), (2, 3, 1)])
def test_an_output_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"output must have shape \[set, k, 1 \+ 2d\]"):
        archs.mixture_parameters(jnp.zeros(shape))


def test_wrong_arguments_are_refused(sets):
    x, mask = sets
    with pytest.raises(ValueError, match="x must have shape"):
        archs.mixture_log_likelihood(mixture_of(), x[0])
    with pytest.raises(TypeError, match="mask must have dtype bool"):
        archs.mixture_em_step(mixture_of(), x, mask.astype(jnp.float32))
    with pytest.raises(ValueError, match="weights must have shape"):
        archs.mixture_em_step(mixture_of(), x, mask, jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="num_components must be 1 or more"):
        archs.initial_mixture(KEY, x, 0)
