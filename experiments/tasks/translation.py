"""Translation: a sequence of tokens from another (M to N)."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from archs import contracts
from archs.decoding import beam_search
from data.sequences import BOS, EOS
from experiments import metrics
from experiments.loop import Training
from experiments.optimizers import Optimizer
from experiments.report import Section
from experiments.tasks import supervised, translation_report
from experiments.tasks.sequence_batches import (
    SequenceDataset,
    at_bucket_length,
    draw_evaluation_batch,
    draw_train_batch,
    evaluation_size,
)


@dataclasses.dataclass(frozen=True)
class Translation(supervised.SupervisedTask):
    """Learns to write a target for a source, token by token, by cross-entropy.

    In training the decoder reads the true target, one token behind (teacher forcing).
    After it, beam search writes the translations of the test split: `translations.tsv`
    and the measures "bleu" (sacrebleu, on the texts as the dataset gives them) and
    "exact".

    Attributes:
      model: `model(source, target, source_lengths, target_lengths, train=...)` returns
        logits [pair, step, K]; with `encode`, `init_cache` and `decode_step` it is
        decoded.
      dataset: "inputs" [pair, step] are source tokens, "targets" [pair, step] those of
        the target from BOS to EOS, "target_lengths" in number. Has `decode(ids)`.
      optimizer: the config's.
      training: the config's.
      num_pairs: pairs a step.
      label_smoothing: the share of a target's probability that is spread over all
        tokens (Szegedy et al., 2016).
      validation_pairs: of an evaluation during training, where they are generated;
        stored ones are all evaluated.
      test_pairs: of the final evaluation, likewise.
      evaluation_batch: pairs that are evaluated, or decoded, at once.
      beam_size: translations that beam search holds.
      length_penalty: the exponent of the length that log probabilities are divided by
        (Wu et al., 2016); 0: none.
      max_length: longest translation, in tokens; None: the longest target of train and
        validation.
    """

    model: nn.Module
    dataset: SequenceDataset
    optimizer: Optimizer
    training: Training
    num_pairs: int = 64
    label_smoothing: float = 0.1
    validation_pairs: int = 1000
    test_pairs: int = 1000
    evaluation_batch: int = 50
    beam_size: int = 5
    length_penalty: float = 0.6
    max_length: int | None = None

    monitor = "cross_entropy"

    def __post_init__(self):
        supervised.check_positive(
            self,
            "num_pairs",
            "validation_pairs",
            "test_pairs",
            "evaluation_batch",
            "beam_size",
        )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing must lie in [0, 1), not {self.label_smoothing}"
            )
        if not hasattr(self.model, "decode_step"):
            raise ValueError(
                f"{type(self.model).__name__} has no decode_step; use a model that "
                "translates, Transformer or RecurrentEncoderDecoder"
            )

    @property
    def arrays(self) -> Mapping[str, Any]:
        """The dataset's."""
        return self.dataset.arrays

    # The methods of `loop.Task`.

    def init(self, key: jax.Array, batch: Mapping) -> supervised.TrainState:
        """The first state; see `loop.Task`."""
        logits, variables = self.model.init_with_output(key, *_arguments(batch))
        expected = (*_expected(batch)[0].shape, self.dataset.spec.num_classes)
        if logits.shape != expected:
            raise ValueError(
                f"the model must return logits of shape {expected} (pairs, steps, "
                f"tokens), not {logits.shape}"
            )
        return supervised.init_state(variables, self.optimizer, self.training.num_steps)

    def sample(self, key: jax.Array, step: jax.Array, arrays: Mapping) -> dict:
        """Pairs of the train split."""
        return draw_train_batch(self.dataset, key, step, self.num_pairs, arrays)

    def train_step(
        self, state: supervised.TrainState, batch: Mapping, key: jax.Array
    ) -> tuple[supervised.TrainState, dict]:
        """One update; see `loop.Task`."""

        def step(state, batch, key):
            def loss(params, model_state):
                logits, model_state = self.model.apply(
                    {"params": params, **model_state},
                    *_arguments(batch),
                    train=True,
                    rngs={"dropout": key},
                    mutable=list(model_state),
                )
                targets, mask = _expected(batch)
                sums = _measures(logits, targets, mask)
                total, count = metrics.masked(self._smoothed(logits, targets), mask)
                return total / jnp.maximum(count, 1), (sums, model_state)

            return supervised.update(
                state, loss, self.optimizer, self.training.num_steps
            )

        return at_bucket_length(self.dataset, step, state, batch, key)

    def _smoothed(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        """Cross-entropy with smoothed labels, [pair, step]."""
        log_probabilities = nn.log_softmax(logits.astype(jnp.float32))
        true = jnp.take_along_axis(log_probabilities, targets[..., None], -1)[..., 0]
        share = self.label_smoothing
        return -(1 - share) * true - share * log_probabilities.mean(-1)

    def num_eval_batches(self, split: str) -> int:
        """Batches of `evaluation_batch` pairs."""
        return -(-self.evaluation_size(split) // self.evaluation_batch)

    def evaluation_size(self, split: str) -> int:
        """Pairs of an evaluation."""
        asked = {"validation": self.validation_pairs, "test": self.test_pairs}
        return evaluation_size(self.dataset, split, asked[split])

    def eval_batch(self, split: str, index: jax.Array, arrays: Mapping) -> dict:
        """Pairs of a split; "counted" leaves out those beyond its number."""
        size = self.evaluation_size(split)
        return draw_evaluation_batch(
            self.dataset, split, index, size, self.evaluation_batch, arrays
        )

    def eval_step(self, state: supervised.TrainState, batch: Mapping) -> dict:
        """Cross-entropy, not smoothed, and accuracy of tokens given those before."""

        def step(state, batch):
            logits = self.model.apply(state.variables, *_arguments(batch))
            targets, mask = _expected(batch)
            return _measures(logits, targets, batch["counted"][:, None] & mask)

        return at_bucket_length(self.dataset, step, state, batch)

    # What the runner calls besides.

    def check_contracts(self, state: supervised.TrainState, batch: Mapping) -> None:
        """Checks on a corner of a batch that what follows a source changes nothing.

        Raises:
          AssertionError: naming the contract and the worst element.
        """
        target = batch["targets"][:2, :8]

        def answer(source, lengths):
            logits = self.model.apply(state.variables, source, target, lengths)
            return logits.reshape(len(logits), -1)

        contracts.assert_sequence_padding_invariant(answer, batch["inputs"][:2, :16])

    def translate(
        self, state: supervised.TrainState, source: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Translations by beam search; compile it with `jax.jit`.

        Args:
          state: the trained state.
          source: int [pair, step].
          lengths: int [pair].

        Returns:
          The best translation of each, int [pair, step], padded after EOS, and its log
          probability [pair].
        """
        model = self.model.bind(state.variables)
        max_length = self.max_length or self.longest_target
        cache = model.init_cache(model.encode(source, lengths), max_length)

        def step(cache, tokens):
            return self.model.apply(
                state.variables, cache, tokens, method="decode_step"
            )

        tokens, _, log_probabilities = beam_search(
            step,
            cache,
            jnp.full(len(source), BOS, jnp.int32),
            max_length,
            EOS,
            beam_size=self.beam_size,
            length_penalty=self.length_penalty,
        )
        return tokens[:, 0], log_probabilities[:, 0]

    @property
    def longest_target(self) -> int:
        """Tokens of the longest target of train and validation, EOS among them."""
        batches = (
            jax.eval_shape(self.sample, jax.random.key(0), jnp.int32(0), self.arrays),
            jax.eval_shape(
                functools.partial(self.eval_batch, "validation"),
                jnp.int32(0),
                self.arrays,
            ),
        )
        return max(batch["targets"].shape[1] for batch in batches) - 1

    def measure_test(
        self, state: supervised.TrainState, workdir: Path
    ) -> dict[str, float]:
        """Decodes the test split; writes `translations.tsv`.

        Returns:
          "bleu" and "exact", the share of translations equal to the reference.
        """
        return translation_report.measure_test(self, state, workdir)

    def report(
        self, state: supervised.TrainState, workdir: Path, seed: int
    ) -> list[Section]:
        """Sections of the report, from `translations.tsv`."""
        return translation_report.sections(self, state, workdir)


def _arguments(batch: Mapping) -> tuple[jax.Array, ...]:
    """What the model reads: the decoder the target without its last token."""
    return (
        batch["inputs"],
        batch["targets"][:, :-1],
        batch["lengths"],
        batch["target_lengths"] - 1,
    )


def _expected(batch: Mapping) -> tuple[jax.Array, jax.Array]:
    """What it should say: the target without BOS, and where there is one."""
    targets = batch["targets"][:, 1:]
    step = jnp.arange(targets.shape[1])
    return targets, step < batch["target_lengths"][:, None] - 1


def _measures(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> dict:
    values = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), targets
    )
    return {
        "cross_entropy": metrics.masked(values, mask),
        "token_accuracy": metrics.masked(logits.argmax(-1) == targets, mask),
    }
