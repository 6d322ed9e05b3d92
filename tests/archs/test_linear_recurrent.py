import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from archs import (
    LinearRecurrentUnit,
    MinGRUCell,
    MinLSTMCell,
    Recurrent,
    RecurrentStack,
    linear_recurrence,
)

BATCH, TIME, FEATURES, HIDDEN = 3, 7, 4, 5


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


# The equations, one step at a time, float64.


def sigma(a):
    return 1 / (1 + np.exp(-a))


def literal_min_gru(params, h, x):
    dense = params["project"]
    update, candidate = np.split(x @ dense["kernel"] + dense["bias"], 2, -1)
    h = sigma(update) * candidate + (1 - sigma(update)) * h
    return h, h


def literal_min_lstm(params, h, x):
    dense = params["project"]
    update, forget, candidate = np.split(x @ dense["kernel"] + dense["bias"], 3, -1)
    update, forget = sigma(update), sigma(forget)
    h = (update * candidate + forget * h) / (update + forget)
    return h, h


def literal_unit(params, s, x):
    eigenvalues = np.exp(-np.exp(params["nu"]) + 1j * np.exp(params["theta"]))
    real, imaginary = np.split(params["input"]["kernel"], 2, -1)
    s = eigenvalues * s + np.exp(params["gamma"]) * (x @ (real + 1j * imaginary))
    real, negated = np.split(params["output"]["kernel"], 2)
    a = (s @ (real - 1j * negated)).real
    a += x @ params["skip"]["kernel"] + params["skip"]["bias"]
    cubic = a + 0.044715 * a**3  # the tanh form of GELU, flax's default
    return s, a * (1 + np.tanh(np.sqrt(2 / np.pi) * cubic)) / 2


CASES = {
    "minimal gru": (MinGRUCell(HIDDEN), literal_min_gru),
    "minimal lstm": (MinLSTMCell(HIDDEN), literal_min_lstm),
    "linear": (LinearRecurrentUnit(HIDDEN), literal_unit),
}


