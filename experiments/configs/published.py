"""The published quantification of Fashion-MNIST: `published.py:MODEL_LOSS`.

MODEL is `histnetq`, `deepsets_mean`, `deepsets_median`, `deepsets_max`,
`set_transformer` or `histnetq_mixtures`, LOSS `ae` or `rae` (absolute or relative
absolute errors). Networks, bags, rates and schedule are those of the code of HistNetQ's
paper (Pérez-Mon, Moreo, del Coz and González 2025): 50,000 examples to train on, 10,000
for validation; bags of 500 under the published generator of prevalences, two a step and
500 an epoch; AdamW from 3e-4, halved after more than ten epochs without a better
validation error, until below 1e-5 or for 1,000 epochs; 5,000 test bags. Published
errors of `histnetq_ae`: AE 0.0060; of `histnetq_rae`: RAE 0.1592.

The linear layer that makes 512 features of each of SetTransformer's seeds is left out,
as the head's first layer is linear in the same features: 4.9 million parameters instead
of the published 7.66.

An epoch encodes 250,000 images. `--config.training.num_steps=5000` stops after twenty.

`histnetq_mixtures` has the same images, validation and test bags, but learns in our
way: convolutions with more channels and smaller kernels, linear binning, 512 single
images a step that serve 64 exact mixtures of uniform prevalences, 32 bags of 500 a step
of what the encoder last said of the images, which teach the head, and a learning rate
of 3e-3 that falls to zero. For `ae` the images are shifted and mirrored, the encoder
has a hidden layer, and a run encodes nine million images. For `rae` some mixtures are
of few images, absolute errors come first, and a run encodes three million.
"""

from ml_collections import ConfigDict

from experiments.variants import check_variant

POOLINGS = {
    "deepsets_mean": "mean",
    "deepsets_median": "lower_median",
    "deepsets_max": "max",
}
MODELS = ("histnetq", *POOLINGS, "set_transformer", "histnetq_mixtures")
LOSSES = {"ae": "absolute_error", "rae": "relative_absolute_error"}
VARIANTS = tuple(f"{model}_{loss}" for model in MODELS for loss in LOSSES)
EPOCH = 250


def get_config(variant: str = "histnetq_ae") -> ConfigDict:
    """The config of a variant `MODEL_LOSS`."""
    check_variant(variant, VARIANTS)
    model, _, loss = variant.rpartition("_")
    config = ConfigDict()
    config.dataset = dict(name="fashion_mnist", validation_fraction=1 / 6)
    config.task = dict(
        name="Quantification",
        loss=LOSSES[loss],
        num_bags=2,
        bag_size=500,
        protocol="published",
        evaluation_protocol="published",
        validation_bags=300,
        test_bags=5000,
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=3e-4,
        end_learning_rate=1e-5,
        schedule="plateau",
        plateau_factor=0.5,
        plateau_patience=10,
    )
    config.training = dict(
        num_steps=1000 * EPOCH,
        steps_per_call=10,
        log_every=EPOCH,
        eval_every=EPOCH,
    )
    encoder = dict(name="CNN", channels=(16, 32), features=256)
    head = dict(name="PrevalenceHead", hidden_sizes=(1024,), dropout_rate=0.1)
    if model == "histnetq":
        histogram = dict(name="HardBinningHistogram", num_bins=32)
        config.model = dict(
            name="HistNetQ", encoder=encoder, histogram=histogram, head=head
        )
    elif model == "set_transformer":
        config.model = dict(
            name="SetTransformer",
            encoder=encoder,
            hidden_size=256,
            num_seeds=10,
            num_decoder_layers=2,
            block="official",
            normalization=None,
            head=head,
        )
    elif model in POOLINGS:
        config.model = dict(
            name="DeepSets", phi=encoder, rho=head, aggregation=POOLINGS[model]
        )
    else:  # histnetq_mixtures
        config.model = dict(
            name="HistNetQ",
            encoder=dict(name="CNN", channels=(32, 64), kernel_size=3, features=256),
            histogram=dict(name="LinearHistogram", num_bins=16),
            head=dict(name="PrevalenceHead", hidden_sizes=(512,)),
        )
        config.task.update(
            num_bags=512,
            bag_size=1,
            evaluation_bag_size=500,
            mixed_bags=64,
            mixture_sharpness=5.0 if loss == "rae" else 1.0,
            remembered_bags=32,
            protocol="uniform",
            warmup_steps=2000 if loss == "rae" else 0,
        )
        config.optimizer = dict(
            name="adamw",
            learning_rate=3e-3,
            schedule="cosine",
            warmup_steps=100,
            clip_norm=0.05,
            ema_decay=0.99,
        )
        config.training = dict(
            num_steps=6000, steps_per_call=10, log_every=200, eval_every=1000
        )
        if loss == "ae":
            # Varied images are learned more slowly, and do not run out.
            config.model.encoder.hidden_sizes = (256,)
            config.task.update(max_shift=1, flip=True)
            config.training.update(num_steps=18_000, eval_every=2000)
    return config
