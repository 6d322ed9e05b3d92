"""Classical quantifiers beside a model: a classifier of the same encoder, counted.

They are CC, PCC, ACC, PACC, EMQ and EMQ-BCTS of `archs.quantification`.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import data
from archs import Classifier
from archs import quantification as quantifiers
from experiments import loop
from experiments.optimizers import Optimizer
from experiments.progress import Progress
from experiments.tasks.classification import Classification

# Bags whose posteriors are gathered at a time.
CHUNK = 50


@dataclasses.dataclass(frozen=True)
class Posteriors:
    """What the classical methods need of a trained classifier.

    Attributes:
      validation: class probabilities of the validation split, [n, K]: ACC and PACC
        estimate the classifier's confusion, and EMQ-BCTS its calibration, from examples
        it was not trained on.
      test: class probabilities of the test split, [n, K].
      accuracy: share of the test split whose likeliest class is right.
    """

    validation: np.ndarray
    test: np.ndarray
    accuracy: float


def train_classifier(
    encoder: nn.Module,
    dataset: data.Dataset,
    workdir: Path,
    num_steps: int,
    seed: int,
    progress: Progress,
) -> Posteriors:
    """Trains a classifier, see `fit_classifier`, and applies it to a dataset.

    Args:
      encoder: the set network's encoder; trained anew.
      dataset: labelled examples.
      workdir: the classifier's own.
      num_steps: longest training, in batches of 128.
      seed: of weights and batches.
      progress: shows what happens.
    """
    task, state = fit_classifier(encoder, dataset, workdir, num_steps, seed, progress)
    accuracy = loop.compile_evaluation(task)(state, "test")["accuracy"]
    return Posteriors(
        validation=task.posteriors(state, "validation"),
        test=task.posteriors(state, "test"),
        accuracy=accuracy,
    )


def fit_classifier(
    encoder: nn.Module,
    dataset: data.Dataset,
    workdir: Path,
    num_steps: int,
    seed: int,
    progress: Progress,
) -> tuple[Classification, Any]:
    """Trains `Classifier(encoder)` on the train split, by Adam and cross-entropy.

    The best checkpoint by cross-entropy on the validation split is kept. Resumes and
    reuses what the workdir holds.

    Args:
      encoder: the set network's encoder; trained anew.
      dataset: labelled examples.
      workdir: the classifier's own.
      num_steps: longest training, in batches of 128.
      seed: of weights and batches.
      progress: shows what happens.

    Returns:
      The task of the classifier and its state.
    """
    batch_size = min(128, dataset.spec.sizes["train"])
    every = max(num_steps // 20, 1)
    training = loop.Training(
        num_steps=every * 20,
        steps_per_call=every,
        log_every=every,
        eval_every=every,
        patience=5,
    )
    task = Classification(
        model=Classifier(encoder, dataset.spec.num_classes),
        dataset=dataset,
        optimizer=Optimizer(name="adam", learning_rate=1e-3),
        training=training,
        batch_size=batch_size,
    )
    workdir.mkdir(parents=True, exist_ok=True)
    return task, loop.train(task, training, workdir, seed, progress)


def estimates(
    posteriors: Posteriors,
    dataset: data.Dataset,
    indices: np.ndarray,
) -> dict[str, np.ndarray]:
    """Prevalences by the classical methods of bags of test examples.

    Args:
      posteriors: by `train_classifier`.
      dataset: the same.
      indices: examples of each bag, int [bag, element].

    Returns:
      {method: prevalences [bag, K]}.
    """
    methods = _methods(posteriors.validation, dataset)

    @jax.jit
    def all_methods(test, chunk):
        bags = test[chunk]  # [bag, element, K]
        return {name: method(bags, None) for name, method in methods.items()}

    test = jnp.asarray(posteriors.test)
    rows = []
    for start in range(0, len(indices), CHUNK):
        # The last chunk is filled up, so that one shape is compiled.
        chunk = np.resize(indices[start : start + CHUNK], (CHUNK, indices.shape[1]))
        rows.append(jax.device_get(all_methods(test, chunk)))
    return {
        name: np.concatenate([row[name] for row in rows])[: len(indices)]
        for name in methods
    }


def bag_estimates(
    classifier: Classification, state: Any, task: Any, split: str
) -> dict[str, np.ndarray]:
    """Prevalences by the classical methods of the bags of a split.

    Args:
      classifier: by `fit_classifier`, of labelled examples of the bags' kind.
      state: its state.
      task: a `BagQuantification`.
      split: of its dataset.

    Returns:
      {method: prevalences [bag, K]}.
    """
    methods = _methods(classifier.posteriors(state, "validation"), classifier.dataset)

    @jax.jit
    def all_methods(variables, arrays, index):
        batch = task.eval_batch(split, index, arrays)
        inputs = batch["inputs"]  # [bag, element, *features]
        flat = inputs.reshape(-1, *inputs.shape[2:])
        posteriors = nn.softmax(classifier.model.apply(variables, flat))
        bags = posteriors.reshape(*inputs.shape[:2], -1)
        mask = batch["element_mask"]
        return {name: method(bags, mask) for name, method in methods.items()}

    rows = [
        jax.device_get(all_methods(state.variables, task.arrays, np.int32(index)))
        for index in range(task.num_eval_batches(split))
    ]
    total = task.num_bags_of(split)
    return {
        name: np.concatenate([row[name] for row in rows])[:total] for name in methods
    }


def _methods(
    validation: np.ndarray, dataset: data.Dataset
) -> dict[str, Callable[[jax.Array, jax.Array | None], jax.Array]]:
    """`(posteriors [bag, element, K], mask) -> prevalences` by method.

    Args:
      validation: posteriors of the validation split, [n, K].
      dataset: what the classifier was trained on.
    """
    validation = jnp.asarray(validation)
    labels = jnp.asarray(dataset.splits["validation"]["labels"])
    train_labels = dataset.splits["train"]["labels"]
    train_prevalence = jnp.asarray(
        np.bincount(train_labels, minlength=dataset.spec.num_classes)
        / len(train_labels),
        jnp.float32,
    )
    hard = quantifiers.confusion_matrix(validation, labels)
    soft = quantifiers.confusion_matrix(validation, labels, probabilistic=True)
    scale, bias = jax.jit(quantifiers.bias_corrected_temperature)(validation, labels)
    return {
        "CC": quantifiers.classify_and_count,
        "PCC": quantifiers.probabilistic_classify_and_count,
        "ACC": lambda bags, mask: quantifiers.adjusted_classify_and_count(
            bags, hard, mask
        ),
        "PACC": lambda bags, mask: (
            quantifiers.probabilistic_adjusted_classify_and_count(bags, soft, mask)
        ),
        "EMQ": lambda bags, mask: quantifiers.expectation_maximization(
            bags, train_prevalence, mask
        ),
        "EMQ-BCTS": lambda bags, mask: quantifiers.expectation_maximization(
            quantifiers.calibrate_posteriors(bags, scale, bias), train_prevalence, mask
        ),
    }
