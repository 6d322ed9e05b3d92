"""Images pixel by pixel: `sequential_images.py:CELL_DATASET`.

CELL is rnn, gru or lstm, DATASET mnist, permuted_mnist, fashion_mnist or digits (8 x 8
pixels, no file needed). The files of the others: `config.dataset.source_dir`, see
`data.load`. Published accuracies with 70,000 parameters (Bai, Kolter and Koltun, arXiv
1803.01271, table 1) on MNIST: 21.5 % (RNN), 96.2 % (GRU), 87.2 % (LSTM); permuted:
25.3 %, 87.3 %, 85.7 %.
"""

from ml_collections import ConfigDict

from experiments.cells import stack
from experiments.variants import check_variant

CELLS = ("rnn", "gru", "lstm")
DATASETS = ("mnist", "permuted_mnist", "fashion_mnist", "digits")


def get_config(variant: str = "gru_digits") -> ConfigDict:
    """The config of a cell and a dataset."""
    check_variant(variant, (f"{cell}_{name}" for cell in CELLS for name in DATASETS))
    cell, _, name = variant.partition("_")
    config = ConfigDict()
    config.dataset = dict(name="SequentialImages", examples=name)
    if name == "permuted_mnist":
        config.dataset.update(examples="mnist", permutation_seed=0)
    steps = 64 if name == "digits" else 784
    # Memories of gated cells last up to the whole image from the start (Tallec and
    # Ollivier 2018).
    cell_fields = {} if cell == "rnn" else dict(chrono_max_length=steps)
    config.model = dict(
        name="SequenceClassifier", stack=stack(cell, 128, cell_fields=cell_fields)
    )
    config.task = dict(
        name="SequencePrediction", objective="cross_entropy", num_sequences=64
    )
    config.optimizer = dict(
        name="adam", learning_rate=2e-3, schedule="cosine", clip_norm=1.0
    )
    config.training = dict(
        num_steps=6000, steps_per_call=10, log_every=100, eval_every=1000
    )
    if name == "digits":
        config.training.update(num_steps=2000, steps_per_call=50, eval_every=200)
    return config
