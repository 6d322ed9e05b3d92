"""Differentiable histograms of the values of a set, one per feature.

`linear_histogram` (linear binning) and `hard_histogram` (one vote per value, with the
gradient of linear binning) scatter their votes forward and gather their gradient
backward: O(elements x features) whatever the number of bins. The published kinds, kept
for reproduction, vote for every bin and are computed one bin at a time. None of them
ever holds elements x features x bins.
"""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


def _check(x: jax.Array, mask: jax.Array | None, num_bins: int) -> None:
    if num_bins < 2:
        raise ValueError(f"num_bins must be at least 2, got {num_bins}.")
    if x.ndim < 2:
        raise ValueError(f"x must be [..., element, feature], got shape {x.shape}.")
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ValueError(
            f"mask must have the shape {x.shape[:-1]} of x without its last axis, "
            f"got {mask.shape}."
        )


def _real(x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Values in at least float32 without what the padding holds, mask with x's rank."""
    x = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
    if mask is None:
        return x, None
    mask = mask.astype(bool)[..., None]
    return jnp.where(mask, x, 0), mask


def _count(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The number of real elements, at least one, to divide a sum [..., feature] by."""
    if mask is None:
        return jnp.asarray(max(x.shape[-2], 1), x.dtype)
    return jnp.maximum(jnp.sum(mask, axis=-2), 1).astype(x.dtype)


def _flat_index(index: jax.Array, num_bins: int) -> jax.Array:
    """Where [..., element, feature] bins lie in a flat [..., feature, num_bins]."""
    num_sets, num_features = math.prod(index.shape[:-2]), index.shape[-1]
    rows = jnp.arange(num_sets * num_features, dtype=index.dtype) * num_bins
    return index + rows.reshape(*index.shape[:-2], 1, num_features)


def _lower_bin(x: jax.Array, num_bins: int) -> tuple[jax.Array, jax.Array]:
    """The lower of the two bins a value lies between, and the share of the upper."""
    position = jnp.clip(x * num_bins - 0.5, 0, num_bins - 1)
    index = jnp.clip(jnp.floor(position), 0, num_bins - 2)
    return index.astype(jnp.int32), position - index


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _histogram(x, mask, num_bins, hard):
    x, mask = _real(x, mask)
    if hard:
        index = jnp.clip(jnp.floor(x * num_bins), 0, num_bins - 1).astype(jnp.int32)
        # A value that is not a number has no bin: let it show.
        votes = jnp.where(jnp.isnan(x), x, 1)[..., None]
    else:
        index, upper = _lower_bin(x, num_bins)
        votes = jnp.stack([1 - upper, upper], axis=-1)
    if mask is not None:
        votes = jnp.where(mask[..., None], votes, 0)
    num_features = x.shape[-1]
    shape = (*x.shape[:-2], num_features, num_bins)
    # One scatter whose window covers both bins: twice as fast as two scatters.
    totals = lax.scatter_add(
        jnp.zeros(math.prod(shape), x.dtype),
        _flat_index(index, num_bins).reshape(-1, 1),
        votes.reshape(-1, votes.shape[-1]),
        lax.ScatterDimensionNumbers(
            update_window_dims=(1,),
            inserted_window_dims=(),
            scatter_dims_to_operand_dims=(0,),
        ),
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
    return totals.reshape(shape) / _count(x, mask)[..., None]


def _histogram_forward(x, mask, num_bins, hard):
    return _histogram(x, mask, num_bins, hard), (x, mask)


def _histogram_backward(num_bins, hard, residuals, cotangent):
    del hard
    dtype = residuals[0].dtype
    x, mask = _real(*residuals)
    slopes = jnp.diff(cotangent, axis=-1) * (num_bins / _count(x, mask)[..., None])
    index, _ = _lower_bin(x, num_bins)
    gradient = slopes.reshape(-1).at[_flat_index(index, num_bins - 1)]
    position = x * num_bins - 0.5
    # Padding counts as 0, which is outside.
    inside = (position > 0) & (position < num_bins - 1)
    gradient = jnp.where(inside, gradient.get(mode="promise_in_bounds"), 0)
    return gradient.astype(dtype), None


_histogram.defvjp(_histogram_forward, _histogram_backward)


def linear_histogram(
    x: jax.Array, num_bins: int = 32, mask: jax.Array | None = None
) -> jax.Array:
    """Histogram by linear binning: a value shares one vote between two bins.

    With t = clip(x b - 1/2, 0, b - 1) and i = floor(t), bin i receives 1 - (t - i) and
    bin i + 1 receives t - i; votes are averaged over the real elements. The votes of a
    value add up to exactly one, and the mean of the histogram over the bins' centres
    (j + 1/2) / b is the mean of x, with slope one, wherever x lies between the first
    and the last centre. Outside, the end bin takes the whole vote and the gradient is
    zero. The backward pass is the exact gradient, (b / m)(g[i + 1] - g[i]).

    Args:
        x: values in [0, 1], [..., element, feature]; accumulated in float32 (float64
            if given).
        num_bins: number of bins b of equal width, at least 2.
        mask: bool [..., element], True for a real element; what padding holds, NaN
            included, touches neither value nor gradient.

    Returns:
        [..., feature, num_bins], summing to one over the bins; zeros for an empty set.

    Raises:
        ValueError: if num_bins is below 2 or a shape is not the one above.
    """
    _check(x, mask, num_bins)
    return _histogram(x, mask, num_bins, False)


def hard_histogram(
    x: jax.Array, num_bins: int = 32, mask: jax.Array | None = None
) -> jax.Array:
    """Histogram by hard votes with the gradient of linear binning.

    Forward, a value gives its one vote to bin min(floor(x b), b - 1), as an ordinary
    histogram does; backward, the gradient is the one of `linear_histogram` (a
    straight-through estimator whose mean slope is one).

    Args:
        x: values in [0, 1], [..., element, feature]; values outside count in the end
            bins.
        num_bins: number of bins b of equal width, at least 2.
        mask: bool [..., element], True for a real element.

    Returns:
        [..., feature, num_bins], summing to one over the bins; zeros for an empty set.

    Raises:
        ValueError: if num_bins is below 2 or a shape is not the one above.
    """
    _check(x, mask, num_bins)
    return _histogram(x, mask, num_bins, True)


def _vote_by_bin(
    vote: Callable[..., jax.Array],
    x: jax.Array,
    mask: jax.Array | None,
    bins: tuple[jax.Array, ...],
) -> jax.Array:
    """Average vote for each bin, one bin at a time in both passes.

    Args:
        vote: (values [..., element, feature], parameters of one bin) -> votes.
        x: [..., element, feature].
        mask: bool [..., element] or None.
        bins: parameters, each [num_bins] or [num_bins, feature].

    Returns:
        [..., feature, num_bins].
    """
    x, mask = _real(x, mask)
    count = _count(x, mask)

    # Recomputed in the backward pass, or every bin's votes would be kept.
    @jax.checkpoint
    def one_bin(parameters):
        return jnp.sum(vote(x, *parameters), axis=-2, where=mask) / count

    return jnp.moveaxis(lax.map(one_bin, bins), 0, -1)


def _centers(num_bins: int) -> jax.Array:
    return (jnp.arange(num_bins) + 0.5) / num_bins


def _learnable_bins(
    module: nn.Module, num_features: int, num_bins: int, width: float
) -> tuple[jax.Array, jax.Array]:
    """Parameters `centers` and `widths`, [feature, num_bins], with the bins leading."""
    shape = (num_features, num_bins)
    centers = module.param(
        "centers", lambda _: jnp.broadcast_to(_centers(num_bins), shape)
    )
    widths = module.param("widths", nn.initializers.constant(width), shape)
    return centers.T, widths.T


class LinearHistogram(nn.Module):
    """`linear_histogram` as a module, without parameters.

    Attributes:
        num_bins: number of bins.
    """

    num_bins: int = 32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Map [..., element, feature] to [..., feature, num_bins]."""
        return linear_histogram(x, self.num_bins, mask)


class HardHistogram(nn.Module):
    """`hard_histogram` as a module, without parameters.

    Attributes:
        num_bins: number of bins.
    """

    num_bins: int = 32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Map [..., element, feature] to [..., feature, num_bins]."""
        return hard_histogram(x, self.num_bins, mask)


class SoftHistogram(nn.Module):
    """Triangular votes with learnable centers and widths (Wang et al. 2016).

    A value votes relu(1 - w |x - c|) for a bin; c starts at (j + 1/2) / b and w at 2b,
    as published, with which a value gives between zero and one vote in all: the
    histogram does not sum to one. ("Learnable Histogram: Statistical Context Features
    for Deep Neural Networks", ECCV 2016.)

    Attributes:
        num_bins: number of bins b.
    """

    num_bins: int = 32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Map [..., element, feature] to [..., feature, num_bins]."""
        _check(x, mask, self.num_bins)
        bins = _learnable_bins(self, x.shape[-1], self.num_bins, 2 * self.num_bins)
        return _vote_by_bin(
            lambda x, center, width: nn.relu(1 - width * jnp.abs(x - center)),
            x,
            mask,
            bins,
        )


class RBFHistogram(nn.Module):
    """Gaussian votes with learnable centers and widths (Peeples et al. 2020).

    A value votes exp(-(w (x - c))^2) for a bin; c starts at (j + 1/2) / b and w at 2b.
    The histogram does not sum to one. ("Histogram Layers for Texture Analysis",
    arXiv:2001.00215.)

    Attributes:
        num_bins: number of bins b.
    """

    num_bins: int = 32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Map [..., element, feature] to [..., feature, num_bins]."""
        _check(x, mask, self.num_bins)
        bins = _learnable_bins(self, x.shape[-1], self.num_bins, 2 * self.num_bins)
        return _vote_by_bin(
            lambda x, center, width: jnp.exp(-jnp.square(width * (x - center))),
            x,
            mask,
            bins,
        )


class SigmoidHistogram(nn.Module):
    """Votes by the difference of two sigmoids, without parameters.

    A value votes sigmoid(s (x - j / b)) - sigmoid(s (x - (j + 1) / b)) for bin j. The
    votes add up to one but near zero and one, where they lose up to a half.

    Attributes:
        num_bins: number of bins b.
        slope: slope s of the sigmoids.
    """

    num_bins: int = 32
    slope: float = 1000.0

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Map [..., element, feature] to [..., feature, num_bins]."""
        _check(x, mask, self.num_bins)
        # Neighbouring bins share an edge: b + 1 sigmoids instead of 2b.
        edges = jnp.arange(self.num_bins + 1) / self.num_bins
        above = _vote_by_bin(
            lambda x, edge: nn.sigmoid(self.slope * (x - edge)), x, mask, (edges,)
        )
        return above[..., :-1] - above[..., 1:]


class HardBinningHistogram(nn.Module):
    """Hard votes with learnable centers and widths (Yusuf et al. 2020).

    A value votes 1.01^(w - |x - c|) for a bin where that exceeds one; c starts at
    (j + 1/2) / b and w at 1 / (2b) + 0.001, as published, so that a value within 0.001
    of an edge votes twice. ("Differentiable Histogram with Hard-Binning",
    arXiv:2012.06311.)

    Attributes:
        num_bins: number of bins b.
    """

    num_bins: int = 32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Map [..., element, feature] to [..., feature, num_bins]."""
        _check(x, mask, self.num_bins)
        width = 0.5 / self.num_bins + 0.001
        bins = _learnable_bins(self, x.shape[-1], self.num_bins, width)

        def vote(x, center, width):
            votes = jnp.exp(math.log(1.01) * (width - jnp.abs(x - center)))
            return jnp.where(votes > 1, votes, 0)

        return _vote_by_bin(vote, x, mask, bins)
