"""Sets of numbers and vectors whose targets are known exactly.

The datasets make their sets when they are asked for, as a pure function of a key:

dataset = data.MaxOfNumbers()
batch = dataset.sample(jax.random.key(0), 128, "train", dataset.arrays)
batch["inputs"], batch["mask"], batch["target"]  # [128, 10, 1], [128, 10], [128, 1]
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from data.datasets import Spec

STATISTICS = ("rotation", "correlation", "rank1", "random")


def generated_spec(
    name: str, feature_shape: tuple[int, ...], source: str = "generated"
) -> Spec:
    """The spec of sets with one number as their target."""
    return Spec(
        name=name,
        feature_shape=feature_shape,
        num_classes=1,
        class_names=(),
        sizes={},
        source=source,
        licence="",
        citation="",
        homepage="",
    )


def draw_mask(key: jax.Array, num_sets: int, min_size: int, max_size: int) -> jax.Array:
    """Which elements are real, bool [set, max_size]: the first n ~ U{min..max}."""
    size = jax.random.randint(key, (num_sets, 1), min_size, max_size + 1)
    return jnp.arange(max_size) < size


def check_sizes(**sizes: int) -> None:
    """Raises ValueError unless 1 <= the first <= the second, and so on."""
    smallest = 1
    for name, size in sizes.items():
        if size < smallest:
            raise ValueError(f"{name} must be {smallest} or more, not {size}")
        smallest = size


@dataclasses.dataclass(frozen=True)
class MaxOfNumbers:
    """The largest of some numbers.

        n ~ U{1..max_size},  x_i ~ U(0, high),  target max_i x_i

    The defaults are the protocol of Lee et al., "Set Transformer", ICML 2019, section
    5.1. Their published code differs: integers from 1 to 99.

    Attributes:
        max_size: most elements of a set, to which all are padded.
        high: numbers lie in [0, high).
        test_max_size: `max_size` of the test split; None: the same.
    """

    max_size: int = 10
    high: float = 100.0
    test_max_size: int | None = None

    arrays: ClassVar[dict] = {"train": {}, "validation": {}, "test": {}}

    def __post_init__(self):
        check_sizes(max_size=self.max_size)
        check_sizes(test_max_size=self.test_max_size or self.max_size)
        if not self.high > 0:
            raise ValueError(f"high must be > 0, not {self.high}")

    @property
    def spec(self) -> Spec:
        """What the sets are."""
        return generated_spec("max_of_numbers", (1,))

    def sample(self, key: jax.Array, num_sets: int, split: str, arrays: dict) -> dict:
        """Draws sets.

        Args:
            key: PRNG key.
            num_sets: how many.
            split: "train", "validation" or "test".
            arrays: not used.

        Returns:
            "inputs" float32 [set, element, 1], zero at padding; "mask" bool
            [set, element]; "target" float32 [set, 1].
        """
        del arrays
        max_size = self.max_size
        if split == "test" and self.test_max_size is not None:
            max_size = self.test_max_size
        size_key, number_key = jax.random.split(key)
        mask = draw_mask(size_key, num_sets, 1, max_size)
        numbers = jax.random.uniform(number_key, mask.shape, maxval=self.high)
        numbers = jnp.where(mask, numbers, 0)
        target = numbers.max(1, keepdims=True)  # padding is the smallest of numbers
        return {"inputs": numbers[..., None], "mask": mask, "target": target}


@dataclasses.dataclass(frozen=True)
class DigitSums:
    """The sum of some digits, each a one-hot vector.

        n ~ U{1..max_size},  x_i ~ U{0..9},  target sum_i x_i

    Zaheer et al., "Deep Sets", NeurIPS 2017, section 4.1.2: a network that is trained
    on ten digits at most adds up a hundred. (Their code draws the digits from 1 to 9
    and pads with a digit 0; here padding is masked.)

    Attributes:
        max_size: most elements of a set of train and validation.
        test_max_size: of the test split.
    """

    max_size: int = 10
    test_max_size: int = 100

    arrays: ClassVar[dict] = {"train": {}, "validation": {}, "test": {}}

    def __post_init__(self):
        check_sizes(max_size=self.max_size)
        check_sizes(test_max_size=self.test_max_size)

    @property
    def spec(self) -> Spec:
        """What the sets are."""
        return generated_spec("digit_sums", (10,))

    def sample(self, key: jax.Array, num_sets: int, split: str, arrays: dict) -> dict:
        """Draws sets.

        Args:
            key: PRNG key.
            num_sets: how many.
            split: "train", "validation" or "test".
            arrays: not used.

        Returns:
            "inputs" float32 [set, element, 10], zero at padding; "mask" bool
            [set, element]; "target" float32 [set, 1].
        """
        del arrays
        max_size = self.test_max_size if split == "test" else self.max_size
        size_key, digit_key = jax.random.split(key)
        mask = draw_mask(size_key, num_sets, 1, max_size)
        # -1 is no digit: its one-hot vector is zero.
        digits = jnp.where(mask, jax.random.randint(digit_key, mask.shape, 0, 10), -1)
        target = jnp.where(mask, digits, 0).sum(1, keepdims=True)
        return {
            "inputs": jax.nn.one_hot(digits, 10),
            "mask": mask,
            "target": target.astype(jnp.float32),
        }


@dataclasses.dataclass(frozen=True)
class PopulationStatistics:
    """A statistic of the Gaussian that the points of a set were drawn from.

    Every set has a covariance Σ of its own, in which one thing varies:

    ==============  ====================================  ============================
    `statistic`     Σ                                     target
    ==============  ====================================  ============================
    `rotation`      R(α) B B' R(α)' in 2-D, α ~ U(0, π)   entropy of the first
                                                          coordinate,
                                                          log(2πe Σ_11) / 2
    `correlation`   [[B, ρB], [ρB, B]] in 16-D            mutual information of the
                                                          two halves,
                                                          -8 log(1 - ρ²) / 2
    `rank1`         I + λ v v' in 32-D, λ ~ U(0, 1)       total correlation,
                                                          (sum_i log Σ_ii -
                                                          log det Σ) / 2
    `random`        C C' in 32-D, C' C = (A A' + I) / t,  total correlation
                    A_ij ~ U(0, 1), t = sum_ij A_ij²
    ==============  ====================================  ============================

    ρ has a random sign; its size is uniform on (0.01, 0.99) for one half of the sets
    and sqrt(1 - exp(-4u)), u uniform alike, for the other. B and v are those of the
    official generator: MATLAB's `rng(3)` is NumPy's `RandomState(3)`, read by columns.

    The four tasks are those of Zaheer et al., "Deep Sets", NeurIPS 2017, section 4.1.1.
    Parameters were on a grid there, and are drawn here; what is drawn is never seen
    twice. The paper speaks of 300 to 500 points a set and of halves of 16 dimensions,
    the official code has 512 points and halves of 8, as here.

    With `legacy_labels` the labels are those of the official generator, of which two
    are not what they are called. `rotation` squares the variance once more, which gives
    log(2πe Σ_11²) / 2. `correlation` counts one dimension of eight, -log(1 - ρ²) / 2,
    and multiplies noise by the upper factor C of Σ = C' C where the lower one, C', was
    called for: its points have the covariance C C', whose mutual information is
    8 log(1 + ρ²) / 2; `legacy_labels` draws them so, too. (`random` does likewise, but
    labels what it draws.)

    Attributes:
        statistic: see above.
        min_size: fewest points of a set.
        max_size: most points of a set, to which all are padded.
        legacy_labels: see above.
    """

    statistic: str = "rotation"
    min_size: int = 512
    max_size: int = 512
    legacy_labels: bool = False

    arrays: ClassVar[dict] = {"train": {}, "validation": {}, "test": {}}

    def __post_init__(self):
        check_sizes(min_size=self.min_size, max_size=self.max_size)
        if self.statistic not in STATISTICS:
            raise ValueError(
                f"statistic must be one of {', '.join(STATISTICS)}, "
                f"not {self.statistic!r}"
            )

    @property
    def dimension(self) -> int:
        """d, of the points."""
        return {"rotation": 2, "correlation": 16}.get(self.statistic, 32)

    @property
    def spec(self) -> Spec:
        """What the sets are."""
        name = f"population_statistics_{self.statistic}"
        return generated_spec(name, (self.dimension,))

    def distributions(
        self, key: jax.Array, num_sets: int
    ) -> tuple[jax.Array, jax.Array]:
        """Draws the Gaussians of sets.

        Args:
            key: PRNG key.
            num_sets: how many.

        Returns:
            Factors F [set, d, d] of the covariances F F', and targets [set, 1].
        """
        draw = getattr(self, f"_{self.statistic}")
        factor, target = jax.vmap(draw)(jax.random.split(key, num_sets))
        return factor, target[:, None]

    def _rotation(self, key):
        angle = jax.random.uniform(key, maxval=math.pi)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        rotation = jnp.array([[cos, -sin], [sin, cos]])
        factor = rotation @ _official_base(2, 2)
        variance = jnp.square(factor[0]).sum()
        power = 2 if self.legacy_labels else 1
        return factor, 0.5 * jnp.log(2 * math.pi * math.e * variance**power)

    def _correlation(self, key):
        half = self.dimension // 2
        sign_key, kind_key, size_key = jax.random.split(key, 3)
        u = jax.random.uniform(size_key, minval=0.01, maxval=0.99)
        size = jnp.where(
            jax.random.bernoulli(kind_key), u, jnp.sqrt(-jnp.expm1(-4 * u))
        )
        rho = size * jax.random.rademacher(sign_key, (), jnp.float32)
        base = _official_base(half, half)
        base = (base @ base.T + np.eye(half)) / np.square(base).sum()
        # Σ is a Kronecker product, and so are its factors.
        narrow = jnp.sqrt(1 - rho**2)
        lower = jnp.array([[1, 0], [rho, narrow]])
        factor = jnp.kron(lower, np.linalg.cholesky(base).astype(np.float32))
        information = -0.5 * jnp.log1p(-(rho**2))
        if self.legacy_labels:
            return factor.T, information
        return factor, half * information

    def _rank1(self, key):
        strength = jax.random.uniform(key)
        v = _official_base(self.dimension, 1)
        v = v / np.linalg.norm(v)
        # The symmetric root of I + λ v v' for a vector v of length one.
        factor = jnp.eye(self.dimension) + (jnp.sqrt(1 + strength) - 1) * (v @ v.T)
        variances = 1 + strength * jnp.square(v[:, 0])
        return factor, 0.5 * (jnp.log(variances).sum() - jnp.log1p(strength))

    def _random(self, key):
        entries = jax.random.uniform(key, (self.dimension, self.dimension))
        covariance = entries @ entries.T + jnp.eye(self.dimension)
        scale = jnp.square(entries).sum()
        factor = jnp.linalg.cholesky(covariance / scale).T
        log_variances = jnp.log(jnp.square(factor).sum(1)).sum()
        return factor, 0.5 * log_variances - jnp.log(jnp.diagonal(factor)).sum()

    def sample(self, key: jax.Array, num_sets: int, split: str, arrays: dict) -> dict:
        """Draws sets.

        Args:
            key: PRNG key.
            num_sets: how many.
            split: all splits are alike.
            arrays: not used.

        Returns:
            "inputs" float32 [set, max_size, d], zero at padding; "mask" bool
            [set, max_size]; "target" float32 [set, 1].
        """
        del split, arrays
        size_key, parameter_key, noise_key = jax.random.split(key, 3)
        mask = draw_mask(size_key, num_sets, self.min_size, self.max_size)
        factor, target = self.distributions(parameter_key, num_sets)
        noise = jax.random.normal(noise_key, (*mask.shape, self.dimension))
        points = jnp.einsum("sij,snj->sni", factor, noise)
        return {
            "inputs": jnp.where(mask[..., None], points, 0),
            "mask": mask,
            "target": target,
        }

    def from_sample_covariance(self, inputs: jax.Array, mask: jax.Array) -> jax.Array:
        """The targets by the covariance of the points, `S = 1/n sum_i x_i x_i'`.

        What a network can be compared with: the estimator of least variance among the
        unbiased ones where nothing is known of Σ but that the mean is zero. It
        takes out of every `log det S`, of d dimensions, what it is too large by in the
        mean, `sum_{i<d} ψ((n - i) / 2) + d log(2 / n)`.

        Ahmed and Gokhale, "Entropy expressions and their estimators for multivariate
        distributions", IEEE Transactions on Information Theory 35(3), 1989.

        Args:
            inputs: [set, element, d].
            mask: bool [set, element], of more than d elements a set.

        Returns:
            Estimates [set, 1] of the targets that are not `legacy_labels`.
        """
        count = mask.sum(-1)[:, None, None]
        points = jnp.where(mask[..., None], inputs, 0)
        covariance = jnp.einsum("sni,snj->sij", points, points, precision="highest")
        covariance /= count

        def log_determinant(dimensions: slice):
            block = covariance[:, dimensions, dimensions]
            size = block.shape[-1]
            n = count[:, 0]
            excess = jax.scipy.special.digamma((n - jnp.arange(size)) / 2).sum(-1)
            excess += size * jnp.log(2 / n[:, 0])
            return jnp.linalg.slogdet(block)[1] - excess

        d = self.dimension
        if self.statistic == "rotation":
            target = math.log(2 * math.pi * math.e) + log_determinant(slice(1))
        else:
            size = d // 2 if self.statistic == "correlation" else 1
            parts = [slice(start, start + size) for start in range(0, d, size)]
            target = sum(map(log_determinant, parts)) - log_determinant(slice(d))
        return target[:, None] / 2


def _official_base(rows: int, columns: int) -> np.ndarray:
    """`rng(3); rand(rows, columns)` of MATLAB, which fills columns first."""
    numbers = np.random.RandomState(3).random_sample(rows * columns)
    return numbers.reshape(columns, rows).T.astype(np.float32)
