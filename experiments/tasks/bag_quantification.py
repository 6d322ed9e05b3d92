"""Quantification from given bags that are labelled by their prevalences.

The labelled documents that come with some of them can be made into further bags.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import data
from data.samplers import (
    class_table,
    draw_bags,
    draw_prevalences,
    draw_whole_bags,
    join_bags,
    mix_bags,
    pair_weights,
)
from experiments.loop import Training
from experiments.optimizers import Optimizer
from experiments.report import Section
from experiments.tasks import quantification_report, supervised
from experiments.tasks.prevalence import (
    PrevalenceTask,
    check_set_network,
    pools_linearly,
)

EVALUATION_BATCH = 20


@dataclasses.dataclass(frozen=True)
class BagQuantification(PrevalenceTask):
    """Learns prevalences from given bags, each labelled by its prevalences.

    A few hundred bags are soon learned by heart, so a step learns from new ones that
    are made of them. `mixer` says how:

    - `exact`: two bags at a time, mixed in representation space. Means and histograms
      are linear in the empirical measure, so of w bags of one kind and 1 - w of another
      the representation is `w r_1 + (1 - w) r_2` and the label
      `w p_1 + (1 - w) p_2`, w ~ U(0, 1). A mixture costs the head alone. For other
      poolings two whole bags become one of twice the size, which is exact too.
    - `published`: the bag mixer of the HistNetQ paper, see `data.samplers.mix_bags`;
      its labels are noisy.
    - None: the bags as they are.

    Attributes:
      model: a set network with `encode`, `aggregate`, `decode`; inputs
        [bag, element, *features], output [bag, K].
      dataset: labelled bags.
      optimizer: the config's.
      training: the config's.
      loss: a measure of `archs.quantification`; for ordered classes
        `normalized_match_distance`. The validation bags' mean of it chooses the best
        checkpoint.
      measures: measures of `archs.quantification` that evaluation reports besides.
      num_bags: bags a step.
      labelled_bags: how many of these are drawn from the dataset's labelled documents
        (of their split "train", with replacement), with prevalences uniform on the
        simplex.
      mixer: `exact`, `published` or None.
      real_bags: share of the bags (or mixtures) that a mixer leaves as they are. All
        mixtures have middling prevalences, so that few real bags teach little about
        rare classes.
      mixed_bags: mixtures a step, where they are made in representation space; 0:
        twice as many as bags.
      warmup_loss: the loss of the first `warmup_steps`.
      warmup_steps: see `PrevalenceTask`.
      baselines: train a classifier of the same encoder on the dataset's labelled
        documents, where it has any, and set what CC, PCC, ACC, PACC, EMQ and EMQ-BCTS
        count with it beside the model on the same test bags.
      baseline_steps: longest training of that classifier, in batches of 128.
    """

    model: nn.Module
    dataset: data.Bags
    optimizer: Optimizer
    training: Training
    loss: str = "absolute_error"
    measures: Sequence[str] = ("absolute_error", "relative_absolute_error")
    num_bags: int = 20
    labelled_bags: int = 0
    mixer: str | None = "exact"
    real_bags: float = 0.5
    mixed_bags: int = 0
    warmup_loss: str = "absolute_error"
    warmup_steps: int = 0
    baselines: bool = True
    baseline_steps: int = 2000

    def __post_init__(self):
        if self.num_bags < 1:
            raise ValueError(f"num_bags must be 1 or more, not {self.num_bags}")
        if self.mixer not in ("exact", "published", None):
            raise ValueError(
                f"mixer must be 'exact', 'published' or None, not {self.mixer!r}"
            )
        if not 0 <= self.real_bags <= 1:
            raise ValueError(
                f"real_bags must lie between 0 and 1, not {self.real_bags}"
            )
        supervised.check_not_negative(
            self, "mixed_bags", "warmup_steps", "labelled_bags"
        )
        if self.labelled_bags >= self.num_bags:
            raise ValueError(
                f"labelled_bags must be fewer than num_bags={self.num_bags}, not "
                f"{self.labelled_bags}"
            )
        if self.labelled_bags and self.dataset.documents is None:
            raise ValueError(
                f"labelled_bags must be 0: {self.dataset.spec.name} has no labelled "
                "documents"
            )
        self.check_measures()
        check_set_network(self.model)
        if self.mixed_bags and not self._mixes_representations:
            raise ValueError(
                "mixed_bags: mixtures are made in representation space only with "
                "mixer='exact' and poolings that are linear: HistNetQ, GMNet, or "
                "DeepSets with aggregation='mean'"
            )
        if self._mixes_representations and self.num_bags < 2:
            raise ValueError(
                "num_bags must be 2 or more for mixer='exact', which mixes the bags of "
                f"a step, not {self.num_bags}"
            )
        # What is memory-mapped may be larger than the memory: `_read` reads it.
        arrays = {
            name: {
                "inputs": jnp.asarray(split["inputs"]),
                "prevalence": jnp.asarray(split["prevalence"], jnp.float32),
                "sizes": jnp.asarray(_sizes(split), jnp.int32),
            }
            for name, split in self.dataset.splits.items()
            if "prevalence" in split and not isinstance(split["inputs"], np.memmap)
        }
        if self.labelled_bags:
            documents = self.dataset.documents.splits["train"]
            arrays["documents"] = {
                "inputs": jnp.asarray(documents["inputs"]),
                "table": class_table(
                    documents["labels"], self.dataset.spec.num_classes
                ),
            }
        object.__setattr__(self, "arrays", arrays)

    @property
    def bag_size(self) -> int:
        """Examples of a bag to learn from; measures smooth by it."""
        return self.dataset.splits["train"]["inputs"].shape[1]

    bag_size_of_measures = bag_size

    @property
    def _mixes_representations(self) -> bool:
        return self.mixer == "exact" and pools_linearly(self.model)

    @property
    def _padded(self) -> bool:
        """Whether bags of a batch may differ in size."""
        joined = self.mixer == "exact" and not pools_linearly(self.model)
        ragged = any("sizes" in split for split in self.dataset.splits.values())
        return ragged or (joined and self.real_bags > 0)

    # The methods of `loop.Task`.

    def sample(self, key: jax.Array, step: jax.Array, arrays: Mapping) -> dict:
        """Bags to learn from, by the mixer."""
        split = arrays["train"]
        bag_key, mix_key, labelled_key = jax.random.split(
            jax.random.fold_in(key, step), 3
        )
        num_given = self.num_bags - self.labelled_bags
        bags = split["prevalence"], split["sizes"], num_given, self.bag_size
        if self.mixer == "published":
            chosen = mix_bags(bag_key, *bags, self.real_bags)
        elif self.mixer == "exact" and not self._mixes_representations:
            chosen = join_bags(bag_key, *bags, self.real_bags)
        else:
            chosen = draw_whole_bags(bag_key, *bags)
        inputs, mask = split["inputs"][chosen.bag, chosen.element], chosen.mask
        prevalence = chosen.prevalence
        if self.labelled_bags:
            drawn, exact = self._draw_labelled_bags(
                labelled_key, arrays["documents"], inputs.shape[1]
            )
            inputs = jnp.concatenate([inputs, drawn])
            prevalence = jnp.concatenate([prevalence, exact])
            mask = jnp.pad(
                mask, ((0, self.labelled_bags), (0, 0)), constant_values=True
            )
        batch = {"inputs": self._inputs(inputs), "prevalence": prevalence}
        if self._padded:
            batch["mask"] = mask
        if self._mixes_representations:
            num_mixtures = self.mixed_bags or 2 * self.num_bags
            batch["weights"] = pair_weights(
                mix_key, num_mixtures, self.num_bags, self.real_bags
            )
            batch["prevalence"] = batch["weights"] @ prevalence
        return batch

    def _draw_labelled_bags(
        self, key: jax.Array, documents: Mapping, size: int
    ) -> tuple[jax.Array, jax.Array]:
        """Bags of labelled documents [bag, size, *features], prevalences [bag, K]."""
        prevalence_key, bag_key = jax.random.split(key)
        num_classes = self.dataset.spec.num_classes
        asked = draw_prevalences(prevalence_key, self.labelled_bags, num_classes)
        indices, prevalence = draw_bags(bag_key, documents["table"], asked, size)
        return documents["inputs"][indices], prevalence

    def _inputs(self, inputs: jax.Array) -> jax.Array:
        return data.normalize(inputs, self.dataset.shift, self.dataset.scale)

    def num_bags_of(self, split: str) -> int:
        """Number of labelled bags of a split."""
        return len(self.dataset.splits.get(split, {}).get("prevalence", ()))

    def num_eval_batches(self, split: str) -> int:
        """Batches of `EVALUATION_BATCH` labelled bags; 0 where there are none."""
        return -(-self.num_bags_of(split) // EVALUATION_BATCH)

    def eval_batch(self, split: str, index: jax.Array, arrays: Mapping) -> dict:
        """Bags of a split in order; the last batch is filled up and masked."""
        if split not in self.dataset.splits:
            split = "validation"  # Of no batch there are still shapes.
        size = len(self.dataset.splits[split]["inputs"])
        number = index * EVALUATION_BATCH + jnp.arange(EVALUATION_BATCH)
        position = jnp.minimum(number, size - 1)
        if split in arrays:
            bags = jax.tree.map(lambda array: array[position], arrays[split])
        else:
            bags = self._read(split, position)
        return {
            "inputs": self._inputs(bags["inputs"]),
            "prevalence": bags["prevalence"],
            "element_mask": jnp.arange(bags["inputs"].shape[1])
            < bags["sizes"][:, None],
            "mask": number < size,
        }

    def _read(self, split: str, position: jax.Array) -> dict:
        """Bags of a split that is not on the device."""
        host = self.dataset.splits[split]
        num_classes = self.dataset.spec.num_classes

        def read(position):
            position = np.asarray(position)
            nothing = np.full((len(host["inputs"]), num_classes), np.nan)
            return {
                "inputs": np.asarray(host["inputs"][position], np.float32),
                "prevalence": np.asarray(
                    host.get("prevalence", nothing)[position], np.float32
                ),
                "sizes": np.asarray(_sizes(host)[position], np.int32),
            }

        shapes = {
            "inputs": (EVALUATION_BATCH, *host["inputs"].shape[1:]),
            "prevalence": (EVALUATION_BATCH, num_classes),
            "sizes": (EVALUATION_BATCH,),
        }
        dtypes = {"inputs": jnp.float32, "prevalence": jnp.float32, "sizes": jnp.int32}
        return jax.pure_callback(
            read,
            {
                name: jax.ShapeDtypeStruct(shape, dtypes[name])
                for name, shape in shapes.items()
            },
            position,
        )

    def estimate(self, state: supervised.TrainState, batch: Mapping) -> jax.Array:
        """The model's prevalences of an evaluation's batch, [bag, K]."""
        mask = batch["element_mask"] if self._padded else None
        return self.model.apply(state.variables, batch["inputs"], mask)

    # What the runner calls besides.

    def report(
        self, state: supervised.TrainState, workdir: Path, seed: int
    ) -> list[Section]:
        """Sections of the report; writes `test_bags.npz` and `submission.csv`."""
        return quantification_report.bag_sections(self, state, workdir, seed)

    def evaluation_estimates(
        self, state: supervised.TrainState, split: str
    ) -> np.ndarray:
        """The model's prevalences of all bags of a split, labelled or not, [n, K]."""

        @jax.jit
        def one_batch(state, arrays, index):
            return self.estimate(state, self.eval_batch(split, index, arrays))

        total = len(self.dataset.splits[split]["inputs"])
        batches = [
            np.asarray(one_batch(state, self.arrays, np.int32(index)))
            for index in range(-(-total // EVALUATION_BATCH))
        ]
        return np.concatenate(batches)[:total]


def _sizes(split: Mapping) -> np.ndarray:
    """Examples of each bag, [n]."""
    n, m = split["inputs"].shape[:2]
    return split.get("sizes", np.full(n, m))
