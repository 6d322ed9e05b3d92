"""Time and memory of the histograms and of HistNetQ's training step, against PyTorch.

    python -m benchmarks.histogram [--runs 10] [--steps]

The PyTorch side is the published formulation: grouped 1x1 convolutions that hold bag x
features x bins. Forward and backward are measured together and both results are kept.
Every measurement has a process of its own, see `benchmarks.processes`. Linux only. Run
it on an idle machine.
"""

import argparse
import functools
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

# [bag, element, feature] and the number of bins.
SHAPES = [((20, 250, 300), 32), ((4, 1000, 512), 64)]
# What is ours, and the published kind it stands against.
KINDS = [
    ("LinearHistogram", "SoftHistogram"),
    ("HardHistogram", "HardBinningHistogram"),
    ("SoftHistogram", "SoftHistogram"),
    ("RBFHistogram", "RBFHistogram"),
    ("SigmoidHistogram", "SigmoidHistogram"),
    ("HardBinningHistogram", "HardBinningHistogram"),
]
# Steps of LeQua 2022 as published; of T1B one of the twenty of an update.
STEPS = {
    "T1A": {
        "shape": (20, 250, 300),
        "hidden_sizes": (1024, 1024),
        "features": 300,
        "head_sizes": (2048,) * 3,
        "num_classes": 2,
    },
    "T1B": {
        "shape": (25, 1000, 300),
        "hidden_sizes": (1024,),
        "features": 512,
        "head_sizes": (4096,),
        "num_classes": 28,
    },
}
NUM_BINS = 32
DROPOUT_RATE, LEARNING_RATE, WEIGHT_DECAY = 0.5, 1e-4, 1e-5


def histogram_jax(kind, shape, num_bins, runs):
    import jax
    import jax.numpy as jnp

    from archs import histogram

    module = getattr(histogram, kind)(num_bins)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.random(shape, np.float32))
    cotangent = rng.standard_normal((shape[0], shape[2], num_bins), np.float32)
    variables = module.init(jax.random.key(0), x[:1, :1])

    def both(variables, x, cotangent):
        value, pullback = jax.vjp(module.apply, variables, x)
        return value, pullback(cotangent)

    args = variables, x, jnp.asarray(cotangent)
    compiled, allocated = compile_jax(both, *args)
    result = measure(lambda: jax.block_until_ready(compiled(*args)), runs)
    return {**result, "allocated": allocated}


