"""The loop with toy tasks: it knows nothing of what it trains."""

import dataclasses
import fcntl
import inspect
import io
import json
import logging
import math
import os
import pty
import signal
import struct
import termios
import threading
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import loop, metrics
from experiments.checkpoints import Checkpoints
from experiments.progress import Progress

STRAIGHT = loop.Training(num_steps=40, steps_per_call=5, log_every=5, eval_every=10)


@flax.struct.dataclass
class LineState:
    w: jax.Array
    noise: jax.Array  # shows whether the steps' keys are the same again
    evaluations: jax.Array
    steps: jax.Array


@dataclasses.dataclass(frozen=True)
class Line:
    """A line through points, by gradient descent."""

    arrays: Any = dataclasses.field(
        default_factory=lambda: {
            "x": jnp.linspace(-1, 1, 64),
            "y": 3 * jnp.linspace(-1, 1, 64) + 1,
        }
    )
    bad_step: int = -1
    bad_value: float = math.nan
    worse_after: int = 10**6
    convolve: bool = False
    stop_after: int = 10**6

    monitor = "error"

    def init(self, key, batch):
        return LineState(
            w=jax.random.normal(key, (2,)),
            noise=jnp.zeros(()),
            evaluations=jnp.int32(0),
            steps=jnp.int32(0),
        )

    def sample(self, key, step, arrays):
        key = jax.random.fold_in(key, step)
        index = jax.random.randint(key, (16,), 0, 64)
        return jax.tree.map(lambda array: array[index], arrays)

    def errors(self, w, batch):
        y = w[0] * batch["x"] + w[1]
        if self.convolve:
            image = y.reshape(1, 4, 4, 1)
            kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
            y = jax.lax.conv_general_dilated(
                image,
                kernel,
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            ).reshape(16)
        return (y - batch["y"]) ** 2

    def train_step(self, state, batch, key):
        gradient = jax.grad(lambda w: self.errors(w, batch).mean())(state.w)
        bad = jnp.where(state.steps == self.bad_step, self.bad_value, 0.0)
        state = state.replace(
            w=state.w - 0.1 * gradient,
            noise=state.noise + jax.random.normal(key),
            steps=state.steps + 1,
        )
        return state, {
            "error": metrics.masked(self.errors(state.w, batch)),
            "other": (bad, jnp.float32(1)),
        }

    def num_eval_batches(self, split):
        return 3

    def eval_batch(self, split, index, arrays):
        keep = 16 * index + jnp.arange(16) < 40
        part = jax.tree.map(
            lambda array: jax.lax.dynamic_slice(array, (16 * index,), (16,)), arrays
        )
        return part | {"mask": keep}

    def prepare_evaluation(self, state, split, arrays):
        return state

    def eval_step(self, state, batch):
        y = state.w[0] * batch["x"] + state.w[1]
        worse = jnp.where(state.steps > self.worse_after, state.steps, 0)
        error = (y - batch["y"]) ** 2 + worse
        return {"error": metrics.masked(error, batch["mask"])}

    def after_evaluation(self, state, means):
        evaluations = state.evaluations + 1
        return state.replace(evaluations=evaluations), evaluations >= self.stop_after


@flax.struct.dataclass
class PlayersState:
    generator: jax.Array
    critic: jax.Array
    generator_optimizer: Any
    critic_optimizer: Any
    average: jax.Array


