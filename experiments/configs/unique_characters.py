"""How many distinct characters are in a set of images: `unique_characters.py:MODEL`.

MODEL is `deepsets_mean`, `deepsets_sum`, `deepsets_max` or `set_transformer`.
`config.dataset.source_dir` names the folder of Omniglot's images, see
`data.UniqueCharacters`.

The protocol, the sizes of the networks and the Poisson likelihood are those of Lee et
al., "Set Transformer", ICML 2019, section 5.2, whose accuracies after 200,000 steps of
32 sets by Adam's 1e-4 are 0.4382 with pooling (rFF + Pooling) and 0.6037 with SAB +
PMA, with the 1,623 characters of all of Omniglot. Here the four convolutions have group
normalisation, as that of batches would mix the sets of a batch, the pooling by
attention is as wide as the layers before it (64 and 4 heads instead of 8 and 8), and
the sets to learn from are turned, mirrored and deformed. There are 20,000 steps of 256
sets at ten times the learning rate, which falls to zero; the sets of a step are drawn
from ten images of each of 25 characters, encoded once. For the first 500 to several
thousand steps a network answers a constant; without the normalisation it has not been
seen to leave it.
"""

from ml_collections import ConfigDict

from experiments.variants import check_variant

MODELS = ("deepsets_mean", "deepsets_sum", "deepsets_max", "set_transformer")


def get_config(variant: str = "set_transformer") -> ConfigDict:
    """The config of a model."""
    check_variant(variant, MODELS)
    config = ConfigDict()
    config.dataset = dict(name="UniqueCharacters", augment=True, shared_characters=25)
    encoder = dict(
        name="CNN",
        channels=(64, 64, 64, 64),
        features=64,
        kernel_size=3,
        stride=2,
        num_groups=8,
    )
    if variant == "set_transformer":
        config.model = dict(
            name="SetTransformer",
            head=dict(name="MLP", hidden_sizes=(), features=1),
            encoder=encoder,
            hidden_size=64,
            num_inducing_points=None,
            normalization=None,
            block="official",
        )
    else:
        config.model = dict(
            name="DeepSets",
            phi=encoder | dict(hidden_sizes=(64, 64, 64)),
            rho=dict(name="MLP", hidden_sizes=(64,), features=1, activation="relu"),
            aggregation=variant.removeprefix("deepsets_"),
        )
    config.task = dict(
        name="SetPrediction", objective="poisson_count", num_sets=256, test_sets=10_000
    )
    config.optimizer = dict(name="adam", learning_rate=1e-3, schedule="cosine")
    config.training = dict(
        num_steps=20_000, steps_per_call=10, log_every=1000, eval_every=1000
    )
    return config
