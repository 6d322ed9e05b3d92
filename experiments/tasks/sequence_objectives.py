"""What a sequence model can be asked for: objectives of `SequencePrediction`.

An objective is a function `f(prediction, batch) -> {measure: values}`. `prediction` is
what the model returned, in float32: one answer a sequence, [sequence, K], or one a
step, [sequence, step, K]. `batch` is a sample of the dataset with "inputs", "lengths",
"targets" and, where there is a target a step, "target_mask" [sequence, step]. The
values are of shape [sequence], or [sequence, step] with a mask beside them,
`(values, mask)`; their mean is what is reported. The first measure is the loss.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax


def _check_shape(prediction: jax.Array, expected: tuple, targets: jax.Array) -> None:
    # (n, 1) against (n,) would broadcast to n x n, and the model would learn the mean.
    if prediction.shape != expected:
        raise ValueError(
            f"the model must return predictions of shape {expected} for targets of "
            f"shape {targets.shape}, not {prediction.shape}"
        )


def cross_entropy(prediction: jax.Array, batch: Mapping) -> dict:
    """Cross-entropy in nats, and accuracy, of a class a sequence or a step.

    Logits [sequence, K] with targets int [sequence], or [sequence, step, K] with
    [sequence, step].
    """
    targets = batch["targets"]
    _check_shape(prediction, (*targets.shape, prediction.shape[-1]), targets)
    values = optax.softmax_cross_entropy_with_integer_labels(prediction, targets)
    correct = (prediction.argmax(-1) == targets).astype(jnp.float32)
    if targets.ndim == 1:
        return {"cross_entropy": values, "accuracy": correct}
    mask = batch["target_mask"]
    return {"cross_entropy": (values, mask), "accuracy": (correct, mask)}


def legal_symbol(prediction: jax.Array, batch: Mapping) -> dict:
    """Cross-entropy of the next symbol of a grammar; whether the most likely is legal.

    Logits [sequence, step, K]; the batch has "legal" bool [sequence, step, K]. Of
    "sequence_legal" a sequence counts if all its steps are legal.
    """
    measures = cross_entropy(prediction, batch)
    mask, chosen = batch["target_mask"], prediction.argmax(-1)
    legal = jnp.take_along_axis(batch["legal"], chosen[..., None], -1)[..., 0]
    return {
        "cross_entropy": measures["cross_entropy"],
        "legal": (legal.astype(jnp.float32), mask),
        "sequence_legal": (legal | ~mask).all(1).astype(jnp.float32),
    }


def frame_likelihood(prediction: jax.Array, batch: Mapping) -> dict:
    """Negative log likelihood of frames of independent notes, in nats.

        NLL^(t) = - sum_k [ y_k log p_k + (1 - y_k) log(1 - p_k) ],  p = sigma(logits)

    Logits and targets are of shape [sequence, step, note]. "frame_nll" is the mean over
    all frames; "later_frame_nll" leaves out the first of each sequence, which follows
    nothing, as the code of Bai, Kolter and Koltun (2018) does; "sequence_nll" is the
    mean over sequences of the mean over their frames.
    """
    targets, mask = batch["targets"], batch["target_mask"]
    _check_shape(prediction, targets.shape, targets)
    values = optax.sigmoid_binary_cross_entropy(prediction, targets).sum(-1)
    count = jnp.maximum(mask.sum(1), 1)
    return {
        "frame_nll": (values, mask),
        "later_frame_nll": (values, mask & (jnp.arange(mask.shape[1]) > 0)),
        "sequence_nll": jnp.where(mask, values, 0).sum(1) / count,
    }


def squared_error(prediction: jax.Array, batch: Mapping) -> dict:
    """Squared error of a number a sequence; prediction [sequence, 1]."""
    targets = batch["targets"]
    _check_shape(prediction, (len(targets), 1), targets)
    return {"squared_error": jnp.square(prediction[:, 0] - targets.reshape(-1))}
