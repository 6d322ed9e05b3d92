"""Classifying point clouds: `point_clouds.py:MODEL_DATASET[_quick]`.

MODEL is `set_transformer` or `deepsets`; DATASET is `solids`, ten generated surfaces
among five outliers a cloud, or `modelnet40`, whose folder `--config.dataset.data_dir`
names. Clouds have 1,000 points, those of `_quick` have 100 and training is shorter.

The set transformer is that of Lee et al., ICML 2019, section 5.5, in the form of its
official code: two ISABs of 16 inducing points, dropout, one seed, dropout, a linear
layer; Adam at 1e-3. The other network is that of Zaheer et al., "Deep Sets", NeurIPS
2017: three equivariant layers of 256 tanh units with the maximum, then the maximum of
all points, dropout, 256 tanh units, dropout. (Their layer maps x - max x; the one here
has matrices of their own for x and for max x.) Published accuracies on ModelNet40 with
100 and 1,000 points: 0.845 and 0.866; 0.82 and 0.87.
"""

from ml_collections import ConfigDict

from experiments.variants import check_variant

MODELS = ("set_transformer", "deepsets")
DATASETS = {"solids": 10, "modelnet40": 40}
VARIANTS = tuple(
    f"{model}_{dataset}{quick}"
    for model in MODELS
    for dataset in DATASETS
    for quick in ("", "_quick")
)


def get_config(variant: str = "set_transformer_solids_quick") -> ConfigDict:
    """The config of a variant."""
    check_variant(variant, VARIANTS)
    quick = variant.endswith("_quick")
    model, _, dataset = variant.removesuffix("_quick").rpartition("_")
    num_points = 100 if quick else 1000
    config = ConfigDict()
    if dataset == "solids":
        # Five points of a cloud on average, whatever its size: the maximum of all
        # points shows the outermost, and of fifty outliers never the solid.
        config.dataset = dict(
            name="Solids", num_points=num_points, outliers=5 / num_points
        )
    else:
        config.dataset = dict(
            name="ModelNet40", num_points=num_points, data_dir="modelnet40"
        )
    num_classes = DATASETS[dataset]
    # Of ModelNet40 all the clouds that there are.
    validation_sets, test_sets = (984, 2468) if num_classes == 40 else (500, 2500)
    if model == "set_transformer":
        config.model = dict(
            name="SetTransformer",
            head=dict(name="MLP", hidden_sizes=(), features=num_classes),
            hidden_size=256,
            num_heads=4,
            num_layers=2,
            num_inducing_points=16,
            dropout_rate=0.5,
            block="official",
            normalization=None,
        )
    else:
        config.model = dict(
            name="EquivariantNetwork",
            layer=dict(name="EquivariantLayer", features=256, aggregation="max"),
            num_layers=3,
            activation="tanh",
            aggregation="max",
            dropout_rate=0.5,
            head=dict(
                name="MLP",
                hidden_sizes=(256,),
                features=num_classes,
                activation="tanh",
                dropout_rate=0.5,
            ),
        )
    config.task = dict(
        name="SetPrediction",
        objective="classification",
        num_sets=64,
        validation_sets=validation_sets,
        test_sets=test_sets,
        evaluation_batch=50,
    )
    config.optimizer = dict(
        name="adam", learning_rate=1e-3, schedule="cosine", clip_norm=5.0
    )
    config.training = dict(
        num_steps=20_000, steps_per_call=20, log_every=200, eval_every=1000
    )
    if quick:
        config.training.update(num_steps=1500, log_every=100, eval_every=300)
    elif dataset == "solids":
        num_steps = 1000 if model == "set_transformer" else 3000
        config.training.update(num_steps=num_steps, log_every=100, eval_every=500)
    return config
