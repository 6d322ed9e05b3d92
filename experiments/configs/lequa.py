"""LeQua by bags labelled with prevalences: `lequa.py:MODEL_TASK`.

MODEL is `histnetq`, `deepsets`, `set_transformer` or `gmnet`, TASK one of `t1a`, `t1b`
(2022), `t1`, `t2`, `t3`, `t4` (2024). The files are read from
`--config.dataset.source_dir=DIR`, see `data/lequa.py`; DIR holds T1A/public and so on.

Sizes, rates and schedules are those published with HistNetQ (Pérez-Mon et al. 2025)
and, for GMNet and for T3, those published with GMNet (González et al. 2025); T4 has
T1's. An epoch ends in an evaluation; the learning rate is halved after more than
`patience` epochs without a better one, and where it would fall below the last one the
training ends. T3 learns from its 100 training bags, too: 770 bags, and 330 for
validation. GMNet draws half of its bags from the labelled documents
(`config.task.labelled_bags`; not of T3, whose documents are in its training bags).
Where this departs from the published code:

- Dropout follows each hidden layer of the encoder, as the paper draws it; the published
  code applies the first one alone. T1A, T1 and T4 have two hidden layers, the others
  one.
- The first ten epochs learn from absolute errors: relative ones from the start make a
  SetTransformer answer a constant.
- SetTransformer's linear layer to 512 features a seed is left out, as the head's
  first layer is linear in the same features.
- `config.task.mixer="exact"` mixes without noise in the labels, and
  `config.model.histogram.name="LinearHistogram"` has an exact gradient; both are ours.
"""

from ml_collections import ConfigDict

from experiments.variants import check_variant

MODELS = ("histnetq", "deepsets", "set_transformer", "gmnet")
NUM_CLASSES = {"t1a": 2, "t1b": 28, "t1": 2, "t2": 28, "t3": 5, "t4": 2}
VARIANTS = tuple(f"{model}_{task}" for model in MODELS for task in NUM_CLASSES)


def get_config(variant: str = "histnetq_t1a") -> ConfigDict:
    """The config of a variant `MODEL_TASK`."""
    check_variant(variant, VARIANTS)
    model, _, task = variant.rpartition("_")
    gmnet = model == "gmnet"
    binary = NUM_CLASSES[task] == 2
    ordinal = task == "t3"
    loss = "normalized_match_distance" if ordinal else "relative_absolute_error"
    num_bags = 100 if gmnet else 20 if binary else 25
    bags_per_epoch = 1000 if binary and not gmnet else 5000
    epoch = bags_per_epoch // num_bags

    config = ConfigDict()
    config.dataset = dict(
        name="LeQua",
        task=task.upper(),
        validation_bags=330 if ordinal else 300,
        training_bags=ordinal,
    )
    config.task = dict(
        name="BagQuantification",
        loss=loss,
        measures=(loss, "absolute_error"),
        num_bags=num_bags,
        mixer="published",
        real_bags=0.1 if binary and not gmnet else 0.5,
        warmup_steps=0 if ordinal else 10 * epoch,
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=1e-4 if binary else 5e-4,
        end_learning_rate=1e-5,
        schedule="plateau",
        plateau_factor=0.5,
        plateau_patience=20,
        weight_decay=1e-3 if ordinal else 1e-5,
        accumulation_steps=1 if binary else 20,
    )
    config.training = dict(
        num_steps=1000 * epoch, steps_per_call=10, log_every=epoch, eval_every=epoch
    )
    encoder = dict(
        name="MLP",
        hidden_sizes=(1024, 1024) if binary else (1024,),
        features=300 if task == "t1a" else 512,
        dropout_rate=0.5,
    )
    head = dict(
        name="PrevalenceHead",
        hidden_sizes=(2048, 2048, 2048) if binary else (4096,),
        dropout_rate=0.5,
    )
    if model == "histnetq":
        histogram = dict(
            name="HardBinningHistogram", num_bins=64 if task in ("t1b", "t2") else 32
        )
        config.model = dict(
            name="HistNetQ", encoder=encoder, histogram=histogram, head=head
        )
    elif model == "deepsets":
        config.model = dict(name="DeepSets", phi=encoder, rho=head, aggregation="mean")
    elif model == "set_transformer":
        config.model = dict(
            name="SetTransformer",
            encoder=encoder,
            hidden_size=256,
            num_heads=4,
            num_inducing_points=32 if binary else 128,
            num_seeds=NUM_CLASSES[task],
            num_decoder_layers=2,
            block="official",
            normalization=None,
            head=head,
        )
    else:
        config.dataset.standardize = True
        config.task.labelled_bags = 0 if ordinal else num_bags // 2
        config.model = dict(
            name="GMNet",
            num_spaces=9,
            num_gaussians=100,
            latent_size=5,
            hidden_sizes=(50,),
            dropout_rate=0.5,
            cka_weight=0.01,
            head=dict(name="PrevalenceHead", hidden_sizes=(4000,), dropout_rate=0.5),
        )
        config.optimizer.update(
            learning_rate=5e-3,
            end_learning_rate=1e-4,
            plateau_patience=40,
            weight_decay=1e-3,
            accumulation_steps=1,
        )
    return config
