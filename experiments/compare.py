"""Trains models side by side, several seeds each, and writes the table of results.

    python -m experiments.compare --dataset=digits --workdir=/tmp/compare

Each run is `run.py` with `configs/quantify.py` and the overrides of `MODELS`. Rows that
end in "sparsemax" have the head and the mixtures of that config, the others the
published softmax and mixtures of nearly the prevalences drawn. The seed sets the split
of the dataset, the initial weights and the batches. The classical
methods use a classifier of the same encoder and are trained once a seed. Runs that are
complete in the workdir are not repeated.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from archs import quantification as measures_of
from experiments.errors import UserError

ROOT = Path(__file__).parent.parent
IMAGES = ("mnist", "fashion_mnist")


def _histogram(name: str) -> dict:
    return {"config.model.histogram.name": name}


def _aggregation(aggregation: str | tuple) -> dict:
    return {"config.model.aggregation": aggregation}


# Row of the table -> (variant of configs/quantify.py without the dataset, overrides).
MODELS: dict[str, tuple[str, Mapping]] = {
    "HistNetQ, linear binning": ("histnetq", {}),
    "HistNetQ, hard votes, linear backward": ("histnetq", _histogram("HardHistogram")),
    "HistNetQ, soft (Wang 2016)": ("histnetq", _histogram("SoftHistogram")),
    "HistNetQ, soft-RBF (Peeples 2020)": ("histnetq", _histogram("RBFHistogram")),
    "HistNetQ, sigmoid": ("histnetq", _histogram("SigmoidHistogram")),
    "HistNetQ, hard binning (Yusuf 2020)": (
        "histnetq",
        _histogram("HardBinningHistogram"),
    ),
    "DeepSets, mean": ("deepsets", _aggregation("mean")),
    "DeepSets, median": ("deepsets", _aggregation("median")),
    "DeepSets, max": ("deepsets", _aggregation("max")),
    "GMNet": ("gmnet", {}),
    "SetTransformer": ("set_transformer", {}),
    "HistNetQ, linear binning, sparsemax": ("histnetq", {}),
    "HistNetQ, cubic B-splines, sparsemax": ("histnetq", _histogram("CubicHistogram")),
    "HistNetQ, learned bins, sparsemax": ("histnetq", _histogram("AdaptiveHistogram")),
    "HistNetQ, cumulative, sparsemax": (
        "histnetq",
        _histogram("CumulativeHistogram")
        | {
            "config.model.histogram.histogram.name": "LinearHistogram",
            "config.model.histogram.histogram.num_bins": 16,
        },
    ),
    "DeepSets, mean, sparsemax": ("deepsets", {}),
    "DeepSets, five quantiles, sparsemax": (
        "deepsets",
        _aggregation((0.1, 0.25, 0.5, 0.75, 0.9)),
    ),
    "DeepSets, mean, std, min and max, sparsemax": (
        "deepsets",
        _aggregation(("mean", "std", "min", "max")),
    ),
    "GMNet, sparsemax": ("gmnet", {}),
    "SetTransformer, sparsemax": ("set_transformer", {}),
    "HistNetQ, linear binning, bags as drawn": ("histnetq", {}),
    "HistNetQ, hard binning, bags as drawn": (
        "histnetq",
        _histogram("HardBinningHistogram"),
    ),
    "DeepSets, mean, bags as drawn": ("deepsets", {}),
}


def overrides_of(row: str, dataset: str) -> dict:
    """What a row changes in its variant's config on a dataset.

    "As drawn" learns from bags as they are drawn instead of mixtures of examples: 2,000
    steps of 20 bags of 100, which encodes about four times as many examples. Rows
    without sparsemax have the published softmax, mixtures of nearly the prevalences
    drawn and, of images, 64 of them a step; aggregations that are no means 16, as
    mixtures then cost more than a product of matrices.
    """
    variant, changed = MODELS[row]
    overrides = dict(changed)
    if not row.endswith("sparsemax"):
        head = "rho" if variant == "deepsets" else "head"
        overrides[f"config.model.{head}.output_activation"] = "softmax"
        overrides["config.task.mixture_sharpness"] = 1.0
        if dataset in IMAGES and variant != "set_transformer":
            overrides["config.task.mixed_bags"] = 64
    if row.endswith("as drawn"):
        overrides |= {
            "config.task.num_bags": 20,
            "config.task.bag_size": 100,
            "config.task.mixed_bags": 0,
            "config.training.num_steps": 2000,
        }
    elif (
        dataset in IMAGES and changed.get("config.model.aggregation", "mean") != "mean"
    ):
        overrides["config.task.mixed_bags"] = 16
    return overrides


def main() -> int:
    """Runs what is missing and prints the table as markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--only", help="rows that contain this text")
    options, overrides = parser.parse_known_args()
    # Bags of images as drawn would take hours on a CPU.
    models = {
        row: model
        for row, model in MODELS.items()
        if (options.only or "") in row
        and not (options.dataset in IMAGES and row.endswith("as drawn"))
    }
    runs = [
        (row, seed, options.workdir / options.dataset / f"{_slug(row)}_{seed}")
        for seed in range(options.seeds)
        for row in models
    ]

    def run(job):
        row, seed, workdir = job
        # The first row trains the classifier of the classical methods for its seed.
        baselines = row == next(iter(models))
        variant, fields = models[row][0], overrides_of(row, options.dataset)
        return _run(
            options.dataset, variant, fields, seed, workdir, baselines, overrides
        )

    with ThreadPoolExecutor(options.parallel) as pool:
        codes = list(pool.map(run, runs))
    if any(codes):
        failed = [str(job[2]) for job, code in zip(runs, codes, strict=True) if code]
        print(f"failed, see log.txt there: {', '.join(failed)}", file=sys.stderr)
        return 1
    print(table([(row, workdir) for row, _, workdir in runs]))
    return 0


