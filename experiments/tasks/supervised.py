"""What tasks with one model and one optimizer share: state, update, schedule."""

from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from experiments.optimizers import Optimizer


@flax.struct.dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
      params: the model's parameters.
      model_state: its other collections (batch statistics), `{}` if it has none.
      opt_state: of the optax chain.
      ema_params: moving average of the parameters; None without `ema_decay`.
      plateau: state of the reduction on plateaus; None with another schedule.
      steps: number of steps taken, int32.
    """

    params: Any
    model_state: Any
    opt_state: Any
    ema_params: Any
    plateau: Any
    steps: jax.Array

    @property
    def variables(self) -> dict:
        """What the model is evaluated with."""
        params = self.params if self.ema_params is None else self.ema_params
        return {"params": params, **self.model_state}


def check_positive(task: Any, *names: str) -> None:
    """Raises ValueError for the first of these fields of a task that is below 1."""
    for name in names:
        if getattr(task, name) < 1:
            raise ValueError(f"{name} must be 1 or more, not {getattr(task, name)}")


def check_not_negative(task: Any, *names: str) -> None:
    """Raises ValueError for the first of these fields of a task that is below 0."""
    for name in names:
        if not getattr(task, name) >= 0:  # NaN is refused, too
            raise ValueError(f"{name} must be 0 or more, not {getattr(task, name)}")


def evaluation_key(split: str, index: jax.Array) -> jax.Array:
    """The key of a batch of "validation" or "test".

    What is drawn there is the same for every model and every seed of training.
    """
    return jax.random.fold_in(
        jax.random.key({"validation": 1, "test": 2}[split]), index
    )


def init_state(variables: dict, optimizer: Optimizer, num_steps: int) -> TrainState:
    """The state before the first step."""
    variables = dict(variables)
    params = variables.pop("params", {})
    plateau = None
    if optimizer.schedule == "plateau":
        plateau = optimizer.plateau().init(params)
    return TrainState(
        params=params,
        model_state=variables,
        opt_state=optimizer.transformation(num_steps).init(params),
        # A copy: the state is donated, and one buffer cannot be donated twice.
        ema_params=jax.tree.map(jnp.copy, params) if optimizer.ema_decay else None,
        plateau=plateau,
        steps=jnp.int32(0),
    )


def update(
    state: TrainState,
    loss: Callable[[Any, Any], tuple[jax.Array, tuple[dict, Any]]],
    optimizer: Optimizer,
    num_steps: int,
) -> tuple[TrainState, dict]:
    """One step of gradient descent.

    Args:
      state: the state before it.
      loss: `(params, model_state) -> (loss, (metrics, new model_state))`.
      optimizer: the config's.
      num_steps: of the run, for the schedule.

    Returns:
      The state after it and the metrics with the learning rate and the gradient's
      norm added.
    """
    grads, (measured, model_state) = jax.grad(loss, has_aux=True)(
        state.params, state.model_state
    )
    step = optimizer.transformation(num_steps)
    updates, opt_state = step.update(grads, state.opt_state, state.params)
    scale = 1.0 if state.plateau is None else state.plateau.scale
    if state.plateau is not None:
        updates = jax.tree.map(lambda leaf: scale * leaf, updates)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        ema_params = optax.incremental_update(
            params, ema_params, 1 - optimizer.ema_decay
        )
    rate = optimizer.learning_rate_schedule(num_steps)(
        state.steps // optimizer.accumulation_steps
    )
    one = jnp.float32(1)
    measured = measured | {
        "learning_rate": (jnp.asarray(rate * scale, jnp.float32), one),
        "gradient_norm": (optax.tree.norm(grads), one),
    }
    return TrainState(
        params=params,
        model_state=model_state,
        opt_state=opt_state,
        ema_params=ema_params,
        plateau=state.plateau,
        steps=state.steps + 1,
    ), measured


def after_evaluation(
    state: TrainState, measure: jax.Array, optimizer: Optimizer
) -> tuple[TrainState, jax.Array]:
    """Moves the plateau schedule on; True when its learning rate is exhausted."""
    if state.plateau is None:
        return state, jnp.bool_(False)
    _, plateau = optimizer.plateau().update({}, state.plateau, value=measure)
    rate = optimizer.learning_rate * plateau.scale
    exhausted = rate < optimizer.end_learning_rate
    return state.replace(plateau=plateau), exhausted


class SupervisedTask:
    """What all tasks with one model and one optimizer share of `loop.Task`."""

    def prepare_evaluation(
        self, state: TrainState, split: str, arrays: Mapping
    ) -> TrainState:
        """The state; see `loop.Task`."""
        return state

    def after_evaluation(
        self, state: TrainState, means: Mapping
    ) -> tuple[TrainState, jax.Array]:
        """The plateau schedule; see `loop.Task`."""
        return after_evaluation(state, means[self.monitor], self.optimizer)
