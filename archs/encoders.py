"""Networks for one example, φ: the part of a set network that every element meets.

A bag `[bag, element, *features]` is flattened to examples `[n, *features]`, each is
encoded on its own, and the codes are laid out as a bag again:

    x_1, ..., x_m   ->   φ(x_1), ..., φ(x_m)          [bag, element, f]

Any module with `__call__(x [n, *features], *, train=False) -> [n, f]` is an encoder.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .contracts import check_set, zero_absent
from .convolution import convolve
from .dropout import Dropout


def uniform_fan_in(fan_in: int) -> nn.initializers.Initializer:
    """Initialiser: uniform in ±1/sqrt(fan_in).

    The variance 1/(3 fan_in) is that of PyTorch's linear and convolutional layers,
    with which the published set networks were trained; without normalisation layers a
    set network that sums many elements diverges with the larger LeCun variance
    1/fan_in.
    """
    if fan_in < 1:
        raise ValueError("a layer has no input features: the size before it is 0.")
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def dense(features: int, fan_in: int, *, dtype: Any = None, **kwargs: Any) -> nn.Dense:
    """`nn.Dense` whose kernel and bias are initialised by `uniform_fan_in(fan_in)`."""
    init = uniform_fan_in(fan_in)
    return nn.Dense(features, dtype=dtype, kernel_init=init, bias_init=init, **kwargs)


class MLP(nn.Module):
    """Multi-layer perceptron: (Dense, activation, Dropout) per hidden size, then Dense.

    The axes after the first are flattened, so images are read as vectors. Kernels and
    biases are initialised by `uniform_fan_in`.

    Attributes:
      hidden_sizes: the width of each hidden layer; may be empty.
      features: the width f of the output.
      dropout_rate: applied after each hidden layer when `train`; needs the rng stream
        "dropout".
      activation: the name of a function of `flax.linen`; "leaky_relu" has slope 0.01
        for negative inputs.
      activate_output: whether the activation follows the last Dense, too.
      dtype: compute dtype; parameters are float32.
    """

    hidden_sizes: Sequence[int]
    features: int
    dropout_rate: float = 0.0
    activation: str = "leaky_relu"
    activate_output: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps x [n, *feature_shape] to [n, features]."""
        activation = getattr(nn, self.activation, None)
        if activation is None:
            raise ValueError(
                "activation must name a function of flax.linen such as 'relu', but "
                f"{self.activation!r} was given."
            )
        x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        for size in self.hidden_sizes:
            x = dense(size, x.shape[-1], dtype=self.dtype)(x)
            x = activation(x)
            x = Dropout(self.dropout_rate)(x, train=train)
        x = dense(self.features, x.shape[-1], dtype=self.dtype)(x)
        return activation(x) if self.activate_output else x


class Embedding(nn.Module):
    """Encoder of tokens: `encoder(x E)` of one-hot vectors x, E the embeddings.

    Attributes:
      encoder: what follows, [n, embedding_size] -> [n, f].
      embedding_size: the width of an embedding.
      dtype: compute dtype; parameters are float32.
    """

    encoder: nn.Module
    embedding_size: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps one-hot x [n, vocabulary] to [n, f]."""
        embed = nn.Dense(
            self.embedding_size,
            use_bias=False,
            dtype=self.dtype,
            # One input at a time is not zero: the fan-in does not matter.
            kernel_init=nn.linear.default_embed_init,
        )
        return self.encoder(embed(x), train=train)


class SequenceEncoder(nn.Module):
    """Encoder of examples that are texts: `network(tokens, lengths)`.

    A set network gets floating inputs, here the ids of tokens, which float32 holds
    exactly, with `padding` after the end of each text.

    Attributes:
      network: maps tokens int32 [n, time] and their lengths [n] to [n, f]: a
        `SequenceClassifier` or a `TransformerClassifier` with f for classes.
      padding: the id that is none.
    """

    network: nn.Module
    padding: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps ids x [n, time] to [n, f].

        Raises:
          ValueError: x is not [n, time].
        """
        if x.ndim != 2:
            raise ValueError(
                "SequenceEncoder reads ids of tokens, [n, time], but the shape given "
                f"is {x.shape}."
            )
        tokens = x.astype(jnp.int32)
        lengths = jnp.sum(tokens != self.padding, axis=1)
        return self.network(tokens, lengths, train=train)


