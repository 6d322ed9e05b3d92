"""Mixtures of Gaussians with diagonal covariances, one mixture per set.

    p(x) = sum_k π_k prod_j N(x_j; μ_kj, σ_kj²)

What a network that clusters sets in one pass is trained with, its likelihood, and the
classical way to the same clusters beside it, expectation-maximisation. Sets are
`x [set, element, d]` with `mask [set, element]` (True = a real element) and `weights
[set, element]` (multiplicities), as everywhere; what masked elements and elements of
weight zero hold, NaN included, changes neither results nor gradients.

Dempster, Laird and Rubin, "Maximum likelihood from incomplete data via the EM
algorithm", JRSS B 39, 1977; as a task for set networks: Lee et al., "Set Transformer",
ICML 2019, arXiv 1810.00825, section 5.3.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .contracts import check_mask, check_weights, present, zero_absent
from .precision import widen


class GaussianMixture(NamedTuple):
    """The parameters of one mixture of k components per set.

    Attributes:
      log_weights: log π, [set, k]; -inf is a component that is not there.
      means: μ, [set, k, d].
      scales: σ, standard deviations, positive, [set, k, d].
    """

    log_weights: jax.Array
    means: jax.Array
    scales: jax.Array


def mixture_parameters(
    output: jax.Array, *, min_scale: float = 1e-3
) -> GaussianMixture:
    """A network's output as a mixture.

    `log π = log_softmax(a)`, `μ = b`, `σ = softplus(c) + min_scale`, where a, b, c are
    the first, the next d and the last d numbers of a component. Without `min_scale`
    the softplus underflows to zero where a network is far off, and the likelihood is
    NaN.

    Args:
      output: floating [set, k, 1 + 2d].
      min_scale: the smallest σ.

    Returns:
      A `GaussianMixture`, float32 at least.

    Raises:
      ValueError: the last axis is not of length 1 + 2d for a d of one or more.
    """
    if output.ndim != 3 or output.shape[-1] < 3 or output.shape[-1] % 2 == 0:
        raise ValueError(
            "output must have shape [set, k, 1 + 2d] (a weight, d means and d standard "
            f"deviations of each component), but its shape is {output.shape}."
        )
    output = widen(output)
    d = output.shape[-1] // 2
    return GaussianMixture(
        log_weights=jax.nn.log_softmax(output[..., 0]),
        means=output[..., 1 : 1 + d],
        scales=jax.nn.softplus(output[..., 1 + d :]) + min_scale,
    )


def mixture_log_likelihood(
    mixture: GaussianMixture,
    x: jax.Array,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> jax.Array:
    """`sum_i w_i log p(x_i)` of every set; 0 of the empty set.

    Args:
      mixture: of k components in d dimensions for every set.
      x: floating [set, element, d].
      mask: None or bool [set, element].
      weights: None or floating [set, element], non-negative.

    Returns:
      [set].

    Raises:
      ValueError, TypeError: see `contracts.check_mask`, `contracts.check_weights`.
    """
    x, counts = _elements(x, mask, weights)
    log_density = jax.nn.logsumexp(_joint(mixture, x), axis=-1)
    return jnp.sum(counts * log_density, axis=-1)


def mixture_posterior(mixture: GaussianMixture, x: jax.Array) -> jax.Array:
    """`p(k | x_i)`: how likely component k is to have made x_i.

    Args:
      mixture: of k components in d dimensions for every set.
      x: floating [set, element, d].

    Returns:
      [set, element, k], sums to one over the components.
    """
    return jax.nn.softmax(_joint(mixture, x), axis=-1)


def mixture_em_step(
    mixture: GaussianMixture,
    x: jax.Array,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
    *,
    regularization: float = 1e-6,
) -> GaussianMixture:
    """One step of expectation-maximisation.

    But for the regularization it never lowers the likelihood.

    With `r_ik = w_i p(k | x_i)` and `N_k = sum_i r_ik`:

        π_k = N_k / sum_j N_j
        μ_k = sum_i r_ik x_i / N_k
        σ_k² = sum_i r_ik (x_i - μ_k)² / N_k + regularization

    A component that no element belongs to keeps its mean and scale, its weight being
    next to nothing; a set without elements keeps its mixture.

    Args:
      mixture: of k components in d dimensions for every set.
      x: floating [set, element, d].
      mask: None or bool [set, element].
      weights: None or floating [set, element], non-negative.
      regularization: added to variances, so that a component which holds a single
        element keeps a finite density.

    Returns:
      The next mixture.

    Raises:
      ValueError, TypeError: see `contracts.check_mask`, `contracts.check_weights`.
    """
    x, counts = _elements(x, mask, weights)
    share = counts[..., None] * mixture_posterior(mixture, x)  # [set, element, k]
    size = jnp.sum(share, axis=1)  # [set, k]
    total = jnp.sum(size, axis=-1, keepdims=True)
    least = jnp.finfo(size.dtype).eps  # less of an element is rounding
    empty = size <= least
    divisor = jnp.where(empty, 1, size)[..., None]
    means = jnp.einsum("snk,snd->skd", share, x) / divisor
    means = jnp.where(empty[..., None], mixture.means, means)
    deviation = x[:, :, None] - means[:, None]  # [set, element, k, d]
    variance = jnp.einsum("snk,snkd->skd", share, deviation**2) / divisor
    scales = jnp.sqrt(variance + regularization)
    log_weights = jnp.log(jnp.maximum(size, least) / jnp.maximum(total, least))
    return GaussianMixture(
        log_weights=jnp.where(total > 0, log_weights, mixture.log_weights),
        means=means,
        scales=jnp.where(empty[..., None], mixture.scales, scales),
    )


def initial_mixture(
    key: jax.Array,
    x: jax.Array,
    num_components: int,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> GaussianMixture:
    """Where expectation-maximisation may start: means drawn as in k-means++.

    The first mean is an element drawn uniformly, each further one an element drawn
    with probability proportional to its squared distance from the nearest mean so far.
    Components weigh the same; every σ is the root mean square distance of a
    coordinate from that of the nearest mean.

    Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007.

    Args:
      key: PRNG key.
      x: floating [set, element, d].
      num_components: k.
      mask: None or bool [set, element].
      weights: None or floating [set, element], non-negative.

    Returns:
      A `GaussianMixture`; of the empty set, one with all means at 0.

    Raises:
      ValueError: `num_components` is not positive.
      ValueError, TypeError: see `contracts.check_mask`, `contracts.check_weights`.
    """
    if num_components < 1:
        raise ValueError(f"num_components must be 1 or more, not {num_components}.")
    x, counts = _elements(x, mask, weights)
    if not x.shape[1]:  # an element to draw, of weight 0
        x = jnp.zeros((len(x), 1, x.shape[2]), x.dtype)
        counts = jnp.zeros((len(x), 1), x.dtype)
    nearest = jnp.full(x.shape[:2], jnp.inf, x.dtype)  # squared distance to the means
    means = []
    for k, draw in enumerate(jax.random.split(key, num_components)):
        # Fewer distinct elements than components: any element will do.
        chance = counts if k == 0 else counts * nearest
        chance = jnp.where(chance.sum(-1, keepdims=True) > 0, chance, counts)
        index = jax.random.categorical(draw, jnp.log(chance), axis=-1)
        mean = jnp.take_along_axis(x, index[:, None, None], axis=1)  # [set, 1, d]
        nearest = jnp.minimum(nearest, jnp.sum((x - mean) ** 2, axis=-1))
        means.append(mean)
    total = jnp.maximum(counts.sum(-1), jnp.finfo(x.dtype).tiny)
    spread = jnp.sum(counts * nearest, axis=-1) / total / x.shape[-1]
    means = jnp.concatenate(means, axis=1)  # [set, k, d]
    scales = jnp.sqrt(spread + 1e-6)[:, None, None]
    return GaussianMixture(
        log_weights=jnp.full(means.shape[:2], -math.log(num_components), x.dtype),
        means=means,
        scales=jnp.broadcast_to(scales, means.shape),
    )


def fit_mixture(
    mixture: GaussianMixture,
    x: jax.Array,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
    *,
    num_steps: int = 100,
) -> GaussianMixture:
    """`num_steps` steps of `mixture_em_step` from a first mixture.

    Args:
      mixture: where to start, such as `initial_mixture`.
      x: floating [set, element, d].
      mask: None or bool [set, element].
      weights: None or floating [set, element], non-negative.
      num_steps: a fixed number, so that it runs compiled.

    Returns:
      The last mixture.
    """
    return jax.lax.fori_loop(
        0, num_steps, lambda _, m: mixture_em_step(m, x, mask, weights), mixture
    )


def _elements(
    x: jax.Array, mask: jax.Array | None, weights: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The sets with zeros where nothing is, and how often each element is there."""
    if x.ndim != 3:
        raise ValueError(
            f"x must have shape [set, element, d], but its shape is {x.shape}."
        )
    check_mask(mask, x.shape[:2])
    check_weights(weights, x.shape[:2])
    x = widen(x)
    real = present(mask, weights)
    if real is None:
        return x, jnp.ones(x.shape[:2], x.dtype)
    counts = jnp.where(real, 1 if weights is None else weights, 0).astype(x.dtype)
    return zero_absent(x, real), counts


def _joint(mixture: GaussianMixture, x: jax.Array) -> jax.Array:
    """`log π_k + log N(x_i; μ_k, σ_k²)`, [set, element, k]."""
    scales = mixture.scales[:, None]
    z = (x[:, :, None] - mixture.means[:, None]) / scales  # [set, element, k, d]
    z = jnp.clip(z, -1e18, 1e18)  # so that the square stays finite
    log_normal = -0.5 * z**2 - jnp.log(scales) - 0.5 * math.log(2 * math.pi)
    return mixture.log_weights[:, None] + log_normal.sum(-1)