def _slug(row: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in row.lower())


def _run(dataset, variant, fields, seed, workdir, baselines, overrides) -> int:
    if (workdir / "evaluation.json").exists():
        return 0
    settings = {
        "config.seed": seed,
        "config.dataset.split_seed": seed,
        "config.task.baselines": baselines,
        **fields,
    }
    workdir.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        f"--config={ROOT}/experiments/configs/quantify.py:{variant}_{dataset}",
        f"--workdir={workdir}",
        *(f"--{field}={value}" for field, value in settings.items()),
        *overrides,
    ]
    with (workdir / "log.txt").open("a") as log:
        log.write(" ".join(command) + "\n")
        log.flush()
        return subprocess.call(command, stdout=log, stderr=subprocess.STDOUT)


def table(runs: list[tuple[str, Path]]) -> str:
    """Markdown: mean ± standard deviation over seeds of the mean AE and RAE of bags.

    Args:
      runs: (row, workdir) of complete runs, the seeds of a row among them.

    Raises:
      UserError: when a workdir lacks its `test_bags.npz`.
    """
    errors: dict[str, list] = {}
    for row, workdir in runs:
        path = workdir / "test_bags.npz"
        if not path.exists():
            raise UserError(f"{path} is missing: run the model first.")
        config = json.loads((workdir / "config.json").read_text())
        model, task = config["model"]["name"], config["task"]
        epsilon = 1 / (2 * (task["evaluation_bag_size"] or task["bag_size"]))
        with np.load(path) as bags:
            true = bags["true"]
            methods = {
                (row if name == model else name): bags[name]
                for name in bags.files
                if name != "true"
            }
        for method, estimate in methods.items():
            absolute = measures_of.absolute_error(true, estimate)
            relative = measures_of.relative_absolute_error(
                true, estimate, epsilon=epsilon
            )
            means = float(absolute.mean()), float(relative.mean())
            errors.setdefault(method, []).append(means)
    lines = ["| method | AE | RAE | seeds |", "|---|---|---|---|"]
    for method, values in sorted(errors.items(), key=lambda kv: np.mean(kv[1], 0)[0]):
        (ae, rae), (ae_std, rae_std) = np.mean(values, 0), np.std(values, 0)
        lines.append(
            f"| {method} | {ae:.4f} ± {ae_std:.4f} | {rae:.3f} ± {rae_std:.3f} "
            f"| {len(values)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
