from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental import rnn
from jax.test_util import check_grads
from scipy import stats

from archs import (
    Bidirectional,
    GRUCell,
    LinearRecurrentUnit,
    LSTMCell,
    MinGRUCell,
    MinLSTMCell,
    PeepholeLSTMCell,
    Recurrent,
    RecurrentEncoderDecoder,
    RecurrentStack,
    SequenceClassifier,
    SequenceModel,
    SimpleCell,
    generate,
)
from archs.decoding import greedy
from archs.recurrent import from_torch, orthogonal_blocks, to_torch

BATCH, TIME, FEATURES, HIDDEN = 3, 6, 4, 5
LENGTHS = jnp.array([6, 0, 4])
CELLS = {
    "simple": SimpleCell(HIDDEN),
    "relu": SimpleCell(HIDDEN, activation="relu"),
    "gru": GRUCell(HIDDEN),
    "plain gru": GRUCell(HIDDEN, relevance_gate=False),
    "reset after": GRUCell(HIDDEN, reset_after=True),
    "lstm": LSTMCell(HIDDEN),
    "peephole": PeepholeLSTMCell(HIDDEN),
    "full peephole": PeepholeLSTMCell(HIDDEN, full=True),
    "minimal gru": MinGRUCell(HIDDEN),
    "minimal lstm": MinLSTMCell(HIDDEN),
    "linear": LinearRecurrentUnit(HIDDEN),
}
TORCH = {
    "simple": (torch.nn.RNN, {"nonlinearity": "tanh"}),
    "relu": (torch.nn.RNN, {"nonlinearity": "relu"}),
    "reset after": (torch.nn.GRU, {}),
    "lstm": (torch.nn.LSTM, {}),
}
each_cell = pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def sequences(batch=BATCH):
    return normal(batch, TIME, FEATURES)


def random_params(model, *args, **kwargs):
    """Parameters none of which is zero, biases and peepholes included."""
    params = jax.eval_shape(model.init, jax.random.key(1), *args, **kwargs)
    draw = np.random.default_rng(0).normal
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.5 * draw(size=leaf.shape), leaf.dtype), params
    )


def close(got, want, tolerance=1e-5):
    def check(a, b):
        # A small difference of large terms is as exact as the largest of the array.
        largest = max(1.0, np.abs(b).max(initial=0.0))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * largest)

    jax.tree.map(check, got, want)


# The lecture's equations, one step at a time, float64.


def sigma(a):
    return 1 / (1 + np.exp(-a))


def matrices(params, gates):
    """For every gate M = [W | U], which acts on columns [h, x], and b."""
    w = np.split(np.float64(params["recurrent_kernel"]), gates, -1)
    u = np.split(np.float64(params["kernel"]), gates, -1)
    b = np.split(np.float64(params["bias"]), gates, -1)
    return [(np.concatenate(pair).T, b) for *pair, b in zip(w, u, b, strict=True)]


def literal_loop(params, inputs, step, num_states):
    outputs = []
    for x in np.float64(inputs):
        state = [np.zeros(HIDDEN) for _ in range(num_states)]
        outputs.append([])
        for x_t in x:
            state = step(params, state, x_t)
            outputs[-1].append(state[0])
    return np.array(outputs)


def literal_simple(params, state, x):
    ((m, b),) = matrices(params, 1)
    return [np.tanh(m @ np.concatenate([state[0], x]) + b)]


def literal_gru(params, state, x, misprint=None):
    """With the misprint "relevance", Gr is where the last equation first has Gu."""
    (h,) = state
    (m_u, b_u), (m_r, b_r), (m, b) = matrices(params, 3)
    hx = np.concatenate([h, x])
    gate_u, gate_r = sigma(m_u @ hx + b_u), sigma(m_r @ hx + b_r)
    candidate = np.tanh(m @ np.concatenate([gate_r * h, x]) + b)
    first = gate_r if misprint == "relevance" else gate_u
    return [first * candidate + (1 - gate_u) * h]


def literal_plain_gru(params, state, x):
    (h,) = state
    (m_u, b_u), (m, b) = matrices(params, 2)
    hx = np.concatenate([h, x])
    gate_u = sigma(m_u @ hx + b_u)
    return [gate_u * np.tanh(m @ hx + b) + (1 - gate_u) * h]


def literal_lstm(params, state, x, misprint=None):
    """The LSTM, with peepholes where there are parameters of them.

    Of the misprints, with "forget" the forget gate is the update gate's, with no M_f of
    its own (the slides name a gate Gr that their LSTM has not); with "hats" the memory
    is what a hat denotes elsewhere, the candidate; "plain" has no peepholes; with "old"
    the output gate sees c(t-1).
    """
    h, c = state
    hx = np.concatenate([h, x])
    a_u, a_f, a_o, a_c = (m @ hx + b for m, b in matrices(params, 4))
    p_u, p_f, p_o = np.float64(params.get("peephole", np.zeros((3, HIDDEN))))
    if misprint == "plain":
        p_u, p_f, p_o = 0 * p_u, 0 * p_f, 0 * p_o
    see = (lambda p, c: c @ p) if p_u.ndim == 2 else (lambda p, c: p * c)
    gate_u, gate_f = sigma(a_u + see(p_u, c)), sigma(a_f + see(p_f, c))
    if misprint == "forget":
        gate_f = gate_u
    old, c = c, gate_u * np.tanh(a_c) + gate_f * c
    if misprint == "hats":
        c = np.tanh(a_c)
    gate_o = sigma(a_o + see(p_o, old if misprint == "old" else c))
    return [gate_o * np.tanh(c), c]


LITERAL = {
    "simple": (literal_simple, 1),
    "gru": (literal_gru, 1),
    "plain gru": (literal_plain_gru, 1),
    "lstm": (literal_lstm, 2),
    "peephole": (literal_lstm, 2),
    "full peephole": (literal_lstm, 2),
}


@pytest.mark.parametrize("name", LITERAL)
def test_equations(name):
    model, inputs = Recurrent(CELLS[name]), sequences()
    variables = random_params(model, inputs)
    outputs, _ = model.apply(variables, inputs)
    want = literal_loop(variables["params"]["cell"], inputs, *LITERAL[name])
    close(outputs, want)


