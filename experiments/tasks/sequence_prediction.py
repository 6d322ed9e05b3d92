"""Sequence prediction: one answer a sequence (M to 1), or one a step (M to M)."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from archs import contracts
from experiments.loop import Training
from experiments.optimizers import Optimizer
from experiments.report import Section
from experiments.tasks import (
    objectives,
    sequence_objectives,
    sequence_report,
    supervised,
)
from experiments.tasks.sequence_batches import (
    SequenceDataset,
    answers,
    at_bucket_length,
    check_reads_the_past,
    chosen_batch,
    draw_evaluation_batch,
    draw_train_batch,
    evaluation_size,
)


@dataclasses.dataclass(frozen=True)
class SequencePrediction(objectives.ObjectiveTask):
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
      temperature: at which the report's sentences and music are drawn.
      top_p: of the report's sentences, see `archs.decoding.sample`.
      first_note: the MIDI number of the note that the report's music begins with.
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
    temperature: float = 1.0
    top_p: float = 0.9
    first_note: int = 60

    objectives = sequence_objectives
    second_input = "lengths"

    def __post_init__(self):
        supervised.check_positive(
            self,
            "num_sequences",
            "validation_sequences",
            "test_sequences",
            "evaluation_batch",
        )
        objectives.check(sequence_objectives, self.objective)
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")
        if not 21 <= self.first_note <= 108:
            raise ValueError(
                "first_note must be a key of the piano, 21 (A0) to 108 (C8), not "
                f"{self.first_note}"
            )
        if getattr(self.dataset, "predicts_next", False):
            check_reads_the_past(self.model)

    def read(self, prediction: Any) -> jax.Array:
        """The answers, without final states."""
        return answers(prediction)

    # The methods of `loop.Task`.

    def sample(self, key: jax.Array, step: jax.Array, arrays: Mapping) -> dict:
        """Sequences of the train split."""
        return draw_train_batch(self.dataset, key, step, self.num_sequences, arrays)

    def train_step(
        self, state: supervised.TrainState, batch: Mapping, key: jax.Array
    ) -> tuple[supervised.TrainState, dict]:
        """One update; see `loop.Task`."""
        step = super().train_step
        return at_bucket_length(self.dataset, step, state, batch, key)

    def num_eval_batches(self, split: str) -> int:
        """Batches of `evaluation_batch` sequences."""
        return -(-self.evaluation_size(split) // self.evaluation_batch)

    def evaluation_size(self, split: str) -> int:
        asked = {"validation": self.validation_sequences, "test": self.test_sequences}
        return evaluation_size(self.dataset, split, asked[split])

    def eval_batch(self, split: str, index: jax.Array, arrays: Mapping) -> dict:
        """Sequences of a split; "counted" leaves out those beyond its number."""
        size = self.evaluation_size(split)
        return draw_evaluation_batch(
            self.dataset, split, index, size, self.evaluation_batch, arrays
        )

    def eval_step(self, state: supervised.TrainState, batch: Mapping) -> dict:
        """The objective's measures, averaged over sequences or steps."""
        return at_bucket_length(self.dataset, super().eval_step, state, batch)

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
        self, state: supervised.TrainState, split: str, num_shown: int
    ) -> tuple[dict, dict, dict]:
        """All sequences of an evaluation.

        Args:
          state: the trained state.
          split: the evaluation's.
          num_shown: how many are returned whole.

        Returns:
          Of each sequence what the batch says in one number, "lengths" among them,
          {name: [sequence]}; the measures, {name: values [sequence]}, means over the
          steps of a sequence where there is a target a step; and a batch of some, of
          all lengths, with its "prediction".
        """

        @jax.jit
        def predict(state, batch):
            return answers(
                self.model.apply(state.variables, batch["inputs"], batch["lengths"])
            )

        @jax.jit
        def evaluate(state, arrays, index):
            batch = self.eval_batch(split, index, arrays)
            measured = self.measure(predict(state, batch), batch)
            measures = {}
            for name, (values, mask) in measured.items():
                if mask is not None:
                    total = jnp.where(mask, values, 0).sum(1)
                    values = total / jnp.where(mask.any(1), mask.sum(1), jnp.nan)
                measures[name] = values
            return batch, measures

        rows = []
        for index in range(self.num_eval_batches(split)):
            batch, measures = evaluate(state, self.arrays, np.int32(index))
            told = {
                name: leaf
                for name, leaf in batch.items()
                if leaf.ndim == 1 and jnp.issubdtype(leaf.dtype, jnp.integer)
            }
            rows.append(jax.device_get((told, measures)))
        total = self.evaluation_size(split)
        told, measures = jax.tree.map(
            lambda *leaves: np.concatenate(leaves)[:total], *rows
        )
        shown = chosen_batch(self, split, num_shown)
        shown["prediction"] = predict(state, shown)
        return told, measures, jax.device_get(shown)
