"""Attention: every query averages values by how well their keys match it.

    dot-product    softmax(Q K' / sqrt(d)) V                    Vaswani et al. 2017
    additive       softmax(v' tanh(W q + U k)) V                Bahdanau et al. 2015
    multi-head     several dot-product attentions of projected queries, keys, values

Bahdanau, Cho and Bengio, "Neural machine translation by jointly learning to align and
translate", ICLR 2015, arXiv 1409.0473. Vaswani, Shazeer, Parmar, Uszkoreit, Jones,
Gomez, Kaiser and Polosukhin, "Attention is all you need", NeurIPS 2017, arXiv
1706.03762. Rotary positions: Su, Lu, Pan, Murtadha, Wen and Liu, "RoFormer", arXiv
2104.09864.

What a query may attend to is said by `lengths [batch]` (the real keys come first), by a
mask of the keys `[batch, key]`, by a mask of the pairs `[batch or 1, head or 1, query,
key]` (True = may), by `causal` (query i: keys 0 to i), or by several of them, and then
all must agree. Keys and values past the lengths or outside the mask of the keys may be
anything, NaN too. **A query that may attend to nothing gets the context 0.**

The logits of long sequences are never in memory together: they are computed by blocks,
and once more in the backward pass, so that memory is linear in the length.
"""

import math
from collections.abc import Mapping
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from .contracts import check_lengths, check_mask, zero_absent
from .dropout import Dropout
from .precision import wide_dtype

# How many logits a block holds: those of a CPU stay in a core's cache.
_CPU_BLOCK, _ACCELERATOR_BLOCK = 2**19, 2**25


def attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    log_weights: jax.Array | None = None,
    *,
    causal: bool = False,
    block_size: int | None = None,
) -> jax.Array:
    """`softmax(Q K' + log w) V`, where a query without any key gets 0.

    More logits than four blocks of `block_size` are computed block by block, and again
    in the backward pass, for which only each query's log-normaliser is kept.

    Args:
      queries: [bag, head, query, d], scaled.
      keys: [bag, head, element, d].
      values: [bag, head, element, f].
      log_weights: None or [bag, element]; -inf is an absent element. What it has for
        key and value must be finite.
      causal: whether query i attends to the keys 0 to i only.
      block_size: the number of logits in memory at a time, at least those of one query;
        None: as it suits the device.

    Returns:
      [bag, head, query, f] in the dtype of the values; the softmax is float32 at least.
    """
    if block_size is None:
        on_cpu = jax.default_backend() == "cpu"
        block_size = _CPU_BLOCK if on_cpu else _ACCELERATOR_BLOCK
    bags, heads, num_queries, _ = queries.shape
    num_keys = keys.shape[2]
    if log_weights is not None:
        log_weights = log_weights[:, None, None].astype(wide_dtype(queries))
    # To keep a few blocks costs less than to compute them again.
    if bags * heads * num_queries * num_keys <= 4 * block_size:
        start = jnp.zeros((), jnp.int32) if causal else None
        return _attend(queries, keys, values, log_weights, start)[0]

    # All queries of several heads in a block, or several blocks of queries a head.
    per_head = num_queries * num_keys
    group = max(
        size
        for size in range(1, bags * heads + 1)
        if bags * heads % size == 0 and (size == 1 or size * per_head <= block_size)
    )
    num_blocks = min(num_queries, -(-group * per_head // block_size))
    rows = -(-num_queries // num_blocks)
    extra = num_blocks * rows - num_queries
    blocks = jnp.pad(queries, ((0, 0), (0, 0), (0, extra), (0, 0)))
    blocks = blocks.reshape(-1, group, num_blocks, rows, queries.shape[-1])
    if log_weights is not None:
        log_weights = jnp.broadcast_to(log_weights, (bags, heads, 1, num_keys))
        log_weights = log_weights.reshape(-1, group, 1, num_keys)
    out = _attend_blocks(
        blocks.swapaxes(1, 2),  # [group, block, head, query, d]
        keys.reshape(-1, group, *keys.shape[2:]),
        values.reshape(-1, group, *values.shape[2:]),
        log_weights,
        rows * jnp.arange(num_blocks) if causal else None,
    )
    out = out.swapaxes(1, 2).reshape(bags, heads, num_queries + extra, -1)
    return out[:, :, :num_queries]


def _logits(q, k, log_weights, start=None):
    """Logits [..., query, key], causal if the position of the first query is given."""
    logits = jnp.einsum(
        "...qd,...kd->...qk", q, k, preferred_element_type=wide_dtype(q)
    )
    if log_weights is not None:
        logits = logits + log_weights
    if start is not None:
        visible = causal_mask(q.shape[-2], k.shape[-2], start)
        logits = jnp.where(visible, logits, -jnp.inf)
    return logits


def _attend(q, k, v, log_weights, start):
    """Averages [..., query, f] of the values and log-normalisers [..., query, 1]."""
    logits = _logits(q, k, log_weights, start)
    top = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True, initial=-jnp.inf))
    top = jnp.where(top == -jnp.inf, 0, top)
    votes = jnp.exp(logits - top)
    total = jnp.sum(votes, -1, keepdims=True)
    total = jnp.where(total > 0, total, 1)  # not of the empty set
    # To divide the averages is cheaper than to divide the votes.
    out = jnp.einsum(
        "...qk,...kf->...qf",
        votes.astype(v.dtype),
        v,
        preferred_element_type=wide_dtype(q),
    )
    return (out / total).astype(v.dtype), top + jnp.log(total)


@jax.custom_vjp
def _attend_blocks(q, k, v, log_weights, starts):
    """`_attend` of [group, block, head, query, d] and [group, head, element, d]."""
    return _attend_blocks_forward(q, k, v, log_weights, starts)[0]


def _attend_blocks_forward(q, k, v, log_weights, starts):
    def of_group(group):
        q, *rest = group
        return jax.lax.map(
            lambda block: _attend(block[0], *rest, block[1]), (q, starts)
        )

    out, log_total = jax.lax.map(of_group, (q, k, v, log_weights))
    return out, (starts, q, k, v, log_weights, out, log_total)


def _attend_blocks_backward(residuals, g):
    starts, *residuals = residuals

    def of_group(group):
        q, k, v, log_weights, *rest = group

        def of_block(sums, block):
            q, start, out, log_total, g = block
            wide = wide_dtype(q)
            p = jnp.exp(_logits(q, k, log_weights, start) - log_total)
            inner = jnp.sum(g.astype(wide) * out.astype(wide), -1, keepdims=True)
            d_logits = p * (_logits(g, v, None) - inner)
            narrow = d_logits.astype(q.dtype)
            terms = (
                jnp.einsum("hqk,hqd->hkd", narrow, q, preferred_element_type=wide),
                jnp.einsum(
                    "hqk,hqf->hkf", p.astype(g.dtype), g, preferred_element_type=wide
                ),
                None if log_weights is None else d_logits.sum(1, keepdims=True),
            )
            dq = jnp.einsum("hqk,hkd->hqd", narrow, k, preferred_element_type=wide)
            return jax.tree.map(jnp.add, sums, terms), dq.astype(q.dtype)

        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, wide_dtype(x)), (k, v, log_weights)
        )
        (dk, dv, d_log_weights), dq = jax.lax.scan(of_block, zeros, (q, starts, *rest))
        return dq, dk.astype(k.dtype), dv.astype(v.dtype), d_log_weights

    return *jax.lax.map(of_group, (*residuals, g)), None


_attend_blocks.defvjp(_attend_blocks_forward, _attend_blocks_backward)


def padding_mask(lengths: jax.Array, size: int) -> jax.Array:
    """Which of `size` steps are real: lengths [batch] -> bool [batch, size]."""
    return jnp.arange(size) < lengths[:, None]


def causal_mask(
    num_queries: int, num_keys: int, start: jax.Array | int = 0
) -> jax.Array:
    """Which keys are not later than the query.

    Args:
      num_queries: the number of queries.
      num_keys: the number of keys; they have the positions 0, 1, ...
      start: the position of the first query, an integer array of any shape.

    Returns:
      Boolean [*start.shape, query, key].
    """
    positions = jnp.asarray(start)[..., None, None] + jnp.arange(num_queries)[:, None]
    return jnp.arange(num_keys) <= positions


def real_steps(
    lengths: jax.Array | None, mask: jax.Array | None, shape: tuple[int, int]
) -> jax.Array | None:
    """Which steps are real, by lengths [batch] and by a mask [batch, time].

    Args:
      lengths: None or integers [batch]; the real steps come first.
      mask: None or bool [batch, time].
      shape: (batch, time).

    Returns:
      Boolean [batch, time], or None where both are None.

    Raises:
      ValueError: an argument has another shape.
      TypeError: lengths are not integers, or the mask is not boolean.
    """
    check_mask(mask, shape)
    check_lengths(lengths, shape[0])
    if lengths is None:
        return mask
    real = padding_mask(lengths, shape[1])
    return real if mask is None else real & mask