class CNN(nn.Module):
    """Convolutional encoder: (Conv, ReLU, 2x2 max pooling) per channel, then Dense.

    Convolutions have stride one and keep the height and width; pooling halves them
    (rounding down). With the default sizes it is the extractor of HistNetQ for 28x28
    images. Kernels and biases are initialised by `uniform_fan_in`.

    With a `stride` of two the convolutions halve the height and width (rounding up)
    and nothing is pooled, which is about a quarter of the work.

    Attributes:
      channels: output channels of each convolution.
      features: the width f of the output.
      kernel_size: the height and width of the kernels.
      stride: of the convolutions; more than one replaces the pooling.
      hidden_sizes: the widths of Dense layers with ReLU before the last.
      dropout_rate: applied before each Dense layer when `train`; needs the rng stream
        "dropout".
      num_groups: None, or each convolution is followed by a normalisation of so many
        groups of channels of an image (Wu and He, "Group normalization", ECCV 2018).
        Four convolutions or more hardly learn without one. Batch normalisation would
        let the examples of a bag see each other.
      dtype: compute dtype; parameters are float32.
    """

    channels: Sequence[int] = (16, 32)
    features: int = 256
    kernel_size: int = 5
    stride: int = 1
    hidden_sizes: Sequence[int] = ()
    dropout_rate: float = 0.0
    num_groups: int | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images x [n, height, width, channel] to [n, features]."""
        check_images(x, "CNN")
        size = self.kernel_size
        for channels in self.channels:
            init = uniform_fan_in(size * size * x.shape[-1])
            conv = nn.Conv(
                channels,
                (size, size),
                self.stride,
                dtype=self.dtype,
                kernel_init=init,
                bias_init=init,
                conv_general_dilated=convolve,
            )
            x = conv(x)
            if self.num_groups is not None:
                x = nn.GroupNorm(self.num_groups, dtype=self.dtype)(x)
            x = nn.relu(x if self.stride > 1 else _max_pool(x))
        x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        x = Dropout(self.dropout_rate)(x, train=train)
        for width in self.hidden_sizes:
            x = nn.relu(dense(width, x.shape[-1], dtype=self.dtype)(x))
            x = Dropout(self.dropout_rate)(x, train=train)
        return dense(self.features, x.shape[-1], dtype=self.dtype)(x)


class Classifier(nn.Module):
    """Class logits of one example: `Dense(K)(leaky_relu(φ(x)))`.

    Attributes:
      encoder: φ, [n, *features] -> [n, f].
      num_classes: K.
    """

    encoder: nn.Module
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps x [n, *features] to logits [n, K]."""
        x = nn.leaky_relu(self.encoder(x, train=train))
        return dense(self.num_classes, x.shape[-1])(x)


def check_images(x: jax.Array, reader: str) -> None:
    """Refuses what is not [n, height, width, channel]; `reader` names who reads it.

    Raises:
      ValueError: with the shape given.
    """
    if x.ndim != 4:
        raise ValueError(
            f"{reader} reads images of shape [n, height, width, channel], but the "
            f"shape given is {x.shape}."
        )


def encode_elements(
    encoder: nn.Module,
    inputs: jax.Array,
    mask: jax.Array | None = None,
    *,
    train: bool = False,
) -> jax.Array:
    """Encodes every element of every bag on its own.

    Padding is replaced by zeros before it is encoded, so that whatever it holds, NaN
    included, reaches neither the codes nor the gradients.

    Args:
      encoder: maps [n, *features] to [n, f].
      inputs: floating [bag, element, *features].
      mask: None or bool [bag, element], True = a real element.
      train: passed on to the encoder.

    Returns:
      [bag, element, f].

    Raises:
      ValueError, TypeError: see `check_set`.
    """
    check_set(inputs, mask)
    inputs = zero_absent(inputs, mask)
    flat = inputs.reshape(math.prod(inputs.shape[:2]), *inputs.shape[2:])
    features = encoder(flat, train=train)
    return features.reshape(*inputs.shape[:2], *features.shape[1:])


def _max_pool(x: jax.Array) -> jax.Array:
    """2x2 max pooling, stride 2, of x [n, height, width, channel]."""
    height, width = x.shape[1] // 2, x.shape[2] // 2
    x = x[:, : 2 * height, : 2 * width]
    # A reshape and a maximum: the gradient of `reduce_window` is slow on CPUs.
    return x.reshape(x.shape[0], height, 2, width, 2, x.shape[3]).max((2, 4))
