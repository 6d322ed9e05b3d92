"""Our networks beside the methods of QuaPy, on the same test bags.

    OPENBLAS_NUM_THREADS=1 python -m experiments.quapy_comparison \\
        --workdir=/tmp/quapy --text_dir=DIR --mnist_dir=DIR

A seed splits each dataset, stratified, into 60 % to learn from and 40 % to draw test
bags from: bags of 100 under QuaPy's UPP (prevalences uniform on the simplex), the same
for every method. All methods see the same features, standardised on the training part:

* `digits`, `breast_cancer`, `wine`: as scikit-learn has them;
* `mnist`, `fashion_mnist`: all 70,000 images, averaged over squares of 2 x 2 to 196
  features; of the training part 5,000 examples, drawn stratified;
* `sentence_polarity` (Pang & Lee, ACL 2005): TF-IDF and truncated SVD to 300 features,
  fitted on the training part alone.

QuaPy's methods count what a `LogisticRegression(max_iter=1000)` says, adjusted by
posteriors of five-fold cross-validation as QuaPy makes them. The networks share an
encoder and, but for EMQNet, a head; EMQNet learns from the labels of the examples, the
others from prevalences of mixtures of them. EMQNet's settings follow the number of
examples to learn from: for fewer than 1,000 they are those of
`configs/quantify.py:emqnet_breast_cancer`, a small classifier of examples with noise
and no calibration; otherwise five classifiers, calibrated from bags.

Results are files in the workdir, one a method, dataset and seed; what is there is not
repeated. The table ends with a test of significance: see `significance`.
"""

import argparse
import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from quapy.data import LabelledCollection
from quapy.evaluation import prediction
from quapy.method.aggregative import ACC, CC, EMQ, PACC, PCC, DMy, HDy, KDEyML
from quapy.protocol import UPP
from scipy import stats
from sklearn.decomposition import TruncatedSVD
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import data
from archs import quantification as measures_of
from experiments.errors import UserError
from experiments.quantifier import HISTNETQ, Quantifier
from experiments.runner import write_json

TRAIN_SHARE = 0.6
LARGEST_TRAIN = 5000
TEXT_FEATURES = 300
TEXT = "sentence_polarity"
DATASETS = ("digits", "breast_cancer", "wine", "mnist", "fashion_mnist", TEXT)
DEFAULT_DATASETS = tuple(name for name in DATASETS if name != "wine")

