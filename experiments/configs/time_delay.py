"""Measuring a time delay: `time_delay.py:CELL`, CELL one of lstm, peephole, gru.

Between two spikes nothing tells the time but the cell's own state: with peepholes its
gates see it. Gers, Schraudolph and Schmidhuber, "Learning precise timing with LSTM
recurrent networks", JMLR 2002, section 4.1, with one or a few units.
"""

from ml_collections import ConfigDict

from experiments.cells import stack
from experiments.variants import check_variant


def get_config(variant: str = "peephole") -> ConfigDict:
    """The config of a cell."""
    check_variant(variant, ("lstm", "peephole", "gru"))
    config = ConfigDict()
    config.dataset = dict(name="TimeDelay", delay=20)
    config.model = dict(name="SequenceModel", stack=stack(variant, 1))
    config.task = dict(
        name="SequencePrediction", objective="cross_entropy", num_sequences=32
    )
    config.optimizer = dict(
        name="adam", learning_rate=1e-2, schedule="cosine", clip_norm=1.0
    )
    config.training = dict(
        num_steps=10_000, steps_per_call=100, log_every=500, eval_every=1000
    )
    return config
