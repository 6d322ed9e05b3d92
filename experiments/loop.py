"""The training loop: a pure step turned many times per dispatch.

The loop knows nothing of what is learned. It drives anything that has the methods of
`Task`: one optimizer or two, a single model or a vmapped population.
"""

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from experiments import metrics
from experiments.checkpoints import Checkpoints
from experiments.errors import UserError
from experiments.progress import Progress


class Task(Protocol):
    """What is learned and measured, as pure functions.

    Attributes:
      arrays: pytree of device arrays that batches are drawn from.
      monitor: the validation measure (a mean, smaller is better) by which the best
        checkpoint is chosen and training stops early.
    """

    arrays: Any
    monitor: str

    def init(self, key: jax.Array, batch: Any) -> Any:
        """The first training state, a pytree of arrays."""

    def sample(self, key: jax.Array, step: jax.Array, arrays: Any) -> Any:
        """The batch of a step: the same key and step give the same batch."""

    def train_step(self, state: Any, batch: Any, key: jax.Array) -> tuple[Any, dict]:
        """The next state and `{metric: (sum, count)}`."""

    def num_eval_batches(self, split: str) -> int:
        """How many batches an evaluation of the split takes."""

    def eval_batch(self, split: str, index: jax.Array, arrays: Any) -> Any:
        """The batch `index` of the split, always the same."""

    def prepare_evaluation(self, state: Any, split: str, arrays: Any) -> Any:
        """What all batches of an evaluation share, computed once; often the state."""

    def eval_step(self, prepared: Any, batch: Any) -> dict:
        """`{metric: (sum, count)}` of one batch."""

    def after_evaluation(self, state: Any, means: Mapping) -> tuple[Any, jax.Array]:
        """The state with what depends on validation moved on; whether to stop."""


@dataclasses.dataclass(frozen=True)
class Training:
    """What `config.training` sets.

    Attributes:
      num_steps: steps of the whole run (batches; `optimizer.accumulation_steps` of
        them make one update).
      steps_per_call: steps compiled into one dispatch to the device.
      log_every: steps between rows of training metrics.
      eval_every: steps between evaluations on the validation split, and checkpoints.
      patience: evaluations without improvement after which training stops; None:
        never.
      keep_best: how many of the best checkpoints are kept (the latest always is).
    """

    num_steps: int = 1000
    steps_per_call: int = 10
    log_every: int = 100
    eval_every: int = 100
    patience: int | None = None
    keep_best: int = 1

    def __post_init__(self):
        for name in (
            "num_steps",
            "steps_per_call",
            "log_every",
            "eval_every",
            "patience",
            "keep_best",
        ):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**31:
                raise ValueError(f"{name} must lie between 1 and 2**31, not {value}")
        for name in ("num_steps", "log_every", "eval_every"):
            value = getattr(self, name)
            if value % self.steps_per_call:
                raise ValueError(
                    f"{name} ({value}) must be a multiple of steps_per_call "
                    f"({self.steps_per_call})"
                )


class NonFiniteError(UserError):
    """The loss or another training metric became NaN or infinite."""


class Interrupted(Exception):
    """A signal asked to stop; the state is saved."""


class StopSignal:
    """Turns the first SIGTERM or SIGINT into a flag; a second one acts as usual.

    Outside the main thread, where Python receives no signals, it does nothing.
    """

    def __init__(self):
        self.name: str | None = None

    def __enter__(self):
        self._former = {}
        if threading.current_thread() is threading.main_thread():
            self._former = {
                number: signal.signal(number, self._handle)
                for number in (signal.SIGTERM, signal.SIGINT)
            }
        return self

    def _handle(self, number, frame):
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self):
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def __exit__(self, *exception):
        self._restore()