DEEPSETS = {
    "name": "DeepSets",
    "phi": HISTNETQ["encoder"],
    "rho": HISTNETQ["head"],
    "aggregation": "mean",
}
SET_TRANSFORMER = {
    "name": "SetTransformer",
    "encoder": HISTNETQ["encoder"],
    "head": HISTNETQ["head"],
    "hidden_size": 64,
    "num_layers": 1,
    "num_inducing_points": 16,
}
EMQNET = {
    "name": "EMQNet",
    "encoder": HISTNETQ["encoder"] | {"dropout_rate": 0.5},
    "num_members": 5,
}
FEW_EXAMPLES = 1000
EMQNET_OF_FEW = {
    "name": "EMQNet",
    "encoder": EMQNET["encoder"] | {"hidden_sizes": (64,)},
    "num_members": 1,
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a method may depend on.

    Attributes:
      num_classes: K.
      bag_size: examples of a test bag.
      seed: of the split, and of what is random in the method.
      num_steps: training steps of a network.
      num_examples: to learn from.
    """

    num_classes: int
    bag_size: int
    seed: int
    num_steps: int
    num_examples: int


def _network(model: Mapping, **fields) -> Callable[[Problem], Quantifier]:
    return lambda problem: Quantifier(
        model,
        **{"num_steps": problem.num_steps} | fields,
        evaluation_bag_size=problem.bag_size,
        seed=problem.seed,
    )


def _emqnet(problem: Problem) -> Quantifier:
    fields = {
        "num_steps": 600,
        "learning_rate": 2e-3,
        "warmup_steps": 100,
        "weight_decay": 1.0,
        "mixed_bags": 32,
    }
    if problem.num_examples >= FEW_EXAMPLES:
        return _network(EMQNET, **fields, validation_fraction=0.1)(problem)
    # The few examples of the validation share choose no checkpoint: the last is kept.
    fields |= {"validation_fraction": 0.03, "evaluations": 1}
    task = {"noise": 0.3, "natural_examples": True, "bag_weight": 0.0}
    return _network(EMQNET_OF_FEW, **fields, task=task)(problem)


def _classifier() -> LogisticRegression:
    return LogisticRegression(max_iter=1000)


def _matching(problem: Problem) -> DMy | HDy:
    # One against all, HDy is no match for a multiclass method.
    return (HDy if problem.num_classes == 2 else DMy)(_classifier())


# Row of the table -> what makes the quantifier, with `fit(X, y)` and `predict(X)`.
METHODS: dict[str, Callable] = {
    "HistNetQ": _network(HISTNETQ),
    "DeepSets": _network(DEEPSETS),
    # Attention costs more than a product of matrices: fewer mixtures a step.
    "SetTransformer": _network(SET_TRANSFORMER, mixed_bags=16),
    "EMQNet": _emqnet,
    "CC": lambda _: CC(_classifier()),
    "PCC": lambda _: PCC(_classifier()),
    "ACC": lambda _: ACC(_classifier()),
    "PACC": lambda _: PACC(_classifier()),
    "HDy/DMy": _matching,
    "EMQ": lambda _: EMQ(_classifier()),
    "EMQ-BCTS": lambda _: EMQ.EMQ_BCTS(_classifier()),
    "KDEy-ML": lambda problem: KDEyML(_classifier(), random_state=problem.seed),
}
MEASURES = {"AE": "absolute_error", "RAE": "relative_absolute_error"}


def main(argv: Sequence[str] | None = None) -> int:
    """Computes what is missing; prints the tables and the test of significance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--datasets", default=",".join(DEFAULT_DATASETS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--bags", type=int, default=1000, help="test bags")
    parser.add_argument("--bag_size", type=int, default=100)
    parser.add_argument("--steps", type=int, default=2000, help="but of EMQNet 600")
    parser.add_argument("--text_dir", type=Path, help=f"the folder of {TEXT}.zip")
    parser.add_argument("--mnist_dir", type=Path, help="the folder of MNIST's files")
    options = parser.parse_args(argv)
    try:
        _run(options)
    except UserError as error:
        print(f"quapy_comparison: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    names = _chosen("--datasets", options.datasets.split(","), DATASETS)
    methods = _chosen("--methods", options.methods.split(","), METHODS)
    for field in ("seeds", "bags", "bag_size", "steps"):
        if getattr(options, field) < 1:
            raise UserError(f"--{field} must be 1 or more.")
    _check_same_settings(options)
    results = []
    for name in names:
        missing = [
            (seed, method)
            for seed in range(options.seeds)
            for method in methods
            if not _file(options.workdir, name, method, seed).exists()
        ]
        try:
            examples = load_examples(name, options) if missing else None
        except (UserError, data.DataError) as error:
            print(f"{name} is skipped: {error}", file=sys.stderr)
            continue
        for seed, method in missing:
            result = evaluate(method, name, examples, seed, options)
            print(
                f"{name}, seed {seed}, {method}: AE {result['AE']:.4f}, "
                f"RAE {result['RAE']:.3f} ({result['seconds']:.0f} s)",
                file=sys.stderr,
                flush=True,
            )
            write_json(_file(options.workdir, name, method, seed), result)
        results += [
            json.loads(_file(options.workdir, name, method, seed).read_text())
            for seed in range(options.seeds)
            for method in methods
        ]
    if not results:
        raise UserError("no dataset is left to compare on.")
    print("\n\n".join(f"{name}\n\n{table(results, name)}" for name in MEASURES))
    errors = blocks(results)
    if len(errors) > 1 and len(next(iter(errors.values()))) > 1:
        print(f"\n{significance(errors)}")
        path = options.workdir / "ranks.png"
        diagram(errors, path)
        print(f"Mean ranks: {path}")


def _chosen(flag: str, given: Sequence[str], known: Sequence[str]) -> list[str]:
    for name in given:
        if name not in known:
            raise UserError(
                f"{flag}: there is no {name!r}; choose from {', '.join(known)}."
            )
    return list(dict.fromkeys(given))


def _check_same_settings(options: argparse.Namespace) -> None:
    """Results of other test bags, or of longer trainings, are no rows of one table."""
    settings = {field: getattr(options, field) for field in ("bags", "bag_size")}
    settings["steps"] = options.steps
    file = options.workdir / "settings.json"
    options.workdir.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        write_json(file, settings)
    elif (former := json.loads(file.read_text())) != settings:
        raise UserError(
            f"{options.workdir} holds results with {former}, not with {settings}: "
            "choose another --workdir."
        )


def _file(workdir: Path, dataset: str, method: str, seed: int) -> Path:
    slug = "".join(c if c.isalnum() else "_" for c in method.lower())
    return workdir / f"{dataset}-{slug}-{seed}.json"


def load_examples(
    name: str, options: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray]:
    """All examples of a dataset and their labels, before any split.

    Args:
      name: of `DATASETS`.
      options: `text_dir`, `mnist_dir`.

    Returns:
      Features [n, d], or texts [n], and labels [n] in 0..K-1.

    Raises:
      UserError, data.DataError: when the files are not there.
    """
    if name == TEXT:
        if options.text_dir is None:
            raise UserError(f"name the folder of {TEXT}.zip with --text_dir.")
        return _read_sentences(options.text_dir)
    source = options.mnist_dir if name == "mnist" else None
    splits = data.load(name, source_dir=source).splits.values()
    inputs = np.concatenate([split["inputs"] for split in splits])
    labels = np.concatenate([split["labels"] for split in splits])
    if name in ("mnist", "fashion_mnist"):
        inputs = inputs.reshape(-1, 14, 2, 14, 2).mean((2, 4), dtype=np.float32)
    return inputs.reshape(len(inputs), -1), labels


def _read_sentences(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    splits = data.MovieSentences(source_dir=folder).sentences.values()
    texts = [(" ".join(words), label) for split in splits for words, label in split]
    sentences, labels = zip(*texts, strict=True)
    return np.array(sentences, dtype=object), np.array(labels)


def split_examples(
    inputs: np.ndarray, labels: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features to learn from and to test on, and their labels.

    Returns:
      (train features [n, d], train labels, test features, test labels); features are
      standardised, and those of texts made, by the train part alone.
    """
    train, test, train_labels, test_labels = train_test_split(
        inputs, labels, train_size=TRAIN_SHARE, stratify=labels, random_state=seed
    )
    if inputs.dtype == object:
        features = make_pipeline(
            TfidfVectorizer(sublinear_tf=True, min_df=2),
            TruncatedSVD(TEXT_FEATURES, random_state=seed),
            StandardScaler(),
        )
    else:
        features = StandardScaler()
        if len(train) > LARGEST_TRAIN:
            train, _, train_labels, _ = train_test_split(
                train,
                train_labels,
                train_size=LARGEST_TRAIN,
                stratify=train_labels,
                random_state=seed,
            )
    # Posteriors of float32 features may underflow to zero, whose logarithm BCTS takes.
    train = features.fit_transform(train).astype(np.float64)
    test = features.transform(test).astype(np.float64)
    return train, train_labels, test, test_labels


def evaluate(
    method: str,
    dataset: str,
    examples: tuple[np.ndarray, np.ndarray],
    seed: int,
    options: argparse.Namespace,
) -> dict:
    """Trains a method and returns its mean errors over the test bags of a seed."""
    train, train_labels, test, test_labels = split_examples(*examples, seed)
    classes = np.unique(train_labels)
    problem = Problem(len(classes), options.bag_size, seed, options.steps, len(train))
    # UPP seeds its own generator: every method gets the same bags.
    bags = UPP(
        LabelledCollection(test, test_labels, classes=classes),
        sample_size=options.bag_size,
        repeats=options.bags,
        random_state=seed,
    )
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        quantifier = METHODS[method](problem).fit(train, train_labels)
        true, estimate = prediction(quantifier, bags)
    if not np.isfinite(estimate).all():
        raise UserError(
            f"{method} gave NaN on {dataset}, seed {seed}: leave it out with --methods."
        )
    relative = measures_of.relative_absolute_error(
        true, estimate, epsilon=1 / (2 * options.bag_size)
    )
    return {
        "dataset": dataset,
        "method": method,
        "seed": seed,
        "AE": float(measures_of.absolute_error(true, estimate).mean()),
        "RAE": float(relative.mean()),
        "seconds": time.perf_counter() - start,
        "train_examples": len(train),
        "test_examples": len(test),
    }


def table(results: Sequence[Mapping], measure: str) -> str:
    """Markdown: mean ± standard deviation over seeds, best mean rank first.

    Args:
      results: of `evaluate`, every method on the same datasets and seeds.
      measure: `AE` or `RAE`.
    """
    errors = blocks(results, measure)
    ranks = dict(zip(errors, _mean_ranks(errors), strict=True))
    datasets = list(dict.fromkeys(result["dataset"] for result in results))
    lines = [
        f"| method | {' | '.join(datasets)} | mean rank |",
        "|---" * (len(datasets) + 2) + "|",
    ]
    for method in sorted(ranks, key=ranks.get):
        cells = []
        for dataset in datasets:
            values = [
                result[measure]
                for result in results
                if (result["method"], result["dataset"]) == (method, dataset)
            ]
            cells.append(f"{np.mean(values):.4f} ± {np.std(values):.4f}")
        lines.append(f"| {method} | {' | '.join(cells)} | {ranks[method]:.2f} |")
    return "\n".join(lines)


def blocks(results: Sequence[Mapping], measure: str = "AE") -> dict[str, np.ndarray]:
    """{method: mean error in each block}, a block being a dataset and a seed."""
    errors: dict[str, list] = {}
    for result in sorted(results, key=lambda r: (r["dataset"], r["seed"])):
        errors.setdefault(result["method"], []).append(result[measure])
    return {method: np.array(values) for method, values in errors.items()}


def _mean_ranks(errors: Mapping[str, np.ndarray]) -> np.ndarray:
    return stats.rankdata(np.stack([*errors.values()], axis=1), axis=1).mean(0)


def significance(errors: Mapping[str, np.ndarray], level: float = 0.05) -> str:
    """Sentences: do the methods differ, and which from the best in rank?

    The Friedman test over blocks asks whether any differ; Wilcoxon's signed-rank test
    on the logarithms of the errors, with Holm's correction over all pairs, which. The
    logarithm lets blocks of small and of large errors count alike. Not Nemenyi's
    critical difference, because there the verdict on two methods depends on which
    others stand in the table (Benavoli, Corani and Mangili, JMLR 2016), and the table
    is made to grow.

    Args:
      errors: of `blocks`, two methods at least.
      level: of significance.
    """
    names = list(errors)
    ranks = _mean_ranks(errors)
    adjusted = pairwise_p_values(errors)
    best = int(np.argmin(ranks))
    differs = [
        f"{name} (p = {adjusted[best, i]:.2g})"
        for i, name in enumerate(names)
        if adjusted[best, i] < level
    ]
    others = [
        name for i, name in enumerate(names) if i != best and adjusted[best, i] >= level
    ]
    num_blocks = len(errors[names[0]])
    num_pairs = len(names) * (len(names) - 1) // 2
    sentences = []
    if len(names) > 2:
        test = stats.friedmanchisquare(*errors.values())
        sentences.append(
            f"Friedman's test over {num_blocks} blocks (dataset and seed) gives "
            f"chi2 = {test.statistic:.1f}, p = {test.pvalue:.2g}."
        )
    sentences.append(
        f"By Wilcoxon's signed-rank test over {num_blocks} blocks, with Holm's "
        f"correction over {num_pairs} pairs at {level:g}, "
        f"{names[best]}, the best in mean rank ({ranks[best]:.2f}), differs from "
        f"{', '.join(differs) or 'no other'} and cannot be told from "
        f"{', '.join(others) or 'no other'}."
    )
    if num_pairs * 2.0 ** (1 - num_blocks) >= level:
        sentences.append(
            f"{num_blocks} blocks are too few to tell any of {num_pairs} pairs apart, "
            "however clear the difference."
        )
    sentences.append(
        "Seeds share the examples of their dataset: this speaks of these datasets, "
        "not of all."
    )
    return " ".join(sentences)


def pairwise_p_values(errors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Holm's adjusted p-values of Wilcoxon's test of each pair, [method, method]."""
    # The smallest number keeps the logarithm of an error of zero finite.
    logs = np.log(np.stack([*errors.values()]) + np.finfo(float).tiny)
    first, second = np.triu_indices(len(logs), 1)
    p_values = np.array(
        [
            stats.wilcoxon(logs[i], logs[j], zero_method="zsplit").pvalue
            for i, j in zip(first, second, strict=True)
        ]
    )
    order = np.argsort(p_values)
    scaled = p_values[order] * np.arange(len(order), 0, -1)
    adjusted = np.ones((len(logs), len(logs)))
    holm = np.minimum(np.maximum.accumulate(scaled), 1)
    adjusted[first[order], second[order]] = holm
    adjusted[second[order], first[order]] = holm
    return adjusted


# Importing QuaPy enlarges the font.
@matplotlib.rc_context({"font.size": 10})
def diagram(errors: Mapping[str, np.ndarray], path: Path, level: float = 0.05) -> None:
    """Draws the methods on a line of mean ranks; bars join those not told apart.

    After Demšar (JMLR 2006), with the pairs of `pairwise_p_values`.
    """
    ranks = _mean_ranks(errors)
    order = np.argsort(ranks)
    names, ranks = np.array(list(errors))[order], ranks[order]
    alike = pairwise_p_values(errors)[np.ix_(order, order)] >= level
    bars = _groups(alike)
    half = (len(names) + 1) // 2
    figure = Figure(figsize=(8, 1.2 + 0.3 * half + 0.15 * len(bars)))
    axes = figure.subplots()
    low, high = 1, len(names)
    top = 0.5 * len(bars) + 1
    axes.plot([low, high], [0, 0], color="black", linewidth=1)
    for tick in range(low, high + 1):
        axes.plot([tick, tick], [0, -0.25], color="black", linewidth=1)
        axes.text(tick, -0.4, str(tick), ha="center", va="bottom")
    for i, (name, rank) in enumerate(zip(names, ranks, strict=True)):
        left = i < half
        depth = top + (i if left else len(names) - 1 - i)
        edge = low - 0.3 if left else high + 0.3
        axes.plot([rank, rank, edge], [0, depth, depth], color="gray", linewidth=0.8)
        axes.text(
            edge + (-0.1 if left else 0.1),
            depth,
            f"{name} ({rank:.2f})",
            ha="right" if left else "left",
            va="center",
        )
    for number, (start, end) in enumerate(bars):
        depth = 0.5 * (number + 1)
        axes.plot(
            [ranks[start] - 0.05, ranks[end] + 0.05],
            [depth, depth],
            color="black",
            linewidth=3.5,
            solid_capstyle="butt",
        )
    margin = 0.35 * (high - low) + 1
    axes.set(xlim=(low - margin, high + margin), ylim=(top + half, -1.5))
    axes.set_title("mean rank by AE (1 is best)")
    axes.axis("off")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _groups(alike: np.ndarray) -> list[tuple[int, int]]:
    """Longest runs (first, last) of methods in which no pair can be told apart."""
    runs = []
    for start in range(len(alike)):
        end = start
        while end + 1 < len(alike) and alike[start : end + 1, end + 1].all():
            end += 1
        if end > start and not any(end <= last for _, last in runs):
            runs.append((start, end))
    return runs


if __name__ == "__main__":
    sys.exit(main())
