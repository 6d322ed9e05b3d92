"""What the report of a quantification run shows besides the training curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import data
from archs import HistNetQ
from archs import quantification as measures_of
from experiments import baselines, figures
from experiments.progress import Progress
from experiments.report import Section

# Examples of each class from which its learned histograms are drawn.
EXAMPLES_PER_CLASS = 500


def sections(task: Any, state: Any, workdir: Path, seed: int) -> list[Section]:
    """Sections of the report; writes `test_bags.npz` (truth and estimates).

    Args:
      task: the run's `Quantification`.
      state: the trained state.
      workdir: the run's.
      seed: of the baselines' classifier.
    """
    indices, true, estimate = task.evaluation_bags(state, "test")
    name = type(task.model).__name__
    by_method = {name: estimate}
    note = ""
    if task.baselines:
        posteriors = baselines.train_classifier(
            task.element_encoder,
            task.dataset,
            workdir / "baseline_classifier",
            task.baseline_steps,
            seed,
            Progress(task.baseline_steps),
        )
        by_method |= baselines.estimates(posteriors, task.dataset, indices)
        note = (
            "CC, PCC, ACC, PACC and EMQ count what a classifier of the same encoder "
            f"says of each example (test accuracy {posteriors.accuracy:.4f}); its "
            "confusion was estimated on the validation split."
        )
    np.savez_compressed(workdir / "test_bags.npz", true=true, **by_method)
    spec = task.dataset.spec
    table = error_table(by_method, true, task.size_at_evaluation)
    result = [
        Section(
            title="Test error, beside classical methods" if note else "Test error",
            text=f"{len(true)} bags of {task.size_at_evaluation} examples; mean ± "
            f"standard deviation over bags. {note}",
            table=table,
        ),
        Section(
            title="True and estimated prevalence",
            figure=figures.prevalence_diagonal(true, by_method[name], spec.class_names),
        ),
        Section(
            title="Error by shift from the training prevalence",
            figure=figures.error_by_shift(true, by_method, task.natural_prevalence),
        ),
    ]
    if isinstance(task.model, HistNetQ):
        result.append(
            Section(
                title="What the network learned: histograms of the classes",
                text="Of each class's test examples, in the features that tell the "
                "classes apart best.",
                figure=figures.learned_histograms(
                    class_histograms(task, state), spec.class_names
                ),
            )
        )
    return result


def error_table(
    by_method: Mapping[str, np.ndarray], true: np.ndarray, bag_size: int
) -> list[dict]:
    """A row per method: mean ± standard deviation of AE and RAE, best first."""
    rows = []
    for name, estimate in by_method.items():
        absolute = np.asarray(measures_of.absolute_error(true, estimate))
        relative = np.asarray(
            measures_of.relative_absolute_error(
                true, estimate, epsilon=1 / (2 * bag_size)
            )
        )
        rows.append((absolute.mean(), name, absolute, relative))
    return [
        {
            "method": name,
            "absolute error": f"{absolute.mean():.4f} ± {absolute.std():.4f}",
            "relative absolute error": f"{relative.mean():.4f} ± {relative.std():.4f}",
        }
        for _, name, absolute, relative in sorted(rows, key=lambda row: row[:2])
    ]


def class_histograms(task: Any, state: Any) -> np.ndarray:
    """Mean histograms of the test examples of each class, [K, f, num_bins]."""
    split = task.dataset.splits["test"]
    features = jax.jit(
        lambda variables, bag: task.model.apply(
            variables,
            task.model.apply(variables, bag, method="encode"),
            method=_histogram,
        )
    )
    rows: Sequence[np.ndarray] = []
    for label in range(task.dataset.spec.num_classes):
        members = np.flatnonzero(split["labels"] == label)
        # One shape for all classes: fewer examples are repeated.
        bag = np.resize(members, EXAMPLES_PER_CLASS) if len(members) else [0]
        inputs = data.normalize(
            split["inputs"][bag], task.dataset.shift, task.dataset.scale
        )
        rows.append(np.asarray(features(state.variables, inputs[None]))[0])
    return np.stack(rows)


def _histogram(model: HistNetQ, values: jax.Array) -> jax.Array:
    return model.histogram(values)
