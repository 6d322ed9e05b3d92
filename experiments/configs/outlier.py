"""Which image of a set does not belong: `outlier.py:MODEL[_digits]`.

MODEL is `set_transformer` or `deepsets`. A set has seven images of one class of
Fashion-MNIST and one of another, at any position; chance is right in 1 of 8 sets, with
an AUROC of 0.5 and an AUPR of 0.125. With `_digits` the images are the 8 x 8 digits of
scikit-learn and need no files.

The task is that of Zaheer et al., "Deep Sets", NeurIPS 2017, and Lee et al., "Set
Transformer", ICML 2019, section 5.4, both with photographs of faces: convolutions for
each image, then three equivariant layers, or two SABs, and a softmax over the images of
the set.
"""

from ml_collections import ConfigDict

from experiments.variants import check_variant

MODELS = ("set_transformer", "deepsets")
VARIANTS = (*MODELS, *(f"{model}_digits" for model in MODELS))


def get_config(variant: str = "set_transformer") -> ConfigDict:
    """The config of a variant."""
    check_variant(variant, VARIANTS)
    digits = variant.endswith("_digits")
    model = variant.removesuffix("_digits")
    config = ConfigDict()
    config.dataset = dict(
        name="OutlierSets",
        examples="digits" if digits else "fashion_mnist",
        set_size=8,
    )
    size = 64 if digits else 128
    if digits:
        encoder = dict(name="MLP", hidden_sizes=(128,), features=size)
    else:
        encoder = dict(name="CNN", channels=(16, 32), features=size)
    if model == "set_transformer":
        layer = dict(name="SAB", hidden_size=size, num_heads=4)
        num_layers, activation = 2, None
    else:
        layer = dict(name="EquivariantLayer", features=size, aggregation="max")
        num_layers, activation = 3, "relu"
    config.model = dict(
        name="EquivariantNetwork",
        encoder=encoder,
        layer=layer,
        num_layers=num_layers,
        activation=activation,
        head=dict(name="MLP", hidden_sizes=(), features=1),
    )
    config.task = dict(
        name="SetPrediction",
        objective="element_classification",
        num_sets=32,
        validation_sets=1000,
        test_sets=5000,
        evaluation_batch=100,
    )
    config.optimizer = dict(
        name="adam", learning_rate=1e-3, schedule="cosine", warmup_steps=100
    )
    config.training = dict(
        num_steps=3000, steps_per_call=10, log_every=100, eval_every=500
    )
    return config
