"""Training steps of recurrent networks and of a Transformer, against PyTorch and flax.

    python -m benchmarks.sequences [--runs 10] [--only LSTM]

The step is forward, backward and Adam on the squared error of all outputs. PyTorch runs
its own layers (`torch.nn.LSTM`, `GRU`, `RNN`, `TransformerEncoder`), flax
`flax.linen.RNN` with its cells, or layers of `flax.linen.MultiHeadDotProductAttention`.
The GRU is the one with the relevance gate before the product (flax and PyTorch have it
after; "GRU, reset after" is ours that computes the same as they). No dropout.

Every measurement has a process of its own, see `benchmarks.processes`. Run it on an
idle machine; with `taskset -c 0` before it all sides have one core.
"""

import argparse
from functools import partial

import numpy as np

from benchmarks.processes import (
    answer,
    compile_jax,
    measure,
    print_head,
    run_apart,
    table_row,
)

# (batch, time, features, hidden size).
SMALL, MIDDLE, LONG = (32, 50, 128, 128), (64, 100, 256, 256), (32, 784, 1, 128)
WORK = [
    *((cell, shape) for shape in (SMALL, MIDDLE, LONG) for cell in ("RNN", "GRU")),
    *(("GRU, reset after", shape) for shape in (SMALL, MIDDLE, LONG)),
    *(("LSTM", shape) for shape in (SMALL, MIDDLE, LONG)),
    ("LSTM, both directions", MIDDLE),
    ("Transformer encoder", (16, 256, 256, 256)),
]
NUM_LAYERS, NUM_HEADS = 4, 4
LEARNING_RATE = 1e-3


def batch(shape):
    batch_size, time, features, _ = shape
    rng = np.random.default_rng(0)
    return rng.standard_normal((batch_size, time, features), np.float32)


def network_ours(kind, size):
    import archs

    if kind == "Transformer encoder":
        return archs.TransformerEncoder(
            num_layers=NUM_LAYERS,
            num_heads=NUM_HEADS,
            hidden_size=size,
            positions=None,
            norm_first=False,
        )
    cells = {
        "RNN": archs.SimpleCell(size),
        "GRU": archs.GRUCell(size),
        "GRU, reset after": archs.GRUCell(size, reset_after=True),
        "LSTM": archs.LSTMCell(size),
    }
    if kind == "LSTM, both directions":
        return archs.Bidirectional(cells["LSTM"])
    return archs.Recurrent(cells[kind])


def network_flax(kind, size):
    import flax.linen as nn

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            attended = nn.MultiHeadDotProductAttention(NUM_HEADS)(x, x)
            x = nn.LayerNorm()(x + attended)
            y = nn.Dense(size)(nn.relu(nn.Dense(4 * size)(x)))
            return nn.LayerNorm()(x + y)

    if kind == "Transformer encoder":
        return nn.Sequential([Layer() for _ in range(NUM_LAYERS)])
    if kind == "LSTM, both directions":
        return nn.Bidirectional(*(nn.RNN(nn.OptimizedLSTMCell(size)) for _ in range(2)))
    cell = {
        "RNN": nn.SimpleCell,
        "GRU": nn.GRUCell,
        "GRU, reset after": nn.GRUCell,
        "LSTM": nn.OptimizedLSTMCell,
    }[kind]
    return nn.RNN(cell(size))


def step_jax(side, kind, shape, runs):
    import jax
    import jax.numpy as jnp
    import optax

    model = {"ours": network_ours, "flax": network_flax}[side](kind, shape[-1])
    optimizer = optax.adam(LEARNING_RATE)
    inputs = jnp.asarray(batch(shape))
    variables = jax.jit(model.init)(jax.random.key(0), inputs)

    def step(state, inputs):
        variables, optimizer_state = state

        def loss(variables):
            outputs = model.apply(variables, inputs)
            return jnp.mean(jax.tree.leaves(outputs)[0] ** 2)

        value, gradient = jax.value_and_grad(loss)(variables)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        return (optax.apply_updates(variables, updates), optimizer_state), value

    state = variables, optimizer.init(variables)
    compiled, allocated = compile_jax(step, state, inputs, donate_argnums=0)

    def run():
        nonlocal state
        state, value = jax.block_until_ready(compiled(state, inputs))
        return value

    return {**measure(run, runs), "allocated": allocated}


def step_torch(kind, shape, runs):
    import torch

    *_, features, size = shape
    if kind == "Transformer encoder":
        layer = torch.nn.TransformerEncoderLayer(
            size, NUM_HEADS, 4 * size, dropout=0.0, batch_first=True
        )
        model = torch.nn.TransformerEncoder(
            layer, NUM_LAYERS, enable_nested_tensor=False
        )
    else:
        layer = {"RNN": torch.nn.RNN, "GRU": torch.nn.GRU, "LSTM": torch.nn.LSTM}
        model = layer[kind.partition(",")[0]](
            features, size, batch_first=True, bidirectional="both" in kind
        )
    inputs = torch.tensor(batch(shape))
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)

    def run(inputs=inputs):
        outputs = model(inputs)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        outputs.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    run(inputs[:1])  # makes the optimizer's state, without the memory of a step
    return measure(run, runs)


MEASUREMENTS = {f.__name__: f for f in (step_jax, step_torch)}
in_process = partial(run_apart, __spec__.name)


def row(kind: str, shape: tuple, ours: dict, flax: dict, theirs: dict) -> str:
    cells = [
        kind,
        ", ".join(map(str, shape)),
        *(
            f"{side['best']:.1f} / {side['median']:.1f}"
            for side in (ours, flax, theirs)
        ),
        f"{ours['best'] / theirs['best']:.2f}",
        f"{ours['best'] / flax['best']:.2f}",
        f"{max(ours['added'], ours['allocated']):.0f}",
        f"{theirs['added']:.0f}",
    ]
    return table_row(cells)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sequences")
    parser.add_argument("--runs", type=int, default=10, help="timed runs of each")
    parser.add_argument("--only", default="", help="kinds that contain this")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        answer(args.measure, MEASUREMENTS)
        return
    header = [
        "training step",
        "batch, time, features, hidden",
        "ours, ms (best / median)",
        "flax.linen, ms",
        "PyTorch, ms",
        "ours / PyTorch",
        "ours / flax",
        "ours, MB",
        "PyTorch, MB added",
    ]
    print_head(f"{args.runs} runs each", header)
    for kind, shape in WORK:
        if args.only not in kind:
            continue
        sides = (
            in_process("step_jax", "ours", kind, shape, args.runs),
            in_process("step_jax", "flax", kind, shape, args.runs),
            in_process("step_torch", kind, shape, args.runs),
        )
        print(row(kind, shape, *sides), flush=True)


if __name__ == "__main__":
    main()
