"""Contracts of set networks: what must hold for every input, as assertions.

A set network `f(inputs, mask)` reads bags `inputs [bag, element, *features]` and a
boolean `mask [bag, element]` (True = a real element; None = all are real). For every
permutation φ of a bag's elements

    invariant:    f({x_i}) = f(φ({x_i}))
    equivariant:  φ(f({x_i})) = f(φ({x_i}))
    padding:      f(x, mask) does not depend on what lies where the mask is False

The functions here check such a contract of any callable on given inputs. They raise
AssertionError with the contract's name, the worst entry, and the difference beside
the tolerance.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

SetFunction = Callable[[jax.Array, jax.Array | None], Any]


def check_set(inputs: jax.Array, mask: jax.Array | None) -> None:
    """Checks the arguments of a set network while it is traced; costs no run time.

    Args:
      inputs: floating [bag, element, *features], at least one feature axis.
      mask: None or bool [bag, element].

    Raises:
      ValueError: an argument has the wrong rank or shape.
      TypeError: an argument has the wrong dtype.
    """
    chex.assert_shape(
        inputs,
        (None, None, None, ...),
        custom_message=(
            "inputs must have shape [bag, element, *features] (three axes or more), "
            f"but its shape is {inputs.shape}."
        ),
        exception_type=ValueError,
    )
    chex.assert_type(
        inputs,
        float,
        custom_message=(
            f"inputs must have a floating dtype, but its dtype is {inputs.dtype}; "
            "normalise integers (such as uint8 images) to floats first."
        ),
        exception_type=TypeError,
    )
    check_mask(mask, inputs.shape[:2])


def check_mask(mask: jax.Array | None, shape: tuple[int, ...]) -> None:
    """Checks that `mask` is None or boolean of the given shape.

    Raises:
      ValueError: the mask has another shape.
      TypeError: the mask is not boolean.
    """
    if mask is None:
        return
    chex.assert_type(
        mask,
        bool,
        custom_message=(
            "mask must have dtype bool (True = a real element), but its dtype is "
            f"{mask.dtype}."
        ),
        exception_type=TypeError,
    )
    chex.assert_shape(
        mask,
        tuple(shape),
        custom_message=(
            f"mask must have shape {tuple(shape)}, one entry per element of inputs, "
            f"but its shape is {mask.shape}."
        ),
        exception_type=ValueError,
    )


def assert_permutation_invariant(
    f: SetFunction,
    inputs: jax.Array,
    mask: jax.Array | None = None,
    *,
    key: jax.Array,
    num_permutations: int = 3,
    rtol: float | None = None,
) -> None:
    """Asserts `f({x_i}) = f(φ({x_i}))` for random permutations φ and the reversal.

    Args:
      f: a function of (inputs, mask) to an array or a pytree of arrays.
      inputs: [bag, element, *features]; every bag is permuted on its own.
      mask: None or bool [bag, element]; permuted along with the elements.
      key: draws the permutations.
      num_permutations: how many random permutations are tried besides the reversal.
      rtol: tolerance relative to max|f|; by default 1e-5 in float32, 2e-2 in half
        precision, 1e-12 in float64.

    Raises:
      AssertionError: the outputs differ, or are not finite.
    """
    expected = f(inputs, mask)
    for order in _orders(key, inputs, num_permutations):
        found = f(_permute(inputs, order), _permute(mask, order))
        _assert_close("permutation invariance", expected, found, rtol)


def assert_permutation_equivariant(
    f: SetFunction,
    inputs: jax.Array,
    mask: jax.Array | None = None,
    *,
    key: jax.Array,
    num_permutations: int = 3,
    rtol: float | None = None,
) -> None:
    """Asserts `φ(f({x_i})) = f(φ({x_i}))`, where every output is [bag, element, ...].

    Where the mask is False outputs are not compared. The arguments and what is raised
    are those of `assert_permutation_invariant`.
    """
    expected = _real_elements(f(inputs, mask), mask)
    for order in _orders(key, inputs, num_permutations):
        moved = _permute(mask, order)
        found = _real_elements(f(_permute(inputs, order), moved), moved)
        permuted = jax.tree.map(partial(_permute, order=order), expected)
        _assert_close("permutation equivariance", permuted, found, rtol)


def assert_padding_invariant(
    f: SetFunction,
    inputs: jax.Array,
    mask: jax.Array | None = None,
    *,
    extra: int = 3,
    rtol: float | None = None,
) -> None:
    """Asserts that padding changes neither the output nor the gradients of `f`.

    Every bag is lengthened by `extra` masked elements, once at its end and once at its
    front, which hold zeros, huge numbers, infinities or NaN; where the given mask is
    already False the contents are replaced too. The gradient with respect to the
    inputs is that of a fixed mixture of f's entries (their plain sum would be constant
    for prevalences): equal for real elements, exactly zero for padding.

    Args:
      f: a function of (inputs, mask) to an array or a pytree of arrays without an
        element axis, differentiable in inputs.
      inputs: [bag, element, *features], floating.
      mask: None or bool [bag, element].
      extra: how many padded elements are added.
      rtol: as in `assert_permutation_invariant`; gradients, in which rounding errors
        cancel less, are allowed a hundred times as much.

    Raises:
      AssertionError: an output or a gradient differs, or is not finite.
    """

    output_and_gradient = _output_and_gradient(f)
    huge = float(jnp.finfo(inputs.dtype).max)
    inputs = np.asarray(inputs)
    mask = np.ones(inputs.shape[:2], bool) if mask is None else np.asarray(mask)
    # The reference is padded with zeros within the given mask and not lengthened.
    clean = np.where(_expand(mask, inputs.ndim), inputs, inputs.dtype.type(0))
    expected, expected_gradient = output_and_gradient(clean, mask)
    for contents in (0.0, huge, -np.inf, np.nan):
        for front in (extra, 0):
            widths = ((0, 0), (front, extra - front))
            padded_mask = np.pad(mask, widths)
            padded = np.pad(inputs, widths + ((0, 0),) * (inputs.ndim - 2))
            real = _expand(padded_mask, inputs.ndim)
            padded = np.where(real, padded, inputs.dtype.type(contents))
            out, gradient = output_and_gradient(padded, padded_mask)
            name = f"padding invariance (padding of {contents:g})"
            _assert_close(name, expected, out, rtol)
            leaked = np.where(real, 0, gradient)
            _assert_close(f"{name}: gradient", np.zeros_like(leaked), leaked, 0.0)
            end = front + inputs.shape[1]
            kept = gradient[:, front:end]
            slack = 100 * (_tolerance(kept.dtype) if rtol is None else rtol)
            _assert_close(f"{name}: gradient", expected_gradient, kept, slack)


def assert_finite_on_empty_set(f: SetFunction, inputs: jax.Array) -> None:
    """Asserts a finite output and gradient where bags have no real element at all.

    Two batches are tried: one of empty bags only, and one in which every other bag is
    full; in the latter the full bags must give what they give among full bags.

    Args:
      f: a function of (inputs, mask) to an array or a pytree of arrays [bag, ...].
      inputs: [bag, element, *features], floating; at least two bags.

    Raises:
      AssertionError: a number is not finite, or an empty bag changed another bag.
    """
    output_and_gradient = _output_and_gradient(f)
    full = np.ones(inputs.shape[:2], bool)
    mixed = full.copy()
    mixed[::2] = False
    for mask in (np.zeros_like(full), mixed):
        out, gradient = output_and_gradient(inputs, mask)
        _assert_finite("finite output on the empty set", out)
        _assert_finite("finite gradient on the empty set", gradient)
    whole = output_and_gradient(inputs, full)
    _assert_close("independence of empty bags", whole[0], out, None, np.s_[1::2])
    slack = 100 * _tolerance(gradient.dtype)
    _assert_close("independence of empty bags", whole[1], gradient, slack, np.s_[1::2])


# Contracts are prepared and compared in NumPy: only `f` is compiled.


def _output_and_gradient(f: SetFunction) -> Callable[..., tuple[Any, jax.Array]]:
    """A compiled function of (inputs, mask): f, and the gradient of a mixture of f."""

    def loss(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
        out = f(x, mask)
        leaves = [_wide(y).ravel() for y in jax.tree.leaves(out)]
        return sum(jnp.cos(jnp.arange(y.size)) @ (y**2 + y) for y in leaves), out

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    return lambda x, mask: gradient(jnp.asarray(x), jnp.asarray(mask))[::-1]


def _orders(key: jax.Array, inputs: jax.Array, count: int) -> list[np.ndarray]:
    """The reversal and `count` random orders, each [bag, element]."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    positions = np.broadcast_to(np.arange(inputs.shape[1]), inputs.shape[:2])
    shuffled = [rng.permuted(positions, axis=1) for _ in range(count)]
    return [positions[:, ::-1], *shuffled]


