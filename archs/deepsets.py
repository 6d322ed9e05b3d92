"""Deep Sets: φ per element, an aggregation, ρ for the whole.

    x_1 ─ φ ─┐
    x_2 ─ φ ─┼─ aggregate ─ ρ ─ f({x_1, ..., x_m})
    x_m ─ φ ─┘

An aggregation that does not know the order makes f a function of the set: for every
permutation of the m elements f({x_i}) stays what it is.

Zaheer, Kottur, Ravanbakhsh, Póczos, Salakhutdinov and Smola, "Deep Sets", NeurIPS 2017,
arXiv 1703.06114.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from .contracts import check_set, check_weights, present, zero_absent
from .encoders import dense, encode_elements
from .pooling import aggregate, merge_aggregates


class DeepSets(nn.Module):
    """`f({x_1, ..., x_m}) = ρ(aggregate_i φ(x_i))`.

    Attributes:
      phi: the network of one element, [n, *features] -> [n, f].
      rho: the network of the aggregate, [bag, r] -> output; r is f times the number of
        aggregations.
      aggregation: a name, a quantile or several, see `pooling.aggregate`; or a module
        such as `PowerMean`, called with (features, mask, weights).
    """

    phi: nn.Module
    rho: nn.Module
    aggregation: str | float | Sequence[str | float] | nn.Module = "mean"

    def encode(
        self, inputs: jax.Array, mask: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """φ: inputs [bag, element, *features] -> [bag, element, f]."""
        return encode_elements(self.phi, inputs, mask, train=train)

    def aggregate(
        self,
        features: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Features [bag, element, f] -> representation [bag, r]."""
        return aggregate(features, mask, self.aggregation, weights)

    def merge(self, representations: jax.Array, totals: jax.Array) -> jax.Array:
        """The representation of bags from those of their parts.

        Args:
          representations: [chunk, bag, r], of parts of each bag.
          totals: [chunk, bag], the number (the sum of weights) of elements of each.

        Returns:
          [bag, r].

        Raises:
          ValueError: the aggregation cannot be merged, see `merge_aggregates`.
        """
        return merge_aggregates(representations, totals, self.aggregation)

    def decode(self, representation: jax.Array, *, train: bool = False) -> jax.Array:
        """ρ: representation [bag, r] -> output."""
        return self.rho(representation, train=train)

    def __call__(
        self,
        inputs: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Maps bags to outputs.

        Args:
          inputs: floating [bag, element, *features].
          mask: None or bool [bag, element], True = a real element.
          weights: None or floating [bag, element], multiplicities of the elements.
          train: switches dropout on; needs the rng stream "dropout".

        Returns:
          What rho returns. A bag without any real element gives rho(0).

        Raises:
          ValueError, TypeError: see `contracts.check_set` and `check_weights`.
        """
        check_weights(weights, inputs.shape[:2])
        features = self.encode(inputs, present(mask, weights), train=train)
        return self.decode(self.aggregate(features, mask, weights), train=train)


class EquivariantLayer(nn.Module):
    """`y_i = x_i Λ + aggregate_j(x_j) Γ + b`: permuting the x permutes the y alike.

    Attributes:
      features: the width of y.
      aggregation: a name, a quantile, several or a module, as in `DeepSets`.
      dtype: compute dtype; parameters are float32.
    """

    features: int
    aggregation: str | float | Sequence[str | float] | nn.Module = "mean"
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Maps x [bag, element, d] to [bag, element, features].

        Where the mask is False or the weight is zero there are zeros.
        """
        check_set(x, mask)
        check_weights(weights, x.shape[:2])
        real = present(mask, weights)
        x = zero_absent(x, real)
        pooled = aggregate(x, mask, self.aggregation, weights)
        own = dense(self.features, x.shape[-1], dtype=self.dtype)(x)
        shared = dense(
            self.features, pooled.shape[-1], dtype=self.dtype, use_bias=False
        )(pooled)
        return zero_absent(own + shared[:, None], real)
