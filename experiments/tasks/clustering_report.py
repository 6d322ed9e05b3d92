"""Amortised clustering in the report: beside expectation-maximisation, and drawn."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.metrics import adjusted_rand_score

from archs import (
    GaussianMixture,
    fit_mixture,
    initial_mixture,
    mixture_em_step,
    mixture_log_likelihood,
    mixture_parameters,
    mixture_posterior,
)
from data import Spec
from experiments import figures
from experiments.report import Section

EM_STEPS = 100
EM_STARTS = 5
DRAWN_SETS = 6


def mixture_sections(outputs: Mapping, first: Mapping, spec: Spec) -> list[Section]:
    """The model's clusters beside those of expectation-maximisation, and a few drawn.

    Args:
      outputs: not used.
      first: the first batch of `SetPrediction.evaluation_sets`.
      spec: not used.
    """
    del outputs, spec
    first = {name: leaf[first["counted"]] for name, leaf in first.items()}
    names = (
        "model",
        "model and one EM step",
        f"model and {EM_STEPS} EM steps",
        "EM from scratch, one start",
        f"EM from scratch, best of {EM_STARTS}",
        "the true mixture",
    )
    mixtures = dict(zip(names, jax.device_get(_mixtures(first)), strict=True))
    rows = []
    for name, mixture in mixtures.items():
        likelihood, labels = jax.device_get(_describe(mixture, first))
        agreement = [
            adjusted_rand_score(true[real], label[real])
            for true, label, real in zip(
                first["components"], labels, first["mask"], strict=True
            )
        ]
        rows.append(
            {
                "clustering": name,
                "log likelihood per element": float(likelihood.mean()),
                "adjusted Rand index": float(np.mean(agreement)),
            }
        )
    drawn = jax.tree.map(lambda leaf: leaf[:DRAWN_SETS], mixtures)
    _, labels = jax.device_get(_describe(mixtures["model"], first))
    masks = first["mask"][:DRAWN_SETS]
    figure = figures.clusters(
        [x[real] for x, real in zip(first["inputs"], masks, strict=False)],
        [label[real] for label, real in zip(labels, masks, strict=False)],
        drawn["model"][1:],
        drawn["the true mixture"][1:],
    )
    return [
        Section(
            title="Beside expectation-maximisation",
            text=f"On {len(first['mask'])} of the test sets. EM from scratch starts at "
            f"means drawn as in k-means++ and makes {EM_STEPS} steps; of "
            f"{EM_STARTS} starts the one of the largest likelihood counts. The "
            "adjusted Rand index compares the most likely component of each element "
            "with the one it was drawn from. (EM may be more likely than the truth: a "
            "component that shrinks to a few points gains without bound.)",
            table=rows,
        ),
        Section(
            title="Clustered sets",
            text="Points have the colour of the component that is most likely by the "
            "model. Ellipses are of two standard deviations: filled by the model, "
            "dashed those of the true mixture.",
            figure=figure,
        ),
    ]


@jax.jit
def _mixtures(batch: Mapping) -> tuple[GaussianMixture, ...]:
    """The rows of the table: each has a mixture for every set of a batch."""
    x, mask, d = batch["inputs"], batch["mask"], batch["means"].shape[-1]
    k = batch["means"].shape[1]
    prediction = jnp.asarray(batch["prediction"], jnp.float32)
    model = mixture_parameters(prediction.reshape(len(x), k, 1 + 2 * d))

    def fit(mixture):
        return fit_mixture(mixture, x, mask, num_steps=EM_STEPS)

    def from_scratch(key):
        return fit(initial_mixture(key, x, k, mask))

    starts = jax.lax.map(from_scratch, jax.random.split(jax.random.key(0), EM_STARTS))
    likelihood = jax.lax.map(lambda m: mixture_log_likelihood(m, x, mask), starts)
    best = likelihood.argmax(0)  # [set]
    sets = jnp.arange(len(x))
    return (
        model,
        mixture_em_step(model, x, mask),
        fit(model),
        jax.tree.map(lambda leaf: leaf[0], starts),
        jax.tree.map(lambda leaf: leaf[best, sets], starts),
        GaussianMixture(batch["log_weights"], batch["means"], batch["scales"]),
    )


@jax.jit
def _describe(mixture: GaussianMixture, batch: Mapping) -> tuple[jax.Array, jax.Array]:
    """Log likelihoods per element [set] and likeliest components [set, element]."""
    x, mask = batch["inputs"], batch["mask"]
    likelihood = mixture_log_likelihood(mixture, x, mask) / mask.sum(1)
    return likelihood, mixture_posterior(mixture, x).argmax(-1)
