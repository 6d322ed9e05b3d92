"""Quantification: learning the class prevalences of bags of examples."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import data
from data.augmentation import shift_and_flip
from data.samplers import (
    class_table,
    draw_bags,
    draw_prevalences,
    draw_tilted_bags,
    mixture_weights,
    whitened_components,
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

PROTOCOLS = ("uniform", "dirichlet", "natural", "grid", "published")
COVARIATE_SHIFT = "covariate_shift"
# Directions of the inputs along which covariates shift.
NUM_COMPONENTS = 8
EVALUATION_BATCH = 20
ENCODING_CHUNK = 2000


@dataclasses.dataclass(frozen=True)
class Quantification(PrevalenceTask):
    """Learns prevalences from bags drawn from labelled examples.

    A bag's prevalences follow `protocol`; its label is the exact prevalence of the
    examples drawn. The labels of single examples are not used.

    With `mixed_bags`, a step learns from mixtures of its bags instead, made exactly in
    representation space: means and histograms are linear in the empirical measure, so
    with weights w of the bags in the batch `representation(sum_b w_b bag_b) =
    sum_b w_b r_b`, and the prevalence mixes alike. A mixture costs the head alone;
    with `bag_size` 1 every example is encoded once and serves all mixtures. For other
    poolings (then `bag_size` must be 1) a mixture is a bag of `evaluation_bag_size`
    encoded examples drawn with the weights.

    Attributes:
      model: a set network with `encode`, `aggregate`, `decode`; inputs
        [bag, element, *features], output [bag, K].
      dataset: labelled examples.
      optimizer: the config's.
      training: the config's.
      loss: a measure of `archs.quantification`.
      measures: measures of `archs.quantification` that evaluation reports besides.
      num_bags: bags a step.
      bag_size: examples a bag.
      protocol: `uniform` on the simplex (APP), `dirichlet`, `natural` (the train
        split's prevalences, NPP), `grid` or `published`, of the bags to learn from;
        see `data.samplers.draw_prevalences`. Or `covariate_shift`: examples are drawn
        by where they lie along the leading principal components of the inputs, see
        `data.samplers.draw_tilted_bags`.
      concentration: of `dirichlet`, one number for all classes.
      grid_points: values per class of `grid`.
      shift_strength: of `covariate_shift`, the largest shift of a bag, in standard
        deviations.
      max_shift: images to learn from are shifted by up to so many pixels in height and
        width.
      flip: images to learn from are mirrored with probability one half.
      evaluation_protocol: of the bags of validation and test.
      replace: whether an example may come twice in a bag.
      evaluation_bag_size: examples a bag of validation and test; None: `bag_size`.
      mixed_bags: mixtures a step, aimed at the prevalences that `protocol` gives bags
        of `evaluation_bag_size`; 0: the step learns from the bags as they are.
      mixture_sharpness: 1 or more; the larger, the fewer examples or bags have most of
        the weight of some mixtures, see `data.samplers.mixture_weights`.
      remembered_bags: bags of `evaluation_bag_size` examples a step besides, drawn from
        the whole train split: of what φ said, with its dropout, of each example when
        it last came (zeros before it first does), so that they cost the head alone and
        teach it alone. The state grows by the features of the train split. For
        `mixed_bags` of single examples.
      warmup_loss: the loss of the first `warmup_steps`.
      warmup_steps: see `PrevalenceTask`.
      validation_bags: number of bags of an evaluation during training.
      test_bags: number of bags of the final evaluation.
      baselines: train a classifier of the same encoder after the run, and set CC, PCC,
        ACC, PACC, EMQ and EMQ-BCTS beside the model on the same test bags.
      baseline_steps: longest training of that classifier, in batches of 128.
    """

    model: nn.Module
    dataset: data.Dataset
    optimizer: Optimizer
    training: Training
    loss: str = "absolute_error"
    measures: Sequence[str] = ("absolute_error", "relative_absolute_error")
    num_bags: int = 20
    bag_size: int = 100
    protocol: str = "uniform"
    concentration: float = 1.0
    grid_points: int = 11
    shift_strength: float = 2.0
    max_shift: int = 0
    flip: bool = False
    evaluation_protocol: str = "uniform"
    evaluation_bag_size: int | None = None
    replace: bool = True
    mixed_bags: int = 0
    mixture_sharpness: float = 5.0
    remembered_bags: int = 0
    warmup_loss: str = "absolute_error"
    warmup_steps: int = 0
    validation_bags: int = 300
    test_bags: int = 1000
    baselines: bool = True
    baseline_steps: int = 2000

    def __post_init__(self):
        supervised.check_positive(
            self, "num_bags", "bag_size", "validation_bags", "test_bags"
        )
        for name in ("protocol", "evaluation_protocol"):
            known = (*PROTOCOLS, COVARIATE_SHIFT)
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, "
                    f"not {getattr(self, name)!r}"
                )
        if self.protocol == COVARIATE_SHIFT and self.mixed_bags:
            raise ValueError(
                "mixed_bags must be 0 with protocol='covariate_shift': mixtures are "
                "aimed at prevalences, which that protocol does not draw"
            )
        if not self.shift_strength >= 0:
            raise ValueError(f"shift_strength must be >= 0, not {self.shift_strength}")
        if self.evaluation_bag_size is not None and self.evaluation_bag_size < 1:
            raise ValueError(
                "evaluation_bag_size must be 1 or more, or None, "
                f"not {self.evaluation_bag_size}"
            )
        if not self.concentration > 0:
            raise ValueError(f"concentration must be > 0, not {self.concentration}")
        supervised.check_not_negative(
            self, "mixed_bags", "remembered_bags", "warmup_steps", "max_shift"
        )
        if self.remembered_bags and not (self.mixed_bags and self.bag_size == 1):
            raise ValueError(
                "remembered_bags must be 0 without mixtures of single examples "
                "(mixed_bags of 1 or more and bag_size=1), not "
                f"{self.remembered_bags}"
            )
        if not self.mixture_sharpness >= 1:
            raise ValueError(
                f"mixture_sharpness must be 1 or more, not {self.mixture_sharpness}"
            )
        self.check_measures()
        images = len(self.dataset.spec.feature_shape) == 3
        if (self.max_shift or self.flip) and not images:
            raise ValueError(
                "max_shift and flip are for images; the examples of "
                f"{self.dataset.spec.name} have the shape "
                f"{self.dataset.spec.feature_shape}"
            )
        if self.mixed_bags and self.bag_size > 1 and not pools_linearly(self.model):
            raise ValueError(
                "mixed_bags: bags of several examples are mixed in representation "
                "space, which is exact for poolings that are linear: HistNetQ, or "
                "DeepSets with aggregation='mean'; others need bag_size=1"
            )
        check_set_network(self.model)
        object.__setattr__(self, "arrays", self._arrays())

    def _arrays(self) -> dict:
        spec = self.dataset.spec
        arrays = {
            split: {
                "inputs": jnp.asarray(values["inputs"]),
                "table": class_table(values["labels"], spec.num_classes),
            }
            for split, values in self.dataset.splits.items()
        }
        if COVARIATE_SHIFT in (self.protocol, self.evaluation_protocol):
            self._add_positions(arrays)
        return arrays

    def _add_positions(self, arrays: dict) -> None:
        """What `covariate_shift` draws by: whitened principal components, labels."""
        dataset = self.dataset
        inputs = {
            split: np.asarray(
                data.normalize(values["inputs"], dataset.shift, dataset.scale)
            )
            for split, values in dataset.splits.items()
        }
        for split, positions in whitened_components(inputs, NUM_COMPONENTS).items():
            arrays[split]["positions"] = jnp.asarray(positions)
            arrays[split]["labels"] = jnp.asarray(dataset.splits[split]["labels"])

    @property
    def natural_prevalence(self) -> np.ndarray:
        """Class prevalences of the train split, [K]."""
        labels = self.dataset.splits["train"]["labels"]
        return np.bincount(labels, minlength=self.dataset.spec.num_classes) / len(
            labels
        )

    # The methods of `loop.Task`.

    def init(self, key: jax.Array, batch: Mapping) -> supervised.TrainState:
        """The first state; see `loop.Task`."""
        state = super().init(key, batch)
        if not self.remembered_bags:
            return state
        encode = partial(self.model.apply, method="encode")
        features = jax.eval_shape(encode, state.variables, batch["inputs"])
        shape = (self.dataset.spec.sizes["train"], *features.shape[2:])
        cache = {"cache": {"features": jnp.zeros(shape, features.dtype)}}
        return state.replace(model_state=state.model_state | cache)

    def sample(self, key: jax.Array, step: jax.Array, arrays: Mapping) -> dict:
        """Bags of the train split."""
        key = jax.random.fold_in(key, step)
        bag_key, target_key, weight_key, draw_key, view_key, memory_key = (
            jax.random.split(key, 6)
        )
        indices, prevalence = self._draw_bags(
            bag_key,
            arrays["train"],
            self._protocol_to_encode,
            self.num_bags,
            self.bag_size,
        )
        batch = {
            "inputs": self._views(view_key, self._inputs(arrays["train"], indices)),
            "prevalence": prevalence,
        }
        if self.mixed_bags:
            targets = self._draw_prevalences(
                target_key, self.protocol, self.mixed_bags, self.size_at_evaluation
            )
            weights = mixture_weights(
                weight_key, prevalence, targets, self.mixture_sharpness
            )
            if pools_linearly(self.model):
                batch["weights"] = weights
                batch["prevalence"] = weights @ prevalence
            else:
                elements = jax.random.categorical(
                    draw_key,
                    jnp.log(weights)[:, None],
                    shape=(self.mixed_bags, self.size_at_evaluation),
                )
                batch["elements"] = elements
                batch["prevalence"] = prevalence[elements].mean(1)
        if self.remembered_bags:
            bags, more = self._draw_bags(
                memory_key,
                arrays["train"],
                self.protocol,
                self.remembered_bags,
                self.size_at_evaluation,
            )
            batch["indices"], batch["remembered"] = indices[:, 0], bags
            batch["prevalence"] = jnp.concatenate([batch["prevalence"], more])
        return batch

    @property
    def _protocol_to_encode(self) -> str:
        """How the classes of the bags of a step are drawn.

        Of single examples to make mixtures of all alike, unless the protocol is of the
        natural prevalences: bags of one example under the others need not have the
        protocol's mean, nor be defined.
        """
        singles = self.mixed_bags and self.bag_size == 1
        return "uniform" if singles and self.protocol != "natural" else self.protocol

    def _inputs(self, split: Mapping, indices: jax.Array | slice) -> jax.Array:
        """The examples `indices` select, as the model takes them."""
        return data.normalize(
            split["inputs"][indices], self.dataset.shift, self.dataset.scale
        )

    def _views(self, key: jax.Array, inputs: jax.Array) -> jax.Array:
        """Examples [bag, element, ...] as they are learned from."""
        if not (self.max_shift or self.flip):
            return inputs
        images = inputs.reshape(-1, *inputs.shape[2:])
        views = shift_and_flip(key, images, self.max_shift, self.flip)
        return views.reshape(inputs.shape)

    def _draw_prevalences(
        self, key: jax.Array, protocol: str, num_bags: int, bag_size: int
    ) -> jax.Array:
        return draw_prevalences(
            key,
            num_bags,
            self.dataset.spec.num_classes,
            protocol=protocol,
            concentration=self.concentration,
            natural=self.natural_prevalence,
            bag_size=bag_size,
            grid_points=self.grid_points,
        )

    def _draw_bags(
        self, key: jax.Array, split: Mapping, protocol: str, num_bags: int, size: int
    ) -> tuple[jax.Array, jax.Array]:
        """Example indices [bag, element] and their exact prevalences [bag, K]."""
        if protocol == COVARIATE_SHIFT:
            return draw_tilted_bags(
                key,
                split["positions"],
                split["labels"],
                self.dataset.spec.num_classes,
                num_bags,
                size,
                self.shift_strength,
            )
        prevalence_key, example_key = jax.random.split(key)
        targets = self._draw_prevalences(prevalence_key, protocol, num_bags, size)
        return draw_bags(
            example_key, split["table"], targets, size, replace=self.replace
        )

    def num_eval_batches(self, split: str) -> int:
        """Batches of `EVALUATION_BATCH` bags."""
        return -(-self._num_evaluation_bags(split) // EVALUATION_BATCH)

    def _num_evaluation_bags(self, split: str) -> int:
        return self.validation_bags if split == "validation" else self.test_bags

    @property
    def size_at_evaluation(self) -> int:
        """Examples a bag of validation and test."""
        return self.evaluation_bag_size or self.bag_size

    bag_size_of_measures = size_at_evaluation

    def prepare_evaluation(
        self, state: supervised.TrainState, split: str, arrays: Mapping
    ) -> tuple[supervised.TrainState, jax.Array]:
        """The state and φ of every example of the split, [n, f], computed once."""
        # Chunks bound the memory; not in a loop, where XLA's CPU backend computes
        # convolutions many times slower.
        features = []
        for start in range(0, len(arrays[split]["inputs"]), ENCODING_CHUNK):
            chunk = self._inputs(arrays[split], slice(start, start + ENCODING_CHUNK))
            encoded = self.model.apply(state.variables, chunk[:, None], method="encode")
            features.append(encoded[:, 0])
        return state, jnp.concatenate(features)

    def eval_batch(self, split: str, index: jax.Array, arrays: Mapping) -> dict:
        """Bags of a split; the last batch is masked to the number asked for."""
        key = supervised.evaluation_key(split, index)
        indices, prevalence = self._draw_bags(
            key,
            arrays[split],
            self.evaluation_protocol,
            EVALUATION_BATCH,
            self.size_at_evaluation,
        )
        number = index * EVALUATION_BATCH + jnp.arange(EVALUATION_BATCH)
        return {
            "indices": indices,
            "prevalence": prevalence,
            "mask": number < self._num_evaluation_bags(split),
        }

    def estimate(self, prepared: tuple, batch: Mapping) -> jax.Array:
        """The model's prevalences of an evaluation's batch of examples, [bag, K]."""
        state, features = prepared
        representation = self.model.apply(
            state.variables, features[batch["indices"]], method="aggregate"
        )
        return self.model.apply(state.variables, representation, method="decode")

    # What the runner calls besides.

    def report(
        self, state: supervised.TrainState, workdir: Path, seed: int
    ) -> list[Section]:
        """Sections of the report, baselines among them; writes `test_bags.npz`."""
        return quantification_report.sections(self, state, workdir, seed)

    def evaluation_bags(
        self, state: supervised.TrainState, split: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All bags of an evaluation.

        Returns:
          Indices of their examples [bag, element], their prevalences [bag, K] and the
          model's estimates [bag, K].
        """
        prepared = jax.jit(self.prepare_evaluation, static_argnums=1)(
            state, split, self.arrays
        )

        @jax.jit
        def bags(prepared, arrays, index):
            batch = self.eval_batch(split, index, arrays)
            estimate = self.estimate(prepared, batch)
            return batch["indices"], batch["prevalence"], estimate

        batches = [
            jax.device_get(bags(prepared, self.arrays, np.int32(index)))
            for index in range(self.num_eval_batches(split))
        ]
        total = self._num_evaluation_bags(split)
        indices, true, estimate = (
            np.concatenate(parts)[:total] for parts in zip(*batches, strict=True)
        )
        return indices, true, estimate
