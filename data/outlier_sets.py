"""Sets in which one element is of another class than the rest."""

import dataclasses
import os

import jax
import jax.numpy as jnp

from data.datasets import DataError, Spec, load, normalize
from data.samplers import class_table, draw_bags


@dataclasses.dataclass(frozen=True)
class OutlierSets:
    """Set anomaly: which of `set_size` examples does not belong?

    All examples but one are of a class drawn uniformly, that one of another class; it
    stands at any position with the same probability, and no example comes twice. The
    examples of different splits are different ones.

    The task of Zaheer et al., "Deep Sets", NeurIPS 2017 (15 faces that share two
    attributes and one without them) and Lee et al., "Set Transformer", ICML 2019 (7
    and one), of which both used photographs that cannot be redistributed.

    Attributes:
        examples: a dataset that `data.load` knows.
        set_size: elements of a set, the outlier among them.
        data_dir: see `data.load`.
        source_dir: see `data.load`.
        download: see `data.load`.
    """

    examples: str = "fashion_mnist"
    set_size: int = 8
    data_dir: str | os.PathLike | None = None
    source_dir: str | os.PathLike | None = None
    download: bool = False

    def __post_init__(self):
        if self.set_size < 3:
            raise ValueError(
                "set_size must be 3 or more, or nothing tells the outlier from the "
                f"rest, not {self.set_size}"
            )
        dataset = load(
            self.examples,
            data_dir=self.data_dir,
            source_dir=self.source_dir,
            download=self.download,
        )
        arrays = {}
        for split, values in dataset.splits.items():
            table = class_table(values["labels"], dataset.spec.num_classes)
            if len(table.count) < 2 or table.count.min() < self.set_size - 1:
                raise DataError(
                    f"{self.examples} is too small for sets of {self.set_size}: its "
                    f"{split} split has classes of {table.count.min()} examples."
                )
            arrays[split] = {
                "inputs": jnp.asarray(values["inputs"]),
                "labels": jnp.asarray(values["labels"]),
                "table": table,
            }
        object.__setattr__(self, "dataset", dataset)
        object.__setattr__(self, "arrays", arrays)

    @property
    def spec(self) -> Spec:
        """That of the examples, with one output per element."""
        return dataclasses.replace(
            self.dataset.spec,
            name=f"outlier_sets of {self.examples}",
            num_classes=1,
            class_names=(),
        )

    def sample(self, key: jax.Array, num_sets: int, split: str, arrays: dict) -> dict:
        """Draws sets of a split.

        Args:
            key: PRNG key.
            num_sets: how many.
            split: "train", "validation" or "test".
            arrays: `self.arrays`.

        Returns:
            "inputs" float32 [set, set_size, *feature_shape], normalised; "mask" bool
            [set, set_size], all True; "target" int32 [set], the position of the
            outlier; "labels" int32 [set, set_size], the elements' classes.
        """
        normal_key, outlier_key, draw_key = jax.random.split(key, 3)
        num_classes = self.dataset.spec.num_classes
        normal = jax.random.randint(normal_key, (num_sets,), 0, num_classes)
        shift = jax.random.randint(outlier_key, (num_sets,), 1, num_classes)
        outlier = (normal + shift) % num_classes
        share = 1 / self.set_size
        prevalence = (1 - share) * jax.nn.one_hot(normal, num_classes)
        prevalence += share * jax.nn.one_hot(outlier, num_classes)
        indices, _ = draw_bags(
            draw_key, arrays[split]["table"], prevalence, self.set_size, replace=False
        )
        labels = arrays[split]["labels"][indices]  # [set, element]
        inputs = normalize(
            arrays[split]["inputs"][indices], self.dataset.shift, self.dataset.scale
        )
        return {
            "inputs": inputs,
            "mask": jnp.ones(indices.shape, bool),
            "target": jnp.argmax(labels == outlier[:, None], axis=-1),
            "labels": labels,
        }
