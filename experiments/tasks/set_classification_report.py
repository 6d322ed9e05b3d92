"""Classified sets and elements in the report."""

from collections.abc import Mapping

import jax
import numpy as np
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score

from data import Spec
from experiments import figures
from experiments.report import Section

DRAWN_SETS = 6


def classification_sections(
    outputs: Mapping, first: Mapping, spec: Spec
) -> list[Section]:
    """Which classes are taken for which."""
    del first
    called = outputs["prediction"].argmax(-1)
    counts = confusion_matrix(
        outputs["target"], called, labels=range(len(spec.class_names))
    )
    return [
        Section(
            title="Confusion of the classes",
            text="In per cent of the sets of a class.",
            figure=figures.confusion(counts, spec.class_names),
        )
    ]


def element_classification_sections(
    outputs: Mapping, first: Mapping, spec: Spec
) -> list[Section]:
    """How well single elements are recognised, beside chance, and a few sets drawn."""
    del spec
    probabilities = element_probabilities(outputs)
    mask, target = outputs["mask"], outputs["target"]
    sought = np.arange(mask.shape[1]) == target[:, None]
    chance = float(np.mean(1 / mask.sum(1)))
    right = probabilities.argmax(1) == target
    rows = [
        ("accuracy", float(right.mean()), chance),
        ("AUROC", float(roc_auc_score(sought[mask], probabilities[mask])), 0.5),
        (
            "AUPR",
            float(average_precision_score(sought[mask], probabilities[mask])),
            float(sought[mask].mean()),
        ),
    ]
    result = [
        Section(
            title="Beside chance",
            text=f"{len(mask)} test sets. Accuracy counts the sets whose most probable "
            "element is the right one. AUROC and AUPR (average precision) rank the "
            "elements of all sets together by their probability.",
            table=[
                {"measure": name, "model": model, "chance": by_chance}
                for name, model, by_chance in rows
            ],
        )
    ]
    if first["inputs"].ndim == 5 and first["inputs"].shape[-1] in (1, 3):
        result.append(
            Section(
                title="Some sets",
                text="The probability of each element. A solid frame is around the "
                "right one, a dashed frame around a wrong guess.",
                figure=figures.image_sets(
                    first["inputs"][:DRAWN_SETS],
                    element_probabilities(first)[:DRAWN_SETS],
                    first["target"][:DRAWN_SETS],
                ),
            )
        )
    return result


def element_probabilities(outputs: Mapping) -> np.ndarray:
    """Probabilities [set, element] of being the element sought; zero at padding."""
    mask = outputs["mask"]
    scores = outputs["prediction"].reshape(mask.shape)
    return np.asarray(jax.nn.softmax(scores, axis=1, where=mask))