def _permute(x: jax.Array | None, order: np.ndarray) -> jax.Array | None:
    if x is None:
        return None
    return jnp.asarray(np.take_along_axis(np.asarray(x), _expand(order, x.ndim), 1))


def _expand(x: np.ndarray, ndim: int) -> np.ndarray:
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _real_elements(outputs: Any, mask: jax.Array | None) -> Any:
    if mask is None:
        return outputs

    def real(y: jax.Array) -> np.ndarray:
        y = np.asarray(y)
        return np.where(_expand(np.asarray(mask), y.ndim), y, y.dtype.type(0))

    return jax.tree.map(real, outputs)


def _tolerance(dtype: Any) -> float:
    bits = jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.floating) else 32
    return {16: 2e-2, 32: 1e-5, 64: 1e-12}.get(bits, 1e-5)


def _assert_finite(contract: str, outputs: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(outputs):
        values = _wide(np.asarray(leaf))
        if not np.isfinite(values).all():
            bad = np.argwhere(~np.isfinite(values))[0]
            where = _position(path, bad)
            raise AssertionError(
                f"{contract} is violated: {where} is {values[tuple(bad)]}."
            )


def _assert_close(
    contract: str, expected: Any, found: Any, rtol: float | None, bags: Any = np.s_[:]
) -> None:
    _assert_finite(contract, expected)
    _assert_finite(contract, found)
    if jax.tree.structure(expected) != jax.tree.structure(found):
        raise AssertionError(
            f"{contract} is violated: the output has structure "
            f"{jax.tree.structure(found)} where {jax.tree.structure(expected)} was "
            "expected."
        )
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(expected),
        jax.tree.leaves(found),
        strict=True,
    )
    for (path, want), got in pairs:
        if want.shape != got.shape:
            raise AssertionError(
                f"{contract} is violated: the output has shape {got.shape} where "
                f"{want.shape} was expected."
            )
        if want.size == 0:
            continue
        relative = _tolerance(want.dtype) if rtol is None else rtol
        want, got = _wide(np.asarray(want)), _wide(np.asarray(got))
        tolerance = relative * np.max(np.abs(want[bags]))
        difference = np.zeros(want.shape)
        difference[bags] = np.abs(got[bags] - want[bags])
        worst = np.unravel_index(np.argmax(difference), difference.shape)
        if difference[worst] > tolerance:
            raise AssertionError(
                f"{contract} is violated: {_position(path, worst)} is {got[worst]:.9g} "
                f"where {want[worst]:.9g} was expected; the difference "
                f"{difference[worst]:.3g} exceeds the tolerance {tolerance:.3g} "
                f"({relative:.0e} of the largest value)."
            )


def _position(path: Any, index: Any) -> str:
    entry = ", ".join(str(int(i)) for i in index)
    return f"output{jax.tree_util.keystr(path)}[{entry}]"
