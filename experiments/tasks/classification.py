"""Supervised classification in shuffled epochs; also the classifier of baselines."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import data
from data.samplers import epoch_indices
from experiments import metrics
from experiments.loop import Training
from experiments.optimizers import Optimizer
from experiments.tasks import supervised


@dataclasses.dataclass(frozen=True)
class Classification(supervised.SupervisedTask):
    """Learns class logits from labelled examples by cross-entropy.

    Attributes:
      model: maps [n, *features] to logits [n, K].
      dataset: the labelled examples.
      optimizer: the config's.
      training: the config's.
      batch_size: examples a step, and an evaluation batch.
    """

    model: nn.Module
    dataset: data.Dataset
    optimizer: Optimizer
    training: Training
    batch_size: int = 128

    monitor = "cross_entropy"

    def __post_init__(self):
        smallest = min(self.dataset.spec.sizes.values())
        if self.batch_size < 1 or self.batch_size > self._size("train"):
            raise ValueError(
                f"batch_size must lie between 1 and {self._size('train')} (the train "
                f"split), not {self.batch_size}"
            )
        if not smallest:
            raise ValueError("a split of the dataset is empty")
        arrays = {
            split: {
                "inputs": jnp.asarray(v["inputs"]),
                "labels": jnp.asarray(v["labels"]),
            }
            for split, v in self.dataset.splits.items()
        }
        object.__setattr__(self, "arrays", arrays)

    def _size(self, split: str) -> int:
        return self.dataset.spec.sizes[split]

    def init(self, key: jax.Array, batch: Mapping) -> supervised.TrainState:
        """The first state; see `loop.Task`."""
        variables = self.model.init(key, batch["inputs"])
        logits = jax.eval_shape(self.model.apply, variables, batch["inputs"])
        expected = (self.batch_size, self.dataset.spec.num_classes)
        if logits.shape != expected:
            raise ValueError(
                f"the model must return logits of shape {expected} (batch, classes), "
                f"not {logits.shape}"
            )
        return supervised.init_state(variables, self.optimizer, self.training.num_steps)

    def sample(self, key: jax.Array, step: jax.Array, arrays: Mapping) -> dict:
        """The batch of a step: every example once an epoch."""
        indices = epoch_indices(key, step, self._size("train"), self.batch_size)
        return self._gather(arrays["train"], indices)

    def _gather(self, split: Mapping, indices: jax.Array) -> dict:
        inputs = data.normalize(
            split["inputs"][indices], self.dataset.shift, self.dataset.scale
        )
        return {"inputs": inputs, "labels": split["labels"][indices]}

    def train_step(
        self, state: supervised.TrainState, batch: Mapping, key: jax.Array
    ) -> tuple[supervised.TrainState, dict]:
        """One update; see `loop.Task`."""

        def loss(params, model_state):
            logits, model_state = self.model.apply(
                {"params": params, **model_state},
                batch["inputs"],
                train=True,
                rngs={"dropout": key},
                mutable=list(model_state),
            )
            values = _cross_entropy(logits, batch["labels"])
            return values.mean(), (
                {
                    "cross_entropy": metrics.masked(values),
                    "accuracy": metrics.masked(_correct(logits, batch["labels"])),
                },
                model_state,
            )

        return supervised.update(state, loss, self.optimizer, self.training.num_steps)

    def num_eval_batches(self, split: str) -> int:
        """Batches that cover the split once."""
        return -(-self._size(split) // self.batch_size)

    def eval_batch(self, split: str, index: jax.Array, arrays: Mapping) -> dict:
        """Examples in order; the last batch is filled up and masked."""
        size = self._size(split)
        position = index * self.batch_size + jnp.arange(self.batch_size)
        batch = self._gather(arrays[split], jnp.minimum(position, size - 1))
        return batch | {"mask": position < size}

    def eval_step(self, state: supervised.TrainState, batch: Mapping) -> dict:
        """Cross-entropy and accuracy; see `loop.Task`."""
        logits = self.model.apply(state.variables, batch["inputs"])
        labels, mask = batch["labels"], batch["mask"]
        return {
            "cross_entropy": metrics.masked(_cross_entropy(logits, labels), mask),
            "accuracy": metrics.masked(_correct(logits, labels), mask),
        }

    def posteriors(self, state: supervised.TrainState, split: str) -> np.ndarray:
        """Class probabilities of every example of a split, in order, [n, K]."""

        @jax.jit
        def batch_posteriors(state, arrays, index):
            batch = self.eval_batch(split, index, arrays)
            return nn.softmax(self.model.apply(state.variables, batch["inputs"]))

        rows = [
            np.asarray(batch_posteriors(state, self.arrays, np.int32(index)))
            for index in range(self.num_eval_batches(split))
        ]
        return np.concatenate(rows)[: self._size(split)]


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), labels
    )


def _correct(logits: jax.Array, labels: jax.Array) -> Any:
    return logits.argmax(-1) == labels