@pytest.mark.parametrize("name", sorted(LITERAL.keys() - {"simple"}))
def test_gates_are_those_of_the_equations(name):
    model, inputs = Recurrent(CELLS[name]), sequences()
    variables = random_params(model, inputs)
    params = variables["params"]["cell"]
    (outputs, _), found = jax.jit(
        lambda inputs: model.apply(variables, inputs, mutable=["intermediates"])
    )(inputs)
    (gates,) = found["intermediates"]["cell"]["gates"]
    close(outputs, model.apply(variables, inputs)[0])
    step, num_states = LITERAL[name]
    is_lstm = num_states == 2
    names = ["update", "forget" if is_lstm else "relevance", "output"]
    weights = matrices(params, 4 if is_lstm else 2 + (name == "gru"))[:-1]
    assert gates.keys() == set(names[: len(weights)])
    peephole = np.float64(params.get("peephole", np.zeros((3, HIDDEN))))
    for row, sequence in enumerate(np.float64(inputs)):
        state = [np.zeros(HIDDEN)] * num_states
        for t, x in enumerate(sequence):
            new = step(params, state, x)
            for gate, (m, b), p in zip(names, weights, peephole, strict=False):
                a = m @ np.concatenate([state[0], x]) + b
                if is_lstm:
                    c = (new if gate == "output" else state)[1]
                    a += c @ p if p.ndim == 2 else c * p
                close(gates[gate][row, t], sigma(a))
            state = new


def test_gates_of_all_layers_and_directions_are_told():
    model = RecurrentStack(CELLS["reset after"], 2, bidirectional=True)
    inputs = sequences()
    variables = random_params(model, inputs)
    outputs, found = model.apply(variables, inputs, LENGTHS, mutable=["intermediates"])
    close(outputs, model.apply(variables, inputs, LENGTHS))
    for layer in ("layers_0", "layers_1"):
        for direction in ("forward", "backward"):
            (gates,) = found["intermediates"][layer][direction]["cell"]["gates"]
            assert gates.keys() == {"update", "relevance"}
            for values in gates.values():
                assert values.shape == (BATCH, TIME, HIDDEN)
                assert 0 <= values.min() < values.max() <= 1
    _, found = Recurrent(CELLS["simple"]).init_with_output(jax.random.key(0), inputs)
    assert found.keys() == {"params"}
    _, found = Recurrent(CELLS["simple"]).apply(found, inputs, mutable="intermediates")
    assert not found


@pytest.mark.parametrize(
    ("name", "misprint"),
    [
        ("gru", "relevance"),
        ("lstm", "forget"),
        ("lstm", "hats"),
        ("peephole", "plain"),
        ("peephole", "old"),
        ("full peephole", "plain"),
        ("full peephole", "old"),
    ],
)
def test_misprints_of_the_slides_are_other_functions(name, misprint):
    model, inputs = Recurrent(CELLS[name]), sequences()
    variables = random_params(model, inputs)
    outputs, _ = model.apply(variables, inputs)
    step, num_states = LITERAL[name]

    def misprinted(*args):
        return step(*args, misprint=misprint)

    other = literal_loop(variables["params"]["cell"], inputs, misprinted, num_states)
    assert np.abs(outputs - other).max() > 0.01


@each_cell
def test_a_cell_called_step_by_step_is_the_loop(cell):
    inputs = sequences()
    variables = random_params(Recurrent(cell), inputs)
    outputs, final = Recurrent(cell).apply(variables, inputs)
    step = jax.jit(cell.apply)
    state = cell.initial_state(BATCH)
    for t in range(TIME):
        own = {"params": variables["params"]["cell"]}
        state, output = step(own, state, inputs[:, t])
        close(output, outputs[:, t])
    close(state, final)


# PyTorch with the same weights.


