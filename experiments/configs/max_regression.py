"""The largest of up to ten numbers: `max_regression.py:MODEL`.

MODEL is `deepsets_mean`, `deepsets_sum`, `deepsets_max` or `set_transformer`. Networks,
numbers of sets and steps and Adam's 1e-3 are those of Lee et al., "Set Transformer",
ICML 2019, section 5.1, whose mean absolute errors are 2.133, 1.902, 0.1355 and 0.2085.
Here the learning rate falls to zero. With `config.optimizer.schedule=constant`, as
published, the error of `deepsets_max` and `set_transformer` swings between evaluations
by a factor of ten, and seeds differ as much.
"""

from ml_collections import ConfigDict

from experiments.variants import check_variant

MODELS = ("deepsets_mean", "deepsets_sum", "deepsets_max", "set_transformer")


def get_config(variant: str = "deepsets_max") -> ConfigDict:
    """The config of a model."""
    check_variant(variant, MODELS)
    config = ConfigDict()
    config.dataset = dict(name="MaxOfNumbers")
    if variant == "set_transformer":
        config.model = dict(
            name="SetTransformer",
            head=dict(name="MLP", hidden_sizes=(), features=1),
            hidden_size=64,
            num_inducing_points=None,
            normalization=None,
            block="official",
        )
    else:
        config.model = dict(
            name="DeepSets",
            phi=dict(
                name="MLP", hidden_sizes=(64, 64, 64), features=64, activation="relu"
            ),
            rho=dict(name="MLP", hidden_sizes=(64,), features=1, activation="relu"),
            aggregation=variant.removeprefix("deepsets_"),
        )
    config.task = dict(name="SetPrediction", objective="absolute_error", num_sets=128)
    config.optimizer = dict(name="adam", learning_rate=1e-3, schedule="cosine")
    config.training = dict(
        num_steps=20_000, steps_per_call=100, log_every=1000, eval_every=1000
    )
    return config
