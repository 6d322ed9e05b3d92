"""Copy memory: `copy_memory.py:CELL`, CELL one of rnn, gru, lstm.

Ten symbols are to be said again after a delay; `config.dataset.delay` is 100 here. At
1,000, as in Bai, Kolter and Koltun, arXiv 1803.01271, table 1, recurrent networks of
16,000 parameters stay at what can be had without memory, 10 ln 8 / (delay + 20) nats a
step: 0.0202 (RNN), 0.0197 (GRU) and 0.0204 (LSTM).
"""

from ml_collections import ConfigDict

from experiments.cells import stack
from experiments.variants import check_variant

HIDDEN_SIZE = 128


def get_config(variant: str = "gru") -> ConfigDict:
    """The config of a cell."""
    check_variant(variant, ("rnn", "gru", "lstm"))
    config = ConfigDict()
    config.dataset = dict(name="CopyMemory", delay=100)
    # Memories of gated cells last up to the delay from the start (Tallec and Ollivier
    # 2018).
    cell_fields = {} if variant == "rnn" else dict(chrono_max_length=100)
    config.model = dict(
        name="SequenceModel",
        stack=stack(variant, HIDDEN_SIZE, cell_fields=cell_fields),
        embedding_size=10,
    )
    config.task = dict(
        name="SequencePrediction",
        objective="cross_entropy",
        num_sequences=32,
        test_sequences=1000,
    )
    config.optimizer = dict(
        name="adam", learning_rate=3e-3, schedule="cosine", clip_norm=1.0
    )
    config.training = dict(
        num_steps=40_000, steps_per_call=50, log_every=2000, eval_every=4000
    )
    return config
