"""What the report of a quantification run shows besides the training curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import data
from archs import HistNetQ
from data.lequa import write_prevalences
from experiments import baselines, figures
from experiments.progress import Progress
from experiments.report import Section
from experiments.tasks.prevalence import measure

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
            "CC, PCC, ACC, PACC, EMQ and EMQ-BCTS count what a classifier of the same "
            f"encoder says of each example (test accuracy {posteriors.accuracy:.4f}); "
            "its confusion and its calibration were estimated on the validation split."
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


def bag_sections(task: Any, state: Any, workdir: Path, seed: int) -> list[Section]:
    """Sections of the report of given bags.

    Writes `test_bags.npz` (truth and estimates) and, where there are test bags,
    `submission.csv`, their estimates in the form that LeQua's scorer reads. Where the
    test bags have no labels, the errors are those of the validation bags.

    Args:
      task: the run's `BagQuantification`.
      state: the trained state.
      workdir: the run's.
      seed: of the baselines' classifier.
    """
    if "test" in task.dataset.splits:
        write_prevalences(
            workdir / "submission.csv", task.evaluation_estimates(state, "test")
        )
    split = "test" if task.num_bags_of("test") else "validation"
    true = np.asarray(task.dataset.splits[split]["prevalence"])
    name = type(task.model).__name__
    by_method = {name: task.evaluation_estimates(state, split)}
    documents, note = task.dataset.documents, ""
    if task.baselines and documents is not None:
        classifier, classifier_state = baselines.fit_classifier(
            task.element_encoder,
            documents,
            workdir / "baseline_classifier",
            task.baseline_steps,
            seed,
            Progress(task.baseline_steps),
        )
        by_method |= baselines.bag_estimates(classifier, classifier_state, task, split)
        note = (
            " CC, PCC, ACC, PACC, EMQ and EMQ-BCTS count what a classifier of the same "
            f"encoder, trained on {documents.spec.sizes['train']} labelled documents, "
            f"says of each example; {name} has seen none of these labels."
        )
    np.savez_compressed(workdir / "test_bags.npz", true=true, **by_method)
    spec = task.dataset.spec
    mean = np.asarray(task.dataset.splits["train"]["prevalence"]).mean(0)
    result = [
        Section(
            title=f"Error on the {split} bags",
            text=f"{len(true)} bags of up to {task.bag_size} examples; mean ± standard "
            f"deviation over bags.{note}",
            table=error_table(
                by_method,
                true,
                task.bag_size,
                tuple(dict.fromkeys([task.loss, *task.measures])),
            ),
        ),
        Section(
            title="True and estimated prevalence",
            figure=figures.prevalence_diagonal(true, by_method[name], spec.class_names),
        ),
        Section(
            title="Error by shift from the mean of the training bags",
            figure=figures.error_by_shift(true, by_method, mean),
        ),
    ]
    if isinstance(task.model, HistNetQ) and documents is not None:
        histograms = class_histograms(task, state, documents.splits["validation"])
        result.append(
            Section(
                title="What the network learned: histograms of the classes",
                text="Of labelled documents of each class, in the features that tell "
                "the classes apart best.",
                figure=figures.learned_histograms(histograms, spec.class_names),
            )
        )
    return result


def error_table(
    by_method: Mapping[str, np.ndarray],
    true: np.ndarray,
    bag_size: int,
    names: Sequence[str] = ("absolute_error", "relative_absolute_error"),
) -> list[dict]:
    """A row per method: mean ± standard deviation of the measures named.

    The best by the first of them comes first.
    """
    rows = []
    for method, estimate in by_method.items():
        values = [np.asarray(measure(name, bag_size)(true, estimate)) for name in names]
        cells = {
            name.replace("_", " "): f"{value.mean():.4f} ± {value.std():.4f}"
            for name, value in zip(names, values, strict=True)
        }
        rows.append((values[0].mean(), method, cells))
    return [
        {"method": method, **cells}
        for _, method, cells in sorted(rows, key=lambda row: row[:2])
    ]


def class_histograms(
    task: Any, state: Any, split: Mapping[str, np.ndarray] | None = None
) -> np.ndarray:
    """Mean histograms of labelled examples of each class, [K, f, num_bins].

    Args:
      task: the run's.
      state: the trained state.
      split: "inputs" and "labels"; None: the test split of the task's dataset.
    """
    split = task.dataset.splits["test"] if split is None else split
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
