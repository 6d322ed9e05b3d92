"""Sums of digits, learned from ten at most, tested on a hundred: `digit_sum.py:KIND`.

KIND is `text` (one-hot digits) or `mnist` (images; the four files of MNIST are named by
`config.dataset.source_dir`, and `config.dataset.examples=digits` needs none). The
networks are those of the official code of Zaheer et al., "Deep Sets", NeurIPS 2017,
section 4.1.2. For text that is an embedding of 100, a layer of 30 with tanh, their sum
and one output: 4,061 parameters for ten digits, and 4,161 with the official vocabulary
of eleven, in which padding has an embedding. Both learn by Adam with a learning rate of
1e-3 that falls to zero (officially constant; text 1e-4), from fresh sets all the time:
text from about as many as officially. Of MNIST the 2,048 sets of a step are drawn from
512 images, each encoded once, of which there are forty deformed copies (the paper's
MNIST8m has 134): more sets than officially, of a quarter of the images.
"""

from ml_collections import ConfigDict

from experiments.variants import check_variant


def get_config(variant: str = "text") -> ConfigDict:
    """The config of a kind of digits."""
    check_variant(variant, ("text", "mnist"))
    config = ConfigDict()
    if variant == "text":
        config.dataset = dict(name="DigitSums")
        layer = dict(name="MLP", hidden_sizes=(), features=30)
        phi = dict(name="Embedding", encoder=layer, embedding_size=100)
        num_steps, num_sets, every = 8000, 128, 500
    else:
        config.dataset = dict(
            name="ImageDigitSums",
            examples="mnist",
            num_deformed=40,
            shared_images=512,
        )
        layer = phi = dict(name="MLP", hidden_sizes=(300, 100), features=30)
        num_steps, num_sets, every = 200_000, 2048, 5000
    layer.update(activation="tanh", activate_output=True)
    config.model = dict(
        name="DeepSets",
        phi=phi,
        rho=dict(name="MLP", hidden_sizes=(), features=1),
        aggregation="sum",
    )
    config.task = dict(
        name="SetPrediction",
        objective="digit_sum",
        num_sets=num_sets,
        # An error is rare and large: few sets would not tell checkpoints apart.
        validation_sets=10_000,
        test_sets=10_000,
    )
    config.optimizer = dict(name="adam", learning_rate=1e-3, schedule="cosine")
    config.training = dict(
        num_steps=num_steps, steps_per_call=50, log_every=every, eval_every=every
    )
    return config
