"""Bags larger than a device's memory: aggregated in chunks, or over many devices.

    chunk 1 ─ encode ─ aggregate ─┐
    chunk 2 ─ encode ─ aggregate ─┼─ merge ─ decode ─ f({x_1, ..., x_m})
    chunk c ─ encode ─ aggregate ─┘

This is exact for set networks whose aggregation adds up: sums, means, histograms,
maxima, but not medians, nor networks in which elements attend to each other. Such a
network has the methods `encode`, `aggregate` and `decode` of `DeepSets` and, besides,

    merge(representations [chunk, bag, r], totals [chunk, bag]) -> [bag, r]

where totals are the numbers of elements, or sums of weights, of each chunk.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .contracts import check_set, check_weights, present
from .precision import wide_dtype


def apply_in_chunks(
    model: nn.Module,
    variables: Any,
    chunks: Iterable[jax.Array | np.ndarray | tuple],
    *,
    chunk_size: int = 8192,
) -> jax.Array:
    """The output of `model` for one bag whose elements come chunk by chunk.

    Memory is that of one chunk, whatever the size of the bag. One program is compiled,
    for `chunk_size` elements, to which smaller chunks are padded and in pieces of which
    larger ones are read. Chunks of less than `chunk_size` elements cost as much as full
    ones.

    Args:
      model: a set network that has the method `merge`.
      variables: of the model.
      chunks: arrays [element, *features] of any sizes, 0 too, or pairs of these and
        their weights [element]. A generator need never hold the whole bag.
      chunk_size: elements that are encoded at once.

    Returns:
      What `model.apply` returns for inputs [1, all elements, *features].

    Raises:
      ValueError: no chunk at all, a chunk_size below 1, or a model or an aggregation
        that cannot be merged.
    """
    _check_mergeable(model)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be 1 or more, but it is {chunk_size}.")
    # Merged like the runs of a merge sort, equals with equals: rounding errors grow as
    # the logarithm of the number of chunks. A few small representations are kept.
    runs = []
    for inputs, weights, count in _pieces(chunks, chunk_size):
        # A chunk is read while the one before is computed, and no more are: dispatched
        # without waiting, chunks would pile up in memory.
        jax.block_until_ready(runs)
        run, level = _represent_chunk(model, variables, inputs, weights, count), 0
        if not runs:  # What cannot be merged is refused at the first chunk.
            jax.eval_shape(partial(_merge, model), variables, run, run)
        while runs and runs[-1][1] == level:
            run, level = _merge(model, variables, runs.pop()[0], run), level + 1
        runs.append((run, level))
    if not runs:
        raise ValueError(
            "chunks must hold one array or more (of 0 elements, for an empty bag), but "
            "there is none."
        )
    run, _ = runs.pop()
    while runs:
        run = _merge(model, variables, runs.pop()[0], run)
    return _decode(model, variables, run[0])


def apply_sharded(
    model: nn.Module,
    variables: Any,
    inputs: jax.Array,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
    *,
    mesh: jax.sharding.Mesh,
    axis: str = "element",
) -> jax.Array:
    """The output of `model` with the elements of every bag spread over devices.

    Each device encodes and aggregates its own elements; what travels between devices
    is one representation per device and bag. Differentiable in variables, inputs and
    weights.

    Args:
      model: a set network that has the method `merge`.
      variables: of the model; every device holds them.
      inputs: floating [bag, element, *features]; the elements are padded to a multiple
        of the number of devices.
      mask: None or bool [bag, element].
      weights: None or floating [bag, element].
      mesh: the devices.
      axis: the axis of the mesh over which elements are spread.

    Returns:
      What `model.apply` returns.

    Raises:
      ValueError: an axis that the mesh does not have, or a model or an aggregation that
        cannot be merged.
      ValueError, TypeError: see `contracts.check_set` and `check_weights`.
    """
    _check_mergeable(model)
    if axis not in mesh.axis_names:
        raise ValueError(
            f"axis must name an axis of the mesh, which has {mesh.axis_names}, but "
            f"{axis!r} was given."
        )
    check_set(inputs, mask)
    check_weights(weights, inputs.shape[:2])
    # Axes of the type Auto, so that arrays may come from wherever they are.
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names)
    return _apply_sharded(model, variables, inputs, mask, weights, mesh, axis)


def _check_mergeable(model: nn.Module) -> None:
    if not hasattr(model, "merge"):
        raise ValueError(
            "model must have a method merge(representations, totals), as set networks "
            f"do whose aggregation adds up, but {type(model).__name__} has none."
        )


def _pieces(
    chunks: Iterable[Any], chunk_size: int
) -> Iterator[tuple[Any, Any, np.ndarray]]:
    """Elements [chunk_size, ...], weights or None, and how many elements are real."""
    for chunk in chunks:
        inputs, weights = chunk if isinstance(chunk, tuple) else (chunk, None)
        for x in (inputs, weights):
            if x is not None and not hasattr(x, "shape"):
                raise ValueError(
                    "chunks must hold arrays, or tuples of an array and its weights, "
                    f"but there is a {type(x).__name__}."
                )
        if weights is not None and len(weights) != len(inputs):
            raise ValueError(
                "the weights of a chunk must be one per element, but there are "
                f"{len(weights)} for {len(inputs)} elements."
            )
        for start in range(0, max(len(inputs), 1), chunk_size):
            piece = slice(start, start + chunk_size)
            count = np.int32(len(inputs[piece]))
            padded = [
                None if x is None else _pad(x[piece], chunk_size)
                for x in (inputs, weights)
            ]
            yield *padded, count


def _pad(x: Any, size: int) -> Any:
    if len(x) == size:
        return x
    padded = np.zeros((size, *x.shape[1:]), x.dtype)
    padded[: len(x)] = x
    return padded


def _represent(
    model: nn.Module,
    inputs: jax.Array,
    mask: jax.Array | None,
    weights: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The representation [bag, r] of a chunk and its number of elements [bag]."""
    real = present(mask, weights)
    features = model.encode(inputs, real)
    counted = jnp.ones(inputs.shape[:2]) if weights is None else weights
    if real is not None:
        counted = jnp.where(real, counted, 0)
    total = jnp.sum(counted, axis=1, dtype=wide_dtype(counted))
    return model.aggregate(features, mask, weights), total