def has_convolution(jaxpr: jax.extend.core.Jaxpr) -> bool:
    """Whether a jaxpr, or one inside it, computes a convolution."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            return True
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            if has_convolution(inner):
                return True
    return False


def compile_steps(task: Task, seed: int, state: Any, steps_per_call: int) -> Callable:
    """`run(state, arrays, first_step) -> (state, metrics [steps_per_call, ...])`.

    The steps are one `lax.scan` with the state donated. XLA's CPU backend computes
    convolutions in a loop body many times slower than outside (jax#12868,
    openxla/xla#34273), so there a step with convolutions is dispatched alone.

    Args:
      task: its `sample` and `train_step` are compiled.
      seed: batches and the steps' randomness derive from it and the step alone.
      state: a state, or its shapes.
      steps_per_call: length of the scan.
    """
    key = jax.random.key(seed)
    data_key, step_key = jax.random.fold_in(key, 1), jax.random.fold_in(key, 2)

    def one_step(arrays, state, step):
        batch = shard_batch(task.sample(data_key, step, arrays))
        return task.train_step(state, batch, jax.random.fold_in(step_key, step))

    @partial(
        jax.jit,
        donate_argnums=0,
        static_argnums=3,
        out_shardings=(everywhere(), None),
    )
    def run(state, arrays, first_step, length):
        if length == 1:  # no loop, not even one of a single turn
            state, row = one_step(arrays, state, first_step)
            return state, jax.tree.map(lambda leaf: leaf[None], row)
        steps = first_step + jnp.arange(length, dtype=jnp.int32)
        return jax.lax.scan(partial(one_step, arrays), state, steps)

    step = jax.ShapeDtypeStruct((), jnp.int32)
    jaxpr = jax.make_jaxpr(one_step)(task.arrays, state, step)
    alone = jax.default_backend() == "cpu" and has_convolution(jaxpr.jaxpr)

    def run_steps(state, arrays, first_step):
        if not alone:
            return run(state, arrays, first_step, steps_per_call)
        rows = []
        for offset in range(steps_per_call):
            state, row = run(state, arrays, first_step + offset, 1)
            rows.append(row)
        return state, jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)

    return run_steps


def _sharding(*axes: str) -> jax.sharding.NamedSharding:
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


def everywhere() -> jax.sharding.NamedSharding:
    """The sharding of what every device has a copy of: the state and the dataset."""
    return _sharding()


def shard_batch(batch: Any) -> Any:
    """Splits the leading axis of a batch over all devices, where there are several."""
    num_devices = jax.device_count()
    if num_devices == 1:
        return batch
    split = _sharding("data")

    def constrain(leaf):
        if leaf.ndim and leaf.shape[0] % num_devices == 0:
            return jax.lax.with_sharding_constraint(leaf, split)
        return leaf

    return jax.tree.map(constrain, batch)


def compile_evaluation(task: Task) -> Callable:
    """`evaluate(state, split, poll) -> {metric: mean}`, one compilation a split.

    `poll` is called before each batch and may raise to stop.
    """

    @partial(jax.jit, static_argnames="split")
    def eval_step(prepared, arrays, index, *, split):
        batch = shard_batch(task.eval_batch(split, index, arrays))
        return task.eval_step(prepared, batch)

    prepare = jax.jit(task.prepare_evaluation, static_argnums=1)
    arrays = jax.device_put(task.arrays, everywhere())

    def evaluate(state, split, poll=lambda: None):
        sums: metrics.Sums = {}
        prepared = prepare(state, split, arrays)
        for index in range(task.num_eval_batches(split)):
            poll()
            more = eval_step(prepared, arrays, np.int32(index), split=split)
            sums = metrics.merge(sums, more)
        return metrics.means(sums)

    return evaluate


def train(
    task: Task, training: Training, workdir: Path, seed: int, progress: Progress
) -> Any:
    """Trains from the latest checkpoint in the workdir, or from the beginning.

    Resuming is exact: parameters, optimizer state and `metrics.jsonl` end as those
    of a run without interruption.

    Args:
      task: what is learned.
      training: the lengths.
      workdir: gets `checkpoints`, `metrics.jsonl` and `tensorboard`.
      seed: fixes initial weights, batches and the steps' randomness.
      progress: shows what happens.

    Returns:
      The state of the best checkpoint by `task.monitor`.

    Raises:
      Interrupted: after a SIGTERM or SIGINT, when everything is saved.
      NonFiniteError: when a metric of a step is NaN or infinite; nothing is saved
        after the last good checkpoint.
      UserError: when checkpoints can be neither read nor written.
    """
    checkpoints = Checkpoints(Path(workdir) / "checkpoints", training.keep_best)
    template = state_template(task, seed)
    restored = checkpoints.restore_latest(template)
    if restored is None:
        step, state = 0, first_state(task, seed)
        notes = {
            "best": None,
            "evaluations_since_best": 0,
            "evaluated_at": -1,
            "stopped": False,
            "position": 0,
            "sums": {},
        }
    else:
        step, state, notes = restored
        progress.resumed(step)
    finished = step >= training.num_steps and notes["evaluated_at"] == step
    if finished or notes["stopped"]:
        checkpoints.close()
        return best_state(workdir, task, seed)[1]

    arrays = jax.device_put(task.arrays, everywhere())
    writer = metrics.MetricsWriter(workdir, notes["position"], step)
    run_steps = compile_steps(task, seed, template, training.steps_per_call)
    evaluate = compile_evaluation(task)
    after_evaluation = jax.jit(task.after_evaluation, donate_argnums=0)
    pending: list = []  # metrics of steps still on the device
    saved_at = step
    clock, clock_step = time.perf_counter(), step

    def collect():
        """Brings the pending metrics to the host; stops at a NaN."""
        for first, rows in jax.device_get(pending):
            if bad := metrics.first_nonfinite(rows):
                offset, name, value = bad
                good = checkpoints.steps()
                raise NonFiniteError(
                    f"Training stopped: {name} is {value} at step "
                    f"{int(first) + offset + 1}. "
                    + (
                        f"The last good checkpoint is that of step {good[-1]}, in "
                        f"{checkpoints.directory}. "
                        if good
                        else "There is no checkpoint yet. "
                    )
                    + "A smaller config.optimizer.learning_rate or "
                    "config.optimizer.clip_norm=1.0 may help; with another config use "
                    "another --workdir."
                )
            notes["sums"] = metrics.merge(notes["sums"], rows)
        pending.clear()

    def save(measure=None):
        nonlocal saved_at
        if saved_at == step and measure is None:
            return
        checkpoints.save(step, state, notes | {"position": writer.position}, measure)
        saved_at = step

    with StopSignal() as stop:

        def stop_if_asked():
            if stop.name:
                collect()
                save()
                checkpoints.wait()
                raise Interrupted(
                    f"{stop.name}: saved step {step}. The same command resumes there."
                )

        try:
            while True:
                due = step and step % training.eval_every == 0
                if (due or step == training.num_steps) and notes[
                    "evaluated_at"
                ] != step:
                    collect()
                    values = evaluate(state, "validation", stop_if_asked)
                    writer.write(step, "validation", values)
                    measure = values[task.monitor]
                    state, finished = after_evaluation(state, values)
                    _note_evaluation(notes, step, measure)
                    notes["stopped"] = bool(finished) or (
                        training.patience is not None
                        and notes["evaluations_since_best"] >= training.patience
                    )
                    save(measure if math.isfinite(measure) else None)
                    progress.evaluated(step, values, task.monitor, notes["best"])
                if step >= training.num_steps or notes["stopped"]:
                    break
                stop_if_asked()
                state, rows = run_steps(state, arrays, np.int32(step))
                pending.append((step, rows))
                step += training.steps_per_call
                if step % training.log_every == 0 or step == training.num_steps:
                    collect()
                    values = metrics.means(notes["sums"])
                    notes["sums"] = {}
                    writer.write(step, "train", values)
                    now = time.perf_counter()
                    rate = (step - clock_step) / (now - clock)
                    clock, clock_step = now, step
                    writer.write_event(step, "steps_per_second", rate)
                    progress.logged(step, values, rate)
                progress.advanced(step)
        finally:
            try:
                checkpoints.close()
            finally:
                writer.close()
                progress.close()
    if notes["stopped"]:
        progress.message(
            f"Stopped at step {step}: the validation measure improves no more."
        )
    return best_state(workdir, task, seed)[1]


def _note_evaluation(notes: dict, step: int, measure: float) -> None:
    notes["evaluated_at"] = step
    best = notes["best"]
    if math.isfinite(measure) and (best is None or measure < best["value"]):
        notes["best"] = {"value": measure, "step": step}
        notes["evaluations_since_best"] = 0
    else:
        notes["evaluations_since_best"] += 1


def initial_state(task: Task, seed: int, arrays: Any) -> Any:
    """The state before the first step; a function of the seed."""
    key = jax.random.key(seed)
    batch = task.sample(jax.random.fold_in(key, 1), jnp.int32(0), arrays)
    return task.init(jax.random.fold_in(key, 0), batch)


def first_state(task: Task, seed: int) -> Any:
    """`initial_state`, computed on the devices."""
    init = jax.jit(partial(initial_state, task, seed), out_shardings=everywhere())
    return init(task.arrays)


def state_template(task: Task, seed: int) -> Any:
    """Shapes, dtypes and sharding of the state."""
    shapes = jax.eval_shape(partial(initial_state, task, seed), task.arrays)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere()), shapes
    )


def best_state(workdir: Path, task: Task, seed: int) -> tuple[int, Any]:
    """Step and state of the best checkpoint in a workdir.

    Raises:
      UserError: when there is none, or it cannot be read.
    """
    directory = Path(workdir) / "checkpoints"
    if not directory.is_dir() or not any(directory.iterdir()):
        raise UserError(f"There is no checkpoint in {directory}: train first.")
    checkpoints = Checkpoints(directory, read_only=True)
    step = checkpoints.best_step()
    try:
        state, _ = checkpoints.restore(step, state_template(task, seed))
    except Exception as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"The best checkpoint, of step {step} in {directory}, cannot be read: "
            f"{text[:300]}"
        ) from error
    finally:
        checkpoints.close()
    return step, state
