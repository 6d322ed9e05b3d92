import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from archs import GRUCell, LSTMCell, SimpleCell
from experiments import gradient_flow


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 10.0])
def test_the_linear_case_is_the_matrix_power(scale):
    w, u = scale * normal(0, 5, 5), normal(1, 3, 5)
    norms = gradient_flow.jacobian_norms(
        lambda h, x: h @ w + x @ u, jnp.zeros(5), normal(2, 30, 3)
    )
    powers = [np.linalg.matrix_power(w.astype(float), k) for k in range(31)]
    expected = [np.log10(np.linalg.norm(p) / np.sqrt(5)) for p in powers]
    np.testing.assert_allclose(norms, expected, atol=2e-4)


@pytest.mark.parametrize("gain", gradient_flow.GAINS)
def test_an_orthogonal_matrix_times_the_gain_is_the_line_drawn(gain):
    w = gain * np.linalg.qr(normal(0, 8, 8))[0]
    norms = gradient_flow.jacobian_norms(
        lambda h, x: h @ w + x, jnp.zeros(8), normal(1, 100, 8)
    )
    exact = gradient_flow.linear()[f"gain {gain:g}"]
    np.testing.assert_allclose(norms, exact, atol=2e-4)


@pytest.mark.parametrize(
    "cell", [SimpleCell(3), GRUCell(3), LSTMCell(3)], ids=["simple", "gru", "lstm"]
)
def test_jacobians_are_finite_differences(cell):
    x, state = normal(0, 4, 1, 2), cell.initial_state(1)
    variables = cell.init(jax.random.key(0), state, x[0])

    def step(state, x):
        return cell.apply(variables, state, x)[0]

    norms = jax.jit(lambda x: gradient_flow.jacobian_norms(step, state, x))(x)
    states = [state]
    for k in range(4):
        states.append(step(states[-1], x[k]))

    def last(flat, lag):
        leaves, tree = jax.tree.flatten(state)
        parts = jnp.split(flat, len(leaves))
        s = jax.tree.unflatten(tree, [part[None] for part in parts])
        for k in range(4 - lag, 4):
            s = step(s, x[k])
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(s)])

    for lag in range(5):
        flat = np.concatenate([np.ravel(s) for s in jax.tree.leaves(states[4 - lag])])
        e = 1e-2 * np.eye(len(flat), dtype=np.float32)
        columns = [(last(flat + d, lag) - last(flat - d, lag)) / 0.02 for d in e]
        norm = np.linalg.norm(columns) / np.sqrt(len(flat))
        assert norms[lag] == pytest.approx(np.log10(norm), abs=2e-3)


@pytest.fixture(scope="module")
def curves():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_flow, "HIDDEN_SIZE", 8)
        return gradient_flow.measure(3)


def test_gradients_vanish_or_explode_with_the_gain_less_in_an_lstm(curves):
    at_end = {
        (title, name): np.median(norms[:, -1])
        for title, cells in curves.items()
        for name, norms in cells.items()
    }
    exact = {title: line[-1] for title, line in gradient_flow.linear().items()}
    for title, line in exact.items():
        # tanh can only shrink what the kernel lets through.
        assert at_end[title, "simple cell"] < line
    assert at_end["gain 0.5", "LSTM"] > at_end["gain 0.5", "GRU"] > exact["gain 0.5"]
    for name in ("simple cell", "GRU", "LSTM"):
        assert at_end["gain 0.5", name] < at_end["gain 1", name]
    # Half open, the gate lets half of the kernel through.
    plain = "GRU without relevance gate"
    assert all(at_end[title, plain] > at_end[title, "GRU"] for title in exact)
    # log10: beyond 0 they have grown on the way back.
    assert at_end["gain 1.5", "simple cell"] > 0 > at_end["gain 1", "simple cell"]


def test_the_command_writes_the_report_and_the_table(
    curves, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(gradient_flow, "measure", lambda num_seeds: curves)
    folder = tmp_path / "flow"
    monkeypatch.setattr(sys, "argv", ["", f"--output={folder}", "--seeds=3"])
    assert gradient_flow.main() == 0
    page = (folder / "report.html").read_text()
    assert "Vanishing and exploding gradients" in page
    assert "No measures" not in page
    assert (folder / "gradient_flow.png").stat().st_size > 10_000
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + 3 * 5 + 1
    rows = [line.split() for line in printed if "linear" in line]
    assert [row[-1] for row in rows] == ["7.9e-31", "1.0e+00", "4.1e+17"]
    assert all("7.9e-31" in text for text in (page, printed[1]))
