"""What `SetPrediction` and `SequencePrediction` share: objectives by name.

An objective is a public function of a module, `f(prediction, batch) -> {measure:
values}`.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from experiments import metrics
from experiments.tasks import supervised


class ObjectiveTask(supervised.SupervisedTask):
    """Learns what an objective measures of the model's predictions.

    A task has the fields `model`, `dataset`, `optimizer`, `training` and `objective`,
    says in `objectives` which module has its objectives and in `second_input` what the
    model is given besides "inputs", and makes the prediction what objectives read.
    """

    objectives: ModuleType
    second_input: str

    def read(self, prediction: Any) -> Any:
        """What objectives read of a prediction."""
        return prediction

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
                jax.random.key(0), *self.arguments(batch)
            )
            names.extend(self.measure(prediction, batch))

        jax.eval_shape(trace, self.arrays)
        return names[0]

    def arguments(self, batch: Mapping) -> tuple[jax.Array, jax.Array]:
        """What the model is given."""
        return batch["inputs"], batch[self.second_input]

    def predict(self, variables: Mapping, batch: Mapping, **options: Any) -> Any:
        """What the model returns; `options` are those of `flax.linen.Module.apply`."""
        return self.model.apply(variables, *self.arguments(batch), **options)

    def measure(self, prediction: Any, batch: Mapping) -> dict:
        """{measure: (values, mask or None)}, the loss first, in float32."""
        prediction = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float32), self.read(prediction)
        )
        measured = getattr(self.objectives, self.objective)(prediction, batch)
        return {
            key: values if isinstance(values, tuple) else (values, None)
            for key, values in measured.items()
        }

    def init(self, key: jax.Array, batch: Mapping) -> supervised.TrainState:
        """The first state; see `loop.Task`."""
        prediction, variables = self.model.init_with_output(key, *self.arguments(batch))
        # Raises where the prediction is not what the objective needs.
        jax.eval_shape(self.measure, prediction, batch)
        return supervised.init_state(variables, self.optimizer, self.training.num_steps)

    def train_step(
        self, state: supervised.TrainState, batch: Mapping, key: jax.Array
    ) -> tuple[supervised.TrainState, dict]:
        """One update; see `loop.Task`."""

        def loss(params, model_state):
            prediction, model_state = self.predict(
                {"params": params, **model_state},
                batch,
                train=True,
                rngs={"dropout": key},
                mutable=list(model_state),
            )
            measured = {
                name: metrics.masked(*values)
                for name, values in self.measure(prediction, batch).items()
            }
            total, count = next(iter(measured.values()))
            return total / jnp.maximum(count, 1), (measured, model_state)

        return supervised.update(state, loss, self.optimizer, self.training.num_steps)

    def eval_step(self, state: supervised.TrainState, batch: Mapping) -> dict:
        """The objective's measures, averaged over what is counted."""
        prediction = self.predict(state.variables, batch)
        sums = {}
        for name, (values, mask) in self.measure(prediction, batch).items():
            counted = batch["counted"].reshape(-1, *(1,) * (values.ndim - 1))
            sums[name] = metrics.masked(
                values, counted if mask is None else counted & mask
            )
        return sums


def at_length(
    options: Iterable[int],
    needed: jax.Array,
    step: Callable,
    state: Any,
    batch: Mapping,
    *rest: Any,
) -> Any:
    """`step(state, batch, *rest)` with the padding of the batch cut off.

    Every option is a branch of one compiled program, of which the shortest is computed
    that holds the batch.

    Args:
      options: lengths to cut to; the whole one is an option always.
      needed: int scalar, the length that holds the batch.
      step: a function of a state, a batch and the rest.
      state: see `step`.
      batch: of the longest arrays [sequence, step, ...] the second axis is cut.
      rest: see `step`.
    """
    longest = max(leaf.shape[1] for leaf in batch.values() if leaf.ndim > 1)
    options = sorted({*options, longest})

    def cut(length, state, batch, *rest):
        shorter = {
            name: leaf[:, :length] if leaf.ndim > 1 else leaf
            for name, leaf in batch.items()
        }
        return step(state, shorter, *rest)

    branches = [functools.partial(cut, length) for length in options]
    bucket = jnp.searchsorted(jnp.asarray(options), needed)
    return jax.lax.switch(bucket, branches, state, batch, *rest)


def check(module: ModuleType, name: str) -> None:
    """Raises ValueError if the module has no objective of that name."""
    known = [
        key
        for key, value in vars(module).items()
        if inspect.isfunction(value)
        and list(inspect.signature(value).parameters) == ["prediction", "batch"]
        and not key.startswith("_")
    ]
    if name not in known:
        raise ValueError(f"objective must be one of {', '.join(known)}, not {name!r}")
