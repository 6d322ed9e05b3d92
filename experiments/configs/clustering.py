"""Clustering mixtures of Gaussians in one pass: `clustering.py:MODEL[_large|_quick]`.

MODEL is `set_transformer` or `deepsets_mean`. Sets, networks, optimizer and steps are
those of Lee et al., "Set Transformer", ICML 2019, section 5.3 and its official code: 10
sets of 100 to 500 points from four Gaussians a step, 50,000 steps of Adam from 1e-3 to
1e-4. Their learning rate drops at one step, here it falls as a cosine or, of DeepSets,
stays and an average of the weights is evaluated. Their published
log likelihoods per point, and those after one step of EM, are -1.4963 and -1.4524 of
the Set Transformer, -2.0006 and -1.6186 of DeepSets, -1.4726 of the true mixture.

`_large` has 1,000 to 5,000 points of six Gaussians (published: -1.8928 and -1.8549 of
the Set Transformer, -2.5195 and -2.0709 of DeepSets, -1.8202 of the true
mixture). `_quick` makes 3,000 steps.
"""

from ml_collections import ConfigDict

from experiments.variants import check_variant

MODELS = ("set_transformer", "deepsets_mean")
VARIANTS = tuple(
    f"{model}{kind}" for model in MODELS for kind in ("", "_large", "_quick")
)


def get_config(variant: str = "set_transformer") -> ConfigDict:
    """The config of a variant."""
    check_variant(variant, VARIANTS)
    model = variant.removesuffix("_quick").removesuffix("_large")
    num_components = 6 if variant.endswith("_large") else 4
    config = ConfigDict()
    config.dataset = dict(name="GaussianMixtures", num_components=num_components)
    if variant.endswith("_large"):
        config.dataset.update(min_size=1000, max_size=5000)
    if model == "set_transformer":
        config.model = dict(
            name="SetTransformer",
            head=dict(name="MLP", hidden_sizes=(), features=5),
            hidden_size=128,
            num_heads=4,
            num_layers=2,
            num_inducing_points=32,
            num_seeds=num_components,
            num_decoder_layers=2,
            per_seed=True,
            block="official",
            normalization=None,
        )
    else:
        wide = dict(name="MLP", hidden_sizes=(128, 128, 128), activation="relu")
        config.model = dict(
            name="DeepSets",
            phi=dict(wide, features=128),
            rho=dict(wide, features=5 * num_components),
            aggregation="mean",
        )
    config.task = dict(
        name="SetPrediction",
        objective="mixture",
        num_sets=10,
        validation_sets=200,
        test_sets=1000,
        evaluation_batch=50,
    )
    config.optimizer = dict(
        name="adam", learning_rate=1e-3, schedule="cosine", end_learning_rate=1e-4
    )
    if model == "deepsets_mean":
        config.optimizer = dict(name="adam", learning_rate=1e-3, ema_decay=0.999)
    config.training = dict(
        num_steps=50_000, steps_per_call=50, log_every=500, eval_every=1000
    )
    if variant.endswith("_quick"):
        config.training.update(num_steps=3000, log_every=100, eval_every=500)
    return config
