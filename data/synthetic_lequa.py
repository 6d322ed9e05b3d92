"""A synthetic dataset in the files of LeQua, for trying the way without the download.

    python -m data.synthetic_lequa --task=T1A --output=DIR

Documents are points of overlapping Gaussian classes. The bags of development and test
have prevalences uniform on the simplex, the labelled documents the classes' own
(T1A, T1B, T1, T2: prior probability shift). In T3 the classes lie in order on a line.
In T4 a feature that tells nothing of the class moves from bag to bag as well
(covariate shift). `data.LeQua(task, DIR)` reads what this writes.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.lequa import TASKS, write_prevalences

CLASSES = {"T1A": 2, "T1B": 28, "T1": 2, "T2": 28, "T3": 5, "T4": 2}
DIMENSIONS = {2022: 300, 2024: 256}
DOCUMENTS = {"T1A": 5000, "T1B": 20000, "T1": 5000, "T2": 20000, "T4": 5000}
TRAINING_BAGS = 100
# Standard deviation over bags of how far T4's extra feature moves.
COVARIATE_SHIFT = 1.0


def write(
    task: str,
    output: str | os.PathLike,
    *,
    dev_bags: int = 1000,
    test_bags: int = 5000,
    bag_size: int | None = None,
    dimensions: int | None = None,
    documents: int | None = None,
    num_classes: int | None = None,
    separation: float = 1.5,
    seed: int = 0,
) -> Path:
    """Writes the files of a task below `output`.

    The class means are random unit vectors times `separation` / sqrt(2), so that two
    of them are `separation` standard deviations of the noise apart, on average; in T3
    neighbouring classes are `separation` apart.

    Args:
        task: as in `data.LeQua`.
        output: gets TASK/public.
        dev_bags: number of development bags.
        test_bags: number of test bags; 0: no test files.
        bag_size: documents a bag; None: the task's own, as for all that follow.
        dimensions: of a document.
        documents: labelled documents; in T3 there are 100 bags of `bag_size`.
        num_classes: K.
        separation: see above.
        seed: of everything.

    Returns:
        The folder TASK/public.

    Raises:
        ValueError: an unknown task, or a number too low or NaN.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
    bag_size = TASKS[task].bag_size if bag_size is None else bag_size
    if dimensions is None:
        dimensions = DIMENSIONS[TASKS[task].edition]
    if documents is None:
        documents = DOCUMENTS.get(task, TRAINING_BAGS * bag_size)
    num_classes = CLASSES[task] if num_classes is None else num_classes
    for name, value, least in (
        ("dev_bags", dev_bags, 1),
        ("test_bags", test_bags, 0),
        ("bag_size", bag_size, 1),
        ("dimensions", dimensions, 1),
        ("documents", documents, 1),
        ("num_classes", num_classes, 2),
        ("separation", separation, 0),
        ("seed", seed, 0),
    ):
        if not value >= least:
            raise ValueError(f"{name} must be {least} or more, not {value}")

    rng = np.random.default_rng(seed)
    if task == "T3":
        direction = _unit(rng.normal(size=dimensions))
        means = separation * np.arange(num_classes)[:, None] * direction
    else:
        means = separation / np.sqrt(2)
        means = means * _unit(rng.normal(size=(num_classes, dimensions)))
    nuisance = _unit(rng.normal(size=dimensions))

    def draw(labels: np.ndarray) -> np.ndarray:
        moved = rng.normal() * COVARIATE_SHIFT if task == "T4" else 0
        noise = rng.normal(size=(len(labels), dimensions))
        return means[labels] + moved * nuisance + noise

    public = Path(output) / task / "public"
    public.mkdir(parents=True, exist_ok=True)
    names = [f"class{k}" for k in range(num_classes)]
    lines = [f"{name} {number}\n" for number, name in enumerate(names)]
    (public / "label_map.txt").write_text("".join(lines))
    own = rng.dirichlet(np.full(num_classes, 5.0))
    if task == "T3":
        _write_bags(public, "training", TRAINING_BAGS, bag_size, own, draw, rng, True)
    else:
        labels = rng.choice(num_classes, documents, p=own)
        _write_table(public / "training_data.txt", draw(labels), labels)
    for part, count in (("dev", dev_bags), ("test", test_bags)):
        if count:
            _write_bags(public, part, count, bag_size, own, draw, rng, False)
    return public


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _write_bags(
    public: Path,
    part: str,
    count: int,
    size: int,
    own: np.ndarray,
    draw: Callable,
    rng: np.random.Generator,
    labelled: bool,
) -> None:
    """PART_samples and PART_prevalences.txt; labelled bags are natural groups."""
    folder, rows = public / f"{part}_samples", []
    folder.mkdir(exist_ok=True)
    num_classes = len(own)
    for number in range(count):
        alpha = 10 * own if labelled else np.ones(num_classes)
        labels = rng.choice(num_classes, size, p=rng.dirichlet(alpha))
        rows.append(np.bincount(labels, minlength=num_classes) / size)
        _write_table(
            folder / f"{number}.txt", draw(labels), labels if labelled else None
        )
    write_prevalences(public / f"{part}_prevalences.txt", np.stack(rows))


def _write_table(path: Path, inputs: np.ndarray, labels: np.ndarray | None) -> None:
    header, formats, table = list(map(str, range(inputs.shape[1]))), "%.6g", inputs
    if labels is not None:
        header = ["label", *header]
        formats = ["%d", *["%.6g"] * inputs.shape[1]]
        table = np.column_stack([labels, inputs])
    np.savetxt(path, table, formats, ",", header=",".join(header), comments="")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--output", required=True)
    for name, default in (
        ("dev_bags", 1000),
        ("test_bags", 5000),
        ("bag_size", None),
        ("dimensions", None),
        ("documents", None),
        ("num_classes", None),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--separation", type=float, default=1.5)
    options = vars(parser.parse_args())
    try:
        public = write(options.pop("task"), options.pop("output"), **options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"Wrote {public}")


if __name__ == "__main__":
    main()