def dot_product_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    lengths: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    causal: bool = False,
    return_weights: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`softmax(Q K' / sqrt(d)) V` of every head.

    Memory is linear in the number of keys and queries unless a mask of the pairs is
    given, which is quadratic itself, or the weights are asked for.

    Args:
      queries: floating [batch, head, query, d].
      keys: floating [batch, head, key, d].
      values: floating [batch, head, key, f].
      lengths: None or integers [batch], the number of real keys.
      mask: None or bool, [batch, key] or [batch or 1, head or 1, query, key].
      causal: whether query i attends to the keys 0 to i only.
      return_weights: whether the weights [batch, head, query, key] are returned, too.

    Returns:
      Contexts [batch, head, query, f], and the weights if asked for.

    Raises:
      ValueError: a wrong rank or shape.
      TypeError: a wrong dtype.
    """
    for name, x in (("queries", queries), ("keys", keys), ("values", values)):
        chex.assert_rank(
            x,
            4,
            custom_message=(
                f"{name} must have shape [batch, head, time, feature], but their shape "
                f"is {x.shape}."
            ),
            exception_type=ValueError,
        )
    real, pairs = _split_mask(lengths, mask, queries.shape, keys.shape)
    if real is not None:
        keys, values = (jnp.where(real[:, None, :, None], x, 0) for x in (keys, values))
    scaled = queries / math.sqrt(queries.shape[-1])
    if not return_weights:
        return _contexts(scaled, keys, values, real, pairs, causal)
    weights = _weights(scaled, keys, real, pairs, causal)
    return _average(weights, values), weights


def _split_mask(lengths, mask, queries, keys):
    """The mask of the keys [batch, key] and that of the pairs; None if not given."""
    batch, num_keys = keys[0], keys[-2]
    if mask is None or mask.ndim == 2:
        return real_steps(lengths, mask, (batch, num_keys)), None
    shape = (batch, queries[1], queries[-2], num_keys)
    if mask.ndim != 4 or any(
        m not in (n, 1) for m, n in zip(mask.shape, shape, strict=True)
    ):
        raise ValueError(
            f"mask must have shape {(batch, num_keys)} [batch, key], or one that "
            f"broadcasts to {shape} [batch, head, query, key], but its shape is "
            f"{mask.shape}."
        )
    check_mask(mask, mask.shape)
    return real_steps(lengths, None, (batch, num_keys)), mask


def _contexts(scaled, keys, values, real, pairs, causal):
    if pairs is not None:
        weights = _weights(scaled, keys, real, pairs, causal)
        return _average(weights, values)
    log_weights = None if real is None else jnp.where(real, 0.0, -jnp.inf)
    return attend(scaled, keys, values, log_weights, causal=causal)


def _weights(scaled, keys, real, pairs, causal):
    """Weights [batch, head, query, key], float32 at least."""
    logits = _logits(scaled, keys, None, jnp.zeros((), jnp.int32) if causal else None)
    if real is not None:
        logits = jnp.where(real[:, None, None], logits, -jnp.inf)
    if pairs is not None:
        logits = jnp.where(pairs, logits, -jnp.inf)
    return _softmax(logits)


def _softmax(logits: jax.Array) -> jax.Array:
    """Softmax over the last axis; zeros where all logits are -inf."""
    top = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    votes = jnp.exp(logits - jnp.where(top == -jnp.inf, 0, top))
    total = jnp.sum(votes, -1, keepdims=True)
    return votes / jnp.where(total > 0, total, 1)


def _average(weights, values):
    return jnp.einsum(
        "...qk,...kf->...qf",
        weights.astype(values.dtype),
        values,
        preferred_element_type=wide_dtype(values),
    ).astype(values.dtype)


class AdditiveAttention(nn.Module):
    """Additive attention: weights `softmax_k(v' tanh(W q + U x_k + b))` of keys x_k.

    The context is the average of the keys themselves. Bahdanau et al. 2015. The memory
    of several queries at once is that of [batch, time, source, hidden_size].

    Attributes:
      hidden_size: the width of what tanh is taken of.
      dtype: compute dtype; parameters are float32, the softmax is float32 at least.
    """

    hidden_size: int
    dtype: Any = None

    def setup(self) -> None:
        size, dtype = self.hidden_size, self.dtype
        self.query = nn.Dense(size, use_bias=False, dtype=dtype)
        self.key = nn.Dense(size, dtype=dtype)
        self.score = nn.Dense(1, use_bias=False, dtype=dtype)

    def project_keys(
        self,
        keys: jax.Array,
        lengths: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """U x_k + b of keys [batch, source, e]: [batch, source, hidden_size]."""
        return self.key(zero_absent(keys, real_steps(lengths, mask, keys.shape[:2])))

    def __call__(
        self,
        query: jax.Array,
        keys: jax.Array,
        lengths: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        projected_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Lets one query or several attend to the keys.

        Args:
          query: floating [batch, d], or [batch, time, d].
          keys: floating [batch, source, e].
          lengths: None or integers [batch], the number of real keys.
          mask: None or bool [batch, source], which keys are real.
          projected_keys: None, or what `project_keys` made of the same keys: it need
            not be computed at every step of a decoder.

        Returns:
          The context [batch, (time,) e] and the weights [batch, (time,) source].

        Raises:
          ValueError: a wrong rank or shape.
          TypeError: a wrong dtype.
        """
        if query.ndim not in (2, 3) or keys.ndim != 3 or len(query) != len(keys):
            raise ValueError(
                "query must have shape [batch, d] or [batch, time, d] and keys [batch, "
                f"source, e], but their shapes are {query.shape} and {keys.shape}."
            )
        real = real_steps(lengths, mask, keys.shape[:2])
        if projected_keys is None:
            projected_keys = self.project_keys(keys, lengths, mask)
        keys = zero_absent(keys, real).astype(projected_keys.dtype)
        queries = self.query(query if query.ndim == 3 else query[:, None])
        mixed = nn.tanh(queries[:, :, None] + projected_keys[:, None])
        logits = self.score(mixed)[..., 0]  # [batch, time, source]
        logits = logits.astype(wide_dtype(logits))
        if real is not None:
            logits = jnp.where(real[:, None], logits, -jnp.inf)
        weights = _softmax(logits)
        context = _average(weights, keys)
        return (context, weights) if query.ndim == 3 else (context[:, 0], weights[:, 0])


