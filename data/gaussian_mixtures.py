"""Sets drawn from random mixtures of Gaussians, to be clustered in one pass."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from data.datasets import Spec


@dataclasses.dataclass(frozen=True)
class GaussianMixtures:
    """Amortised clustering: every set comes from a mixture of its own.

        n ~ U{min_size..max_size},  μ_k ~ U(-bound, bound)^d,  π ~ Dirichlet(1, ..., 1)
        x_i ~ sum_k π_k N(μ_k, scale² I)

    Sets to learn from that are drawn together have one size, as in the code of the
    paper; those of validation and test have each its own.

    The defaults are the protocol of Lee et al., "Set Transformer", ICML 2019, section
    5.3; with sets of 1,000 to 5,000 elements and six components it is the large one of
    their supplement.

    Attributes:
        min_size: fewest elements of a set.
        max_size: most elements of a set, to which all are padded.
        num_components: k.
        num_features: d, the dimension of the space.
        bound: means lie in a cube of twice this side.
        scale: standard deviation of every component in every direction.
    """

    min_size: int = 100
    max_size: int = 500
    num_components: int = 4
    num_features: int = 2
    bound: float = 4.0
    scale: float = 0.3

    arrays: ClassVar[dict] = {"train": {}, "validation": {}, "test": {}}

    def __post_init__(self):
        for name in ("min_size", "num_components", "num_features"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if self.max_size < self.min_size:
            raise ValueError(
                f"max_size must be min_size ({self.min_size}) or more, "
                f"not {self.max_size}"
            )
        for name in ("bound", "scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, not {getattr(self, name)}")

    @property
    def size_buckets(self) -> tuple[int, ...]:
        """Sizes to pad sets to learn from to: fifths of the largest."""
        sizes = (math.ceil(self.max_size * fifth / 5) for fifth in range(1, 6))
        # No less than there are components, of which none may be cut off.
        least = max(self.min_size, self.num_components)
        return tuple(size for size in sizes if size >= least)

    @property
    def spec(self) -> Spec:
        """What the sets are; `num_classes` counts the parameters of a mixture."""
        return Spec(
            name="gaussian_mixtures",
            feature_shape=(self.num_features,),
            num_classes=self.num_components * (1 + 2 * self.num_features),
            class_names=(),
            sizes={},
            source="generated",
            licence="",
            citation="",
            homepage="",
        )

    def sample(self, key: jax.Array, num_sets: int, split: str, arrays: dict) -> dict:
        """Draws sets and the mixtures they come from.

        Args:
            key: PRNG key.
            num_sets: how many.
            split: "train", "validation" or "test".
            arrays: not used.

        Returns:
            "inputs" float32 [set, max_size, d], zero at padding; "mask" bool [set,
            max_size]; "components" int32 [set, max_size], which component made an
            element; and the mixture: "log_weights" [set, k], "means" and "scales"
            [set, k, d].
        """
        del arrays
        size_key, weight_key, mean_key, component_key, noise_key = jax.random.split(
            key, 5
        )
        k, d = self.num_components, self.num_features
        num_sizes = 1 if split == "train" else num_sets
        size = jax.random.randint(
            size_key, (num_sizes, 1), self.min_size, self.max_size + 1
        )
        mask = jnp.broadcast_to(
            jnp.arange(self.max_size) < size, (num_sets, self.max_size)
        )
        # A Dirichlet by its gamma variables, in logarithms: no weight is ever zero.
        log_weights = jax.nn.log_softmax(
            jax.random.loggamma(weight_key, 1.0, (num_sets, k))
        )
        means = jax.random.uniform(
            mean_key, (num_sets, k, d), minval=-self.bound, maxval=self.bound
        )
        components = jax.random.categorical(
            component_key, log_weights[:, None], shape=(num_sets, self.max_size)
        )
        noise = jax.random.normal(noise_key, (num_sets, self.max_size, d))
        centre = jnp.take_along_axis(means, components[..., None], axis=1)
        inputs = jnp.where(mask[..., None], centre + self.scale * noise, 0)
        return {
            "inputs": inputs,
            "mask": mask,
            "components": components,
            "log_weights": log_weights,
            "means": means,
            "scales": jnp.full((num_sets, k, d), self.scale),
        }
