"""'Roma', the city or the film, as the words after it say: `roma.py:DIRECTION`.

DIRECTION is forward or bidirectional. What precedes the word tells nothing, so that a
forward network stays at one half, and a bidirectional one can always be right.
"""

from ml_collections import ConfigDict

from experiments.cells import stack
from experiments.variants import check_variant


def get_config(variant: str = "bidirectional") -> ConfigDict:
    """The config of a direction."""
    check_variant(variant, ("forward", "bidirectional"))
    config = ConfigDict()
    config.dataset = dict(name="RomaDisambiguation")
    config.model = dict(
        name="SequenceModel",
        stack=stack("lstm", 16, bidirectional=variant == "bidirectional"),
        embedding_size=16,
    )
    config.task = dict(
        name="SequencePrediction", objective="cross_entropy", num_sequences=64
    )
    config.optimizer = dict(name="adam", learning_rate=1e-2, schedule="cosine")
    config.training = dict(
        num_steps=500, steps_per_call=50, log_every=50, eval_every=100
    )
    return config
