"""`config.optimizer` against the update rules written out in numpy."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import metrics
from experiments.optimizers import Optimizer
from experiments.tasks import supervised

NUM_STEPS = 20


def mean_square(params, batch):
    return ((batch["x"] @ params["w"] - batch["y"]) ** 2).mean()


def batches(count, size=6, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, size, 3)).astype(np.float32)
    return [{"x": a, "y": a.sum(-1) + 1} for a in x]


def run(optimizer, data, num_steps=NUM_STEPS):
    """States after each batch (the first is the initial one) and the metrics."""
    params = {"w": jnp.array([0.5, -1.0, 2.0])}
    state = supervised.init_state({"params": params}, optimizer, num_steps)

    @jax.jit
    def step(state, batch):
        def loss(params, model_state):
            value = mean_square(params, batch)
            return value, ({"loss": metrics.masked(value)}, model_state)

        return supervised.update(state, loss, optimizer, num_steps)

    states, rows = [state], []
    for batch in data:
        state, row = step(state, batch)
        states.append(state)
        rows.append({name: float(total / n) for name, (total, n) in row.items()})
    return states, rows


def weights(states):
    return np.stack([state.params["w"] for state in states])


def rates(optimizer, num_steps=NUM_STEPS):
    _, rows = run(optimizer, batches(num_steps), num_steps)
    return np.array([row["learning_rate"] for row in rows])


def sgd(**fields):
    return Optimizer(name="sgd", **{"learning_rate": 0.1} | fields)


def numpy_sgd(data, rate, transform=lambda g, w: g):
    w = np.array([0.5, -1.0, 2.0], np.float32)
    path = [w]
    for number, batch in enumerate(data):
        x, y = batch["x"], batch["y"]
        gradient = 2 * x.T @ (x @ w - y) / len(x)
        w = w - rate(number) * transform(gradient, w)
        path.append(w)
    return np.stack(path)


def test_constant():
    states, rows = run(sgd(), batches(5))
    np.testing.assert_allclose(
        weights(states), numpy_sgd(batches(5), lambda step: 0.1), rtol=1e-5
    )
    assert [row["learning_rate"] for row in rows] == [pytest.approx(0.1)] * 5
    batch = batches(1)[0]
    gradient = jax.grad(mean_square)(states[0].params, batch)["w"]
    assert rows[0]["gradient_norm"] == pytest.approx(np.linalg.norm(gradient), 1e-5)
    assert rows[0]["loss"] == pytest.approx(
        float(mean_square(states[0].params, batch)), 1e-5
    )


def test_cosine_ends_at_the_end_learning_rate():
    step = np.arange(NUM_STEPS)
    expected = 0.01 + (0.1 - 0.01) * (1 + np.cos(np.pi * step / NUM_STEPS)) / 2
    optimizer = sgd(schedule="cosine", end_learning_rate=0.01)
    np.testing.assert_allclose(rates(optimizer), expected, rtol=1e-5)
    states, _ = run(optimizer, batches(NUM_STEPS))
    np.testing.assert_allclose(
        weights(states),
        numpy_sgd(batches(NUM_STEPS), lambda step: expected[step]),
        rtol=1e-4,
    )
    end = optimizer.learning_rate_schedule(NUM_STEPS)(NUM_STEPS)
    assert end == pytest.approx(0.01)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warm_up_rises_linearly_to_the_rate(schedule):
    found = rates(sgd(schedule=schedule, warmup_steps=4))
    np.testing.assert_allclose(found[:5], [0, 0.025, 0.05, 0.075, 0.1], rtol=1e-6)
    rest = np.full(16, 0.1)
    if schedule == "cosine":
        rest = 0.1 * (1 + np.cos(np.pi * np.arange(16) / 16)) / 2
    np.testing.assert_allclose(found[4:], rest, rtol=1e-5)


def test_clipping_bounds_the_global_norm():
    def clip(gradient, w):
        return gradient * min(1, 0.5 / np.linalg.norm(gradient))

    states, rows = run(sgd(clip_norm=0.5), batches(5))
    assert max(row["gradient_norm"] for row in rows) > 0.5  # measured before it
    np.testing.assert_allclose(
        weights(states), numpy_sgd(batches(5), lambda step: 0.1, clip), rtol=1e-4
    )


def test_weight_decay_is_decoupled():
    optimizer = Optimizer(name="adamw", learning_rate=0.1, weight_decay=0.3)
    plain = Optimizer(name="adamw", learning_rate=0.1)
    (start, decayed), _ = run(optimizer, batches(1))
    (_, kept), _ = run(plain, batches(1))
    np.testing.assert_allclose(
        kept.params["w"] - decayed.params["w"],
        0.1 * 0.3 * start.params["w"],
        rtol=1e-4,
    )


def test_momentum():
    velocity = np.zeros(3, np.float32)

    def heavy_ball(gradient, w):
        nonlocal velocity
        velocity = 0.9 * velocity + gradient
        return velocity

    states, _ = run(sgd(momentum=0.9, learning_rate=0.01), batches(8))
    np.testing.assert_allclose(
        weights(states), numpy_sgd(batches(8), lambda step: 0.01, heavy_ball), rtol=1e-4
    )


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_accumulated_batches_make_the_update_of_one_big_batch(name):
    k = 4
    small = batches(5 * k)
    big = [
        {key: np.concatenate([b[key] for b in small[i : i + k]]) for key in ("x", "y")}
        for i in range(0, len(small), k)
    ]
    fields = dict(name=name, learning_rate=0.1, schedule="cosine", warmup_steps=2)
    accumulated, rows = run(Optimizer(**fields, accumulation_steps=k), small)
    plain, big_rows = run(Optimizer(**fields), big, num_steps=NUM_STEPS // k)
    path = weights(accumulated)
    np.testing.assert_allclose(path[::k], weights(plain), rtol=1e-4, atol=1e-6)
    # Between updates nothing moves, and the rate is that of the update to come.
    np.testing.assert_array_equal(path[1], path[0])
    np.testing.assert_allclose(
        [row["learning_rate"] for row in rows],
        np.repeat([row["learning_rate"] for row in big_rows], k),
        rtol=1e-5,
    )


def test_moving_average_is_what_is_evaluated():
    states, _ = run(sgd(ema_decay=0.8), batches(6))
    path = weights(states)
    average = path[0]
    for w in path[1:]:
        average = 0.8 * average + 0.2 * w
    np.testing.assert_allclose(states[-1].ema_params["w"], average, rtol=1e-5)
    np.testing.assert_array_equal(
        states[-1].variables["params"]["w"], states[-1].ema_params["w"]
    )
    plain, _ = run(sgd(), batches(6))
    np.testing.assert_array_equal(weights(plain), path)
    assert plain[-1].ema_params is None
    np.testing.assert_array_equal(plain[-1].variables["params"]["w"], path[-1])


def test_plateau_reduces_the_rate_after_patience_and_then_stops():
    optimizer = sgd(
        schedule="plateau",
        plateau_patience=1,
        plateau_factor=0.5,
        end_learning_rate=0.02,
    )
    (_, state), _ = run(optimizer, batches(1))
    measures = [1.0, 0.9, 0.9, 0.9, 0.95, 0.9, 0.8, 0.8, 0.8]
    scales, stops = [], []
    for measure in measures:
        state, stop = supervised.after_evaluation(
            state, jnp.float32(measure), optimizer
        )
        scales.append(float(state.plateau.scale))
        stops.append(bool(stop))
    assert scales == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]
    # 0.1 * 0.25 is still above the end rate, 0.1 * 0.125 is below.
    assert stops == [False] * 8 + [True]


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_is_that_of_torch(patience):
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.zeros(1))
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        torch.optim.SGD([weight], lr=1.0), factor=0.5, patience=patience, eps=0
    )
    plateau = sgd(
        schedule="plateau", plateau_patience=patience, plateau_factor=0.5
    ).plateau()
    state = plateau.init({})
    update = jax.jit(lambda state, value: plateau.update({}, state, value=value)[1])
    rng = np.random.default_rng(0)
    for measure in 1 / np.arange(1, 60) ** 0.3 + rng.normal(0, 0.1, 59):
        theirs.step(measure)
        state = update(state, jnp.float32(measure))
        assert float(state.scale) == theirs.get_last_lr()[0]
    assert state.scale < 0.5


def test_plateau_scales_the_updates():
    optimizer = sgd(schedule="plateau", plateau_patience=0)
    (state, first), (row,) = run(optimizer, batches(1))
    reduced = state
    for measure in (1.0, 1.0):
        reduced, _ = supervised.after_evaluation(
            reduced, jnp.float32(measure), optimizer
        )

    def loss(params, model_state):
        return mean_square(params, batches(1)[0]), ({}, model_state)

    half, measured = supervised.update(reduced, loss, optimizer, NUM_STEPS)
    np.testing.assert_allclose(
        2 * (half.params["w"] - state.params["w"]),
        first.params["w"] - state.params["w"],
        rtol=1e-4,
    )
    assert row["learning_rate"] == pytest.approx(0.1)
    assert measured["learning_rate"][0] == pytest.approx(0.05)


def test_without_plateau_evaluation_changes_nothing():
    (state, _), _ = run(sgd(), batches(1))
    after, stop = supervised.after_evaluation(state, jnp.float32(1), sgd())
    assert after is state and not stop


def named():
    for name in dir(optax):
        factory = getattr(optax, name)
        if inspect.isfunction(factory) and "learning_rate" in (
            inspect.signature(factory).parameters
        ):
            yield name


@pytest.mark.parametrize("name", list(named()))
def test_every_optimizer_of_optax_trains_or_is_refused_with_a_sentence(name):
    try:
        optimizer = Optimizer(name=name, learning_rate=0.01)
    except ValueError as error:
        assert str(error).startswith(f"name: optax.{name} needs more")
        assert name not in ("adam", "adamw", "sgd", "rmsprop", "lion", "lamb")
        return
    states, _ = run(optimizer, batches(3))
    assert np.isfinite(weights(states)).all()
    assert (weights(states)[-1] != weights(states)[0]).all()
