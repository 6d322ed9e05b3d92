"""Bags of examples labelled by the prevalences of the classes in them, and no more."""

import dataclasses

import numpy as np

from data.datasets import Dataset, Spec

# What the prevalences of a bag may lack to one: they were written with few digits.
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Bags:
    """Arrays of bags and their spec.

    Attributes:
        spec: the `Spec`; its sizes count bags.
        splits: "train", "validation" and, where there is one, "test", each with
            "inputs": [n, m, *feature_shape], n bags of m examples; a memory-mapped
                array is read where it is, a batch at a time, by evaluations;
            "prevalence": float32 [n, K], rows sum to one; the test split may lack it;
            "sizes": int32 [n], where bags differ in size: the examples of a bag, which
                come first among its m rows, the others being padding.
        shift: float32, broadcasts to `feature_shape`; see `normalize`.
        scale: float32, broadcasts to `feature_shape`.
        documents: labelled examples of the same kind, with the splits "train" and
            "validation", for methods that learn from those; None: there are none.

    Raises:
        ValueError: an array is missing, or its shape or values are not as above.
    """

    spec: Spec
    splits: dict[str, dict[str, np.ndarray]]
    shift: np.ndarray
    scale: np.ndarray
    documents: Dataset | None = None

    def __post_init__(self):
        for name in ("train", "validation"):
            if name not in self.splits or "prevalence" not in self.splits[name]:
                raise ValueError(
                    f'splits must hold "{name}", with "inputs" and "prevalence"'
                )
        for name, split in self.splits.items():
            _check_split(name, split, self.spec)


def _check_split(name: str, split: dict[str, np.ndarray], spec: Spec) -> None:
    shape = split["inputs"].shape
    if len(shape) < 2 or 0 in shape[:2] or shape[2:] != tuple(spec.feature_shape):
        raise ValueError(
            f"inputs of the {name} split must have the shape [bags, examples, "
            f"{', '.join(map(str, spec.feature_shape))}], not {list(shape)}"
        )
    expected = (shape[0], spec.num_classes)
    prevalence = np.asarray(split.get("prevalence", np.ones(expected) / expected[1]))
    if prevalence.shape != expected:
        raise ValueError(
            f"prevalence of the {name} split must have the shape {list(expected)} "
            f"(bags, classes), not {list(prevalence.shape)}"
        )
    # Written so that NaN fails.
    wrong = ~((prevalence >= 0).all(1) & (abs(prevalence.sum(1) - 1) <= TOLERANCE))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"prevalence of the {name} split: row {row} must hold numbers of 0 or more "
            f"that sum to one, not {prevalence[row].tolist()}"
        )
    sizes = np.asarray(split.get("sizes", np.full(shape[0], shape[1])))
    if sizes.shape != shape[:1] or sizes.min() < 1 or sizes.max() > shape[1]:
        raise ValueError(
            f"sizes of the {name} split must be {shape[0]} numbers between 1 and "
            f"{shape[1]}, the length of the bags"
        )
