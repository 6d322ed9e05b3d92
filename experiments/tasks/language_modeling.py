"""Language modelling: the next token of a text that never ends."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from archs import contracts
from data.samplers import random_windows, stream_batch
from experiments import metrics
from experiments.loop import Training
from experiments.optimizers import Optimizer
from experiments.report import Section
from experiments.tasks import sequence_report, supervised
from experiments.tasks.sequence_batches import (
    SequenceDataset,
    answers,
    check_reads_the_past,
)


@dataclasses.dataclass(frozen=True)
class LanguageModeling(supervised.SupervisedTask):
    """Learns which token follows, by cross-entropy.

    With `carry_state` (recurrent networks) each row of a batch reads its own part of
    the text, window after window, and begins a window with the state in which it ended
    the last: backpropagation through time is truncated at the window, memory is not.
    Otherwise (Transformers) windows come from anywhere, and no more than `window`
    tokens are ever read at once: a model need not know more positions than it learned.

    Evaluation goes through a split in pieces, each read with `context` tokens before it
    that are not counted, so that no token is predicted from less than `context` tokens
    but the first ones. With `carry_state` a piece has `window` tokens; otherwise piece
    and context have.

    Attributes:
      model: `model(inputs, lengths, train=...)` returns logits [window, step, K],
        perhaps with states beside them, which it takes as a third argument.
      dataset: its arrays hold a "stream" of token ids for each split.
      optimizer: the config's.
      training: the config's.
      num_windows: windows a step.
      window: tokens of a window.
      carry_state: see above.
      context: see above; None: `window` with `carry_state`, half of it without.
      evaluation_batch: pieces that are evaluated at once.
      sample_length: tokens of the samples in the report, after the first tokens of the
        test split.
      temperatures: of the samples in the report.
    """

    model: nn.Module
    dataset: SequenceDataset
    optimizer: Optimizer
    training: Training
    num_windows: int = 32
    window: int = 128
    carry_state: bool = True
    context: int | None = None
    evaluation_batch: int = 50
    sample_length: int = 500
    temperatures: tuple[float, ...] = (0.5, 0.8, 1.0)

    monitor = "cross_entropy"

    def __post_init__(self):
        supervised.check_positive(
            self, "num_windows", "window", "evaluation_batch", "sample_length"
        )
        if self.context is not None and self.context < 0:
            raise ValueError(f"context must be 0 or more, not {self.context}")
        if self._stride < 1:
            raise ValueError(
                f"context must be below window ({self.window}) without carry_state, "
                f"where both are read at once, not {self.context}"
            )
        if not all(temperature > 0 for temperature in self.temperatures):
            raise ValueError(f"temperatures must be > 0, not {self.temperatures}")
        check_reads_the_past(self.model)
        for split, arrays in self.dataset.arrays.items():
            if "stream" not in arrays:
                raise ValueError(
                    f"{self.dataset.spec.name} has no stream of tokens in its {split} "
                    "split; use a dataset of text, such as TinyShakespeare"
                )

    @property
    def arrays(self) -> Mapping[str, Any]:
        """The dataset's."""
        return self.dataset.arrays

    # The methods of `loop.Task`.

    def init(self, key: jax.Array, batch: Mapping) -> supervised.TrainState:
        """The first state; see `loop.Task`."""
        output, variables = self.model.init_with_output(
            key, batch["inputs"], batch["lengths"]
        )
        expected = (*batch["inputs"].shape, self.dataset.spec.num_classes)
        if answers(output).shape != expected:
            raise ValueError(
                f"the model must return logits of shape {expected} (windows, steps, "
                f"tokens), not {answers(output).shape}"
            )
        state = supervised.init_state(
            variables, self.optimizer, self.training.num_steps
        )
        if not self.carry_state:
            return state
        if not isinstance(output, tuple):
            raise ValueError(
                f"carry_state: {type(self.model).__name__} has no state to carry on; "
                "set carry_state=False"
            )
        carried = jax.tree.map(jnp.zeros_like, output[1])
        return state.replace(model_state=state.model_state | {"carried": carried})

    def sample(self, key: jax.Array, step: jax.Array, arrays: Mapping) -> dict:
        """Windows of the train split."""
        size = self.num_windows, self.window
        if self.carry_state:
            return stream_batch(step, arrays["train"]["stream"], *size)
        key = jax.random.fold_in(key, step)
        return random_windows(key, arrays["train"]["stream"], *size)

    def train_step(
        self, state: supervised.TrainState, batch: Mapping, key: jax.Array
    ) -> tuple[supervised.TrainState, dict]:
        """One update; see `loop.Task`."""

        def loss(params, model_state):
            model_state = dict(model_state)
            arguments = [batch["inputs"], batch["lengths"]]
            if self.carry_state:
                carried = model_state.pop("carried")
                # The first window of a part follows nothing.
                first = self.model.apply(
                    {"params": params, **model_state},
                    len(batch["inputs"]),
                    method="init_cache",
                )
                arguments.append(
                    jax.tree.map(
                        lambda first, leaf: jnp.where(
                            batch["reset"], first.astype(leaf.dtype), leaf
                        ),
                        first,
                        carried,
                    )
                )
            output, model_state = self.model.apply(
                {"params": params, **model_state},
                *arguments,
                train=True,
                rngs={"dropout": key},
                mutable=list(model_state),
            )
            if self.carry_state:
                carried = jax.lax.stop_gradient(output[1])
                model_state = {**model_state, "carried": carried}
            values = _cross_entropy(answers(output), batch["targets"])
            measured = {"cross_entropy": metrics.masked(values)}
            return values.mean(), (measured, model_state)

        return supervised.update(state, loss, self.optimizer, self.training.num_steps)

    @property
    def _context(self) -> int:
        if self.context is not None:
            return self.context
        return self.window if self.carry_state else self.window // 2

    @property
    def _stride(self) -> int:
        """Tokens of a piece of an evaluation."""
        return self.window if self.carry_state else self.window - self._context

    def num_eval_batches(self, split: str) -> int:
        """Batches that cover the split once."""
        last = len(self.dataset.arrays[split]["stream"]) - 1
        return max(-(-last // (self._stride * self.evaluation_batch)), 1)

    def prepare_evaluation(
        self, state: supervised.TrainState, split: str, arrays: Mapping
    ) -> dict:
        """The variables of the model; see `loop.Task`."""
        return self.variables(state)

    def variables(self, state: supervised.TrainState) -> dict:
        """The model's variables, without the states carried in training."""
        variables = dict(state.variables)
        variables.pop("carried", None)
        return variables

    def eval_batch(self, split: str, index: jax.Array, arrays: Mapping) -> dict:
        """Pieces in order; "counted" is True where a token counts."""
        stream = arrays[split]["stream"]
        last = len(stream) - 1  # tokens that have a next one
        number = index * self.evaluation_batch + jnp.arange(self.evaluation_batch)
        start = number * self._stride
        # The first pieces begin earlier than their context would: at the beginning.
        begin = jnp.maximum(start - self._context, 0)
        position = begin[:, None] + jnp.arange(self._context + self._stride)
        stop = jnp.minimum(start + self._stride, last)
        counted = (position >= start[:, None]) & (position < stop[:, None])
        position = jnp.minimum(position, last - 1)
        return {
            "inputs": stream[position],
            "targets": stream[position + 1],
            "lengths": jnp.full(len(number), position.shape[1], jnp.int32),
            "counted": counted,
        }

    def eval_step(self, prepared: dict, batch: Mapping) -> dict:
        """Cross-entropy in nats and in bits a token, and accuracy."""
        logits = answers(self.model.apply(prepared, batch["inputs"], batch["lengths"]))
        values = _cross_entropy(logits, batch["targets"])
        counted = batch["counted"]
        return {
            "cross_entropy": metrics.masked(values, counted),
            "bits_per_token": metrics.masked(values / math.log(2), counted),
            "accuracy": metrics.masked(logits.argmax(-1) == batch["targets"], counted),
        }

    # What the runner calls besides.

    def check_contracts(self, state: supervised.TrainState, batch: Mapping) -> None:
        """Checks on a corner of a batch that what follows changes no answer.

        Raises:
          AssertionError: naming the contract and the worst element.
        """
        contracts.assert_sequence_padding_invariant(
            lambda inputs, lengths: answers(
                self.model.apply(self.variables(state), inputs, lengths)
            ),
            batch["inputs"][:2, :16],
        )

    def report(
        self, state: supervised.TrainState, workdir: Path, seed: int
    ) -> list[Section]:
        """Sections of the report; writes `samples.txt`."""
        return sequence_report.language_sections(self, state, workdir, seed)


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), targets
    )
