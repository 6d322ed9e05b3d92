"""The shipped configs: every variant of every file."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from data.sequences import spec
from experiments import config as configs
from experiments import runner
from experiments.errors import UserError

SHIPPED = Path(__file__).parents[2] / "experiments" / "configs"
# Datasets of files that are not distributed here.
OUTSIDE = (
    "LeQua",
    "ModelNet40",
    "UniqueCharacters",
    "Chorales",
    "TinyShakespeare",
    "WordText",
    "MovieSentences",
    "Multi30k",
    "mnist",
    "fashion_mnist",
)


def variants(file):
    """The variants of a config file, as it lists them."""
    try:
        configs.load(f"{file}:no such variant")
    except UserError as error:
        return str(error).split("it must be one of ")[1].split(", ")


FLAGS = [
    f"{file}:{variant}"
    for file in sorted(SHIPPED.glob("*.py"))
    for variant in variants(file)
]


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: Path(flag).name)
def test_a_variant_loads_and_builds(flag):
    config = configs.load(flag)
    if not {config.dataset.name, config.dataset.get("examples")} & set(OUTSIDE):
        runner.build(config)


# What the published network has more: 512 features of each of ten seeds, which the head
# reads instead of 256. The published histogram keeps fixed numbers as parameters.
OF_512_FEATURES = 256 * 512 + 512 + 10 * 256 * 1024


@pytest.mark.parametrize(
    ("model", "number", "more", "published"),
    [
        ("histnetq", 8_831_178, 0, 8.86),
        ("deepsets_mean", 688_330, 0, 0.69),
        ("set_transformer", 4_908_746, OF_512_FEATURES, 7.66),
    ],
)
def test_published_networks_have_their_number_of_parameters(
    model, number, more, published
):
    section = configs.load(f"{SHIPPED}/published.py:{model}_ae").model.to_dict()
    model = configs.build_module(section, spec=spec("x", 10), precision="float32")
    inputs = jnp.zeros((1, 2, 28, 28, 1))
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)
    found = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert found == number
    assert (found + more) / 1e6 == pytest.approx(published, abs=0.03)


@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        ("histnetq_rae", {"encoder.features": 4, "histogram.num_bins": 4}),
        ("deepsets_median_ae", {"phi.features": 4}),
        (
            "set_transformer_ae",
            {"hidden_size": 8, "num_seeds": 2, "num_decoder_layers": 1},
        ),
        ("histnetq_mixtures_rae", {"encoder.features": 4}),
    ],
)
def test_published_configs_train_and_are_evaluated(measured, variant, fields):
    """In small, on images that need no file."""
    deepsets, mixtures = (name in variant for name in ("deepsets", "mixtures"))
    fields = {f"model.{name}": value for name, value in fields.items()} | {
        f"model.{'rho' if deepsets else 'head'}.hidden_sizes": "(8,)",
        f"model.{'phi' if deepsets else 'encoder'}.channels": "(2,3)",
        "dataset.name": "digits",
        f"task.{'evaluation_bag_size' if mixtures else 'bag_size'}": 20,
        "task.validation_bags": 5,
        "task.test_bags": 5,
        "task.baselines": False,
        "training.num_steps": 2,
        "training.steps_per_call": 1,
        "training.eval_every": 2,
        "training.log_every": 1,
    }
    if mixtures:
        fields |= {"task.num_bags": 30, "task.mixed_bags": 5}
    test = measured(f"{SHIPPED}/published.py:{variant}", fields)
    assert 0 < test["absolute_error"] < 0.2
