"""Permutation-invariant aggregation: a set of feature vectors becomes one vector.

Every function takes `x [..., element, f]`, a boolean `mask [..., element]` (True = a
real element; None = all are real) and floating `weights [..., element]` (None = all are
1), and returns `[..., f]` in x's dtype; half precision accumulates in float32. Weights
are multiplicities, zero or positive: an element of weight 2 counts as two equal
elements, one of weight 0 is not in the set. Elements that are not in the set, whatever
they hold, change neither the result nor its gradients, and their own gradients are 0.
**The aggregate of an empty set is 0**, for all of them.

What adds up over parts of a set is put together by `merge_aggregates`.
"""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from .contracts import check_mask, check_weights, present
from .precision import wide_dtype, widen

Aggregation = str | float | Sequence[str | float] | Callable[..., jax.Array]


def sum_pool(
    x: jax.Array, mask: jax.Array | None = None, weights: jax.Array | None = None
) -> jax.Array:
    """`sum_i w_i x_i`."""
    return _sum(x, mask, weights).astype(x.dtype)


def mean_pool(
    x: jax.Array, mask: jax.Array | None = None, weights: jax.Array | None = None
) -> jax.Array:
    """`1/m sum_i w_i x_i`, where m = sum_i w_i counts the elements of the set."""
    return _mean(x, mask, weights).astype(x.dtype)


def sqrt_sum_pool(
    x: jax.Array, mask: jax.Array | None = None, weights: jax.Array | None = None
) -> jax.Array:
    """`1/sqrt(m) sum_i w_i x_i`.

    Of centered independent features its variance does not depend on the size m, where
    that of the sum grows and that of the mean shrinks with m.
    """
    root = jnp.sqrt(_at_least_one(x, mask, weights))
    return (_sum(x, mask, weights) / root).astype(x.dtype)


def log_count_pool(
    x: jax.Array, mask: jax.Array | None = None, weights: jax.Array | None = None
) -> jax.Array:
    """`log(1 + m)`, [..., 1]: the size that a mean does not tell."""
    count = _count(x, mask, weights).astype(wide_dtype(x))
    return jnp.broadcast_to(jnp.log1p(count), (*x.shape[:-2], 1)).astype(x.dtype)


def max_pool(
    x: jax.Array, mask: jax.Array | None = None, weights: jax.Array | None = None
) -> jax.Array:
    """`max_i x_i`; the gradient is shared evenly by elements that tie."""
    real = _real(x, present(mask, weights))
    top = jnp.max(jnp.where(real, x, -jnp.inf), axis=-2, initial=-jnp.inf)
    return _unless_empty(top, x, mask, weights)


def min_pool(
    x: jax.Array, mask: jax.Array | None = None, weights: jax.Array | None = None
) -> jax.Array:
    """`min_i x_i`; the gradient is shared evenly by elements that tie."""
    real = _real(x, present(mask, weights))
    bottom = jnp.min(jnp.where(real, x, jnp.inf), axis=-2, initial=jnp.inf)
    return _unless_empty(bottom, x, mask, weights)


def median_pool(
    x: jax.Array, mask: jax.Array | None = None, weights: jax.Array | None = None
) -> jax.Array:
    """The median per feature; of an even number of elements the mean of the middle two.

    Weighted, with C(v) the weight of the elements up to v, it is the mean of the
    smallest v with C(v) >= m/2 and the smallest with C(v) > m/2; weights are rounded to
    about 2^-30 of their sum (2^-60 in float64). Elements that tie share the gradient
    evenly.
    """
    multiset = _Multiset(x, mask, weights)
    lower, upper = multiset.middle_ranks()
    # Halved first: the sum may be beyond the dtype.
    return multiset.order_statistic(lower) / 2 + multiset.order_statistic(upper) / 2


def lower_median_pool(
    x: jax.Array, mask: jax.Array | None = None, weights: jax.Array | None = None
) -> jax.Array:
    """The median per feature; of an even number of elements the lower middle one.

    This is the median of the published set networks (`torch.median`). Elements that tie
    share the gradient evenly.
    """
    multiset = _Multiset(x, mask, weights)
    lower, _ = multiset.middle_ranks()
    return multiset.order_statistic(lower)


