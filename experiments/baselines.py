"""Classical quantifiers beside a model: a classifier of the same encoder, counted."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

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
        estimate the classifier's confusion from examples it was not trained on.
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
    state = loop.train(task, training, workdir, seed, progress)
    accuracy = loop.compile_evaluation(task)(state, "test")["accuracy"]
    return Posteriors(
        validation=task.posteriors(state, "validation"),
        test=task.posteriors(state, "test"),
        accuracy=accuracy,
    )


def estimates(
    posteriors: Posteriors,
    dataset: data.Dataset,
    indices: np.ndarray,
) -> dict[str, np.ndarray]:
    """Prevalences by CC, PCC, ACC, PACC and EMQ of bags of test examples.

    Args:
      posteriors: by `train_classifier`.
      dataset: the same.
      indices: examples of each bag, int [bag, element].

    Returns:
      {method: prevalences [bag, K]}.
    """
    labels = jnp.asarray(dataset.splits["validation"]["labels"])
    validation = jnp.asarray(posteriors.validation)
    train_labels = dataset.splits["train"]["labels"]
    train_prevalence = jnp.asarray(
        np.bincount(train_labels, minlength=dataset.spec.num_classes)
        / len(train_labels),
        jnp.float32,
    )
    hard = quantifiers.confusion_matrix(validation, labels)
    soft = quantifiers.confusion_matrix(validation, labels, probabilistic=True)
    methods: dict[str, Callable] = {
        "CC": quantifiers.classify_and_count,
        "PCC": quantifiers.probabilistic_classify_and_count,
        "ACC": lambda bags: quantifiers.adjusted_classify_and_count(bags, hard),
        "PACC": lambda bags: quantifiers.probabilistic_adjusted_classify_and_count(
            bags, soft
        ),
        "EMQ": lambda bags: quantifiers.expectation_maximization(
            bags, train_prevalence
        ),
    }

    @jax.jit
    def all_methods(test, chunk):
        bags = test[chunk]  # [bag, element, K]
        return {name: method(bags) for name, method in methods.items()}

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
