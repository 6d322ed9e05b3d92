"""Networks of equivariant layers: every element is seen in the light of its set.

    x_1 ─ φ ─┐        ┌─ ... ─┐        ┌─ head ─ y_1
    x_2 ─ φ ─┼─ layer ┼─ ... ─┼─ layer ┼─ head ─ y_2      or, pooled,  ─ head ─ y
    x_m ─ φ ─┘        └─ ... ─┘        └─ head ─ y_m

Layers whose outputs move with the elements (`EquivariantLayer`, `SAB`, `ISAB`) give one
answer per element, or an invariant one after an aggregation.

Zaheer et al., "Deep Sets", NeurIPS 2017, arXiv 1703.06114, section 3; Lee et al., "Set
Transformer", ICML 2019, arXiv 1810.00825. With set normalisation and residuals it is
of the kind of Deep Sets++, Zhang, Tozzo, Higgins and Ranganath, "Set Norm and
equivariant skip connections", ICML 2022, arXiv 2206.11925.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax

from .contracts import check_weights, present, zero_absent
from .dropout import Dropout
from .encoders import encode_elements
from .pooling import aggregate
from .set_transformer import normalize


class EquivariantNetwork(nn.Module):
    """`head(σ(layer(... σ(layer(φ(x_1), ..., φ(x_m))))))`, by element or pooled.

    A layer is `x <- σ(norm(layer(x)))` or, with `residual`,
    `x <- x + layer(σ(norm(x)))`: on this clean path nothing but sums lies.

    Attributes:
      layer: called with (x [bag, element, d], mask, weights), returns [bag, element,
        f]; the network has `num_layers` copies of it with parameters of their own.
      head: maps [n, f] to [n, ...], called as `head(x, train=train)`.
      encoder: φ, the network of one element, [n, *features] -> [n, d]; None: the
        inputs are [bag, element, d].
      num_layers: number of layers.
      activation: σ, the name of a function of `flax.linen`; None: none.
      normalization: norm, `layer` (of each element), `set` (`SetNorm`) or None.
      residual: layers add to what they are given, which has then their width.
      aggregation: pools the elements before the head, a name or several, see
        `pooling.aggregate`; None: the head answers for every element on its own.
      dropout_rate: before the head, when `train`; needs the rng stream "dropout".
    """

    layer: nn.Module
    head: nn.Module
    encoder: nn.Module | None = None
    num_layers: int = 3
    activation: str | None = None
    normalization: str | None = None
    residual: bool = False
    aggregation: str | Sequence[str] | None = None
    dropout_rate: float = 0.0

    def encode(
        self, inputs: jax.Array, mask: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """φ: inputs [bag, element, *features] -> [bag, element, d]."""
        if self.encoder is None:
            return inputs
        return encode_elements(self.encoder, inputs, mask, train=train)

    @nn.compact
    def aggregate(
        self,
        features: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Features [bag, element, d] -> [bag, element, f] or, pooled, [bag, r].

        Zero at absent elements.
        """
        x = zero_absent(features, present(mask, weights))
        activation = getattr(nn, self.activation or "", lambda x: x)
        for i in range(self.num_layers):
            layer = self.layer.copy(name=f"layer_{i}")

            def prepare(x: jax.Array, name: str = f"norm_{i}") -> jax.Array:
                x = normalize(self.normalization, x, mask, weights, name=name)
                return activation(x)

            if self.residual:
                y = layer(prepare(x), mask, weights)
                if y.shape != x.shape:
                    raise ValueError(
                        "with residual a layer must keep the width of its elements, "
                        f"but made {y.shape} of {x.shape}; give an encoder of the "
                        "width of the layers."
                    )
                x = x + y
            else:
                x = prepare(layer(x, mask, weights))
        if self.aggregation is not None:
            return aggregate(x, mask, self.aggregation, weights)
        return zero_absent(x, present(mask, weights))

    @nn.compact
    def decode(self, representation: jax.Array, *, train: bool = False) -> jax.Array:
        """Representations [bag, r] or [bag, element, f] -> output of the head."""
        x = Dropout(self.dropout_rate)(representation, train=train)
        y = self.head(x.reshape(-1, x.shape[-1]), train=train)
        return y.reshape(*x.shape[:-1], *y.shape[1:])

    def __call__(
        self,
        inputs: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Maps bags to an output per element or, with an aggregation, per bag.

        Args:
          inputs: floating [bag, element, *features].
          mask: None or bool [bag, element], True = a real element.
          weights: None or floating [bag, element], multiplicities of the elements.
          train: switches dropout on.

        Returns:
          [bag, element, ...], zero at absent elements; with an aggregation [bag, ...].

        Raises:
          ValueError: a wrong rank, shape or field.
          TypeError: a wrong dtype.
        """
        check_weights(weights, inputs.shape[:2])
        if self.activation is not None and not hasattr(nn, self.activation):
            raise ValueError(
                "activation must name a function of flax.linen such as 'tanh', or be "
                f"None, but {self.activation!r} was given."
            )
        real = present(mask, weights)
        features = self.encode(inputs, real, train=train)
        representation = self.aggregate(features, mask, weights)
        y = self.decode(representation, train=train)
        return y if self.aggregation is not None else zero_absent(y, real)
