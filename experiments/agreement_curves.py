"""How far back a cell remembers the subject: accuracy of agreement against distance.

    for CELL in rnn gru lstm; do
      python run.py --config=experiments/configs/number_agreement.py:$CELL \
          --workdir=runs/agreement/$CELL
    done
    python -m experiments.agreement_curves --output=/tmp/agreement runs/agreement/*

The distance between the subject and its verb is counted in attractors, the nouns in
between that may have another number. Of several runs of a cell, such as other seeds,
the line is the mean and the band the range.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import figures
from experiments.cells import CELLS
from experiments.errors import UserError

FILE = "agreement.png"


def read(workdir: Path) -> tuple[str, dict[int, float]]:
    """The cell of a run, and its accuracy by the number of attractors.

    Raises:
      UserError: there is no finished run of `number_agreement.py`.
    """
    try:
        config = json.loads((workdir / "config.json").read_text())
        with np.load(workdir / "test_sequences.npz") as found:
            attractors, accuracy = found["attractors"], found["accuracy"]
        cell = config["model"]["stack"]["cell"]
    except (OSError, KeyError) as error:
        raise UserError(
            f"{workdir} has no finished run of number_agreement.py ({error})."
        ) from error
    names = [name for name, fields in CELLS.items() if fields.items() <= cell.items()]
    return max(names, key=lambda name: len(CELLS[name])), {
        int(number): float(accuracy[attractors == number].mean())
        for number in np.unique(attractors)
    }


def curves(workdirs: Sequence[Path]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The runs by cell.

    Returns:
      {cell: (numbers of attractors [distance], accuracies [run, distance])}, NaN where
      a run has no such sentence; in the order of `cells.CELLS`.
    """
    runs: dict[str, list[dict[int, float]]] = {name: [] for name in CELLS}
    for workdir in workdirs:
        name, accuracy = read(workdir)
        runs[name].append(accuracy)
    found = {}
    for name, accuracies in runs.items():
        if accuracies:
            numbers = sorted(set().union(*accuracies))
            rows = [[row.get(n, np.nan) for n in numbers] for row in accuracies]
            found[name] = np.array(numbers), np.array(rows)
    return found


def main() -> int:
    """Writes the picture and prints its numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, type=Path, help="folder to write to")
    parser.add_argument("workdirs", nargs="+", type=Path, help="of finished runs")
    options = parser.parse_args()
    try:
        found = curves(options.workdirs)
    except UserError as error:
        parser.error(str(error))
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / FILE
    figures.accuracy_by_distance(
        found, "attractors between subject and verb", chance=0.5
    ).savefig(path, dpi=200, facecolor="white")
    for name, (numbers, accuracies) in found.items():
        means = np.nanmean(accuracies, 0)
        told = "  ".join(f"{n}: {m:.3f}" for n, m in zip(numbers, means, strict=True))
        print(f"{name:<10} {len(accuracies)} runs  {told}")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
