"""Number agreement in Spanish: `number_agreement.py:CELL`.

"la bicicleta que compraron los vecinos ..." goes on with "es" or "son", as its first
noun says, whatever comes between. CELL is rnn, gru, plain_gru, lstm, peephole, min_gru,
min_lstm or linear. The report has the accuracy against the number of attractors, 0 to
4; `experiments.agreement_curves` draws it of several cells. With many in every sentence
(`config.dataset.min_attractors`, `config.dataset.max_attractors`) gradients have far to
go: docs/results.md says which cell still learns.
"""

from ml_collections import ConfigDict

from experiments.cells import CELLS, stack
from experiments.variants import check_variant


def get_config(variant: str = "lstm") -> ConfigDict:
    """The config of a cell."""
    check_variant(variant, CELLS)
    config = ConfigDict()
    config.dataset = dict(name="NumberAgreement")
    config.model = dict(
        name="SequenceClassifier", stack=stack(variant, 32), embedding_size=16
    )
    config.task = dict(
        name="SequencePrediction", objective="cross_entropy", num_sequences=64
    )
    config.optimizer = dict(
        name="adam", learning_rate=3e-3, schedule="cosine", clip_norm=1.0
    )
    config.training = dict(
        num_steps=2000, steps_per_call=50, log_every=100, eval_every=200
    )
    return config
