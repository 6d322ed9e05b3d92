"""Shakespeare, character by character: `shakespeare.py:MODEL`.

MODEL is lstm, gru, rnn, min_gru, min_lstm, linear (all with their state carried from
window to window) or transformer. `config.dataset.source_dir` is the folder of
tinyshakespeare.txt, `config.dataset.download=True` fetches it.

The Transformer is of the size of nanoGPT's example for a CPU (4 layers of 128, windows
of 64), which gives 1.88 nats after 2,000 steps of 12 windows; 10.7 million parameters
give 1.47. The cells without a matrix on their memory are in four residual layers; Feng
et al., arXiv 2410.01201, report 1.548 (minGRU) and 1.555 nats (minLSTM) of larger
blocks.
"""

from ml_collections import ConfigDict

from experiments.cells import stack
from experiments.variants import check_variant

GATED = ("lstm", "gru", "rnn")
PARALLEL = ("min_gru", "min_lstm", "linear")


def get_config(variant: str = "lstm") -> ConfigDict:
    """The config of a model."""
    check_variant(variant, (*GATED, *PARALLEL, "transformer"))
    config = ConfigDict()
    config.dataset = dict(name="TinyShakespeare")
    config.optimizer = dict(
        name="adamw",
        learning_rate=2e-3,
        schedule="cosine",
        warmup_steps=100,
        clip_norm=1.0,
        weight_decay=1e-2,
    )
    config.training = dict(
        num_steps=4000, steps_per_call=10, log_every=100, eval_every=500
    )
    if variant == "transformer":
        config.model = dict(name="TransformerLanguageModel", dropout_rate=0.1)
        config.task = dict(
            name="LanguageModeling", window=64, num_windows=32, carry_state=False
        )
    else:
        layers, width = dict(num_layers=2), 64
        if variant in PARALLEL:
            layers, width = dict(num_layers=4, residual=True, layer_norm=True), 256
        config.model = dict(
            name="SequenceModel",
            stack=stack(variant, 256, dropout_rate=0.3, **layers),
            embedding_size=width,
        )
        config.task = dict(name="LanguageModeling", window=100, num_windows=32)
    return config
