"""Vanishing and exploding gradients: how a state depends on that of many steps before.

    python -m experiments.gradient_flow --output=/tmp/gradient_flow

A loss at the step T reaches the state of a step t through

    ds(T)/ds(t) = A(T) A(T-1) ... A(t+1),  A(k) = ds(k)/ds(k-1),

with s = h, and s = (h, c) of an LSTM. Without activation it is W^(T-t), whatever the
inputs: with W = gain * orthogonal its singular values are gain^(T-t), so that gradients
vanish or explode. The norm shown is the root mean square of the singular values, that
of Frobenius over the square root of the state's size: 1 of an orthogonal matrix.
Nothing is trained: cells are as initialised, but for the recurrent kernel times the
gain.

Bengio, Simard and Frasconi, "Learning long-term dependencies with gradient descent is
difficult", 1994. Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent
neural networks", ICML 2013, arXiv 1211.5063.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from archs import GRUCell, LSTMCell, SimpleCell
from experiments import figures, report
from experiments.report import Section

GAINS = (0.5, 1.0, 1.5)
NUM_STEPS = 100
HIDDEN_SIZE = 64
# Small, so that the activations of the first steps do not saturate.
INPUT_SCALE = 0.1
SHOWN_LAGS = (1, 10, 50, 100)
LINEAR = "linear: gain^(T-t)"
FILE = "gradient_flow.png"


def jacobian_norms(
    step: Callable[[Any, jax.Array], Any], state: Any, inputs: jax.Array
) -> jax.Array:
    """How the last state depends on those before.

    Args:
      step: (state, input) -> the next state, a pytree of n floating numbers in all.
      state: the state before the first step.
      inputs: [step, ...].

    Returns:
      log10 of the Frobenius norms of ds(T)/ds(T-k), divided by sqrt(n), [step + 1], for
      k = 0, 1, ..., T.
    """
    first, unravel = ravel_pytree(state)

    def advance(s, x):
        return ravel_pytree(step(unravel(s), x))[0]

    _, before = jax.lax.scan(lambda s, x: (advance(s, x), s), first, inputs)

    def back(carry, step_inputs):
        # Normalised in each step: gain^T leaves what float32 can hold.
        product, log_norm = carry
        product = product @ jax.jacrev(advance)(*step_inputs)
        norm = jnp.linalg.norm(product)
        log_norm += jnp.log10(norm)
        return (product / norm, log_norm), log_norm

    size = jnp.sqrt(first.size)
    start = jnp.eye(first.size) / size, jnp.zeros(())
    _, norms = jax.lax.scan(back, start, (before, inputs), reverse=True)
    return jnp.concatenate([jnp.zeros(1), norms[::-1]])


def cell_norms(cell: nn.Module, num_seeds: int) -> np.ndarray:
    """`jacobian_norms` of a cell of archs and of random inputs, [gain, seed, lag].

    Args:
      cell: as initialised, but for its recurrent kernel times one of `GAINS`.
      num_seeds: of weights and inputs.
    """

    def of_gain_and_seed(gain, seed):
        keys = jax.random.split(jax.random.key(seed))
        shape = NUM_STEPS, 1, cell.hidden_size
        inputs = INPUT_SCALE * jax.random.normal(keys[0], shape)
        state = cell.initial_state(1)
        params = cell.init(keys[1], state, inputs[0])["params"]
        kernel = gain * params["recurrent_kernel"]
        variables = {"params": params | {"recurrent_kernel": kernel}}
        return jacobian_norms(
            lambda state, x: cell.apply(variables, state, x)[0], state, inputs
        )

    @jax.jit
    def of_all(gains, seeds):
        # One after another: side by side they would only wait for memory.
        return jax.lax.map(
            lambda gain: jax.lax.map(lambda seed: of_gain_and_seed(gain, seed), seeds),
            gains,
        )

    return np.asarray(of_all(jnp.asarray(GAINS), jnp.arange(num_seeds)))


def measure(num_seeds: int) -> dict[str, dict[str, np.ndarray]]:
    """{"gain 0.5": {cell: log10 norms [seed, lag]}, ...} of all cells and gains."""
    cells = {
        "simple cell": SimpleCell(HIDDEN_SIZE),
        "GRU": GRUCell(HIDDEN_SIZE),
        "GRU without relevance gate": GRUCell(HIDDEN_SIZE, relevance_gate=False),
        "LSTM": LSTMCell(HIDDEN_SIZE),
    }
    norms = {name: cell_norms(cell, num_seeds) for name, cell in cells.items()}
    return {
        f"gain {gain:g}": {name: found[i] for name, found in norms.items()}
        for i, gain in enumerate(GAINS)
    }


def linear() -> dict[str, np.ndarray]:
    """{"gain 0.5": log10 of gain^lag, [lag]}."""
    lags = np.arange(NUM_STEPS + 1)
    return {f"gain {gain:g}": lags * np.log10(gain) for gain in GAINS}


def table(curves: Mapping, exact: Mapping) -> list[dict]:
    """Medians over the seeds at a few lags."""
    rows = []
    for title, cells in curves.items():
        medians = {LINEAR: exact[title]}
        medians |= {name: np.median(norms, 0) for name, norms in cells.items()}
        for name, norms in medians.items():
            row = {"recurrent kernel": title, "cell": name}
            # As text: numbers of thirty digits are not to be read.
            row |= {f"T - t = {lag}": f"{10.0 ** norms[lag]:.1e}" for lag in SHOWN_LAGS}
            rows.append(row)
    return rows


def main() -> int:
    """Writes `report.html` and the picture, and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, type=Path, help="folder to write to")
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    curves, exact = measure(options.seeds), linear()
    rows = table(curves, exact)
    figure = figures.gradient_flow(curves, exact, LINEAR)
    figure.savefig(options.output / FILE, dpi=200, facecolor="white")
    section = Section(
        title="Vanishing and exploding gradients",
        text="How strongly the state at step T depends on that at step t: the root "
        "mean square of the singular values of ds(T)/ds(t), with s = h and, of the "
        f"LSTM, s = (h, c). T = {NUM_STEPS}, {HIDDEN_SIZE} units, as initialised, not "
        "trained; the recurrent kernel is the gain times an orthogonal matrix a gate, "
        f"inputs are normal with standard deviation {INPUT_SCALE:g}. Lines are medians "
        f"of {options.seeds} seeds, bands their range. Dashed: without activation and "
        "gates it is gain^(T-t).",
        figure=figure,
        table=rows,
        alt="Norm of the Jacobian by the number of steps, four cells and three gains",
    )
    path = report.write(options.output, [section])
    widths = {name: max(len(name), *(len(r[name]) for r in rows)) for name in rows[0]}
    for row in [{name: name for name in widths}, *rows]:
        print("  ".join(f"{row[name]:<{width}}" for name, width in widths.items()))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
