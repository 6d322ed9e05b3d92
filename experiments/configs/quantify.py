"""Quantification of a labelled dataset: `quantify.py:MODEL_DATASET`.

MODEL is `histnetq` or `deepsets`, DATASET one of `digits`, `breast_cancer`, `wine`,
`mnist`, `fashion_mnist`. Training encodes `num_bags` examples a step and learns from
mixtures of them (`mixed_bags`); with `config.task.mixed_bags=0`,
`config.task.bag_size=100` and `config.task.num_bags=20` it learns from bags as drawn.
"""

from ml_collections import ConfigDict

VECTORS = ("breast_cancer", "wine")
IMAGES = ("mnist", "fashion_mnist")
MODELS = ("histnetq", "deepsets")


def get_config(variant: str = "histnetq_digits") -> ConfigDict:
    """The config of a variant `MODEL_DATASET`."""
    model, _, dataset = variant.partition("_")
    datasets = ("digits", *VECTORS, *IMAGES)
    if model not in MODELS or dataset not in datasets:
        raise ValueError(
            f"there is no variant {variant!r}: MODEL_DATASET with MODEL one of "
            f"{', '.join(MODELS)} and DATASET one of {', '.join(datasets)}"
        )
    config = ConfigDict()
    config.dataset = dict(name=dataset)
    config.task = dict(
        name="Quantification",
        num_bags=256,
        bag_size=1,
        mixed_bags=64,
        evaluation_bag_size=500 if dataset in IMAGES else 100,
    )
    config.optimizer = dict(
        name="adamw", learning_rate=1e-3, schedule="cosine", ema_decay=0.99
    )
    if dataset in IMAGES:
        encoder = dict(name="CNN", channels=(16, 32), features=256)
        head = dict(name="PrevalenceHead", hidden_sizes=(512,))
        config.task.num_bags = 128
        config.training = dict(num_steps=1200, steps_per_call=10, eval_every=400)
        # Three times the rate, which without warm-up ends in a constant answer.
        config.optimizer.update(learning_rate=3e-3, warmup_steps=100, clip_norm=0.05)
    else:
        encoder = dict(
            name="MLP", hidden_sizes=(512, 512), features=64, dropout_rate=0.3
        )
        head = dict(name="PrevalenceHead", hidden_sizes=(256,))
        config.training = dict(num_steps=4000, steps_per_call=50, eval_every=500)
        config.training.log_every = 500
    if model == "histnetq":
        config.model = dict(
            name="HistNetQ",
            encoder=encoder,
            histogram=dict(name="LinearHistogram", num_bins=16),
            head=head,
        )
    else:
        config.model = dict(name="DeepSets", phi=encoder, rho=head, aggregation="mean")
    return config
