"""Permutation-invariant aggregation: a set of feature vectors becomes one vector.

Every function takes `x [..., element, f]` and a boolean `mask [..., element]` (True = a
real element; None = all are real) and returns `[..., f]` in x's dtype; half precision
accumulates in float32. Masked elements, whatever they hold, change neither the result
nor its gradients. **The aggregate of an empty set is 0**, for all of them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from .contracts import check_mask


def sum_pool(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """`sum_i x_i`."""
    return _sum(x, mask).astype(x.dtype)


def mean_pool(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """`1/m sum_i x_i`, where m counts the real elements."""
    return _mean(x, mask).astype(x.dtype)


def max_pool(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """`max_i x_i`; the gradient is shared evenly by elements that tie."""
    real = _real(x, mask)
    return _unless_empty(
        jnp.max(jnp.where(real, x, -jnp.inf), axis=-2, initial=-jnp.inf), x, mask
    )


def min_pool(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """`min_i x_i`; the gradient is shared evenly by elements that tie."""
    real = _real(x, mask)
    return _unless_empty(
        jnp.min(jnp.where(real, x, jnp.inf), axis=-2, initial=jnp.inf), x, mask
    )


def median_pool(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The median per feature; of an even number of elements the mean of the middle two.

    Among elements that tie, one receives the gradient.
    """
    lower, upper = _middle(x, mask)
    return (lower + upper) / 2


def lower_median_pool(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The median per feature; of an even number of elements the lower middle one.

    This is the median of the published set networks (`torch.median`).
    """
    return _middle(x, mask)[0]


def std_pool(
    x: jax.Array, mask: jax.Array | None = None, *, epsilon: float = 1e-6
) -> jax.Array:
    """`sqrt(1/m sum_i (x_i - mean)^2 + epsilon)`.

    The epsilon keeps the gradient finite where all elements are equal; there the result
    is sqrt(epsilon).
    """
    if mask is not None:
        x = jnp.where(_real(x, mask), x, 0)
    deviation = _wide(x) - jnp.expand_dims(_mean(x, mask), -2)
    std = jnp.sqrt(_mean(deviation**2, mask) + epsilon)
    return _unless_empty(std, x, mask).astype(x.dtype)


def logsumexp_pool(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """`log sum_i exp(x_i)`, a smooth maximum."""
    wide = jnp.where(_real(x, mask), _wide(x), -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(wide, axis=-2, keepdims=True, initial=-jnp.inf))
    top = jnp.where(jnp.isfinite(top), top, 0)
    total = jnp.sum(jnp.exp(wide - top), axis=-2)
    # The empty set: log(1) = 0, chosen before the logarithm for finite gradients.
    total = jnp.where(_any(x, mask), total, 1)
    return (jnp.log(total) + jnp.squeeze(top, -2)).astype(x.dtype)


_POOLS = {
    pool.__name__.removesuffix("_pool"): pool
    for pool in (
        sum_pool,
        mean_pool,
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
    aggregation: str | Sequence[str] = "mean",
) -> jax.Array:
    """Aggregates by name; several names give several aggregates side by side.

    Args:
      x: [..., element, f].
      mask: None or bool [..., element].
      aggregation: a function's name in this module without "_pool" ("sum", "mean",
        "max", "min", "median", "lower_median", "std", "logsumexp"), or several.

    Returns:
      [..., f] for one name, [..., a * f] for a sequence of a names.

    Raises:
      ValueError: an unknown name, no name, or a mask of another shape.
      TypeError: the mask is not boolean.
    """
    names = (aggregation,) if isinstance(aggregation, str) else tuple(aggregation)
    unknown = [name for name in names if name not in _POOLS]
    if unknown or not names:
        raise ValueError(
            f"aggregation must name one or more of {', '.join(_POOLS)}, but "
            f"{aggregation!r} was given."
        )
    check_mask(mask, x.shape[:-1])
    return jnp.concatenate([_POOLS[name](x, mask) for name in names], axis=-1)


def _real(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The mask as [..., element, 1]."""
    if mask is None:
        return jnp.ones((x.shape[-2], 1), bool)
    return mask[..., None]


def _count(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The number of real elements, [..., 1]."""
    return jnp.sum(_real(x, mask), axis=-2, dtype=jnp.int32)


def _any(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    return _count(x, mask) > 0


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _sum(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    return jnp.sum(_wide(x if mask is None else jnp.where(_real(x, mask), x, 0)), -2)


def _mean(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    return _sum(x, mask) / jnp.maximum(_count(x, mask), 1)


def _unless_empty(y: jax.Array, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    return jnp.where(_any(x, mask), y, 0)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the floating-point numbers x."""
    bits = jnp.finfo(x.dtype).bits
    unsigned = jnp.dtype(f"uint{bits}")
    raw = jax.lax.bitcast_convert_type(x + 0, unsigned)  # -0 + 0 = 0
    top = unsigned.type(1 << (bits - 1))
    return jnp.where(raw & top, ~raw, raw | top)


def _order_statistic(keys: jax.Array, rank: jax.Array) -> jax.Array:
    """The element of a rank (0: the smallest) along the axis before the last.

    The answer is built bit by bit, by counting what is smaller; on CPUs this is about
    ten times faster than sorting, and it is exact.

    Args:
      keys: unsigned integers [..., element, f].
      rank: int [..., 1, 1].

    Returns:
      [..., 1, f].
    """
    bits = jnp.iinfo(keys.dtype).bits

    def set_bit(i: jax.Array, answer: jax.Array) -> jax.Array:
        candidate = answer | (keys.dtype.type(1) << (bits - 1 - i).astype(keys.dtype))
        smaller = jnp.sum(keys < candidate, axis=-2, keepdims=True, dtype=jnp.int32)
        return jnp.where(smaller <= rank, candidate, answer)

    start = jnp.zeros_like(keys[..., :1, :])
    return jax.lax.fori_loop(0, bits, set_bit, start)


def _middle(x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The lower and the upper of the middle elements per feature, each [..., f]."""
    if not x.shape[-2]:
        nothing = jnp.zeros((*x.shape[:-2], x.shape[-1]), x.dtype)
        return nothing, nothing
    keys = _ordered_bits(jax.lax.stop_gradient(x))
    # Padding sorts last; a NaN among real elements sorts after the infinities.
    keys = jnp.where(_real(x, mask), keys, ~keys.dtype.type(0))
    count = _count(x, mask)[..., None, :].astype(jnp.int32)  # [..., 1, 1]

    def at(rank: jax.Array) -> jax.Array:
        chosen = _order_statistic(keys, rank)
        index = jnp.argmax(keys == chosen, axis=-2, keepdims=True)
        row = jnp.squeeze(jnp.take_along_axis(x, index, axis=-2), -2)
        return _unless_empty(row, x, mask)

    return at(jnp.maximum(count - 1, 0) // 2), at(count // 2)