# Dispatched chunk by chunk: XLA's CPU backend computes convolutions in loops slowly.
@partial(jax.jit, static_argnums=0)
def _represent_chunk(
    model: nn.Module,
    variables: Any,
    inputs: jax.Array,
    weights: jax.Array | None,
    count: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    mask = (jnp.arange(inputs.shape[0]) < count)[None]
    weights = None if weights is None else weights[None]
    return model.apply(variables, inputs[None], mask, weights, method=_represent)


@partial(jax.jit, static_argnums=0)
def _merge(
    model: nn.Module, variables: Any, *runs: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    representations, totals = map(jnp.stack, zip(*runs, strict=True))
    merged = model.apply(variables, representations, totals, method="merge")
    return merged, totals.sum(0)


@partial(jax.jit, static_argnums=0)
def _decode(model: nn.Module, variables: Any, representation: jax.Array) -> jax.Array:
    return model.apply(variables, representation, method="decode")


@partial(jax.jit, static_argnums=(0, 5, 6))
def _apply_sharded(
    model: nn.Module,
    variables: Any,
    inputs: jax.Array,
    mask: jax.Array | None,
    weights: jax.Array | None,
    mesh: jax.sharding.Mesh,
    axis: str,
) -> jax.Array:
    num_bags, size = inputs.shape[:2]
    padding = -size % mesh.shape[axis]
    mask = jnp.ones((num_bags, size), bool) if mask is None else mask

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))

    def of_one_device(variables: Any, *args: Any) -> tuple[jax.Array, jax.Array]:
        parts = model.apply(variables, *args, method=_represent)
        return jax.tree.map(lambda part: part[None], parts)

    by_element = jax.P(None, axis)
    representations, totals = jax.shard_map(
        of_one_device,
        mesh=mesh,
        in_specs=(jax.P(), *(by_element,) * 3),
        out_specs=jax.P(axis),
    )(variables, *jax.tree.map(pad, (inputs, mask, weights)))
    # Merged on every device, which the small representations are gathered for.
    representations, totals = jax.lax.with_sharding_constraint(
        (representations, totals), jax.NamedSharding(mesh, jax.P())
    )
    merged = model.apply(variables, representations, totals, method="merge")
    return _decode(model, variables, merged)
