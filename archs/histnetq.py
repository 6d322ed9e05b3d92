"""HistNetQ: quantification with a network invariant to permutations.

    x_1 ─ φ ─ sigmoid ─┐
    x_2 ─ φ ─ sigmoid ─┼─ one histogram per feature ─ dense layers ─ softmax ─ p
    x_m ─ φ ─ sigmoid ─┘

The bag is represented by the distribution of each feature over its elements, and the
network answers the prevalence of each class in the bag. It learns from bags labelled by
their prevalences; no element needs a label.

Pérez-Mon, Moreo, del Coz and González, "Quantification using permutation-invariant
networks based on histograms", Neural Computing and Applications 2025, arXiv 2403.15123.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from optax.projections import projection_simplex

from .contracts import check_weights, present
from .encoders import MLP, encode_elements
from .pooling import merge_aggregates
from .precision import widen


def sparsemax(logits: jax.Array) -> jax.Array:
    """The nearest point of the simplex, `argmin_p |p - z|²`, on the last axis.

    `p_k = max(0, z_k - τ)` with the τ for which they sum to one. Where all classes are
    present p is linear in z, as a prevalence is in the bag's histogram; classes can be
    absent, `p_k = 0` exactly. Martins and Astudillo, "From softmax to sparsemax", ICML
    2016.

    The gradient is that of `z - mean(z)` everywhere: the exact one where all classes
    are present. Elsewhere the exact one is zero for the absent classes, and a class
    absent from all answers would never be learned again.

    Args:
      logits: z, floating [..., K].

    Returns:
      Of the shape and dtype of the logits.
    """
    return _sparsemax(widen(logits)).astype(logits.dtype)


@jax.custom_jvp
def _sparsemax(logits: jax.Array) -> jax.Array:
    # Large logits would take digits from the threshold. What all have in common
    # changes nothing, and a class more than 1 behind another is absent.
    behind = jnp.maximum(logits - logits.max(-1, keepdims=True), -2)
    return jnp.vectorize(projection_simplex, signature="(k)->(k)")(behind)


@_sparsemax.defjvp
def _sparsemax_jvp(primals, tangents):
    (tangent,) = tangents
    return _sparsemax(*primals), tangent - tangent.mean(-1, keepdims=True)


OUTPUT_ACTIVATIONS = {"softmax": nn.softmax, "sparsemax": sparsemax}


class PrevalenceHead(nn.Module):
    """Dense layers and a softmax: a bag's representation becomes its prevalences.

    (Dense, LeakyReLU(0.01), Dropout) per hidden size, Dense(num_classes), softmax or
    sparsemax.

    Attributes:
      hidden_sizes: the width of each hidden layer; may be empty.
      num_classes: K.
      dropout_rate: applied after each hidden layer when `train`.
      output_activation: `softmax`, as published, or `sparsemax`, which answers absent
        classes with zero.
      dtype: compute dtype of the dense layers; the activation is float32 at least.

    Raises:
      ValueError: another output activation.
    """

    hidden_sizes: Sequence[int]
    num_classes: int
    dropout_rate: float = 0.0
    output_activation: str = "softmax"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps x [bag, r] to prevalences [bag, num_classes] which sum to one."""
        if self.output_activation not in OUTPUT_ACTIVATIONS:
            raise ValueError(
                f"output_activation must be one of {', '.join(OUTPUT_ACTIVATIONS)}, "
                f"not {self.output_activation!r}"
            )
        mlp = MLP(
            self.hidden_sizes, self.num_classes, self.dropout_rate, dtype=self.dtype
        )
        return OUTPUT_ACTIVATIONS[self.output_activation](widen(mlp(x, train=train)))


class HistNetQ(nn.Module):
    """`p = head(histogram_i(sigmoid(φ(x_i))))`.

    Attributes:
      encoder: φ, the network of one element, [n, *features] -> [n, f].
      histogram: a module of `histogram`, called with (values [bag, element, f] in
        [0, 1], mask, weights); gives [bag, f, num_bins].
      head: maps [bag, f * num_bins] to prevalences, such as `PrevalenceHead`.
    """

    encoder: nn.Module
    histogram: nn.Module
    head: nn.Module

    def encode(
        self, inputs: jax.Array, mask: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Inputs [bag, element, *features] -> values in [0, 1], [bag, element, f]."""
        features = encode_elements(self.encoder, inputs, mask, train=train)
        return nn.sigmoid(widen(features))

    def aggregate(
        self,
        features: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Values [bag, element, f] -> histograms side by side, [bag, f * num_bins]."""
        histogram = self.histogram(features, mask, weights)  # [bag, f, num_bins]
        return histogram.reshape(*histogram.shape[:-2], -1)

    def merge(self, representations: jax.Array, totals: jax.Array) -> jax.Array:
        """The representation of bags from those of their parts: a weighted mean.

        Args:
          representations: [chunk, bag, r], of parts of each bag.
          totals: floating [chunk, bag], the number (the sum of weights) of elements of
            each.

        Returns:
          [bag, r], exact; zero where all totals are zero.
        """
        return merge_aggregates(representations, totals, "mean")

    def decode(self, representation: jax.Array, *, train: bool = False) -> jax.Array:
        """Histograms [bag, f * num_bins] -> prevalences [bag, K]."""
        return self.head(representation, train=train)

    def __call__(
        self,
        inputs: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Estimates the prevalences of each bag.

        Args:
          inputs: floating [bag, element, *features].
          mask: None or bool [bag, element], True = a real element.
          weights: None or floating [bag, element], multiplicities of the elements.
          train: switches dropout on; needs the rng stream "dropout".

        Returns:
          Prevalences [bag, K], float32 or wider. A bag without any real element has
          the prevalences that the head gives to empty histograms.

        Raises:
          ValueError, TypeError: see `contracts.check_set` and `check_weights`.
        """
        check_weights(weights, inputs.shape[:2])
        features = self.encode(inputs, present(mask, weights), train=train)
        return self.decode(self.aggregate(features, mask, weights), train=train)
