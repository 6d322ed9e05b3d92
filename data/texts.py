"""Texts: characters of Shakespeare, words of any file, opinions on films."""

import dataclasses
import functools
import os
import re
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from data import originals, samplers, sequences
from data.datasets import DataError, Spec
from data.originals import Original
from data.sequences import Vocabulary

_SPLITS = ("train", "validation", "test")

SHAKESPEARE = Original(
    "tinyshakespeare.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
    "input.txt",
)


@dataclasses.dataclass(frozen=True)
class TinyShakespeare:
    """A million characters of Shakespeare's plays, to be told one by one.

    The last tenth of the file is the test split: it is what nanoGPT calls validation,
    on which its figures are. `validation_fraction` of the first nine tenths, at their
    end, is the validation split. Each character is a token; the vocabulary is that of
    the train split.

    Chance: ln 65 = 4.17 nats a character; the characters' frequencies, about 3.3.

    Karpathy, "The unreasonable effectiveness of recurrent neural networks", 2015. The
    plays are in the public domain. For truncated backpropagation through time see
    `samplers.stream_batch` of `arrays["train"]["stream"]`.

    Attributes:
        length: characters of a window.
        data_dir: see `data.load`.
        source_dir: a folder with the file as tinyshakespeare.txt or input.txt.
        download: whether a missing file may be downloaded.
        validation_fraction: in (0, 1).
    """

    length: int = 128
    data_dir: str | os.PathLike | None = None
    source_dir: str | os.PathLike | None = None
    download: bool = False
    validation_fraction: float = 0.05

    predicts_next: ClassVar[bool] = True

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"length must be 1 or more, not {self.length}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                "validation_fraction must lie between 0 and 1, "
                f"not {self.validation_fraction}"
            )

    @functools.cached_property
    def _texts(self) -> tuple[dict[str, str], str]:
        splits, source = originals.examples(
            "tiny_shakespeare",
            {"text": SHAKESPEARE},
            lambda contents: {"train": [{"text": contents["text"].decode()}]},
            {"text": str},
            data_dir=self.data_dir,
            source_dir=self.source_dir,
            download=self.download,
        )
        text = splits["train"][0]["text"]
        test = int(0.9 * len(text))
        validation = round((1 - self.validation_fraction) * test)
        parts = text[:validation], text[validation:test], text[test:]
        return dict(zip(_SPLITS, parts, strict=True)), source

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """Characters of the train split."""
        return Vocabulary.of([self._texts[0]["train"]])

    @property
    def spec(self) -> Spec:
        """A character a step, given those before; `sizes` counts characters."""
        texts, source = self._texts
        return sequences.spec(
            "tiny_shakespeare",
            len(self.vocabulary),
            vocabulary_size=len(self.vocabulary),
            sizes={split: len(text) for split, text in texts.items()},
            source=source,
            licence="public domain",
            citation="Karpathy, The unreasonable effectiveness of recurrent neural "
            "networks, 2015",
            homepage="https://github.com/karpathy/char-rnn",
        )

    @functools.cached_property
    def arrays(self) -> dict:
        """{split: {"stream": int32 [characters]}}."""
        return {
            split: {"stream": jnp.asarray(self.encode(text), jnp.int32)}
            for split, text in self._texts[0].items()
        }

    def sample(
        self, key: jax.Array, num_sequences: int, split: str, arrays: dict
    ) -> dict:
        """Draws windows from anywhere in a split.

        Args:
            key: PRNG key.
            num_sequences: how many.
            split: "train", "validation" or "test".
            arrays: `self.arrays`.

        Returns:
            "inputs" and "targets" int32 [n, length], the targets one character ahead;
            "lengths" int32 [n], all `length`; "target_mask" bool [n, length], all True.
        """
        stream = arrays[split]["stream"]
        batch = samplers.random_windows(key, stream, num_sequences, self.length)
        return batch | {"target_mask": jnp.ones(batch["targets"].shape, bool)}

    def encode(self, text: str) -> list[int]:
        """Ids of a text's characters."""
        return self.vocabulary.encode(text)

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids."""
        return "".join(self.vocabulary.decode(ids))

    def token(self, token_id: int) -> str:
        """The character of an id."""
        return self.vocabulary.token(token_id)


@dataclasses.dataclass(frozen=True)
class WordText:
    """The sentences of a text file, to be told word by word.

    Words are runs of letters and digits; each other sign that is no space is a word by
    itself. A sentence that comes again is kept once, so that the splits have none in
    common. The vocabulary is made of the most frequent words of the train split; all
    other words are unknown.

    Chance: ln of the vocabulary's size; the words' frequencies are much better.

    The licence is that of the file.

    Attributes:
        path: a text file in UTF-8, gzipped or not.
        unit: "sentence": sentences end at . ! ? … or at an empty line; "line": each
            line is one.
        vocabulary_limit: most ids, the special ones among them.
        max_words: most words of a sentence among the inputs.
        lowercase: whether capitals are made small.
        validation_fraction: of the sentences.
        test_fraction: of the sentences.
        split_seed: seed of the splits.
        num_buckets: most groups of sentences of alike lengths, see
            `samplers.length_buckets`.
        min_bucket_size: fewest sentences of a group: the largest batch.
    """

    path: str | os.PathLike
    unit: str = "sentence"
    vocabulary_limit: int = 10_000
    max_words: int = 50
    lowercase: bool = True
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    split_seed: int = 0
    num_buckets: int = 8
    min_bucket_size: int = 128

    predicts_next: ClassVar[bool] = True

    def __post_init__(self):
        if self.unit not in ("sentence", "line"):
            raise ValueError(f"unit must be sentence or line, not {self.unit!r}")
        if self.max_words < 1:
            raise ValueError(f"max_words must be 1 or more, not {self.max_words}")
        _check_fractions(self)

    @functools.cached_property
    def _sentences(self) -> dict[str, list[list[str]]]:
        text = _read_text(Path(self.path).expanduser())
        if self.lowercase:
            text = text.lower()
        if self.unit == "line":
            units = text.splitlines()
        else:
            units = re.split(r"(?<=[.!?…])\s+|\n\s*\n", text)
        # One word more than are kept tells that the sentence goes on.
        words = (tuple(split_words(unit)[: self.max_words + 1]) for unit in units)
        found = [list(sentence) for sentence in dict.fromkeys(words) if sentence]
        return dict(zip(_SPLITS, _split(self, found, str(self.path)), strict=True))

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """Words of the train split."""
        return Vocabulary.of(self._sentences["train"], self.vocabulary_limit)

    @property
    def spec(self) -> Spec:
        """A word a step, given those before."""
        return sequences.spec(
            "word_text",
            len(self.vocabulary),
            vocabulary_size=len(self.vocabulary),
            sizes={split: len(rows) for split, rows in self._sentences.items()},
            source=f"file {self.path}",
            licence="not stated",
        )

    @functools.cached_property
    def arrays(self) -> dict:
        """Sentences of each split, sorted by length.

        {split: {"inputs": int32 [n, time], "targets": int32 [n, time], "lengths": int32
        [n]}}: BOS and the words, and the words and EOS. Of a longer sentence than
        `max_words` the inputs are its first words, and no EOS follows.
        """
        arrays = {}
        for split, sentences in self._sentences.items():
            rows = [
                [sequences.BOS, *self.vocabulary.encode(words), sequences.EOS]
                for words in sorted(sentences, key=len)
            ]
            rows = [row[: self.max_words + 2] for row in rows]
            inputs, lengths = sequences.pad([row[:-1] for row in rows])
            targets, _ = sequences.pad([row[1:] for row in rows])
            arrays[split] = _on_device(inputs=inputs, targets=targets, lengths=lengths)
        return arrays

    @functools.cached_property
    def buckets(self) -> tuple[tuple[int, int, int], ...]:
        """(start, stop, length) of sentences of alike lengths in the train split."""
        lengths = np.asarray(self.arrays["train"]["lengths"])
        return samplers.length_buckets(lengths, self.num_buckets, self.min_bucket_size)

    def select(self, indices: jax.Array, split: str, arrays: dict) -> dict:
        """Sentences of given indices.

        Args:
            indices: int [n], of sentences of the split.
            split: "train", "validation" or "test".
            arrays: `self.arrays`.

        Returns:
            "inputs" and "targets" int32 [n, time]; "lengths" int32 [n]; "target_mask"
            bool [n, time].
        """
        rows = sequences.select(arrays[split], indices)
        return rows | {"target_mask": rows["targets"] != sequences.PADDING}

    def encode(self, text: str) -> list[int]:
        """Ids of a text's words."""
        return self.vocabulary.encode(
            split_words(text.lower() if self.lowercase else text)
        )

    def decode(self, ids: np.ndarray) -> str:
        """The words of ids, with a space between them."""
        return " ".join(self.vocabulary.decode(ids))

    def token(self, token_id: int) -> str:
        """The word of an id."""
        return self.vocabulary.token(token_id)


