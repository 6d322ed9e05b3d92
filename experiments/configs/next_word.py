"""The next word of a sentence: `next_word.py:MODEL`, MODEL lstm, gru, rnn, transformer.

`config.dataset.path` names a text file. A vocabulary of 10,000 words and sentences of
up to 50, as in the lecture.
"""

from ml_collections import ConfigDict

from experiments.cells import stack
from experiments.variants import check_variant


def get_config(variant: str = "lstm") -> ConfigDict:
    """The config of a model."""
    check_variant(variant, ("lstm", "gru", "rnn", "transformer"))
    config = ConfigDict()
    config.dataset = dict(name="WordText", path="text.txt")
    if variant == "transformer":
        config.model = dict(
            name="TransformerLanguageModel",
            num_layers=2,
            dropout_rate=0.3,
            tied_embeddings=True,
        )
    else:
        config.model = dict(
            name="SequenceModel",
            stack=stack(variant, 256, dropout_rate=0.5),
            embedding_size=128,
            dropout_rate=0.3,
        )
    config.task = dict(
        name="SequencePrediction", objective="cross_entropy", num_sequences=32
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=2e-3,
        schedule="cosine",
        warmup_steps=100,
        clip_norm=1.0,
        weight_decay=1e-2,
    )
    config.training = dict(
        num_steps=3000, steps_per_call=10, log_every=100, eval_every=300
    )
    return config
