"""Decoding: sequences out of a model that predicts the next token.

All functions are driven by a `step(cache, tokens [batch]) -> (logits [batch, K],
cache)`, such as `decode_step` of a model here, where every array in the cache has the
batch for its first axis, and run in one `lax.while_loop`, which may be jitted. Padding
is token 0. A sequence ends with its first `eos`, which belongs to it, or is cut after
max_length tokens.

    model.apply(variables, cache, tokens, method="decode_step")

With a beam of one, `beam_search` is `greedy`, and no beam answers anything worse.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Step = Callable[[Any, jax.Array], tuple[jax.Array, Any]]


def greedy(
    step: Step, cache: Any, first_tokens: jax.Array, max_length: int, eos: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The most probable next token, again and again.

    Args:
      step: the model, see the module.
      cache: its state before the first tokens.
      first_tokens: integers [batch], which are read first and are not in the result.
      max_length: how many tokens a sequence has at most.
      eos: the token that ends a sequence.

    Returns:
      tokens: int32 [batch, max_length], 0 after the end.
      lengths: int32 [batch], with eos.
      log_probabilities: float32 [batch], of the tokens with eos.
    """
    return _generate(
        step,
        cache,
        first_tokens,
        max_length,
        eos,
        lambda i, logits: jnp.argmax(logits, axis=-1),
    )


