"""Prevalences of bags that a user brings, with intervals.

Bootstrap resamples of a bag say how far chance in its examples moves the estimate, not
how far off the network is. Bags of validation, whose prevalences are known, say that:
the intervals are made wider until they hold those.
"""

import csv
import itertools
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import rankdata

import data
from experiments.errors import UserError
from experiments.tasks import BagQuantification, Quantification

LEVEL = 0.95
# Bags of validation that tell how wide intervals must be.
CALIBRATION_BAGS = 100


def predict(
    task: Quantification | BagQuantification,
    state: Any,
    source: str,
    output: Path,
    resamples: int,
    seed: int,
    joint: bool = False,
) -> int:
    """Writes a csv with a row per bag; returns the number of bags.

    The columns are `bag`, a prevalence per class under the class's name, and
    `NAME_low`, `NAME_high`: the 95 % interval, see `interval` and `margin`. (Those of
    the first bags of validation hold by construction.)

    Args:
      task: the run's.
      state: the trained state.
      source: `validation` or `test` (the evaluation's bags of that split), or a file;
        see `read_bags`.
      output: the csv file.
      resamples: bootstrap resamples a bag.
      seed: of the bootstrap.
      joint: whether the intervals hold for all classes at once.

    Raises:
      UserError: when the source cannot be read or does not fit the model.
    """
    names = task.dataset.spec.class_names
    header = ["bag", *names]
    header += [f"{name}_{end}" for name in names for end in ("low", "high")]
    rows = []
    key, wider = jax.random.key(seed), None
    for index, (name, bag) in enumerate(_bags(task, state, source)):
        if wider is None:  # Not before the first bag: there may be none to be read.
            known = normalized_bags(
                *evaluation_bags(task, state, "validation"), *_normalization(task)
            )
            common = resamples, key, LEVEL, joint
            wider = margin(task.model, state.variables, known, *common)
        draws = jax.random.fold_in(key, index)
        estimate, low, high = interval(
            task.model, state.variables, bag, resamples, draws, LEVEL, joint, wider
        )
        ends = np.stack([low, high], axis=1).reshape(-1)
        numbers = [f"{value:.6f}" for value in (*estimate, *ends)]
        rows.append([name, *numbers])
    if not rows:
        raise UserError(f"{source} holds no bag.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    except OSError as error:
        raise UserError(f"Could not write {output}: {error.strerror}.") from error
    return len(rows)


def interval(
    model: nn.Module,
    variables: Mapping,
    bag: np.ndarray,
    resamples: int,
    key: jax.Array,
    level: float,
    joint: bool = False,
    wider: np.ndarray | float = 0.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prevalences of one bag, and the ends of their intervals, each [K].

    The percentile interval over bags resampled with replacement from the bag's own
    examples, see `confidence_box`, made wider at both ends.

    Args:
      model: a set network.
      variables: its parameters.
      bag: examples as the model takes them, [element, *features].
      resamples: number of bootstrap resamples.
      key: of the resampling.
      level: the share of the resamples that the percentile interval holds.
      joint: see `confidence_box`.
      wider: by how much at each end, see `margin`.
    """
    padded, count = pad(bag)
    draws = np.asarray(
        _bag_and_resamples(model, variables, padded, count, key, resamples)
    )
    low, high = confidence_box(draws[1:], level, joint)
    return draws[0], np.maximum(low - wider, 0), np.minimum(high + wider, 1)


def margin(
    model: nn.Module,
    variables: Mapping,
    bags: Iterable[tuple[jax.Array, np.ndarray]],
    resamples: int,
    key: jax.Array,
    level: float,
    joint: bool = False,
) -> np.ndarray:
    """How much wider intervals must be to hold the prevalences of known bags, [K].

    The percentile intervals of n bags miss the prevalences in them by some distances,
    in a class or, when joint, in the worst one; the margin is the
    ceil((n + 1) level)-th smallest, 0 at least, and 1 where there are fewer (19 bags
    are needed at 95 %). Made wider by it, intervals hold the prevalences in another bag
    of the kind (size and protocol) with a probability of `level` or more, whatever the
    network, as far as it was not chosen by these bags.

    Romano, Patterson and Candès, "Conformalized quantile regression", NeurIPS 2019.

    Args:
      model: see `interval`.
      variables: see `interval`.
      bags: examples as the model takes them and the prevalences in them [K], of which
        the first `CALIBRATION_BAGS` are used.
      resamples: see `interval`.
      key: see `interval`.
      level: see above.
      joint: see above.
    """
    missed = []
    for index, (bag, prevalence) in enumerate(itertools.islice(bags, CALIBRATION_BAGS)):
        draws = jax.random.fold_in(key, index)
        _, low, high = interval(model, variables, bag, resamples, draws, level, joint)
        missed.append(np.maximum(low - prevalence, prevalence - high))
    distances = np.array(missed)  # [bag, K]
    if joint:
        distances = np.broadcast_to(distances.max(1, keepdims=True), distances.shape)
    rank = math.ceil((len(distances) + 1) * level)
    if rank > len(distances):
        return np.ones(distances.shape[1:])
    return np.maximum(np.sort(distances, axis=0)[rank - 1], 0)


def confidence_box(
    draws: np.ndarray, level: float, joint: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The ends of percentile intervals of resampled prevalences, each [K].

    Args:
      draws: prevalences of the resamples, [resample, K].
      level: the share of the resamples that each class's interval holds or, when joint,
        that lie inside the intervals of all classes at once: a confidence region.
      joint: whether all classes are meant at once. All intervals then leave out the
        same share at each end, the largest with which the region holds its level.
    """
    tail = (1 - level) / 2
    if joint:
        # How far from an end, as a share of the draws, a draw is in its worst class.
        last = max(len(draws) - 1, 1)
        below = (rankdata(draws, "max", axis=0) - 1) / last
        above = (len(draws) - rankdata(draws, "min", axis=0)) / last
        worst = np.minimum(below, above).min(axis=1)
        tail = np.quantile(worst, 1 - level, method="lower")
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return low, high


def pad(bag: np.ndarray) -> tuple[np.ndarray, np.int32]:
    """The bag filled up with zeros, and its size.

    Sizes are rounded up to powers of two, so that few are compiled.
    """
    size = 1 << (len(bag) - 1).bit_length()
    padded = np.zeros((size, *bag.shape[1:]), np.float32)
    padded[: len(bag)] = bag
    return padded, np.int32(len(bag))


@partial(jax.jit, static_argnums=(0, 5))
def _bag_and_resamples(model, variables, bag, count, key, resamples) -> jax.Array:
    """Prevalences of the bag, then of its resamples, [1 + resamples, K]."""
    mask = jnp.arange(len(bag)) < count  # [element]
    features = model.apply(variables, bag[None], mask[None], method="encode")[0]

    def estimate(indices):
        representation = model.apply(
            variables, features[indices][None], mask[None], method="aggregate"
        )
        return model.apply(variables, representation, method="decode")[0]

    draw = jax.random.randint(key, (resamples, len(bag)), 0, count)
    indices = jnp.concatenate([jnp.arange(len(bag))[None], draw])
    return jax.lax.map(estimate, indices, batch_size=16)


def _bags(
    task: Quantification | BagQuantification, state: Any, source: str
) -> Iterator[tuple[str, jax.Array]]:
    spec = task.dataset.spec
    if source in ("validation", "test"):
        bags = normalized_bags(
            *evaluation_bags(task, state, source), *_normalization(task)
        )
        for number, (bag, _) in enumerate(bags):
            yield str(number), bag
        return
    for name, bag in read_bags(Path(source), spec.feature_shape):
        if bag.shape[1:] != tuple(spec.feature_shape):
            raise UserError(
                f"{source}, bag {name}: examples must have the shape "
                f"{tuple(spec.feature_shape)} of the dataset {spec.name}, "
                f"not {bag.shape[1:]}."
            )
        if not len(bag):
            raise UserError(f"{source}, bag {name} is empty.")
        if bag.dtype.kind not in "buif":
            raise UserError(f"{source}, bag {name} holds {bag.dtype}, not numbers.")
        if not np.isfinite(bag).all():
            raise UserError(f"{source}, bag {name} holds NaN or infinite values.")
        yield name, data.normalize(bag, *_normalization(task))


def _normalization(task: Any) -> tuple[np.ndarray, np.ndarray]:
    return task.dataset.shift, task.dataset.scale


def evaluation_bags(
    task: Any, state: Any, split: str
) -> tuple[np.ndarray, Sequence, Sequence]:
    """The bags of an evaluation.

    Args:
      task: the run's.
      state: a trained state.
      split: "validation" or "test".

    Returns:
      Inputs as the dataset has them; of each bag what selects its examples among them,
      and its prevalences [K], or None where they are not known.

    Raises:
      UserError: there are no bags of this split.
    """
    if isinstance(task, Quantification):
        indices, prevalences, _ = task.evaluation_bags(state, split)
        return task.dataset.splits[split]["inputs"], indices, prevalences
    if split not in task.dataset.splits:
        raise UserError(f"{task.dataset.spec.name} has no {split} bags.")
    bags = task.dataset.splits[split]
    count, longest = bags["inputs"].shape[:2]
    sizes = bags.get("sizes", [longest] * count)
    selections = [(number, slice(size)) for number, size in enumerate(sizes)]
    return bags["inputs"], selections, bags.get("prevalence", [None] * count)


def normalized_bags(
    inputs: np.ndarray,
    selections: Sequence,
    prevalences: Sequence,
    shift: np.ndarray,
    scale: np.ndarray,
) -> Iterator[tuple[jax.Array, np.ndarray | None]]:
    """Bags of `evaluation_bags` as the model takes them, and their prevalences."""
    for selection, prevalence in zip(selections, prevalences, strict=True):
        yield data.normalize(inputs[selection], shift, scale), prevalence


def read_bags(path: Path, feature_shape: tuple) -> Iterator[tuple[str, np.ndarray]]:
    """Names and examples [element, *features] of the bags in a file.

    Args:
      path: `.npz`: each array is a bag, or, where there is one array with an axis more,
        a bag per row of it. `.csv`: a header; one example per line, its features in
        order; the bag's name in a column `bag` (without it all lines are one bag).
      feature_shape: of one example.

    Raises:
      UserError: when the file cannot be read.
    """
    try:
        if path.suffix == ".npz":
            # `np.load` takes other formats under this name for what they are.
            with zipfile.ZipFile(path), np.load(path) as archive:
                arrays = {name: np.asarray(archive[name]) for name in archive.files}
            if len(arrays) == 1:
                (only,) = arrays.values()
                if only.ndim == len(feature_shape) + 2:
                    arrays = {str(number): bag for number, bag in enumerate(only)}
            yield from arrays.items()
        elif path.suffix == ".csv":
            yield from _read_csv(path, feature_shape)
        else:
            raise UserError(
                f"--bags must be validation, test, a .npz or a .csv file, not {path}."
            )
    except OSError as error:
        raise UserError(f"Could not read {path}: {error.strerror or error}.") from error
    except (
        ValueError,
        csv.Error,
        zipfile.BadZipFile,
        zlib.error,
        RuntimeError,  # of an archive with a password or another compression
    ) as error:
        raise UserError(f"Could not read {path}: {error}.") from error


def _read_csv(path: Path, feature_shape: tuple) -> Iterator[tuple[str, np.ndarray]]:
    bags: dict[str, list] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise ValueError("the header names a column twice")
        if any(re.fullmatch(r"\s*[-+]?\d*\.\d+\s*", name) for name in names):
            raise ValueError("the first line is no header: it holds numbers")
        for number, row in enumerate(reader, start=2):
            name = row.pop("bag", "0")
            if None in row or None in row.values():
                raise ValueError(f"line {number} has another number of columns")
            bags.setdefault(name, []).append([float(cell) for cell in row.values()])
    width = int(np.prod(feature_shape))
    for name, rows in bags.items():
        examples = np.asarray(rows, np.float32)
        if examples.shape[1] != width:
            raise ValueError(
                f"{examples.shape[1]} feature columns where the model takes {width}"
            )
        yield name, examples.reshape(-1, *feature_shape)