@pytest.mark.parametrize("lengths", [None, [6, 2, 4]], ids=["full", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("name", TORCH)
def test_equals_torch(name, bidirectional, lengths):
    kind, fields = TORCH[name]
    torch.manual_seed(0)
    theirs = kind(
        FEATURES, HIDDEN, 2, batch_first=True, bidirectional=bidirectional, **fields
    )
    x = torch.randn(BATCH, TIME, FEATURES, requires_grad=True)
    packed = x
    if lengths is not None:
        packed = torch.nn.utils.rnn.pack_padded_sequence(
            x, torch.tensor(lengths), batch_first=True, enforce_sorted=False
        )
    torch_states = [
        torch.randn(2 * (1 + bidirectional), BATCH, HIDDEN, requires_grad=True)
        for _ in range(2 if name == "lstm" else 1)
    ]
    first = torch_states[0] if len(torch_states) == 1 else tuple(torch_states)
    want, last = theirs(packed, first)
    if lengths is not None:
        want, _ = torch.nn.utils.rnn.pad_packed_sequence(want, batch_first=True)
    last = last if isinstance(last, tuple) else (last,)
    ((want**2).sum() + sum((state**2).sum() for state in last)).backward()

    model = RecurrentStack(CELLS[name], 2, bidirectional=bidirectional)
    params = from_torch({k: v.detach().numpy() for k, v in theirs.state_dict().items()})
    lengths = None if lengths is None else jnp.array(lengths)
    # h and c of a layer and direction stand together here.
    leaves = [
        s.detach().numpy() for pair in zip(*torch_states, strict=True) for s in pair
    ]
    zeros = model.apply({"params": params}, BATCH, method="initial_state")
    state = jax.tree.unflatten(jax.tree.structure(zeros), leaves)

    @jax.jit
    def run(params, inputs, state):
        def loss(params, inputs, state):
            outputs, final = model.apply({"params": params}, inputs, lengths, state)
            squares = [(leaf**2).sum() for leaf in jax.tree.leaves((outputs, final))]
            return sum(squares), (outputs, final)

        return jax.grad(loss, (0, 1, 2), has_aux=True)(params, inputs, state)

    (d_params, d_inputs, d_state), (outputs, final) = run(
        params, x.detach().numpy(), state
    )
    close(outputs, want.detach().numpy())
    close(d_inputs, x.grad.numpy())
    for i, (began, ended) in enumerate(zip(torch_states, last, strict=True)):
        close(np.stack(jax.tree.leaves(final)[i :: len(last)]), ended.detach().numpy())
        close(np.stack(jax.tree.leaves(d_state)[i :: len(last)]), began.grad.numpy())

    # The gradient of b_ih + b_hh is that of either; the rest is laid out as weights.
    d_torch = to_torch(jax.tree.map(np.asarray, d_params))
    for weight, parameter in theirs.named_parameters():
        found = d_torch[weight]
        if weight.startswith("bias_hh"):
            found = d_torch[weight.replace("hh", "ih")].copy()
            if name == "reset after":  # b_n stands by itself
                found[2 * HIDDEN :] = d_torch[weight][2 * HIDDEN :]
        close(found, parameter.grad.numpy())


@pytest.mark.parametrize("name", TORCH)
def test_weights_go_to_torch_and_back(name):
    model = RecurrentStack(CELLS[name], 2, bidirectional=True)
    inputs = sequences()
    variables = random_params(model, inputs)
    kind, fields = TORCH[name]
    theirs = kind(FEATURES, HIDDEN, 2, batch_first=True, bidirectional=True, **fields)
    weights = to_torch(variables["params"])
    theirs.load_state_dict({k: torch.tensor(np.array(v)) for k, v in weights.items()})
    with torch.no_grad():
        want, _ = theirs(torch.tensor(np.asarray(inputs)))
    close(model.apply(variables, inputs)[0], want.numpy())
    close(from_torch(weights), variables["params"], 0)


def test_weights_without_bias_come_from_torch():
    theirs = torch.nn.LSTM(FEATURES, HIDDEN, bias=False, batch_first=True)
    params = from_torch({k: v.numpy() for k, v in theirs.state_dict().items()})
    inputs = sequences()
    outputs, _ = RecurrentStack(CELLS["lstm"]).apply({"params": params}, inputs)
    with torch.no_grad():
        want, _ = theirs(torch.tensor(np.asarray(inputs)))
    close(outputs, want.numpy())


@pytest.mark.parametrize("name", sorted(CELLS.keys() - TORCH.keys()))
def test_what_torch_has_not_is_not_converted(name):
    variables = random_params(RecurrentStack(CELLS[name]), sequences())
    with pytest.raises(ValueError, match="torch has SimpleCell"):
        to_torch(variables["params"])


@pytest.mark.parametrize(
    ("field", "message"),
    [("layer_norm", "nothing between them"), ("learned_initial_state", "no parameter")],
)
def test_what_torch_has_not_beside_cells_is_not_left_out(field, message):
    model = RecurrentStack(CELLS["lstm"], 2, bidirectional=True, **{field: True})
    variables = random_params(model, sequences())
    with pytest.raises(ValueError, match=message):
        to_torch(variables["params"])


def test_weights_of_something_else_are_refused():
    projected = torch.nn.LSTM(FEATURES, HIDDEN, proj_size=2).state_dict()
    for weights in ({}, {"weight": np.zeros((2, 2))}, projected):
        with pytest.raises(ValueError, match="torch"):
            from_torch(weights)


# Derivatives.


def plain_scan(cell, variables, inputs, lengths, reverse):
    """The loop differentiated by JAX, step by step through the cell's call."""
    own = {"params": variables["params"]["cell"]}

    def step(state, step_inputs):
        x, t = step_inputs
        new, output = cell.apply(own, state, x)
        real = (t < lengths)[:, None]
        state = jax.tree.map(lambda a, b: jnp.where(real, a, b), new, state)
        return state, jnp.where(real, output, 0)

    xs = (inputs.swapaxes(0, 1), jnp.arange(TIME))
    state = cell.initial_state(len(inputs))
    state, outputs = jax.lax.scan(step, state, xs, reverse=reverse)
    return outputs.swapaxes(0, 1), state


# Few sequences and many take different ways on a CPU.
@pytest.mark.parametrize("batch", [3, 9])
@pytest.mark.parametrize("reverse", [False, True])
@each_cell
def test_derivatives_equal_those_of_a_plain_scan(cell, reverse, batch):
    inputs = sequences(batch)
    lengths = jnp.arange(batch) % (TIME + 1)
    model = Recurrent(cell, reverse=reverse)
    variables = random_params(model, inputs)

    def loss(run):
        def of(variables, inputs):
            outputs, state = run(variables, inputs)
            weighted = outputs * normal(*outputs.shape, seed=5)
            return weighted.sum() + sum(
                (leaf * leaf.conj()).real.sum() for leaf in jax.tree.leaves(state)
            )

        return jax.jit(jax.value_and_grad(of, (0, 1)))

    got = loss(lambda v, x: model.apply(v, x, lengths))(variables, inputs)
    want = loss(lambda v, x: plain_scan(cell, v, x, lengths, reverse))(
        variables, inputs
    )
    close(got, want, 2e-5)


@pytest.mark.parametrize("name", ["simple", "gru", "plain gru", "reset after", "lstm"])
def test_derivatives_equal_finite_differences(name):
    model, inputs = Recurrent(CELLS[name]), sequences()
    variables = random_params(model, inputs)
    state = jax.tree.map(lambda x: x + 0.3, CELLS[name].initial_state(BATCH))

    @jax.jit
    def f(variables, inputs, state):
        return model.apply(variables, inputs, LENGTHS, state)

    args = (variables, inputs, state)
    check_grads(f, args, order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_second_derivatives_equal_those_of_a_plain_scan():
    cell, inputs = CELLS["lstm"], sequences()
    model = Recurrent(cell)
    variables = random_params(model, inputs)
    full = jnp.full((BATCH,), TIME)

    def slope(run):
        def norm(inputs):
            gradient = jax.grad(lambda x: (run(x)[0] ** 2).sum())(inputs)
            return (gradient**2).sum()

        return jax.jit(jax.grad(norm))(inputs)

    close(
        slope(lambda x: model.apply(variables, x)),
        slope(lambda x: plain_scan(cell, variables, x, full, False)),
        1e-4,
    )
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: model.apply(variables, x)[0], (inputs,), (inputs,))


def test_backpropagation_through_time():
    """dL/dW = sum_t d(t) h(t-1)', d(t) = g'(a(t)) * (dL/dh(t) + W' d(t+1))."""
    model, inputs = Recurrent(SimpleCell(HIDDEN)), sequences()
    variables = random_params(model, inputs)
    outputs, _ = model.apply(variables, inputs)
    target = normal(*outputs.shape, seed=3)

    def loss(variables):
        return 0.5 * ((model.apply(variables, inputs)[0] - target) ** 2).sum()

    gradient = jax.grad(loss)(variables)["params"]["cell"]
    h, x = np.float64(outputs), np.float64(inputs)
    w = np.float64(variables["params"]["cell"]["recurrent_kernel"]).T
    d_w, d_u, d_b = np.zeros_like(w), np.zeros((HIDDEN, FEATURES)), np.zeros(HIDDEN)
    for b in range(BATCH):
        d = np.zeros(HIDDEN)
        for t in reversed(range(TIME)):
            d = (1 - h[b, t] ** 2) * (h[b, t] - np.float64(target)[b, t] + w.T @ d)
            before = h[b, t - 1] if t else np.zeros(HIDDEN)
            d_w += np.outer(d, before)
            d_u += np.outer(d, x[b, t])
            d_b += d
    close(gradient, {"recurrent_kernel": d_w.T, "kernel": d_u.T, "bias": d_b}, 2e-5)


def test_jacobian_of_the_linear_network_is_a_power_of_w():
    # With relu, and all states positive, the network is h = W h + U x.
    cell = SimpleCell(HIDDEN, activation="relu")
    inputs = jnp.ones((1, TIME, FEATURES))
    variables = jax.tree.map(jnp.abs, random_params(Recurrent(cell), inputs))
    rest = inputs[:, 1:]

    def last(first_state):
        return Recurrent(cell).apply(variables, rest, None, first_state)[1]

    jacobian = jax.jacrev(last)(jnp.ones((1, HIDDEN)))[0, :, 0]
    w = np.float64(variables["params"]["cell"]["recurrent_kernel"]).T
    close(jacobian, np.linalg.matrix_power(w, TIME - 1), 1e-5)


@pytest.mark.parametrize("name", ["gru", "lstm", "full peephole"])
def test_seeds_are_vmapped(name):
    model, inputs = Recurrent(CELLS[name]), sequences()
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = jax.jit(jax.vmap(lambda key: model.init(key, inputs)))(keys)

    @jax.jit
    def gradient(variables):
        return jax.grad(lambda v: (model.apply(v, inputs, LENGTHS)[0] ** 2).sum())(
            variables
        )

    got = jax.jit(jax.vmap(gradient))(stacked)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
        close(jax.tree.map(lambda leaf, i=i: leaf[i], got), gradient(one))


# Lengths and states.


@pytest.mark.parametrize("kind", ["forward", "reverse", "both"])
@each_cell
def test_lengths_equal_truncated_runs(cell, kind):
    model = Bidirectional(cell)
    if kind != "both":
        model = Recurrent(cell, reverse=kind == "reverse")
    inputs = sequences()
    variables = random_params(model, inputs)
    outputs, final = jax.jit(model.apply)(variables, inputs, LENGTHS)
    for i, length in enumerate([6, 0, 4]):
        assert not outputs[i, length:].any()
        row = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], final)
        if length == 0:
            close(row, jax.tree.map(jnp.zeros_like, row))
            continue
        alone, state = model.apply(variables, inputs[i : i + 1, :length])
        close(outputs[i, :length], alone[0])
        close(row, state)


