"""GMNet: quantification by likelihoods under learned Gaussians.

    x_i ─ φ ─┬─ MLP ─ sigmoid ─ N(μ_1g, Σ_1g), g = 1, ..., G ─┐
             ├─ ...                                           ├─ normalise ─ l_i
             └─ MLP ─ sigmoid ─ N(μ_Lg, Σ_Lg), g = 1, ..., G ─┘

    p = head(1/m sum_i l_i)

Every element is described by its density under G Gaussians in each of L latent spaces,
the bag by the mean of its elements: a histogram whose cells are learned and lie in
several dimensions, where HistNetQ's are intervals of single features. The latent spaces
are kept apart by a regulariser, the alignment of their kernels. It learns from bags
labelled by their prevalences; no element needs a label.

González et al., arXiv 2501.13638, 2025; where that leaves a choice, as in the authors'
code (https://github.com/AICGijon/gmnet). Kernel alignment: Kornblith, Norouzi, Lee and
Hinton, "Similarity of neural network representations revisited", ICML 2019, arXiv
1905.00414.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .contracts import check_weights, present, zero_absent
from .encoders import MLP, encode_elements
from .pooling import mean_pool, merge_aggregates
from .precision import widen

# The smallest scale of a Gaussian: bounds the density by 400^d.
_MIN_SCALE = 1e-3


def centered_kernel_alignment(
    x: jax.Array, y: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Linear CKA of two representations of the same elements.

        ||Y' X||_F^2 / (||X' X||_F ||Y' Y||_F)

    with the columns of X and Y centered. It lies between 0 and 1, is 1 for
    representations that differ by a rotation, a shift and a scale, and 0 where no
    feature of one correlates with a feature of the other. A representation that is
    constant has the alignment 0.

    Args:
      x: [element, d].
      y: [element, e].
      mask: None or bool [element], True = a real element.

    Returns:
      A scalar, float32 at least.

    Raises:
      ValueError: x and y are not matrices with the same number of rows.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(
            "x and y must be [element, d] and [element, e] with the same elements, "
            f"but their shapes are {x.shape} and {y.shape}."
        )
    return _alignments([x, y], mask)[0, 1]


def _alignments(spaces: Sequence[jax.Array], mask: jax.Array | None) -> jax.Array:
    """Linear CKA of every pair of representations [element, d_i], [space, space]."""
    x = widen(jnp.concatenate(spaces, axis=-1))
    x = zero_absent(x - mean_pool(x, mask), mask)
    covariance = jnp.matmul(x.T, x, precision="highest")  # of all pairs at once
    member = np.repeat(np.eye(len(spaces)), [space.shape[-1] for space in spaces], 0)
    squares = member.T @ covariance**2 @ member  # the squared norms of its blocks
    own = jnp.diagonal(squares)
    varies = own > 0
    norms = jnp.sqrt(jnp.where(varies, own, 1))
    alignments = squares / (norms[:, None] * norms)
    return jnp.where(varies[:, None] & varies, alignments, 0)


class GaussianDensities(nn.Module):
    """Densities of a point under learned Gaussians.

        N(x; μ, Σ) = (2π)^(-d/2) prod_i 1/σ_i exp(-||L'(x - μ)||^2 / 2),    Σ^-1 = L L'

    L is lower triangular with the diagonal 1/σ_i, σ_i = softplus(a_i) + 0.001: every
    covariance matrix whose precision has such a factor can be learned, none degenerates
    and nothing is inverted. The centers μ start uniform in [0, 1]^d; all covariances
    start at s^2 I, where 2s is the mean distance from a center to the nearest other.

    Attributes:
      num_gaussians: G, two or more.
    """

    num_gaussians: int = 100

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [..., d] to densities [..., G], float32 at least.

        Raises:
          ValueError: num_gaussians is below 2.
        """
        count, size = self.num_gaussians, x.shape[-1]
        if count < 2:
            raise ValueError(f"num_gaussians must be 2 or more, not {count}.")
        centers = self.param("centers", nn.initializers.uniform(1.0), (count, size))
        scales = self.param("scales", lambda _: _initial_scales(centers))
        factors = self.param(
            "factors", nn.initializers.zeros, (count, size * (size - 1) // 2)
        )
        return _densities(widen(x), centers, scales, factors)


def _initial_scales(centers: jax.Array) -> jax.Array:
    squares = jnp.sum((centers[:, None] - centers) ** 2, axis=-1)
    nearest = jnp.sqrt(jnp.min(squares, axis=0, initial=jnp.inf, where=squares > 0))
    scale = jnp.maximum(jnp.mean(nearest) / 2 - _MIN_SCALE, _MIN_SCALE)
    return jnp.full_like(centers, jnp.log(jnp.expm1(scale)))  # the inverse of softplus


# Recomputed in the backward pass: the distances along each axis are many times the size
# of x and of the parameters.
@jax.checkpoint
def _densities(
    x: jax.Array, centers: jax.Array, scales: jax.Array, factors: jax.Array
) -> jax.Array:
    count, size = centers.shape
    scales = nn.softplus(scales) + _MIN_SCALE
    rows, columns = np.tril_indices(size, -1)
    lower = jnp.zeros((count, size, size), factors.dtype)
    lower = lower.at[:, rows, columns].set(factors)
    axes = jnp.arange(size)
    lower = lower.at[:, axes, axes].set(1 / scales)
    log_density = -jnp.sum(jnp.log(scales), -1) - size / 2 * math.log(2 * math.pi)
    for i in range(size):
        column = lower[:, i:, i]  # [gaussian, d - i]
        # Differences of projections: no [..., gaussian, d].
        project = partial(jnp.matmul, precision="highest")
        distance = project(x[..., i:], column.T) - jnp.sum(centers[:, i:] * column, -1)
        log_density -= distance**2 / 2
    return jnp.exp(log_density)


class LatentGaussians(nn.Module):
    """One latent space of GMNet: an MLP, a sigmoid and `GaussianDensities`.

    Attributes:
      num_gaussians: G.
      latent_size: the dimension d of the space.
      hidden_sizes: of the MLP.
      dropout_rate: of the MLP.
      dtype: compute dtype of the MLP; what follows is float32 at least.
    """

    num_gaussians: int = 100
    latent_size: int = 5
    hidden_sizes: Sequence[int] = (50,)
    dropout_rate: float = 0.5
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """Maps x [n, f] to points before the sigmoid [n, d] and densities [n, G]."""
        mlp = MLP(
            self.hidden_sizes, self.latent_size, self.dropout_rate, dtype=self.dtype
        )
        points = widen(mlp(x, train=train))
        return points, GaussianDensities(self.num_gaussians)(nn.sigmoid(points))


class GMNet(nn.Module):
    """`p = head(mean_i normalise(densities(x_i)))`.

    The densities (normalised, with full covariances; not responsibilities) span orders
    of magnitude; `normalise` is batch normalisation over the real elements of all bags.
    It keeps moving averages in the collection "batch_stats", which a training step
    passes on. Being affine, it leaves the representation linear in the empirical
    measure of a bag.

    Training adds `cka_weight` times the mean linear CKA (`centered_kernel_alignment`)
    of all pairs of latent spaces, of the points before the sigmoid, to its loss:
    `encode` and `__call__` sow it as "cka" in the collection "losses", if mutable.

        estimate, collected = model.apply(
            variables, inputs, mask, train=True, rngs={"dropout": key},
            mutable=["batch_stats", "losses"],
        )
        loss = error(prevalence, estimate) + sum(jax.tree.leaves(collected["losses"]))

    The defaults are those published for LeQua; beside them a head
    `PrevalenceHead((4000,), num_classes, 0.5)`, AdamW with weight decay 1e-3 and a
    learning rate from 5e-3 reduced by half at plateaus, 100 bags a step, standardised
    inputs without an encoder, and values of `cka_weight` of 0, 0.001, 0.01 and 0.1.

    Attributes:
      head: maps [bag, L * G] to prevalences, such as `PrevalenceHead`.
      encoder: φ, the network of one element that all latent spaces share,
        [n, *features] -> [n, f]; None: they read the elements themselves, as vectors.
      num_spaces: L, the number of latent spaces.
      num_gaussians: G in each latent space.
      latent_size: the dimension of each latent space.
      hidden_sizes: of the MLP before each latent space.
      dropout_rate: of these MLPs.
      cka_weight: of the alignment in the collection "losses"; 0 sows nothing.
      dtype: compute dtype of these MLPs; what follows is float32 at least.
    """

    head: nn.Module
    encoder: nn.Module | None = None
    num_spaces: int = 9
    num_gaussians: int = 100
    latent_size: int = 5
    hidden_sizes: Sequence[int] = (50,)
    dropout_rate: float = 0.5
    cka_weight: float = 0.01
    dtype: Any = None

    def setup(self):
        if self.num_spaces < 1:
            raise ValueError(f"num_spaces must be 1 or more, not {self.num_spaces}.")
        spaces = nn.vmap(
            LatentGaussians,
            in_axes=None,
            out_axes=-2,
            axis_size=self.num_spaces,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
        )
        self.spaces = spaces(
            self.num_gaussians,
            self.latent_size,
            self.hidden_sizes,
            self.dropout_rate,
            self.dtype,
        )
        self.normalise = nn.BatchNorm(momentum=0.9)

    def encode(
        self, inputs: jax.Array, mask: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Inputs [bag, element, *features] -> densities [bag, element, L * G].

        With `train`, the densities are normalised by the statistics of these elements,
        and "batch_stats" must be mutable; otherwise by the moving averages.
        """
        real = None if mask is None else mask.reshape(-1)
        densities = partial(self._densities, real=real)
        return encode_elements(densities, inputs, mask, train=train)

    def _densities(
        self, x: jax.Array, *, real: jax.Array | None, train: bool
    ) -> jax.Array:
        """x [n, *features] -> [n, L * G]."""
        if self.encoder is not None:
            x = self.encoder(x, train=train)
        points, densities = self.spaces(x, train)  # [n, space, d], [n, space, gaussian]
        if self.cka_weight and self.num_spaces > 1 and not self.is_initializing():
            spaces = [points[:, i] for i in range(self.num_spaces)]
            pairs = np.triu_indices(self.num_spaces, 1)
            alignment = jnp.mean(_alignments(spaces, real)[pairs])
            self.sow("losses", "cka", self.cka_weight * alignment)
        if real is not None:
            real = (real | ~jnp.any(real))[:, None]  # nothing real: no statistics of it
        densities = densities.reshape(len(x), self.num_spaces * self.num_gaussians)
        stored = not train or not len(x)  # of no element there are no statistics
        return self.normalise(densities, use_running_average=stored, mask=real)

    def aggregate(
        self,
        features: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Densities [bag, element, L * G] -> their mean [bag, L * G]."""
        return mean_pool(features, mask, weights)

    def merge(self, representations: jax.Array, totals: jax.Array) -> jax.Array:
        """The representation of bags from those of their parts: a weighted mean.

        Args:
          representations: [chunk, bag, L * G], of parts of each bag.
          totals: floating [chunk, bag], the number (the sum of weights) of elements of
            each.

        Returns:
          [bag, L * G], exact but for training, where each part has its own statistics;
          zero where all totals are zero.
        """
        return merge_aggregates(representations, totals, "mean")

    def decode(self, representation: jax.Array, *, train: bool = False) -> jax.Array:
        """Mean densities [bag, L * G] -> prevalences [bag, K]."""
        return self.head(representation, train=train)

    def __call__(
        self,
        inputs: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Estimates the prevalences of each bag.

        Args:
          inputs: floating [bag, element, *features].
          mask: None or bool [bag, element], True = a real element.
          weights: None or floating [bag, element], multiplicities of the elements; the
            statistics of a training step and the alignment count an element of any
            positive weight once.
          train: switches dropout on, which needs the rng stream "dropout", and the
            statistics of the batch, for which "batch_stats" must be mutable.

        Returns:
          Prevalences [bag, K], float32 or wider. A bag without any real element has
          the prevalences that the head gives to zeros.

        Raises:
          ValueError, TypeError: see `contracts.check_set` and `check_weights`.
        """
        check_weights(weights, inputs.shape[:2])
        features = self.encode(inputs, present(mask, weights), train=train)
        return self.decode(self.aggregate(features, mask, weights), train=train)
