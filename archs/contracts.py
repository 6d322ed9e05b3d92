"""Contracts of set networks: what must hold for every input, as assertions.

A set network `f(inputs, mask)` reads bags `inputs [bag, element, *features]` and a
boolean `mask [bag, element]` (True = a real element; None = all are real). For every
permutation φ of a bag's elements

    invariant:    f({x_i}) = f(φ({x_i}))
    equivariant:  φ(f({x_i})) = f(φ({x_i}))
    padding:      f(x, mask) does not depend on what lies where the mask is False
    batch:        what f says of a bag does not depend on the other bags
    weights:      f(x, mask, weights) with the weights [bag, element] 2, 0, ... is f of
                  a set that holds an element twice, not at all, ...
    chunks:       what is aggregated in parts and merged is what is aggregated at once

The functions here check such a contract of any callable on given inputs. They raise
AssertionError with the contract's name, the worst entry, and the difference beside
the tolerance.

Tolerances are relative to the largest value of a bag's output or, where a bag has one
number, of all; outputs of other magnitudes, such as sums beside means, are returned
apart, as a tuple, of which each array is measured by itself. By default they are

    max(tolerance of the dtype, 5 u sqrt(m))

with 1e-5 in float32, 2e-2 in half precision and 1e-12 in float64 for networks of some
layers. Two orders of a sum of m terms differ by about u sqrt(m) times the sum of their
magnitudes, where u is half the machine epsilon of the dtype in which they are added up
(half precision: float32), because rounding errors are as good as independent (Higham
and Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci.
Comput. 41(5), 2019). In float32 this counts from a thousand elements on.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

SetFunction = Callable[[jax.Array, jax.Array | None], Any]
SequenceFunction = Callable[[jax.Array, jax.Array], jax.Array]
WeightedSetFunction = Callable[[jax.Array, jax.Array | None, jax.Array | None], Any]


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


def check_lengths(lengths: jax.Array | None, batch_size: int) -> None:
    """Checks that `lengths` is None or integer [batch].

    Raises:
      ValueError: the lengths have another shape.
      TypeError: the lengths are not integers.
    """
    if lengths is None:
        return
    chex.assert_type(
        lengths,
        int,
        custom_message=(
            "lengths must have an integer dtype (the number of real steps), but their "
            f"dtype is {jnp.result_type(lengths)}."
        ),
        exception_type=TypeError,
    )
    chex.assert_shape(
        lengths,
        (batch_size,),
        custom_message=(
            f"lengths must have shape {(batch_size,)}, one entry per sequence, but "
            f"their shape is {jnp.shape(lengths)}."
        ),
        exception_type=ValueError,
    )


def check_weights(weights: jax.Array | None, shape: tuple[int, ...]) -> None:
    """Checks that `weights` is None or floating of the given shape.

    Raises:
      ValueError: the weights have another shape.
      TypeError: the weights are not floating.
    """
    if weights is None:
        return
    chex.assert_type(
        weights,
        float,
        custom_message=(
            "weights must have a floating dtype (multiplicities of the elements), but "
            f"their dtype is {weights.dtype}."
        ),
        exception_type=TypeError,
    )
    chex.assert_shape(
        weights,
        tuple(shape),
        custom_message=(
            f"weights must have shape {tuple(shape)}, one entry per element of inputs, "
            f"but their shape is {weights.shape}."
        ),
        exception_type=ValueError,
    )


def present(mask: jax.Array | None, weights: jax.Array | None) -> jax.Array | None:
    """Which elements are in their set: real by the mask and of positive weight.

    Returns:
      A boolean array of the arguments' shape, or None where both are None.
    """
    if weights is None:
        return mask
    return weights > 0 if mask is None else mask & (weights > 0)


def zero_absent(x: jax.Array, real: jax.Array | None) -> jax.Array:
    """x [..., element, *features] with zeros where `real` [..., element] is False."""
    if real is None:
        return x
    return jnp.where(real.reshape(*real.shape, *(1,) * (x.ndim - real.ndim)), x, 0)


def assert_permutation_invariant(
    f: SetFunction,
    inputs: jax.Array,
    mask: jax.Array | None = None,
    *,
    key: jax.Array,
    num_permutations: int = 3,
    rtol: float | None = None,
) -> None:
    """Asserts `f({x_i}) = f(φ({x_i}))` for several permutations φ.

    They are the reversal, the ascending order of the elements' first feature, and
    random ones. The same is asserted of elements that all tie in their first feature: a
    network that sorts by it, or picks the largest, has then only the order to go by.

    Args:
      f: a function of (inputs, mask) to an array or a pytree of arrays.
      inputs: [bag, element, *features]; every bag is permuted on its own.
      mask: None or bool [bag, element]; permuted along with the elements.
      key: draws the permutations.
      num_permutations: how many random permutations are tried.
      rtol: tolerance relative to max|f| of a bag; by default that of the module's
        docstring.

    Raises:
      AssertionError: the outputs differ, or are not finite.
    """
    orders = _orders(key, inputs, num_permutations)
    tied = np.array(inputs)
    tied[..., 0] = tied[:, :1, ..., 0]
    for elements, tried, name in (
        (inputs, orders, "permutation invariance"),
        (jnp.asarray(tied), orders[:1], "permutation invariance at ties"),
    ):
        expected = f(elements, mask)
        for order in tried:
            found = f(_permute(elements, order), _permute(mask, order))
            _assert_close(name, expected, found, rtol, size=inputs.shape[1])


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
        _assert_close(
            "permutation equivariance", permuted, found, rtol, size=inputs.shape[1]
        )


def assert_padding_invariant(
    f: SetFunction,
    inputs: jax.Array,
    mask: jax.Array | None = None,
    *,
    extra: int = 3,
    rtol: float | None = None,
) -> None:
    """Asserts that padding changes neither the output nor the gradients of `f`.

    Every bag is lengthened by `extra` masked elements, at its end, at its front and
    among the others, which hold zeros, ordinary or huge numbers, infinities or NaN;
    where the given mask is already False the contents are replaced too. The gradient
    with respect to the inputs is that of a fixed mixture of f's entries (their plain
    sum would be constant for prevalences): equal for real elements, exactly zero for
    padding.

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
    size = inputs.shape[1]
    mask = np.ones(inputs.shape[:2], bool) if mask is None else np.asarray(mask)
    # The reference is padded with zeros within the given mask and not lengthened.
    clean = np.where(_expand(mask, inputs.ndim), inputs, inputs.dtype.type(0))
    expected, expected_gradient = output_and_gradient(clean, mask)
    elements = np.arange(size)
    places = (elements + extra, elements, elements * (size + extra) // max(size, 1))
    for contents in (0.0, huge, -np.inf, np.nan, 1.5):
        for place in places:
            shape = (len(inputs), size + extra)
            padded_mask = np.zeros(shape, bool)
            padded_mask[:, place] = mask
            padded = np.zeros(shape + inputs.shape[2:], inputs.dtype)
            padded[:, place] = inputs
            real = _expand(padded_mask, inputs.ndim)
            padded = np.where(real, padded, inputs.dtype.type(contents))
            out, gradient = output_and_gradient(padded, padded_mask)
            name = f"padding invariance (padding of {contents:g})"
            _assert_close(name, expected, out, rtol, size=size)
            leaked = np.where(real, 0, gradient)
            _assert_close(f"{name}: gradient", np.zeros_like(leaked), leaked, 0.0)
            kept = gradient[:, place]
            slack = _slack(kept, rtol, size)
            _assert_close(f"{name}: gradient", expected_gradient, kept, slack)


def assert_sequence_padding_invariant(
    f: SequenceFunction, inputs: jax.Array, *, rtol: float | None = None
) -> None:
    """Asserts that what follows the end of a sequence changes no answer of `f`.

    The first half of the sequences is given alone, and then with padding after it:
    of floating inputs the rest of the sequences, huge numbers and NaN, of token ids the
    rest and zeros.

    Args:
      f: a function of (inputs, lengths) to an array [sequence, ...] or, where it
        answers step by step, [sequence, step, ...]; lengths is int32 [sequence].
      inputs: [sequence, step, *features], floating or integer; two steps or more.
      rtol: as in `assert_permutation_invariant`.

    Raises:
      AssertionError: an answer differs, or is not finite.
    """
    length = inputs.shape[1] // 2
    lengths = jnp.full(len(inputs), length, jnp.int32)
    f = jax.jit(f)
    expected = f(inputs[:, :length], lengths)
    floating = jnp.issubdtype(inputs.dtype, jnp.floating)
    fillings = [jnp.finfo(inputs.dtype).max, jnp.nan] if floating else [0]
    for contents in (None, *fillings):
        padded = inputs
        if contents is not None:
            padded = padded.at[:, length:].set(contents)
        found = f(padded, lengths)
        if found.shape != expected.shape:  # it answers step by step
            found = found[:, :length]
        name = "padding invariance of a sequence"
        _assert_close(name, expected, found, rtol, size=length)


def assert_finite_on_empty_set(f: SetFunction, inputs: jax.Array) -> None:
    """Asserts a finite output and gradient where bags have no real element at all.

    Two batches are tried: one of empty bags only, and one in which every other bag is
    full; in the latter the full bags must give what they give among full bags.

    Args:
      f: a function of (inputs, mask) to an array or a pytree of arrays [bag, ...].
      inputs: [bag, element, *features], floating; at least two bags.

    Raises:
      ValueError: there is one bag.
      AssertionError: a number is not finite, or an empty bag changed another bag.
    """
    _check_two_bags(inputs)
    output_and_gradient = _output_and_gradient(f)
    full = np.ones(inputs.shape[:2], bool)
    mixed = full.copy()
    mixed[::2] = False
    for mask in (np.zeros_like(full), mixed):
        out, gradient = output_and_gradient(inputs, mask)
        _assert_finite("finite output on the empty set", out)
        _assert_finite("finite gradient on the empty set", gradient)
    whole, whole_gradient = output_and_gradient(inputs, full)
    name, size, others = "independence of empty bags", inputs.shape[1], np.s_[1::2]
    _assert_close(name, whole, out, None, others, size=size)
    slack = _slack(gradient, None, size)
    _assert_close(name, whole_gradient, gradient, slack, others)


def assert_batch_independent(
    f: SetFunction,
    inputs: jax.Array,
    mask: jax.Array | None = None,
    *,
    rtol: float | None = None,
) -> None:
    """Asserts that f says of each bag alone what it says of it among the others.

    Args:
      f: a function of (inputs, mask) to an array or a pytree of arrays [bag, ...].
      inputs: [bag, element, *features]; at least two bags.
      mask: None or bool [bag, element].
      rtol: as in `assert_permutation_invariant`.

    Raises:
      ValueError: there is one bag.
      AssertionError: an output differs, or is not finite.
    """
    _check_two_bags(inputs)
    together = jax.tree.map(np.asarray, f(inputs, mask))
    alone = [
        f(inputs[i : i + 1], None if mask is None else mask[i : i + 1])
        for i in range(inputs.shape[0])
    ]
    alone = jax.tree.map(lambda *bags: np.concatenate(bags), *alone)
    _assert_close("batch independence", alone, together, rtol, size=inputs.shape[1])


def assert_duplication(
    f: SetFunction,
    inputs: jax.Array,
    mask: jax.Array | None = None,
    *,
    factor: float = 1.0,
    rtol: float | None = None,
) -> None:
    """Asserts `f(every element twice) = factor f(x)`.

    The factor is 1 for what depends on the distribution of the elements alone, such as
    the mean, the maximum, a histogram or attention, and 2 for what counts them, such as
    the sum.

    Args:
      f: a function of (inputs, mask) to an array or a pytree of arrays.
      inputs: [bag, element, *features].
      mask: None or bool [bag, element].
      factor: of every output.
      rtol: as in `assert_permutation_invariant`.

    Raises:
      AssertionError: an output differs, or is not finite.
    """
    once = jax.tree.map(lambda y: np.asarray(y) * factor, f(inputs, mask))
    twice = jnp.repeat(inputs, 2, axis=1)
    twice = f(twice, None if mask is None else jnp.repeat(mask, 2, axis=1))
    _assert_close(
        f"duplication (factor {factor:g})", once, twice, rtol, size=2 * inputs.shape[1]
    )


def assert_weights_are_multiplicities(
    f: WeightedSetFunction,
    inputs: jax.Array,
    mask: jax.Array | None = None,
    *,
    key: jax.Array,
    rtol: float | None = None,
) -> None:
    """Asserts that an element of weight w counts as w equal elements, w = 0, 1, 2, 3.

    `f` with weights is compared with `f` without weights on sets that hold each element
    as often as its weight says: the outputs, and the gradients of the mixture of
    outputs of `assert_padding_invariant`, which for a weighted element is the sum over
    its copies. Elements of weight 0 hold NaN, which may reach neither outputs nor
    gradients. Where there are several bags the last has weights of zero only. Gradients
    with respect to the weights must be finite.

    Args:
      f: a function of (inputs, mask, weights) to an array or a pytree of arrays without
        an element axis, differentiable in inputs and weights; mask or weights may be
        None.
      inputs: [bag, element, *features], floating.
      mask: None or bool [bag, element].
      key: deals the weights.
      rtol: as in `assert_permutation_invariant`; gradients are allowed a hundred times
        as much.

    Raises:
      AssertionError: an output or a gradient differs, or is not finite.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    inputs = np.asarray(inputs)
    num_bags, size = inputs.shape[:2]
    mask = np.ones((num_bags, size), bool) if mask is None else np.asarray(mask)
    # Different weights come up in every bag, however few its real elements are.
    shuffled = np.argsort(np.where(mask, 0, 1) + rng.random(mask.shape), axis=1)
    times = np.array([2, 1, 0, 3])[np.argsort(shuffled, axis=1) % 4]
    if num_bags > 1:
        times[-1] = 0
    copies = np.arange(3) < times[..., None]  # [bag, element, copy]
    copies = (copies & mask[..., None]).reshape(num_bags, 3 * size)
    copied = np.repeat(inputs, 3, axis=1)
    copied = np.where(_expand(copies, inputs.ndim), copied, inputs.dtype.type(0))
    absent = _expand(times == 0, inputs.ndim)
    given = np.where(absent, inputs.dtype.type(np.nan), inputs)

    def without_weights(x: jax.Array, mask: jax.Array) -> Any:
        return f(x, mask, None)

    name = "multiplicity of weights"
    expected, gradient = _output_and_gradient(without_weights)(copied, copies)
    gradient = np.asarray(gradient).reshape(num_bags, size, 3, *inputs.shape[2:])
    gradient = np.sum(gradient, axis=2, dtype=gradient.dtype)
    dtype = np.float64 if inputs.dtype == np.float64 else np.float32
    found, (found_gradient, weights_gradient) = _output_and_gradient(f, (0, 2))(
        given, mask, times.astype(dtype)
    )
    size = copies.shape[1]
    _assert_close(name, expected, found, rtol, size=size)
    _assert_finite(f"{name}: gradient of the weights", weights_gradient)
    leaked = np.where(absent, found_gradient, 0)
    _assert_close(f"{name}: gradient", np.zeros_like(leaked), leaked, 0.0)
    slack = _slack(gradient, rtol, size)
    _assert_close(f"{name}: gradient", gradient, found_gradient, slack)


def assert_chunk_invariant(
    aggregate: WeightedSetFunction,
    merge: Callable[[jax.Array, jax.Array], Any],
    features: jax.Array,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
    *,
    key: jax.Array,
    num_chunks: int = 3,
    rtol: float | None = None,
) -> None:
    """Asserts that what is aggregated in chunks and merged is what is aggregated whole.

    Every element is assigned to a chunk at random; one more chunk stays empty.

    Args:
      aggregate: a function of (features, mask, weights) to [bag, r], such as the method
        of a set network.
      merge: a function of (representations [chunk, bag, r], totals [chunk, bag]) to
        [bag, r], where totals are numbers of elements or sums of weights.
      features: [bag, element, f].
      mask: None or bool [bag, element].
      weights: None or floating [bag, element].
      key: assigns the elements.
      num_chunks: how many chunks.
      rtol: as in `assert_permutation_invariant`.

    Raises:
      AssertionError: the outputs differ, or are not finite.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    shape = features.shape[:2]
    real = np.ones(shape, bool) if mask is None else np.asarray(mask)
    counted = np.ones(shape, np.float32) if weights is None else np.asarray(weights)
    chunk = rng.integers(0, num_chunks, shape)
    parts = [real & (chunk == i) for i in range(num_chunks + 1)]
    totals = [np.where(part, counted, 0).sum(1, dtype=counted.dtype) for part in parts]
    representations = [aggregate(features, jnp.asarray(p), weights) for p in parts]
    merged = merge(jnp.stack(representations), jnp.asarray(np.stack(totals)))
    whole = aggregate(features, mask, weights)
    _assert_close("chunk invariance", whole, merged, rtol, size=shape[1])


def assert_size_generalization(
    error: Callable[[int], float], sizes: Sequence[int], *, bound: float
) -> None:
    """Asserts that an error stays below a bound at set sizes a network never saw.

    It measures and proves nothing: `error` decides on which sets.

    Args:
      error: the network's error on sets of a given size.
      sizes: the sizes that are tried, beyond those of training.
      bound: what the error may be at most, at every size.

    Raises:
      AssertionError: naming the size with the largest error.
    """
    errors = {size: float(error(size)) for size in sizes}
    wrong = {s: e for s, e in errors.items() if not e <= bound}  # NaN is wrong
    if wrong:
        worst = max(wrong, key=lambda s: np.nan_to_num(wrong[s], nan=np.inf))
        raise AssertionError(
            f"size generalization is violated: at set size {worst} the error is "
            f"{wrong[worst]:.4g}, which exceeds the bound {bound:.4g} (sizes tried: "
            f"{', '.join(map(str, errors))})."
        )


# Contracts are prepared and compared in NumPy: only `f` is compiled.


def _output_and_gradient(
    f: Callable[..., Any], argnums: int | tuple[int, ...] = 0
) -> Callable[..., tuple[Any, Any]]:
    """A compiled function of f's arguments: f, and the gradient of a mixture of f."""

    def loss(*args: jax.Array) -> tuple[jax.Array, Any]:
        out = f(*args)
        leaves = [_wide(y).ravel() for y in jax.tree.leaves(out)]
        return sum(jnp.cos(jnp.arange(y.size)) @ (y**2 + y) for y in leaves), out

    gradient = jax.jit(jax.grad(loss, argnums, has_aux=True))
    return lambda *args: gradient(*map(jnp.asarray, args))[::-1]


def _check_two_bags(inputs: jax.Array) -> None:
    if len(inputs) < 2:
        raise ValueError(
            "inputs must hold two bags or more, for one could change another, but "
            f"its shape is {inputs.shape}."
        )


def _orders(key: jax.Array, inputs: jax.Array, count: int) -> list[np.ndarray]:
    """The reversal, the sorted and `count` random orders, each [bag, element]."""
    if not inputs.size:
        raise ValueError(
            "inputs must hold bags with elements to be permuted, but its shape is "
            f"{inputs.shape}."
        )
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    positions = np.broadcast_to(np.arange(inputs.shape[1]), inputs.shape[:2])
    first = np.asarray(inputs).reshape(*inputs.shape[:2], -1)[..., 0]
    shuffled = [rng.permuted(positions, axis=1) for _ in range(count)]
    return [positions[:, ::-1], np.argsort(first, axis=1), *shuffled]


def _permute(x: jax.Array | None, order: np.ndarray) -> jax.Array | None:
    if x is None:
        return None
    return jnp.asarray(np.take_along_axis(np.asarray(x), _expand(order, x.ndim), 1))


def _expand(x: np.ndarray, ndim: int) -> np.ndarray:
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))


