"""Entropies and mutual informations of Gaussians: `population_statistics.py:STATISTIC`.

STATISTIC is `rotation`, `correlation`, `rank1` or `random`, see
`data.PopulationStatistics`. The network is that of the official code of Zaheer et al.,
"Deep Sets", NeurIPS 2017, section 4.1.1 (13,081 parameters for points in the plane),
which trains it 500 epochs on squared and 500 on absolute errors of up to 131,072 sets,
and gives its results as a figure. Here it learns from 640,000 sets, each seen once, in
5,000 steps, with a learning rate that falls to zero.
"""

from ml_collections import ConfigDict

from experiments.variants import check_variant

STATISTICS = ("rotation", "correlation", "rank1", "random")


def get_config(variant: str = "rotation") -> ConfigDict:
    """The config of a statistic."""
    check_variant(variant, STATISTICS)
    config = ConfigDict()
    config.dataset = dict(name="PopulationStatistics", statistic=variant)
    config.model = dict(
        name="DeepSets",
        phi=dict(name="MLP", hidden_sizes=(50, 100), features=50, activation="elu"),
        rho=dict(name="MLP", hidden_sizes=(30, 30, 10), features=1, activation="elu"),
        aggregation="sum",
    )
    config.task = dict(
        name="SetPrediction",
        objective="squared_error",
        num_sets=128,
        validation_sets=512,
        test_sets=5120,
        evaluation_batch=128,
    )
    config.optimizer = dict(name="adam", learning_rate=1e-3, schedule="cosine")
    config.training = dict(
        num_steps=5000, steps_per_call=50, log_every=500, eval_every=500
    )
    return config