def quantile_pool(
    x: jax.Array,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
    *,
    quantile: float = 0.5,
    bandwidth: float = 0.0,
) -> jax.Array:
    """The quantile per feature, with linear interpolation as in `numpy.quantile`.

    The elements, as many times as their weights say, are numbered 0 to m - 1 in
    ascending order; the quantile q is the value at position q (m - 1). (Weights that
    sum to one therefore describe a set of one element: give multiplicities.)

    The exact gradient reaches one or two elements of a set. A positive bandwidth h
    changes the gradient alone: that of an order statistic v is then

        dv/dx_i = w_i K((x_i - v) / s) / sum_j w_j K((x_j - v) / s),    K(z) = e^(-z²/2)

    with s = h times the mean of |x_j - v|. It is the gradient of the quantile of the
    distribution smoothed by K (by the implicit function theorem), taken at v: the
    elements near v share what v alone received. It still adds up to one.

    Args:
      x: [..., element, f].
      mask: None or bool [..., element].
      weights: None or floating [..., element].
      quantile: q, from 0 to 1.
      bandwidth: h; 0 for the exact gradient, which elements that tie share evenly.

    Returns:
      [..., f].

    Raises:
      ValueError: quantile or bandwidth are out of range.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must lie between 0 and 1, but it is {quantile}.")
    if bandwidth < 0:
        raise ValueError(f"bandwidth must be 0 or more, but it is {bandwidth}.")
    multiset = _Multiset(x, mask, weights)
    position = quantile * jnp.maximum(multiset.size() - 1, 0)
    rank = jnp.floor(position)
    share = position - rank
    statistic = partial(multiset.order_statistic, bandwidth=bandwidth)
    lower = statistic(multiset.in_parts(rank))
    # At a whole position there may be no next element; and 0 * inf is not a number.
    upper = statistic(multiset.in_parts(jnp.where(share > 0, rank + 1, rank)))
    between = (1 - share) * lower + share * upper
    return jnp.where(share > 0, between, lower).astype(x.dtype)


def std_pool(
    x: jax.Array,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
    *,
    epsilon: float = 1e-6,
) -> jax.Array:
    """`sqrt(1/m sum_i w_i (x_i - mean)^2 + epsilon)`.

    The epsilon keeps the gradient finite where all elements are equal; there the result
    is sqrt(epsilon).
    """
    real = present(mask, weights)
    if real is not None:
        x = jnp.where(_real(x, real), x, 0)
    deviation = widen(x) - jnp.expand_dims(_mean(x, mask, weights), -2)
    std = jnp.sqrt(_mean(deviation**2, mask, weights) + epsilon)
    return _unless_empty(std, x, mask, weights).astype(x.dtype)


def logsumexp_pool(
    x: jax.Array, mask: jax.Array | None = None, weights: jax.Array | None = None
) -> jax.Array:
    """`log sum_i w_i exp(x_i)`, a smooth maximum."""
    real = present(mask, weights)
    wide = jnp.where(_real(x, real), widen(x), -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(wide, axis=-2, keepdims=True, initial=-jnp.inf))
    top = jnp.where(jnp.isfinite(top), top, 0)
    terms = jnp.exp(wide - top)
    if weights is not None:
        terms = terms * _clean_weights(x, mask, weights)
    total = jnp.sum(terms, axis=-2)
    # The empty set: log(1) = 0, chosen before the logarithm for finite gradients.
    total = jnp.where(_any(x, real), total, 1)
    return (jnp.log(total) + jnp.squeeze(top, -2)).astype(x.dtype)


class Quantiles(nn.Module):
    """Quantiles side by side whose gradient many elements share: `quantile_pool`.

    Attributes:
      quantiles: each from 0 to 1; 0.5 is the median.
      bandwidth: of the gradient's kernel, in mean absolute deviations of a set from its
        quantile; 0 for the exact gradient.
    """

    quantiles: Sequence[float] = (0.5,)
    bandwidth: float = 0.5

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Maps x [..., element, f] to [..., q * f] for q quantiles."""
        pool = partial(quantile_pool, bandwidth=self.bandwidth)
        parts = [pool(x, mask, weights, quantile=q) for q in self.quantiles]
        return jnp.concatenate(parts, axis=-1)