@dataclasses.dataclass(frozen=True)
class Players(Line):
    """Two players, two optimizers: a shift of noise against a linear critic."""

    generator_rule = optax.adam(0.02)
    critic_rule = optax.rmsprop(0.05)

    def init(self, key, batch):
        generator, critic = jax.random.normal(key, (2, 2))
        return PlayersState(
            generator=generator,
            critic=critic,
            generator_optimizer=self.generator_rule.init(generator),
            critic_optimizer=self.critic_rule.init(critic),
            average=jnp.array(generator),
        )

    def train_step(self, state, batch, key):
        noise = jax.random.normal(key, batch["x"].shape)

        def value(generator, critic):
            made = generator[0] * noise + generator[1]
            return (jnp.tanh(critic[0] * batch["y"] + critic[1])).mean() - (
                jnp.tanh(critic[0] * made + critic[1])
            ).mean()

        def descend(rule, sign, position, optimizer):
            gradient = jax.grad(value, position)(state.generator, state.critic)
            players = (state.generator, state.critic)
            updates, optimizer = rule.update(sign * gradient, optimizer)
            return optax.apply_updates(players[position], updates), optimizer

        critic, critic_optimizer = descend(
            self.critic_rule, -1, 1, state.critic_optimizer
        )
        generator, generator_optimizer = descend(
            self.generator_rule, 1, 0, state.generator_optimizer
        )
        one = jnp.float32(1)
        values = {"value": (value(generator, critic), one)}
        average = 0.9 * state.average + 0.1 * generator
        return PlayersState(
            generator, critic, generator_optimizer, critic_optimizer, average
        ), values

    def eval_step(self, state, batch):
        error = jnp.abs(state.average[1] - batch["y"])
        return {"error": metrics.masked(error, batch["mask"])}

    def after_evaluation(self, state, means):
        return state, jnp.bool_(False)


@dataclasses.dataclass(frozen=True)
class Population(Line):
    """Lines of several learning rates in one program."""

    rates: tuple = (0.01, 0.2)
    rule = optax.inject_hyperparams(optax.adam)(learning_rate=0.0)

    def init(self, key, batch):
        def member(key, rate):
            w = jax.random.normal(key, (2,))
            state = self.rule.init(w)
            state.hyperparams["learning_rate"] = rate
            return {"w": w, "optimizer": state}

        fold = jax.vmap(partial(jax.random.fold_in, key))
        keys = fold(jnp.arange(len(self.rates)))
        return jax.vmap(member)(keys, jnp.array(self.rates))

    def train_step(self, state, batch, key):
        def member(state):
            def loss(w):
                return self.errors(w, batch).mean()

            value, gradient = jax.value_and_grad(loss)(state["w"])
            updates, optimizer = self.rule.update(gradient, state["optimizer"])
            new = {"w": optax.apply_updates(state["w"], updates)}
            return new | {"optimizer": optimizer}, value

        state, values = jax.vmap(member)(state)
        return state, {"error": (values, jnp.ones_like(values))}

    def eval_step(self, state, batch):
        error = jax.vmap(lambda w: self.errors(w, batch))(state["w"]).min(0)
        return {"error": metrics.masked(error, batch["mask"])}

    def after_evaluation(self, state, means):
        return state, jnp.bool_(False)


class Crash(Exception):
    pass


class Hook(Progress):
    """Shows nothing; does something when a step is reached."""

    def __init__(self, at=-1, action=lambda: None):
        super().__init__(100, io.StringIO())
        self.at, self.action = at, action

    def advanced(self, step):
        if step == self.at:
            self.action()

    @property
    def text(self):
        return self._stream.getvalue()


def crash():
    raise Crash


terminate = partial(signal.raise_signal, signal.SIGTERM)


def run(task, workdir, training=STRAIGHT, progress=None, seed=3):
    workdir.mkdir(exist_ok=True)
    return loop.train(task, training, workdir, seed, progress or Hook())


def end(task, workdir, seed=3):
    """The last checkpoint and `metrics.jsonl`."""
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    step = checkpoints.steps()[-1]
    state, notes = checkpoints.restore(step, loop.state_template(task, seed))
    best = checkpoints.best_step()
    checkpoints.close()
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    return step, best, notes, leaves, (workdir / "metrics.jsonl").read_bytes()


def validation(workdir):
    rows = metrics.read_rows(workdir)
    return {row["step"]: row["error"] for row in rows if row["split"] == "validation"}


# Steps.


def test_many_steps_a_call_are_the_same_steps():
    task = Line()
    states, rows = {}, {}
    for steps_per_call in (1, 10):
        state = loop.first_state(task, 3)
        run_steps = loop.compile_steps(task, 3, state, steps_per_call)
        parts = []
        for step in range(0, 20, steps_per_call):
            state, metric = run_steps(state, task.arrays, np.int32(step))
            parts.append(metric)
        states[steps_per_call] = state
        rows[steps_per_call] = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    for tree in (states, rows):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), tree[1], tree[10])
    assert rows[1]["error"][0].shape == (20,)
    assert len(set(rows[1]["error"][0])) == 20  # another batch every step


