"""Draws the picture of the README from a trained run.

    python -m docs.picture --workdir=/tmp/digits --output=docs/histnetq_digits.png

A test bag, the histograms of three learned features of it, and its prevalences.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

import data
from experiments import loop, runner
from experiments.predict import bag_interval


def main() -> None:
    """Draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    task, config = runner.load_run(options.workdir)
    _, state = loop.best_state(options.workdir, task, config.seed)
    indices, true, _ = task.evaluation_bags(state, "test")
    # The bag with the largest share of one class of the first hundred.
    number = int(true[:100].max(1).argmax())
    bag = task.dataset.splits["test"]["inputs"][indices[number]]
    estimate, low, high = bag_interval(task, state, bag, 200, jax.random.key(0))
    inputs = data.normalize(bag, task.dataset.shift, task.dataset.scale)[None]
    values = task.model.apply(state.variables, inputs, method="encode")
    histograms = np.asarray(
        task.model.apply(state.variables, values, method="aggregate")
    ).reshape(values.shape[-1], -1)
    figure = draw(bag, histograms, true[number], estimate, low, high)
    figure.savefig(options.output, dpi=150, bbox_inches="tight", facecolor="white")


def draw(
    bag: np.ndarray,
    histograms: np.ndarray,
    true: np.ndarray,
    estimate: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> Figure:
    """The bag's examples, three of its histograms, its prevalences, left to right.

    Args:
      bag: images [element, height, width, 1].
      histograms: [f, num_bins].
      true: prevalences [K].
      estimate: prevalences [K].
      low: lower ends of their intervals [K].
      high: upper ends [K].
    """
    figure = Figure(figsize=(10, 3.1))
    left, middle, right = figure.subfigures(1, 3, width_ratios=[3, 3, 4.4])
    for axes, image in zip(left.subplots(6, 6).flat, bag, strict=False):
        axes.imshow(image[..., 0], cmap="gray_r")
        axes.set_axis_off()
    left.suptitle(f"a bag of {len(bag)} digits", fontsize=10)
    # Features whose values are spread over the most bins say most to the eye.
    spread = np.argsort(-(histograms > 0.02).sum(1))[:3]
    for axes, feature in zip(middle.subplots(3, 1), spread, strict=True):
        axes.bar(range(histograms.shape[1]), histograms[feature], width=0.9)
        axes.set_yticks([])
        axes.set_xticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)
    middle.suptitle("a histogram per learned feature", fontsize=10)
    axes = right.subplots()
    classes = np.arange(len(true))
    axes.bar(classes - 0.2, true, 0.38, label="true", color="#b0b0b0")
    errors = np.maximum([estimate - low, high - estimate], 0)
    axes.bar(
        classes + 0.2,
        estimate,
        0.38,
        yerr=errors,
        label="estimated, 95 % interval",
        color="#0072b2",
        error_kw={"lw": 1},
    )
    axes.set_xticks(classes)
    axes.set_xlabel("digit")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    right.suptitle("the prevalence of each class", fontsize=10)
    return figure


if __name__ == "__main__":
    main()