class PowerMean(nn.Module):
    """`(1/m sum_i w_i y_i^p)^(1/p)`, `y = softplus(x) + epsilon`, with p learned.

    The exponent p, one per feature, makes the mean (1), the geometric mean (0), the
    harmonic mean (-1), and tends to the maximum and the minimum (±infinity). The
    features are made positive first, for powers to be defined. Computed in logarithms:

        1/p (log sum_i w_i exp(p log y_i) - log m)

    and by its Taylor series in p where p log y hardly varies within the set.

    Attributes:
      exponent: of all features at the start.
      epsilon: the smallest feature.
    """

    exponent: float = 1.0
    epsilon: float = 1e-6

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Maps x [..., element, f] to [..., f]."""
        real = present(mask, weights)
        wide = widen(x if real is None else jnp.where(_real(x, real), x, 0))
        log_y = jnp.log(nn.softplus(wide) + self.epsilon)
        out = _power_mean(log_y, self._exponents(x.shape[-1]), mask, weights)
        return out.astype(x.dtype)

    def merge(self, representations: jax.Array, totals: jax.Array) -> jax.Array:
        """Of parts [chunk, ..., f] and their sizes [chunk, ...] makes [..., f]."""
        parts, totals = _chunks_last(representations, totals)
        log_y = jnp.log(jnp.where(totals[..., None] > 0, widen(parts), 1))
        out = _power_mean(log_y, self._exponents(parts.shape[-1]), None, totals)
        return out.astype(representations.dtype)

    @nn.compact
    def _exponents(self, features: int) -> jax.Array:
        return self.param(
            "exponent", nn.initializers.constant(self.exponent), (features,)
        )


_POOLS = {
    pool.__name__.removesuffix("_pool"): pool
    for pool in (
        sum_pool,
        mean_pool,
        sqrt_sum_pool,
        log_count_pool,
        max_pool,
        min_pool,
        median_pool,
        lower_median_pool,
        std_pool,
        logsumexp_pool,
    )
}


def aggregate(
    x: jax.Array,
    mask: jax.Array | None = None,
    aggregation: Aggregation = "mean",
    weights: jax.Array | None = None,
) -> jax.Array:
    """Aggregates by name; several names give several aggregates side by side.

    Args:
      x: [..., element, f].
      mask: None or bool [..., element].
      aggregation: a function's name in this module without "_pool" ("sum", "mean",
        "sqrt_sum", "log_count", "max", "min", "median", "lower_median", "std",
        "logsumexp"), or a number between 0 and 1 for that quantile, or several of
        these; or a function or module, called with (x, mask, weights).
      weights: None or floating [..., element], multiplicities.

    Returns:
      [..., f] for one name, [..., a * f] for a sequence of a names; but "log_count" is
      a single number, [..., 1].

    Raises:
      ValueError: an unknown name, no name, or a mask or weights of another shape.
      TypeError: the mask is not boolean or the weights are not floating.
    """
    check_mask(mask, x.shape[:-1])
    check_weights(weights, x.shape[:-1])
    if callable(aggregation):
        return aggregation(x, mask, weights)
    pools = [
        _POOLS[name] if isinstance(name, str) else partial(quantile_pool, quantile=name)
        for name in _names(aggregation)
    ]
    return jnp.concatenate([pool(x, mask, weights) for pool in pools], axis=-1)


def merge_aggregates(
    representations: jax.Array, totals: jax.Array, aggregation: Aggregation = "mean"
) -> jax.Array:
    """The aggregate of a set from the aggregates of its parts.

    Args:
      representations: [chunk, ..., r], what `aggregate` gave for each part of a set.
      totals: floating [chunk, ...], the number of elements of each part, that is the
        sum of their weights; a part of 0 elements does not count.
      aggregation: the one that was used. "sum", "mean", "sqrt_sum", "log_count",
        "max", "min" and "logsumexp" can be merged, several of them too, and a module
        that has a method `merge(representations, totals)`.

    Returns:
      [..., r].

    Raises:
      ValueError: another aggregation, or totals of another shape.
      TypeError: the totals are not floating.
    """
    check_weights(totals, representations.shape[:-1])
    if callable(aggregation):
        if not hasattr(aggregation, "merge"):
            raise ValueError(_not_mergeable(type(aggregation).__name__))
        return aggregation.merge(representations, totals)
    names = _names(aggregation)
    for name in names:
        if name not in _MERGES:
            raise ValueError(_not_mergeable(repr(name)))
    parts, totals = _chunks_last(representations, totals)
    num_wide = sum(name != "log_count" for name in names)
    width = (parts.shape[-1] - names.count("log_count")) // max(num_wide, 1)
    merged, start = [], 0
    for name in names:
        end = start + (1 if name == "log_count" else width)
        merged.append(_MERGES[name](parts[..., start:end], totals))
        start = end
    return jnp.concatenate(merged, axis=-1)


def _merge_sqrt_sum(parts: jax.Array, totals: jax.Array) -> jax.Array:
    there = totals > 0
    roots = jnp.sqrt(jnp.where(there, totals, 1))  # it has no slope at 0
    sums = _sum(parts, there, roots)
    return (sums / jnp.sqrt(_at_least_one(parts, None, totals))).astype(parts.dtype)


_MERGES = {
    "sum": lambda parts, totals: sum_pool(parts, totals > 0),
    "mean": lambda parts, totals: mean_pool(parts, None, totals),
    "sqrt_sum": _merge_sqrt_sum,
    "log_count": lambda parts, totals: log_count_pool(parts, None, totals),
    "max": lambda parts, totals: max_pool(parts, totals > 0),
    "min": lambda parts, totals: min_pool(parts, totals > 0),
    "logsumexp": lambda parts, totals: logsumexp_pool(parts, totals > 0),
}


def _not_mergeable(name: str) -> str:
    return (
        f"the aggregation {name} of a set does not follow from those of its parts; "
        f"those that can be merged are {', '.join(_MERGES)}."
    )


def _chunks_last(
    representations: jax.Array, totals: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return jnp.moveaxis(representations, 0, -2), jnp.moveaxis(totals, 0, -1)


def _names(aggregation: str | float | Sequence[str | float]) -> tuple[str | float, ...]:
    """The names and numbers of an aggregation, checked."""
    one = isinstance(aggregation, (str, int, float))
    names = (aggregation,) if one else tuple(aggregation)
    known = [
        name in _POOLS if isinstance(name, str) else 0 < name < 1 for name in names
    ]
    if not names or not all(known):
        raise ValueError(
            f"aggregation must name one or more of {', '.join(_POOLS)}, or be a "
            f"quantile between 0 and 1, but {aggregation!r} was given."
        )
    return names


def _real(x: jax.Array, real: jax.Array | None) -> jax.Array:
    """Which elements are in the set, as [..., element, 1]."""
    if real is None:
        return jnp.ones((x.shape[-2], 1), bool)
    return real[..., None]


def _clean_weights(
    x: jax.Array, mask: jax.Array | None, weights: jax.Array
) -> jax.Array:
    """The weights as [..., element, 1], zero at padding."""
    real = present(mask, weights)
    return jnp.where(real, weights, 0).astype(wide_dtype(x))[..., None]


def _count(
    x: jax.Array, mask: jax.Array | None, weights: jax.Array | None = None
) -> jax.Array:
    """The number of elements, [..., 1]: an integer, or floating where weighted."""
    if weights is None:
        return jnp.sum(_real(x, mask), axis=-2, dtype=jnp.int32)
    return jnp.sum(_clean_weights(x, mask, weights), axis=-2)


def _at_least_one(
    x: jax.Array, mask: jax.Array | None, weights: jax.Array | None
) -> jax.Array:
    """The number of elements [..., 1] to divide by: one where there are none."""
    count = _count(x, mask, weights)
    return jnp.where(count > 0, count, 1)


def _any(x: jax.Array, real: jax.Array | None) -> jax.Array:
    return _count(x, real) > 0


def _sum(
    x: jax.Array, mask: jax.Array | None, weights: jax.Array | None = None
) -> jax.Array:
    real = present(mask, weights)
    wide = widen(x if real is None else jnp.where(_real(x, real), x, 0))
    if weights is not None:
        wide = wide * _clean_weights(x, mask, weights)
    return jnp.sum(wide, -2)


def _mean(x: jax.Array, mask: jax.Array | None, weights: jax.Array | None) -> jax.Array:
    return _sum(x, mask, weights) / _at_least_one(x, mask, weights)


def _unless_empty(
    y: jax.Array, x: jax.Array, mask: jax.Array | None, weights: jax.Array | None
) -> jax.Array:
    return jnp.where(_any(x, present(mask, weights)), y, 0)


def _power_mean(
    log_y: jax.Array,
    exponent: jax.Array,
    mask: jax.Array | None,
    weights: jax.Array | None,
) -> jax.Array:
    """`(1/m sum_i w_i y_i^p)^(1/p)` of log y [..., element, f] and p [f]."""
    center = _mean(log_y, mask, weights)
    z = log_y - center[..., None, :]
    real = _real(log_y, present(mask, weights))
    spread = jnp.max(jnp.where(real, jnp.abs(z), 0), axis=-2, initial=0)
    # 1/p (logsumexp - log m) loses digits as p z nears 0: there, the cumulants of z.
    # Each of the two sees harmless numbers where the other is taken.
    near = jnp.abs(exponent) * spread < 0.1
    p, small = jnp.where(near, 1, exponent), jnp.where(near[..., None, :], z, 0)
    count = _at_least_one(log_y, mask, weights)
    total = logsumexp_pool(p[..., None, :] * z, mask, weights)
    far = (total - jnp.log(count)) / p
    second, third, fourth = (_mean(small**k, mask, weights) for k in (2, 3, 4))
    series = exponent * (
        second / 2 + exponent * (third / 6 + exponent * (fourth - 3 * second**2) / 24)
    )
    out = jnp.exp(center + jnp.where(near, series, far))
    return _unless_empty(out, log_y, mask, weights)


class _Multiset:
    """Elements of which each counts as a whole number of equal parts.

    Sums of whole numbers do not depend on their order, those of floating-point weights
    do: an element in the middle could be chosen by rounding. A weight of 1 is
    2^shift parts, so many that the sum of all has about 30 bits (60 in float64);
    positive weights have one part at least. Without weights an element is one part.
    """

    def __init__(
        self, x: jax.Array, mask: jax.Array | None, weights: jax.Array | None
    ) -> None:
        self.present = real = present(mask, weights)
        self.x = x if real is None else jnp.where(_real(x, real), x, 0)
        self.real = _real(x, real)  # [..., element, 1]
        self.weights = self.parts = None
        self.integer = jnp.int32
        if weights is None:
            return
        self.weights = _clean_weights(x, mask, weights)
        exact = jax.lax.stop_gradient(self.weights)
        bits = 30
        if exact.dtype == jnp.float64:
            bits, self.integer = 60, jnp.int64
        # First parts so large that all elements could have the largest weight, then
        # as small as their number allows.
        number = _count(x, real)[..., None, :]
        largest = exact.max(-2, keepdims=True, initial=0)
        room = bits - _num_bits(number) - _num_bits(largest)
        coarse = jnp.ceil(jnp.ldexp(exact, room)).astype(self.integer)
        total = jnp.sum(coarse, axis=-2, keepdims=True, dtype=self.integer)
        self.shift = bits + room - _num_bits(total)  # [..., 1, 1]
        parts = jnp.round(jnp.ldexp(exact, self.shift))
        self.parts = jnp.where(self.real, jnp.maximum(parts, 1), 0).astype(self.integer)

    def count(self) -> jax.Array:
        """The parts of all elements, integer [..., 1]."""
        parts = self.real if self.parts is None else self.parts
        return jnp.sum(parts, axis=-2, dtype=self.integer)

    def size(self) -> jax.Array:
        """The sum of the weights, floating [..., 1]."""
        count = self.count().astype(wide_dtype(self.x))
        return count if self.parts is None else jnp.ldexp(count, -self.shift[..., 0])

    def in_parts(self, rank: jax.Array) -> jax.Array:
        """Ranks [..., 1] among elements of weight 1, as ranks among parts."""
        if self.parts is not None:
            rank = jnp.ldexp(rank, self.shift[..., 0])
        # The last one may have been rounded up to the number of parts.
        last = jnp.maximum(self.count() - 1, 0)
        most = last.astype(rank.dtype)
        return jnp.minimum(jnp.minimum(rank, most).astype(self.integer), last)

    def middle_ranks(self) -> tuple[jax.Array, jax.Array]:
        """The ranks of the lower and the upper of the middle parts, each [..., 1]."""
        count = self.count()
        return jnp.maximum(count - 1, 0) // 2, count // 2

    def order_statistic(self, rank: jax.Array, bandwidth: float = 0.0) -> jax.Array:
        """The smallest element with more than `rank` parts no larger, [..., f].

        That of rank 0 is the smallest of all. For the bandwidth see `quantile_pool`.
        """
        chosen = _select(
            self.x, self.real, self.weights, self.parts, rank[..., None, :], bandwidth
        )
        return _unless_empty(chosen, self.x, self.present, None)


def _num_bits(x: jax.Array) -> jax.Array:
    """The smallest b with x < 2^b, int32; of x >= 0."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        # Rounded to floating-point numbers an integer is at most its next power of two.
        x = x.astype(jnp.float32)
    return jnp.frexp(x)[1]


