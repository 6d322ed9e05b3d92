"""Images read pixel by pixel."""

import dataclasses
import functools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np

from data import sequences
from data.datasets import DataError, Dataset, Spec, load, normalize


@dataclasses.dataclass(frozen=True)
class SequentialImages:
    """Images to be classified, one pixel a step, row by row.

    With `permutation_seed` the pixels come in an order of their own, the same for all
    images, so that neighbours are far apart: "permuted MNIST".

    Le, Jaitly and Hinton, "A simple way to initialize recurrent networks of rectified
    linear units", 2015. Chance: the share of the most frequent class, about 1/10 of
    digits. The licence is that of the images, see `spec`.

    Attributes:
        examples: labelled images by name, such as "mnist", "fashion_mnist" or "digits";
            see `data.load`.
        permutation_seed: of the order of the pixels; None: row by row.
        data_dir: see `data.load`.
        source_dir: see `data.load`.
        download: see `data.load`.
    """

    examples: str = "mnist"
    permutation_seed: int | None = None
    data_dir: str | os.PathLike | None = None
    source_dir: str | os.PathLike | None = None
    download: bool = False

    @functools.cached_property
    def _dataset(self) -> Dataset:
        dataset = load(
            self.examples,
            data_dir=self.data_dir,
            source_dir=self.source_dir,
            download=self.download,
        )
        if len(dataset.spec.feature_shape) != 3:
            raise DataError(
                "examples must be images [height, width, channel], but those of "
                f"{self.examples} are {list(dataset.spec.feature_shape)}."
            )
        return dataset

    @property
    def num_pixels(self) -> int:
        """Steps of a sequence."""
        return math.prod(self._dataset.spec.feature_shape[:2])

    @property
    def spec(self) -> Spec:
        """The classes of the images; a step has the channels of a pixel."""
        spec = self._dataset.spec
        kind = "sequential" if self.permutation_seed is None else "permuted"
        return dataclasses.replace(
            spec, name=f"{kind}_{spec.name}", feature_shape=spec.feature_shape[2:]
        )

    @functools.cached_property
    def arrays(self) -> dict:
        """{split: {"inputs", "lengths", "targets"}}; pixels as stored."""
        order = np.arange(self.num_pixels)
        if self.permutation_seed is not None:
            order = np.random.default_rng(self.permutation_seed).permutation(order)
        arrays = {}
        for split, stored in self._dataset.splits.items():
            images, labels = stored["inputs"], stored["labels"]
            pixels = images.reshape(len(images), self.num_pixels, -1)[:, order]
            arrays[split] = {
                "inputs": jnp.asarray(pixels),
                "lengths": jnp.full(len(labels), self.num_pixels, jnp.int32),
                "targets": jnp.asarray(labels),
            }
        return arrays

    @property
    def buckets(self) -> tuple[tuple[int, int, int], ...]:
        """All images of the train split are of one length."""
        return ((0, self.spec.sizes["train"], self.num_pixels),)

    def select(self, indices: jax.Array, split: str, arrays: dict) -> dict:
        """Images of given indices.

        Args:
            indices: int [n], of images of the split.
            split: "train", "validation" or "test".
            arrays: `self.arrays`.

        Returns:
            "inputs" float32 [n, time, channel] in [-1, 1]; "lengths" int32 [n], all of
            them the number of pixels; "targets" int32 [n], the class.
        """
        rows = sequences.select(arrays[split], indices)
        inputs = normalize(rows["inputs"], self._dataset.shift, self._dataset.scale)
        return rows | {"inputs": inputs}
