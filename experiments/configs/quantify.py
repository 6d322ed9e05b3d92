"""Quantification of a labelled dataset: `quantify.py:MODEL_DATASET`.

MODEL is `histnetq`, `deepsets`, `set_transformer`, `gmnet` or `emqnet`, DATASET one of
`digits`, `breast_cancer`, `wine`, `mnist`, `fashion_mnist`, `sentences` (opinions on
films, `config.dataset.source_dir` has sentence_polarity.zip; each sentence is read by a
bidirectional GRU). Training encodes `num_bags`
examples a step and learns from mixtures of them (`mixed_bags`); with
`config.task.mixed_bags=0`, `config.task.bag_size=100` and `config.task.num_bags=20` it
learns from bags as drawn. Heads answer with sparsemax; the published softmax is
`config.model.head.output_activation="softmax"` (of DeepSets, `config.model.rho...`).
`emqnet` learns from the labels of single examples as well. Images can be encoded by a
residual network: `--config.model.encoder.name=ResNet`, with its fields, here
`--config.model.encoder.stage_sizes="(1,1,1)" --config.model.encoder.width=16
--config.model.encoder.stem=cifar --config.model.encoder.num_groups=4`.
"""

from ml_collections import ConfigDict

from experiments.cells import stack
from experiments.variants import check_variant

VECTORS = ("breast_cancer", "wine")
IMAGES = ("mnist", "fashion_mnist")
SENTENCES = "sentences"
DATASETS = ("digits", *VECTORS, *IMAGES, SENTENCES)
MODELS = ("histnetq", "deepsets", "set_transformer", "gmnet", "emqnet")
VARIANTS = {f"{m}_{d}": (m, d) for m in MODELS for d in DATASETS}


def get_config(variant: str = "histnetq_digits") -> ConfigDict:
    """The config of a variant `MODEL_DATASET`."""
    check_variant(variant, VARIANTS)
    model, dataset = VARIANTS[variant]
    config = ConfigDict()
    config.dataset = dict(name="MovieSentences" if dataset == SENTENCES else dataset)
    if model == "emqnet":
        return _with_labels(config, dataset)
    config.task = dict(
        name="Quantification",
        num_bags=256,
        bag_size=1,
        mixed_bags=64,
        evaluation_bag_size=500 if dataset in IMAGES else 100,
    )
    head = dict(
        name="PrevalenceHead", hidden_sizes=(256,), output_activation="sparsemax"
    )
    config.optimizer = dict(
        name="adamw", learning_rate=1e-3, schedule="cosine", ema_decay=0.99
    )
    if dataset in IMAGES:
        encoder = dict(name="CNN", channels=(16, 32), features=256)
        head.update(hidden_sizes=(512,))
        config.task.update(num_bags=128, mixed_bags=256)
        config.training = dict(num_steps=1200, steps_per_call=10, eval_every=400)
        # Three times the rate, which without warm-up ends in a constant answer.
        config.optimizer.update(learning_rate=3e-3, warmup_steps=100, clip_norm=0.05)
    elif dataset == SENTENCES:
        encoder = _reader()
        config.training = dict(num_steps=1500, steps_per_call=10, eval_every=150)
        config.optimizer.update(warmup_steps=100, clip_norm=1.0)
    else:
        encoder = dict(
            name="MLP", hidden_sizes=(512, 512), features=64, dropout_rate=0.3
        )
        config.training = dict(num_steps=4000, steps_per_call=50, eval_every=500)
        config.training.log_every = 500
    if model == "histnetq":
        config.model = dict(
            name="HistNetQ",
            encoder=encoder,
            histogram=dict(name="LinearHistogram", num_bins=16),
            head=head,
        )
    elif model == "deepsets":
        config.model = dict(name="DeepSets", phi=encoder, rho=head, aggregation="mean")
    elif model == "gmnet":
        config.model = dict(name="GMNet", encoder=encoder, head=head)
    else:
        config.model = dict(
            name="SetTransformer",
            encoder=encoder,
            hidden_size=64,
            num_seeds=dict(breast_cancer=2, wine=3, sentences=2).get(dataset, 10),
            head=head,
        )
        # A mixture is a bag of its own for attention: fewer of them, and fewer steps.
        config.task.mixed_bags = 16
        config.training.num_steps = 1200
        config.optimizer.update(warmup_steps=100, clip_norm=1.0)
    return config


def _reader() -> dict:
    """The encoder of a sentence."""
    network = dict(
        name="SequenceClassifier",
        stack=stack("gru", 64, bidirectional=True),
        num_classes=64,
        embedding_size=64,
        pooling="max",
        dropout_rate=0.5,
    )
    return dict(name="SequenceEncoder", network=network)


def _with_labels(config: ConfigDict, dataset: str) -> ConfigDict:
    """EMQNet: an ensemble that learns labels, and its calibration from bags."""
    images = dataset in IMAGES
    config.task = dict(
        name="LabelledQuantification",
        num_bags=128,
        mixed_bags=32,
        evaluation_bag_size=500 if images else 100,
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=2e-3,
        schedule="cosine",
        warmup_steps=100,
        ema_decay=0.99,
        weight_decay=1e-2,
    )
    if images:
        encoder = dict(
            name="CNN",
            channels=(32, 64),
            kernel_size=3,
            hidden_sizes=(256,),
            features=64,
            dropout_rate=0.3,
        )
        config.task.update(max_shift=2, flip=dataset == "fashion_mnist")
        config.training = dict(num_steps=5000, steps_per_call=10, eval_every=1000)
        # Among so many examples, seen shifted, no fold needs to be left out.
        config.model = dict(name="EMQNet", encoder=encoder)
        return config
    if dataset == SENTENCES:
        config.task.num_bags = 256
        config.training = dict(num_steps=600, steps_per_call=10, eval_every=100)
        config.model = dict(name="EMQNet", encoder=_reader())
        return config
    # Few examples: most of the train split is learned from, and calibration needs no
    # other.
    config.dataset.validation_fraction = 0.1
    config.task.num_bags = 256
    encoder = dict(name="MLP", hidden_sizes=(512, 512), features=64, dropout_rate=0.3)
    num_members, num_steps = 5, 600
    if dataset in VECTORS:
        config.dataset.validation_fraction = 0.03
        encoder.update(hidden_sizes=(64,), dropout_rate=0.5)
        config.optimizer.weight_decay = 1.0
        # So few examples calibrate nothing: the posteriors are taken as they are.
        config.task.update(noise=0.3, natural_examples=True, bag_weight=0.0)
        num_members = 1
    config.training = dict(num_steps=num_steps, steps_per_call=50, eval_every=num_steps)
    config.model = dict(name="EMQNet", encoder=encoder, num_members=num_members)
    return config