def test_the_state_is_donated():
    task = Line()
    state = loop.first_state(task, 3)
    run_steps = loop.compile_steps(task, 3, state, 5)
    run_steps(state, task.arrays, np.int32(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(task.arrays))


def internals(task, steps_per_call=5):
    state = loop.first_state(task, 3)
    run_steps = loop.compile_steps(task, 3, state, steps_per_call)
    variables = inspect.getclosurevars(run_steps).nonlocals
    length = 1 if variables["alone"] else steps_per_call
    compiled = variables["run"].lower(state, task.arrays, np.int32(0), length).compile()
    return variables["alone"], compiled.as_text()


def test_steps_are_one_loop_on_the_device():
    alone, program = internals(Line())
    assert not alone
    loops = [line for line in program.splitlines() if " while(" in line]
    assert any("f32" in line.split(" while(")[0] for line in loops)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of the CPU backend alone")
def test_a_convolution_on_the_cpu_is_kept_out_of_loops():
    alone, program = internals(Line(convolve=True))
    assert alone
    assert "convolution" in program
    # What loops are left are the random number generator's: they carry integers.
    loops = [line for line in program.splitlines() if " while(" in line]
    assert not any("f32" in line.split(" while(")[0] for line in loops)


def test_steps_dispatched_alone_are_the_same_steps(tmp_path):
    run(Line(), tmp_path / "loop")
    run(Line(convolve=True), tmp_path / "alone")
    for row, other in zip(
        metrics.read_rows(tmp_path / "loop"),
        metrics.read_rows(tmp_path / "alone"),
        strict=True,
    ):
        assert row.pop("split") == other.pop("split")
        assert row == pytest.approx(other, rel=1e-4)


def convolution(x):
    return jax.lax.conv_general_dilated(
        x,
        jnp.ones((3, 3, 1, 1)),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@jax.custom_vjp
def forward_rule(x):
    return convolution(x)


forward_rule.defvjp(lambda x: (convolution(x), None), lambda _, g: (g,))


@jax.custom_vjp
def backward_rule(x):
    return x


backward_rule.defvjp(lambda x: (x, None), lambda _, g: (convolution(g),))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (convolution, True),
        (jax.jit(convolution), True),
        (lambda x: jax.lax.scan(lambda c, _: (convolution(c), 0), x, None, 2), True),
        (lambda x: jax.lax.cond(x.sum() > 0, convolution, lambda y: y, x), True),
        (lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, convolution, x), True),
        (lambda x: jax.lax.map(convolution, x[None]), True),
        (jax.checkpoint(convolution), True),
        (forward_rule, True),
        (jax.grad(lambda x: backward_rule(x).sum()), True),
        (jax.grad(lambda x: jax.jit(convolution)(x).sum()), True),
        (jax.vmap(jax.jit(jax.checkpoint(lambda x: convolution(x[None])))), True),
        (backward_rule, False),
        (lambda x: jnp.tensordot(x, x, 4), False),
        (jax.jit(lambda x: jax.lax.scan(lambda c, _: (c + 1, 0), x, None, 2)), False),
    ],
)
def test_has_convolution(function, expected):
    jaxpr = jax.make_jaxpr(function)(jnp.ones((1, 4, 4, 1)))
    assert loop.has_convolution(jaxpr.jaxpr) == expected


# Evaluation.


def test_evaluation_is_the_mean_over_what_is_real():
    task = Line()
    state = LineState(jnp.array([2.0, 0.5]), 0.0, jnp.int32(0), jnp.int32(0))
    found = loop.compile_evaluation(task)(state, "validation")
    x, y = (np.asarray(task.arrays[name][:40]) for name in "xy")
    expected = ((2 * x + 0.5 - y) ** 2).mean()
    assert found == {"error": pytest.approx(expected, rel=1e-5)}


def test_rows_come_when_asked(tmp_path):
    run(Line(), tmp_path)
    rows = metrics.read_rows(tmp_path)
    steps = {
        split: [row["step"] for row in rows if row["split"] == split]
        for split in ("train", "validation")
    }
    assert steps == {"train": list(range(5, 41, 5)), "validation": [10, 20, 30, 40]}
    assert rows[-1]["error"] < 0.1 * rows[0]["error"]


