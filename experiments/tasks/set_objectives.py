"""What a set network can be asked for: objectives of `SetPrediction`.

An objective is a function `f(prediction, batch) -> {measure: values}`. `prediction` is
what the model returned, in float32; `batch` is a sample of the dataset, with "inputs",
"mask" and "target". The values are of shape [set], or [set, ...] with a mask beside
them, `(values, mask)`; their mean is what is reported. The first measure is the loss.
"""

from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
import optax

from archs import (
    GaussianMixture,
    mixture_em_step,
    mixture_log_likelihood,
    mixture_parameters,
)


def _check_same_shape(prediction: jax.Array, target: jax.Array) -> None:
    # (n, 1) against (n,) would broadcast to n x n, and the model would learn the mean.
    chex.assert_equal_shape(
        (prediction, target),
        custom_message=(
            f"the model must return predictions of the target's shape {target.shape}, "
            f"not {prediction.shape}"
        ),
        exception_type=ValueError,
    )


def absolute_error(prediction: jax.Array, batch: Mapping) -> dict[str, jax.Array]:
    """Mean absolute error; prediction and target [set, k]."""
    _check_same_shape(prediction, batch["target"])
    return {"absolute_error": jnp.abs(prediction - batch["target"]).mean(-1)}


def squared_error(prediction: jax.Array, batch: Mapping) -> dict[str, jax.Array]:
    """Mean squared error, and the absolute one; prediction and target [set, k]."""
    measures = absolute_error(prediction, batch)
    return {
        "squared_error": jnp.square(prediction - batch["target"]).mean(-1)
    } | measures


def digit_sum(prediction: jax.Array, batch: Mapping) -> dict[str, jax.Array]:
    """Absolute error of a whole number, and how often its rounding is exact.

    Prediction and target are of shape [set, 1]; the target is integral.
    """
    exact = jnp.round(prediction) == batch["target"]
    return absolute_error(prediction, batch) | {"exact": exact.all(-1)}


def poisson_count(prediction: jax.Array, batch: Mapping) -> dict[str, jax.Array]:
    """Negative log likelihood of a count c under a Poisson distribution.

        rate = softplus(prediction),  NLL = rate - c log(rate) + log(c!)

    "accuracy" is how often the mode of the distribution, floor(rate), is the count.
    Prediction and target are of shape [set, 1].
    """
    target = batch["target"]
    _check_same_shape(prediction, target)
    # Above zero, where softplus underflows: the likelihood stays finite.
    rate = jnp.maximum(jax.nn.softplus(prediction), jnp.finfo(jnp.float32).tiny)
    log_likelihood = jax.scipy.stats.poisson.logpmf(target, rate)
    return {
        "negative_log_likelihood": -log_likelihood.sum(-1),
        "accuracy": (jnp.floor(rate) == target).all(-1),
    }


def classification(prediction: jax.Array, batch: Mapping) -> dict[str, jax.Array]:
    """Cross-entropy and accuracy of the class of a set.

    The prediction is logits [set, K], the target int [set].
    """
    target = batch["target"]
    if prediction.ndim != 2 or prediction.shape[:1] != target.shape:
        raise ValueError(
            f"the model must return logits of shape ({len(target)}, classes), one row "
            f"for each of the targets {target.shape}, not {prediction.shape}"
        )
    return {
        "cross_entropy": optax.softmax_cross_entropy_with_integer_labels(
            prediction, target
        ),
        "accuracy": prediction.argmax(-1) == target,
    }


def element_classification(
    prediction: jax.Array, batch: Mapping
) -> dict[str, jax.Array]:
    """Cross-entropy and accuracy of which element of a set it is.

    The prediction is one number per element, [set, element] or [set, element, 1]; a
    softmax over the real elements of a set makes probabilities of it. The target is the
    position, int [set].
    """
    mask = batch["mask"]
    if prediction.shape not in (mask.shape, (*mask.shape, 1)):
        raise ValueError(
            f"the model must return one number per element, of shape {mask.shape}, "
            f"not {prediction.shape}"
        )
    scores = jnp.where(
        mask, prediction.reshape(mask.shape), jnp.finfo(prediction.dtype).min
    )
    return classification(scores, batch)


def mixture(prediction: jax.Array, batch: Mapping) -> dict[str, jax.Array]:
    """Negative log likelihood of a set's elements under the mixture predicted for them.

    The prediction [set, k, 1 + 2d] or [set, k (1 + 2d)] is read by
    `archs.mixture_parameters`. Log likelihoods are means over the elements of a set:
    that of the prediction, of what one step of expectation-maximisation makes of it,
    and of the mixture that the set was drawn from.
    """
    x, mask = batch["inputs"], batch["mask"]
    num_sets, num_components, d = batch["means"].shape
    if prediction.size != num_sets * num_components * (1 + 2 * d):
        raise ValueError(
            f"the model must return a mixture of {num_components} components, of shape "
            f"{(num_sets, num_components, 1 + 2 * d)}, not {prediction.shape}"
        )
    found = mixture_parameters(prediction.reshape(num_sets, num_components, -1))
    improved = mixture_em_step(jax.lax.stop_gradient(found), x, mask)
    true = GaussianMixture(batch["log_weights"], batch["means"], batch["scales"])
    size = jnp.maximum(mask.sum(1), 1)
    log_likelihood, after_em, of_truth = (
        mixture_log_likelihood(m, x, mask) / size for m in (found, improved, true)
    )
    return {
        "negative_log_likelihood": -log_likelihood,
        "log_likelihood": log_likelihood,
        "log_likelihood_after_em_step": after_em,
        "log_likelihood_of_truth": of_truth,
    }
