"""Set Transformer: elements that attend to each other, and seeds that attend to them.

    X ─ SAB or ISAB ─ ... ─ PMA ─ SAB ─ ... ─ head
        elements attend     k seeds attend    seeds attend
        to elements         to elements       to seeds

In `MAB(X, Y)` every x attends to all y. The others are made of it:

    SAB(X)  = MAB(X, X)               n elements cost n²
    ISAB(X) = MAB(X, MAB(I, X))       m inducing points I: cost n m
    PMA(X)  = MAB(S, X)               k seeds S: the set becomes k vectors

Lee, Lee, Kim, Kosiorek, Choi and Teh, "Set Transformer: a framework for attention-based
permutation-invariant neural networks", ICML 2019, arXiv 1810.00825. `SetNorm` and
clean paths: Zhang, Tozzo, Higgins and Ranganath, "Set Norm and equivariant skip
connections: putting the deep in Deep Sets", ICML 2022, arXiv 2206.11925.

Sets are `x [bag, element, feature]` with `mask [bag, element]` (True = a real element;
None = all are real) and `weights [bag, element]`, multiplicities. Both enter attention
as log-weights of the keys: weight 2 equals the element twice; weight 0 and False equal
its absence, whatever it holds, NaN included. Outputs at absent elements are zero.
**Attention over the empty set is 0.**

The n² logits of a long set are never in memory together: they are computed by blocks,
and once more in the backward pass. Inducing points and seeds ask the same of every
bag, which spares the projections of the elements:

    Q_h (X W_k)' = (Q_h W_k') X',    A (X W_v) = (A X) W_v
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from .attention import Affine, attend
from .contracts import check_set, check_weights, present, zero_absent
from .dropout import Dropout
from .encoders import dense, encode_elements, uniform_fan_in
from .precision import wide_dtype

_BLOCKS = ("paper", "official", "clean_path")
_NORMALIZATIONS = (None, "layer", "set")


def multihead_attention(
    queries: jax.Array,
    elements: jax.Array,
    key: tuple[jax.Array, jax.Array],
    value: tuple[jax.Array, jax.Array],
    log_weights: jax.Array | None = None,
    *,
    num_heads: int,
) -> jax.Array:
    """Attention to keys X W_k + b_k and values X W_v + b_v, the heads side by side.

    Queries that are shared by all bags are multiplied by W_k' before they meet the
    elements, and W_v multiplies what they have averaged, wherever that takes fewer
    operations; b_k then drops out, as it moves all logits of a query alike.

    Args:
      queries: [bag, query, hidden], or [query, hidden] shared by all bags; scaled.
      elements: X, [bag, element, d].
      key: W_k [d, hidden] and b_k [hidden].
      value: W_v [d, hidden] and b_v [hidden].
      log_weights: None or [bag, element]; see `attend`.
      num_heads: divides hidden.

    Returns:
      [bag, query, hidden].
    """
    (w_k, b_k), (w_v, b_v) = key, value
    (num_bags, n, d), (m, hidden) = elements.shape, queries.shape[-2:]

    def heads(x: jax.Array) -> jax.Array:  # [..., head, hidden / head]
        return x.reshape(*x.shape[:-1], num_heads, hidden // num_heads)

    associated = 2 * n * d * num_heads * m + m * d * hidden
    if queries.ndim == 2 and associated < 2 * n * hidden * (d + m):
        q = jnp.einsum("mhi,dhi->hmd", heads(queries), heads(w_k))
        q = jnp.broadcast_to(q.reshape(-1, d), (num_bags, 1, num_heads * m, d))
        x = elements[:, None]
        mean = attend(q, x, x, log_weights)  # of the elements
        mean = mean.reshape(num_bags, num_heads, m, d)
        out = jnp.einsum("bhmd,dhi->bmhi", mean, heads(w_v))
        empty = jnp.array(n == 0)
        if log_weights is not None:
            empty = jnp.all(log_weights == -jnp.inf, -1)[:, None, None]
        return out.reshape(num_bags, m, hidden) + jnp.where(empty, 0, b_v)

    q = jnp.broadcast_to(queries, (num_bags, m, hidden))
    q, k, v = (
        heads(x).swapaxes(1, 2) for x in (q, elements @ w_k + b_k, elements @ w_v + b_v)
    )  # [bag, head, element, hidden / head]
    return attend(q, k, v, log_weights).swapaxes(1, 2).reshape(num_bags, m, hidden)


class SetNorm(nn.Module):
    """`y_if = a_f (x_if - μ) / sqrt(σ² + epsilon) + b_f`, μ and σ² those of the set.

    One mean and one variance, over the elements and the features of a set, so that
    unlike after layer normalisation its elements still differ in scale. Only real
    elements count, by their weights. Zhang et al. 2022, arXiv 2206.11925.

    Attributes:
      epsilon: keeps the result and gradients finite where all values are equal.
      dtype: compute dtype; parameters are float32, statistics float32 at least.
    """

    epsilon: float = 1e-5
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Maps x [bag, element, f] to [bag, element, f], zero at absent elements.

        Raises:
          ValueError, TypeError: see `contracts.check_set` and `check_weights`.
        """
        _check_elements(x, mask, weights)
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        x, scale, bias = promote_dtype(x, scale, bias, dtype=self.dtype)
        real = present(mask, weights)
        x = zero_absent(x, real)
        wide = x.astype(wide_dtype(x))
        counts = jnp.ones(x.shape[:2], wide.dtype) if weights is None else weights
        counts = counts if real is None else jnp.where(real, counts, 0)
        total = x.shape[-1] * counts.sum(1, keepdims=True)
        share = (counts / jnp.where(total > 0, total, 1))[..., None]
        mean = jnp.sum(share * wide, (1, 2), keepdims=True)
        variance = jnp.sum(share * (wide - mean) ** 2, (1, 2), keepdims=True)
        y = (wide - mean) * jax.lax.rsqrt(variance + self.epsilon)
        return zero_absent(y.astype(x.dtype) * scale + bias, real)


