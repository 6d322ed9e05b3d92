"""Quantification where every training example has a label: classifiers and bags."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import metrics
from experiments.tasks import supervised
from experiments.tasks.quantification import Quantification


@dataclasses.dataclass(frozen=True)
class LabelledQuantification(Quantification):
    """Learns from the labels of single examples and from the prevalences of bags.

    Each step encodes `num_bags` single examples, of equally likely classes or as they
    come (`natural_examples`). The classifiers of the model learn their labels by
    cross-entropy; each leaves out its own fold of the train split. What a classifier
    says of an example it left out is remembered, and `mixed_bags` bags of
    `evaluation_bag_size` examples are drawn from all that is remembered: from them
    calibration and aggregation learn by `loss`. That gradient does not reach the
    classifiers. A single classifier leaves out nothing.

    Attributes:
      model: an `archs.EMQNet`.
      bag_weight: of `loss` beside the cross-entropy; 0: the posteriors are taken as
        the classifiers give them.
      natural_examples: the examples to encode are drawn from the train split as it is,
        with its class prevalences π, and the classifiers learn
        `softmax(logits + log π)`: their logits are those of equal prevalences, as
        EMQNet expects (Menon et al., "Long-tail learning via logit adjustment", ICLR
        2021). Otherwise classes are equally likely, which shows the examples of rare
        classes more often.
      noise: standard deviation of Gaussian noise that is added to the inputs, in the
        units the model sees.
    """

    bag_size: int = 1
    num_bags: int = 128
    mixed_bags: int = 32
    bag_weight: float = 1.0
    natural_examples: bool = False
    noise: float = 0.0

    def __post_init__(self):
        if not hasattr(self.model, "classify"):
            raise ValueError(
                "LabelledQuantification needs a model with classifiers, EMQNet, not "
                f"{type(self.model).__name__}"
            )
        if self.bag_size != 1 or self.mixed_bags < 1:
            raise ValueError(
                "bag_size must be 1 and mixed_bags 1 or more, not "
                f"{self.bag_size} and {self.mixed_bags}"
            )
        supervised.check_not_negative(self, "bag_weight", "noise")
        for name in ("warmup_steps", "remembered_bags"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} must be 0 here: what learns from bags are calibration "
                    f"and pseudo-counts alone, not {getattr(self, name)}"
                )
        super().__post_init__()

    def _arrays(self) -> dict:
        arrays = super()._arrays()
        order = np.asarray(arrays["train"]["table"].order)
        # Within a class the folds take turns.
        fold = np.empty(len(order), np.int32)
        fold[order] = np.arange(len(order)) % self.model.num_members
        arrays["train"]["fold"] = jnp.asarray(fold)
        arrays["train"]["labels"] = jnp.asarray(self.dataset.splits["train"]["labels"])
        return arrays

    def init(self, key: jax.Array, batch: Mapping) -> supervised.TrainState:
        """The first state; see `loop.Task`."""
        state = super().init(key, batch)
        spec = self.dataset.spec
        remembered = jnp.zeros((spec.sizes["train"], spec.num_classes))
        cache = {"cache": {"logits": remembered}}
        return state.replace(model_state=state.model_state | cache)

    def sample(self, key: jax.Array, step: jax.Array, arrays: Mapping) -> dict:
        """Single examples with their folds, and bags of examples by their indices."""
        example_key, bag_key, view_key, noise_key = jax.random.split(
            jax.random.fold_in(key, step), 4
        )
        train = arrays["train"]
        examples = "natural" if self.natural_examples else "uniform"
        indices, _ = self._draw_bags(example_key, train, examples, self.num_bags, 1)
        bags, prevalence = self._draw_bags(
            bag_key, train, self.protocol, self.mixed_bags, self.size_at_evaluation
        )
        unchanged = self._inputs(train, indices)
        inputs = self._views(view_key, unchanged)
        if self.noise:
            inputs += self.noise * jax.random.normal(noise_key, inputs.shape)
        indices = indices[:, 0]
        return {
            "inputs": inputs,
            "unchanged": unchanged,
            "indices": indices,
            "labels": train["labels"][indices],
            "fold": train["fold"][indices],
            "bags": bags,
            "prevalence": prevalence,
        }

    def train_step(
        self, state: supervised.TrainState, batch: Mapping, key: jax.Array
    ) -> tuple[supervised.TrainState, dict]:
        """One update; see `loop.Task`."""

        def loss(params, model_state):
            model_state = dict(model_state)
            remembered = model_state.pop("cache")["logits"]
            variables = {"params": params, **model_state}
            unseen = self.model.apply(variables, batch["unchanged"], method="classify")
            own = batch["fold"], jnp.arange(len(batch["fold"])), 0
            remembered = remembered.at[batch["indices"]].set(
                jax.lax.stop_gradient(unseen[own])  # [example, K]
            )
            (estimate, logits), collections = self.model.apply(
                variables,
                batch,
                remembered,
                rngs={"dropout": key},
                mutable=[*model_state, "losses"],
                method=_estimate_and_logits,
            )
            model_state = collections | {"cache": {"logits": remembered}}
            sown = jax.tree.leaves(model_state.pop("losses", {}))
            if self.natural_examples:
                # A class without examples has no prior to take out.
                logits += jnp.log(jnp.maximum(self.natural_prevalence, 1e-9))
            labels = jnp.broadcast_to(batch["labels"], logits.shape[:-1])
            entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            taught = _taught(batch["fold"], len(logits))
            values = self.measure(self.loss)(batch["prevalence"], estimate)
            total = (entropy * taught).sum() / len(batch["labels"])
            total += self.bag_weight * values.mean()
            return sum(sown, start=total), (
                {
                    self.loss: metrics.masked(values),
                    "cross_entropy": metrics.masked(entropy, taught),
                },
                model_state,
            )

        return supervised.update(state, loss, self.optimizer, self.training.num_steps)


def _taught(fold: jax.Array, num_members: int) -> jax.Array:
    """Whether a member learns from an example, bool [member, example]."""
    if num_members == 1:
        return jnp.ones((1, len(fold)), bool)
    return fold != jnp.arange(num_members)[:, None]


def _estimate_and_logits(
    model: nn.Module, batch: Mapping, remembered: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What a step learns from, of a bound EMQNet.

    Args:
      model: the network.
      batch: of `LabelledQuantification.sample`.
      remembered: what its members say of the train split, [n, K].

    Returns:
      Prevalences of the bags, [bag, K]; logits to learn, [member, example, K].
    """
    logits = model.classify(batch["inputs"], train=True)[:, :, 0]
    features = model.calibrate(remembered[batch["bags"]])
    return model.decode(model.aggregate(features)), logits
