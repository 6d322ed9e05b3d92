"""`Quantifier`: set networks for prevalences with the face of a scikit-learn estimator.

    quantifier = Quantifier(num_steps=1000).fit(X, y)
    quantifier.predict(bag)  # the prevalences of `quantifier.classes_` in the bag

Training is that of `run.py`: the tasks `Quantification`, `LabelledQuantification` (for
`EMQNet`) and `BagQuantification` in `loop.train`. QuaPy's protocols and
`quapy.evaluation` take it for one of theirs.
"""

import contextlib
import dataclasses
import io
import logging
import math
import numbers
import os
import tempfile
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import joblib
import numpy as np
from sklearn.base import BaseEstimator
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

import data
from experiments import config, loop
from experiments.errors import UserError
from experiments.optimizers import Optimizer
from experiments.predict import (
    CALIBRATION_BAGS,
    LEVEL,
    evaluation_bags,
    interval,
    margin,
    normalized_bags,
    pad,
)
from experiments.progress import Progress
from experiments.tasks.bag_quantification import BagQuantification
from experiments.tasks.labelled_quantification import LabelledQuantification
from experiments.tasks.prevalence import pools_linearly
from experiments.tasks.quantification import Quantification

# The network of `configs/quantify.py` for vectors.
HISTNETQ = {
    "name": "HistNetQ",
    "encoder": {
        "name": "MLP",
        "hidden_sizes": (512, 512),
        "features": 64,
        "dropout_rate": 0.3,
    },
    "histogram": {"name": "LinearHistogram", "num_bins": 16},
    "head": {
        "name": "PrevalenceHead",
        "hidden_sizes": (256,),
        "output_activation": "sparsemax",
    },
}

NUMBERS = {int: numbers.Integral, float: numbers.Real}
"""What a parameter of `Quantifier` that is declared as a number may be."""