@each_cell
def test_padding_changes_neither_results_nor_gradients(cell):
    model = RecurrentStack(cell, 2, bidirectional=True, residual=True, layer_norm=True)
    inputs = sequences()
    variables = random_params(model, inputs)
    padding = (jnp.arange(TIME) >= LENGTHS[:, None])[..., None]

    @jax.jit
    def run(inputs):
        def loss(variables, inputs):
            outputs, final = model.apply(variables, inputs, LENGTHS)
            return (outputs**2).sum(), (outputs, final)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables, inputs)

    want = run(inputs)
    close(run(jnp.where(padding, jnp.nan, inputs)), want, 0)
    _, (_, d_inputs) = want
    assert not jnp.where(padding, d_inputs, 0).any()


@pytest.mark.parametrize("name", ["gru", "lstm", "linear"])
def test_a_stopped_state_truncates_backpropagation(name):
    cell = CELLS[name]
    model, inputs = RecurrentStack(cell, 2), sequences()
    variables = random_params(model, inputs)

    def second(variables, inputs, stop, state=None):
        if state is None:
            _, state = model.apply(variables, inputs[:, :2])
            state = jax.lax.stop_gradient(state) if stop else state
        outputs, _ = model.apply(variables, inputs[:, 2:], initial_state=state)
        return (outputs**2).sum()

    gradient = jax.jit(jax.value_and_grad(second, (0, 1)), static_argnums=2)
    value, (d_params, d_inputs) = gradient(variables, inputs, True)
    full_value, (full, d_all) = gradient(variables, inputs, False)
    close(value, full_value, 0)
    assert not d_inputs[:, :2].any() and d_all[:, :2].any()
    close(d_inputs[:, 2:], d_all[:, 2:])
    _, state = model.apply(variables, inputs[:, :2])
    _, (expected, _) = gradient(variables, inputs, True, state)
    close(d_params, expected)
    differences = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), d_params, full)
    assert max(jax.tree.leaves(differences)) > 1e-3


