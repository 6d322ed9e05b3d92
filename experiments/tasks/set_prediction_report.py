"""What the report of a set prediction run shows besides the training curves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data import Spec
from experiments import figures
from experiments.report import Section
from experiments.tasks import clustering_report, set_classification_report
from experiments.tasks.groups import measures_by_size, size_groups


def sections(task: Any, state: Any, workdir: Path) -> list[Section]:
    """Sections of the report; writes `test_sets.npz` (sizes and measures).

    An objective has sections of its own where this module has a function
    `OBJECTIVE_sections(outputs, first, spec) -> list[Section]` of what
    `SetPrediction.evaluation_sets` returns, the outputs of all test sets and the first
    batch whole, and of the dataset's spec.

    Args:
      task: the run's `SetPrediction`.
      state: the trained state.
      workdir: the run's.
    """
    outputs, measures, first = task.evaluation_sets(state, "test")
    sizes = outputs["mask"].sum(1)
    np.savez_compressed(workdir / "test_sets.npz", size=sizes, **measures)
    table = measures_by_size(sizes, measures)
    centers = [sizes[group].mean() for group in size_groups(sizes)]
    columns = {
        name: [row[name.replace("_", " ")] for row in table] for name in measures
    }
    by_size = Section(
        title="Test sets by size",
        text=f"{len(sizes)} sets; means over the sets of a size.",
        figure=figures.measures_by_size(centers, columns) if len(table) > 1 else None,
        table=table,
    )
    own = globals().get(f"{task.objective}_sections")
    return [by_size, *(own(outputs, first, task.dataset.spec) if own else [])]


def absolute_error_sections(
    outputs: Mapping, first: Mapping, spec: Spec
) -> list[Section]:
    """True against predicted numbers, and how much of their variance is explained."""
    del first, spec
    true, predicted = outputs["target"].ravel(), outputs["prediction"].ravel()
    unexplained = np.square(predicted - true).mean() / max(true.var(), 1e-12)
    return [
        Section(
            title="True and predicted numbers",
            text=f"The mean squared error is {unexplained:.4g} of the variance "
            f"{true.var():.4g} of the true numbers, that is of the error of a model "
            "that always answers their mean.",
            figure=figures.predicted_numbers(true, predicted),
        )
    ]


squared_error_sections = digit_sum_sections = absolute_error_sections

mixture_sections = clustering_report.mixture_sections
classification_sections = set_classification_report.classification_sections
element_classification_sections = (
    set_classification_report.element_classification_sections
)
