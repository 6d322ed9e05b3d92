"""Differentiable histograms of the values of a set, one per feature.

The votes of `linear_histogram` (linear binning), `hard_histogram` (one vote per value,
with the gradient of linear binning), `cubic_histogram` (cubic B-splines) and
`adaptive_histogram` (linear binning between given centers) are scattered forward, and
their gradient is gathered backward: O(elements x features) whatever the number of bins,
and the values are the only thing of their size that is kept between the passes. Where
the backend scatters slowly, one-hot matrices are multiplied instead, a bounded chunk of
elements at a time, and looked up in like manner where it gathers slowly. The published
kinds, kept for reproduction, vote for every bin and are computed one bin at a time.
None of them ever holds elements x features x bins.

All of them average votes over a set whose elements may have a mask and weights. A
weight is a multiplicity, `sum_i w_i vote(x_i) / sum_i w_i`: an element of weight 2
counts as two, one of weight 0 is absent, and so is one where the mask is False; what
absent elements hold, NaN included, touches neither value nor gradient. The gradient
with respect to the weights is exact where they are positive and zero where they are
zero. **The histogram of an empty set is 0.**
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from .contracts import check_mask, check_weights, present
from .precision import wide_dtype, widen

# One-hot numbers held at a time, where votes are not scattered.
_MAX_DENSE_SIZE = 2**24


def _check(
    x: jax.Array, mask: jax.Array | None, weights: jax.Array | None, num_bins: int
) -> None:
    if num_bins < 2:
        raise ValueError(f"num_bins must be at least 2, got {num_bins}.")
    if x.ndim < 2:
        raise ValueError(f"x must be [..., element, feature], got shape {x.shape}.")
    check_mask(mask, x.shape[:-1])
    check_weights(weights, x.shape[:-1])


def _multiplicities(
    x: jax.Array, mask: jax.Array | None, weights: jax.Array | None
) -> jax.Array | None:
    """Mask and weights as one array [..., element], or None where all count once."""
    counted = present(mask, weights)
    if counted is None:
        return None
    weights = 1 if weights is None else weights
    return jnp.where(counted, jnp.asarray(weights, wide_dtype(x)), 0)


def _zeroed(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Values in at least float32, without what absent elements hold."""
    x = widen(x)
    return x if weights is None else jnp.where(weights[..., None] > 0, x, 0)