def normalize(
    normalization: str | None,
    x: jax.Array,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
    *,
    dtype: Any = None,
    name: str | None = None,
) -> jax.Array:
    """x [bag, element, f] by a layer of the module that calls: of its own shape.

    Args:
      normalization: `layer` (of each element on its own), `set` (`SetNorm`) or None.
      x: [bag, element, f].
      mask: None or bool [bag, element].
      weights: None or floating [bag, element].
      dtype: compute dtype.
      name: of the layer.

    Raises:
      ValueError: another normalization.
    """
    _check_one_of("normalization", normalization, _NORMALIZATIONS)
    if normalization == "layer":
        return nn.LayerNorm(epsilon=1e-5, dtype=dtype, name=name)(x)
    if normalization == "set":
        return SetNorm(dtype=dtype, name=name)(x, mask, weights)
    return x


class MAB(nn.Module):
    """Multihead attention block: every query attends to all keys.

    With Q = X W_q + b_q, K = Y W_k + b_k, V = Y W_v + b_v, cut into heads of
    d = hidden_size / num_heads features, attention(X, Y) is
    `softmax(Q_h K_h' / s) V_h`, the heads side by side. With
    `rFF(H) = relu(H W + b)`, the `block` says what is made of it:

        "paper"       H = norm(X + attention(X, Y) W_o + b_o)      s = sqrt(d)
                      norm(H + rFF(H))
        "official"    H = norm(Q + attention(X, Y))                s = sqrt(hidden_size)
                      norm(H + rFF(H))
        "clean_path"  H = X + attention(norm X, norm Y) W_o + b_o  s = sqrt(d)
                      H + rFF(norm(H))

    "paper" is section 3.1 of Lee et al. 2019. "official" is the code published with it:
    what is added is the projected query, there is no W_o, and logits are divided by the
    root of the full width; normalisation is off there unless asked for. "clean_path"
    (Zhang et al. 2022) leaves the path from input to output free of normalisation;
    queries that all bags share (inducing points, seeds) are not normalised.

    Attributes:
      hidden_size: the width of the output, a multiple of num_heads.
      num_heads: number of heads.
      normalization: None, "layer" (over the features of an element) or "set"
        (`SetNorm`).
      block: "paper", "official" or "clean_path".
      dtype: compute dtype; parameters are float32, the softmax is float32 at least.
    """

    hidden_size: int = 128
    num_heads: int = 4
    normalization: str | None = "layer"
    block: str = "paper"
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        queries: jax.Array,
        keys: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
        query_mask: jax.Array | None = None,
        query_weights: jax.Array | None = None,
    ) -> jax.Array:
        """Lets queries attend to keys.

        Args:
          queries: X, floating [bag, query, d_x]; or [query, d_x], shared by all bags.
            d_x must be hidden_size unless the block is "official".
          keys: Y, floating [bag, element, d_y].
          mask: None or bool [bag, element], which keys are real.
          weights: None or floating [bag, element], multiplicities of the keys.
          query_mask: None or bool [bag, query]; the output is zero where it is False.
          query_weights: None or floating [bag, query]: zero is absence; otherwise only
            the statistics of `SetNorm` depend on them.

        Returns:
          [bag, query, hidden_size].

        Raises:
          ValueError: a wrong rank, shape or field.
          TypeError: a wrong dtype.
        """
        self._check(queries, keys)
        _check_elements(keys, mask, weights)
        shared = queries.ndim == 2
        if not shared:
            _check_elements(queries, query_mask, query_weights)
        real, asked = present(mask, weights), present(query_mask, query_weights)
        keys = zero_absent(keys, real)
        queries = queries if shared else zero_absent(queries, asked)

        def norm(name: str, x: jax.Array) -> jax.Array:
            return normalize(
                self.normalization,
                x,
                query_mask,
                query_weights,
                dtype=self.dtype,
                name=name,
            )

        clean = self.block == "clean_path"
        official = self.block == "official"
        size, residual = self.hidden_size, queries
        if clean:
            keys = normalize(
                self.normalization,
                keys,
                mask,
                weights,
                dtype=self.dtype,
                name="key_norm",
            )
            queries = queries if shared else norm("query_norm", queries)

        def affine(name: str, fan_in: int) -> tuple[jax.Array, jax.Array]:
            init = uniform_fan_in(fan_in)
            return Affine(size, init, init, name=name)(fan_in)

        w_q, b_q = affine("query", queries.shape[-1])
        w_k, b_k = affine("key", keys.shape[-1])
        w_v, b_v = affine("value", keys.shape[-1])
        residual, queries, keys, w_q, b_q, w_k, b_k, w_v, b_v = promote_dtype(
            residual, queries, keys, w_q, b_q, w_k, b_k, w_v, b_v, dtype=self.dtype
        )
        q = queries @ w_q + b_q
        scaled = q / math.sqrt(size if official else size // self.num_heads)
        attention = multihead_attention(
            scaled,
            keys,
            (w_k, b_k),
            (w_v, b_v),
            _log_weights(real, weights),
            num_heads=self.num_heads,
        )
        if official:
            residual = q
        else:
            attention = dense(size, size, dtype=self.dtype, name="out")(attention)
        h = residual + attention
        rff = dense(size, size, dtype=self.dtype, name="feedforward")
        if clean:
            h = h + nn.relu(rff(norm("norm", h)))
        else:
            h = norm("attention_norm", h)
            h = norm("norm", h + nn.relu(rff(h)))
        return zero_absent(h, asked)

    def _check(self, queries: jax.Array, keys: jax.Array) -> None:
        if self.num_heads < 1 or self.hidden_size % self.num_heads:
            raise ValueError(
                "hidden_size must be a multiple of num_heads, but they are "
                f"{self.hidden_size} and {self.num_heads}."
            )
        _check_one_of("block", self.block, _BLOCKS)
        if queries.ndim not in (2, 3) or (
            queries.ndim == 3 and queries.shape[0] != keys.shape[0]
        ):
            raise ValueError(
                "queries must have shape [query, feature] or [bag, query, feature] "
                f"with the bags of the keys, but their shapes are {queries.shape} and "
                f"{keys.shape}."
            )
        if self.block != "official" and queries.shape[-1] != self.hidden_size:
            raise ValueError(
                f"block {self.block!r} adds the queries to its output, so that they "
                f"must have hidden_size = {self.hidden_size} features, but their shape "
                f"is {queries.shape}; project them first, or use block 'official'."
            )


class SAB(nn.Module):
    """Set attention block, `SAB(X) = MAB(X, X)`; n elements cost n².

    Attributes: see `MAB`.
    """

    hidden_size: int = 128
    num_heads: int = 4
    normalization: str | None = "layer"
    block: str = "paper"
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Maps x [bag, element, d] to [bag, element, hidden_size].

        Zero at absent elements; d and what is raised as in `MAB`.
        """
        return _mab(self)(x, x, mask, weights, mask, weights)


class ISAB(nn.Module):
    """Induced set attention block, `ISAB(X) = MAB(X, MAB(I, X))`.

    The elements meet in m inducing points I, parameters: n elements cost n m.

    Attributes:
      num_inducing_points: m.

    For the others see `MAB`.
    """

    hidden_size: int = 128
    num_heads: int = 4
    num_inducing_points: int = 32
    normalization: str | None = "layer"
    block: str = "paper"
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Maps x [bag, element, d] to [bag, element, hidden_size].

        Zero at absent elements; d and what is raised as in `MAB`.
        """
        inducing_points = _points(
            self, "inducing_points", self.num_inducing_points, self.hidden_size
        )
        summary = _mab(self)(inducing_points, x, mask, weights)
        return _mab(self)(x, summary, None, None, mask, weights)


class PMA(nn.Module):
    """Pooling by multihead attention: k seeds S, parameters, attend to the elements.

    `PMA(X) = MAB(S, rFF(X))` with block "paper", `rFF(X) = relu(X W + b)`; `MAB(S, X)`
    with the others. The empty set gives a function of the seeds alone.

    Attributes:
      num_seeds: k.

    For the others see `MAB`.
    """

    hidden_size: int = 128
    num_heads: int = 4
    num_seeds: int = 1
    normalization: str | None = "layer"
    block: str = "paper"
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Maps x [bag, element, d] to [bag, num_seeds, hidden_size].

        What is raised as in `MAB`.
        """
        _check_elements(x, mask, weights)
        seeds = _points(self, "seeds", self.num_seeds, self.hidden_size)
        if self.block == "paper":
            x = zero_absent(x, present(mask, weights))
            x = dense(
                self.hidden_size, x.shape[-1], dtype=self.dtype, name="feedforward"
            )(x)
            x = nn.relu(x)
        return _mab(self)(seeds, x, mask, weights)


class SetTransformer(nn.Module):
    """`head(SAB ... SAB(PMA(ISAB ... ISAB(φ(x_1), ..., φ(x_m)))))`.

    The networks of Lee et al. 2019 are, with block "official", normalization None and
    head `MLP((), outputs)`,

        maximum            num_inducing_points=None, hidden_size=64
        clustering         num_seeds=4, num_decoder_layers=2, per_seed=True
        point clouds       hidden_size=256, num_inducing_points=16, dropout_rate=0.5

    Attributes:
      head: maps representations [bag, num_seeds * hidden_size] to outputs, called as
        `head(x, train=train)`.
      encoder: φ, the network of one element, [n, *features] -> [n, f]; None: the
        inputs are [bag, element, f].
      hidden_size: the width of the attention blocks. Where φ has another, a dense layer
        comes first, unless the block is "official", which does without.
      num_heads: attention heads of every block.
      num_layers: how many blocks, ISAB or SAB, come before the pooling.
      num_inducing_points: of each ISAB; None or 0: SAB instead.
      num_seeds: how many vectors PMA makes of a set.
      num_decoder_layers: how many SABs the seeds pass afterwards.
      per_seed: the head meets the vector of each seed on its own, and the output is
        [bag, num_seeds, ...].
      dropout_rate: before and after PMA when `train`.
      normalization: see `MAB`.
      block: see `MAB`.
      dtype: compute dtype of the blocks; parameters are float32.
    """

    head: nn.Module
    encoder: nn.Module | None = None
    hidden_size: int = 128
    num_heads: int = 4
    num_layers: int = 2
    num_inducing_points: int | None = 32
    num_seeds: int = 1
    num_decoder_layers: int = 0
    per_seed: bool = False
    dropout_rate: float = 0.0
    normalization: str | None = "layer"
    block: str = "paper"
    dtype: Any = None

    def encode(
        self, inputs: jax.Array, mask: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """φ: inputs [bag, element, *features] -> [bag, element, f]."""
        if self.encoder is not None:
            return encode_elements(self.encoder, inputs, mask, train=train)
        _check_elements(inputs, mask, None)
        return zero_absent(inputs, mask)

    @nn.compact
    def aggregate(
        self,
        features: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Features [bag, element, f] -> [bag, num_seeds * hidden_size].

        Dropout acts when `train`, and needs the rng stream "dropout".
        """
        _check_elements(features, mask, weights)
        fields = {name: getattr(self, name) for name in _MAB_FIELDS}
        x = zero_absent(features, present(mask, weights))
        size = self.hidden_size
        if self.block != "official" and x.shape[-1] != size:
            x = dense(size, x.shape[-1], dtype=self.dtype, name="project")(x)
        for _ in range(self.num_layers):
            if self.num_inducing_points:
                layer = ISAB(num_inducing_points=self.num_inducing_points, **fields)
            else:
                layer = SAB(**fields)
            x = layer(x, mask, weights)
        x = Dropout(self.dropout_rate)(x, train=train)
        x = PMA(num_seeds=self.num_seeds, **fields)(x, mask, weights)
        x = Dropout(self.dropout_rate)(x, train=train)
        for i in range(self.num_decoder_layers):
            x = SAB(name=f"decoder_{i}", **fields)(x)
        return x.reshape(x.shape[0], self.num_seeds * size)

    def decode(self, representation: jax.Array, *, train: bool = False) -> jax.Array:
        """Representations [bag, num_seeds * hidden_size] -> output of the head."""
        if not self.per_seed:
            return self.head(representation, train=train)
        out = self.head(representation.reshape(-1, self.hidden_size), train=train)
        return out.reshape(-1, self.num_seeds, *out.shape[1:])

    def __call__(
        self,
        inputs: jax.Array,
        mask: jax.Array | None = None,
        weights: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Maps bags to outputs.

        Args:
          inputs: floating [bag, element, *features].
          mask: None or bool [bag, element], True = a real element.
          weights: None or floating [bag, element], multiplicities of the elements.
          train: switches dropout on; needs the rng stream "dropout".

        Returns:
          What the head returns, [bag, ...] or, if `per_seed`, [bag, num_seeds, ...].

        Raises:
          ValueError: a wrong rank, shape or field.
          TypeError: a wrong dtype.
        """
        check_weights(weights, inputs.shape[:2])
        features = self.encode(inputs, present(mask, weights), train=train)
        representation = self.aggregate(features, mask, weights, train=train)
        return self.decode(representation, train=train)


_MAB_FIELDS = ("hidden_size", "num_heads", "normalization", "block", "dtype")


def _mab(module: nn.Module) -> MAB:
    return MAB(**{name: getattr(module, name) for name in _MAB_FIELDS})


def _points(module: nn.Module, name: str, number: int, size: int) -> jax.Array:
    """Learnable queries [number, size]."""
    if number < 1:
        raise ValueError(f"num_{name} must be 1 or more, but {number} was given.")
    # As published: Glorot's bound of an array [1, number, size] read as the kernel of a
    # convolution, with number * size inputs and size outputs.
    bound = math.sqrt(6 / (number * size + size))

    def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    return module.param(name, init, (number, size))


def _check_one_of(name: str, given: str | None, known: tuple) -> None:
    if given not in known:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, known))}, but {given!r} was "
            "given."
        )


def _log_weights(real: jax.Array | None, weights: jax.Array | None) -> jax.Array | None:
    """Logarithms of the multiplicities, -inf for what is absent."""
    if real is None:
        return None
    if weights is None:
        return jnp.where(real, 0, -jnp.inf)
    # Chosen before the logarithm: its gradient is finite then.
    weights = jnp.where(real, weights, 1).astype(wide_dtype(weights))
    return jnp.where(real, jnp.log(weights), -jnp.inf)


def _check_elements(
    x: jax.Array, mask: jax.Array | None, weights: jax.Array | None
) -> None:
    check_set(x, mask)
    if x.ndim != 3:
        raise ValueError(
            "inputs of attention must have shape [bag, element, feature], but the "
            f"shape given is {x.shape}; give an encoder for elements of more axes."
        )
    check_weights(weights, x.shape[:2])
