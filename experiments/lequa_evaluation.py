"""The errors of a submission to LeQua, as the organisers' scorer computes them.

    python -m experiments.lequa_evaluation TASK TRUE PREDICTED

TRUE is the organisers' `test_prevalences.txt` (or `dev_prevalences.txt`), PREDICTED a
submission: the `submission.csv` that a run of `BagQuantification` leaves in its workdir
when it is done, or when `run.py --mode=eval` evaluates it anew. T3 is measured by the
normalised match distance (MNMD) and its macro average, all else by relative (MRAE) and
absolute (MAE) errors.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import data
from archs import quantification as measures_of
from data.lequa import TASKS, read_prevalences

STARS = np.arange(1, 6)


def evaluate(
    task: str, true: np.ndarray, estimate: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over bags of the official measures of a task.

    macro-NMD is the mean, over the four bins [1, 2), [2, 3), [3, 4) and [4, 5) of a
    bag's mean star, of the bins' mean NMD, and its deviation is over the bins. As in
    the official scorer, a bin without bags counts as 0, and a bag of five stars only is
    in none.

    Args:
      task: T1A, T1B, T1, T2, T3 or T4; decides the measures and the smoothing 1/(2m).
      true: prevalences [n, K].
      estimate: prevalences [n, K].

    Returns:
      {"MRAE", "MAE"} or, of T3, {"macro-NMD", "MNMD"}: (mean, standard deviation).

    Raises:
      data.DataError: an unknown task, arrays that do not fit each other, or, of T3,
        another number of classes than five.
    """
    if task not in TASKS:
        raise data.DataError(f"TASK must be one of {', '.join(TASKS)}, not {task!r}.")
    if true.shape != estimate.shape:
        raise data.DataError(
            f"TRUE holds {true.shape[0]} bags of {true.shape[1]} classes, PREDICTED "
            f"{estimate.shape[0]} of {estimate.shape[1]}."
        )
    if task == "T3":
        if true.shape[1] != len(STARS):
            raise data.DataError(f"T3 has {len(STARS)} classes, not {true.shape[1]}.")
        values = _measure(measures_of.normalized_match_distance, true, estimate)
        bins = np.digitize((STARS * true).sum(1), STARS)
        macro = np.array(
            [values[bins == k].mean() if (bins == k).any() else 0.0 for k in STARS[:-1]]
        )
        errors = {"macro-NMD": macro, "MNMD": values}
    else:
        epsilon = 1 / (2 * TASKS[task].bag_size)
        relative = partial(measures_of.relative_absolute_error, epsilon=epsilon)
        errors = {
            "MRAE": _measure(relative, true, estimate),
            "MAE": _measure(measures_of.absolute_error, true, estimate),
        }
    return {
        name: (float(np.mean(values)), float(np.std(values)))
        for name, values in errors.items()
    }


def _measure(measure: Callable, true: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    # The scorer prints five decimals of sums of thousands of numbers.
    with jax.enable_x64(True):
        return np.asarray(measure(jnp.asarray(true), jnp.asarray(estimate)))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.lequa_evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", metavar="TASK")
    parser.add_argument("true", metavar="TRUE", type=Path)
    parser.add_argument("predicted", metavar="PREDICTED", type=Path)
    options = parser.parse_args(argv)
    try:
        true, estimate = map(read_prevalences, (options.true, options.predicted))
        errors = evaluate(options.task, true, estimate)
    except data.DataError as error:
        print(f"lequa_evaluation: {error}", file=sys.stderr)
        return 1
    for name, (mean, deviation) in errors.items():
        print(f"{name}: {mean:.5f} ~ {deviation:.5f}")
    if len(true) not in (1000, 5000):
        print(
            f"note: the official scorer takes 1,000 or 5,000 bags, not {len(true)}.",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
