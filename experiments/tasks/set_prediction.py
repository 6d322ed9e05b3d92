"""Set prediction: learning a function of generated sets."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import data
from archs import contracts
from experiments.loop import Training
from experiments.optimizers import Optimizer
from experiments.report import Section
from experiments.tasks import (
    objectives,
    set_objectives,
    set_prediction_report,
    supervised,
)
from experiments.tasks.prevalence import check_set_network


class SetDataset(Protocol):
    """A dataset that makes its sets when they are needed.

    One with a fixed number of sets in a split, `spec.sizes[split]`, also has
    `select(key, indices, split, arrays)`, which returns those of given indices:
    evaluation goes through them in order. One whose sets of a training step are alike
    in size has `size_buckets`, of which the smallest that holds them is computed.

    Attributes:
      spec: `num_classes` is the number of outputs that its target asks for,
        `feature_shape` that of one element.
      arrays: {split: pytree of arrays} that sets are made from; `{}` of a split where
        nothing is needed.
    """

    spec: data.Spec
    arrays: Mapping[str, Any]

    def sample(
        self, key: jax.Array, num_sets: int, split: str, arrays: Mapping[str, Any]
    ) -> dict:
        """Sets of a split, a pure function of the key.

        Args:
          key: PRNG key.
          num_sets: how many, static.
          split: "train", "validation" or "test", static.
          arrays: `self.arrays`, of all splits.

        Returns:
          "inputs" float32 [set, element, *feature_shape], "mask" bool [set, element],
          "target" [set, ...], and what else the objective needs. Sets of the train
          split that share elements may have, instead of "inputs", "elements" float32
          [n, *feature_shape], of which each is encoded once, and "indices" int32 [set,
          element]. Dropout and batch statistics of the encoder then act on an element,
          whatever number of sets it is in.
        """


@dataclasses.dataclass(frozen=True)
class SetPrediction(objectives.ObjectiveTask):
    """Learns what a dataset asks about its sets.

    Every step sees sets never seen before; those of validation and test are fixed.

    Attributes:
      model: a set network, `model(inputs, mask, train=...)`.
      dataset: makes the sets, see `SetDataset`.
      optimizer: the config's.
      training: the config's.
      objective: a function of `experiments.tasks.set_objectives`: the loss and the
        measures.
      num_sets: sets a step.
      validation_sets: number of sets of an evaluation during training.
      test_sets: number of sets of the final evaluation.
      evaluation_batch: sets that are evaluated at once.
    """

    model: nn.Module
    dataset: SetDataset
    optimizer: Optimizer
    training: Training
    objective: str
    num_sets: int = 128
    validation_sets: int = 1000
    test_sets: int = 10_000
    evaluation_batch: int = 100

    objectives = set_objectives
    second_input = "mask"

    def __post_init__(self):
        supervised.check_positive(
            self, "num_sets", "validation_sets", "test_sets", "evaluation_batch"
        )
        objectives.check(set_objectives, self.objective)

    def init(self, key: jax.Array, batch: Mapping) -> supervised.TrainState:
        """The first state; see `loop.Task`."""
        if "elements" in batch:
            check_set_network(self.model)
        return super().init(key, batch)

    def arguments(self, batch: Mapping) -> tuple[jax.Array, jax.Array]:
        """What the model is given: the sets and their mask."""
        if "elements" in batch:
            return batch["elements"][batch["indices"]], batch["mask"]
        return super().arguments(batch)

    def predict(self, variables: Mapping, batch: Mapping, **options: Any) -> Any:
        """What the model returns; elements that sets share are encoded once."""
        if "elements" not in batch:
            return super().predict(variables, batch, **options)
        shared = batch["elements"], batch["indices"], batch["mask"]
        return self.model.apply(variables, *shared, method=_encode_once, **options)

    def sample(self, key: jax.Array, step: jax.Array, arrays: Mapping) -> dict:
        """Sets of the train split."""
        key = jax.random.fold_in(key, step)
        return self.dataset.sample(key, self.num_sets, "train", arrays)

    def train_step(
        self, state: supervised.TrainState, batch: Mapping, key: jax.Array
    ) -> tuple[supervised.TrainState, dict]:
        """One update; see `loop.Task`."""
        step = super().train_step
        if not hasattr(self.dataset, "size_buckets") or "elements" in batch:
            return step(state, batch, key)
        size = batch["mask"].sum(1).max()
        options = self.dataset.size_buckets
        return objectives.at_length(options, size, step, state, batch, key)

    def num_eval_batches(self, split: str) -> int:
        """Batches of `evaluation_batch` sets."""
        return -(-self._num_evaluation_sets(split) // self.evaluation_batch)

    def _num_evaluation_sets(self, split: str) -> int:
        return self.validation_sets if split == "validation" else self.test_sets

    def eval_batch(self, split: str, index: jax.Array, arrays: Mapping) -> dict:
        """Sets of a split; "counted" leaves out those beyond the number asked for."""
        key = supervised.evaluation_key(split, index)
        number = index * self.evaluation_batch + jnp.arange(self.evaluation_batch)
        if hasattr(self.dataset, "select"):
            indices = number % self.dataset.spec.sizes[split]
            batch = self.dataset.select(key, indices, split, arrays)
        else:
            batch = self.dataset.sample(key, self.evaluation_batch, split, arrays)
        return batch | {"counted": number < self._num_evaluation_sets(split)}

    # What the runner calls besides.

    def check_contracts(self, state: supervised.TrainState, batch: Mapping) -> None:
        """Checks on a corner of a batch that order and padding change nothing.

        Outputs of a model that answers element by element must follow their elements.

        Raises:
          AssertionError: naming the contract and the worst element.
        """
        inputs, mask = (np.asarray(argument) for argument in self.arguments(batch))
        elements = inputs[mask][:32]
        size = len(elements) // 2
        if not size:
            return
        inputs = elements[: 2 * size].reshape(2, size, *elements.shape[1:])  # two sets

        @jax.jit
        def model(inputs, mask):
            return self.model.apply(state.variables, inputs, mask)

        key = jax.random.key(0)
        if not _answers_by_element(model, inputs):
            contracts.assert_permutation_invariant(model, inputs, key=key)
            contracts.assert_padding_invariant(model, inputs)
            return

        def moments(inputs, mask):
            output = model(inputs, mask)  # [set, element, ...]
            real = mask.reshape(*mask.shape, *(1,) * (output.ndim - 2))
            output = jnp.where(real, output, 0)
            return output.sum(1), jnp.square(output).sum(1)

        contracts.assert_permutation_equivariant(model, inputs, key=key)
        contracts.assert_padding_invariant(moments, inputs)

    def report(
        self, state: supervised.TrainState, workdir: Path, seed: int
    ) -> list[Section]:
        """Sections of the report; writes `test_sets.npz`."""
        return set_prediction_report.sections(self, state, workdir)

    def evaluation_sets(
        self, state: supervised.TrainState, split: str
    ) -> tuple[dict, dict, dict]:
        """All sets of an evaluation.

        Returns:
          What was learned from them, without the inputs: the batch's "mask", "target"
          and others, and the "prediction", each [set, ...]; the measures, {name: values
          [set, ...], masked ones being NaN where the mask is False}; and the first
          batch whole, with its "prediction".
        """

        @jax.jit
        def evaluate(state, arrays, index):
            batch = self.eval_batch(split, index, arrays)
            prediction = self.predict(state.variables, batch)
            measures = {
                name: values if mask is None else jnp.where(mask, values, jnp.nan)
                for name, (values, mask) in self.measure(prediction, batch).items()
            }
            return batch | {"prediction": prediction}, measures

        first: dict = {}
        rows = []
        for index in range(self.num_eval_batches(split)):
            batch, measures = evaluate(state, self.arrays, np.int32(index))
            first = first or jax.device_get(batch)
            kept = {
                name: leaf
                for name, leaf in batch.items()
                if name not in ("inputs", "counted")
            }
            rows.append(jax.device_get((kept, measures)))
        total = self._num_evaluation_sets(split)
        outputs, measures = jax.tree.map(
            lambda *leaves: np.concatenate(leaves)[:total], *rows
        )
        return outputs, measures, first


def _encode_once(
    model: nn.Module,
    elements: jax.Array,
    indices: jax.Array,
    mask: jax.Array,
    *,
    train: bool = False,
) -> Any:
    """The set network's output on sets `elements[indices]`; elements [n, *features]."""
    features = model.encode(elements[None], train=train)[0]
    representation = model.aggregate(features[indices], mask, train=train)
    return model.decode(representation, train=train)


def _answers_by_element(model: Callable, inputs: np.ndarray) -> bool:
    """Whether the shape of the output follows the number of elements."""
    shapes = [
        jax.tree.map(
            lambda leaf: leaf.shape,
            jax.eval_shape(model, elements, np.ones(elements.shape[:2], bool)),
        )
        for elements in (inputs, inputs[:, 1:])
    ]
    return shapes[0] != shapes[1]