@each_cell
def test_two_halves_are_the_whole(cell):
    model, inputs = RecurrentStack(cell, 2), sequences()
    variables = random_params(model, inputs)
    whole, last = model.apply(variables, inputs)
    first, state = model.apply(variables, inputs[:, :2])
    second, state = model.apply(variables, inputs[:, 2:], initial_state=state)
    close(jnp.concatenate([first, second], 1), whole)
    close(state, last)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Recurrent, name) for name in CELLS]
    + [(Bidirectional, "lstm"), (RecurrentStack, "lstm")],
)
def test_initial_states_are_learned(kind, name):
    model = kind(CELLS[name], learned_initial_state=True)
    inputs = sequences()
    variables = jax.jit(model.init)(jax.random.key(0), inputs)
    variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    empty = jnp.zeros(BATCH, int)
    _, final = model.apply(variables, inputs, empty)
    value = 0.1 + 0.1j if name == "linear" else 0.1
    close(final, jax.tree.map(lambda leaf: jnp.full_like(leaf, value), final))
    gradient = jax.grad(lambda v: model.apply(v, inputs)[0].sum())(variables)
    assert all(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_a_complex_initial_state_descends():
    """The gradient is that of finite differences, not its conjugate."""
    model, inputs = Recurrent(CELLS["linear"], learned_initial_state=True), sequences()
    variables = random_params(model, inputs)

    @jax.jit
    def loss(first):
        params = variables["params"] | {"initial_state": first}
        return (model.apply({"params": params}, inputs)[0] ** 2).sum()

    first = variables["params"]["initial_state"]
    assert {name: leaf.shape for name, leaf in first.items()} == dict.fromkeys(
        ("real", "imag"), (1, HIDDEN)
    )
    # In float32 a smaller step loses digits and a larger one is bent.
    check_grads(loss, (first,), 1, ["rev"], atol=1e-2, rtol=1e-2, eps=3e-2)


@pytest.mark.parametrize("merge", ["concat", "sum", "mean"])
def test_bidirectional_merges_both_directions(merge):
    model, inputs = Bidirectional(CELLS["gru"], merge), sequences()
    variables = random_params(model, inputs)
    outputs, _ = model.apply(variables, inputs, LENGTHS)
    halves = [
        Recurrent(CELLS["gru"], reverse=reverse).apply(
            {"params": variables["params"][name]}, inputs, LENGTHS
        )[0]
        for name, reverse in [("forward", False), ("backward", True)]
    ]
    if merge == "concat":
        want = jnp.concatenate(halves, -1)
    else:
        want = sum(halves) / (2 if merge == "mean" else 1)
    close(outputs, want)


class Accumulator(nn.Module):
    """A cell that this library does not know."""

    hidden_size: int

    def initial_state(self, batch_size, dtype=jnp.float32):
        return jnp.zeros((batch_size, self.hidden_size), dtype)

    @nn.compact
    def __call__(self, state, inputs):
        state = state + nn.Dense(self.hidden_size)(inputs)
        return state, state


def test_a_cell_of_ones_own():
    model, inputs = RecurrentStack(Accumulator(HIDDEN), bidirectional=True), sequences()
    padding = (jnp.arange(TIME) >= LENGTHS[:, None])[..., None]
    inputs = jnp.where(padding, jnp.nan, inputs)
    variables = model.init(jax.random.key(0), inputs, LENGTHS)
    outputs, _ = model.apply(variables, inputs, LENGTHS)
    layer = variables["params"]["layers_0"]
    x = np.where(padding, 0, inputs)
    for half, name in zip(jnp.split(outputs, 2, -1), layer, strict=True):
        dense = layer[name]["cell"]["Dense_0"]
        terms = np.where(padding, 0, x @ dense["kernel"] + dense["bias"])
        sums = np.cumsum(terms, 1)
        if name == "backward":
            sums = np.cumsum(terms[:, ::-1], 1)[:, ::-1]
        close(half, np.where(padding, 0, sums))
    gradient = jax.grad(lambda v: (model.apply(v, inputs, LENGTHS)[0] ** 2).sum())(
        variables
    )
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_cell_of_ones_own_keeps_the_dtype_of_its_state():
    model, inputs = Recurrent(Accumulator(HIDDEN)), sequences()
    variables = model.init(jax.random.key(0), inputs)
    exact, _ = model.apply(variables, inputs)
    outputs, state = model.apply(variables, inputs.astype(jnp.bfloat16))
    assert state.dtype == jnp.bfloat16
    close(jnp.float32(outputs), exact, 0.05)


# Dtypes, tokens, initialisers.


@pytest.mark.parametrize("name", sorted(set(CELLS) - {"linear"}))
def test_bfloat16_stays_bfloat16(name):
    cell = CELLS[name]
    half = cell.clone(dtype=jnp.bfloat16)
    inputs = sequences()

    @partial(jax.jit, static_argnums=0)
    def run(cell, variables):
        model = RecurrentStack(cell, 2, layer_norm=True, residual=True)

        def loss(variables):
            results = model.apply(variables, inputs, LENGTHS)
            return results[0].astype(jnp.float32).sum(), results

        return jax.grad(loss, has_aux=True)(variables)

    model = RecurrentStack(half, 2, layer_norm=True, residual=True)
    variables = random_params(model, inputs)
    gradient, results = run(half, variables)
    for tree, dtype in [
        (variables, "float32"),
        (results, "bfloat16"),
        (gradient, "float32"),
    ]:
        assert {leaf.dtype.name for leaf in jax.tree.leaves(tree)} == {dtype}
    _, exact = run(cell, variables)
    close(jax.tree.map(jnp.float32, results), exact, 0.1)


def bfloat16(*trees):
    return {leaf.dtype.name for leaf in jax.tree.leaves(trees)} == {"bfloat16"}


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_models_compute_in_bfloat16(name):
    tokens = jax.random.randint(jax.random.key(0), (BATCH, TIME), 0, 7)

    def models(dtype):
        stack = RecurrentStack(CELLS[name].clone(dtype=dtype), 2)
        fields = dict(vocabulary_size=7, embedding_size=4, dtype=dtype)
        yield SequenceModel(stack, 7, **fields)
        for pooling in ("last", "mean", "max"):
            yield SequenceClassifier(stack, 3, pooling=pooling, **fields)

    for half, full in zip(models(jnp.bfloat16), models(None), strict=True):
        variables = random_params(half, tokens)
        found = jax.jit(half.apply)(variables, tokens, LENGTHS)
        assert bfloat16(found)
        exact = jax.jit(full.apply)(variables, tokens, LENGTHS)
        close(jax.tree.map(jnp.float32, found), exact, 0.1)

    model = next(models(jnp.bfloat16))
    variables = random_params(model, tokens)
    step = jax.jit(partial(model.apply, method="decode_step"))
    cache = model.apply(variables, BATCH, method="init_cache")
    logits, _ = model.apply(variables, tokens)
    for t in range(TIME):
        one, cache = step(variables, cache, tokens[:, t])
        assert bfloat16(one, cache)
        close(jnp.float32(one), jnp.float32(logits[:, t]), 0.05)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_an_encoder_and_a_decoder_may_differ_in_dtype(half):
    dtypes = {half: jnp.bfloat16}
    stacks = [
        RecurrentStack(GRUCell(HIDDEN, dtype=dtypes.get(name)))
        for name in ("encoder", "decoder")
    ]
    model = RecurrentEncoderDecoder(*stacks, 7, embedding_size=4, attention_size=4)
    source = jax.random.randint(jax.random.key(0), (BATCH, TIME), 0, 7)
    variables = model.init(jax.random.key(1), source, source)

    def decode():
        memory = model.apply(variables, source, method="encode")
        cache = model.apply(variables, memory, TIME, method="init_cache")
        step = partial(model.apply, variables, method="decode_step")
        return greedy(step, cache, jnp.ones(BATCH, int), TIME, 2)

    tokens, _, log_p = jax.jit(decode)()
    assert tokens.shape == (BATCH, TIME) and jnp.isfinite(log_p).all()


@pytest.mark.parametrize("attention", [False, True])
def test_an_encoder_decoder_computes_and_decodes_in_bfloat16(attention):
    source = jax.random.randint(jax.random.key(0), (BATCH, TIME), 0, 7)
    lengths = jnp.array([6, 2, 4])

    def model(dtype):
        return RecurrentEncoderDecoder(
            RecurrentStack(GRUCell(HIDDEN, dtype=dtype), bidirectional=True),
            RecurrentStack(LSTMCell(HIDDEN, dtype=dtype)),
            7,
            embedding_size=4,
            attention=attention,
            attention_size=6,
            dtype=dtype,
        )

    half = model(jnp.bfloat16)
    variables = random_params(half, source, source)
    found = jax.jit(half.apply)(variables, source, source, lengths)
    assert bfloat16(found)
    exact = jax.jit(model(None).apply)(variables, source, source, lengths)
    close(jnp.float32(found), exact, 0.15)
    memory = half.apply(variables, source, lengths, method="encode")
    assert bfloat16(memory["state"], memory["keys"])
    # A loop needs a cache that keeps its dtypes.
    tokens, ended, _ = greedy(
        partial(half.apply, variables, method="decode_step"), memory, source[:, 0], 4, 2
    )
    read = jnp.concatenate([source[:, :1], tokens[:, :-1]], 1)
    logits = half.apply(variables, source, read, lengths)
    assert bfloat16(logits)
    own = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    gap = jnp.where(jnp.arange(4) < ended[:, None], logits.max(-1) - own, 0)
    assert jnp.float32(gap).max() < 0.05


@pytest.mark.parametrize("name", ["gru", "lstm", "full peephole"])
def test_tokens_are_one_hot_vectors(name):
    model = Recurrent(CELLS[name].clone(vocabulary_size=FEATURES))
    tokens = jax.random.randint(jax.random.key(0), (BATCH, TIME), 0, FEATURES)
    one_hot = jax.nn.one_hot(tokens, FEATURES)
    variables = random_params(model, tokens)

    def gradient(inputs):
        def loss(variables):
            outputs, state = model.apply(variables, inputs, LENGTHS)
            return (outputs**2).sum(), (outputs, state)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)

    close(gradient(tokens), gradient(one_hot))


