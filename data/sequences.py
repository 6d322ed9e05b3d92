"""What datasets of sequences share: ids of tokens, vocabularies, padding, selection."""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from data.datasets import Spec

PADDING, BOS, EOS, UNKNOWN = range(4)
"""Ids of padding, begin and end of a sequence, and unknown tokens, everywhere."""

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, the special ones first.

    Attributes:
        words: the tokens of the ids from 4 on.
    """

    words: tuple[str, ...]

    @classmethod
    def of(
        cls,
        texts: Iterable[Iterable[str]],
        limit: int | None = None,
        min_count: int = 1,
    ) -> "Vocabulary":
        """The most frequent tokens, ties in the order of their characters.

        Args:
            texts: tokens of each text.
            limit: largest size, the special tokens among it; None: all tokens.
            min_count: tokens that are rarer are left out.

        Returns:
            A `Vocabulary`.

        Raises:
            ValueError: `limit` leaves no place for a word.
        """
        if limit is not None and limit <= len(SPECIAL_TOKENS):
            raise ValueError(f"limit must be above {len(SPECIAL_TOKENS)}, not {limit}")
        counts = collections.Counter(token for text in texts for token in text)
        kept = [token for token, count in counts.items() if count >= min_count]
        ranked = sorted(kept, key=lambda token: (-counts[token], token))
        size = None if limit is None else limit - len(SPECIAL_TOKENS)
        return cls(tuple(ranked[:size]))

    def __len__(self) -> int:
        return len(SPECIAL_TOKENS) + len(self.words)

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words, len(SPECIAL_TOKENS))}

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """Ids of tokens; what is not in the vocabulary is unknown."""
        return [self._ids.get(token, UNKNOWN) for token in tokens]

    def token(self, token_id: int) -> str:
        """The token of an id, a special one as "<pad>"."""
        return (SPECIAL_TOKENS + self.words)[token_id]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Tokens of ids up to the end of the sequence, without BOS and padding."""
        return [self.token(i) for i in real_ids(ids)]


def real_ids(ids: Iterable[int]) -> list[int]:
    """Ids up to the first EOS, without it, BOS and padding."""
    ids = [int(i) for i in ids]
    if EOS in ids:
        ids = ids[: ids.index(EOS)]
    return [i for i in ids if i not in (PADDING, BOS)]


def pad(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as one array.

    Returns:
        int32 [n, longest], zero at padding, and lengths int32 [n].
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    array = np.zeros((len(rows), lengths.max(initial=1)), np.int32)
    array[np.arange(array.shape[1]) < lengths[:, None]] = [
        i for row in rows for i in row
    ]
    return array, lengths


def select(arrays: Mapping[str, jax.Array], indices: jax.Array) -> dict:
    """Rows of all arrays of a split."""
    return {name: array[indices] for name, array in arrays.items()}


def compact(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Moves what is not padding to the left, in its order.

    Args:
        tokens: int [..., width].

    Returns:
        int [..., width] and lengths int32 [...].
    """
    order = jnp.argsort(tokens == PADDING, axis=-1, stable=True)
    lengths = (tokens != PADDING).sum(-1, dtype=jnp.int32)
    return jnp.take_along_axis(tokens, order, axis=-1), lengths


def spec(name: str, num_classes: int, **fields) -> Spec:
    """A spec; what is not given is that of a generated dataset of ids."""
    defaults = {
        "feature_shape": (),
        "class_names": (),
        "sizes": {},
        "source": "generated",
        "licence": "",
        "citation": "",
        "homepage": "",
    }
    return Spec(name=name, num_classes=num_classes, **defaults | fields)
