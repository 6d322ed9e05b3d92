"""What the tasks that learn prevalences of bags share."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from archs import MLP, DeepSets, GMNet, HistNetQ, contracts
from archs import quantification as measures_of
from experiments import metrics
from experiments.tasks import supervised


def measure(name: str, bag_size: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The measure of that name: `(prevalence, estimate) -> value of each bag`.

    Args:
      name: of a function of `archs.quantification`.
      bag_size: m; measures that smooth do so with ε = 1/(2m).

    Raises:
      ValueError: there is no such measure.
    """
    known = {
        key: value
        for key, value in vars(measures_of).items()
        if inspect.isfunction(value)
        and list(inspect.signature(value).parameters)[:2] == ["prevalence", "estimate"]
        and not key.startswith("_")
    }
    if name not in known:
        raise ValueError(
            f"there is no measure {name!r} in archs.quantification, which has "
            f"{', '.join(known)}"
        )
    function = known[name]
    if "epsilon" in inspect.signature(function).parameters:
        return partial(function, epsilon=1 / (2 * bag_size))
    return function


def check_set_network(model: nn.Module) -> None:
    """Raises ValueError for what has no `encode` and `aggregate`."""
    if not (hasattr(model, "encode") and hasattr(model, "aggregate")):
        raise ValueError(
            f"{type(model).__name__} is no set network: it has no encode and "
            "aggregate; use DeepSets or HistNetQ"
        )


def pools_linearly(model: nn.Module) -> bool:
    """Whether the representation of a mixture is the mixture of representations."""
    return isinstance(model, (HistNetQ, GMNet)) or (
        isinstance(model, DeepSets) and model.aggregation in ("mean", ("mean",))
    )


def bags_or_mixtures(
    model: nn.Module,
    batch: Mapping,
    remembered: jax.Array | None = None,
    *,
    train: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """Prevalences of the bags of a batch or, where it says how, of their mixtures.

    Args:
      model: a bound set network.
      batch: "inputs" [bag, element, *features], perhaps with "mask" [bag, element];
        with "elements" int [mixture, element], a mixture is those of the bags, which
        hold one example each; with "weights" [mixture, bag], it is made of the bags'
        representations.
      remembered: None or what φ said of the examples of the train split, [n, *f]. Then
        the bags are the examples "indices" int [bag] of it, one each, and the bags
        "remembered" int [more, element] of it follow the mixtures.
      train: switches dropout on.

    Returns:
      Prevalences [bag or mixture, K]; what is remembered after this batch.
    """
    mask = batch.get("mask")
    if not {"elements", "weights"} & set(batch):
        return model(batch["inputs"], mask, train=train), remembered
    features = model.encode(batch["inputs"], mask, train=train)  # [bag, element, *f]
    if remembered is not None:
        latest = jax.lax.stop_gradient(features[:, 0])
        remembered = remembered.at[batch["indices"]].set(latest)
    if "elements" in batch:
        features = features[:, 0][batch["elements"]]  # [mixture, element, *f]
    representation = model.aggregate(features, mask, train=train)
    if "weights" in batch:
        representation = batch["weights"] @ representation  # [mixture, r]
    if remembered is not None:
        bags = remembered[batch["remembered"]]  # [more, element, *f]
        more = model.aggregate(bags, train=train)
        representation = jnp.concatenate([representation, more])
    return model.decode(representation, train=train), remembered


class PrevalenceTask(supervised.SupervisedTask):
    """What the tasks share that learn the prevalences of bags.

    They have fields `model`, `dataset`, `optimizer`, `training`, `loss`, `measures`,
    `num_bags`, `warmup_loss` and `warmup_steps`, and `bag_size_of_measures`, by which
    measures smooth. The first `warmup_steps` learn by `warmup_loss`: relative errors
    from the start make some networks answer a constant for ever.
    """

    @property
    def monitor(self) -> str:
        """The validation measure that decides: the loss."""
        return self.loss

    def measure(self, name: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """The measure of that name at this task's size of bags."""
        return measure(name, self.bag_size_of_measures)

    def check_measures(self) -> None:
        """Raises ValueError for a loss or measure that there is not."""
        for name in (self.loss, self.warmup_loss, *self.measures):
            self.measure(name)

    def init(self, key: jax.Array, batch: Mapping) -> supervised.TrainState:
        """The first state; see `loop.Task`."""
        inputs = batch["inputs"]
        variables = self.model.init(key, inputs)
        estimate = jax.eval_shape(self.model.apply, variables, inputs)
        expected = (self.num_bags, self.dataset.spec.num_classes)
        if estimate.shape != expected:
            raise ValueError(
                f"the model must return prevalences of shape {expected} (bags, "
                f"classes), not {estimate.shape}"
            )
        return supervised.init_state(variables, self.optimizer, self.training.num_steps)

    def train_step(
        self, state: supervised.TrainState, batch: Mapping, key: jax.Array
    ) -> tuple[supervised.TrainState, dict]:
        """One update; see `loop.Task`."""

        def loss(params, model_state):
            model_state = dict(model_state)
            remembered = model_state.pop("cache", {}).get("features")
            (estimate, remembered), collections = self.model.apply(
                {"params": params, **model_state},
                batch,
                remembered,
                train=True,
                rngs={"dropout": key},
                mutable=[*model_state, "losses"],
                method=bags_or_mixtures,
            )
            collections = dict(collections)
            if remembered is not None:
                collections["cache"] = {"features": remembered}
            # What the model adds to the loss by sowing it.
            sown = jax.tree.leaves(collections.pop("losses", {}))
            values = {
                name: self.measure(name)(batch["prevalence"], estimate)
                for name in dict.fromkeys(
                    [self.loss, *([self.warmup_loss] if self.warmup_steps else [])]
                )
            }
            learned = values[self.loss].mean()
            if self.warmup_steps:
                first = values[self.warmup_loss].mean()
                learned = jnp.where(state.steps < self.warmup_steps, first, learned)
            measured = {name: metrics.masked(value) for name, value in values.items()}
            return sum(sown, start=learned), (measured, collections)

        return supervised.update(state, loss, self.optimizer, self.training.num_steps)

    def eval_step(self, prepared: Any, batch: Mapping) -> dict:
        """The loss and the measures, averaged over bags."""
        estimate = self.estimate(prepared, batch)
        return {
            name: metrics.masked(
                self.measure(name)(batch["prevalence"], estimate), batch["mask"]
            )
            for name in dict.fromkeys([self.loss, *self.measures])
        }

    def check_contracts(self, state: supervised.TrainState, batch: Mapping) -> None:
        """Checks on a corner of a batch that order and padding change nothing.

        Raises:
          AssertionError: naming the contract and the worst element.
        """
        inputs = batch["inputs"]  # [bag, element, *features]
        elements = inputs[:32].reshape(-1, *inputs.shape[2:])
        corner = elements[: len(elements) // 2 * 2][:32]
        corner = corner.reshape(2, -1, *corner.shape[1:])  # two bags

        @jax.jit
        def apply(inputs: jax.Array, mask: jax.Array | None) -> Any:
            return self.model.apply(state.variables, inputs, mask)

        contracts.assert_permutation_invariant(apply, corner, key=jax.random.key(0))
        contracts.assert_padding_invariant(apply, corner)

    @property
    def element_encoder(self) -> nn.Module:
        """The network of one element, φ; one layer for models that do without."""
        model = self.model
        found = getattr(model, "encoder", None) or getattr(model, "phi", None)
        return MLP((), 128) if found is None else found