def test_the_last_step_is_evaluated_and_logged_whatever_the_intervals(tmp_path):
    training = loop.Training(num_steps=8, steps_per_call=4, log_every=20, eval_every=20)
    run(Line(), tmp_path, training)
    rows = metrics.read_rows(tmp_path)
    assert [(row["step"], row["split"]) for row in rows] == [
        (8, "train"),
        (8, "validation"),
    ]


def test_the_best_state_is_returned(tmp_path):
    state = run(Line(worse_after=20), tmp_path)
    assert int(state.steps) == 20
    assert min(validation(tmp_path), key=validation(tmp_path).get) == 20


def test_patience(tmp_path):
    training = dataclasses.replace(STRAIGHT, num_steps=100, patience=2)
    progress = Hook()
    state = run(Line(worse_after=20), tmp_path, training, progress)
    assert list(validation(tmp_path)) == [10, 20, 30, 40]
    assert int(state.steps) == 20
    assert "Stopped at step 40" in progress.text
    # The same command again trains no further.
    before = end(Line(), tmp_path)
    run(Line(worse_after=20), tmp_path, training)
    assert end(Line(), tmp_path) == before


def test_a_task_may_stop_the_run(tmp_path):
    run(Line(stop_after=2), tmp_path)
    assert list(validation(tmp_path)) == [10, 20]


def test_an_evaluation_without_a_number_is_never_the_best(tmp_path):
    class Sometimes(Line):
        def eval_step(self, state, batch):
            error, count = super().eval_step(state, batch)["error"]
            return {"error": (jnp.where(state.steps == 10, jnp.nan, error), count)}

    progress = Hook()
    state = run(Sometimes(), tmp_path, progress=progress)
    assert "best error none yet" in progress.text
    assert int(state.steps) == 40
    assert math.isnan(validation(tmp_path)[10])


# Resuming.

TASKS = [Line(), Line(convolve=True), Players(), Population()]
NAMES = ["line", "convolution", "two players", "population"]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    # As `runner.main` does.
    monkeypatch.setattr(logging.getLogger("absl"), "level", logging.CRITICAL)


@pytest.fixture(scope="module", params=TASKS, ids=NAMES)
def straight(request, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    run(request.param, workdir)
    return request.param, workdir


@pytest.mark.parametrize(
    ("at", "action", "raised"),
    [
        (5, crash, Crash),
        (35, crash, Crash),
        (20, terminate, loop.Interrupted),
        (25, terminate, loop.Interrupted),
    ],
)
def test_a_run_that_was_interrupted_ends_the_same(
    straight, tmp_path, at, action, raised
):
    task, workdir = straight
    with pytest.raises(raised) as caught:
        run(task, tmp_path, progress=Hook(at, action))
    if raised is loop.Interrupted:
        assert str(caught.value).startswith(f"SIGTERM: saved step {at}.")
        assert end(task, tmp_path)[0] == at
    progress = Hook()
    run(task, tmp_path, progress=progress)
    assert ("Resuming from the checkpoint of step" in progress.text) == (
        raised is loop.Interrupted or at > 10
    )
    assert end(task, tmp_path) == end(task, workdir)


def test_a_run_may_be_interrupted_again_and_again(straight, tmp_path):
    task, workdir = straight
    for at in (5, 10, 25, 30, 40):
        with pytest.raises(loop.Interrupted):
            run(task, tmp_path, progress=Hook(at, terminate))
    run(task, tmp_path)
    assert end(task, tmp_path) == end(task, workdir)


@pytest.mark.parametrize(("evaluation", "batch"), [(1, 0), (2, 1), (4, 2)])
def test_a_signal_during_an_evaluation(tmp_path, monkeypatch, evaluation, batch):
    task = Line()
    run(task, tmp_path / "straight")
    compiled = loop.compile_evaluation(task)
    count = 0

    def evaluate(state, split, poll):
        nonlocal count

        def signalled():
            nonlocal count
            if count == 3 * (evaluation - 1) + batch:
                terminate()
            count += 1
            poll()

        return compiled(state, split, signalled)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "compile_evaluation", lambda task: evaluate)
        with pytest.raises(loop.Interrupted, match=f"saved step {10 * evaluation}"):
            run(task, tmp_path / "resumed")
    run(task, tmp_path / "resumed")
    assert end(task, tmp_path / "resumed") == end(task, tmp_path / "straight")


