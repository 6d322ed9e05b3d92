"""Time of the convolutions of the image encoders, against flax's and PyTorch's.

    taskset -c 0 python -m benchmarks.convolution [--runs 10]

One layer forward and backward, with the gradients of kernel, bias and, but for the
first layer of a network, inputs. Ours is `nn.Conv` with `archs.convolution.convolve`,
flax's is `nn.Conv` as it is; PyTorch has its own layout of the images (channels before
height). Every measurement has a process of its own, see `benchmarks.processes`.
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

# Images, height and width, channels, features, kernel size, stride; whether the layer
# is the first. HistNetQ's encoder, EMQNet's, and the one of unique characters.
WORK = [
    (512, 28, 1, 16, 5, 1, True),
    (512, 14, 16, 32, 5, 1, False),
    (128, 28, 1, 32, 3, 1, True),
    (128, 14, 32, 64, 3, 1, False),
    (320, 28, 1, 64, 3, 2, True),
    (320, 14, 64, 64, 3, 2, False),
]


def images(number, size, channels):
    rng = np.random.default_rng(0)
    return rng.standard_normal((number, size, size, channels), np.float32)


def step_jax(fast, number, size, channels, features, kernel, stride, first, runs):
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from archs.convolution import convolve

    ours = {"conv_general_dilated": convolve} if fast else {}
    layer = nn.Conv(features, (kernel, kernel), stride, **ours)
    x = jnp.asarray(images(number, size, channels))
    variables = layer.init(jax.random.key(0), x)

    def loss(variables, x):
        return jnp.square(layer.apply(variables, x)).sum()

    step = jax.value_and_grad(loss, argnums=0 if first else (0, 1))
    compiled, _ = compile_jax(step, variables, x)
    return measure(lambda: jax.block_until_ready(compiled(variables, x)), runs)


def step_torch(number, size, channels, features, kernel, stride, first, runs):
    import torch

    layer = torch.nn.Conv2d(channels, features, kernel, stride, padding=kernel // 2)
    x = torch.tensor(images(number, size, channels).transpose(0, 3, 1, 2).copy())
    x.requires_grad_(not first)

    def run():
        layer.zero_grad()
        x.grad = None
        layer(x).square().sum().backward()

    return measure(run, runs)


MEASUREMENTS = {
    "ours": partial(step_jax, True),
    "flax": partial(step_jax, False),
    "torch": step_torch,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convolution")
    parser.add_argument("--runs", type=int, default=10, help="timed runs of each")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        answer(args.measure, MEASUREMENTS)
        return
    header = [
        "images, size, channels, features, kernel, stride",
        "ours, ms (best / median)",
        "flax, ms",
        "PyTorch, ms",
        "ours / flax",
        "ours / PyTorch",
    ]
    print_head(f"{args.runs} runs each", header)
    for work in WORK:
        measured = {
            side: run_apart(__spec__.name, side, *work, args.runs)
            for side in MEASUREMENTS
        }
        best = {name: side["best"] for name, side in measured.items()}
        cells = [
            ", ".join(map(str, work[:6])) + (", first layer" if work[6] else ""),
            *(f"{m['best']:.1f} / {m['median']:.1f}" for m in measured.values()),
            f"{best['ours'] / best['flax']:.2f}",
            f"{best['ours'] / best['torch']:.2f}",
        ]
        print(table_row(cells), flush=True)


if __name__ == "__main__":
    main()
