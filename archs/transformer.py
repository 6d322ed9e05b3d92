"""Transformers: encoder, decoder, encoder-decoder, language model and classifier.

A layer is attention and a network of every step, each with a residual connection:

    norm_first    H = X + attention(norm X)         Y = H + rFF(norm H)
    otherwise     H = norm(X + attention(X))        Y = norm(H + rFF(H))

with `rFF(H) = activation(H W_1 + b_1) W_2 + b_2`; a decoder's layer attends to a memory
in between. Post-norm is that of Vaswani et al., "Attention is all you need", NeurIPS
2017, arXiv 1706.03762; pre-norm trains without warm-up: Xiong et al., ICML 2020, arXiv
2002.04745.

Nothing in a layer knows the order of the steps: without positions the encoder is
permutation-*equivariant*, and invariant once its outputs are pooled. (The slide says
invariant of the encoder itself: equivariant is meant.)

Sequences are [batch, time, feature], or integer token ids [batch, time]; `lengths
[batch]` says how many steps are real, the first ones. What comes after them, NaN too,
changes nothing, and outputs there are 0.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from . import attention
from .attention import MultiHeadAttention, real_steps
from .contracts import zero_absent
from .dropout import Dropout
from .pooling import max_pool, mean_pool

_ACTIVATIONS = {
    "relu": nn.relu,
    "gelu": functools.partial(nn.gelu, approximate=False),
}
_POSITIONS = ("sinusoidal", "learned", "rotary", None)


def sinusoidal_encoding(
    positions: jax.Array, size: int, base: float = 10_000.0
) -> jax.Array:
    """`PE(p, 2i) = sin(p base^(-2i/size))`, `PE(p, 2i+1) = cos(p base^(-2i/size))`.

    Vaswani et al. 2017, section 3.5.

    Args:
      positions: integers p of any shape.
      size: the number of features, even.
      base: the wavelengths go from 2π to 2π base.

    Returns:
      float32 [*positions.shape, size].

    Raises:
      ValueError: size is odd.
    """
    if size % 2:
        raise ValueError(f"size must be even for sinusoidal positions, not {size}.")
    frequencies = base ** (-np.arange(0, size, 2) / size)
    angles = positions[..., None] * jnp.asarray(frequencies, jnp.float32)
    pairs = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return pairs.reshape(*positions.shape, size)


class TransformerLayer(nn.Module):
    """Self-attention, attention to a memory if asked for, and a network of every step.

    Attributes:
      num_heads: number of heads, divides hidden_size.
      hidden_size: the width of inputs and outputs.
      feedforward_size: the width within rFF.
      dropout_rate: of what is added to the residual, when `train`.
      attention_dropout_rate: of the weights of attention, when `train`.
      activation: of rFF, "relu" or "gelu" (exact, by the error function).
      norm_first: pre-norm or post-norm, see the module.
      causal: whether steps attend to themselves and earlier steps only.
      cross_attention: whether the layer attends to a memory.
      rotary: whether self-attention knows positions, see `attention.rotate`.
      dtype: compute dtype; parameters are float32.
    """

    num_heads: int
    hidden_size: int
    feedforward_size: int
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    activation: str = "relu"
    norm_first: bool = True
    causal: bool = False
    cross_attention: bool = False
    rotary: bool = False
    dtype: Any = None

    def setup(self) -> None:
        if self.activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation must be 'relu' or 'gelu', but {self.activation!r} was "
                "given."
            )
        attend = functools.partial(
            MultiHeadAttention,
            self.num_heads,
            self.hidden_size,
            dropout_rate=self.attention_dropout_rate,
            dtype=self.dtype,
        )
        norm = functools.partial(nn.LayerNorm, epsilon=1e-5, dtype=self.dtype)
        self.attention = attend(rotary=self.rotary)
        self.attention_norm = norm()
        if self.cross_attention:
            self.memory_attention = attend()
            self.memory_norm = norm()
        self.expand = _dense(self.feedforward_size, self.dtype)
        self.contract = _dense(self.hidden_size, self.dtype)
        self.feedforward_norm = norm()
        self.dropout = Dropout(self.dropout_rate)

    def __call__(
        self,
        x: jax.Array,
        memory: jax.Array | None = None,
        mask: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Maps x [batch, time, hidden_size] to the same shape.

        Args:
          x: floating, finite at padding.
          memory: floating [batch, source, d], finite at padding; of a layer with
            `cross_attention` only.
          mask: None or bool, [batch, time] (which steps are real) or [batch or 1, head
            or 1, time, time] (which pairs attend).
          memory_mask: None or bool [batch, source].
          train: switches dropout on; needs the rng stream "dropout".

        Raises:
          ValueError, TypeError: see `MultiHeadAttention`.
        """
        return self._residuals(
            x,
            lambda y: self.attention(y, mask=mask, causal=self.causal, train=train),
            lambda y: self.memory_attention(y, memory, mask=memory_mask, train=train),
            train=train,
        )

    def memory_weights(
        self, x: jax.Array, memory: jax.Array, memory_mask: jax.Array | None = None
    ) -> jax.Array:
        """With what weights it attends to the memory, [batch, head, time, source]."""
        found = []

        def recall(y: jax.Array) -> jax.Array:
            out, weights = self.memory_attention(
                y, memory, mask=memory_mask, return_weights=True
            )
            found.append(weights)
            return out

        def attend(y: jax.Array) -> jax.Array:
            return self.attention(y, causal=self.causal)

        self._residuals(x, attend, recall, train=False)
        return found[0]

    def init_cache(
        self, batch_size: int, max_length: int, memory: jax.Array | None = None
    ) -> dict[str, Any]:
        """A cache for `decode`, with the memory's keys and values in it."""
        cache = {"own": self.attention.init_cache(batch_size, max_length)}
        if self.cross_attention:
            cache["memory"] = self.memory_attention.project_memory(memory)
        return cache

    def decode(
        self,
        x: jax.Array,
        cache: dict[str, Any],
        position: jax.Array,
        memory_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """`__call__` of new steps, causal; see `MultiHeadAttention.decode`."""
        cache = dict(cache)

        def attend(y: jax.Array) -> jax.Array:
            out, cache["own"] = self.attention.decode(y, cache["own"], position)
            return out

        def recall(y: jax.Array) -> jax.Array:
            return self.memory_attention.attend_memory(y, cache["memory"], memory_mask)

        return self._residuals(x, attend, recall, train=False), cache

    def _residuals(self, x, attend, recall, *, train):
        def residual(x, norm, function):
            if self.norm_first:
                return x + self.dropout(function(norm(x)), train=train)
            return norm(x + self.dropout(function(x), train=train))

        def feedforward(y):
            return self.contract(_ACTIVATIONS[self.activation](self.expand(y)))

        x = residual(x, self.attention_norm, attend)
        if self.cross_attention:
            x = residual(x, self.memory_norm, recall)
        return residual(x, self.feedforward_norm, feedforward)


class TransformerEncoder(nn.Module):
    """Layers in which every step attends to all, or to itself and earlier ones.

    Token ids are embedded and multiplied by sqrt(hidden_size); floating inputs of
    another width than hidden_size pass a dense layer. Positions are added, then
    dropout. With `norm_first` a layer normalisation comes last.

    Attributes:
      num_layers: number of layers.
      num_heads: number of heads, divides hidden_size.
      hidden_size: the width of the layers and of the output.
      feedforward_size: the width within rFF; None: 4 hidden_size.
      vocabulary_size: the number of token ids; None: the inputs are floating.
      positions: "sinusoidal" or "learned" (added to the inputs), "rotary" (queries and
        keys are turned) or None.
      max_length: how many learned positions there are.
      dropout_rate: of the inputs and of what is added to the residual, when `train`.
      attention_dropout_rate: of the weights of attention, when `train`.
      activation: of rFF, "relu" or "gelu".
      norm_first: pre-norm or post-norm.
      causal: whether steps attend to themselves and earlier steps only.
      dtype: compute dtype; parameters are float32.
    """

    num_layers: int = 4
    num_heads: int = 4
    hidden_size: int = 128
    feedforward_size: int | None = None
    vocabulary_size: int | None = None
    positions: str | None = "sinusoidal"
    max_length: int | None = None
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    activation: str = "relu"
    norm_first: bool = True
    causal: bool = False
    dtype: Any = None

    def setup(self) -> None:
        self.inputs = _inputs(self, self.vocabulary_size)
        self.layers = _layers(self, causal=self.causal)
        if self.norm_first:
            self.norm = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)

    def __call__(
        self,
        inputs: jax.Array,
        lengths: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Encodes sequences.

        Args:
          inputs: floating [batch, time, feature], or integers [batch, time].
          lengths: None or integers [batch], the number of real steps.
          mask: None or bool [batch, time], which steps are real.
          train: switches dropout on; needs the rng stream "dropout".

        Returns:
          [batch, time, hidden_size], zero at padding.

        Raises:
          ValueError: a wrong rank, shape or field.
          TypeError: a wrong dtype.
        """
        real = real_steps(lengths, mask, inputs.shape[:2])
        x = self.inputs(inputs, jnp.arange(inputs.shape[1]), real, train=train)
        for layer in self.layers:
            x = layer(x, mask=real, train=train)
        return zero_absent(self.norm(x) if self.norm_first else x, real)


class TransformerDecoder(nn.Module):
    """Causal layers that may attend to a memory; predicts at every step.

    Attributes:
      num_classes: the number of outputs; None: vocabulary_size.
      vocabulary_size: the number of token ids; None: the inputs are floating.
      cross_attention: whether the layers attend to a memory.
      tied_embeddings: whether the embeddings are the kernel of the output layer, too,
        which then has no bias.

    For the others see `TransformerEncoder`.
    """

    num_classes: int | None = None
    vocabulary_size: int | None = None
    num_layers: int = 4
    num_heads: int = 4
    hidden_size: int = 128
    feedforward_size: int | None = None
    positions: str | None = "sinusoidal"
    max_length: int | None = None
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    activation: str = "relu"
    norm_first: bool = True
    cross_attention: bool = True
    tied_embeddings: bool = False
    dtype: Any = None

    def setup(self) -> None:
        outputs = self.num_classes or self.vocabulary_size
        if outputs is None:
            raise ValueError("num_classes or vocabulary_size must be given.")
        if self.tied_embeddings and outputs != self.vocabulary_size:
            raise ValueError(
                "tied_embeddings needs num_classes equal to vocabulary_size, but they "
                f"are {outputs} and {self.vocabulary_size}."
            )
        self.inputs = _inputs(self, self.vocabulary_size)
        self.layers = _layers(self, causal=True, cross_attention=self.cross_attention)
        if self.norm_first:
            self.norm = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)
        if not self.tied_embeddings:
            self.outputs = _dense(outputs, self.dtype)

    def __call__(
        self,
        inputs: jax.Array,
        memory: jax.Array | None = None,
        lengths: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Predictions at every step from it, the earlier ones and the memory.

        Args:
          inputs: integers [batch, time], or floating [batch, time, feature].
          memory: floating [batch, source, d], finite at padding.
          lengths: None or integers [batch], the number of real steps.
          memory_mask: None or bool [batch, source].
          train: switches dropout on; needs the rng stream "dropout".

        Returns:
          Logits [batch, time, num_classes], zero at padding.

        Raises:
          ValueError: a wrong rank, shape or field.
          TypeError: a wrong dtype.
        """
        real = real_steps(lengths, None, inputs.shape[:2])
        x = self.inputs(inputs, jnp.arange(inputs.shape[1]), real, train=train)
        for layer in self.layers:
            # Padding comes last: no real step attends to it.
            x = layer(x, memory, memory_mask=memory_mask, train=train)
        return zero_absent(self._logits(x), real)

    def memory_weights(
        self,
        inputs: jax.Array,
        memory: jax.Array,
        lengths: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Weights of the memory in the last layer, [batch, head, time, source]."""
        real = real_steps(lengths, None, inputs.shape[:2])
        x = self.inputs(inputs, jnp.arange(inputs.shape[1]), real, train=False)
        for layer in self.layers[:-1]:
            x = layer(x, memory, memory_mask=memory_mask)
        return self.layers[-1].memory_weights(x, memory, memory_mask)

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        memory: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
    ) -> dict[str, Any]:
        """A cache, [batch, ...] in every leaf, for max_length steps in all."""
        self.inputs.check_length(max_length)
        return {
            "position": jnp.zeros(batch_size, jnp.int32),
            "memory_mask": memory_mask,
            "layers": [
                layer.init_cache(batch_size, max_length, memory)
                for layer in self.layers
            ],
        }

    def prefill(
        self, cache: dict[str, Any], inputs: jax.Array, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Several steps at once.

        Attention weights [batch, num_heads, time, max_length] of a layer are formed at
        once; a long prompt can come in pieces.

        Args:
          cache: what `init_cache`, this method or `decode_step` returned.
          inputs: integers [batch, time], or floating [batch, time, feature]: the steps
            that follow those in the cache.
          lengths: None or integers [batch], the number of real steps of the inputs.

        Returns:
          Logits [batch, time, num_classes], zero at padding, and the cache. More steps
          than its max_length overwrite the last ones.
        """
        real = real_steps(lengths, None, inputs.shape[:2])
        start, time = cache["position"], inputs.shape[1]
        x = self.inputs(inputs, start[:, None] + jnp.arange(time), real, train=False)
        layers = []
        for layer, old in zip(self.layers, cache["layers"], strict=True):
            x, new = layer.decode(x, old, start, cache["memory_mask"])
            layers.append(new)
        position = start + (time if lengths is None else lengths.astype(start.dtype))
        logits = zero_absent(self._logits(x), real)
        return logits, {**cache, "position": position, "layers": layers}

    def decode_step(
        self, cache: dict[str, Any], tokens: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        """One step: tokens [batch] (or [batch, feature]) -> logits [batch, K]."""
        logits, cache = self.prefill(cache, tokens[:, None])
        return logits[:, 0], cache

    def _logits(self, x: jax.Array) -> jax.Array:
        x = self.norm(x) if self.norm_first else x
        return self.inputs.attend(x) if self.tied_embeddings else self.outputs(x)


class TransformerLanguageModel(nn.Module):
    """What comes next, at every step: a decoder without a memory.

    Attributes: see `TransformerDecoder`.
    """

    num_classes: int | None = None
    vocabulary_size: int | None = None
    num_layers: int = 4
    num_heads: int = 4
    hidden_size: int = 128
    feedforward_size: int | None = None
    positions: str | None = "sinusoidal"
    max_length: int | None = None
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    activation: str = "gelu"
    norm_first: bool = True
    tied_embeddings: bool = False
    dtype: Any = None

    def setup(self) -> None:
        fields = _fields(self, *_STACK, "num_classes", "vocabulary_size")
        self.decoder = TransformerDecoder(
            cross_attention=False, tied_embeddings=self.tied_embeddings, **fields
        )

    def __call__(
        self,
        inputs: jax.Array,
        lengths: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Predictions at every step from it and the earlier ones.

        Args:
          inputs: integers [batch, time], or floating [batch, time, feature].
          lengths: None or integers [batch], the number of real steps.
          train: switches dropout on; needs the rng stream "dropout".

        Returns:
          Logits [batch, time, num_classes], zero at padding.

        Raises:
          ValueError: a wrong rank, shape or field.
          TypeError: a wrong dtype.
        """
        return self.decoder(inputs, lengths=lengths, train=train)

    def init_cache(self, batch_size: int, max_length: int) -> dict[str, Any]:
        """See `TransformerDecoder.init_cache`."""
        return self.decoder.init_cache(batch_size, max_length)

    def prefill(
        self, cache: dict[str, Any], inputs: jax.Array, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """See `TransformerDecoder.prefill`."""
        return self.decoder.prefill(cache, inputs, lengths)

    def decode_step(
        self, cache: dict[str, Any], tokens: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        """See `TransformerDecoder.decode_step`."""
        return self.decoder.decode_step(cache, tokens)


class Transformer(nn.Module):
    """Encoder and decoder: from one sequence to another.

    Attributes:
      num_classes: the vocabulary of the target, inputs and outputs.
      source_vocabulary_size: the vocabulary of the source; None: it is floating.
      num_layers: of the encoder and of the decoder.
      tied_embeddings: whether the target's embeddings are the output's kernel, too.

    For the others see `TransformerEncoder`.
    """

    num_classes: int | None = None
    source_vocabulary_size: int | None = None
    num_layers: int = 4
    num_heads: int = 4
    hidden_size: int = 128
    feedforward_size: int | None = None
    positions: str | None = "sinusoidal"
    max_length: int | None = None
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    activation: str = "relu"
    norm_first: bool = True
    tied_embeddings: bool = False
    dtype: Any = None

    def setup(self) -> None:
        fields = _fields(self, *_STACK)
        self.encoder = TransformerEncoder(
            vocabulary_size=self.source_vocabulary_size, **fields
        )
        self.decoder = TransformerDecoder(
            vocabulary_size=self.num_classes,
            tied_embeddings=self.tied_embeddings,
            **fields,
        )

    def __call__(
        self,
        source: jax.Array,
        target: jax.Array,
        source_lengths: jax.Array | None = None,
        target_lengths: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Predictions at every step of the target, given the earlier ones.

        Args:
          source: integers [batch, time], or floating [batch, time, feature].
          target: integers [batch, target time]; the first is the start.
          source_lengths: None or integers [batch].
          target_lengths: None or integers [batch].
          train: switches dropout on; needs the rng stream "dropout".

        Returns:
          Logits [batch, target time, num_classes], zero at padding.

        Raises:
          ValueError: a wrong rank, shape or field.
          TypeError: a wrong dtype.
        """
        memory = self.encode(source, source_lengths, train=train)
        return self.decoder(
            target, memory["states"], target_lengths, memory["mask"], train=train
        )

    def attention_weights(
        self,
        source: jax.Array,
        target: jax.Array,
        source_lengths: jax.Array | None = None,
        target_lengths: jax.Array | None = None,
    ) -> jax.Array:
        """What each step of the target takes from each of the source.

        Args: see `__call__`.

        Returns:
          The mean over the heads of the last layer, [batch, target time, time]; rows,
          which sum to one, mean nothing past the target's length.

        Raises:
          ValueError, TypeError: see `__call__`.
        """
        memory = self.encode(source, source_lengths)
        return self.decoder.memory_weights(
            target, memory["states"], target_lengths, memory["mask"]
        ).mean(1)

    def encode(
        self,
        source: jax.Array,
        source_lengths: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> dict[str, Any]:
        """The memory: "states" [batch, time, hidden_size] and their "mask"."""
        states = self.encoder(source, source_lengths, train=train)
        mask = real_steps(source_lengths, None, source.shape[:2])
        return {"states": states, "mask": mask}

    def init_cache(self, memory: dict[str, Any], max_length: int) -> dict[str, Any]:
        """See `TransformerDecoder.init_cache`."""
        states, mask = memory["states"], memory["mask"]
        return self.decoder.init_cache(len(states), max_length, states, mask)

    def prefill(
        self, cache: dict[str, Any], inputs: jax.Array, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """See `TransformerDecoder.prefill`."""
        return self.decoder.prefill(cache, inputs, lengths)

    def decode_step(
        self, cache: dict[str, Any], tokens: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        """See `TransformerDecoder.decode_step`."""
        return self.decoder.decode_step(cache, tokens)


class TransformerClassifier(nn.Module):
    """Logits of a sequence, or K numbers: an encoder, pooling and a dense layer.

    Without positions it is a network of sets.

    Attributes:
      num_classes: K.
      pooling: "mean" or "max" over the real steps.

    For the others see `TransformerEncoder`.
    """

    num_classes: int | None = None
    vocabulary_size: int | None = None
    num_layers: int = 4
    num_heads: int = 4
    hidden_size: int = 128
    feedforward_size: int | None = None
    positions: str | None = "sinusoidal"
    max_length: int | None = None
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    activation: str = "relu"
    norm_first: bool = True
    pooling: str = "mean"
    dtype: Any = None

    def setup(self) -> None:
        if self.num_classes is None:
            raise ValueError("num_classes must be given.")
        if self.pooling not in ("mean", "max"):
            raise ValueError(
                f"pooling must be 'mean' or 'max', but {self.pooling!r} was given."
            )
        fields = _fields(self, *_STACK, "vocabulary_size")
        self.encoder = TransformerEncoder(**fields)
        self.outputs = _dense(self.num_classes, self.dtype)

    def __call__(
        self,
        inputs: jax.Array,
        lengths: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Maps sequences to logits [batch, num_classes]; see `TransformerEncoder`."""
        states = self.encoder(inputs, lengths, mask, train=train)
        real = real_steps(lengths, mask, inputs.shape[:2])
        pool = mean_pool if self.pooling == "mean" else max_pool
        return self.outputs(pool(states, real))


_LAYER = (
    "num_heads",
    "hidden_size",
    "dropout_rate",
    "attention_dropout_rate",
    "activation",
    "norm_first",
    "dtype",
)
_STACK = (*_LAYER, "num_layers", "feedforward_size", "positions", "max_length")


def _fields(module: nn.Module, *names: str) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names}


def _dense(features: int, dtype: Any) -> nn.Dense:
    init = nn.initializers.xavier_uniform()
    return nn.Dense(features, kernel_init=init, dtype=dtype)


def _layers(module: nn.Module, **kwargs: Any) -> list[TransformerLayer]:
    return [
        TransformerLayer(
            feedforward_size=module.feedforward_size or 4 * module.hidden_size,
            rotary=module.positions == "rotary",
            **_fields(module, *_LAYER),
            **kwargs,
        )
        for _ in range(module.num_layers)
    ]


def _inputs(module: nn.Module, vocabulary_size: int | None) -> "_Inputs":
    names = ("hidden_size", "positions", "max_length", "dropout_rate", "dtype")
    return _Inputs(vocabulary_size=vocabulary_size, **_fields(module, *names))


class _Inputs(nn.Module):
    """What the first layer reads: embeddings or projections, positions, dropout."""

    hidden_size: int
    vocabulary_size: int | None
    positions: str | None
    max_length: int | None
    dropout_rate: float
    dtype: Any

    def setup(self) -> None:
        size = self.hidden_size
        if self.positions not in _POSITIONS:
            raise ValueError(
                f"positions must be one of {', '.join(map(repr, _POSITIONS))}, but "
                f"{self.positions!r} was given."
            )
        if self.positions == "learned" and self.max_length is None:
            raise ValueError("learned positions need a max_length.")
        if self.vocabulary_size is None:
            self.project = _dense(size, self.dtype)
        else:
            # Logits of tied embeddings have variance 1 then, and so have the inputs.
            init = nn.initializers.normal(size**-0.5)
            self.embedding = nn.Embed(
                self.vocabulary_size, size, embedding_init=init, dtype=self.dtype
            )
        if self.positions == "learned":
            self.position = nn.Embed(
                self.max_length,
                size,
                embedding_init=nn.initializers.normal(0.02),
                dtype=self.dtype,
            )
        self.dropout = Dropout(self.dropout_rate)

    def __call__(
        self,
        inputs: jax.Array,
        positions: jax.Array,
        real: jax.Array | None,
        *,
        train: bool,
    ) -> jax.Array:
        """Inputs at positions [time] or [batch, time] -> [batch, time, hidden_size]."""
        integer = jnp.issubdtype(inputs.dtype, jnp.integer)
        if inputs.ndim != (2 if integer else 3):
            raise ValueError(
                "inputs must be integers [batch, time] or floating [batch, time, "
                f"feature], but {inputs.dtype} {inputs.shape} was given."
            )
        if integer != (self.vocabulary_size is not None):
            raise TypeError(
                f"inputs must be {'floating' if integer else 'integers'} where the "
                f"vocabulary size is {self.vocabulary_size}, but their dtype is "
                f"{inputs.dtype}."
            )
        self.check_length(inputs.shape[1])
        if integer:
            inputs = inputs if real is None else jnp.where(real, inputs, 0)
            x = self.embedding(inputs) * math.sqrt(self.hidden_size)
        else:
            x = zero_absent(inputs, real).astype(self.dtype or inputs.dtype)
            if x.shape[-1] != self.hidden_size:
                x = self.project(x)
        if self.positions == "sinusoidal":
            x = x + sinusoidal_encoding(positions, self.hidden_size).astype(x.dtype)
        elif self.positions == "learned":
            x = x + self.position(positions)
        return self.dropout(x, train=train)

    def attend(self, x: jax.Array) -> jax.Array:
        """x times the embeddings: logits of the tokens."""
        return self.embedding.attend(x)

    def check_length(self, length: int) -> None:
        if self.positions == "learned" and length > self.max_length:
            raise ValueError(
                f"there are max_length = {self.max_length} learned positions, but "
                f"sequences of {length} steps were given."
            )


def layer_from_torch(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Parameters of `TransformerLayer` from those of a layer of PyTorch.

    Without biases there (bias=False) ours are zero.

    Args:
      state: the `state_dict()` of torch.nn.TransformerEncoderLayer, or of
        TransformerDecoderLayer for a layer with `cross_attention`, with NumPy arrays
        for values.
      prefix: what precedes the names, such as "layers.0.".

    Returns:
      The parameters, NumPy arrays.
    """
    params = {}
    for ours, theirs in _torch_names(prefix + "norm3.weight" in state):
        name = prefix + theirs
        if "attn" in theirs:
            params[ours] = attention.from_torch(state, name + ".")
            continue
        weight = np.asarray(state[name + ".weight"])
        bias = state.get(name + ".bias", np.zeros(len(weight), weight.dtype))
        weight = {"scale": weight} if "norm" in theirs else {"kernel": weight.T}
        params[ours] = {**weight, "bias": np.asarray(bias)}
    return params


def layer_to_torch(
    params: Mapping[str, Any], prefix: str = ""
) -> dict[str, np.ndarray]:
    """The inverse of `layer_from_torch`: names of PyTorch and NumPy arrays."""
    state = {}
    for ours, theirs in _torch_names("memory_norm" in params):
        name, layer = prefix + theirs, params[ours]
        if "attn" in theirs:
            state |= attention.to_torch(layer, name + ".")
            continue
        weight = layer["scale"] if "norm" in theirs else layer["kernel"].T
        state[name + ".weight"] = np.asarray(weight)
        state[name + ".bias"] = np.asarray(layer["bias"])
    return state


def _torch_names(decoder: bool) -> list[tuple[str, str]]:
    names = [
        ("attention", "self_attn"),
        ("attention_norm", "norm1"),
        ("expand", "linear1"),
        ("contract", "linear2"),
        ("feedforward_norm", "norm3" if decoder else "norm2"),
    ]
    memory = [("memory_attention", "multihead_attn"), ("memory_norm", "norm2")]
    return names + memory if decoder else names
