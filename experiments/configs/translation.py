"""Translation: `translation.py:MODEL_DATASET`.

MODEL is gru (a bidirectional encoder and a decoder with additive attention), seq2seq
(the same without attention) or transformer; DATASET is multi30k (English to German;
`config.dataset.target_language=fr` for French), or dates ("3 de mayo de 2021" to
2021-05-03, generated). `config.dataset.source_dir` is the folder of Multi30k's files,
`config.dataset.download=True` fetches them. Published BLEU on test 2016, lowercased:
about 33 to 35 of recurrent networks with attention, 38 to 41 of small Transformers.
"""

from ml_collections import ConfigDict

from experiments.cells import stack
from experiments.variants import check_variant

MODELS = ("gru", "seq2seq", "transformer")
DATASETS = {"multi30k": "Multi30k", "dates": "DateTranslation"}


def get_config(variant: str = "gru_dates") -> ConfigDict:
    """The config of a model and a dataset."""
    variants = {f"{m}_{name}": (m, name) for m in MODELS for name in DATASETS}
    check_variant(variant, variants)
    model, name = variants[variant]
    large = name == "multi30k"
    config = ConfigDict()
    config.dataset = dict(name=DATASETS[name])
    size, dropout_rate = (256, 0.3) if large else (64, 0.1)
    if model == "transformer":
        config.model = dict(
            name="Transformer",
            num_layers=3 if large else 2,
            hidden_size=size,
            dropout_rate=dropout_rate,
            feedforward_size=2 * size,
            tied_embeddings=True,
        )
    else:
        config.model = dict(
            name="RecurrentEncoderDecoder",
            encoder=stack("gru", size, bidirectional=True),
            decoder=stack("gru", size),
            embedding_size=size,
            attention=model == "gru",
            attention_size=size,
            dropout_rate=dropout_rate,
        )
    config.task = dict(name="Translation", num_pairs=64)
    config.optimizer = dict(
        name="adamw",
        learning_rate=1e-3 if large else 3e-3,
        schedule="cosine",
        warmup_steps=400 if large else 100,
        clip_norm=1.0,
        weight_decay=1e-2,
        ema_decay=0.999 if large else None,
    )
    config.training = dict(
        num_steps=6000, steps_per_call=10, log_every=100, eval_every=1000
    )
    if not large:
        config.training.update(num_steps=1500, eval_every=300)
    return config
