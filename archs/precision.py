"""Half precision is for products; what is added up or exponentiated is wider."""

from typing import Any

import jax
import jax.numpy as jnp


def wide_dtype(x: jax.Array) -> Any:
    """float32, or the dtype of x where that is wider."""
    return jnp.promote_types(x.dtype, jnp.float32)


def widen(x: jax.Array) -> jax.Array:
    """x in float32, or as it is where that is wider."""
    x = jnp.asarray(x)
    return x.astype(wide_dtype(x))