def split_words(text: str) -> list[str]:
    """Runs of letters and digits, and every other sign that is no space."""
    return re.findall(r"\w+|[^\w\s]", text)


_POLARITY = (
    "https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/corpora/"
    "sentence_polarity.zip"
)
POLARITIES = {
    "negative": Original(
        "sentence_polarity/rt-polarity.neg",
        "614274f81185a850e5a88d533d4679f916d6f62e9af6f0b4ec71fb94bf466ea5",
        _POLARITY,
        "sentence_polarity.zip",
    ),
    "positive": Original(
        "sentence_polarity/rt-polarity.pos",
        "c2dc6b2f55bcf725725372916287cc3f8f9b19402edaa9167de5287cb3ade421",
        _POLARITY,
        "sentence_polarity.zip",
    ),
}


@dataclasses.dataclass(frozen=True)
class MovieSentences:
    """10,662 sentences of film reviews, one half of them in favour.

    Sentences are as published: in small letters, words and signs separated by spaces.
    There is no official split; here it is by `split_seed`, with as many sentences for
    as against in each split. (Published figures are mostly means of ten folds.) The
    vocabulary is made of the most frequent words of the train split.

    Chance: one half.

    Pang and Lee, "Seeing stars: exploiting class relationships for sentiment
    categorization with respect to rating scales", ACL 2005; sentence polarity dataset
    1.0, CC BY 4.0 as distributed with NLTK.

    Attributes:
        data_dir: see `data.load`.
        source_dir: a folder with sentence_polarity.zip, or with rt-polarity.neg and
            rt-polarity.pos.
        download: whether a missing file may be downloaded.
        min_count: a word that the train split has less often is unknown.
        validation_fraction: of the sentences.
        test_fraction: of the sentences.
        split_seed: seed of the splits.
        num_buckets: most groups of sentences of alike lengths, see
            `samplers.length_buckets`.
        min_bucket_size: fewest sentences of a group: the largest batch.
    """

    data_dir: str | os.PathLike | None = None
    source_dir: str | os.PathLike | None = None
    download: bool = False
    min_count: int = 2
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    split_seed: int = 0
    num_buckets: int = 8
    min_bucket_size: int = 128

    classes: ClassVar[tuple[str, str]] = ("negative", "positive")

    def __post_init__(self):
        _check_fractions(self)

    @functools.cached_property
    def _read(self) -> tuple[dict[str, list[tuple[list[str], int]]], str]:
        """{split: [(words, class)]}, and where they are from."""
        stored, source = originals.examples(
            "movie_sentences",
            POLARITIES,
            self._parse,
            {"text": str, "label": int},
            data_dir=self.data_dir,
            source_dir=self.source_dir,
            download=self.download,
        )
        splits: dict[str, list] = {split: [] for split in _SPLITS}
        for label, name in enumerate(self.classes):
            rows = [row for row in stored["train"] if row["label"] == label]
            lines = [row["text"].split() for row in rows]
            parts = _split(self, lines, POLARITIES[name].name)
            for split, part in zip(_SPLITS, parts, strict=True):
                splits[split] += [(words, label) for words in part]
        return splits, source

    def _parse(self, contents: dict[str, bytes]) -> dict[str, list[dict]]:
        return {
            "train": [
                {"text": line, "label": label}
                for label, name in enumerate(self.classes)
                for line in contents[name].decode().splitlines()
            ]
        }

    @property
    def sentences(self) -> dict[str, list[tuple[list[str], int]]]:
        """{split: [(words, class)]}."""
        return self._read[0]

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """Words of the train split."""
        train = self.sentences["train"]
        return Vocabulary.of((words for words, _ in train), min_count=self.min_count)

    @property
    def spec(self) -> Spec:
        """Two classes of sentences."""
        splits, source = self._read
        return sequences.spec(
            "movie_sentences",
            2,
            class_names=self.classes,
            vocabulary_size=len(self.vocabulary),
            feature_shape=(self._longest,),
            sizes={split: len(rows) for split, rows in splits.items()},
            source=source,
            licence="CC BY 4.0",
            citation="Pang and Lee, Seeing stars: exploiting class relationships for "
            "sentiment categorization with respect to rating scales, ACL 2005",
            homepage="https://www.cs.cornell.edu/people/pabo/movie-review-data/",
        )

    @functools.cached_property
    def _longest(self) -> int:
        rows = self.sentences.values()
        return max(len(words) for pairs in rows for words, _ in pairs)

    # As a `Dataset`: sentences are labelled examples, of which bags may be drawn.

    shift: ClassVar[np.float32] = np.float32(0)
    scale: ClassVar[np.float32] = np.float32(1)

    @functools.cached_property
    def splits(self) -> dict[str, dict[str, np.ndarray]]:
        """{split: {"inputs": int32 [n, longest], 0 after the end, "labels": [n]}}."""
        splits = {}
        for split, rows in self.arrays.items():
            inputs = np.asarray(rows["inputs"])
            inputs = np.pad(inputs, ((0, 0), (0, self._longest - inputs.shape[1])))
            splits[split] = {"inputs": inputs, "labels": np.asarray(rows["targets"])}
        return splits

    # As sequences.

    @functools.cached_property
    def arrays(self) -> dict:
        """Sentences of each split, sorted by length.

        {split: {"inputs": int32 [n, time], "lengths": int32 [n], "targets": int32
        [n]}}.
        """
        arrays = {}
        for split, pairs in self.sentences.items():
            pairs = sorted(pairs, key=lambda pair: len(pair[0]))
            inputs, lengths = sequences.pad(
                [self.vocabulary.encode(words) for words, _ in pairs]
            )
            labels = np.array([label for _, label in pairs], np.int32)
            arrays[split] = _on_device(inputs=inputs, lengths=lengths, targets=labels)
        return arrays

    @functools.cached_property
    def buckets(self) -> tuple[tuple[int, int, int], ...]:
        """(start, stop, length) of sentences of alike lengths in the train split."""
        lengths = np.asarray(self.arrays["train"]["lengths"])
        return samplers.length_buckets(lengths, self.num_buckets, self.min_bucket_size)

    def select(self, indices: jax.Array, split: str, arrays: dict) -> dict:
        """Sentences of given indices.

        Args:
            indices: int [n], of sentences of the split.
            split: "train", "validation" or "test".
            arrays: `self.arrays`.

        Returns:
            "inputs" int32 [n, time], ids of words; "lengths" int32 [n]; "targets" int32
            [n], 1 for sentences in favour.
        """
        return sequences.select(arrays[split], indices)

    def encode(self, text: str) -> list[int]:
        """Ids of the words of any sentence, taken apart as the published ones."""
        # "it's" and "well-made" are words there.
        words = re.findall(r"\w+(?:['-]\w+)*|[^\w\s]", text.lower())
        return self.vocabulary.encode(words)

    def decode(self, ids: np.ndarray) -> str:
        """The words of ids, with a space between them."""
        return " ".join(self.vocabulary.decode(ids))

    def token(self, token_id: int) -> str:
        """The word of an id."""
        return self.vocabulary.token(token_id)


def _on_device(**arrays: np.ndarray) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.asarray, arrays)


def _check_fractions(dataset) -> None:
    for name in ("validation_fraction", "test_fraction"):
        if not 0 < getattr(dataset, name) < 1:
            raise ValueError(
                f"{name} must lie between 0 and 1, not {getattr(dataset, name)}"
            )
    total = dataset.validation_fraction + dataset.test_fraction
    if total >= 1:
        raise ValueError(
            "validation_fraction and test_fraction must leave something to learn from, "
            f"not add up to {total:g}"
        )


def _split(dataset, examples: list, source: str) -> list[list]:
    """Examples of train, validation and test, by the dataset's seed."""
    order = np.random.default_rng(dataset.split_seed).permutation(len(examples))
    shares = [dataset.test_fraction, dataset.validation_fraction]
    ends = np.round(np.cumsum(shares) * len(examples)).astype(int)
    test, validation, train = np.split(order, ends)
    if not (len(test) and len(validation) and len(train)):
        raise DataError(
            f"{source} holds {len(examples)} sentences, too few for three splits."
        )
    return [[examples[i] for i in part] for part in (train, validation, test)]


def _read_text(path: Path) -> str:
    import gzip

    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text in UTF-8: {error}.") from error