@partial(jax.custom_jvp, nondiff_argnums=(5,))
def _select(
    x: jax.Array,
    real: jax.Array,
    weights: jax.Array | None,
    parts: jax.Array | None,
    rank: jax.Array,
    bandwidth: float,
) -> jax.Array:
    """The order statistic of x [..., element, f], all else [..., element or 1, 1].

    The answer is built bit by bit, by counting what is smaller; on CPUs this is about
    ten times faster than sorting, and it is exact.
    """
    del weights, bandwidth
    keys = _ordered_bits(x)
    # Padding sorts last; a NaN among real elements sorts after the infinities.
    keys = jnp.where(real, keys, ~keys.dtype.type(0))
    bits = jnp.iinfo(keys.dtype).bits

    def set_bit(i: jax.Array, answer: jax.Array) -> jax.Array:
        candidate = answer | (keys.dtype.type(1) << (bits - 1 - i).astype(keys.dtype))
        smaller = keys < candidate
        counted = smaller if parts is None else jnp.where(smaller, parts, 0)
        below = jnp.sum(counted, axis=-2, keepdims=True, dtype=rank.dtype)
        return jnp.where(below <= rank, candidate, answer)

    start = jnp.zeros((*x.shape[:-2], 1, x.shape[-1]), keys.dtype)
    chosen = jax.lax.fori_loop(0, bits, set_bit, start)
    return jnp.squeeze(_from_ordered_bits(chosen, x.dtype), -2)


