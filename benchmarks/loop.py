"""Steps of the shipped configs: alone, in the loop, and what sampling costs of them.

    python -m benchmarks.loop [--runs 5]

For each config: the time of one training step dispatched alone, of one step inside the
loop as it is compiled by `experiments.loop`, inside a `lax.scan` whatever the backend,
and of sampling its batch. Run it on an idle machine.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments import config as configs
from experiments import loop, runner

SHIPPED = [
    ("histnetq_digits", {}),
    ("deepsets_digits", {}),
    (
        "histnetq_digits",
        {"task.mixed_bags": "0", "task.num_bags": "20", "task.bag_size": "100"},
    ),
    ("histnetq_fashion_mnist", {}),
    ("deepsets_fashion_mnist", {}),
]


def best(run: Callable[[], object], runs: int) -> float:
    """Shortest time of `run`, in ms, after one call to compile."""
    jax.block_until_ready(run())
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def measure(variant: str, overrides: dict, runs: int) -> dict[str, float]:
    """Times in ms per step of one config."""
    file = f"experiments/configs/quantify.py:{variant}"
    config = configs.load(file, overrides)
    _, task, training = runner.build(config)
    length = training.steps_per_call
    key = jax.random.key(0)
    first = np.int32(0)
    state = loop.first_state(task, config.seed)

    sample = jax.jit(task.sample)

    def one(arrays, state, step):
        return task.train_step(state, task.sample(key, step, arrays), key)

    alone = jax.jit(one)
    scanned = jax.jit(
        lambda arrays, state: jax.lax.scan(
            partial(one, arrays), state, jnp.arange(length)
        )
    )
    run_steps = loop.compile_steps(task, config.seed, state, length)

    def in_loop():
        nonlocal state
        state, rows = run_steps(state, task.arrays, first)
        return state, rows

    times = {
        "sampling": best(lambda: sample(key, first, task.arrays), 10 * runs),
        "alone": best(lambda: alone(task.arrays, state, first), 4 * runs),
        "in a scan": best(lambda: scanned(task.arrays, state), runs) / length,
    }
    times["in the loop"] = best(in_loop, runs) / length
    return times


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    print(
        "| config | alone, ms | in the loop, ms | in a scan, ms | loop / alone "
        "| sampling, ms | sampling / step |\n|---|---|---|---|---|---|---|"
    )
    for variant, overrides in SHIPPED:
        times = measure(variant, overrides, options.runs)
        name = variant + (", bags as drawn" if overrides else "")
        print(
            f"| {name} | {times['alone']:.2f} | {times['in the loop']:.2f} "
            f"| {times['in a scan']:.2f} "
            f"| {times['in the loop'] / times['alone']:.2f} "
            f"| {times['sampling']:.2f} "
            f"| {100 * times['sampling'] / times['in the loop']:.1f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