class Quantifier(BaseEstimator):
    """Estimates class prevalences of bags with a network invariant to permutations.

    Inputs are standardised by the training examples; arrays uint8
    [n, height, width, channels] are images, mapped to [-1, 1].

    Args:
      model: a section of a config (`name`: a set network of `archs`, and its fields;
        fields `num_classes` may be left out), or the network itself; None:
        `HISTNETQ`.
      loss: a measure of `archs.quantification`.
      num_steps: of the training; the learning rate falls to zero as a cosine.
      learning_rate: of AdamW.
      warmup_steps: steps of linear rise of the rate.
      clip_norm: largest norm of the gradient; None: no clipping.
      weight_decay: of AdamW.
      num_bags: bags a step; None: 256 in `fit`, 20 in `fit_bags`.
      bag_size: examples of a bag that `fit` draws.
      mixed_bags: mixtures of its bags that a step learns from, see `Quantification`
        and `BagQuantification`; 0: the bags as they are.
      evaluation_bag_size: examples of a bag of validation that `fit` draws, and of a
        mixture where mixtures are bags; about the size of the bags to come.
      protocol: of the prevalences of the bags that `fit` draws, see `Quantification`.
      task: further fields of the task, such as `noise` of `LabelledQuantification`.
      validation_fraction: share of the examples, or of the bags given to `fit_bags`,
        by which the best checkpoint is chosen.
      validation_bags: bags that `fit` draws from that share of the examples.
      evaluations: how often, evenly spaced, a checkpoint is evaluated; 1: the last one
        alone, which is then the best.
      seed: of the split, the initial weights and the batches.
      workdir: keeps checkpoints and metrics; an interrupted fit resumes there. None: a
        temporary folder.

    Attributes:
      classes_: labels, [K], in the order of the prevalences; after `fit_bags` 0..K-1.
      n_features_in_: length of the second axis of the examples.
      model_: the network.
      variables_: its parameters.

    The examples of validation are kept, too: intervals are measured by them.
    """

    def __init__(
        self,
        model: Mapping | nn.Module | None = None,
        *,
        loss: str = "absolute_error",
        num_steps: int = 2000,
        learning_rate: float = 1e-3,
        warmup_steps: int = 0,
        clip_norm: float | None = None,
        weight_decay: float = 0.0,
        num_bags: int | None = None,
        bag_size: int = 1,
        mixed_bags: int = 64,
        evaluation_bag_size: int = 100,
        protocol: str = "uniform",
        task: Mapping | None = None,
        validation_fraction: float = 0.2,
        validation_bags: int = 300,
        evaluations: int = 8,
        seed: int = 0,
        workdir: str | os.PathLike | None = None,
    ):
        self.model = model
        self.loss = loss
        self.num_steps = num_steps
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.clip_norm = clip_norm
        self.weight_decay = weight_decay
        self.num_bags = num_bags
        self.bag_size = bag_size
        self.mixed_bags = mixed_bags
        self.evaluation_bag_size = evaluation_bag_size
        self.protocol = protocol
        self.task = task
        self.validation_fraction = validation_fraction
        self.validation_bags = validation_bags
        self.evaluations = evaluations
        self.seed = seed
        self.workdir = workdir

    def fit(self, X: np.ndarray, y: np.ndarray) -> "Quantifier":
        """Learns from labelled examples: bags are drawn from them.

        Args:
          X: numbers [n, *features].
          y: labels of any type, [n], two examples of each class at least, and enough
            for every class to be in the share that `validation_fraction` sets aside.

        Raises:
          ValueError: NaN, infinite or immense values, lengths that differ, a class with
            too few examples, or parameters out of range.
        """
        self._check_numbers()
        X, y = validate_data(self, X, y, allow_nd=True)
        try:
            check_classification_targets(y)
            self.classes_, labels = np.unique(y, return_inverse=True)
        except TypeError as error:
            raise ValueError(f"y must hold labels of one type: {error}") from error
        if len(self.classes_) < 2:
            raise ValueError(f"y must have two classes or more, not {self.classes_}")
        try:
            train, validation = train_test_split(
                np.arange(len(X)),
                test_size=self.validation_fraction,
                stratify=labels,
                random_state=self.seed,
            )
        except ValueError as error:
            raise ValueError(
                f"validation_fraction, {self.validation_fraction}, of the {len(X)} "
                f"examples of {len(self.classes_)} classes cannot be set aside: {error}"
            ) from error
        self._set_normalization(X[train])
        splits = {
            name: {
                "inputs": self._stored(X[part]),
                "labels": labels[part].astype(np.int32),
            }
            for name, part in (("train", train), ("validation", validation))
        }
        learns_labels = hasattr(self._network(), "classify")
        return self._train(
            LabelledQuantification if learns_labels else Quantification,
            data.Dataset(self._spec(splits), splits, *self._stored_normalization),
            num_bags=256 if self.num_bags is None else self.num_bags,
            bag_size=self.bag_size,
            mixed_bags=self.mixed_bags,
            evaluation_bag_size=self.evaluation_bag_size,
            protocol=self.protocol,
            validation_bags=self.validation_bags,
        )

    def fit_bags(
        self, bags: Iterable[np.ndarray], prevalences: np.ndarray
    ) -> "Quantifier":
        """Learns from bags of which the prevalences are known, and no example's label.

        Args:
          bags: n arrays of numbers [element, *features]; they may differ in size.
          prevalences: [n, K], rows sum to one.

        Raises:
          ValueError: NaN, infinite or immense values, an empty bag, lengths or features
            that differ, rows that are no prevalences, or parameters out of range.
        """
        self._check_numbers()
        prevalences, bags = check_array(prevalences, dtype=np.float32), list(bags)
        if len(bags) != len(prevalences):
            raise ValueError(
                "prevalences must have a row for each bag: there are "
                f"{len(prevalences)} rows and {len(bags)} bags"
            )
        if len(bags) < 2 or prevalences.shape[1] < 2:
            raise ValueError(
                "bags and their classes must be two or more, but prevalences has the "
                f"shape {prevalences.shape}"
            )
        checked = []
        for bag in bags:
            checked.append(validate_data(self, bag, reset=not checked, allow_nd=True))
            self._feature_shape = checked[0].shape[1:]
            self._check_shape(checked[-1])
        self.classes_ = np.arange(prevalences.shape[1])
        if hasattr(self._network(), "classify"):
            raise ValueError(
                f"model: {type(self._network()).__name__} learns from the labels of "
                "single examples; use fit, or another model"
            )
        train, validation = train_test_split(
            np.arange(len(bags)),
            test_size=self.validation_fraction,
            random_state=self.seed,
        )
        self._set_normalization(np.concatenate([checked[i] for i in train]))
        padded, sizes = _pad_to_longest([self._stored(bag) for bag in checked])
        arrays = {"inputs": padded, "prevalence": prevalences}
        if sizes.min() < sizes.max():
            arrays["sizes"] = sizes
        splits = {
            name: {key: array[part] for key, array in arrays.items()}
            for name, part in (("train", train), ("validation", validation))
        }
        mixes = self.mixed_bags and pools_linearly(self._network())
        return self._train(
            BagQuantification,
            data.Bags(self._spec(splits), splits, *self._stored_normalization),
            num_bags=20 if self.num_bags is None else self.num_bags,
            mixer="exact" if self.mixed_bags else None,
            mixed_bags=self.mixed_bags if mixes else 0,
        )

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Prevalences [K] of one bag.

        Args:
          X: the examples of the bag, [element, *features].

        Raises:
          NotFittedError: before `fit`.
          ValueError: NaN, infinite or immense values, no example, or features of
            another number.
        """
        padded, count = pad(self._inputs(X))
        return np.asarray(_estimate(self.model_, self.variables_, padded, count))

    def predict_bags(self, bags: Iterable[np.ndarray]) -> np.ndarray:
        """Prevalences [n, K] of n bags, which may differ in size; see `predict`."""
        check_is_fitted(self, "variables_")
        estimates = [self.predict(bag) for bag in bags]
        return np.array(estimates, np.float32).reshape(-1, len(self.classes_))

    def predict_interval(
        self,
        X: np.ndarray,
        level: float = LEVEL,
        resamples: int = 200,
        joint: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ends of intervals that hold the prevalences of the bag, each [K].

        Percentiles of bags resampled with replacement from the bag's own examples, made
        wider until those of the bags of validation hold the prevalences in them, see
        `experiments.predict.margin`. The level is that of bags of their size, drawn
        alike, and needs 19 of them at 95 % to be less than everything. The margin is
        computed at the first call with given arguments.

        Args:
          X: the examples of the bag, [element, *features].
          level: the probability, in (0, 1).
          resamples: number of bootstrap resamples.
          joint: whether it is that of all classes at once.

        Raises:
          NotFittedError, ValueError: see `predict`.
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, not {level}")
        if resamples < 1:
            raise ValueError(f"resamples must be 1 or more, not {resamples}")
        bag, key = self._inputs(X), jax.random.key(self.seed)
        common = resamples, key, level, joint
        asked = resamples, self.seed, level, joint
        if asked not in self._margins:
            known = normalized_bags(*self._validation, *self._stored_normalization)
            self._margins[asked] = margin(self.model_, self.variables_, known, *common)
        _, low, high = interval(
            self.model_, self.variables_, bag, *common, self._margins[asked]
        )
        return low, high

    def _check_numbers(self) -> None:
        for name, hint in typing.get_type_hints(Quantifier.__init__).items():
            value = getattr(self, name)
            for declared in typing.get_args(hint) or [hint]:
                kind = NUMBERS.get(declared)
                if kind and not isinstance(value, kind | hint):
                    raise ValueError(
                        f"{name} must be of the type {kind.__name__}, not {value!r}"
                    )

    def _set_normalization(self, examples: np.ndarray) -> None:
        self._feature_shape = examples.shape[1:]
        self._are_images = examples.dtype == np.uint8 and examples.ndim == 4
        if not self._are_images:
            scaler = StandardScaler().fit(
                examples.reshape(len(examples), -1).astype(np.float64)
            )
            self._shift = scaler.mean_.reshape(self._feature_shape)
            self._scale = scaler.scale_.reshape(self._feature_shape)

    def _stored(self, X: np.ndarray) -> np.ndarray:
        """Examples as the dataset keeps them: bytes of images, or standardised."""
        if self._are_images and X.dtype == np.uint8:
            return X
        with np.errstate(over="ignore", invalid="ignore"):
            if not self._are_images:
                # Of large numbers that differ little, float32 keeps no difference.
                X = (X.astype(np.float64) - self._shift) / self._scale
            stored = X.astype(np.float32)
        if not np.isfinite(stored).all():
            raise ValueError(
                "X holds values too large: as the network takes them (standardised by "
                "the training examples, unless they are images) they are beyond float32"
            )
        return stored

    @property
    def _stored_normalization(self) -> tuple[np.float32, np.float32]:
        """Shift and scale that make inputs of the network of what is stored."""
        middle = np.float32(127.5)
        return (middle, middle) if self._are_images else (np.float32(0), np.float32(1))

    def _inputs(self, X: np.ndarray) -> jax.Array:
        """The examples of a bag as the network takes them."""
        check_is_fitted(self, "variables_")
        X = validate_data(self, X, reset=False, allow_nd=True)
        self._check_shape(X)
        return data.normalize(self._stored(X), *self._stored_normalization)

    def _check_shape(self, bag: np.ndarray) -> None:
        if bag.shape[1:] != self._feature_shape:
            raise ValueError(
                f"the examples of a bag must have the shape {self._feature_shape} of "
                f"those before them, not {bag.shape[1:]}"
            )

    def _spec(self, splits: Mapping) -> data.Spec:
        return data.Spec(
            name="the examples given",
            feature_shape=self._feature_shape,
            num_classes=len(self.classes_),
            class_names=tuple(map(str, self.classes_)),
            sizes={name: len(split["inputs"]) for name, split in splits.items()},
            source="given",
            licence="",
            citation="",
            homepage="",
        )

    def _network(self) -> nn.Module:
        if isinstance(self.model, nn.Module):
            return self.model
        sections = {
            "dataset": {"name": ""},
            "model": HISTNETQ if self.model is None else self.model,
            "task": {"name": "Quantification"},
        }
        try:
            section = config.complete(sections)["model"]
        except UserError as error:
            raise ValueError(str(error).replace("config.model", "model")) from error
        return config.build_module(section, spec=self._spec({}), precision="float32")

    def _train(
        self, make_task: type, dataset: data.Dataset | data.Bags, **fields
    ) -> "Quantifier":
        network = self._network()
        steps_per_call = math.gcd(self.num_steps, 50)
        if self.evaluations < 1:
            raise ValueError(f"evaluations must be 1 or more, not {self.evaluations}")
        every = max(self.num_steps // (self.evaluations * steps_per_call), 1)
        training = loop.Training(
            num_steps=self.num_steps,
            steps_per_call=steps_per_call,
            log_every=every * steps_per_call,
            eval_every=every * steps_per_call,
        )
        optimizer = Optimizer(
            name="adamw",
            learning_rate=self.learning_rate,
            schedule="cosine",
            warmup_steps=self.warmup_steps,
            clip_norm=self.clip_norm,
            weight_decay=self.weight_decay,
            ema_decay=0.99,
        )
        fields |= {
            "model": network,
            "dataset": dataset,
            "optimizer": optimizer,
            "training": training,
            "loss": self.loss,
            "measures": (),
            "baselines": False,
        }
        if not isinstance(self.task, Mapping | None):
            raise ValueError(f"task must be fields by their names, not {self.task!r}")
        further = {f.name for f in dataclasses.fields(make_task)} - set(fields)
        unknown = set(self.task or {}) - further
        if unknown:
            raise ValueError(
                f"task: the further fields of {make_task.__name__} are "
                f"{', '.join(sorted(further))}, not {', '.join(sorted(unknown))}"
            )
        task = make_task(**fields, **(self.task or {}))
        progress = Progress(self.num_steps, io.StringIO())
        with self._folder(dataset.splits) as folder, _quiet():
            try:
                state = loop.train(task, training, folder, self.seed, progress)
            except loop.Interrupted as interruption:
                raise KeyboardInterrupt(str(interruption)) from interruption
        self.model_, self.variables_ = network, state.variables
        inputs, drawn, prevalences = evaluation_bags(task, state, "validation")
        self._validation = (
            inputs,
            drawn[:CALIBRATION_BAGS],
            prevalences[:CALIBRATION_BAGS],
        )
        self._margins: dict[tuple, np.ndarray] = {}
        return self

    @contextlib.contextmanager
    def _folder(self, given: Any) -> Iterator[Path]:
        """A folder for this fit alone: what it holds of another would be resumed."""
        if self.workdir is None:
            with tempfile.TemporaryDirectory(prefix="quantifier-") as folder:
                yield Path(folder)
            return
        folder = Path(self.workdir).absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"workdir: {folder} cannot be made a folder: {error.strerror}"
            ) from error
        identity, file = joblib.hash((self.get_params(), given)), folder / "fit.txt"
        if (folder / "checkpoints").exists() and not (
            file.exists() and file.read_text() == identity
        ):
            raise ValueError(
                f"workdir: {folder} holds checkpoints of another fit, with other data "
                "or parameters; choose another folder"
            )
        file.write_text(identity)
        yield folder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what orbax logs about its own options."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _pad_to_longest(bags: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Bags [n, longest, *features] filled up with zeros, and their sizes [n]."""
    sizes = np.array([len(bag) for bag in bags], np.int32)
    shape = len(bags), sizes.max(), *bags[0].shape[1:]
    padded = np.zeros(shape, np.result_type(*bags))
    for row, bag in zip(padded, bags, strict=True):
        row[: len(bag)] = bag
    return padded, sizes


@partial(jax.jit, static_argnums=0)
def _estimate(model, variables, bag, count) -> jax.Array:
    """Prevalences [K] of one padded bag."""
    mask = jnp.arange(len(bag)) < count  # [element]
    return model.apply(variables, bag[None], mask[None])[0]
