"""Quantification of a labelled dataset: `quantify.py:MODEL_DATASET`.

MODEL is `histnetq` or `deepsets`, DATASET one of `digits`, `breast_cancer`, `wine`,
`mnist`, `fashion_mnist`.
"""

from ml_collections import ConfigDict

VECTOR_DATASETS = ("breast_cancer", "wine")
IMAGE_DATASETS = ("mnist", "fashion_mnist")
MODELS = ("histnetq", "deepsets")


def get_config(variant: str = "histnetq_digits") -> ConfigDict:
    """The config of a variant `MODEL_DATASET`."""
    model, _, dataset = variant.partition("_")
    datasets = ("digits", *VECTOR_DATASETS, *IMAGE_DATASETS)
    if model not in MODELS or dataset not in datasets:
        raise ValueError(
            f"there is no variant {variant!r}: MODEL_DATASET with MODEL one of "
            f"{', '.join(MODELS)} and DATASET one of {', '.join(datasets)}"
        )
    config = ConfigDict()
    config.dataset = dict(name=dataset)
    if dataset in IMAGE_DATASETS:
        encoder = dict(name="CNN", channels=(16, 32), features=256)
        head = dict(name="PrevalenceHead", hidden_sizes=(1024,), dropout_rate=0.1)
        config.task = dict(name="Quantification", num_bags=2, bag_size=500)
    else:
        encoder = dict(
            name="MLP", hidden_sizes=(256, 256), features=64, dropout_rate=0.5
        )
        head = dict(name="PrevalenceHead", hidden_sizes=(256,), dropout_rate=0.2)
        config.task = dict(name="Quantification", num_bags=20, bag_size=100)
    if model == "histnetq":
        config.model = dict(
            name="HistNetQ",
            encoder=encoder,
            histogram=dict(name="LinearHistogram", num_bins=32),
            head=head,
        )
    else:
        config.model = dict(name="DeepSets", phi=encoder, rho=head, aggregation="mean")
    config.optimizer = dict(name="adamw", learning_rate=1e-3, schedule="cosine")
    config.training = dict(num_steps=2000, steps_per_call=20, eval_every=200)
    return config
