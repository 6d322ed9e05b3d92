"""EMQNet: maximum-likelihood quantification as a network over sets.

    x_1 ─ φ ─ classifiers ─ calibration ─┐
    x_2 ─ φ ─ classifiers ─ calibration ─┼─ EM over the set ─ p
    x_m ─ φ ─ classifiers ─ calibration ─┘

The classical quantifier EMQ (Saerens, Latinne and Decaestecker, 2002) is a set
network: its aggregation is the prevalences of largest likelihood. Here it is one,
trained as one: several classifiers learn from labelled examples, and the
calibration of their posteriors, with the pseudo-counts of the aggregation, from bags
with a loss of quantification, through the unrolled steps of EM.

**Cross-fitting.** A classifier is too sure of the examples it learned from, so bags of
those examples would teach a wrong calibration. Each member of the ensemble leaves one
fold of the training examples out, and bags are made of what a member says of its own
fold: every example serves both purposes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from .contracts import check_mask, check_weights, present, zero_absent
from .encoders import Classifier, encode_elements
from .precision import widen


class EMQNet(nn.Module):
    """`p = argmax_p sum_i log sum_k p_k q_ik + sum_k c_k log p_k`, q by classifiers.

    `q_i = softmax(A z_i + b)` is the calibrated posterior of element i at equal
    prevalences of the classes, z_i the mean of the members' logits; the matrix A
    (near the identity), b and the pseudo-counts c >= 0 are learned.

    The members expect to be trained at equal class prevalences, so that posteriors are
    proportional to likelihoods.

    Attributes:
      encoder: φ of each member, [n, *features] -> [n, f].
      num_classes: K.
      num_members: classifiers in the ensemble, with weights of their own.
      num_steps: EM steps.
    """

    encoder: nn.Module
    num_classes: int
    num_members: int = 1
    num_steps: int = 50

    def setup(self):
        size = self.num_classes
        if self.num_members < 1:
            raise ValueError(f"num_members must be 1 or more, not {self.num_members}.")
        # A list and not a vmap, which makes grouped convolutions: slow on CPUs.
        self.classifiers = [
            Classifier(self.encoder.clone(parent=None, name=None), size)
            for _ in range(self.num_members)
        ]
        # Deviations from the identity: decaying weights decay to no calibration.
        self.log_scale = self.param("log_scale", nn.initializers.zeros, ())
        self.mixing = self.param("mixing", nn.initializers.zeros, (size, size))
        self.bias = self.param("bias", nn.initializers.zeros, (size,))
        # softplus(-4) = 0.02 of an element.
        self.pseudo_count = self.param(
            "pseudo_count", nn.initializers.constant(-4.0), (size,)
        )

    def classify(
        self, inputs: jax.Array, mask: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Inputs [bag, element, *features] -> logits [member, bag, element, K]."""
        return jnp.stack(
            [encode_elements(c, inputs, mask, train=train) for c in self.classifiers]
        )

    def calibrate(self, logits: jax.Array) -> jax.Array:
        """Logits [..., K] -> calibrated log-posteriors [..., K]."""
        scale = jnp.exp(self.log_scale)
        logits = widen(logits)
        return nn.log_softmax(scale * (logits + logits @ self.mixing) + self.bias)

    def encode(
        self, inputs: jax.Array, mask: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Inputs [bag, element, *features] -> log-posteriors [bag, element, K]."""
        return self.calibrate(self.classify(inputs, mask, train=train).mean(0))

    def aggregate(
        self,
        features: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Log-posteriors [bag, element, K] -> prevalences [bag, K].

        The EM steps from equal prevalences, each element counted by its weight:

            E:  r_ik ∝ p_k q_ik,  sum_k r_ik = 1
            M:  p_k ∝ sum_i w_i r_ik + c_k

        A bag without any real element has the prevalences of the pseudo-counts.
        """
        check_mask(mask, features.shape[:-1])
        check_weights(weights, features.shape[:-1])
        count = jnp.ones((), features.dtype) if weights is None else weights
        real = present(mask, weights)
        if real is not None:
            count = jnp.where(real, count, 0)
        features = zero_absent(features, real)
        count = jnp.broadcast_to(count, features.shape[:-1]).astype(features.dtype)
        # An element's scale changes nothing, hence no gradient: that of a maximum
        # divides by how many are equal to it, none where XLA rounds it anew.
        largest = jax.lax.stop_gradient(features.max(-1, keepdims=True))
        likelihood = jnp.exp(features - largest)
        pseudo_count = nn.softplus(self.pseudo_count)

        @jax.checkpoint
        def step(p, _):  # p [bag, K]
            joint = p[..., None, :] * likelihood
            share = count / joint.sum(-1)
            p = jnp.einsum("...mk,...m->...k", joint, share) + pseudo_count
            return p / p.sum(-1, keepdims=True), None

        shape = (*features.shape[:-2], self.num_classes)
        start = jnp.full(shape, 1 / self.num_classes, features.dtype)
        return jax.lax.scan(step, start, None, length=self.num_steps)[0]

    def decode(self, representation: jax.Array, *, train: bool = False) -> jax.Array:
        """The prevalences, as they are."""
        return representation

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
          weights: None or multiplicities [bag, element].
          train: switches dropout on; needs the rng stream "dropout".

        Returns:
          Prevalences [bag, K], each row summing to one.

        Raises:
          ValueError, TypeError: see `contracts.check_set` and `check_weights`.
        """
        check_weights(weights, inputs.shape[:2])
        features = self.encode(inputs, present(mask, weights), train=train)
        return self.decode(self.aggregate(features, mask, weights), train=train)
