"""Whether a sentence of a film review is in favour: `sentiment.py:MODEL`.

MODEL is lstm, gru or rnn (bidirectional, the maximum over the words) or transformer.
`config.dataset.source_dir` is the folder of sentence_polarity.zip (Pang and Lee 2005),
`config.dataset.download=True` fetches it. Published accuracies without pre-trained
vectors: about 76 to 77 % (Kim, arXiv 1408.5882, CNN-rand 76.1), with them 79 to 81.5.
"""

from ml_collections import ConfigDict

from experiments.cells import stack
from experiments.variants import check_variant


def get_config(variant: str = "lstm") -> ConfigDict:
    """The config of a model."""
    check_variant(variant, ("lstm", "gru", "rnn", "transformer"))
    config = ConfigDict()
    config.dataset = dict(name="MovieSentences")
    if variant == "transformer":
        config.model = dict(
            name="TransformerClassifier", num_layers=2, dropout_rate=0.3
        )
    else:
        config.model = dict(
            name="SequenceClassifier",
            stack=stack(variant, 128, bidirectional=True, dropout_rate=0.3),
            embedding_size=128,
            pooling="max",
            dropout_rate=0.5,
        )
    config.task = dict(
        name="SequencePrediction", objective="cross_entropy", num_sequences=64
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=1e-3,
        schedule="cosine",
        warmup_steps=100,
        clip_norm=1.0,
        weight_decay=1e-2,
    )
    config.training = dict(
        num_steps=1000, steps_per_call=10, log_every=50, eval_every=50
    )
    return config
