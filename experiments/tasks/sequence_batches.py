"""Batches of stored and of generated sequences, and what models answer to them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import data
from archs import Bidirectional
from data.samplers import bucketed_batch
from experiments.tasks import supervised
from experiments.tasks.groups import spread
from experiments.tasks.objectives import at_length


class SequenceDataset(Protocol):
    """A dataset of sequences, stored or generated.

    A stored one holds them in `arrays`, sorted by length, has `buckets`, which its
    train split is divided into, and `select(indices, split, arrays)`; a generated one
    has `sample(key, num_sequences, split, arrays)`. Both return a batch: "inputs"
    [sequence, step, ...], "lengths" int32 [sequence], "targets" [sequence] or
    [sequence, step, ...], of the latter "target_mask" bool [sequence, step], and what
    else evaluation groups by, int [sequence]. Where the target of a step is the input
    of the next, there is `predicts_next`, True.

    Attributes:
      spec: `num_classes` is the number of outputs that the targets ask for.
      arrays: {split: {name: array}}; `{}` of a split where nothing is needed.
    """

    spec: data.Spec
    arrays: Mapping[str, Any]


def draw_train_batch(
    dataset: SequenceDataset,
    key: jax.Array,
    step: jax.Array,
    batch_size: int,
    arrays: Mapping,
) -> dict:
    """The batch of a training step: stored sequences of one bucket, or new ones."""
    if hasattr(dataset, "buckets"):
        _, indices = bucketed_batch(key, step, dataset.buckets, batch_size)
        return dataset.select(indices, "train", arrays)
    key = jax.random.fold_in(key, step)
    return dataset.sample(key, batch_size, "train", arrays)


def evaluation_size(dataset: SequenceDataset, split: str, generated: int) -> int:
    """Sequences of an evaluation: all stored ones, or so many generated ones."""
    return dataset.spec.sizes[split] if hasattr(dataset, "buckets") else generated


def draw_evaluation_batch(
    dataset: SequenceDataset,
    split: str,
    index: jax.Array,
    size: int,
    batch_size: int,
    arrays: Mapping,
) -> dict:
    """Batch `index` of an evaluation; "counted" leaves out those beyond its `size`."""
    number = index * batch_size + jnp.arange(batch_size)
    if hasattr(dataset, "buckets"):
        batch = dataset.select(jnp.minimum(number, size - 1), split, arrays)
    else:
        key = supervised.evaluation_key(split, index)
        batch = dataset.sample(key, batch_size, split, arrays)
    return batch | {"counted": number < size}


def chosen_batch(task: Any, split: str, count: int) -> dict:
    """A few of the sequences of an evaluation, of all lengths: evenly chosen.

    Args:
      task: has a `SequenceDataset`, `eval_batch`, and `evaluation_size(split)`.
      split: the evaluation's.
      count: how many; fewer if there are no more.
    """
    number = np.array(spread(range(task.evaluation_size(split)), count))
    if hasattr(task.dataset, "buckets"):
        return task.dataset.select(number, split, task.arrays)
    # Those generated come in any order.
    batch = jax.jit(task.eval_batch, static_argnums=0)(split, 0, task.arrays)
    return {name: leaf[: len(number)] for name, leaf in batch.items()}


def at_bucket_length(
    dataset: Any, step: Callable, state: Any, batch: Mapping, *rest: Any
) -> Any:
    """`step(state, batch, *rest)` with the batch cut to the length of its bucket.

    Args:
      dataset: a `SequenceDataset`; a generated batch stays as it is.
      step: a function of a state, a batch and the rest.
      state: see `step`.
      batch: see `objectives.at_length`.
      rest: see `step`.
    """
    if not hasattr(dataset, "buckets"):
        return step(state, batch, *rest)
    lengths = [batch[name] for name in ("lengths", "target_lengths") if name in batch]
    needed = functools.reduce(jnp.maximum, lengths).max()
    options = [length for *_, length in dataset.buckets]
    return at_length(options, needed, step, state, batch, *rest)


def answers(prediction: Any) -> jax.Array:
    """What a model answered, without the states it may return besides."""
    return prediction[0] if isinstance(prediction, tuple) else prediction


def check_reads_the_past(model: nn.Module) -> None:
    """Raises ValueError if a model of what comes next has read it already."""
    stack = getattr(model, "stack", None)
    both = isinstance(stack, Bidirectional) or getattr(stack, "bidirectional", False)
    if both or getattr(stack, "reverse", False):
        raise ValueError(
            "the targets are what comes next, which a bidirectional stack reads; use a "
            "RecurrentStack with bidirectional=False"
        )