def test_recurrent_kernels_are_orthogonal_blocks():
    for name, cell in CELLS.items():
        if name in ("minimal gru", "minimal lstm", "linear"):
            continue
        variables = Recurrent(cell).init(jax.random.key(0), sequences())
        kernel = variables["params"]["cell"]["recurrent_kernel"]
        blocks = np.split(kernel, kernel.shape[1] // HIDDEN, -1)
        for block in blocks:
            close(block @ block.T, np.eye(HIDDEN), 1e-5)
        assert len({float(block[0, 0]) for block in blocks}) == len(blocks), name
    half = orthogonal_blocks(2)(jax.random.key(0), (4, 8), jnp.bfloat16)
    assert half.dtype == jnp.bfloat16


def test_forget_bias():
    inputs = sequences()
    for value in (1.0, 3.0):
        model = Recurrent(LSTMCell(HIDDEN, forget_bias=value))
        variables = jax.jit(model.init)(jax.random.key(0), inputs)
        bias = variables["params"]["cell"]["bias"].reshape(4, HIDDEN)
        close(bias, np.array([[0], [value], [0], [0]]) * np.ones(HIDDEN), 0)


@pytest.mark.parametrize(
    ("cell", "gates"),
    [(LSTMCell, 4), (GRUCell, 3), (partial(GRUCell, relevance_gate=False), 2)],
)
def test_chrono_initialisation(cell, gates):
    cell = cell(1000, chrono_max_length=100)
    variables = jax.jit(Recurrent(cell).init)(jax.random.key(0), sequences())
    update, *rest = variables["params"]["cell"]["bias"].reshape(gates, -1)
    if gates == 4:
        close(update, -rest.pop(0), 0)
    times = np.exp(-update)
    assert stats.kstest(times, stats.uniform(1, 98).cdf).pvalue > 0.01
    assert not np.any(rest)


def test_chrono_initialisation_keeps_memories_for_their_times():
    """After t steps without input a unit of the time t has (1 - 1/(1 + t))^t left."""
    cell = GRUCell(50, chrono_max_length=1000)
    inputs = jnp.zeros((1, 400, FEATURES))
    params = Recurrent(cell).init(jax.random.key(0), inputs)["params"]["cell"]
    params["recurrent_kernel"] = 0 * params["recurrent_kernel"]
    outputs, _ = Recurrent(cell).apply(
        {"params": {"cell": params}}, inputs, None, jnp.ones((1, 50))
    )
    times = np.exp(-params["bias"][:50])
    want = (1 - 1 / (1 + times)) ** np.arange(1, 401)[:, None]
    np.testing.assert_allclose(outputs[0], want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("cell", [LSTMCell, GRUCell])
def test_chrono_initialisation_needs_a_length(cell):
    with pytest.raises(ValueError, match="chrono_max_length must be 3 or more"):
        Recurrent(cell(2, chrono_max_length=2)).init(jax.random.key(0), sequences())


# Stacks and models.


@pytest.mark.parametrize("variational", [False, True])
def test_variational_dropout_is_one_mask_for_all_steps(variational):
    cell = SimpleCell(64, activation="relu")
    model = RecurrentStack(cell, dropout_rate=0.5, variational=variational)
    inputs = jnp.ones((2, TIME, FEATURES))
    variables = jax.tree.map(
        lambda leaf: jnp.abs(leaf) / 10, random_params(model, inputs)
    )
    full, _ = model.apply(variables, inputs)
    assert (full > 0).all()
    dropped, _ = model.apply(
        variables, inputs, train=True, rngs={"dropout": jax.random.key(0)}
    )
    kept = np.asarray(dropped) > 0
    assert 0.3 < kept.mean() < 0.7
    close(dropped[kept], 2 * full[kept])
    assert (kept == kept[:, :1]).all() == variational
    assert (kept[0] != kept[1]).any()


def test_residuals_and_layer_norm():
    inputs = normal(BATCH, TIME, HIDDEN)
    plain = RecurrentStack(CELLS["gru"])
    variables = random_params(plain, inputs)
    outputs, _ = plain.apply(variables, inputs)
    added, _ = plain.clone(residual=True).apply(variables, inputs)
    close(added, outputs + inputs)
    model = plain.clone(layer_norm=True)
    params = model.init(jax.random.key(0), inputs)["params"] | variables["params"]
    normed, _ = model.apply({"params": params}, inputs)
    x = np.asarray(outputs)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    close(normed, x, 1e-4)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
def test_classifier_reads_real_steps(pooling, bidirectional):
    stack = RecurrentStack(CELLS["lstm"], bidirectional=bidirectional)
    model = SequenceClassifier(stack, 3, pooling=pooling)
    inputs = sequences()
    variables = random_params(model, inputs)
    logits = model.apply(variables, inputs, LENGTHS)
    own = {"params": variables["params"]["stack"]}
    outputs, final = stack.apply(own, inputs[2:, :4])
    pooled = {"mean": outputs.mean(1), "max": outputs.max(1)}.get(pooling)
    if pooling == "last":
        hidden = jax.tree.leaves(final)[::2]
        pooled = jnp.concatenate(hidden, -1)
    head = variables["params"]["Dense_0"]
    close(logits[2], (pooled @ head["kernel"] + head["bias"])[0])
    close(logits[1], head["bias"])
    padded = inputs.at[2, 4:].set(jnp.nan).at[1].set(jnp.nan)
    close(model.apply(variables, padded, LENGTHS), logits, 0)


def test_a_model_of_tokens_decodes_step_by_step():
    model = SequenceModel(RecurrentStack(CELLS["gru"], 2), 7, 7, embedding_size=4)
    tokens = jax.random.randint(jax.random.key(0), (BATCH, TIME), 0, 7)
    variables = random_params(model, tokens)
    logits, final = model.apply(variables, tokens)
    assert logits.shape == (BATCH, TIME, 7)
    cache = model.apply(variables, BATCH, TIME, method="init_cache")
    step = jax.jit(lambda c, t: model.apply(variables, c, t, method="decode_step"))
    for t in range(TIME):
        one, cache = step(cache, tokens[:, t])
        close(one, logits[:, t])
    close(cache, final)


def test_generation_feeds_its_own_output_back():
    model = SequenceModel(RecurrentStack(CELLS["lstm"]), 7)
    variables = random_params(model, normal(BATCH, TIME, 7))
    first = jnp.ones((BATCH, 7))

    def step(cache, notes):
        return model.apply(variables, cache, notes, method="decode_step")

    def sample(key, logits):
        return jax.random.bernoulli(key, jax.nn.sigmoid(logits / 0.5))

    cache = model.apply(variables, BATCH, method="init_cache")
    key = jax.random.key(0)
    notes = jax.jit(lambda: generate(step, cache, first, TIME, sample, key))()
    assert notes.shape == (BATCH, TIME, 7) and notes.dtype == first.dtype
    # Each must be what is drawn from the whole call's prediction after those before.
    read = jnp.concatenate([first[:, None], notes[:, :-1]], 1)
    logits, _ = model.apply(variables, read)
    for t, own in enumerate(jax.random.split(key, TIME)):
        close(notes[:, t], sample(own, logits[:, t]), 0)


@pytest.mark.parametrize("attention", [False, True])
def test_encoder_decoder(attention):
    model = RecurrentEncoderDecoder(
        RecurrentStack(CELLS["gru"], 2, bidirectional=True),
        RecurrentStack(CELLS["lstm"], 2),
        num_classes=7,
        source_vocabulary_size=9,
        embedding_size=4,
        attention=attention,
        attention_size=6,
    )
    source = jax.random.randint(jax.random.key(0), (BATCH, TIME), 0, 9)
    target = jax.random.randint(jax.random.key(1), (BATCH, 5), 0, 7)
    lengths = jnp.array([6, 2, 4])
    variables = random_params(model, source, target)
    apply = jax.jit(model.apply)
    logits = apply(variables, source, target, lengths)
    assert logits.shape == (BATCH, 5, 7)

    memory = model.apply(variables, source, lengths, method="encode")
    cache = model.apply(variables, memory, 5, method="init_cache")
    assert {leaf.shape[0] for leaf in jax.tree.leaves(cache)} == {BATCH}
    step = jax.jit(lambda c, t: model.apply(variables, c, t, method="decode_step"))
    for t in range(5):
        one, cache = step(cache, target[:, t])
        close(one, logits[:, t])

    # What the source's padding holds does not matter; its real tokens do.
    padded = jnp.where(jnp.arange(TIME) < lengths[:, None], source, 8 - source)
    close(apply(variables, padded, target, lengths), logits, 0)
    other = source.at[:, 0].set((source[:, 0] + 1) % 9)
    changed = apply(variables, other, target, lengths)
    assert (np.abs(changed - logits).max((1, 2)) > 1e-3).all()


@pytest.mark.parametrize(
    ("encoder", "decoder"), [("linear", "lstm"), ("gru", "linear"), ("linear",) * 2]
)
def test_encoder_decoder_of_complex_states(encoder, decoder):
    model = RecurrentEncoderDecoder(
        RecurrentStack(CELLS[encoder], bidirectional=True),
        RecurrentStack(CELLS[decoder]),
        num_classes=7,
        embedding_size=4,
        attention_size=6,
    )
    source = jax.random.randint(jax.random.key(0), (BATCH, TIME), 0, 7)
    target = source[:, :3]
    variables = random_params(model, source, target)
    params = variables["params"]
    logits = model.apply(variables, source, target)
    cache = model.apply(variables, source, method="encode")
    parts = 2 * (1 + (encoder == "linear"))  # of the summary, of width HIDDEN
    assert params["bridge"]["Dense_0"]["kernel"].shape == (parts * HIDDEN, HIDDEN)
    assert len(params["bridge"]) == 2
    (state,) = cache["state"]
    assert jnp.iscomplexobj(jax.tree.leaves(state)[0]) == (decoder == "linear")
    for t in range(3):
        one, cache = model.apply(variables, cache, target[:, t], method="decode_step")
        close(one, logits[:, t])
    gradient = jax.grad(lambda v: (model.apply(v, source, target) ** 2).sum())(
        variables
    )
    assert all(leaf.any() for leaf in jax.tree.leaves(gradient["params"]["bridge"]))


def test_a_decoder_has_no_initial_state_to_learn():
    stack = RecurrentStack(CELLS["gru"])
    model = RecurrentEncoderDecoder(stack, stack.clone(learned_initial_state=True), 7)
    tokens = jnp.zeros((2, 3), int)
    with pytest.raises(ValueError, match="learned_initial_state=False"):
        model.init(jax.random.key(0), tokens, tokens)


def test_attention_weights_are_those_of_the_contexts():
    model = RecurrentEncoderDecoder(
        RecurrentStack(CELLS["gru"]),
        RecurrentStack(CELLS["gru"]),
        num_classes=7,
        embedding_size=4,
        attention_size=6,
    )
    source = jax.random.randint(jax.random.key(0), (BATCH, TIME), 0, 7)
    target = jax.random.randint(jax.random.key(1), (BATCH, 5), 0, 7)
    lengths = jnp.array([6, 1, 4])
    variables = random_params(model, source, target)
    arguments = variables, source, target, lengths
    weights = np.asarray(model.apply(*arguments, method="attention_weights"))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    for row, length in zip(weights, lengths, strict=True):
        assert (row[:, :length] > 0).all() and not row[:, length:].any()
    logits, found = model.apply(
        *arguments, capture_intermediates=True, mutable="intermediates"
    )
    states = found["intermediates"]["decoder"]["__call__"][0][0]
    keys = model.apply(variables, source, lengths, method="encode")["keys"]
    params = variables["params"]
    mixed = np.concatenate([states, weights @ keys], -1) @ params["combine"]["kernel"]
    mixed = np.tanh(mixed + params["combine"]["bias"])
    close(mixed @ params["head"]["kernel"] + params["head"]["bias"], logits)
    with pytest.raises(ValueError, match="needs attention=True"):
        model.clone(attention=False).apply(*arguments, method="attention_weights")


# Errors.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((jnp.ones((2, 3)),), ValueError, r"inputs must have shape \[batch, time, f"),
        ((jnp.ones((2, 3, 4), bool),), TypeError, "inputs must be floating"),
        ((jnp.ones((2, 3, 4), int),), ValueError, "where they are integers"),
        ((jnp.ones((2, 3), int),), ValueError, "needs its vocabulary_size"),
        ((jnp.ones((2, 0, 4)),), ValueError, "one step of time or more"),
        ((jnp.ones((2, 3, 4)), jnp.ones(2)), TypeError, "lengths must have an integer"),
        (
            (jnp.ones((2, 3, 4)), jnp.ones(3, int)),
            ValueError,
            r"lengths must have shape \(2,\)",
        ),
        (
            (jnp.ones((2, 3, 4)), None, jnp.ones((2, 6))),
            ValueError,
            r"must have the shapes \(2, 5\)",
        ),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Recurrent(CELLS["gru"]).init(jax.random.key(0), *arguments)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Recurrent(SimpleCell(2, activation="gelu")), "activation must be 'tanh' or"),
        (
            Recurrent(GRUCell(2, relevance_gate=False, reset_after=True)),
            "relevance_gate is False",
        ),
        (Bidirectional(GRUCell(2), "product"), "merge must be one of"),
        (RecurrentStack(GRUCell(2), 0), "num_layers must be 1 or more"),
        (
            SequenceClassifier(RecurrentStack(GRUCell(2)), 2, pooling="first"),
            "pooling must be one of",
        ),
    ],
)
def test_wrong_fields(model, message):
    with pytest.raises(ValueError, match=message):
        model.init(jax.random.key(0), sequences())


