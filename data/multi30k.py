"""Multi30k: descriptions of photographs in English, German and French."""

import dataclasses
import functools
import hashlib
import io
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from data import originals, samplers, sequences
from data.datasets import DataError, Spec, cache_dir
from data.originals import Original

_URL = "https://github.com/multi30k/dataset/raw/master/data/task1/raw/"
_SHA256 = {
    "train.en": "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6",
    "train.de": "2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72",
    "train.fr": "5925a3c18f1587b6b54b87743106e6e8ab93618edb6f65d19eac0621f853a10d",
    "val.en": "1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227",
    "val.de": "660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660",
    "val.fr": "5304e444d842e962b2dda4d816b70b22a1765b15401642b7ca37a67477e708dc",
    "test_2016_flickr.en": (
        "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182"
    ),
    "test_2016_flickr.de": (
        "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16"
    ),
    "test_2016_flickr.fr": (
        "cb3160d69b002bb638e66cc7612fcd56cb0af82eadc9c142dedc438afb885ef6"
    ),
}
ORIGINALS = {
    name: Original(name, sha256, f"{_URL}{name}.gz") for name, sha256 in _SHA256.items()
}
_FILES = {"train": "train", "validation": "val", "test": "test_2016_flickr"}


@dataclasses.dataclass(frozen=True)
class Multi30k:
    """29,000 descriptions of photographs in English, to be translated.

    The validation split has 1,014 pairs and the test split, "test 2016", 1,000. Tokens
    are sub-words, by byte pair encoding over characters (Sennrich, Haddow and Birch,
    ACL 2016) with one vocabulary for both languages, which is learned from the train
    split alone and kept in `data_dir`. Inputs end with EOS; targets begin with BOS and
    end with EOS.

    Elliott, Frank, Sima'an and Specia, "Multi30K: multilingual English-German image
    descriptions", VL 2016; French by Elliott, Frank, Barrault, Bougares and Specia,
    WMT 2017. Task 1, raw text. The descriptions are those of Flickr30k, for
    non-commercial research.

    Attributes:
        target_language: "de" or "fr".
        data_dir: see `data.load`; sub-words are kept there, too.
        source_dir: a folder with train.en.gz, val.en.gz, test_2016_flickr.en.gz and the
            same of the target language.
        download: whether missing files may be downloaded.
        vocabulary_limit: number of sub-words, the special ones among them.
        lowercase: whether capitals are made small, in both languages.
        num_buckets: most groups of pairs of alike lengths, see
            `samplers.length_buckets`.
        min_bucket_size: fewest pairs of a group: the largest batch.
    """

    target_language: str = "de"
    data_dir: str | os.PathLike | None = None
    source_dir: str | os.PathLike | None = None
    download: bool = False
    vocabulary_limit: int = 8000
    lowercase: bool = True
    num_buckets: int = 8
    min_bucket_size: int = 256

    def __post_init__(self):
        if self.target_language not in ("de", "fr"):
            raise ValueError(
                f"target_language must be de or fr, not {self.target_language!r}"
            )

    @functools.cached_property
    def _read(self) -> tuple[dict[str, list[tuple[str, str]]], str]:
        """{split: [(English, translation)]} as in the files, and where from."""
        languages = "en", self.target_language
        files = [f"{f}.{language}" for f in _FILES.values() for language in languages]
        splits, source = originals.examples(
            "multi30k",
            {file: ORIGINALS[file] for file in files},
            self._parse,
            dict.fromkeys(languages, str),
            data_dir=self.data_dir,
            source_dir=self.source_dir,
            download=self.download,
        )

        pairs = {
            split: [tuple(row[language] for language in languages) for row in rows]
            for split, rows in splits.items()
        }
        if self.lowercase:
            pairs = {
                split: [tuple(map(str.lower, pair)) for pair in rows]
                for split, rows in pairs.items()
            }
        return pairs, source

    def _parse(self, contents: dict[str, bytes]) -> dict[str, list[dict]]:
        languages = "en", self.target_language
        splits = {}
        for split, file in _FILES.items():
            columns = [
                contents[f"{file}.{language}"].decode().strip("\n").split("\n")
                for language in languages
            ]
            if len(columns[0]) != len(columns[1]):
                raise DataError(
                    f"{file}.en has {len(columns[0])} lines, but "
                    f"{file}.{self.target_language} has {len(columns[1])}."
                )
            splits[split] = [
                {key: line.strip() for key, line in zip(languages, row, strict=True)}
                for row in zip(*columns, strict=True)
            ]
        return splits

    @functools.cached_property
    def _subwords(self):
        """The sub-word model: learned once, then read."""
        import sentencepiece

        lines = [
            line for pair in zip(*self._read[0]["train"], strict=True) for line in pair
        ]
        options = {
            "vocab_size": self.vocabulary_limit,
            "model_type": "bpe",
            "character_coverage": 1.0,
            "normalization_rule_name": "identity",
            "pad_id": sequences.PADDING,
            "bos_id": sequences.BOS,
            "eos_id": sequences.EOS,
            "unk_id": sequences.UNKNOWN,
        }
        # Whatever the model depends on is in its name.
        made_of = repr((sentencepiece.__version__, sorted(options.items()), lines))
        digest = hashlib.sha256(made_of.encode()).hexdigest()[:16]
        folder = cache_dir(self.data_dir) / "subwords"
        path = folder / f"multi30k-en-{self.target_language}-{digest}.model"
        try:
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                _learn(lines, options, path)
            model = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{path} cannot be written or read: {error}. Another data_dir may help."
            ) from error
        return sentencepiece.SentencePieceProcessor(model_proto=model)

    @property
    def spec(self) -> Spec:
        """A sub-word a step, given the English and the sub-words before."""
        pairs, source = self._read
        size = self._subwords.get_piece_size()
        return sequences.spec(
            f"multi30k_en_{self.target_language}",
            size,
            vocabulary_size=size,
            source_vocabulary_size=size,
            sizes={split: len(rows) for split, rows in pairs.items()},
            source=source,
            licence="for non-commercial research",
            citation="Elliott, Frank, Sima'an and Specia, Multi30K: multilingual "
            "English-German image descriptions, VL 2016",
            homepage="https://github.com/multi30k/dataset",
        )

    @functools.cached_property
    def _sorted(self) -> dict[str, list[tuple[list[int], list[int], str, str]]]:
        """{split: [(source, target, English, translation)]} by the longer length."""
        found = {}
        for split, pairs in self._read[0].items():
            sources, targets = (
                self._subwords.encode(list(lines)) for lines in zip(*pairs, strict=True)
            )
            rows = [
                (
                    [*source, sequences.EOS],
                    [sequences.BOS, *target, sequences.EOS],
                    *pair,
                )
                for source, target, pair in zip(sources, targets, pairs, strict=True)
            ]
            found[split] = sorted(rows, key=lambda row: max(map(len, row[:2])))
        return found

    @functools.cached_property
    def texts(self) -> dict[str, list[tuple[str, str]]]:
        """{split: [(English, translation)]}, in the order of `arrays`."""
        return {s: [row[2:] for row in rows] for s, rows in self._sorted.items()}

    @functools.cached_property
    def arrays(self) -> dict:
        """Pairs of each split, sorted by the longer one's length.

        {split: {"inputs": int32 [n, time], "lengths": int32 [n], "targets": int32
        [n, time], "target_lengths": int32 [n]}}.
        """
        arrays = {}
        for split, rows in self._sorted.items():
            inputs, lengths = sequences.pad([row[0] for row in rows])
            targets, target_lengths = sequences.pad([row[1] for row in rows])
            parts = inputs, lengths, targets, target_lengths
            names = "inputs", "lengths", "targets", "target_lengths"
            arrays[split] = dict(zip(names, map(jnp.asarray, parts), strict=True))
        return arrays

    @functools.cached_property
    def buckets(self) -> tuple[tuple[int, int, int], ...]:
        """(start, stop, length) of pairs of alike lengths in the train split.

        The length is that of the longest input or target.
        """
        train = self.arrays["train"]
        lengths = np.maximum(train["lengths"], train["target_lengths"])
        return samplers.length_buckets(lengths, self.num_buckets, self.min_bucket_size)

    def select(self, indices: jax.Array, split: str, arrays: dict) -> dict:
        """Pairs of given indices.

        Args:
            indices: int [n], of pairs of the split.
            split: "train", "validation" or "test".
            arrays: `self.arrays`.

        Returns:
            "inputs" int32 [n, time], "lengths" int32 [n], "targets" int32 [n, time],
            "target_lengths" int32 [n], BOS and EOS being counted.
        """
        return sequences.select(arrays[split], indices)

    def encode(self, text: str) -> list[int]:
        """Ids of the sub-words of a text and EOS, as those of inputs."""
        text = text.lower() if self.lowercase else text
        return [*self._subwords.encode(text), sequences.EOS]

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids, in either language."""
        return self._subwords.decode(sequences.real_ids(ids))

    def token(self, token_id: int) -> str:
        """The sub-word of an id, in either language; "▁" begins a word."""
        return self._subwords.id_to_piece(int(token_id))


def _learn(lines: list[str], options: dict, path: Path) -> None:
    """The file gets its name only once it is whole."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            num_threads=1,  # the same model on every machine
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        raise DataError(
            f"Sub-words cannot be learned with vocabulary_limit="
            f"{options['vocab_size']}: {error}"
        ) from error
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(model.getvalue())
    part.rename(path)