def rotate(x: jax.Array, positions: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotary positions: turns pairs of features by angles that grow with the position.

    The pair (x_i, x_{i+d/2}) is turned by `position * base^(-2i/d)`, so that the inner
    product of a query and a key depends on the difference of their positions alone.
    Su et al. 2021 pair neighbouring features, which is the same but for their order.

    Args:
      x: floating [batch, head, time, d], d even.
      positions: integers [time] or [batch, time].
      base: the wavelengths go from 2π to 2π base.

    Returns:
      [batch, head, time, d] in the dtype of x.

    Raises:
      ValueError: d is odd.
    """
    size = x.shape[-1]
    if size % 2:
        raise ValueError(f"rotary positions need an even head width, not {size}.")
    frequencies = base ** (-np.arange(0, size, 2) / size)
    angles = positions[..., None] * jnp.asarray(frequencies, wide_dtype(x))
    angles = angles[None, None] if positions.ndim == 1 else angles[:, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(wide_dtype(x)), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class MultiHeadAttention(nn.Module):
    """Multi-head attention: heads attend on their own, W_o mixes what they found.

    With Q = X W_q + b_q, K = Y W_k + b_k, V = Z W_v + b_v, cut into heads of
    d = hidden_size / num_heads features, the output is the contexts
    `softmax(Q_h K_h' / sqrt(d)) V_h` side by side, times W_o, plus b_o. Vaswani et al.
    2017, section 3.2.2. Kernels are initialised as Glorot and Bengio 2010 have it.

    A cache of keys and values, {"keys", "values"} of [batch, head, time, d], lets a
    sequence be decoded without computing its past again: `init_cache` and `decode`, or
    `project_memory` and `attend_memory` for a memory that stays as it is.

    Attributes:
      num_heads: number of heads, divides hidden_size.
      hidden_size: the width of the output.
      rotary: whether queries and keys are turned by their positions, see `rotate`.
      dropout_rate: of the weights, when `train`; the logits are in memory at once then.
      dtype: compute dtype; parameters are float32, the softmax is float32 at least.
    """

    num_heads: int
    hidden_size: int
    rotary: bool = False
    dropout_rate: float = 0.0
    dtype: Any = None

    def setup(self) -> None:
        if self.num_heads < 1 or self.hidden_size % self.num_heads:
            raise ValueError(
                "hidden_size must be a multiple of num_heads, but they are "
                f"{self.hidden_size} and {self.num_heads}."
            )
        self.query = Affine(self.hidden_size)
        self.key = Affine(self.hidden_size)
        self.value = Affine(self.hidden_size)
        self.out = nn.Dense(
            self.hidden_size,
            kernel_init=nn.initializers.xavier_uniform(),
            dtype=self.dtype,
        )
        self.dropout = Dropout(self.dropout_rate)

    def __call__(
        self,
        queries: jax.Array,
        keys: jax.Array | None = None,
        values: jax.Array | None = None,
        lengths: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        causal: bool = False,
        return_weights: bool = False,
        train: bool = False,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Lets queries attend to keys.

        Args:
          queries: X, floating [batch, query, d_x].
          keys: Y, floating [batch, key, d_y]; None: the queries (self-attention).
          values: Z, floating [batch, key, d_z]; None: the keys.
          lengths: None or integers [batch], the number of real keys; self-attention
            reads zeros past them, as queries, too.
          mask: None or bool, [batch, key] or [batch or 1, head or 1, query, key].
          causal: whether query i attends to the keys 0 to i only.
          return_weights: whether the weights [batch, head, query, key] are returned.
          train: switches dropout on; needs the rng stream "dropout".

        Returns:
          [batch, query, hidden_size], b_o where there is nothing to attend to; and the
          weights if asked for.

        Raises:
          ValueError: a wrong rank, shape or field.
          TypeError: a wrong dtype.
        """
        own = keys is None
        keys = queries if own else keys
        same = values is None
        values = keys if same else values
        shapes = [x.shape for x in (queries, keys, values)]
        if {len(shape) for shape in shapes} != {3} or (
            len({shape[0] for shape in shapes}) > 1 or shapes[1][1] != shapes[2][1]
        ):
            raise ValueError(
                "queries must have shape [batch, query, feature], keys and values "
                "[batch, key, feature], but their shapes are "
                f"{', '.join(map(str, shapes))}."
            )
        heads = (len(queries), self.num_heads)
        real, pairs = _split_mask(
            lengths, mask, (*heads, *queries.shape[1:]), (*heads, *keys.shape[1:])
        )
        if own and same:
            x = zero_absent(queries, real)
            q, k, v = self._project(x, self.query, self.key, self.value)
        else:
            (q,) = self._project(queries, self.query)
            keys = zero_absent(keys, real)
            if same:
                k, v = self._project(keys, self.key, self.value)
            else:
                (k,) = self._project(keys, self.key)
                (v,) = self._project(zero_absent(values, real), self.value)
        if self.rotary:
            q, k = (rotate(x, jnp.arange(x.shape[2])) for x in (q, k))
        q = q / math.sqrt(q.shape[-1])
        drop = train and self.dropout_rate > 0
        if not drop and not return_weights:
            return self._merge(_contexts(q, k, v, real, pairs, causal))
        weights = _weights(q, k, real, pairs, causal)
        out = self._merge(_average(self.dropout(weights, train=train), v))
        return (out, weights) if return_weights else out

    def init_cache(self, batch_size: int, max_length: int) -> dict[str, jax.Array]:
        """An empty cache for sequences of up to max_length steps."""
        size = self.hidden_size // self.num_heads
        shape = (batch_size, self.num_heads, max_length, size)
        return {name: jnp.zeros(shape, self.dtype) for name in ("keys", "values")}

    def decode(
        self, x: jax.Array, cache: dict[str, jax.Array], position: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Causal self-attention of new steps to themselves and to those in the cache.

        Args:
          x: floating [batch, time, d_x], the new steps.
          cache: what `init_cache` or this method returned.
          position: integers [batch], how many steps of the cache are valid: the new
            ones overwrite the others.

        Returns:
          [batch, time, hidden_size], and the cache with the new steps.
        """
        q, k, v = self._project(x, self.query, self.key, self.value)
        if self.rotary:
            positions = position[:, None] + jnp.arange(x.shape[1])
            q, k = rotate(q, positions), rotate(k, positions)

        def write(old, new, start):
            # Padding of a chunk may reach past the end, where nothing is written.
            return old.at[:, start + jnp.arange(new.shape[1])].set(new, mode="drop")

        keys, values = (
            jax.vmap(write)(cache[name], new.astype(cache[name].dtype), position)
            for name, new in (("keys", k), ("values", v))
        )
        visible = causal_mask(x.shape[1], keys.shape[2], position)[:, None]
        scaled = q / math.sqrt(q.shape[-1])
        out = self._merge(_contexts(scaled, keys, values, None, visible, False))
        return out, {"keys": keys, "values": values}

    def project_memory(self, memory: jax.Array) -> dict[str, jax.Array]:
        """Keys and values of a memory [batch, source, d_y], finite at padding."""
        k, v = self._project(memory, self.key, self.value)
        return {"keys": k, "values": v}

    def attend_memory(
        self, queries: jax.Array, cache: dict[str, jax.Array], real: jax.Array | None
    ) -> jax.Array:
        """Attention to the memory in the cache; real [batch, source] is its mask."""
        (q,) = self._project(queries, self.query)
        q = q / math.sqrt(q.shape[-1])
        keys, values = cache["keys"], cache["values"]
        return self._merge(_contexts(q, keys, values, real, None, False))

    def _project(self, x: jax.Array, *layers: nn.Module) -> list[jax.Array]:
        """One product with all kernels, cut into heads [batch, head, time, d] each."""
        kernels, biases = zip(*(layer(x.shape[-1]) for layer in layers), strict=True)
        x, kernel, bias = promote_dtype(
            x,
            jnp.concatenate(kernels, axis=1),
            jnp.concatenate(biases),
            dtype=self.dtype,
        )
        parts = jnp.split(x @ kernel + bias, len(layers), axis=-1)
        # Each on its own: XLA moves two axes of an array faster than three.
        return [
            part.reshape(*x.shape[:2], self.num_heads, -1).swapaxes(1, 2)
            for part in parts
        ]

    def _merge(self, contexts: jax.Array) -> jax.Array:
        batch, _, time, _ = contexts.shape
        return self.out(contexts.swapaxes(1, 2).reshape(batch, time, self.hidden_size))


class Affine(nn.Module):
    """The kernel [fan_in, features] and the bias [features] of a dense layer.

    Attributes:
      features: the width of the output.
      kernel_init: initialiser of the kernel.
      bias_init: initialiser of the bias.
    """

    features: int
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, fan_in: int) -> tuple[jax.Array, jax.Array]:
        """The kernel and the bias, which are parameters."""
        kernel = self.param("kernel", self.kernel_init, (fan_in, self.features))
        return kernel, self.param("bias", self.bias_init, (self.features,))


def from_torch(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Parameters of `MultiHeadAttention` from those of torch.nn.MultiheadAttention.

    Without biases there (bias=False) ours are zero.

    Args:
      state: its `state_dict()`, with NumPy arrays for values.
      prefix: what precedes the names, such as "self_attn.".

    Returns:
      The parameters, of float32 NumPy arrays.

    Raises:
      ValueError: it has a key and a value of its own (add_bias_kv=True).
    """
    if prefix + "bias_k" in state or prefix + "bias_v" in state:
        raise ValueError(
            "MultiHeadAttention has nothing for bias_k and bias_v: the torch module "
            "must have add_bias_kv=False."
        )
    if prefix + "in_proj_weight" in state:
        weights = np.split(np.asarray(state[prefix + "in_proj_weight"]), 3)
    else:
        weights = [np.asarray(state[f"{prefix}{x}_proj_weight"]) for x in "qkv"]
    biases = [np.zeros(len(weight), weight.dtype) for weight in weights]
    if prefix + "in_proj_bias" in state:
        biases = np.split(np.asarray(state[prefix + "in_proj_bias"]), 3)
    out = np.asarray(state[prefix + "out_proj.weight"]).T
    no_bias = np.zeros(out.shape[1], out.dtype)
    params = {
        name: {"kernel": weight.T, "bias": bias}
        for name, weight, bias in zip(
            ("query", "key", "value"), weights, biases, strict=True
        )
    }
    params["out"] = {
        "kernel": out,
        "bias": np.asarray(state.get(prefix + "out_proj.bias", no_bias)),
    }
    return params


def to_torch(params: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: names of torch and NumPy arrays."""
    names = ("query", "key", "value")
    weights = [np.asarray(params[name]["kernel"]).T for name in names]
    state = {
        "in_proj_bias": np.concatenate([np.asarray(params[n]["bias"]) for n in names]),
        "out_proj.weight": np.asarray(params["out"]["kernel"]).T,
        "out_proj.bias": np.asarray(params["out"]["bias"]),
    }
    if len({weight.shape for weight in weights}) == 1:
        state["in_proj_weight"] = np.concatenate(weights)
    else:
        state |= {f"{x}_proj_weight": w for x, w in zip("qkv", weights, strict=True)}
    return {prefix + name: value for name, value in state.items()}