def test_wrong_calls():
    inputs, key = sequences(), jax.random.key(0)
    with pytest.raises(ValueError, match="one state a layer, 2, but holds 1"):
        state = (jnp.zeros((BATCH, HIDDEN)),)
        RecurrentStack(CELLS["gru"], 2).init(key, inputs, initial_state=state)
    tokens = jnp.zeros((2, 3), int)
    with pytest.raises(ValueError, match="needs its vocabulary_size"):
        SequenceModel(RecurrentStack(CELLS["gru"]), 3).init(key, tokens)
    both = SequenceModel(RecurrentStack(CELLS["gru"], bidirectional=True), 3)
    with pytest.raises(ValueError, match="bidirectional=False"):
        both.apply({}, BATCH, method="init_cache")
    with pytest.raises(ValueError, match=r"\[batch, feature\]"):
        CELLS["gru"].init(key, jnp.zeros((2, HIDDEN)), inputs)


# On GPUs.


@pytest.fixture
def cudnn(monkeypatch):
    """cuDNN runs on GPUs alone; JAX's reference of its layout stands in for it.

    Returns a list that gets the shape, dtype and lengths of every call, and a function
    after which there is a GPU.
    """
    calls = []

    def reference(x, h, c, weights, lengths, *sizes):
        calls.append((x.shape, x.dtype.name, np.asarray(lengths).tolist()))
        input_size, hidden_size, num_layers, _, bidirectional = sizes
        parts = rnn.unpack_lstm_weights(
            weights, input_size, hidden_size, num_layers, bidirectional
        )
        return rnn.lstm_ref(x, h, c, *parts, lengths, *sizes)

    def switch_on():
        monkeypatch.setattr(rnn, "lstm", reference)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    return calls, switch_on


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
@pytest.mark.parametrize("reverse", [False, True])
def test_cudnn_gets_the_same_weights(reverse, lengths, cudnn):
    calls, switch_on = cudnn
    model = Recurrent(LSTMCell(HIDDEN), reverse=reverse)
    x = sequences()
    params = random_params(model, x)
    state = normal(BATCH, HIDDEN, seed=3), normal(BATCH, HIDDEN, seed=4)

    def loss(params, x, state):
        outputs, (h, c) = model.apply(params, x, lengths, state)
        return jnp.sum(jnp.sin(outputs)) + jnp.sum(h * c), (outputs, h, c)

    gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    expected = gradient(params, x, state)
    switch_on()
    found = gradient(params, x, state)
    given = [TIME] * BATCH if lengths is None else [6, 1, 4]
    assert calls == [((BATCH, TIME, FEATURES), "float32", given)]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        found,
        expected,
    )
    if lengths is not None:
        close(jax.tree.map(lambda s: s[1], found[1][1:]), tuple(s[1] for s in state), 0)


def test_cudnn_rounds_its_results_to_half_precision(cudnn):
    calls, switch_on = cudnn
    model = Recurrent(LSTMCell(HIDDEN, dtype=jnp.bfloat16))
    x = sequences()
    params = random_params(model, x)
    expected = model.apply(params, x, LENGTHS)
    switch_on()
    found = model.apply(params, x, LENGTHS)
    assert [dtype for _, dtype, _ in calls] == ["float32"]
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(found))
    close(jax.tree.map(jnp.float32, found), jax.tree.map(jnp.float32, expected), 0.05)


def test_what_cudnn_cannot_keeps_our_own_loop(cudnn):
    calls, switch_on = cudnn
    x, tokens = sequences(), jnp.zeros((BATCH, TIME), int)
    switch_on()
    for cell, inputs in [
        (PeepholeLSTMCell(HIDDEN), x),
        (LSTMCell(HIDDEN, cudnn=False), x),
        (LSTMCell(HIDDEN, vocabulary_size=3), tokens),
    ]:
        model = Recurrent(cell)
        model.apply(random_params(model, inputs), inputs)
    assert not calls