def _total(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    """What a sum [..., feature, bin] of votes is divided by; one for an empty set."""
    if weights is None:
        return jnp.asarray(max(x.shape[-2], 1), x.dtype)
    total = jnp.sum(weights, axis=-1)
    return jnp.where(total > 0, total, 1)[..., None, None]


def _weighted(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    return x if weights is None else x * weights[..., None]


def _weights_gradient(agreement: jax.Array, weights: jax.Array) -> jax.Array:
    """Gradient of an average with respect to its weights.

    Args:
        agreement: [..., element, feature], each element's votes times the cotangent
            divided by the total weight.
        weights: [..., element].
    """
    agreement = jnp.sum(agreement, axis=-1)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mean = jnp.sum(weights * agreement, -1, keepdims=True) / jnp.where(total, total, 1)
    return (agreement - mean).astype(weights.dtype)


def _flat_index(index: jax.Array, width: int) -> jax.Array:
    """Where [..., element, feature] entries lie in a flat [..., feature, width]."""
    num_sets, num_features = math.prod(index.shape[:-2]), index.shape[-1]
    rows = jnp.arange(num_sets * num_features, dtype=index.dtype) * width
    return index + rows.reshape(*index.shape[:-2], 1, num_features)


def _scatter(index: jax.Array, votes: jax.Array, width: int) -> jax.Array:
    shape = (*index.shape[:-2], index.shape[-1], width)
    # One scatter whose window covers a value's bins: twice as fast as two scatters.
    totals = lax.scatter_add(
        jnp.zeros(math.prod(shape), votes.dtype),
        _flat_index(index, width).reshape(-1, 1),
        votes.reshape(-1, votes.shape[-1]),
        lax.ScatterDimensionNumbers(
            update_window_dims=(1,),
            inserted_window_dims=(),
            scatter_dims_to_operand_dims=(0,),
        ),
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
    return totals.reshape(shape)


def _dense_scatter(
    index: jax.Array, votes: jax.Array, width: int, max_size: int = _MAX_DENSE_SIZE
) -> jax.Array:
    """`_scatter` as products of one-hot matrices, one per set and feature.

    With the bins numbered by two digits, about the square root of `width` values each,
    `totals[high, low] = sum_i [high_i = high] ([low_i = low] votes_i)`. The one-hot
    vectors of the digits are held, not those of bins: at most `max_size` numbers.
    """
    num_low = 1 << ((width - 1).bit_length() + 1) // 2
    num_high = -(-width // num_low)

    def total(chunk):
        index, votes = chunk
        bins = index[..., None] + jnp.arange(votes.shape[-1], dtype=index.dtype)
        high = jax.nn.one_hot(bins // num_low, num_high, dtype=votes.dtype)
        low = jax.nn.one_hot(bins % num_low, num_low, dtype=votes.dtype)
        totals = jnp.einsum(
            "...nfkh,...nfkl->...fhl",
            high,
            low * votes[..., None],
            precision=lax.Precision.HIGHEST,  # votes are no less exact on a TPU
        )
        return totals.reshape(*totals.shape[:-2], -1)[..., :width]

    num_elements = index.shape[-2]
    per_element = votes.size // max(num_elements, 1) * (num_high + num_low)
    length = max(max_size // max(per_element, 1), 1)
    if num_elements <= length:
        return total((index, votes))
    count = -(-num_elements // length)

    def chunks(x, axis):
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, count * length - num_elements)
        axis %= x.ndim
        x = jnp.pad(x, widths)  # with votes of zero
        x = x.reshape(*x.shape[:axis], count, length, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def add(totals, chunk):
        return totals + total(chunk), None

    shape = (*index.shape[:-2], index.shape[-1], width)
    chunked = chunks(index, -2), chunks(votes, -3)
    return lax.scan(add, jnp.zeros(shape, votes.dtype), chunked)[0]


def _gather(table: jax.Array, index: jax.Array) -> jax.Array:
    flat = _flat_index(index, table.shape[-1])
    return table.reshape(-1).at[flat].get(mode="promise_in_bounds")


def _dense_gather(
    table: jax.Array, index: jax.Array, max_size: int = _MAX_DENSE_SIZE
) -> jax.Array:
    """`_gather` as a sum over one-hot bins, at most `max_size` of them at a time."""
    bins = jnp.arange(table.shape[-1], dtype=index.dtype)

    def look_up(index):  # [..., feature]
        return jnp.sum(jnp.where(index[..., None] == bins, table, 0), axis=-1)

    per_element = index.size // max(index.shape[-2], 1) * table.shape[-1]
    length = max(max_size // max(per_element, 1), 1)
    rows = lax.map(look_up, jnp.moveaxis(index, -2, 0), batch_size=length)
    return jnp.moveaxis(rows, 0, -2)


def _add_votes(index: jax.Array, votes: jax.Array, width: int) -> jax.Array:
    """Sums the votes of a set's elements by bin.

    Args:
        index: int [..., element, feature], the first bin a value votes for.
        votes: [..., element, feature, k], its votes for that bin and the next.
        width: the number of bins.

    Returns:
        [..., feature, width].
    """
    return lax.platform_dependent(
        index,
        votes,
        cpu=partial(_scatter, width=width),
        default=partial(_dense_scatter, width=width),
    )


def _look_up(table: jax.Array, index: jax.Array) -> jax.Array:
    """The transpose: table [..., feature, width] at index [..., element, feature]."""
    return lax.platform_dependent(table, index, tpu=_dense_gather, default=_gather)


class _Votes(NamedTuple):
    """How a value votes for bins of equal width.

    Attributes:
        values: (x, num_bins) -> the first bin voted for, and the votes for it and the
            next, each [..., element, feature].
        slopes: (x, num_bins) -> the first of the differences of neighbouring bins that
            the gradient takes, and its factors but for num_bins.
        beyond: bins added at each end, whose votes go to the end bin.
    """

    values: Callable[[jax.Array, int], tuple[jax.Array, list[jax.Array]]]
    slopes: Callable[[jax.Array, int], tuple[jax.Array, list[jax.Array]]]
    beyond: int = 0


def _linear_values(x, num_bins):
    position = jnp.clip(x * num_bins - 0.5, 0, num_bins - 1)
    index = jnp.clip(jnp.floor(position), 0, num_bins - 2)
    upper = position - index
    return index.astype(jnp.int32), [1 - upper, upper]


def _linear_slopes(x, num_bins):
    index, _ = _linear_values(x, num_bins)
    position = x * num_bins - 0.5
    inside = (position > 0) & (position < num_bins - 1)
    return index, [inside.astype(x.dtype)]


def _hard_values(x, num_bins):
    index = jnp.clip(jnp.floor(x * num_bins), 0, num_bins - 1)
    # A value that is not a number has no bin: let it show.
    return index.astype(jnp.int32), [jnp.where(jnp.isnan(x), x, 1)]


def _cubic_cell(x, num_bins):
    """The lower neighbour among centers that reach from -2 to b + 1, and the rest."""
    position = jnp.clip(x * num_bins - 0.5, -1, num_bins)
    index = jnp.clip(jnp.floor(position), -1, num_bins - 1)
    return index.astype(jnp.int32) + 1, position - index


def _cubic_values(x, num_bins):
    index, u = _cubic_cell(x, num_bins)
    v = 1 - u
    inner = [2 / 3 - t * t * (1 - t / 2) for t in (u, v)]
    return index, [v**3 / 6, *inner, u**3 / 6]


def _cubic_slopes(x, num_bins):
    # The derivative of a B-spline is a difference of splines of one degree less.
    index, u = _cubic_cell(x, num_bins)
    v = 1 - u
    return index, [v * v / 2, 0.5 + u * v, u * u / 2]


_LINEAR = _Votes(_linear_values, _linear_slopes)
_HARD = _Votes(_hard_values, _linear_slopes)
_CUBIC = _Votes(_cubic_values, _cubic_slopes, beyond=2)


def _fold(totals: jax.Array, beyond: int) -> jax.Array:
    """Adds what the `beyond` bins at each end received to the end bins within."""
    if not beyond:
        return totals
    first = jnp.sum(totals[..., : beyond + 1], axis=-1, keepdims=True)
    last = jnp.sum(totals[..., -beyond - 1 :], axis=-1, keepdims=True)
    inner = totals[..., beyond + 1 : -beyond - 1]
    return jnp.concatenate([first, inner, last], axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _histogram(x, weights, num_bins, kind):
    values = _zeroed(x, weights)
    index, votes = kind.values(values, num_bins)
    votes = jnp.stack([_weighted(vote, weights) for vote in votes], axis=-1)
    totals = _add_votes(index, votes, num_bins + 2 * kind.beyond)
    return _fold(totals, kind.beyond) / _total(values, weights)


def _histogram_forward(x, weights, num_bins, kind):
    return _histogram(x, weights, num_bins, kind), (x, weights)


def _histogram_backward(num_bins, kind, residuals, cotangent):
    x, weights = residuals
    values = _zeroed(x, weights)
    share = 1 / _total(values, weights)

    def agreement(table, index, factors):
        return sum(
            factor * _look_up(table, index + k) for k, factor in enumerate(factors)
        )

    # Scaled after the differences: the other order takes twice as long on CPUs.
    differences = jnp.diff(cotangent, axis=-1) * (num_bins * share)
    ends = [(0, 0)] * (cotangent.ndim - 1) + [(kind.beyond, kind.beyond)]
    gradient = agreement(jnp.pad(differences, ends), *kind.slopes(values, num_bins))
    gradient = _weighted(gradient, weights).astype(x.dtype)
    if weights is None:
        return gradient, None
    table = jnp.pad(cotangent * share, ends, mode="edge")
    votes = agreement(table, *kind.values(values, num_bins))
    return gradient, _weights_gradient(votes, weights)


_histogram.defvjp(_histogram_forward, _histogram_backward)


def linear_histogram(
    x: jax.Array,
    num_bins: int = 32,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> jax.Array:
    """Histogram by linear binning: a value shares one vote between two bins.

    With t = clip(x b - 1/2, 0, b - 1) and i = floor(t), bin i receives 1 - (t - i) and
    bin i + 1 receives t - i; votes are averaged over the elements. The votes of a
    value add up to exactly one, and the mean of the histogram over the bins' centers
    (j + 1/2) / b is the mean of x, with slope one, wherever x lies between the first
    and the last center. Outside, the end bin takes the whole vote and the gradient is
    zero. The backward pass is the exact gradient, (b / m)(g[i + 1] - g[i]).

    Args:
        x: values in [0, 1], [..., element, feature]; accumulated in float32 (float64
            if given).
        num_bins: number of bins b of equal width, at least 2.
        mask: None or bool [..., element], True for a real element.
        weights: None or floating [..., element], the elements' multiplicities.

    Returns:
        [..., feature, num_bins], summing to one over the bins; zeros for an empty set.

    Raises:
        ValueError: if num_bins is below 2 or a shape is not the one above.
        TypeError: if the mask is not boolean or the weights are not floating.
    """
    _check(x, mask, weights, num_bins)
    return _histogram(x, _multiplicities(x, mask, weights), num_bins, _LINEAR)


def hard_histogram(
    x: jax.Array,
    num_bins: int = 32,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> jax.Array:
    """Histogram by hard votes with the gradient of linear binning.

    Forward, a value gives its one vote to bin min(floor(x b), b - 1), as an ordinary
    histogram does; backward, the gradient is the one of `linear_histogram` (a
    straight-through estimator whose mean slope is one).

    Args:
        x: values in [0, 1], [..., element, feature]; values outside count in the end
            bins.
        num_bins: number of bins b of equal width, at least 2.
        mask: None or bool [..., element], True for a real element.
        weights: None or floating [..., element], the elements' multiplicities.

    Returns:
        [..., feature, num_bins], summing to one over the bins; zeros for an empty set.

    Raises:
        ValueError, TypeError: as `linear_histogram`.
    """
    _check(x, mask, weights, num_bins)
    return _histogram(x, _multiplicities(x, mask, weights), num_bins, _HARD)


def cubic_histogram(
    x: jax.Array,
    num_bins: int = 32,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> jax.Array:
    """Histogram by cubic B-splines: a value shares one vote among four bins.

    With t = x b - 1/2, i = floor(t) and u = t - i, bins i - 1, ..., i + 2 receive
    (1 - u)^3 / 6, 2/3 - u^2 + u^3 / 2, 2/3 - (1 - u)^2 + (1 - u)^3 / 2 and u^3 / 6;
    what falls beyond an end goes to the end bin. The votes of a value add up to exactly
    one and have two continuous derivatives everywhere. The mean of the histogram over
    the bins' centers (j + 1/2) / b is the mean of x, with slope one, where x lies
    between the second and the last but one center; towards the ends the slope falls to
    zero half a bin outside of [0, 1]. The backward pass is the exact gradient.

    Args:
        x: values in [0, 1], [..., element, feature]; accumulated in float32 (float64
            if given).
        num_bins: number of bins b of equal width, at least 2.
        mask: None or bool [..., element], True for a real element.
        weights: None or floating [..., element], the elements' multiplicities.

    Returns:
        [..., feature, num_bins], summing to one over the bins; zeros for an empty set.

    Raises:
        ValueError, TypeError: as `linear_histogram`.
    """
    _check(x, mask, weights, num_bins)
    return _histogram(x, _multiplicities(x, mask, weights), num_bins, _CUBIC)


def _interval(x: jax.Array, centers: jax.Array) -> jax.Array:
    """How many of a feature's centers [feature, num_bins] are at most x, per value.

    Bisection without branches, all values side by side: `jnp.searchsorted` mapped over
    the features takes seven times as long on CPUs.
    """
    num_bins = centers.shape[-1]
    num_steps = num_bins.bit_length()
    length = 2**num_steps - 1
    padding = ((0, 0), (0, length - num_bins))
    flat = jnp.pad(centers, padding, constant_values=jnp.inf).reshape(-1)
    rows = jnp.arange(len(centers), dtype=jnp.int32) * length

    # A loop, for XLA would repeat unrolled steps in all that uses their result.
    def halve(i, count):
        step = 1 << (num_steps - 1 - i)
        pivot = flat.at[rows + count + (step - 1)].get(mode="promise_in_bounds")
        return count + jnp.where(x >= pivot, step, 0)

    count = lax.fori_loop(0, num_steps, halve, jnp.zeros(x.shape, jnp.int32))
    return jnp.minimum(count, num_bins)  # infinity is not below the padding


def _gaps(centers: jax.Array) -> jax.Array:
    gaps = jnp.diff(centers, axis=-1)
    return jnp.where(gaps > 0, gaps, 1)  # no value lies within an empty interval


def _adaptive_votes(x, centers):
    """The interval a value lies in, and the share of the upper of its two centers."""
    num_bins = centers.shape[-1]
    index = _interval(x, centers)

    def at(table):
        flat = jnp.arange(x.shape[-1], dtype=index.dtype) * table.shape[-1]
        flat += jnp.clip(index - 1, 0, num_bins - 2)
        return table.reshape(-1).at[flat].get(mode="promise_in_bounds")

    upper = (x - at(centers[:, :-1])) / at(_gaps(centers))
    return index, jnp.clip(upper, 0, 1)


@jax.custom_vjp
def _adaptive(x, weights, centers):
    return _adaptive_forward(x, weights, centers)[0]


def _adaptive_forward(x, weights, centers):
    values = _zeroed(x, weights)
    index, upper = _adaptive_votes(values, centers)
    votes = [_weighted(vote, weights) for vote in (1 - upper, upper)]
    # Each interval's votes for its two centers apart: the gradient with respect to the
    # centers needs no more.
    parts = _add_votes(2 * index, jnp.stack(votes, -1), 2 * centers.shape[-1] + 2)
    parts = parts / _total(values, weights)
    # Neighbouring intervals meet at a center; those before the first and after the last
    # center vote for it alone.
    ends = [(0, 0)] * (parts.ndim - 1) + [(1, 1)]
    pairs = jnp.pad(parts, ends).reshape(*parts.shape[:-1], -1, 2)
    inner = parts[..., 2:-2].reshape(*parts.shape[:-1], -1, 2)
    return _fold(jnp.sum(pairs, axis=-1), 1), (x, weights, centers, inner)


def _adaptive_backward(residuals, cotangent):
    x, weights, centers, parts = residuals
    values = _zeroed(x, weights)
    index, upper = _adaptive_votes(values, centers)
    ends = [(0, 0)] * (cotangent.ndim - 1) + [(1, 1)]
    slopes = jnp.diff(cotangent, axis=-1) / _gaps(centers)
    moved = -slopes[..., None] * parts  # [..., feature, interval, lower and upper]
    gradient = (
        jnp.pad(moved[..., 0], ends)[..., 1:] + jnp.pad(moved[..., 1], ends)[..., :-1]
    )
    gradient = jnp.sum(gradient, axis=range(gradient.ndim - 2)).astype(centers.dtype)
    total = _total(values, weights)
    x_gradient = _look_up(jnp.pad(slopes / total, ends), index)
    x_gradient = _weighted(x_gradient, weights).astype(x.dtype)
    if weights is None:
        return x_gradient, None, gradient
    table = jnp.pad(cotangent / total, ends, mode="edge")
    lower, higher = (_look_up(table, index + k) for k in (0, 1))
    agreement = (1 - upper) * lower + upper * higher
    return x_gradient, _weights_gradient(agreement, weights), gradient


_adaptive.defvjp(_adaptive_forward, _adaptive_backward)


def adaptive_histogram(
    x: jax.Array,
    centers: jax.Array,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> jax.Array:
    """Histogram by linear binning between given centers.

    With c_i <= x < c_{i+1}, bin i receives 1 - u and bin i + 1 receives u =
    (x - c_i) / (c_{i+1} - c_i); before the first and after the last center the end bin
    takes the whole vote. The votes of a value add up to one, and the mean of the
    histogram over the centers is the mean of x between the first and the last of them.
    At equal widths it is `linear_histogram`. The bin of a value is found by bisection,
    O(log num_bins). The gradients with respect to x and to the centers are exact.

    Args:
        x: values, [..., element, feature]; accumulated in float32 (float64 if given).
        centers: [feature, num_bins], ascending, at least two.
        mask: None or bool [..., element], True for a real element.
        weights: None or floating [..., element], the elements' multiplicities.

    Returns:
        [..., feature, num_bins], summing to one over the bins; zeros for an empty set.

    Raises:
        ValueError: if a shape is not the one above.
        TypeError: if the mask is not boolean or the weights are not floating.
    """
    if centers.ndim != 2 or centers.shape[0] != x.shape[-1]:
        raise ValueError(
            f"centers must be [feature, num_bins] with {x.shape[-1]} features, got "
            f"shape {centers.shape}."
        )
    _check(x, mask, weights, centers.shape[-1])
    return _adaptive(x, _multiplicities(x, mask, weights), widen(centers))


def _vote_by_bin(
    vote: Callable[..., jax.Array],
    x: jax.Array,
    mask: jax.Array | None,
    weights: jax.Array | None,
    bins: tuple[jax.Array, ...],
) -> jax.Array:
    """Average vote for each bin, one bin at a time in both passes.

    Args:
        vote: (values [..., element, feature], parameters of one bin) -> votes.
        x: [..., element, feature].
        mask: None or bool [..., element].
        weights: None or floating [..., element].
        bins: parameters, each [num_bins] or [num_bins, feature].

    Returns:
        [..., feature, num_bins].
    """
    weights = _multiplicities(x, mask, weights)
    x = _zeroed(x, weights)

    # Recomputed in the backward pass, or every bin's votes would be kept.
    @jax.checkpoint
    def one_bin(parameters):
        return jnp.sum(_weighted(vote(x, *parameters), weights), axis=-2)

    sums = jnp.moveaxis(lax.map(one_bin, bins), 0, -1)
    return sums / _total(x, weights)


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
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Map [..., element, feature] to [..., feature, num_bins]."""
        return linear_histogram(x, self.num_bins, mask, weights)


class HardHistogram(nn.Module):
    """`hard_histogram` as a module, without parameters.

    Attributes:
        num_bins: number of bins.
    """

    num_bins: int = 32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Map [..., element, feature] to [..., feature, num_bins]."""
        return hard_histogram(x, self.num_bins, mask, weights)


class CubicHistogram(nn.Module):
    """`cubic_histogram` as a module, without parameters.

    Attributes:
        num_bins: number of bins.
    """

    num_bins: int = 32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Map [..., element, feature] to [..., feature, num_bins]."""
        return cubic_histogram(x, self.num_bins, mask, weights)


class AdaptiveHistogram(nn.Module):
    """Linear binning with learnable edges of the bins, for each feature its own.

    The widths of a feature's bins are a softmax of its parameters, mixed with 1 percent
    of equal widths so that no bin vanishes; the edges are their cumulative sums, from
    zero to one and ascending whatever the parameters, and the centers, between which
    `adaptive_histogram` shares the votes, lie in the middle of the bins. It starts at
    equal widths, as `LinearHistogram`.

    Attributes:
        num_bins: number of bins.
    """

    num_bins: int = 32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Map [..., element, feature] to [..., feature, num_bins]."""
        _check(x, mask, weights, self.num_bins)
        logits = self.param(
            "width_logits", nn.initializers.zeros, (x.shape[-1], self.num_bins)
        )
        widths = 0.99 * nn.softmax(widen(logits)) + 0.01 / self.num_bins
        centers = jnp.cumsum(widths, axis=-1) - widths / 2
        return adaptive_histogram(x, centers, mask, weights)


class CumulativeHistogram(nn.Module):
    """Cumulative sums of a histogram over its bins, an empirical distribution function.

    Entry j is the share of votes for bins 0, ..., j. The last entry stays: it is one
    for a set with elements and zero for an empty one, and the sum of all votes where a
    kind's votes do not add up to one.

    Attributes:
        histogram: a module that maps [..., element, feature] to
            [..., feature, num_bins].
    """

    histogram: nn.Module

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Map [..., element, feature] to [..., feature, num_bins]."""
        return jnp.cumsum(self.histogram(x, mask, weights), axis=-1)


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
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Map [..., element, feature] to [..., feature, num_bins]."""
        _check(x, mask, weights, self.num_bins)
        bins = _learnable_bins(self, x.shape[-1], self.num_bins, 2 * self.num_bins)
        return _vote_by_bin(
            lambda x, center, width: nn.relu(1 - width * jnp.abs(x - center)),
            x,
            mask,
            weights,
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
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Map [..., element, feature] to [..., feature, num_bins]."""
        _check(x, mask, weights, self.num_bins)
        bins = _learnable_bins(self, x.shape[-1], self.num_bins, 2 * self.num_bins)
        return _vote_by_bin(
            lambda x, center, width: jnp.exp(-jnp.square(width * (x - center))),
            x,
            mask,
            weights,
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
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Map [..., element, feature] to [..., feature, num_bins]."""
        _check(x, mask, weights, self.num_bins)
        # Neighbouring bins share an edge: b + 1 sigmoids instead of 2b.
        edges = jnp.arange(self.num_bins + 1) / self.num_bins
        above = _vote_by_bin(
            lambda x, edge: nn.sigmoid(self.slope * (x - edge)),
            x,
            mask,
            weights,
            (edges,),
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
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Map [..., element, feature] to [..., feature, num_bins]."""
        _check(x, mask, weights, self.num_bins)
        width = 0.5 / self.num_bins + 0.001
        bins = _learnable_bins(self, x.shape[-1], self.num_bins, width)

        def vote(x, center, width):
            votes = jnp.exp(math.log(1.01) * (width - jnp.abs(x - center)))
            return jnp.where(votes > 1, votes, 0)

        return _vote_by_bin(vote, x, mask, weights, bins)