@_select.defjvp
def _select_jvp(bandwidth, primals, tangents):
    x, real, weights, *_ = primals
    value = _select(*primals, bandwidth)
    at = value[..., None, :]
    counted = real.astype(wide_dtype(x)) if weights is None else weights
    kernel = (x == at).astype(wide_dtype(x))
    if bandwidth:
        distance = jnp.where(real, jnp.abs(widen(x) - widen(at)), 0)
        total = jnp.sum(counted, axis=-2, keepdims=True)
        deviation = jnp.sum(counted * distance, axis=-2, keepdims=True) / total
        scale = bandwidth * jnp.where(deviation > 0, deviation, 1)
        kernel = jnp.exp(-((distance / scale) ** 2) / 2)
    votes = jnp.where(real, counted * kernel, 0)
    total = jnp.sum(votes, axis=-2, keepdims=True)
    share = votes / jnp.where(total > 0, total, 1)
    return value, jnp.sum(share * widen(tangents[0]), axis=-2).astype(x.dtype)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the floating-point numbers x."""
    bits = jnp.finfo(x.dtype).bits
    unsigned = jnp.dtype(f"uint{bits}")
    raw = jax.lax.bitcast_convert_type(x + 0, unsigned)  # -0 + 0 = 0
    top = unsigned.type(1 << (bits - 1))
    return jnp.where(raw & top, ~raw, raw | top)


def _from_ordered_bits(keys: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The inverse of `_ordered_bits`."""
    top = keys.dtype.type(1 << (jnp.iinfo(keys.dtype).bits - 1))
    raw = jnp.where(keys & top, keys ^ top, ~keys)
    return jax.lax.bitcast_convert_type(raw, dtype)