@pytest.fixture
def interruptible():
    """SIGINT as usual: where tests run in the background, shells have it ignored."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def test_a_second_signal_acts_as_usual(interruptible):
    with loop.StopSignal() as stop:
        terminate()
        assert stop.name == "SIGTERM"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with loop.StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.name == "SIGINT"


def test_the_members_of_a_population_are_runs_of_their_own(tmp_path):
    training = dataclasses.replace(STRAIGHT, eval_every=40)
    both = run(Population(), tmp_path / "both", training)
    alone = run(Population(rates=(0.01,)), tmp_path / "alone", training)
    np.testing.assert_allclose(both["w"][0], alone["w"][0], rtol=1e-5)
    assert float(abs(both["w"][0] - both["w"][1]).max()) > 0.1
    rates = both["optimizer"].hyperparams["learning_rate"]
    np.testing.assert_allclose(rates, [0.01, 0.2])


# NaN.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, value):
    task = Line(bad_step=26, bad_value=value)
    with pytest.raises(loop.NonFiniteError) as caught:
        run(task, tmp_path)
    message = str(caught.value)
    # The 27th step: steps are counted from 1, as in the rows.
    assert message.startswith(f"Training stopped: other is {value} at step 27. ")
    assert "The last good checkpoint is that of step 20" in message
    assert "learning_rate" in message
    assert end(task, tmp_path)[0] == 20
    assert metrics.read_rows(tmp_path)[-1]["step"] == 25
    with pytest.raises(loop.NonFiniteError) as again:
        run(task, tmp_path)
    assert str(again.value) == message


def test_before_any_checkpoint_the_message_says_so(tmp_path):
    with pytest.raises(loop.NonFiniteError, match="at step 7. There is no checkpoint"):
        run(Line(bad_step=6), tmp_path)


# Progress.


def test_where_there_is_no_terminal_there_are_plain_lines(tmp_path):
    stream = io.StringIO()
    run(Line(), tmp_path, progress=Progress(40, stream))
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()
    train = [line for line in lines if "validation" not in line]
    assert len(lines) == 12 and len(train) == 8
    assert train[0].startswith("step 5/40  error ")
    assert "steps/s" in train[0] and "s left" in train[0]
    best = min(validation(tmp_path).values())
    assert lines[-1].startswith("step 40/40  validation  error ")
    assert lines[-1].endswith(f"(best error {best:.4g} at step 40)")


def test_on_a_terminal_there_is_a_bar(tmp_path):
    leader, follower = pty.openpty()
    size = struct.pack("HHHH", 24, 120, 0, 0)
    fcntl.ioctl(follower, termios.TIOCSWINSZ, size)
    shown = []

    def read():
        try:
            while data := os.read(leader, 4096):
                shown.append(data)
        except OSError:
            pass  # how a terminal ends

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(follower, "w") as stream:
        run(Line(worse_after=30), tmp_path, progress=Progress(40, stream))
    reader.join()
    os.close(leader)
    text = b"".join(shown).decode()
    first, *_, bar = text.strip().split("\r")
    assert "0/40 steps" in first
    values = validation(tmp_path)
    assert "40/40 steps" in bar and "00:00 left" in bar and "steps/s" in bar
    assert f"error {values[40]:.4g}, best {values[30]:.4g} at step 30" in bar
    assert "step 5/40" not in text


def test_resuming_starts_the_bar_where_it_was():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = Progress(40, stream)
    progress.resumed(20)
    progress.advanced(30)
    progress.close()
    assert "Resuming from the checkpoint of step 20." in stream.getvalue()
    assert "30/40 steps" in stream.getvalue()


def test_training_lengths_must_fit():
    with pytest.raises(ValueError, match="eval_every.*multiple of steps_per_call"):
        loop.Training(num_steps=20, steps_per_call=10, log_every=10, eval_every=15)


def test_best_state_of_nothing_is_a_sentence(tmp_path):
    with pytest.raises(loop.UserError, match="There is no checkpoint"):
        loop.best_state(tmp_path, Line(), 3)


def test_rows_are_json(tmp_path):
    run(Line(), tmp_path)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert set(json.loads(line)) >= {"step", "split", "error"}