def _wide(x: Any) -> Any:
    # A NumPy array stays one, where float64 is kept.
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _real_elements(outputs: Any, mask: jax.Array | None) -> Any:
    if mask is None:
        return outputs

    def real(y: jax.Array) -> np.ndarray:
        y = np.asarray(y)
        return np.where(_expand(np.asarray(mask), y.ndim), y, y.dtype.type(0))

    return jax.tree.map(real, outputs)


def _tolerance(dtype: Any, size: int) -> float:
    """The relative tolerance of outputs of sets of a size; see the module's text."""
    dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32
    of_dtype = {16: 2e-2, 32: 1e-5, 64: 1e-12}[jnp.finfo(dtype).bits]
    unit = jnp.finfo(jnp.promote_types(dtype, jnp.float32)).eps / 2
    return max(of_dtype, 5 * float(unit) * size**0.5)


def _slack(gradient: jax.Array, rtol: float | None, size: int) -> float:
    """The relative tolerance of gradients, in which rounding errors cancel less."""
    return 100 * (_tolerance(gradient.dtype, size) if rtol is None else rtol)


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
    contract: str,
    expected: Any,
    found: Any,
    rtol: float | None,
    bags: Any = np.s_[:],
    *,
    size: int = 1,
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
        relative = _tolerance(want.dtype, size) if rtol is None else rtol
        want, got = _wide(np.asarray(want)), _wide(np.asarray(got))
        scale = _scale(want, bags)
        difference = np.zeros(want.shape)
        difference[bags] = np.abs(got[bags] - want[bags])
        excess = difference - relative * scale
        worst = np.unravel_index(np.argmax(excess), excess.shape)
        if excess[worst] > 0:
            raise AssertionError(
                f"{contract} is violated: {_position(path, worst)} is {got[worst]:.9g} "
                f"where {want[worst]:.9g} was expected; the difference "
                f"{difference[worst]:.3g} exceeds the tolerance "
                f"{relative * scale[worst]:.3g} ({relative:.0e} of the largest value)."
            )


def _scale(values: np.ndarray, bags: Any) -> np.ndarray:
    """The largest value of each bag, or of all where a bag has one; of their shape."""
    size = np.abs(values)
    largest = np.max(size[bags])
    if values.ndim > 1:
        # A bag of zeros beside others has the rounding errors of a program for all.
        own = size.max(axis=tuple(range(1, values.ndim)), keepdims=True)
        largest = np.maximum(own, 1e-6 * largest)
    return np.broadcast_to(largest, values.shape)


def _position(path: Any, index: Any) -> str:
    entry = ", ".join(str(int(i)) for i in index)
    return f"output{jax.tree_util.keystr(path)}[{entry}]"
