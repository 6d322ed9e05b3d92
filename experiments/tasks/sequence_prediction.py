"""Sequence prediction: one answer a sequence (M to 1), or one a step (M to M)."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import data
from archs import contracts
from data.samplers import bucketed_batch
from experiments import metrics
from experiments.loop import Training
from experiments.optimizers import Optimizer
from experiments.report import Section
from experiments.tasks import sequence_objectives, sequence_report, supervised

# Sequences of validation and test are the same for every model and every seed.
EVALUATION_SEED = {"validation": 1, "test": 2}


class SequenceDataset(Protocol):
    """A dataset of sequences, stored or generated.

    A stored one holds them in `arrays`, sorted by length, has `buckets`, which its
    train split is divided into, and `select(indices, split, arrays)`; a generated one
    has `sample(key, num_sequences, split, arrays)`. Both return a batch: "inputs"
    [sequence, step, ...], "lengths" int32 [sequence], "targets" [sequence] or
    [sequence, step, ...], of the latter "target_mask" bool [sequence, step], and what
    else evaluation groups by, int [sequence].

    Attributes:
      spec: `num_classes` is the number of outputs that the targets ask for.
      arrays: {split: {name: array}}; `{}` of a split where nothing is needed.
    """

    spec: data.Spec
    arrays: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class SequencePrediction:
    """Learns what a dataset asks about its sequences.

    Stored sequences come in batches of similar length, so that little is computed for
    padding; generated ones are never seen twice. A step compiles once for each length
    of the dataset's buckets.

    Attributes:
      model: `model(inputs, lengths, train=...)` returns one answer a sequence,
        [sequence, K], or one a step, [sequence, step, K], perhaps with states beside
        it.
      dataset: see `SequenceDataset`.
      optimizer: the config's.
      training: the config's.
      objective: a function of `experiments.tasks.sequence_objectives`: the loss and
        the measures.
      num_sequences: sequences a step.
      validation_sequences: of an evaluation during training, where they are generated;
        stored ones are all evaluated.
      test_sequences: of the final evaluation, likewise.
      evaluation_batch: sequences that are evaluated at once.
    """

    model: nn.Module
    dataset: SequenceDataset
    optimizer: Optimizer
    training: Training
    objective: str = "cross_entropy"
    num_sequences: int = 32
    validation_sequences: int = 1000
    test_sequences: int = 10_000
    evaluation_batch: int = 100

    def __post_init__(self):
        for name in (
            "num_sequences",
            "validation_sequences",
            "test_sequences",
            "evaluation_batch",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        known = [
            name
            for name, value in vars(sequence_objectives).items()
            if inspect.isfunction(value) and not name.startswith("_")
        ]
        if self.objective not in known:
            raise ValueError(
                f"objective must be one of {', '.join(known)}, not {self.objective!r}"
            )
        both = getattr(getattr(self.model, "stack", None), "bidirectional", False)
        if both and self.objective in ("frame_likelihood", "legal_symbol"):
            raise ValueError(
                f"{self.objective} is about what comes next, which a bidirectional "
                "stack reads; set config.model.stack.bidirectional=False"
            )

    @property
    def arrays(self) -> Mapping[str, Any]:
        """The dataset's."""
        return self.dataset.arrays

    @functools.cached_property
    def monitor(self) -> str:
        """The validation measure that decides: the loss, the objective's first."""
        names: list[str] = []

        def trace(arrays):
            batch = self.sample(jax.random.key(0), jnp.int32(0), arrays)
            prediction, _ = self.model.init_with_output(
                jax.random.key(0), batch["inputs"], batch["lengths"]
            )
            names.extend(self._measure(prediction, batch))

        jax.eval_shape(trace, self.arrays)
        return names[0]

    def _measure(self, prediction: Any, batch: Mapping) -> dict:
        """{measure: (values, mask or None)}, the loss first."""
        answer = answers(prediction).astype(jnp.float32)
        measured = getattr(sequence_objectives, self.objective)(answer, batch)
        return {
            name: values if isinstance(values, tuple) else (values, None)
            for name, values in measured.items()
        }

    # The methods of `loop.Task`.

    def init(self, key: jax.Array, batch: Mapping) -> supervised.TrainState:
        """The first state; see `loop.Task`."""
        prediction, variables = self.model.init_with_output(
            key, batch["inputs"], batch["lengths"]
        )
        # Raises where the prediction is not what the objective needs.
        jax.eval_shape(self._measure, prediction, batch)
        return supervised.init_state(variables, self.optimizer, self.training.num_steps)

    def sample(self, key: jax.Array, step: jax.Array, arrays: Mapping) -> dict:
        """Sequences of the train split."""
        if hasattr(self.dataset, "buckets"):
            _, indices = bucketed_batch(
                key, step, self.dataset.buckets, self.num_sequences
            )
            return self.dataset.select(indices, "train", arrays)
        key = jax.random.fold_in(key, step)
        return self.dataset.sample(key, self.num_sequences, "train", arrays)

    def train_step(
        self, state: supervised.TrainState, batch: Mapping, key: jax.Array
    ) -> tuple[supervised.TrainState, dict]:
        """One update; see `loop.Task`."""

        def step(state, batch, key):
            def loss(params, model_state):
                prediction, model_state = self.model.apply(
                    {"params": params, **model_state},
                    batch["inputs"],
                    batch["lengths"],
                    train=True,
                    rngs={"dropout": key},
                    mutable=list(model_state),
                )
                measured = {
                    name: metrics.masked(*values)
                    for name, values in self._measure(prediction, batch).items()
                }
                total, count = next(iter(measured.values()))
                return total / jnp.maximum(count, 1), (measured, model_state)

            return supervised.update(
                state, loss, self.optimizer, self.training.num_steps
            )

        return at_bucket_length(self.dataset, step, state, batch, key)

    def num_eval_batches(self, split: str) -> int:
        """Batches of `evaluation_batch` sequences."""
        return -(-self._num_evaluation_sequences(split) // self.evaluation_batch)

    def _num_evaluation_sequences(self, split: str) -> int:
        if hasattr(self.dataset, "buckets"):
            return self.dataset.spec.sizes[split]
        return (
            self.validation_sequences if split == "validation" else self.test_sequences
        )

    def prepare_evaluation(
        self, state: supervised.TrainState, split: str, arrays: Mapping
    ) -> supervised.TrainState:
        """The state; see `loop.Task`."""
        return state

    def eval_batch(self, split: str, index: jax.Array, arrays: Mapping) -> dict:
        """Sequences of a split; "counted" leaves out those beyond its number."""
        size = self._num_evaluation_sequences(split)
        number = index * self.evaluation_batch + jnp.arange(self.evaluation_batch)
        if hasattr(self.dataset, "buckets"):
            batch = self.dataset.select(jnp.minimum(number, size - 1), split, arrays)
        else:
            key = jax.random.fold_in(jax.random.key(EVALUATION_SEED[split]), index)
            batch = self.dataset.sample(key, self.evaluation_batch, split, arrays)
        return batch | {"counted": number < size}

    def eval_step(self, state: supervised.TrainState, batch: Mapping) -> dict:
        """The objective's measures, averaged over sequences or steps."""

        def step(state, batch):
            prediction = self.model.apply(
                state.variables, batch["inputs"], batch["lengths"]
            )
            sums = {}
            for name, (values, mask) in self._measure(prediction, batch).items():
                counted = batch["counted"].reshape(-1, *(1,) * (values.ndim - 1))
                sums[name] = metrics.masked(
                    values, counted if mask is None else counted & mask
                )
            return sums

        return at_bucket_length(self.dataset, step, state, batch)

    def after_evaluation(
        self, state: supervised.TrainState, means: Mapping
    ) -> tuple[supervised.TrainState, jax.Array]:
        """The plateau schedule; see `loop.Task`."""
        return supervised.after_evaluation(state, means[self.monitor], self.optimizer)

    # What the runner calls besides.

    def check_contracts(self, state: supervised.TrainState, batch: Mapping) -> None:
        """Checks on a corner of a batch that padding changes nothing.

        Raises:
          AssertionError: naming the contract and the worst element.
        """
        contracts.assert_sequence_padding_invariant(
            lambda inputs, lengths: answers(
                self.model.apply(state.variables, inputs, lengths)
            ),
            batch["inputs"][:2, :16],
        )

    def report(
        self, state: supervised.TrainState, workdir: Path, seed: int
    ) -> list[Section]:
        """Sections of the report; writes `test_sequences.npz`."""
        return sequence_report.sections(self, state, workdir, seed)

    def evaluation_sequences(
        self, state: supervised.TrainState, split: str
    ) -> tuple[dict, dict, dict]:
        """All sequences of an evaluation.

        Returns:
          Of each sequence what the batch says in one number, "lengths" among them,
          {name: [sequence]}; the measures, {name: values [sequence]}, means over the
          steps of a sequence where there is a target a step; and the first batch
          whole, with its "prediction".
        """

        @jax.jit
        def evaluate(state, arrays, index):
            batch = self.eval_batch(split, index, arrays)
            prediction = answers(
                self.model.apply(state.variables, batch["inputs"], batch["lengths"])
            )
            measures = {}
            for name, (values, mask) in self._measure(prediction, batch).items():
                if mask is not None:
                    total = jnp.where(mask, values, 0).sum(1)
                    values = total / jnp.where(mask.any(1), mask.sum(1), jnp.nan)
                measures[name] = values
            return batch | {"prediction": prediction}, measures

        first: dict = {}
        rows = []
        for index in range(self.num_eval_batches(split)):
            batch, measures = evaluate(state, self.arrays, np.int32(index))
            first = first or jax.device_get(batch)
            told = {
                name: leaf
                for name, leaf in batch.items()
                if leaf.ndim == 1 and jnp.issubdtype(leaf.dtype, jnp.integer)
            }
            rows.append(jax.device_get((told, measures)))
        total = self._num_evaluation_sequences(split)
        told, measures = jax.tree.map(
            lambda *leaves: np.concatenate(leaves)[:total], *rows
        )
        return told, measures, first


def answers(prediction: Any) -> jax.Array:
    """What a model answered, without the states it may return besides."""
    return prediction[0] if isinstance(prediction, tuple) else prediction


def at_bucket_length(
    dataset: Any, step: Callable, state: Any, batch: Mapping, *rest: Any
) -> Any:
    """`step(state, batch, *rest)` with the batch cut to the length of its bucket.

    Every length of the dataset's buckets is a branch of one compiled program, of which
    the shortest is computed that holds the batch. A generated batch stays as it is.

    Args:
      dataset: a `SequenceDataset`.
      step: a function of a state, a batch and the rest.
      state: see `step`.
      batch: arrays [sequence, step, ...] are cut, those of one axis stay.
      rest: see `step`.
    """
    if not hasattr(dataset, "buckets"):
        return step(state, batch, *rest)
    lengths = [batch[name] for name in ("lengths", "target_lengths") if name in batch]
    longest = max(leaf.shape[1] for leaf in batch.values() if leaf.ndim > 1)
    options = sorted({length for *_, length in dataset.buckets} | {longest})

    def cut(length, state, batch, *rest):
        shorter = {
            name: leaf[:, :length] if leaf.ndim > 1 else leaf
            for name, leaf in batch.items()
        }
        return step(state, shorter, *rest)

    branches = [functools.partial(cut, length) for length in options]
    needed = functools.reduce(jnp.maximum, lengths).max()
    bucket = jnp.searchsorted(jnp.asarray(options), needed)
    return jax.lax.switch(bucket, branches, state, batch, *rest)