def sample(
    step: Step,
    cache: Any,
    first_tokens: jax.Array,
    max_length: int,
    eos: int,
    key: jax.Array,
    temperature: jax.Array | float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Random next tokens, `p_i ∝ exp(logit_i / temperature)` of those that are left.

    Args:
      step, cache, first_tokens, max_length, eos: see `greedy`.
      key: draws the tokens.
      temperature: positive; below one the probable gains, above one it loses.
      top_k: None, or how many of the most probable tokens are left (Fan et al. 2018,
        arXiv 1805.04833).
      top_p: None, or in (0, 1]: the fewest most probable tokens are left that have this
        probability together, at the temperature and of the top_k (nucleus sampling,
        Holtzman et al. 2020, arXiv 1904.09751).

    Returns:
      As `greedy`; log_probabilities are those of the model, without temperature, top_k
      and top_p.

    Raises:
      ValueError: temperature, top_k or top_p is out of range.
    """
    if isinstance(temperature, int | float) and temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or more, not {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], not {top_p}.")

    def choose(i: jax.Array, logits: jax.Array) -> jax.Array:
        kept = keep_probable(logits / temperature, top_k, top_p)
        return jax.random.categorical(jax.random.fold_in(key, i), kept)

    return _generate(step, cache, first_tokens, max_length, eos, choose)


def keep_probable(
    logits: jax.Array, top_k: int | None = None, top_p: float | None = None
) -> jax.Array:
    """Logits [..., K], -inf where `sample` draws no token.

    Of equal logits at the border the lower tokens are left.
    """
    size = logits.shape[-1]
    if top_k is None and top_p is None:
        return logits
    values, tokens = jax.lax.top_k(logits, size if top_k is None else min(top_k, size))
    if top_p is not None:
        probabilities = jax.nn.softmax(values)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The first is left even if rounding says otherwise.
        kept = (before < top_p).at[..., 0].set(True)
        values = jnp.where(kept, values, -jnp.inf)
    empty = jnp.full_like(logits, -jnp.inf)
    return jnp.put_along_axis(empty, tokens, values, axis=-1, inplace=False)


def beam_search(
    step: Step,
    cache: Any,
    first_tokens: jax.Array,
    max_length: int,
    eos: int,
    beam_size: int = 4,
    length_penalty: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sequences of highest score that a beam of beam_size finds.

    At every step the continuations of all sequences of the beam, and those that have
    ended, compete for its places by their score

        log p / ((5 + length) / 6)^length_penalty

    (Wu et al. 2016, arXiv 1609.08144). The greedy sequence, which may be overtaken
    half way by others that end worse, always keeps a place: the best sequence never
    scores below it. A beam as large as the number of sequences is an exhaustive search.

    Args:
      step, cache, first_tokens, max_length, eos: see `greedy`.
      beam_size: how many sequences are followed and returned.
      length_penalty: 0 compares log-probabilities, more favours long sequences.

    Returns:
      tokens: int32 [batch, beam, max_length], the best first, 0 after the end.
      lengths: int32 [batch, beam], with eos.
      log_probabilities: float32 [batch, beam]; -inf where there are fewer sequences.

    Raises:
      ValueError: beam_size is less than one.
    """
    if beam_size < 1:
        raise ValueError(f"beam_size must be 1 or more, not {beam_size}.")
    batch = len(first_tokens)
    shape = (batch, beam_size)

    def rows(x: jax.Array) -> jax.Array:  # [batch, beam, ...] -> [batch * beam, ...]
        return x.reshape(batch * beam_size, *x.shape[2:])

    def score(log_probabilities: jax.Array, lengths: jax.Array) -> jax.Array:
        return log_probabilities / ((5 + lengths) / 6) ** length_penalty

    def advance(state):
        i, cache, last, tokens, lengths, log_p, ended, greedy_place = state
        logits, changed = step(cache, rows(last))
        size = logits.shape[-1]
        logits = logits.astype(jnp.float32).reshape(*shape, size)
        # By the logits, as `greedy` has it: logarithms of probabilities round, so that
        # they can be equal where logits are not.
        likeliest = jnp.where(ended, 0, jnp.argmax(logits, axis=-1))
        # What has ended goes on by padding, for nothing.
        padding = jnp.where(jnp.arange(size) == 0, 0.0, -jnp.inf)
        gains = jnp.where(ended[..., None], padding, jax.nn.log_softmax(logits))
        totals = log_p[..., None] + gains
        grown = lengths + ~ended
        scores = score(totals, grown[..., None])
        _, best = jax.lax.top_k(scores.reshape(batch, -1), beam_size)
        best, greedy_place = keep_greedy(best, likeliest, greedy_place, size)
        parent, token = best // size, (best % size).astype(jnp.int32)

        def inherit(x: jax.Array) -> jax.Array:  # of [batch, beam, ...]
            index = parent.reshape(*shape, *(1,) * (x.ndim - 2))
            return jnp.take_along_axis(x, index, axis=1)

        def move(old: jax.Array, new: jax.Array) -> jax.Array:
            # What no step changes, such as a source, is the same in all of the beam.
            if new is old:
                return old
            return rows(inherit(new.reshape(*shape, *new.shape[1:])))

        cache = jax.tree.map(move, cache, changed)
        log_p = jnp.take_along_axis(totals.reshape(batch, -1), best, axis=1)
        tokens = inherit(tokens).at[:, :, i].set(token)
        ended = inherit(ended) | (token == eos)
        lengths = inherit(grown)
        return i + 1, cache, token, tokens, lengths, log_p, ended, greedy_place

    def keep_greedy(best, likeliest, place, size):
        """Gives the greedy sequence the last place where it has none."""
        token = jnp.take_along_axis(likeliest, place[:, None], axis=1)[:, 0]
        continuation = place * size + token
        found = best == continuation[:, None]  # [batch, beam]
        missing = ~found.any(1)
        last = jnp.arange(beam_size) == beam_size - 1
        best = jnp.where(missing[:, None] & last, continuation[:, None], best)
        return best, jnp.where(missing, beam_size - 1, jnp.argmax(found, axis=1))

    def unfinished(state):
        i, *_, ended, _ = state
        return (i < max_length) & ~jnp.all(ended)

    # All of the beam are the same at first: one of them counts.
    log_p = jnp.where(jnp.arange(beam_size) == 0, 0.0, -jnp.inf)
    state = (
        0,
        jax.tree.map(lambda x: jnp.repeat(x, beam_size, axis=0), cache),
        jnp.broadcast_to(first_tokens.astype(jnp.int32)[:, None], shape),
        jnp.zeros((*shape, max_length), jnp.int32),
        jnp.zeros(shape, jnp.int32),
        jnp.broadcast_to(log_p, shape),
        jnp.zeros(shape, bool),
        jnp.zeros(batch, jnp.int32),
    )
    *_, tokens, lengths, log_p, _, _ = jax.lax.while_loop(unfinished, advance, state)
    order = jnp.argsort(-score(log_p, lengths), axis=1)
    return (
        jnp.take_along_axis(tokens, order[..., None], axis=1),
        jnp.take_along_axis(lengths, order, axis=1),
        jnp.take_along_axis(log_p, order, axis=1),
    )


def _generate(step, cache, first_tokens, max_length, eos, choose):
    def advance(state):
        i, cache, last, tokens, lengths, log_p, ended = state
        logits, cache = step(cache, last)
        logits = logits.astype(jnp.float32)
        token = choose(i, logits).astype(jnp.int32)
        gains = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)
        log_p = log_p + jnp.where(ended, 0, gains[:, 0])
        token = jnp.where(ended, 0, token)
        tokens = tokens.at[:, i].set(token)
        return (
            i + 1,
            cache,
            token,
            tokens,
            lengths + ~ended,
            log_p,
            ended | (token == eos),
        )

    def unfinished(state):
        i, *_, ended = state
        return (i < max_length) & ~jnp.all(ended)

    batch = len(first_tokens)
    state = (
        0,
        cache,
        first_tokens.astype(jnp.int32),
        jnp.zeros((batch, max_length), jnp.int32),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, jnp.float32),
        jnp.zeros(batch, bool),
    )
    *_, tokens, lengths, log_p, _ = jax.lax.while_loop(unfinished, advance, state)
    return tokens, lengths, log_p