@pytest.mark.parametrize("name", CASES)
def test_equations(name):
    cell, literal = CASES[name]
    inputs = normal(BATCH, TIME, FEATURES)
    model = Recurrent(cell)
    variables = model.init(jax.random.key(1), inputs)
    draw = np.random.default_rng(0).normal
    variables = jax.tree.map(lambda leaf: leaf + 0.3 * draw(size=leaf.shape), variables)
    outputs, final = model.apply(variables, inputs)
    params = jax.tree.map(np.float64, variables["params"]["cell"])
    state = np.zeros((BATCH, HIDDEN))
    for t in range(TIME):
        state, output = literal(params, state, np.float64(inputs[:, t]))
        np.testing.assert_allclose(outputs[:, t], output, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(final, state, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(a=st.floats(-1, 1), reverse=st.booleans(), seed=st.integers(0, 99))
def test_a_constant_factor_is_a_recursive_filter(a, reverse, seed):
    b = np.asarray(normal(50, 2, seed=seed))
    got = linear_recurrence(
        jnp.full_like(b, a), jnp.asarray(b), jnp.zeros(2), reverse=reverse
    )
    rows = b[::-1] if reverse else b
    want = scipy.signal.lfilter([1], [1, -a], rows, axis=0)
    want = want[::-1] if reverse else want
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["minimal gru", "minimal lstm"])
def test_jacobian_is_the_product_of_the_factors(name):
    cell, _ = CASES[name]
    inputs = normal(1, TIME, FEATURES)
    model = Recurrent(cell)
    variables = model.init(jax.random.key(0), inputs)

    def last(state):
        return model.apply(variables, inputs, initial_state=state[None])[1][0]

    jacobian = jax.jacfwd(last)(jnp.zeros(HIDDEN))
    own = {"params": variables["params"]["cell"]}
    factors, _ = cell.apply(own, inputs[0], method="terms")
    assert factors.min() > 0 and factors.max() < 1
    np.testing.assert_allclose(jacobian, np.diag(factors.prod(0)), rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_long_sequences_and_saturated_gates(name):
    cell, _ = CASES[name]
    inputs = 100 * normal(1, 3000, FEATURES)
    model = Recurrent(cell)
    variables = model.init(jax.random.key(0), inputs)

    @jax.jit
    def gradient(variables):
        return jax.value_and_grad(lambda v: jnp.mean(model.apply(v, inputs)[0] ** 2))(
            variables
        )

    assert all(
        jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(variables))
    )


def test_eigenvalues_begin_in_the_ring():
    cell = LinearRecurrentUnit(500, min_radius=0.6, max_radius=0.9, max_phase=1.0)
    params = cell.init(jax.random.key(0), cell.initial_state(1), normal(1, 3))["params"]
    eigenvalues = np.exp(-np.exp(params["nu"]) + 1j * np.exp(params["theta"]))
    radius = np.abs(eigenvalues)
    assert radius.min() >= 0.6 and radius.max() <= 0.9
    # Uniform in area: the square of the radius has the mean of its ends.
    np.testing.assert_allclose((radius**2).mean(), (0.36 + 0.81) / 2, atol=0.02)
    phase = np.angle(eigenvalues)
    assert phase.min() >= 0 and phase.max() <= 1.0
    np.testing.assert_allclose(np.exp(2 * params["gamma"]), 1 - radius**2, rtol=1e-4)


def test_the_state_keeps_the_variance_of_its_inputs():
    cell = LinearRecurrentUnit(64, max_radius=0.95)
    inputs = normal(8, 400, 16)
    variables = Recurrent(cell).init(jax.random.key(0), inputs)
    own = {"params": variables["params"]["cell"]}
    _, b = cell.apply(own, inputs, method="terms")
    _, final = Recurrent(cell).apply(variables, inputs)
    driven = np.abs(b / np.exp(own["params"]["gamma"])) ** 2
    np.testing.assert_allclose(np.mean(np.abs(final) ** 2), driven.mean(), rtol=0.2)


def test_half_precision():
    inputs = normal(BATCH, TIME, FEATURES)
    cell = LinearRecurrentUnit(HIDDEN, dtype=jnp.bfloat16)
    model = RecurrentStack(cell, 2, layer_norm=True)
    variables = model.init(jax.random.key(0), inputs)
    outputs, final = model.apply(variables, inputs)
    assert outputs.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(final)} == {jnp.dtype("complex64")}
    exact = RecurrentStack(LinearRecurrentUnit(HIDDEN), 2, layer_norm=True)
    want, _ = exact.apply(variables, inputs)
    np.testing.assert_allclose(np.float32(outputs), want, atol=0.1)


@pytest.mark.parametrize(
    ("name", "gates"),
    [("minimal gru", {"update"}), ("minimal lstm", {"update", "forget"})],
)
def test_gates_are_told(name, gates):
    inputs = normal(BATCH, TIME, FEATURES)
    model = Recurrent(CASES[name][0])
    variables = model.init(jax.random.key(0), inputs)
    _, told = model.apply(variables, inputs, mutable=["intermediates"])
    (told,) = told["intermediates"]["cell"]["gates"]
    assert set(told) == gates
    dense = variables["params"]["cell"]["project"]
    update = (inputs @ dense["kernel"] + dense["bias"])[..., :HIDDEN]
    np.testing.assert_allclose(told["update"], scipy.special.expit(update), rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_refused(name):
    tokens = jnp.zeros((BATCH, TIME), int)
    with pytest.raises(TypeError, match="floating inputs.*embed tokens first"):
        Recurrent(CASES[name][0]).init(jax.random.key(0), tokens)


@pytest.mark.parametrize("radii", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1)])
def test_wrong_radii(radii):
    cell = LinearRecurrentUnit(HIDDEN, min_radius=radii[0], max_radius=radii[1])
    with pytest.raises(ValueError, match="ordered within"):
        Recurrent(cell).init(jax.random.key(0), normal(1, 2, 3))


def test_a_step_wants_one_step():
    cell = MinGRUCell(HIDDEN)
    with pytest.raises(ValueError, match="inputs must have shape"):
        cell.init(jax.random.key(0), cell.initial_state(BATCH), normal(BATCH, 2, 3))