def torch_histogram(kind, num_features, num_bins):
    """The published layer [bag, element, feature] -> [bag, feature * num_bins]."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    rows = num_features * num_bins

    class Histogram(nn.Module):
        def __init__(self):
            super().__init__()
            centers = (torch.arange(num_bins) + 0.5) / num_bins
            hard = kind == "HardBinningHistogram"
            width = 0.5 / num_bins + 0.001 if hard else 2.0 * num_bins
            learnable = kind != "SigmoidHistogram"
            self.negated = nn.Parameter(-centers.repeat(num_features), learnable)
            self.widths = nn.Parameter(torch.full((rows,), width), learnable)
            self.register_buffer("ones", torch.ones(rows, 1, 1))

        def forward(self, x):
            distance = F.conv1d(
                x.transpose(1, 2), self.ones, self.negated, groups=num_features
            )
            scale = functools.partial(F.conv1d, groups=rows)
            if kind == "SoftHistogram":
                ones = self.ones[:, 0, 0]
                slopes = -self.widths[:, None, None]
                votes = F.relu(scale(distance.abs(), slopes, ones))
            elif kind == "RBFHistogram":
                slopes = self.widths[:, None, None]
                votes = torch.exp(-(scale(distance.abs(), slopes) ** 2))
            elif kind == "HardBinningHistogram":
                reach = scale(distance.abs(), -self.ones, self.widths)
                votes = F.threshold(torch.pow(1.01, reach), 1, 0)
            else:
                half = 0.5 / num_bins
                votes = torch.sigmoid(1000 * (distance + half))
                votes = votes - torch.sigmoid(1000 * (distance - half))
            return votes.mean(2)

    return Histogram()


def histogram_torch(kind, shape, num_bins, runs):
    import torch

    layer = torch_histogram(kind, shape[2], num_bins)
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.random(shape, np.float32), requires_grad=True)
    cotangent = torch.tensor(
        rng.standard_normal((shape[0], shape[2] * num_bins), np.float32)
    )
    layer(x[:1, :1]).sum().backward()  # loads what PyTorch loads on first use

    def both():
        layer.zero_grad()
        x.grad = None
        layer(x).backward(cotangent)

    return measure(both, runs)


def batch(shape, num_classes):
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal(shape, np.float32)
    prevalence = rng.dirichlet([1] * num_classes, shape[0])
    return inputs, prevalence.astype(np.float32)


def step_jax(kind, name, runs):
    import jax
    import jax.numpy as jnp
    import optax

    from archs import histogram
    from archs.encoders import MLP
    from archs.histnetq import HistNetQ, PrevalenceHead

    sizes = STEPS[name]
    model = HistNetQ(
        encoder=MLP(sizes["hidden_sizes"], sizes["features"], DROPOUT_RATE),
        histogram=getattr(histogram, kind)(NUM_BINS),
        head=PrevalenceHead(sizes["head_sizes"], sizes["num_classes"], DROPOUT_RATE),
    )
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    inputs, prevalence = map(jnp.asarray, batch(sizes["shape"], sizes["num_classes"]))
    variables = jax.jit(model.init)(jax.random.key(0), inputs[:1])
    key = jax.random.key(1)

    def step(state, inputs, prevalence):
        variables, optimizer_state, count = state

        def loss(variables):
            rngs = {"dropout": jax.random.fold_in(key, count)}
            estimate = model.apply(variables, inputs, train=True, rngs=rngs)
            return jnp.mean(jnp.abs(estimate - prevalence))

        value, gradient = jax.value_and_grad(loss)(variables)
        updates, optimizer_state = optimizer.update(
            gradient, optimizer_state, variables
        )
        variables = optax.apply_updates(variables, updates)
        return (variables, optimizer_state, count + 1), value

    state = variables, optimizer.init(variables), jnp.zeros((), jnp.int32)
    compiled, allocated = compile_jax(step, state, inputs, prevalence, donate_argnums=0)

    def run():
        nonlocal state
        state, value = jax.block_until_ready(compiled(state, inputs, prevalence))
        return value

    run()
    return {**measure(run, runs), "allocated": allocated}


def step_torch(kind, name, runs):
    import torch
    from torch import nn

    def mlp(*sizes):
        layers = []
        for before, after in zip(sizes, sizes[1:-1], strict=False):
            layers += [nn.Linear(before, after), nn.LeakyReLU()]
            layers.append(nn.Dropout(DROPOUT_RATE))
        return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))

    sizes = STEPS[name]
    features, num_classes = sizes["features"], sizes["num_classes"]
    inputs, prevalence = map(torch.tensor, batch(sizes["shape"], num_classes))
    model = nn.Sequential(
        mlp(inputs.shape[-1], *sizes["hidden_sizes"], features),
        nn.Sigmoid(),
        torch_histogram(kind, features, NUM_BINS),
        mlp(features * NUM_BINS, *sizes["head_sizes"], num_classes),
        nn.Softmax(-1),
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )

    def run(num_bags=None):
        loss = nn.functional.l1_loss(model(inputs[:num_bags]), prevalence[:num_bags])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    run(1)  # makes the optimizer's state, without the memory of a step
    return measure(run, runs)


MEASUREMENTS = {
    f.__name__: f for f in (histogram_jax, histogram_torch, step_jax, step_torch)
}


in_process = functools.cache(partial(run_apart, __spec__.name))


def row(work: str, kinds: tuple[str, str], ours: dict, theirs: dict) -> str:
    cells = [
        work,
        *kinds,
        f"{ours['best']:.1f} / {ours['median']:.1f}",
        f"{theirs['best']:.0f} / {theirs['median']:.0f}",
        f"{theirs['best'] / ours['best']:.1f}",
        f"{theirs['median'] / ours['median']:.1f}",
        f"{ours['added']:.0f} ({ours['allocated']:.0f})",
        f"{theirs['added']:.0f}",
        f"{theirs['added'] / max(ours['added'], ours['allocated']):.1f}",
    ]
    return table_row(cells)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.histogram")
    parser.add_argument("--runs", type=int, default=10, help="timed runs of each")
    parser.add_argument("--steps", action="store_true", help="training steps alone")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        answer(args.measure, MEASUREMENTS)
        return
    header = [
        "forward + backward",
        "ours",
        "PyTorch",
        "ours, ms (best / median)",
        "PyTorch, ms",
        "times faster (best)",
        "(median)",
        "ours, MB added (XLA)",
        "PyTorch, MB added",
        "times less memory",
    ]
    print_head(f"{args.runs} runs each", header)
    for shape, num_bins in SHAPES if not args.steps else ():
        work = f"{' x '.join(map(str, shape))}, {num_bins} bins"
        for kinds in KINDS:
            ours, theirs = (
                in_process(f"histogram_{side}", kind, shape, num_bins, args.runs)
                for side, kind in zip(("jax", "torch"), kinds, strict=True)
            )
            print(row(work, kinds, ours, theirs), flush=True)
    for name in STEPS:
        for kinds in KINDS[:2]:
            ours = in_process("step_jax", kinds[0], name, args.runs)
            theirs = in_process("step_torch", "HardBinningHistogram", name, args.runs)
            pair = kinds[0], "HardBinningHistogram"
            work = f"HistNetQ, {name} training step"
            print(row(work, pair, ours, theirs), flush=True)


if __name__ == "__main__":
    main()
