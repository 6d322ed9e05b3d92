"""One bag of millions of elements through HistNetQ, in the memory of one chunk.

    python -m benchmarks.big_set [--elements 1_000_000 10_000_000] [--chunk_size 8192]

The elements are drawn chunk by chunk and never held together. Every size has a process
of its own, see `benchmarks.processes`. "Peak" is the largest resident memory of the
process, libraries included; "all elements" is what the elements alone would take. Linux
only. Run it on an idle machine.
"""

import argparse
import resource
import time

import numpy as np

from benchmarks.processes import answer, print_head, run_apart, table_row

FEATURES = 64
HIDDEN_SIZES, CODES, NUM_BINS, HEAD_SIZES, NUM_CLASSES = (128,), 64, 32, (256,), 10
POOL = 1 << 16


def measure(elements: int, chunk_size: int) -> dict[str, float]:
    """Time in seconds and peak resident memory in MB of one bag."""
    import jax

    from archs import MLP, HistNetQ, LinearHistogram, PrevalenceHead, apply_in_chunks

    model = HistNetQ(
        MLP(HIDDEN_SIZES, CODES),
        LinearHistogram(NUM_BINS),
        PrevalenceHead(HEAD_SIZES, NUM_CLASSES),
    )
    rng = np.random.default_rng(0)
    # Drawing every number anew would take longer than the network does.
    drawn = rng.standard_normal((POOL, FEATURES), np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), drawn[None, :2])

    def chunks(elements: int):
        for start in range(0, elements, chunk_size):
            yield drawn[rng.integers(0, POOL, min(chunk_size, elements - start))]

    def run(elements: int):
        return jax.block_until_ready(
            apply_in_chunks(model, variables, chunks(elements), chunk_size=chunk_size)
        )

    run(2 * chunk_size)  # compiles
    start = time.perf_counter()
    prevalence = run(elements)
    seconds = time.perf_counter() - start
    assert abs(float(prevalence.sum()) - 1) < 1e-5
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"seconds": seconds, "peak": peak}


def row(elements: int, result: dict[str, float]) -> str:
    cells = [
        f"{elements:,}",
        f"{result['seconds']:.1f}",
        f"{elements / result['seconds']:,.0f}",
        f"{result['peak']:,.0f}",
        f"{elements * FEATURES * 4 / 1e6:,.0f}",
    ]
    return table_row(cells)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.big_set")
    parser.add_argument(
        "--elements", type=int, nargs="+", default=[10**6, 10**7], help="sizes of bags"
    )
    parser.add_argument("--chunk_size", type=int, default=8192)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        answer(args.measure, {"bag": measure})
        return
    header = ["elements", "s", "elements/s", "peak, MB", "all elements, MB"]
    print_head(
        f"{FEATURES} features an element, chunks of {args.chunk_size:,} elements",
        header,
    )
    for elements in args.elements:
        result = run_apart(__spec__.name, "bag", elements, args.chunk_size)
        print(row(elements, result), flush=True)


if __name__ == "__main__":
    main()
