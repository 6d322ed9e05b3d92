"""Time and memory of a Set Transformer's training step, against PyTorch.

    python -m benchmarks.sets [--runs 10]

The step is forward, backward and Adam on ten sets of n points in two dimensions, with
the published network for clustering (Lee et al. 2019): two ISABs of 32 inducing points
(or two SABs), PMA with four seeds, two SABs, a dense layer; width 128, four heads. The
PyTorch side is the published formulation, which holds keys, values and logits.

Every measurement has a process of its own, see `benchmarks.processes`. Linux only. Run
it on an idle machine; with `taskset -c 0` before it both sides have one core.
"""

import argparse
import math
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

# Kind of the blocks before the pooling, and the number of elements.
WORK = [("ISAB", 300), ("ISAB", 1000), ("ISAB", 5000), ("SAB", 300), ("SAB", 1000)]
NUM_BAGS, NUM_FEATURES, NUM_OUTPUTS = 10, 2, 4
HIDDEN_SIZE, NUM_HEADS, NUM_POINTS, NUM_SEEDS = 128, 4, 32, 4
LEARNING_RATE = 1e-3


def batch(n):
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((NUM_BAGS, n, NUM_FEATURES), np.float32)
    target = rng.standard_normal((NUM_BAGS, NUM_SEEDS, NUM_OUTPUTS), np.float32)
    return inputs, target


def step_jax(kind, n, runs):
    import jax
    import jax.numpy as jnp
    import optax

    from archs import MLP, SetTransformer

    model = SetTransformer(
        MLP((), NUM_OUTPUTS),
        hidden_size=HIDDEN_SIZE,
        num_heads=NUM_HEADS,
        num_inducing_points=NUM_POINTS if kind == "ISAB" else None,
        num_seeds=NUM_SEEDS,
        num_decoder_layers=2,
        per_seed=True,
        normalization=None,
        block="official",
    )
    optimizer = optax.adam(LEARNING_RATE)
    inputs, target = map(jnp.asarray, batch(n))
    variables = jax.jit(model.init)(jax.random.key(0), inputs)

    def step(state, inputs, target):
        variables, optimizer_state = state

        def loss(variables):
            return jnp.mean((model.apply(variables, inputs) - target) ** 2)

        value, gradient = jax.value_and_grad(loss)(variables)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        return (optax.apply_updates(variables, updates), optimizer_state), value

    state = variables, optimizer.init(variables)
    compiled, allocated = compile_jax(step, state, inputs, target, donate_argnums=0)

    def run():
        nonlocal state
        state, value = jax.block_until_ready(compiled(state, inputs, target))
        return value

    return {**measure(run, runs), "allocated": allocated}


def torch_network(kind):
    import torch
    from torch import nn

    class MAB(nn.Module):
        def __init__(self, d_q, d_k):
            super().__init__()
            self.query = nn.Linear(d_q, HIDDEN_SIZE)
            self.key = nn.Linear(d_k, HIDDEN_SIZE)
            self.value = nn.Linear(d_k, HIDDEN_SIZE)
            self.feedforward = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)

        def forward(self, x, y):
            def heads(z):
                return torch.cat(z.split(HIDDEN_SIZE // NUM_HEADS, 2), 0)

            q, k, v = heads(self.query(x)), heads(self.key(y)), heads(self.value(y))
            logits = q.bmm(k.transpose(1, 2)) / math.sqrt(HIDDEN_SIZE)
            out = q + torch.softmax(logits, 2).bmm(v)
            out = torch.cat(out.split(x.shape[0], 0), 2)
            return out + torch.relu(self.feedforward(out))

    class Shared(nn.Module):
        """Inducing points or seeds that attend to the elements."""

        def __init__(self, number, d):
            super().__init__()
            self.points = nn.Parameter(torch.empty(1, number, HIDDEN_SIZE))
            nn.init.xavier_uniform_(self.points)
            self.mab = MAB(HIDDEN_SIZE, d)

        def forward(self, x):
            return self.mab(self.points.repeat(len(x), 1, 1), x)

    class SAB(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.mab = MAB(d, d)

        def forward(self, x):
            return self.mab(x, x)

    class ISAB(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.summary = Shared(NUM_POINTS, d)
            self.mab = MAB(d, HIDDEN_SIZE)

        def forward(self, x):
            return self.mab(x, self.summary(x))

    layer = {"ISAB": ISAB, "SAB": SAB}[kind]
    return nn.Sequential(
        layer(NUM_FEATURES),
        layer(HIDDEN_SIZE),
        Shared(NUM_SEEDS, HIDDEN_SIZE),
        SAB(HIDDEN_SIZE),
        SAB(HIDDEN_SIZE),
        nn.Linear(HIDDEN_SIZE, NUM_OUTPUTS),
    )


def step_torch(kind, n, runs):
    import torch

    inputs, target = map(torch.tensor, batch(n))
    model = torch_network(kind)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)

    def run(n=n):
        torch.nn.functional.mse_loss(model(inputs[:, :n]), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    run(1)  # makes the optimizer's state, but does not yet take a step's memory
    return measure(run, runs)


MEASUREMENTS = {f.__name__: f for f in (step_jax, step_torch)}


in_process = partial(run_apart, __spec__.name)


def row(kind: str, n: int, ours: dict, theirs: dict) -> str:
    memory = max(ours["added"], ours["allocated"])
    cells = [
        f"{kind}, n = {n}",
        f"{ours['best']:.1f} / {ours['median']:.1f}",
        f"{theirs['best']:.1f} / {theirs['median']:.1f}",
        f"{ours['best'] / theirs['best']:.2f}",
        f"{ours['median'] / theirs['median']:.2f}",
        f"{ours['added']:.0f} ({ours['allocated']:.0f})",
        f"{theirs['added']:.0f}",
        f"{memory / theirs['added']:.2f}",
    ]
    return table_row(cells)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sets")
    parser.add_argument("--runs", type=int, default=10, help="timed runs of each")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        answer(args.measure, MEASUREMENTS)
        return
    header = [
        "training step",
        "ours, ms (best / median)",
        "PyTorch, ms",
        "ours / PyTorch (best)",
        "(median)",
        "ours, MB added (XLA)",
        "PyTorch, MB added",
        "ours / PyTorch",
    ]
    print_head(f"{args.runs} runs each", header)
    for kind, n in WORK:
        ours, theirs = (
            in_process(f"step_{side}", kind, n, args.runs) for side in ("jax", "torch")
        )
        print(row(kind, n, ours, theirs), flush=True)


if __name__ == "__main__":
    main()
