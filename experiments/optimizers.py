"""The optimizer of a config: optax's pieces in one chain."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ("constant", "cosine", "plateau")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What `config.optimizer` sets.

    Attributes:
      name: an optimizer of optax: `adamw`, `adam`, `sgd`, ...
      learning_rate: the rate after the warm-up.
      schedule: `constant`; `cosine`, down to `end_learning_rate` at the last step;
        or `plateau`: times `plateau_factor` whenever the validation measure has not
        improved for more than `plateau_patience` evaluations, and training ends when
        the rate would fall below `end_learning_rate` (the HistNetQ paper's schedule,
        PyTorch's `ReduceLROnPlateau`).
      warmup_steps: steps of linear rise from 0.
      end_learning_rate: see `schedule`.
      plateau_factor: see `schedule`.
      plateau_patience: see `schedule`, in evaluations.
      weight_decay: decoupled weight decay, for optimizers that have it.
      momentum: for optimizers that have it.
      clip_norm: largest global norm of the gradient; None: no clipping.
      accumulation_steps: batches whose gradients are averaged for one update.
      ema_decay: evaluate with an exponential moving average of the parameters of
        this decay; None: with the parameters themselves.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    end_learning_rate: float = 0.0
    plateau_factor: float = 0.5
    plateau_patience: int = 10
    weight_decay: float = 0.0
    momentum: float | None = None
    clip_norm: float | None = None
    accumulation_steps: int = 1
    ema_decay: float | None = None

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}"
            )
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, not {self.learning_rate}")
        if not 0 <= self.warmup_steps < 2**31:
            raise ValueError(
                f"warmup_steps must lie between 0 and 2**31, not {self.warmup_steps}"
            )
        if not 0 <= self.end_learning_rate <= self.learning_rate:
            raise ValueError(
                "end_learning_rate must lie between 0 and learning_rate "
                f"({self.learning_rate}), not {self.end_learning_rate}"
            )
        if not 0 < self.plateau_factor < 1:
            raise ValueError(
                f"plateau_factor must lie between 0 and 1, not {self.plateau_factor}"
            )
        if self.plateau_patience < 0:
            raise ValueError(
                f"plateau_patience must be 0 or more, not {self.plateau_patience}"
            )
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be >= 0, not {self.weight_decay}")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise ValueError(
                f"momentum must lie between 0 and 1 or be None, not {self.momentum}"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be > 0 or None, not {self.clip_norm}")
        if self.accumulation_steps < 1:
            raise ValueError(
                f"accumulation_steps must be 1 or more, not {self.accumulation_steps}"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(
                f"ema_decay must lie between 0 and 1 or be None, not {self.ema_decay}"
            )
        factory = getattr(optax, self.name, None)
        if not callable(factory) or "learning_rate" not in (
            parameters := inspect.signature(factory).parameters
        ):
            raise ValueError(f"name: optax has no optimizer {self.name!r}")
        for field in ("weight_decay", "momentum"):
            if getattr(self, field) and field not in parameters:
                raise ValueError(f"{field}: optax.{self.name} has none")
        try:
            jax.eval_shape(self._one_update, jnp.zeros(1))
        except Exception as error:
            raise ValueError(
                f"name: optax.{self.name} needs more than this section sets: {error}"
            ) from error

    def _one_update(self, params: jax.Array) -> jax.Array:
        step = self.transformation(1)
        return step.update(params, step.init(params), params)[0]

    def learning_rate_schedule(self, num_steps: int) -> optax.Schedule:
        """Update number -> learning rate, before any reduction on a plateau."""
        updates = max(num_steps // self.accumulation_steps, 1)
        if self.schedule == "cosine":
            main = optax.cosine_decay_schedule(
                self.learning_rate,
                max(updates - self.warmup_steps, 1),
                alpha=self.end_learning_rate / self.learning_rate,
            )
        else:
            main = optax.constant_schedule(self.learning_rate)
        if not self.warmup_steps:
            return main
        warmup = optax.linear_schedule(0.0, self.learning_rate, self.warmup_steps)
        return optax.join_schedules([warmup, main], [self.warmup_steps])

    def transformation(self, num_steps: int) -> optax.GradientTransformation:
        """The optax chain: clipping, the optimizer, accumulation."""
        factory = getattr(optax, self.name)
        parameters = inspect.signature(factory).parameters
        extra = {
            field: getattr(self, field)
            for field in ("weight_decay", "momentum")
            if field in parameters and getattr(self, field) is not None
        }
        chain = factory(self.learning_rate_schedule(num_steps), **extra)
        if self.clip_norm is not None:
            chain = optax.chain(optax.clip_by_global_norm(self.clip_norm), chain)
        if self.accumulation_steps > 1:
            chain = optax.MultiSteps(
                chain, self.accumulation_steps
            ).gradient_transformation()
        return chain

    def plateau(self) -> optax.GradientTransformationExtraArgs:
        """Scales updates; its state moves on at evaluations only."""
        # Optax reduces at the evaluation that completes the patience.
        return optax.contrib.reduce_on_plateau(
            factor=self.plateau_factor, patience=self.plateau_patience + 1
        )
