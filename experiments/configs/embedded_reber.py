"""The embedded Reber grammar: `embedded_reber.py:CELL`.

The symbol before the last is the second one again, whatever the inner string: a cell
that says only legal symbols has remembered it. CELL is rnn, gru, lstm or peephole.
Hochreiter and Schmidhuber, "Long short-term memory", 1997, section 5.1.
"""

from ml_collections import ConfigDict

from experiments.cells import stack
from experiments.variants import check_variant


def get_config(variant: str = "lstm") -> ConfigDict:
    """The config of a cell."""
    check_variant(variant, ("rnn", "gru", "lstm", "peephole"))
    config = ConfigDict()
    config.dataset = dict(name="EmbeddedReber")
    config.model = dict(
        name="SequenceModel", stack=stack(variant, 16), embedding_size=8
    )
    config.task = dict(
        name="SequencePrediction", objective="legal_symbol", num_sequences=64
    )
    config.optimizer = dict(
        name="adam", learning_rate=1e-2, schedule="cosine", clip_norm=1.0
    )
    config.training = dict(
        num_steps=2000, steps_per_call=50, log_every=100, eval_every=200
    )
    return config
